"""Drift field and drift loss: official numbers, slow references, and the laws of the method."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import two_ranks

from common import run
from common.kernels import drift_field, drift_field_reference, drift_loss, drift_loss_reference

# (R, g, p, u, C), loss per row, lam2 at 0.02 / 0.05 / 0.2, m, first two gradient entries of each row's first
# sample, gradient norm: printed by the official JAX function (lambertae/drifting, drift_loss.py at accd0cf)
# with its casts to float32 turned into casts to float64.
OFFICIAL = [
    ((3, 4, 5, 2, 6), [0.7986958555, 4.021320933, 18.57062191],
     [0.04956396132, 0.1022337641, 0.109618714], 4.277587303,
     [-0.01052595059, -0.1299969855, -0.02271867271, 0.04327884896, 0.01424155669, -0.04228937575],
     1.130634305),
    ((2, 3, 4, 2, 16), [0.4309711825, 14.96139611], [0.08292872618, 0.1125817237, 0.1176025561], 6.86896881,
     [-0.05127888214, -0.02313321982, 0.01168934332, -0.02232848525], 0.6595238919),
    ((2, 3, 4, 0, 5), [7.615505102, 6.263400132],
     [3.960925834e-06, 0.0003197512116, 0.06481515768], 3.613195908,
     [-0.124868327, -0.008097473111, -0.1075989071, 0.2147268575], 1.190571449),
]
NARROW, WIDE = (3, 5, 6, 2, 4), (3, 5, 6, 2, 40)  # C <= t; C > t
MANY = (2500, 8, 8, 4, 2)  # more rows than one block


def features(R, g, p, u, C, dtype=torch.float64, seed=7, spread=1.5):
    """Gaussian gen (wider by `spread`), pos, unc and weights 0.5 .. 2, from numpy's frozen generator."""
    rng = np.random.RandomState(seed)
    gen, pos, unc = (torch.from_numpy(rng.randn(R, n, C).astype(np.float32)).to(dtype) for n in (g, p, u))
    weight = torch.from_numpy(np.linspace(0.5, 2, R)).to(dtype)
    return (gen * spread).requires_grad_(), pos, unc, weight


def value_and_grad(loss, gen, *rest, up=None, **options):
    out = loss(gen, *rest, **options)
    loss_R = out[0] if isinstance(out, tuple) else out
    up = torch.ones_like(loss_R) if up is None else up
    return loss_R.detach(), torch.autograd.grad((loss_R * up).sum(), gen)[0]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- drift_loss: the numbers ---------------------------------------------------


@pytest.mark.parametrize("sizes, loss, lam2, m, first, norm", OFFICIAL)
def test_loss_equals_the_official_code_on_golden_inputs(sizes, loss, lam2, m, first, norm):
    gen, pos, unc, weight = features(*sizes)
    loss_R, info = drift_loss(gen, pos, unc if sizes[3] else None, weight if sizes[3] else None)
    grad = torch.autograd.grad(loss_R.sum(), gen)[0]
    # 1e-8: ten digits were printed, and float64 rounding of the masked self-distance differs.
    assert loss_R.tolist() == pytest.approx(loss, rel=1e-8)
    assert [float(info[f"lam2/{tau}"]) for tau in (0.02, 0.05, 0.2)] == pytest.approx(lam2, rel=1e-8)
    assert float(info["m"]) == pytest.approx(m, rel=1e-8)
    assert grad[:, 0, :2].flatten().tolist() == pytest.approx(first, rel=1e-8)
    assert float(grad.norm()) == pytest.approx(norm, rel=1e-8)


@pytest.mark.parametrize("floor", [1e-6, 0.0])
@pytest.mark.parametrize("sizes", [NARROW, WIDE, MANY, (1, 1, 1, 0, 3), (2, 3, 1, 0, 50)])
def test_loss_and_gradient_equal_the_reference_in_float64(sizes, floor):
    inputs, up = features(*sizes), torch.linspace(-1, 2, sizes[0], dtype=torch.float64)
    ours, slow = (value_and_grad(f, *inputs, floor=floor, up=up) for f in (drift_loss, drift_loss_reference))
    # 1e-9 of the norm.  A single sample and a single positive have no force at all: then both are zero.
    assert float((ours[0] - slow[0]).norm()) <= 1e-9 * float(slow[0].norm()) + 1e-12
    assert float((ours[1] - slow[1]).norm()) <= 1e-9 * float(slow[1].norm()) + 1e-12


@pytest.mark.parametrize("sizes", [(16, 64, 64, 16, 640), (64, 64, 64, 16, 320), (4, 64, 64, 16, 5120)])
def test_float32_holds_at_imagenet_sizes(sizes):
    inputs = features(*sizes, dtype=torch.float32, spread=1.0)
    exact = [v.detach().double() for v in inputs]
    slow = value_and_grad(drift_loss_reference, exact[0].requires_grad_(), *exact[1:])
    ours = value_and_grad(drift_loss, *inputs)
    # 1e-5 (measured 2e-6): rounding of the distances over tau = 0.02.
    assert relative(ours[0], slow[0]) < 1e-5 and relative(ours[1], slow[1]) < 1e-5


@pytest.mark.parametrize("sizes", [NARROW, WIDE])
def test_float32_holds_far_from_the_origin(sizes):
    gen, pos, unc, weight = features(*sizes, dtype=torch.float32)
    near = value_and_grad(drift_loss, gen, pos, unc, weight)
    moved = [(v.detach() + 1024).requires_grad_() for v in (gen, pos, unc)]
    back = [(v.detach() - 1024).requires_grad_() for v in moved]  # what is left of the inputs after rounding
    far, same = value_and_grad(drift_loss, *moved, weight), value_and_grad(drift_loss, *back, weight)
    assert relative(far[0], same[0]) < 1e-4 and relative(far[1], same[1]) < 1e-4
    assert relative(far[0], near[0]) < 0.1


# --- drift_loss: the laws --------------------------------------------------------


@pytest.mark.parametrize("sizes", [NARROW, WIDE])
def test_loss_is_the_squared_length_of_its_own_gradient(sizes):
    gen, pos, unc, weight = features(*sizes)
    loss_R, info = drift_loss(gen, pos, unc, weight)
    grad = torch.autograd.grad(loss_R.sum(), gen)[0]
    R, g, _, _, C = sizes
    s = info["m"] / C ** 0.5  # grad = -2 F / (s g C) and loss = mean F^2
    assert torch.allclose(grad.square().sum((1, 2)) * s ** 2 * g * C / 4, loss_R, rtol=1e-9)


@pytest.mark.parametrize("sizes", [NARROW, WIDE])
def test_scaling_features_keeps_the_loss_and_divides_the_gradient(sizes):
    gen, pos, unc, weight = features(*sizes)
    loss, grad = value_and_grad(drift_loss, gen, pos, unc, weight)
    big = [(50 * v.detach()).requires_grad_() for v in (gen, pos, unc)]
    loss50, grad50 = value_and_grad(drift_loss, *big, weight)
    # 1e-5: only the floor under the self-distance breaks the law, 1e-4 in a mean of about 3, over tau = 0.02.
    assert relative(loss50, loss) < 1e-5 and relative(50 * grad50, grad) < 1e-5


def test_moving_and_rotating_all_features_changes_nothing():
    gen, pos, unc, weight = features(*WIDE)
    turn = torch.linalg.qr(torch.from_numpy(np.random.RandomState(1).randn(40, 40)))[0]
    loss, grad = value_and_grad(drift_loss, gen, pos, unc, weight)
    moved = [(v.detach() @ turn + 3.0).requires_grad_() for v in (gen, pos, unc)]
    loss2, grad2 = value_and_grad(drift_loss, *moved, weight)
    assert relative(loss2, loss) < 1e-9 and relative(grad2, grad @ turn) < 1e-9


def test_stretching_one_channel_does_change_the_loss():
    gen, pos, unc, weight = features(*NARROW)
    stretch = torch.tensor([5.0, 1, 1, 1], dtype=torch.float64)
    loss = drift_loss(gen, pos, unc, weight)[0]
    other = drift_loss(gen * stretch, pos * stretch, unc * stretch, weight)[0]
    assert relative(other.detach(), loss.detach()) > 0.05


def test_order_of_targets_does_not_matter_and_queries_permute():
    gen, pos, unc, weight = features(*WIDE)
    loss, grad = value_and_grad(drift_loss, gen, pos, unc, weight)
    swapped = gen.detach().flip(1).requires_grad_()
    loss2, grad2 = value_and_grad(drift_loss, swapped, pos.flip(1), unc.roll(1, 1), weight)
    assert relative(loss2, loss) < 1e-12 and relative(grad2.flip(1), grad) < 1e-9


@pytest.mark.parametrize("sizes", [NARROW, WIDE])
def test_rows_interact_only_through_the_two_scales(sizes):
    gen, pos, unc, weight = features(*sizes)
    loss, info = drift_loss(gen, pos, unc, weight)
    again, info2 = drift_loss(*(torch.cat([v, v.flip(0)]) for v in (gen, pos, unc, weight)))
    assert torch.allclose(again, torch.cat([loss, loss.flip(0)]), rtol=1e-9)  # same scales: same losses
    assert all(torch.allclose(info[k], info2[k], rtol=1e-9) for k in info)
    scaled = [torch.cat([v[:1], 9 * v[1:2].detach()]) for v in (gen, pos, unc)]
    with_other = drift_loss(*scaled, weight[:2])[0]
    assert relative(with_other[:1].detach(), loss[:1].detach()) > 0.05  # other scales: not


@pytest.mark.parametrize("C", [4, 40])
def test_features_that_share_a_call_keep_scales_of_their_own(C):
    parts = [features(R, 6, 5, 3, C) for R in (3, 1)]
    parts[1] = [(v.detach() * 7).requires_grad_() for v in parts[1][:3]] + [parts[1][3]]
    order = torch.tensor([1, 0, 2, 3])                      # rows of a feature need not stand together
    inputs = [torch.cat(v).detach()[order].requires_grad_() for v in zip(*parts)]
    loss, info = drift_loss(*inputs, key_R=torch.tensor([0, 0, 0, 1])[order])
    grad = torch.autograd.grad(loss.sum(), inputs[0])[0]
    for key, part in enumerate(parts):
        want, info_of_one = drift_loss(*part)
        rows = (torch.tensor([0, 0, 0, 1])[order] == key).nonzero()[:, 0]
        rows = rows[order[rows].argsort()]
        assert torch.allclose(loss[rows], want, rtol=1e-12)
        assert torch.allclose(grad[rows], torch.autograd.grad(want.sum(), part[0])[0], rtol=1e-9, atol=1e-15)
        assert all(torch.allclose(info[k][key], v, rtol=1e-12) for k, v in info_of_one.items())


def test_one_temperature_has_mean_loss_one_and_three_lie_between_one_and_nine():
    gen, pos, unc, weight = (v.detach() for v in features(4, 16, 16, 4, 64))
    assert float(drift_loss(gen, pos, unc, weight, taus=(0.2,))[0].mean()) == pytest.approx(1, rel=1e-9)
    assert 3 < float(drift_loss(gen, pos, unc, weight)[0].mean()) < 9


def test_zero_weight_drops_the_force_of_the_unconditional_but_not_their_share_of_the_softmax():
    gen, pos, unc, weight = features(*NARROW)
    loss, grad = value_and_grad(drift_loss, gen, pos, unc, 0 * weight)
    absent = value_and_grad(drift_loss, gen, pos, None, None)[1]
    assert relative(grad, absent) > 1e-3
    far = value_and_grad(drift_loss, gen, pos, unc + 1e4, 0 * weight, floor=0.0)
    want = value_and_grad(drift_loss, gen, pos, None, None, floor=0.0)
    assert relative(far[1], want[1]) < 1e-9  # far away they have no share either, and weigh nothing in m


def test_gradient_reaches_gen_alone_and_may_be_taken_twice():
    gen, pos, unc, weight = features(*WIDE)
    pos.requires_grad_()
    loss = drift_loss(gen, pos, unc, weight)[0].sum()
    first, of_pos = torch.autograd.grad(loss, (gen, pos), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(2 * loss, gen)[0]
    assert of_pos is None and torch.equal(second, 2 * first)


def test_autocast_and_a_lower_matmul_precision_leave_the_loss_alone():
    gen, pos, unc, weight = features(*WIDE, dtype=torch.float32)
    want = value_and_grad(drift_loss, gen, pos, unc, weight)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = value_and_grad(drift_loss, gen, pos, unc, weight)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# Inputs are rounded once, then all is float32: the error is that of the rounding over the smallest tau.
@pytest.mark.parametrize("dtype, bound",
                         [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_low_precision_inputs_are_computed_in_float32(dtype, bound):
    gen, pos, unc, weight = features(4, 16, 16, 4, 64)
    want = value_and_grad(drift_loss, gen, pos, unc, weight)
    low = [v.detach().to(dtype) for v in (gen, pos, unc)]
    loss, grad = value_and_grad(drift_loss, low[0].requires_grad_(), *low[1:], weight)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert relative(loss, want[0]) < bound and relative(grad, want[1]) < bound


@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("floor", [1e-6, 0.0])
def test_extreme_temperatures_and_degenerate_inputs_stay_finite(tau, floor):
    gen, pos, unc, weight = features(2, 4, 5, 2, 3, dtype=torch.float32)
    same = torch.zeros(2, 4, 3)
    for case in ((gen, pos, unc, weight), (gen[:, :1], pos, unc, weight), (gen, gen.detach(), unc, weight),
                 (gen[:, :1], pos[:, :1], None, None), (same, same, same[:, :2], weight),
                 (same + 7, pos, None, None)):
        leaf = case[0].detach().clone().requires_grad_()
        loss, grad = value_and_grad(drift_loss, leaf, *case[1:], taus=(tau, 2 * tau), floor=floor)
        assert loss.isfinite().all() and grad.isfinite().all()


def test_wrong_shapes_and_temperatures_are_named():
    gen, pos, unc, weight = features(*NARROW)
    for args, options in (((gen, pos[:2]), {}), ((gen, pos, unc[..., :2]), {}), ((gen, pos[:, :0]), {}),
                          ((gen, pos, unc, weight[:1]), {}), ((gen, pos), dict(taus=(0.1, 0.0))),
                          ((gen, pos), dict(taus=()))):
        with pytest.raises(ValueError):
            drift_loss(*args, **options)


def _rank(rank, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for sizes in (NARROW, WIDE):
        rows = slice(1, None) if rank else slice(1)  # one row here, two there
        inputs = [v[rows].detach() for v in features(*sizes)]
        loss, info = drift_loss(inputs[0].requires_grad_(), *inputs[1:], group=dist.group.WORLD)
        grad = torch.autograd.grad(loss.sum(), inputs[0])[0]
        torch.save(dict(loss=loss.detach(), grad=grad, m=info["m"]), f"{out}.{sizes[-1]}.{rank}")
    run.leave_together()


def test_two_ranks_with_shared_scales_equal_one(tmp_path):
    two_ranks(_rank, str(tmp_path / "store"), str(tmp_path / "out"))
    for sizes in (NARROW, WIDE):
        loss, grad = value_and_grad(drift_loss, *features(*sizes))
        parts = [torch.load(tmp_path / f"out.{sizes[-1]}.{rank}", weights_only=True) for rank in (0, 1)]
        assert parts[0]["m"] == parts[1]["m"]
        assert torch.allclose(torch.cat([p["loss"] for p in parts]), loss, rtol=1e-12)
        assert torch.allclose(torch.cat([p["grad"] for p in parts]), grad, rtol=1e-9, atol=1e-15)


# --- drift_field -------------------------------------------------------------------


def points(n, seed, dtype=torch.float64, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.RandomState(seed).randn(n, 2) * scale + shift).to(dtype)


@pytest.mark.parametrize("normalize", ["both", "targets", "none"])
@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("attract, repel", [(1, 1), (1.5, 1), (1, 2), (1, 0)])
def test_field_equals_the_pairwise_reference(normalize, mask_self, attract, repel):
    x, pos = points(9, 0), points(7, 1, shift=0.5)
    neg = x if mask_self else points(5, 2)
    args = (x, pos, neg, 0.3, mask_self, attract, repel, normalize)
    assert torch.allclose(drift_field(*args), drift_field_reference(*args), rtol=1e-10, atol=1e-14)


def test_field_is_antisymmetric():
    x, a, b = points(50, 0), points(40, 1), points(30, 2, shift=1.0)
    for tau in (0.05, 0.5, 5.0):
        there, back = drift_field(x, a, b, tau), drift_field(x, b, a, tau)
        assert torch.allclose(there, -back, rtol=1e-10, atol=1e-14) and there.norm() > 0.01
        broken = drift_field(x, a, b, tau, attract=2.0) + drift_field(x, b, a, tau, attract=2.0)
        assert broken.norm() > 0.1 * there.norm()


def test_field_is_zero_at_equilibrium():
    x, a = points(50, 0), points(40, 1)
    assert drift_field(x, a, a, 0.2).abs().max() < 1e-15  # the same set attracts and repels


def test_field_between_equal_laws_fades_as_one_over_root_n():
    def rms(n):
        tries = [drift_field(x := points(n, seed), points(n, seed + 99), x, 0.2, mask_self=True)
                 for seed in range(4)]
        return float(torch.stack(tries).square().mean().sqrt())
    small, large = rms(64), rms(1024)
    assert 2.5 < small / large < 6.5  # root of 16 is 4; four draws each


def test_masked_field_towards_ones_own_copy_is_not_zero():
    x = points(64, 0)
    assert 0.005 < float(drift_field(x, x, x, 0.2, mask_self=True).square().mean().sqrt()) < 0.1


def test_field_does_not_depend_on_the_origin_even_when_unbalanced():
    x, a, b = points(20, 0), points(15, 1), points(10, 2)
    for attract, repel in ((1, 1), (2, 1), (1, 0)):
        here = drift_field(x, a, b, 0.3, attract=attract, repel=repel)
        there = drift_field(x + 100, a + 100, b + 100, 0.3, attract=attract, repel=repel)
        assert torch.allclose(here, there, rtol=1e-9, atol=1e-12)


def test_field_ignores_the_order_of_targets_and_follows_the_order_of_queries():
    x, a, b = points(20, 0), points(15, 1), points(10, 2)
    here = drift_field(x, a, b, 0.3)
    other = drift_field(x.flip(0), a.flip(0), b.roll(3, 0), 0.3)
    assert torch.allclose(other, here.flip(0), rtol=1e-10, atol=1e-14)


def test_loss_with_one_temperature_follows_the_field():
    gen, pos, _, _ = features(1, 12, 10, 0, 2)
    loss, info = drift_loss(gen, pos, taus=(0.3,), floor=0.0)
    field = drift_field(gen[0], pos[0], gen[0], 0.3 * float(info["m"]), mask_self=True)
    grad = torch.autograd.grad(loss.sum(), gen)[0][0]
    # 1e-6: the loss masks a sample by +100 instead of infinity and floors distances at 1e-4.
    assert torch.allclose(-grad / grad.norm(), field / field.norm(), atol=1e-6)


@pytest.mark.parametrize("dtype, bound",
                         [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_field_of_low_precision_points_is_computed_in_float32(dtype, bound):
    x, a = points(64, 0), points(64, 1)
    field = drift_field(x.to(dtype), a.to(dtype), x.to(dtype), 0.2, mask_self=True)
    assert field.dtype == torch.float32
    assert relative(field, drift_field(x, a, x, 0.2, mask_self=True)) < bound


@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1.0, 1e6])
def test_field_is_finite_at_extreme_temperatures_and_on_duplicates(tau):
    x, a = points(16, 0, torch.float32), points(16, 1, torch.float32)
    for args in ((x, a, x), (x[:1], a, x[:1]), (x, x, x), (0 * x, 0 * x, 0 * x), (x, a + 1e4, x)):
        for normalize in ("both", "targets", "none"):
            assert drift_field(*args, tau, mask_self=True, normalize=normalize).isfinite().all()
    hot = drift_field(x, a, x, 1e6)
    pull = float((a.mean(0) - x.mean(0)).norm())
    assert math.isclose(float(hot.norm()), pull * 4 * hot_weight(16), rel_tol=1e-3)


def hot_weight(n):
    """rowsum(A+) rowsum(A-) of n queries and 2n targets under a flat kernel: A = 1 / sqrt(2n n)."""
    return (n / math.sqrt(2 * n * n)) ** 2


def test_field_refuses_what_it_cannot_mean():
    x, a = points(4, 0), points(3, 1)
    for args, options in (((x, a[:0], x, 0.1), {}), ((x, a, x, 0.0), {}),
                          ((x, a, a, 0.1), dict(mask_self=True)), ((x, a, x, 0.1), dict(normalize="rows"))):
        with pytest.raises(ValueError):
            drift_field(*args, **options)
