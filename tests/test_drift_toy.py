"""drift_toy: the method's laws, metrics against closed forms, replay, resume, ranks, mistakes."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import drift_toy as toy
from common import run

ROOT = Path(toy.__file__).parent
SMALL = dict(steps=40, batch=64, positives=64, width=32, depth=2, pictures=False)
MIDDLE = dict(steps=300, batch=128, positives=256, width=64, depth=3)


def config(out, **changes):
    return replace(toy.Config(out=str(out)), **{**SMALL, **changes})


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Fewer points, frames and steps to the start: enough to tell right from wrong, in less time."""
    for name, value in dict(SCORED=1000, FRAMES=9, SHOWN=200, INIT_STEPS=120).items():
        monkeypatch.setattr(toy, name, value)


def weights(out):
    tensors, _ = run.load_weights(Path(out, "generator.safetensors"))
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in tensors.values())).hexdigest()


def rows(out, kind):
    return [row for row in map(json.loads, open(Path(out, "log.jsonl"))) if row["kind"] == kind]


def script(monkeypatch, *words):
    """The script's command line, in this process -> exit status."""
    monkeypatch.setattr(sys, "argv", ["drift_toy.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run.main(toy.Config, toy.PRESETS, toy.COMMANDS)
    return stop.value.code


# --- the method --------------------------------------------------------------------


def test_loss_is_the_mean_square_of_the_drift_and_its_gradient_is_minus_twice_the_drift():
    torch.manual_seed(0)
    x, pos = torch.randn(32, 2, requires_grad=True), torch.randn(32, 2)
    cfg = toy.Config()
    loss = toy.drifting_loss(cfg, x, pos)
    grad = torch.autograd.grad(loss, x)[0]
    v = toy.drift_field(x.detach(), pos, x.detach(), cfg.tau, mask_self=True)
    assert torch.allclose(loss, v.square().mean(), rtol=1e-4)  # float32 difference of nearly equal points
    assert torch.allclose(grad, -2 * v / v.numel(), rtol=1e-3, atol=1e-7)


def test_a_collapsed_start_spreads_over_both_modes(tmp_path):
    # A third of the demo's steps and half its network: already most of both modes; the start has one half.
    result = toy.train(config(tmp_path, init="collapsed", **MIDDLE))
    assert result["coverage"] > 0.8 and result["energy_distance"] < 0.03


def test_broken_antisymmetry_is_worse_and_bends_the_spread_the_way_it_must(tmp_path):
    results = {(a, b): toy.train(config(tmp_path / f"{a}{b}", **MIDDLE, attract=a, repel=b))
               for a, b in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))}
    whole, pull, push = results.values()
    assert pull["energy_distance"] > 3 * whole["energy_distance"]
    assert push["energy_distance"] > 3 * whole["energy_distance"]
    assert pull["spread"] < 0.12 < whole["spread"] < push["spread"]  # the data's own is 0.15


def test_affinity_floor_of_the_release_turns_the_drift_around_in_two_dimensions():
    torch.manual_seed(0)
    side = torch.where(torch.rand(256, 1) < 0.5, -1.0, 1.0)
    x = side * torch.tensor([0.3, 0.0]) + 0.1 * torch.randn(256, 2)  # on the way to either mode
    x.requires_grad_()
    pos = toy.TARGETS["bimodal"](256)
    outward = {}
    for floor in (0.0, 1e-6):
        loss = toy.drifting_loss(replace(toy.Config(), loss="imagenet", floor=floor), x, pos)
        v = -torch.autograd.grad(loss, x)[0]
        outward[floor] = float((v[:, :1] * side).mean() / v.square().mean().sqrt())
    assert outward[0.0] > 0.5 and outward[1e-6] < -0.5  # to the nearer mode; to the mean of all data


# --- data and metrics ----------------------------------------------------------------


@pytest.mark.parametrize("name", toy.TARGETS)
def test_targets_are_two_dimensional_about_unit_size_and_seeded(name):
    torch.manual_seed(0)
    first = toy.TARGETS[name](4000)
    torch.manual_seed(0)
    assert torch.equal(first, toy.TARGETS[name](4000))
    assert first.shape == (4000, 2) and 0.3 < first.std() < 1.2 and first.abs().max() < 1.8


def test_checkerboard_fills_half_of_the_board():
    torch.manual_seed(0)
    cell = torch.floor(2 * (toy.checkerboard(20_000) + 1)).clamp(0, 3).long()
    share = torch.bincount(4 * cell[:, 0] + cell[:, 1], minlength=16) / 20_000
    dark = torch.tensor([(i + j) % 2 == 0 for i in range(4) for j in range(4)])
    assert share[dark].min() > 0.09 and share[~dark].max() < 0.03  # 1/8 each; the soft edge spills over


def test_energy_distance_of_two_shifted_gaussians_equals_the_closed_form():
    # In one dimension E|N(d, 2)| is known; points on the line y = 0, shifted along it, are that case.
    torch.manual_seed(0)
    n, shift = 4000, 1.5
    x, y = (torch.stack([torch.randn(n) + d, torch.zeros(n)], 1) for d in (0.0, shift))
    mean_abs = lambda d: 2 / math.sqrt(math.pi) * math.exp(-d * d / 4) + d * math.erf(d / 2)
    want = 2 * mean_abs(shift) - 2 * mean_abs(0.0)
    assert toy.energy_distance(x, y) == pytest.approx(want, rel=0.06)  # 4000 points: deviation about 2 %
    assert abs(toy.energy_distance(x, x.flip(0)) - toy.energy_distance(x, x)) < 1e-9
    slow = float(2 * (x[:, None] - y[None]).norm(dim=-1)[:50, :50].double().mean()
                 - sum((p[:50, None] - p[None, :50]).norm(dim=-1).double().sum() / (50 * 49) for p in (x, y)))
    assert toy.energy_distance(x[:50], y[:50]) == pytest.approx(slow, rel=1e-5)


def test_sliced_w1_of_a_shift_is_the_mean_projection_of_the_shift():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert toy.sliced_w1(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5 * 2 / math.pi, rel=1e-3)


def test_coverage_counts_lost_modes_and_points_between_modes():
    centers, std = toy.MODES["bimodal"]
    torch.manual_seed(0)
    whole = toy.TARGETS["bimodal"](20_000)
    assert toy.mode_scores(whole, centers, std)["coverage"] > 0.98
    assert toy.mode_scores(whole, centers, std)["spread"] == pytest.approx(0.15, rel=0.03)
    assert toy.mode_scores(whole.abs(), centers, std)["coverage"] == pytest.approx(0.5, abs=0.01)
    assert toy.mode_scores(whole * 0.0, centers, std)["coverage"] == 0.0


# --- a run ------------------------------------------------------------------------------


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    a, b, c = (toy.train(config(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert a == b != c
    assert rows(tmp_path / "a", "eval")[0]["sha256"] == rows(tmp_path / "b", "eval")[0]["sha256"]
    strip_time = lambda row: {k: v for k, v in row.items() if k != "time_s"}
    logs = [list(map(strip_time, rows(tmp_path / name, "train"))) for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) > 3


def test_stop_and_resume_equals_a_straight_run_bit_for_bit(tmp_path, monkeypatch):
    straight = toy.train(config(tmp_path / "a", save_every=15))
    real = run.save_if_due

    def stop_at_20(out, step, *rest):
        real(out, step, *rest)
        if step == 20:
            raise run.Interrupted("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_if_due", stop_at_20)
        with pytest.raises(run.Interrupted):
            toy.train(config(tmp_path / "b", save_every=15))
    again = toy.train(config(tmp_path / "b", save_every=15))  # from the checkpoint of step 15
    assert {p.name for p in (tmp_path / "b" / "ckpt").iterdir()} == {"00000030", "00000040"}
    assert again == straight and weights(tmp_path / "a") == weights(tmp_path / "b")
    film = [run.load_weights(tmp_path / name / "film.safetensors")[0]["points"] for name in "ab"]
    assert torch.equal(*film) and film[0].abs().sum((1, 2)).min() > 0


def test_a_run_leaves_scores_pictures_and_weights_that_sample_and_evaluate_use(tmp_path, capsys):
    cfg = config(tmp_path / "run", pictures=True, steps=4)
    trained = toy.train(cfg)
    folder = tmp_path / "run" / "samples"
    assert {p.name for p in folder.iterdir()} == {"film.png", "field.png", "curve.png", "drift.gif"}
    from PIL import Image
    assert Image.open(folder / "drift.gif").n_frames > 2
    toy.evaluate(cfg)
    assert f"{trained['energy_distance']:10.3g}" in capsys.readouterr().out  # same seeds, same score
    toy.sample(replace(cfg, count=70))
    assert np.load(folder / "points.npy").shape == (70, 2)
    assert [row["step"] for row in rows(cfg.out, "eval")] == [4, 4]


def test_a_comparison_trains_each_case_once_and_ends_with_the_pictures(tmp_path, capsys):
    tables = toy.train(config(tmp_path, steps=2, batch=8, positives=8, suite="starts+antisymmetry"))
    assert [len(t) for t in tables.values()] == [3, 6]
    assert len(list((tmp_path / "cases").iterdir())) == 8  # the whole case is shared
    assert tables["starts"]["start between the modes"] == tables["antisymmetry"]["pull 1, push 1"]
    assert len(rows(tmp_path, "case")) == 9
    (total,) = rows(tmp_path, "eval")
    assert total["energy_distance"] == max(r["energy_distance"] for r in tables["starts"].values())
    assert total["coverage"] == min(r["coverage"] for r in tables["starts"].values())
    whole, *broken = (r["energy_distance"] for r in tables["antisymmetry"].values())
    assert total["broken_times"] == pytest.approx(min(broken) / whole)
    assert capsys.readouterr().out.splitlines()[-1] == f"pictures: {tmp_path / 'samples'}"
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"starts.png", "starts.gif", "field.png",
                                                                  "antisymmetry.png"}


def test_two_ranks_train_on_the_samples_of_both(tmp_path):
    words = ["--out", tmp_path / "two", "--steps", 3, "--batch", 32, "--positives", 32, "--width", 16,
             "--depth", 2, "--no-pictures", "--init", "random"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(ROOT / "drift_toy.py"), *map(str, words)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # What two ranks must compute, in one process: both halves of noise and data, one field over all.
    cfg = config(tmp_path, steps=3, batch=32, positives=32, width=16, depth=2)
    run.seed_all(cfg.seed)
    net = toy.Generator(cfg.noise, cfg.width, cfg.depth)
    optim = torch.optim.Adam(net.parameters(), cfg.lr)
    for step in range(1, 4):
        eps, pos = [], []
        for rank in (0, 1):
            run.seed_all(cfg.seed, rank, step)
            eps.append(torch.randn(16, cfg.noise))
            pos.append(toy.TARGETS["bimodal"](16))
        optim.param_groups[0]["lr"] = toy.learning_rate(cfg, step)
        optim.zero_grad()
        toy.drifting_loss(cfg, net(torch.cat(eps)), torch.cat(pos)).backward()
        optim.step()
    got = run.load_weights(tmp_path / "two" / "generator.safetensors")[0]
    for name, want in net.state_dict().items():
        assert torch.allclose(got[name], want, atol=1e-5), name  # sums in another order


def test_own_points_can_be_the_data(tmp_path):
    points = np.random.RandomState(0).randn(500, 2) * 40
    np.save(tmp_path / "points.npy", points)
    law = toy.data_law(config(tmp_path, data=str(tmp_path / "points.npy")))
    assert float(law(5000).abs().max()) == pytest.approx(1.0)
    assert "coverage" not in toy.scores(law(50), law(50), config(tmp_path, data="x"))


@pytest.mark.parametrize("words, says", [
    (["--preset", "dmeo"], "did you mean 'demo'"), (["--stesp", "3"], "did you mean '--steps'"),
    (["--target", "spiral"], "did you mean 'spirals'"), (["--suite", "start"], "did you mean 'starts'"),
    (["--data", "nowhere.npy"], "nowhere.npy"), (["--tau", "0"], "--tau must be above 0"),
    (["evaluate"], "no weights"), (["--batch", "1"], "--batch 1"),
    (["sample", "--preset", "demo"], "name one of them"),
])
def test_mistakes_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, words, says):
    assert script(monkeypatch, *words, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("drift_toy.py: error:") and says in line


@pytest.mark.parametrize("array", [np.zeros((4, 3)), np.zeros(4), np.full((4, 2), np.nan), np.zeros((0, 2))])
def test_points_of_the_wrong_kind_are_refused(tmp_path, array):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(run.UserError, match="bad.npy"):
        toy.data_law(config(tmp_path, data=str(tmp_path / "bad.npy")))


def test_precision_table_shows_that_float32_inside_is_enough(capsys):
    toy.precision_table()
    words = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    lines = {name: [float(v) for v in values] for name, *values in words}
    assert lines["float32"][1] < 1e-5 and lines["bfloat16"][1] < lines["bfloat16"][0] < 0.2


@pytest.mark.parametrize("preset", toy.PRESETS)
def test_plan_counts_the_parameters_of_every_preset(preset, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["drift_toy.py"])
    _, cfg = run.parse(toy.Config, toy.PRESETS, ("plan",), ["plan", "--preset", preset, "--json"])
    toy.plan(cfg)
    with torch.device("meta"):
        net = toy.Generator(cfg.noise, cfg.width, cfg.depth)
    assert json.loads(capsys.readouterr().out)["params"] == sum(p.numel() for p in net.parameters())
