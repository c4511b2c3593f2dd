"""streetvision.py and its common files: laws, simulations of the guarantees, leakage, and one tiny run of all
phases."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import command
from PIL import Image, ImageDraw
from scipy.special import expit, logit

import streetvision as sv
from common import run
from common.street import (ablation, adapters, augment, bundle, conformal, fusion, index, pipeline, probe,
                           scorecard, selfsup, serving, splits, streets, subnet, views)
from common.bootstrap import bootstrap
from common.classify import binary_metrics
from common.street.maccal import MaskedHead, mac_cal, retention

ROOT = Path(sv.__file__).parent
torch.set_num_threads(1)
TINY = dict(sv.PRESETS["smoke"]["set"], scenes=40, size=64, shift_scenes=3, source_steps=3, phase4a_epochs=1,
            phase4a_batch=16, phase4a_accumulate=2, phase1_epochs=2, phase1_batch=64, phase4c_epochs=1,
            phase2_n_thresholds=101,
            eval_resamples=60, eval_windows=20, phase6_compress=True)


def config(out, data, **more):
    return sv.Config(**{**TINY, "out": str(out), "data": str(data), **more})


def tiny_vit(seed=0, **kw):
    torch.manual_seed(seed)
    return sv.ViT(32, 2, 2, 48, patch=8, **kw).reset()


# --- the whole pipeline, once --------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("streets")
    streets.write(out, 40, 3, 64, 0, 0.5, 3)
    return out


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    cfg = config(out, data)
    sv.train(cfg)
    sv.evaluate(cfg)
    return cfg, sv.Paths(str(out))


def shas(folder):
    """sha256 of every artifact of phases 4a to 6 but those with timestamps in them."""
    skip = {"manifest.json", "bundle.json", "bundle.tar.gz", "model_card.json"}
    folders = [Path(folder, n) for n in ("phase4a_explora", "phase1", "phase2", "phase4c_cvfm", "phase5_scrc",
                                         "export")]
    return {str(p.relative_to(folder)): splits.sha256_file(p) for f in folders for p in sorted(f.rglob("*"))
            # holds seconds
            if p.is_file() and p.name not in skip and p != Path(folder, "phase1", "metrics.csv")}


def test_full_pipeline_leaves_every_artifact(done):
    _, paths = done
    for name in sv.ARTIFACTS:
        if name not in ("gate_json", "peft_adapters", "explora_lora", "model_third"):   # other settings
            assert getattr(paths, name).exists(), name
    plots = {p.name for p in paths.evaluation_dir.glob("*.png")}
    assert plots == {"roc_curve.png", "pr_curve.png", "confusion_matrix.png", "reliability_diagram.png",
                     "risk_coverage.png", "phase_gains.png"}
    for p in [*paths.evaluation_dir.glob("*.png"), paths.mcc_curve_plot, paths.reliability_plot]:
        image = np.asarray(Image.open(p))
        assert image.std() > 5 and min(image.shape[:2]) > 200


def test_manifest_names_commit_inputs_and_outputs_by_hash(done):
    _, paths = done
    for step in sv.STEPS.values():
        m = json.loads((getattr(paths, step.folder) / "manifest.json").read_text())
        assert m["schema"] == "streetvision/manifest@1" and m["git_sha"] and len(m["config_hash"]) == 12
        assert m["outputs"] and "splits" in m["inputs"]
        for fact in m["outputs"].values():
            assert splits.sha256_file(getattr(paths, step.folder) / fact["path"]) == fact["sha256"]
    # the export opens no split at all
    assert m["splits"] == {}


def test_sweep_csv_has_the_header_and_a_row_per_threshold(done):
    lines = done[1].threshold_sweep_csv.read_text().splitlines()
    assert lines[0] == "threshold,mcc,tp,tn,fp,fn" and len(lines) == 102


def test_report_has_intervals_and_paired_differences(done):
    r = json.loads(done[1].evaluation_report_json.read_text())
    assert set(r["results"]) == {"single_view", "multiview_mean", "cvfm_inference", "cvfm_trained", "bundle"}
    cell = r["results"]["bundle"]["scrc"]
    assert cell["ci"]["mcc"]["lower"] <= cell["metrics"]["mcc"] <= cell["ci"]["mcc"]["upper"]
    assert len(r["paired"]) == 7 and all({"diff", "lower", "upper", "supported"} <= set(d["mcc"])
                                         for d in r["paired"].values())
    phases = {name.split(":")[0] for name in r["paired"]}
    assert phases == {"phase4a", "phase1", "phase2", "phase4c", "phase5", "all"}
    own = r["baseline"]["probe_before"]["metrics"]["mcc"]
    d = r["paired"]["all: bundle - frozen-feature logistic"]["mcc"]
    assert d["diff"] == pytest.approx(cell["metrics"]["mcc"] - own, abs=1e-9)
    assert r["acceptance"]["met"] == (d["lower"] > -0.02)
    assert r["bootstrap"]["unit"] == "group" and r["leakage_check"] == "pass"
    assert {s["slice"] for s in r["slices"]} >= {"perturb_level", "shift"}
    c = cell["counts"]
    assert sum(c.values()) == r["n_samples"]


def test_evaluation_twice_is_the_same_report_and_quick_has_no_plots(done, tmp_path):
    cfg, paths = done
    before = paths.evaluation_report_json.read_bytes()
    sv.evaluate(cfg)
    assert paths.evaluation_report_json.read_bytes() == before
    copy = shutil.copytree(paths.run, tmp_path / "copy", ignore=shutil.ignore_patterns("evaluation"))
    sv.evaluate(dataclasses.replace(cfg, out=str(copy), mode="quick"))
    assert not list((copy / "evaluation").glob("*.png"))


def test_evaluation_needs_nothing_of_the_phases(done, tmp_path):
    cfg, paths = done
    home = tmp_path / "moved"
    home.mkdir()
    shutil.copytree(paths.export_dir, home / "export")
    shutil.copy(paths.splits_json, home)
    report = sv.evaluate(dataclasses.replace(cfg, out="elsewhere",
                                             bundle=str(home / "export" / "bundle.json"), mode="quick"))
    whole = json.loads(paths.evaluation_report_json.read_text())
    assert report["results"]["bundle"]["scrc"]["metrics"] == whole["results"]["bundle"]["scrc"]["metrics"]


def test_complete_phases_are_skipped_and_damage_is_noticed(done, tmp_path):
    cfg, paths = done
    home = shutil.copytree(paths.run, tmp_path / "again")
    (home / ".lock").unlink(missing_ok=True)
    cfg, p = dataclasses.replace(cfg, out=str(home)), sv.Paths(str(home))
    times = lambda: {k: (getattr(p, s.folder) / "manifest.json").stat().st_mtime_ns
                     for k, s in sv.STEPS.items()}
    old = times()
    sv.train(cfg)
    assert times() == old
    raw = bytearray(p.thresholds_json.read_bytes())
    raw[-3] ^= 1
    p.thresholds_json.write_bytes(raw)
    with pytest.raises(run.UserError, match="phase2 is stale"):
        sv.train(dataclasses.replace(cfg, phases="phase6"))
    sv.train(dataclasses.replace(cfg, phases="phase2,phase5,phase6"))
    new = times()
    assert new["phase1"] == old["phase1"] and new["phase2"] > old["phase2"] and new["phase6"] > old["phase6"]


def test_other_phase_settings_make_it_stale_and_other_data_settings_are_refused(done, tmp_path):
    cfg, paths = done
    home = shutil.copytree(paths.run, tmp_path / "again")
    (home / ".lock").unlink(missing_ok=True)
    with pytest.raises(run.UserError, match="another --out"):
        sv.train(dataclasses.replace(cfg, out=str(home), seed=1))


def test_phase_order_is_enforced(data, tmp_path):
    with pytest.raises(run.UserError, match="run the earlier phases first"):
        sv.train(config(tmp_path, data, phases="phase2"))
    with pytest.raises(run.UserError, match="did you mean 'phase5'"):
        sv.train(config(tmp_path, data, phases="phaze5"))


def test_moved_bundle_predicts_bit_identically_and_as_the_pipeline_did(done, data, tmp_path):
    _, paths = done
    home = shutil.copytree(paths.export_dir, tmp_path / "b")
    a, b = sv.RoadworkPredictor(paths.bundle_json), sv.RoadworkPredictor(home / "bundle.json")
    rows = {r.split(",")[0]: r.split(",") for r in paths.predictions_csv.read_text().splitlines()[1:]}
    for k, name in enumerate(list(rows)[:3]):
        image = Image.open(data / name)
        assert a(image) == b(image)
        context = [Image.open(p) for p in sorted((data / "images").glob(name[7:13] + "_*"))
                   if p.name != name[7:]]
        assert a.explain(image, context)["p_out"] == pytest.approx(float(rows[name][6]), abs=1e-5)
    out = a.explain(image)
    assert (out["p_out"] > 0.5) == bool(out["pred"])
    assert out["set"] and sum(out["weights"]) == pytest.approx(1)


def fails(path, text):
    with pytest.raises(run.UserError) as caught:
        bundle.check(path)
    assert re.search(text, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)


def test_damaged_bundles_are_refused_with_one_line(done, tmp_path):
    home = shutil.copytree(done[1].export_dir, tmp_path / "b")
    file = home / "bundle.json"
    assert bundle.check(file) == "bundle" and bundle.check(home / "scrc_params.json") == "scrc policy"
    good = file.read_text()

    def edited(**change):
        file.write_text(json.dumps({**json.loads(good), **change}))
    weights = (home / "model.safetensors").read_bytes()
    (home / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    fails(file, "model.safetensors does not match its hash")
    with pytest.raises(run.UserError, match="hash"):
        sv.RoadworkPredictor(file)
    (home / "model.safetensors").unlink()
    fails(file, "model.safetensors is missing")
    (home / "model.safetensors").write_bytes(weights)
    for bad, text in (("../model.safetensors", "unsafe path"), ("/etc/passwd", "unsafe path")):
        edited(model_checkpoint=bad)
        fails(file, text)
    edited(policy=[1, 2])
    fails(file, "exactly one")
    edited(policy=None)
    fails(file, "without policy")
    file.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00")                        # the start of a pickle
    fails(file, "is not JSON")


def test_policy_checker_reads_types_and_ranges(tmp_path):
    path = tmp_path / "p.json"
    for value, text in (({"policy_type": "magic"}, "none of"),
                        ({"policy_type": "threshold"}, "without threshold"),
                        ({"policy_type": "threshold", "threshold": 1.5}, "outside"),
                        ({"policy_type": "threshold", "threshold": True}, "finite"),
                        ({"policy_type": "scrc", "scrc_params": {}}, "without calibrator")):
        path.write_text(json.dumps(value))
        fails(path, text)
    path.write_text(json.dumps({"policy_type": "threshold", "threshold": 0.4}))
    assert bundle.policy_errors(path) == [] and bundle.policy_errors(path, "scrc")
    with pytest.raises(ValueError):
        bundle.write_json(path, {"x": float("nan")})


def test_archives_are_deterministic_and_refuse_to_climb_out(done, tmp_path):
    root = done[1].export_dir
    names = ["bundle.json", "model.safetensors"]
    for name in ("a", "b"):
        bundle.write_archive(tmp_path / f"{name}.tar.gz", root, names[::1 if name == "a" else -1])
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    assert bundle.extract(done[1].bundle_tar, tmp_path / "out")
    assert bundle.check(tmp_path / "out" / "bundle.json") == "bundle"
    for k, (name, kind) in enumerate((("../evil", tarfile.REGTYPE), ("/evil", tarfile.REGTYPE),
                                      ("link", tarfile.SYMTYPE))):
        bad = tmp_path / f"bad{k}.tar.gz"
        with tarfile.open(bad, "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        fails(bad, "unsafe path|plain file")


def test_export_lists_everything_that_is_missing(data, tmp_path):
    cfg = config(tmp_path, data, model_weights="weights.safetensors")
    store = type("Store", (), dict(sha256="0"))()
    with pytest.raises(run.UserError) as caught:
        sv.run_phase6(sv.Job((cfg, None, sv.Paths(str(tmp_path)), store, None)))
    assert all(word in str(caught.value) for word in ("phase1 model", "phase5 policy", "splits", "licence"))


def test_stop_and_resume_gives_the_same_weights(data, done, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch of phase 1: the same bytes as a straight run (one thread, CPU)."""
    cfg, paths = done
    home = shutil.copytree(paths.run, tmp_path / "again", ignore=shutil.ignore_patterns("phase1", ".lock"))
    cfg = dataclasses.replace(cfg, out=str(home), phases="phase1")
    calls = itertools.count(1)
    real = run.save_if_due

    def stopping(out, step, steps, every, state, ddp, ranked=None):
        monkeypatch.setattr(run, "_stop", next(calls) == 1)
        real(out, step, steps, every, state, ddp, ranked)
    monkeypatch.setattr(run, "save_if_due", stopping)
    with pytest.raises(run.Interrupted):
        sv.train(cfg)
    assert json.loads((home / "pipeline_state.json").read_text())["phase1"]["status"] == "failed"
    sv.train(cfg)
    for name in ("model_best", "model_second", "model_last", "model_ema"):
        assert getattr(sv.Paths(str(home)), name).read_bytes() == getattr(paths, name).read_bytes()
    assert not (home / "phase1" / "ckpt").exists()


def test_the_three_best_epochs_are_kept_by_mcc_and_the_better_of_weights_and_average(monkeypatch):
    net, ema = torch.nn.Linear(1, 1), {"weight": torch.zeros(1, 1)}
    live = {"weight": net.weight}
    told = iter([0.1, 0.3, 0.2, 0.1, 0.3, 0.0, 0.2, 0.25, 0.3005, 0.1])     # weights, average; five epochs
    monkeypatch.setattr(sv, "infer", lambda *a, **k: None)
    monkeypatch.setattr(sv, "head_logits", lambda *a: None)
    monkeypatch.setattr(sv, "answers", lambda z, y: dict(val_mcc=next(told)))
    net.head, best, book = None, {}, dict(top=[], epoch=-1)
    select = type("Select", (), dict(labels=lambda self: None))()
    patience = []
    for epoch in range(5):
        with torch.no_grad():
            net.weight.fill_(epoch + 1), ema["weight"].fill_(-epoch - 1)
        sv.judge(net, ema, select, None, None, best, book, epoch, live)
        patience.append(book["epoch"])
    kept = [(mcc, epoch, won, float(best[f"{slot}.weight"])) for mcc, epoch, won, slot in book["top"]]
    # a later equal score does not displace an earlier one; 0.0005 more is better, but no progress
    assert kept == [(0.3005, 4, False, 5.0), (0.3, 0, True, -1.0), (0.3, 2, False, 3.0)]
    assert patience == [0] * 5


def test_float16_is_refused_without_cuda_and_its_scaler_changes_nothing_but_the_range(data, done, tmp_path,
                                                                                      monkeypatch, capsys):
    with pytest.raises(run.UserError, match="needs a CUDA device"):
        sv.train(config(tmp_path / "no", data, hardware_precision="fp16"))
    assert not (tmp_path / "no" / "log.jsonl").exists()
    ends = []
    for scale in (None, 2.0 ** 9):
        home = tmp_path / str(scale)
        (home / "source").mkdir(parents=True)
        shutil.copy(done[1].source_weights, home / "source")
        if scale:                                       # float32 gradients, scaled by a power of two: exact
            monkeypatch.setattr(serving, "scaler",
                                lambda *a: torch.amp.GradScaler("cpu", init_scale=scale))
        sv.train(config(home, data, phases="phase4a,phase1", steps=2, phase1_mac_cal=False))
        paths = sv.Paths(str(home))
        ends.append([run.load_weights(f)[0] for f in (paths.explora_checkpoint, paths.model_last)])
    for plain, scaled in zip(*ends):
        assert all(torch.equal(plain[k], scaled[k]) for k in plain)


def cloned(done, tmp_path, **more):
    """A copy of the finished run that may be changed -> (cfg, paths)."""
    cfg, paths = done
    home = shutil.copytree(paths.run, tmp_path / "again")
    (home / ".lock").unlink(missing_ok=True)
    return dataclasses.replace(cfg, out=str(home), **more), sv.Paths(str(home))


def test_ablations_are_paired_differences_of_val_select(done, data, tmp_path, monkeypatch):
    cfg, paths = cloned(done, tmp_path, steps=1, eval_resamples=200)
    trained = []

    def fake(sub):                                              # the phases themselves are tested elsewhere
        trained.append((sub.seed, sub.model_init_from_explora, sub.phases))
        target = sv.Paths(sub.out)
        target.phase1_dir.mkdir(parents=True)
        tensors, meta = bundle.load_tensors(paths.val_select_logits)
        better = torch.nn.functional.one_hot(tensors["labels"], 2) * 9.0
        tensors["logits"] = better if sub.model_init_from_explora else -better
        bundle.save_tensors(target.val_select_logits, tensors, meta)
    result = ablation.ablate(dataclasses.replace(cfg, what="explora"), fake, data)
    assert set(result) == {"42", "43", "44", "mean"} and len(trained) == 6
    assert {t[2] for t in trained if t[1]} == {"phase4a_explora,phase1"}
    assert result["mean"]["diff"] == pytest.approx(2) == result["42"]["diff"]
    assert result["mean"]["seeds"] == 3 and result["mean"]["lower"] <= 2 and "supported" in result["mean"]
    for what, names in (("cvfm", set(sv.MODES)), ("calibration", {*sv.CALIBRATORS, "mac_cal"})):
        sv.ablate(dataclasses.replace(cfg, what=what))
        assert set(json.loads(Path(cfg.out, "ablation.json").read_text())[what]) == names
    assert set(json.loads(Path(cfg.out, "ablation.json").read_text())) == {"explora", "cvfm", "calibration"}


def test_small_commands_leave_what_they_say(done, tmp_path, capsys):
    cfg, paths = cloned(done, tmp_path, scenes=4, shift_scenes=1)
    sv.demo_data(dataclasses.replace(cfg, out=str(tmp_path / "drawn")))
    assert len(splits.read_index(tmp_path / "drawn")) == 12
    assert (tmp_path / "drawn/shift/index.jsonl").is_file()
    sv.sample(cfg)
    assert Image.open(Path(cfg.out, "samples/predictions.png")).size[0] > 6 * cfg.size
    pipeline.doctor(cfg)
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "cuda devices" in said and "ok" in said
    assert not Path(cfg.out, ".doctor.json").exists()
    sv.validate(cfg)
    assert "sound bundle" in capsys.readouterr().out


def test_doctor_refuses_old_versions(done, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(run.UserError, match="2.6"):
        pipeline.doctor(dataclasses.replace(done[0], out=str(tmp_path)))


def test_bench_writes_three_cases_without_promises(done, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net,
                        **kw: (_ for _ in ()).throw(RuntimeError("no compiler")))
    with pytest.warns(UserWarning, match="torch.compile failed"):
        sv.bench(dataclasses.replace(done[0], out=str(tmp_path), steps=2, phase1_batch=2))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [r["case"] for r in rows] == ["eager-fp32"] * 2 + ["eager-auto"] * 2 + ["compile-auto"]
    assert all(r["ms_mean"] > 0 and r["images_per_s"] > 0
               for r in rows[:4]) and "failed" in rows[4]["skipped"]


def test_inverse_entropy_weights_reach_the_bundle(done, tmp_path):
    cfg, paths = cloned(done, tmp_path, phase4c_inverse=True, phase4c_mode="weighted_uncertainty")
    sv.train(dataclasses.replace(cfg, phases="phase4c,phase5,phase6"))
    predictor = sv.RoadworkPredictor(paths.bundle_json)
    f_NVF = torch.randn(7, 3, predictor.net.width)
    logits = predictor.net.head(f_NVF)
    for inverse in (True, False):
        want = fusion.fuse("weighted_uncertainty", logits, inverse=inverse)[1].numpy()
        assert np.allclose(predictor.fused(f_NVF, None, mac=False)[1], want, atol=1e-6) == inverse


def test_bca_intervals_of_the_report_are_those_of_the_bootstrap(done, tmp_path):
    cfg, paths = cloned(done, tmp_path, eval_interval="bca")
    sv.evaluate(cfg)
    report = json.loads(paths.evaluation_report_json.read_text())
    cell = report["results"]["single_view"]["raw_argmax"]
    rows = [line.split(",") for line in paths.predictions_csv.read_text().splitlines()[1:]]
    p, y = np.array([float(r[3]) for r in rows]), np.array([int(r[2]) for r in rows])
    own = bootstrap(binary_metrics(p, y, 0.5), len(y), np.array([r[1] for r in rows]), cfg.eval_resamples,
                    method="bca", seed=cfg.seed)
    for name in ("mcc", "nll", "roc_auc"):
        assert [cell["ci"][name][end] for end in ("lower", "upper")] == pytest.approx(
            [own[name]["lower"], own[name]["upper"]], abs=1e-9)
    assert report["bootstrap"]["method"] == "bca"
    before = json.loads(done[1].evaluation_report_json.read_text())
    assert before["bootstrap"]["method"] == "percentile"
    assert before["results"]["single_view"]["raw_argmax"]["ci"]["nll"] != cell["ci"]["nll"]


def test_evaluate_from_the_command_line(done, tmp_path):
    home = shutil.copytree(done[1].run, tmp_path / "again")
    r = cli("evaluate", "--bundle", str(home / "export/bundle.json"), "--data", done[0].data, "--mode",
            "quick",
            cwd=tmp_path)
    assert r.returncode == 0 and r.stdout.startswith("VAL_TEST  MCC"), r.stderr


def test_sweep_and_plot_can_be_left_out_and_the_grid_can_follow_the_scores(done, tmp_path):
    cfg, paths = cloned(done, tmp_path, phases="phase2", phase2_save_sweep_curve=False,
                        phase2_save_mcc_plot=False, phase2_space="logit")
    paths.threshold_sweep_csv.unlink()
    sv.train(cfg)
    assert paths.thresholds_json.is_file() and not paths.threshold_sweep_csv.exists()
    # all below the second threshold of a plain grid
    p = 1e-7 * np.arange(1, 101)
    logits, y = np.log(np.stack([1 - p, p], 1)), (np.arange(100) >= 60).astype(int)
    plain, fine = (sv.select_threshold_max_mcc(logits, y, 1000, space=s) for s in ("prob", "logit"))
    assert plain[1] == 0 and fine[1] == 1 and p[59] < fine[0] <= p[60]


# --- leakage ---------------------------------------------------------------


def poisoned(data, paths, tmp_path, which, seed=0):
    """The data set with random labels on one split, and a fresh run directory with the same splits."""
    new = shutil.copytree(data, tmp_path / "data")
    rows = [json.loads(r) for r in (new / "index.jsonl").read_text().splitlines()]
    where = json.loads(paths.splits_json.read_text())["split"]
    rng = np.random.default_rng(seed)
    for r in rows:
        if where[r["path"]] == which or which == "ALL":
            r["label"] = int(rng.integers(2))
    (new / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    home = tmp_path / "run"
    home.mkdir()
    # the salt search may look at class counts; not what is tested
    shutil.copy(paths.splits_json, home)
    return new, home


def test_poison_val_test_changes_no_artifact(data, done, tmp_path):
    new, home = poisoned(data, done[1], tmp_path, "VAL_TEST")
    sv.train(config(home, new))
    assert shas(home) == shas(done[1].run)


def test_poison_val_calib_changes_only_what_is_fitted_on_it(data, done, tmp_path):
    new, home = poisoned(data, done[1], tmp_path, "VAL_CALIB")
    sv.train(config(home, new))
    a, b = shas(home), shas(done[1].run)
    same = ("explora_checkpoint", "model_best", "model_last", "model_ema", "cvfm_weights",
            "export/model.safetensors")
    assert all(a[k] == b[k] for k in a if any(s in k for s in same))
    assert a["phase5_scrc/scrc_params.json"] != b["phase5_scrc/scrc_params.json"]
    assert a["phase2/threshold_sweep.csv"] != b["phase2/threshold_sweep.csv"]


def test_phase4a_is_blind_to_labels(data, done, tmp_path):
    new, home = poisoned(data, done[1], tmp_path, "ALL")
    sv.train(config(home, new, phases="phase4a"))
    assert sv.Paths(str(home)).explora_checkpoint.read_bytes() == done[1].explora_checkpoint.read_bytes()


def test_every_combination_outside_the_table_is_refused(done, data, tmp_path):
    shutil.copy(done[1].splits_json, tmp_path)
    store = sv.SplitStore(data, tmp_path, sv.ROLES, blind=("phase4a_explora",))
    opened = 0
    for phase, split, purpose in itertools.product((*sv.PHASES, "evaluate"), (*splits.SHARES, *splits.PARTS),
                                                   ("grad", "select", "fit", "report")):
        if purpose in sv.ROLES.get((phase, split), ()):
            rows = store.open(split, phase, purpose).rows
            assert phase != "phase4a_explora" or all("label" not in r for r in rows)
            opened += 1
        else:
            with pytest.raises(splits.LeakageError):
                store.open(split, phase, purpose)
    assert opened == sum(len(set(v) - {"infer_frozen"}) for v in sv.ROLES.values())
    assert len((tmp_path / "access_log.jsonl").read_text().splitlines()) == opened
    splits.check_access_log(tmp_path)
    with open(tmp_path / "access_log.jsonl", "a") as file:
        file.write(json.dumps(dict(split="VAL_TEST", phase="phase1", time="now")) + "\n")
    with pytest.raises(splits.LeakageError, match="opened by phase1"):
        splits.check_access_log(tmp_path)


def test_calibration_images_open_only_for_a_frozen_model(done, data, tmp_path):
    shutil.copy(done[1].splits_json, tmp_path)
    store = sv.SplitStore(data, tmp_path, sv.ROLES)
    net, file = torch.nn.Linear(1, 1), tmp_path / "w"
    with pytest.raises(splits.LeakageError):
        store.open("VAL_CALIB", "phase1", "infer_frozen", file, "", net)
    file.write_bytes(b"x")
    with pytest.raises(splits.LeakageError, match="not the frozen"):
        store.open("VAL_CALIB", "phase1", "infer_frozen", file, "0", net)
    samples = store.open("VAL_CALIB", "phase1", "infer_frozen", file, splits.sha256_file(file), net)
    with pytest.raises(splits.LeakageError, match="eval"):
        samples.image(0)
    with torch.no_grad():
        net.eval()
        assert samples.image(0).size == (64, 64)


def rows_of(groups, frames=3):
    return [dict(id=f"{g}_{k}", path=f"{g}_{k}", label=int(g % 2), group=f"g{g}") for g in range(groups)
            for k in range(frames)]


def test_splits_are_by_group_stable_under_growth_and_near_their_shares():
    a, b = splits.make_splits(rows_of(400)), splits.make_splits(rows_of(500))
    assert not splits.leaks(a) and len(a["split"]) == 1200
    assert a == splits.make_splits(rows_of(400)) and a["salt"] == b["salt"] == "0"
    assert all(b["split"][k] == v for k, v in a["split"].items())
    # 4 binomial standard errors of 400 groups
    for name, share in splits.SHARES.items():
        assert abs(a["counts"][name] / 1200 - share) < 4 * math.sqrt(share * (1 - share) / 400)
    assert len(splits.leaks(splits.make_splits(rows_of(400), "image"))) > 100


def test_stratified_splits_cut_each_class_at_its_quantiles():
    rows = rows_of(401)
    s = splits.make_splits(rows, "hash_stratified")
    assert not splits.leaks(s) and len(s["split"]) == len(rows)
    groups = {(g, s["split"][r["id"]]) for r in rows for g in [r["group"]]}
    for label in (0, 1):
        mine = [split for g, split in groups if int(g[1:]) % 2 == label]
        for name, share in splits.SHARES.items():
            assert abs(mine.count(name) - share * len(mine)) <= 1


def test_official_test_rows_are_the_test_split_and_void_the_guarantees():
    rows = [dict(r, official_split="test" if int(r["group"][1:]) % 5 == 0 else "train") for r in rows_of(400)]
    s = splits.make_splits(rows, "official_test")
    for r in rows:
        assert (s["split"][r["id"]] == "VAL_TEST") == (r["official_split"] == "test")
    assert abs(s["counts"]["TRAIN"] / 960 - 2 / 3) < 4 * math.sqrt(2 / 9 / 320)
    with pytest.raises(run.UserError, match="official_split"):
        splits.make_splits(rows_of(10), "official_test")
    rng = np.random.default_rng(0)
    p, y = (a[0] for a in draw(rng, 1, 300))
    conf = dict(label=y, group=np.arange(300), id=np.arange(300).astype(str))
    kw = dict(xi=0.8, alpha=0.1, delta=0.1, fnr_alpha=0.1)
    kinds = [conformal.guarantees(conf, p, p, 0.5, exchangeable=e, **kw) for e in (True, False)]
    assert [k["risk"]["guarantee"] for k in kinds] == ["marginal_exact", "none"]


def test_near_duplicates_join_groups(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(np.kron(rng.integers(0, 255, (8, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8))
              for _ in range(6)]
    images.append(images[0].point(lambda v: min(v + 3, 255)))                # the first, a little brighter
    rows = []
    for k, im in enumerate(images):
        im.save(tmp_path / f"{k}.png")
        rows.append(dict(id=str(k), path=f"{k}.png", group=f"g{k}", label=0))
    assert splits.merge_duplicates(rows, tmp_path) == 1
    assert rows[0]["group"] == rows[6]["group"] and len({r["group"] for r in rows}) == 6


def test_index_reader_guesses_nothing(tmp_path):
    (tmp_path / "roadwork").mkdir()
    (tmp_path / "no_roadwork").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "roadwork" / "a.png")
    assert [(r["label"], r["group"]) for r in splits.read_index(tmp_path)] == [(1, "roadwork/a.png")]
    (tmp_path / "maybe").mkdir()
    with pytest.raises(run.UserError, match="maybe"):
        splits.read_index(tmp_path)
    (tmp_path / "index.jsonl").write_text('{"path": "a", "label": 2}\n')
    with pytest.raises(run.UserError, match="row 1"):
        splits.read_index(tmp_path)


def test_columns_of_the_hugging_face_export_are_read_nested_or_dotted(tmp_path):
    rows = [{"image": {"path": "a.jpg", "bytes": None}, "label": 1, "city_name": "Lyon",
             "video_info": {"vid_id": 7, "seq_id": 1, "frame_id": 3},
             "scene_level_tags": {"weather": "rain"}},
            {"image": "b.jpg", "label": 0, "video_info.vid_id": 7, "scene_level_tags.daytime": "night"},
            {"image": "c.jpg", "label": 0, "video_info": {"vid_id": None, "seq_id": "s"}},
            {"path": "d.jpg", "image": "other.jpg", "label": 0, "group": "own", "video_info": {"vid_id": 7}},
            {"image": "e.jpg", "label": 1, "video_info": None}]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    read = index.read_index(tmp_path)
    assert [r["id"] for r in read] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert [r["group"] for r in read] == ["7", "7", "s", "own", "e.jpg"]
    assert read[0]["weather"] == "rain" and read[0]["city"] == "Lyon" and read[0]["frame"] == 3
    assert read[1]["daytime"] == "night" and "weather" not in read[1]


# --- model and adapters -----------------------------------------------------


@pytest.mark.parametrize("name, params, tensors", [
    ("vits16", 21_596_544, 211), ("vits16plus", 28_692_864, 235), ("vitb16", 85_660_416, 211),
    ("vitl16", 303_129_600, 415), ("vith16plus", 840_592_640, 615)])
def test_published_sizes_have_the_published_parameters(name, params, tensors):
    with torch.device("meta"):
        vit = sv.ViT.sized(name)
    state = vit.state_dict()
    assert sum(t.numel() for t in state.values()) == params and len(state) == tensors
    assert "layer.0.attention.k_proj.bias" not in state and "layer.0.layer_scale1.lambda1" in state


@pytest.mark.parametrize("name, targets, r, count, dora", [
    ("vitl16", "qkv", 16, 2_359_296, 73_728), ("vitl16", "qv", 64, 6_291_456, 49_152),
    ("vith16plus", "qkvo", 16, 5_242_880, 163_840), ("vitb16", "qkv", 32, 1_769_472, 27_648)])
def test_adapter_counts_are_those_of_the_table(name, targets, r, count, dora):
    with torch.device("meta"):
        vit = sv.ViT.sized(name)
    shapes = [m.weight.shape for *_, m in adapters.linears(vit, tuple(targets))]
    assert sum(r * (o + i) for o, i in shapes) == count and sum(o for o, _ in shapes) == dora


def test_vit_reads_its_own_file_under_both_prefixes_and_lists_every_fault(tmp_path):
    vit, x = tiny_vit().eval(), torch.randn(2, 3, 16, 24)
    want = vit(x)
    assert want["cls"].shape == (2, 32) and want["patches"].shape == (2, 6, 32)
    for prefix in ("", "model."):
        state = {prefix + k: v for k, v in vit.state_dict().items() if "mask_token" not in k}
        run.save_weights(tmp_path / "w.safetensors", state, {})
        assert torch.equal(sv.ViT.load(tmp_path / "w.safetensors", 2)(x)["cls"], want["cls"])
    del state["model.norm.bias"]
    state["model.extra"] = torch.zeros(1)
    state["model.norm.weight"] = torch.zeros(3)
    run.save_weights(tmp_path / "w.safetensors", state, {})
    with pytest.raises(run.UserError) as caught:
        sv.ViT.load(tmp_path / "w.safetensors", 2)
    assert all(word in str(caught.value) for word in ("missing norm.bias", "unexpected extra",
                                                      "norm.weight is (3,)"))


def test_metas_own_files_convert_to_the_same_network(tmp_path):
    vit, x = tiny_vit().eval(), torch.randn(1, 3, 16, 16)
    s, out = vit.state_dict(), {}
    for k, v in s.items():
        k = k.replace("layer.", "blocks.").replace("layer_scale1.lambda1",
                                                   "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        k = k.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj",
                                                        "mlp.fc2").replace("attention.o_proj", "attn.proj")
        k = k.replace("embeddings.patch_embeddings",
                      "patch_embed.proj").replace("embeddings.register_tokens", "storage_tokens")
        out[k.replace("embeddings.", "")] = v
    for n in range(2):
        qkv = [out.pop(f"blocks.{n}.attention.{c}_proj.weight") for c in "qkv"]
        bias = [out.pop(f"blocks.{n}.attention.q_proj.bias"), torch.full((32,), 9.0),
                out.pop(f"blocks.{n}.attention.v_proj.bias")]
        out |= {f"blocks.{n}.attn.qkv.weight": torch.cat(qkv), f"blocks.{n}.attn.qkv.bias": torch.cat(bias),
                f"blocks.{n}.attn.qkv.bias_mask": torch.ones(96)}
    out["mask_token"], out["rope_embed.periods"] = out["mask_token"][0], torch.ones(4)
    torch.save(out, tmp_path / "meta.pth")
    assert torch.equal(sv.ViT.load(tmp_path / "meta.pth", 2)(x)["cls"], vit(x)["cls"])


@pytest.mark.skipif(not os.environ.get("DINOV3_WEIGHTS"),
                    reason="gated weights: DINOV3_WEIGHTS=FOLDER of them")
@pytest.mark.parametrize("name, want", [
    ("vits16", (0.463561, -0.415609, 0.408236, -0.126613, -0.286636)),
    ("vitb16", (1.034643, -0.180609, -0.341018, -0.066376, -0.011383)),
    ("vitl16", (0.484527, -0.582214, 0.480636, 0.592040, 0.945166)),
    ("vith16plus", (-0.064575, -0.148866, -0.621524, 0.634878, 0.152695))])
def test_released_weights_give_the_published_class_token(name, want):
    """COCO val2017 000000039769.jpg beside the weights; values of transformers' conversion script, 1e-3 as
    there."""
    folder = Path(os.environ["DINOV3_WEIGHTS"])
    weights = folder / f"dinov3-{name}-pretrain-lvd1689m"
    if not weights.is_dir():
        pytest.skip(f"no {weights}")
    x = views.resized(Image.open(folder / "000000039769.jpg").convert("RGB"), 224)[None]
    with torch.no_grad():
        assert torch.allclose(sv.ViT.load(weights)(x)["cls"][0, :5], torch.tensor(want), atol=1e-3)


def test_positions_stretch_only_in_training():
    vit, x = tiny_vit().double(), torch.randn(1, 3, 32, 32).double()
    vit.rope_stretch = 2.0
    with torch.no_grad():
        assert not torch.equal(vit.train()(x)["cls"], vit(x)["cls"])
        assert torch.equal(vit.eval()(x)["cls"], vit(x)["cls"])


@pytest.mark.parametrize("kind, rslora, init", list(itertools.product(("lora", "dora"), (False, True),
                                                                      ("default", "gaussian", "pissa"))))
def test_adapters_start_neutral_follow_their_equation_and_merge(kind, rslora, init):
    torch.manual_seed(1)
    plain = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(24, 16)})
    W, b, x = plain["q_proj"].weight.detach().clone(), plain["q_proj"].bias, torch.randn(5, 24)
    net = sv.adapt(plain, kind, 4, 8.0, rslora, init, ("q",))
    layer = net["q_proj"]
    assert torch.allclose(layer(x), F.linear(x, W, b), atol=2e-6)            # float32 rounding of an SVD
    assert layer.scaling == (4.0 if rslora else 2.0) and not layer.weight.requires_grad
    with torch.no_grad():
        layer.A += 0.1 * torch.randn_like(layer.A)
        layer.B += 0.1 * torch.randn_like(layer.B)
        base = W if init != "pissa" else W - layer.scaling * layer.B0 @ layer.A0
        V = base + layer.scaling * layer.B @ layer.A
        if kind == "dora":
            layer.m *= 1.1
            V = layer.m[:, None] * V / V.norm(dim=1, keepdim=True)
    want = F.linear(x, V, b)
    assert torch.allclose(layer(x), want, atol=1e-5)
    tensors, meta = adapters.adapter_tensors(net)
    original = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(24, 16)})
    original["q_proj"].load_state_dict(dict(weight=W, bias=b))
    adapters.apply_adapters(original, tensors, meta)
    sv.merge(net)
    assert type(net["q_proj"]) is torch.nn.Linear and net["q_proj"].weight.requires_grad
    assert torch.allclose(net["q_proj"](x), want,
                          atol=1e-5) and torch.allclose(original["q_proj"](x), want, atol=1e-5)


def test_pissa_takes_the_leading_directions_out_and_only_adapters_learn():
    vit = tiny_vit()
    W = vit.layer[1].attention["q_proj"].weight.detach().clone()
    sv.adapt(vit, "lora", 4, 4.0, init="pissa", targets=("q",), blocks=[1])
    left = torch.linalg.svdvals(vit.layer[1].attention["q_proj"].weight)
    assert torch.allclose(left[0], torch.linalg.svdvals(W)[4], rtol=1e-4)
    assert [n for n, p in vit.named_parameters()
            if p.requires_grad] == ["layer.1.attention.q_proj.A", "layer.1.attention.q_proj.B"]
    with pytest.raises(ValueError, match="layer"):
        sv.adapt(tiny_vit(), targets=("layer",))


def test_dora_gradient_treats_the_norm_as_constant():
    torch.manual_seed(0)
    lin = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5, bias=False)})
    layer = sv.adapt(lin, "dora", 2, 2.0, targets=("q",))["q"]
    with torch.no_grad():
        layer.B += torch.randn_like(layer.B)
    x, up = torch.randn(3, 6), torch.randn(3, 5)
    (layer(x) * up).sum().backward()
    gain = (layer.m / layer.full().norm(dim=1)).detach()
    assert torch.allclose(layer.A.grad, layer.B.detach().T @ (gain * up).T @ x, atol=1e-5)


# --- losses -------------------------------------------------------------------


def test_nt_xent_equals_a_loop():
    torch.manual_seed(0)
    z1, z2, T = torch.randn(5, 8), torch.randn(5, 8), 0.3
    z = [v / v.norm() for v in torch.cat([z1, z2])]
    terms = [-(z[i] @ z[(i + 5) % 10]) / T + math.log(sum(math.exp(z[i] @ z[j] / T)
                                                          for j in range(10) if j != i)) for i in range(10)]
    assert float(sv.nt_xent(z1, z2, T)) == pytest.approx(float(sum(terms) / 10), abs=1e-5)
    assert float(sv.nt_xent(z2, z1, T)) == pytest.approx(float(sv.nt_xent(z1, z2, T)), abs=1e-6)


@pytest.mark.parametrize("N, collapsed, perfect",
                         [(16, 3.434, 0.00136), (64, 4.844, 0.00570), (256, 6.236, 0.02289)])
def test_nt_xent_reference_values(N, collapsed, perfect):
    one = torch.ones(N, 4)
    assert float(sv.nt_xent(one, one, 0.1)) == pytest.approx(collapsed,
                                                             abs=1e-3) == pytest.approx(math.log(2 * N - 1),
                                                                                        abs=1e-3)
    eye = torch.eye(N)
    assert float(sv.nt_xent(eye, eye, 0.1)) == pytest.approx(perfect, abs=1e-5)


def test_gradcache_is_the_full_batch_and_microbatches_are_not():
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(),
                                 torch.nn.Linear(16, 8)), torch.randn(2, 12, 6)
    cfg = sv.Config(phase4a_temperature=0.2)

    def grads(parts, negatives):
        net.zero_grad()
        loss = sv.simclr_step(net, parts, dataclasses.replace(cfg, phase4a_negatives=negatives), (0,))[0]
        return float(loss), torch.cat([p.grad.flatten().clone() for p in net.parameters()])
    whole, g = grads([x], "gradcache")
    parts = list(x.split(4, 1))
    cached, g2 = grads(parts, "gradcache")
    alone, g3 = grads(parts, "microbatch")
    assert cached == pytest.approx(whole, abs=1e-6) and torch.allclose(g, g2, atol=1e-6)
    # fewer negatives: another, easier problem
    assert alone < whole - 0.1 and not torch.allclose(g, g3, atol=1e-3)


TWO_RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import streetvision as sv
from common import run
rank = int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
torch.manual_seed(0)
net, x = torch.nn.Linear(6, 8), torch.randn(2, 8, 6)
mine = x[:, rank * 4:rank * 4 + 4]
loss = sv.simclr_step(net, [mine], sv.Config(phase4a_temperature=0.2), (0,))[0]
params = list(net.parameters())
sv.average_gradients(params, run.Ranks(rank, 2, torch.device("cpu")))
got = torch.cat([p.grad.flatten() for p in params])
full = sv.nt_xent(*net(x.flatten(0, 1)).chunk(2), 0.2)
want = torch.cat([g.flatten() for g in torch.autograd.grad(full, params)])
assert abs(float(loss) - float(full)) < 1e-6, (float(loss), float(full))
assert torch.allclose(got, want, atol=1e-6), got - want
run.leave_together()
"""


def test_two_gloo_ranks_give_the_gradients_of_one_process(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(ROOT), str(k), str(tmp_path / "meet")],
                              env=env,
                              stderr=subprocess.PIPE, text=True) for k in range(2)]
    for r in ranks:
        _, error = r.communicate(timeout=240)
        assert r.returncode == 0, error


def test_focal_loss_is_ce_at_gamma_zero_weighs_by_class_and_has_its_gradient():
    torch.manual_seed(0)
    x, y = torch.randn(12, 2, dtype=torch.double).requires_grad_(), torch.arange(12) % 2
    assert float(sv.focal_loss(x, y, None, 0.0)) == pytest.approx(float(F.cross_entropy(x.float(), y)),
                                                                  abs=1e-6)
    p = x.softmax(1)[torch.arange(12), y]
    want = ((torch.where(y == 1, 0.3, 0.7)) * (1 - p) ** 2 * -p.log()).mean()
    assert float(sv.focal_loss(x, y, 0.3, 2.0)) == pytest.approx(float(want), abs=1e-6)
    soft = F.one_hot(y, 2).float()
    assert torch.allclose(sv.focal_loss(x, soft, 0.3), sv.focal_loss(x, y, 0.3))
    g, = torch.autograd.grad(sv.focal_loss(x, y), x)
    h = torch.autograd.grad((torch.where(y == 1, 0.25, 0.75) * (1 - p) ** 2 * -p.log()).mean(), x)[0]
    assert torch.allclose(g, h, atol=1e-6)                                   # float32 inside against float64


def test_task_losses_on_hard_and_soft_targets():
    torch.manual_seed(0)
    x, y = torch.randn(8, 2), torch.tensor([0, 1, 1, 0, 1, 1, 1, 0])
    soft, w = F.one_hot(y, 2).float(), torch.tensor([1.0, 2.5])
    cfg = sv.Config(phase1_loss="weighted_ce")
    assert torch.allclose(sv.task_loss(x, soft, cfg, w), F.cross_entropy(x, y, w))
    smooth = sv.Config(phase1_loss="ce", phase1_smoothing=0.1)
    assert torch.allclose(sv.task_loss(x, soft, smooth, w), F.cross_entropy(x, y, label_smoothing=0.1))


def test_schedule_warms_up_then_falls_on_a_cosine():
    lr = [sv.lr_at(k, 100, 1.0) for k in range(100)]
    assert lr[0] == pytest.approx(0.01) and lr[5] == pytest.approx(0.505) and lr[10] == 1.0
    assert lr[55] == pytest.approx((1 + 1e-6) / 2) and all(a > b for a, b in zip(lr[10:],
                                                                                 lr[11:])) and lr[-1] < 1e-2


def test_byol_swav_parts():
    assert selfsup.byol_momentum(0, 10) == pytest.approx(0.996) and selfsup.byol_momentum(10, 10) == 1
    z = torch.randn(6, 4)
    assert float(selfsup.byol_loss(z, z, 3 * z, 2 * z)) == pytest.approx(0, abs=1e-6)
    q = selfsup.sinkhorn(torch.randn(64, 8) * 0.1)
    assert torch.allclose(q.sum(1), torch.ones(64),
                          atol=1e-5) and torch.allclose(q.sum(0), torch.full((8,), 8.0), atol=0.5)
    shadow = {"w": torch.zeros(2)}
    selfsup.average_into(shadow, {"w": torch.ones(2)}, 0.9)
    assert torch.allclose(shadow["w"], torch.full((2,), 0.1))


def test_simclr_lowers_its_loss_and_finds_the_other_view(picture):
    """Eight images, thirty steps: NT-Xent falls by more than a tenth of ln(2N - 1) and retrieval rises."""
    vit, cfg = tiny_vit(), sv.Config(model_image=32)
    head = sv.make_projector(32, 16)
    pictures = [streets.frame(0, k, 0, size=48)[0] for k in range(8)]
    x = torch.stack([sv.simclr_views(im, cfg, run.generator(k))
                     for k, im in enumerate(pictures)]).transpose(0, 1)
    optim = torch.optim.AdamW([*vit.parameters(), *head.parameters()], 1e-3)
    embed, rows = lambda v: head(vit(v)["cls"]), []
    for step in range(30):
        optim.zero_grad()
        loss, z1, z2 = sv.simclr_step(embed, [x], cfg, (0, step))
        optim.step()
        rows.append((float(loss), selfsup.contrast_scores(z1, z2)["top1"]))
    assert rows[-1][0] < rows[0][0] - 0.1 * math.log(15) and rows[-1][1] > rows[0][1]


def test_accumulation_equals_one_large_batch(data, done, tmp_path, monkeypatch):
    """Four micro-batches of 8 and one of 32: the same weights after a step of plain gradient descent."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, *a, **k: torch.optim.SGD(groups, 0.1))
    samples = splits.Samples(splits.read_index(data)[:32], data)
    ends = []
    for batch in (32, 8):
        cfg = dataclasses.replace(done[0], phase1_batch=batch, phase1_accumulate=32 // batch,
                                  model_dropout=0.0,
                                  model_init_from_explora=False, steps=1, phase1_warmup=0.0)
        job = sv.Job((cfg, run.Ranks(0, 1, torch.device("cpu")), done[1], None, lambda *a, **k: None))
        net = sv.prepare(cfg, done[1], job.ddp)
        sv.fit_task(job, net, samples, samples, "basic", 1, tmp_path / str(batch))
        ends.append(net.state_dict())
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-6) for k in ends[0])


@pytest.mark.parametrize("objective", ["byol", "swav", "byol_swav"])
def test_other_objectives_train_a_backbone(data, done, tmp_path, objective):
    home = tmp_path / "run"
    (home / "source").mkdir(parents=True)
    shutil.copy(done[1].source_weights, home / "source")
    sv.train(config(home, data, phases="phase4a", phase4a_objective=objective, steps=2, phase4a_hidden=16,
                    phase4a_batch=8))
    a, b = (sv.ViT.load(f, 4).state_dict() for f in (sv.Paths(str(home)).explora_checkpoint,
                                                     done[1].source_weights))
    assert any(not torch.equal(a[k], b[k]) for k in a) and all(torch.isfinite(v).all() for v in a.values())


def test_peft_head_gate_and_focal_runs_train(data, done, tmp_path):
    """The other ways through phase 1: DoRA + PiSSA with the gate, then a frozen backbone with focal loss."""
    small = dict(data=str(data), phases="phase1", model_init_from_explora=False, phase1_epochs=1,
                 phase1_gate_epochs=1, steps=2)
    for name, more in (("peft", dict(phase1_mode="peft", data_augment="gate", peft_rank=4,
                                     phase1_accumulate=2, phase1_batch=8,
                                     phase1_mix=True, data_erasing=0.5, data_perturb=0.5)),
                       ("head", dict(phase1_mode="head", phase1_loss="focal", hardware_precision="bf16"))):
        home = tmp_path / name
        (home / "source").mkdir(parents=True)
        shutil.copy(done[1].source_weights, home / "source")
        sv.train(config(home, **{**small, **more}))
        paths = sv.Paths(str(home))
        net, source = sv.load_model(paths.model_best), sv.ViT.load(done[1].source_weights, 4)
        moved = [k for k, v in source.state_dict().items()
                 if not torch.allclose(net.backbone.state_dict()[k], v, atol=1e-6)]
        assert all(re.search(r"[qkvo]_proj.weight", k) for k in moved) and bool(moved) == (name == "peft")
        assert paths.gate_json.is_file() == (name == "peft") == paths.peft_adapters.is_file()
        logits = run.load_weights(paths.val_calib_logits)[0]["logits"]
        assert torch.isfinite(logits).all()


def test_gate_decision_table():
    table = [(0.5, 0.3, 0.6, 0.9, True), (0.5, 0.3, 0.48, 0.2, True), (0.5, 0.3, 0.48, 0.4, False),
             (0.5, 0.3, 0.46, 0.1, False)]
    for mcc0, fnr0, mcc1, fnr1, want in table:
        assert sv.gate_accepts(dict(val_mcc=mcc0, val_fnr=fnr0), dict(val_mcc=mcc1, val_fnr=fnr1)) is want


# --- pictures ---------------------------------------------------------------


@pytest.fixture(scope="module")
def picture():
    return streets.frame(0, 5, 0)[0]


def test_every_operation_keeps_size_at_both_ends(picture):
    for name in augment.OPS:
        table = augment.magnitudes(name, 31, 0.99, 32.0, 135.0, 0.99, 6)
        for m in (0.0,) if table is None else (float(table[0]), float(table[-1]),
                                               -float(table[-1]))[:3 if name in augment.SIGNED else 2]:
            out = augment.apply_op(picture, name, m)
            assert out.size == picture.size and out.mode == "RGB"
    assert augment.magnitudes("Posterize", 31, 0, 0, 0, 0, 6).tolist()[:9] == [8, 8, 8, 7, 7, 7, 7, 7, 6]
    assert augment.magnitudes("Posterize", 10, 0, 0, 0, 0, 4, 4).tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    x = np.asarray(augment.apply_op(picture, "TranslateX", 10))
    assert np.array_equal(x[:, 10:], np.asarray(picture)[:, :-10]) and not x[:, :10].any()


def test_brightness_and_contrast_by_table_are_the_bytes_of_pillow(picture):
    from PIL import ImageEnhance
    for m in np.linspace(-0.99, 0.99, 31):
        for name in ("Brightness", "Contrast"):
            want = getattr(ImageEnhance, name)(picture).enhance(1 + m)
            assert augment.apply_op(picture, name, m).tobytes() == want.tobytes(), (name, m)


def test_training_pictures_are_a_function_of_the_seed(picture):
    for kind in ("basic", "strong", "rand"):
        cfg = sv.Config(model_image=32, data_perturb=0.5, data_erasing=0.5)
        a, b, c = (sv.train_picture(picture, cfg, run.generator(s), kind) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a,
                                                     c) and a.shape == (3, 32, 32) and torch.isfinite(a).all()
        v = sv.simclr_views(picture, cfg, run.generator(3))
        assert v.shape == (2, 3, 32, 32) and not torch.equal(v[0], v[1])
        assert torch.equal(v, sv.simclr_views(picture, cfg, run.generator(3)))


def test_augmix_consistency_vanishes_for_equal_answers_and_trains(picture, data, done, tmp_path):
    x = torch.randn(5, 2)
    assert float(sv.jensen_shannon(torch.stack([x, x, x]))) == pytest.approx(0, abs=1e-6)
    far = torch.tensor([[[50.0, 0]], [[0, 50.0]]])              # two certain, opposite answers: ln 2
    assert float(sv.jensen_shannon(far)) == pytest.approx(math.log(2), abs=1e-4)
    v = sv.consistent_pictures(picture, sv.Config(), run.generator(0), 48)
    assert v.shape == (3, 3, 48, 48) and not torch.equal(v[0], v[1]) and not torch.equal(v[1], v[2])
    home = tmp_path / "run"
    (home / "source").mkdir(parents=True)
    shutil.copy(done[1].source_weights, home / "source")
    sv.train(config(home, data, phases="phase1", model_init_from_explora=False, phase1_js=12.0, steps=2,
                    phase1_batch=8, data_multiscale=True))
    assert np.isfinite(float(sv.Paths(str(home)).phase1_metrics.read_text().splitlines()[1].split(",")[2]))


def test_multiscale_draws_one_side_a_step_in_whole_patches(data, done):
    cfg = dataclasses.replace(done[0], data_multiscale=True)
    train = splits.Samples(splits.read_index(data), data)
    sides = {sv.batch_of(train, np.arange(2), cfg, 0, step, "basic")[0].shape[-1] for step in range(40)}
    assert sides == {48, 56, 64, 72, 80}                        # 51.2, 57.6, .. to multiples of 8


def test_strong_pictures_follow_their_settings(picture):
    make = lambda **kw: sv.train_picture(picture, sv.Config(model_image=48, **kw), run.generator(5), "strong")
    plain = make(data_trivial=False, data_augmix=False)
    assert not torch.equal(make(), plain) and torch.equal(make(data_trivial_bins=31), make())
    assert not torch.equal(make(data_trivial=False, data_augmix_severity=10), make(data_trivial=False))
    cfg = sv.Config()
    assert (cfg.data_trivial_bins, cfg.data_augmix_severity, cfg.data_augmix_width) == (31, 3, 3)


def test_augmix_stays_between_its_ends_and_erasing_within_its_share(picture):
    out = augment.aug_mix(picture, run.generator(0))
    assert out.size == picture.size and np.asarray(out).dtype == np.uint8
    x = torch.ones(3, 64, 64)
    for seed in range(50):
        share = float((augment.random_erasing(x, run.generator(seed), 1.0, (0.02, 0.33)) == 0).float().mean())
        # rounding of the sides moves the area a little
        assert 0.015 < share < 0.345
    assert x.all() and augment.random_erasing(x, run.generator(0), 0.0) is x


def test_mixing_keeps_pixels_and_targets_in_step():
    x = torch.stack([torch.full((3, 16, 16), float(k)) for k in range(4)])
    t = torch.eye(4)
    for fn in (augment.mixup, augment.cutmix):
        y, s = fn(x, t, run.generator(1))
        value = torch.arange(4.0)
        assert torch.allclose(y.mean((1, 2, 3)), s @ value,
                              atol=1e-5) and torch.allclose(s.sum(1), torch.ones(4))


def test_views_are_the_whole_and_overlapping_tiles(picture):
    wide = picture.resize((90, 60))
    samples = serving.Loose([wide])
    x, boxes = views.make_views(samples, 0, 32, overlap=0.15)
    assert x.shape == (10, 3, 32, 32) and boxes[0].tolist() == [0, 0, 90, 60]
    # round(25.5) is 26 (half to even), 64.5 is 64
    assert boxes[5].tolist() == [30 - 4, 20 - 3, 60 + 4, 40 + 3]
    assert boxes[1].tolist()[:2] == [0, 0] and boxes[9].tolist()[2:] == [90, 60]
    canvas, box = views.letterbox(wide, 120)
    assert box == (0, 20, 120, 100) and canvas.size == (120, 120)
    assert torch.allclose(x[0], views.resized(wide, 32))
    x, _ = views.make_views(serving.Loose([wide, picture]), 0, 32, source="frames")
    assert torch.equal(x[2], x[0]) and not torch.equal(x[1], x[0])


def test_street_scenes_are_reproducible_balanced_and_hold_what_they_say():
    a, fa = streets.frame(3, 7, 1)
    b, fb = streets.frame(3, 7, 1)
    assert a.tobytes() == b.tobytes() and fa == fb
    label = [streets.layout(0, k)["label"] for k in range(400)]
    assert 0.4 < np.mean(label) < 0.6                                        # 4 standard errors
    for k in range(30):
        things = {t[0] for t in streets.layout(0, k)["things"]}
        assert bool(things & set(streets.POSITIVE)) == bool(label[k])
    assert np.mean([streets.layout(0, k, "B")["night"] for k in range(200)]) > 0.45
    seen = {t[0] for k in range(400) for t in streets.layout(0, k)["things"]}
    assert seen == {*streets.POSITIVE, *streets.NEGATIVE}
    assert set(streets.POSITIVE) >= {"excavator", "fence", "worker"} and "poster" in streets.NEGATIVE


def test_every_thing_of_a_street_leaves_its_own_mark():
    marks = {}
    for kind in (*streets.POSITIVE, *streets.NEGATIVE):
        image = Image.new("RGB", (120, 120), (88, 88, 92))
        streets._thing(ImageDraw.Draw(image), kind, 60, 90, 30, lambda c: c, 0.2)
        mark = np.asarray(image) != (88, 88, 92)
        assert 60 < mark.any(2).sum() < 7000 and not mark[105:].any(), kind     # it stands on its foot point
        marks[kind] = np.asarray(image).tobytes()
    assert len(set(marks.values())) == len(marks)


# --- fusion -----------------------------------------------------------------


def test_frames_embedded_once_are_the_views_of_every_sample(data):
    samples = splits.Samples(splits.read_index(data)[:9], data)
    net = sv.Classifier(tiny_vit(), "cls_mean", "linear", 0, 0.0).eval()
    plan = dict(source="frames", canvas=0, grid=3, overlap=0.0)
    f_NVF, boxes = serving.infer(net, samples, torch.device("cpu"), 32, views=plan)
    for i in (0, 4, 8):
        x, box = views.make_views(samples, i, 32, source="frames")
        with torch.no_grad():
            assert torch.allclose(net.features(x), f_NVF[i], atol=1e-5) and torch.equal(box, boxes[i])
    alone = serving.Loose([samples.image(0)])
    f_1VF, _ = serving.infer(net, alone, torch.device("cpu"), 32, views=plan)
    assert torch.equal(f_1VF[0, 0], f_1VF[0, 2]) and torch.allclose(f_1VF[0, 0], f_NVF[0, 0], atol=1e-5)
    tiles = dict(plan, source="tiles", grid=2)
    f_NVF, boxes = serving.infer(net, samples, torch.device("cpu"), 32, views=tiles)
    assert f_NVF.shape == (9, 5, 64) and boxes.shape == (9, 5, 4)


def test_fusion_weights_sum_to_one_and_follow_permutations():
    torch.manual_seed(0)
    logits, boxes = torch.randn(4, 5, 2), torch.rand(4, 5, 4).sort(-1).values * 10
    boxes = boxes[..., [0, 1, 2, 3]]
    order = torch.tensor([3, 0, 4, 1, 2])
    for mode in sv.MODES[1:6]:
        out, w = fusion.fuse(mode, logits, boxes)
        assert torch.allclose(w.sum(1), torch.ones(4)) and out.shape == (4, 2)
        out2, w2 = fusion.fuse(mode, logits[:, order], boxes[:, order])
        assert torch.allclose(out, out2, atol=1e-6) and torch.allclose(w[:, order], w2, atol=1e-6)
    assert torch.equal(fusion.fuse("single_view", logits)[0], logits[:, 0])
    assert torch.allclose(fusion.fuse("soft_vote", logits)[0].softmax(1), logits.softmax(-1).mean(1),
                          atol=1e-6)


def test_sure_views_weigh_more_and_large_tiles_weigh_more():
    logits = torch.tensor([[[0.0, 4.0], [0.0, 0.1]]])
    for inverse in (False, True):
        _, w = fusion.fuse("weighted_uncertainty", logits, inverse=inverse)
        assert w[0, 0] > w[0, 1]
    _, w = fusion.fuse("content_aware", logits, torch.tensor([[[0, 0, 4, 4], [0, 0, 2, 2.0]]]))
    assert w[0].tolist() == pytest.approx([0.8, 0.2])


def test_flex_attention_equals_sdpa_with_the_same_bias():
    torch.manual_seed(0)
    net = fusion.FlexFusion(4, 8, latent=16, heads=2).eval()
    torch.nn.init.normal_(net.bias)
    with torch.no_grad():
        f = torch.randn(3, 4, 8)
        assert torch.allclose(net(f, flex=True)[0], net(f)[0], atol=1e-5)


def test_cvfm_starts_at_the_mean_and_trains_nothing_else():
    torch.manual_seed(0)
    f, head = torch.randn(40, 3, 8), torch.nn.Linear(8, 2)
    net = sv.Classifier(tiny_vit(), "cls", "linear", 8, 0.0)
    net.head = head
    cfg = sv.Config(phase4c_epochs=2, phase4c_hidden=8, phase4c_latent=4, phase4c_lr=1e-2)
    before = [p.clone() for p in net.parameters()]
    y = np.arange(40) % 2
    for mode in fusion.TRAINED:
        module, rows = fusion.train_fusion(mode, net, (f, None), y, cfg, lambda *_: 0.0)
        assert len(rows) == 2 and all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    module = fusion.TrainableCVFM(3, 8, 8, 4).eval()
    # rho = 0: the plain mean of features
    torch.nn.init.constant_(module.rho, -40.0)
    logits, w, _ = module(f, head)
    assert torch.allclose(logits, head(f.mean(1)),
                          atol=1e-5) and torch.allclose(w, torch.full((40, 3), 1 / 3))


# --- calibration --------------------------------------------------------------


def toy(n, T=1.0, seed=0):
    rng = np.random.default_rng(seed)
    s = rng.normal(0, 2, n)
    return expit(s * T), (rng.random(n) < expit(s)).astype(int)


def test_temperature_platt_and_beta_recover_the_truth():
    p, y = toy(20000, T=3.0)
    fit = {m: sv.CALIBRATORS[m]().fit(p, y) for m in ("temperature", "platt", "beta")}
    assert fit["temperature"].params["T"] == pytest.approx(3.0, abs=0.12)    # 3 standard errors at this n
    assert fit["platt"].params["a"] == pytest.approx(1 / 3, abs=0.02) and abs(fit["platt"].params["b"]) < 0.06
    want = expit(logit(p) / 3)
    for c in fit.values():
        assert np.abs(c(p) - want).max() < 0.05
    rising = sv.CALIBRATORS["beta"]().fit(1 - p, y)                          # labels run against the score
    assert rising.params["a"] == 0 and rising.params["b"] == 0


def test_beta_variants_and_dirichlet_recover_what_each_can_say():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 1, 40000)
    for name, w in (("beta_am", (1.7, 1.7, -0.4)), ("beta_ab", (0.6, 1.9, 0.0)),
                    ("dirichlet", (0.6, 1.9, 0.4))):
        truth = expit(w[0] * np.log(p) - w[1] * np.log(1 - p) + w[2])
        y = (rng.random(len(p)) < truth).astype(int)
        fitted = sv.CALIBRATORS[name]().fit(p, y)
        assert np.abs(fitted(p) - truth).max() < 0.02               # three standard errors at this n
        if name != "dirichlet":
            assert [fitted.params[k] for k in "abc"] == pytest.approx(w, abs=0.08)
    down = (rng.random(len(p)) < 1 - p).astype(int)                 # labels run against the score
    assert sv.CALIBRATORS["beta_am"]().fit(p, down).params["a"] == 0
    ab = sv.CALIBRATORS["beta_ab"]().fit(p, down).params
    assert ab["a"] >= 0 and ab["b"] >= 0 and ab["c"] == 0
    # Dirichlet may turn the score round: it has no sign constraint
    assert np.abs(sv.CALIBRATORS["dirichlet"]().fit(p, down)(p) - (1 - p)).max() < 0.02


def test_linear_ensemble_is_the_average_of_its_members():
    p, y = toy(500, 2.0)
    fitted = sv.CALIBRATORS["ensemble_linear"]().fit(p, y)
    q = np.stack([sv.CALIBRATORS["identity"].from_json(m)(p) for m in fitted.params["members"]])
    assert fitted(p) == pytest.approx(np.array(fitted.params["weights"]) @ q, abs=1e-12)
    assert np.all(fitted(p) <= q.max(0) + 1e-12) and np.all(fitted(p) >= q.min(0) - 1e-12)
    assert sum(fitted.params["weights"]) == pytest.approx(1)


def test_isotonic_maps_are_monotone_bounded_and_equal_block_means():
    p, y = toy(400)
    grid = np.linspace(0, 1, 501)
    for m in ("isotonic", "isotonic_pchip"):
        q = sv.CALIBRATORS[m]().fit(p, y)(grid)
        assert np.all(np.diff(q) >= -1e-12) and q.min() >= 0 and q.max() <= 1
    iso = sv.CALIBRATORS["isotonic"]().fit([0.1, 0.2, 0.2, 0.3, 0.4], [0, 1, 0, 0, 1])
    assert iso([0.1, 0.2, 0.25, 0.3, 0.4, 0.9]) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 1, 1])


@pytest.mark.parametrize("name", list(sv.CALIBRATORS))
def test_calibrators_reload_bit_for_bit_from_json(name):
    p, y = toy(300, 2.0)
    fitted = sv.CALIBRATORS[name]().fit(p, y)
    again = sv.CALIBRATORS[name].from_json(json.loads(json.dumps(fitted.to_json())))
    grid = np.linspace(0, 1, 97)
    assert type(again) is type(fitted) and np.array_equal(fitted(grid), again(grid))
    if name.startswith("ensemble"):
        w = np.array(fitted.params["weights"])
        assert len(w) == 3 and w.sum() == pytest.approx(1) and w.min() >= 0


def test_calibration_choice_names_reasons_and_never_takes_a_collapsed_method():
    p, y = toy(600, 3.0)
    z = dict(prob=p, prob_mac=np.full(600, 0.5), label=y, group=np.arange(600) // 3)
    rows, best = sv.compare_calibrators(z, 201)
    status = {r["method"]: r["status"] for r in rows}
    assert status["mac_cal"] == "rejected" and status[best] == "selected"
    assert list(status.values()).count("selected") == 1
    nll = {r["method"]: r["cv_nll"] for r in rows}
    assert nll[best] < nll["identity"]


def test_mac_cal_retention_follows_the_confidence_gap():
    values = [retention(0.9, 0.2), retention(0.6, 0.5), retention(0.9, -0.4)]
    assert values == pytest.approx([0.8, 0.5, 1.0])


def test_masked_head_averages_its_masks_and_without_any_is_the_plain_head():
    torch.manual_seed(0)
    plain = sv.make_head("mlp", 6, 8, 0.0).eval()
    f_NF = torch.randn(5, 6)
    assert torch.equal(MaskedHead(plain)(f_NF), plain(f_NF))
    head = MaskedHead(plain, 16).eval()
    head.draw(0.7, 3)
    assert head.masks.unique().tolist() == pytest.approx([0, 1 / 0.7])
    before = head.masks.clone()
    head.draw(0.7, 3)
    assert torch.equal(before, head.masks)
    answer = lambda m: plain[:-1](f_NF) @ (m * plain[-1].weight).T + plain[-1].bias
    want = sum(answer(m).softmax(1) for m in head.masks) / 16
    assert torch.allclose(head(f_NF).softmax(1), want, atol=1e-6)
    assert torch.allclose(head(f_NF).exp().sum(1), torch.ones(5), atol=1e-6)
    y = (f_NF[:, 0] > 0).long().numpy()
    rho = mac_cal(head, f_NF, y, f_NF, y, 0, epochs=2)
    assert 0.5 <= rho <= 1 and head.masks.max() == pytest.approx(1 / rho)


def test_mac_cal_masks_travel_in_the_model_file(done, data, tmp_path):
    home = tmp_path / "run"
    (home / "source").mkdir(parents=True)
    shutil.copy(done[1].source_weights, home / "source")
    sv.train(config(home, data, phases="phase1", model_init_from_explora=False, steps=1, phase1_mac_masks=4))
    paths = sv.Paths(str(home))
    net, z = sv.load_model(paths.model_best), run.load_weights(paths.val_calib_logits)[0]
    assert net.head_mac.masks.shape == (4, 2, 64)
    assert torch.allclose(net.head_mac(z["features"]), z["logits_mac"], atol=1e-6)


def test_threshold_is_the_middle_of_the_plateau():
    logit2 = lambda p: np.log(np.stack([1 - np.array(p), np.array(p)], 1))
    tau, best, m, curve = sv.select_threshold_max_mcc(logit2([0.1, 0.2, 0.7, 0.9]), [0, 0, 1, 1], 1001,
                                                      return_curve=True)
    assert best == 1 and tau == pytest.approx(0.45, abs=2e-3) and (m["tp"], m["fn"], m["fp"],
                                                                   m["tn"]) == (2, 0, 0, 2)
    assert len(curve) == 1001
    p, y = toy(500)
    tau, best, *_ = sv.select_threshold_max_mcc(logit2(p), y, 301)
    brute = max(binary_metrics(p, y, t)()["mcc"] for t in np.linspace(0, 1, 301))
    assert best == pytest.approx(brute, abs=1e-12)


# --- guarantees: simulations, with controls that must fail -------------------------


def draw(rng, rows, n, sharpen=1.0):
    s = rng.normal(0, 2.5, (rows, n))
    return expit(sharpen * s), (rng.random((rows, n)) < expit(s)).astype(int)


def scrc_trial(reps, n, xi, alpha, sharpen, seed):
    rng = np.random.default_rng(seed)
    cover, miss = np.zeros(reps), []
    pc, yc = draw(rng, reps, n)
    pt, yt = draw(rng, reps, 20, sharpen)
    tie = rng.random((2, reps, max(n, 20)))
    for i in range(reps):
        c = conformal.scrc_thresholds(pc[i], yc[i], tie[0, i, :n], xi, alpha)
        ok = conformal.accepts(pt[i], tie[1, i, :20], c["lambda1"], c["lambda1_tie"])
        cover[i] = ok.mean()
        bad = ~conformal.label_set(pt[i], c["lambda2"])[np.arange(20), yt[i]]
        miss.append((bad[ok].sum(), ok.sum()))
    miss = np.array(miss, float)
    risk = miss[:, 0].sum() / miss[:, 1].sum()
    error = np.std(miss[:, 0] - risk * miss[:, 1]) / np.sqrt(reps) / miss[:, 1].mean()
    return cover.mean(), cover.std() / np.sqrt(reps), risk, error, c["k"] / (n + 1)


def test_scrc_coverage_is_exact_and_risk_is_kept():
    cover, cover_se, risk, risk_se, want = scrc_trial(2000, 150, 0.8, 0.05, 1.0, 0)
    assert abs(cover - want) < 3 * cover_se and want >= 0.8
    # kept, and not by refusing everything
    assert risk <= 0.05 + 3 * risk_se and risk > 0.02


def test_scrc_fails_under_shift_so_the_simulation_has_power():
    """Probabilities three times too sure at test time: the calibrated sets become too small."""
    _, _, risk, se, _ = scrc_trial(600, 150, 0.8, 0.05, 3.0, 1)
    assert risk > 0.05 + 3 * se


def test_scrc_holds_with_ties():
    """Isotonic probabilities take few values; a hash of the sample orders them."""
    rng = np.random.default_rng(2)
    taken = []
    for _ in range(800):
        p, y = draw(rng, 1, 120)
        p = np.round(p[0] * 5) / 5
        tie = rng.random(120)
        c = conformal.scrc_thresholds(p[:100], y[0, :100], tie[:100], 0.7, 0.1)
        taken.append(conformal.accepts(p[100:], tie[100:], c["lambda1"], c["lambda1_tie"]).mean())
    assert abs(np.mean(taken) - math.ceil(0.7 * 101) / 101) < 3 * np.std(taken) / np.sqrt(800)


def test_pac_threshold_violates_rarely_and_the_naive_rule_often():
    rng = np.random.default_rng(3)
    grid = np.quantile(np.maximum(*(lambda p: (p, 1 - p))(draw(rng, 1, 4000)[0][0])),
                       1 - np.arange(0.3, 1.001, 0.05).clip(max=1))
    big_p, big_y = draw(rng, 1, 100_000)
    g, wrong = np.maximum(big_p[0], 1 - big_p[0]), (big_p[0] >= 0.5) != big_y[0]
    true = {float(t): wrong[g >= t].mean() for t in grid}
    broken = naive = 0
    for _ in range(400):
        p, y = draw(rng, 1, 300)
        g, w = np.maximum(p[0], 1 - p[0]), (p[0] >= 0.5) != y[0]
        t = conformal.pac_threshold(grid, g, w, 0.05, 0.1)["threshold"]
        broken += t is not None and true[t] > 0.05
        ok = [t for t in true if (g >= t).any() and w[g >= t].mean() <= 0.05]
        naive += bool(ok) and true[min(ok)] > 0.05
    assert broken / 400 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400) and naive / 400 > 0.25


def test_guarantees_by_group_hold_where_those_by_frame_break():
    """Four identical frames a group: 60 groups, not 240 samples.  By frame the risk target is broken, and the
    PAC threshold far more often than delta; by group both are kept."""
    rng = np.random.default_rng(7)
    kw = dict(xi=0.8, alpha=0.05, delta=0.1, fnr_alpha=0.05)
    grid_scores, _ = draw(rng, 1, 2000)
    big_p, big_y = draw(rng, 1, 50_000)
    sure, wrong = np.maximum(big_p[0], 1 - big_p[0]), (big_p[0] >= 0.5) != big_y[0]
    ids = np.arange(240).astype(str)
    result = {}
    for unit in ("group", "frame"):
        miss, taken, broken, said_none, reps = [], [], 0, [], 400
        for _ in range(reps):
            p, y = (np.repeat(a[0], 4) for a in draw(rng, 1, 60))
            conf = dict(label=y, group=np.repeat(np.arange(60), 4), id=rng.permutation(ids))
            c = conformal.guarantees(conf, p, grid_scores[0], 0.5, unit=unit, **kw)
            pt, yt = (a[0] for a in draw(rng, 1, 40))
            s = c["selection"]
            ok = conformal.accepts(pt, rng.random(40), s["lambda1"], s["lambda1_tie"])
            miss.append((~conformal.label_set(pt, c["risk"]["lambda2"])[np.arange(40), yt])[ok].sum())
            taken.append(ok.sum())
            t = c["pac"]["threshold"]
            broken += t is not None and wrong[sure >= t].mean() > 0.05
            said_none.append(np.mean(pt[yt == 1] < (-1 if c["fnr"]["t_lo"] is None else c["fnr"]["t_lo"])))
        risk = np.sum(miss) / np.sum(taken)
        error = np.std(np.array(miss) - risk * np.array(taken)) / math.sqrt(reps) / np.mean(taken)
        result[unit] = (risk, error, broken / reps, np.mean(said_none), np.std(said_none) / math.sqrt(reps))
        assert c["selection"]["n"] == (60 if unit == "group" else 240)
    risk, error, broken, none, none_error = result["group"]
    assert risk <= 0.05 + 3 * error and broken <= 0.1 + 3 * math.sqrt(0.09 / 400)
    assert none <= 0.05 + 3 * none_error
    assert result["frame"][2] > 0.1 + 3 * math.sqrt(0.09 / 400)             # the control has power
    assert result["frame"][0] > result["group"][0]


def test_false_negatives_by_group_average_their_frames():
    p, g = np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.7]), np.array([0, 0, 0, 1, 2, 2])
    # three groups, alpha 0.5: 0.5 (3 + 1) - 1 = 1 group may lie below; the first three frames are one group
    assert conformal.fnr_threshold(p, 0.5, g)["t_lo"] == 0.7 and conformal.fnr_threshold(p, 0.5,
                                                                                         g)["n_pos"] == 3
    assert conformal.fnr_threshold(p, 0.5)["t_lo"] == 0.3
    assert conformal.fnr_threshold(np.array([]), 0.5)["t_lo"] is None
    one = conformal.one_per_group(g, np.arange(6))
    assert g[one].tolist() == [0, 1, 2] and np.array_equal(one, conformal.one_per_group(g, np.arange(6)))


def test_false_negatives_stay_below_alpha_exactly():
    rng = np.random.default_rng(4)
    rate = []
    for _ in range(2000):
        pos = expit(rng.normal(1, 2, 120))
        t = conformal.fnr_threshold(pos[:100], 0.05)["t_lo"]
        rate.append(np.mean(pos[100:] < t))
    want = math.floor(0.05 * 101) / 101
    assert abs(np.mean(rate) - want) < 3 * np.std(rate) / np.sqrt(2000) and want <= 0.05
    assert conformal.fnr_threshold(np.full(48, 0.5),
                                   0.02)["t_lo"] is None and conformal.fnr_threshold(np.full(49, 0.5),
                                                                                     0.02)["t_lo"] == 0.5


def test_conformal_thresholds_are_monotone_symmetric_and_say_when_infeasible():
    rng = np.random.default_rng(5)
    p, y = (a[0] for a in draw(rng, 1, 80))
    tie = rng.random(80)
    lam2 = [conformal.scrc_thresholds(p, y, tie, 0.8, a)["lambda2"] for a in (0.02, 0.05, 0.1, 0.3)]
    lam1 = [conformal.scrc_thresholds(p, y, tie, xi, 0.1)["lambda1"] for xi in (0.5, 0.7, 0.9, 1.0)]
    assert lam2 == sorted(lam2, reverse=True) and lam1 == sorted(lam1, reverse=True) and lam1[-1] == -1.0
    order = rng.permutation(80)
    assert conformal.scrc_thresholds(p[order], y[order], tie[order]) == conformal.scrc_thresholds(p, y, tie)
    small = conformal.scrc_thresholds(p[:10], y[:10], tie[:10], 0.8, 0.05)
    assert small["status"] == "infeasible" and small["lambda2"] == 1.0 and conformal.label_set(p, 1.0).all()
    # an empty set is reported as both
    assert conformal.label_set(np.array([0.5]), 0.2).all()
    losses = (rng.random((50, 1)) > np.linspace(0, 1, 11)).astype(float)
    lam = conformal.crc_threshold(np.linspace(0, 1, 11), losses, 0.2)
    assert (losses[:, round(lam * 10)].sum() + 1) / 51 <= 0.2 < (losses[:, round(lam * 10) - 1].sum()
                                                                 + 1) / 51


# --- the competition -------------------------------------------------------------


def test_reward_values_of_the_subnet():
    y = np.arange(100) % 2
    assert subnet.natix_reward(y * 1.0, y) == 1 and subnet.natix_reward([-1.0], [1]) == 0
    # 0.5 rounds to 0; one class: MCC 0
    assert subnet.natix_reward(np.full(100, 0.5), y) == pytest.approx((0.5 * 0.5) ** 3)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 4000)
    pred = np.where(rng.random(4000) < 0.9, label, 1 - label) * 0.8 + 0.1
    sim = subnet.simulate_reward(pred, label, 1000)
    t = np.mean((pred > 0.5) == label)
    # the table's value at accuracy 0.90
    assert sim["mean"] == pytest.approx(0.623, abs=0.03 + 3 * abs(t - 0.9))
    assert sim["p5"] < sim["mean"] < sim["p95"]


def test_returned_number_moves_the_cut_to_one_half():
    p = np.linspace(0, 1, 1001)
    for tau in (0.0, 0.2, 0.5, 0.77, 1.0):
        out = subnet.returned(p, tau)
        assert np.array_equal(out > 0.5, p >= tau) and np.all(np.diff(out) >= 0) and not np.any(out == 0.5)
        assert np.array_equal(np.round(out), (p >= tau).astype(float))


def test_perturbations_have_their_levels(picture):
    for level in range(4):
        out = subnet.natix_perturb(picture, level, np.random.default_rng(0), 64)
        assert out.size == (64, 64) and out.mode == "RGB"
    assert np.array_equal(*(np.asarray(subnet.natix_perturb(picture, 3, np.random.default_rng(9), 64))
                            for _ in range(2)))
    still = np.asarray(subnet.natix_perturb(picture, 0, np.random.default_rng(0), 160), float)
    # a crop of the whole and one JPEG
    assert np.abs(still - np.asarray(picture, float)).mean() < 6
    with pytest.raises(ValueError):
        subnet.natix_perturb(picture, 4, None)


# --- command line ------------------------------------------------------------------


cli = functools.partial(command, "streetvision.py")


def test_mistakes_are_one_line_and_status_2(done, tmp_path):
    for words, text in ((("run", "--preset", "smok"), "did you mean 'smoke'"),
                        (("run", "--set", "phase1.epoch=3"), "phase1_epochs"),
                        (("validate", str(tmp_path / "no.json")), "no file")):
        r = cli(*words, cwd=tmp_path)
        assert r.returncode == 2 and re.match(r"streetvision.py: error: .+\n$",
                                              r.stderr) and text in r.stderr, r.stderr


def test_predict_prints_one_float_a_line(done, data, tmp_path):
    names = [str(p) for p in sorted((data / "images").glob("A*_0.jpg"))[:2]]
    r = cli("predict", "--bundle", str(done[1].bundle_json), *names, cwd=tmp_path)
    assert r.returncode == 0 and len(r.stdout.split()) == 2
    predictor = sv.RoadworkPredictor(done[1].bundle_json)
    assert float(r.stdout.split()[0]) == pytest.approx(predictor(Image.open(names[0])), abs=1e-8)


def test_settings_by_group_and_config_command(capsys):
    argv = pipeline.translate(["run", "--run", "R", "--set", "phase1.epochs=3", "phase1.mac_cal=false",
                               "--force"], sv.Config)
    command, cfg = run.parse(sv.Config, sv.PRESETS, tuple(sv.COMMANDS), argv)
    assert (command, cfg.out, cfg.phase1_epochs, cfg.phase1_mac_cal,
            cfg.force) == ("run", "R", 3, False, True)
    sv.show_config(cfg)
    shown = json.loads(capsys.readouterr().out)
    assert shown["phase1"]["epochs"] == 3 and {"data", "model", "phase4a", "peft", "phase5", "hardware",
                                               "eval"} <= set(shown)
    plain = sv.Config()
    assert (plain.phase2_n_thresholds, plain.peft_init, plain.phase4a_temperature) == (5000, "pissa", 0.1)
    sv.plan(dataclasses.replace(cfg, json=True))
    assert json.loads(capsys.readouterr().out)["params"] > 303e6


@pytest.mark.parametrize("preset", list(sv.PRESETS))
def test_every_preset_builds_without_memory(preset):
    cfg = sv.Config(**sv.PRESETS[preset]["set"])
    with torch.device("meta"):
        net = sv.build(cfg, sv.ViT.sized(cfg.model_size))
    assert net.head[0].in_features == 2 * net.backbone.D


def test_a_wrong_compile_stance_is_replaced_and_failure_runs_eagerly(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.compiler, "set_stance", set_to.append)
    monkeypatch.setattr(torch, "compile", lambda net,
                        **kw: (_ for _ in ()).throw(RuntimeError("no compiler")))
    net = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning) as warned:
        assert pipeline.maybe_compile(net, torch.zeros(1, 2), True, stance="performance") is net
    assert set_to == ["default"] and len(warned) == 2
    assert pipeline.maybe_compile(net, None, False) is net


def test_compiling_follows_its_mode(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda s: seen.append(s))
    monkeypatch.setattr(torch, "compile", lambda net, **kw: seen.append(kw) or net)
    for mode in ("default", "max-autotune"):
        pipeline.maybe_compile(torch.nn.Linear(2, 2), torch.zeros(1, 2), True, mode, "eager_on_recompile")
    assert seen == ["eager_on_recompile", dict(mode="default", fullgraph=False, dynamic=None),
                    "eager_on_recompile", dict(mode="max-autotune", fullgraph=True, dynamic=False)]


def test_logistic_probe_is_the_regression_and_prefers_the_better_penalty():
    rng = np.random.default_rng(0)
    f = rng.normal(size=(600, 5)) * [1, 10, 0.1, 1, 1] + [0, 50, 0, 0, 3]
    y = (rng.random(600) < expit(f[:, 0] - 0.2 * (f[:, 1] - 50))).astype(int)
    linear = torch.nn.Linear(5, 2)
    chosen = probe.fit_probe(linear, (f[:400], y[:400]), (f[400:], y[400:]))
    with torch.no_grad():
        prob = linear(torch.from_numpy(f).float()).softmax(1)[:, 1].numpy()
    best = f[:, 0] - 0.2 * (f[:, 1] - 50) > 0                   # Bayes' answer; 400 noisy labels come near it
    assert np.mean((prob > 0.5) == best) > 0.9
    w, b = probe.logistic(f[:, :1], y, 1e-9)
    z = f[:, 0] * w[0] + b                                      # at the optimum the slopes vanish
    assert abs(np.mean((expit(z) - y) * f[:, 0])) < 1e-4 and abs(np.mean(expit(z) - y)) < 1e-4
    assert 0 < chosen["threshold"] < 1


def test_scores_on_shared_resamples_equal_those_one_at_a_time():
    p, y = toy(120)
    q, g = p ** 2, np.arange(120) // 3
    both = scorecard.Resampled({"p": (p, 0.5), "q": (q, 0.4), "again": (p, 0.5)}, y, g, 100, 1,
                               {"d": [("p", "q")]})
    assert both.score("p") == scorecard.score(p, y, 0.5, g, 100, 1) == both.score("again")
    assert both.pair("d") == scorecard.paired((p, 0.5), (q, 0.4), y, g, 100, 1)
    low = scorecard.Resampled({"p": (p, 0.5), "low": (p, 0.2)}, y, g, 100, 1)
    assert low.score("low") == scorecard.score(p, y, 0.2, g, 100, 1)        # counts alone are computed anew
    assert both.pair("d")["mcc"]["diff"] == pytest.approx(both.score("p")["metrics"]["mcc"]
                                                          - both.score("q")["metrics"]["mcc"], abs=1e-9)


def test_no_pickle_is_read_anywhere():
    for f in [ROOT / "streetvision.py", *(ROOT / "common" / "street").glob("*.py")]:
        text = f.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|joblib|dill)\b", text, re.M)
        assert all("weights_only=True" in line for line in text.splitlines() if "torch.load(" in line)
