"""Accuracy against rate of several beta_vae_arc runs: `python -m eval.arc_rate RUN [RUN ...] --out rate.png`.

Reads metrics.json of each run (written by `python beta_vae_arc.py evaluate RUN`), prints one Markdown row a
run, and draws cell and non-background accuracy over nats a grid, one line per kind of latent.  Nats are code
plus reconstruction with z drawn from the posterior, which is the bound.
"""

import argparse
import json
from pathlib import Path

from common import draw


def read(run):
    """The row of one run."""
    m = json.loads(Path(run, "metrics.json").read_text())
    c = m["config"]
    kind = f"spatial, {c['prior']} prior" if c["latent"] == "spatial" else "vector"
    beta = 2 * c["beta_scale"] * (0.05 if c["schedule"] == "conservative" else 1)
    return dict(kind=kind, d=m["latents"], beta=beta, steps=c["steps"], cell=m["cell_acc"],
                nonbg=m["nonbg_acc"], exact=m["exact_acc"], drawn=m["sampled_z"]["cell_acc"],
                code=m["kl_nats"]["mean"], recon=m["recon_nats"], total=-m["sampled_z"]["elbo_nats"],
                uniform=m["uniform_code_nats"], zlib=m["zlib_nats"])


def table(rows):
    names = ("latents", "d", "beta", "steps", "cell", "non-background", "exact", "cell, z drawn",
             "code", "recon", "total, z drawn")
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [line(names), "|" + "---|" * len(names)]
    for r in rows:
        shares = [f"{r[k]:.4f}" for k in ("cell", "nonbg", "exact", "drawn")]
        nats = [f"{r[k]:.1f}" for k in ("code", "recon", "total")]
        lines.append(line([r["kind"], str(r["d"]), f"{r['beta']:g}", str(r["steps"]), *shares, *nats]))
    others = f"uniform code {rows[0]['uniform']:.1f}, zlib {rows[0]['zlib']:.1f} nats a grid"
    return "\n".join([*lines, "", others])


def picture(rows):
    """Accuracy over total nats, with the uniform code and zlib as upright lines."""
    panels = {}
    for key, name in (("cell", "cell accuracy"), ("nonbg", "non-background accuracy")):
        series = {}
        for kind in dict.fromkeys(r["kind"] for r in rows):
            points = sorted((r["total"], r[key]) for r in rows if r["kind"] == kind)
            series[kind] = tuple(zip(*points))
        low = min(r[key] for r in rows)
        for name_of, at in (("uniform code", rows[0]["uniform"]), ("zlib", rows[0]["zlib"])):
            series[name_of] = ((at, at), (low, 1.0))
        panels[name] = draw.lines(series, xlabel="nats a grid, code + reconstruction", ylabel=name)
    return draw.sheet(panels)


def main():
    parser = argparse.ArgumentParser("eval.arc_rate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="PNG")
    args = parser.parse_args()
    rows = sorted(map(read, args.runs), key=lambda r: (r["kind"], r["total"]))
    print(table(rows))
    if args.out:
        draw.save(picture(rows), args.out)


if __name__ == "__main__":
    main()
