"""drift_pixel.py: what differs from its sibling, the twins they share, runs, ranks, and a user's mistakes."""

import ast
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from drift_runs import (ONE, ROOT, check_files_and_scores, compare, conditions, flags, forget, generated,
                        gradients_of, inventory, kill_after_three_steps, newest, opened, rows_of, same,
                        slow_total, tiny_images, weights)
from forked import command, two_ranks
from safetensors.torch import save_file
from test_imagenet import archives  # noqa: F401  a fixture: small ILSVRC2012 archives of the real nesting

import drift_pixel as dp
from common import imagenet, run
from common.drift import jax_release, parallel
from common.drift.convnext import GRN, ConvNeXt
from common.drift.queues import Bank, Pixels
from common.run import Ranks, UserError

MICRO = dict(preset="smoke", data="", size=16, channels=1, fit="crop", augment="none", patch=4, width=16,
             depth=2, heads=2, classes=4, context=2, style_tables=2, style_codes=4, mae_width=16,
             mae_blocks=(1, 2, 1, 1), mae_groups=4, mae_fold=2, mask_cell=1, mae_steps=3, mae_batch=8,
             mae_warmup=2, mae_ema=0.5, cls_steps=2, cls_warmup=1, labels=4, gen=3, pos=3, unc=2, push=8,
             fill=16, bank=6, bank_unc=10, lr=1e-3, warmup=2, steps=6, ema=(0.5, 0.9), save_every=2,
             keep_every=2, grid_every=100, log_every=1, count=8, alphas=(1.0,), judge_epochs=1)


def config(**changes):
    return dp.Config(**{**MICRO, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_images(tmp_path_factory.mktemp("data"))


def small_convnext(side=64):
    torch.manual_seed(5)
    return opened(ConvNeXt((1, 1, 2, 1), (8, 16, 24, 32), side)).eval()


@pytest.fixture(scope="module")
def convnext_file(tmp_path_factory):
    """A small ConvNeXt-V2 as its publisher lays it out: prefix, and a classifier that has no place here."""
    path = tmp_path_factory.mktemp("convnext") / "model.safetensors"
    state = {"convnextv2." + k: v.clone().contiguous() for k, v in small_convnext().state_dict().items()}
    save_file({**state, "classifier.weight": torch.zeros(5, 32), "classifier.bias": torch.zeros(5)}, path,
              {"format": "pt"})
    return str(path)


# --- twins -------------------------------------------------------------------


def definitions(source):
    return {node.name: node for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_blocks_marked_as_twins_are_the_same_in_both_scripts():
    """Every mark names its own block, and the two syntax trees, docstrings included, are equal."""
    text = (ROOT / "drift_pixel.py").read_text()
    ours = definitions(text)
    theirs = definitions((ROOT / "drift_latent.py").read_text())
    marks = re.findall(r"^(?:def|class) (\w+).*#\s*twin: drift_latent\.(\w+)$", text, re.M)
    assert len(marks) == text.count("twin: drift_latent.") >= 40
    for name, mark in marks:
        assert name == mark and ast.dump(ours[name]) == ast.dump(theirs[mark]), name


def test_a_changed_twin_would_be_noticed():
    text = (ROOT / "drift_pixel.py").read_text()
    changed = text.replace("hidden = -(-int(2 / 3 * 4 * width) // 32) * 32", "hidden = 4 * width")
    assert changed != text
    assert ast.dump(definitions(changed)["SwiGLU"]) != ast.dump(definitions(text)["SwiGLU"])


# --- presets -----------------------------------------------------------------


@pytest.mark.parametrize("preset, count", [("ablation", 133_864_704), ("table8_b16", 133_864_704),
                                           ("table8_l16", 464_450_304)])
def test_parameter_counts_are_those_of_the_release(preset, count):
    with torch.device("meta"):
        net = dp.Generator(**dp.sizes(dp.Config(**dp.PRESETS[preset]["set"])))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("name", dp.PRESETS)
def test_every_preset_builds_on_meta_and_passes_its_own_check(name):
    cfg = dp.Config(preset=name, **dp.PRESETS[name]["set"])
    with torch.device("meta"):
        net, mae = dp.Generator(**dp.sizes(cfg)), dp.MAE(**dp.mae_sizes(cfg))
        encoder = dp.Encoder(mae, ConvNeXt() if "n" in cfg.features else None)
        out = net(torch.zeros(2).long(), torch.ones(2), torch.empty(2, cfg.channels, cfg.size, cfg.size),
                  torch.zeros(2, cfg.style_tables).long())
    assert out.shape == (2, cfg.channels, cfg.size, cfg.size)
    assert len(inventory(encoder, cfg.size, cfg.channels, cfg.features)) >= 10
    dp.check(cfg, Ranks(0, 8 if name.startswith("table8") else 1, torch.device("cpu")))


COMMON8 = dict(
    size=256, channels=3, patch=16, context=16, style_tables=32, style_codes=64, mae_width=640,
    mae_blocks=(3, 4, 6, 3), mae_fold=8, mae_groups=32, mask_ratio=0.5, mask_cell=2, mae_steps=200_000,
    mae_batch=8192, mae_lr=4e-3, mae_warmup=4000, mae_ema=0.9995, cls_steps=3000, cls_warmup=1000,
    cls_weight=0.1, wd=0.01, warmup=10_000, schedule="constant", clip=2.0, steps=100_000,
    ema=(0.999, 0.9995, 0.9998, 0.9999), labels=128, pos=128, gen=64, unc=32, taus=(0.02, 0.05, 0.2),
    alpha_max=4.0, alpha_power=5.0, alpha_one=0.0, push=128, bank=128, bank_unc=1000, attn_fp32=True,
    remat=True, seed=42,
    features="abcdn", augment="rrc", fit="crop", save_every=2000, keep_every=50_000, grid_every=5000,
    alphas=(1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5))
# The paper's table with the release's values where it is silent; table 9's first row is the ablation.
TABLE8 = {"table8_b16": dict(COMMON8, width=768, depth=12, heads=12, lr=2e-4),
          "table8_l16": dict(COMMON8, width=1024, depth=24, heads=16, lr=4e-4),
          "ablation": dict(size=256, patch=16, width=768, depth=12, heads=12, mae_width=256, mae_steps=30_000,
                           cls_steps=0, lr=2e-4, wd=0.01, warmup=5000, steps=30_000, ema=(0.999,), labels=64,
                           pos=64, gen=64, unc=16, alpha_power=3.0, push=64, features="abcd", augment="rrc")}


@pytest.mark.parametrize("preset", TABLE8)
def test_table_8_and_9_cells(preset):
    cfg = dp.Config(preset=preset, **dp.PRESETS[preset]["set"])
    assert {cell: getattr(cfg, cell) for cell in TABLE8[preset]} == TABLE8[preset]


def test_plan_counts_the_papers_flop_and_says_what_fits(capsys):
    cfg = dp.Config(preset="table8_l16", json=True, device="cpu", **dp.PRESETS["table8_l16"]["set"])
    dp.plan(cfg)
    plan = json.loads(capsys.readouterr().out)
    # drift.md 9.2: 7.0e15 multiply-adds a step, two FLOP each; 86.8 GMAC the generator, the paper's 87 G
    assert plan["flops_per_step"] == pytest.approx(2 * 7.0e15, rel=0.02)
    assert plan["generator_flops"] == pytest.approx(2 * 86.8e9, rel=0.01)
    assert plan["feature_keys"] == 99 and plan["params"] == 464_450_304
    assert plan["generator_gb_ddp+remat"] < 0.9 * plan["generator_gb_ddp"]
    assert plan["encoder_needs"] in ("ddp", "ddp+remat") and plan["generator_needs"] == "over 1 ranks"


def test_plan_for_many_ranks_knows_fsdp2(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    cfg = dp.Config(preset="table8_l16", json=True, device="cpu", **dp.PRESETS["table8_l16"]["set"])
    dp.plan(cfg)
    plan = json.loads(capsys.readouterr().out)
    assert plan["ranks"] == 16 and plan["generator_needs"] == "ddp+remat"
    # parameters, gradients, two moments and four averages, once a rank or once in all
    weights = 464_450_304 * 32e-9
    assert plan["generator_gb_ddp"] - plan["generator_gb_fsdp2"] == pytest.approx(weights * 15 / 16)


# --- encoders ----------------------------------------------------------------


def test_feature_inventory_is_the_official_one():
    """86 keys of the MAE on 32 x 32 folded pixels, 192 channels in norm_x, and 13 of ConvNeXt-V2 Base."""
    with torch.device("meta"):
        encoder = dp.Encoder(dp.MAE(channels=3, width=640, patch=8), ConvNeXt())
    table = {key: (f, c) for key, f, c in inventory(encoder, 256, 3, "abcdn")}
    assert len(table) == 99
    assert table["norm_x"] == (1, 192) and table["global"] == (1, 196_608)
    assert table["layer1"] == (1024, 640) and table["layer4_std_4"] == (1, 5120)
    mine = {key: shape for key, shape in table.items() if key.startswith("convnext")}
    assert mine == {"convnext0_mean": (1, 128), "convnext0_std": (1, 128),
                    "convnext1": (784, 256), "convnext1_mean": (1, 256), "convnext1_std": (1, 256),
                    "convnext2": (196, 512), "convnext2_mean": (1, 512), "convnext2_std": (1, 512),
                    "convnext3": (49, 1024), "convnext3_mean": (1, 1024), "convnext3_std": (1, 1024),
                    "convnext_pool": (1, 1024), "convnext_std": (1, 1024)}
    with torch.device("meta"):
        base = sum(p.numel() for p in ConvNeXt().parameters())
    assert base == 87_692_800  # 88.7 M as published, less the classifier of 1000 classes


def test_every_one_of_the_99_keys_reaches_the_image_and_none_the_encoders():
    torch.manual_seed(0)
    mae = dp.MAE(channels=3, width=16, classes=3, patch=3, groups=8)
    encoder = dp.Encoder(mae, small_convnext()).eval().requires_grad_(False)
    x = torch.rand(2, 3, 96, 96).mul_(2).sub_(1).requires_grad_()
    feats = encoder.features(x, "abcdn")
    assert len(feats) == 99
    for key, f in feats.items():
        direction = torch.randn(f.shape, generator=torch.Generator().manual_seed(1))
        grad, = torch.autograd.grad((f * direction).sum(), x, retain_graph=True)
        assert torch.isfinite(grad).all() and grad.flatten(1).abs().amax(1).min() > 0, key
    sum(f.sum() for f in feats.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


def test_a_step_moves_the_generator_alone_and_bytes_count_as_floats():
    cfg = config(features="abcdnr", channels=3, size=32, patch=8)
    torch.manual_seed(1)
    encoder = dp.Encoder(dp.MAE(**dp.mae_sizes(cfg)), small_convnext(32)).eval().requires_grad_(False)
    net, b = opened(dp.Generator(**dp.sizes(cfg))), fixed_batch(cfg)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    loss, infos = dp.drift_backward(net, encoder, b, cfg, ONE)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    floats = dict(b, pos=dp.to_float(b["pos"]), unc=dp.to_float(b["unc"]))
    assert dp.drift_backward(net, encoder, floats, cfg, ONE)[0] == loss
    assert sum(key.startswith("convnext") for key in infos) == 13 and "x_mean_2" in infos


def test_global_response_norm_equals_its_formula():
    grn = GRN(3)
    x = torch.randn(2, 4, 5, 3)
    assert torch.equal(grn(x), x)  # weight and bias start at zero
    with torch.no_grad():
        grn.weight.normal_()
        grn.bias.normal_()
        got = grn(x)
        for b in range(2):
            norm = [float((x[b, :, :, c] ** 2).sum() ** 0.5) for c in range(3)]
            for c in range(3):
                gain = 1 + grn.weight[0, 0, 0, c] * norm[c] / (sum(norm) / 3)
                want = x[b, ..., c] * gain + grn.bias[0, 0, 0, c]
                assert torch.allclose(got[b, ..., c], want, atol=1e-4)
    zero = torch.zeros(1, 2, 2, 3, requires_grad=True)
    grn(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_convnext_maps_are_standardised_at_every_location():
    net = small_convnext()
    with torch.no_grad():
        feats = net.features(torch.rand(2, 3, 64, 64) * 2 - 1)
    for i in (1, 2, 3):
        f = feats[f"convnext{i}"]
        assert f.mean(-1).abs().max() < 1e-5
        assert (f.std(-1, unbiased=False) <= 1).all() and f.std(-1, unbiased=False).min() > 0.9
        assert torch.allclose(feats[f"convnext{i}_mean"][:, 0], f.mean(1), atol=1e-6)
        std = (f.var(1, unbiased=False) + 1e-6).sqrt()
        assert torch.allclose(feats[f"convnext{i}_std"][:, 0], std, atol=1e-6)
    assert torch.equal(feats["convnext_std"], feats["convnext3_std"])


def test_convnext_file_loads_whole_and_alone(convnext_file, tmp_path):
    net = ConvNeXt.load(convnext_file, side=64)
    x = torch.rand(2, 3, 80, 80) * 2 - 1
    with torch.no_grad():
        got, want = net.features(x), small_convnext().features(x)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert net.sizes == dict(depths=(1, 1, 2, 1), widths=(8, 16, 24, 32))
    folder = ConvNeXt.load(pathlib.Path(convnext_file).parent)
    assert folder.side == 224 and not any(p.requires_grad for p in folder.parameters())
    tensors = run.load_weights(convnext_file)[0]
    for change, why in ((lambda t: t.pop("convnextv2.layernorm.bias"), "layernorm.bias"),
                        (lambda t: t.update({"convnextv2.extra": torch.zeros(1)}), "extra"),
                        (lambda t: t.pop("convnextv2.encoder.stages.0.layers.0.grn.weight"), "no ConvNeXt"),
                        (lambda t: t.clear() or t.update(a=torch.zeros(1)), "no ConvNeXt-V2")):
        bad = dict(tensors)
        change(bad)
        save_file(bad, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=why):
            ConvNeXt.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("what", ["generator", "mae", "encoder"])
def test_recomputed_blocks_give_the_same_numbers(what):
    """--remat changes when activations are computed and nothing else."""
    cfg = config(channels=3, size=32, patch=8, features="abcdn")
    results = []
    for remat in (False, True):
        torch.manual_seed(2)
        if what == "mae":
            net = dp.MAE(**dp.mae_sizes(cfg), remat=remat)
            x = torch.rand(4, 3, 32, 32)
            dp.mae_loss(net, x, torch.arange(4), torch.ones(4, 16, 16), 0.1)[0].backward()
        else:
            net = opened(dp.Generator(**dp.sizes(cfg), remat=remat and what == "generator"))
            mae, conv = dp.MAE(**dp.mae_sizes(cfg)), small_convnext(32)
            mae.remat = conv.remat = remat and what == "encoder"
            encoder = dp.Encoder(mae, conv).eval().requires_grad_(False)
            dp.drift_backward(net, encoder, fixed_batch(cfg), cfg, ONE)
        results.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("micro", [1, 3])
def test_encoder_micro_batches_equal_the_full_batch(micro):
    cfg, results = config(), []
    g = torch.Generator().manual_seed(0)
    x, mask = torch.rand(8, 1, 16, 16, generator=g), (torch.rand(8, 8, 8, generator=g) < 0.5).float()
    for k in (0, micro):
        torch.manual_seed(2)
        net = dp.MAE(**dp.mae_sizes(cfg))
        part = dataclasses.replace(cfg, mae_micro=k)
        values = dp.mae_backward(net, x, torch.arange(8) % 4, mask, 0.1, part, ONE)
        results.append((values, [p.grad for p in net.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    scale = max(p.abs().max() for p in results[0][1])
    assert max((a - b).abs().max() for a, b in zip(results[0][1], results[1][1])) < 1e-5 * scale


# --- data --------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    x = np.random.default_rng(1).integers(0, 256, (24, 48, 40, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "p.npz"
    np.savez(path, train_images=x, train_labels=np.arange(24) % 4)
    return str(path)


def test_a_real_sample_is_a_function_of_seed_epoch_and_row(photos):
    cfg = config(data=photos, size=32, channels=3, augment="rrc")
    source = Pixels(cfg)
    first, later = source.latents(source.ids(0, [3, 5])), source.latents(source.ids(7, [3, 5]))
    assert first.dtype == torch.uint8 and first.shape == (2, 3, 32, 32)
    assert torch.equal(first, Pixels(cfg).latents(source.ids(0, [3, 5])))
    assert not torch.equal(first, later)  # another epoch, another crop
    other = Pixels(dataclasses.replace(cfg, seed=1))
    assert not torch.equal(first, other.latents(other.ids(0, [3, 5])))
    whole = Pixels(dataclasses.replace(cfg, augment="none"))
    assert torch.equal(whole.latents(whole.ids(0, [3])), whole.latents(whole.ids(9, [3])))


def test_queues_hold_bytes_and_come_back_from_ids_alone(photos):
    cfg = config(data=photos, size=32, channels=3, augment="rrc")
    source = Pixels(cfg)
    bank = Bank(source, 4, (3, 32, 32), 5, 9)
    assert bank.by_class.x.dtype == bank.any.x.dtype == torch.uint8
    for epoch in range(3):
        rows = np.random.default_rng(epoch).permutation(24)[:16]
        # as the loop pushes: images that came through the loader, and ones the bank reads itself
        bank.push(epoch, rows, source.latents(source.ids(epoch, rows)) if epoch else None)
    state = {k: {n: v.clone() if torch.is_tensor(v) else v for n, v in ring.items()}
             for k, ring in bank.state_dict().items()}
    assert all(getattr(v, "dtype", None) != torch.uint8 for ring in state.values() for v in ring.values())
    again = Bank(Pixels(cfg), 4, (3, 32, 32), 5, 9)
    again.load_state_dict(state)
    for name in ("by_class", "any"):
        assert torch.equal(getattr(bank, name).x, getattr(again, name).x)
    torch.manual_seed(0)
    drawn = bank.by_class.draw(torch.tensor([0, 3]), 4)
    assert drawn.dtype == torch.uint8 and drawn.shape == (2, 4, 3, 32, 32)


def test_many_images_are_decoded_by_several_processes_to_the_same_bytes(photos):
    source = Pixels(config(data=photos, size=32, channels=3, augment="rrc"))
    ids = torch.arange(1200)
    many = source.latents(ids)
    assert many.shape == (1200, 3, 32, 32) and torch.equal(many[1100:], source.latents(ids[1100:]))


def test_training_batches_are_the_crops_that_ids_name(photos):
    """What the loader hands the loop and what a resume reads back are one and the same."""
    cfg = config(data=photos, size=32, channels=3, augment="rrc", push=8)
    source = Pixels(cfg)
    order = dp.data.Order(24, 8, cfg.seed)
    for step, x, _ in dp.data.batches(source.images, order, 0, 5, workers=0):
        assert torch.equal(x, source.latents(source.ids(*order(step))))


# --- one step ----------------------------------------------------------------


def fixed_batch(cfg, seed=0):
    g = torch.Generator().manual_seed(seed)
    fixed, shape, N = conditions(cfg, g), (cfg.channels, cfg.size, cfg.size), cfg.labels
    return dict(fixed, pos=torch.randint(256, (N, cfg.pos, *shape), generator=g, dtype=torch.uint8),
                unc=torch.randint(256, (N, cfg.unc, *shape), generator=g, dtype=torch.uint8))


def step_models(cfg):
    torch.manual_seed(3)
    net = opened(dp.Generator(**dp.sizes(cfg)))
    encoder = dp.Encoder(dp.MAE(**dp.mae_sizes(cfg)), small_convnext(32) if "n" in cfg.features else None)
    return net, encoder.eval().requires_grad_(False)


def gradients(cfg, b, ddp=ONE, group=None, how="ddp"):
    net, encoder = step_models(cfg)
    wrapped = parallel.wrap(net, (dp.Block,), ddp, how)
    loss, infos = dp.drift_backward(wrapped, encoder, b, cfg, ddp, group)
    return loss, infos, {n: parallel.full(p.grad) for n, p in net.named_parameters() if p.grad is not None}


def test_step_equals_the_slow_reference():
    """Key by key, label by label, autograd through the ten-line loss."""
    cfg = config(channels=3, size=32, patch=8, features="abcdn")
    b = fixed_batch(cfg)
    loss, _, grads = gradients(cfg, b)
    net, encoder = step_models(cfg)
    fake = encoder.features(generated(net, b, cfg.gen), cfg.features)
    with torch.no_grad():
        pos, unc = ([encoder.features(dp.to_float(x), cfg.features) for x in b[kind]]
                    for kind in ("pos", "unc"))
    total = slow_total(fake, pos, unc, b["alpha"], cfg)
    total.backward()
    assert float(loss) == pytest.approx(total.item(), rel=1e-4)
    # float32; near-duplicate rows lose digits in the reference's uncentred distances
    compare(grads, gradients_of(net), 2e-3)


def test_label_micro_batches_equal_the_full_batch():
    cfg = config(channels=3, size=32, patch=8, features="abcdn")
    b = fixed_batch(cfg, seed=1)        # at seed 0 one ReLU is within 1e-6 of its kink: rounding decides
    full = gradients(cfg, b)
    parts = gradients(dataclasses.replace(cfg, micro=3), b)
    assert float(parts[0]) == pytest.approx(float(full[0]), rel=1e-5)
    compare(parts[2], full[2], 1e-4)  # batches of another size sum in another order


def _two_ranks(rank, store, cfg, whole, out, how):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ddp = Ranks(rank, 2, torch.device("cpu"))
    half = {k: v[rank * 2:rank * 2 + 2] for k, v in whole.items()}
    loss, infos, grads = gradients(cfg, half, ddp, dist.group.WORLD, how)
    torch.manual_seed(2)
    mae = dp.MAE(**dp.mae_sizes(cfg))
    net = parallel.wrap(mae, (dp.BasicBlock, dp.UpBlock), ddp, how)
    values = dp.mae_backward(net, *(v[rank * 4:rank * 4 + 4] for v in mae_batch()), 0.1, cfg, ddp)
    mae_grads = {n: parallel.full(p.grad).clone() for n, p in mae.named_parameters()}
    norm = parallel.full(torch.nn.utils.clip_grad_norm_(mae.parameters(), 2.0))
    values, loss = run.all_mean(values, ddp), run.all_mean(loss, ddp)
    if rank == 0:
        torch.save(dict(loss=loss, grads=grads, m={k: v["m"] for k, v in infos.items()}, values=values,
                        mae_grads=mae_grads, norm=norm), out)
    run.leave_together()


def mae_batch():
    g = torch.Generator().manual_seed(0)
    return (torch.rand(8, 1, 16, 16, generator=g), torch.arange(8) % 4,
            (torch.rand(8, 8, 8, generator=g) < 0.5).float())


@pytest.mark.parametrize("how, micro", [("ddp", 0), ("ddp", 1), ("fsdp2", 0), ("fsdp2", 1)])
def test_two_ranks_equal_one_on_the_same_batch(tmp_path, how, micro):
    """Generator and encoder, whole on each rank or cut over both, with and without micro-batches."""
    cfg = config(micro=micro, mae_micro=2 * micro)
    whole = fixed_batch(cfg)
    # as many labels at once as a rank has: the batch of a convolution sets its rounding
    one = dataclasses.replace(cfg, micro=micro or 2, mae_micro=2 * micro or 4)
    loss, infos, grads = gradients(one, whole)
    torch.manual_seed(2)
    mae = dp.MAE(**dp.mae_sizes(cfg))
    values = dp.mae_backward(mae, *mae_batch(), 0.1, one, ONE)
    mae_grads = {n: p.grad.clone() for n, p in mae.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(mae.parameters(), 2.0)
    two_ranks(_two_ranks, str(tmp_path / "store"), cfg, whole, str(tmp_path / "out"), how)
    two = torch.load(tmp_path / "out", weights_only=True)
    assert float(two["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert all(float(two["m"][k]) == pytest.approx(float(infos[k]["m"]), rel=1e-5) for k in infos)
    compare(two["grads"], grads, 1e-5)
    assert torch.allclose(two["values"].float(), values, rtol=1e-5)
    compare(two["mae_grads"], mae_grads, 1e-5)
    assert float(two["norm"]) == pytest.approx(float(norm), rel=1e-5)


# --- runs --------------------------------------------------------------------


script = functools.partial(command, "drift_pixel.py")


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """An uninterrupted run, in process."""
    torch.set_num_threads(1)
    cfg = config(data=images, out=str(tmp_path_factory.mktemp("runs") / "straight"), then_evaluate=True)
    dp.train(cfg)
    return cfg


def test_smoke_preset_runs_in_process_and_its_loss_stays_finite(tmp_path):
    cfg = dp.Config(preset="smoke", out=str(tmp_path / "s"),
                    **{**dp.PRESETS["smoke"]["set"], "then_evaluate": False})     # `straight` is scored
    dp.train(cfg)
    train = [r for r in rows_of(tmp_path / "s") if r["kind"] == "train"]
    # the collapsed start: GroupNorms of constant images multiply gradients, until the images differ
    assert train[-1]["step"] == 20 and train[-1]["grad_norm"] < train[0]["grad_norm"] / 10
    recon = [r["recon"] for r in rows_of(tmp_path / "s" / "mae") if r["kind"] == "mae"]
    assert recon[-1] < recon[0]
    assert (tmp_path / "s" / "samples" / "00000020.png").exists()


def test_a_run_leaves_what_the_style_promises(straight):
    train = check_files_and_scores(straight.out, "drift_pixel.py")
    assert train[-1]["floored"] == 0
    bank = pathlib.Path(straight.out, "ckpt", "00000006", "bank.rank0.safetensors").stat().st_size
    assert bank < 8 * (4 * 6 + 10 + 4 + 4 + 2) + 2000  # ids and counters, no image


@pytest.mark.parametrize("augment", ["none", "rrc"])
def test_resume_is_bit_exact_queues_included(straight, augment, tmp_path):
    cfg = dataclasses.replace(straight, out=str(tmp_path / "r"), then_evaluate=False, augment=augment,
                              mae=straight.out + "/mae/mae.safetensors")
    dp.train(cfg)
    whole = weights(cfg.out), newest(cfg.out)
    forget(cfg.out, 6)
    dp.train(cfg)
    assert same(weights(cfg.out), whole[0]) and newest(cfg.out) == whole[1]


def test_sigkill_and_the_same_command_again_give_the_same_bits(straight, tmp_path):
    cfg = dataclasses.replace(straight, out=str(tmp_path / "k"), then_evaluate=False, steps=30, save_every=1,
                              augment="rrc", mae=straight.out + "/mae/mae.safetensors")
    words = flags(cfg, "out")
    kill_after_three_steps("drift_pixel.py", words, cfg.out, cfg.steps)
    script("train", *words, "--out", cfg.out, check=0)
    script("train", *words, "--out", tmp_path / "whole", check=0)
    assert same(weights(cfg.out), weights(tmp_path / "whole"))
    assert newest(cfg.out) == newest(tmp_path / "whole")


def test_stopping_the_encoder_is_bit_exact_too(images, tmp_path):
    a = config(data=images, out=str(tmp_path / "a"), save_every=1, mae_steps=4, augment="rrc")
    first = run.load_weights(dp.train_mae(a))[0]
    for step in ("00000004", "00000003"):
        shutil.rmtree(tmp_path / "a" / "mae" / "ckpt" / step, ignore_errors=True)
    again = run.load_weights(dp.train_mae(a))[0]
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_both_networks_stop_and_resume_bit_exactly(images, how, tmp_path):
    cfg = config(data=images, out=str(tmp_path / how), shard=how, steps=4, save_every=2)
    script("train", *flags(cfg), ranks=2, check=0)
    whole = weights(cfg.out), newest(cfg.out)
    assert whole[1]["bank.rank0.safetensors"] != whole[1]["bank.rank1.safetensors"]
    assert ("net.rank1.safetensors" in whole[1]) == (how == "fsdp2")
    forget(cfg.out, 4)
    script("train", *flags(cfg), ranks=2, check=0)
    assert same(weights(cfg.out), whole[0]) and newest(cfg.out) == whole[1]
    dp.sample(dataclasses.replace(cfg, count=4))  # what was cut over ranks is exported in one piece
    assert np.load(tmp_path / how / "samples" / "alpha1.npz")["arr_0"].shape == (4, 16, 16, 1)


def test_ddp_and_fsdp2_train_the_same_weights(images, tmp_path):
    ends = {}
    for how in ("ddp", "fsdp2"):
        cfg = config(data=images, out=str(tmp_path / how), shard=how, steps=2, save_every=2, ema=(0.5,))
        script("train", *flags(cfg), ranks=2, check=0)
        ends[how] = {**weights(cfg.out)["ema.safetensors"],
                     **run.load_weights(pathlib.Path(cfg.out, "mae", "mae.safetensors"))[0]}
    # Adam divides by the gradient's own size: the sign of a rounding error may move a weight by the rate
    for name, value in ends["ddp"].items():
        assert torch.allclose(ends["fsdp2"][name], value, atol=5e-5), name


def test_a_run_cut_over_ranks_by_fsdp2_continues_on_as_many_only(images, tmp_path):
    cfg = config(data=images, out=str(tmp_path / "x"), shard="fsdp2", steps=2, mae_steps=2)
    script("mae", *flags(cfg), ranks=2, check=0)
    ckpt = tmp_path / "x" / "mae" / "ckpt" / "00000002"
    assert (ckpt / "optim.rank1.safetensors").exists() and not (ckpt / "net.safetensors").exists()
    state = {"net": parallel.Local(dp.MAE(**dp.mae_sizes(cfg)))}
    with pytest.raises(UserError, match="written by 2 ranks"):
        run.load(tmp_path / "x" / "mae", {}, ONE, state)


def test_prepared_ilsvrc_archives_train(archives, tmp_path):  # noqa: F811
    """The archives as published, nested, to shards by the script's own command, then both networks."""
    files = [archives / f for f in ("ILSVRC2012_img_train.tar.1", "ILSVRC2012_img_val.tar",
                                    "ILSVRC2012_devkit_t12.tar.gz")]
    shards = tmp_path / "shards"
    done = script("prepare", *files, "--size", 32, "--out", shards, "--unofficial", check=0)
    assert "train: 30 images" in done.stdout and len(imagenet.check_shards(shards)) == 2
    first = {p: p.read_bytes() for p in shards.rglob("*.tar")}
    script("prepare", *files, "--size", 32, "--out", shards, "--unofficial", check=0)  # nothing left to do
    assert first == {p: p.read_bytes() for p in shards.rglob("*.tar")}
    cfg = config(data=str(shards), size=32, channels=3, patch=8, mae_fold=4, augment="rrc", steps=2, fill=8,
                 classes=3, labels=3, then_evaluate=True, out=str(tmp_path / "run"), save_every=1)
    dp.train(cfg)
    meta = run.load_weights(tmp_path / "run" / "ema.safetensors")[1]
    assert meta["names"] == ["n01440764", "n01443537", "n02105855"] and meta["step"] == 2
    refused = script("prepare", *files, "--size", 32, "--out", tmp_path / "other")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_convnext_features_join_a_run(straight, convnext_file, images, tmp_path):
    cfg = dataclasses.replace(straight, out=str(tmp_path / "n"), then_evaluate=False, steps=2, features="abn",
                              convnext=convnext_file, mae=straight.out + "/mae/mae.safetensors", remat=True)
    dp.train(cfg)
    keys = [r for r in rows_of(tmp_path / "n") if r["kind"] == "train"][-1]["lam"]
    assert {"convnext3", "convnext_pool", "layer4", "global"} <= set(keys)


def test_ablations_leave_out_what_the_preset_is_without(straight, monkeypatch, tmp_path):
    cfg = dataclasses.replace(straight, out=str(tmp_path / "a"), steps=1, features="abcd", augment="flip",
                              mae=straight.out + "/mae/mae.safetensors")
    monkeypatch.setattr(dp, "ABLATIONS", {k: dp.ABLATIONS[k] for k in ("all", "features_ab", "no_convnext",
                                                                       "no_pixels", "no_crop", "no_rope")})
    dp.ablate(cfg)
    table = (tmp_path / "a" / "ablate.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == ["all", "features_ab", "no_rope"]


def test_sampling_reads_its_shapes_from_the_weights_and_refuses_others(straight, monkeypatch):
    cfg = dp.Config(preset="table8_l16", out=straight.out, count=10, alpha=1.5)  # no shape of the run
    monkeypatch.setattr(sys, "argv", ["drift_pixel.py", "sample"])
    dp.sample(cfg)
    path = pathlib.Path(straight.out) / "samples" / "alpha1.5.npz"
    first = np.load(path)["arr_0"].copy()
    assert first.shape == (10, 16, 16, 1) and first.dtype == np.uint8
    dp.sample(cfg)
    assert np.array_equal(np.load(path)["arr_0"], first)
    monkeypatch.setattr(sys, "argv", ["drift_pixel.py", "sample", "--width", "512"])
    with pytest.raises(UserError, match="width 16, not 512"):
        dp.sample(dataclasses.replace(cfg, width=512))


def test_the_script_and_common_alone_are_a_working_copy(tmp_path):
    shutil.copy(ROOT / "drift_pixel.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "drift_pixel.py", "plan", "--preset", "fashion", "--json"],
                          cwd=tmp_path, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["preset"] == "fashion" and plan["script"] == "drift_pixel.py" and plan["feature_keys"] == 36


# --- official files ----------------------------------------------------------


def test_official_artifacts_of_pixels_describe_these_networks():
    gen = dict(cond_dim=768, input_size=256, in_channels=3, patch_size=16, hidden_size=768, depth=12,
               num_heads=12, mlp_ratio=4.0, out_channels=3, use_qknorm=True, use_swiglu=True, use_rope=True,
               use_rmsnorm=True, n_cls_tokens=16, noise_classes=64, noise_coords=32, use_bf16=True,
               attn_fp32=True, use_remat=True, num_classes=1000)
    cfg = dp.Config(**dp.PRESETS["table8_b16"]["set"])
    assert jax_release.generator_sizes(gen) == dp.sizes(cfg)
    mae = dict(base_channels=640, patch_size=2, dropout_prob=0.0, layers=[3, 4, 6, 3], in_channels=3,
               use_bf16=True, input_patch_size=8)
    assert dict(jax_release.mae_sizes(mae), groups=32) == dp.mae_sizes(cfg)


def test_official_command_converts_and_its_weights_sample(tmp_path):
    from test_drift_latent import write_artifact
    config_ = dict(hidden_size=32, cond_dim=32, depth=1, num_heads=2, input_size=16, patch_size=4,
                   in_channels=3, out_channels=3, num_classes=5, n_cls_tokens=2, noise_coords=2,
                   noise_classes=4, mlp_ratio=4.0, use_qknorm=True, use_swiglu=True, use_rope=True,
                   use_rmsnorm=True)
    torch.manual_seed(0)
    net = opened(dp.Generator(**jax_release.generator_sizes(config_))).eval()
    write_artifact(tmp_path / "gen", net, config_, jax_release.generator_path)
    script("official", tmp_path / "gen", "--out", tmp_path / "run", check=0)
    script("sample", "--out", tmp_path / "run", "--count", 5, check=0)
    made = np.load(tmp_path / "run" / "samples" / "alpha1.npz")
    want = dp.sample_images(net, torch.from_numpy(made["labels"]), 1.0, 42, torch.device("cpu"))
    assert np.array_equal(made["arr_0"], want.permute(0, 2, 3, 1).numpy())


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize("words, line", [
    (["--preset", "table8_l1"], "unknown preset 'table8_l1'; did you mean 'table8_l16'?"),
    (["--convnex", "3"], "--convnext"),
    (["--data", "/nonexistent"], "no data at /nonexistent"),
    (["--labels", "4", "--push", "2"], "--push 2 is below the 4 labels"),
    (["--features", "xyz"], "--features takes letters of abcdnr"),
    (["--features", "abcdn"], "letter n of --features needs --convnext FILE"),
    (["--features", "abcdn", "--convnext", "/nonexistent"], "no weights at"),
    (["--shard", "fsdp"], "fsdp2"),
    (["--patch", "5"], "must divide by --patch"),
    (["sample", "--out", "/nonexistent/run"], "no weights at"),
    (["official", "/nonexistent"], "is not an official artifact"),
    (["prepare"], "give the archives"),
    (["prepare", "/nonexistent"], "/nonexistent"),
    (["--mae", "/nonexistent.safetensors"], "no weights at"),
])
def test_a_mistake_is_one_line_and_exit_2(words, line, tmp_path):
    command = [] if words[0].startswith("-") else [words[0]]
    rest = words[len(command):]
    out = [] if "--out" in rest else ["--out", str(tmp_path / "o")]
    positional = [w for w in rest if not w.startswith("-")] if command and not rest[:1] == ["--out"] else []
    done = script(*command, *positional, *(["--preset", "smoke"] if "--preset" not in rest else []), *out,
                  *[w for w in rest if w not in positional])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("drift_pixel.py: error: ") and line in done.stderr


def test_weights_of_another_kind_size_or_space_are_refused(straight, tmp_path):
    other = dataclasses.replace(straight, out=str(tmp_path / "x"), mae=straight.out + "/mae/mae.safetensors",
                                mae_fold=4)
    with pytest.raises(UserError, match="folded 4 x 4"):
        dp.train(other)
    with pytest.raises(UserError, match="does not hold a feature encoder"):
        dp.train(dataclasses.replace(other, mae=straight.out + "/ema.safetensors"))
    tensors, meta = run.load_weights(pathlib.Path(straight.out, "ema.safetensors"))
    meta.pop("space")
    run.save_weights(tmp_path / "latent.safetensors", tensors, meta)
    for name in (straight.out + "/mae/mae.safetensors", str(tmp_path / "latent.safetensors")):
        with pytest.raises(UserError, match="does not hold a generator of pixels"):
            dp.load_generator(dataclasses.replace(straight, weights=name), torch.device("cpu"))
