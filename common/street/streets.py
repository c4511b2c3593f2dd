"""Procedural street scenes with and without roadwork: a data set that a laptop draws in seconds.

A scene is a group: a few frames of one street while the camera moves forward.  Positive scenes hold cones,
barrels, barrier boards, diamond signs, excavators, mesh fences or workers in vests; every scene holds
look-alikes of the same colours or shapes, so neither alone tells: a poster of a cone, a person without a vest
and a yellow van are no roadwork.  Style B (night, pale, noisy) is the domain shift.  One scene is a function
of (seed, scene, style).

    image = frame(seed=0, scene=7, index=1)[0]        PIL RGB, 160 x 160
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

ORANGE, WHITE, RED = (245, 120, 25), (240, 240, 235), (200, 35, 35)
BLACK, YELLOW, GREY, LIME = (25, 25, 25), (235, 200, 40), (120, 120, 120), (200, 235, 40)
POSITIVE = ("cone", "barrel", "barrier", "worksign", "excavator", "fence", "worker")
NEGATIVE = ("car", "van", "awning", "tree", "yellowsign", "stop", "poster", "person")
CITIES = ("north", "river", "hill", "port", "mill")


def _box(pen, x, y, w, h, colour):
    """A filled rectangle standing on (x, y), w wide and h high."""
    pen.rectangle((x - w / 2, y - h, x + w / 2, y), colour)


def _cone(pen, x, y, s, shade):
    pen.polygon([(x - 0.3 * s, y), (x + 0.3 * s, y), (x + 0.05 * s, y - s), (x - 0.05 * s, y - s)],
                shade(ORANGE))
    pen.polygon([(x - 0.19 * s, y - 0.4 * s), (x + 0.19 * s, y - 0.4 * s), (x + 0.13 * s, y - 0.65 * s),
                 (x - 0.13 * s, y - 0.65 * s)], shade(WHITE))
    _box(pen, x, y + 0.08 * s, 0.8 * s, 0.1 * s, shade((200, 90, 15)))


def _barrel(pen, x, y, s, shade):
    _box(pen, x, y, 0.6 * s, s, shade(ORANGE))
    for low in (0.25, 0.6):
        _box(pen, x, y - low * s, 0.6 * s, 0.16 * s, shade(WHITE))


def _barrier(pen, x, y, s, shade, stripe=RED):
    for side in (-0.7, 0.7):
        _box(pen, x + side * s, y, 0.1 * s, s, shade((150, 150, 150)))
    top, wide = y - s, 2.0 * s
    pen.rectangle((x - wide / 2, top, x + wide / 2, top + 0.4 * s), shade(WHITE))
    for k in range(4):
        left = x - wide / 2 + k * wide / 4
        pen.polygon([(left, top + 0.4 * s), (left + 0.22 * s, top + 0.4 * s), (left + 0.42 * s, top),
                     (left + 0.2 * s, top)], shade(stripe))


def _diamond(pen, x, y, s, shade, colour=ORANGE, figure=True):
    _box(pen, x, y, 0.08 * s, 1.1 * s, shade(GREY))
    c, r = y - 1.4 * s, 0.55 * s
    pen.polygon([(x, c - r), (x + r, c), (x, c + r), (x - r, c)], shade(colour))
    if figure:
        _box(pen, x, c + 0.25 * s, 0.16 * s, 0.4 * s, shade(BLACK))
        pen.ellipse((x - 0.09 * s, c - 0.32 * s, x + 0.09 * s, c - 0.14 * s), shade(BLACK))


def _car(pen, x, y, s, shade, colour=ORANGE, high=0.8):
    _box(pen, x, y - 0.15 * s, 1.7 * s, high * s, shade(colour))
    _box(pen, x, y - 0.5 * s, 1.2 * s, 0.3 * s, shade((60, 70, 85)))
    for side in (-0.5, 0.5):
        pen.ellipse((x + side * s - 0.2 * s, y - 0.35 * s, x + side * s + 0.2 * s, y + 0.05 * s),
                    shade(BLACK))


def _excavator(pen, x, y, s, shade):
    """Yellow body and cab on dark tracks, an arm of two beams with a bucket."""
    _box(pen, x, y, 1.6 * s, 0.3 * s, shade(BLACK))
    _box(pen, x + 0.15 * s, y - 0.3 * s, 1.2 * s, 0.5 * s, shade(YELLOW))
    _box(pen, x + 0.1 * s, y - 0.8 * s, 0.5 * s, 0.45 * s, shade((70, 85, 100)))
    arm = [(x - 0.3 * s, y - 0.7 * s), (x - 0.9 * s, y - 1.5 * s), (x - 1.4 * s, y - 0.6 * s)]
    pen.line(arm, shade(YELLOW), max(1, round(0.16 * s)))
    tip, low = x - 1.4 * s, y - 0.6 * s
    pen.polygon([(tip - 0.2 * s, low), (tip + 0.2 * s, low), (tip + 0.1 * s, low + 0.35 * s)], shade(BLACK))


def _fence(pen, x, y, s, shade):
    """Orange plastic mesh between two posts: one sees through it."""
    wide, thin = 2.4 * s, max(1, round(0.07 * s))
    for k in range(7):
        at = x - wide / 2 + k * wide / 6
        pen.line([(at, y), (at, y - 0.9 * s)], shade(ORANGE), thin)
    for k in range(4):
        at = y - 0.15 * s - k * 0.25 * s
        pen.line([(x - wide / 2, at), (x + wide / 2, at)], shade(ORANGE), thin)
    for side in (-0.5, 0.5):
        _box(pen, x + side * wide, y, 0.1 * s, s, shade((70, 60, 50)))


def _person(pen, x, y, s, shade, top, vest):
    """Someone on foot; with a vest: reflecting stripes and a helmet."""
    for side in (-0.12, 0.12):
        _box(pen, x + side * s, y, 0.16 * s, 0.6 * s, shade((45, 50, 80)))
    _box(pen, x, y - 0.55 * s, 0.5 * s, 0.65 * s, shade(top))
    pen.ellipse((x - 0.15 * s, y - 1.5 * s, x + 0.15 * s, y - 1.18 * s), shade((215, 165, 135)))
    if vest:
        for low in (0.7, 0.95):
            _box(pen, x, y - low * s, 0.5 * s, 0.08 * s, shade(WHITE))
        pen.pieslice((x - 0.2 * s, y - 1.6 * s, x + 0.2 * s, y - 1.2 * s), 180, 360, shade(YELLOW))


def _poster(pen, x, y, s, shade):
    """An advertisement that shows a cone; no roadwork, though the cone is a perfect one."""
    for side in (-0.5, 0.5):
        _box(pen, x + side * s, y, 0.1 * s, 0.7 * s, shade(GREY))
    _box(pen, x, y - 0.6 * s, 1.5 * s, 1.4 * s, shade((60, 70, 150)))
    _box(pen, x, y - 0.7 * s, 1.3 * s, 1.2 * s, shade(WHITE))
    _cone(pen, x, y - 0.9 * s, 0.8 * s, shade)


def _thing(pen, kind, x, y, s, shade, pick):
    """Draw one object of foot point (x, y) and size s pixels; pick in [0, 1) chooses its variant."""
    if kind == "cone":
        _cone(pen, x, y, s, shade)
    elif kind == "barrel":
        _barrel(pen, x, y, s, shade)
    elif kind == "barrier":
        _barrier(pen, x, y, s, shade, RED if pick < 0.5 else ORANGE)
    elif kind == "worksign":
        _diamond(pen, x, y, s, shade)
    elif kind == "excavator":
        _excavator(pen, x, y, 1.3 * s, shade)
    elif kind == "fence":
        _fence(pen, x, y, s, shade)
    elif kind == "worker":
        _person(pen, x, y, 1.2 * s, shade, LIME if pick < 0.5 else ORANGE, True)
    elif kind == "person":
        _person(pen, x, y, 1.2 * s, shade, (140, 40, 60) if pick < 0.7 else ORANGE, False)
    elif kind == "poster":
        _poster(pen, x, y, s, shade)
    elif kind == "yellowsign":
        _diamond(pen, x, y, s, shade, YELLOW)
    elif kind == "stop":
        _box(pen, x, y, 0.08 * s, 1.2 * s, shade(GREY))
        pen.regular_polygon((x, y - 1.4 * s, max(0.5 * s, 1)), 8, fill=shade(RED))
    elif kind == "car":
        _car(pen, x, y, 1.5 * s, shade, ORANGE if pick < 0.6 else RED)
    elif kind == "van":
        _car(pen, x, y, 1.6 * s, shade, ORANGE if pick < 0.6 else YELLOW, 1.2)
    elif kind == "awning":
        _box(pen, x, y - 1.2 * s, 2.2 * s, 0.5 * s, shade(ORANGE))
        for k in (-0.6, 0.2):
            _box(pen, x + k * s, y - 1.2 * s, 0.3 * s, 0.5 * s, shade(WHITE))
    elif kind == "tree":
        _box(pen, x, y, 0.25 * s, 1.2 * s, shade((90, 60, 40)))
        pen.ellipse((x - 0.8 * s, y - 2.4 * s, x + 0.8 * s, y - s), shade((225, 120 + int(40 * pick), 30)))


def layout(seed, scene, style="A", prior=0.5):
    """What stands in a scene, before any frame: dict(label, things [(kind, side, depth, pick)], sky, night,
    ...)."""
    rng = random.Random(hashlib.sha256(f"{seed}/{scene}/{style}".encode()).digest())
    label = int(rng.random() < prior)
    things = [(rng.choice(NEGATIVE), rng.uniform(-1, 1), rng.uniform(0.1, 0.95), rng.random())
              for _ in range(rng.randint(3, 7))]
    if label:
        things += [(rng.choice(POSITIVE), rng.uniform(-0.9, 0.9), rng.uniform(0.2, 0.95), rng.random())
                   for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.5:
            side = rng.uniform(-0.6, 0.6)
            things += [("cone", side, z, 0.0) for z in (0.35, 0.55, 0.8)]
    dark = style == "B"
    return dict(label=label, things=things, style=style, night=rng.random() < (0.6 if dark else 0.15),
                sky=rng.choice([(130, 170, 225), (175, 178, 182), (205, 160, 140)]),
                houses=[(rng.randint(70, 150), rng.uniform(0.35, 0.8), rng.random()) for _ in range(6)],
                saturation=rng.uniform(0.35, 0.8) if dark else rng.uniform(0.7, 1.2),
                brightness=rng.uniform(0.8, 1.2), noise=rng.uniform(8, 16) if dark else rng.uniform(2, 7),
                weather=rng.choice(("clear", "cloudy", "rain")), city=rng.choice(CITIES))


def frame(seed, scene, index, style="A", size=160, prior=0.5):
    """Frame `index` of a scene -> (PIL RGB size x size, dict of facts with the boxes of roadwork objects)."""
    plan = layout(seed, scene, style, prior)
    rng = random.Random(hashlib.sha256(f"{seed}/{scene}/{style}/{index}".encode()).digest())
    high = int(size * 0.42)
    image = Image.new("RGB", (size, size), plan["sky"])
    pen = ImageDraw.Draw(image)
    for k, (grey, tall, lit) in enumerate(plan["houses"]):
        left, wide = k * size / 6, size / 6
        pen.rectangle((left, high * (1 - tall), left + wide, high), (grey, grey - 10, grey - 20))
        for row in range(3):
            for column in range(3):
                x, y = left + wide * (0.15 + 0.28 * column), high * (1 - tall * (0.9 - 0.28 * row))
                pen.rectangle((x, y, x + wide * 0.14, y + high * 0.08),
                              (250, 225, 140) if lit > 0.5 else (50, 55, 70))
    pen.rectangle((0, high, size, size), (95, 125, 70))
    shift = rng.uniform(-8, 8) * size / 160
    middle = size / 2 + shift
    pen.polygon([(middle - 0.03 * size, high), (middle + 0.03 * size, high), (middle + 0.62 * size, size),
                 (middle - 0.62 * size, size)], (88, 88, 92))
    # the dashes run towards the camera
    for k in range(7):
        z0 = (k + 0.3 * index) / 7 % 1
        y0, y1 = (high + (size - high) * z ** 1.5 for z in (z0, min(z0 + 0.06, 1)))
        wide = (0.004 + 0.016 * z0) * size
        pen.rectangle((middle - wide, y0, middle + wide, max(y1, y0)), (225, 225, 215))
    boxes = []
    for kind, side, depth, pick in sorted(plan["things"], key=lambda t: t[2]):
        z = min(depth * (1 + 0.06 * index), 1.0)
        y = high + (size - high) * 0.95 * z ** 1.5
        s = size * (0.03 + 0.2 * z ** 1.5) * 0.7
        edge = side if kind in POSITIVE else side + (0.35 if side > 0 else -0.35)
        x = middle + edge * size * (0.12 + 0.5 * z)
        _thing(pen, kind, x, y, s, lambda c: c, pick)
        if kind in POSITIVE and 0 < x < size:
            boxes.append([round(v, 1) for v in (x - s, y - 2 * s, x + s, y)])
    image = ImageEnhance.Color(image).enhance(plan["saturation"])
    dim = rng.uniform(0.3, 0.5) if plan["night"] else plan["brightness"]
    image = ImageEnhance.Brightness(image).enhance(dim).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, plan["noise"], (size, size, 3))
    image = Image.fromarray((np.asarray(image, np.float32) + noise).clip(0, 255).round().astype(np.uint8))
    facts = dict(label=plan["label"], style=style, night=plan["night"], weather=plan["weather"],
                 city=plan["city"],
                 daytime="night" if plan["night"] else "day", boxes=boxes,
                 largest_px=round(max([b[3] - b[1] for b in boxes], default=0.0) / 2, 1))
    return image, facts


def write(out, scenes=700, frames=3, size=160, seed=0, prior=0.5, shift=60, min_visible_px=3.0):
    """Draw a data set: out/index.jsonl, out/images/*.jpg, and out/shift/ (style B, never for fitting) ->
    counts."""
    out, counts = Path(out), {}
    for style, number, root in (("A", scenes, out), ("B", shift, out / "shift")):
        if not number:
            continue
        (root / "images").mkdir(parents=True, exist_ok=True)
        rows, scene = [], -1
        while len(rows) < number * frames:
            scene += 1
            drawn = [frame(seed, scene, k, style, size, prior) for k in range(frames)]
            if drawn[0][1]["label"] and max(f["largest_px"] for _, f in drawn) < min_visible_px:
                continue                                                    # nothing a model could see
            for k, (image, facts) in enumerate(drawn):
                name = f"images/{style}{scene:05d}_{k}.jpg"
                image.save(root / name, quality=92)
                rows.append(dict(path=name, group=f"{style}{scene:05d}", frame=k, width=size, height=size,
                                 source=style, **facts))
        text = "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows)
        # last: its presence means complete
        (root / "index.jsonl").write_text(text)
        counts["shift" if style == "B" else "images"] = len(rows)
    return counts
