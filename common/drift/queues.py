"""Real samples of drifting: where latents come from, and the queues that a step draws from.

A latent has an id, 2 * row + mirrored, and is a function of it. So a checkpoint of the queues is ids and
nothing else, and a resumed run reads the same latents back. Of drift_pixel.py the same holds for images.
"""

import os

import numpy as np
import torch

from common import data
from common.drift.codec import SDVAE, PatchPCA
from common.run import UserError


def open_images(cfg, split, augment="none"):
    return data.open_images(cfg.data or None, size=cfg.image_size, split=split, channels=cfg.colors,
                            fit=cfg.fit, seed=cfg.seed, augment=augment)


class Source:
    """Real latents by id = 2 * row + mirrored, from a latent cache or from images through the codec."""

    def __init__(self, cfg, device, split="train"):
        self.images = open_images(cfg, split)
        self.cached = hasattr(self.images, "manifest")
        self.labels, self.names = self.images.labels, self.images.classes
        self.flip, self.seed = cfg.flip, cfg.seed
        if len(self.names) > cfg.classes:
            raise UserError(f"{cfg.data} has {len(self.names)} classes; give --classes {len(self.names)}")
        self.codec = None
        if cfg.codec == "pca":
            if self.cached:
                raise UserError("a latent cache holds VAE latents; use --codec sdvae")
            rows = np.random.default_rng([cfg.seed, 1]).permutation(len(self.labels))[:4000]
            self.codec = PatchPCA.fit(self.images.batch(rows)[0], cfg.image_size // cfg.size, cfg.channels)
        elif cfg.vae:
            self.codec = SDVAE(cfg.vae, cfg.seed, device)
        elif not self.cached:
            raise UserError("images need a codec: --vae FILE for the SD-VAE, or --codec pca")
        if self.cached and tuple(self.images.rows.shape[2:]) != (cfg.channels, cfg.size, cfg.size):
            raise UserError(f"{cfg.data} holds latents {tuple(self.images.rows.shape[2:])}, "
                            f"not {(cfg.channels, cfg.size, cfg.size)}")

    def latents(self, ids):
        """int64 ids [B] -> float32 [B, C, h, w]."""
        rows, mirrored = ids // 2, ids % 2
        if self.cached:
            picked = [self.images.rows[r, m] for r, m in zip(rows.tolist(), mirrored.tolist())]
            return torch.from_numpy(np.stack(picked).astype(np.float32))
        x_BCHW = self.images.batch(rows.numpy())[0]
        x_BCHW = torch.where(mirrored[:, None, None, None].bool(), x_BCHW.flip(3), x_BCHW)
        return self.codec.encode(x_BCHW, ids)

    def ids(self, epoch, rows):
        """Rows of a batch -> ids; with --flip each is mirrored with probability 1/2, by (seed, epoch, row).
        """
        ids = 2 * torch.as_tensor(np.asarray(rows))
        if self.flip:
            coin = (np.random.default_rng([self.seed, 2, epoch, int(r)]).integers(2) for r in rows)
            ids += torch.tensor([int(c) for c in coin])
        return ids


def open_pixels(cfg, split="train", augment="none"):
    images = data.open_images(cfg.data or None, size=cfg.size, split=split, channels=cfg.channels,
                              fit=cfg.fit, seed=cfg.seed, augment=augment)
    if hasattr(images, "manifest"):
        raise UserError(f"{cfg.data} is a latent cache; drift_pixel.py needs images")
    return images


class Pixels:
    """Real images by id = epoch * images + row, as bytes; crop and mirror by (seed, epoch, row).

    So the queues' checkpoint is ids and nothing else, and a resumed run crops the same images again.
    """

    dtype, at_once = torch.uint8, 8192

    def __init__(self, cfg):
        self.images, self.seed = open_pixels(cfg, augment=cfg.augment), cfg.seed
        self.labels, self.names = self.images.labels, self.images.classes
        if len(self.names) > cfg.classes:
            raise UserError(f"{cfg.data} has {len(self.names)} classes; give --classes {len(self.names)}")
        if cfg.augment == "none" and cfg.data and len(self.labels) * cfg.channels * cfg.size ** 2 < 1 << 28:
            self.images.tensor()                        # a set this small stays in memory

    def ids(self, epoch, rows):
        return epoch * len(self.labels) + torch.as_tensor(np.asarray(rows))

    def __getitem__(self, i):
        epoch, row = divmod(i, len(self.labels))
        return self.images.batch([row], (self.seed, epoch))[0][0]

    def latents(self, ids):
        """int64 ids [B] -> uint8 [B, C, H, W]; many are decoded by several processes."""
        few = self.images.whole is not None or len(ids) < 1000
        loader = torch.utils.data.DataLoader(
            self, batch_size=64, sampler=ids.tolist(), generator=torch.Generator(),  # not the global one
            num_workers=0 if few else min(16, os.cpu_count() or 1))
        return torch.cat(list(loader))


class Ring:
    """One ring buffer of latents per label; the checkpoint holds the ids and the latents are read back."""

    def __init__(self, labels, size, shape, source):
        self.x = torch.zeros(labels, size, *shape, dtype=getattr(source, "dtype", torch.float32))
        self.ids = torch.full((labels, size), -1)
        self.next, self.count = torch.zeros(labels, dtype=torch.int64), torch.zeros(labels, dtype=torch.int64)
        self.size, self.source, self.underflows = size, source, 0

    def push(self, x_BCHW, label_B, ids_B):
        """Store one by one; the oldest of that label falls out when its ring is full."""
        for x, label, i in zip(x_BCHW, label_B.tolist(), ids_B):
            slot = int(self.next[label])
            self.x[label, slot], self.ids[label, slot] = x, i
            self.next[label] = (slot + 1) % self.size
            self.count[label] = min(int(self.count[label]) + 1, self.size)

    def draw(self, label_N, n):
        """n latents of each label -> [N, n, C, h, w], without replacement where the ring holds as many.

        Where it does not they repeat, and the draw counts as an underflow. Raises ValueError on an empty
        ring.
        """
        out = self.x.new_empty(len(label_N), n, *self.x.shape[2:])
        for row, label in zip(out, label_N.tolist()):
            have = int(self.count[label])
            if have == 0 and n:
                raise ValueError(f"no sample of label {label} is stored")
            self.underflows += have < n
            row.copy_(self.x[label, torch.randperm(have)[:n] if have >= n else torch.randint(have, (n,))])
        return out

    def state_dict(self):
        return dict(ids=self.ids, next=self.next, count=self.count, underflows=self.underflows)

    def load_state_dict(self, state):
        for name in ("ids", "next", "count"):
            getattr(self, name).copy_(state[name])
        self.underflows = state["underflows"]
        for part in (self.ids >= 0).nonzero().split(getattr(self.source, "at_once", 128)):
            self.x[part[:, 0], part[:, 1]] = self.source.latents(self.ids[part[:, 0], part[:, 1]])


class Bank:
    """Queues of one rank (A.8): a ring per class for positives, one ring over all classes for unconditional
    samples.
    """

    def __init__(self, source, classes, shape, size, size_any):
        self.source, self.last = source, torch.zeros(0, dtype=torch.int64)
        self.by_class, self.any = Ring(classes, size, shape, source), Ring(1, size_any, shape, source)

    def push(self, epoch, rows, x_BCHW=None):
        """Real images enter both queues; their labels are those the next step may draw. x_BCHW: them, if at
        hand."""
        ids_B = self.source.ids(epoch, rows)
        x_BCHW = self.source.latents(ids_B) if x_BCHW is None else x_BCHW
        label_B = torch.from_numpy(self.source.labels[np.asarray(rows)])
        self.by_class.push(x_BCHW, label_B, ids_B)
        self.any.push(x_BCHW, torch.zeros_like(label_B), ids_B)
        self.last = label_B

    def labels(self, n):
        """n labels of the last pushed images, drawn without replacement, so classes follow the data; with
        --push 0 the queues are frozen and every stored class is a candidate."""
        stored = self.last if len(self.last) else self.by_class.count.nonzero()[:, 0]
        if len(stored) < n:
            raise UserError(f"{n} labels a rank, but only {len(stored)} images were pushed: raise --push, or "
                            "use more ranks")
        return stored[torch.randperm(len(stored))[:n]]

    def state_dict(self):
        return dict(by_class=self.by_class.state_dict(), any=self.any.state_dict())

    def load_state_dict(self, state):
        self.by_class.load_state_dict(state["by_class"])
        self.any.load_state_dict(state["any"])


def mae_batches(cfg, source, ddp, start):
    """Yield (latents, labels) of updates start+1 ...; --mae-crop crops pixels before the codec (4.2)."""
    order = data.Order(len(source.labels), cfg.mae_batch, cfg.seed, ddp.rank, ddp.world)
    if cfg.mae_crop:
        if source.cached:
            raise UserError("--mae-crop needs pixels: give --data images, or --no-mae-crop for a cache")
        crops = open_images(cfg, "train", augment="rrc")
        for _, x, label in data.batches(crops, order, start, cfg.mae_steps):
            yield source.codec.encode(x), label
    for step in range(start + 1, 0 if cfg.mae_crop else cfg.mae_steps + 1):
        epoch, rows = order(step)
        yield source.latents(source.ids(epoch, rows)), torch.from_numpy(source.labels[rows])
