"""Pictures of a finished run of beta_vae_arc.py: tables of grids, prior draws, curves, maps of latents."""

import json

import numpy as np
from PIL import Image, ImageDraw

from common import draw
from common.arc.embed import pca, tsne
from common.arc.tasks import OUTSIDE, grid_statistics
from common.axes import INK, RAMP, Plot, font, limits, plain, ramp

PALETTE = np.array([[int(c[i:i + 2], 16) for i in (0, 2, 4)] for c in (
    "000000 0074D9 FF4136 2ECC40 FFDC00 AAAAAA F012BE FF851B 7FDBFF 870C25").split()], np.uint8)
ARC = ["#%02x%02x%02x" % tuple(c) for c in PALETTE.tolist()]


def picture(grid, tile=96, span=None, truth=None):
    """A grid [h, w] in the ARC palette, centred on a white square of tile pixels -> uint8 [tile, tile, 3].

    span: cells across the tile (default: the grid fills it).  Cells unlike truth are framed.
    """
    seen = (grid != OUTSIDE) | ((truth if truth is not None else grid) != OUTSIDE)
    h, w = (int(seen.any(axis).nonzero()[0].max(initial=0)) + 1 for axis in (1, 0))
    cell = max(tile // max(span or 0, h, w), 2)
    paper = (200 + 20 * (np.indices((h, w)).sum(0) % 2)).astype(np.uint8)[..., None].repeat(3, 2)
    image = np.where((grid[:h, :w] == OUTSIDE)[..., None], paper, PALETTE[np.minimum(grid[:h, :w], 9)])
    image = image.repeat(cell, 0).repeat(cell, 1)
    if cell > 4:                                # in smaller cells the lines would be most of what one sees
        image[::cell] = image[:, ::cell] = 90
    for y, x in np.argwhere(grid[:h, :w] != truth[:h, :w]) if truth is not None else ():
        box = image[y * cell:(y + 1) * cell, x * cell:(x + 1) * cell]
        box[[0, -1]] = box[:, [0, -1]] = (255, 255, 255) if cell > 6 else (230, 0, 60)
        if cell > 6:
            box[[1, -2]] = box[:, [1, -2]] = (230, 0, 60)
    page = np.full((max(tile, h * cell), max(tile, w * cell), 3), 255, np.uint8)
    top, left = (page.shape[0] - h * cell) // 2, (page.shape[1] - w * cell) // 2
    page[top:top + h * cell, left:left + w * cell] = image
    return page


def strip(grids, tile=96):
    """Pictures of a row of grids [N, P, P] at one scale."""
    real = grids != OUTSIDE
    span = int(max(real.any(1).sum(1).max(), real.any(2).sum(1).max()))
    return [picture(g, tile, span) for g in grids]


def table(rows, heads=(), names=(), title="", pad=6):
    """Rows of pictures [tile, tile, 3] under column heads, each row after its name -> pillow image."""
    tile, across = rows[0][0].shape[0], max(map(len, rows))
    left = max([font(13).getlength(plain(n)) for n in names] or [0]) + pad * (2 if names else 1)
    top = pad + 26 * bool(title) + 20 * bool(heads)
    page = Image.new("RGB", (int(left) + across * (tile + pad), top + len(rows) * (tile + pad)), "white")
    pen = ImageDraw.Draw(page)
    pen.text((pad, pad), plain(title), INK, font(16))
    for j, head in enumerate(heads):
        pen.text((left + j * (tile + pad) + tile / 2, top - 6), plain(head), INK, font(13), "ms")
    for i, row in enumerate(rows):
        y = top + i * (tile + pad)
        if names:
            pen.text((left - pad, y + tile / 2), plain(names[i]), INK, font(13), "rm")
        for j, image in enumerate(row):
            page.paste(Image.fromarray(image), (int(left) + j * (tile + pad), y))
    return page


def reconstructions(true, back, title, columns=8, tile=128):
    """Each grid beside what came back, its wrong cells framed in red, with their count below."""
    pictures, labels = [], []
    for g, r in zip(true, back):
        wrong, cells = int((g != r).sum()), int((g != OUTSIDE).sum())
        pictures += [picture(g, tile), picture(r, tile, truth=g)]
        labels += [f"{(g[:, 0] != OUTSIDE).sum()} x {(g[0] != OUTSIDE).sum()}",
                   f"{wrong} of {cells} wrong" if wrong else "exact"]
    return draw.sheet([draw.grid(pictures, columns, labels=labels, pad=6)], title=title)


def prior_page(drawn, held, side=6, tile=94):
    """Draws beside held-out grids, and how heights, colours and colours per grid are distributed in both."""
    both = {"prior draws": drawn, "held-out grids": held}
    tables = []
    for name, grids in both.items():
        pictures = [picture(g, tile) for g in grids[:side**2]]
        rows = [pictures[i:i + side] for i in range(0, len(pictures), side)]
        s = grid_statistics(grids)
        size = f"{s['mean_h']:.0f}x{s['mean_w']:.0f}"
        facts = f"{s['valid']:.0%} valid, {size}, {s['colors_per_grid']:.1f} colours"
        tables.append(table(rows, title=f"{name}: {facts}"))
    share = lambda v, n: np.bincount(v, minlength=n + 1)[:n + 1] / len(v)
    height = {k: (range(1, 31), share((g[:, :, 0] != OUTSIDE).sum(1), 30)[1:]) for k, g in both.items()}
    colors = {k: (range(1, 11), share(sum((g == c).any((1, 2)).astype(int) for c in range(10)), 10)[1:])
              for k, g in both.items()}
    used = {k: (range(10), grid_statistics(g)["color_share"]) for k, g in both.items()}
    small = dict(size=(400, 300), ylabel="share")
    return draw.sheet([draw.sheet(tables), draw.sheet([
        draw.lines(height, title="height of a grid", **small),
        draw.lines(colors, title="colours in a grid", **small),
        draw.lines(used, title="cells of colour 0 to 9", **small)], columns=3)], columns=1, pad=4)


def curves(out, to):
    """Training curves from log.jsonl."""
    rows = [json.loads(r) for r in (out / "log.jsonl").read_text().splitlines()]
    seen = [r for r in rows if r["kind"] == "train"]
    held = [r for r in rows if r["kind"] == "eval"]
    pick = lambda rows, key: ([r["step"] for r in rows], [r[key] for r in rows])
    # a batch holds grids of one size, so neighbouring steps are not alike: average a fiftieth of the run
    n = max(len(seen) // 50, 1)
    acc = [np.mean([r["cell_acc"] for r in seen[i:i + n]]) for i in range(0, len(seen), n)]
    small = dict(size=(480, 380), xlabel="step")
    draw.save(draw.sheet([
        draw.lines({"training": ([r["step"] for r in seen[::n]], acc),
                    "held-out tasks": pick(held, "cell_acc"),
                    "held out, non-background": pick(held, "nonbg_acc"),
                    "held out, exact": pick(held, "exact_acc")}, title="accuracy", **small),
        draw.lines({"reconstruction": pick(held, "recon_nats"),
                    "code (KL)": ([r["step"] for r in held], [r["kl_nats"]["mean"] for r in held])},
                   title="nats a grid, held-out tasks", logy=True, **small),
        draw.lines({"beta": pick(seen, "beta")}, title="beta", **small)], columns=3), to / "curves.png")


def cloud(points, label, colors, title):
    """Scatter of points [N, 2] in the colour of their label: {label: colour}."""
    colors = {k: v for k, v in colors.items() if (label == k).any()}
    key = lambda plot, i, x, y: plot.dot(x + 10, y, 5, list(colors.values())[i])
    xlim, ylim = limits([points[:, 0]]), limits([points[:, 1]])
    plot = Plot((460, 480), xlim, ylim, title, keys=list(colors), mark=key)
    for x, y, name in zip(*np.array(plot.px(*points.T)).T, label):
        plot.dot(x, y, 2.6, colors[name])
    return plot.done()


def maps(held, mu, to):
    """PCA and t-SNE of posterior means mu [N, D], coloured by half of the pair, area, top colour."""
    held, x = held.where(slice(0, 1000)), mu[:1000].astype(np.float64)
    area = held.shapes.astype(int).prod(1)
    mode = np.stack([(held.grids == c).sum((1, 2)) for c in range(10)], 1).argmax(1)
    cuts = np.quantile(area, [0.25, 0.5, 0.75]).astype(int)
    steps = [f"to {cuts[0]}", f"to {cuts[1]}", f"to {cuts[2]}", f"over {cuts[2]}"]
    shades = ["#%02x%02x%02x" % tuple(c) for c in ramp(RAMP, np.linspace(0, 1, 4)).tolist()]
    panels = {"half of a pair": (np.array(["input", "output", "neither"])[held.io],
                                 dict(input="#0072b2", output="#d55e00", neither="#444444")),
              "cells": (np.array(steps)[np.searchsorted(cuts, area)], dict(zip(steps, shades))),
              "most frequent colour": (mode.astype(str), {str(c): ARC[c] for c in range(10)})}
    mean, axes, share = pca(x, min(50, *x.shape))
    flat = (x - mean) @ axes.T
    few = slice(0, 600)                                         # t-SNE costs N^2 a step
    pages = {"latent_pca": (flat[:, :2], f"PCA ({share[:2].sum():.0%} of the variance)")}
    if len(flat[few]) > 91:
        y, cost = tsne(flat[few], steps=600)
        pages["latent_tsne"] = (y, f"t-SNE (KL {cost:.2f})")
    for name, (points, title) in pages.items():
        draw.save(draw.sheet([cloud(points, label[:len(points)], colors, f"{title}: {what}")
                              for what, (label, colors) in panels.items()], columns=3), to / f"{name}.png")
