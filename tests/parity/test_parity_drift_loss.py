"""drift_loss against the official JAX function, on identical inputs.

Needs jax, einops and a checkout of github.com/lambertae/drifting at accd0cf, its folder in the environment
variable ONEFILE_OFFICIAL_DRIFTING; skipped without.  That repository has no licence, so it is called, never
copied.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common.kernels import drift_loss

jax = pytest.importorskip("jax")
pytest.importorskip("einops")
SIZES = [(16, 64, 64, 16, 640), (64, 64, 64, 16, 320), (4, 64, 64, 16, 5120), (3, 4, 5, 2, 6),
         (2, 3, 4, 2, 16)]


@pytest.fixture(scope="module")
def official():
    path = Path(os.environ.get("ONEFILE_OFFICIAL_DRIFTING", "")) / "drift_loss.py"
    if not path.is_file():
        pytest.skip("ONEFILE_OFFICIAL_DRIFTING does not hold a checkout of lambertae/drifting")
    spec = importlib.util.spec_from_file_location("official_drift_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clip = jax.numpy.clip
    try:
        clip(jax.numpy.zeros(1), a_min=0.0)
    except TypeError:  # the keyword was renamed after the JAX 0.4 the release was written for
        def clip(x, a_min=None, a_max=None, renamed=clip):
            return renamed(x, min=a_min, max=a_max)
        module.jnp = Namespace(jax.numpy, clip=clip)
    return module


class Namespace:
    """A module with some of its names replaced, for that one importer."""

    def __init__(self, module, **names):
        self.__dict__.update(vars(module), **names)


def run_both(official, sizes, dtype, seed=0):
    """Loss, gradient of its mean, statistics: the official function and ours, as numpy."""
    R, g, p, u, C = sizes
    rng = np.random.RandomState(seed)
    gen, pos, unc = (rng.randn(R, n, C).astype(np.float32).astype(dtype) for n in (g, p, u))
    weight = np.linspace(0.0, 8.0, R).astype(dtype)

    def mean(x):
        loss, info = official.drift_loss(x, pos, unc, weight_neg=np.repeat(weight[:, None], u, 1))
        return loss.mean(), (loss, info)

    with jax.default_matmul_precision("highest"):
        (_, (loss, info)), grad = jax.value_and_grad(mean, has_aux=True)(gen)
    leaf = torch.from_numpy(gen).requires_grad_()
    ours, stats = drift_loss(leaf, torch.from_numpy(pos), torch.from_numpy(unc), torch.from_numpy(weight))
    ours_grad = torch.autograd.grad(ours.mean(), leaf)[0]
    return [(np.asarray(loss), ours.detach().numpy()), (np.asarray(grad), ours_grad.numpy()),
            (np.asarray(info["scale"]), stats["m"].numpy()),
            *((np.asarray(info[f"loss_{tau}"]), stats[f"lam2/{tau}"].numpy()) for tau in (0.02, 0.05, 0.2))]


def errors(pairs):
    return [float(np.linalg.norm(ours - want) / np.linalg.norm(want)) for want, ours in pairs]


@pytest.mark.parametrize("sizes", SIZES)
def test_float32_value_gradient_and_statistics_equal_the_official_function(official, sizes):
    # 1e-4: the bar set for float32; distances are rounded and then divided by tau = 0.02 inside an exponent.
    assert max(errors(run_both(official, sizes, np.float32))) <= 1e-4


@pytest.mark.parametrize("sizes", SIZES)
def test_float64_equals_the_official_function_cast_to_float64(official, sizes, monkeypatch):
    jnp = official.jnp
    monkeypatch.setattr(official, "jnp", Namespace(jnp, float32=np.float64))
    jax.clear_caches()
    with jax.enable_x64(True):
        pairs = run_both(official, sizes, np.float64)
    jax.clear_caches()
    assert pairs[0][0].dtype == np.float64
    assert max(errors(pairs)) <= 1e-9
