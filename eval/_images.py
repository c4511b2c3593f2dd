"""Images to be scored: a folder, a tar, an .npz or a run, read a batch at a time in a fixed order."""

import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import images
from common.metrics import npz_images
from common.run import UserError
from eval._shared import step_of

THREADS = 8                                                     # pillow decodes outside the interpreter lock
DAMAGED = (OSError, ValueError)


class Images:
    """batches() yields (rows, uint8 [n, 3, H, W]), rows being places in the source; damaged ones land in bad.

    Memory: two batches and the names.  n counts what the source lists, damaged files included.
    """

    def __init__(self, path, limit=None):
        self.path, self.bad = Path(path), []
        if self.path.is_dir():
            self._folder()
        elif self.path.suffix == ".npz":
            self._npz()
        elif self.path.suffix == ".tar":
            self._tar()
        else:
            raise UserError(f"{path} is no folder, .npz or .tar" if self.path.exists()
                            else f"nothing at {path}")
        if not self.n:
            raise UserError(f"no images in {path}")
        self.n = min(self.n, limit or self.n)

    def _folder(self):
        self.names = sorted(os.path.relpath(os.path.join(folder, f), self.path)
                            for folder, _, files in os.walk(self.path) for f in files
                            if f.lower().endswith(images.EXTENSIONS) and not f.startswith("."))
        self.n = len(self.names)
        self.read = lambda i: images.decode(str(self.path / self.names[i]))

    def _tar(self):
        try:
            with tarfile.open(self.path, "r:") as tar:
                members = sorted((m.name, m.offset_data, m.size) for m in tar
                                 if m.isreg() and m.name.lower().endswith(images.EXTENSIONS))
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from None
        self.names, self.n = [m[0] for m in members], len(members)
        self.file = open(self.path, "rb", buffering=0)
        self.read = lambda i: images.decode(os.pread(self.file.fileno(), members[i][2], members[i][1]))

    def _npz(self):
        self.read, shape = None, npz_shapes(self.path).get("arr_0")
        if shape is None:
            held = ", ".join(npz_shapes(self.path))
            raise UserError(f"{self.path} holds {held}; expected images in arr_0, uint8 [N, H, W, 3]")
        self.n = shape[0]
        self.names = None                                       # named by position

    def name(self, row):
        return self.names[row] if self.names else f"{row:06d}"

    def label(self, row):
        """The folder an image lies in, its class by the custom of image folders; None at the top."""
        return str(Path(self.names[row]).parent) if self.names and os.sep in self.names[row] else None

    def batches(self, batch=64):
        if self.read is None:
            yield from self._npz_batches(batch)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            waiting = None                                      # is decoded while the caller works
            for start in [*range(0, self.n, batch), None]:
                done, waiting = waiting, None
                if start is not None:
                    rows = range(start, min(start + batch, self.n))
                    waiting = zip(rows, pool.map(self._array, rows))
                if done:
                    yield from self._stack(done)

    def _stack(self, decoded):
        groups = {}                                             # one tensor needs one size: group by it
        for row, array in decoded:
            if array is None:
                self.bad.append(self.name(row))
            else:
                groups.setdefault(array.shape, []).append((row, array))
        for group in groups.values():
            stack = np.stack([a for _, a in group])
            yield [r for r, _ in group], torch.from_numpy(stack).permute(0, 3, 1, 2)

    def _array(self, row):
        try:
            return np.array(self.read(row))
        except DAMAGED:
            return None

    def _npz_batches(self, batch):
        at = 0
        try:
            for x_NCHW in npz_images(self.path, batch):
                x_NCHW = x_NCHW[:self.n - at]
                yield list(range(at, at + len(x_NCHW))), x_NCHW
                at += len(x_NCHW)
                if at >= self.n:
                    return
        except (ValueError, zipfile.BadZipFile) as error:
            raise UserError(str(error)) from None


def npz_shapes(path):
    """{key: shape} of an .npz, from the headers alone.  UserError when it is none, or holds pickles."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    old = np.lib.format.read_magic(file)[0] == 1
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shapes[name.removesuffix(".npy")] = read(file)[0]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return shapes


def sample_sets(run):
    """Sample sets of a run directory, by step: samples.npz or .tar, and samples/*.npz, *.tar or folders."""
    found = [p for name in ("samples*.npz", "samples*.tar", "samples/*.npz", "samples/*.tar")
             for p in run.glob(name)]
    found += [p for p in run.glob("samples/*") if p.is_dir()]
    if not found:
        raise UserError(f"{run} holds no sample set (samples.npz, samples/*.npz, *.tar or folders): "
                        "sample from it first")
    return [(step_of(p), p) for p in sorted(found, key=lambda p: (step_of(p), p.stat().st_mtime))]
