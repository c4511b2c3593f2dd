"""The FLUX.1 transformer, read from the public files in both their spellings.

Double blocks are those of SD3 with rotary positions; single blocks run attention and MLP side by side on
[text, image]. `settings` reads every size off the shapes, `plain_names` and `from_diffusers` rename.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from common.t2i.dit_blocks import MLP, Attention, RMSNorm, gate, modulate, norm, time_features
from common.t2i.memory import KEEP
from common.t2i.mmdit import Final, two_layers
from common.t2i.weights import Outline, fill


MASK = 64                                                    # mask pixels of a latent cell, 8 x 8


def axes_of(head):
    """Channels of a head that turn with (text index, row, column): 16, 56, 56 of FLUX's 128."""
    side = head * 7 // 16 // 2 * 2
    return head - 2 * side, side, side


def rope(axes, rows, cols, words):
    """cos, sin [words + rows * cols, head / 2]: text tokens stand at the origin."""
    row, col = torch.meshgrid(torch.arange(rows).double(), torch.arange(cols).double(), indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, col]).flatten(1)
    angle = [p[:, None] * 10000 ** (-torch.arange(0, n, 2).double() / n) for p, n in zip(places, axes)]
    angle = F.pad(torch.cat(angle, 1), (0, 0, words, 0))
    return angle.cos().float(), angle.sin().float()


def rotate(x_BHNK, turn):
    """Turn channel pairs (2i, 2i + 1)."""
    cos, sin = (v.to(x_BHNK.device) for v in turn)
    a, b = x_BHNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x_BHNK.dtype)


def attend(q, k, v, turn):
    out = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v)
    return out.transpose(1, 2).flatten(2)


class Double(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        for side in ("img", "txt"):
            setattr(self, f"{side}_mod", nn.Linear(width, 6 * width))
            setattr(self, f"{side}_attn", Attention(width, heads, True))
            setattr(self, f"{side}_mlp", MLP(width, 4 * width))

    def forward(self, x, text, c, turn):
        sides = [(text, self.txt_mod(c).chunk(6, -1), self.txt_attn, self.txt_mlp),
                 (x, self.img_mod(c).chunk(6, -1), self.img_attn, self.img_mlp)]
        qkv = [a.project(modulate(norm(h), m[0], m[1])) for h, m, a, _ in sides]
        out, done = attend(*(torch.cat(pair, 2) for pair in zip(*qkv)), turn), []
        for (h, m, a, mlp), o in zip(sides, out.split([text.shape[1], x.shape[1]], 1)):
            h = gate(h, m[2], a.proj(o.contiguous()))
            done.append(gate(h, m[5], mlp(modulate(norm(h), m[3], m[4]))))
        return done[1], done[0]


class Single(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.modulation = heads, nn.Linear(width, 3 * width)
        self.linear1, self.linear2 = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)
        self.ln_q, self.ln_k = (RMSNorm(width // heads) for _ in "qk")

    def forward(self, x, c, turn):
        shift, scale, by = self.modulation(c).chunk(3, -1)
        D = x.shape[-1]
        qkv, hidden = self.linear1(modulate(norm(x), shift, scale)).split([3 * D, 4 * D], -1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(self.ln_q(q), self.ln_k(k), v, turn)
        return gate(x, by, self.linear2(torch.cat([out, F.gelu(hidden, approximate="tanh")], -1)))


class Flux(nn.Module):
    """net(x [B, C, H, W], t [B] in 0..1000, text [B, L, E], pooled [B, P], guidance [B]) -> velocity.

    guidance: the scale that FLUX.1-dev was distilled at; schnell has no such input. skip: as in MMDiT.
    extra: channels read beside the C noisy ones: latents of a picture to follow (canny, depth), or latents of
    a masked picture and its mask (fill)."""
    patch = 2

    def __init__(self, channels=16, width=3072, heads=24, double=19, single=38, text_width=4096,
                 pooled_width=768, guidance=True, axes=(), extra=0):
        super().__init__()
        self.channels, self.extra, self.axes = channels, extra, tuple(axes) or axes_of(width // heads)
        self.img_in = nn.Linear(4 * (channels + extra), width)
        self.txt_in = nn.Linear(text_width, width)
        self.time_in, self.vector_in = two_layers(256, width), two_layers(pooled_width, width)
        if guidance:
            self.guidance_in = two_layers(256, width)
        self.double_blocks = nn.ModuleList(Double(width, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(Single(width, heads) for _ in range(single))
        self.final_layer = Final(width, 4 * channels)

    @property
    def blocks(self):
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, x, t, text, pooled, guidance=None, skip=()):
        rows, cols, dtype = x.shape[2] // 2, x.shape[3] // 2, x.dtype
        x = self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        c = self.time_in(time_features(t).to(dtype)) + self.vector_in(pooled.to(dtype))
        if guidance is not None:
            c = c + self.guidance_in(time_features(1000 * guidance).to(dtype))
        text, words = self.txt_in(text.to(dtype)), text.shape[1]
        turn, act = rope(self.axes, rows, cols, words), F.silu(c)
        for i, block in enumerate(self.double_blocks):
            if i not in skip:
                x, text = block(x, text, act, turn)
        x = torch.cat([text, x], 1)
        for i, block in enumerate(self.single_blocks, len(self.double_blocks)):
            if i not in skip:
                x = block(x, act, turn)
        out = self.final_layer(x[:, words:].contiguous(), c).transpose(1, 2).unflatten(2, (rows, cols))
        return F.pixel_shuffle(out, 2)

    @classmethod
    def load(cls, files, dtype, config, **storage):
        """From a Checkpoint in either spelling; without a config heads are 128 wide, as in public files."""
        files = (from_diffusers if files.count("single_transformer_blocks.") else plain_names)(files)
        with Outline():
            net = cls(**settings(files, config))
        return fill(net, files, dtype, skip=KEEP, **storage).eval()


def settings(files, config):
    shapes = files.shapes
    width, inputs = shapes["img_in.weight"]
    channels = shapes["final_layer.linear.weight"][0] // 4
    extra = inputs // 4 - channels
    if extra not in (0, channels, channels + MASK):
        raise files.wrong_family(f"a FLUX.1 transformer (it reads {inputs} numbers a token; dev and schnell "
                                 "read 64, canny and depth 128, fill 384)", "img_in.weight of [3072, 64]")
    heads = config.get("num_attention_heads") or max(width // 128, 1)
    return dict(channels=channels, extra=extra, width=width, heads=heads,
                double=files.count("double_blocks."), single=files.count("single_blocks."),
                text_width=shapes["txt_in.weight"][1], pooled_width=shapes["vector_in.0.weight"][1],
                guidance="guidance_in.0.weight" in shapes, axes=config.get("axes_dims_rope", ()))


RENAMES = ((r"_in\.in_layer", "_in.0"), (r"_in\.out_layer", "_in.2"), (r"_mod\.lin", "_mod"),
           (r"modulation\.lin", "modulation"), (r"_mlp\.0", "_mlp.fc1"), (r"_mlp\.2", "_mlp.fc2"),
           (r"norm\.query_norm\.scale", "ln_q.weight"), (r"norm\.key_norm\.scale", "ln_k.weight"))
FROM_DIFFUSERS = (
    (r"^single_transformer_blocks", "single_blocks"), (r"^transformer_blocks", "double_blocks"),
    (r"x_embedder", "img_in"), (r"context_embedder", "txt_in"),
    (r"time_text_embed\.timestep_embedder", "time_in"),
    (r"time_text_embed\.guidance_embedder", "guidance_in"), (r"time_text_embed\.text_embedder", "vector_in"),
    (r"_in\.linear_1", "_in.0"), (r"_in\.linear_2", "_in.2"), (r"norm1\.linear", "img_mod"),
    (r"norm1_context\.linear", "txt_mod"),
    (r"ff\.net\.0\.proj", "img_mlp.fc1"), (r"ff\.net\.2", "img_mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.fc1"), (r"ff_context\.net\.2", "txt_mlp.fc2"),
    (r"attn\.to_out\.0", "img_attn.proj"), (r"attn\.to_add_out", "txt_attn.proj"),
    (r"attn\.norm_added_([qk])", r"txt_attn.ln_\1"), (r"attn\.add_([qkv])_proj", r"txt_attn.\1"),
    (r"(single_blocks\.\d+)\.attn\.norm_([qk])", r"\1.ln_\2"),
    (r"(single_blocks\.\d+)\.attn\.to_([qkv])", r"\1.\2"),
    (r"(single_blocks\.\d+)\.norm\.linear", r"\1.modulation"),
    (r"(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
    (r"(double_blocks\.\d+)\.attn\.norm_([qk])", r"\1.img_attn.ln_\2"),
    (r"(double_blocks\.\d+)\.attn\.to_([qkv])", r"\1.img_attn.\2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"), (r"^proj_out", "final_layer.linear"))


def renamed(name, rules):
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


def plain_names(files):
    """Black Forest Labs' spelling -> ours."""
    return files.renamed(lambda name: renamed(name, RENAMES))


def from_diffusers(files):
    """diffusers' spelling -> ours: names, fused qkv (and MLP), final (scale, shift) -> (shift, scale)."""
    def rule(name):
        new = renamed(name, FROM_DIFFUSERS)
        return (new, lambda t: torch.cat(t.chunk(2)[::-1])) if name.startswith("norm_out.linear") else new
    files, groups = files.renamed(rule), {}
    for name in files.shapes:
        if m := re.match(r"(single_blocks\.\d+\.)q\.(weight|bias)$", name):
            groups[f"{m[1]}linear1.{m[2]}"] = [f"{m[1]}{k}.{m[2]}" for k in ("q", "k", "v", "proj_mlp")]
        elif m := re.match(r"(.*_attn\.)q\.(weight|bias)$", name):
            groups[f"{m[1]}qkv.{m[2]}"] = [f"{m[1]}{k}.{m[2]}" for k in "qkv"]
    return files.joined(groups)
