"""Single images: safe decoding, the crops of the field, and procedural pictures for when no data is given.

Everything here is a pure function of its arguments; randomness comes in as a numpy Generator.
"""

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageDraw

from common.flags import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")                # no EPS: it starts ghostscript
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


# --- decoding and crops ------------------------------------------------

def decode(data):
    """bytes (or a path) of an encoded image -> PIL RGB image, judged by content, never by file name.

    EXIF rotation is not applied (ImageNet convention). Raises OSError or ValueError on anything but a whole
    8-bit image; a decompression bomb counts as damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)                    # odd metadata in a sound image
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
                if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                    raise ValueError(f"{image.mode} images (more than 8 bits a channel) are not supported")
                return image.convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
            raise ValueError(f"refused as a decompression bomb: {e}") from None
        except (SyntaxError, EOFError, IndexError, KeyError, TypeError) as e:    # pillow, on damaged files
            raise ValueError(f"damaged image: {e}") from None


def center_crop(image, size):
    """ADM's centre crop: PIL image -> PIL image of size x size.

    Halve with a box filter while the short side is at least twice `size`, bicubic to the size, crop the
    middle. Small images are enlarged, bicubic. The same pixels as guided-diffusion, DiT, MAR and EDM2.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pad_to(image, size):
    """Put a small image in the middle of a black size x size square (28 -> 32 for the MNIST family)."""
    if max(image.size) > size:
        raise UserError(f"cannot pad a {image.width}x{image.height} image to {size}x{size}; crop instead")
    square = Image.new(image.mode, (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def crop_box(width, height, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """(left, top, w, h) of RandomResizedCrop by torchvision's rule: area uniform in `scale` of the image, log
    aspect uniform in log `ratio`, ten tries, then the largest centred box with an aspect in `ratio`."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(image, size, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop with Pillow's antialiased bicubic: PIL image -> PIL image of size x size."""
    left, top, w, h = crop_box(image.width, image.height, rng, scale, ratio)
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)


# --- procedural images -------------------------------------------------

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "stripes", "checker", "dots", "crescent")


def regular(n, inner=1.0):
    """Corners of a regular n-gon of radius 1; inner < 1 pulls every second one in (a star)."""
    angles = 2 * np.pi * np.arange(n) / n
    radius = np.where(np.arange(n) % 2, inner, 1.0)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * radius[:, None]


def box(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


# Each class is a list of (kind, geometry in the square [-1, 1]^2, 1 draw or 0 erase).
PARTS = {
    "disc": [("disc", (0, 0, 0.9), 1)],
    "ring": [("disc", (0, 0, 0.95), 1), ("disc", (0, 0, 0.55), 0)],
    "square": [("poly", box(-0.8, -0.8, 0.8, 0.8), 1)],
    "triangle": [("poly", regular(3), 1)],
    "star": [("poly", regular(10, 0.42), 1)],
    "cross": [("poly", box(-0.3, -0.95, 0.3, 0.95), 1), ("poly", box(-0.95, -0.3, 0.95, 0.3), 1)],
    "stripes": [("poly", box(-0.9, y, 0.9, y + 0.28), 1) for y in (-0.9, -0.39, 0.11, 0.62)],
    "checker": [("poly", box(x, y, x + 0.6, y + 0.6), 1) for x, y in
                ((-0.9, -0.9), (0.3, -0.9), (-0.3, -0.3), (-0.9, 0.3), (0.3, 0.3))],
    "dots": [("disc", (x, y, 0.24), 1) for x in (-0.66, 0, 0.66) for y in (-0.66, 0, 0.66)],
    "crescent": [("disc", (0, 0, 0.95), 1), ("disc", (0.45, 0, 0.75), 0)],
}


def render(shape, size, rng):
    """Draw one picture of the class: PIL RGB, size x size. Pose, scale, colour and background come from rng.

    The shape spans 50-90 % of the frame, rotated freely, lighter or darker than its background, in any
    colour: only form tells the class, and 16 pixels are enough to see it.
    """
    over = 4                                                            # supersampling against jagged edges
    half, turn = size * over / 2, rng.uniform(0, 2 * np.pi)
    radius = half * rng.uniform(0.5, 0.9)
    centre = half + rng.uniform(-1, 1, 2) * (half - radius) * 0.9
    spin = radius * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    mask = Image.new("L", (size * over, size * over))
    pen = ImageDraw.Draw(mask)
    for kind, geometry, on in PARTS[shape]:
        if kind == "poly":
            pen.polygon([tuple(p) for p in geometry @ spin + centre], fill=255 * on)
        else:
            x, y = np.array(geometry[:2]) @ spin + centre
            r = geometry[2] * radius
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255 * on)
    mask = np.asarray(mask.reduce(over), np.float32)[..., None] / 255

    dark, light = rng.uniform(10, 80), rng.uniform(165, 245)
    below, above = (dark, light) if rng.random() < 0.5 else (light, dark)
    slope = rng.uniform(-1, 1, 2) @ np.mgrid[-1:1:size * 1j, -1:1:size * 1j].reshape(2, -1) * 12
    ground = tint(below, rng) + slope.reshape(size, size, 1) + rng.normal(0, 4, (size, size, 1))
    x_HWC = ground * (1 - mask) + tint(above, rng) * mask
    return Image.fromarray(x_HWC.clip(0, 255).round().astype(np.uint8))


def tint(luminance, rng):
    """A random RGB colour of roughly the given luminance (0..255)."""
    colour = rng.uniform(-1, 1, 3)
    return luminance + 60 * (colour - colour @ np.array([0.299, 0.587, 0.114]))
