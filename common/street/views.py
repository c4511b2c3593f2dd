"""Images to network inputs: preprocessing, batches that need no state, and several views of one sample.

C channels  S side  V views of a sample
"""

import concurrent.futures
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(image):
    """PIL RGB -> float [3, H, W], x / 255 less mean over std of ImageNet."""
    x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x_CHW - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def letterbox(image, side):
    """Fit into a side x side square of the mean colour -> (PIL, box (x1, y1, x2, y2) of the content)."""
    scale = min(side / image.width, side / image.height)
    w, h = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    x, y = (side - w) // 2, (side - h) // 2
    canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN))
    canvas.paste(image.resize((w, h), Image.BILINEAR), (x, y))
    return canvas, (x, y, x + w, y + h)


def resized(image, size, how="square"):
    """PIL RGB -> normalised [3, size, size].  square: aspect not kept, as the released processor does."""
    if how == "letterbox":
        image = letterbox(image, size)[0]
    x_CHW, (w, h) = normalised(image), image.size
    # DINOv3's own evaluation transform
    if how == "shorter_crop":
        short = round(size * 256 / 224)
        w, h = (short, round(h * short / w)) if w < h else (round(w * short / h), short)
        x_CHW = F.interpolate(x_CHW[None], (h, w), mode="bicubic", antialias=True)[0]
        top, left = (h - size) // 2, (w - size) // 2
        return x_CHW[:, top:top + size, left:left + size]
    return F.interpolate(x_CHW[None], (size, size), mode="bilinear", antialias=True)[0]


def stack(make, indices, workers=0):
    """torch.stack of make(i); threads, because Pillow decodes without Python's lock."""
    if workers < 2:
        return torch.stack([make(i) for i in indices])
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return torch.stack(list(pool.map(make, indices)))


def step_indices(n, per_step, step, seed):
    """The samples of a step (1-based): epochs are permutations of (seed, epoch), so resuming needs no
    state."""
    epoch, k = divmod(step - 1, max(1, math.ceil(n / per_step)))
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return epoch, order[k * per_step:(k + 1) * per_step]


def frames_of(samples, i):
    """Sample i, then two more frames of its group, or itself when there are none."""
    others = [j for j in samples.of_group(i) if j != i][:2]
    return [i, *(others + [i, i])[:2]]


def make_views(samples, i, S, how="square", source="tiles", canvas=0, grid=3, overlap=0.15):
    """Views of sample i -> (x [V, 3, S, S], boxes [V, 4] in pixels): the whole image first.

    tiles: grid x grid overlapping tiles of it; frames: those of frames_of.
    """
    if source == "frames":
        views = [samples.image(j) for j in frames_of(samples, i)]
        return torch.stack([resized(v, S, how) for v in views]), \
            torch.tensor([[0.0, 0.0, v.width, v.height] for v in views])
    image = samples.image(i)
    box = (0, 0, *image.size)
    if canvas:
        image, box = letterbox(image, canvas)
    boxes = [box]
    w, h = (box[2] - box[0]) / grid, (box[3] - box[1]) / grid
    for row in range(grid):
        for column in range(grid):
            x, y = box[0] + column * w, box[1] + row * h
            boxes.append((max(box[0], round(x - overlap * w)), max(box[1], round(y - overlap * h)),
                          min(box[2], round(x + w * (1 + overlap))),
                          min(box[3], round(y + h * (1 + overlap)))))
    whole = resized(samples.image(i), S, how) if not canvas else resized(image.crop(box), S)
    return torch.stack([whole] + [resized(image.crop(b), S)
                                  for b in boxes[1:]]), torch.tensor(boxes, dtype=torch.float32)
