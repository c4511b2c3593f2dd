"""What eval.lm writes: SUMMARY.md and the plots of a bundle."""

import json

import numpy as np
import torch

from common import draw, run
from eval._zeroshot import interval


def cells(part, value):
    """(task, text) rows of a part's results; whole grids and matrices stay in metrics.json."""
    if value is None:
        return [("", "not run: the run's text is not here")]
    if part == "ruler":
        by = {}
        for r in value:
            by.setdefault((r["variant"], r["length"]), []).append(r)
        value = {f"{variant} {length}": pooled(some) for (variant, length), some in by.items()}
    elif part == "passkey":
        value = {str(r["length"]): {k: v for k, v in r.items() if k != "length"} for r in value}
    rows = []
    for task, v in value.items():
        if isinstance(v, dict) and "matrix" in v:
            v = {k: x for k, x in v.items() if k != "matrix"}
        rows.append((task, "not run: no file" if v is None else json.dumps(rounded(run.plain(v)))))
    return rows


def pooled(rows):
    """One variant and length of the needles over its depths."""
    n = sum(r["n"] for r in rows)
    if not n:
        return dict(score=None, why=rows[0]["why"])
    score = sum(r["score"] * r["n"] for r in rows) / n
    return dict(score=score, n=n, interval=interval(score, n))


def rounded(tree):
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [rounded(v) for v in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def summary(meta, base, memorized):
    """Markdown of a bundle."""
    lines = [f"# Evaluation of {meta['run']}", "",
             f"{meta['variant']}, {meta['params']:,} parameters, step {meta['step']}, "
             f"trained on {json.dumps(meta['data'])}", "", "## Commands and environment", "",
             f"    {meta['command']}", "",
             f"torch {torch.__version__}, {meta['machine']}; {meta['cpu_s']:.0f} CPU seconds; "
             f"weights sha256 {meta['weights'][:16]}", "", "## Training", "",
             f"last training row: {json.dumps(meta['last_train'])}", ""]
    for title, found in (("Scores", base), ("Scores after memorising", memorized)):
        if found:
            lines += [f"## {title}", "", "| part | task | value |", "|---|---|---|"]
            lines += [f"| {part} | {task} | {v} |" for part in found for task, v in cells(part, found[part])]
            lines.append("")
    if memorized:
        m = meta["memorize"]
        oracle = ", ORACLE: the right answer was memorised" if m["oracle"] else ""
        events = json.dumps({part: {k: round(n) for k, n in e.items()} for part, e in m["events"].items()})
        lines += ["## Memory", "", f"paths {m['paths']}, threshold {m['threshold']}, "
                  f"steps {m['steps']}{oracle}; events {events}", ""]
    risks = ("Small models score near chance on the zero-shot tasks; intervals are 95% Wilson; prompts "
             f"longer than the {meta['trained_length']} tokens of a training row ask for more than the model "
             "was shown.")
    return "\n".join([*lines, "## Risks", "", risks]) + "\n"


def plots(found, out):
    if found.get("continual"):
        c = found["continual"]
        for key in ("on", "off"):
            xs = list(range(1, len(c["domains"]) + 1))
            curves = {d: (xs, row) for d, row in zip(c["domains"], c[key]["matrix"])}
            picture = draw.lines(curves, title=f"memory {key}", xlabel="domains trained", ylabel="loss, nats")
            draw.save(picture, out / f"forgetting_{key}.png")
    if found.get("classes"):
        c = found["classes"]
        xs = list(range(1, len(c["on"]["matrix"]) + 1))
        curves = {f"memory {key}": (xs, [float(np.mean(row)) for row in c[key]["matrix"]])
                  for key in ("on", "off")}
        picture = draw.lines(curves, xlabel="tasks memorised", ylabel="accuracy, labels so far")
        draw.save(picture, out / "classes.png")
    if found.get("ruler"):
        scores = {}
        for r in found["ruler"]:
            score = float("nan") if r["score"] is None else r["score"]
            scores.setdefault(r["variant"], {}).setdefault(r["length"], []).append(score)
        rows = [[float(np.mean(v)) for v in by.values()] for by in scores.values()]
        draw.save(draw.heat(np.array(rows), rows=list(scores),
                            cols=[str(k) for k in next(iter(scores.values()))]), out / "ruler.png")
    if found.get("books", {}).get("nll_by_position"):
        by = found["books"]["nll_by_position"]
        draw.save(draw.lines({"NLL": ([int(k.split("-")[1]) for k in by], list(by.values()))}, logx=True,
                             xlabel="position", ylabel="nats a token"), out / "nll_by_position.png")
    if (found.get("context") or {}).get("gain"):
        gain = found["context"]["gain"]
        xs = [int(c) for c in gain]
        curves = {name: (xs, [g["mean"] + sign * (g["se"] or 0) for g in gain.values()])
                  for name, sign in (("lost", 0), ("+ s.e.", 1), ("- s.e.", -1))}
        draw.save(draw.lines(curves, logx=True, xlabel="tokens of context left",
                             ylabel="nats a token lost"), out / "context.png")
