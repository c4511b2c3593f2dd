"""common/run.py, flags.py, runlog.py, ckpt.py: what a user can do wrong, and a crash at any moment."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest
import torch

from common import ckpt, run, runlog

ROOT = pathlib.Path(__file__).parents[1]
ONE = run.Ranks(0, 1, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = run.opt("small", "named settings")
    out: str = run.opt("", "run directory")
    steps: int = run.opt(10, "optimizer steps")
    lr: float = run.opt(1e-3, "peak learning rate")
    ema: bool = run.opt(True, "keep an average")
    taus: tuple = run.opt((0.02, 0.2), "temperatures")
    limit: int | None = run.opt(None, "stop early")
    mode: str = run.opt("xy", "normalisation", choices=("xy", "y", "none"))
    files: tuple = run.opt((), "inputs", positional=True)
    device: str = run.opt("auto", "cpu or cuda")
    wandb: str = run.opt("", "project")


PRESETS = {"small": dict(paper="-", expect={}, set=dict(steps=3)),
           "table8_l2": dict(paper="table 8, column L/2", expect=dict(fid=1.54),
                             set=dict(steps=200_000, lr=4e-4))}


def parse(*argv):
    return run.parse(Config, PRESETS, ("train", "sample"), list(argv))


# --- flags -------------------------------------------------------------------


def test_flags_beat_presets_and_presets_beat_defaults():
    command, cfg = parse("--preset", "table8_l2", "--lr", "0.5")
    assert (command, cfg.steps, cfg.lr, cfg.ema) == ("train", 200_000, 0.5, True)


@dataclasses.dataclass(frozen=True)
class Filed(Config):
    config: str = run.opt("", "JSON file of flags", free=True)


def parse_file(path, content, *more):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return run.parse(Filed, PRESETS, ("train",), ["--config", str(path), *more])[1]


def test_a_config_file_stands_between_preset_and_flags(tmp_path):
    body = dict(preset="table8_l2", lr=1, taus=[1.0, 2.0], limit=None, ema=False)
    cfg = parse_file(tmp_path / "c.json", body, "--mode", "y")
    assert (cfg.steps, cfg.lr, cfg.taus, cfg.limit, cfg.ema, cfg.mode) == \
        (200_000, 1.0, (1.0, 2.0), None, False, "y")
    assert parse_file(tmp_path / "c.json", body, "--lr", "3", "--preset", "small").lr == 3
    saved = dict(config=dataclasses.asdict(cfg), argv=["x"])                # a run's own config.json
    again = parse_file(tmp_path / "c.json", saved)
    assert dataclasses.replace(again, config="") == dataclasses.replace(cfg, config="", files=())


@pytest.mark.parametrize("content, says", [
    (dict(stepz=3), "did you mean 'steps'"), (dict(steps="3"), 'steps takes int, not "3"'),
    (dict(steps=True), "steps takes int, not true"),
    (dict(limit=1.5), "limit takes int or NoneType, not 1.5"),
    (dict(mode="z"), "mode in"), ([1], "expected a JSON object"), ("{", "not JSON")])
def test_a_wrong_config_file_is_named(tmp_path, content, says):
    with pytest.raises(run.UserError, match=says):
        parse_file(tmp_path / "c.json", content)


def test_every_kind_of_field_parses():
    command, cfg = parse("sample", "a.png", "b.png", "--no-ema", "--taus", "1,2.5", "--limit", "1e3",
                         "--mode=y")
    assert (command, cfg.files, cfg.ema, cfg.taus, cfg.limit, cfg.mode) == \
        ("sample", ("a.png", "b.png"), False, (1.0, 2.5), 1000, "y")
    assert parse("--limit", "none")[1].limit is None


@pytest.mark.parametrize("argv, said", [
    (["--preset", "table8_l"], "unknown preset 'table8_l'; did you mean 'table8_l2'?"),
    (["--stepz", "3"], "unknown flag '--stepz'; did you mean '--steps'?"),
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["--steps", "many"], "--steps takes int, not 'many'"),
    (["--mode", "xyz"], "unknown --mode 'xyz'; did you mean 'xy'?"),
    (["--steps"], "expected one argument"),
])
def test_a_wrong_flag_is_one_line_with_a_way_out(argv, said):
    with pytest.raises(run.UserError, match="^[^\n]*$") as error:
        parse(*argv)
    assert said in str(error.value)


def test_help_lists_presets_with_their_paper_rows(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "table 8, column L/2, fid 1.54" in text and "--lr" in text and "peak learning rate [0.001]" in text


def test_default_out_is_named_after_script_and_preset():
    assert parse()[1].out.endswith("small") and parse("--out", "x")[1].out == "x"


# --- seeds -------------------------------------------------------------------


def test_noise_depends_on_seed_rank_and_step_only():
    def draw(*key):
        run.seed_all(*key)
        return torch.randn(3).tolist() + np.random.rand(2).tolist()
    assert draw(1, 0, 5) == draw(1, 0, 5)
    assert len({tuple(draw(*key)) for key in [(1, 0, 5), (1, 0, 6), (1, 1, 5), (2, 0, 5), (5, 0, 1)]}) == 5


def test_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(run.UserError, match="--batch 100 does not divide over 8 ranks; try 96"):
        run.per_rank(100, run.Ranks(0, 8, torch.device("cpu")), "--batch")


# --- checkpoints -----------------------------------------------------------------


def model_and_optimizer():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    net[1].weight = torch.nn.Parameter(net[0].weight.t())       # shared storage, not contiguous
    optim = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optim.step()
    return net, optim


def test_state_round_trips_bit_for_bit(tmp_path):
    net, optim = model_and_optimizer()
    bank = dict(ring=torch.arange(6), half=torch.randn(3).bfloat16(), at={3: (1, [2.5, None])},
                count=np.arange(3))
    ckpt.save(tmp_path, 7, dict(net=net, optim=optim), ONE, dict(bank=bank))
    net2, optim2 = model_and_optimizer()
    bank2 = {}
    assert ckpt.load(tmp_path, dict(net=net2, optim=optim2), ONE, dict(bank=bank2)) == 7
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), net2.parameters()))
    for a, b in zip(optim.state.values(), optim2.state.values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(bank2["ring"], bank["ring"]) and torch.equal(bank2["half"], bank["half"])
    assert bank2["at"] == {3: (1, [2.5, None])} and bank2["count"].dtype == np.int64


def test_newest_two_are_kept_and_a_damaged_newest_falls_back(tmp_path, capsys):
    state = dict(x=torch.zeros(100))
    for step in (1, 2, 3):
        state["x"] += 1
        ckpt.save(tmp_path, step, dict(s=state), ONE)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["00000002", "00000003"]
    path = tmp_path / "ckpt/00000003/s.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1                                               # one flipped bit
    path.write_bytes(data)
    assert ckpt.verify(path.parent) == ["s.safetensors does not match its hash"]
    assert ckpt.load(tmp_path, dict(s=state), ONE) == 2 and state["x"][0] == 2
    assert "using the one before" in capsys.readouterr().err
    ckpt.save(tmp_path, 3, dict(s=state), ONE)                  # the good one must outlive the damaged one
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["00000002", "00000003"]


@pytest.mark.parametrize("harm", ["truncate", "remove", "meta", "other step", "no step"])
def test_any_missing_or_short_file_is_noticed(tmp_path, harm):
    state = dict(x=torch.zeros(100))
    for step in (1, 2):
        ckpt.save(tmp_path, step, dict(s=state), ONE)
    folder = tmp_path / "ckpt/00000002"
    if harm == "truncate":
        os.truncate(folder / "s.safetensors", 50)
    elif harm == "remove":
        (folder / "s.json").unlink()
    else:
        whole = (folder / "meta.json").read_text()
        text = {"meta": "{", "other step": whole.replace('"step": 2', '"step": 3'),
                "no step": whole.replace('"step"', '"stop"')}[harm]
        assert text != whole
        (folder / "meta.json").write_text(text)
    assert ckpt.load(tmp_path, dict(s=state), ONE) == 1


def test_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    state = dict(x=torch.ones(10))
    ckpt.save(tmp_path, 1, dict(s=state), ONE)
    monkeypatch.setattr(ckpt.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ckpt.save(tmp_path, 2, dict(s=state), ONE)
    monkeypatch.undo()
    assert ckpt.load(tmp_path, dict(s=state), ONE) == 1
    assert not list((tmp_path / "ckpt").glob("*.tmp"))


def test_full_disk_keeps_the_old_checkpoint_and_says_what_to_do(tmp_path, monkeypatch):
    state = dict(x=torch.ones(10))
    ckpt.save(tmp_path, 1, dict(s=state), ONE)
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(ckpt, "save_file", full)
    with pytest.raises(run.UserError, match="no space left .* free some space and run the same command"):
        ckpt.save(tmp_path, 2, dict(s=state), ONE)
    monkeypatch.undo()
    assert ckpt.load(tmp_path, dict(s=state), ONE) == 1


def test_a_checkpoint_of_another_size_is_one_line(tmp_path):
    ckpt.save(tmp_path, 1, dict(net=torch.nn.Linear(2, 2)), ONE)
    with pytest.raises(run.UserError, match="^[^\n]*does not fit this model[^\n]*$"):
        ckpt.load(tmp_path, dict(net=torch.nn.Linear(3, 2)), ONE)


def test_weights_carry_their_config_and_a_short_file_is_refused(tmp_path):
    path = tmp_path / "ema.safetensors"
    run.save_weights(path, {"w": torch.ones(4, 4).t()}, dict(config=dict(width=8), step=3))
    tensors, meta = run.load_weights(path)
    assert meta["config"]["width"] == 8 and tensors["w"].shape == (4, 4)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(run.UserError, match="not a whole safetensors file"):
        run.load_weights(path)


def test_one_wrong_bit_anywhere_in_weights_is_never_read_as_weights(tmp_path):
    path = tmp_path / "ema.safetensors"
    run.save_weights(path, {"w": torch.arange(6.0)}, dict(config=dict(width=8)))
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            tensors, meta = run.load_weights(path)
        except run.UserError:
            continue
        # only the seal's own name may go unnoticed: it holds neither weights nor config
        assert torch.equal(tensors["w"], torch.arange(6.0)) and meta["config"] == dict(width=8)


# --- the log of a run --------------------------------------------------------------


def rows(out):
    return [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]


def test_log_writes_header_config_source_and_nulls(tmp_path):
    cfg = parse("--out", str(tmp_path / "r"))[1]
    log = run.Log(cfg, ONE, data=dict(train="abc"))
    log("train", step=1, loss=float("nan"), m=torch.tensor(2.0), each={"a": np.float32(1)})
    log.finish()
    header, line = rows(cfg.out)
    assert header["kind"] == "header" and header["config"]["steps"] == 3 and header["world"] == 1
    for key in ("python", "torch", "cpu", "cpus", "ram_gb", "disk_free_gb", "gpu", "threads", "host_sha256"):
        assert key in header["env"]
    assert (line["step"], line["loss"], line["m"], line["each"]) == (1, None, 2.0, {"a": 1.0})
    assert json.loads((tmp_path / "r/config.json").read_text())["code_sha256"] == header["code_sha256"]
    assert (tmp_path / "r/test_run.py").read_bytes() == pathlib.Path(__file__).read_bytes()
    text = (tmp_path / "r/RUN.md").read_text()
    assert "finished" in text and header["code_sha256"] in text and "data: train | abc" in text


def test_another_config_in_the_same_directory_is_refused(tmp_path):
    run.Log(parse("--out", str(tmp_path))[1], ONE).finish()
    with pytest.raises(run.UserError, match="holds a run with lr = 0.001, not 0.5"):
        run.Log(parse("--out", str(tmp_path), "--lr", "0.5")[1], ONE)
    run.Log(parse("--out", str(tmp_path), "--device", "cpu")[1], ONE).finish()     # where it runs may change


def test_two_processes_on_one_run_directory_are_refused(tmp_path):
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    cfg = parse("--out", str(tmp_path))[1]
    with pytest.raises(run.UserError, match="in use by another process"):
        run.Log(cfg, ONE)
    other.communicate(b"\n")
    run.Log(cfg, ONE).finish()


def test_workers_that_outlive_a_killed_run_do_not_hold_its_directory(tmp_path):
    log = run.Log(parse("--out", str(tmp_path))[1], ONE)
    if not (child := os.fork()):                                # as a loader's worker is made
        time.sleep(60)
        os._exit(0)
    log.lock.close()                                            # what the kernel does for the killed parent
    free = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    try:
        assert subprocess.run([sys.executable, "-c", free, str(tmp_path / ".lock")]).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(run.UserError, match="this run needs 1000000000.0 GB"):
        run.Log(parse("--out", str(tmp_path))[1], ONE, need_gb=1e9)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path):
    cfg = parse("--out", str(tmp_path))[1]
    run.Log(cfg, ONE).finish()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "time_s": 9, "st')
    log = run.Log(cfg, ONE)
    log("train", step=2)
    log.finish()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in (lines[0], *lines[2:])] == ["header", "header", "train"]


def test_one_changed_byte_changes_the_fingerprint_and_git_is_not_needed(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common/a.py").write_text("x = 1\n")
    (tmp_path / "s.py").write_text("y = 1\n")
    before = runlog.code_fingerprint(tmp_path / "s.py")
    again = runlog.code_fingerprint(tmp_path / "s.py")
    assert before["commit"] is None and before["code_sha256"] == again["code_sha256"]
    (tmp_path / "common/a.py").write_text("x = 2\n")
    after = runlog.code_fingerprint(tmp_path / "s.py")
    assert after["code_sha256"] != before["code_sha256"]
    (tmp_path / "common/part").mkdir()
    (tmp_path / "common/part/b.py").write_text("z = 1\n")          # folders of common/ count too
    assert runlog.code_fingerprint(tmp_path / "s.py")["code_sha256"] != after["code_sha256"]


def test_wandb_is_optional_and_receives_the_lines_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)             # not installed
    cfg = parse("--out", str(tmp_path / "a"), "--wandb", "p")[1]
    with pytest.raises(run.UserError, match="pip install wandb"):
        run.Log(cfg, ONE)
    got = []
    fake = types.SimpleNamespace(init=lambda **k: types.SimpleNamespace(
        log=lambda row, step: got.append((step, row["loss"])),
                                                                        finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = run.Log(parse("--out", str(tmp_path / "b"), "--wandb", "p")[1], ONE)
    log("train", step=4, loss=0.5)
    log.finish()
    assert got == [(4, 0.5)]


def test_a_loss_that_is_not_finite_names_the_step():
    run.check_finite(3, loss=1.0)
    with pytest.raises(run.UserError, match="loss is nan at step 3"):
        run.check_finite(3, loss=torch.tensor(float("nan")))


# --- whole processes --------------------------------------------------------------

SCRIPT = textwrap.dedent('''
    """A script of the house, reduced to its plumbing."""
    import dataclasses, time, torch
    from common import run

    @dataclasses.dataclass(frozen=True)
    class Config:
        preset: str = run.opt("tiny", "named settings")
        out: str = run.opt("", "run directory")
        seed: int = run.opt(0, "seed")
        steps: int = run.opt(40, "steps")
        batch: int = run.opt(4, "batch, all ranks together")
        pause_s: float = run.opt(0.0, "sleep a step", free=True)
        device: str = run.opt("cpu", "device")

    def train(cfg):
        ddp = run.init(cfg.device)
        run.per_rank(cfg.batch, ddp, "--batch")
        run.seed_all(cfg.seed)
        net = torch.nn.Linear(4, 4)
        optim = torch.optim.Adam(net.parameters(), lr=0.1)
        bank = dict(sum=torch.zeros(()))
        log = run.Log(cfg, ddp)
        start = run.load(cfg.out, dict(net=net, optim=optim), ddp, dict(bank=bank))
        for step in run.progress(start, cfg.steps, ddp):
            run.seed_all(cfg.seed, ddp.rank, step)
            loss = (net(torch.randn(8, 4)) - 1).square().mean()
            optim.zero_grad(); loss.backward()
            for p in net.parameters():
                p.grad.copy_(run.all_mean(p.grad, ddp))
            optim.step()
            bank["sum"] += torch.randn(())
            log("train", step=step, loss=run.all_mean(float(loss), ddp))
            time.sleep(cfg.pause_s)
            run.save_if_due(cfg.out, step, cfg.steps, 5, dict(net=net, optim=optim), ddp, dict(bank=bank))
        if ddp.rank == 0:
            meta = dict(config=dataclasses.asdict(cfg))
            run.save_weights(cfg.out + "/ema.safetensors", net.state_dict(), meta)
        log.finish()

    if __name__ == "__main__":
        run.main(Config, {"tiny": dict(paper="-", expect={}, set={})}, {"train": train})
''')


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(SCRIPT)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    def start(*argv, ranks=0):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        return subprocess.Popen([sys.executable, *launch, str(path), *argv], env=env, cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start


def weights(tmp_path, out):
    tensors, _ = run.load_weights(tmp_path / out / "ema.safetensors")
    bank, _ = run.load_weights(tmp_path / out / "ckpt/00000040/bank.rank0.safetensors")
    return {**tensors, **bank}


def wait_for_steps(path, n, process):
    for _ in range(2400):                       # two minutes: other work may share the machine
        if path.exists() and path.read_text().count('"kind": "train"') >= n:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the script did not start")


def test_kill_and_ctrl_c_then_the_same_command_ends_bit_equal(script, tmp_path):
    assert script("--out", "straight").wait() == 0
    process = script("--out", "broken", "--pause-s", "0.05")
    wait_for_steps(tmp_path / "broken/log.jsonl", 12, process)
    process.kill()                                              # SIGKILL: nothing was warned
    process.wait()
    process = script("--out", "broken", "--pause-s", "0.05")
    wait_for_steps(tmp_path / "broken/log.jsonl", 20, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "the same command continues" in err and "Traceback" not in err
    assert script("--out", "broken").wait() == 0
    a, b = weights(tmp_path, "straight"), weights(tmp_path, "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_ranks_run_save_their_own_state_and_refuse_an_odd_batch(script, tmp_path):
    process = script("--out", "two", "--steps", "6", ranks=2)
    assert process.wait() == 0, process.communicate()[1]
    names = {p.name for p in (tmp_path / "two/ckpt/00000006").iterdir()}
    assert {"bank.rank0.safetensors", "bank.rank1.safetensors", "net.safetensors", "meta.json"} <= names
    assert [r["step"] for r in rows(tmp_path / "two") if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    process = script("--out", "odd", "--batch", "3", ranks=2)
    _, err = process.communicate()
    assert process.returncode != 0 and err.count("--batch 3 does not divide over 2 ranks; try 2") == 1


@pytest.mark.parametrize("argv, said", [(["--stepz", "1"], "did you mean '--steps'?"),
                                        (["--device", "tpu"], "unknown --device 'tpu'"),
                                        (["--out", "/proc/nowhere"], "/proc/nowhere")])
def test_a_mistake_is_one_line_and_exit_2(script, argv, said):
    process = script(*argv)
    _, err = process.communicate()
    assert process.returncode == 2 and err.startswith("tiny.py: error: ") and said in err
    assert len(err.strip().splitlines()) == 1


def test_equal_weights_are_equal_bytes(tmp_path):
    meta = {f"key{i}": "é" * i for i in range(8)}
    files = []
    for i in range(6):                                  # unsorted, two of six would be equal once in 8! draws
        run.save_weights(tmp_path / f"{i}.safetensors", {"w": torch.arange(3.0)}, meta)
        files.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(files)) == 1 and run.load_weights(tmp_path / "0.safetensors")[1] == meta
