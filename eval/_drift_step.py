"""One optimizer step of drift_pixel.py and of the official JAX code at sizes for CPUs; used by bench_drift.

Same weights (written by the official serialiser, read by ours), same real images, same work: noise, generator
forward and backward, features of generated and real images, 86 drift losses, clip, AdamW, average.
"""

import dataclasses
import importlib
import json
import os
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np

# multiply-adds a step of the first: generator 16 x 3 x 57 M = 2.7 G, encoder (2 x 16 + 24) x 293 M = 16.4 G
TINY = dict(labels=2, gen=8, pos=8, unc=4, size=64, patch=8, width=128, depth=4, heads=4, classes=10,
            context=4, style_tables=8, style_codes=16, mae_width=32, mae_fold=2)
SIZES = {"tiny": TINY, "samples": dict(TINY, gen=16, pos=16, unc=8, labels=1),
         "wider": dict(TINY, width=192, heads=6, mae_width=64, labels=1)}
STUBS = ("dataset.dataset", "utils.ckpt_util", "utils.env", "utils.fid_util", "utils.init_util",
         "utils.logging", "utils.model_builder", "models.hf")


class Stub(types.ModuleType):
    """A module in which every public name is a function that does nothing."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kw: None


def real_images(s):
    rng = np.random.RandomState(5)
    shape = (s["size"], s["size"], 3)
    return [rng.uniform(-1, 1, (s["labels"], n, *shape)).astype(np.float32) for n in (s["pos"], s["unc"])]


def missing():
    return [name for name in ("flax", "optax") if importlib.util.find_spec(name) is None]


def ours(folder, size, compiled=False):
    """-> step() that trains once and returns the loss; weights from the official peer's artifacts."""
    import torch

    import drift_pixel as dp
    from common.run import Ranks
    torch.set_num_threads(1)
    dp.run.keep_freed_memory()                                              # as run.main
    fields = {f.name for f in dataclasses.fields(dp.Config)}
    cfg = dp.Config(**{k: v for k, v in SIZES[size].items() if k in fields})
    gen, mae = (dp.load_official(str(Path(folder, kind))) for kind in ("gen", "mae"))
    encoder = dp.Encoder(dp.fused.channels_last(mae)).requires_grad_(False)  # as load_encoder
    ema, optim = dp.copy.deepcopy(gen), dp.adamw(gen, 1e-6, 0.01)
    net = torch.compile(gen) if compiled else gen                           # as train with --compile
    encoder.features = torch.compile(encoder.features) if compiled else encoder.features
    pos, unc = (torch.from_numpy(x).permute(0, 1, 4, 2, 3).contiguous() for x in real_images(SIZES[size]))
    ddp, N, G = Ranks(0, 1, torch.device("cpu")), cfg.labels, cfg.gen

    def step():
        batch = dict(label=torch.arange(N), alpha=dp.alpha_law(torch.rand(N), 3.0), pos=pos, unc=unc,
                     eps=torch.randn(N, G, 3, cfg.size, cfg.size),
                     style=torch.randint(cfg.style_codes, (N, G, cfg.style_tables)))
        optim.zero_grad(set_to_none=True)
        loss, _ = dp.drift_backward(net, encoder, batch, cfg, ddp)
        torch.nn.utils.clip_grad_norm_(gen.parameters(), 2.0)
        optim.step()
        dp.ema_update(ema, gen, 0.999)
        return float(loss)
    return step


def official(folder, size):
    """The same of the release's own train_step under jax.jit; writes both networks' weights to folder."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import serialization, traverse_util
    sys.path.insert(0, os.environ["ONEFILE_OFFICIAL_DRIFTING"])
    for name in STUBS:          # parts of the release that a step does not touch, and their dependencies
        sys.modules[name] = Stub(name)
    jax.distributed.initialize = lambda: None
    clip = jnp.clip             # JAX renamed the keyword a_min after the release was written
    jnp.clip = lambda x, a_min=None, a_max=None, min=None, max=None: clip(  # noqa: A002
        x, a_min if min is None else min, a_max if max is None else max)
    train, s = importlib.import_module("train"), SIZES[size]
    importlib.import_module("utils.hsdp_util").set_global_mesh(1)
    config = dict(hidden_size=s["width"], cond_dim=s["width"], depth=s["depth"], num_heads=s["heads"],
                  input_size=s["size"], patch_size=s["patch"], in_channels=3, out_channels=3, mlp_ratio=4.0,
                  num_classes=s["classes"], n_cls_tokens=s["context"], noise_coords=s["style_tables"],
                  noise_classes=s["style_codes"], use_qknorm=True, use_swiglu=True, use_rope=True,
                  use_rmsnorm=True, use_bf16=False, attn_fp32=True, use_remat=False)
    mae_config = dict(base_channels=s["mae_width"], patch_size=2, layers=[3, 4, 6, 3], in_channels=3,
                      num_classes=s["classes"], input_patch_size=s["mae_fold"])
    gen = importlib.import_module("models.generator").DitGen(**config)
    mae = importlib.import_module("models.mae_model").MAEResNetJAX(**dict(mae_config, layers=(3, 4, 6, 3)))
    key, x = jax.random.PRNGKey(0), jnp.zeros((1, s["size"], s["size"], 3))
    rng, params = np.random.RandomState(0), []
    keys, label = dict(params=key, noise=key, masking=key), jnp.zeros(1, int)
    shapes = (jax.eval_shape(lambda: gen.init(keys, label)),
              jax.eval_shape(lambda: mae.init(keys, x, label, train=False)))
    for shape, kind, conf in zip(shapes, ("gen", "mae"), (config, mae_config)):
        flat = traverse_util.flatten_dict(shape["params"], sep="/")
        flat = {k: draw(rng, k, flat[k].shape) for k in sorted(flat)}
        params.append(traverse_util.unflatten_dict(flat, sep="/"))
        Path(folder, kind).mkdir(parents=True)
        Path(folder, kind, "ema_params.msgpack").write_bytes(serialization.msgpack_serialize(params[-1]))
        Path(folder, kind, "metadata.json").write_text(json.dumps(dict(model_config=conf)))

    def features(variables, image, **kw):
        maps = mae.apply({"params": variables}, image, method=mae.get_activations, **kw)
        return {"global": image.reshape(len(image), 1, -1), **maps}

    box = [train.TrainState.create(apply_fn=gen.apply, params=params[0], ema_params=params[0],
                                   tx=optax.adamw(1e-6, b1=0.9, b2=0.95, weight_decay=0.01))]
    pos, unc = map(jnp.asarray, real_images(s))
    fast = jax.jit(partial(
        train.train_step, rng_init=key, learning_rate_fn=lambda i: jnp.float32(1e-6), feature_apply=features,
        gen_per_label=s["gen"], neg_cfg_pw=3.0, loss_kwargs=dict(R_list=(0.2, 0.05, 0.02))))

    def step():
        box[0], metric = fast(box[0], jnp.arange(s["labels"]), pos, unc, params[1])
        return float(jax.block_until_ready((box[0], metric))[1]["loss"])
    return step


def draw(rng, path, shape):
    """Random values at a scale that keeps activations near 1 and gates open."""
    value = rng.standard_normal(shape)
    if path.endswith("kernel"):
        value = value / np.sqrt(np.prod(shape[:-1]))
    else:
        value = 0.1 * value + path.endswith(("weight", "scale"))
    return value.astype(np.float32)
