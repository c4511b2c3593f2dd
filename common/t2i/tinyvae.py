"""A VAE small enough to train in minutes: 4x down, space-to-depth at both ends so that nothing runs at full
resolution."""
import torch
import torch.nn.functional as F
from torch import nn

from common.sealed import load_weights


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class TinyVAE(nn.Module):
    """Convolutional VAE, 4x down: images [B, 3, H, W] in [-1, 1] <-> latents [B, z, H/4, W/4].

    Pixels are folded 2 x 2 into channels at both ends, so that nothing runs at full resolution."""
    factor = 4

    def __init__(self, width=32, latent=4):
        super().__init__()
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, 1, 1), Residual(width),
            nn.Conv2d(width, wide, 4, 2, 1), Residual(wide), Residual(wide),
            nn.GroupNorm(8, wide), nn.SiLU(), nn.Conv2d(wide, 2 * latent, 3, 1, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, wide, 3, 1, 1), Residual(wide), Residual(wide),
            nn.Conv2d(wide, 4 * width, 3, 1, 1), nn.PixelShuffle(2), Residual(width), Residual(width),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 12, 3, 1, 1), nn.PixelShuffle(2))
        self.register_buffer("stats", torch.tensor([1.0, 0.0]))  # scale, shift: unit variance for the DiT

    @classmethod
    def load(cls, path):
        tensors, meta = load_weights(path)
        vae = cls(meta["width"], meta["latent"])
        vae.load_state_dict(tensors)
        return vae

    @property
    def scale(self):
        return float(self.stats[0])

    @property
    def shift(self):
        return float(self.stats[1])

    def encode(self, image):
        mean, logvar = self.encoder(image).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, image):
        mean, logvar = self.encode(image)
        return self.decode(mean + torch.randn_like(mean) * (logvar / 2).exp()), mean, logvar
