"""Drifting on ImageNet pixels: one forward pass, one image, no autoencoder.

Idea        Train a generator so that each step moves its samples a little towards real images and away from
            each other, in the features of frozen encoders: a masked autoencoder of pixels, and ConvNeXt-V2.
            When both pulls balance, one call is a picture.
Paper       Generative Modeling via Drifting, arXiv:2602.04770; where paper and the authors' JAX release
            differ we compute what the release computes (docs/drift.md lists every difference)
Reproduces  table8_b16 FID 1.76, table8_l16 1.61, 50k samples. Measured here: not run (paper scale); preset
            fashion: 84.6 % of one-step samples show the class asked for, docs/drift.md
Run         1 CPU   python drift_pixel.py                                        seconds, procedural pictures
            1 CPU   python drift_pixel.py --preset fashion --data FASHION_MNIST  encoder, generator, scores
            data    python drift_pixel.py prepare TRAIN.tar VAL.tar DEVKIT.tar.gz --size 256 --out SHARDS
            8 GPUs  torchrun --nproc_per_node=8 drift_pixel.py mae --preset table8_b16 --data SHARDS
                    torchrun --nproc_per_node=8 drift_pixel.py --preset table8_b16 --data SHARDS
                        --mae MAE.safetensors --convnext CONVNEXTV2_BASE
            weights python drift_pixel.py official FOLDER --out runs/b16
                    python drift_pixel.py sample --out runs/b16
Differs     from drift_latent.py: images of size 256 where that has latents of 32, patches of 16, an encoder
            that folds 8 x 8 pixels, ConvNeXt-V2 features (letter n), random resized crops as real samples,
            queues of bytes. Blocks that must stay the same carry the mark twin, and a test compares them

B images  N labels a step  G generated, P positive, U unconditional samples of a label  T style tables
R rows of the loss = labels x locations  F locations of a key  L tokens  D width  H heads  K head width
"""

import contextlib
import copy
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import data, draw, imagenet, run
from common.drift import fused, jax_release, judge, parallel, plans
from common.drift.codec import load_strict
from common.drift.convnext import ConvNeXt
from common.drift.queues import Bank, Pixels, open_pixels
from common.kernels import drift_loss
from common.run import UserError, opt

# --- config ------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    words: tuple = opt((), "official: the artifact folder; prepare: archives, or one folder", positional=True)
    preset: str = opt("smoke", "a row of PRESETS")
    out: str = opt("", "run directory (default runs/drift_pixel/PRESET); prepare: folder of the shards")
    data: str = opt("", "images: shards, folder, IDX or .npz; empty: procedural pictures of ten shapes")
    seed: int = opt(42, "seed of weights, order, queues and noise")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    steps: int = opt(100_000, "optimizer steps of the generator")
    compile: bool = opt(False, "torch.compile generator and encoder")
    shard: str = opt("ddp", "several ranks: networks whole on each, or cut over them", choices=parallel.WAYS)
    wandb: str = opt("", "Weights & Biases project")
    json: bool = opt(False, "plan: print one JSON object", free=True)
    # pictures
    size: int = opt(256, "side of the images")
    channels: int = opt(3, "channels of the images: 3, or 1 for grey")
    fit: str = opt("crop", "images of another size: ADM centre crop or black border", choices=("crop", "pad"))
    augment: str = opt("rrc", "real samples: RandomResizedCrop (0.2, 1) and mirror as released, mirror, none",
                       choices=("rrc", "flip", "none"))
    unofficial: bool = opt(False, "prepare: take other archives than the published ones", free=True)
    # generator
    patch: int = opt(16, "pixels on the side of a token")
    width: int = opt(768, "token width")
    depth: int = opt(12, "blocks")
    heads: int = opt(12, "attention heads")
    classes: int = opt(1000, "class labels")
    context: int = opt(16, "in-context tokens made of the condition (table 8: register tokens)")
    style_tables: int = opt(32, "random codes summed into the condition (table 8: style tokens)")
    style_codes: int = opt(64, "entries of a style table")
    qk_norm: bool = opt(True, "RMSNorm on queries and keys")
    rope: bool = opt(True, "rotary positions beside the learned ones")
    rms_norm: bool = opt(True, "RMSNorm with gain in blocks; off: LayerNorm without")
    attn_fp32: bool = opt(True, "softmax and its products in float32 under bf16")
    remat: bool = opt(False, "recompute blocks of generator and encoders in the backward pass", free=True)
    # feature encoders
    mae: str = opt("", "encoder: mae.safetensors or an official artifact folder; empty: train one in OUT/mae")
    mae_width: int = opt(256, "channels of the encoder's first stage")
    mae_blocks: tuple = opt((3, 4, 6, 3), "basic blocks per stage")
    mae_groups: int = opt(32, "groups of its GroupNorms, at most half its width")
    mae_fold: int = opt(8, "pixels on a side folded into channels before the first convolution")
    mae_steps: int = opt(30_000, "optimizer steps of the encoder")
    mae_batch: int = opt(8192, "images a step, all ranks together")
    mae_micro: int = opt(0, "images a rank encodes at once, 0 all; the loss is the same", free=True)
    mae_lr: float = opt(4e-3, "encoder learning rate")
    mae_warmup: int = opt(4000, "linear warm-up from 1e-6")
    mae_ema: float = opt(0.9995, "averaged weights are the encoder")
    mask_ratio: float = opt(0.5, "share of hidden cells")
    mask_cell: int = opt(2, "side of a hidden cell on the encoder's grid")
    cls_steps: int = opt(0, "last steps in which the class loss rises")
    cls_warmup: int = opt(1000, "steps in which it rises")
    cls_weight: float = opt(0.1, "its final weight")
    convnext: str = opt("", "ConvNeXt-V2 Base: safetensors or Hugging Face folder; letter n of --features")
    # drifting
    labels: int = opt(64, "N_c: labels a step, all ranks together")
    gen: int = opt(64, "N_gen = N_neg: generated samples per label")
    pos: int = opt(64, "N_pos: real samples per label")
    unc: int = opt(16, "N_unc: unconditional real samples per label")
    taus: tuple = opt((0.02, 0.05, 0.2), "kernel temperatures relative to the mean distance")
    floor: float = opt(1e-6, "lower bound of the product of the two softmaxes")
    features: str = opt("abcd", "A.5: a locations, b global statistics, c 2x2, d 4x4 patches; n ConvNeXt; "
                        "r folded pixels")
    location_sum: bool = opt(False, "sum a key's loss over locations, as printed; off: mean, as released")
    alpha_max: float = opt(4.0, "guidance scale alpha is drawn from [1, alpha_max]")
    alpha_power: float = opt(3.0, "with density alpha^-power")
    alpha_one: float = opt(0.0, "share of labels with alpha exactly 1")
    bank: int = opt(128, "queue of real samples per class")
    bank_unc: int = opt(1000, "queue of real samples of all classes")
    push: int = opt(64, "real samples that enter the queues per step and rank")
    fill: int = opt(0, "real samples that enter each rank's queues before the first step")
    micro: int = opt(0, "labels encoded at once, 0 all; the loss is the same", free=True)
    # optimizer
    lr: float = opt(2e-4, "peak learning rate")
    wd: float = opt(0.01, "weight decay, on every parameter")
    warmup: int = opt(5000, "linear warm-up from 1e-6")
    schedule: str = opt("constant", "after warm-up", choices=("constant", "cosine"))
    clip: float = opt(2.0, "gradient norm")
    ema: tuple = opt((0.999,), "decays of the averaged weights; the first is ema.safetensors")
    save_every: int = opt(2000, "checkpoint", free=True)
    keep_every: int = opt(10_000, "averaged weights kept under weights/", free=True)
    grid_every: int = opt(5000, "fixed-noise sample grid", free=True)
    log_every: int = opt(100, "lines of log.jsonl", free=True)
    # sample and evaluate
    weights: str = opt("", "weights to sample from (default OUT/ema.safetensors)", free=True)
    alphas: tuple = opt((1.0, 1.5, 2.0, 2.5, 3.0, 3.5), "guidance scales of evaluate", free=True)
    alpha: float = opt(1.0, "guidance scale of sample", free=True)
    count: int = opt(50_000, "samples per guidance scale", free=True)
    inception: str = opt("", "weights of the FID network; empty: a classifier trained here", free=True)
    fid_stats: str = opt("", "reference statistics (.npz with mu, sigma)", free=True)
    judge_epochs: int = opt(4, "epochs of that classifier on the real training set", free=True)
    then_evaluate: bool = opt(False, "train: evaluate at the end", free=True)


B16 = dict(size=256, channels=3, patch=16, width=768, depth=12, heads=12, mae_fold=8, remat=True)
LONG = dict(mae_width=640, mae_steps=200_000, cls_steps=3000, mae_micro=64, features="abcdn", warmup=10_000,
            steps=100_000, labels=128, gen=64, pos=128, unc=32, alpha_power=5.0, push=128, keep_every=50_000,
            ema=(0.999, 0.9995, 0.9998, 0.9999), alphas=(1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5),
            micro=1)
TINY = dict(size=32, fit="pad", augment="flip", patch=4, classes=10, context=4, style_tables=8,
            style_codes=16, mae_fold=4, mae_groups=8, mask_cell=1, labels=10, count=2000,
            alphas=(1.0, 1.5, 2.0))
PRESETS = {
    # table 9, first row. Its others: --mae MAE640 --mae-width 640 (9.35); --features abcdn --convnext FILE
    # beside that (3.70)
    "ablation": dict(paper="table 9, MAE-256, 100 epochs", expect=dict(fid=32.11), set=dict(
        B16, mae_width=256, mae_steps=30_000, mae_micro=128, lr=2e-4, wd=0.01, warmup=5000, steps=30_000,
        labels=64, gen=64, pos=64, unc=16, alpha_power=3.0, push=64, micro=2)),
    "table8_b16": dict(paper="table 8, column B/16", expect=dict(fid=1.76, isc=299.7), set=dict(
        B16, **LONG, lr=2e-4, wd=0.01)),
    "table8_l16": dict(paper="table 8, column L/16", expect=dict(fid=1.61, isc=307.5), set=dict(
        B16 | LONG | dict(width=1024, depth=24, heads=16, lr=4e-4, wd=0.01))),
    # 64 tokens of 4 x 4 pixels; r: the pixels pull while the encoder still sees nothing but grey
    "fashion": dict(paper="-", expect={}, goal=dict(accuracy=0.80), set=dict(
        TINY, channels=1, augment="none", width=128, depth=3, heads=4, mae_width=32, mae_blocks=(1, 1, 1, 1),
        mae_steps=1000, mae_batch=128, mae_lr=2e-3, mae_warmup=50, mae_ema=0.99, cls_steps=600,
        cls_warmup=100, gen=12, pos=24, unc=4, push=64, fill=4000, features="abcdr", lr=1.5e-3, warmup=50,
        schedule="cosine", steps=1600, ema=(0.99,), save_every=100, keep_every=500, grid_every=250,
        log_every=20, judge_epochs=2, then_evaluate=True)),
    "smoke": dict(paper="-", expect={}, set=dict(
        TINY, width=64, depth=2, heads=2, mae_width=16, mae_blocks=(1, 2, 2, 2), mae_steps=20, mae_batch=32,
        mae_lr=2e-3, mae_warmup=5, mae_ema=0.9, cls_steps=10, cls_warmup=5, labels=4, gen=8, pos=8, unc=4,
        push=16, fill=200, lr=1e-3, warmup=5, steps=20, ema=(0.9,), save_every=10, keep_every=10,
        grid_every=20, log_every=5, count=200, alphas=(1.0, 2.0), judge_epochs=1, then_evaluate=True)),
}


# --- generator ---------------------------------------------------------

class RMSNorm(nn.Module):  # twin: drift_latent.RMSNorm
    """x / sqrt(mean(x^2) + 1e-6) * gain over the last axis; statistics in float32, output in x's dtype."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return fused.rms_norm(x.float(), self.weight.float()).to(x.dtype)


class SwiGLU(nn.Module):  # twin: drift_latent.SwiGLU
    """W2( SiLU(W1 x) * W3 x ), hidden width floor(2/3 * 4 D) rounded up to a multiple of 32."""

    def __init__(self, width):
        super().__init__()
        hidden = -(-int(2 / 3 * 4 * width) // 32) * 32
        self.w1, self.w3 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rope_table(length, head_dim, base=10_000.0):  # twin: drift_latent.rope_table
    """cos and sin [L, K] of position * base^(-2 i / K), i < K/2; 1-D over tokens, context tokens first."""
    freq = base ** (-torch.arange(head_dim // 2, dtype=torch.float32) / (head_dim // 2))
    angle_LK = torch.outer(torch.arange(length, dtype=torch.float32), freq).repeat(1, 2)
    return angle_LK.cos(), angle_LK.sin()


def rotate(x_BHLK, cos_LK, sin_LK):  # twin: drift_latent.rotate
    """Rotary embedding in the rotate-half convention, angles in float32."""
    a, b = x_BHLK.chunk(2, dim=-1)
    return torch.addcmul(x_BHLK * cos_LK, torch.cat([-b, a], dim=-1), sin_LK).to(x_BHLK.dtype)


class Attention(nn.Module):  # twin: drift_latent.Attention
    """Self-attention with QK-norm, then RoPE; fp32 keeps softmax and products in float32 under autocast."""

    def __init__(self, width, heads, qk_norm, rope, fp32):
        super().__init__()
        self.heads, self.rope, self.fp32 = heads, rope, fp32
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x_BLD, cos_LK, sin_LK):
        B, L, D = x_BLD.shape
        q_BHLK, k_BHLK, v_BHLK = self.qkv(x_BLD).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHLK, k_BHLK = self.q_norm(q_BHLK), self.k_norm(k_BHLK)
        if self.rope:
            q_BHLK, k_BHLK = rotate(q_BHLK, cos_LK, sin_LK), rotate(k_BHLK, cos_LK, sin_LK)
        dtype = torch.float32 if self.fp32 else v_BHLK.dtype
        with no_autocast(x_BLD):
            o_BHLK = F.scaled_dot_product_attention(q_BHLK.to(dtype), k_BHLK.to(dtype), v_BHLK.to(dtype))
        return self.out(o_BHLK.transpose(1, 2).reshape(B, L, D).to(x_BLD.dtype))


def no_autocast(x):  # twin: drift_latent.no_autocast
    """Keep the types that the code says; the meta device, where sizes are counted, knows no autocast."""
    kind = x.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def modulation(linear, cond_BD, n, dtype):  # twin: drift_latent.modulation
    """adaLN: n vectors [B, 1, D] from the condition, computed in float32 whatever autocast says."""
    with no_autocast(cond_BD):
        return linear(F.silu(cond_BD.float())).to(dtype).unsqueeze(1).chunk(n, dim=-1)


class Block(nn.Module):  # twin: drift_latent.Block
    """x += g1 * Attn((1+s1) norm(x) + b1);  x += g2 * SwiGLU((1+s2) norm(x) + b2);  adaLN-zero."""

    def __init__(self, width, heads, cond, qk_norm, rope, rms_norm, attn_fp32):
        super().__init__()
        self.norm1, self.norm2 = make_norm(width, rms_norm), make_norm(width, rms_norm)
        self.attn, self.mlp = Attention(width, heads, qk_norm, rope, attn_fp32), SwiGLU(width)
        self.ada = nn.Linear(cond, 6 * width)

    def forward(self, x_BLD, cond_BD, cos_LK, sin_LK):
        b1, s1, g1, b2, s2, g2 = modulation(self.ada, cond_BD, 6, x_BLD.dtype)
        x_BLD = torch.addcmul(
            x_BLD, g1, self.attn(torch.addcmul(b1, 1 + s1, self.norm1(x_BLD)), cos_LK, sin_LK))
        return torch.addcmul(x_BLD, g2, self.mlp(torch.addcmul(b2, 1 + s2, self.norm2(x_BLD))))


def make_norm(width, rms_norm):  # twin: drift_latent.make_norm
    return RMSNorm(width) if rms_norm else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def sincos_2d(width, side):  # twin: drift_latent.sincos_2d
    """2-D sine-cosine positions [side^2, D]: first half of the channels the column, second half the row."""
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [torch.outer(p.reshape(-1).double(), omega) for p in (col, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def patchify(x_BCHW, p):  # twin: drift_latent.patchify
    """[B, C, h p, w p] -> [B, h w, p p C], order (row in patch, column in patch, channel)."""
    B, C, H, W = x_BCHW.shape
    return x_BCHW.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(x_BLP, p, side):  # twin: drift_latent.unpatchify
    """Inverse of patchify for a square of side x side patches."""
    x = x_BLP.view(x_BLP.shape[0], side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], x.shape[1], side * p, side * p)


def call(block, *args, remat):  # twin: drift_latent.call
    """block(*args); remat: keep its input alone and run it again in the backward pass."""
    again = remat and torch.is_grad_enabled()
    return checkpoint(block, *args, use_reentrant=False) if again else block(*args)


class Generator(nn.Module):  # twin: drift_latent.Generator
    """The one-step generator, a DiT: net(label_B, alpha_B, eps_BCHW, style_BT) -> sample_BCHW.

    label int in [0, classes); alpha the guidance scale >= 1, an input and not an extrapolation; eps ~ N(0, I)
    of the output's shape; style ints in [0, style_codes). The last Linear starts at zero: first outputs are
    0.
    """

    def __init__(self, size=32, channels=4, patch=2, width=768, depth=12, heads=12, classes=1000, context=16,
                 style_tables=32, style_codes=64, qk_norm=True, rope=True, rms_norm=True, attn_fp32=True,
                 remat=False):
        super().__init__()
        self.sizes = dict(
            size=size, channels=channels, patch=patch, width=width, depth=depth, heads=heads, classes=classes,
            context=context, style_tables=style_tables, style_codes=style_codes, qk_norm=qk_norm, rope=rope,
            rms_norm=rms_norm, attn_fp32=attn_fp32)
        self.size, self.channels, self.patch, self.remat = size, channels, patch, remat
        self.style_tables, self.style_codes = style_tables, style_codes
        side, cond = size // patch, width
        self.class_embed = nn.Embedding(classes, cond)
        self.style_embed = nn.Embedding(style_tables * style_codes, cond) if style_tables else None
        self.alpha_mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.alpha_norm = RMSNorm(cond)
        self.patch_in = nn.Linear(patch * patch * channels, width)
        self.pos = nn.Parameter(sincos_2d(width, side))
        self.context_in = nn.Linear(cond, width) if context else None
        self.context = nn.Parameter(0.02 * torch.randn(context, width)) if context else None
        self.blocks = nn.ModuleList(Block(width, heads, cond, qk_norm, rope, rms_norm, attn_fp32)
                                    for _ in range(depth))
        self.norm_out, self.ada_out = make_norm(width, rms_norm), nn.Linear(cond, 2 * width)
        self.patch_out = nn.Linear(width, patch * patch * channels)
        self.head_dim = width // heads
        self.set_rope()
        self.init()

    def set_rope(self):
        """The rotary tables, on the device of the parameters; not in the weights file."""
        length = self.pos.shape[0] + (0 if self.context is None else self.context.shape[0])
        with self.pos.device:
            for name, table in zip(("cos", "sin"), rope_table(length, self.head_dim)):
                self.register_buffer(name, table, persistent=False)

    def init(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for linear in (self.alpha_mlp[0], self.alpha_mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*(block.ada for block in self.blocks), self.ada_out, self.patch_out):
            nn.init.zeros_(linear.weight)

    def condition(self, label_B, alpha_B, style_BT):
        """cond [B, D] = class + sum of style codes + 0.02 RMSNorm(MLP(sinusoid(alpha)))."""
        freq = torch.exp(-math.log(10_000) * torch.arange(128, device=alpha_B.device) / 128)
        angle = alpha_B.float()[:, None] * freq
        alpha_BD = self.alpha_norm(self.alpha_mlp(torch.cat([angle.cos(), angle.sin()], dim=1)))
        cond_BD = self.class_embed(label_B)
        if self.style_embed is not None:
            first = torch.arange(self.style_tables, device=style_BT.device) * self.style_codes
            cond_BD = cond_BD + self.style_embed(style_BT + first).sum(1)
        return cond_BD + 0.02 * alpha_BD

    def forward(self, label_B, alpha_B, eps_BCHW, style_BT):
        cond_BD = self.condition(label_B, alpha_B, style_BT)
        tokens = self.patch_in(patchify(eps_BCHW, self.patch))
        x_BLD = tokens + self.pos.to(tokens.dtype)
        if self.context is not None:
            ctx_BLD = self.context_in(cond_BD)[:, None] + self.context.to(tokens.dtype)
            x_BLD = torch.cat([ctx_BLD, x_BLD], dim=1)
        for block in self.blocks:
            x_BLD = call(block, x_BLD, cond_BD, self.cos, self.sin, remat=self.remat)
        b, s = modulation(self.ada_out, cond_BD, 2, x_BLD.dtype)
        out_BLP = self.patch_out((1 + s) * self.norm_out(x_BLD) + b)[:, -self.pos.shape[0]:]
        return unpatchify(out_BLP, self.patch, self.size // self.patch)


# --- feature encoders --------------------------------------------------

def group_norm(channels, groups):  # twin: drift_latent.group_norm
    """GroupNorm, the largest group count <= groups that divides the channels; eps 1e-6 as in Flax."""
    groups = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)
    return fused.GroupNorm(groups, channels, eps=1e-6)


def conv(cin, cout, kernel=3, stride=1):  # twin: drift_latent.conv
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)


class ConvBlock(nn.Module):  # twin: drift_latent.ConvBlock
    """conv3x3 - GN - ReLU."""

    def __init__(self, cin, cout, groups):
        super().__init__()
        self.conv, self.gn = conv(cin, cout), group_norm(cout, groups)

    def forward(self, x):
        return F.relu_(self.gn(self.conv(x)))


class BasicBlock(nn.Module):  # twin: drift_latent.BasicBlock
    """ReLU( skip(x) + GN conv3x3 ReLU GN conv3x3(stride) x ); skip: 1x1 conv + GN where the shape changes."""

    def __init__(self, cin, cout, stride, groups):
        super().__init__()
        self.conv1, self.gn1 = conv(cin, cout, stride=stride), group_norm(cout, groups)
        self.conv2, self.gn2 = conv(cout, cout), group_norm(cout, groups)
        self.skip = nn.Identity()
        if stride > 1 or cin != cout:
            self.skip = nn.Sequential(conv(cin, cout, 1, stride), group_norm(cout, groups))

    def forward(self, x):
        y = self.gn2(self.conv2(F.relu_(self.gn1(self.conv1(x)))))
        return F.relu_(y.add_(self.skip(x)))


class UpBlock(nn.Module):  # twin: drift_latent.UpBlock
    """Bilinear resize to the skip's size, concatenate, GN, two conv blocks."""

    def __init__(self, cin, cskip, cout, groups):
        super().__init__()
        self.norm = group_norm(cin + cskip, groups)
        self.proj, self.refine = ConvBlock(cin + cskip, cout, groups), ConvBlock(cout, cout, groups)

    def forward(self, x, skip):
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(self.norm(torch.cat([x, skip], dim=1))))


def map_features(name, map_BCHW, sets="abcd"):  # twin: drift_latent.map_features
    """One feature map -> dict of vectors [B, F, C] (A.5): a every location, b global mean and std,
    c means and stds over 2x2 patches, d over 4x4 patches (skipped where the map does not divide).

    A patch's variance is the mean of its quarters' variances plus the variance of their means. In float32;
    std = sqrt(biased variance + 1e-6), so that its gradient stays finite on constant maps.
    """
    H, W = map_BCHW.shape[2:]
    vectors = lambda v_BChw: v_BChw.flatten(2).transpose(1, 2)
    deviations = lambda var_BChw: vectors((var_BChw + 1e-6).sqrt())
    mean, var, patches = map_BCHW.float(), 0.0, {}
    for letter, s in (("c", 2), ("d", 4)):
        if set(sets) <= set("ar") or H % s or W % s:
            break
        mean, var = fused.halve(mean, var)
        if letter in sets:
            patches[f"{name}_mean_{s}"] = vectors(mean.to(map_BCHW.dtype))
            patches[f"{name}_std_{s}"] = deviations(var)
    out = {name: vectors(map_BCHW)} if "a" in sets else {}
    if "b" in sets and H * W > 1:  # of a single location the mean is the location and the std constant
        all_mean = mean.mean((2, 3), keepdim=True)
        all_var = (var + (mean - all_mean).square()).mean((2, 3), keepdim=True)
        out[f"{name}_mean"], out[f"{name}_std"] = vectors(all_mean.to(map_BCHW.dtype)), deviations(all_var)
    return {**out, **patches}


class MAE(nn.Module):  # twin: drift_latent.MAE
    """ResNet masked autoencoder; trained once, then its frozen encoder is where drifting measures distances.

    forward(x_BCHW, mask_BHW) -> (reconstruction, logits); features(x) -> dict name -> [B, F, C], 86 keys at
    32x32. patch > 1 folds patch x patch cells of the input into channels first (8 for pixels). Keep two
    channels in a group: with one, the stage norms make a map's mean and std constants, those keys noise.
    """

    def __init__(self, channels=4, width=256, classes=1000, blocks=(3, 4, 6, 3), patch=1, groups=32,
                 remat=False):
        super().__init__()
        self.sizes = dict(channels=channels, width=width, classes=classes, blocks=tuple(blocks), patch=patch,
                          groups=groups)
        self.patch, self.remat, cin = patch, remat, channels * patch * patch
        C = [width, width, 2 * width, 4 * width, 8 * width]  # conv1, then the four stages
        self.conv1, self.gn1 = conv(cin, width), group_norm(width, groups)
        self.stages = nn.ModuleList(
            nn.ModuleList(BasicBlock(C[i] if j == 0 else C[i + 1], C[i + 1], 2 if i and j == 0 else 1, groups)
                          for j in range(n)) for i, n in enumerate(blocks))
        self.norms = nn.ModuleList(group_norm(c, groups) for c in C[1:])
        self.bridge = ConvBlock(C[4], C[4], groups)
        self.ups = nn.ModuleList(UpBlock(C[i + 1], C[i], C[i], groups) for i in (3, 2, 1, 0))
        self.head, self.fc = nn.Conv2d(width, cin, 1), nn.Linear(C[4], classes)
        for module in self.modules():  # Flax defaults: LeCun normal, truncated at two deviations; zero bias
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fold(self, x_BCHW):
        """Space to depth, channel order (row in patch, column in patch, channel)."""
        B, _, H, W = x_BCHW.shape
        p = self.patch
        return x_BCHW if p == 1 else patchify(x_BCHW, p).transpose(1, 2).reshape(B, -1, H // p, W // p)

    def encode(self, x):
        """Folded input -> dict of 12 maps: conv1, layer1..4 after the stage norm, layerI_blkK before it."""
        maps = {"conv1": F.relu_(self.gn1(self.conv1(x)))}
        x = maps["conv1"]
        blocks = {}
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms), 1):
            for j, block in enumerate(stage, 1):
                x = call(block, x, remat=self.remat)
                if j % 2 == 0:
                    blocks[f"layer{i}_blk{j}"] = x
            x = maps[f"layer{i}"] = norm(x)
        return {**maps, **blocks}

    def forward(self, x_BCHW, mask_BHW):
        x = self.fold(x_BCHW)
        maps = self.encode(x * (1 - mask_BHW[:, None]))
        y = self.bridge(maps["layer4"])
        for up, skip in zip(self.ups, ("layer3", "layer2", "layer1", "conv1")):
            y = up(y, maps[skip])
        return self.head(y), self.fc(maps["layer4"].mean((2, 3)))

    def features(self, x_BCHW, sets="abcd"):
        """Everything the drift loss looks at: dict key -> [B, F, C]; differentiable in x."""
        x = self.fold(x_BCHW)
        out = {"global": x_BCHW.permute(0, 2, 3, 1).flatten(1)[:, None],
               "norm_x": (x.float().square().mean((2, 3)) + 1e-6).sqrt()[:, None]}
        if "r" in sets:  # ours, for weak encoders: their input itself as one more map
            out.update(map_features("x", x, sets))
        with no_autocast(x):  # GroupNorm stays in the weights' dtype, bf16 on a GPU
            for name, fmap in self.encode(x.to(self.conv1.weight.dtype)).items():
                out.update(map_features(name, fmap, sets))
        return out


def mae_loss(mae, x_BCHW, label_B, mask_BHW, lam):  # twin: drift_latent.mae_loss
    """lam * cross-entropy + (1 - lam) * reconstruction, mean over images -> (loss, reconstruction, accuracy).

    Reconstruction: squared error summed over channels and hidden cells, divided by the number of those cells.
    mask_BHW: 1 where the (folded) input was hidden.
    """
    recon, logit_BK = mae(x_BCHW, mask_BHW)
    target = getattr(mae, "module", mae).fold(x_BCHW).float()
    error_BHW = (recon.float() - target).square().sum(1)
    recon_B = (error_BHW * mask_BHW).sum((1, 2)) / (mask_BHW.sum((1, 2)) + 1e-8)
    ce = F.cross_entropy(logit_BK.float(), label_B)
    accuracy = (logit_BK.argmax(1) == label_B).float().mean()
    return lam * ce + (1 - lam) * recon_B.mean(), recon_B.mean().detach(), accuracy


def to_float(x_BCHW):
    """uint8 -> float32 in [-1, 1]."""
    return x_BCHW.float() / 127.5 - 1


class Encoder(nn.Module):
    """Where drifting measures distances: the MAE, and with letter n ConvNeXt-V2 beside it, 99 keys in all."""

    def __init__(self, mae, convnext=None):
        super().__init__()
        self.mae, self.convnext = mae, convnext

    def features(self, x_BCHW, sets="abcd"):
        """Images, float in [-1, 1] or bytes, -> dict key -> [B, F, C]; differentiable in x."""
        x_BCHW = to_float(x_BCHW) if x_BCHW.dtype == torch.uint8 else x_BCHW
        out = self.mae.features(x_BCHW, sets)
        if "n" in sets:
            out.update(self.convnext.features(x_BCHW))
        return out


# --- official weights --------------------------------------------------

def load_official(folder):  # twin: drift_latent.load_official
    """Folder of the JAX release (metadata.json, ema_params.msgpack) -> Generator or MAE, eval mode, float32.

    Every tensor must be there, with the right shape, and nothing may be left over. Raises UserError.
    """
    kind, sizes, _ = jax_release.describe(folder)
    with torch.device("meta"):
        net = Generator(**sizes) if kind == "generator" else MAE(**sizes)
    jax_release.load(folder, net, kind)
    if kind == "generator":
        net.set_rope()
    return net


# --- drift -------------------------------------------------------------

def alpha_law(u, power, high=4.0):  # twin: drift_latent.alpha_law
    """u ~ U(0,1) -> alpha in [1, high] with density proportional to alpha^-power; power 1 is log-uniform."""
    e = 1 - power
    return high ** u if abs(e) < 1e-6 else (1 + u * (high ** e - 1)) ** (1 / e)


def alpha_weight(alpha, n_gen, n_unc):  # twin: drift_latent.alpha_weight
    """Weight w = (alpha - 1)(n_gen - 1) / n_unc of one unconditional negative (A.7); -1 is the masked self.

    Negatives then follow (1 - gamma) q(.|c) + gamma p(.) with alpha = 1 / (1 - gamma) (eq. 15-16).
    """
    return (alpha - 1) * (n_gen - 1) / max(1, n_unc)


def draw_batch(cfg, bank, ddp):
    """Everything random of one step, on the CPU so that every device draws the same.

    -> dict: label, alpha [N], eps [N, G, C, H, W], style [N, G, T], and as bytes pos [N, P, C, H, W] and
    unc [N, U, C, H, W].
    """
    n = cfg.labels // ddp.world
    label_N = bank.labels(n)
    alpha_N = alpha_law(torch.rand(n), cfg.alpha_power, cfg.alpha_max)
    alpha_N = torch.where(torch.rand(n) < cfg.alpha_one, torch.ones(n), alpha_N)
    pos, unc = bank.by_class.draw(label_N, cfg.pos), bank.any.draw(torch.zeros_like(label_N), cfg.unc)
    eps = torch.randn(n, cfg.gen, cfg.channels, cfg.size, cfg.size)
    style = torch.randint(cfg.style_codes, (n, cfg.gen, cfg.style_tables))
    return {k: v.to(ddp.device) for k, v in dict(label=label_N, alpha=alpha_N, eps=eps, style=style, pos=pos,
                                                 unc=unc).items()}


def generate(net, b, part):  # twin: drift_latent.generate
    """Samples of some labels of a batch -> [N * G, C, h, w]; the G of a label share class and alpha."""
    G = b["eps"].shape[1]
    label, alpha = b["label"][part].repeat_interleave(G), b["alpha"][part].repeat_interleave(G)
    return net(label, alpha, b["eps"][part].flatten(0, 1), b["style"][part].flatten(0, 1))


def by_label(feats, n):  # twin: drift_latent.by_label
    """{key: [N * X, F, C]} -> {key: [N, F, X, C]}: one drift problem per label and location."""
    return {key: f.unflatten(0, (n, -1)).transpose(1, 2) for key, f in feats.items()}


def real_features(mae, b, cfg, parts):  # twin: drift_latent.real_features
    """Features of positives and unconditional samples of every label, encoded part by part, no gradient."""
    out = []
    for part in parts:
        x = torch.cat([b["pos"][part], b["unc"][part]], dim=1)
        with torch.no_grad():
            out.append(by_label(mae.features(x.flatten(0, 1), cfg.features), len(x)))
    return out[0] if len(out) == 1 else {key: torch.cat([o.pop(key) for o in out]) for key in list(out[0])}


def drift_objective(gen, real, alpha_N, cfg, group):  # twin: drift_latent.drift_objective
    """Sum over keys of the drift loss (each a mean over labels and locations) -> (loss, {key: info}).

    gen {key: [N, F, G, C]} carries the gradient, real {key: [N, F, P + U, C]} does not.
    """
    weight_N, total, infos = alpha_weight(alpha_N, cfg.gen, cfg.unc), 0.0, {}
    for keys in fused.packs(gen):       # keys of one width go through side by side along F
        places = [gen[key].shape[1] for key in keys]
        gen_RGC, real_RXC = (torch.cat([of[key] for key in keys], 1).flatten(0, 1) for of in (gen, real))
        pos_RPC, unc_RUC = real_RXC.split([cfg.pos, cfg.unc], dim=1)
        key_F = torch.arange(len(keys)).repeat_interleave(torch.tensor(places)).to(alpha_N.device)
        loss_R, info = drift_loss(gen_RGC, pos_RPC, unc_RUC, weight_N.repeat_interleave(len(key_F)), cfg.taus,
                                  cfg.floor, group, key_F.repeat(len(alpha_N)))
        for loss_NF in loss_R.view(len(alpha_N), -1).split(places, dim=1):
            total = total + loss_NF.mean() * (loss_NF.shape[1] if cfg.location_sum else 1)
        infos.update((key, {name: v[i] for name, v in info.items()}) for i, key in enumerate(keys))
    return total, {key: infos[key] for key in gen}


def drift_backward(net, mae, b, cfg, ddp, group=None):  # twin: drift_latent.drift_backward
    """Forward and backward of one step; leaves gradients in net -> (loss, {key: info}).

    One drift problem needs all samples of a label, and the scales m and lambda of a key need all labels, but
    the networks need neither. So with --micro k labels at once: every part is generated and encoded without a
    graph, the loss of the whole batch gives d loss / d features, and each part is run again with a graph that
    takes its share. Same loss and gradient as the full batch; memory for one graph of k labels and the
    features.
    """
    N = len(b["label"])
    k = cfg.micro or N
    parts = [slice(i, min(i + k, N)) for i in range(0, N, k)]
    with run.autocast(ddp.device):
        real = real_features(mae, b, cfg, parts)
        if len(parts) == 1:
            feats = mae.features(generate(net, b, parts[0]), cfg.features)
            loss, infos = drift_objective(by_label(feats, N), real, b["alpha"], cfg, group)
            loss.backward()
            return loss.detach(), infos
        plain, leaves = getattr(net, "module", net), []
        with torch.no_grad():
            for part in parts:
                feats = mae.features(generate(plain, b, part), cfg.features)
                leaves.append(by_label(feats, part.stop - part.start))
        leaves = {key: torch.cat([o.pop(key) for o in leaves]).requires_grad_() for key in list(leaves[0])}
        loss, infos = drift_objective(leaves, real, b["alpha"], cfg, group)
        real.clear()
        loss.backward()
        for part in parts:
            last = part.stop == N
            with contextlib.nullcontext() if last or net is plain else net.no_sync():
                feats = by_label(mae.features(generate(net, b, part), cfg.features), part.stop - part.start)
                torch.autograd.backward(list(feats.values()), [leaves[key].grad[part] for key in feats])
    return loss.detach(), infos


# --- train the encoder -------------------------------------------------

def lr_at(i, lr, warmup, schedule="constant", steps=0):  # twin: drift_latent.lr_at
    """Learning rate of update i = 0, 1, ...: linear from 1e-6 over warmup, then constant or a cosine to 0."""
    if i < warmup:
        return 1e-6 + (lr - 1e-6) * i / warmup
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, steps - warmup)))


def cls_lambda(i, steps, cls_steps, warmup, weight):  # twin: drift_latent.cls_lambda
    """Weight of the class loss at update i = 0, 1, ...: 0, then rising over the last cls_steps (A.3)."""
    since = i - (steps - cls_steps)
    return weight * min(1.0, since / max(1, warmup)) if since >= 0 and cls_steps else 0.0


def random_mask(n, side, cell, ratio):  # twin: drift_latent.random_mask
    """mask_BHW: each cell x cell patch of the encoder's grid is 1, hidden, independently with this ratio."""
    mask = (torch.rand(n, side // cell, side // cell) < ratio).float()
    return mask.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


@torch.no_grad()
def ema_update(ema, net, decay):  # twin: drift_latent.ema_update
    for average, value in zip(ema.parameters(), net.parameters()):
        average.lerp_(value, 1 - decay)


def adamw(net, lr, wd):  # twin: drift_latent.adamw
    return torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=wd,
                             fused=True)


def mae_sizes(cfg):  # twin: drift_latent.mae_sizes
    return dict(channels=cfg.channels, width=cfg.mae_width, classes=cfg.classes, blocks=cfg.mae_blocks,
                patch=cfg.mae_fold, groups=cfg.mae_groups)


def mae_backward(net, x_BCHW, label_B, mask_BHW, lam, cfg, ddp):  # twin: drift_latent.mae_backward
    """Forward and backward of one step -> mean (loss, reconstruction, accuracy).

    An image's loss is its own, so with --mae-micro k images at a time the gradient stays the same.
    """
    B, total = len(x_BCHW), 0
    k = cfg.mae_micro or B
    for i in range(0, B, k):
        part = slice(i, min(i + k, B))
        quiet = part.stop < B and hasattr(net, "no_sync")
        with net.no_sync() if quiet else contextlib.nullcontext():
            with run.autocast(ddp.device):
                parts = mae_loss(net, x_BCHW[part], label_B[part], mask_BHW[part], lam)
            share = (part.stop - part.start) / B
            (parts[0] * share).backward()
        total = total + share * torch.stack(parts).detach()
    return total


def train_mae(cfg, ddp=None, source=None):
    """Masked autoencoder on pixels (4.2, 4.3) -> path of OUT/mae/mae.safetensors, the averaged weights."""
    ddp = ddp or run.init(cfg.device)
    check(cfg, ddp)
    source = source or Pixels(cfg)
    out = Path(cfg.out) / "mae"
    cfg = dataclasses.replace(cfg, out=str(out))
    run.seed_all(cfg.seed, 0)
    mae = MAE(**mae_sizes(cfg), remat=cfg.remat).to(ddp.device)
    ema = copy.deepcopy(mae)
    net = parallel.wrap(mae, (BasicBlock, UpBlock), ddp, cfg.shard, [ema])
    optim = adamw(mae, cfg.mae_lr, 0.01)
    state, ranked = parallel.states(dict(net=mae, ema=ema, optim=optim), {}, ddp, cfg.shard)
    log = run.Log(cfg, ddp, data=dict(images=cfg.data or "procedural", rows=len(source.labels)))
    start = run.load(out, state, ddp, ranked)
    side, epochs = cfg.size // cfg.mae_fold, cfg.mae_batch * cfg.mae_steps / len(source.labels)
    order = data.Order(len(source.labels), cfg.mae_batch, cfg.seed, ddp.rank, ddp.world)

    def export(name, step, cls_steps):
        meta = dict(kind="mae", sizes=mae_sizes(cfg), step=step, epochs=round(epochs, 2), cls_steps=cls_steps,
                    ema=cfg.mae_ema, names=source.names, preset=cfg.preset)
        tensors = parallel.full_state(ema)
        if ddp.rank == 0:
            run.save_weights(out / name, tensors, meta)

    feed = data.batches(source.images, order, start, cfg.mae_steps)
    for step in run.progress(start, cfg.mae_steps, ddp, "mae"):
        _, x_BCHW, label_B = next(feed)
        run.seed_all(cfg.seed, 1, ddp.rank, step)
        mask_BHW = random_mask(len(x_BCHW), side, cfg.mask_cell, cfg.mask_ratio)
        lam = cls_lambda(step - 1, cfg.mae_steps, cfg.cls_steps, cfg.cls_warmup, cfg.cls_weight)
        lr = optim.param_groups[0]["lr"] = lr_at(step - 1, cfg.mae_lr, cfg.mae_warmup)
        optim.zero_grad(set_to_none=True)
        x_BCHW, label_B, mask_BHW = (v.to(ddp.device) for v in (x_BCHW, label_B, mask_BHW))
        values = mae_backward(net, to_float(x_BCHW), label_B, mask_BHW, lam, cfg, ddp)
        nn.utils.clip_grad_norm_(mae.parameters(), 2.0)
        optim.step()
        ema_update(ema, mae, cfg.mae_ema)
        if step % cfg.log_every == 0 or step == cfg.mae_steps:
            loss, recon, accuracy = run.all_mean(values, ddp).tolist()
            run.check_finite(step, loss=loss)
            log("mae", step=step, loss=loss, recon=recon, accuracy=accuracy, lam=lam, lr=lr)
        if cfg.cls_steps and step == cfg.mae_steps - cfg.cls_steps:
            export("mae_before_cls.safetensors", step, 0)
        run.save_if_due(out, step, cfg.mae_steps, cfg.save_every, state, ddp, ranked)
    export("mae.safetensors", cfg.mae_steps, cfg.cls_steps)
    log.finish()
    return str(out / "mae.safetensors")


def load_encoder(cfg, ddp, source):
    """The frozen encoders: --mae, or the one in OUT/mae, trained now when it is not there, and --convnext."""
    path = cfg.mae or str(Path(cfg.out) / "mae" / "mae.safetensors")
    convnext = ConvNeXt.load(cfg.convnext, remat=cfg.remat).to(ddp.device) if "n" in cfg.features else None
    if not cfg.mae and not os.path.exists(path):
        train_mae(cfg, ddp, source)
        if ddp.world > 1:
            dist.barrier()
    if os.path.isdir(path):
        mae = load_official(path)
    else:
        tensors, meta = run.load_weights(path)
        if meta.get("kind") != "mae":
            raise UserError(f"{path} does not hold a feature encoder")
        mae = MAE(**meta["sizes"])
        load_strict(mae, tensors, path)
    wanted = dict(channels=cfg.channels, width=cfg.mae_width, patch=cfg.mae_fold)
    if not isinstance(mae, MAE) or any(mae.sizes[name] != value for name, value in wanted.items()):
        raise UserError(f"{path} is no encoder of width {cfg.mae_width} for {cfg.channels} channels folded "
                        f"{cfg.mae_fold} x {cfg.mae_fold}; see --mae-width, --channels and --mae-fold")
    mae.remat = cfg.remat
    with run.autocast(ddp.device):
        low = torch.is_autocast_enabled(ddp.device.type)
    mae = mae.eval().requires_grad_(False).to(ddp.device, torch.bfloat16 if low else torch.float32)
    return Encoder(fused.channels_last(mae), convnext)


# --- train the generator -----------------------------------------------

def sizes(cfg):  # twin: drift_latent.sizes
    """The Generator's constructor arguments, which its weights file carries."""
    names = "size channels patch width depth heads classes context style_tables style_codes"
    return {name: getattr(cfg, name) for name in f"{names} qk_norm rope rms_norm attn_fp32".split()}


def check(cfg, ddp):
    """A user's mistakes, found before anything is allocated."""
    per = run.per_rank(cfg.labels, ddp, "--labels")
    run.per_rank(cfg.mae_batch, ddp, "--mae-batch")
    if cfg.push < per:
        raise UserError(f"--push {cfg.push} is below the {per} labels a rank draws from the pushed images; "
                        f"try --push {per} or {-(-cfg.labels // max(1, cfg.push))} ranks")
    if (cfg.size % cfg.patch or cfg.size % (cfg.mae_fold * cfg.mask_cell) or cfg.width % (2 * cfg.heads)
            or cfg.width % 4):
        raise UserError(f"--size {cfg.size} must divide by --patch and --mae-fold x --mask-cell, "
                        f"--width {cfg.width} by twice --heads and by 4")
    if 2 * cfg.mae_groups > cfg.mae_width:
        raise UserError(
            f"--mae-groups {cfg.mae_groups} leaves --mae-width {cfg.mae_width} one channel a group "
            f"and a map's mean constant; try --mae-groups {cfg.mae_width // 2}")
    if set(cfg.features) - set("abcdnr") or min(cfg.taus, default=0) <= 0 or not cfg.ema:
        raise UserError("--features takes letters of abcdnr, --taus numbers above 0, --ema one decay or more")


def train(cfg):
    """Encoder if there is none, then the generator; OUT/ema.safetensors is enough to sample."""
    ddp = run.init(cfg.device)
    check(cfg, ddp)
    if "n" in cfg.features and not cfg.convnext:
        raise UserError("letter n of --features needs --convnext FILE (facebook/convnextv2-base-22k-224, "
                        f"model.safetensors); without it: --features {cfg.features.replace('n', '')}")
    run.keep_freed_memory()                                 # a step makes and frees the same tensors
    source = Pixels(cfg)
    encoder = load_encoder(cfg, ddp, source)
    run.seed_all(cfg.seed, 0)
    gen = Generator(**sizes(cfg), remat=cfg.remat).to(ddp.device)
    emas = {str(decay): copy.deepcopy(gen).eval().requires_grad_(False) for decay in cfg.ema}
    need_gb = plans.disk_gb(gen, len(emas))
    net = parallel.wrap(gen, (Block,), ddp, cfg.shard, emas.values())
    optim = adamw(gen, cfg.lr, cfg.wd)
    bank = Bank(source, cfg.classes, (cfg.channels, cfg.size, cfg.size), cfg.bank, cfg.bank_unc)
    state = dict(net=gen, optim=optim, **{f"ema_{decay}": ema for decay, ema in emas.items()})
    state, ranked = parallel.states(state, dict(bank=bank), ddp, cfg.shard)
    log = run.Log(cfg, ddp, need_gb=need_gb, data=dict(images=cfg.data or "procedural"))
    start = run.load(cfg.out, state, ddp, ranked)
    order = data.Order(len(source.labels), cfg.push * ddp.world, cfg.seed, ddp.rank, ddp.world)
    if start == 0 and cfg.fill:
        rows = np.random.default_rng([cfg.seed, 3]).permutation(len(source.labels))
        bank.push(0, rows[ddp.rank::ddp.world][:cfg.fill])
    if cfg.compile:
        net, encoder.features = torch.compile(net), torch.compile(encoder.features)
    group, began, images = (dist.group.WORLD if ddp.world > 1 else None), time.time(), 0

    feed = data.batches(source.images, order, start, cfg.steps)     # cropped ahead, in processes of their own
    for step in run.progress(start, cfg.steps, ddp):
        _, fresh_BCHW, _ = next(feed)
        run.seed_all(cfg.seed, 2, ddp.rank, step)
        bank.push(*order(step), fresh_BCHW)
        batch = draw_batch(cfg, bank, ddp)
        lr = optim.param_groups[0]["lr"] = lr_at(step - 1, cfg.lr, cfg.warmup, cfg.schedule, cfg.steps)
        optim.zero_grad(set_to_none=True)
        loss, infos = drift_backward(net, encoder, batch, cfg, ddp, group)
        grad_norm = parallel.full(nn.utils.clip_grad_norm_(gen.parameters(), cfg.clip))
        optim.step()
        for decay, ema in emas.items():
            ema_update(ema, gen, float(decay))
        images += cfg.labels * cfg.gen

        if step % cfg.log_every == 0 or step in (1, cfg.steps):
            loss = float(run.all_mean(loss, ddp))
            run.check_finite(step, loss=loss, grad_norm=grad_norm)
            log("train", step=step, loss=loss, grad_norm=float(grad_norm), lr=lr,
                img_s=images / (time.time() - began), mem_gb=plans.memory_gb(ddp.device),
                underflows=bank.by_class.underflows, **drift_stats(infos, batch, cfg))
        if step % cfg.grid_every == 0 or step in (1, cfg.steps):
            sample_grid(cfg, ddp, emas[str(cfg.ema[0])], step)
        if step % cfg.save_every == 0 and step < cfg.steps:
            export(cfg, ddp, emas, source, step)
        run.save_if_due(cfg.out, step, cfg.steps, cfg.save_every, state, ddp, ranked)
    export(cfg, ddp, emas, source, cfg.steps)       # a finished run makes lost files anew
    log.finish()
    if cfg.then_evaluate and ddp.rank == 0:
        evaluate(cfg)


def drift_stats(infos, batch, cfg):  # twin: drift_latent.drift_stats
    """What shows progress, as the loss is constant by construction: m = S sqrt(C) and lambda of every key.

    floored: share of (key, tau) whose scale stands at its numerical floor and carries noise, not signal.
    """
    alpha_N, w_N = batch["alpha"], alpha_weight(batch["alpha"], cfg.gen, cfg.unc)
    table = torch.stack([torch.stack(list(info.values())).float() for info in infos.values()]).cpu()
    m, lam2 = table[:, 0], table[:, 1:]
    floored = (lam2 <= 1e-8) | (m[:, None] <= 1e-3)
    return dict(lam_mean=float(lam2.clamp_min(1e-30).log10().mean() / 2),
                floored=float(floored.float().mean()),
                m=dict(zip(infos, m.tolist())), lam=dict(zip(infos, lam2.sqrt().tolist())),
                alpha_mean=float(alpha_N.mean()), w_mean=float(w_N.mean()),
                gamma_mean=float((1 - 1 / alpha_N).mean()))


def export(cfg, ddp, emas, source, step):
    """ema.safetensors (first decay), ema_DECAY.safetensors; every --keep-every steps a copy in weights/."""
    for i, (decay, ema) in enumerate(emas.items()):
        meta = dict(kind="generator", sizes=sizes(cfg), step=step, ema=float(decay), space="pixels",
                    names=source.names, preset=cfg.preset)
        tensors = parallel.full_state(ema)
        if ddp.rank:
            continue
        name = "ema.safetensors" if i == 0 else f"ema_{decay}.safetensors"
        run.save_weights(Path(cfg.out) / name, tensors, meta)
        if i == 0 and (step % cfg.keep_every == 0 or step == cfg.steps):
            run.save_weights(Path(cfg.out) / "weights" / f"{step:08d}.safetensors", tensors, meta)


# --- sample and evaluate -----------------------------------------------

def load_generator(cfg, device, path=None):
    """(Generator in eval mode, meta) of a weights file; shapes come from the file alone.

    A shape flag on the command line that contradicts the file is refused.
    """
    path = path or cfg.weights or str(Path(cfg.out) / "ema.safetensors")
    tensors, meta = run.load_weights(path)
    if meta.get("kind") != "generator" or meta.get("space") != "pixels":
        raise UserError(f"{path} does not hold a generator of pixels")
    for name, value in meta["sizes"].items():
        flags = {"--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")}
        if flags & {word.split("=")[0] for word in sys.argv} and getattr(cfg, name) != value:
            raise UserError(f"{path} has {name} {value}, not {getattr(cfg, name)}; drop the flag")
    with torch.device("meta"):
        net = Generator(**meta["sizes"])
    net.to_empty(device=device).set_rope()
    load_strict(net, tensors, path)
    return net.eval(), meta


def to_uint8(x_BCHW):  # twin: drift_latent.to_uint8
    """[-1, 1] -> uint8, truncated and not rounded, as in the released evaluation."""
    return ((x_BCHW + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def sample_images(net, label_B, alpha, seed, device, batch=250):
    """One network call per image -> uint8 [B, C, H, W]; an image is a function of seed, place and label."""
    out, shape = [], (net.channels, net.size, net.size)
    for i, label in enumerate(label_B.split(batch)):
        g = run.generator(seed, 5, i)
        eps = torch.randn(len(label), *shape, generator=g)
        style = torch.randint(max(1, net.style_codes), (len(label), net.style_tables), generator=g)
        with run.autocast(device):
            x = net(label.to(device), torch.full((len(label),), float(alpha), device=device), eps.to(device),
                    style.to(device))
        out.append(to_uint8(x.float()).cpu())
    return torch.cat(out)


def sample_grid(cfg, ddp, net, step):
    """Ten columns of classes, eight rows of the same noises and styles at every step."""
    state = parallel.full_state(net)                # cut over ranks, it takes all of them to put it together
    if ddp.rank == 0:
        net = Generator(**sizes(cfg)).to(ddp.device).eval()
        net.load_state_dict(state)
        label_B = torch.arange(min(10, cfg.classes)).repeat(8)
        images = sample_images(net, label_B, cfg.alpha, cfg.seed, ddp.device)
        draw.save(judge.picture(images, min(10, cfg.classes)), Path(cfg.out) / "samples" / f"{step:08d}.png")


def sample(cfg):
    """OUT/samples/alphaA.npz (arr_0 uint8 NHWC, labels) with --count images, and a grid of a hundred."""
    ddp = run.init(cfg.device)
    net, meta = load_generator(cfg, ddp.device)
    label_B = judge.rows_of_classes(cfg.count, meta["sizes"]["classes"])
    began = time.time()
    images = sample_images(net, label_B, cfg.alpha, cfg.seed, ddp.device)
    took = time.time() - began
    name = judge.save_samples(Path(cfg.out) / "samples" / f"alpha{cfg.alpha:g}", images, label_B)
    print(f"{cfg.count} images in {took:.1f} s: {name}.npz, {name}.png")


def evaluate(cfg):
    """Scores of one-step samples at every --alphas; lines in the log, grids in samples/.

    With --inception FID (against --fid-stats) and the inception score. Without, a classifier trained here on
    the real training set: share of samples it gives the requested class, Frechet distance and
    precision/recall in its features beside their floor (real train against real test), nearest training
    images of ten samples.
    """
    ddp = run.init(cfg.device)
    if cfg.inception:
        test, base = judge.inception_test(cfg.inception, cfg.fid_stats, cfg.out, ddp.device)
    else:
        real = [open_pixels(cfg, split) for split in ("train", "test")]
        test, base = judge.classifier_test(*real, cfg.out, cfg.count, cfg.judge_epochs, cfg.seed, ddp.device)
    net, meta = load_generator(cfg, ddp.device)
    label_B, rows = judge.rows_of_classes(cfg.count, len(meta["names"]) or meta["sizes"]["classes"]), []
    for alpha in cfg.alphas:
        began = time.time()
        images = sample_images(net, label_B, alpha, cfg.seed + 1, ddp.device)
        rows.append(dict(step=meta["step"], alpha=alpha, n=cfg.count, img_s=cfg.count / (time.time() - began),
                         **test(images, label_B, f"alpha{alpha:g}"), **base))
        run.record(cfg.out, "eval", **rows[-1])
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    for name, paper in PRESETS.get(meta["preset"], dict(expect={}))["expect"].items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            best = min(values) if name == "fid" else max(values)
            print(f"{name} {best:.2f}  paper {paper}  {best - paper:+.2f}")
    return rows


# --- prepare, ablate, plan, official -----------------------------------

def prepare(cfg):
    """ILSVRC2012 archives as published, or an image folder, to tar shards in --out; resumable, idempotent."""
    if not cfg.words:
        raise UserError("give the archives or one folder: prepare TRAIN.tar VAL.tar DEVKIT.tar.gz --out DIR")
    imagenet.prepare(cfg.words, cfg.out, cfg.size, unofficial=cfg.unofficial)


ABLATIONS = {"all": {}, "no_rope": dict(rope=False), "no_qk_norm": dict(qk_norm=False),
             "layer_norm": dict(rms_norm=False), "no_style": dict(style_tables=0),
             "no_context": dict(context=0), "features_ab": dict(without="cd"),
             "features_abc": dict(without="d"), "no_convnext": dict(without="n"),
             "no_pixels": dict(without="r"), "no_crop": dict(augment="flip"),
             "tau_0.02": dict(taus=(0.02,)), "tau_0.2": dict(taus=(0.2,)), "floor_0": dict(floor=0.0)}


def ablate(cfg):
    """One short run per component switched off (5.3, A.5, A.6, table 9), same seed, data, encoder ->
    OUT/ablate.md; what the preset does without already is left out."""
    ddp = run.init(cfg.device)
    mae = cfg.mae or train_mae(cfg, ddp)
    for name, change in ABLATIONS.items():
        features = "".join(letter for letter in cfg.features if letter not in change.get("without", ""))
        change = {k: v for k, v in dict(change, features=features).items() if k != "without"}
        if name != "all" and all(getattr(cfg, field) == value for field, value in change.items()):
            continue
        part = dataclasses.replace(cfg, mae=mae, out=f"{cfg.out}/{name}", then_evaluate=False, **change)
        train(part)
        if ddp.rank == 0:
            score = {} if cfg.inception else evaluate(dataclasses.replace(part, alphas=cfg.alphas[:1]))[0]
            with torch.device("meta"):
                params = plans.numel(Generator(**sizes(part)))
            print(plans.add_row(cfg.out, name, params, score))


def plan(cfg):
    """Parameters, FLOP (2 per multiply-add), disk, and the memory of a rank under every way to run."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, run.Ranks(0, world, torch.device("meta")))
    with torch.device("meta"):
        gen, mae = Generator(**sizes(cfg)), MAE(**mae_sizes(cfg))
        encoder = Encoder(mae, ConvNeXt() if "n" in cfg.features else None)
        x, style = torch.empty(1, cfg.channels, cfg.size, cfg.size), torch.zeros(1, cfg.style_tables).long()
        one, mask = torch.zeros(1).long(), torch.ones(1, cfg.size // cfg.mae_fold, cfg.size // cfg.mae_fold)
    calls = (lambda: gen(one, one.float(), x, style)), (lambda x: encoder.features(x, cfg.features))
    train_one = lambda: mae_loss(mae, x, one, mask, 0.1)
    run.print_plan(cfg, plans.report(cfg, world, gen, encoder, mae, calls, train_one))


def official(cfg):
    """Convert a released artifact folder to safetensors in --out, for sample, evaluate and train --mae."""
    if len(cfg.words) != 1:
        raise UserError("give one artifact folder: python drift_pixel.py official FOLDER --out runs/NAME")
    net, (kind, sizes, released) = load_official(cfg.words[0]), jax_release.describe(cfg.words[0])
    path = Path(cfg.out) / ("ema.safetensors" if kind == "generator" else "mae.safetensors")
    run.save_weights(path, net.state_dict(), dict(
        kind=kind, sizes=sizes, step=released.get("step"), ema=released.get("ema_decay"), names=[], preset="",
        space="pixels", released=released))
    print(f"{path}: {kind}, {sum(p.numel() for p in net.parameters()):,} parameters")


if __name__ == "__main__":
    run.main(Config, PRESETS, dict(train=train, sample=sample, evaluate=evaluate, plan=plan, prepare=prepare,
                                   mae=train_mae, ablate=ablate, official=official))
