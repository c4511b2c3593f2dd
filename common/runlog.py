"""A run on disk: log.jsonl, config.json, the source that ran, RUN.md, the lock against a second run."""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version

import torch
import torch.distributed as dist

from common.files import sha256_file, write_atomic
from common.flags import UserError

FREE = {"out", "device", "wandb", "json"}       # a run may continue with these changed


class Log:
    """runs/<name>/log.jsonl: one object a line, append only, flushed per line; only rank 0 writes.

    Claims the directory: refuses one held by another process or by another config, and one on a disk
    with less than need_gb free.  data: hashes or paths that identify the inputs, kept in RUN.md.
    """

    def __init__(self, cfg, ddp, need_gb=0.0, data=None):
        self.out, self.rank, self.began = pathlib.Path(cfg.out), ddp.rank, time.time()
        self.file = self.wandb = None
        if ddp.rank == 0:
            self._claim(cfg, ddp, need_gb, data or {})
        if ddp.world > 1:
            dist.barrier()

    def _claim(self, cfg, ddp, need_gb, data):
        config = json.loads(json.dumps(dataclasses.asdict(cfg)))
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "w")
        try:
            # lockf, not flock: workers forked by a run that was killed outlive it, and must not hold this
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.out} is in use by another process; wait for it or choose another --out"
                            ) from None
        free = {f.name for f in dataclasses.fields(cfg) if f.metadata.get("free")}
        _refuse_other_config(self.out, config, free)
        free_gb = shutil.disk_usage(self.out).free / 1e9
        if free_gb < need_gb:
            raise UserError(f"{self.out} has {free_gb:.1f} GB free and this run needs {need_gb:.1f} GB")
        script = pathlib.Path(sys.modules[type(cfg).__module__].__file__)
        code = code_fingerprint(script)
        self.facts = dict(config=config, argv=sys.argv, world=ddp.world, **code, env=environment(self.out))
        write_atomic(self.out / "config.json", json.dumps({**self.facts, "data": data}, indent=1).encode())
        write_atomic(self.out / script.name, script.read_bytes())
        self.data, self.before_s = data, _last_time(self.out / "log.jsonl")
        self.file = open(self.out / "log.jsonl", "a")
        if getattr(cfg, "wandb", ""):
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs the wandb package: pip install wandb") from None
            self.wandb = wandb.init(project=cfg.wandb, config=config, name=str(self.out), resume="allow")
        self("header", **self.facts)
        self.run_md("running")

    def __call__(self, kind, **values):
        """Append {"kind": kind, "time_s": ..., **values}; non-finite numbers become null."""
        if self.rank:
            return
        row = {"kind": kind, "time_s": round(self.before_s + time.time() - self.began, 3), **plain(values)}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb and kind != "header":
            self.wandb.log(row, step=row.get("step"))

    def run_md(self, status):
        """RUN.md: what ran, on what, from which inputs, and the hash of every output."""
        if self.rank:
            return
        skip = {".lock", "RUN.md", "log.jsonl"}
        files = [p for p in sorted(self.out.rglob("*"))     # checkpoints carry their own hashes
                 if p.is_file() and p.name not in skip and "ckpt" not in p.relative_to(self.out).parts]
        rows = "\n".join(f"| {p.relative_to(self.out)} | {p.stat().st_size} | {sha256_file(p)[:16]} |"
                         for p in files)
        facts = self.facts
        digest = hashlib.sha256(json.dumps(facts["config"], sort_keys=True).encode()).hexdigest()
        write_atomic(self.out / "RUN.md", f"""# {self.out.name}

status: {status}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC

    {shlex.join(map(str, facts['argv']))}

| | |
|---|---|
| config sha256 | {digest} |
| code sha256 | {facts['code_sha256']} |
| commit | {facts['commit']} |
| ranks | {facts['world']} |
| python, torch | {facts['env']['python']}, {facts['env']['torch']} |
""".encode() + "".join(f"| data: {k} | {v} |\n" for k, v in self.data.items()).encode()
                     + f"\n| file | bytes | sha256 |\n|---|---|---|\n{rows}\n".encode())

    def finish(self):
        """Write the final RUN.md and let go of the directory."""
        self.run_md("finished")
        if self.file:
            self.file.close()
            self.lock.close()
        if self.wandb:
            self.wandb.finish()


def record(out, kind, **values):
    """Append one line to the log of a finished run, as `evaluate` does."""
    with open(pathlib.Path(out) / "log.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "time_s": _last_time(file.name), **plain(values)}) + "\n")


def plain(value):
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):                # tensors and numpy values
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_time(path):
    """time_s of the last whole line; a line torn by a crash is ended so that the next one stands alone."""
    path, last = pathlib.Path(path), 0.0
    if path.exists() and path.stat().st_size:
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            with open(path, "ab") as file:
                file.write(b"\n")
        for line in reversed(text.splitlines()):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                return float(json.loads(line)["time_s"])
    return last


def _refuse_other_config(out, config, free):
    path = out / "config.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())["config"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged; move {out} away or choose another --out") from None
    for name in [*config, *(n for n in old if n not in config)]:
        if name not in FREE | free and old.get(name) != config.get(name):
            raise UserError(f"{out} holds a run with {name} = {old.get(name)!r}, not {config.get(name)!r}; "
                            "choose another --out")


# --- where and what ran ----------------------------------------------------------


def code_fingerprint(script):
    """dict(code_sha256, files, commit): SHA-256 over sorted lines 'path NUL sha256 LF' of script and common.

    commit is the git commit (with '+dirty' when the tree differs) or None: the hash identifies the code.
    """
    script = pathlib.Path(script).resolve()
    paths = sorted([script, *(script.parent / "common").rglob("*.py")])
    files = {str(p.relative_to(script.parent)): sha256_file(p) for p in paths}
    text = "".join(f"{name}\0{digest}\n" for name, digest in sorted(files.items()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return dict(code_sha256=digest, files=files, commit=_git(script.parent))


def _git(folder):
    def ask(*words):
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    try:
        top = ask("rev-parse", "HEAD")
        if top.returncode:
            return None
        return top.stdout.strip() + ("+dirty" if ask("status", "--porcelain").stdout else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF")


def environment(out):
    """What a reader needs to repeat a number: versions, hardware, thread counts.  No user, no host names."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
    return dict(
        python=platform.python_version(), platform=platform.platform(), torch=torch.__version__,
        **{name: version(name) for name in ("numpy", "pillow", "scipy", "safetensors")},
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version() if cuda else None,
        driver=_driver() if cuda else None,
        gpu=[g.name for g in gpus], gpu_gb=[round(g.total_memory / 1e9, 1) for g in gpus],
        cpu=_cpu_name(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        ram_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        disk_free_gb=round(shutil.disk_usage(out).free / 1e9, 1),
        threads=torch.get_num_threads(), tf32=torch.backends.cuda.matmul.allow_tf32,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        host_sha256=hashlib.sha256(platform.node().encode()).hexdigest()[:12])


def _cpu_name():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver():
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        return None
