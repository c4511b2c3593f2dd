"""Steps of the drifting networks as single autograd nodes: fewer passes over memory, the same numbers.

    rms_norm      x / rms(x) * gain over the last axis
    GroupNorm     nn.GroupNorm that keeps channels last, where a CPU's convolutions are fastest
    halve         mean and variance of every 2 x 2 cells of a map

Plain operators save and re-read a tensor at each step; a CPU waits for that traffic, not for arithmetic. Each
node keeps what its closed-form gradient needs. On a GPU rms_norm and GroupNorm are PyTorch's own; inside
torch.compile, which fuses by itself, all three are plain. The slow references are those and halve_reference.

B batch  C channels  G groups  S places of a map  D width
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def _plain(x):
    """Whether PyTorch's own operator is the better one: anywhere but on a CPU, eager."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


# --- normalisations ----------------------------------------------------


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; x and weight of one dtype."""
    return F.rms_norm(x, weight.shape, weight, eps) if _plain(x) else _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms and h = w dy: dx = r h - x r^3 mean(h x); dw = sum of r x dy."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        power = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = power.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        D = len(weight)
        product = dy * x
        dweight = (r.reshape(1, -1) @ product.reshape(-1, D))[0]
        pull = (product.reshape(-1, D) @ weight).view(r.shape).mul_(r.pow(3).div_(-D))
        dx = torch.mul(dy, r, out=product).mul_(weight)
        return dx.addcmul_(x, pull), dweight, None


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm; on a CPU input and output are channels-last in memory (torch.channels_last)."""

    def forward(self, x_BCHW):
        if _plain(x_BCHW):
            return super().forward(x_BCHW)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        return _GroupNorm.apply(x_BCHW, self.weight, self.bias, self.num_groups, self.eps)


def channels_last(net):
    """net, on a CPU with the weights of its convolutions laid out as GroupNorm lays out the maps."""
    cpu = next(net.parameters()).device.type == "cpu"
    return net.to(memory_format=torch.channels_last) if cpu else net


def _rows(x_BCHW):
    """Channels-last map as [B, S, C], no copy."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


class _GroupNorm(torch.autograd.Function):
    """c = x - mean, r = 1 / std, h = w dy: dx = r (h - mean(h) - c r^2 mean(h c)), means over a group."""

    @staticmethod
    def forward(ctx, x_BCHW, weight, bias, groups, eps):
        out = torch.empty_like(x_BCHW)
        x_BSC, y_BSC = _rows(x_BCHW), _rows(out)
        c_BSC = x_BSC - _level(x_BSC.mean(1), groups)
        power_B1C = _level(torch.mul(c_BSC, c_BSC, out=y_BSC).mean(1), groups)
        r_B1C = (power_B1C + eps).rsqrt_()
        torch.addcmul(bias, c_BSC, r_B1C * weight, out=y_BSC)
        ctx.save_for_backward(c_BSC, r_B1C, weight)
        ctx.groups = groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCHW):
        c_BSC, r_B1C, weight = ctx.saved_tensors
        dy_BCHW = dy_BCHW.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(dy_BCHW)
        dy_BSC, dx_BSC = _rows(dy_BCHW), _rows(out)
        dyc_BC, dy_BC = torch.mul(dy_BSC, c_BSC, out=dx_BSC).mean(1), dy_BSC.mean(1)
        offset_B1C, slope_B1C = (_level(v * weight, ctx.groups) for v in (dy_BC, dyc_BC))
        torch.addcmul(offset_B1C * -r_B1C, c_BSC, slope_B1C * -r_B1C ** 3, out=dx_BSC)
        dx_BSC.addcmul_(dy_BSC, r_B1C * weight)
        if not ctx.needs_input_grad[1]:
            return out, None, None, None, None
        S = c_BSC.shape[1]
        return out, S * (dyc_BC * r_B1C[:, 0]).sum(0), S * dy_BC.sum(0), None, None


def _level(v_BC, groups):
    """Mean over the channels of each group, for each of its channels, [B, 1, C]."""
    B, C = v_BC.shape
    return v_BC.view(B, groups, -1).mean(2, keepdim=True).expand(B, groups, C // groups).reshape(B, 1, C)


# --- moments -----------------------------------------------------------


def halve(x_BCHW, inner=0.0):
    """Mean and biased variance of every 2 x 2 cells of a map of even sides -> two maps of half the side.

    inner: where cells are means themselves, the variances they were taken from; a patch's variance is that of
    its cells' means plus the mean of their own.
    """
    mean, var = halve_reference(x_BCHW) if torch.compiler.is_compiling() else _Halve.apply(x_BCHW)
    return mean, var + F.avg_pool2d(inner, 2) if torch.is_tensor(inner) else var


class _Halve(torch.autograd.Function):
    """dx = dmean / 4 + dvar (x - mean) / 2."""

    @staticmethod
    def forward(ctx, x_BCHW):
        mean = F.avg_pool2d(x_BCHW, 2)
        var = torch.zeros_like(mean)
        for cell in _cells(x_BCHW):
            away = cell - mean
            var.addcmul_(away, away, value=0.25)
        ctx.save_for_backward(x_BCHW, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dmean, dvar):
        x_BCHW, mean = ctx.saved_tensors
        slope = dvar / 2
        offset = (dmean / 4).addcmul_(mean, slope, value=-1)
        dx_BCHW = torch.empty_like(x_BCHW)
        for cell, out in zip(_cells(x_BCHW), _cells(dx_BCHW)):
            torch.addcmul(offset, cell, slope, out=out)
        return dx_BCHW


def _cells(x_BCHW):
    """The four cells of every 2 x 2, as views of half the side."""
    return [x_BCHW[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def halve_reference(x_BCHW):
    """The same without inner, one line a step."""
    B, C, H, W = x_BCHW.shape
    cells = x_BCHW.reshape(B, C, H // 2, 2, W // 2, 2)
    return cells.mean((3, 5)), cells.var((3, 5), unbiased=False)


# --- the loss of many features -----------------------------------------


def packs(feats, most=1 << 22):
    """Names of features {key: [N, F, G, C]} in lists of one width C and dtype, at most `most` numbers in one.

    A call of the loss costs as much for ten numbers as for a hundred thousand; a feature above the limit
    stays alone, so that packing never doubles what is large.
    """
    lists = {}
    for key, f in feats.items():
        of_kind = lists.setdefault((f.shape[-1], f.dtype), [[]])
        if of_kind[-1] and sum(feats[k].numel() for k in of_kind[-1]) + f.numel() > most:
            of_kind.append([])
        of_kind[-1].append(key)
    return [pack for of_kind in lists.values() for pack in of_kind]
