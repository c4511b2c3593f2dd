"""Accuracy against rate of several beta_vae_arc runs: `python -m eval.arc_rate RUN [RUN ...] --out rate.png`.

Reads metrics.json of each run (written by `python beta_vae_arc.py evaluate RUN`), prints one Markdown row a
setting (runs that differ in their seed alone are averaged), and draws accuracy over nats a grid and over the
number of latents, PCA beside.  Nats are code plus reconstruction with z drawn, which is the bound.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from common import draw

NUMBERS = ("cell", "nonbg", "exact", "drawn", "code", "recon", "total")


def read(run):
    """The row of one run."""
    m = json.loads(Path(run, "metrics.json").read_text())
    c = m["config"]
    kind = "vector" if c["latent"] == "vector" else "spatial" + ", causal prior" * (c["prior"] == "causal")
    kind += f", {c['patch']}x{c['patch']} patches" if kind == "spatial" and c["patch"] != 2 else ""
    top = dict(conservative=0.1).get(c["schedule"], 2)
    kind += "" if c["data"] else " (no file)"
    return dict(kind=kind, d=m["latents"], beta=top * c["beta_scale"], steps=c["steps"], runs=1,
                cell=m["cell_acc"], nonbg=m["nonbg_acc"], exact=m["exact_acc"],
                drawn=m["sampled_z"]["cell_acc"], code=m["kl_nats"]["mean"], recon=m["recon_nats"],
                total=-m["sampled_z"]["elbo_nats"], uniform=m["uniform_code_nats"], zlib=m["zlib_nats"],
                pca={int(k[3:]): (v["cell_acc"], v["nonbg_acc"], v["exact_acc"])
                     for k, v in m["baselines"].items() if k.startswith("pca")})


def merge(rows):
    """Rows of the same setting as one: means, with the standard deviation over runs as `spread`."""
    groups = {}
    for r in rows:
        groups.setdefault((r["kind"], r["d"], r["beta"], r["steps"]), []).append(r)
    out = []
    for some in groups.values():
        values = {k: [r[k] for r in some] for k in NUMBERS}
        spread = {k: float(np.std(v, ddof=1)) for k, v in values.items()} if len(some) > 1 else {}
        means = {k: float(np.mean(v)) for k, v in values.items()}
        out.append({**some[0], **means, "runs": len(some), "spread": spread})
    return sorted(out, key=lambda r: (r["kind"], r["total"]))


def table(rows):
    names = ("latents", "d", "beta", "steps", "runs", "cell", "non-background", "exact", "cell, z drawn",
             "code", "recon", "total, z drawn")
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [line(names), "|" + "---|" * len(names)]
    for r in rows:
        text = []
        for k in NUMBERS:
            digits = 4 if k in NUMBERS[:4] else 1
            spread = f" ± {r['spread'][k]:.{digits}f}" if r["spread"] else ""
            text.append(f"{r[k]:.{digits}f}{spread}")
        lines.append(line([r["kind"], str(r["d"]), f"{r['beta']:g}", str(r["steps"]), str(r["runs"]), *text]))
    for d, values in sorted({d: v for r in rows for d, v in r["pca"].items()}.items()):
        shares = [f"{v:.4f}" for v in values]
        lines.append(line(["PCA of the canvas", str(d), "", "", "", *shares, *[""] * 4]))
    others = f"uniform code {rows[0]['uniform']:.1f}, zlib {rows[0]['zlib']:.1f} nats a grid"
    return "\n".join([*lines, "", others])


def picture(rows):
    """Accuracy over total nats (uniform code and zlib as upright lines), and over the number of latents."""
    panels, kinds = [], list(dict.fromkeys(r["kind"] for r in rows))
    runs = {r["kind"] + f", {r['steps']} steps": (r["kind"], r["steps"]) for r in rows}
    pca = {d: v for r in rows for d, v in r["pca"].items()}
    for i, (key, name) in enumerate((("cell", "cell accuracy"), ("nonbg", "non-background accuracy"))):
        series = {k: tuple(zip(*sorted((r["total"], r[key]) for r in rows if (r["kind"], r["steps"]) == v)))
                  for k, v in runs.items()}
        low = min(r[key] for r in rows)
        for other in ("zlib", "uniform"):
            at = rows[0][other]
            series[f"{other} code"] = ((at, at), (low, 1.0))
        panels.append(draw.lines(series, title=f"{name} against rate", ylabel=name, size=(560, 440),
                                 xlabel="nats a grid, code + reconstruction, z drawn"))
        best = {k: {} for k in kinds}
        for r in rows:
            best[r["kind"]][r["d"]] = max(r[key], best[r["kind"]].get(r["d"], 0))
        if pca:
            best["PCA of the canvas"] = {d: v[i] for d, v in pca.items()}
        series = {k: (sorted(v), [v[d] for d in sorted(v)]) for k, v in best.items()}
        panels.append(draw.lines(series, title=f"{name} against size", xlabel="latents d", ylabel=name,
                                 logx=True, size=(560, 440)))
    return draw.sheet(panels, columns=2)


def main():
    parser = argparse.ArgumentParser("eval.arc_rate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="PNG")
    args = parser.parse_args()
    rows = merge(map(read, args.runs))
    print(table(rows))
    if args.out:
        draw.save(picture(rows), args.out)


if __name__ == "__main__":
    main()
