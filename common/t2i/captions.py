"""Captioned pictures: folders, JSONL and tar shards; aspect-ratio buckets; latents cached by content; a word
list.

    for item in items(path, size=256, step=64): item.key, item.bucket (w, h), item.pixels [h, w, 3],
    item.caption buckets = latents(pixel_buckets(path, 256), encode)      all of one shape, so a batch comes
    from one bucket

A damaged picture, or one without a caption, is named on stderr, counted and left out; never fatal, never
silent.
"""
import hashlib
import json
import math
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import images
from common.flags import UserError

TEXT = (".txt", ".caption")
LARGEST = 64 << 20                                           # bytes: a larger member is no picture


# --- sources -------------------------------------------------------------


def pairs(path):
    """Yield (name, image bytes, caption or None) from a folder, a .jsonl, or tar shards
    `part-{000..012}.tar`."""
    path = Path(path)
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".tar":
        for shard in braces(str(path)):
            yield from _tar(shard)
    elif path.is_dir():
        tables = [path / n for n in ("metadata.jsonl", "captions.jsonl") if (path / n).is_file()]
        shards = sorted(path.glob("*.tar"))
        if tables:
            yield from _jsonl(tables[0])
        elif shards:
            for shard in shards:
                yield from _tar(shard)
        else:
            yield from _folder(path)
    else:
        raise UserError(f"no captioned pictures at {path}: expected a folder, a .jsonl file or .tar shards")


def braces(pattern):
    """'a-{00..02}.tar' -> a-00.tar, a-01.tar, a-02.tar; a plain path is itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    low, high = found[1], found[2]
    return [pattern[:found.start()] + str(i).zfill(len(low)) + pattern[found.end():]
            for i in range(int(low), int(high) + 1)]


def _folder(path):
    for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in images.EXTENSIONS):
        texts = [file.with_suffix(s) for s in TEXT if file.with_suffix(s).is_file()]
        yield str(file), file.read_bytes(), texts[0].read_text(encoding="utf-8") if texts else None


def _jsonl(path):
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row.get("file_name", row.get("image"))
            caption = row.get("text", row.get("caption"))
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{path}, line {number}: not a JSON object") from None
        if not isinstance(name, str):
            raise UserError(f"{path}, line {number}: no 'file_name' or 'image' in it")
        file = path.parent / name
        try:
            data = file.read_bytes()
        except (OSError, ValueError):                        # absent, or no name that a file could have
            data = b""
        yield str(file), data, caption


def _tar(path):
    """WebDataset: members that share the name up to the first dot are one sample."""
    key, sample = None, {}
    try:
        with tarfile.open(path, "r:") as tar:                # packed tars could unpack to anything
            for member in tar:
                if not member.isreg() or member.issparse() or member.size > LARGEST:
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if (folder, stem) != key and sample:
                    yield from _sample(path, key, sample)
                    sample = {}
                key = folder, stem
                sample["." + kind.lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if not Path(path).is_file():
            raise UserError(f"no tar shard at {path}") from None
        print(f"{path}: damaged shard, the rest of it is left out: {error}", file=sys.stderr)
    if sample:
        yield from _sample(path, key, sample)


def _sample(path, key, sample):
    picture = next((v for k, v in sample.items() if k in images.EXTENSIONS), None)
    if picture is None:
        return
    caption = next((sample[s].decode("utf-8", "replace") for s in TEXT if s in sample), None)
    if caption is None and ".json" in sample:
        try:
            caption = json.loads(sample[".json"]).get("caption")
        except (ValueError, AttributeError, RecursionError):
            caption = None
    yield f"{path}:{'/'.join(filter(None, key))}", picture, caption


# --- buckets -------------------------------------------------------------


def bucket_sizes(size, step=64, least=256, most=1024):
    """Width x height of every bucket of about size^2 pixels, sides multiples of step in [least, most]."""
    area, found = size * size, {(size // step * step,) * 2}
    for width in range(least, most + step, step):
        height = min(most, area // width // step * step)
        if height >= least:
            found |= {(width, height), (height, width)}
    return sorted(found)


def into_bucket(image, sizes):
    """PIL image -> (bucket (w, h), uint8 [h, w, 3]): nearest aspect ratio (in log), scaled to cover, centre
    crop."""
    ratio = math.log(image.width / image.height)
    w, h = min(sizes, key=lambda s: abs(math.log(s[0] / s[1]) - ratio))
    scale = max(w / image.width, h / image.height)
    wide, high = max(w, round(image.width * scale)), max(h, round(image.height * scale))
    image = image.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - w) // 2, (high - h) // 2
    return (w, h), np.asarray(image.crop((left, top, left + w, top + h)))


@dataclass
class Item:
    key: str                    # sha256 of the file's bytes
    bucket: tuple               # width, height
    pixels: np.ndarray          # uint8 [height, width, 3]
    caption: str


def items(path, size, step=64):
    """Yield every usable picture as an Item; say at the end how many were left out, UserError when none is
    left."""
    sizes = bucket_sizes(size, step, max(step, size // 2), size * 2)
    used = lost = 0
    for name, data, caption in pairs(path):
        try:
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError("no caption")
            bucket, pixels = into_bucket(images.decode(data), sizes)
        except (OSError, ValueError) as error:
            lost += 1
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        used += 1
        yield Item(hashlib.sha256(data).hexdigest(), bucket, pixels, " ".join(caption.split()))
    if lost:
        print(f"{path}: {lost} of {used + lost} pictures left out", file=sys.stderr)
    if not used:
        raise UserError(f"no captioned pictures at {path}: expected images with .txt beside them, "
                        "metadata.jsonl, or tar shards")


# --- latent cache --------------------------------------------------------


@dataclass
class Bucket:
    """Pictures of one shape: captions, and pixels uint8 [N, H, W, 3] or latent mean, logvar [N, z, h, w]
    float16."""
    captions: list
    pixels: np.ndarray = None
    mean: torch.Tensor = None
    logvar: torch.Tensor = None


def to_images(pixels_NHWC):
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pixels_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images_BCHW):
    """float [-1, 1] -> uint8 [B, H, W, 3]. A value that is not finite is an error, never a black picture."""
    if not torch.isfinite(images_BCHW).all():
        raise UserError("non-finite values out of the VAE decoder; try --dtype fp32 or a lower --cfg")
    return ((images_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def pixel_buckets(path, size, step=64):
    """Every usable picture, in memory -> [Bucket]."""
    groups = {}
    for item in items(path, size, step):
        groups.setdefault(item.bucket, []).append(item)
    return [Bucket([i.caption for i in g], np.stack([i.pixels for i in g])) for _,
            g in sorted(groups.items())]


@torch.no_grad()
def encode(buckets, vae, device, batch=64):
    """Add the latents to pixel buckets that are in memory anyway -> the same buckets."""
    for b in buckets:
        parts = [vae.encode(to_images(b.pixels[i:i + batch]).to(device))
                 for i in range(0, len(b.pixels), batch)]
        b.mean, b.logvar = (torch.cat(p).half().cpu() for p in zip(*parts))
    return buckets


def pick(buckets, *key):
    """A bucket chosen in proportion to its size by a generator seeded with key: the same on every rank."""
    sizes = np.array([len(b.captions) for b in buckets], float)
    return buckets[np.random.default_rng(key).choice(len(buckets), p=sizes / sizes.sum())]


@torch.no_grad()
def cached(source, vae, device, folder, vae_id, batch=16, pixels=False):
    """Latents of Items, each encoded once -> [Bucket]; pixels: with their pixels, to cut holes into them.

    One file an item, named by the hash of picture, VAE and bucket: the same command continues, and caches of
    different VAEs never mix."""
    folder, waiting, rows = Path(folder), {}, {}

    def flush(bucket):
        group = waiting.pop(bucket, [])
        if group:
            x = to_images(np.stack([i.pixels for i, _ in group])).to(device)
            for (item, path), mean, logvar in zip(group, *vae.encode(x)):
                pair = dict(mean=mean.half().cpu().contiguous(), logvar=logvar.half().cpu().contiguous())
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(pair, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
                rows.setdefault(bucket, []).append((item, pair["mean"], pair["logvar"]))

    for item in source:
        name = hashlib.sha256(f"{item.key} {vae_id} {item.bucket}".encode()).hexdigest()
        path = folder / name[:2] / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                rows.setdefault(item.bucket, []).append((item, file.get_tensor("mean"),
                                                         file.get_tensor("logvar")))
        except (OSError, SafetensorError):                   # absent or damaged: encode it (again)
            waiting.setdefault(item.bucket, []).append((item, path))
            if len(waiting[item.bucket]) == batch:
                flush(item.bucket)
    for bucket in list(waiting):
        flush(bucket)
    return [Bucket([i.caption for i, _, _ in r], np.stack([i.pixels for i, _, _ in r]) if pixels else None,
                   torch.stack([m for _, m, _ in r]), torch.stack([v for _, _, v in r]))
            for _, r in sorted(rows.items())]


# --- words ---------------------------------------------------------------


class Words:
    """Captions to ids for a text encoder trained here: 0 padding, 1 start, 2 unknown, then the training
    words."""

    def __init__(self, vocabulary, length):
        self.vocabulary, self.length = list(vocabulary), length
        self.ids = {w: i + 3 for i, w in enumerate(self.vocabulary)}

    @classmethod
    def of(cls, texts, length, most=8192):
        """The `most` frequent words of the captions."""
        counts = {}
        for word in " ".join(texts).lower().split():
            counts[word] = counts.get(word, 0) + 1
        return cls(sorted(sorted(counts), key=lambda w: -counts[w])[:most], length)

    def __len__(self):
        return len(self.vocabulary) + 3

    def __call__(self, texts):
        """-> ids [B, length]; words beyond the length, and words never seen, are said on stderr."""
        rows = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [1] + [self.ids.get(w, 2) for w in text.lower().split()]
            row[:len(ids[:self.length])] = torch.tensor(ids[:self.length])
        return rows

    def warn(self, texts):
        for text in texts:
            words = text.lower().split()
            new, lost = sorted(set(words) - set(self.ids)), words[self.length - 1:]
            for label, some in (("words this model has never seen", new), ("words beyond its length", lost)):
                if some:
                    print(f"{label}: {' '.join(some)}", file=sys.stderr)
