"""Parts of a language model that are nobody's experiment: norms, convolution, rotary
attention, DeltaNet, SwiGLU.

A sequence mixer maps (x [B,T,D], state dict) -> (y [B,T,D], state dict).  An empty state is a fresh context,
a returned one continues it, so training, scoring, sampling and memorising are the same forward pass.

B sequences  T tokens  D width  H heads  M stacked  K head width
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.flags import UserError
from common.hope.passes import Taps, rms_norm, unit
from common.hope.scan import advance, decays


def cut(x_BTD, heads, parts=1):
    """[B, T, parts D] -> float [B, H, parts, T, K]: states and solves stay in float32 under autocast."""
    B, T, D = x_BTD.shape
    x = x_BTD.unflatten(-1, (parts, heads, D // parts // heads)).permute(0, 3, 2, 1, 4)
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def glue(x_BHMTK):
    return x_BHMTK.squeeze(2).transpose(1, 2).flatten(2)


def linear(i, o, std=0.02, bias=False):
    layer = nn.Linear(i, o, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rates(layer, x_BTD, count):
    """Per-head scalars [B, H, 1, T] from a linear map to count x H numbers -> tuple of count."""
    y = layer(x_BTD)
    y = y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
    return y.view(*y.shape[:2], count, -1).permute(2, 0, 3, 1)[:, :, :, None].unbind(0)


class Conv(nn.Module):
    """Depthwise causal convolution over time."""

    def __init__(self, width, taps):
        super().__init__()
        self.taps = taps
        self.kernel = nn.Parameter(torch.randn(taps, width) * 0.1)
        with torch.no_grad():
            self.kernel[-1] += 1.0                  # near the identity

    def forward(self, x_BTD, tail):
        T, n = x_BTD.shape[1], self.taps - 1
        x = x_BTD if tail is None else torch.cat([tail.to(x_BTD.dtype), x_BTD], 1)
        tail = x[:, max(0, x.shape[1] - n):]
        if tail.shape[1] < n:                       # a context shorter than the taps
            tail = F.pad(tail, (0, 0, n - tail.shape[1], 0))
        return Taps.apply(x.to(self.kernel.dtype), self.kernel, T), tail


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.weight.to(x.dtype))


def rope(x, start, theta=10_000.0):
    """Rotary positions start, start+1, ... on [..., T, K], halves rotated against each other."""
    T, K = x.shape[-2:]
    inverse = theta ** -(torch.arange(0, K, 2, device=x.device, dtype=torch.float32) / K)
    angle = (start + torch.arange(T, device=x.device, dtype=torch.float32))[:, None] * inverse
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions; window > 0: sliding, cost linear
    in T; P always visible."""

    def __init__(self, D, heads, out_std=0.02, window=0, persistent=0):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = linear(D, 3 * D), linear(D, D, out_std)
        self.persistent = nn.Parameter(torch.randn(2, persistent, D) * 0.02) if persistent else None

    def forward(self, x, state):
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        start = state.get("position", 0)
        q, k = rope(q, start), rope(k, start)
        if "kv" in state:
            k, v = torch.cat([state["kv"][0], k], 2), torch.cat([state["kv"][1], v], 2)
        past, W = k.shape[2] - T, self.window
        if not W and self.persistent is None and not past:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            step = W or T
            y = torch.cat([self._block(q[:, :, lo:lo + step], k, v, past + lo) for lo in range(0, T, step)],
                          2)
        keep = slice(max(0, past + T - W + 1), None) if W else slice(None)
        state = dict(kv=(k[:, :, keep], v[:, :, keep]), position=start + T)
        return self.out(y.transpose(1, 2).reshape(B, T, D)), state

    def _block(self, q, k, v, at):
        """Queries at key index at, at+1, ... see the last `window` keys (all when 0)
        and the persistent ones."""
        n, first = q.shape[2], max(0, at - self.window + 1) if self.window else 0
        k, v = k[:, :, first:at + n], v[:, :, first:at + n]
        row = torch.arange(at, at + n, device=q.device)[:, None]
        column = torch.arange(first, at + n, device=q.device)[None]
        seen = (column <= row) & (column > row - self.window if self.window else True)
        if self.persistent is not None:
            shape = 1, -1, self.heads, q.shape[-1]
            pk, pv = (p.to(q.dtype).view(shape).transpose(1, 2).expand(len(q), -1, -1, -1)
                      for p in self.persistent)
            k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
            seen = F.pad(seen, (pk.shape[2], 0), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class DeltaNet(nn.Module):
    """S_t = a S_{t-1} (I - b k k^T) + b v k^T, o = S_t q: Gated DeltaNet; a = 1
    without the gate: DeltaNet."""

    def __init__(self, D, heads, out_std=0.02, gated=False, chunk=64, taps=4):
        super().__init__()
        H = heads
        self.heads, self.chunk, self.gated = H, chunk, gated
        self.qkv, self.beta, self.out = linear(D, 3 * D), linear(D, H), linear(D, D, out_std)
        self.conv, self.norm = Conv(3 * D, taps), RMSNorm(D // H)
        if gated:
            self.decay, self.open = linear(D, H, bias=True), linear(D, D)
            nn.init.uniform_(self.decay.bias, -5.0, -2.0)   # softplus: keeps 0.87 to 0.993
            self.log_rate = nn.Parameter(torch.zeros(H))

    def forward(self, x, state):
        c, tail = self.conv(self.qkv(x), state.get("tail"))
        q, k, v = (cut(p, self.heads) for p in F.silu(c).chunk(3, -1))
        q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
        beta = rates(self.beta, x, 1)[0].sigmoid()
        log_keep = torch.zeros_like(beta)
        if self.gated:
            log_keep = -self.log_rate.exp()[:, None, None] * F.softplus(rates(self.decay, x, 1)[0])
        o, S = delta_net(q, k, v, beta, log_keep, state.get("memory"), self.chunk)
        y = glue(self.norm(o)).to(x.dtype)
        return self.out(y * F.silu(self.open(x)) if self.gated else y), dict(tail=tail, memory=S)


def delta_net(q, k, v, beta, log_keep, S, chunk):
    """Gated delta rule by chunks: q, k, v [..., T, K], beta, log_keep [..., T], S [..., K,
    K] or None -> (o, S)."""
    if S is None:
        S = v.new_zeros(*v.shape[:-2], v.shape[-1], k.shape[-1])
    outs = []
    with torch.autocast(v.device.type, enabled=False):
        for lo in range(0, k.shape[-2], chunk):
            at = slice(lo, lo + chunk)
            x, b, a = k[..., at, :], beta[..., at], log_keep[..., at]
            S, _, out = advance(S, None, x, b[..., None] * v[..., at, :], b * a.exp(), decays(a),
                                q=q[..., at, :])
            outs.append(out)
    return torch.cat(outs, -2), S


def log_sigmoid(x, floor=math.log(1e-3)):
    """Log of a decay in (1e-3, 1): products of it stay finite however long the chunk."""
    return F.logsigmoid(x).clamp(min=floor)


def inverse_softplus(y):
    return math.log(math.expm1(y))


class SwiGLU(nn.Module):
    def __init__(self, D, hidden, out_std=0.02):
        super().__init__()
        self.up, self.down = linear(D, 2 * hidden), linear(hidden, D, out_std)

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


def pieces(total, first, size):
    """Sizes that cut `total` tokens at the boundaries of chunks of `size`, the first of
    which has `first` left."""
    first = min(total, first)
    whole, rest = divmod(total - first, size)
    return [first] + [size] * whole + [rest] * (rest > 0)


def detached(tree):
    if torch.is_tensor(tree):
        return tree.detach()
    if isinstance(tree, dict):
        return {k: detached(v) for k, v in tree.items()}
    return type(tree)(detached(v) for v in tree) if isinstance(tree, (list, tuple)) else tree


def nll(logits_BTV, target_BT):
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1) if logits_BTV.dtype != torch.float64
                           else logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=-1,
                           reduction="none")
    return loss.view_as(target_BT)


def sum_gates(tree):
    """(gates open, gates seen) over all Memory states in a tree of dicts."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, tuple) and len(tree) == 4 and isinstance(tree[3], list):
        return torch.as_tensor(tree[3][0]).detach(), tree[3][1]     # no float(): a GPU would be waited for
    pairs = [sum_gates(t) for t in tree] if isinstance(tree, list) else []
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def pairs(batch, device):
    """A loader's rows -> (input, target) on the device."""
    a, b = batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, 1:])
    return torch.from_numpy(a.copy()).to(device), torch.from_numpy(b.copy()).to(device)


def teach_signal(logits_BTV, target_BT, head_VD):
    """dL/dh at the head's input for the summed cross entropy: (softmax(z) - onehot(y)) W, 0
    where there is no target."""
    p = logits_BTV.softmax(-1)
    p = p - F.one_hot(target_BT.clamp(min=0), p.shape[-1])
    return (p * (target_BT >= 0)[..., None]) @ head_VD


def stacked(theirs, ours, levels):
    """State dict of a headwise CMS of `levels` levels from one of one: its MLP in each, mixed by the mean."""
    made = {}
    for name, value in ours.items():
        head, _, tail = name.partition(".levels.")
        old = theirs.get(f"{head}.levels.0.{tail.split('.')[1]}" if tail else name)
        if name.endswith("cms.mix"):
            old = theirs.get(name, torch.ones(1)).expand(levels) / levels
        if old is None or old.shape != value.shape:
            raise UserError(f"--stack: {name} is not there in the shape {tuple(value.shape)}")
        made[name] = old
    return made
