"""Image <-> latent: the SD-VAE, or a linear codec fitted in seconds where no VAE weights are at hand.

Both: encode(uint8 [B, C, H, W], ids=None) -> float32 [B, c, h, w] on the CPU; decode(latent) -> [-1, 1] on
the CPU; state() tensors and meta() JSON to carry in a weights file, so that whoever has the weights can
decode.
"""

import torch
import torch.nn.functional as F

from common import run
from common.run import UserError


class PatchPCA:
    """The leading principal components of p x p pixel patches, one scale for all of them.

    Where every component is kept it is an isometry up to that scale: distances in latents are distances in
    pixels.
    """

    def __init__(self, mean, basis, scale, patch):
        # mean [K], basis [K, c], scale []; K = C p p numbers of a patch
        self.mean, self.basis, self.scale, self.patch = mean, basis, scale, patch

    @classmethod
    def fit(cls, x_BCHW, patch, components):
        """uint8 images -> codec whose latents have unit mean square."""
        v = F.pixel_unshuffle(x_BCHW.double() / 127.5 - 1, patch).movedim(1, -1).flatten(0, 2)
        if components > v.shape[1]:
            raise UserError(f"a {patch}x{patch} patch of these images has {v.shape[1]} components, "
                            f"not {components}")
        mean = v.mean(0)
        basis = torch.linalg.eigh((v - mean).T.cov(correction=0))[1].flip(1)[:, :components]
        # eigenvectors have no sign of their own: make the largest entry positive
        basis = basis * basis[basis.abs().argmax(0), torch.arange(components)].sign()
        scale = ((v - mean) @ basis).square().mean().sqrt()
        return cls(mean.float(), basis.float(), scale.float(), patch)

    @classmethod
    def from_state(cls, tensors, meta):
        return cls(*(tensors[f"codec.{key}"] for key in ("mean", "basis", "scale")), meta["patch"])

    def encode(self, x_BCHW, ids=None):
        v_BhwK = F.pixel_unshuffle(x_BCHW.float() / 127.5 - 1, self.patch).movedim(1, -1)
        return ((v_BhwK - self.mean) @ self.basis / self.scale).movedim(-1, 1).contiguous()

    def decode(self, z_BchW):
        v_BhwK = z_BchW.cpu().float().movedim(1, -1) * self.scale @ self.basis.T + self.mean
        return F.pixel_shuffle(v_BhwK.movedim(-1, 1), self.patch).clamp(-1, 1)

    def state(self):
        return {"codec.mean": self.mean, "codec.basis": self.basis, "codec.scale": self.scale}

    def meta(self):
        return dict(kind="pca", patch=self.patch)


class SDVAE:
    """The SD autoencoder; a latent is one posterior sample, its noise a function of (seed, id), times the
    VAE's scale.
    """

    def __init__(self, path, seed, device):
        from common import vae  # here: runs with the linear codec or on a cache never need it
        self.net, self.seed, self.device = vae.AutoencoderKL.load(path, family="sd1",
                                                                  device=device), seed, device

    @torch.no_grad()
    def encode(self, x_BCHW, ids=None):
        mean, logvar = self.net.encode(x_BCHW.to(self.device).float() / 127.5 - 1)
        ids = range(len(mean)) if ids is None else ids.tolist()
        eps = torch.stack(
            [torch.randn(mean.shape[1:], generator=run.generator(self.seed, 9, i)) for i in ids])
        return self.net.normalize(mean + (0.5 * logvar).exp() * eps.to(mean)).float().cpu()

    @torch.no_grad()
    def decode(self, z_BchW):
        return self.net.decode(self.net.denormalize(z_BchW.to(self.device).float())).clamp(-1, 1).cpu()

    def state(self):
        return {}

    def meta(self):
        return dict(kind="sdvae", scale=self.net.scale, shift=self.net.shift, provenance=self.net.provenance)


def open_codec(tensors, meta, vae, seed, device):
    """Codec of a weights file: the linear one from its tensors, the SD-VAE from --vae. Raises UserError
    without it.
    """
    if meta["kind"] == "pca":
        return PatchPCA.from_state(tensors, meta)
    if not vae:
        raise UserError("these weights make SD-VAE latents: give --vae FILE to decode them")
    return SDVAE(vae, seed, device)


def load_strict(net, tensors, path):
    """Fill net from a weights file that may carry a codec beside it. UserError names what does not fit."""
    state = {k: v for k, v in tensors.items() if not k.startswith("codec.")}
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())[:200]}") from None
