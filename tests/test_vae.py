"""common/vae.py: sizes, laws of encode and decode, tiles, and every spelling of the published weights."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from common.run import UserError
from common.vae import AutoencoderKL, fade, tiled

TINY = dict(widths=(32, 32, 32, 64), blocks=1)


def tiny(z=4, quant=True, **kw):
    """A small autoencoder of the published shape (four levels) with weights that keep activations of order
    one."""
    torch.manual_seed(z)
    return AutoencoderKL(z=z, quant=quant, **{**TINY, **kw}).eval().requires_grad_(False)


def old_names(state):
    """diffusers' spelling of 2022."""
    swap = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub(r"to_[qkv]|to_out\.0", lambda m: swap[m[0]], key): value for key, value in state.items()}


def ldm_names(state, prefix=""):
    """CompVis' spelling: the decoder's levels counted the other way round, attention as 1x1 convolutions."""
    out = {}
    for key, value in state.items():
        part = key.split(".")
        if len(part) > 2 and part[1] in ("down_blocks", "up_blocks"):
            level = int(part[2]) if part[1] == "down_blocks" else 3 - int(part[2])
            way = part[1].removesuffix("_blocks")
            inner = ["block", part[4]] if part[3] == "resnets" else [way + "sample"]
            part = [part[0], way, str(level), *inner, *part[5:]]
        elif len(part) > 2 and part[1] == "mid_block":
            if part[2] == "resnets":
                part = [part[0], "mid", f"block_{int(part[3]) + 1}", *part[4:]]
            else:
                inner = dict(group_norm="norm", to_q="q", to_k="k", to_v="v", to_out="proj_out")[part[4]]
                value = value[:, :, None, None] if value.ndim == 2 else value
                part = [part[0], "mid", "attn_1", inner, part[-1]]
        key = ".".join(part).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        out[prefix + key] = value
    return {k: v.contiguous() for k, v in out.items()}


def outputs(vae):
    x = torch.linspace(-1, 1, 3 * 32 * 40).reshape(1, 3, 32, 40)
    mean, logvar = vae.encode(x)
    return torch.cat([mean.flatten(), logvar.flatten(), vae.decode(mean).flatten()])


# --- sizes and laws ----------------------------------------------------

@pytest.mark.parametrize("z,quant,tensors,encoder,decoder", [(4, True, 248, 34_163_592, 49_490_179),
                                                             (16, False, 244, 34_274_208, 49_545_475)])
def test_published_sizes_have_the_published_parameter_counts(z, quant, tensors, encoder, decoder):
    with torch.device("meta"):
        vae = AutoencoderKL(z=z, quant=quant)
    count = [sum(p.numel() for p in part.parameters()) for part in (vae, vae.encoder, vae.decoder)]
    assert len(vae.state_dict()) == tensors and count[1:] == [encoder, decoder]
    assert count[0] == {4: 83_653_863, 16: 83_819_683}[z]


@pytest.mark.parametrize("z,quant", [(4, True), (16, False)])
def test_shapes_determinism_and_the_clamp(z, quant):
    vae = tiny(z, quant)
    x = torch.rand(2, 3, 32, 24) * 2 - 1
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (2, z, 4, 3) and vae.decode(mean).shape == (2, 3, 32, 24)
    assert torch.equal(vae.encode(x)[0], mean)
    draws = [vae.sample(mean, logvar, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(vae.sample(mean, torch.full_like(mean, -300.0)), mean)
    vae.encoder.conv_out.bias += 1e4
    assert vae.encode(x)[1].max() <= 20 and vae.encode(-x)[1].min() >= -30
    with pytest.raises(UserError, match="60x64"):
        vae.encode(torch.zeros(1, 3, 64, 60))


def test_the_posterior_sample_has_the_mean_and_deviation_asked_for():
    mean, logvar = torch.full((20_000,), 3.0), torch.full((20_000,), -2.0)
    draw = AutoencoderKL.sample(mean, logvar, torch.Generator().manual_seed(0))
    deviation = torch.tensor(-1.0).exp()
    assert abs(draw.mean() - 3) < 4 * deviation / 20_000 ** 0.5                     # 4 standard errors
    assert abs(draw.std() / deviation - 1) < 4 / 40_000 ** 0.5


def test_normalize_is_undone_exactly_enough():
    vae = tiny(16, False, scale=1.5305, shift=0.0609)
    z = torch.randn(100)
    assert torch.allclose(vae.denormalize(vae.normalize(z)), z, atol=1e-6)          # a few float32 roundings
    assert torch.allclose(vae.normalize(z), (z - 0.0609) * 1.5305)


def test_the_down_step_pads_right_and_bottom_only():
    step = tiny().encoder.down_blocks[0].downsamplers[0]
    step.conv.weight.zero_()
    step.conv.bias.zero_()
    step.conv.weight[:, :, 0, 0] = torch.eye(32)                                    # the top left tap alone
    x = torch.randn(1, 32, 6, 8)
    assert torch.equal(step(x), x[..., ::2, ::2])


def test_attention_is_the_softmax_formula():
    attention = tiny().encoder.mid_block.attentions[0]
    x = torch.randn(2, 64, 3, 5)
    t = attention.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = attention.to_q(t), attention.to_k(t), attention.to_v(t)
    out = attention.to_out[0](torch.softmax(q @ k.transpose(1, 2) / 64 ** 0.5, -1) @ v)
    expected = x + out.transpose(1, 2).reshape(x.shape)
    assert torch.allclose(attention(x), expected, atol=1e-5)                        # two orders of summation


def test_gradients_pass_through_the_frozen_decoder():
    vae = tiny()
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    vae.decode(z).square().sum().backward()
    assert z.grad.abs().min() > 0 and all(p.grad is None for p in vae.parameters())


# --- slices and tiles --------------------------------------------------

def test_slices_equal_the_batch():
    vae = tiny()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, logvar = vae.encode(x)
    for whole, part in zip((mean, logvar), vae.encode(x, slices=True), strict=True):
        assert torch.allclose(whole, part, atol=1e-5)  # other kernels, other order of sums
    assert torch.allclose(vae.decode(mean), vae.decode(mean, slices=True), atol=1e-5)


def test_an_image_within_one_tile_is_the_whole_and_a_larger_one_has_its_shape():
    vae = tiny()
    x = torch.rand(1, 3, 64, 40) * 2 - 1
    mean, _ = vae.encode(x)
    assert torch.equal(vae.encode(x, tile=64)[0], mean)
    assert torch.equal(vae.decode(mean, tile=64), vae.decode(mean))
    small, _ = vae.encode(x, tile=32)
    assert small.shape == mean.shape and not torch.equal(small, mean)
    assert vae.decode(mean, tile=32).shape == x.shape
    with pytest.raises(UserError, match="multiple of 32"):
        vae.decode(mean, tile=40)


@pytest.mark.parametrize("H,W,tile", [(40, 40, 16), (37, 90, 16), (100, 20, 32), (25, 25, 24)])
@pytest.mark.parametrize("zoom", [1, 2])
def test_tiles_of_a_local_function_join_without_a_trace(H, W, tile, zoom):
    def enlarge(x):
        return x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)

    x = torch.randn(2, 3, H, W, dtype=torch.float64)
    assert torch.allclose(tiled(enlarge, x, tile, zoom), enlarge(x), atol=1e-12)    # (1-t)a + ta


def test_a_step_between_tiles_becomes_a_ramp():
    before, after = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    mixed = fade(before, after, 4, dim=3)[0, 0, 0]
    assert mixed.tolist() == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_half_precision_overflow_is_decoded_again_in_float32(capsys):
    vae = tiny().half()
    vae.decoder.conv_out.weight.fill_(6e4)                          # float16 ends at 65504
    x = vae.decode(torch.randn(1, 4, 2, 2))
    assert x.dtype == torch.float32 and x.isfinite().all() and x.abs().max() > 65504
    assert "float32" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_decode_of_the_published_size_is_near_the_cpu(dtype):
    torch.manual_seed(0)
    vae = AutoencoderKL().eval().requires_grad_(False)
    z = torch.randn(1, 4, 8, 8)
    expected = vae.decode(z)
    got = vae.to("cuda", dtype).decode(z.cuda()).float().cpu()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 5e-3, torch.bfloat16: 5e-2}[dtype]           # TF32 convolutions; 8 bits


# --- loading -----------------------------------------------------------

@pytest.mark.parametrize("z,quant", [(4, True), (16, False)])
@pytest.mark.parametrize("spelling", ["new", "old", "ldm", "first_stage_model.", "vae."])
def test_every_spelling_loads_to_the_same_function(tmp_path, z, quant, spelling):
    vae = tiny(z, quant)
    prefix = spelling if spelling.endswith(".") else ""
    state = {"new": dict, "old": old_names}.get(spelling, lambda s: ldm_names(s, prefix))(vae.state_dict())
    if spelling == "first_stage_model.":                  # the rest of a checkpoint is not its business
        state |= {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(1)}
    save_file(state | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    again = AutoencoderKL.load(tmp_path / "vae.safetensors", family={4: "sd1", 16: "sd3"}[z])
    assert torch.equal(outputs(again), outputs(vae))
    assert again.config == dict(vae.config, scale=again.scale, shift=again.shift)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_scale_comes_from_argument_config_checkpoint_or_a_stated_assumption(tmp_path, capsys):
    def load(z, extra=(), config=None, style=lambda s: s, **kw):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        state = style(tiny(z, z == 4).state_dict()) | {k: torch.zeros(1) for k in extra}
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        vae = AutoencoderKL.load(folder, **kw)
        return (vae.scale, vae.shift), capsys.readouterr().err

    def single(state):
        return ldm_names(state, "first_stage_model.")

    assert load(4)[0] == (0.18215, 0) and "assumed" in load(4)[1]
    assert load(16)[0] == (1.5305, 0.0609) and load(16, style=ldm_names)[0] == (0.3611, 0.1159)
    assert load(4, ["conditioner.embedders.0.x"], style=single)[0] == (0.13025, 0)
    assert load(16, ["model.diffusion_model.double_blocks.0.x"], style=single)[0] == (0.3611, 0.1159)
    config = dict(scaling_factor=0.5, shift_factor=None)
    assert load(4, config=config) == ((0.5, 0), "")
    assert load(4, config=config, family="sdxl") == ((0.13025, 0), "")
    assert load(4, config=config, scale=0.7, shift=0.1) == ((0.7, 0.1), "")
    with pytest.raises(UserError, match=r"these fit: \['sd1', 'sdxl'\]"):
        load(4, family="flux")
    with pytest.raises(UserError, match="8 latent channels"):
        load(8)


def test_wrong_files_name_what_is_wrong(tmp_path):
    state = tiny().state_dict()
    file = tmp_path / "vae.safetensors"

    def error(change):
        save_file(change(dict(state)), file)
        with pytest.raises(UserError) as e:
            AutoencoderKL.load(file, family="sd1")
        return str(e.value)

    missing, extra = "decoder.up_blocks.3.resnets.1.conv2.bias", "decoder.up_blocks.0.resnets.0.conv9.bias"
    assert f"1 missing: {missing}" in error(lambda s: {k: v for k, v in s.items() if k != missing})
    assert f"1 unexpected: {extra}" in error(lambda s: s | {extra: torch.zeros(2)})
    assert "1 misshapen: encoder.mid_block.attentions.0.to_q.weight (64, 63)" in error(
        lambda s: s | {"encoder.mid_block.attentions.0.to_q.weight": torch.zeros(64, 63)})
    assert "no KL autoencoder" in error(lambda s: {"transformer.wte.weight": torch.zeros(2)})
    twice = "encoder.mid_block.attentions.0.query.weight"
    assert "are both" in error(lambda s: s | {twice: torch.zeros(64, 64)})
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="cannot read"):
        AutoencoderKL.load(file)
    with pytest.raises(UserError, match="no VAE weights"):
        AutoencoderKL.load(tmp_path / "nothing")
    (tmp_path / "other.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="2 .safetensors files"):
        AutoencoderKL.load(tmp_path)


def test_provenance_names_file_hash_repository_and_revision(tmp_path):
    folder = tmp_path / "models--stabilityai--sd-vae-ft-mse" / "snapshots" / "31f26fde"
    folder.mkdir(parents=True)
    save_file(old_names(tiny().state_dict()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(scaling_factor=0.18215)))
    said = AutoencoderKL.load(folder).provenance
    assert said["repo"] == "stabilityai/sd-vae-ft-mse" and said["revision"] == "31f26fde"
    assert len(said["sha256"]) == 64 and said["keys"] == "diffusers" and said["scale"] == 0.18215
    half = AutoencoderKL.load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.provenance["sha256"] == said["sha256"]
