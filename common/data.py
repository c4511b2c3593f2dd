"""Datasets, the resumable order and the loader.

    data = open_images(path, size=256)     folder, tar shards, IDX, .npz, latent cache; None: drawn pictures
    len(data), data.labels, data.classes   labels int64 [N], class names
    data.get(index, epoch_seed)            one image, uint8 HWC, augmented by (seed, epoch, index)
    data.tensor()                          the whole set, uint8 NCHW and labels: for sets that fit in memory
    order = Order(len(data), batch, seed, ddp.rank, ddp.world)
    for step, x, label in batches(data, order, start, steps):           steps start+1 .. steps, x uint8 NCHW

Nothing here has state to save: the batch of a step is a function of (seed, step, rank, world), so resuming is
"start at this step" and the number of workers changes nothing. A damaged image is replaced by the next sound
one of its class, named on stderr once and counted in data.skipped.
"""

import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import images
from common.latents import Latents
from common.run import UserError
from common.sources import Shapes, Subset, open_folder, open_idx, open_npz, open_shards, warn

SPLITS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}     # folders, keys of a split


# --- one dataset -------------------------------------------------------

class Images:
    """A labelled image set over a reader of common/sources.py.

    size None keeps each image's own size. fit "crop" is ADM's centre crop, "pad" a black border. augment
    "none", "flip", or "rrc" (RandomResizedCrop with `scale`, then flip); it acts where epoch_seed is given.
    """

    def __init__(self, read, labels, classes, *, size=None, channels=3, fit="crop", augment="none",
                 scale=(0.2, 1.0), source=None):
        self.read, self.size, self.channels, self.fit = read, size, channels, fit
        self.augment, self.scale, self.source = augment, scale, source or {}
        self.labels, self.classes = np.asarray(labels, np.int64), list(classes)
        self.skipped, self.sound = {}, False                # name -> reason; True once an image could be read
        self.whole = None                                   # the set in memory, after tensor()
        if not len(self.labels):
            raise UserError(f"the dataset is empty: {self.source.get('path')}")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise UserError(f"labels run from {self.labels.min()} to {self.labels.max()}, but there are "
                            f"{len(self.classes)} class names")

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """SHA-256 over names and labels in order: two sets with the same value have the same batches."""
        digest = hashlib.sha256()
        for i, label in enumerate(self.labels.tolist()):
            digest.update(f"{self.read.name(i)}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def get(self, index, epoch_seed=None):
        """Image `index` -> uint8 [H, W, channels]; epoch_seed = (seed, epoch) turns the augmentation on."""
        return self.pick(index, epoch_seed)[0]

    def pick(self, index, epoch_seed=None):
        """-> (uint8 HWC, the index delivered): a damaged image gives way to the next sound one of its class,
        then of any. The random numbers stay those of the index asked for. UserError when none can be read."""
        for candidate in self.candidates(int(index)):
            name = self.read.name(candidate)
            if name not in self.skipped:
                try:
                    image, self.sound = self.view(self.read(candidate), index, epoch_seed), True
                    return image, candidate
                except (OSError, ValueError) as e:
                    self.skip(name, str(e))
            if not self.sound and len(self.skipped) >= 100:
                break                                       # no dataset at all: do not name a million files
        raise UserError(f"not one of {len(self.skipped)} images can be read; {name}: {self.skipped[name]}")

    def candidates(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        yield index
        after = np.roll(np.arange(len(self)), -index)[1:]
        same = self.labels[after] == self.labels[index]
        yield from after[same].tolist()
        yield from after[~same].tolist()

    def skip(self, name, why):
        if name not in self.skipped:
            self.skipped[name] = why
            if torch.utils.data.get_worker_info() is None:          # the main process speaks for its workers
                warn(f"skipped {name}: {why} ({len(self.skipped)} so far)")

    def view(self, image, index, epoch_seed):
        rng = None if epoch_seed is None else np.random.default_rng([*epoch_seed, int(index)])
        image = image.convert("L" if self.channels == 1 else "RGB")
        if rng is not None and self.augment == "rrc":
            image = images.random_resized_crop(image, self.size, rng, self.scale)
        elif self.size and image.size != (self.size, self.size):
            image = (images.pad_to if self.fit == "pad" else images.center_crop)(image, self.size)
        if rng is not None and self.augment != "none" and rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return np.array(image).reshape(image.height, image.width, self.channels)

    def batch(self, indices, epoch_seed=None):
        """indices [B] -> (uint8 [B, C, H, W], int64 labels [B]) of the images delivered."""
        if self.whole is not None and (epoch_seed is None or self.augment == "none"):
            indices = torch.as_tensor(np.asarray(indices))
            return self.whole[0][indices], self.whole[1][indices]
        got = [self.pick(i, epoch_seed) for i in indices]
        if len({image.shape for image, _ in got}) > 1:
            raise UserError("images of different sizes in one batch: give a size")
        x_NHWC = torch.from_numpy(np.stack([image for image, _ in got]))
        return x_NHWC.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(self.labels[[i for _, i in got]])

    def tensor(self):
        """The whole set without augmentation -> (uint8 [N, C, H, W], int64 [N]), kept for the next call."""
        if self.whole is None:
            x = getattr(self.read, "x", None)               # an array that needs no crop is taken as it is
            size = self.size and (self.size, self.size)
            if x is not None and x.shape[3] == self.channels and size in (None, x.shape[1:3]):
                self.whole = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(self.labels)
            else:
                self.whole = self.batch(range(len(self)))
        return self.whole


# --- opening -----------------------------------------------------------

def open_images(path=None, size=None, split="train", *, channels=None, fit="crop", augment="none",
                scale=(0.2, 1.0), holdout=0, count=None, seed=0):
    """Open whatever lies at `path` -> Images, or Latents for a latent cache.

    None           procedural pictures of ten shape classes, 10,000 train and 2,000 test (or `count`), size 32
    folder         one subfolder a class, sorted; PATH/train, PATH/val, PATH/test are taken when they exist
    .tar           or a folder of them: WebDataset shards, NAME.jpg|png and NAME.cls or NAME.json
    IDX            folder with *-idx3-ubyte(.gz), the MNIST family: train-* and t10k-*
    .npz           images or arr_0 uint8 [N,H,W(,C)], labels; or train_images / x_train, ... by split
    latent cache   folder with latents.f16.bin

    channels 3, or 1 for grey; by default what the source has. holdout k: of a source without a test split,
    every k-th image of a class is the test set. count: so many images, drawn by seed. Raises UserError on
    anything unusable.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: train or test")
    if augment == "rrc" and not size:
        raise UserError("random resized crops need a size")
    if path is None:
        count = count or (10_000 if split == "train" else 2_000)
        read, labels = Shapes(size or 32, seed, split == "test"), np.arange(count) % len(images.SHAPES)
        classes, has_splits = images.SHAPES, True
    else:
        at, has_splits = locate(Path(path), split)
        if (at / "latents.f16.bin").exists():
            return Latents(at)
        read, labels, classes, has_splits = open_at(at, split, has_splits)
    if not has_splits:
        rows = held_out(labels, holdout, split, path)
        read, labels = Subset(read, rows), labels[rows]
    if count and count < len(labels):
        rows = np.sort(np.random.default_rng([seed, 3]).choice(len(labels), count, replace=False))
        read, labels = Subset(read, rows), labels[rows]
    channels = channels or getattr(read, "channels", 3)
    return Images(read, labels, classes, size=size, channels=channels, fit=fit, augment=augment, scale=scale,
                  source=dict(path=None if path is None else str(path), split=split, seed=seed))


def locate(path, split):
    """-> (where the split lies, whether the folder is divided into splits at all)."""
    if not path.exists():
        raise UserError(f"no data at {path}")
    if path.is_file() and "idx" in path.name:
        path = path.parent
    divided = any((path / name).is_dir() for names in SPLITS.values() for name in names)
    below = next((path / name for name in SPLITS[split] if (path / name).is_dir()), None)
    if divided and not below:
        raise UserError(f"{path} has no {split} split; looked for {', '.join(SPLITS[split])}")
    return below or path, divided


def open_at(path, split, divided):
    """-> (reader, labels, classes, True when the source tells train from test)."""
    if path.suffix == ".npz":
        return open_npz(path, SPLITS[split])
    if path.is_dir() and any("idx3-ubyte" in p.name for p in path.iterdir()):
        return open_idx(path, "train" if split == "train" else "t10k")
    if path.suffix == ".tar" or path.is_dir() and any(path.glob("*.tar")):
        return *open_shards(path), divided
    if path.is_file():
        raise UserError(f"{path} is neither a folder nor a .tar, .npz or IDX file")
    return *open_folder(path), divided


def held_out(labels, k, split, path):
    """Rows of a split of a source without splits: every k-th image of each class is the test set."""
    if not k:
        if split == "test":
            raise UserError(f"{path} has no test split: put one at {Path(path) / 'test'}")
        return np.arange(len(labels))
    place = np.empty(len(labels), np.int64)                         # position of an image within its class
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[rows] = np.arange(len(rows))
    return np.flatnonzero((place % k == k - 1) == (split == "test"))


# --- order -------------------------------------------------------------

class Order:
    """step (from 1, as run.progress counts) -> (epoch, this rank's indices), a pure function of its fields.

    An epoch is a permutation of n seeded by (seed, epoch); its batch t is the slice [t B, (t+1) B), the tail
    that does not fill a batch is dropped, and rank r of W takes the r-th of W equal parts, so the union over
    ranks is the same for every W. When n < B an epoch is as many permutations as one batch takes.
    """

    def __init__(self, n, batch, seed=0, rank=0, world=1):
        if batch % world:
            near = max(batch // world, 1) * world
            raise UserError(f"batch {batch} does not divide over {world} ranks; try {near}")
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.steps_per_epoch = max(1, n // batch)
        self.cached = None, None

    def __call__(self, step):
        epoch, t = divmod(step - 1, self.steps_per_epoch)
        if self.cached[0] != epoch:
            rounds = range(-(-self.batch // self.n))
            order = [np.random.default_rng([self.seed, epoch, r]).permutation(self.n) for r in rounds]
            self.cached = epoch, np.concatenate(order)
        share = self.batch // self.world
        at = t * self.batch + self.rank * share
        return epoch, self.cached[1][at:at + share]


class ClassOrder:
    """step (from 1) -> (step, indices [L/W * P]): L classes a step, P images of each, class by class.

    Classes come from one permutation of all classes after another, so each is drawn as often as any other;
    the P images are drawn without replacement where the class has as many, by (seed, step, place of the class
    in the step). Rank r of W takes the r-th part of the classes.
    """

    def __init__(self, labels, classes, per_class, seed=0, rank=0, world=1):
        if classes % world:
            raise UserError(f"{classes} classes a step do not divide over {world} ranks; "
                            f"try {max(classes // world, 1) * world}")
        self.rows = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
        self.present = np.array(sorted(self.rows))
        self.count, self.per_class, self.seed, self.rank, self.world = classes, per_class, seed, rank, world

    def classes(self, step):
        """All L class numbers of a step, every rank's."""
        n = len(self.present)
        places = np.arange((step - 1) * self.count, step * self.count)
        rounds = {r: np.random.default_rng([self.seed, 1, r]).permutation(n)
                  for r in range(places[0] // n, places[-1] // n + 1)}
        return np.array([self.present[rounds[p // n][p % n]] for p in places])

    def __call__(self, step):
        share = self.count // self.world
        classes, drawn = self.classes(step), []
        for place in range(self.rank * share, (self.rank + 1) * share):
            rows = self.rows[int(classes[place])]
            rng = np.random.default_rng([self.seed, 2, step, place])
            drawn.append(rng.choice(rows, self.per_class, replace=len(rows) < self.per_class))
        return step, np.concatenate(drawn)


def eval_rows(n, rank=0, world=1):
    """Rows rank, rank + world, ...: every row once over all ranks, no padding, which would bias a metric."""
    return np.arange(rank, n, world)


# --- loader ------------------------------------------------------------

class Steps(torch.utils.data.Dataset):
    """step -> (step, images, labels, what was newly skipped): the unit of work of a worker process."""

    def __init__(self, data, order):
        self.data, self.order = data, order

    def __getitem__(self, step):
        epoch, indices = self.order(step)
        before = set(self.data.skipped)
        x, label = self.data.batch(indices, (self.order.seed, epoch))
        return step, x, label, {k: why for k, why in self.data.skipped.items() if k not in before}


def batches(data, order, start, steps, workers=None, prefetch=2):
    """Yield (step, images uint8 [B, C, H, W], labels int64 [B]) for steps start+1 .. steps, in order.

    order: Order, ClassOrder, or any picklable step -> (epoch, indices) with a .seed. workers: processes that
    decode ahead, by default up to 8, none for a set held in memory; what is yielded does not depend on it.
    """
    if workers is None:
        workers = 0 if data.whole is not None else min(8, (os.cpu_count() or 1) - 1)
    loader = torch.utils.data.DataLoader(
        Steps(data, order), batch_size=None, sampler=range(start + 1, steps + 1), num_workers=workers,
        prefetch_factor=prefetch if workers else None, pin_memory=workers > 0 and torch.cuda.is_available(),
        generator=torch.Generator())                                # the global state is not ours
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:                               # workers inherit the mask: Ctrl-C reaches every process of a terminal,
        stream = iter(loader)          # and the main one may want to finish its step and save
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for step, x, label, new in stream:
        for name, why in new.items():
            data.skip(name, why)
        yield step, x, label
