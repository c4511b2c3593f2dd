"""What exists and what is missing, experiment by experiment: `python -m eval.status [--json] [--verify]`.

Stages of a preset: run, trained to its last step, evaluated.  Artifacts: those of a run directory.
"""

import json
from pathlib import Path

from common.ckpt import verify
from eval._shared import ROOT, Parser, cli, experiments, find_runs, text_table

ARTIFACTS = {
    "config": lambda p: p / "config.json",
    "source": lambda p: next(p.glob("*.py"), p / "none"),
    "RUN.md": lambda p: p / "RUN.md",
    "ckpt": lambda p: next((c for c in sorted(p.glob("ckpt/*"), reverse=True) if c.name.isdigit()),
                           p / "none"),
    "weights": lambda p: next((w for w in p.glob("*.safetensors")), p / "none"),
    "samples": lambda p: next((s for s in p.glob("samples/*")), p / "none"),
}


def stages(run, check=False):
    """One run -> dict(trained, evaluated, artifacts {name: bool}, torn, damaged)."""
    done, wanted = run.steps
    damaged = []
    if check:
        damaged = [f"{c.name}: {bad[0]}" for c in sorted(run.path.glob("ckpt/*"))
                   if c.name.isdigit() and (bad := verify(c))]
    return dict(run=str(run.path), step=done, steps=wanted,
                trained=None not in (done, wanted) and done >= wanted,
                evaluated=any(str(r.get("kind")).startswith("eval") for r in run.rows),
                artifacts={name: find(run.path).exists() for name, find in ARTIFACTS.items()},
                torn=run.torn, damaged=damaged)


def progress(stage):
    done, wanted = ("-" if stage[k] is None else stage[k] for k in ("step", "steps"))
    return f"{done} of {wanted}" + (" done" if stage["trained"] else "")


def survey(root, folder, check=False):
    """[{script, title, tests, parity, presets: {name: [stages of each run]}}]"""
    runs = find_runs(folder)
    return [dict(script=e.name, title=e.title, tests=(root / "tests" / f"test_{e.name}.py").is_file(),
                 parity=any(e.name in p.read_text() for p in root.glob("tests/parity/test_parity_*.py")),
                 presets={name: dict(paper=p.get("paper", "-"), expect=p.get("expect", {}),
                                     runs=[stages(r, check) for r in runs
                                           if (r.script, r.preset) == (e.name, name)])
                          for name, p in e.presets.items()})
            for e in experiments(root)]


def main(argv=None):
    parser = Parser("eval.status", __doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project [where this file lies]")
    parser.add_argument("--runs", type=Path, help="folder of runs [ROOT/runs]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verify", action="store_true", help="also re-hash every checkpoint")
    args = parser.parse_args(argv)
    found = survey(args.root, args.runs or args.root / "runs", args.verify)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    have = lambda ok: "yes" if ok else "missing"
    for e in found:
        print(f"\n{e['script']}.py  {e['title']}\n  tests {have(e['tests'])}, parity {have(e['parity'])}")
        rows = []
        for name, preset in e["presets"].items():
            for r in preset["runs"] or [None]:
                rows.append(["  " + name] + (["not run"] + [""] * (len(ARTIFACTS) + 2) if r is None else [
                    progress(r), have(r["evaluated"]),
                    *(have(ok) for ok in r["artifacts"].values()),
                    "; ".join(r["damaged"] + ([f"{r['torn']} torn line(s)"] if r["torn"] else []))]))
        print(text_table(["  preset", "steps", "evaluated", *ARTIFACTS, "trouble"], rows))


if __name__ == "__main__":
    cli("eval.status", main)
