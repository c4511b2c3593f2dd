"""Grids nobody drew: objects, lines, tilings, magnified noise, walks, flood fills, mirrors, stamps.

Each family paints on g [h, w] in place, with colours from ink and the parameters of its block.
"""

import numpy as np
import scipy

OUTSIDE = 10                                    # here: a cell a sprite leaves clear


def sprinkle(g, rng, ink, block):
    on = rng.random(g.shape) < block["density"]
    g[on] = rng.choice(ink, int(on.sum()))


def objects(g, rng, ink, block):
    h, w = g.shape
    for _ in range(rng.integers(1, block["count"] + 1)):
        a, b = rng.integers(1, max(2, h // 2 + 1)), rng.integers(1, max(2, w // 2 + 1))
        y, x = rng.integers(0, h - a + 1), rng.integers(0, w - b + 1)
        hollow = g[y + 1:y + a - 1, x + 1:x + b - 1].copy()
        g[y:y + a, x:x + b] = rng.choice(ink)
        if rng.random() < block["hollow"]:
            g[y + 1:y + a - 1, x + 1:x + b - 1] = hollow


def lines(g, rng, ink, block):
    for _ in range(rng.integers(1, block["count"] + 1)):
        target = g if rng.random() < 0.5 else g.T
        start, every = rng.integers(0, len(target)), block["period"] if rng.random() < 0.4 else 99
        target[start::every] = rng.choice(ink)


def diagonals(g, rng, ink, block):
    i, j = np.indices(g.shape)
    for _ in range(rng.integers(1, 3)):
        line = i + j if rng.random() < 0.5 else i - j
        every = block["period"] if rng.random() < 0.6 else 99
        g[(line - rng.integers(0, max(g.shape))) % every == 0] = rng.choice(ink)


def tiling(g, rng, ink, block):
    motif = rng.choice(np.append(ink, g[0, 0]), rng.integers(1, 1 + block["period"], 2))
    g[:] = np.tile(motif, (30 // len(motif) + 1, 30 // motif.shape[1] + 1))[:g.shape[0], :g.shape[1]]
    if rng.random() < 0.3:
        g[block["period"]::block["period"] + 1] = g[:, block["period"]::block["period"] + 1] = ink[0]


def magnified(g, rng, ink, block):
    k = rng.integers(2, 6)
    small = np.full((-(-g.shape[0] // k), -(-g.shape[1] // k)), g[0, 0])
    sprinkle(small, rng, ink, block)
    g[:] = small.repeat(k, 0).repeat(k, 1)[:g.shape[0], :g.shape[1]]


def walk(g, rng, ink, block):
    for _ in range(rng.integers(1, block["count"] + 1)):
        axes = rng.integers(0, 2, (1, 2)) | (rng.random() < 0.7)  # some walks keep to a row or a column
        step = rng.integers(-1, 2, (rng.integers(3, 40), 2)) * axes
        at = np.cumsum(np.vstack([[rng.integers(0, g.shape[0]), rng.integers(0, g.shape[1])], step]), 0)
        at = at[(at >= 0).all(1) & (at < g.shape).all(1)]
        g[at[:, 0], at[:, 1]] = rng.choice(ink)


def flood(g, rng, ink, block):
    """Fill connected regions of one colour, as a paint bucket does."""
    for _ in range(rng.integers(1, 4)):
        y, x = rng.integers(0, g.shape[0]), rng.integers(0, g.shape[1])
        region, _ = scipy.ndimage.label(g == g[y, x])
        g[region == region[y, x]] = rng.choice(ink)


def mirror(g, rng, ink, block):
    h, w = g.shape
    if block["mirror"] & 1:
        g[:, w - w // 2:] = g[:, :w // 2][:, ::-1]
    if block["mirror"] & 2:
        g[h - h // 2:] = g[:h // 2][::-1]
    if h == w and block["mirror"] & 4:
        g[:] = np.where(np.tri(h, dtype=bool), g, g.T)


def stamps(g, rng, ink, block):
    sprite = np.full(rng.integers(2, 6, 2), OUTSIDE, np.uint8)
    walk(sprite, rng, ink, block)
    for _ in range(rng.integers(2, 7)):
        s = np.rot90(sprite, rng.integers(0, 4))[:g.shape[0], :g.shape[1]]
        y, x = rng.integers(0, g.shape[0] - s.shape[0] + 1), rng.integers(0, g.shape[1] - s.shape[1] + 1)
        place = g[y:y + s.shape[0], x:x + s.shape[1]]
        place[s != OUTSIDE] = s[s != OUTSIDE]


FAMILIES = (sprinkle, objects, lines, diagonals, tiling, magnified, walk, flood, mirror, stamps)
FIRST = 7                                       # the families that can start from an empty grid


def procedural(n, canvas=30, seed=0, fixed=False):
    """Yield n (grid uint8 [h, w], block id).  A block of 50 fixes one to three families and their parameters.

    It is a task for the split: held-out grids come from parameters never trained on.
    """
    for b in range(-(-n // 50)):
        rng = np.random.default_rng([seed, b])
        more = rng.permutation(len(FAMILIES))[:rng.integers(0, 3)]
        layers = [FAMILIES[rng.integers(FIRST)], *(FAMILIES[i] for i in more)]
        block = dict(density=rng.uniform(0.05, 0.6), count=rng.integers(1, 7), hollow=rng.random(),
                     period=rng.integers(2, 6), mirror=rng.integers(1, 8))
        ground, inks, mean = rng.random(), rng.integers(1, 6), rng.uniform(6, 18)
        for _ in range(min(50, n - 50 * b)):
            h, w = (canvas, canvas) if fixed else np.minimum(rng.geometric(1 / mean, 2) + 1, canvas)
            colors = rng.permutation(10)
            if ground < 0.5:
                colors = np.append(0, colors[colors != 0])
            g = np.full((h, h if rng.random() < 0.5 else w), colors[0], np.uint8)
            for layer in layers:
                layer(g, rng, colors[1:1 + inks], block)
            yield g, f"block{b:05d}"
