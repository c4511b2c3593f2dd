"""Where images come from: readers and the functions that open a folder, an .npz, IDX files or tar shards.

A reader is a callable: read(index) -> PIL image (raises OSError or ValueError when damaged), read.name(index)
-> str and, when the source is not RGB, read.channels. Each open_* returns (reader, labels, class names),
open_npz and open_idx also whether the source itself tells train from test. User mistakes raise UserError.
"""

import gzip
import hashlib
import json
import math
import os
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from common import images
from common.archive import write_whole
from common.files import read_npz, refuse_bomb
from common.flags import UserError


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# --- readers -----------------------------------------------------------

class Shapes:
    """The procedural set: image i shows class i % 10, drawn by a generator seeded with (seed, split, i)."""

    def __init__(self, size, seed, test):
        self.size, self.key = size, (seed, int(test))

    def __call__(self, index):
        rng = np.random.default_rng([*self.key, int(index)])
        return images.render(images.SHAPES[index % len(images.SHAPES)], self.size, rng)

    def name(self, index):
        return f"shape {index}"


class Files:
    """Image files."""

    def __init__(self, root, names):
        self.root, self.names = root, names

    def __call__(self, index):
        return images.decode(os.path.join(self.root, self.names[index]))

    def name(self, index):
        return self.names[index]


class Array:
    """A uint8 array [N, H, W, C], C 1 or 3."""

    def __init__(self, x_NHWC, label):
        self.x, self.label, self.channels = x_NHWC, label, x_NHWC.shape[3]

    def __call__(self, index):
        return Image.fromarray(self.x[index] if self.channels == 3 else self.x[index, :, :, 0])

    def name(self, index):
        return f"{self.label}[{index}]"


class Subset:
    """Rows of another reader."""

    def __init__(self, read, rows):
        self.read, self.rows, self.channels = read, rows, getattr(read, "channels", 3)

    def __call__(self, index):
        return self.read(int(self.rows[index]))

    def name(self, index):
        return self.read.name(int(self.rows[index]))


class Shards:
    """Images inside tar files, by (file, offset, size). Opened for each read: a thousand shards need no
    descriptors."""

    def __init__(self, files, shard, offset, size, keys):
        self.files, self.shard, self.offset, self.size, self.keys = files, shard, offset, size, keys

    def __call__(self, index):
        with open(self.files[self.shard[index]], "rb", buffering=0) as file:
            return images.decode(os.pread(file.fileno(), int(self.size[index]), int(self.offset[index])))

    def name(self, index):
        return f"{os.path.basename(self.files[self.shard[index]])}/{self.keys[index]}"


# --- folders and arrays ------------------------------------------------

def open_folder(root):
    """Image folder: class = sorted subfolder, deeper folders belong to their class; no subfolders: one
    class."""
    visible = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    names, labels = [], []
    for label, name in enumerate(visible or ["."]):
        files = []
        for folder, _, found in os.walk(root / name):
            files += [os.path.relpath(os.path.join(folder, f), root) for f in found
                      if f.lower().endswith(images.EXTENSIONS) and not f.startswith(".")]
        if not files:
            raise UserError(f"no images in {root / name}{': every subfolder is a class' if visible else ''}")
        names += sorted(files)
        labels += [label] * len(files)
    return Files(str(root), names), np.array(labels), visible or ["image"]


def open_npz(path, names):
    """Images and labels from an .npz, never unpickled; names: what the wanted split may be called in its
    keys."""
    aliases = [key for name in names for key in (f"{name}_images", f"x_{name}")]
    wanted = [*aliases, "images", "arr_0"]
    labels = [k.replace("images", "labels").replace("x_", "y_").replace("arr_0", "labels") for k in wanted]
    arrays = read_npz(path, {*wanted, *labels, "arr_1"})
    key = next((k for k in wanted if k in arrays), None)
    if key is None:
        raise UserError(f"{path}: expected images and labels, none of {', '.join(wanted)} is there")
    x = arrays[key]
    label_key = next((k for k in (labels[wanted.index(key)], "arr_1") if k in arrays), None)
    y = arrays[label_key].reshape(-1) if label_key else np.zeros(len(x) if x.ndim else 0, np.int64)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise UserError(f"{path}: {key} is {x.dtype} {x.shape}; expected uint8 [N, H, W] or [N, H, W, 3]")
    return named(Array(x, f"{path.name}:{key}"), x, y, path, key in aliases)


def open_idx(folder, prefix):
    """MNIST family, prefix train or t10k: big-endian header, then bytes; plain or gzip."""
    x = read_idx(find_idx(folder, f"{prefix}-images"), 3)[..., None]
    y = read_idx(find_idx(folder, f"{prefix}-labels"), 1)
    return named(Array(x, f"{prefix}-images"), x, y, folder, True)


def named(read, x, y, path, has_splits):
    """Check the labels of an array set and find its class names."""
    if len(x) != len(y):
        raise UserError(f"{path}: {len(x)} images but {len(y)} labels")
    if len(x) == 0:
        raise UserError(f"{path} holds no images")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise UserError(f"{path}: labels must be whole numbers from 0, found {y.dtype} from {y.min()}")
    return read, y.astype(np.int64), class_names([path if path.is_dir() else path.parent], y), has_splits


def class_names(folders, labels):
    """Lines of the first classes.txt in the folders; the numbers themselves when there is none."""
    for listing in (Path(folder) / "classes.txt" for folder in folders):
        if listing.exists():
            return [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    return [str(i) for i in range(int(labels.max()) + 1)]


def find_idx(folder, stem):
    found = sorted(p for p in folder.iterdir() if stem in p.name and "idx" in p.name and "ubyte" in p.name)
    plain = {p.name.removesuffix(".gz"): p for p in reversed(found)}            # x and x.gz are the same file
    if len(plain) != 1:
        raise UserError(f"{folder} holds {len(plain)} files named *{stem}-idx*-ubyte(.gz); expected one")
    return next(iter(plain.values()))


def read_idx(path, dims):
    """IDX file of unsigned bytes -> uint8 array. Raises UserError unless the header and the length agree."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes([0, 0, 8, dims]):
                raise UserError(f"{path} is not an IDX file of unsigned bytes with {dims} dimensions")
            shape = struct.unpack(f">{dims}I", head[4:])
            count = math.prod(shape)
            refuse_bomb(path, path.stat().st_size, count)
            data = file.read(min(count, 1 << 40) + 1)           # one more than there should be
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if len(data) != count:
        raise UserError(f"{path} is truncated or overlong: {len(data)} bytes for shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


# --- tar shards --------------------------------------------------------

def open_shards(path):
    """WebDataset tar shards: a .tar or a folder of them -> (reader, labels, classes).

    A damaged shard is named, counted and left out; none left is an error. The index of a shard (key, offset,
    size, label of each sample) is kept beside it as NAME.tar.json, trusted while the tar has the size it
    tells, and rebuilt when missing or stale.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"no tar shards at {path}")
    if (files[0].parent / "unfinished.json").exists():
        raise UserError(f"the shards in {files[0].parent} are unfinished; run prepare again")
    rows, used, damaged = [], [], []
    for file in files:
        try:
            found = read_index(file)
        except (OSError, ValueError, tarfile.TarError) as e:
            damaged.append(f"{file.name}: {e}")
            continue
        rows += [(len(used), *sample) for sample in found]
        used.append(str(file))
    if not rows:
        raise UserError(f"no readable images in {path}" + (f"; {damaged[0]}" if damaged else ""))
    for i, line in enumerate(damaged, 1):
        warn(f"skipped shard {line} ({i} of {len(files)} shards)")
    labelled = [row for row in rows if row[4] is not None]
    if labelled and len(labelled) < len(rows):
        warn(f"skipped {len(rows) - len(labelled)} samples without a label in {path}")
    shard, keys, offset, size, labels = zip(*(labelled or rows))
    labels = np.array(labels) if labelled else np.zeros(len(rows), np.int64)
    reader = Shards(used, np.array(shard, np.int32), np.array(offset), np.array(size), keys)
    root = path.parent if path.is_file() else path
    return reader, labels, class_names([root, root.parent], labels)


def read_index(file):
    """Samples of a shard [[key, offset, size, label], ...], from its index or by reading the tar's
    headers."""
    listing, length = Path(f"{file}.json"), file.stat().st_size
    try:
        index = json.loads(listing.read_text())
        samples = index["samples"]
        if index["bytes"] == length and index["check"] == check(samples):
            return samples
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    samples = scan_tar(file)
    try:
        write_whole(listing, json.dumps(dict(bytes=length, check=check(samples), samples=samples)).encode())
    except OSError:                             # a read-only data folder: the index is built again next time
        pass
    return samples


def check(samples):
    """What an index must say of its samples: a changed offset or label would be another picture or class."""
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def scan_tar(file):
    """[[key, offset, size, label], ...] of a tar shard. Raises ValueError or TarError when it is not
    whole."""
    fields = {}
    with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, field = base.partition(".")
            sample = fields.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if f".{field.lower()}".endswith(images.EXTENSIONS):
                sample["image"] = member.offset_data, member.size
            elif field == "cls" or field == "json" and "label" not in sample:
                sample["label"] = parse_label(tar.extractfile(member).read(1 << 20), field)
        raw.seek(-512, os.SEEK_END)
        if any(raw.read(512)):
            raise ValueError("truncated: no end-of-archive mark")
    return [[key, *s["image"], s.get("label")] for key, s in fields.items() if "image" in s]


def parse_label(data, field):
    """Class number of a sample from its .cls (a number) or .json ({"label": number}); None when there is
    none."""
    try:
        label = int(data) if field == "cls" else json.loads(data)["label"]
    except (ValueError, KeyError, TypeError):
        return None
    return label if isinstance(label, int) and label >= 0 else None
