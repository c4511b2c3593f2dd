"""drift_loss against its peers: the official function under XLA, and the plain PyTorch version under
autograd; and a whole optimizer step of drift_pixel.py against the official one.

    python -m eval.bench_drift --json bench_drift.json          # CPU: one process per peer, all on one core
    python -m eval.bench_drift --device cuda                    # GPU: the peer is torch.compile of plain

Forward and gradient, paired: in every round each peer runs once, in an order that turns, and the ratios are
taken within the round.  A peer waits on a pipe while another works, so they share the core without
overlapping.  Peak extra memory is the rise of the process's peak resident size (Linux), or of the allocator's
peak on a GPU. The official peer needs jax, einops and ONEFILE_OFFICIAL_DRIFTING, a checkout of
lambertae/drifting; it is left out, and said so, where they are missing.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from eval import _drift_step

SIZES = [(16, 64, 64, 16, 640), (64, 64, 64, 16, 320), (4, 64, 64, 16, 5120)]  # R, g, p, u, C
PEERS = ("ours", "plain", "official")
STEPPERS = ("official", "ours", "compiled")  # compiled: ours with --compile
WARM = 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# --- the peers -----------------------------------------------------------------


def inputs(sizes):
    R, g, p, u, C = sizes
    rng = np.random.RandomState(0)
    gen, pos, unc = (rng.standard_normal((R, n, C)).astype(np.float32) for n in (g, p, u))
    return gen, pos, unc, np.full(R, 1.96875, np.float32)  # alpha 1.5


def torch_step(name, sizes, device):
    """A function that runs forward and gradient once, to the end."""
    import torch

    from common.kernels import drift_loss, drift_loss_reference
    torch.set_num_threads(1)
    loss = {"ours": lambda *a: drift_loss(*a)[0], "plain": drift_loss_reference,
            "compiled": drift_loss_reference}[name]
    if name == "compiled":
        loss = torch.compile(loss)
    tensors = [torch.from_numpy(v).to(device) for v in inputs(sizes)]
    tensors[0].requires_grad_()

    def step():
        torch.autograd.grad(loss(*tensors).mean(), tensors[0])
        if device == "cuda":
            torch.cuda.synchronize()
    return step


def official_step(sizes):
    import jax
    import jax.numpy as jnp
    path = Path(os.environ["ONEFILE_OFFICIAL_DRIFTING"]) / "drift_loss.py"
    spec = importlib.util.spec_from_file_location("official_drift_loss", path)
    module = importlib.util.module_from_spec(spec)
    clip = jnp.clip  # JAX renamed the keyword a_min after the release was written
    jnp.clip = lambda x, a_min=None, a_max=None, min=None, max=None: clip(  # noqa: A002
        x, a_min if min is None else min, a_max if max is None else max)
    spec.loader.exec_module(module)
    *features, weight = map(jnp.asarray, inputs(sizes))
    weight_RU = jnp.repeat(weight[:, None], sizes[3], 1)
    mean = lambda gen, pos, unc, w: module.drift_loss(gen, pos, unc, weight_neg=w)[0].mean()
    grad = jax.jit(jax.grad(mean))
    return lambda: grad(*features, weight_RU).block_until_ready()


def official_missing():
    """Why the official peer cannot run, or None."""
    path = Path(os.environ.get("ONEFILE_OFFICIAL_DRIFTING", "")) / "drift_loss.py"
    if not path.is_file():
        return "ONEFILE_OFFICIAL_DRIFTING does not hold a checkout of lambertae/drifting"
    gone = [name for name in ("jax", "einops") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(gone)}" if gone else None


# --- CPU: one process per peer ----------------------------------------------------


def worker(name, clock):
    """Answers lines on stdin: a size opens it, 'time' runs a step, 'memory' runs one, peak in MB."""
    reply, step = os.fdopen(os.dup(1), "w", buffering=1), None
    os.dup2(2, 1)  # what libraries print goes to stderr
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "size":
            sizes = tuple(map(int, rest))
            step = official_step(sizes) if name == "official" else torch_step(name, sizes, "cpu")
            for _ in range(WARM):
                step()
            print("ready", file=reply)
        elif word == "step":
            step = (_drift_step.official(*rest) if name == "official"
                    else _drift_step.ours(*rest, compiled=name == "compiled"))
            print(np.mean([step() for _ in range(WARM)]), file=reply)
        elif word == "time":
            start = clock()
            step()
            print(clock() - start, file=reply)
        else:
            print(peak_mb(step), file=reply)


def peak_mb(step):
    """Rise of the peak resident size over one step, in MB; nan where /proc does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps left in the heap is not counted as free
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kb("VmRSS")
        step()
        return (status_kb("VmHWM") - before) / 1024
    except OSError:
        return float("nan")


def status_kb(key):
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])


class Peer:
    def __init__(self, name, core, clock):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "eval.bench_drift", "--worker", name, "--clock", clock]
        pin = getattr(os, "sched_setaffinity", lambda pid, cores: None)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=env, preexec_fn=lambda: pin(0, {core}))

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"bench_drift: error: a peer ended at {line!r}; see its message above")
        return answer.strip()


def bench_cpu(rounds, core, clock):
    missing = official_missing()
    names = [name for name in PEERS if name != "official" or not missing]
    peers = {name: Peer(name, core, clock) for name in names}
    rows = []
    for sizes in SIZES:
        for peer in peers.values():
            peer.ask("size " + " ".join(map(str, sizes)))
        times = {name: [] for name in names}
        for i in range(rounds):
            for name in names[i % len(names):] + names[:i % len(names)]:
                times[name].append(float(peers[name].ask("time")))
        memory = {name: float(peers[name].ask("memory")) for name in names if name != "official"}
        rows.append(summary(sizes, times, memory))
    for peer in peers.values():
        peer.process.stdin.close()
        peer.process.wait()
    return rows, missing


GOAL = 1.5


def bench_step(rounds, core, clock, size="tiny", steppers=STEPPERS[:2]):
    """One optimizer step, ours against the release's, at a size of _drift_step -> a case of eval.bench."""
    gone = [official_missing()] if official_missing() else _drift_step.missing()
    if gone:
        return dict(skipped=", ".join(gone))
    with tempfile.TemporaryDirectory() as folder:
        peers = {name: Peer(name, core, clock) for name in steppers}
        losses = {name: float(peer.ask(f"step {folder} {size}")) for name, peer in peers.items()}
    times = {name: [] for name in peers}
    for i in range(rounds):
        for name in list(peers)[i % len(peers):] + list(peers)[:i % len(peers)]:
            times[name].append(float(peers[name].ask("time")))
    for peer in peers.values():
        peer.process.stdin.close()
        peer.process.wait()
    row = {}
    for name in steppers[1:]:
        ratios = sorted(theirs / t for theirs, t in zip(times["official"], times[name]))
        row[name] = dict(value=statistics.median(ratios), s=statistics.median(times[name]),
                         quartiles=[ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]])
    best = row[steppers[-1]]        # the release's step is compiled; so is ours where --compiled asks for it
    # other noise on both sides: the sum of 86 losses of almost constant size moves by about a hundredth
    return dict(what="optimizer step in pixels, official JAX / ours", ratio="time", value=best["value"],
                goal=GOAL, met=best["value"] >= GOAL,
                agree=all(abs(loss / losses["official"] - 1) < 0.05 for loss in losses.values()),
                ours_s=best["s"], theirs_s=statistics.median(times["official"]), modes=row, losses=losses,
                rounds=rounds, size=_drift_step.SIZES[size])


# --- GPU: in process ----------------------------------------------------------------


def bench_cuda(rounds):
    import torch
    rows = []
    for sizes in SIZES:
        steps = {name: torch_step(name, sizes, "cuda") for name in ("ours", "plain", "compiled")}
        times, memory = {name: [] for name in steps}, {}
        for name, step in steps.items():
            for _ in range(WARM):
                step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        names = list(steps)
        for i in range(rounds):
            for name in names[i % len(names):] + names[:i % len(names)]:
                start = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - start)
        row = summary(sizes, times, memory)
        R, g, p, u, C = sizes
        # Inputs read by forward and again by backward, gradient written: what any implementation has to move.
        row["least_gb_s"] = 4e-9 * (2 * R * (g + p + u) * C + R * g * C) / statistics.median(times["ours"])
        rows.append(row)
    return rows, None


# --- report ---------------------------------------------------------------------------


def summary(sizes, times, memory):
    row = dict(zip("RgpuC", sizes))
    for name, seconds in times.items():
        row[f"{name}_ms"] = 1e3 * statistics.median(seconds)
        if name != "ours":
            ratios = sorted(other / ours for other, ours in zip(seconds, times["ours"]))
            row[f"speedup_over_{name}"] = statistics.median(ratios)
            row[f"speedup_over_{name}_quartiles"] = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
    for name, mb in memory.items():
        row[f"{name}_extra_mb"] = mb
        if name != "ours":
            row[f"memory_share_of_{name}"] = memory["ours"] / mb
    return row


def main():
    parser = argparse.ArgumentParser(prog="eval.bench_drift", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--rounds", type=int, default=31, help="paired rounds per size (default 31)")
    parser.add_argument("--core", type=int, default=0, help="CPU core all peers are pinned to (default 0)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="wall, or cpu: processor time of the process, for a machine that others use too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("loss", "step"), help="one of the two; step on CPUs [both]")
    parser.add_argument("--size", choices=_drift_step.SIZES, default="tiny", help="of the step [tiny]")
    parser.add_argument("--compiled", action="store_true", help="the step also with --compile")
    parser.add_argument("--worker", choices={*PEERS, *STEPPERS}, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, CLOCKS[args.clock])
    cuda = args.device == "cuda"
    rows, missing, cases = [], None, {}
    if args.only != "step":
        rows, missing = bench_cuda(args.rounds) if cuda else bench_cpu(args.rounds, args.core, args.clock)
    if args.only != "loss" and not cuda:
        cases["step"] = bench_step(args.rounds, args.core, args.clock, args.size,
                                   STEPPERS if args.compiled else STEPPERS[:2])
        print("optimizer step: " + "  ".join(f"{k} {v}" for k, v in cases["step"].items()))
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                        if not k.endswith("quartiles")))
    if missing:
        print(f"official function not run: {missing}")
    if args.json:
        machine = platform.processor() or platform.machine()
        record = dict(bench="drift_loss", device=args.device, machine=machine, clock=args.clock,
                      rounds=args.rounds, official_missing=missing, rows=rows, cases=cases)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
