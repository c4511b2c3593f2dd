"""common/vae.py against diffusers' AutoencoderKL with the same random weights: SD 1.x and SD3 families, tiles
included.

Tolerance 1e-4 on values of order one: both sides are float32 and differ in the order of sums (attention,
convolutions).
"""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from common.vae import AutoencoderKL  # noqa: E402

FAMILY = {"sd1": dict(latent_channels=4, scaling_factor=0.18215),
          "sd3": dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                      use_post_quant_conv=False)}


def peer(family, widths):
    """A diffusers autoencoder whose random weights keep the activations of order one."""
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=32, sample_size=64, **FAMILY[family],
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    for p in net.parameters():                                      # norms and biases off their defaults, too
        p.data += torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.01)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["sd1", "sd3"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = peer(request.param, (32, 64, 64, 96))
    theirs.save_pretrained(folder)
    return theirs, AutoencoderKL.load(folder)


def test_encode_and_decode_equal(pair):
    theirs, ours = pair
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    moments = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    assert (mean - moments.mean).abs().max() < 1e-4 and (logvar - moments.logvar).abs().max() < 1e-4
    z = torch.randn(2, mean.shape[1], 6, 8)
    assert (ours.decode(z) - theirs.decode(z).sample).abs().max() < 1e-4
    assert theirs.decode(z).sample.std() > 0.05                     # the comparison is of something
    assert (ours.scale, ours.shift) == (theirs.config.scaling_factor, theirs.config.shift_factor or 0)


def test_tiles_equal(pair):
    theirs, ours = pair
    theirs.enable_tiling()
    x = torch.rand(1, 3, 128, 112) * 2 - 1
    mean, _ = ours.encode(x, tile=64)
    expected = theirs.encode(x).latent_dist.mean
    z = torch.randn(1, mean.shape[1], 20, 13)
    decoded = theirs.decode(z).sample
    theirs.disable_tiling()
    assert (mean - expected).abs().max() < 1e-4 and (ours.decode(z, tile=64) - decoded).abs().max() < 1e-4
    assert (mean - theirs.encode(x).latent_dist.mean).abs().max() > 1e-3    # unlike the whole


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_published_size_equals(family, tmp_path):
    theirs = peer(family, (128, 256, 512, 512))
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.load(tmp_path)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, _ = ours.encode(x)
    assert (mean - theirs.encode(x).latent_dist.mean).abs().max() < 1e-4
    assert (ours.decode(mean) - theirs.decode(mean).sample).abs().max() < 1e-4
