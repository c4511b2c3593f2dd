"""A beta-VAE over ARC grids: what does a code of a small coloured picture cost, in nats?

Idea        Encode a grid (1x1 to 30x30 cells, ten colours) as Gaussian latents, decode it, and pay for both:
            cells that come back wrong and nats of code.  beta is the exchange rate: one knob draws the curve.
Paper       beta-VAE (Higgins 2017); annealing after 1804.03599 and 1903.10145; free bits 1606.04934; active
            units 1509.00519.  1811.12359 is why no disentanglement is claimed: ARC has no known factors.
            Grids: ARC-AGI-1 (1911.01547), RE-ARC (2404.07353).  Before: 2311.08083, latent program network.
Reproduces  an open experiment whose 93 % accuracy was black ink: presets paper and paper_literal show how
Run         1 CPU   python beta_vae_arc.py --preset smoke           20 s, loss falls, on grids it makes itself
            1 CPU   python beta_vae_arc.py --data ARC.json,RE-ARC.npz
                    python beta_vae_arc.py evaluate runs/beta_vae_arc/arc
Differs     Height and width are two coordinates of z, held at the normal quantiles of the training sizes;
            the rest of the code exists inside the grid only.  Padding is never coded and never scored, every
            decode is a legal grid, and prior samples have the sizes of the data.  No convolution sees past
            the edge of a grid, so a crop gives the numbers of the canvas, and batches are cropped.
            sigma is exp(logvar/2), not softplus; sums over cells and dimensions, never means (see the docs).

B grids  H W rows, columns of cells (or of patches)  C classes, 10 = outside  D latent dimensions  N samples
L patches in reading order  E channels  Z latents of a patch
"""

import hashlib
import itertools
import json
import math
import pathlib
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import draw, run
from common.arc.plots import curves, maps, picture, prior_page, reconstructions, strip, table
from common.arc.tasks import OUTSIDE, SOURCES, SPLITS, code_nats, grid_statistics, load_corpus, top_up
from common.files import write_atomic
from common.run import UserError, opt

COLORS = 10

# --- config ------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = opt("arc", "a named set of flags, listed below")
    config: str = opt("", "JSON file of flags, such as a run's config.json; flags beat it", free=True)
    out: str = opt("", "run directory, or the .npz that `corpus` writes; empty: runs/beta_vae_arc/PRESET")
    data: str = opt("", "comma-separated files or folders: ARC JSON, RE-ARC, .npz; empty: procedural grids")
    words: tuple = opt(("",), "RUN directory of evaluate, sample and plots", positional=True)
    seed: int = opt(0, "random seed")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    compile: bool = opt(False, "torch.compile the model")
    bf16: bool = opt(True, "bfloat16 matrix products where the hardware has them")
    wandb: str = opt("", "Weights & Biases project; empty: log.jsonl alone")
    json: bool = opt(False, "plan: print one JSON object")
    n: int = opt(0, "procedural grids (0: 100,000 for corpus, else 20,000); corpus --data: grids in all; "
                    "sample: draws (0: 64)")
    baselines: bool = opt(True, "evaluate: nearest grid and PCA too, which take longer than the model")
    split: str = opt("test", "evaluate and plots: which part of the data", choices=("train", "val", "test"))

    latent: str = opt("spatial", "a code per patch, or one global vector", choices=("spatial", "vector"))
    prior: str = opt("normal", "N(0, I), or that through a causal flow", choices=("normal", "causal"))
    sizes: str = opt("coded", "height and width in z, or fixed to the canvas", choices=("coded", "fixed"))
    canvas: int = opt(30, "largest height and width")
    patch: int = opt(2, "spatial: cells per side of a patch")
    zc: int = opt(8, "spatial: latents per patch")
    dim: int = opt(64, "vector: latents in all, the two of the size included")
    width: int = opt(96, "channels (vector: of the first convolution)")
    depth: int = opt(1, "spatial: pairs of 3x3 and pointwise residual blocks on each side")
    hidden: int = opt(1024, "vector: units between convolutions and latents")
    linear: bool = opt(False, "vector: a linear path beside the convolutions, begun at PCA")
    prior_width: int = opt(96, "causal prior: channels")
    prior_depth: int = opt(2, "causal prior: transformer blocks")

    steps: int = opt(900, "optimizer steps; the 50 epochs of the schedule are spread over them")
    batch: int = opt(64, "grids of mean size a step, all ranks together")
    lr: float = opt(4e-3, "peak learning rate of Adam")
    warmup: int = opt(100, "steps of linear learning-rate warm-up")
    clip: float = opt(1.0, "gradient norm limit")
    beta_scale: float = opt(0.05, "beta = beta_scale * beta(epoch): the largest is twice this")
    schedule: str = opt("seed", "beta over the run",
                        choices=("seed", "linear", "constant", "cyclical", "conservative"))
    free_bits: float = opt(0.0, "least KL in nats a dimension is charged for")
    capacity: float = opt(0.0, "C in nats a grid, rising to epoch 30: charge beta |KL - C|; 0: beta KL")
    colors: str = opt("all", "renaming of colours in training", choices=("all", "nonzero", "none"))
    patience: int = opt(10, "stop after so many validations past epoch 30 without a better one; 0: never")


_VECTOR = dict(latent="vector", linear=True, width=32, batch=128, lr=1e-3, beta_scale=0.005, colors="none",
               steps=80)
_PAPER = dict(latent="vector", sizes="fixed", canvas=16, dim=10, width=32, hidden=128, batch=128, lr=1e-3,
              colors="none", patience=10, steps=8000)
PRESETS = {
    "arc": dict(paper="held-out tasks in 10 minutes", expect={}, goal=dict(cell_acc=0.90, nonbg_acc=0.80),
                set={}),
    "fast": dict(paper="the same in half a minute", expect={}, goal=dict(cell_acc=0.90), set=dict(steps=300)),
    "arc_long": dict(paper="the same, longer", expect={}, set=dict(steps=6000),
                     goal=dict(cell_acc=0.97, nonbg_acc=0.92, exact_acc=0.55)),
    "procedural": dict(paper="the same from grids made here, no file", expect={},
                       goal=dict(cell_acc=0.90), set=dict(steps=600)),
    "arc_small": dict(paper="3x3 patches: 802 latents", expect={}, set=dict(patch=3)),
    "arc_code": dict(paper="a code: KL + reconstruction below zlib", expect={}, goal=dict(cell_acc=0.90),
                     set=dict(prior="causal", colors="nonzero", beta_scale=0.2, lr=3e-3, steps=450)),
    "vector10": dict(paper="PCA 10 on ARC", expect={}, goal=dict(cell_acc=0.484), set=dict(_VECTOR, dim=10)),
    "vector64": dict(paper="PCA 64 on ARC", expect={}, goal=dict(cell_acc=0.656),
                      set=dict(_VECTOR, dim=64)),
    "vector256": dict(paper="PCA 256 on ARC", expect={}, goal=dict(cell_acc=0.766),
                      set=dict(_VECTOR, dim=256)),
    "paper": dict(paper="the seed's network, 16x16, d 10, both terms summed", expect={},
                  goal=dict(cell_acc=0.90), set=dict(_PAPER, beta_scale=0.005)),
    "paper_literal": dict(paper="the same with its means: beta 512; collapses", expect={},
                          set=dict(_PAPER, beta_scale=256.0)),
    "smoke": dict(paper="-", expect={}, set=dict(steps=20, width=32, batch=16, n=400, warmup=5)),
}

# --- model -------------------------------------------------------------
# channels last throughout: a 1x1 convolution is a matrix product, and a permuted view feeds the 3x3 ones


class Conv(nn.Module):
    """x + linear(gelu(conv3x3(norm(x)))).  The norm is per position; the mask zeroes what is outside."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), zero(nn.Linear(width, width))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BHWE, mask_BHW1):
        h = self.conv((self.norm(x_BHWE) * mask_BHW1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x_BHWE + self.out(F.gelu(h))


class Pointwise(nn.Module):
    """x + linear(gelu(linear(norm(x))))."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.out = zero(nn.Linear(2 * width, width))

    def forward(self, x, mask=None):
        return x + self.out(F.gelu(self.up(self.norm(x))))


def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def inside(shape_B2, H, W):
    """Which cells of an H x W canvas belong to a grid of that height and width -> bool [B, H, W]."""
    h, w = shape_B2[:, 0, None, None], shape_B2[:, 1, None, None]
    return (torch.arange(H, device=h.device)[:, None] < h) & (torch.arange(W, device=h.device) < w)


def shape_of(grid_BHW):
    """Height and width of each grid, from its codes -> int64 [B, 2]."""
    real = grid_BHW != OUTSIDE
    return torch.stack([real.any(2).sum(1), real.any(1).sum(1)], 1)


class SizeCode(nn.Module):
    """Height and width as two latents: cut N(0,1) into intervals with the training shares, one per length.

    mu is the middle quantile of a length's interval, sigma a fifth of the way to its nearer edge: a posterior
    draw reads back wrongly about once in two million, and a prior draw has the sizes of the data.
    """

    def __init__(self, canvas):
        super().__init__()
        self.register_buffer("share_2L", torch.full((2, canvas), 1 / canvas))

    def fit(self, shape_N2):
        """Learn the shares of heights and widths; one more of each, so that no length is impossible."""
        n = self.share_2L.shape[1]
        count = torch.bincount(shape_N2.flatten().long(), minlength=n + 1)[1:] + 1.0
        self.share_2L.copy_(count / count.sum())            # transposing is an augmentation: one for both

    def edges(self):
        """Normal quantiles between consecutive lengths -> [2, canvas - 1]."""
        return torch.special.ndtri(self.share_2L.double().cumsum(1)[:, :-1]).float()

    def encode(self, shape_B2):
        """-> mu, logvar, each [B, 2]."""
        top = self.share_2L.double().cumsum(1).clamp(max=1.0)
        middle = torch.special.ndtri(top - self.share_2L.double() / 2).float()
        edge = F.pad(self.edges(), (1, 1), value=math.inf)
        edge[:, 0] = -math.inf
        sigma = torch.minimum(middle - edge[:, :-1], edge[:, 1:] - middle) / 5
        at = (shape_B2 - 1).T
        return middle.gather(1, at).T, 2 * sigma.log().gather(1, at).T

    def decode(self, z_B2):
        """-> int64 [B, 2], each 1..canvas."""
        return 1 + (z_B2[:, :, None] > self.edges()).sum(2)


class Spatial(nn.Module):
    """zc latents for each patch of a grid; a residual network over patches on either side."""

    def __init__(self, cfg):
        super().__init__()
        self.patch, self.zc, w = cfg.patch, cfg.zc, cfg.width
        blocks = lambda: nn.ModuleList(kind(w) for _ in range(cfg.depth) for kind in (Conv, Pointwise))
        colors = COLORS * cfg.patch**2
        self.embed, self.down, self.head = nn.Linear(colors, w), blocks(), nn.Linear(w, 2 * cfg.zc)
        self.lift, self.up, self.paint = nn.Linear(cfg.zc, w), blocks(), nn.Linear(w, colors)
        self.down_norm, self.up_norm = nn.LayerNorm(w), nn.LayerNorm(w)
        self.register_buffer("onehot", torch.eye(COLORS + 1)[:, :COLORS], persistent=False)   # outside: 0
        with torch.no_grad():
            self.head.bias[cfg.zc:] = -2.0      # start with a posterior that carries something

    def latents(self, H, W):
        return self.zc * (H // self.patch) * (W // self.patch)

    def encode(self, grid_BHW, shape_B2):
        """-> mu, logvar [B, zc H W / p^2], standard normal outside the grid."""
        B, H, W = grid_BHW.shape
        p = self.patch
        onehot = F.embedding(grid_BHW.int(), self.onehot)
        x = onehot.view(B, H // p, p, W // p, p, COLORS).transpose(2, 3).reshape(B, H // p, W // p, -1)
        mask = inside(shape_B2, H, W)[:, ::p, ::p, None].float()
        x = self.embed(x)
        for block in self.down:
            x = block(x, mask)
        mu, logvar = (self.head(self.down_norm(x)).float() * mask).chunk(2, -1)
        return mu.flatten(1), logvar.clamp(-12, 6).flatten(1)

    def decode(self, z_BD, shape_B2, H, W):
        """-> colour logits [B, H, W, 10]; only those inside the grid mean anything."""
        B, p = len(z_BD), self.patch
        mask = inside(shape_B2, H, W)[:, ::p, ::p, None].float()
        x = self.lift(z_BD.view(B, H // p, W // p, self.zc))
        for block in self.up:
            x = block(x, mask)
        x = self.paint(self.up_norm(x)).view(B, H // p, W // p, p, p, COLORS)
        return x.transpose(2, 3).reshape(B, H, W, COLORS)


class Vector(nn.Module):
    """One global vector: strided convolutions, a dense layer, and back through transposed convolutions.

    Grids are stretched to a square that the strides divide (nearest cell), and the logits of each block are
    averaged on the way back.  With cfg.linear a linear path runs beside both and the convolutions start at
    zero: begun at the principal components of the stretched grids (start_at_pca), the model is PCA at step 0.
    """

    def __init__(self, cfg):
        super().__init__()
        self.side, w = 16 if cfg.canvas <= 16 else 32, cfg.width
        self.dim = cfg.dim - 2 * (cfg.sizes == "coded")
        flat = 4 * w * 16
        conv = lambda a, b, stride: (nn.Conv2d(a, b, 3, stride, 1), nn.GELU())
        self.down = nn.Sequential(
            *conv(COLORS, w, self.side // 16), *conv(w, 2 * w, 2), *conv(2 * w, 4 * w, 2), nn.Flatten(),
            nn.Linear(flat, cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, 2 * self.dim))
        grow = lambda a, b: (nn.ConvTranspose2d(a, b, 4, 2, 1), nn.GELU())
        self.up = nn.Sequential(
            nn.Linear(self.dim, cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, flat), nn.GELU(),
            nn.Unflatten(1, (4 * w, 4, 4)), *grow(4 * w, 2 * w), *grow(2 * w, w),
            *(grow(w, w) if self.side == 32 else ()), nn.Conv2d(w, COLORS, 3, 1, 1))
        self.linear = cfg.linear
        if cfg.linear:
            cells = self.side**2 * COLORS
            self.into, self.back = (nn.Parameter(torch.randn(cells, self.dim)) for _ in range(2))
            self.mean = nn.Parameter(torch.zeros(cells))
            self.register_buffer("scale", torch.ones(self.dim))
            zero(self.up[-1]), zero(self.down[-1])
            with torch.no_grad():
                self.down[-1].bias[self.dim:] = -4.0

    def latents(self, H, W):
        return self.dim

    @torch.no_grad()
    def start_at_pca(self, grids_NPP, shapes_N2):
        """Set the linear path to whitened principal components of the stretched training grids."""
        x = self.stretch(grids_NPP, shapes_N2).flatten(1)
        mean = x.mean(0)
        _, s, v = torch.svd_lowrank(x - mean, q=min(self.dim + 20, *x.shape), niter=3)
        v, s = F.pad(v, (0, self.dim))[:, :self.dim], F.pad(s, (0, self.dim))[:self.dim]
        # columns of about unit entries, so that a step of Adam is a small turn of each component
        self.into.copy_(v * len(v)**0.5)
        self.back.copy_(v * len(v)**0.5)
        self.mean.copy_(mean)
        self.scale.copy_((s / len(x)**0.5).clamp(min=1e-3))

    def stretch(self, grid_BHW, shape_B2):
        """-> one-hot [B, side, side, 10]; the cell under the middle of each of side x side equal pieces."""
        at = torch.arange(self.side, device=grid_BHW.device) + 0.5
        row, col = ((at * shape_B2[:, a, None] / self.side).long() for a in (0, 1))
        b = torch.arange(len(grid_BHW), device=grid_BHW.device)[:, None, None]
        square = grid_BHW[b, row[:, :, None], col[:, None, :]]
        return F.one_hot(square.long(), COLORS + 1)[..., :COLORS].float()

    def encode(self, grid_BHW, shape_B2):
        square = self.stretch(grid_BHW, shape_B2)
        mu, logvar = self.down(square.permute(0, 3, 1, 2)).float().chunk(2, 1)
        if self.linear:
            mu = mu + (square.flatten(1) - self.mean) @ self.into / (self.scale * len(self.mean)**0.5)
        return mu, logvar.clamp(-12, 6)

    def decode(self, z_BD, shape_B2, H, W):
        square = self.up(z_BD).permute(0, 2, 3, 1).float()
        if self.linear:                         # PCA returns shares of colours; 8 makes them confident logits
            flat = (z_BD * self.scale) @ self.back.T / len(self.mean)**0.5 + self.mean
            square = square + 8 * flat.view(square.shape).float()
        at, blocks = torch.arange(self.side, device=z_BD.device) + 0.5, []
        for a, n in ((0, H), (1, W)):
            cell = (at * shape_B2[:, a, None] / self.side).long()
            block = (cell[:, None] == torch.arange(n, device=z_BD.device)[:, None]).float()    # [B, n, side]
            blocks.append(block / block.sum(2, keepdim=True).clamp(min=1))
        return torch.einsum("bhs,bstc,bwt->bhwc", blocks[0], square, blocks[1])


class Causal(nn.Module):
    """The flow from N(0, I) to a prior that has seen the patches before: z_l = m(z_<l) + exp(v(z_<l)/2) u_l.

    A small transformer in reading order.  The KL of a factorised posterior to this prior is the KL of the
    innovations u to N(0, I), so the rest of the script does not change.
    """

    def __init__(self, cfg):
        super().__init__()
        w, side = cfg.prior_width, -(-cfg.canvas // cfg.patch)
        self.zc, self.left, self.above = cfg.zc, nn.Linear(cfg.zc, w), nn.Linear(cfg.zc, w)
        self.place = nn.ParameterList(nn.Parameter(0.02 * torch.randn(side, w)) for _ in range(4))
        self.attend = nn.ModuleList(Attention(w) for _ in range(cfg.prior_depth))
        self.mix = nn.ModuleList(Pointwise(w) for _ in range(cfg.prior_depth))
        self.norm, self.head = nn.LayerNorm(w), zero(nn.Linear(w, 2 * cfg.zc))

    def forward(self, z_BHWZ, shape_B2):
        """-> mean, logvar of each patch's latents given those before, [B, H, W, Z]; zero outside the grid.

        shape: rows and columns of patches of each grid, which may reach beyond the H rows given.
        """
        B, H, W, _ = z_BHWZ.shape
        r, c = torch.arange(H, device=z_BHWZ.device), torch.arange(W, device=z_BHWZ.device)
        h, w = shape_B2[:, :1], shape_B2[:, 1:]
        mask_BHW = inside(shape_B2, H, W)
        top, side, below, right = self.place
        row, col = top[r] + below[(h - 1 - r).clamp(min=0)], side[c] + right[(w - 1 - c).clamp(min=0)]
        place = row[:, :, None] + col[:, None]
        left = F.pad(self.left(z_BHWZ), (0, 0, 1, 0))[:, :, :W]
        above = F.pad(self.above(z_BHWZ), (0, 0, 0, 0, 1, 0))[:, :H]
        x = (left + above + place).flatten(1, 2)
        l = torch.arange(H * W, device=x.device)
        seen = (l <= l[:, None]) & (mask_BHW.reshape(B, 1, -1) | (l == l[:, None]))
        for attend, mix in zip(self.attend, self.mix):
            x = mix(attend(x, seen[:, None]))
        mean, logvar = (self.head(self.norm(x)).float().view(B, H, W, -1) * mask_BHW[..., None]).chunk(2, -1)
        return mean, logvar.clamp(-8, 2)


class Attention(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), zero(nn.Linear(width, width))

    def forward(self, x_BLE, seen_B1LL):
        B, L, E = x_BLE.shape
        q, k, v = self.qkv(self.norm(x_BLE)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B1LL)
        return x_BLE + self.out(h.transpose(1, 2).reshape(B, L, E))


class BetaVAE(nn.Module):
    """net(grid_BHW) -> (logits [B, 11, H, W], mu [B, D], logvar [B, D]); uint8 codes 0-9, and 10 outside.

    z is drawn in training mode and is mu in eval mode; noise=1 or 0 says so explicitly.  mu and logvar are
    relative to the prior: their KL to N(0, I) is the KL of the model.  D is 2 + zc patches, or cfg.dim.
    """

    def __init__(self, cfg):
        super().__init__()
        self.canvas, self.coded = cfg.canvas, cfg.sizes == "coded"
        if cfg.latent == "vector" and cfg.dim < 3 or cfg.prior == "causal" and cfg.latent == "vector":
            raise UserError("a vector latent needs --dim 3 or more and --prior normal")
        if cfg.sizes == "fixed" and cfg.latent == "spatial" and cfg.canvas % cfg.patch:
            raise UserError(f"--patch {cfg.patch} does not divide --canvas {cfg.canvas}")
        self.multiple = cfg.patch if cfg.latent == "spatial" else 1
        self.body = Spatial(cfg) if cfg.latent == "spatial" else Vector(cfg)
        self.size = SizeCode(cfg.canvas) if self.coded else None
        self.prior = Causal(cfg) if cfg.prior == "causal" else None

    def padded(self, n):
        return -(-n // self.multiple) * self.multiple

    def latents(self, H=None, W=None):
        """D for grids on an H x W crop (default: the canvas)."""
        H, W = H or self.canvas, W or self.canvas
        return 2 * self.coded + self.body.latents(self.padded(H), self.padded(W))

    def encode(self, grid_BHW):
        """Posterior mean and log-variance of z, [B, D] each; the size comes first."""
        H, W = grid_BHW.shape[1:]
        shape_B2 = shape_of(grid_BHW)
        grid_BHW = F.pad(grid_BHW, (0, self.padded(W) - W, 0, self.padded(H) - H), value=OUTSIDE)
        mu, logvar = self.body.encode(grid_BHW, shape_B2)
        if not self.coded:
            return mu, logvar
        size_mu, size_logvar = self.size.encode(shape_B2)
        return torch.cat([size_mu, mu], 1), torch.cat([size_logvar, logvar], 1)

    def decode(self, z_BD, H=None, W=None):
        """z [B, D] -> logits [B, 11, H, W] (default: the canvas): colours inside the coded size."""
        H, W = H or self.canvas, W or self.canvas
        shape_B2 = self.shape(z_BD)
        color = self.body.decode(z_BD[:, 2 * self.coded:], shape_B2, self.padded(H), self.padded(W))
        color, real = color[:, :H, :W], inside(shape_B2, H, W)[..., None]
        # 30 nats: outside is certain to seven digits, and a wrong size still costs a finite amount
        color, outside = torch.where(real, color.float(), -30.0), torch.where(real, -30.0, 0.0)
        return torch.cat([color, outside], -1).permute(0, 3, 1, 2)

    def shape(self, z_BD):
        """The height and width that z stands for -> int64 [B, 2]."""
        if not self.coded:
            return torch.full((len(z_BD), 2), self.canvas, device=z_BD.device)
        return self.size.decode(z_BD[:, :2])

    def conditional(self, z_BD, H, W):
        """Causal prior: mean and log-variance of each latent given those before it, [B, D] each."""
        H, W = self.padded(H) // self.multiple, self.padded(W) // self.multiple
        z_BHWZ = z_BD[:, 2 * self.coded:].view(len(z_BD), H, W, -1)
        mean, logvar = self.prior(z_BHWZ, -(-self.shape(z_BD) // self.multiple))
        return [F.pad(t.flatten(1), (2 * self.coded, 0)) for t in (mean, logvar)]

    def forward(self, grid_BHW, noise=None):
        mu, logvar = self.encode(grid_BHW)
        noise = float(self.training) if noise is None else noise
        z = mu + noise * torch.exp(0.5 * logvar) * torch.randn_like(mu)
        logits = self.decode(z, *grid_BHW.shape[1:])
        if self.prior is not None:
            mean, spread = self.conditional(z, *grid_BHW.shape[1:])
            mu, logvar = (mu - mean) * torch.exp(-0.5 * spread), logvar - spread
        return logits, mu, logvar

    @torch.no_grad()
    def draw(self, n, seed, device="cpu"):
        """n draws of z from the prior, [n, D] on the canvas.  The causal prior goes patch by patch."""
        u = torch.randn(n, self.latents(), generator=torch.Generator().manual_seed(seed)).to(device)
        if self.prior is None:
            return u
        side, first = self.padded(self.canvas) // self.multiple, 2 * self.coded
        z = u.clone()
        z_NHWZ, shape = z[:, first:].view(n, side, side, -1), -(-self.shape(u) // self.multiple)
        for r, c in np.ndindex(*shape.amax(0).tolist()):
            on = torch.nonzero((shape > torch.tensor([r, c], device=device)).all(1))[:, 0]
            if len(on):
                seen = z_NHWZ[on, :r + 1, :int(shape[on, 1].max())]
                mean, logvar = (t[:, r, c] for t in self.prior(seen, shape[on]))
                z_NHWZ[on, r, c] = mean + torch.exp(0.5 * logvar) * z_NHWZ[on, r, c]
        return z


def best_rectangle(logits_BCHW):
    """The likeliest legal grid: a solid rectangle of colours at the top left -> uint8 [B, H, W], 10 outside.

    With c the best colour's log-probability and q that of outside, h x w scores the sum of c - q over its
    cells; one cumulative sum scores all of them.  Ties go to the smaller height, then the smaller width.
    """
    B, _, H, W = logits_BCHW.shape
    best, color = logits_BCHW[:, :COLORS].max(1)                # log-softmax cancels in c - q
    score = (best - logits_BCHW[:, OUTSIDE]).double().cumsum(1).cumsum(2)
    at = score.flatten(1).argmax(1)
    shape_B2 = torch.stack([at // W + 1, at % W + 1], 1)
    return torch.where(inside(shape_B2, H, W), color, OUTSIDE).to(torch.uint8)

# --- loss --------------------------------------------------------------


def kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, elementwise: (mu^2 + exp(logvar) - 1 - logvar) / 2."""
    return 0.5 * (mu**2 + torch.exp(logvar) - 1 - logvar)


def elbo_terms(logits_BCHW, grid_BHW, mu_BD, logvar_BD, free_bits=0.0):
    """Nats per grid: reconstruction R_B, summed over cells, and code K_B, over dimensions.  -ELBO = R + K.

    free_bits: each dimension is charged at least that much, after the mean over the batch (1606.04934).
    """
    R_B = F.cross_entropy(logits_BCHW.float(), grid_BHW.long(), reduction="none").sum((1, 2))
    K_BD = kl(mu_BD.float(), logvar_BD.float())
    if free_bits:
        return R_B, K_BD.mean(0).clamp(min=free_bits).sum().expand(len(R_B))
    return R_B, K_BD.sum(1)


def charge(code, capacity, epoch):
    """What beta multiplies: nats of code, or (1804.03599) their distance from capacity min(epoch / 30, 1)."""
    return abs(code - capacity * min(epoch / 30, 1.0)) if capacity else code


def beta(epoch, schedule="seed", last=50):
    """The schedule's beta at a (fractional) epoch of `last`; "seed": 0.1, 1, 2, 2 at epochs 1, 10, 30, 50."""
    if schedule == "seed":
        e = epoch * 50 / last
        return e / 10 if e <= 10 else min(1 + (e - 10) / 20, 2.0)
    if schedule == "linear":
        return 2.0 * min(epoch / (0.3 * last), 1.0)
    if schedule == "cyclical":                              # 1903.10145: four cycles, half ramp, half hold
        return 2.0 if epoch >= last else 2.0 * min((epoch * 4 / last) % 1 / 0.5, 1.0)
    if schedule == "conservative":                              # the seed's rescue: a fifth at 0, then to 0.1
        return 0.1 * max(epoch / last - 0.2, 0) / 0.8
    return 2.0


class Monitor:
    """Early stopping not fooled by a rising beta: watches R + beta_max K, and counts from epoch 30 on."""

    def __init__(self, patience):
        self.patience, self.state = patience, dict(best=1e30, bad=0, stop=False)

    def see(self, loss, epoch):
        """True when this is the best loss so far."""
        better = loss < self.state["best"]
        if better:
            self.state.update(best=loss, bad=0)
        elif epoch >= 30:
            self.state["bad"] += 1
        self.state["stop"] = bool(self.patience) and self.state["bad"] >= self.patience
        return better

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state.update(state)

# --- data: batches -----------------------------------------------------------


def symmetry(grid_BPP, shape_B2, code_B, H, W):
    """One of the eight symmetries of each grid, inside its own rectangle -> [B, H, W] crops.

    code: bit 2 transposes, then bits 0 and 1 flip rows and columns.  shape is the size before.
    """
    B, P = grid_BPP.shape[:2]
    turn = (code_B & 4).bool()[:, None, None]
    h, w = torch.where(turn[:, 0], shape_B2.flip(1), shape_B2)[:, :, None, None].unbind(1)
    i, j = torch.arange(H)[:, None], torch.arange(W)
    real = (i < h) & (j < w)
    i = torch.where((code_B & 1).bool()[:, None, None], h - 1 - i, i).clamp(0, P - 1)
    j = torch.where((code_B & 2).bool()[:, None, None], w - 1 - j, j).clamp(0, P - 1)
    at = torch.where(turn, j * P + i, i * P + j).expand(B, H, W)
    return torch.where(real, grid_BPP.flatten(1).gather(1, at.flatten(1)).view(B, H, W), OUTSIDE)


def rename(grid_BHW, colors, gen):
    """Permute the ten colours ("all"), or those but 0 ("nonzero"), differently in each grid; 10 stays 10."""
    first = 0 if colors == "all" else 1
    table = torch.arange(11, dtype=torch.uint8).repeat(len(grid_BHW), 1)
    order = torch.rand(len(grid_BHW), 10 - first, generator=gen).argsort(1)
    table[:, first:10] = first + order.to(torch.uint8)
    return table.gather(1, grid_BHW.flatten(1).long()).view_as(grid_BHW)


def batches(shapes_N2, batch, multiple, seed, world=1, rank=0):
    """Endless index arrays: every pass shuffles, groups grids of like size, and cuts by area: little padding.

    A batch has room for `batch` grids of mean area, in patches.  Sides are compared with each grid upright.
    """
    side = -(-shapes_N2.astype(np.int64) // multiple)
    tall, wide = side.max(1), side.min(1)
    room, pool = batch * float((tall * wide).mean()), 64 * batch * world
    for turn in itertools.count():
        rng = np.random.default_rng([seed, turn])
        order = rng.permutation(len(tall))
        for a in range(0, len(order), pool):
            some = order[a:a + pool]
            some = some[np.lexsort((np.where(tall[some] % 2, wide[some], -wide[some]), tall[some]))]
            cuts = list(cut(tall[some], wide[some], room))
            cuts = cuts[:len(cuts) // world * world] or cuts * world    # as many for every rank
            for c in rng.permutation(len(cuts))[rank::world]:
                yield some[cuts[c]]


def cut(tall, wide, room):
    """Slices of consecutive grids whose count times largest height times largest width stays within room."""
    start, h, w = 0, 0, 0
    for i, (a, b) in enumerate(zip(tall.tolist(), wide.tolist())):
        h, w = max(h, a), max(w, b)
        if i > start and (i - start + 1) * h * w > room:
            yield slice(start, i)
            start, h, w = i, a, b
    yield slice(start, len(tall))


class Feed:
    """The training grids on the device's side of the fence: uint8, whole, augmented a batch at a time."""

    def __init__(self, corpus, multiple, colors):
        self.grids = torch.from_numpy(corpus.grids)
        self.shapes = torch.from_numpy(corpus.shapes.astype(np.int64))
        self.multiple, self.colors = multiple, colors

    def __call__(self, index, gen):
        """Crops of the indexed grids under random symmetries and renaming -> uint8 [B, H, W]."""
        index = torch.from_numpy(np.ascontiguousarray(index))
        shape, m = self.shapes[index], self.multiple
        side = -(-shape // m)
        code = torch.randint(0, 8, (len(index),), generator=gen)
        flat = int(torch.randint(0, 2, (), generator=gen))      # the whole batch lies down or stands up
        turn = torch.where(side[:, 0] == side[:, 1], code >> 2, ((side[:, 0] < side[:, 1]).long() + flat) % 2)
        H, W = (int(side.amax(1).max()) * m, int(side.amin(1).max()) * m)[::-1 if flat else 1]
        grid = symmetry(self.grids[index], shape, code & 3 | turn << 2, H, W)
        return grid if self.colors == "none" else rename(grid, self.colors, gen)


def crops(corpus, multiple, room=20_000):
    """The grids of a corpus as they are, in crops of like size: yields (index, uint8 [B, H, W])."""
    side = -(-corpus.shapes.astype(np.int64) // multiple)
    order = np.lexsort((side[:, 1], side[:, 0]))
    for s in cut(side[order, 0], side[order, 1], room / multiple**2):
        index = order[s]
        H, W = np.minimum(side[index].max(0) * multiple, corpus.grids.shape[1])
        yield index, torch.from_numpy(corpus.grids[index, :H, :W])

# --- metrics -----------------------------------------------------------


class Score:
    """Counts of right cells, defined in docs/beta_vae_arc.md.  Padding enters canvas_acc alone."""

    def __init__(self, canvas=30):
        self.canvas, self.rows = canvas, []
        self.color = np.zeros((2, COLORS))                      # right, all

    def add(self, pred_BHW, true_BHW):
        """Grids [B, H, W], codes 0-10; a cell predicted outside is wrong."""
        pred, true = (torch.as_tensor(t).long() for t in (pred_BHW, true_BHW))
        real, right = true != OUTSIDE, (pred == true) & (true != OUTSIDE)
        count = F.one_hot(true, COLORS + 1)[..., :COLORS].sum((1, 2))
        fore = real & (true != count.argmax(1)[:, None, None])          # not the grid's most frequent colour
        beyond = self.canvas**2 - true[0].numel()
        size = (shape_of(pred) == shape_of(true)).all(1)
        same = (pred == true).flatten(1)
        cells = [t.sum((1, 2)) for t in (real, right, fore, right & fore)]
        self.rows.append(torch.stack([*cells, size, same.all(1), same.sum(1) + beyond], 1).double())
        self.color[0] += torch.bincount(true[right], minlength=COLORS)[:COLORS].numpy()
        self.color[1] += torch.bincount(true[real], minlength=COLORS)[:COLORS].numpy()

    def result(self):
        real, right, fore, fore_right, size, exact, canvas = torch.cat(self.rows).T
        recall = self.color[0] / np.maximum(self.color[1], 1)
        return dict(n_grids=len(real), n_cells=int(real.sum()), cell_acc=float(right.sum() / real.sum()),
                    cell_acc_grid=float((right / real).mean()),
                    nonbg_acc=float(fore_right.sum() / fore.sum().clamp(min=1)),
                    balanced_acc=float(recall[self.color[1] > 0].mean()), per_color=recall.tolist(),
                    shape_acc=float(size.mean()), exact_acc=float(exact.mean()),
                    canvas_acc=float(canvas.mean() / self.canvas**2))


@torch.no_grad()
def measure(net, corpus, noise=0.0, device="cpu", amp=False):
    """Score, nats and latent statistics of a corpus -> (dict, mu [N, D] on the canvas, mean KL [D])."""
    net.eval()
    score, d = Score(net.canvas), net.latents()
    R, K = np.zeros((2, len(corpus)))
    mus, per_dim = torch.zeros(len(corpus), d), torch.zeros(d, dtype=torch.float64)
    for index, grid in crops(corpus, net.multiple):
        with precision(device, amp):
            logits, mu, logvar = net(grid.to(device), noise)
            posterior = net.encode(grid.to(device))[0]
        R_B, K_B = elbo_terms(logits, grid.to(device), mu, logvar)
        score.add(best_rectangle(logits).cpu(), grid)
        R[index], K[index] = R_B.cpu(), K_B.cpu()
        mus[index] = on_canvas(net, posterior.float().cpu(), grid.shape)
        per_dim += on_canvas(net, kl(mu.float(), logvar.float()).cpu(), grid.shape).double().sum(0)
    net.train()
    kl_D = per_dim / len(corpus)
    pct = lambda q: float(np.percentile(K, q))
    result = dict(score.result(), recon_nats=float(R.mean()), elbo_nats=float(-(R + K).mean()),
                  kl_nats=dict(mean=float(K.mean()), median=pct(50), p99=pct(99), max=pct(100)), latents=d,
                  active_var=int((mus.var(0) > 0.01).sum()), active_kl=int((kl_D > 0.05).sum()))
    return result, mus, kl_D


def on_canvas(net, x_BD, shape):
    """Latents of a crop placed among those of the whole canvas; zero elsewhere."""
    _, H, W = shape
    if net.latents(H, W) == net.latents():
        return x_BD
    m, first, zc = net.multiple, 2 * net.coded, net.body.zc
    side, h, w = net.padded(net.canvas) // m, net.padded(H) // m, net.padded(W) // m
    full = x_BD.new_zeros(len(x_BD), side, side, zc)
    full[:, :h, :w] = x_BD[:, first:].view(len(x_BD), h, w, zc)
    return torch.cat([x_BD[:, :first], full.flatten(1)], 1)


def collapse(result, mode_acc, vector=True):
    """The ways in which accuracy lies -> dict of flags.  Only a vector should use half of its dimensions."""
    return dict(collapsed=result["kl_nats"]["mean"] < 0.1 or result["active_var"] == 0,
                partial=vector and result["active_kl"] < result["latents"] / 2,
                background_only=result["nonbg_acc"] < 0.05 and result["cell_acc"] >= mode_acc - 0.01,
                pad_only=result["cell_acc"] < 0.01)


COLUMNS = ("cell_acc", "nonbg_acc", "exact_acc", "canvas_acc")


def baselines(train, test, dims=(10, 64, 256), limit=10_000, full=True):
    """What needs no network: one colour, each grid's mode (an oracle); if full, nearest grid and PCA."""
    P = test.grids.shape[1]
    true, real = test.grids, test.grids != OUTSIDE
    some = train.where(np.random.default_rng(0).permutation(len(train))[:limit])
    onehot = lambda g: F.one_hot(torch.from_numpy(g).long(), 11).float().flatten(1)
    wanted = onehot(true)
    count = wanted.view(len(true), P * P, 11)[..., :COLORS].sum(1)
    mode = count.argmax(1).numpy().astype(np.uint8)
    guesses = dict(zero=np.where(real, 0, OUTSIDE), outside=np.full_like(true, OUTSIDE),
                   mode=np.where(real, mode[:, None, None], OUTSIDE))
    if full:
        seen = onehot(some.grids)
        nearest = torch.cat([(w @ seen.T).argmax(1) for w in wanted.split(512)])
        guesses["nearest"] = some.grids[nearest.numpy()]
    if full and dims:
        mean = seen.mean(0)
        torch.manual_seed(0)
        _, _, v = torch.svd_lowrank(seen - mean, q=min(max(dims) + 20, *seen.shape), niter=4)
    for d in dims if full else ():
        back = (wanted - mean) @ v[:, :d] @ v[:, :d].T + mean
        guesses[f"pca{d}"] = best_rectangle(back.view(-1, P, P, 11).permute(0, 3, 1, 2)).numpy()
    out = {}
    for name, guess in guesses.items():
        score = Score(P)
        score.add(guess, true)
        out[name] = {k: score.result()[k] for k in COLUMNS}
    return out

# --- train -------------------------------------------------------------


def precision(device, enabled=True):
    """bfloat16 autocast on CPUs that multiply in it (twice as fast), elsewhere what common/run.py decides."""
    device = torch.device(device)
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if device.type == "cpu" and enabled and native():
        return torch.autocast("cpu", torch.bfloat16)
    return run.autocast(device, enabled)


def corpus_of(cfg):
    return load_corpus(cfg.data, cfg.canvas, cfg.n or 20_000, 0, cfg.sizes == "fixed")


def learning_rate(cfg, step):
    warm = min(step / max(cfg.warmup, 1), 1.0)
    return cfg.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / cfg.steps)))


def train(cfg):
    """Fit the model; the best weights so far are always in weights.safetensors."""
    ddp = run.init(cfg.device)
    data = corpus_of(cfg)
    if cfg.batch % ddp.world:
        run.per_rank(cfg.batch, ddp, "--batch")
    run.seed_all(cfg.seed)
    net = BetaVAE(cfg).to(ddp.device)
    seen, held = data.part("train"), data.part("val")
    feed = Feed(seen, net.multiple, cfg.colors)
    if net.coded:
        net.size.fit(feed.shapes)
    if not len(held):
        raise UserError("no validation grids: give more tasks, or a corpus with a val split")
    held = held.where(np.random.default_rng(0).permutation(len(held))[:256])
    optim = torch.optim.Adam(net.parameters(), lr=cfg.lr, fused=ddp.device.type != "mps")
    monitor = Monitor(cfg.patience)
    state = dict(net=net, optim=optim, monitor=monitor)
    facts = dict(path=cfg.data or "procedural", train=len(seen), val=len(held))
    log = run.Log(cfg, ddp, need_gb=0.1, data=facts)
    start = run.load(cfg.out, state, ddp)
    if cfg.linear and not start:
        some = torch.from_numpy(np.random.default_rng(cfg.seed).permutation(len(seen))[:10_000])
        net.body.start_at_pca(feed.grids[some].to(ddp.device), feed.shapes[some].to(ddp.device))
    model = torch.compile(net, dynamic=True) if cfg.compile else net
    model = DistributedDataParallel(model) if ddp.world > 1 else model
    share = cfg.batch // ddp.world
    order = batches(seen.shapes, share, net.multiple, cfg.seed, ddp.world, ddp.rank)
    order = itertools.islice(order, start, None)
    epoch_steps, top = max(cfg.steps // 50, 1), cfg.beta_scale * beta(50, cfg.schedule)
    sums, began = np.zeros(4), time.perf_counter()
    for step in run.progress(start, cfg.steps, ddp):
        if monitor.state["stop"]:
            break
        run.seed_all(cfg.seed, ddp.rank, step)
        epoch = 1 + 49 * step / cfg.steps
        b = cfg.beta_scale * beta(epoch, cfg.schedule)
        optim.param_groups[0]["lr"] = learning_rate(cfg, step)
        grid = feed(next(order), run.generator(cfg.seed, ddp.rank, step)).to(ddp.device)
        with precision(ddp.device, cfg.bf16):
            logits, mu, logvar = model(grid)
        R_B, K_B = elbo_terms(logits, grid, mu, logvar, cfg.free_bits)
        # a sum over a fixed room: a grid weighs the same whatever batch it falls in; /100 keeps clip in range
        loss = (R_B.sum() + b * share * charge(K_B.sum() / share, cfg.capacity, epoch)) / (100 * share)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        optim.step()
        sums += [len(grid), R_B.sum().item(), K_B.sum().item(), (grid != OUTSIDE).sum().item()]
        if step == 1 and ddp.rank == 0:
            page = draw.grid([picture(g) for g in grid[:16].cpu().numpy()], 8, pad=6)
            draw.save(page, pathlib.Path(cfg.out, "samples", "batch.png"))
        if step == 1 or step % max(epoch_steps // 5, 1) == 0:
            run.check_finite(step, loss=loss.detach(), gradient=norm)
            took, n = time.perf_counter() - began, sums[0]
            real = grid != OUTSIDE
            log("train", step=step, epoch=epoch, loss=loss.detach(), recon=sums[1] / n, kl=sums[2] / n,
                beta=b, grad_norm=norm, cell_acc=((logits.argmax(1) == grid) & real).sum() / real.sum(),
                active=int((kl(mu, logvar).mean(0) > 0.05).sum()), lr=optim.param_groups[0]["lr"],
                grids_s=n * ddp.world / took, cells_s=sums[3] * ddp.world / took, cpu_s=time.process_time())
            sums, began = np.zeros(4), time.perf_counter()
        if step % max(epoch_steps, 50) == 0 or step == cfg.steps:
            validate(cfg, ddp, net, held, monitor, log, step, epoch, top)
        run.save_if_due(cfg.out, step, cfg.steps, 10 * epoch_steps, state, ddp)
    if ddp.rank == 0:
        export(cfg, net)
    log.finish()


def validate(cfg, ddp, net, held, monitor, log, step, epoch, top):
    """Score the held-out grids, log, and keep the weights when R + beta_max K is the lowest yet."""
    result, _, kl_D = measure(net, held, device=ddp.device, amp=cfg.bf16)
    code = charge(result["kl_nats"]["mean"], cfg.capacity, 50)
    better = monitor.see(result["recon_nats"] + top * code, epoch)
    log("eval", step=step, epoch=epoch, best=better, **{k: v for k, v in result.items() if k != "per_color"},
        kl_per_dim=[round(float(k), 4) for k in kl_D] if len(kl_D) <= 256 else None)
    if better and ddp.rank == 0:
        meta = dict(config=asdict(cfg), step=step)
        run.save_weights(pathlib.Path(cfg.out, "weights.safetensors"), net.state_dict(), meta)


def export(cfg, net):
    """final.safetensors, and the best weights again as encoder and decoder."""
    out = pathlib.Path(cfg.out)
    run.save_weights(out / "final.safetensors", net.state_dict(), dict(config=asdict(cfg), step=cfg.steps))
    best, meta = run.load_weights(out / "weights.safetensors")
    both, front = ("size", "body.scale", "body.mean"), ("body.embed", "body.down", "body.head", "body.into")
    encoder = {k: v for k, v in best.items() if k.startswith(both + front)}
    decoder = {k: v for k, v in best.items() if not k.startswith(front)}
    run.save_weights(out / "encoder.safetensors", encoder, meta)
    run.save_weights(out / "decoder.safetensors", decoder, meta)

# --- evaluate ----------------------------------------------------------


def load_run(cfg):
    """(net in eval mode, its config, run directory, corpus, device) of the RUN named after the command."""
    out = pathlib.Path(cfg.words[0] or cfg.out)
    path = out / "weights.safetensors"
    tensors, meta = run.load_weights(path)
    known = {f.name for f in fields(Config)}
    if "config" not in meta or not set(meta["config"]) <= known:
        raise UserError(f"{path} was not written by this version of {pathlib.Path(__file__).name}")
    ran = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()})
    net = BetaVAE(ran)
    net.load_state_dict(tensors)
    device = run.init(cfg.device).device
    data = corpus_of(replace(ran, data=cfg.data or ran.data))
    return net.to(device).eval(), ran, out, data, device


def evaluate(cfg):
    """Accuracy that padding and background cannot inflate, nats, latents, baselines, prior samples.

    Into metrics.json; of another split than test into metrics_SPLIT.json.
    """
    began = time.perf_counter()
    net, ran, out, data, device = load_run(cfg)
    held = data.part(cfg.split)
    if not len(held):
        raise UserError(f"no grids in the {cfg.split} split; give --data with held-out tasks")
    result, _, kl_D = measure(net, held, device=device)
    run.seed_all(cfg.seed)
    drawn, *_ = measure(net, held, noise=1.0, device=device)
    base = baselines(data.part("train"), held, full=cfg.baselines)
    z = net.draw(256, cfg.seed, device)
    digest = lambda p: hashlib.sha256(pathlib.Path(p).read_bytes()).hexdigest()
    target = dict(cell_acc=0.90, nonbg_acc=0.80, held_out=cfg.split == "test")
    flags = collapse(result, base["mode"]["cell_acc"], ran.latent == "vector")
    target["met"] = result["cell_acc"] >= 0.90 and result["nonbg_acc"] >= 0.80 and not any(flags.values())
    code = code_nats(held)
    body = dict(schema=1, script=pathlib.Path(__file__).name, config=asdict(ran),
                code_sha256=digest(__file__), weights_sha256=digest(out / "weights.safetensors"),
                split=cfg.split,
                corpus_sha256=hashlib.sha256(held.grids.tobytes()).hexdigest(),
                sources={SOURCES[s]: int((held.source == s).sum()) for s in np.unique(held.source)},
                **result, **code,
                sampled_z={k: drawn[k] for k in ("cell_acc", "nonbg_acc", "exact_acc", "elbo_nats")},
                kl_per_dim=[float(k) for k in kl_D], collapse=flags, baselines=base, target=target,
                prior=grid_statistics(best_rectangle(net.decode(z)).cpu().numpy()),
                data=grid_statistics(held.grids),
                seconds=round(time.perf_counter() - began, 1))
    name = "metrics.json" if cfg.split == "test" else f"metrics_{cfg.split}.json"
    write_atomic(out / name, json.dumps(body, indent=1, allow_nan=False).encode())
    kind = "evaluate" if cfg.split == "test" else f"on {cfg.split}"     # tables show what is called evaluate
    run.record(out, kind, n=len(held), met=target["met"],
               **{k: result[k] for k in ("cell_acc", "nonbg_acc", "exact_acc", "elbo_nats")})
    report(body, PRESETS.get(ran.preset, {}).get("goal", {}))


def report(body, goal):
    """The numbers of metrics.json for a human, baselines beside them."""
    number = lambda r, k: f"{r[k]:>10.4f}" if k in r else " " * 10
    row = lambda name, r: print(f"{name:<26}" + "".join(number(r, k) for k in COLUMNS))
    sources = ", ".join(f"{n} {s}" for s, n in body["sources"].items())
    print(f"{body['n_grids']} grids of the {body['split']} split: {sources}")
    print(f"{'':<26}{'cell':>10}{'non-bg':>10}{'exact':>10}{'(canvas)':>10}")
    row("model, z = mu", body)
    row("model, z drawn", body["sampled_z"])
    for name, r in body["baselines"].items():
        row(f"baseline {name}", r)
    print(f"nats a grid, z = mu:    code {body['kl_nats']['mean']:.1f} + reconstruction "
          f"{body['recon_nats']:.1f} = "
          f"{-body['elbo_nats']:.1f};  z drawn: {-body['sampled_z']['elbo_nats']:.1f} (the ELBO)\n"
          f"nats in other codes:    uniform {body['uniform_code_nats']:.1f}, zlib {body['zlib_nats']:.1f}, "
          f"zlib on all grids at once {body['zlib_together_nats']:.1f}\n"
          f"latents: {body['latents']}, of which {body['active_var']} move (variance of mu > 0.01) and "
          f"{body['active_kl']} cost over 0.05 nats")
    for name, value in goal.items():
        print(f"{name} {body[name]:.4f}  target {value:.2f}  {body[name] - value:+.4f}")
    for name in [k for k, v in body["collapse"].items() if v]:
        print(f"collapse: {name}")
    met = "met" if body["target"]["met"] else "not met"
    print(f"target (cell 0.90, non-background 0.80, no collapse): {met}")


# --- sample and plots ----------------------------------------------------


def sample(cfg):
    """Grids decoded from prior draws: samples/prior.png, samples/prior.npz (a corpus), and statistics."""
    net, ran, out, data, device = load_run(cfg)
    with torch.no_grad():
        grids = best_rectangle(net.decode(net.draw(cfg.n or 64, cfg.seed, device))).cpu().numpy()
    draw.save(draw.grid([picture(g) for g in grids], 8, pad=6), out / "samples" / "prior.png")
    shapes = shape_of(torch.from_numpy(grids)).numpy().astype(np.uint8)
    np.savez_compressed(out / "samples" / "prior.npz", grids=grids, shapes=shapes)
    train = data.part("train").grids[:20_000]
    near = [(g[None] != train).sum((1, 2)).min() for g in grids[:64]]
    a, b = grid_statistics(grids), grid_statistics(data.part("train").grids)
    for key in ("valid", "mean_h", "mean_w", "colors_per_grid", "modal_share", "equal_to_cell_above"):
        print(f"{key:<22} prior {a[key]:8.3f}   training grids {b[key]:8.3f}")
    print(f"cells unlike the nearest training grid: median {np.median(near):.0f}")
    print(f"wrote {out / 'samples' / 'prior.png'}")


def plots(cfg):
    """Every picture of a run, into RUN/plots."""
    net, ran, out, data, device = load_run(cfg)
    held, to = data.part(cfg.split), out / "plots"
    pick = np.random.default_rng(cfg.seed).permutation(len(held))
    _, mu, kl_D = measure(net, held.where(pick[:2000]), device=device)
    held = held.where(pick[:2000])
    decode = torch.no_grad()(lambda z: best_rectangle(net.decode(z.to(device))).cpu().numpy())
    back = np.concatenate([decode(m) for m in mu[:200].split(50)])
    worst = (back != held.grids[:200]).sum((1, 2))[12:].argsort(kind="stable")[:-5:-1] + 12
    show = [*range(12), *worst]
    title = f"{ran.preset}: 12 held-out grids and reconstructions (z = mu); last row: the worst 4 of 200"
    draw.save(reconstructions(held.grids[show], back[show], title), to / "reconstruction.png")
    draw.save(prior_page(decode(net.draw(256, cfg.seed, device)), held.grids), to / "prior.png")
    t = torch.linspace(0, 1, 8)[:, None]
    rows = [strip(decode(a + t * (b - a))) for a, b in mu[16:28].view(6, 2, -1)]
    heads = [f"{i}/7" for i in range(8)]
    page = table(rows, heads, title="from one held-out grid to another, linear in mu")
    draw.save(page, to / "interpolation.png")
    draw.save(traversal(net, mu, decode), to / "traversal.png")
    if ran.latent == "vector":
        most = sorted(enumerate(kl_D.tolist()), key=lambda p: -p[1])[:40]
        page = draw.bars({f"z{j}": k for j, k in most}, title="nats a grid, by dimension")
    else:
        side = net.padded(net.canvas) // net.multiple
        patches = kl_D[2 * net.coded:].view(side, side, -1).sum(2)
        page = draw.heat(patches.numpy(), title="nats a grid, by patch (rows and columns of patches)")
    draw.save(page, to / "kl_per_dim.png")
    curves(out, to)
    maps(held, mu.numpy(), to)
    arithmetic(net, data.part(cfg.split), device, to)
    print(f"wrote {', '.join(sorted(p.name for p in to.glob('*.png')))} to {to}")


def traversal(net, mu, decode):
    """One latent of one grid moved from -2 to 2 standard deviations: the sizes, then the busiest."""
    first = 2 * net.coded
    area = net.shape(mu[:50]).prod(1)
    base = mu[int((area - 100).abs().argmin())]                 # large enough to see, small enough to read
    own = torch.nonzero(mu.var(0) * (base != 0) > 0)[:, 0]      # a patch outside the grid moves nothing
    own = own[own >= first]
    busy = own[mu.var(0)[own].argsort(descending=True)[:6]].tolist()
    rows, names = [], [*("height", "width")[:first], *(f"z{j}" for j in busy)]
    for j in [*range(first), *busy]:
        z = base.repeat(7, 1)
        z[:, j] = torch.linspace(-2, 2, 7) * (1 if j < first else float(mu[:, j].std()))
        rows.append(strip(decode(z)))
    heads = [f"{v / 3:.1f} sd" for v in range(-6, 7, 2)]
    return table(rows, heads, names, "one latent moved, the others held (at 0 beyond the edge of the grid)")


def arithmetic(net, held, device, to):
    """z(output 1) - z(input 1) + z(input 2), decoded, against output 2 of the same task: arithmetic.png."""
    model, copy, rows = Score(net.canvas), Score(net.canvas), []
    for t in np.unique(held.task)[:400]:
        one = held.where(held.task == t)
        at = np.flatnonzero((one.io[:-1] == 0) & (one.io[1:] == 1))
        if len(at) < 2:
            continue
        with torch.no_grad():
            mu, _ = net.encode(torch.from_numpy(one.grids[[at[0], at[0] + 1, at[1]]]).to(device))
            guess = best_rectangle(net.decode((mu[1] - mu[0] + mu[2])[None])).cpu().numpy()[0]
        x, y = one.grids[at[1]], one.grids[at[1] + 1]
        model.add(guess[None], y[None])
        copy.add(x[None], y[None])
        if len(rows) < 8:
            rows.append([picture(g) for g in (one.grids[at[0]], one.grids[at[0] + 1], x, guess, y)])
    if rows:
        a, b = model.result(), copy.result()
        heads = ("input 1", "output 1", "input 2", "decoded", "output 2")
        draw.save(table(rows, heads, title="z(output 1) - z(input 1) + z(input 2)"), to / "arithmetic.png")
        print(f"latent arithmetic, {a['n_grids']} tasks: cells {a['cell_acc']:.3f}, "
              f"exact {a['exact_acc']:.3f}; copying the input: cells {b['cell_acc']:.3f}, "
              f"exact {b['exact_acc']:.3f}")

# --- corpus and plan -------------------------------------------------------


def corpus(cfg):
    """Build corpus.npz: --data, filled up to --n with procedural grids; print what it holds."""
    began = time.perf_counter()
    n = cfg.n or 100_000
    data = load_corpus(cfg.data, cfg.canvas, n, cfg.seed, cfg.sizes == "fixed")
    if cfg.n > len(data):
        data = top_up(data, cfg.n, cfg.seed)
    path = pathlib.Path(cfg.out) if cfg.out.endswith(".npz") else pathlib.Path(cfg.out, "corpus.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = [p for p in map(pathlib.Path, cfg.data.split(",")) if p.is_file()]
    source = cfg.data or f"procedural, {n} drawn"
    meta = json.dumps(dict(version=1, seed=cfg.seed, data=source, grids=len(data),
                           sha256={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in inputs}))
    np.savez_compressed(path, meta=np.array(meta), **{f.name: getattr(data, f.name) for f in fields(data)})
    took = time.perf_counter() - began
    print(f"{len(data)} grids, {path.stat().st_size / 1e6:.1f} MB, {took:.0f} s: {path}")
    for name in SPLITS:
        part = data.part(name)
        if len(part):
            s = grid_statistics(part.grids)
            print(f"{name:<6}{len(part):>8} grids {len(np.unique(part.task)):>6} tasks  "
                  f"mean {s['mean_h']:.1f}x{s['mean_w']:.1f}  {s['colors_per_grid']:.1f} colours  "
                  "shares of 0-9 " + " ".join(f"{c:.3f}" for c in s["color_share"]))
    held = data.part("test") if (data.split == SPLITS["test"]).any() else data.part("train")
    for name, r in baselines(data.part("train"), held.where(slice(0, 2000)), dims=()).items():
        print(f"baseline {name:<10}" + "".join(f"{k} {r[k]:.3f}  " for k in COLUMNS))


def plan(cfg):
    """What a run would take; the model is built on the meta device."""
    with torch.device("meta"):
        net = BetaVAE(cfg)
    params = sum(p.numel() for p in net.parameters())
    cells = 279.5 if cfg.sizes == "coded" else cfg.canvas**2    # mean cells of a RE-ARC grid
    if cfg.latent == "spatial":                                 # every weight once a patch; sides round up
        macs = params * 1.06 * cells / cfg.patch**2
    else:                                                   # convolutions at 8x8 to 32x32, dense layers once
        macs = sum(w.numel() * (256 if w.dim() == 4 else 1) for w in net.parameters())
    flops = 6 * macs * cfg.batch
    memory = 0.6 + 16 * params / 1e9 + cfg.batch * cells / cfg.patch**2 * cfg.width * 160 * cfg.depth / 1e9
    run.print_plan(cfg, dict(params=params, flops_per_step=flops, disk_gb=40 * params / 1e9,
                             memory_gb_per_rank=memory, latents=net.latents(),
                             mfu_device="a core at 100 GFLOP/s",
                             hours_at_mfu=flops * cfg.steps / 1e11 / 3600))


if __name__ == "__main__":
    run.main(Config, PRESETS, dict(train=train, evaluate=evaluate, sample=sample, plots=plots, corpus=corpus,
                                   plan=plan))
