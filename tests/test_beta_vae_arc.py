import json
import math
import os
import pathlib
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import beta_vae_arc as arc
from common import run
from common.arc import embed, plots
from common.arc import tasks as files
from common.arc.generators import procedural
from eval import arc_rate

torch.set_num_threads(1)
ROOT = pathlib.Path(arc.__file__).parent
REAL = ROOT.parent / "shared" / "data" / "arc_agi_1" / "arc_agi_1.json"
OUT = arc.OUTSIDE
SMALL = dict(preset="smoke", width=16, prior_width=16, prior_depth=1, bf16=False, device="cpu")


def net(**kw):
    torch.manual_seed(0)
    model = arc.BetaVAE(arc.Config(**{**SMALL, **kw}))
    for p in model.parameters():                # zero-initialised layers would make many laws trivially true
        if p.dim() and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def grids(n=12, seed=0, canvas=30):
    rows = [(g, t, 2, 0, files.UNSPLIT) for g, t in procedural(n, canvas, seed)]
    return files.stack(rows, canvas)


def crop(corpus, multiple=2):
    h, w = -(-corpus.shapes.max(0).astype(int) // multiple) * multiple
    return torch.from_numpy(corpus.grids[:, :h, :w])


# --- model ---------------------------------------------------------------

@pytest.mark.parametrize("kw", [dict(), dict(patch=3), dict(prior="causal"), dict(latent="vector", dim=10),
                                dict(latent="vector", dim=10, linear=True)])
def test_net_returns_logits_and_a_finite_posterior(kw):
    model = net(**kw)
    for n, (h, w) in ((1, (30, 30)), (3, (30, 30)), (2, (7, 5))):
        grid = torch.randint(0, 10, (n, h, w), dtype=torch.uint8)
        logits, mu, logvar = model(grid)
        assert logits.shape == (n, 11, h, w) and mu.shape == logvar.shape == (n, model.latents(h, w))
        assert all(torch.isfinite(t).all() for t in (logits, mu, logvar))
    want = 10 if kw.get("latent") == "vector" else 2 + 8 * (30 // model.multiple)**2
    assert model.latents() == want


def test_default_model_has_270392_parameters_and_every_preset_builds_on_meta():
    for name, preset in arc.PRESETS.items():
        with torch.device("meta"):
            model = arc.BetaVAE(arc.Config(preset=name, **preset["set"]))
        if name == "arc":
            assert sum(p.numel() for p in model.parameters()) == 270_392


@pytest.mark.parametrize("kw", [dict(), dict(prior="causal"), dict(latent="vector", dim=10)])
def test_a_crop_gives_what_the_canvas_gives(kw):
    model, data = net(**kw).eval(), grids()
    data = data.where(data.shapes.max(1) <= 20)     # the widest grid alone touches the edge of the crop
    with torch.no_grad():
        small, large = model(crop(data), 0), model(torch.from_numpy(data.grids), 0)
    h, w = crop(data).shape[1:]
    real = crop(data)[:, None] != OUT
    # float32 sums in another order: 1e-4 of values of order one
    assert torch.allclose(small[0] * real, large[0][:, :, :h, :w] * real, atol=1e-4)
    for a, b in zip(small[1:], large[1:]):
        assert torch.allclose(arc.on_canvas(model, a, (0, h, w)), b, atol=1e-4)


def test_latents_outside_the_grid_are_free_and_unread():
    model, data = net().eval(), grids()
    with torch.no_grad():
        mu, logvar = model.encode(torch.from_numpy(data.grids))
        cost = arc.kl(mu, logvar)[:, 2:].view(-1, 15, 15, 8).sum(-1)
        beyond = ~arc.inside(-(-torch.from_numpy(data.shapes.astype(int)) // 2), 15, 15)
        assert (cost[beyond] == 0).all() and (cost[~beyond] > 0).all()
        noisy = torch.where(F.pad(beyond[..., None].expand(-1, -1, -1, 8).flatten(1), (2, 0)), 100.0, mu)
        assert torch.equal(model.decode(mu), model.decode(noisy))


def test_sizes_survive_their_code_and_the_prior_has_the_sizes_of_the_data():
    code = arc.SizeCode(30)
    shapes = torch.from_numpy(grids(400).shapes.astype(int))
    code.fit(shapes)
    every = torch.cartesian_prod(torch.arange(1, 31), torch.arange(1, 31))
    mu, logvar = code.encode(every)
    assert torch.equal(code.decode(mu), every)
    torch.manual_seed(0)
    for _ in range(20):                         # 36,000 posterior draws; a misreading is a 5 sigma event
        assert torch.equal(code.decode(mu + torch.exp(logvar / 2) * torch.randn_like(mu)), every)
    n = 200_000
    drawn = torch.bincount(code.decode(torch.randn(n, 2))[:, 0], minlength=31)[1:] / n
    share = code.share_2L[0]
    assert ((drawn - share).abs() < 5 * (share * (1 - share) / n).sqrt() + 1e-5).all()
    nats = arc.kl(mu, logvar)
    assert (nats > -share.log()[every - 1]).all()           # no code beats its own entropy


def test_kl_is_the_closed_form_and_what_monte_carlo_says():
    mu, logvar = torch.tensor([0.0, 0.7, -2.0]), torch.tensor([0.0, -3.0, 1.0])
    q, p = torch.distributions.Normal(mu, torch.exp(logvar / 2)), torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(arc.kl(mu, logvar), torch.distributions.kl_divergence(q, p), atol=1e-6)
    assert arc.kl(mu, logvar)[0] == 0
    torch.manual_seed(0)
    z = q.sample((100_000,))
    gap = q.log_prob(z) - p.log_prob(z)
    assert ((gap.mean(0) - arc.kl(mu, logvar)).abs() <= 3.5 * gap.std(0) / 100_000**0.5 + 1e-7).all()


def test_z_is_reparameterised(monkeypatch):
    model, seen = net(), []
    mu = torch.full((20_000, 3), 0.5, requires_grad=True)
    logvar = torch.full((20_000, 3), -1.0, requires_grad=True)
    monkeypatch.setattr(model, "encode", lambda g: (mu, logvar))
    monkeypatch.setattr(model, "decode", lambda z, *_: seen.append(z) or z)
    torch.manual_seed(0)
    model(torch.zeros(20_000, 2, 2, dtype=torch.uint8))
    z, = seen
    sigma = math.exp(-0.5)
    assert abs(z.mean() - 0.5) < 4 * sigma / 60_000**0.5 and abs(z.std() / sigma - 1) < 0.02
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones_like(mu))
    assert torch.allclose(logvar.grad, (z - mu).detach() / 2, atol=1e-6)        # eps sigma / 2
    model.eval()(torch.zeros(1, 2, 2, dtype=torch.uint8))
    assert torch.equal(seen[1], mu)


def test_causal_kl_is_the_kl_to_the_conditional_prior():
    model, grid = net(prior="causal"), crop(grids())
    mu, logvar = model.encode(grid)
    torch.manual_seed(1)
    noise = torch.randn_like(mu)
    z = mu + torch.exp(logvar / 2) * noise
    mean, spread = model.conditional(z, *grid.shape[1:])
    want = torch.distributions.kl_divergence(torch.distributions.Normal(mu, torch.exp(logvar / 2)),
                                             torch.distributions.Normal(mean, torch.exp(spread / 2)))
    torch.manual_seed(1)
    _, u_mu, u_logvar = model(grid)
    assert torch.allclose(arc.kl(u_mu, u_logvar), want, rtol=1e-4, atol=1e-4)
    assert mean[:, 2:].abs().max() > 0.01


def test_causal_prior_sees_only_patches_before():
    model = net(prior="causal")
    z = torch.randn(1, 8 * 3 * 4 + 2, requires_grad=True)
    z.data[:, :2] = model.size.encode(torch.tensor([[6, 8]]))[0]
    mean, logvar = model.conditional(z, 6, 8)
    for l in range(12):
        at = slice(2 + 8 * l, 2 + 8 * (l + 1))
        grad, = torch.autograd.grad((mean + logvar)[:, at].sum(), z, retain_graph=True)
        assert not grad[:, at.start:].any() and (l == 0 or grad[:, 2:at.start].any())


def test_causal_draws_invert_to_the_noise_they_came_from():
    model = net(prior="causal", canvas=6).eval()
    z = model.draw(5, seed=3)
    u = torch.randn(5, model.latents(), generator=torch.Generator().manual_seed(3))
    mean, logvar = model.conditional(z, 6, 6)
    real = arc.inside(-(-model.shape(z) // 2), 3, 3)[..., None].expand(-1, -1, -1, 8).flatten(1)
    got = ((z - mean) * torch.exp(-logvar / 2))[:, 2:]
    assert torch.allclose(got[real], u[:, 2:][real], atol=1e-4)
    assert torch.equal(z, model.draw(5, seed=3)) and not torch.equal(z, model.draw(5, seed=4))


def test_linear_path_starts_as_pca():
    data = grids(300, canvas=8)
    model = arc.BetaVAE(arc.Config(**{**SMALL, **dict(latent="vector", dim=22, linear=True, canvas=8)}))
    shapes = torch.from_numpy(data.shapes.astype(int))
    torch.manual_seed(0)
    model.body.start_at_pca(torch.from_numpy(data.grids), shapes)
    x = model.body.stretch(torch.from_numpy(data.grids), shapes).flatten(1).numpy().astype(np.float64)
    mean, axes, _ = embed.pca(x, 20)
    with torch.no_grad():
        mu = model.body.encode(torch.from_numpy(data.grids), shapes)[0].numpy()
        back = model.body.decode(torch.from_numpy(mu), torch.full((300, 2), 16), 16, 16).flatten(1) / 8
    want = (x - mean) @ axes.T @ axes + mean
    # the randomised SVD may turn near-equal components; it may leave out 2 % more than the least possible
    assert ((back.numpy() - x)**2).sum() < 1.02 * ((want - x)**2).sum()
    assert np.allclose(mu.var(0), 1, atol=0.1)


# --- loss and schedule -----------------------------------------------------

def test_reconstruction_is_a_sum_over_cells_by_hand():
    grid = torch.tensor([[[3, OUT]]], dtype=torch.uint8)
    logits = torch.zeros(1, 11, 1, 2)
    R, K = arc.elbo_terms(logits, grid, torch.zeros(1, 4), torch.zeros(1, 4))
    assert abs(R.item() - 2 * math.log(11)) < 1e-6 and K.item() == 0
    logits[0, 3, 0, 0] = math.log(10)           # p = 10 / 20
    R, K = arc.elbo_terms(logits, grid, torch.full((1, 4), 2.0), torch.zeros(1, 4))
    assert abs(R.item() - math.log(2) - math.log(11)) < 1e-6 and abs(K.item() - 8) < 1e-6


def test_loss_is_a_mean_of_grid_sums_and_padding_adds_nothing():
    model, data = net().eval(), grids()
    terms = lambda g: arc.elbo_terms(*(lambda l, m, v: (l, g, m, v))(*model(g, 0)))
    with torch.no_grad():
        one, twice = terms(crop(data)), terms(crop(data).repeat(2, 1, 1))
        wide = terms(torch.from_numpy(data.grids))
    for a, b, c in zip(one, twice, wide):
        assert torch.allclose(a.mean(), b.mean(), rtol=1e-5)
        assert torch.allclose(a, c, rtol=1e-4)


def test_free_bits_charge_a_floor_after_the_batch_mean():
    logits, grid = torch.zeros(2, 11, 1, 1), torch.zeros(2, 1, 1, dtype=torch.uint8)
    mu = torch.tensor([[0.0, 2.0], [0.0, 0.0]])             # mean KL: 0 and 1
    _, K = arc.elbo_terms(logits, grid, mu, torch.zeros(2, 2), free_bits=0.3)
    assert torch.allclose(K, torch.tensor([1.3, 1.3]))


def test_capacity_charges_the_distance_from_a_rising_target():
    assert arc.charge(70.0, 0.0, 15) == 70 and arc.charge(70.0, 100.0, 15) == 20      # C(15) = 50
    assert arc.charge(70.0, 100.0, 30) == arc.charge(70.0, 100.0, 50) == 30
    data, code = grids(16), []
    run.seed_all(0)
    model = arc.BetaVAE(arc.Config(**{**SMALL, "width": 32}))
    optim, grid = torch.optim.Adam(model.parameters(), lr=4e-3), crop(data)
    for step in range(240):
        R, K = arc.elbo_terms(*(lambda l, m, v: (l, grid, m, v))(*model(grid)))
        optim.zero_grad()
        ((R.mean() + 10 * arc.charge(K.mean(), 60.0, 50 * step / 240)) / 100).backward()
        optim.step()
        code.append(K.mean().item())
    early, late = np.mean(code[65:80]), np.mean(code[-15:])         # C is 29 to 33 there, then 60
    assert 25 < early < 40 and 54 < late < 66, (early, late)


def test_beta_values():
    want = {0: 0.0, 1: 0.1, 10: 1.0, 11: 1.05, 20: 1.5, 30: 2.0, 31: 2.0, 50: 2.0}
    for epoch, value in want.items():
        assert abs(arc.beta(epoch) - value) < 1e-12
    for kind in ("seed", "linear", "constant", "conservative"):
        values = [arc.beta(e / 4, kind) for e in range(201)]
        assert all(a <= b for a, b in zip(values, values[1:]))
    assert arc.beta(15, "linear") == 2 and arc.beta(7.5, "linear") == 1 and arc.beta(0, "constant") == 2
    assert arc.beta(10, "conservative") == 0 and abs(arc.beta(50, "conservative") - 0.1) < 1e-12
    cycle = [arc.beta(12.5 * k + 3.125, "cyclical") for k in range(4)]
    assert cycle == [1.0] * 4 and arc.beta(12.5, "cyclical") == 0 and arc.beta(50, "cyclical") == 2


def test_early_stopping_is_not_fooled_by_a_rising_beta():
    top, R, K = 2.0, lambda e: 100 / e, lambda e: 10.0
    naive, ours = arc.Monitor(10), arc.Monitor(10)
    for e in range(1, 51):
        naive.see(R(e) + arc.beta(e) * K(e), max(e, 30))
        ours.see(R(e) + top * K(e), e)
    assert naive.state["stop"] and not ours.state["stop"]
    for e in range(30, 41):
        ours.see(1e6, e)
    assert ours.state["stop"]
    young = arc.Monitor(2)
    for e in range(1, 30):
        young.see(1.0, e)                       # no better for 28 epochs, but beta was still rising
    assert not young.state["stop"]


# --- data --------------------------------------------------------------------

@pytest.mark.parametrize("rows, says", [
    ([[1, 2], [3]], "ragged"), ([[1, 10]], "colour 10"), ([[-1]], "colour -1"), ([], "non-empty"),
    ([[]], "non-empty"), ([[0] * 31], "1x31"), ([[1.0]], "1.0 is not an integer"),
    ([["1"]], "'1' is not an integer"), ("11", "non-empty"), ([[True]], "True is not an integer")])
def test_a_malformed_grid_is_named(rows, says):
    with pytest.raises(run.UserError, match=says):
        files.check_grid(rows, "task x")


@pytest.mark.parametrize("arrays, says", [
    (dict(pictures=np.zeros((2, 3, 3), np.uint8)), "keys.*pictures"),
    (dict(grids=np.zeros((2, 3), np.uint8)), "uint8"),
    (dict(grids=np.zeros((2, 3, 3))), "float64"),
    (dict(grids=np.full((2, 3, 3), 11)), "code 11"),
    (dict(grids=np.zeros((2, 31, 3), int)), "at most 30x30"),
    (dict(grids=np.array([[[1, 10], [10, 1]]])), "grid 0 is not a solid"),
    (dict(grids=np.full((1, 3, 3), 10)), "grid 0 is not a solid"),
    (dict(grids=np.zeros((2, 3, 3), int), task=np.array([0, 5]), task_ids=np.array(["a"])), "'task' must"),
    (dict(grids=np.array([{}], dtype=object)), "not a plain .npz")])
def test_a_wrong_npz_is_named(tmp_path, arrays, says):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(run.UserError, match=says):
        files.read_npz(tmp_path / "x.npz", 30)


def pair(*colors):
    return {"input": [[c] * 3 for c in colors], "output": [[c, 0] for c in colors]}


def test_every_public_layout_is_read(tmp_path):
    task = {"train": [pair(1, 2), pair(3)], "test": [pair(4)]}
    seen = {"train": [{"input": [[1, 2, 3, 4]], "output": [[5, 6], [7, 8]]}], "test": []}
    (tmp_path / "merged.json").write_text(json.dumps({"training": {"a": seen}, "evaluation": {"b": task}}))
    merged = files.load_corpus(str(tmp_path / "merged.json"))
    assert sorted(merged.task_ids) == ["a", "b"] and (merged.split == 2).sum() == 6
    assert set(merged.io[merged.split == 2]) == {0, 1}
    folder = tmp_path / "data"
    for part, name, content in (("training", "a", seen), ("evaluation", "b", task)):
        (folder / part).mkdir(parents=True)
        (folder / part / f"{name}.json").write_text(json.dumps(content))
    split = files.load_corpus(str(folder))
    assert np.array_equal(split.grids[split.split == 2], merged.grids[merged.split == 2])
    kaggle = {"a": {"train": [pair(1, 2)], "test": [{"input": [[5]]}]}}
    (tmp_path / "arc_training_challenges.json").write_text(json.dumps(kaggle))
    (tmp_path / "arc_training_solutions.json").write_text(json.dumps({"a": [[[6, 6]]]}))
    got = files.read_tasks(tmp_path / "arc_training_challenges.json", 30)
    assert len(got) == 4 and got.grids[3, 0, :3].tolist() == [6, 6, 10]
    (tmp_path / "0a1b2c3d.json").write_text(json.dumps([pair(7), pair(8)]))
    assert len(files.read_tasks(tmp_path / "0a1b2c3d.json", 30)) == 4
    plain = lambda n: np.full((n, 16, 16), n, np.uint8)
    np.savez(tmp_path / "seed.npz", train=plain(5), val=plain(2), test=plain(1))
    got = files.load_corpus(str(tmp_path / "seed.npz"), 16)
    assert got.split.tolist() == [0] * 5 + [1] * 2 + [2]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(run.UserError, match="not JSON"):
        files.read_tasks(tmp_path / "bad.json", 30)


def test_corpus_file_round_trips(tmp_path, capsys):
    arc.corpus(arc.Config(out=str(tmp_path / "c.npz"), n=300))
    data = files.load_corpus("", 30, 300)
    back = files.load_corpus(str(tmp_path / "c.npz"))
    for f in ("grids", "shapes", "io", "split", "source"):
        assert np.array_equal(getattr(data, f), getattr(back, f)), f
    assert (data.task_ids[data.task] == back.task_ids[back.task]).all()
    assert "baseline mode" in capsys.readouterr().out


def test_a_corpus_holds_as_many_grids_as_were_asked_for(tmp_path):
    assert len(files.load_corpus("", 30, 700)) == 700
    task = {"train": [pair(1, 2), pair(3)], "test": [pair(4)]}
    (tmp_path / "few.json").write_text(json.dumps({"training": {f"t{i}": {"train": [
        {"input": [[i, 1, 2]], "output": [[i], [i + 1], [3]]}], "test": []} for i in range(8)},
        "evaluation": {"e": task}}))
    few = files.load_corpus(str(tmp_path / "few.json"))
    arc.corpus(arc.Config(data=str(tmp_path / "few.json"), out=str(tmp_path / "c.npz"), n=500))
    data = files.load_corpus(str(tmp_path / "c.npz"))
    assert len(data) == 500 and (data.split == 2).sum() == (few.split == 2).sum()
    assert set(data.split[data.source == files.PROCEDURAL]) == {files.TRAIN}
    form = lambda c, i: files.canonical(c.grids[i, :c.shapes[i, 0], :c.shapes[i, 1]])
    held = {form(few, i) for i in np.flatnonzero(few.split > 0)}
    assert not any(form(data, i) in held for i in np.flatnonzero(data.split == 0))


def test_splits_are_by_task_and_no_training_grid_repeats_a_held_out_one():
    data = files.load_corpus("", 30, 2000)
    parts = [set(data.task[data.split == s]) for s in range(3)]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    form = lambda i: files.canonical(data.grids[i, :data.shapes[i, 0], :data.shapes[i, 1]])
    held = {form(i) for i in np.flatnonzero(data.split > 0)}
    assert not any(form(i) in held for i in np.flatnonzero(data.split == 0))


def test_planted_leaks_and_repeats_are_dropped():
    g = np.array([[1, 2, 3], [4, 4, 4]], np.uint8)
    twin = np.array([9, 7, 0, 5, 8], np.uint8)[np.rot90(g)]
    other = np.array([[1, 2, 3], [4, 4, 1]], np.uint8)
    rows = [(g, "held", 0, 1, files.TEST)]
    rows += [(grid, task, 0, 1, files.TRAIN) for grid, task in ((twin, "t"), (other, "t"), (other, "u"))]
    left, leaks, repeats = files.drop_leaks(files.stack(rows, 30))
    assert (leaks, repeats, len(left)) == (1, 1, 2)


def test_re_arc_grids_of_held_out_tasks_are_dropped():
    one, two = np.ones((2, 2), np.uint8), np.full((1, 2), 3, np.uint8)
    rows = [(one, f"t{i}", 0, files.ARC_TRAINING, files.UNSPLIT) for i in range(20)]
    rows += [(two, f"t{i}", 0, files.REARC, files.UNSPLIT) for i in range(20)]
    rows += [(one, "e", 0, files.ARC_EVALUATION, files.TEST)]
    data = files.split_tasks(files.stack(rows, 30))
    held = set(data.task[data.split == files.VAL])
    assert len(held) == 2 and set(data.source[np.isin(data.task, list(held))]) == {files.ARC_TRAINING}
    assert (data.source == files.REARC).sum() == 18


def test_eight_symmetries_equal_numpy_and_keep_the_padding():
    rng = np.random.default_rng(0)
    for h, w in ((3, 5), (5, 3), (4, 4), (1, 6), (30, 29)):
        g = rng.integers(0, 10, (h, w), dtype=np.uint8)
        canvas = np.full((1, 30, 30), OUT, np.uint8)
        canvas[0, :h, :w] = g
        for code in range(8):
            want = g.T if code & 4 else g
            want = want[::-1] if code & 1 else want
            want = want[:, ::-1] if code & 2 else want
            got = arc.symmetry(torch.from_numpy(canvas), torch.tensor([[h, w]]), torch.tensor([code]), 30, 30)
            got = got[0].numpy()
            assert np.array_equal(got[:want.shape[0], :want.shape[1]], want)
            assert (got != OUT).sum() == h * w


def test_renaming_is_a_permutation_that_leaves_the_outside_alone():
    grid = torch.arange(11, dtype=torch.uint8).repeat(50, 1, 1)
    for colors, fixed in (("all", 0), ("nonzero", 1)):
        out = arc.rename(grid, colors, run.generator(0))[:, 0]
        assert (out.sort(1).values == torch.arange(11)).all() and (out[:, 10] == OUT).all()
        assert (out[:, 0] == 0).all() == bool(fixed) and len(out.unique(dim=0)) > 40


def test_augmented_batches_hold_the_same_grids_up_to_symmetry_and_renaming():
    data = grids(64)
    form = lambda g: files.canonical(g[(g != OUT).any(1)][:, (g != OUT).any(0)])
    got = arc.Feed(data, 2, "all")(np.arange(64), run.generator(1)).numpy()
    assert sorted(map(form, got)) == sorted(map(form, data.grids))
    assert not np.array_equal(got[:, :5, :5], data.grids[:, :5, :5])


def test_elongated_grids_are_never_cut():
    rng = np.random.default_rng(0)
    shapes = [(3, 11), (12, 4)] * 8
    rows = [(rng.integers(0, 10, s, dtype=np.uint8), str(i), 0, 0, 0) for i, s in enumerate(shapes)]
    feed = arc.Feed(files.stack(rows, 30), 2, "none")
    for seed in range(6):
        got = feed(np.arange(16), run.generator(seed))
        assert sorted(got.shape[1:]) == [4, 12] and (got != OUT).sum() == 8 * (33 + 48)


def test_batches_cover_every_pass_once_within_their_room():
    shapes = grids(500).shapes
    side = -(-shapes.astype(int) // 2)
    room = 16 * (side[:, 0] * side[:, 1]).mean()
    for world in (1, 2):
        seen, feeds = [], [arc.batches(shapes, 16, 2, 0, world, r) for r in range(world)]
        while len(seen) < 500 - 40 * (world > 1):
            for feed in feeds:
                b = next(feed)
                s = np.sort(side[b], 1).max(0)
                assert len(b) == 1 or len(b) * s[0] * s[1] <= room
                seen += b.tolist()
        assert len(set(seen)) == len(seen)
    a, b, c = (next(arc.batches(shapes, 16, 2, s)) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_batches_compute_little_padding():
    shapes = grids(4000).shapes.astype(int)
    feed, cells, canvas = arc.batches(shapes, 64, 2, 0), 0, 0
    for _ in range(40):
        b = next(feed)
        s = -(-np.sort(shapes[b], 1).max(0) // 2) * 2
        cells, canvas = cells + shapes[b].prod(1).sum(), canvas + len(b) * s[0] * s[1]
    assert cells / canvas > 0.8                 # a 30x30 canvas would hold about 0.2


def test_procedural_grids_are_legal_seeded_and_not_mostly_background():
    a, b = grids(1000), grids(1000)
    assert np.array_equal(a.grids, b.grids)
    s = files.grid_statistics(a.grids)
    assert s["valid"] == 1 and s["distinct"] > 750
    count = np.stack([(a.grids == c).sum((1, 2)) for c in range(10)], 1)
    assert count.max(1).sum() / count.sum() <= 0.75         # the oracle that prints one colour a grid
    fixed = list(procedural(60, 16, 0, fixed=True))
    assert all(g.shape == (16, 16) for g, _ in fixed)


# --- metrics -------------------------------------------------------------------

def test_best_rectangle_equals_brute_force():
    torch.manual_seed(0)
    logits = torch.randn(6, 11, 7, 9)
    got = arc.best_rectangle(logits)
    logp = logits.log_softmax(1).double()
    for x, lp in zip(got, logp):
        score = lambda h, w: sum(lp[:10, i, j].max().item() if i < h and j < w else lp[10, i, j].item()
                                 for i in range(7) for j in range(9))
        _, h, w = max((score(h, w), h, w) for h in range(1, 8) for w in range(1, 10))
        assert ((x != OUT) == arc.inside(torch.tensor([[h, w]]), 7, 9)[0]).all()
        assert torch.equal(x[:h, :w].long(), lp[:10, :h, :w].argmax(0))
    assert (arc.best_rectangle(torch.zeros(1, 11, 4, 4)) != OUT).sum() == 1     # ties: the smallest


def test_decoded_draws_are_legal_grids_however_wild():
    for kw in (dict(), dict(latent="vector", dim=10)):
        model = net(**kw).eval()
        with torch.no_grad():
            for scale in (1, 100):
                drawn = arc.best_rectangle(model.decode(scale * model.draw(100, 0)))
                s = files.grid_statistics(drawn.numpy())
                assert s["valid"] == 1 and 1 <= s["mean_h"] <= 30


def scored(pred, true, canvas=30):
    score = arc.Score(canvas)
    score.add(np.asarray(pred, np.uint8), np.asarray(true, np.uint8))
    return score.result()


def test_accuracy_by_hand():
    true = np.full((2, 3, 3), OUT)
    true[0, :2, :3], true[1, :1, :1] = [[0, 0, 0], [0, 5, 6]], 7
    pred = true.copy()
    r = scored(pred, true)
    names = ("cell_acc", "nonbg_acc", "exact_acc", "shape_acc", "balanced_acc", "canvas_acc")
    assert [r[k] for k in names] == [1.0] * 6
    pred[0, 1, 1] = 0                           # one foreground cell wrong
    r = scored(pred, true)
    assert abs(r["cell_acc"] - 6 / 7) < 1e-12 and r["nonbg_acc"] == 0.5 and r["exact_acc"] == 0.5
    assert abs(r["cell_acc_grid"] - (5 / 6 + 1) / 2) < 1e-12 and abs(r["balanced_acc"] - 3 / 4) < 1e-12
    assert abs(r["canvas_acc"] - (1 - 1 / 1800)) < 1e-12
    r = scored(np.full_like(true, OUT), true)
    assert r["cell_acc"] == 0 and r["shape_acc"] == 0 and abs(r["canvas_acc"] - (1 - 7 / 1800)) < 1e-12
    assert scored((true + 1) % 10 * (true < 10) + 10 * (true == 10), true)["cell_acc"] == 0
    tall = np.full((1, 3, 3), OUT)
    tall[0, :3, :2] = true[0, :2, :3].T
    r = scored(tall, true[:1])
    assert r["shape_acc"] == 0 and r["exact_acc"] == 0 and r["cell_acc"] < 1


def test_metrics_equal_a_loop():
    rng = np.random.default_rng(0)
    data = grids(20)
    pred = np.where(rng.random(data.grids.shape) < 0.3, rng.integers(0, 11, data.grids.shape), data.grids)
    r, right, real, fore = scored(pred, data.grids), 0, 0, [0, 0]
    for p, t, (h, w) in zip(pred, data.grids, data.shapes):
        mode = np.bincount(t[:h, :w].ravel(), minlength=10).argmax()
        for i in range(h):
            for j in range(w):
                real, right = real + 1, right + (p[i, j] == t[i, j])
                fore = [fore[0] + (t[i, j] != mode), fore[1] + (t[i, j] != mode and p[i, j] == t[i, j])]
    assert abs(r["cell_acc"] - right / real) < 1e-12 and abs(r["nonbg_acc"] - fore[1] / fore[0]) < 1e-12


def test_padding_cannot_inflate_accuracy():
    data = grids(20)
    pred = np.where(np.random.default_rng(0).random(data.grids.shape) < 0.3, 1, data.grids)
    pred[data.grids == OUT] = OUT
    more = lambda g: np.pad(g, ((0, 0), (0, 10), (0, 10)), constant_values=OUT)
    a, b = scored(pred, data.grids), scored(more(pred), more(data.grids), 40)
    assert all(a[k] == b[k] for k in ("cell_acc", "nonbg_acc", "balanced_acc", "exact_acc", "cell_acc_grid"))
    assert b["canvas_acc"] > a["canvas_acc"]    # what the misleading number does


def test_collapse_flags():
    good = dict(cell_acc=0.95, nonbg_acc=0.9, kl_nats=dict(mean=50.0), latents=10,
                active_var=10, active_kl=10)
    assert not any(arc.collapse(good, 0.6).values())
    flags = lambda **kw: {k for k, v in arc.collapse({**good, **kw}, 0.93).items() if v}
    black = dict(kl_nats=dict(mean=1e-5), active_var=0, active_kl=0, nonbg_acc=0.0)
    assert flags(**black) == {"collapsed", "partial", "background_only"}
    assert flags(cell_acc=0.0) == {"pad_only"} and flags(active_kl=3) == {"partial"}
    assert not arc.collapse({**good, "active_kl": 3}, 0.6, vector=False)["partial"]   # most patches are rare


def test_black_ink_scores_well_and_is_caught():
    data = grids(200)
    r = arc.baselines(data.where(slice(0, 100)), data.where(slice(100, 200)), dims=(10,))
    assert r["mode"]["nonbg_acc"] == 0 and 0.5 < r["mode"]["cell_acc"] < r["mode"]["canvas_acc"]
    assert r["outside"]["cell_acc"] == 0 and set(r) == {"zero", "outside", "mode", "nearest", "pca10"}
    itself = arc.baselines(data, data, dims=())
    assert itself["nearest"]["exact_acc"] == 1


def test_code_lengths_by_hand():
    rows = [(np.full((2, 3), 1, np.uint8), "a", 0, 0, 0)]
    r = files.code_nats(files.stack(rows, 30))
    assert abs(r["uniform_code_nats"] - (6 * math.log(10) + math.log(900))) < 1e-9
    packed = zlib.compress(bytes([2, 3, 1, 1, 1, 1, 1, 1]), 9)
    assert abs(r["zlib_nats"] - 8 * math.log(2) * len(packed)) < 1e-9


def blobs():
    rs = np.random.RandomState(0)
    centre, label = rs.standard_normal((5, 10)) * 4, np.arange(300) % 5
    return centre[label] + rs.standard_normal((300, 10)), label


def test_tsne_probabilities_and_gradient_equal_the_reference_values():
    x, _ = blobs()
    P = embed.joint_probabilities(x, 30)
    assert abs(P.sum() - 1) < 1e-12 and np.array_equal(P, P.T)
    # the reference bisects to 1e-5 in entropy, which leaves about 1e-5 relative
    assert abs((P**2).sum() / 1.4533814600e-4 - 1) < 1e-4 and abs(P[0, 5] / 8.14491794e-6 - 1) < 1e-4
    turn = np.linalg.qr(np.random.RandomState(1).standard_normal((10, 10)))[0]
    assert np.allclose(embed.joint_probabilities(x @ turn + 3, 30), P, atol=1e-9)
    y = np.random.RandomState(2).standard_normal((300, 2))
    grad, cost = embed.tsne_gradient(np.maximum(P, 1e-12), y)
    assert abs(cost - 2.4475830545) < 1e-4 and abs(grad[7, 1] + 9.4051634e-4) < 1e-7
    step = np.zeros_like(y)
    step[7, 1] = 1e-5
    up, down = (embed.tsne_gradient(np.maximum(P, 1e-12), y + s * step)[1] for s in (1, -1))
    assert abs((up - down) / 2e-5 - grad[7, 1]) < 1e-8


def test_tsne_finds_the_clusters_and_survives_an_outlier():
    x, label = blobs()
    y, cost = embed.tsne(x, steps=600)
    assert cost <= 0.36                         # scikit-learn after 1000 steps: 0.339
    near = ((y[:, None] - y[None])**2).sum(-1).argsort(1)[:, 1:6]
    assert (label[near] == label[:, None]).mean() > 0.99
    x[0] = 1e4
    assert np.isfinite(embed.tsne(x[:120], steps=50)[0]).all()
    with pytest.raises(run.UserError, match="more than 91"):
        embed.tsne(x[:50])


def test_pca_is_the_eigendecomposition():
    x = np.random.default_rng(0).standard_normal((40, 6)) * np.arange(1, 7)
    mean, axes, share = embed.pca(x, 3)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    assert np.allclose(share, values[::-1][:3] / values.sum(), atol=1e-12)
    assert np.allclose(np.abs(axes @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-9)
    assert (axes[np.arange(3), np.abs(axes).argmax(1)] > 0).all()


def test_picture_has_the_palette_and_frames_wrong_cells():
    grid = np.full((30, 30), OUT, np.uint8)
    grid[:2, :2] = [[2, 3], [0, 9]]
    truth = grid.copy()
    truth[1, 0] = 1
    image = plots.picture(grid, 40, truth=truth)
    assert image.shape == (40, 40, 3) and image[10, 10].tolist() == [0xFF, 0x41, 0x36]
    assert image[30, 30].tolist() == [0x87, 0x0C, 0x25] and image[21, 10].tolist() == [230, 0, 60]
    small = plots.picture(grid, 40, span=10)
    assert (small[0, 0] == 255).all() and small[17, 17].tolist() == [0xFF, 0x41, 0x36]


def test_tables_of_pictures_have_their_computed_size_and_place():
    red = np.full((1, 3, 3), OUT, np.uint8)
    red[0, :2, :2] = 2
    page = plots.table([plots.strip(red, 40)] * 2, title="t", heads=["h"])
    assert page.size == (6 + 46, 6 + 26 + 20 + 2 * 46)
    assert page.getpixel((6 + 10, 52 + 10)) == (0xFF, 0x41, 0x36)
    wrong = red.copy()
    wrong[0, 1, 1] = 5
    page = plots.reconstructions(red, wrong, "t", tile=40)
    colors = {c for _, c in page.getcolors(10_000)}
    assert (230, 0, 60) in colors and (0xAA, 0xAA, 0xAA) in colors
    both = np.repeat(red, 40, 0)
    assert min(plots.prior_page(both, both).size) > 700


def test_the_rate_table_averages_seeds_and_the_plot_holds_every_setting(tmp_path):
    runs = []
    for i, (latent, d, total) in enumerate((("spatial", 1802, 480.0), ("spatial", 1802, 470.0),
                                            ("vector", 10, 260.0))):
        (tmp_path / f"r{i}").mkdir()
        runs.append(str(tmp_path / f"r{i}"))
        body = dict(config=dict(latent=latent, prior="normal", schedule="seed", beta_scale=0.05, steps=9,
                                patch=2, data="x"),
                    latents=d, cell_acc=0.9 - i / 10, nonbg_acc=0.8, exact_acc=0.5, recon_nats=50,
                    sampled_z=dict(cell_acc=0.8, elbo_nats=-total), kl_nats=dict(mean=total - 50),
                    uniform_code_nats=486.4, zlib_nats=267.5,
                    baselines=dict(pca10=dict(cell_acc=0.47, nonbg_acc=0.05, exact_acc=0.0)))
        pathlib.Path(runs[-1], "metrics.json").write_text(json.dumps(body))
    rows = arc_rate.merge(map(arc_rate.read, runs))
    assert [(r["kind"], r["runs"], r["total"]) for r in rows] == [("spatial", 2, 475.0), ("vector", 1, 260.0)]
    text = arc_rate.table(rows)
    for wanted in ("| 0.8500 ± 0.0707 |", "| PCA of the canvas | 10 |", "uniform code 486.4"):
        assert wanted in text
    assert min(arc_rate.picture(rows).size) > 300


# --- runs ------------------------------------------------------------------------

def test_one_batch_of_grids_is_learned_to_the_last_cell():
    data = grids(16)
    run.seed_all(0)
    model = arc.BetaVAE(arc.Config(**{**SMALL, "width": 48}))
    optim, grid = torch.optim.Adam(model.parameters(), lr=4e-3), crop(data)
    for step in range(1, 300):
        R, K = arc.elbo_terms(*(lambda l, m, v: (l, grid, m, v))(*model(grid)))
        optim.zero_grad()
        ((R + 1e-3 * K).mean() / 100).backward()
        optim.step()
        if step % 25 == 0 and arc.measure(model, data)[0]["exact_acc"] == 1:
            return
    pytest.fail(f"cell accuracy {arc.measure(model, data)[0]['cell_acc']} after 300 steps")


def config(out, **kw):
    return arc.Config(**{**SMALL, "steps": 8, "batch": 8, "n": 300, "warmup": 2, "out": str(out), **kw})


def stop_at(monkeypatch, step):
    calls = iter(range(1, 1000))
    monkeypatch.setattr(run, "stop_requested", lambda ddp: next(calls) == step)


@pytest.mark.parametrize("kw", [dict(), dict(prior="causal"),
                                dict(latent="vector", dim=6, hidden=16, width=4, linear=True)])
def test_resume_is_bit_exact(tmp_path, monkeypatch, kw):
    arc.train(config(tmp_path / "a", **kw))
    stop_at(monkeypatch, 5)
    with pytest.raises(run.Interrupted):
        arc.train(config(tmp_path / "b", **kw))
    monkeypatch.undo()
    arc.train(config(tmp_path / "b", **kw))
    a, b = (run.load_weights(tmp_path / d / "final.safetensors")[0] for d in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_come_every_ten_epochs_and_at_the_end(tmp_path, monkeypatch):
    steps, kept = [], run.save
    monkeypatch.setattr(run, "save", lambda out, step, *rest: steps.append(step) or kept(out, step, *rest))
    arc.train(config(tmp_path, steps=100, width=8))             # two steps an epoch
    assert steps == [20, 40, 60, 80, 100]


def test_the_config_of_a_run_is_a_config_file(tmp_path):
    cfg = config(tmp_path / "r", steps=2, capacity=20.0)
    arc.train(cfg)
    file = tmp_path / "r" / "config.json"
    _, again = run.parse(arc.Config, arc.PRESETS, ("train",), ["--config", str(file)])
    assert arc.replace(again, config="") == cfg
    _, more = run.parse(arc.Config, arc.PRESETS, ("train",), ["--config", str(file), "--steps", "9"])
    assert more.steps == 9 and more.width == cfg.width


def test_a_run_leaves_everything_its_readers_need(tmp_path, capsys):
    cfg = config(tmp_path / "r", steps=60, n=1500)
    arc.train(cfg)
    rows = [json.loads(r) for r in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    seen = [r for r in rows if r["kind"] == "train"]
    assert {"beta", "kl", "recon", "active", "grad_norm"} <= set(seen[0])
    assert seen[-1]["cell_acc"] > seen[0]["cell_acc"] + 0.1     # nats a grid depend on the size of the grids
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert {"config.json", "beta_vae_arc.py", "log.jsonl", "RUN.md", "weights.safetensors",
            "final.safetensors", "encoder.safetensors", "decoder.safetensors", "ckpt", "samples"} <= names
    with Image.open(tmp_path / "r" / "samples" / "batch.png") as page:      # tiles of 96 pixels, 6 apart
        assert [n % 102 for n in page.size] == [6, 6] and min(page.size) > 100
    load = lambda name: set(run.load_weights(tmp_path / "r" / f"{name}.safetensors")[0])
    assert load("encoder") | load("decoder") == load("weights")
    words = (str(tmp_path / "r"),)
    arc.evaluate(arc.Config(words=words, device="cpu"))
    body = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert body["n_grids"] == (files.load_corpus("", 30, 1500).split == 2).sum()
    assert body["prior"]["valid"] == 1 and not body["target"]["met"]
    assert abs(body["elbo_nats"] + body["recon_nats"] + body["kl_nats"]["mean"]) < 1e-6
    assert {"zero", "mode", "nearest", "pca10", "pca64", "pca256"} <= set(body["baselines"])
    arc.sample(arc.Config(words=words, n=4, device="cpu"))
    drawn = np.load(tmp_path / "r" / "samples" / "prior.npz")
    assert drawn["grids"].shape == (4, 30, 30)
    assert (tmp_path / "r" / "samples" / "prior.png").stat().st_size > 500
    arc.plots(arc.Config(words=words, device="cpu"))
    names = {p.name for p in (tmp_path / "r" / "plots").iterdir()}
    assert {"reconstruction.png", "prior.png", "interpolation.png", "traversal.png", "kl_per_dim.png",
            "curves.png", "latent_pca.png", "latent_tsne.png"} <= names
    assert "target" in capsys.readouterr().out
    with pytest.raises(run.UserError, match="width"):
        arc.train(config(tmp_path / "r", steps=60, n=1500, width=24))


def cli(*words, ranks=0, **kw):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launch, str(ROOT / "beta_vae_arc.py"), *map(str, words)]
    return subprocess.run(command, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **kw)


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    bad = {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": []}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    out = ["--out", str(tmp_path / "o")]
    for words, says in ((["--preset", "arx", *out], "did you mean 'arc'"),
                        (["--data", str(tmp_path / "bad.json"), *out], "ragged"),
                        (["--data", "nowhere.json", *out], "no such file"),
                        (["evaluate", str(tmp_path)], "no weights"),
                        (["--latent", "vektor", *out], "did you mean 'vector'"),
                        (["--prior", "causal", "--latent", "vector", *out], "prior normal")):
        monkeypatch.setattr(sys, "argv", ["beta_vae_arc.py", *words])
        with pytest.raises(SystemExit) as stop:
            run.main(arc.Config, arc.PRESETS, dict(train=arc.train, evaluate=arc.evaluate))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and says in err, err
        assert err.startswith("beta_vae_arc.py: error:")


def test_plan_and_two_ranks_from_the_command_line(tmp_path):
    got = json.loads(cli("plan", "--json").stdout)
    assert got["params"] == 270_392 and got["steps"] == arc.Config.steps
    done = cli("--preset", "smoke", "--device", "cpu", "--steps", 4, "--out", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "final.safetensors").exists()


@pytest.mark.skipif(not REAL.exists(), reason="ARC-AGI-1 is not here")
def test_arc_agi_1_counts_are_those_of_the_spec():
    data = files.load_corpus(str(REAL))
    assert (data.split == 2).sum() == 3564 and (data.split == 1).sum() == 350
    assert len(set(data.task[data.split == 1])) == 40
    r = files.code_nats(data.part("test"))
    assert abs(r["uniform_code_nats"] - 486.4) < 0.1 and abs(r["zlib_nats"] - 267.5) < 1
