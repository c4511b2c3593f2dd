"""drift_latent.py: the model, the encoder, the queues, one step, a run, and everything a user can do wrong.
"""

import base64
import dataclasses
import functools
import json
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from drift_runs import (ONE, ROOT, check_files_and_scores, compare, conditions, flags, forget, generated,
                        gradients_of, inventory, kill_after_three_steps, newest, opened, same, slow_total,
                        tiny_images, weights)
from forked import command, two_ranks

import drift_latent as dl
from common import run
from common.drift import codec, flax_msgpack, jax_release
from common.drift.queues import Bank
from common.run import Ranks, UserError

GOLDEN = json.loads((ROOT / "tests" / "golden_drift_latent.json").read_text())
MICRO = dict(preset="smoke", data="", image_size=16, colors=1, fit="crop", codec="pca", size=8, channels=4,
             patch=2, width=16, depth=1, heads=2, classes=4, context=2, style_tables=2, style_codes=4,
             mae_width=16, mae_blocks=(1, 2, 1, 1), mae_groups=4, mae_fold=1, mae_crop=False, mask_cell=1,
             mae_steps=3, mae_batch=8, mae_warmup=2, mae_ema=0.5, cls_steps=2, cls_warmup=1, labels=4, gen=3,
             pos=3, unc=2, push=8, fill=16, bank=6, bank_unc=10, lr=1e-3, warmup=2, steps=6, ema=(0.5, 0.9),
             save_every=2, keep_every=2, grid_every=100, log_every=1, count=8, alphas=(1.0,), judge_epochs=1)


def config(**changes):
    return dl.Config(**{**MICRO, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_images(tmp_path_factory.mktemp("data"))


def tiny_generator(**changes):
    torch.manual_seed(1)
    return opened(dl.Generator(**{**dict(size=8, channels=4, patch=2, width=32, depth=2, heads=2, classes=5,
                                         context=3, style_tables=4, style_codes=8), **changes})).eval()


def inputs(net, n=3, seed=2):
    g = torch.Generator().manual_seed(seed)
    return (torch.arange(n) % 5, torch.linspace(1, 3, n),
            torch.randn(n, net.channels, net.size, net.size, generator=g),
            torch.randint(8, (n, net.style_tables), generator=g))


# --- generator ---------------------------------------------------------------


@pytest.mark.parametrize("preset, count", [("table8_ablation", 132_708_880), ("table8_b2", 132_708_880),
                                           ("table8_l2", 462_909_456)])
def test_parameter_counts_are_those_of_the_release(preset, count):
    with torch.device("meta"):
        net = dl.Generator(**dl.sizes(dl.Config(**dl.PRESETS[preset]["set"])))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("name", dl.PRESETS)
def test_every_preset_builds_on_meta_and_passes_its_own_check(name):
    cfg = dl.Config(preset=name, **dl.PRESETS[name]["set"])
    with torch.device("meta"):
        net, mae = dl.Generator(**dl.sizes(cfg)), dl.MAE(**dl.mae_sizes(cfg))
        out = net(torch.zeros(2, dtype=torch.long), torch.ones(2),
                  torch.empty(2, cfg.channels, cfg.size, cfg.size),
                  torch.zeros(2, cfg.style_tables, dtype=torch.long))
    assert out.shape == (2, cfg.channels, cfg.size, cfg.size)
    assert len(inventory(mae, cfg.size, cfg.channels, cfg.features)) >= 10
    dl.check(cfg, Ranks(0, 8 if name == "table8_l2" else 1, torch.device("cpu")))


# The paper's table as printed, except N_pos of B/2, where the release has 64 (D3); push is the release's.
TABLE8 = {
    "table8_ablation": dict(
        size=32, channels=4, patch=2, width=768, depth=12, context=16, style_tables=32, mae_width=256,
        mae_blocks=(3, 4, 6, 3), mae_fold=1, mask_ratio=0.5, mae_steps=30_000, cls_steps=0, lr=2e-4, wd=0.01,
        warmup=5000, clip=2.0, steps=30_000, ema=(0.999,), labels=64, pos=64, gen=64, unc=16,
        taus=(0.02, 0.05, 0.2), alpha_max=4.0, alpha_power=3.0, alpha_one=0.0, heads=12, push=64, bank=128,
        bank_unc=1000, mae_batch=8192, mae_lr=4e-3, alphas=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5), attn_fp32=True,
        seed=42, style_codes=64),
    "table8_b2": dict(
        size=32, channels=4, patch=2, width=768, depth=12, context=16, style_tables=32, mae_width=640,
        mae_blocks=(3, 4, 6, 3), mae_fold=1, mask_ratio=0.5, mae_steps=200_000, cls_steps=3000, lr=4e-4,
        wd=0.0, warmup=10_000, clip=2.0, steps=200_000, ema=(0.999, 0.9995, 0.9998, 0.9999), labels=128,
        pos=64, gen=64, unc=32, taus=(0.02, 0.05, 0.2), alpha_max=4.0, alpha_power=5.0, alpha_one=0.0,
        heads=12, push=128, bank=128, bank_unc=1000, mae_batch=8192, mae_lr=4e-3, attn_fp32=False,
        style_codes=64),
    "table8_l2": dict(
        size=32, channels=4, patch=2, width=1024, depth=24, context=16, style_tables=32, mae_width=640,
        mae_blocks=(3, 4, 6, 3), mae_fold=1, mask_ratio=0.5, mae_steps=200_000, cls_steps=3000, lr=4e-4,
        wd=0.01, warmup=10_000, clip=2.0, steps=200_000, ema=(0.999, 0.9995, 0.9998, 0.9999), labels=128,
        pos=64, gen=64, unc=32, taus=(0.02, 0.05, 0.2), alpha_max=4.0, alpha_power=3.0, alpha_one=0.5,
        heads=16, push=64, bank=128, bank_unc=1000, mae_batch=8192, mae_lr=4e-3, attn_fp32=False,
        style_codes=64)}


@pytest.mark.parametrize("preset, cell", [(p, c) for p, row in TABLE8.items() for c in row])
def test_table_8_cell(preset, cell):
    cfg = dl.Config(preset=preset, **dl.PRESETS[preset]["set"])
    assert getattr(cfg, cell) == TABLE8[preset][cell]


def test_optimizer_is_the_papers():
    group = dl.adamw(torch.nn.Linear(2, 2), 2e-4, 0.01).param_groups
    assert len(group) == 1 and group[0]["betas"] == (0.9, 0.95)
    assert group[0]["weight_decay"] == 0.01  # on every parameter


def test_a_fresh_generator_returns_zero_for_every_noise():
    net = dl.Generator(size=8, width=32, depth=2, heads=2, classes=5, context=3, style_tables=4,
                       style_codes=8)
    assert not net(*inputs(net)).any()


def test_generator_equals_the_official_values():
    """tests/parity wrote these with the official JAX code from weights that NumPy draws in sorted name order.
    """
    config_, want = GOLDEN["generator"]["config"], np.array(GOLDEN["generator"]["output"])
    net = dl.Generator(**jax_release.generator_sizes(config_))
    fill_like_parity(net, jax_release.generator_path, 0)
    rng = np.random.RandomState(7)
    eps = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    label, alpha = rng.randint(0, 5, 2), np.linspace(1.0, 3.5, 2).astype(np.float32)
    style = rng.randint(0, 8, (2, 4))
    with torch.no_grad():
        got = net(torch.from_numpy(label), torch.from_numpy(alpha), torch.from_numpy(eps).permute(0, 3, 1, 2),
                  torch.from_numpy(style)).permute(0, 2, 3, 1).numpy()
    assert np.abs(got - want).max() < 2e-5  # float32 sums in another order over outputs of size 1


def fill_like_parity(net, path_of, seed):
    """The weights of tests/parity: every Flax leaf, in sorted path order, from one RandomState."""
    leaves = {}
    for name, p in net.named_parameters():
        path = path_of(name)
        for i in range(1 if path else net.style_tables):
            shape = tuple(p.shape) if path else (net.style_codes, p.shape[1])
            if path and path.endswith("/kernel"):
                shape = shape[::-1] if p.ndim == 2 else (shape[2], shape[3], shape[1], shape[0])
            if name in ("pos", "context"):
                shape = (1, *shape)
            leaves[path or f"noise_embeds_{i}/embedding"] = (name, i, shape)
    rng, state, tables = np.random.RandomState(seed), {}, {}
    for path in sorted(leaves):
        name, i, shape = leaves[path]
        value = rng.standard_normal(shape)
        value = (value / np.sqrt(np.prod(shape[:-1])) if path.endswith("kernel") else
                 1 + 0.1 * value if path.endswith(("weight", "scale")) else 0.1 * value)
        tensor = jax_release.to_torch(torch.from_numpy(value.astype(np.float32)), path)
        if name == "style_embed.weight":
            tables[i] = tensor
        else:
            state[name] = tensor[0] if name in ("pos", "context") else tensor
    if tables:
        state["style_embed.weight"] = torch.cat([tables[i] for i in sorted(tables)])
    net.load_state_dict(state, strict=True)
    return net.eval()


def test_style_alpha_and_class_each_change_the_output_and_a_row_does_not_see_the_others():
    net = tiny_generator()
    label, alpha, eps, style = inputs(net)
    with torch.no_grad():
        base = net(label, alpha, eps, style)
        for change in ((label + 1, alpha, eps, style), (label, alpha + 1, eps, style),
                       (label, alpha, eps, (style + 1) % 8)):
            assert (net(*change) - base).abs().amax((1, 2, 3)).min() > 1e-4
        alone = net(label[:1], alpha[:1], eps[:1], style[:1])
    assert torch.allclose(alone, base[:1], atol=1e-6)  # a batch of one takes another matmul path


def test_context_tokens_are_read_and_dropped():
    net = tiny_generator()
    with torch.no_grad():
        before = net(*inputs(net))
        net.context.add_(1)
        after = net(*inputs(net))
    assert before.shape == (3, 4, 8, 8) and (before - after).abs().max() > 1e-4


def test_patchify_round_trip_and_channels_last_order():
    x = torch.arange(2 * 3 * 8 * 8.).view(2, 3, 8, 8)
    tokens = dl.patchify(x, 4)
    assert torch.equal(dl.unpatchify(tokens, 4, 2), x)
    assert torch.equal(tokens[0, 1, :3], x[0, :, 0, 4])  # second patch, first pixel: its three channels


def test_rope_depends_on_the_distance_alone_over_272_tokens():
    cos, sin = dl.rope_table(272, 64)
    q, k = torch.randn(64), torch.randn(64)
    q_L, k_L = dl.rotate(q.expand(272, 64), cos, sin), dl.rotate(k.expand(272, 64), cos, sin)
    dots = (q_L[7:] * k_L[:-7]).sum(1)
    # angles up to 272 in float32 are off by 272 * 2^-24 each
    assert dots.std() < 1e-3 * dots.abs().mean() + 1e-4


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    net = tiny_generator(depth=1)
    args = inputs(net)
    with torch.no_grad():
        before = net(*args)
        D = net.sizes["width"]
        for p in (net.blocks[0].attn.qkv.weight, net.blocks[0].attn.qkv.bias):
            p[:D] *= 100
        assert torch.allclose(net(*args), before, atol=1e-4)  # exact but for the 1e-6 inside the norm


def test_sincos_positions_match_their_formula():
    pos, omega = dl.sincos_2d(16, 3), 10_000.0 ** (-torch.arange(4) / 4)
    row, col = 2, 1
    want = torch.cat([torch.sin(col * omega), torch.cos(col * omega), torch.sin(row * omega),
                      torch.cos(row * omega)])
    assert torch.allclose(pos[row * 3 + col], want, atol=1e-6)


# --- encoder -----------------------------------------------------------------


def test_feature_inventory_is_the_official_one():
    with torch.device("meta"):
        mae = dl.MAE(width=256)
    table = {key: (f, c) for key, f, c in inventory(mae, 32, 4)}
    assert len(table) == 86 and sum(f for f, _ in table.values()) == 6734
    assert table["global"] == (1, 4096) and table["norm_x"] == (1, 4)
    for name, side, width in (("conv1", 32, 256), ("layer1_blk2", 32, 256), ("layer2_blk4", 16, 512),
                              ("layer3_blk6", 8, 1024), ("layer4", 4, 2048)):
        assert table[name] == (side ** 2, width) and table[f"{name}_std"] == (1, width)
        assert table[f"{name}_mean_2"] == (side ** 2 // 4, width)
        assert table[f"{name}_std_4"] == (side ** 2 // 16, width)


@pytest.mark.parametrize("width, total, encoder",
                         [(64, 27.4e6, 21.3e6), (256, 431.4e6, 340.2e6), (640, 2687.9e6, 2126.0e6)])
def test_encoder_parameter_counts(width, total, encoder):
    with torch.device("meta"):
        mae = dl.MAE(width=width)
    outside = ("bridge", "ups", "head", "fc")
    count = sum(p.numel() for n, p in mae.named_parameters() if not n.startswith(outside))
    assert abs(sum(p.numel() for p in mae.parameters()) - total) < 6e4 and abs(count - encoder) < 6e4
    assert len(list(mae.parameters())) == 155


def test_features_equal_the_official_values():
    config_ = GOLDEN["mae"]["config"]
    mae = fill_like_parity(dl.MAE(**jax_release.mae_sizes(config_)), jax_release.mae_path, 1)
    x = np.random.RandomState(8).standard_normal((3, 16, 16, 4)).astype(np.float32)
    with torch.no_grad():
        got = mae.features(torch.from_numpy(x).permute(0, 3, 1, 2))
    for key, (mean, rms, first, last) in GOLDEN["mae"]["features"].items():
        f = got[key].numpy()
        have = [f.mean(), np.sqrt((f ** 2).mean()), f.ravel()[0], f.ravel()[-1]]
        assert np.abs(np.array(have) - [mean, rms, first, last]).max() < 1e-4, key  # 8 blocks of float32 sums


@pytest.mark.parametrize("letter, suffix, cell", [("c", "2", 2), ("d", "4", 4)])
def test_patch_statistics_equal_a_loop(letter, suffix, cell):
    fmap = torch.randn(2, 3, 8, 8, dtype=torch.float64).float()
    got = dl.map_features("m", fmap, letter)
    for i in range(8 // cell):
        for j in range(8 // cell):
            part = fmap[:, :, i * cell:(i + 1) * cell, j * cell:(j + 1) * cell].flatten(2)
            at = i * (8 // cell) + j
            assert torch.allclose(got[f"m_mean_{suffix}"][:, at], part.mean(2), atol=1e-6)
            assert torch.allclose(got[f"m_std_{suffix}"][:, at], (part.var(2, unbiased=False) + 1e-6).sqrt(),
                                  atol=1e-6)


def test_std_has_a_finite_gradient_on_a_constant_map():
    x = torch.ones(1, 2, 4, 4, requires_grad=True)
    sum(f.sum() for f in dl.map_features("m", x).values()).backward()
    assert torch.isfinite(x.grad).all()


def test_every_key_reaches_the_image_and_none_the_encoder():
    mae = dl.MAE(width=8, classes=3, blocks=(2, 2, 2, 2)).eval().requires_grad_(False)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    for key, f in mae.features(x).items():
        grad, = torch.autograd.grad(f.float().square().sum(), x, retain_graph=True)
        assert grad.abs().sum() > 0, key
    assert all(p.grad is None for p in mae.parameters())


def test_feature_sets_are_nested():
    mae = dl.MAE(width=8, classes=3, blocks=(2, 2, 2, 2)).eval()
    with torch.no_grad():
        full, some = mae.features(torch.ones(1, 4, 16, 16)), mae.features(torch.ones(1, 4, 16, 16), "ab")
    assert set(some) < set(full) and {k.split("_")[-1] for k in set(full) - set(some)} == {"2", "4"}


def test_mae_loss_counts_hidden_cells_alone_and_sums_channels():
    mae = dl.MAE(width=8, classes=3, blocks=(1, 1, 1, 1), patch=2)
    x, label = torch.randn(2, 4, 16, 16), torch.tensor([0, 2])
    mask = dl.random_mask(2, 8, 2, 0.5)
    loss, recon, _ = dl.mae_loss(mae, x, label, mask, 0.0)
    out, logit = mae(x, mask)
    target, want = mae.fold(x), []
    for b in range(2):
        cells = [(i, j) for i in range(8) for j in range(8) if mask[b, i, j]]
        want.append(sum(((out - target)[b, :, i, j] ** 2).sum() for i, j in cells) / (len(cells) + 1e-8))
    assert torch.allclose(loss, torch.stack(want).mean(), rtol=1e-5)
    mixed, _, _ = dl.mae_loss(mae, x, label, mask, 0.1)
    ce = torch.nn.functional.cross_entropy(logit, label)
    assert torch.allclose(mixed, 0.9 * loss + 0.1 * ce, rtol=1e-5)


def test_hidden_input_cannot_leak():
    mae = dl.MAE(width=8, classes=3, blocks=(1, 1, 1, 1))
    mask = dl.random_mask(1, 16, 2, 0.5)
    x = torch.randn(1, 4, 16, 16)
    other = torch.where(mask[:, None].bool(), torch.randn_like(x), x)
    with torch.no_grad():
        assert torch.equal(mae(x, mask)[0], mae(other, mask)[0])


def test_masks_hide_half_of_the_2x2_cells_independently():
    torch.manual_seed(0)
    mask = dl.random_mask(400, 32, 2, 0.5)
    cells = mask[:, ::2, ::2]
    assert torch.equal(cells, mask[:, 1::2, 1::2])
    # 400 * 256 fair coins: standard error 0.0016; neighbours uncorrelated, standard error 0.0031
    assert abs(cells.mean() - 0.5) < 0.007
    assert abs(((cells[:, 1:] - 0.5) * (cells[:, :-1] - 0.5)).mean() * 4) < 0.014


@pytest.mark.parametrize("since, lam", [(-1, 0.0), (0, 0.0), (500, 0.05), (1000, 0.1), (2999, 0.1)])
def test_class_weight_rises_over_the_last_steps(since, lam):
    assert dl.cls_lambda(200_000 - 3000 + since, 200_000, 3000, 1000, 0.1) == pytest.approx(lam)
    assert dl.cls_lambda(29_999, 30_000, 0, 1000, 0.1) == 0.0


def test_learning_rate_schedule():
    assert dl.lr_at(0, 4e-3, 4000) == 1e-6 and dl.lr_at(2000, 4e-3, 4000) == pytest.approx((1e-6 + 4e-3) / 2)
    assert dl.lr_at(4000, 4e-3, 4000) == dl.lr_at(10 ** 6, 4e-3, 4000) == 4e-3
    assert dl.lr_at(100, 1.0, 0, "cosine", 200) == pytest.approx(0.5)


# --- guidance ----------------------------------------------------------------


@pytest.mark.parametrize("power, median, mean, ninety",
                         [(3.0, 1.372, 1.600, 2.530), (5.0, 1.188, 1.318, 1.763)])
def test_alpha_law_has_its_quantiles(power, median, mean, ninety):
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    a = dl.alpha_law(u, power)
    assert a.min() >= 1 and a.max() <= 4
    assert (float(a.median()), float(a.mean()),
            float(a.quantile(0.9))) == pytest.approx((median, mean, ninety), abs=1e-3)


def test_alpha_law_inverts_its_distribution_function():
    """P(alpha < a) = (1 - a^(1-k)) / (1 - 4^(1-k)), and log a / log 4 at k = 1."""
    u = torch.rand(100, dtype=torch.float64)
    for k in (1.0, 2.0, 3.0, 5.0):
        a = dl.alpha_law(u, k)
        cdf = a.log() / np.log(4) if k == 1 else (1 - a ** (1 - k)) / (1 - 4.0 ** (1 - k))
        assert torch.allclose(cdf, u, atol=1e-12)


@pytest.mark.parametrize("n_unc, values", [(16, (0, 1.96875, 3.9375, 7.875, 11.8125)),
                                           (32, (0, 0.984375, 1.96875, 3.9375, 5.90625))])
def test_weight_of_unconditional_negatives_and_its_inverse(n_unc, values):
    for alpha, w in zip((1, 1.5, 2, 3, 4), values):
        assert dl.alpha_weight(alpha, 64, n_unc) == w
        gamma = n_unc * w / (63 + n_unc * w)
        assert 1 / (1 - gamma) == pytest.approx(alpha) and (63 + n_unc * w) / 63 == pytest.approx(alpha)


# --- queues ------------------------------------------------------------------


class Numbers:
    """A source whose latent i is the number i everywhere; image i has label i // 2 % 3."""
    labels, seed = np.arange(60) % 3, 0

    def latents(self, ids):
        return ids.float()[:, None, None, None].expand(-1, 1, 2, 2).clone()

    def ids(self, epoch, rows):
        return 2 * torch.as_tensor(rows)


def bank_of_numbers(**changes):
    return Bank(Numbers(), 3, (1, 2, 2), **{**dict(size=4, size_any=7), **changes})


def test_ring_keeps_the_newest_in_order_and_never_more_than_its_size():
    bank = bank_of_numbers()
    bank.push(0, np.arange(30))
    assert bank.by_class.count.tolist() == [4, 4, 4] and bank.any.count.tolist() == [7]
    for c in range(3):
        assert sorted((bank.by_class.ids[c] // 2).tolist()) == [18 + c, 21 + c, 24 + c, 27 + c]
    assert sorted((bank.any.ids[0] // 2).tolist()) == list(range(23, 30))
    assert torch.equal(bank.by_class.x[:, :, 0, 0, 0], bank.by_class.ids.float())


def test_draws_have_the_label_do_not_repeat_and_count_underflows():
    bank = bank_of_numbers()
    bank.push(0, np.arange(30))
    torch.manual_seed(0)
    got = bank.by_class.draw(torch.tensor([2, 0, 2]), 4)[..., 0, 0, 0] / 2
    assert (got % 3).tolist() == [[2] * 4, [0] * 4, [2] * 4]
    assert all(len(set(row.tolist())) == 4 for row in got)
    assert bank.by_class.underflows == 0
    few = bank.by_class.draw(torch.tensor([1]), 9)
    assert bank.by_class.underflows == 1 and few.shape[1] == 9
    with pytest.raises(ValueError, match="no sample"):
        bank_of_numbers().by_class.draw(torch.tensor([0]), 1)


def test_unconditional_draws_spread_over_classes_and_differ_between_labels():
    bank = bank_of_numbers(size_any=30)
    bank.push(0, np.arange(30))
    got = bank.any.draw(torch.zeros(5, dtype=torch.long), 20)[..., 0, 0, 0] / 2
    assert all({0, 1, 2} == set((row % 3).tolist()) for row in got)
    assert len({tuple(sorted(row.tolist())) for row in got}) > 1


def test_labels_of_a_step_are_a_subset_of_those_just_pushed():
    bank = bank_of_numbers()
    bank.push(0, np.array([0, 3, 6, 1]))
    assert sorted(bank.labels(4).tolist()) == [0, 0, 0, 1]
    with pytest.raises(UserError, match="--push"):
        bank.labels(5)


def test_queues_draw_the_same_from_the_same_seed_and_after_a_reload():
    a, b = bank_of_numbers(), bank_of_numbers()
    a.push(0, np.arange(17))
    b.load_state_dict({k: v for k, v in a.state_dict().items()})
    for bank in (a, b):
        bank.push(0, np.arange(17, 20))
    draws = []
    for bank in (a, b):
        torch.manual_seed(5)
        draws.append((bank.by_class.draw(torch.tensor([0, 1, 2]), 3), bank.any.draw(torch.tensor([0]), 3),
                      bank.labels(2)))
    assert all(torch.equal(x, y) for x, y in zip(*draws))
    assert a.by_class.ids.tolist() == b.by_class.ids.tolist()


# --- one step ----------------------------------------------------------------


def fixed_batch(cfg, seed=0):
    g = torch.Generator().manual_seed(seed)
    fixed, shape, N = conditions(cfg, g), (cfg.channels, cfg.size, cfg.size), cfg.labels
    return dict(fixed, pos=torch.randn(N, cfg.pos, *shape, generator=g) + 0.5,
                unc=torch.randn(N, cfg.unc, *shape, generator=g))


def step_models(cfg):
    torch.manual_seed(3)
    net = opened(dl.Generator(**dl.sizes(cfg)))
    mae = dl.MAE(**dl.mae_sizes(cfg)).eval().requires_grad_(False)
    return net, mae


def gradients(cfg, b, ddp=ONE, group=None, wrap=lambda net: net):
    net, mae = step_models(cfg)
    loss, infos = dl.drift_backward(wrap(net), mae, b, cfg, ddp, group)
    return loss, infos, gradients_of(net)


def test_step_equals_the_slow_reference():
    """Feature by feature, label by label, autograd through the ten-line loss; global m and lambda need all
    rows at once.
    """
    cfg = config()
    b = fixed_batch(cfg)
    loss, _, grads = gradients(cfg, b)
    net, mae = step_models(cfg)
    fake = mae.features(generated(net, b, cfg.gen))
    with torch.no_grad():
        pos, unc = ([mae.features(x) for x in b[kind]] for kind in ("pos", "unc"))
    total = slow_total(fake, pos, unc, b["alpha"], cfg)
    total.backward()
    assert float(loss) == pytest.approx(total.item(), rel=1e-4)
    # float32; near-duplicate rows lose digits in the reference's uncentred distances
    compare(grads, gradients_of(net), 2e-3)


@pytest.mark.parametrize("micro", [1, 3])
def test_label_micro_batches_equal_the_full_batch(micro):
    cfg = config()
    full = gradients(cfg, fixed_batch(cfg))
    micro = gradients(dataclasses.replace(cfg, micro=micro), fixed_batch(cfg))
    assert micro[0] == pytest.approx(float(full[0]), rel=1e-5)
    for key in full[1]:
        for name in full[1][key]:
            assert float(micro[1][key][name]) == pytest.approx(float(full[1][key][name]), rel=1e-4, abs=1e-9)
    compare(micro[2], full[2], 1e-4)  # batches of another size sum in another order


def test_label_blocks_do_not_mix():
    """Reordering labels reorders their problems: same loss, same gradient."""
    cfg = config()
    b = fixed_batch(cfg)
    order = torch.tensor([2, 0, 3, 1])
    a, c = gradients(cfg, b), gradients(cfg, {k: v[order] for k, v in b.items()})
    assert float(a[0]) == pytest.approx(float(c[0]), rel=1e-5)
    compare(a[2], c[2], 1e-4)


def test_location_sum_multiplies_each_key_by_its_locations():
    gen = {"k": torch.randn(2, 5, 3, 4), "one": torch.randn(2, 1, 3, 4)}
    real = {"k": torch.randn(2, 5, 5, 4), "one": torch.randn(2, 1, 5, 4)}
    alpha, cfg = torch.ones(2), config()
    parts = [float(dl.drift_objective({k: gen[k]}, {k: real[k]}, alpha, cfg, None)[0]) for k in gen]
    total = dl.drift_objective(gen, real, alpha, dataclasses.replace(cfg, location_sum=True), None)[0]
    assert float(total) == pytest.approx(5 * parts[0] + parts[1], rel=1e-5)


def test_scale_and_shift_of_features_change_nothing_but_the_gradient_scale():
    gen, real = {"k": torch.randn(3, 2, 4, 6)}, {"k": torch.randn(3, 2, 5, 6)}
    alpha, cfg, out = torch.tensor([1.0, 2.0, 3.0]), config(gen=4), []
    for c, shift in ((1, 0), (50, 0), (1, 30)):
        g = {"k": (gen["k"] * c + shift).requires_grad_()}
        loss, infos = dl.drift_objective(g, {"k": real["k"] * c + shift}, alpha, cfg, None)
        loss.backward()
        out.append((loss.item(), g["k"].grad, float(infos["k"]["m"])))
    assert out[1][0] == pytest.approx(out[0][0], rel=1e-4) and out[2][0] == pytest.approx(out[0][0], rel=1e-4)
    assert torch.allclose(out[1][1] * 50, out[0][1], rtol=1e-2, atol=1e-6)
    assert out[1][2] == pytest.approx(50 * out[0][2], rel=1e-4)


def test_statistics_of_a_step_are_finite_and_above_their_floors():
    cfg = config()
    b = fixed_batch(cfg)
    _, infos, _ = gradients(cfg, b)
    stats = dl.drift_stats(infos, b, cfg)
    assert stats["floored"] == 0 and set(stats["m"]) == set(infos)
    values = [*stats["m"].values(), *sum(stats["lam"].values(), [])]
    assert np.isfinite(values).all() and min(values) > 0
    assert stats["w_mean"] == pytest.approx(float(((b["alpha"] - 1) * 2 / 2).mean()), rel=1e-5)


def _two_ranks(rank, store, cfg, whole, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = {k: v[rank * 2:rank * 2 + 2] for k, v in whole.items()}
    wrap = torch.nn.parallel.DistributedDataParallel
    loss, infos, grads = gradients(cfg, half, Ranks(rank, 2, torch.device("cpu")), dist.group.WORLD, wrap)
    mean = run.all_mean(loss, Ranks(rank, 2, torch.device("cpu")))
    if rank == 0:
        torch.save(dict(loss=mean, grads=grads, m={k: v["m"] for k, v in infos.items()}), out)
    run.leave_together()


@pytest.mark.parametrize("micro", [0, 1])
def test_two_ranks_equal_one_on_the_same_batch(tmp_path, micro):
    cfg = config(micro=micro)
    whole = fixed_batch(cfg)
    # as many labels at once as a rank has: convolutions of other batches round otherwise, a law of its own
    loss, infos, grads = gradients(dataclasses.replace(cfg, micro=micro or 2), whole)
    two_ranks(_two_ranks, str(tmp_path / "store"), cfg, whole, str(tmp_path / "out"))
    two = torch.load(tmp_path / "out", weights_only=True)
    assert float(two["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert all(float(two["m"][k]) == pytest.approx(float(infos[k]["m"]), rel=1e-5) for k in infos)
    compare(two["grads"], grads, 1e-5)


# --- runs --------------------------------------------------------------------


script = functools.partial(command, "drift_latent.py")


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """An uninterrupted run, in process."""
    torch.set_num_threads(1)
    cfg = config(data=images, out=str(tmp_path_factory.mktemp("runs") / "straight"), then_evaluate=True)
    dl.train(cfg)
    return cfg


def test_a_run_leaves_what_the_style_promises(straight):
    train = check_files_and_scores(straight.out, "drift_latent.py")
    for key in ("loss", "grad_norm", "lr", "img_s", "m", "lam", "alpha_mean", "w_mean", "gamma_mean",
                "underflows", "floored"):
        assert key in train[-1]


def test_resume_is_bit_exact_queues_included(straight, images, tmp_path):
    cfg = dataclasses.replace(straight, out=str(tmp_path / "r"), then_evaluate=False,
                              mae=straight.out + "/mae/mae.safetensors")
    dl.train(cfg)
    whole = weights(cfg.out), newest(cfg.out)
    forget(cfg.out, 6)
    dl.train(cfg)
    assert same(weights(cfg.out), whole[0]) and newest(cfg.out) == whole[1]


def test_sigkill_and_the_same_command_again_give_the_same_bits(straight, images, tmp_path):
    cfg = dataclasses.replace(straight, out=str(tmp_path / "k"), then_evaluate=False, steps=40, save_every=1,
                              mae=straight.out + "/mae/mae.safetensors")
    words = flags(cfg, "out")
    kill_after_three_steps("drift_latent.py", words, cfg.out, cfg.steps)
    script("train", *words, "--out", cfg.out, check=0)
    script("train", *words, "--out", tmp_path / "whole", check=0)
    assert same(weights(cfg.out), weights(tmp_path / "whole"))
    assert newest(cfg.out) == newest(tmp_path / "whole")


def test_stopping_the_encoder_is_bit_exact_too(images, tmp_path):
    a = config(data=images, out=str(tmp_path / "a"), save_every=1, mae_steps=4)
    first = run.load_weights(dl.train_mae(a))[0]
    for step in ("00000004", "00000003"):
        shutil.rmtree(tmp_path / "a" / "mae" / "ckpt" / step, ignore_errors=True)
    again = run.load_weights(dl.train_mae(a))[0]
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_and_resume(images, straight, how, tmp_path):
    """Encoder and generator, whole on each rank or cut over both; the second call continues the first."""
    cfg = dataclasses.replace(straight, out=str(tmp_path / "two"), then_evaluate=False, steps=2, shard=how,
                              save_every=1)
    script("train", *flags(cfg), ranks=2, check=0)
    ckpt = tmp_path / "two" / "ckpt" / "00000002"
    banks = [(ckpt / f"bank.rank{r}.safetensors").read_bytes() for r in (0, 1)]
    assert banks[0] != banks[1] and (ckpt / "net.rank1.safetensors").exists() == (how == "fsdp2")
    whole = weights(cfg.out)
    forget(cfg.out, 2)                                          # nothing is left of step 2
    script("train", *flags(cfg), ranks=2, check=0)
    assert same(weights(cfg.out), whole)


def test_sampling_reads_its_shapes_from_the_weights_and_refuses_others(straight, monkeypatch):
    cfg = dl.Config(preset="table8_l2", out=straight.out, count=10, alpha=1.5)  # no shape of the run
    monkeypatch.setattr(sys, "argv", ["drift_latent.py", "sample"])
    dl.sample(cfg)
    made = np.load(pathlib.Path(straight.out) / "samples" / "alpha1.5.npz")
    assert made["arr_0"].shape == (10, 16, 16, 1) and made["arr_0"].dtype == np.uint8
    first = made["arr_0"].copy()
    dl.sample(cfg)
    assert np.array_equal(np.load(pathlib.Path(straight.out) / "samples" / "alpha1.5.npz")["arr_0"], first)
    monkeypatch.setattr(sys, "argv", ["drift_latent.py", "sample", "--width", "512"])
    with pytest.raises(UserError, match="width 16, not 512"):
        dl.sample(dataclasses.replace(cfg, width=512))


def test_the_script_and_common_alone_are_a_working_copy(tmp_path):
    shutil.copy(ROOT / "drift_latent.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    done = subprocess.run([sys.executable, "drift_latent.py", "plan", "--preset", "table8_l2", "--json"],
                          cwd=tmp_path, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["params"] == 462_909_456 and plan["preset"] == "table8_l2" and plan["steps"] == 200_000
    # drift.md 9.2: 5.4e15 multiply-adds a step, two FLOP each; 86.4 GMAC the generator
    assert plan["flops_per_step"] == pytest.approx(2 * 5.4e15, rel=0.02)
    assert plan["generator_flops"] == pytest.approx(2 * 86.4e9, rel=0.01) and plan["feature_vectors"] == 6734


def test_overfit_puts_every_sample_next_to_its_own_positive(tmp_path):
    """The overfit preset's switches at the size of these tests: two classes, four positives and four noises
    of each.
    """
    x = np.kron(np.random.default_rng(0).uniform(0, 255, (96, 4, 4)), np.ones((4, 4))).astype(np.uint8)
    np.savez(tmp_path / "x.npz", train_images=x, train_labels=np.arange(96) % 2)
    names = ("unc", "push", "fixed_noise", "alpha_max", "features", "lr", "warmup", "schedule", "wd")
    cfg = config(**{k: dl.PRESETS["overfit"]["set"][k] for k in names}, data=str(tmp_path / "x.npz"), fill=96,
                 gen=4, pos=4, classes=2, labels=2, bank=4, bank_unc=4, steps=500, out=str(tmp_path / "o"),
                 log_every=50, save_every=250, ema=(0.5,), width=64, depth=2)
    dl.train(cfg)
    net, _, _ = dl.load_generator(cfg, torch.device("cpu"))
    bank = Bank(dl.Source(cfg, torch.device("cpu")), cfg.classes, (4, 8, 8), cfg.bank, cfg.bank_unc)
    bank.load_state_dict(dict(zip(("by_class", "any"), saved_bank(cfg.out))))
    noise = [dl.fixed_noise(cfg, (4, 8, 8), c) for c in range(2)]
    with torch.no_grad():
        z = net(torch.arange(2).repeat_interleave(4), torch.ones(8), torch.cat([n[0] for n in noise]),
                torch.cat([n[1] for n in noise])).view(2, 4, -1)
    real = bank.by_class.x.flatten(2)
    distance = torch.cdist(z, real)
    apart = torch.cdist(real, real).sum((1, 2)).mean() / 12
    # measured 0.28; a sample at its class mean would stand at 0.61, a fresh generator at 0.7
    assert distance.amin(2).mean() < 0.45 * apart, (distance.amin(2).mean(), apart)
    assert distance.amin(1).mean() < 0.45 * apart  # and every positive has a sample: nothing collapsed


def saved_bank(out):
    """The two rings of the newest checkpoint, as state dicts."""
    box = {}
    run.load(out, {}, ONE, ranked=dict(bank=box))
    return box["by_class"], box["any"]


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize("words, line", [
    (["--preset", "table8_l"], "unknown preset 'table8_l'; did you mean 'table8_l2'?"),
    (["--widht", "3"], "--width"),
    (["--data", "/nonexistent"], "no data at /nonexistent"),
    (["--labels", "4", "--push", "2"], "--push 2 is below the 4 labels"),
    (["--features", "xyz"], "--features takes letters of abcd"),
    (["--codec", "sdvae"], "--vae FILE"),
    (["sample", "--out", "/nonexistent/run"], "no weights at"),
    (["official", "/nonexistent"], "is not an official artifact"),
    (["--mae", "/nonexistent.safetensors"], "no weights at"),
    (["--channels", "99"], "components"),
])
def test_a_mistake_is_one_line_and_exit_2(words, line, tmp_path):
    command = [] if words[0].startswith("-") else [words[0]]
    rest = words[len(command):]
    out = [] if "--out" in rest else ["--out", str(tmp_path / "o")]
    done = script(*command, "--preset", "smoke", *out, *rest)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("drift_latent.py: error: ") and line in done.stderr


def test_weights_of_another_size_and_another_kind_are_refused(straight, images, tmp_path):
    wide = dataclasses.replace(straight, out=str(tmp_path / "x"), mae=straight.out + "/mae/mae.safetensors",
                               mae_width=8)
    with pytest.raises(UserError, match="no encoder of width 8"):
        dl.train(wide)
    with pytest.raises(UserError, match="does not hold a feature encoder"):
        dl.train(dataclasses.replace(wide, mae=straight.out + "/ema.safetensors"))
    with pytest.raises(UserError, match="does not hold a generator"):
        dl.load_generator(dataclasses.replace(straight, weights=straight.out + "/mae/mae.safetensors"),
                          torch.device("cpu"))
    whole = (pathlib.Path(straight.out) / "ema.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        dl.load_generator(dataclasses.replace(straight, weights=str(tmp_path / "cut.safetensors")),
                          torch.device("cpu"))


# --- codec -------------------------------------------------------------------


def test_complete_patch_pca_is_an_isometry_and_inverts():
    x = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    pca = codec.PatchPCA.fit(x, 2, 12)
    z = pca.encode(x)
    assert z.shape == (20, 12, 4, 4) and z.square().mean() == pytest.approx(1, rel=1e-4)
    assert (pca.decode(z) - (x / 127.5 - 1)).abs().max() < 1e-5
    pixels = x.float().flatten(1) / 127.5
    ratio = torch.pdist(z.flatten(1)) / torch.pdist(pixels)
    assert ratio.std() < 1e-5 * ratio.mean()


def test_truncated_patch_pca_keeps_the_best_subspace():
    """Squared error of decode(encode(x)) is the sum of the eigenvalues left out."""
    g = torch.Generator().manual_seed(0)
    noise, level = torch.randn(200, 1, 8, 8, generator=g), torch.randn(200, 1, 1, 1, generator=g)
    x = (100 + 20 * noise + 40 * level).clamp(0, 255).byte()
    pca = codec.PatchPCA.fit(x, 4, 5)
    v = torch.nn.functional.pixel_unshuffle(x.double() / 127.5 - 1, 4).movedim(1, -1).flatten(0, 2)
    left = torch.linalg.eigvalsh(v.T.cov(correction=0))[:-5].sum()
    error = (pca.decode(pca.encode(x)) - (x.float() / 127.5 - 1)).square().mean() * 16
    assert error == pytest.approx(float(left), rel=1e-3)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    """An SD-VAE of the published layout, small and random."""
    from common.vae import AutoencoderKL
    from safetensors.torch import save_file
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(AutoencoderKL(z=4, widths=(32, 32, 32, 32), blocks=1).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    x = np.random.default_rng(1).integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "p.npz"
    np.savez(path, train_images=x, train_labels=np.arange(24) % 4)
    return str(path)


def test_sd_vae_path_caches_resumes_trains_on_the_cache_and_decodes(vae_file, photos, tmp_path):
    cfg = config(data=photos, out=str(tmp_path / "cache"), codec="sdvae", vae=vae_file, image_size=32,
                 colors=3, size=4, patch=1, width=16, heads=2, fill=8, push=4, flip=True, mae_width=16,
                 steps=2, features="ab")
    dl.cache(cfg)
    first = (tmp_path / "cache" / "latents.f16.bin").read_bytes()
    dl.cache(cfg)  # nothing left to do
    assert (tmp_path / "cache" / "latents.f16.bin").read_bytes() == first
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["codec"]["scale"] == 0.18215 and len(manifest["codec"]["provenance"]["sha256"]) == 64
    ids = torch.tensor([0, 1, 7])
    live, kept = dl.Source(cfg, ONE.device), dl.Source(dataclasses.replace(cfg, data=str(tmp_path / "cache")),
                                                       ONE.device)
    assert torch.allclose(live.latents(ids), kept.latents(ids), atol=2e-3)  # float16 on disk
    assert not torch.equal(live.latents(ids)[0],
                           live.latents(ids)[1].flip(2))  # a mirror is encoded, not mirrored
    run_cfg = dataclasses.replace(cfg, data=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    dl.train(run_cfg)
    meta = run.load_weights(tmp_path / "run" / "ema.safetensors")[1]
    assert meta["codec"]["kind"] == "sdvae"
    dl.sample(dataclasses.replace(run_cfg, count=3))
    assert np.load(tmp_path / "run" / "samples" / "alpha1.npz")["arr_0"].shape == (3, 32, 32, 3)
    with pytest.raises(UserError, match="--vae FILE"):
        dl.load_generator(dataclasses.replace(run_cfg, vae=""), ONE.device)


def test_encoder_crops_happen_on_pixels_before_the_codec(vae_file, photos, tmp_path):
    cfg = config(data=photos, codec="sdvae", vae=vae_file, image_size=32, colors=3, size=4, patch=1,
                 mae_crop=True, mae_steps=2, out=str(tmp_path))
    source = dl.Source(cfg, ONE.device)
    crops = [x for x, _ in dl.mae_batches(cfg, source, ONE, 0)]
    assert len(crops) == 2 and crops[0].shape == (8, 4, 4, 4)
    rows = dl.data.Order(24, 8, cfg.seed)(1)[1]
    whole = source.latents(2 * torch.as_tensor(rows))
    assert not torch.allclose(crops[0], whole, atol=1e-2)  # not the centre crop
    again = next(dl.mae_batches(cfg, source, ONE, 1))[0]
    assert torch.equal(again, crops[1])  # a resumed run sees the same crops
    cached = dataclasses.replace(cfg, out=str(tmp_path / "c"))
    dl.cache(cached)
    with pytest.raises(UserError, match="--mae-crop needs pixels"):
        next(dl.mae_batches(cfg, dl.Source(dataclasses.replace(cfg, data=cached.out), ONE.device), ONE, 0))


# --- official files ----------------------------------------------------------


def test_reader_reads_what_flax_wrote_chunked_and_bfloat16():
    got = flax_msgpack.parse(base64.b64decode(GOLDEN["msgpack"]))
    assert torch.equal(got["a/b"], torch.arange(20.).view(2, 10) / 4)
    assert got["bf"].dtype == torch.bfloat16 and got["bf"].tolist() == [0, 1, 2, 3, 4]


def test_reader_survives_any_damage():
    """Every prefix, and thousands of random edits: a tree or MsgpackError, never another exception, never
    much memory.
    """
    whole = base64.b64decode(GOLDEN["msgpack"])
    rng = random.Random(0)
    cases = [whole[:i] for i in range(len(whole))]
    for _ in range(4000):
        edited = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            edited[rng.randrange(len(edited))] = rng.randrange(256)
        cases.append(bytes(edited))
    cases += [rng.randbytes(rng.randrange(1, 80)) for _ in range(2000)]
    refused = 0
    for case in cases:
        try:
            flax_msgpack.parse(case)
        except flax_msgpack.MsgpackError:
            refused += 1
    assert refused > len(cases) / 2


@pytest.mark.parametrize("data, why", [
    (b"\xdd\xff\xff\xff\xff", "array of 4294967295"), (b"\xdf\xff\xff\xff\xff", "map of 4294967295"),
    (b"\xc6\xff\xff\xff\xff", "bytes wanted"), (b"\x81\x01\x02", "not text"),
    (b"\x91" * 50, "nested deeper"), (b"\x82\xa1a\x80\xa1a\x80", "twice"), (b"\x80\x00", "bytes after"),
    (b"\x81\xa1a\x01", "not an array"), (b"\xc1", "unknown type byte"),
    (b"\x81\xa1a\xd4\x05\x00", "extension type 5"), (b"\x90", "not a parameter tree")])
def test_reader_says_what_is_wrong(data, why):
    with pytest.raises(flax_msgpack.MsgpackError, match=why):
        flax_msgpack.parse(data)


def pack(value):
    """Ten lines of msgpack: the writer of these tests."""
    if isinstance(value, dict):
        pairs = b"".join(pack(k) + pack(v) for k, v in value.items())
        return b"\xdf" + len(value).to_bytes(4, "big") + pairs
    if isinstance(value, str):
        return b"\xd9" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"\xce" + value.to_bytes(4, "big")
    if isinstance(value, bytes):
        return b"\xc6" + len(value).to_bytes(4, "big") + value
    if isinstance(value, list):
        return bytes([0x90 + len(value)]) + b"".join(map(pack, value))
    body = pack([list(value.shape), str(value.dtype), value.tobytes()])
    return b"\xc9" + len(body).to_bytes(4, "big") + b"\x01" + body


def write_artifact(folder, net, config_, path_of):
    """A Generator or MAE as the two files of a release."""
    tree = {}
    for name, p in net.named_parameters():
        path = path_of(name)
        for i in range(1 if path else net.style_tables):
            t = p.detach() if path else p.detach().view(net.style_tables, -1, p.shape[1])[i]
            if path and path.endswith("/kernel"):
                t = t.T if t.ndim == 2 else t.permute(2, 3, 1, 0)
            *folders, leaf = (path or f"noise_embeds_{i}/embedding").split("/")
            node = tree
            for f in folders:
                node = node.setdefault(f, {})
            node[leaf] = np.ascontiguousarray((t[None] if name in ("pos", "context") else t).numpy())
    folder.mkdir(exist_ok=True)
    (folder / "ema_params.msgpack").write_bytes(pack(tree))
    (folder / "metadata.json").write_text(json.dumps(dict(format="flax.msgpack", step=7, ema_decay=0.999,
                                                          model_config=config_)))
    return tree


def test_official_command_converts_and_its_weights_sample_the_same(tmp_path):
    config_ = dict(GOLDEN["generator"]["config"])
    net = fill_like_parity(dl.Generator(**jax_release.generator_sizes(config_)), jax_release.generator_path,
                           0)
    write_artifact(tmp_path / "gen", net, config_, jax_release.generator_path)
    loaded = dl.load_official(str(tmp_path / "gen"))
    with torch.no_grad():
        assert torch.equal(loaded(*inputs(net, 2)), net(*inputs(net, 2)))
    script("official", tmp_path / "gen", "--out", tmp_path / "run", check=0)
    tensors, meta = run.load_weights(tmp_path / "run" / "ema.safetensors")
    assert meta["sizes"] == net.sizes and all(torch.equal(tensors[k], v) for k, v in net.state_dict().items())
    done = script("sample", "--out", tmp_path / "run")
    assert done.returncode == 2 and "--vae" in done.stderr


def test_damaged_artifacts_are_refused_in_one_line(tmp_path):
    config_ = dict(GOLDEN["mae"]["config"])
    mae = dl.MAE(**jax_release.mae_sizes(config_))
    tree = write_artifact(tmp_path / "mae", mae, config_, jax_release.mae_path)
    assert isinstance(dl.load_official(str(tmp_path / "mae")), dl.MAE)
    file = tmp_path / "mae" / "ema_params.msgpack"

    def refused(match):
        with pytest.raises(UserError, match=match):
            dl.load_official(str(tmp_path / "mae"))

    removed = tree["fc"].pop("bias")
    file.write_bytes(pack(tree))
    refused("fc/bias is missing")
    tree["fc"].update(bias=removed, extra=removed)
    file.write_bytes(pack(tree))
    refused("fc/extra has no place")
    tree["fc"].pop("extra")
    tree["fc"]["bias"] = np.zeros(3, np.float32)
    file.write_bytes(pack(tree))
    refused("fc/bias has shape")
    file.write_bytes(b"")
    refused("not an official artifact")
    for text in ("{", "[]", "{}", '{"model_config": {"hidden_size": 3}}', '{"model_config": {}}'):
        (tmp_path / "mae" / "metadata.json").write_text(text)
        with pytest.raises(UserError):
            dl.load_official(str(tmp_path / "mae"))
