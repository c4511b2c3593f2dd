"""Drills on whole runs: killed, damaged, out of disk, started twice (for eval.drills).

A run is a forked child that executes SCRIPT.py as __main__ under its own sys.argv: the command itself,
without the seconds that importing torch takes and in which nothing is written.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from common.ckpt import verify
from common.run import UserError, load_weights
from eval._drill_worker import harm, rng_of
from eval._forked import become
from eval._shared import ROOT, as_flags, load, read_log

TIMEOUT_S = 300
# The smallest run of each script that still writes everything; DATA stands for what `inputs` makes.
DRIFT = dict(
    preset="smoke", data="DATA", fit="crop", width=16, heads=2, classes=4, context=2, style_tables=2,
    style_codes=4, mae_width=16, mae_blocks=(1, 2, 1, 1), mae_groups=4, mask_cell=1, mae_steps=4, mae_batch=8,
    mae_warmup=2, mae_ema=0.5, cls_steps=2, cls_warmup=1, labels=4, gen=3, pos=3, unc=2, push=8, fill=16,
    bank=6, bank_unc=10, lr=1e-3, warmup=2, steps=6, ema=(0.5, 0.9), save_every=2, keep_every=2,
    grid_every=100, log_every=1, count=8, alphas=(1.0,), judge_epochs=1, then_evaluate=False)
TINY = {
    "drift_toy": dict(preset="smoke", steps=12, save_every=3, pictures=False, count=64),
    "drift_latent": dict(DRIFT, image_size=16, colors=1, codec="pca", size=8, channels=4, patch=2, depth=1,
                         mae_fold=1, mae_crop=False),
    "drift_pixel": dict(DRIFT, size=16, channels=1, augment="none", patch=4, depth=2, mae_fold=2),
    "dit_t2i": dict(preset="smoke", train_steps=6, vae_steps=4, pool=32, width=16, depth=1, text_depth=1,
                    vae_width=8, vae_batch=4, batch=4, warmup=2, eval_every=6, sample_steps=2, save_every=2),
    "hope_lm": dict(preset="smoke", data="DATA", width=16, heads=2, depth=1, length=16, batch=4, chunk=8,
                    chunk_self=8, steps=8, eval_every=4, eval_rows=2, save_every=2, log_every=1),
    "beta_vae_arc": dict(preset="smoke", width=16, prior_width=16, prior_depth=1, bf16=False, steps=30,
                         batch=8, n=400, warmup=2),
    "streetvision": dict(preset="smoke", scenes=40, size=64, shift_scenes=3, source_steps=3, phase4a_epochs=1,
                         phase4a_batch=16, phase1_epochs=2, phase1_batch=64, phase4c_epochs=1,
                         phase2_n_thresholds=101, eval_resamples=60, eval_windows=20)}
TRAIN = {"streetvision": "run"}  # where it is not called train


def inputs(folder):
    """The data of the tiny runs: {script: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, label = np.random.default_rng(0), np.arange(96) % 4
    x = 40 * label[:, None, None] + rng.uniform(0, 60, (96, 16, 16))
    x = x.clip(0, 255).astype(np.uint8)
    np.savez(folder / "tiny.npz", train_images=x[:64], train_labels=label[:64], test_images=x[64:],
             test_labels=label[64:])
    (folder / "story.txt").write_text("once there was a fox who read a book about a dog. " * 60)
    return dict(drift_latent=folder / "tiny.npz", drift_pixel=folder / "tiny.npz",
                hope_lm=folder / "story.txt")


class Script:
    """A script under its tiny flags, in a folder of its own."""

    def __init__(self, name, folder):
        self.name, self.folder, self.path = name, Path(folder), ROOT / f"{name}.py"
        fields = {f.name for f in load(self.path).Config.__dataclass_fields__.values()}
        data = inputs(self.folder / "data")
        tiny = {k: v for k, v in dict(TINY[name], device="cpu").items() if k in fields}
        if tiny.get("data"):
            tiny["data"] = str(data[name])
        self.flags = as_flags({k: ",".join(map(str, v)) if isinstance(v, tuple) else v
                               for k, v in tiny.items()})
        self.train = TRAIN.get(name, "train")

    def log_of(self, out):
        """Where a run says things: not inside it, and not on its disk."""
        return self.folder / f"{Path(out).name}.log"

    def start(self, out, command=None, ranks=1):
        """Fork the ranks of a command -> their pids; what they say goes to log_of(out)."""
        port, pids = free_port(), []
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                self._child(out, command or self.train, rank, ranks, port)
            pids.append(pid)
        return pids

    def _child(self, out, command, rank, ranks, port):
        os.setpgid(0, 0)
        log = os.open(self.log_of(out), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        become(self.path, [command, *self.flags, "--out", out], log, log, ranks, rank, port)

    def run(self, out, command=None, ranks=1):
        """(exit status of rank 0, what was said); status None when it hung."""
        self.log_of(out).unlink(missing_ok=True)
        status = wait(self.start(out, command, ranks))
        return status, self.log_of(out).read_text(errors="replace")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(pids, until=TIMEOUT_S):
    """Exit status of the first pid once all ended; None, and all killed, after `until` seconds."""
    left, first, end = list(pids), None, time.time() + until
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                first = os.waitstatus_to_exitcode(status) if pid == pids[0] else first
        if left and time.time() > end:
            kill(left)
            return None
        time.sleep(0.002 if left else 0)
    return first


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def alive(pids):
    """True while every one of them runs; asks without reaping."""
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return all(os.waitid(os.P_PID, pid, look) is None for pid in pids)


def tensors_of(out):
    """{file: SHA-256 of names, shapes and bits} of all final weights of a run; a damaged file says so."""
    found = {}
    for path in sorted(Path(out).rglob("*.safetensors")):
        if "ckpt" in path.relative_to(out).parts:
            continue
        try:
            tensors, _ = load_weights(path)
        except UserError:
            found[str(path.relative_to(out))] = "damaged"
            continue
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
            digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found[str(path.relative_to(out))] = digest.hexdigest()
    return found


def last_eval(out):
    """The numbers of the last line that evaluation wrote, but for times and speeds."""
    rows = [r for r in read_log(Path(out) / "log.jsonl")[0]
            if str(r.get("kind")).startswith(("eval", "score", "test"))]

    def keep(key):
        return not any(word in key for word in ("time", "_s", "_ms", "mem", "date"))
    return json.dumps({k: v for k, v in rows[-1].items() if keep(k)}, sort_keys=True) if rows else None


def polite(status, said, ok=(0, 2)):
    """None when a command ended as it should: 0, or 2 with one line; else what it did."""
    if status is None:
        return "hang"
    if "Traceback" in said:
        return f"traceback: {said.strip().splitlines()[-1][:200]}"
    if status not in ok:
        return f"status {status}: {said.strip()[-200:]}"
    if status == 2 and sum("error: " in line for line in said.splitlines()) != 1:
        return f"{said.count('error: ')} error lines: {said.strip()[-200:]}"
    return None


# --- (a) killed ------------------------------------------------------------------------


def killed(script, kills, ranks, seed):
    """SIGKILL at random moments, up to three times a run, then to its end: the bits of an undisturbed run."""
    rng, failures, done, late = rng_of(seed, script.name, ranks), [], 0, 0
    began = time.time()
    status, said = script.run(script.folder / "straight", ranks=ranks)
    length, want = time.time() - began, tensors_of(script.folder / "straight")
    if status or not want:
        return dict(kills=0, failed=1, failures=[f"the undisturbed run: status {status}: {said[-300:]}"])
    moments = []
    while done < kills:
        out = script.folder / f"killed{done}"
        for _ in range(min(int(rng.integers(1, 4)), kills - done)):
            pids, moment = script.start(out, ranks=ranks), float(rng.uniform(0, length))
            time.sleep(moment)
            done, late = done + 1, late + (not alive(pids))
            kill(pids)
            moments.append(round(moment, 3))
        status, said = script.run(out, ranks=ranks)
        got = tensors_of(out)
        if polite(status, said, ok=(0,)) or got != want:
            wrong = [n for n in want if got.get(n) != want[n]]
            what = polite(status, said, ok=(0,)) or f"other bits in {wrong}"
            failures.append(f"killed at {moments[-3:]} s: {what}")
        shutil.rmtree(out, ignore_errors=True)
    return dict(ranks=ranks, kills=done, already_finished=late, undisturbed_s=round(length, 2),
                failed=len(failures), failures=failures[:10])


# --- (b) damaged -----------------------------------------------------------------------


def damaged(script, most, seed):
    """Each file of a finished run flipped, cut, deleted, then trained or evaluated: recovered or refused."""
    whole = script.folder / "whole"
    for command in (script.train, "evaluate"):
        status, said = script.run(whole, command)
        if status:
            failure = f"{command} of an undamaged run: status {status}: {said[-300:]}"
            return dict(cases=0, failed=1, failures=[failure])
    want, scores = tensors_of(whole), last_eval(whole)
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*"))
             if p.is_file() and "data" not in p.parts and p.name != ".lock"]
    cases = [(f, kind, n % 2) for n, f in enumerate(files) for kind in ("flip", "truncate", "delete")]
    cases = [cases[i] for i in sorted(rng_of(seed, script.name).permutation(len(cases))[:most])]
    counts, failures = dict(recovered=0, refused=0), []
    for file, kind, again in cases:
        out = script.folder / "hurt"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        harm(out / file, kind, rng_of(seed, file, kind))
        command = script.train if again else "evaluate"
        status, said = script.run(out, command)
        wrong = polite(status, said)
        got = tensors_of(out) if again else want
        other = [n for n in want if got.get(n) != want[n]]
        if other == [str(file)] and file.stem.isdigit() and got.get(str(file)) in (None, "damaged"):
            other = []                          # weights of an earlier step: gone, and readers say so
        if not wrong and status == 0 and other:
            wrong = f"WRONG: other weights in {other}"
        if not wrong and status == 0 and not again and last_eval(out) != scores:
            wrong = f"WRONG: other scores {last_eval(out)}, not {scores}"
        if wrong:
            failures.append(f"{file} {kind}, then {command}: {wrong}"[:600])
        else:
            counts["refused" if status == 2 else "recovered"] += 1
    return dict(files=len(files), cases=len(cases), **counts, failed=len(failures), failures=failures[:20])


# --- (d) no space left, (e) started twice ------------------------------------------------


def full_disk(script, seed):
    """The disk fills up after the first checkpoint: the line says so, checkpoints are whole, and with space
    again the same command ends in the bits of an undisturbed run."""
    if os.geteuid() != 0:
        return dict(skipped="mounting a small disk needs root")
    disk = script.folder / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768m", "tmpfs", str(disk)],
                           capture_output=True, text=True)
    if mount.returncode:
        return dict(skipped=f"mount: {mount.stderr.strip()}")
    try:
        script.run(script.folder / "roomy")
        out = disk / "run"
        for _ in range(5):                      # a busy machine may let a tiny run end before it is stopped
            shutil.rmtree(out, ignore_errors=True)
            script.log_of(out).unlink(missing_ok=True)
            pids, end = script.start(out), time.time() + TIMEOUT_S
            saved = lambda: any(p.name.isdigit() for p in out.rglob("ckpt/*"))  # noqa: E731
            while not saved() and alive(pids) and time.time() < end:
                time.sleep(0.001)
            if alive(pids):
                os.kill(pids[0], signal.SIGSTOP)
                break
            wait(pids)
        else:
            return dict(skipped="the run ended before the disk could be filled, five times")
        for block in (bytes(1 << 20), bytes(4096)):         # to the last page
            with open(disk / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(block)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[0], signal.SIGCONT)
        status = wait(pids)
        said = script.log_of(out).read_text(errors="replace")
        broken = [f"{c.name}: {bad[0]}" for c in sorted(out.rglob("ckpt/*"))
                  if c.name.isdigit() and (bad := verify(c))]
        (disk / "filler").unlink()
        again, word = script.run(out)
        same = tensors_of(out) == tensors_of(script.folder / "roomy")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    failures = [f"checkpoint {b}" for b in broken]
    failures += [] if status == 2 else [f"status {status} on a full disk: {said[-300:]}"]
    failures += [p] if (p := polite(status, said)) else []
    failures += [] if "pace" in said and "free" in said else [f"the message names no way out: {said[-200:]}"]
    if again or not same:
        failures.append(f"with space again: status {again}, same bits {same}: {word[-200:]}")
    return dict(said=said.strip()[-250:], failed=len(failures), failures=failures)


def twice(script, seed):
    """A second process on the same run directory is refused, and does the first one no harm."""
    script.run(script.folder / "alone")
    out = script.folder / "both"
    first, end = script.start(out), time.time() + TIMEOUT_S
    while not list(out.rglob("log.jsonl")) and alive(first) and time.time() < end:
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(first[0], signal.SIGSTOP)  # so that it is still there when the second one comes
    script.log_of(out).rename(script.folder / "first.log")
    second, said = script.run(out)
    with contextlib.suppress(ProcessLookupError):
        os.kill(first[0], signal.SIGCONT)
    status = wait(first)
    refused = second == 2 and "in use by another process" in said
    failures = [] if refused else [f"second: status {second}: {said[-300:]}"]
    same = tensors_of(out) == tensors_of(script.folder / "alone")
    failures += [] if status == 0 and same else [f"first: status {status}, same bits {same}"]
    return dict(said=said.strip()[-250:], failed=len(failures), failures=failures)
