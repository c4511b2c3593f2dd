"""Pictures of a finished run of beta_vae_arc.py: strips, training curves, maps of the latents."""

import json

import numpy as np

from common import draw
from common.arc.embed import pca, tsne
from common.arc.tasks import OUTSIDE, picture


def strip(grids, tile=96):
    """Pictures of a row of grids [N, P, P] at one scale."""
    real = grids != OUTSIDE
    span = int(max(real.any(1).sum(1).max(), real.any(2).sum(1).max()))
    return [picture(g, tile, span) for g in grids]


def curves(out, to):
    """Training curves from log.jsonl."""
    rows = [json.loads(r) for r in (out / "log.jsonl").read_text().splitlines()]
    seen = [r for r in rows if r["kind"] == "train"]
    held = [r for r in rows if r["kind"] == "eval"]
    pick = lambda rows, key: ([r["step"] for r in rows], [r[key] for r in rows])
    draw.save(draw.sheet([
        draw.lines({"training": pick(seen, "cell_acc"), "held-out tasks": pick(held, "cell_acc"),
                    "held out, non-background": pick(held, "nonbg_acc"),
                    "held out, exact": pick(held, "exact_acc")},
                   title="accuracy", xlabel="step"),
        draw.lines({"reconstruction": pick(seen, "recon"), "code (KL)": pick(seen, "kl")},
                   title="nats a grid", xlabel="step", logy=True),
        draw.lines({"beta": pick(seen, "beta")}, title="beta", xlabel="step")], columns=3), to / "curves.png")


def maps(held, mu, to):
    """PCA and t-SNE of posterior means mu [N, D], coloured by half of the pair, area, and most frequent colour."""
    x = mu.astype(np.float64)
    area = held.shapes.astype(int).prod(1)
    mode = np.stack([(held.grids == c).sum((1, 2)) for c in range(10)], 1).argmax(1)
    cuts = np.quantile(area, [0.25, 0.5, 0.75])
    labels = {"half of a pair": np.array(["input", "output", "neither"])[held.io],
              "cells": np.array([f"quarter {q + 1}" for q in range(4)])[np.searchsorted(cuts, area)],
              "most frequent colour": np.array([f"colour {c}" for c in mode])}
    mean, axes, share = pca(x, min(50, *x.shape))
    flat = (x - mean) @ axes.T
    few = slice(0, 600)                                         # t-SNE costs N^2 a step
    pages = {"latent_pca": (flat[:, :2], f"PCA, {share[:2].sum():.0%} of the variance")}
    if len(flat[few]) > 91:
        y, cost = tsne(flat[few], steps=600)
        pages["latent_tsne"] = (y, f"t-SNE, KL {cost:.2f}")
    for name, (points, title) in pages.items():
        panels = []
        for what, label in labels.items():
            label = label[:len(points)]
            groups = {v: points[label == v] for v in sorted(set(label))}
            panels.append(draw.scatter(groups, title=f"{title}: {what}", equal=False))
        draw.save(draw.sheet(panels, columns=3), to / f"{name}.png")
