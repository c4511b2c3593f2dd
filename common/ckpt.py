"""Checkpoints that survive a crash at any moment, in safetensors and JSON; nothing is ever unpickled.

    ckpt/00010000/net.safetensors, net.json, ...    one pair a state: tensors, and the tree they hang in
    ckpt/00010000/bank.rank3.safetensors, ...       states that differ by rank
    ckpt/00010000/meta.json                         step, world, sha256 and size of every file

Written as 00010000.tmp/, every file fsynced, one rename, parent fsynced; the newest two are kept.
"""

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
from common.sealed import not_written, unshared

KEEP = 2

# what a wrong byte of JSON can become
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Interrupted(Exception):
    """The run was asked to stop, and has saved: exit status 130."""


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
    save_file(unshared(tensors), folder / f"{name}.safetensors")
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
        raise UserError(not_written(failure, root))
    if ddp.rank == 0:
        try:
            _seal(root, final, work, step, ddp.world)
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise UserError(not_written(error, root)) from None
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
        meta = json.loads((folder / "meta.json").read_text())
        files = meta["files"].items()
        assert all(isinstance(facts, dict) for _, facts in files)
        assert isinstance(meta["world"], int) and meta["step"] == int(folder.name)
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


def _any(flag, ddp):
    if ddp.world == 1:
        return flag
    tensor = torch.tensor(int(flag))
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor)


def _barrier(ddp):
    if ddp.world > 1:
        dist.barrier()
