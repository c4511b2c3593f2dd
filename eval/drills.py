"""What can go wrong, done on purpose: `python -m eval.drills [kill damage hostile disk twice] [--quick]`.

kill     SIGKILL at random moments, the same command again: the weights of an undisturbed run, bit for bit
damage   files of a run (36 cases a script, drawn) and of each input format (all, three times) flipped, cut,
         deleted: one clear line or a clean recovery
hostile  fuzzed and crafted inputs for every reader: no crash, no hang, no pickle run, no more than 1 GiB
disk     a disk that fills up during a run: older checkpoints stay whole, the line says what to do
twice    two processes on one run directory: the second is refused

Each writes OUT/NAME.json: machine, versions, seed, n, counts, failures.  --quick is a sample for CI.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.files import write_atomic
from common.run import UserError, unknown
from common.runlog import code_fingerprint, environment
from eval import _drill_inputs, _drill_runs
from eval._drill_readers import READERS
from eval._shared import ROOT, SCRIPTS, Parser, cli

FOLDER = "/dev/shm"  # memory, where there is: thousands of small files
TWO_RANKS = ("drift_toy", "hope_lm")


def over(names, drill):
    """{script: record of drill(Script)}, each in a folder that goes away."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory(dir=FOLDER if Path(FOLDER).is_dir() else None) as folder:
            began = time.time()
            found[name] = dict(drill(_drill_runs.Script(name, folder)), time_s=round(time.time() - began, 1))
        print(
            f"  {name}: { {k: v for k, v in found[name].items() if k != 'failures'} }",
            *found[name].get("failures", ())[:5],
            sep="\n    ",
            flush=True,
        )
    return found


def kill(scripts, quick, seed, fuzz):
    share = 2 if quick else -(-50 // (len(scripts) + len(TWO_RANKS)))
    one = over(scripts, lambda s: _drill_runs.killed(s, share, 1, seed))
    two = (
        {}
        if quick
        else over([n for n in TWO_RANKS if n in scripts], lambda s: _drill_runs.killed(s, share, 2, seed))
    )
    return {**one, **{f"{name}, two ranks": record for name, record in two.items()}}


def damage(scripts, quick, seed, fuzz):
    runs = over(scripts, lambda s: _drill_runs.damaged(s, 8 if quick else 36, seed))
    return {**runs, **_drill_inputs.damage(READERS, 1 if quick else 3, seed)}


def hostile(scripts, quick, seed, fuzz):
    return _drill_inputs.hostile(READERS, min(fuzz, 40) if quick else fuzz, seed)


def disk(scripts, quick, seed, fuzz):
    return over(scripts, lambda s: _drill_runs.full_disk(s, seed))


def twice(scripts, quick, seed, fuzz):
    return over(scripts, lambda s: _drill_runs.twice(s, seed))


DRILLS = dict(kill=kill, damage=damage, hostile=hostile, disk=disk, twice=twice)


def main(argv=None):
    parser = Parser("eval.drills", __doc__)
    parser.add_argument("names", nargs="*", help="which drills; all by default")
    parser.add_argument("--quick", action="store_true", help="a sample of each, under a minute")
    parser.add_argument("--scripts", help="comma-separated; all by default, with --quick drift_toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fuzz", type=int, default=10_000, help="fuzzed inputs a reader [10000]")
    parser.add_argument("--out", type=Path, help="folder of the JSON [docs/drills, with --quick none]")
    args = parser.parse_args(argv)
    there = [name for name in SCRIPTS if (ROOT / f"{name}.py").is_file()]
    scripts = args.scripts.split(",") if args.scripts else there[:1] if args.quick else there
    for name, known in [(n, DRILLS) for n in args.names] + [(n, there) for n in scripts]:
        if name not in known:
            raise UserError(unknown("drill or script", name, known))
    torch.set_num_threads(1)  # forked children must not inherit a pool of threads
    os.environ["OMP_NUM_THREADS"] = "1"
    failed, out = 0, args.out or (None if args.quick else ROOT / "docs" / "drills")
    for name in args.names or DRILLS:
        began, env = time.time(), environment(ROOT)
        print(f"== {name}", flush=True)
        cases = DRILLS[name](scripts, args.quick, args.seed, args.fuzz)
        total = {
            key: sum(c.get(key, 0) for c in cases.values())
            for key in ("kills", "cases", "fuzzed", "crafted", "recovered", "refused", "read", "failed")
        }
        total["skipped"] = sum("skipped" in c for c in cases.values())
        record = dict(
            drill=name,
            quick=args.quick,
            seed=args.seed,
            commit=code_fingerprint(__file__)["commit"],
            time_s=round(time.time() - began, 1),
            total={k: v for k, v in total.items() if v or k == "failed"},
            cases=cases,
            env={
                k: env[k]
                for k in ("python", "torch", "numpy", "pillow", "safetensors", "cpu", "cpus", "threads")
            },
        )
        if out:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
        print(f"{name}: {record['total']} in {record['time_s']} s", flush=True)
        failed += total["failed"]
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli("eval.drills", main)
