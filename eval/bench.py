"""Ratios against installed peers, paired: `python -m eval.bench [NAME ...] [--json FILE] [-- FLAGS]`.

Runs every eval/bench_NAME.py (or those named) in a process of its own, passes FLAGS on, and gathers what they
measured in one JSON file beside the environment.  A peer that is missing reads 'not installed', never 1.

A bench file takes --json FILE and writes one object with either
    cases: {name: {what, value, ratio, goal, met, agree, ours_s, theirs_s} or {skipped: why}}
    rows: [{sizes ..., ours_ms, PEER_ms, speedup_over_PEER, ...}] and PEER_missing: why or null
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common.files import write_atomic
from common.run import UserError, unknown
from common.runlog import environment
from eval._shared import ROOT, Parser, cli, text_table


def names(root):
    return sorted(p.stem.removeprefix("bench_") for p in (root / "eval").glob("bench_*.py"))


def measure(root, name, flags):
    """The record of one bench file, or {"failed": why}; what it prints goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "out.json")
        command = [sys.executable, "-m", f"eval.bench_{name}", "--json", str(file), *flags]
        status = subprocess.run(command, cwd=root, stdout=2).returncode
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):
            return dict(failed=f"exit status {status} and no result; see its output")


def ratios(name, record):
    """Flat rows of one record: bench, case, peer or direction, ratio (None where not run), goal, status."""
    if "failed" in record:
        yield dict(bench=name, case="-", kind="-", ratio=None, goal=None,
                   status=f"failed: {record['failed']}")
    for key, case in record.get("cases", {}).items():
        if "skipped" in case:
            yield dict(bench=name, case=key, kind="-", ratio=None, goal=None,
                       status=f"not installed: {case['skipped']}")
        else:
            status = ("met" if case["met"] else "NOT met") + ("" if case["agree"] else ", results DIFFER")
            yield dict(bench=name, case=case["what"], kind=case["ratio"], ratio=case["value"],
                       goal=case["goal"], status=status)
    for row in record.get("rows", []):
        sizes = " ".join(f"{k}={v}" for k, v in row.items() if isinstance(v, (int, str)))
        for key, value in row.items():
            if key.startswith("speedup_over_") and not key.endswith("_quartiles"):
                low, high = row.get(f"{key}_quartiles", (value, value))
                yield dict(bench=name, case=sizes, kind=f"{key.removeprefix('speedup_over_')} / ours",
                           ratio=value, goal=None, status=f"middle half {low:.3g} to {high:.3g}")
    for key, why in record.items():
        if key.endswith("_missing") and why:
            yield dict(bench=name, case="-", kind=f"{key.removesuffix('_missing')} / ours", ratio=None,
                       goal=None, status=f"not installed: {why}")


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("eval.bench", __doc__)
    parser.add_argument("names", nargs="*", help="which eval/bench_NAME.py; all by default")
    parser.add_argument("--json", metavar="FILE", help="write everything here")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project [where this file lies]")
    args = parser.parse_args(argv[:cut])
    known = names(args.root)
    for name in args.names:
        if name not in known:
            raise UserError(unknown("benchmark", name, known))
    if not known:
        raise UserError(f"no eval/bench_*.py in {args.root}")
    records = {name: measure(args.root, name, argv[cut + 1:]) for name in args.names or known}
    rows = [row for name, record in records.items() for row in ratios(name, record)]
    if args.json:
        out = dict(env=environment(args.root), flags=argv[cut + 1:], ratios=rows, benches=records)
        write_atomic(args.json, (json.dumps(out, indent=1) + "\n").encode())
    print(text_table(["bench", "case", "ratio of", "value", "goal", "status"],
                     [[r["bench"], r["case"], r["kind"], "-" if r["ratio"] is None else f"{r['ratio']:.3g}",
                       "-" if r["goal"] is None else f"{r['goal']:g}", r["status"]] for r in rows]))
    if any("failed" in r for r in records.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli("eval.bench", main)
