"""Weights for others to load: a safetensors file with JSON metadata, and a seal that shows one wrong bit."""

import errno
import hashlib
import json
import os
import pathlib
import shutil

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import fsync
from common.flags import UserError

HEADER_LIMIT = 100 << 20                      # of a safetensors header: the limit of the library itself
UNSEALED = "0" * 64                             # stands for the seal in the bytes whose SHA-256 it is


def save_weights(path, tensors, meta):
    """Weights for others to load: safetensors with meta (a JSON object) in its metadata, written atomically.

    metadata["seal"] is the SHA-256 of the file with 64 zeros in its place: one wrong bit is noticed.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        text = {key: json.dumps(value) for key, value in meta.items()}
        save_file(unshared(tensors), temporary, {**text, "seal": UNSEALED})
        _sort_metadata(temporary)
        _put_seal(temporary)
        fsync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:     # a full disk is an error of safetensors' own
        temporary.unlink(missing_ok=True)
        raise UserError(not_written(error, path.parent, path.name)) from None


def _sort_metadata(path):
    """safetensors writes metadata in random order; sorted, equal weights are equal bytes (of one length)."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def _header(path):
    """(the file up to its tensors, where in it the 64 digits of the seal stand: -1 without one)."""
    with open(path, "rb") as file:
        size = file.read(8)
        head = size + file.read(min(int.from_bytes(size, "little"), HEADER_LIMIT))
    at = head.find(b'"seal":"')                 # text inside other metadata has its quotes escaped
    return head, at + 8 if at >= 0 else -1


def _put_seal(path):
    _, at = _header(path)
    with open(path, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(at)
        file.write(digest.encode())


def _seal_broken(path):
    """True when a file of save_weights differs from what was written; files without a seal are not judged."""
    head, at = _header(path)
    if at < 0:
        return False
    digest = hashlib.sha256(head[:at] + UNSEALED.encode() + head[at + 64:])
    with open(path, "rb") as file:
        file.seek(len(head))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest().encode() != head[at:at + 64]


def load_weights(path, device="cpu"):
    """(tensors, meta) of a file of save_weights; foreign metadata stays text.  UserError when damaged."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        broken = _seal_broken(path)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    if broken:
        raise UserError(f"{path} is damaged: its bytes are not those that were written; make it anew")
    meta.pop("seal", None)
    for key, text in meta.items():
        try:
            meta[key] = json.loads(text)
        except ValueError:
            pass
    return tensors, meta


def unshared(tensors):
    """Contiguous CPU tensors, no two on one storage: safetensors refuses anything else."""
    seen, result = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(place)
        result[key] = tensor
    return result


def not_written(error, root, what="a checkpoint"):
    """The line of a write that failed (error None: on another rank); of a full disk, what to do about it."""
    if error is None:
        return "another rank could not write the checkpoint"
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        free_gb = shutil.disk_usage(root).free / 1e9
        return (f"no space left for {what} in {root} ({free_gb:.2f} GB free); the older ones are whole: "
                "free some space and run the same command again")
    return f"cannot write {what} in {root}: {text}"
