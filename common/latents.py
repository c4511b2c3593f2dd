"""A latent cache on disk: every image and its mirror encoded once, read back by memory map.

    latents.f16.bin  float16 [N, 2, C, h, w]: image and mirrored image; no latent is the mirror of another
    labels.i16       int16 [N]
    keys.txt         one name a line
    manifest.json    shape, classes, what the caller wants recorded (codec hash, scale, shift, crop, ...) and,
                     once everything is written, the SHA-256 of every chunk
    done.RANK.jsonl  while writing: one line a finished chunk, so a killed run continues with the missing ones
"""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from common.files import read_json, write_atomic
from common.run import UserError

CHUNK = 256                                     # images between two durable marks


class LatentWriter:
    """Fill a cache chunk by chunk, from any number of ranks (rank 0 first), resumable at any point.

    shape (C, h, w); meta: JSON values that identify codec and crop. A cache in the folder is continued when
    all that identifies it is equal, and refused, naming the first difference, when not. Values are stored as
    given: say in meta whether they are already scaled.
    """

    def __init__(self, folder, labels, classes, keys, shape, meta, rank=0, world=1):
        self.folder, self.rank, self.world = Path(folder), rank, world
        self.shape = (len(labels), 2, *shape)
        self.row = 2 * int(np.prod(shape)) * 2                          # bytes of an image and its mirror
        if len(classes) > 2 ** 15:
            raise UserError(f"{len(classes)} classes do not fit the cache's int16 labels")
        names, labels = ("\n".join(keys) + "\n").encode(), np.asarray(labels).astype("<i2")
        source = source_hash(names, labels.tobytes())
        self.manifest = dict(meta, shape=list(self.shape), classes=list(classes), chunk=CHUNK, source=source)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "manifest.json").exists():
            self.refuse_another(read_manifest(self.folder))
        elif rank == 0:
            write_atomic(self.folder / "keys.txt", names)
            write_atomic(self.folder / "labels.i16", labels.tobytes())
            write_atomic(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())
        self.file = os.open(self.folder / "latents.f16.bin", os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.file, self.shape[0] * self.row)

    def refuse_another(self, found):
        for key, value in json.loads(json.dumps(self.manifest)).items():
            if found.get(key) != value:
                raise UserError(f"{self.folder} holds a latent cache with another {key}; take another folder")

    def done(self):
        """{chunk: sha256} over all ranks; a torn last line is not done."""
        found = dict(read_manifest(self.folder).get("chunks", ()))
        for file in self.folder.glob("done.*.jsonl"):
            for line in file.read_text().splitlines():
                try:
                    found.update([json.loads(line)])
                except (ValueError, TypeError):
                    pass
        return found

    def todo(self):
        """This rank's missing chunks -> list of (chunk, rows)."""
        done, n = self.done(), self.shape[0]
        return [(c, range(c * CHUNK, min(n, (c + 1) * CHUNK)))
                for c in range(self.rank, -(-n // CHUNK), self.world) if c not in done]

    def write(self, chunk, z_N2CHW):
        """Store one chunk durably. Raises ValueError on a wrong shape or a value float16 cannot hold."""
        data = np.ascontiguousarray(torch.as_tensor(z_N2CHW).detach().cpu().to(torch.float16).numpy())
        rows = min(CHUNK, self.shape[0] - chunk * CHUNK)
        if data.shape != (rows, *self.shape[1:]):
            raise ValueError(f"chunk {chunk} is {data.shape}, expected {(rows, *self.shape[1:])}")
        if not np.isfinite(data).all():
            raise ValueError(f"chunk {chunk} holds values that are not finite in float16")
        data = data.astype("<f2").tobytes()
        os.pwrite(self.file, data, chunk * CHUNK * self.row)
        os.fsync(self.file)
        with open(self.folder / f"done.{self.rank}.jsonl", "a") as file:
            file.write("\n" + json.dumps([chunk, hashlib.sha256(data).hexdigest()]))  # "\n" ends a torn line
            file.flush()
            os.fsync(file.fileno())

    def finish(self):
        """On one rank, after all wrote their chunks: seal the cache. ValueError while chunks are missing."""
        done, expected = self.done(), -(-self.shape[0] // CHUNK)
        if len(done) < expected:
            raise ValueError(f"{expected - len(done)} of {expected} chunks are not written yet")
        chunks = [[c, done[c]] for c in sorted(done)]
        whole = dict(self.manifest, chunks=chunks)
        text = json.dumps(dict(whole, seal=seal(json.loads(json.dumps(whole)))), indent=1)
        write_atomic(self.folder / "manifest.json", text.encode())
        for file in self.folder.glob("done.*.jsonl"):
            file.unlink()


class Latents:
    """A finished cache as a dataset: get -> float32 [C, h, w]; an epoch_seed draws image or mirror."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if "chunks" not in self.manifest:
            raise UserError(f"the latent cache in {folder} is unfinished; run the cache command again")
        self.classes, self.source = self.manifest["classes"], dict(path=str(folder))
        shape = tuple(self.manifest["shape"])
        try:
            size = (self.folder / "latents.f16.bin").stat().st_size
            names, labels = ((self.folder / name).read_bytes() for name in ("keys.txt", "labels.i16"))
        except OSError as e:
            raise UserError(f"{e.filename} is missing; delete the folder and cache again") from None
        if size != 2 * math.prod(shape):
            raise UserError(f"{folder}/latents.f16.bin is truncated; delete the folder and cache again")
        if len(labels) != 2 * shape[0]:
            raise UserError(f"{folder}/labels.i16 is truncated; delete the folder and cache again")
        if source_hash(names, labels) != self.manifest["source"]:
            raise UserError(f"{folder}: labels.i16 or keys.txt are not those written; "
                            "delete the folder and cache again")
        self.labels = np.frombuffer(labels, "<i2").astype(np.int64)
        self.rows = np.memmap(self.folder / "latents.f16.bin", "<f2", "r", shape=shape)
        self.skipped, self.whole = {}, None

    def __len__(self):
        return len(self.labels)

    def get(self, index, epoch_seed=None):
        mirror = epoch_seed is not None and np.random.default_rng([*epoch_seed, int(index)]).random() < 0.5
        return np.asarray(self.rows[int(index), int(mirror)], np.float32)

    def batch(self, indices, epoch_seed=None):
        """indices [B] -> (float32 tensor [B, C, h, w], int64 labels [B])."""
        z_BCHW = np.stack([self.get(i, epoch_seed) for i in indices])
        return torch.from_numpy(z_BCHW), torch.from_numpy(self.labels[np.asarray(indices)])

    def verify(self):
        """Raise UserError naming the first chunk whose bytes are not those written."""
        expected = dict(self.manifest["chunks"])
        for chunk in range(-(-len(self) // CHUNK)):
            data = np.ascontiguousarray(self.rows[chunk * CHUNK:(chunk + 1) * CHUNK]).tobytes()
            if hashlib.sha256(data).hexdigest() != expected.get(chunk):
                raise UserError(f"{self.folder}: chunk {chunk} is damaged; delete the folder and cache again")


def read_manifest(folder):
    try:
        manifest = read_json(Path(folder) / "manifest.json")
        shape, classes, chunks = (manifest[key] for key in ("shape", "classes", "chunk"))
    except (UserError, KeyError) as e:
        raise UserError(f"{folder} is not a latent cache: {e}") from None
    whole = isinstance(shape, list) and len(shape) == 5 and chunks == CHUNK and isinstance(classes, list)
    whole = whole and all(type(n) is int and 0 < n < 2 ** 40 for n in shape)
    if not whole or manifest.get("seal", seal(manifest)) != seal(manifest):
        raise UserError(f"{folder} is not a latent cache: its manifest.json is damaged")
    return manifest


def source_hash(names, labels):
    """SHA-256 of keys.txt and labels.i16 together."""
    return hashlib.sha256(names + labels).hexdigest()


def seal(manifest):
    """SHA-256 of a manifest but for its seal: a changed class name or scale would go unnoticed."""
    rest = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

