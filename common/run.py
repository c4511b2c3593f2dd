"""What every script needs and no reader came for: flags, ranks, seeds, signals, the log of a run.

Knows no model and no data.  Flags stand in common/flags.py, the log in common/runlog.py, checkpoints in
common/ckpt.py, weights in common/sealed.py; scripts say `from common import run` and find all of it here.

    command, cfg = parse(Config, PRESETS, commands)      flags from one flat frozen dataclass
    ddp = init(cfg.device)                                torchrun or a single process
    log = Log(cfg, ddp)                                   claims the run directory: config, source, lock
    start = load(cfg.out, state, ddp)                     0 on a fresh run
    for step in progress(start, cfg.steps, ddp):          1-based; Ctrl-C waits for the end of the step
        seed_all(cfg.seed, ddp.rank, step)                noise is a function of (seed, rank, step)
        ...
        save_if_due(cfg.out, step, cfg.steps, every, state, ddp)
"""

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import json
import math
import os
import random
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.ckpt import Interrupted, load, save, verify  # noqa: F401
from common.flags import UserError, opt, parse, script_name, unknown  # noqa: F401
from common.runlog import Log, plain, record  # noqa: F401
from common.sealed import load_weights, save_weights  # noqa: F401

# --- main ------------------------------------------------------------------


def main(Config, presets, commands):
    """Parse, run commands[command](cfg), and turn the outcome into an exit status: 0, 2, 130 or 1 (a bug)."""
    signal.signal(signal.SIGTERM, _interrupt)
    cfg = None
    try:
        command, cfg = parse(Config, presets, tuple(commands))
        commands[command](cfg)
        if dist.is_initialized():
            leave_together()
    except UserError as error:
        _leave(2, f"error: {error}")
    except Interrupted as stop:
        _leave(130, str(stop))
    except KeyboardInterrupt:
        _leave(130, "interrupted; the same command continues from the last checkpoint")
    except OSError as error:
        if error.errno not in USER_ERRNO:
            raise
        where = error.filename or getattr(cfg, "out", None) or "standard output"    # a write names no file
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space there and run the same command again" if full else ""
        _leave(2, f"error: {error.strerror}: {where}{hint}")


def leave_together():
    """End this rank with status 0 once every rank is here; does not return.

    Python's own finalisation is skipped: gloo's threads may still hold tensors of finished collectives, and
    freeing one under an interpreter that is going away aborts the process.
    """
    dist.barrier()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


USER_ERRNO = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR,
              errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


def _leave(status, line):
    """One line on stderr, then exit.  Under torchrun rank 0 speaks for all, others only when it lives on."""
    with contextlib.suppress(KeyboardInterrupt, OSError):       # stderr may lie on the disk that is full
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)                       # torchrun ends this process first when rank 0 failed too
        print(f"{script_name()}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)                        # the others may sit in a collective: do not wait for them
    sys.exit(status)


# --- ranks and seeds -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device


def init(device="auto"):
    """Join the process group that torchrun describes (nccl + gloo on CUDA, gloo on CPU) -> Ranks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = next(k for k, ok in have.items() if ok) if device == "auto" else str(device).split(":")[0]
    if kind not in have:
        raise UserError(unknown("--device", device, ["auto", *have]))
    if not have[kind]:
        raise UserError(f"--device {device}: not available on this machine; try --device auto")
    where = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(where)
    if world > 1 and not dist.is_initialized():
        # gloo beside nccl: flags such as "stop now" travel over the CPU without stalling the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return Ranks(rank, world, where)


def keep_freed_memory(below=1 << 30):
    """Let glibc keep what tensors free for the next ones: a page that was handed back costs a fault.

    below: bytes; a larger tensor has a mapping of its own and cannot leave holes between long-lived ones.
    """
    with contextlib.suppress(OSError, AttributeError):      # not glibc: its allocator stays as it is
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, below)                             # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)                     # M_TRIM_THRESHOLD


def per_rank(total, ddp, flag):
    """total / world, or a UserError that names the nearest batch that divides."""
    if total % ddp.world or total < ddp.world:
        near = max(total // ddp.world, 1) * ddp.world
        raise UserError(f"{flag} {total} does not divide over {ddp.world} ranks; try {near}")
    return total // ddp.world


def seed_all(*key):
    """Seed torch, numpy and random from a tuple of integers such as (seed, rank, step)."""
    state = np.random.SeedSequence([int(k) & (2**63 - 1) for k in key]).generate_state(3, np.uint64)
    torch.manual_seed(int(state[0]) & (2**63 - 1))
    np.random.seed(int(state[1]) & 0xFFFFFFFF)
    random.seed(int(state[2]))


def generator(*key, device="cpu"):
    """A torch.Generator of its own, seeded from a tuple of integers."""
    state = np.random.SeedSequence([int(k) & (2**63 - 1) for k in key]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) & (2**63 - 1))


def autocast(device, enabled=True):
    """bfloat16 autocast where the device computes in it natively (CUDA, sm_80 on); otherwise float32."""
    ok = enabled and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast("cuda", torch.bfloat16) if ok else contextlib.nullcontext()


def all_mean(value, ddp):
    """Mean of a number or tensor over ranks; a single process returns it unchanged."""
    if ddp.world == 1:
        return value
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
    dist.all_reduce(tensor)
    return tensor / ddp.world if torch.is_tensor(value) else float(tensor / ddp.world)


# --- the loop ----------------------------------------------------------------

_stop = False


def _interrupt(*_):
    raise KeyboardInterrupt


def _request_stop(*_):
    global _stop
    if _stop:                                   # asked twice: no more patience
        raise KeyboardInterrupt
    _stop = True


def progress(start, steps, ddp, label="train"):
    """Yield start+1 .. steps under a bar.  SIGINT and SIGTERM wait for save_if_due at the end of the step."""
    global _stop
    _stop = False
    old = {s: signal.signal(s, _request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield from tqdm(range(start + 1, steps + 1), initial=start, total=steps, desc=label,
                        disable=True if ddp.rank else None, dynamic_ncols=True)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def stop_requested(ddp):
    """True on every rank once a signal reached any of them."""
    flag = torch.tensor(int(_stop))
    if ddp.world > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def save_if_due(out, step, steps, every, state, ddp, ranked=None):
    """Save every `every` steps, at the last one, and on a signal; then a signal ends the run with 130."""
    stop = stop_requested(ddp)
    if stop or step == steps or step % every == 0:
        save(out, step, state, ddp, ranked)
    if stop and step < steps:
        raise Interrupted(f"stopped at step {step}, checkpoint written to {out}; the same command continues")


def check_finite(step, **values):
    """Stop the run when a logged number is not finite."""
    for name, value in values.items():
        if not math.isfinite(float(value)):
            raise UserError(f"{name} is {float(value)} at step {step}; "
                            "the last checkpoint is intact: try a lower --lr or another --seed")


def print_plan(cfg, plan):
    """What a run would take, without running it: a table, or with --json one object.

    plan: params, flops_per_step, memory_gb_per_rank, disk_gb, hours_at_mfu; any more keys are printed too.
    """
    head = dict(script=script_name(), preset=cfg.preset, params=None, flops_per_step=None,
                memory_gb_per_rank=None, disk_gb=None, steps=getattr(cfg, "steps", None), hours_at_mfu=None)
    plan = plain({**head, **plan})
    if getattr(cfg, "json", False):
        print(json.dumps(plan))
        return
    for name, value in plan.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
        print(f"{name:<22} {'-' if value is None else value}")
