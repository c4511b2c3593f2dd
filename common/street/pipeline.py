"""Phases one after another: skip what is complete and unchanged, run the rest, leave a manifest; and small
commands.

    STEPS = {"phase1": Step(body, folder, fields, needs, uses)}
    run_phases(STEPS, wanted, cfg, ddp, artifact, ...)
"""

import collections
import dataclasses
import json
import platform
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from common import run
from common.street import bundle, scorecard


@dataclass(frozen=True)
class Step:
    """body(job) -> (outputs, metrics); fields: prefixes of the config it reads; needs and uses: artifact
    names, the second only when they exist; all_ranks: every rank runs it, otherwise rank 0 alone."""
    body: object
    folder: str
    fields: str
    needs: tuple = ()
    uses: tuple = ()
    all_ranks: bool = False


def wanted_phases(text, steps):
    """Names in a comma list, full or up to the underscore, in run-time order; all when empty."""
    names = {alias: p for p in steps for alias in (p, p.split("_")[0])}
    asked = [p.strip() for p in text.split(",") if p.strip()] or list(steps)
    for p in asked:
        if p not in names:
            raise run.UserError(run.unknown("phase", p, steps))
    return [p for p in steps if p in {names[a] for a in asked}]


def run_phases(steps, wanted, cfg, ddp, paths, store, log, job):
    """Run the wanted phases that are stale, and every wanted one after the first of those.

    Raises UserError when an earlier phase that is not wanted is stale, or a file that a phase needs is
    missing.
    """
    state = bundle.read_json(paths.pipeline_state) if paths.pipeline_state.is_file() else {}
    fresh = False

    def note(phase, **values):
        state[phase] = values
        if ddp.rank == 0:
            bundle.write_json(paths.pipeline_state, state)

    for phase, step in steps.items():
        folder = getattr(paths, step.folder)
        inputs = {n: getattr(paths, n) for n in step.needs}
        inputs |= {n: getattr(paths, n) for n in step.uses if getattr(paths, n).is_file()}
        inputs["splits"] = paths.splits_json
        prefixes = tuple(step.fields.split())
        part = {k: v for k, v in dataclasses.asdict(cfg).items() if k.startswith(prefixes)
                or k in ("seed", "steps")}
        why = bundle.stale(folder, bundle.digest(part), inputs)
        # all ranks have judged before any file changes
        _meet(ddp)
        if phase not in wanted:
            before = list(steps).index(phase) < list(steps).index(wanted[-1])
            if before and why not in (None, "no manifest"):
                raise run.UserError(f"{phase} is stale ({why}); add it to --phases")
            continue
        if why is None and not cfg.force and not fresh:
            note(phase, **dict(state.get(phase, {}), status="skipped"))
            continue
        if missing := [str(p) for p in inputs.values() if not p.is_file()]:
            raise run.UserError(f"{phase} needs {missing[0]}; run the earlier phases first")
        fresh, began, store.grants = True, time.time(), []
        if ddp.rank == 0:
            (folder / "manifest.json").unlink(missing_ok=True)
        note(phase, status="running", start=began)
        outputs, metrics = {}, {}
        try:
            if ddp.rank == 0 or step.all_ranks:
                outputs, metrics = step.body(job)
        except BaseException as error:
            note(phase, status="failed", start=began, end=time.time(), error=str(error))
            raise
        if ddp.rank == 0:
            shutil.rmtree(folder / "ckpt", ignore_errors=True)
            metrics = scorecard.rounded(metrics)
            bundle.write_manifest(folder, phase, config_hash=bundle.digest(part), seed=cfg.seed,
                                  commit=log.facts["commit"], inputs=inputs, outputs=outputs, metrics=metrics,
                                  grants=store.grants, started=began, device=ddp.device)
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                              for k, v in list(metrics.items())[:5])
            print(f"{phase:<16} {time.time() - began:6.1f} s  {shown}", flush=True)
        note(phase, status="completed", start=began, end=time.time())
        _meet(ddp)


def _meet(ddp):
    if ddp.world > 1:
        dist.barrier()


def maybe_compile(net, example, enabled, mode="default", stance="default"):
    """torch.compile with the stance set first; eager, with a warning, when compiling fails or changes the
    output.

    'performance' is no stance of PyTorch (set_stance takes it silently, every compiled call then fails):
    'default'.
    """
    if not enabled:
        return net
    if stance == "performance":
        warnings.warn("stance 'performance' does not exist in PyTorch; using 'default'")
        stance = "default"
    torch.compiler.set_stance(stance)
    tuned = mode == "max-autotune"
    try:
        fast = torch.compile(net, mode=mode, fullgraph=tuned, dynamic=False if tuned else None)
        with torch.no_grad():
            net.eval()
            off = float((fast(example) - net(example)).abs().max())
    except Exception as error:                                  # no compiler is no reason not to train
        warnings.warn(f"torch.compile failed, running eagerly: {str(error).splitlines()[0]}")
        return net
    if off > 1e-2:
        warnings.warn(f"the compiled model's output is off by {off:.1e}; running eagerly")
        return net
    return fast


# --- commands --------------------------------------------------------------


def translate(argv, Config):
    """`--run R` is `--out R`; `--set phase1.epochs=3` is `--phase1-epochs=3`."""
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    out, words = [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--run":
            out.append("--out")
            continue
        if word != "--set":
            out.append(word)
            continue
        while words and "=" in words[0] and not words[0].startswith("-"):
            key, value = words.pop(0).split("=", 1)
            name = key.replace(".", "_")
            if name not in kinds:
                raise run.UserError(run.unknown("setting", key, kinds))
            flag = name.replace("_", "-")
            if kinds[name] is bool:
                out.append(f"--{'no-' if value.lower() in ('false', '0', 'no') else ''}{flag}")
            else:
                out.append(f"--{flag}={value}")
    return out


def grouped(cfg, groups):
    """The configuration as nested dicts: fields that start with a group's name below it, the others under
    "run"."""
    out = collections.defaultdict(dict)
    for name, value in dataclasses.asdict(cfg).items():
        head, _, tail = name.partition("_")
        out[head if tail and head in groups else "run"][tail if tail and head in groups else name] = value
    return json.loads(json.dumps(out))


def doctor(cfg):
    """Versions, devices, a write test; a machine without CUDA is fine."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    probe = Path(cfg.out, ".doctor.json")
    bundle.write_json(probe, {})
    probe.unlink()
    cuda = torch.cuda.device_count()
    bf16 = cuda > 0 and torch.cuda.get_device_capability()[0] >= 8
    print(f"python {platform.python_version()}  torch {torch.__version__}  cuda devices {cuda}"
          f"{'' if cuda else ' (CPU works, slowly)'}  bf16 {bf16}  threads {torch.get_num_threads()}  "
          f"write {cfg.out} ok")
    if sys.version_info < (3, 11) or tuple(int(v)
                                           for v in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
        raise run.UserError("needs Python 3.11 and PyTorch 2.6 or newer")
