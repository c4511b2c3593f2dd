"""Captioned scenes drawn on demand, and a judge that reads a picture back: composition can be scored, not
just admired.

A scene is one or two flat objects on a dark ground. Its caption says size, colour, shape and, for two
objects, how the first stands to the second: `a large red circle left of a small blue square`. Captions fall
into three parts by the CRC-32 of a two-object caption: 0 modulo 10 is the test, 1 modulo 20 the validation,
which chooses the guidance scale. Neither is ever drawn for training: they ask for composition, not recall.
"""
import itertools
import random
import zlib

import numpy as np
import scipy
from PIL import Image, ImageDraw

GROUND = (40, 40, 48)
COLOURS = {"red": (220, 50, 50), "green": (50, 180, 75), "blue": (50, 90, 220), "yellow": (235, 215, 60),
           "purple": (160, 70, 200), "white": (240, 240, 240)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"large": 6.5, "small": 3.5}  # half the side of the bounding box, in 1/32 of the picture
# axis, sign of second - first
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
FIELDS = ("count", "colour", "shape", "size", "relation", "exact")
_OVER = 4                                               # supersampling before the box filter


def captions(part="train"):
    """Every caption of a part (train, validation, test), in a fixed order."""
    one = [" ".join(("a",) + o) for o in _objects()]
    two = [f"a {' '.join(a)} {r} a {' '.join(b)}"
           for a, r, b in itertools.product(_objects(), RELATIONS, _objects()) if a[1] != b[1]]
    return [c for c in one + two if part_of(c) == part]


def part_of(caption):
    """train, validation (5 % of the two-object captions) or test (10 %)."""
    crc = zlib.crc32(caption.encode())
    if caption.count(" a ") == 0 or (crc % 10 and crc % 20 != 1):
        return "train"
    return "validation" if crc % 10 else "test"


def parse(caption):
    """Caption -> ([(size, colour, shape)] of length 1 or 2, relation or None); ValueError when it is not a
    scene."""
    for relation in RELATIONS:
        first, found, second = caption.partition(f" {relation} ")
        if found:
            return [_parse_object(first), _parse_object(second)], relation
    return [_parse_object(caption)], None


def draw(caption, seed, size=32):
    """Picture uint8 [size, size, 3] of the caption; the seed decides where the objects stand."""
    rng = random.Random(f"{seed}/{caption}")
    objects, relation = parse(caption)
    picture = Image.new("RGB", (size * _OVER,) * 2, GROUND)
    pen = ImageDraw.Draw(picture)
    for (name, colour, shape), (x, y) in zip(objects, _place(objects, relation, rng)):
        _shape(pen, shape, x * size / 32, y * size / 32, SIZES[name] * size / 32, COLOURS[colour])
    return np.asarray(picture.reduce(_OVER))


def scenes(count, seed, part="train", single=0.25, size=32):
    """-> (pictures uint8 [count, size, size, 3], captions); a quarter of a training draw has one object."""
    rng = random.Random(f"{seed}/{part}")
    pool = captions(part)
    ones, twos = [c for c in pool if " a " not in c], [c for c in pool if " a " in c]
    chosen = [rng.choice(ones if ones and rng.random() < single else twos) for _ in range(count)]
    return np.stack([draw(c, f"{seed}/{i}", size) for i, c in enumerate(chosen)]), chosen


# --- judge ---------------------------------------------------------------

def judge(picture, caption):
    """What of the caption is true in the picture uint8 [S, S, 3] -> dict field -> fraction in [0, 1] (or
    None).

    colour, shape and size are fractions of the caption's objects under the best assignment; relation is None
    for one object. exact: everything holds and nothing else is in the picture."""
    objects, relation = parse(caption)
    seen = look(picture)
    best, order = -1, ()
    for perm in itertools.permutations(range(len(seen)), min(len(seen), len(objects))):
        score = sum(_matches(seen[j], objects[i]) @ (1.01, 1.0, 1.0) for i, j in enumerate(perm))
        best, order = max((best, order), (score, perm))
    hits = np.zeros((len(objects), 3))
    for i, j in enumerate(order):
        hits[i] = _matches(seen[j], objects[i])
    right = None
    if relation:
        axis, sign = RELATIONS[relation]
        right = float(len(order) == 2
                      and sign * (seen[order[1]]["xy"][axis] - seen[order[0]]["xy"][axis]) > 3 / 32)
    result = dict(zip(("size", "colour", "shape"), hits.mean(0).tolist()), relation=right)
    result["count"] = float(len(seen) == len(objects))
    result["exact"] = float(result["count"] == 1 and hits.all() and right != 0)
    return result


def judge_all(pictures, texts):
    """Mean of every field over pictures uint8 [N, S, S, 3] and their captions."""
    rows = [judge(p, t) for p, t in zip(pictures, texts)]
    return {f: float(np.mean([r[f] for r in rows if r[f] is not None] or [np.nan])) for f in FIELDS}


SHORT = {"a ": "", "large": "L", "small": "s", "circle": "circ", "square": "sq", "triangle": "tri",
         "left of": "<", "right of": ">", "above": "^", "below": "v"}


def short(caption):
    """'a large red circle left of a small blue square' -> 'L red circ < s blue sq', to fit a picture."""
    for long, brief in SHORT.items():
        caption = caption.replace(long, brief)
    return caption


def look(picture):
    """Objects in a picture uint8 [S, S, 3]: [{colour, shape, size, xy (0..1)}], found without knowing the
    caption."""
    pixels = np.asarray(picture, np.float32)
    side = pixels.shape[0]
    ground = np.float32(GROUND)
    names, palette = list(COLOURS), np.float32(list(COLOURS.values()))
    distance = np.linalg.norm(pixels - ground, axis=-1)
    labels, count = scipy.ndimage.label(distance > 60)
    objects = []
    for k in range(1, count + 1):
        inside = labels == k
        if inside.sum() < 10 * (side / 32) ** 2:
            continue
        core = scipy.ndimage.binary_erosion(inside)
        core = core if core.any() else inside
        nearest = np.linalg.norm(pixels[core][:, None] - palette, axis=-1).argmin(-1)
        colour = np.bincount(nearest, minlength=len(names)).argmax()
        axis = palette[colour] - ground  # coverage of each pixel: its projection from ground to colour
        cover = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1)
        cover = cover * scipy.ndimage.binary_dilation(inside)
        yx = np.array(scipy.ndimage.center_of_mass(cover))
        shape, size = max(_templates(), key=lambda t: _overlap(cover, t, yx, side))
        objects.append(dict(colour=names[colour], shape=shape, size=size,
                            xy=((yx[::-1] + 0.5) / side).tolist()))
    return objects


def _matches(seen, wanted):
    return np.array([seen["size"] == wanted[0], seen["colour"] == wanted[1], seen["shape"] == wanted[2]],
                    float)


def _overlap(cover, template, yx, side):
    """Soft IoU sum(min)/sum(max) of a coverage map and a template drawn at its centroid."""
    shape, size = template
    drawn = Image.new("L", (side * _OVER,) * 2)
    radius = SIZES[size] * side / 32
    lift = radius / 3 if shape == "triangle" else 0  # a triangle's centroid lies below the middle of its box
    _shape(ImageDraw.Draw(drawn), shape, yx[1] + 0.5, yx[0] + 0.5 - lift, radius, 255)
    want = np.asarray(drawn.reduce(_OVER), np.float32) / 255
    return np.minimum(cover, want).sum() / np.maximum(cover, want).sum()


# --- drawing -------------------------------------------------------------

def _objects():
    return list(itertools.product(SIZES, COLOURS, SHAPES))


def _templates():
    return list(itertools.product(SHAPES, SIZES))


def _parse_object(text):
    words = text.split()
    known = ("a",), SIZES, COLOURS, SHAPES
    if len(words) != 4 or any(w not in some for w, some in zip(words, known)):
        raise ValueError(f"not a scene caption: {text!r}; "
                         "e.g. 'a large red circle above a small blue square'")
    return tuple(words[1:])


def _place(objects, relation, rng):
    """Centres (x, y) on a 32 x 32 canvas: inside it, and apart by 2 along the axis that the relation
    names."""
    radii = [SIZES[o[0]] for o in objects]
    centres = [[rng.uniform(r + 1, 31 - r) for _ in "xy"] for r in radii]
    if relation:
        axis, sign = RELATIONS[relation]
        low, high = (0, 1) if sign > 0 else (1, 0)        # who has the smaller coordinate
        gap = radii[0] + radii[1] + 2
        a = rng.uniform(radii[low] + 1, 31 - radii[high] - gap)
        centres[low][axis] = a
        centres[high][axis] = rng.uniform(a + gap, 31 - radii[high])
    return centres


def _shape(pen, shape, x, y, r, fill):
    """One object whose bounding box is [x - r, x + r] x [y - r, y + r], on a canvas enlarged _OVER times."""
    box = [(v * _OVER) for v in (x - r, y - r, x + r, y + r)]
    box[2:] = [v - 1 for v in box[2:]]                    # pillow includes the last row and column
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([((box[0] + box[2]) / 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=fill)
