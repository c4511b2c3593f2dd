"""Checkpoints that survive a crash at any moment, in safetensors and JSON; nothing is ever unpickled.

    ckpt/00010000/net.safetensors, net.json, ...    one pair a state: tensors, and the tree they hang in
    ckpt/00010000/bank.rank3.safetensors, ...       states that differ by rank
    ckpt/00010000/meta.json                         step, world, sha256 and size of every file

Written as 00010000.tmp/, every file fsynced, one rename, parent fsynced; the newest two are kept.
"""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import fsync, sha256_file, write_atomic
from common.flags import UserError, script_name

KEEP = 2
HEADER_LIMIT = 100 << 20                      # of a safetensors header: the limit of the library itself


# what a wrong byte of JSON can become
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Interrupted(Exception):
    """The run was asked to stop, and has saved: exit status 130."""


# --- files -------------------------------------------------------------------


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
        save_file(_unshared(tensors), temporary, {**text, "seal": UNSEALED})
        _sort_metadata(temporary)
        _put_seal(temporary)
        fsync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:     # a full disk is an error of safetensors' own
        temporary.unlink(missing_ok=True)
        raise UserError(_explain(error, path.parent, path.name)) from None


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


def _unshared(tensors):
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


# --- a tree of tensors as safetensors + JSON ---------------------------------


def _split(tree, name, tensors):
    """Nested dicts, lists, tuples, tensors, arrays and JSON scalars -> JSON, filling tensors by name."""
    if isinstance(tree, torch.Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, np.ndarray):
        tensors[name] = torch.from_numpy(tree)
        return {"array": name}
    if isinstance(tree, dict):
        return {"dict": [[k, _split(v, f"{name}.{k}" if name else str(k), tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_split(v, f"{name}.{i}" if name else str(i), tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"value": tree}
    raise TypeError(f"{name}: a {type(tree).__name__} does not go into a checkpoint")


def _join(node, tensors):
    (kind, value), = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "dict":
        return {k: _join(v, tensors) for k, v in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_join(v, tensors) for v in value)
    return value


def _write_tree(folder, name, obj):
    tensors = {}
    tree = _split(obj.state_dict() if hasattr(obj, "state_dict") else obj, "", tensors)
    save_file(_unshared(tensors), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree))
    for suffix in (".safetensors", ".json"):
        fsync(folder / (name + suffix))


def _read_tree(folder, name, obj):
    try:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        tree = _join(json.loads((folder / f"{name}.json").read_text()), tensors)
    except (SafetensorError, OSError, *DAMAGE) as error:
        raise UserError(f"{folder} holds no such state '{name}': {type(error).__name__}: {error}") from None
    if hasattr(obj, "load_state_dict"):
        try:
            obj.load_state_dict(tree)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            first = str(error).strip().splitlines()
            raise UserError(f"{folder}: '{name}' does not fit this model: {' '.join(first[:2])}") from None
    elif not isinstance(tree, dict):
        raise UserError(f"{folder}: '{name}' holds {type(tree).__name__}, not named values")
    else:
        obj.clear()
        obj.update(tree)


# --- checkpoints -----------------------------------------------------------------


def save(out, step, state, ddp, ranked=None):
    """Write ckpt/<step>: state (name -> module, optimizer or dict) by rank 0, ranked by every rank.

    A full disk leaves the older checkpoints as they were and raises UserError.
    """
    root = pathlib.Path(out) / "ckpt"
    final, work = root / f"{step:08d}", root / f"{step:08d}.tmp"
    if ddp.rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        if final.exists() and verify(final):
            shutil.rmtree(final)                # damaged: this step writes it anew
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    _barrier(ddp)
    failure = None
    try:
        for name, obj in (state if ddp.rank == 0 else {}).items():
            _write_tree(work, name, obj)
        for name, obj in (ranked or {}).items():
            _write_tree(work, f"{name}.rank{ddp.rank}", obj)
    except (OSError, SafetensorError) as error:
        failure = error
    if _any(failure is not None, ddp):
        if ddp.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise UserError(_explain(failure, root))
    if ddp.rank == 0:
        try:
            _seal(root, final, work, step, ddp.world)
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise UserError(_explain(error, root)) from None
    _barrier(ddp)


def _seal(root, final, work, step, world):
    files = {p.name: dict(sha256=sha256_file(p), bytes=p.stat().st_size) for p in sorted(work.iterdir())}
    meta = dict(format=1, step=step, world=world, torch=torch.__version__, files=files)
    write_atomic(work / "meta.json", json.dumps(meta, indent=1).encode())
    fsync(work)
    if final.exists():                          # whole, and of the same run and step: the same bits
        shutil.rmtree(work)
    else:
        os.replace(work, final)
    fsync(root)
    for old in [*_whole_names(root)[:-KEEP], *root.glob("*.damaged")]:
        shutil.rmtree(old, ignore_errors=True)


def load(out, state, ddp, ranked=None):
    """Fill state (and ranked) from the newest checkpoint whose hashes match -> its step, 0 if there is none.

    A damaged newest one is set aside as NAME.damaged, with a line on stderr, and the one before is used.
    """
    root = pathlib.Path(out) / "ckpt"
    folder = None
    if ddp.rank == 0 and root.is_dir():
        for left_over in root.glob("*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        for candidate in reversed(_whole_names(root)):
            bad = verify(candidate)
            if not bad:
                folder = candidate.name
                break
            print(f"{script_name()}: checkpoint {candidate} is damaged ({bad[0]}); using the one before",
                  file=sys.stderr)
            os.replace(candidate, candidate.with_name(candidate.name + ".damaged"))
    if ddp.world > 1:
        box = [folder]
        dist.broadcast_object_list(box)
        folder = box[0]
    if folder is None:
        return 0
    folder = root / folder
    meta = json.loads((folder / "meta.json").read_text())
    if ranked and meta["world"] != ddp.world:
        raise UserError(f"{folder} was written by {meta['world']} ranks and holds state of each; "
                        f"this is {ddp.world}")
    for name, obj in state.items():
        _read_tree(folder, name, obj)
    for name, obj in (ranked or {}).items():
        _read_tree(folder, f"{name}.rank{ddp.rank}", obj)
    return meta["step"]


def verify(folder):
    """Re-hash a checkpoint directory -> list of what is wrong with it, empty when whole."""
    folder = pathlib.Path(folder)
    try:
        files = json.loads((folder / "meta.json").read_text())["files"].items()
        assert all(isinstance(facts, dict) for _, facts in files)
    except (OSError, AssertionError, *DAMAGE) as error:
        return [f"meta.json: {type(error).__name__}"]
    bad = []
    for name, facts in files:
        path = folder / pathlib.Path(name).name
        if not path.is_file():
            bad.append(f"{name} is missing")
        elif sha256_file(path) != facts.get("sha256"):
            bad.append(f"{name} does not match its hash")
    return bad


def _whole_names(root):
    return sorted(p for p in root.iterdir() if p.is_dir() and p.name.isdigit())


def _explain(error, root, what="a checkpoint"):
    if error is None:
        return "another rank could not write the checkpoint"
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        free_gb = shutil.disk_usage(root).free / 1e9
        return (f"no space left for {what} in {root} ({free_gb:.2f} GB free); the older ones are whole: "
                "free some space and run the same command again")
    return f"cannot write {what} in {root}: {text}"


def _any(flag, ddp):
    if ddp.world == 1:
        return flag
    tensor = torch.tensor(int(flag))
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor)


def _barrier(ddp):
    if ddp.world > 1:
        dist.barrier()
