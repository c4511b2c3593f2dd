"""The SD3 / SD3.5 transformer (MM-DiT, arXiv:2403.03206), read from the public files in both their spellings.

Image and text tokens keep separate weights and meet in one attention. Parameter names are those of the
single-file release; `settings` reads every size off the shapes, `from_diffusers` renames the other spelling.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from common.t2i.dit_blocks import MLP, Attention, gate, modulate, norm, patches_to_image, time_features
from common.flags import UserError
from common.t2i.memory import KEEP
from common.t2i.weights import Outline, fill


# --- blocks --------------------------------------------------------------


def two_layers(a, b):
    return nn.Sequential(nn.Linear(a, b), nn.SiLU(), nn.Linear(b, b))


class Stream(nn.Module):
    """One side (image or text) of a joint block: its own modulation, projections and MLP.

    pre_only: the text side of the last block gives keys and values and is dropped. dual: the image side of
    some SD3.5-medium blocks has a second, image-only attention."""

    def __init__(self, width, heads, qk_norm, pre_only=False, dual=False):
        super().__init__()
        self.pre_only, self.dual = pre_only, dual
        self.attn = Attention(width, heads, qk_norm)
        if pre_only:
            self.attn.proj = nn.Identity()
        else:
            self.mlp = MLP(width, 4 * width)
        if dual:
            self.attn2 = Attention(width, heads, qk_norm)
        pieces = 2 if pre_only else 9 if dual else 6  # shift, scale (, gate) of attention, MLP (, attn2)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, pieces * width))

    def before(self, x, c):
        """-> q, k, v for the joint attention, and what `after` needs."""
        parts = self.adaLN_modulation(c).chunk(2 if self.pre_only else 9 if self.dual else 6, -1)
        normed = norm(x)
        return self.attn.qkv(modulate(normed, parts[0], parts[1])), (parts, normed)

    def after(self, x, out, kept):
        parts, normed = kept
        x = gate(x, parts[2], self.attn.proj(out))
        if self.dual:
            x = gate(x, parts[8], self.attn2(modulate(normed, parts[6], parts[7])))
        return gate(x, parts[5], self.mlp(modulate(norm(x), parts[3], parts[4])))


class JointBlock(nn.Module):
    """Two streams, one attention over [text, image]."""

    def __init__(self, width, heads, qk_norm, last, dual):
        super().__init__()
        self.x_block = Stream(width, heads, qk_norm, dual=dual)
        self.context_block = Stream(width, heads, qk_norm, pre_only=last)

    def forward(self, x, text, c, counts=None):
        qkv_t, kept_t = self.context_block.before(text, c)
        qkv_x, kept_x = self.x_block.before(x, c)
        q, k, v = self.x_block.attn.joined(self.context_block.attn, qkv_t, qkv_x)
        words = text.shape[1]
        if self.context_block.pre_only:                      # nobody reads what the text would attend to
            out = F.scaled_dot_product_attention(q[:, :, words:], k, v, attn_mask=counts)
            return self.x_block.after(x, out.transpose(1, 2).flatten(2), kept_x), text
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=counts).transpose(1, 2).flatten(2)
        # copied: a linear layer on a slice of a batch costs more than copy and product together
        out_t, out_x = (o.contiguous() for o in out.split([words, x.shape[1]], 1))
        return self.x_block.after(x, out_x, kept_x), self.context_block.after(text, out_t, kept_t)


class Features(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.mlp = two_layers(inputs, width)


class Final(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(norm(x), *self.adaLN_modulation(c).chunk(2, -1)))


# --- the transformer -----------------------------------------------------


class MMDiT(nn.Module):
    """net(x [B, C, H, W], t [B] in 0..1000, text [B, L, E], pooled [B, P]) -> velocity [B, C, H, W].

    extra: channels that inpainting models read beside the C they predict. skip: blocks left out (skip-layer
    guidance). last_counts [B]: attention counts the last text token so many times. Positions are a stored
    table, cropped in its centre."""

    def __init__(self, channels=16, patch=2, depth=24, width=1536, heads=24, text_width=4096,
                 pooled_width=2048, table=192, qk_norm=False, dual=(), extra=0):
        super().__init__()
        self.patch, self.table, self.channels, self.extra = patch, table, channels, extra
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(channels + extra, width, patch, patch)))
        self.register_buffer("pos_embed", torch.zeros(1, table * table, width))
        self.t_embedder, self.y_embedder = Features(256, width), Features(pooled_width, width)
        self.context_embedder = nn.Linear(text_width, width)
        self.joint_blocks = nn.ModuleList(JointBlock(width, heads, qk_norm, i == depth - 1, i in dual)
                                          for i in range(depth))
        self.final_layer = Final(width, patch * patch * channels)

    @property
    def blocks(self):
        return self.joint_blocks

    def positions(self, rows, cols):
        if max(rows, cols) > self.table:
            raise UserError(f"{rows} x {cols} tokens exceed this model's position table of {self.table}; "
                            "try a smaller --size")
        top, left = (self.table - rows) // 2, (self.table - cols) // 2
        grid = self.pos_embed.view(self.table, self.table, -1)
        return grid[top:top + rows, left:left + cols].flatten(0, 1)

    def forward(self, x, t, text, pooled, skip=(), last_counts=None):
        rows, cols, dtype = x.shape[2] // self.patch, x.shape[3] // self.patch, x.dtype
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.positions(rows, cols).to(dtype)
        c = self.t_embedder.mlp(time_features(t).to(dtype)) + self.y_embedder.mlp(pooled.to(dtype))
        text = self.context_embedder(text.to(dtype))
        counts = None
        if last_counts is not None:                          # n equal keys: one whose logit gains ln n
            counts = x.new_zeros(len(x), 1, 1, text.shape[1] + x.shape[1])
            counts[..., text.shape[1] - 1] = last_counts.to(x).log()[:, None, None]
        for i, block in enumerate(self.joint_blocks):
            if i not in skip:
                x, text = block(x, text, c, counts)
        return patches_to_image(self.final_layer(x, c), rows, cols, self.patch)

    @classmethod
    def load(cls, files, dtype, heads=0, **storage):
        """From a Checkpoint in either spelling; head width is 64 in every public model unless `heads` says
        otherwise."""
        files = from_diffusers(files) if "transformer_blocks.0.attn.to_q.weight" in files.shapes else files
        with Outline():
            net = cls(**settings(files, heads))
        return fill(net, files, dtype, skip=KEEP, **storage).eval()


def settings(files, heads=0):
    """Constructor arguments read off the shapes of a single-file SD3 transformer."""
    shapes = files.shapes
    if "joint_blocks.0.x_block.attn.qkv.weight" not in shapes:
        raise files.wrong_family("an SD3 transformer", "joint_blocks.0.x_block.attn.qkv.weight")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth, out = files.count("joint_blocks."), shapes["final_layer.linear.weight"][0] // patch**2
    return dict(channels=out, extra=channels - out, patch=patch, depth=depth, width=width,
                heads=heads or max(width // 64, 1),
                text_width=shapes["context_embedder.weight"][1],
                pooled_width=shapes["y_embedder.mlp.0.weight"][1],
                table=math.isqrt(shapes["pos_embed"][1]),
                qk_norm="joint_blocks.0.x_block.attn.ln_k.weight" in shapes,
                dual=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes))


RENAMES = (
    (r"pos_embed\.pos_embed", "pos_embed"), (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"), (r"^proj_out", "final_layer.linear"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"), (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"), (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
    (r"attn(2?)\.norm_([qk])", r"x_block.attn\1.ln_\2"),
    (r"attn\.to_add_out", "context_block.attn.proj"), (r"attn(2?)\.to_out\.0", r"x_block.attn\1.proj"),
    (r"attn\.add_([qkv])_proj", r"context_block.attn.\1"), (r"attn(2?)\.to_([qkv])", r"x_block.attn\1.\2"),
    (r"transformer_blocks", "joint_blocks"))


def from_diffusers(files):
    """The diffusers spelling -> the single-file one: names, fused qkv, (scale, shift) -> (shift, scale)."""
    last = files.count("transformer_blocks.") - 1
    swapped = re.compile(rf"norm_out\.linear|transformer_blocks\.{last}\.norm1_context\.linear")

    def rule(name):
        new = name
        for old, to in RENAMES:
            new = re.sub(old, to, new)
        return (new, lambda t: torch.cat(t.chunk(2)[::-1])) if swapped.match(name) else new
    files = files.renamed(rule)
    found = [m for n in files.shapes if (m := re.match(r"(.*attn2?\.)q\.(weight|bias)$", n))]
    return files.joined({f"{m[1]}qkv.{m[2]}": [f"{m[1]}{k}.{m[2]}" for k in "qkv"] for m in found})
