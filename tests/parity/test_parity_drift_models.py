"""Generator, MAE and ConvNeXt-V2 against the official JAX code with the same random weights, written as its
own artifact files, and ConvNeXt-V2 against transformers.

The official repository has no licence, so nothing of it is here: the test loads it from the folder in
ONEFILE_OFFICIAL_DRIFTING, a checkout of github.com/lambertae/drifting at accd0cf, and is skipped without it.
    ONEFILE_OFFICIAL_DRIFTING=/path python -m pytest tests/parity/test_parity_drift_models.py
Running this file as a script rewrites tests/golden_drift_latent.json from the official code.
"""

import base64
import json
import os
import pathlib
import sys

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
serialization = pytest.importorskip("flax.serialization")
traverse = pytest.importorskip("flax.traverse_util")
OFFICIAL = os.environ.get("ONEFILE_OFFICIAL_DRIFTING", "")
if not OFFICIAL:
    pytest.skip("ONEFILE_OFFICIAL_DRIFTING is not set", allow_module_level=True)
sys.path.insert(0, OFFICIAL)

import drift_latent  # noqa: E402
import drift_pixel  # noqa: E402
from common.drift import flax_msgpack  # noqa: E402
from common.drift.convnext import ConvNeXt  # noqa: E402

official_generator = pytest.importorskip("models.generator")
official_mae = pytest.importorskip("models.mae_model")

# Of the largest output. float32 sums in another order over up to 24 blocks need about 1e-5.
TOLERANCE = 1e-4
GOLDEN = pathlib.Path(__file__).parents[1] / "golden_drift_latent.json"
SIZES = {
    "tiny": dict(hidden_size=64, depth=2, num_heads=2, input_size=8, num_classes=5, n_cls_tokens=3,
                 noise_coords=4, noise_classes=8),
    "b2": dict(hidden_size=768, depth=12, num_heads=12, input_size=32, num_classes=1000, n_cls_tokens=16,
               noise_coords=32, noise_classes=64),
    "l2": dict(hidden_size=1024, depth=24, num_heads=16, input_size=32, num_classes=1000, n_cls_tokens=16,
               noise_coords=32, noise_classes=64),
    "b16": dict(hidden_size=768, depth=12, num_heads=12, input_size=256, num_classes=1000, n_cls_tokens=16,
                noise_coords=32, noise_classes=64, patch_size=16, in_channels=3, out_channels=3),
    "l16": dict(hidden_size=1024, depth=24, num_heads=16, input_size=256, num_classes=1000, n_cls_tokens=16,
                noise_coords=32, noise_classes=64, patch_size=16, in_channels=3, out_channels=3),
}
MAE_SIZES = {"tiny": dict(base_channels=32, layers=[2, 2, 2, 2], in_channels=4, num_classes=5, size=16),
             "full": dict(base_channels=32, layers=[3, 4, 6, 3], in_channels=4, num_classes=10, size=32),
             "patched": dict(base_channels=32, layers=[3, 4, 6, 3], in_channels=3, num_classes=10, size=64,
                             input_patch_size=2),
             "pixel": dict(base_channels=32, layers=[3, 4, 6, 3], in_channels=3, num_classes=10, size=256,
                           input_patch_size=8)}


def script_of(size):
    return drift_pixel if size in ("b16", "l16", "pixel") else drift_latent


def random_weights(shapes, seed):
    """Every leaf drawn from NumPy in sorted order, at a scale that keeps activations near 1 and gates open.
    """
    rng = np.random.RandomState(seed)
    flat = traverse.flatten_dict(shapes, sep="/")
    out = {}
    for key in sorted(flat):
        shape = flat[key].shape
        if key.endswith(("kernel",)):
            value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))
        elif key.endswith(("weight", "scale")):
            value = 1 + 0.1 * rng.standard_normal(shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        out[key] = value.astype(np.float32)
    return traverse.unflatten_dict(out, sep="/")


def official_generator_and_weights(size, seed=0):
    config = dict(dict(patch_size=2, in_channels=4, out_channels=4), **SIZES[size],
                  cond_dim=SIZES[size]["hidden_size"], mlp_ratio=4.0, use_qknorm=True, use_swiglu=True,
                  use_rope=True, use_rmsnorm=True, use_bf16=False, attn_fp32=True, use_remat=False)
    net = official_generator.DitGen(**config)

    def whole(module, eps, label, alpha, style):
        return module.generate_image(eps, module.c_cfg_noise_to_cond(label, alpha, style))

    args = generator_inputs(config)
    shapes = jax.eval_shape(lambda key: net.init({"params": key}, *args, method=whole), jax.random.PRNGKey(0))
    params = random_weights(shapes["params"], seed)
    out = jax.jit(lambda p: net.apply({"params": p}, *args, method=whole))(params)
    return config, params, args, np.asarray(out)


def generator_inputs(config, n=2):
    rng = np.random.RandomState(7)
    side, channels = config["input_size"], config["in_channels"]
    eps = rng.standard_normal((n, side, side, channels)).astype(np.float32)
    label = rng.randint(0, config["num_classes"], n)
    alpha = np.linspace(1.0, 3.5, n).astype(np.float32)
    return eps, label, alpha, rng.randint(0, config["noise_classes"], (n, config["noise_coords"]))


def official_mae_and_weights(size, seed=1):
    config = dict(MAE_SIZES[size])
    side = config.pop("size")
    config = dict(config, patch_size=2, dropout_prob=0.0, use_bf16=False)
    net = official_mae.MAEResNetJAX(**dict(config, layers=tuple(config["layers"])))
    x = np.random.RandomState(8).standard_normal((3, side, side, config["in_channels"])).astype(np.float32)
    label = np.array([0, 3, 4])
    shapes = jax.eval_shape(lambda key: net.init({"params": key, "masking": key}, x, label, train=False),
                            jax.random.PRNGKey(0))
    params = random_weights(shapes["params"], seed)
    feats = jax.jit(lambda p: net.apply({"params": p}, x, method=net.get_activations))(params)
    return net, config, params, x, label, {k: np.asarray(v) for k, v in feats.items()}


def write_artifact(folder, kind, config, params):
    """The two files that the official code writes for a release."""
    (folder / "ema_params.msgpack").write_bytes(serialization.msgpack_serialize(params))
    (folder / "metadata.json").write_text(json.dumps(dict(format="flax.msgpack", kind=kind, backend="jax",
                                                          step=1, ema_decay=0.999, model_config=config)))
    return str(folder)


def torch_generate(net, args):
    eps, label, alpha, style = (torch.from_numpy(np.asarray(a)) for a in args)
    with torch.no_grad():
        return net(label, alpha, eps.permute(0, 3, 1, 2), style).permute(0, 2, 3, 1).numpy()


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("size", SIZES)
def test_generator_equals_official_forward(size, tmp_path):
    config, params, args, want = official_generator_and_weights(size)
    net = script_of(size).load_official(write_artifact(tmp_path, "gen", config, params))
    error = relative(torch_generate(net, args), want)
    print(f"generator {size}: relative error {error:.1e}, output rms {np.sqrt((want ** 2).mean()):.2f}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("size", MAE_SIZES)
def test_mae_features_equal_official_for_all_keys(size, tmp_path):
    net, config, params, x, label, want = official_mae_and_weights(size)
    mae = script_of(size).load_official(write_artifact(tmp_path, "mae", config, params))
    x_t = torch.from_numpy(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        got = mae.features(x_t)
    assert set(got) == set(want) | {"global"}
    assert np.array_equal(got["global"].numpy(), x.reshape(3, 1, -1))
    worst = {key: relative(got[key].numpy(), want[key]) for key in want}
    print(f"mae {size}: {len(want)} keys, worst {max(worst, key=worst.get)} {max(worst.values()):.1e}")
    assert max(worst.values()) <= TOLERANCE, worst


def test_mae_loss_equals_official(tmp_path):
    """Same mask on both sides: all cells masked, so that the random draw of the official code does not
    matter.
    """
    net, config, params, x, label, _ = official_mae_and_weights("tiny")
    mae = drift_latent.load_official(write_artifact(tmp_path, "mae", config, params))
    x_t = torch.from_numpy(x).permute(0, 3, 1, 2)
    for lam in (0.0, 0.1):
        want, _ = net.apply({"params": params}, x, label, lambda_cls=lam, mask_ratio_min=1.0,
                            mask_ratio_max=1.0, train=False, rngs={"masking": jax.random.PRNGKey(0)})
        with torch.no_grad():
            got = drift_latent.mae_loss(mae, x_t, torch.from_numpy(label), torch.ones(3, 16, 16), lam)
        assert relative(got[0].numpy(), np.asarray(want).mean()) <= TOLERANCE


def convnext_pair(depths, widths, seed=0):
    """(transformers' ConvNextV2 with random weights, ours read from the file that it writes)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ConvNextV2Config(hidden_sizes=widths, depths=depths, num_labels=7)
    theirs = transformers.ConvNextV2ForImageClassification(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():   # GRN starts at zero, norms at one: let everything act
            if p.ndim == 1 or "grn" in name:
                p.add_(0.2 * torch.randn(p.shape))
    return theirs


CONVNEXT = {"tiny": ([2, 1, 3, 1], [16, 24, 32, 48]), "base": ([3, 3, 27, 3], [128, 256, 512, 1024])}


@pytest.mark.parametrize("size", CONVNEXT)
def test_convnext_equals_transformers(size, tmp_path):
    """Stage outputs and pooled vector at 224 x 224, where nothing is resized."""
    theirs = convnext_pair(*CONVNEXT[size])
    theirs.save_pretrained(tmp_path)
    ours = ConvNeXt.load(tmp_path)
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        out = theirs.convnextv2(((x + 1) / 2 - mean) / std, output_hidden_states=True)
        maps, feats = ours.maps(x), ours.features(x)
    worst = max(relative(mine.permute(0, 3, 1, 2).numpy(), hidden.numpy())
                for mine, hidden in zip(maps, out.hidden_states[-4:], strict=True))
    pooled = relative(feats["convnext_pool"][:, 0].numpy(), out.pooler_output.numpy())
    print(f"convnext {size}: stages {worst:.1e}, pooled {pooled:.1e}")
    assert max(worst, pooled) <= TOLERANCE


@pytest.mark.parametrize("size, side", [("tiny", 256), ("tiny", 64), ("base", 256)])
def test_convnext_features_equal_official_for_all_13_keys(size, side, tmp_path):
    """Shrunk from 256 as in the pixel runs, and enlarged; weights through the official conversion."""
    official = pytest.importorskip("models.convnext")
    sharding = pytest.importorskip("utils.hsdp_util")
    depths, widths = CONVNEXT[size]
    theirs = convnext_pair(depths, widths)
    theirs.save_pretrained(tmp_path)
    net = official.ConvNextV2(depths=depths, dims=widths, num_classes=7)
    sharding.set_global_mesh(1)
    params = jax.jit(net.init)(jax.random.PRNGKey(0), jnp.ones((1, 224, 224, 3)))
    params = official.convert_weights_to_jax(params, theirs.state_dict(), hf=True)
    x = np.random.RandomState(3).uniform(-1.2, 1.2, (2, side, side, 3)).astype(np.float32)
    scaled = ((x + 1) / 2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    run = lambda p, v: net.apply(p, v, method=net.get_activations)
    params = {"params": {k: v for k, v in params["params"].items()}}
    want = jax.jit(run)(params, scaled.astype(np.float32))
    with torch.no_grad():
        got = ConvNeXt.load(tmp_path).features(torch.from_numpy(x).permute(0, 3, 1, 2))
    names = {"global_mean": "convnext_pool", "global_std": "convnext_std"}
    worst = {key: relative(got[names.get(key, key.replace("convenxt_stage_", "convnext"))].numpy(),
                           np.asarray(value)) for key, value in want.items()}
    print(f"convnext {size} from {side}: worst {max(worst, key=worst.get)} {max(worst.values()):.1e}")
    assert len(got) == len(want) == 13 and max(worst.values()) <= TOLERANCE, worst


def test_reader_equals_flax_on_every_dtype_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"a": {"b": np.arange(60, dtype=np.float32).reshape(3, 20), "half": np.ones((2, 3), np.float16)},
            "bf": jnp.arange(5, dtype=jnp.bfloat16), "i": np.arange(3, dtype=np.int64), "s": np.float32(2.5)}
    data = serialization.msgpack_serialize(tree)
    got, want = flax_msgpack.parse(data), traverse.flatten_dict(serialization.msgpack_restore(data), sep="/")
    assert set(got) == set(want)
    for key in want:
        assert np.array_equal(got[key].float().numpy(), np.asarray(want[key], np.float32))




def rewrite_golden():
    """Values of the official code for the default tests, which run without jax."""
    out = {}
    config, params, args, want = official_generator_and_weights("tiny")
    out["generator"] = dict(config=config, output=np.round(want.astype(float), 6).tolist())
    _, config, params, x, _, feats = official_mae_and_weights("tiny")
    out["mae"] = dict(config=config, features={k: [round(float(v.mean()), 7),
                                                   round(float(np.sqrt((v ** 2).mean())), 7),
                                                   *np.round(v.ravel()[[0, -1]].astype(float), 6).tolist()]
                                               for k, v in feats.items()})
    serialization.MAX_CHUNK_SIZE = 64
    tree = {"a": {"b": np.arange(20, dtype=np.float32).reshape(2, 10) / 4},
            "bf": jnp.arange(5, dtype=jnp.bfloat16)}
    out["msgpack"] = base64.b64encode(serialization.msgpack_serialize(tree)).decode()
    GOLDEN.write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    rewrite_golden()
