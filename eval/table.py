"""Results in README.md and docs/, made from logs alone: `python -m eval.table [--docs]`.

Reads runs/*/*/log.jsonl and docs/results.json (what was recorded from runs of other machines), writes both
the table between <!-- results --> and <!-- /results --> in README.md and the record.  --docs also rewrites
the marked blocks of docs/evidence.md, deviations.md and decisions.md.  A preset nobody ran reads 'not run'.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from common.files import write_atomic
from common.draw import number
from common.run import UserError
from eval._evidence import write_docs
from eval._shared import (ROOT, Parser, changed, cli, duration, experiments, find_runs, last_scores,
                          markdown_table, replace_block)


def result(run, experiment):
    """One run as a flat record, ready for docs/results.json."""
    scores, notes = last_scores(run)
    last, wanted = run.steps
    return dict(script=run.script, preset=run.preset, run=run.path.name,
                changed=changed(run.config, experiment, run.preset), n=scores.pop("n", None), scores=scores,
                notes=notes, steps=last, steps_wanted=wanted, hardware=run.hardware,
                time_s=round(run.time_s, 1), commit=run.header.get("commit"),
                code_sha256=run.header.get("code_sha256"), torch=run.env.get("torch"))


def gather(runs, record, known):
    """Records of all runs: those on this disk, and those recorded before whose directory is elsewhere."""
    old = []
    if record.is_file():
        try:
            old = json.loads(record.read_text())
        except ValueError as error:
            raise UserError(f"{record} is damaged: {error}") from None
    rows = {(r["script"], r["preset"], r["run"]): r for r in old}
    for run in runs:
        if run.script in known and run.rows:
            row = result(run, known[run.script])
            rows[row["script"], row["preset"], row["run"]] = row
    return [rows[key] for key in sorted(rows)]


def paper(experiment):
    """Where the numbers come from: the arXiv id in the docstring's Paper line, else how that line starts."""
    text = experiment.doc.get("Paper", "-")
    words = [w.strip(".,;()") for w in text.split() if "arXiv:" in w]
    return words[0] if words else re.split("[;,]", text)[0]


def ours(row, keys):
    """'fid 1.61 (n 1000)': the scores named, or the first three where none is named."""
    found = {k: row["scores"][k] for k in keys if k in row["scores"]}
    if not found:                                               # the first three that are not rates
        found = dict([(k, v) for k, v in row["scores"].items() if not k.endswith("_s")][:3])
    if not found:
        return f"no score logged, {row['steps']} steps" if row["steps"] else "ran, no score logged"
    text = ", ".join(f"{k} {number(v)}" for k, v in found.items())
    notes = row["notes"] + ([f"n {row['n']}"] if row["n"] else [])
    if row["steps"] and row["steps_wanted"] and row["steps"] < row["steps_wanted"]:
        notes.append(f"step {row['steps']} of {row['steps_wanted']}")
    return text + (f" ({', '.join(notes)})" if notes else "")


def seeds(rows):
    """Runs that differ in nothing but their seed, as one: mean scores, the spread among the notes."""
    names = [k for k in rows[0]["scores"] if all(isinstance(r["scores"].get(k), (int, float)) for r in rows)]
    values = {k: [r["scores"][k] for r in rows] for k in names}
    spread = max(names, key=lambda k: (max(values[k]) - min(values[k])) / (abs(max(values[k])) or 1))
    low, high = (number(f(values[spread])) for f in (min, max))
    note = f"mean of {len(rows)} seeds; {spread} {low} to {high}"
    return dict(rows[0], scores={k: statistics.mean(v) for k, v in values.items()},
                notes=[*rows[0]["notes"], note], time_s=statistics.median(r["time_s"] for r in rows))


def first_screen(rows, keys):
    """The runs of one preset that the README shows: the preset itself, over its seeds; else what was changed.

    docs/results.json keeps them all.
    """
    plain = [dict(r, scores={k: v for k, v in r["scores"].items() if k in keys or not keys})
             for r in rows if not r["changed"]]
    return [seeds(plain)] if len(plain) > 1 else plain or rows


def table(found, rows):
    """The table of the README's first screen, in Markdown."""
    lines = []
    for e in found:
        for name, preset in e.presets.items():
            expect, goal = preset.get("expect", {}), preset.get("goal", {})     # the paper's; our own
            mine = [r for r in rows if (r["script"], r["preset"]) == (e.name, name)
                    and (expect or goal or not name.startswith("smoke"))]
            wanted = ", ".join(f"{k} {v}" for k, v in expect.items()) or "-"
            if goal:
                wanted = "no paper; goal " + ", ".join(f"{k} {v}" for k, v in goal.items())
            source = f"{paper(e)}, {preset['paper']}" if preset.get("paper", "-") != "-" else paper(e)
            for r in first_screen(mine, {**expect, **goal}):
                other = ", ".join(f"{k}={v}" for k, v in list(r["changed"].items())[:4])
                lines.append([f"{e.name}.py", source, name + (f" with {other}" if other else ""), wanted,
                              ours(r, expect or goal), f"{r['hardware']}, {duration(r['time_s'])}"])
            if not mine and (expect or goal):
                lines.append([f"{e.name}.py", source, name, wanted, "not run", "-"])
        if not any(line[0] == f"{e.name}.py" for line in lines):
            lines.append([f"{e.name}.py", paper(e), "-", "-", "not run", "-"])
    return markdown_table(["script", "paper", "preset", "paper's number", "ours", "hardware and time"], lines)


def main(argv=None):
    parser = Parser("eval.table", __doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project [where this file lies]")
    parser.add_argument("--runs", type=Path, help="folder of runs [ROOT/runs]")
    parser.add_argument("--docs", action="store_true", help="also docs/*.md")
    args = parser.parse_args(argv)
    readme, record = args.root / "README.md", args.root / "docs" / "results.json"
    if not readme.is_file():
        raise UserError(f"no README.md in {args.root}")
    found = experiments(args.root)
    rows = gather(find_runs(args.runs or args.root / "runs"), record, {e.name: e for e in found})
    text = replace_block(readme.read_text(), "results", table(found, rows), readme)
    record.parent.mkdir(exist_ok=True)
    write_atomic(record, (json.dumps(rows, indent=1) + "\n").encode())
    write_atomic(readme, text.encode())
    print(f"{readme}: {len(rows)} runs of {len({r['script'] for r in rows})} experiments", file=sys.stderr)
    if args.docs:
        write_docs(args.root, found, rows)


if __name__ == "__main__":
    cli("eval.table", main)
