"""What happens to pictures before and after the model: masks, compositing, recipes inside PNG files, blocked
pictures.

A recipe is the full list of flags that made a picture, so that `--recipe IMAGE` makes it again.
"""
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from common import images
from common.files import write_atomic
from common.flags import UserError
from common.t2i.captions import to_images

KEY = "dit_t2i"               # the PNG text chunk that holds the recipe as JSON


# --- reading -------------------------------------------------------------


def read_rgb(path, size=None):
    """Picture at path -> uint8 [H, W, 3]; size (w, h): scaled to cover it and cropped in the centre."""
    try:
        image = images.decode(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    return fit(image, size)


def fit(image, size):
    if size and image.size != tuple(size):
        w, h = size
        scale = max(w / image.width, h / image.height)
        wide, high = max(w, round(image.width * scale)), max(h, round(image.height * scale))
        image = image.resize((wide, high), Image.Resampling.LANCZOS)
        left, top = (wide - w) // 2, (high - h) // 2
        image = image.crop((left, top, left + w, top + h))
    return np.asarray(image)


def read_mask(path, size):
    """Mask picture -> bool [H, W], white (over half) = repaint."""
    mask = read_rgb(path, size).mean(-1) > 127.5
    if not mask.any():
        raise UserError(f"{path}: no white pixel in the mask, nothing to repaint")
    return mask


def latent_mask(mask_HW, factor):
    """bool [H, W] -> float [1, 1, H/f, W/f]: a cell is repainted when any of its pixels is."""
    return F.max_pool2d(torch.from_numpy(mask_HW).float()[None, None], factor)


def beside(net, control, init, mask_HW, shape, vae, to_latent):
    """What the network reads beside the noisy latents -> [1, net.extra, H/f, W/f], or None.

    As many channels as latents: the latents of the --control picture. Otherwise mask and picture: without a
    picture everything is masked."""
    if not net.extra:
        return None
    if net.extra == net.channels:
        if not control:
            raise UserError("this model follows a picture: give it with --control PICTURE")
        return to_latent(to_images(read_rgb(control, shape)[None]))
    w, h = shape
    mask = torch.ones(1, 1, h, w) if mask_HW is None else torch.from_numpy(mask_HW).float()[None, None]
    image = torch.zeros(1, 3, h, w) if init is None else to_images(init[None])
    return masked(image, mask, vae.factor, to_latent, whole=net.extra > net.channels + 1)


def masked(image, mask_B1HW, factor, to_latent, whole=False):
    """Mask and latents of the picture with the masked part grey -> [B, 1 + z, H/f, W/f]: one mask pixel a
    cell. whole (FLUX fill): latents first, then all f * f mask pixels of the cell -> [B, z + f^2, ...]."""
    held = to_latent(image * (1 - mask_B1HW))
    if whole:
        return torch.cat([held, F.pixel_unshuffle(mask_B1HW, factor).to(held)], 1)
    return torch.cat([F.interpolate(mask_B1HW, held.shape[2:]).to(held), held], 1)


@torch.no_grad()
def holes(pixels_BHWC, vae, everything=0.1):
    """Training pictures with a rectangle cut out of each -> what `masked` makes of them; `everything`: the
    part that loses the whole picture, so that the model can also paint without one."""
    image, rng = to_images(pixels_BHWC), np.random
    B, _, H, W = image.shape
    mask = torch.zeros(B, 1, H, W)
    for one in mask:
        h, w = (H, W) if rng.random() < everything else (rng.randint(n // 4, n + 1) for n in (H, W))
        top, left = rng.randint(H - h + 1), rng.randint(W - w + 1)
        one[:, top:top + h, left:left + w] = 1
    device = next(vae.parameters()).device
    return masked(image.to(device), mask.to(device), vae.factor,
                  lambda v: (vae.encode(v)[0].float() - vae.shift) * vae.scale)


class WithChannels(torch.nn.Module):
    """net(x, ...) of a model whose first layer reads more channels than it predicts; others are constant."""

    def __init__(self, net, rest_1CHW):
        super().__init__()
        self.net, self.rest = net, rest_1CHW

    def forward(self, x, *args, **cond):
        return self.net(torch.cat([x, self.rest.to(x).expand(len(x), -1, -1, -1)], 1), *args, **cond)


def region(mask_HW, margin, aspect):
    """Box (left, top, right, bottom) around the mask and `margin` pixels, grown to width / height = aspect as
    far as the picture allows."""
    H, W = mask_HW.shape
    rows, cols = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    sides = [(cols[0] - margin, cols[-1] + 1 + margin, W), (rows[0] - margin, rows[-1] + 1 + margin, H)]
    wide, high = (min(b, n) - max(a, 0) for a, b, n in sides)
    wide, high = max(wide, round(high * aspect)), max(high, round(wide / aspect))
    box = []
    for (a, b, n), size in zip(sides, (wide, high)):
        size = min(size, n)
        start = min(max((a + b - size) // 2, 0), n - size)
        box.append((int(start), int(start + size)))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def resized(pixels, size, kind=Image.Resampling.LANCZOS):
    """uint8 or bool [H, W(, 3)] -> the same at size (w, h)."""
    image = Image.fromarray(pixels.astype(np.uint8) * (255 if pixels.dtype == bool else 1)).resize(size, kind)
    return np.asarray(image) > 127 if pixels.dtype == bool else np.asarray(image)


def cut(pixels, box, size):
    left, top, right, bottom = box
    return resized(pixels[top:bottom, left:right], size)


def paste(made, whole, mask_HW, box, feather=0):
    """A repainted cut back into its picture; pixels outside the mask keep their bytes."""
    left, top, right, bottom = box
    canvas = whole.copy()
    canvas[top:bottom, left:right] = resized(made, (right - left, bottom - top))
    return composite(canvas, whole, mask_HW, feather)


def composite(made, original, mask_HW, feather=0):
    """Paste the repainted part back: uint8 [H, W, 3]. Pixels outside the mask keep their bytes exactly.

    feather: pixels over which the edge fades, inside the mask only."""
    weight = mask_HW.astype(np.float32)
    if feather > 0:
        soft = Image.fromarray((weight * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(feather))
        weight = weight * np.clip(2 * np.asarray(soft, np.float32) / 255 - 1, 0, 1)
    mixed = weight[..., None] * made + (1 - weight[..., None]) * original
    return np.where(mask_HW[..., None], mixed.round().astype(np.uint8), original)


def block(pixels, action):
    """What to do with a flagged picture: report (nothing), blur or black."""
    if action == "black":
        return np.zeros_like(pixels)
    if action == "blur":
        radius = max(pixels.shape[:2]) / 12
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    return pixels


# --- recipes -------------------------------------------------------------


def save_png(path, pixels, recipe):
    """PNG with its recipe: one chunk in the widely read 'parameters' layout, one as JSON."""
    info = PngInfo()
    info.add_text("parameters", parameters(recipe, pixels.shape[1], pixels.shape[0]))
    info.add_text(KEY, json.dumps(recipe, sort_keys=True))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def parameters(recipe, width, height):
    """prompt, negative prompt and one line of settings, as other programs write and read them."""
    names = dict(steps="Steps", sampler="Sampler", cfg="CFG scale", seed="Seed")
    line = [f"{label}: {recipe[key]}" for key, label in names.items() if key in recipe]
    line += [f"Size: {width}x{height}"] + [f"Model hash: {h[:10]}"
                                           for h in list(recipe.get("sha256", {}).values())[:1]]
    negative = [f"Negative prompt: {recipe['negative']}"] if recipe.get("negative") else []
    return "\n".join([str(recipe.get("prompt", "")), *negative, ", ".join(line)])


def read_recipe(path):
    """The recipe that save_png wrote -> dict; UserError when the file holds none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.text.get(KEY)
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError):
        raise UserError(f"{path} is not a readable PNG") from None
    try:
        recipe = json.loads(text or "")
        return recipe if isinstance(recipe, dict) else {}["not an object"]
    except (ValueError, KeyError, RecursionError):
        raise UserError(f"{path} holds no recipe: expected a PNG written by this program") from None
