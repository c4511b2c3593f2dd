"""Evaluate a finished run at several values of one flag, and over its newest weights:

    python -m eval.sweep RUN --values 1.0,1.5,2.0 [--flag alphas] [--last K] [-- more flags of the script]

Each value is one `SCRIPT.py evaluate` in a process of its own, with the flags the run was made with.  The
lines it adds to the run's log are the result: a table, sweep.json and sweep.png in the run.
"""

import json
import statistics
import subprocess
import sys

from common import draw
from common.files import write_atomic
from common.draw import number
from common.run import UserError
from eval._shared import (ROOT, Parser, as_flags, changed, cli, experiments, flat, read_log, read_run,
                          step_of, text_table)


def weights(run, last):
    """The newest `last` files of RUN/weights, oldest first; without last [None], the final weights."""
    if not last:
        return [None]
    kept = sorted((run / "weights").glob("*.safetensors"), key=lambda p: (step_of(p), p.name))
    if not kept:
        raise UserError(f"{run}/weights is empty: this script keeps no weights by step for --last")
    return kept[-last:]


def evaluate(script, run, flags):
    """Run SCRIPT evaluate -> the eval lines it appended to the log."""
    before = len(read_log(run.path / "log.jsonl")[0])
    command = [sys.executable, str(script), "evaluate", "--preset", run.preset, "--out", str(run.path),
               *flags]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{script.name} evaluate ended with status {done.returncode}: {last}")
    rows = [r for r in read_log(run.path / "log.jsonl")[0][before:] if str(r.get("kind")).startswith("eval")]
    if not rows:
        raise UserError(f"{script.name} evaluate wrote no eval line to {run.path / 'log.jsonl'}")
    return rows


def collect(script, run, flag, values, last, more):
    """[{weights, value, scores}] over weights and values; one line on the terminal for each."""
    found = []
    for path in weights(run.path, last):
        for value in values:
            flags = [f"--{flag}", value, *(["--weights", str(path)] if path else []), *more]
            scores = {}
            for row in evaluate(script, run, flags):
                scores.update({k: v for k, v in flat(row).items() if v is not None})
            found.append(dict(weights=path.name if path else "final", value=value, scores=scores))
            print(f"{found[-1]['weights']} {flag} {value}: "
                  + ", ".join(f"{k} {number(v)}" for k, v in list(scores.items())[:6]), flush=True)
    return found


def summary(found, values, flag):
    """One row a value: the mean over the weights, with their spread where there are several."""
    keys = list(dict.fromkeys(k for f in found for k in f["scores"] if k not in (flag, flag.rstrip("s"))))
    rows = []
    for value in values:
        mine = [f["scores"] for f in found if f["value"] == value]
        cells = []
        for key in keys:
            x = [s[key] for s in mine if key in s]
            spread = f" +- {number(statistics.stdev(x), 2)}" if len(x) > 1 else ""
            cells.append(number(statistics.fmean(x)) + spread if x else "-")
        rows.append([value, *cells])
    return text_table([flag, *keys], rows)


def picture(found, flag):
    """A panel for each score over the values, a line for each weights file."""
    names = list(dict.fromkeys(f["weights"] for f in found))
    keys = [k for k in dict.fromkeys(k for f in found for k in f["scores"])
            if len({f["scores"].get(k) for f in found}) > 1 and k not in (flag, flag.rstrip("s"))][:6]
    panels = []
    for key in keys:
        series = {n: zip(*[(float(f["value"]), f["scores"][key]) for f in found
                           if f["weights"] == n and key in f["scores"]]) for n in names}
        panels.append(draw.lines({n: tuple(xy) for n, xy in series.items()}, title=key, xlabel=flag,
                                 size=(460, 320)))
    return draw.sheet(panels, columns=2) if panels else None


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("eval.sweep", __doc__)
    parser.add_argument("run", metavar="RUN", help="a finished run")
    parser.add_argument("--values", required=True, help="comma-separated, such as 1.0,1.5,2.0")
    parser.add_argument("--flag", default="alphas", help="the script's flag they are given to [alphas]")
    parser.add_argument("--last", type=int, default=0, metavar="K", help="the newest K files of RUN/weights")
    args = parser.parse_args(argv[:cut])
    values = [v for v in args.values.split(",") if v]
    run, flag = read_run(args.run), args.flag.lstrip("-")
    known = {e.name: e for e in experiments(only={run.script})}
    if run.script not in known:
        raise UserError(f"{run.path} is a run of {run.script}, which is not in {ROOT}")
    if not values or args.last < 0:
        raise UserError("--values needs at least one value, and --last cannot be negative")
    own = as_flags(changed(run.config, known[run.script], run.preset, free=()))
    found = collect(ROOT / f"{run.script}.py", run, flag, values, args.last, own + argv[cut + 1:])
    print("\n" + summary(found, values, flag))
    write_atomic(run.path / "sweep.json", json.dumps(dict(flag=flag, results=found), indent=1).encode())
    try:
        image = picture(found, flag)
    except ValueError:                                          # values that are words have no axis
        image = None
    if image:
        draw.save(image, run.path / "sweep.png")


if __name__ == "__main__":
    cli("eval.sweep", main)
