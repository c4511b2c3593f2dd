"""DINOv3 features for FD-DINO: the ViT of arXiv 2508.10104, forward only, weights in Hugging Face layout.

FD-DINO is the Frechet distance of class tokens instead of Inception's pool: it follows human judgement more
closely (arXiv 2306.04675). Published FD numbers use DINOv2 ViT-L/14; those of DINOv3 compare only with each
other.

B images  C channels  L tokens (class, registers, patches)  D width  H heads  K head dim  P patches
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from common.files import read_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rope_table(rows, cols, head_dim, theta=100., stretch=1., skip=0):
    """Tables [skip + rows * cols, head_dim] for rotate: cosines, and sines whose first half is negated.

    Places are patch centres, each axis scaled to [-1, 1] and by stretch; the first `skip` tokens (class and
    registers) have no place and stay as they are: cosine 1, sine 0.
    """
    y, x = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, cols))
    at_P2 = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1) * stretch
    frequency = theta ** -torch.arange(0, 1, 4 / head_dim)                       # K / 4 of them
    angle_PK = F.pad((2 * math.pi * at_P2[:, :, None] * frequency).flatten(1), (0, 0, skip, 0))
    sin_LK = angle_PK.sin()
    return angle_PK.cos().tile(2), torch.cat([-sin_LK, sin_LK], 1)


def rotate(t_BHLK, cos_LK, sin_LK):
    """Rotary embedding t cos + [-second half, first half] sin, as two passes over t: the sign sits in the
    table, roll swaps the halves.  t's layout comes out again: with heads side by side, attention's output is
    ready for the projection after it."""
    return torch.addcmul(t_BHLK * cos_LK, t_BHLK.roll(cos_LK.shape[1] // 2, -1), sin_LK)


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel. gated: the MLP is down(silu(gate x) * up x)."""

    def __init__(self, D, heads, hidden, gated, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D, eps), nn.LayerNorm(D, eps)
        self.attention = nn.ModuleDict({f"{name}_proj": nn.Linear(D, D, bias=name != "k") for name in "qkvo"})
        self.layer_scale1 = nn.ParameterDict({"lambda1": torch.ones(D)})
        self.layer_scale2 = nn.ParameterDict({"lambda1": torch.ones(D)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(D, hidden), "down_proj": nn.Linear(hidden, D)})
        if gated:
            self.mlp["gate_proj"] = nn.Linear(D, hidden)

    def forward(self, x_BLD, cos_LK, sin_LK):
        a, m = self.attention, self.mlp
        h_BLD = self.norm1(x_BLD)
        q, k, v = (a[name](h_BLD).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))
        h_BHLK = F.scaled_dot_product_attention(rotate(q, cos_LK, sin_LK), rotate(k, cos_LK, sin_LK), v)
        h_BLD = a["o_proj"](h_BHLK.transpose(1, 2).flatten(2))
        x_BLD = torch.addcmul(x_BLD, self.layer_scale1["lambda1"], h_BLD)
        h_BLD = self.norm2(x_BLD)
        up = m["up_proj"](h_BLD)
        up = F.silu(m["gate_proj"](h_BLD)) * up if "gate_proj" in m else F.gelu(up)
        return torch.addcmul(x_BLD, self.layer_scale2["lambda1"], m["down_proj"](up))


class Backbone(nn.Module):
    """Patches, class and register tokens through the blocks; parameters named as in Hugging Face files."""

    def __init__(self, D, depth, heads, hidden, gated=False, patch=16, registers=4, eps=1e-5, theta=100.):
        super().__init__()
        self.D, self.heads, self.patch, self.theta = D, heads, patch, theta
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.embeddings.register_tokens = nn.Parameter(torch.zeros(1, registers, D))
        self.embeddings.patch_embeddings = nn.Conv2d(3, D, patch, patch)
        self.layer = nn.ModuleList(Block(D, heads, hidden, gated, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps)

    def tokens(self, x_BCHW, stretch=1.):
        """Preprocessed images -> all tokens [B, L, D] after the final norm; stretch scales the positions."""
        x_BDhw = self.embeddings.patch_embeddings(x_BCHW)
        e, B = self.embeddings, len(x_BCHW)
        skip = 1 + e.register_tokens.shape[1]
        rope = rope_table(*x_BDhw.shape[2:], self.D // self.heads, self.theta, stretch, skip)
        rope = [t.to(x_BDhw) for t in rope]
        x_BLD = torch.cat([e.cls_token.expand(B, -1, -1), e.register_tokens.expand(B, -1, -1),
                           x_BDhw.flatten(2).mT], 1)
        for block in self.layer:
            x_BLD = block(x_BLD, *rope)
        return self.norm(x_BLD)


class DinoV3(Backbone):
    """net(uint8_BCHW) -> class token [B, D] after the final norm, of the image resized to side x side."""

    def __init__(self, *sizes, side=224, **more):
        super().__init__(*sizes, **more)
        self.side = side
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path, side=224):
        """From a Hugging Face directory or .safetensors file -> net in eval mode.

        Sizes come from the tensors, heads from config.json or else 64 channels each. Raises ValueError naming
        what is missing or does not belong.
        """
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(f.is_file() for f in files):
            raise ValueError(f"no .safetensors file at {path}")
        config_file = (path if path.is_dir() else path.parent) / "config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        state = {k.removeprefix("model."): v for f in files for k, v in load_file(f).items()}
        state.pop("embeddings.mask_token", None)
        try:
            D, _, patch, _ = state["embeddings.patch_embeddings.weight"].shape
            hidden = state["layer.0.mlp.up_proj.weight"].shape[0]
            registers = state["embeddings.register_tokens"].shape[1]
        except KeyError as error:
            raise ValueError(f"{path} is not DINOv3 in Hugging Face layout: no tensor {error}") from error
        depth = len({k.split(".")[1] for k in state if k.startswith("layer.")})
        net = cls(D, depth, config.get("num_attention_heads", D // 64), hidden,
                  "layer.0.mlp.gate_proj.weight" in state, patch, registers,
                  config.get("layer_norm_eps", 1e-5), config.get("rope_theta", 100.), side=side)
        missing, unexpected = net.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ValueError(f"{path} is no DINOv3: missing {missing[:3]}, unexpected {unexpected[:3]}")
        return net

    def preprocess(self, image_BCHW):
        """uint8 -> float [B, 3, side, side] as the released processor: antialiased bilinear."""
        if image_BCHW.dtype != torch.uint8 or image_BCHW.ndim != 4 or image_BCHW.shape[1] != 3:
            raise ValueError(f"expected uint8 [B, 3, H, W], got {image_BCHW.dtype} {tuple(image_BCHW.shape)}")
        x = image_BCHW.to(self.norm.weight.dtype) / 255
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        return (x - mean) / std

    def forward(self, image_BCHW):
        return self.tokens(self.preprocess(image_BCHW))[:, 0]
