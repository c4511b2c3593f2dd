"""The SD-family autoencoder (AutoencoderKL), read from public safetensors: SD 1.x/2, SDXL, SD3/3.5, FLUX.1.

    vae = AutoencoderKL.load("sd-vae-ft-mse")           a diffusers folder, a VAE file or a whole checkpoint
    mean, logvar = vae.encode(x)                        x [B, 3, H, W] in [-1, 1], H and W multiples of 8
    z = vae.normalize(vae.sample(mean, logvar))         (z - shift) * scale: what a generator learns
    x = vae.decode(vae.denormalize(z))                  nominally [-1, 1], not clamped
    vae.provenance                                      file, SHA-256, repository, revision, key style, scale

Parameter names are those of diffusers, so state_dict() is interchangeable with it. The encoder takes H x W
pixels to H/8 x W/8 cells of 4 or 16 channels.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import vaekeys
from common.files import sha256_file
from common.run import UserError


# --- network -----------------------------------------------------------

def silu(x):
    """SiLU of a tensor nobody else holds: in place where no gradient is wanted, a full-size copy less."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Resnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the skip through a 1x1 convolution when the width
    changes."""

    def __init__(self, n_in, n_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, n_in, 1e-6), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, n_out, 1e-6), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class Attention(nn.Module):
    """x + one-headed self-attention over all positions; SDPA keeps the [HW, HW] weights out of memory."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BCHW):
        t_BLC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        q, k, v = (f(t_BLC)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        out_BLC = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x_BCHW + out_BLC.transpose(1, 2).reshape(x_BCHW.shape)


class Mid(nn.Module):
    def __init__(self, width, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)] if attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Sampler(nn.Module):
    """Halve (zero row and column on the right and bottom only, stride 2) or double (nearest) the
    resolution."""

    def __init__(self, width, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks at one resolution, then a step to the next one; not after the last level."""

    def __init__(self, n_in, n_out, blocks, groups, up, last):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(n_in if j == 0 else n_out, n_out, groups) for j in range(blocks))
        if not last:
            setattr(self, "upsamplers" if up else "downsamplers", nn.ModuleList([Sampler(n_out, up)]))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in getattr(self, "upsamplers", None) or getattr(self, "downsamplers", []):
            x = sampler(x)
        return x


class Encoder(nn.Module):
    def __init__(self, channels, z, widths, blocks, groups, attention):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, blocks, groups, up=False, last=i == len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = Mid(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, z, widths, blocks, groups, attention):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(z, widths[0], 3, padding=1)
        self.mid_block = Mid(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, blocks + 1, groups, up=True, last=i == len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with a diagonal Gaussian between them; `config` holds the arguments."""

    def __init__(self, z=4, widths=(128, 256, 512, 512), blocks=2, groups=32, attention=True, quant=True,
                 channels=3, scale=0.18215, shift=0.0):
        super().__init__()
        self.config = dict(z=z, widths=list(widths), blocks=blocks, groups=groups, attention=attention,
                           quant=quant, channels=channels, scale=scale, shift=shift)
        self.scale, self.shift, self.factor = scale, shift, 2 ** (len(widths) - 1)
        self.encoder = Encoder(channels, z, list(widths), blocks, groups, attention)
        self.decoder = Decoder(channels, z, list(widths), blocks, groups, attention)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if quant else nn.Identity()
        self.provenance = {}

    def encode(self, x, tile=None, slices=False):
        """Images [B, 3, H, W] in [-1, 1] -> (mean, logvar), each [B, z, H/8, W/8], logvar in [-30, 20].

        tile: pixels; a larger image is encoded in overlapping tiles. slices: one image at a time. Raises
        UserError when H or W is not a multiple of 8.
        """
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise UserError(f"a {x.shape[-1]}x{x.shape[-2]} image does not divide into cells of "
                            f"{self.factor}x{self.factor}; crop or resize it")
        if slices and len(x) > 1:
            return tuple(torch.cat(parts) for parts in zip(*(self.encode(one, tile) for one in x.split(1))))
        side = self.cells(tile) * self.factor
        moments = tiled(lambda t: self.quant_conv(self.encoder(t)), x.to(self.dtype), side, 1 / self.factor)
        mean, logvar = moments.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, tile=None, slices=False):
        """Latents [B, z, h, w], not normalised -> images [B, 3, 8h, 8w].

        tile: pixels, as in encode. Running out of GPU memory is tried again in tiles of 512 pixels, and a
        half-precision result that is not finite (SDXL's in float16) again in float32; both say so on stderr.
        """
        if slices and len(z) > 1:
            return torch.cat([self.decode(one, tile) for one in z.split(1)])
        try:
            side = self.cells(tile)
            x = tiled(lambda t: self.decoder(self.post_quant_conv(t)), z.to(self.dtype), side, self.factor)
        except torch.cuda.OutOfMemoryError:
            if tile:
                raise
            print("note: out of GPU memory in the VAE decoder; decoding in tiles", file=sys.stderr)
            torch.cuda.empty_cache()
            return self.decode(z, tile=512)
        if self.dtype != torch.float32 and not x.isfinite().all():
            print(f"note: the VAE decoder overflows in {self.dtype}; going on in float32", file=sys.stderr)
            return self.float().decode(z, tile)
        return x

    def cells(self, tile):
        """Pixels of a tile -> latent cells; a quarter of a tile must be whole cells. None: 0, no tiles."""
        if tile and (tile < 0 or tile % (4 * self.factor)):
            raise UserError(f"a VAE tile of {tile} pixels is not a multiple of {4 * self.factor}")
        return (tile or 0) // self.factor

    @property
    def dtype(self):
        return self.decoder.conv_in.weight.dtype

    @staticmethod
    def sample(mean, logvar, generator=None):
        """One draw of the posterior: mean + exp(logvar / 2) * eps."""
        eps = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + (0.5 * logvar).exp() * eps.to(mean.dtype)

    def normalize(self, z):
        return (z - self.shift) * self.scale

    def denormalize(self, z):
        return z / self.scale + self.shift

    @classmethod
    def load(cls, path, family=None, scale=None, shift=None, dtype=torch.float32, device="cpu"):
        """A .safetensors file (a VAE alone or a whole checkpoint) or a diffusers folder -> eval module.

        Keys may be diffusers' (new or old attention names) or LDM's (prefix first_stage_model., vae. or
        none); sizes come from the tensors; scale and shift from the arguments, the family (sd1, sdxl, sd3,
        flux), config.json, the rest of a whole checkpoint, or an assumption, and the last two are said on
        stderr. Raises UserError naming missing, unexpected and misshapen tensors.
        """
        file, config = vaekeys.find_weights(Path(path))
        with vaekeys.open_weights(file) as weights:
            names, style, told = vaekeys.canonical_names(list(weights.keys()), file)
            shapes = {new: tuple(weights.get_slice(old).get_shape()) for new, old in names.items()}
            sizes = vaekeys.detect_sizes(shapes, file, config)
            scale, shift = vaekeys.choose_scale(sizes["z"], family, scale, shift, config, told, style, file)
            with torch.device("meta"):
                vae = cls(**sizes, scale=scale, shift=shift)
            vaekeys.check_names(vae.state_dict(), shapes, file)
            for new, old in names.items():                  # one at a time: the peak is the model and one
                owner, _, leaf = new.rpartition(".")
                owner = vae.get_submodule(owner)
                tensor = weights.get_tensor(old).to(device=device, dtype=dtype)
                tensor = tensor.reshape(getattr(owner, leaf).shape)
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        vae.provenance = dict(file=file.name, bytes=file.stat().st_size, sha256=sha256_file(file), keys=style,
                              scale=scale, shift=shift, **vaekeys.origin(Path(path)))
        return vae.eval()


# --- tiles -------------------------------------------------------------

def tiled(f, x_BCHW, tile, zoom):
    """f over overlapping tiles of `tile` input cells, neighbours cross-faded; f itself when one is enough.

    Tiles start every 3/4 tile, and each keeps its first 3/4; the first quarter fades linearly from the
    neighbour above, then from the one on the left. zoom: output cells an input cell. Not equal to the whole
    (GroupNorm and the attention see a tile only), but without seams.
    """
    H, W = x_BCHW.shape[-2:]
    if not tile or max(H, W) <= tile:
        return f(x_BCHW)
    step, blend = int(tile * 0.75), int(tile * zoom * 0.25)
    keep, above, rows = int(tile * zoom) - blend, [], []
    for top in range(0, H, step):
        row = []
        for j, left in enumerate(range(0, W, step)):
            part = f(x_BCHW[..., top:top + tile, left:left + tile])
            if above:
                part = fade(above[j], part, blend, dim=2)
            if row:
                part = fade(row[-1], part, blend, dim=3)
            row.append(part)
        rows.append(torch.cat([part[..., :keep, :keep] for part in row], 3))
        above = row
    return torch.cat(rows, 2)


def fade(before, after, width, dim):
    """`after` with its first `width` cells along dim mixed linearly with the last ones of `before`."""
    width = min(width, before.shape[dim], after.shape[dim])
    t = torch.arange(width, device=after.device, dtype=after.dtype).div(width)
    t = t[:, None] if dim == 2 else t
    mixed = before.narrow(dim, before.shape[dim] - width, width) * (1 - t) + after.narrow(dim, 0, width) * t
    return torch.cat([mixed, after.narrow(dim, width, after.shape[dim] - width)], dim)
