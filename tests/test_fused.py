"""common/drift/fused.py: every node equals its slow reference, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from common.drift import fused


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def close(got, want):
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(got, want))


def value_and_grads(f, *leaves):
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    ups = [torch.sin(torch.arange(o.numel(), dtype=o.dtype)).view(o.shape) for o in out]
    return [*out, *torch.autograd.grad(out, leaves, ups)]


def test_rms_norm_equals_the_composed_one_on_any_strides():
    x, weight = draw(2, 5, 3, 8), draw(8, seed=1)
    for view in (lambda v: v, lambda v: v.transpose(1, 2), lambda v: v[:, ::2]):
        got = value_and_grads(lambda v, w: fused.rms_norm(view(v), w, 1e-3), x, weight)
        assert close(got, value_and_grads(lambda v, w: F.rms_norm(view(v), (8,), w, 1e-3), x, weight))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_equals_pytorchs_and_keeps_channels_last(groups):
    norm = fused.GroupNorm(groups, 8, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(3))
    leaves = draw(3, 8, 4, 6), norm.weight, norm.bias
    got = value_and_grads(lambda x, *_: norm(x), *leaves)
    assert close(got, value_and_grads(lambda x, w, b: F.group_norm(x, groups, w, b, 1e-3), *leaves))
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    frozen = norm.requires_grad_(False)
    assert close(value_and_grads(frozen, leaves[0]), got[:2])


def test_group_norm_of_a_large_mean_keeps_its_digits():
    x = (draw(2, 4, 8, 8).detach() * 1e-2 + 100).float()
    norm = fused.GroupNorm(2, 4, eps=1e-6)
    want = F.group_norm(x.double(), 2, eps=1e-6)
    # 1e-3: float32 holds 100 to 8e-6, a thousandth of the deviation; a variance as E x^2 - (E x)^2 is lost
    assert (norm(x) - want).abs().max() < 3e-3


def test_halve_equals_its_reference_in_both_layouts():
    x = draw(2, 3, 4, 6)
    want = value_and_grads(fused.halve_reference, x)
    assert close(value_and_grads(fused.halve, x), want)
    last = value_and_grads(lambda v: fused.halve(v.contiguous(memory_format=torch.channels_last)), x)
    assert close(last, want)


def test_halving_twice_gives_the_moments_of_4_x_4_patches():
    x = draw(2, 3, 8, 4)

    def twice(v):
        return fused.halve(*fused.halve(v))

    def at_once(v):
        cells = v.view(2, 3, 2, 4, 1, 4)
        return cells.mean((3, 5)), cells.var((3, 5), unbiased=False)
    assert close(value_and_grads(twice, x), value_and_grads(at_once, x))


def test_packs_hold_every_feature_once_by_width_and_leave_large_ones_alone():
    feats = {"a": torch.zeros(1, 2, 3, 4), "b": torch.zeros(1, 9, 3, 4), "c": torch.zeros(1, 2, 3, 5),
             "d": torch.zeros(1, 1, 3, 4), "e": torch.zeros(1, 1, 3, 4, dtype=torch.float16)}
    assert fused.packs(feats, most=60) == [["a"], ["b"], ["d"], ["c"], ["e"]]
    assert fused.packs(feats, most=1000) == [["a", "b", "d"], ["c"], ["e"]]
