"""Parts that every diffusion transformer shares: positions, time features, attention, MLP, patches.

Parameter names are those of the DiT, PixArt and SD3 files (qkv, proj, fc1, fc2, ln_q, ln_k).
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def time_features(t_B, width=256):
    """[cos(t f), sin(t f)], f_k = 10000^(-2k / width): float32 [B, width], t in 0..1000."""
    f = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t_B.device) / (width // 2))
    angle = t_B.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], -1)


# --- positions -----------------------------------------------------------


@functools.lru_cache(maxsize=16)
def sincos_2d(width, rows, cols, base=0, stretch=1.0):
    """Fixed 2-D table [rows * cols, width] float32: the first half encodes the column, the second the row.

    base: grid side at training; positions are scaled to it, then divided by stretch, as PixArt does."""
    w = 1 / 10000 ** (np.arange(width // 4) / (width / 4))

    def wave(p):
        angle = np.outer(p.ravel(), w)
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)
    col, row = np.meshgrid(*(np.arange(n) / (n / base if base else 1) / stretch for n in (cols, rows)))
    return torch.from_numpy(np.concatenate([wave(col), wave(row)], 1)).float()


@functools.lru_cache(maxsize=16)
def rope_2d(head, rows, cols, still=0):
    """cos, sin [still + rows * cols, head]: half of a head turns with the row, half with the column.

    still: tokens in front (text) that do not turn."""
    f = 10000 ** (-torch.arange(head // 4).float() / (head // 4))
    row, col = torch.meshgrid(torch.arange(rows).float(), torch.arange(cols).float(), indexing="ij")
    parts = [p.reshape(-1, 1) * f for p in (row, row, col, col)]
    angle = F.pad(torch.cat(parts, 1), (0, 0, still, 0))
    return angle.cos(), angle.sin()


def rotate(x_BHNK, rope):
    """Apply RoPE: in each half of the head, channel k turns with channel k + K/4."""
    cos, sin = (v.to(x_BHNK) for v in rope)
    a, b, c, d = x_BHNK.chunk(4, -1)
    return x_BHNK * cos + torch.cat([-b, a, -d, c], -1) * sin


# --- layers --------------------------------------------------------------


def norm(x):
    """LayerNorm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x_BND, shift_BD, scale_BD):
    return torch.addcmul(shift_BD[:, None], x_BND, 1 + scale_BD[:, None])


def gate(x_BND, by_BD, change_BND):
    """x + by * change, in one pass."""
    return torch.addcmul(x_BND, by_BD[:, None], change_BND)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


def qk_norms(width, heads, wanted):
    """Two norms of a head's channels, for q and k; they bound the attention logits."""
    return (RMSNorm(width // heads) if wanted else nn.Identity() for _ in "qk")


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over tokens [B, N, D], fused qkv; q and k optionally normalised and
    rotated."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ln_q, self.ln_k = qk_norms(width, heads, qk_norm)

    def split(self, qkv_BNE):
        q, k, v = qkv_BNE.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v

    def project(self, x_BND):
        return self.split(self.qkv(x_BND))

    def joined(self, other, theirs_BLE, ours_BNE):
        """q, k, v of two attentions' fused projections over the tokens of both; one copy without norms."""
        if isinstance(self.ln_q, nn.Identity) and isinstance(other.ln_q, nn.Identity):
            return self.split(torch.cat([theirs_BLE, ours_BNE], 1))
        return (torch.cat(pair, 2) for pair in zip(other.split(theirs_BLE), self.split(ours_BNE)))

    def forward(self, x_BND, rope=None, mask=None):
        q, k, v = self.project(x_BND)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Image tokens read text tokens; mask_BL marks the real ones. Padded tokens have no influence."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.ln_q, self.ln_k = qk_norms(width, heads, qk_norm)

    def forward(self, x_BND, text_BLD, mask_BL=None):
        (B, N, D), K = x_BND.shape, x_BND.shape[-1] // self.heads
        q = self.q_linear(x_BND).view(B, N, self.heads, K).transpose(1, 2)
        k, v = self.kv_linear(text_BLD).view(B, -1, 2, self.heads, K).permute(2, 0, 3, 1, 4)
        mask = None if mask_BL is None else mask_BL[:, None, None].bool()
        out = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, width, hidden, out=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out or width)

    def forward(self, x):
        h = self.fc1(x)                                      # in place saves 4 % of the MLP's time
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return self.fc2(gelu(h, approximate="tanh"))


def patches_to_image(y_BNP, rows, cols, patch):
    """[B, rows * cols, patch * patch * C] with (row, col, channel) inside a patch -> [B, C, rows p, cols p].

    The patch embedding reads (channel, row, col): mixing the two orders is the classic loading bug."""
    B, _, P = y_BNP.shape
    y = y_BNP.view(B, rows, cols, patch, patch, P // patch**2)
    return y.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, cols * patch)
