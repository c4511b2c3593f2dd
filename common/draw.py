"""Plots and image grids with pillow alone: the pictures every script writes into its run directory.

lines, bars, scatter, hist, heat and arrows return an RGB image with axes, ticks and a legend above the data;
grid and sheet put images beside each other; save writes a PNG.  The same input gives the same bytes: the font
is the one inside pillow, nothing is random.  Plots are drawn S times larger and averaged down: anti-aliasing.
Non-finite values are gaps, never errors, so a diverged run still gets its picture.
"""

import functools
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.axes import (COLORS, EMPTY, GREY, INK, RAMP, SIGNED, Plot, color, fit, font, limits, number,
                         pieces, plain, ramp, text_width, ticks)


def _groups(groups):
    return {k: np.asarray(v, float).reshape(-1, 2) for k, v in groups.items()}


def _dot_key(plot, i, x, y):
    plot.dot(x + 10, y, 4.5, color(i), i)


# --- plots -------------------------------------------------------------

def lines(series, *, title="", xlabel="", ylabel="", logx=False, logy=False, size=(720, 440)):
    """Line plot.  series: {label: (xs, ys) or (xs, ys, lo, hi)}; lo and hi are the ends of an error band."""
    series = {k: [np.asarray(c, float) for c in v] for k, v in series.items()}
    stroke = lambda i, points: plot.line(points, color(i), 2.0 if i < len(COLORS) else 1.0)
    plot = Plot(size, limits([v[0] for v in series.values()], logx, 0.01),
                 limits([c for v in series.values() for c in v[1:]], logy), title, xlabel, ylabel, series,
                 lambda c, i, x, y: c.line([(x, y), (x + 19, y)], color(i), 2.0 if i < len(COLORS) else 1.0),
                 log=(logx, logy))
    for i, (xs, _, *band) in enumerate(series.values()):
        if band:
            both = np.array([plot.px(xs, band[0]), plot.px(xs, band[1])])
            low, high = both[:, np.isfinite(both).all((0, 2))].tolist()
            plot.area(low + high[::-1], color(i, "38"))
    for i, (xs, ys, *_) in enumerate(series.values()):
        for piece in pieces(plot.px(xs, ys)):
            if len(piece) > 1:
                stroke(i, piece)
            for x, y in piece if len(xs) <= 30 or len(piece) == 1 else ():
                plot.dot(x, y, 3, color(i))                    # few points: show where they were measured
    return plot.done()


def scatter(groups, *, title="", xlabel="", ylabel="", size=(560, 560), equal=True, radius=None,
            xlim=None, ylim=None):
    """Scatter plot.  groups: {label: points [N, 2]}; colour and marker shape both tell groups apart."""
    groups = _groups(groups)
    xlim, ylim = (lim or limits([v[:, a] for v in groups.values()]) for a, lim in ((0, xlim), (1, ylim)))
    plot = Plot(size, xlim, ylim, title, xlabel, ylabel, groups, _dot_key, equal=equal)
    plot.dots(groups, radius)
    return plot.done()


def arrows(points_N2, vectors_N2, background=None, *, title="", xlabel="", ylabel="", size=(560, 560),
           scale=None):
    """Vector field: an arrow from each point along its vector, over background [M, 2] or {label: points}.

    scale multiplies the vectors; by default the longest spans 1/12 of the points, the scale is in the title.
    """
    p, v = (np.asarray(a, float).reshape(-1, 2) for a in (points_N2, vectors_N2))
    if not isinstance(background, dict):
        background = {} if background is None else {"": background}
    groups = _groups(background)
    if scale is None:
        longest = np.nanmax(np.hypot(*v.T), initial=0.0)
        scale = float(np.nanmax(np.ptp(p, axis=0), initial=0.0) / 12 / longest) if longest else 1.0
        title = f"{title}  (arrows x {number(scale, 2)})".strip()
    ends = [*groups.values(), p, p + scale * v]
    xlim, ylim = (limits([e[:, a] for e in ends]) for a in (0, 1))
    plot = Plot(size, xlim, ylim, title, xlabel, ylabel, groups, _dot_key, equal=True)
    plot.dots(groups)
    for (x0, y0), (x1, y1) in zip(plot.px(*p.T), plot.px(*(p + scale * v).T)):
        length = math.hypot(x1 - x0, y1 - y0)
        if length >= 1:                                         # false on nan
            head = min(7.0, 0.5 * length)
            ux, uy = head * (x1 - x0) / length, head * (y1 - y0) / length
            bx, by = x1 - ux, y1 - uy
            plot.line([(x0, y0), (bx, by)], INK, 1.5)
            plot.area([(x1, y1), (bx - 0.45 * uy, by + 0.45 * ux), (bx + 0.45 * uy, by - 0.45 * ux)], INK)
    return plot.done()


def hist(groups, bins=40, *, title="", xlabel="", ylabel="share of values", size=(720, 440)):
    """Histogram.  groups: {label: values}; common bins, the bars of each group add up to 1."""
    groups = {k: np.ravel(np.asarray(v, float)) for k, v in groups.items()}
    edges = np.linspace(*limits(groups.values(), pad=0.0), bins + 1)
    share = [np.histogram(v[np.isfinite(v)], edges)[0] / max(len(v), 1) for v in groups.values()]
    top = 1.05 * max([h.max() for h in share] or [0]) or 1.0
    plot = Plot(size, (edges[0], edges[-1]), (0.0, top), title, xlabel, ylabel, groups,
                 lambda c, i, x, y: c.box(x, y - 5, x + 19, y + 5, color(i)))
    for i, h in enumerate(share):
        steps = plot.px(np.repeat(edges, 2), [0.0, *np.repeat(h, 2), 0.0])
        plot.area(steps, color(i, "30"))
        plot.line(steps, color(i))
    return plot.done()


def bars(values, *, title="", xlabel="", size=None):
    """Horizontal bars.  values: {label: value or (value, lo, hi)}; None and nan read 'not run'."""
    rows = np.array([(list(v) if isinstance(v, (tuple, list)) else [v, None, None]) for v in values.values()],
                    float).reshape(-1, 3)
    lo, hi = limits([rows, [0.0]], pad=0.0)
    lo -= 0.15 * (hi - lo) * (lo < 0)                           # room for the numbers of negative bars
    size = size or (720, 60 + 30 * len(rows) + 28 * bool(title) + 22 * bool(xlabel))
    plot = Plot(size, (lo, hi), (max(len(rows), 1), 0), title, xlabel, names=(None, list(values)), right=90)
    for i, v in enumerate(rows):
        (zero, y0), (end, y1) = plot.px([0.0, v[0]], [i + 0.18, i + 0.82])
        y, sign = (y0 + y1) / 2, -1 if v[0] < 0 else 1
        if not math.isfinite(v[0]):
            plot.text(zero + 6, y, "not run", 13, "lm", GREY)
            continue
        plot.box(zero, y0, end, y1, color(0))
        if np.isfinite(v).all():
            (a, _), (b, _) = plot.px(v[1:], [i, i])
            for line in ([(a, y), (b, y)], [(a, y - 5), (a, y + 5)], [(b, y - 5), (b, y + 5)]):
                plot.line(line, INK, 1.5)
            end = sign * max(sign * x for x in (a, b, end))
        plot.text(end + 6 * sign, y, number(v[0]), 13, "lm" if sign > 0 else "rm")
    return plot.done()


def heat(matrix, rows=None, cols=None, *, title="", xlabel="", ylabel="", size=None, signed=False):
    """Heat map of matrix [R, C], first row on top; rows and cols: names.

    Values stand in the cells where they fit, nan cells are grey.  signed: blue-white-orange, white at 0.
    """
    m = np.asarray(matrix, float)
    high, wide = m.shape
    lo, hi = limits([m], pad=0.0)
    lo, hi = (-max(-lo, hi), max(-lo, hi)) if signed else (lo, hi)
    size = size or (190 + min(max(wide * 44, 260), 560), 110 + min(max(high * 36, 200), 480))
    plot = Plot(size, (0, wide), (high, 0), title, xlabel, ylabel, names=(cols or (), rows or ()), right=88)
    shade = functools.partial(ramp, SIGNED if signed else RAMP)
    colors = shade(np.clip(np.nan_to_num((m - lo) / (hi - lo)), 0, 1))
    (x0, y0), (x1, y1) = plot.px([0, 1], [0, 1])
    fits = y1 - y0 >= 16 and m.size <= 4000 and all(
        text_width(number(v, 3), 12) + 6 <= x1 - x0 for v in m.flat)
    for (i, j), v in np.ndenumerate(m):
        (x0, y0), (x1, y1) = plot.px([j, j + 1], [i, i + 1])
        plot.box(x0, y0, x1, y1, tuple(colors[i, j].tolist()) if math.isfinite(v) else EMPTY)
        if fits:
            dark = math.isfinite(v) and colors[i, j] @ (0.299, 0.587, 0.114) < 125
            plot.text((x0 + x1) / 2, (y0 + y1) / 2, number(v, 3), 12, "mm", "white" if dark else INK)
    x, (_, y0, _, y1) = plot.frame[2] + 18, plot.frame
    for k, rgb in enumerate(shade(np.linspace(1, 0, 101)).tolist()):
        plot.box(x, y0 + (y1 - y0) * k / 101, x + 14, y0 + (y1 - y0) * (k + 1) / 101, tuple(rgb))
    for v in ticks(lo, hi, max(3, int((y1 - y0) / 48))):
        plot.text(x + 19, y1 - (v - lo) / (hi - lo) * (y1 - y0), number(v), 12, "lm", GREY)
    return plot.done()


# --- images ------------------------------------------------------------

def _rgb(image):
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    a = np.asarray(image)
    a = a[..., 0] if a.ndim == 3 and a.shape[-1] == 1 else a
    if a.dtype != np.uint8 or a.ndim not in (2, 3) or a.ndim == 3 and a.shape[-1] != 3:
        raise ValueError(f"an image must be uint8 [H, W] or [H, W, 3], got {a.dtype} {list(a.shape)}")
    return Image.fromarray(np.ascontiguousarray(a)).convert("RGB")


def _page(tiles, texts, columns, pad, above=0, below=0, title=""):
    """Tiles row by row, each with its text above or below."""
    if not tiles:
        raise ValueError("no images to draw")
    widths = [max(t.width for t in tiles[j::columns]) for j in range(min(columns, len(tiles)))]
    heights = [max(t.height for t in tiles[i:i + columns]) + above + below
               for i in range(0, len(tiles), columns)]
    top = pad + (30 if title else 0)
    size = sum(widths) + pad * (len(widths) + 1), sum(heights) + pad * len(heights) + top
    out = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(out)
    pen.text((pad, 12), plain(title), INK, font(16))
    for k, tile in enumerate(tiles):
        i, j = divmod(k, columns)
        x, y = pad + sum(widths[:j]) + pad * j, top + sum(heights[:i]) + pad * i
        out.paste(tile, (x, y + above))
        text = fit(texts[k], 13, widths[j]) if k < len(texts) else ""
        pen.text((x, y + 4) if above else (x + tile.width / 2, y + tile.height + 3), text, INK, font(13),
                 "la" if above else "ma")
    return out


def grid(images, columns=None, labels=None, scale=1, pad=2):
    """Images [N, H, W, 3] or [N, H, W] uint8, or a list of pillow images, row by row.

    labels: one short text per image, below it.  scale enlarges without smoothing.
    """
    tiles = [_rgb(x) for x in images]
    tiles = [t.resize((round(t.width * scale), round(t.height * scale)), Image.NEAREST) for t in tiles]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    return _page(tiles, labels or (), columns, pad, below=18 * bool(labels))


def sheet(panels, columns=None, title="", pad=12):
    """Several pictures on one page.  panels: {title: image} or a list of images (pillow or uint8 arrays)."""
    names = list(panels) if isinstance(panels, dict) else []
    tiles = [_rgb(p) for p in (panels.values() if isinstance(panels, dict) else panels)]
    return _page(tiles, names, columns or len(tiles), pad, above=24 * bool(names), title=title)


def save(image, path):
    """Write a PNG whose bytes depend on the pixels alone; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    _rgb(image).save(part, "PNG")
    os.replace(part, path)
