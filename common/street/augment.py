"""Image augmentations on Pillow images and torch tensors, torchvision's definitions and order of random
draws.

Every draw comes from the torch.Generator handed in, so an image is a function of (image, seed).
TrivialAugmentWide arXiv 2103.10158, RandAugment 1909.13719, AugMix 1912.02781, RandomErasing 1708.04896,
MixUp 1710.09412, CutMix 1905.04899.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps, ImageStat

OPS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
       "Contrast",
       "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
AUGMIX_OPS = OPS[1:6] + ("Posterize", "Solarize", "AutoContrast", "Equalize") + OPS[6:10]
SIGNED = set(OPS[1:10])


def rand(g, low=0.0, high=1.0):
    """One uniform number from the generator."""
    return float(torch.empty(1).uniform_(low, high, generator=g))


def randint(g, low, high):
    """One integer of low .. high - 1."""
    return int(torch.randint(low, high, (), generator=g))


# --- pixel operations ----------------------------------------------------


def apply_op(image, name, m, resample=Image.NEAREST):
    """PIL RGB -> PIL RGB; m: signed magnitude of the operation.  Corners that come free are black."""
    # the inverse map, output to input
    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, resample)
    if name == "Identity":
        return image
    if name == "ShearX":
        return affine(1, m, 0, 0, 1, 0)
    if name == "ShearY":
        return affine(1, 0, 0, m, 1, 0)
    if name == "TranslateX":
        return affine(1, 0, -int(m), 0, 1, 0)
    if name == "TranslateY":
        return affine(1, 0, 0, 0, 1, -int(m))
    if name == "Rotate":
        return image.rotate(m, resample)
    if name in ("Brightness", "Contrast"):
        grey = int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5) if name == "Contrast" else 0
        return image.point(blend_table(grey, 1 + m))
    if name in ("Color", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(1 + m)
    if name == "Posterize":
        # no bits left: Pillow refuses, the image is black
        if int(m) == 0:
            return Image.new("RGB", image.size)
        return ImageOps.posterize(image, int(m))
    if name == "Solarize":
        return ImageOps.solarize(image, 255 * m)
    return {"AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize,
            "Invert": ImageOps.invert}[name](image)


@functools.lru_cache(64)
def magnitudes(name, bins, shear, translate, rotate, enhance, bits, posterize_from=8):
    """The `bins` magnitudes of an operation, weakest first, float32 as torchvision's; None where it has
    none."""
    if name in ("Identity", "AutoContrast", "Equalize"):
        return None
    if name == "Posterize":
        return (posterize_from - (torch.arange(bins) / ((bins - 1) / bits)).round()).int()
    if name == "Solarize":
        return torch.linspace(1.0, 0.0, bins)
    top = {"Shear": shear, "Trans": translate, "Rotat": rotate}.get(name[:5], enhance)
    return torch.linspace(0.0, top, bins)


def blend_table(grey, factor):
    """Pillow's blend of every byte with one grey, as a table for three channels: ImageEnhance's Brightness
    (black) and Contrast (the mean) without a grey image; the same bytes, for it is Pillow that blends."""
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    return 3 * list(Image.blend(Image.new("L", (256, 1), grey), ramp, factor).tobytes())


def _signed(g, name, m):
    return -m if name in SIGNED and float(torch.rand((), generator=g)) <= 0.5 else m


def trivial_augment_wide(image, g, bins=31, scale_to_size=False):
    """One operation of 14, one strength of `bins`.  scale_to_size: 32 pixels of shift at side 224, less
    below."""
    name = OPS[randint(g, 0, len(OPS))]
    limit = 32.0 * (min(image.size) / 224 if scale_to_size else 1)
    table = magnitudes(name, bins, 0.99, limit, 135.0, 0.99, 6)
    m = 0.0 if table is None else _signed(g, name, float(table[randint(g, 0, bins)]))
    return apply_op(image, name, m)


def rand_augment(image, g, count=2, level=9, bins=31):
    """`count` operations at strength index `level`."""
    for _ in range(count):
        name = OPS[randint(g, 0, len(OPS))]
        side = image.height if name == "TranslateY" else image.width
        table = magnitudes(name, bins, 0.3, 150.0 / 331.0 * side, 30.0, 0.9, 4)
        image = apply_op(image, name, 0.0 if table is None else _signed(g, name, float(table[level])))
    return image


def aug_mix(image, g, severity=3, width=3, depth=-1, alpha=1.0, bins=10):
    """w0 image + sum_i w_i chain_i(image), weights from two Dirichlets; truncated to uint8."""
    def dirichlet(n):
        return torch._sample_dirichlet(torch.full((n,), alpha), generator=g).numpy()
    keep, mixed = dirichlet(2)
    weights = dirichlet(width) * mixed
    out = keep * np.asarray(image, np.float32)
    for w in weights:
        chain = image
        for _ in range(depth if depth > 0 else randint(g, 1, 4)):
            name = AUGMIX_OPS[randint(g, 0, len(AUGMIX_OPS))]
            side = image.height if name == "TranslateY" else image.width
            table = magnitudes(name, bins, 0.3, side / 3.0, 30.0, 0.9, 4, 4)
            m = 0.0 if table is None else _signed(g, name, float(table[randint(g, 0, severity)]))
            chain = apply_op(chain, name, m, Image.BILINEAR)
        out += w * np.asarray(chain, np.float32)
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


# --- geometry and colour ---------------------------------------------------


def resized_crop(image, g, size, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop, bilinear antialiased: PIL -> PIL of size x size."""
    W, H = image.size
    for _ in range(10):
        area = W * H * rand(g, *scale)
        aspect = math.exp(rand(g, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            top, left = randint(g, 0, H - h + 1), randint(g, 0, W - w + 1)
            break
    else:
        w, h = W, H
        if W / H < ratio[0]:
            h = round(W / ratio[0])
        elif W / H > ratio[1]:
            w = round(H * ratio[1])
        top, left = (H - h) // 2, (W - w) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.BILINEAR)


def flip(image, g, p=0.5):
    """Left to right with probability p."""
    return image.transpose(Image.FLIP_LEFT_RIGHT) if float(torch.rand(1, generator=g)) < p else image


def color_jitter(image, g, brightness, contrast, saturation, hue):
    """The four changes in random order; factors U[max(0, 1-a), 1+a], hue U[-h, h] turns of the circle."""
    order = torch.randperm(4, generator=g).tolist()
    factors = [rand(g, max(0.0, 1 - a), 1 + a) if a else None for a in (brightness, contrast, saturation)]
    turn = rand(g, -hue, hue) if hue else None
    for k in order:
        if k < 3 and factors[k] is not None:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k]
            image = kind(image).enhance(factors[k])
        elif k == 3 and turn is not None:
            h, s, v = image.convert("HSV").split()
            # wraps modulo 256
            h = Image.fromarray((np.asarray(h, np.int16) + int(turn * 255)).astype(np.uint8))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
    return image


def grayscale(image):
    """ITU-R 601-2 luma in all three channels."""
    return image.convert("L").convert("RGB")


def gaussian_blur(image, kernel, sigma):
    """Separable Gaussian of odd width `kernel`, reflected borders, rounded to bytes."""
    at = torch.arange(kernel) - (kernel - 1) / 2
    taps = torch.exp(-0.5 * (at / sigma) ** 2)
    taps /= taps.sum()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[:, None]
    x = F.pad(x, [kernel // 2] * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return Image.fromarray(x[:, 0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def random_erasing(x_CHW, g, p=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3), noise=False):
    """Zero (the mean colour of a normalised image), or normal noise, in a random rectangle; a new tensor."""
    if float(torch.rand(1, generator=g)) >= p:
        return x_CHW
    C, H, W = x_CHW.shape
    for _ in range(10):
        area = H * W * rand(g, *scale)
        aspect = math.exp(rand(g, math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (h < H and w < W):
            continue
        fill = torch.randn(C, h, w, generator=g) if noise else 0.0
        top, left = randint(g, 0, H - h + 1), randint(g, 0, W - w + 1)
        x_CHW = x_CHW.clone()
        x_CHW[:, top:top + h, left:left + w] = fill
        break
    return x_CHW


# --- batches -----------------------------------------------------------------


def _beta(g, a):
    return float(torch._sample_dirichlet(torch.full((2,), float(a)), generator=g)[0])


def mixup(x_BCHW, target_BK, g, alpha=0.2):
    """lam x + (1 - lam) x rolled by one image, soft targets the same; lam ~ Beta(alpha, alpha)."""
    lam = _beta(g, alpha)
    return lam * x_BCHW + (1 - lam) * x_BCHW.roll(1, 0), lam * target_BK + (1 - lam) * target_BK.roll(1, 0)


def cutmix(x_BCHW, target_BK, g, alpha=1.0):
    """A rectangle of area share 1 - lam comes from the image before; targets by the area really covered."""
    lam, (H, W) = _beta(g, alpha), x_BCHW.shape[2:]
    cx, cy = randint(g, 0, W), randint(g, 0, H)
    half = 0.5 * math.sqrt(1 - lam)
    rw, rh = int(half * W), int(half * H)
    x1, y1, x2, y2 = max(cx - rw, 0), max(cy - rh, 0), min(cx + rw, W), min(cy + rh, H)
    x_BCHW = x_BCHW.clone()
    x_BCHW[:, :, y1:y2, x1:x2] = x_BCHW.roll(1, 0)[:, :, y1:y2, x1:x2]
    lam = 1 - (x2 - x1) * (y2 - y1) / (W * H)
    return x_BCHW, lam * target_BK + (1 - lam) * target_BK.roll(1, 0)
