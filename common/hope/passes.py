"""Norms and a convolution with their backward by hand: on a CPU half of the passes autograd's graph makes.

B sequences  P rows of the past  T tokens  D width
"""

import torch
import torch.nn.functional as F


class Unit(torch.autograd.Function):
    """y = x / max(|x|, 1e-6), with a backward of half of F.normalize's passes: (g - y y.g) / |x|."""

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        size = norm.clamp(min=1e-6)
        y = (x / size).contiguous()
        ctx.save_for_backward(y, size, norm)
        return y

    @staticmethod
    def backward(ctx, g):
        y, size, norm = ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True) * (norm >= 1e-6)      # below: a mere factor
        return torch.addcmul(g, y, along, value=-1).div_(size)


def unit(x):
    return Unit.apply(x)


class RootMeanSquare(torch.autograd.Function):
    """y = x / sqrt(mean x^2 + eps); the backward, (g - y mean(g y)) / root, in half of autograd's passes."""

    @staticmethod
    def forward(ctx, x, eps):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, g):
        y, inverse = ctx.saved_tensors
        along = (g * y).mean(-1, keepdim=True)
        return torch.addcmul(g, y, along, value=-1).mul_(inverse), None


def rms_norm(x, weight=None, eps=1e-6):
    """[weight] x / sqrt(mean x^2 + eps), last axis: one kernel of PyTorch's on a GPU, many on a CPU."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    y = RootMeanSquare.apply(x, eps)
    return y if weight is None else y * weight


class Taps(torch.autograd.Function):
    """y_t = sum_j kernel[-1-j] x_{t-j} of the last T of x's rows [B,P+T,D]; rows before the first are 0."""

    @staticmethod
    def forward(ctx, x, kernel, T):
        y = x[:, x.shape[1] - T:] * kernel[-1]
        for past, rows, tap in Taps.shifts(x, kernel, T):
            y[:, rows].addcmul_(x[:, past], kernel[tap])
        ctx.save_for_backward(x, kernel)
        ctx.T = T
        return y

    @staticmethod
    def backward(ctx, g):
        x, kernel = ctx.saved_tensors
        gx, P = torch.empty_like(x), x.shape[1] - ctx.T
        gx[:, :P] = 0
        torch.mul(g, kernel[-1], out=gx[:, P:])
        gk = torch.zeros_like(kernel)
        gk[-1] = (g * x[:, P:]).sum((0, 1))
        for past, rows, tap in Taps.shifts(x, kernel, ctx.T):
            gx[:, past].addcmul_(g[:, rows], kernel[tap])
            gk[tap] = (g[:, rows] * x[:, past]).sum((0, 1))
        return gx, gk, None

    @staticmethod
    def shifts(x, kernel, T):
        """(rows of x, the rows of y that see them, tap) for every tap but the last."""
        end = x.shape[1]
        for back in range(1, len(kernel)):
            first = max(0, end - T - back)              # nothing stands before x
            if first < end - back:
                yield slice(first, end - back), slice(first + back - (end - T), None), -1 - back
