"""ConvNeXt-V2 as a feature encoder of drifting: 13 keys beside the MAE's (drift.md 4.4, 4.5).

Reads the published weights in Hugging Face's layout (`facebook/convnextv2-base-22k-224`, model.safetensors);
the sizes come from the tensors, so the smaller models of the family load too.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import run
from common.run import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet, for inputs in [0, 1]


class GRN(nn.Module):
    """Global response normalisation of x_BHWC: x + weight * x * g / mean_C(g) + bias, g = |x| over space."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x):
        g = (x.square().sum((1, 2), keepdim=True) + 1e-6).sqrt()    # so a map of zeros has a gradient
        return x + self.weight * (x * (g / (g.mean(-1, keepdim=True) + 1e-6))) + self.bias


class Layer(nn.Module):
    """x + Linear GRN GELU Linear LayerNorm depthwise7x7 x, on x_BHWC."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.grn = GRN(4 * width)

    def forward(self, x):
        y = self.layernorm(self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.grn(F.gelu(self.pwconv1(y))))


class Stage(nn.Module):
    def __init__(self, cin, width, depth):
        super().__init__()
        shrink = (nn.LayerNorm(cin, eps=1e-6), nn.Conv2d(cin, width, 2, 2)) if cin else ()
        self.downsampling_layer = nn.ModuleList(shrink)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x_BHWC, remat):
        if len(self.downsampling_layer):
            norm, conv = self.downsampling_layer
            x_BHWC = conv(norm(x_BHWC).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for layer in self.layers:
            again = remat and torch.is_grad_enabled() and x_BHWC.requires_grad
            x_BHWC = checkpoint(layer, x_BHWC, use_reentrant=False) if again else layer(x_BHWC)
        return x_BHWC


class ConvNeXt(nn.Module):
    """features(x_BCHW in [-1, 1]) -> dict of 13 keys, each [B, F, C], float32; differentiable in x.

    side: the input is resized to side x side, bilinear, with a wider kernel where that shrinks it. Parameter
    names are those of the file, so loading is one strict load_state_dict.
    """

    def __init__(self, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024), side=224, remat=False):
        super().__init__()
        self.sizes = dict(depths=tuple(depths), widths=tuple(widths))
        self.side, self.remat = side, remat
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.patch_embeddings = nn.Conv2d(3, widths[0], 4, 4)
        self.embeddings.layernorm = nn.LayerNorm(widths[0], eps=1e-6)
        self.encoder.stages = nn.ModuleList(map(Stage, (0, *widths), widths, depths))
        self.layernorm = nn.LayerNorm(widths[-1], eps=1e-6)

    @classmethod
    def load(cls, path, side=224, remat=False):
        """Weights file, or a folder with model.safetensors -> frozen ConvNeXt. Raises UserError."""
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        tensors = {k.removeprefix("convnextv2."): v.float() for k, v in run.load_weights(path)[0].items()
                   if not k.startswith("classifier.")}
        stages = [re.match(r"encoder\.stages\.(\d)\.layers\.(\d+)\.dwconv\.weight", k) for k in tensors]
        found = sorted((int(m[1]), int(m[2]), len(tensors[m[0]])) for m in stages if m)
        depths = [sum(s == i for s, _, _ in found) for i in range(4)]
        if not all(depths) or "encoder.stages.0.layers.0.grn.weight" not in tensors:
            raise UserError(f"{path} holds no ConvNeXt-V2 in Hugging Face's layout")
        widths = [next(w for s, _, w in found if s == i) for i in range(4)]
        with torch.device("meta"):
            net = cls(depths, widths, side, remat)
        try:
            net.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit ConvNeXt-V2: {why}") from None
        return net.eval().requires_grad_(False)

    def maps(self, x_BCHW):
        """Outputs x_BHWC of the four stages."""
        x = (x_BCHW.float() + 1) / 2                # not clipped: beyond white there is still a gradient
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
        x = (x.expand(-1, 3, -1, -1) - mean) / std
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True)
        x = self.embeddings.layernorm(self.embeddings.patch_embeddings(x).permute(0, 2, 3, 1))
        out = []
        for stage in self.encoder.stages:
            x = stage(x, self.remat)
            out.append(x)
        return out

    def features(self, x_BCHW):
        kind = x_BCHW.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):               # float32, as released
                return self.features(x_BCHW)
        out, maps = {}, self.maps(x_BCHW)
        for i, x_BHWC in enumerate(maps):
            x_BFC = standardise(x_BHWC.flatten(1, 2))
            if i:
                out[f"convnext{i}"] = x_BFC
            out[f"convnext{i}_mean"] = x_BFC.mean(1, keepdim=True)
            out[f"convnext{i}_std"] = (x_BFC.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        out["convnext_pool"] = self.layernorm(maps[-1].mean((1, 2)))[:, None]
        out["convnext_std"] = out["convnext3_std"]                  # the release lists this one twice
        return out


def standardise(x_BFC):
    """Every location's channels to mean 0 and, nearly, deviation 1."""
    mean = x_BFC.mean(-1, keepdim=True)
    # 1e-12 moves the deviation by less than float32 can tell; the gradient stays finite where all are equal
    std = ((x_BFC - mean).square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return (x_BFC - mean) / (std + 1e-3)
