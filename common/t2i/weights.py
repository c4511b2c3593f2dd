"""Foreign weights: checked before they are believed, loaded one tensor at a time.

    files = Checkpoint.open("transformer/")          a file, a folder, shards; .pt only with weights_only=True
    fill(module_on_meta, files, torch.bfloat16, quantise="int8")

Names and shapes are known without reading a tensor, so a wrong file is refused before any memory is taken.
"""
import functools
import json
import os
import pickle
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.files import read_json, sha256_file
from common.flags import UserError
from common.t2i.memory import LEAST, QEmbedding, QLinear, fine_layers, replace, small

HEADER_LIMIT = 100 << 20                                     # the limit of the safetensors library itself


# --- files ---------------------------------------------------------------


def check_header(path):
    """Raise UserError unless path starts like a whole safetensors file; reads the header only -> {name:
    shape}."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise UserError(f"{path}: not a safetensors file: expected a header of 2 to {max(size - 8, 0)} "
                            f"bytes, found {length}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(int(n) for n in row["shape"]) for name, row in header.items()}
            end = max((int(row["data_offsets"][1]) for row in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: damaged safetensors header ({type(error).__name__})") from None
    if end != size - 8 - length:
        raise UserError(f"{path}: truncated or padded: its header describes {end} bytes of tensors, "
                        f"the file holds {size - 8 - length}")
    return shapes


class Checkpoint:
    """Tensors by name, read when asked for: .shapes {name: shape}, .get(name) -> tensor, .path."""

    def __init__(self, path, shapes, get):
        self.path, self.shapes, self._get = path, shapes, get

    @classmethod
    def open(cls, path):
        """path: .safetensors, .pt/.pth/.bin, or a folder with one of them or with shards and their index."""
        path = Path(path)
        if path.is_dir():
            index = sorted(path.glob("*.safetensors.index.json"))
            files = sorted({path / n for n in _weight_map(index[0])}
                           if index
                           else path.glob("*.safetensors")) or sorted([*path.glob("*.bin"),
                                                                       *path.glob("*.pt")])
        else:
            files = [path]
        if not files or not all(f.is_file() for f in files):
            missing = next((f for f in files if not f.is_file()), path)
            raise UserError(f"no weights at {missing}: expected a .safetensors or .pt file, or a folder of "
                            "them")
        if len(files) > 1 and not (path.is_dir() and index):
            full = [f for f in files if "fp16" not in f.name and "non_ema" not in f.name]
            files = full[:1] or files[:1]                    # model.safetensors beside model.fp16.safetensors
        shapes, where = {}, {}
        for file in files:
            for name, (shape,
                       get) in (_safetensors(file) if file.suffix == ".safetensors"
                                else _torch(file)).items():
                shapes[name], where[name] = shape, get
        return cls(path, shapes, lambda name: where[name]())

    def get(self, name):
        return self._get(name)

    def renamed(self, rule):
        """The same tensors under rule(name); rule may return None to hide one, or (name, function of the
        tensor)."""
        shapes, source = {}, {}
        for old, shape in self.shapes.items():
            new = rule(old)
            if new is None:
                continue
            new, change = new if isinstance(new, tuple) else (new, None)
            shapes[new], source[new] = shape, (old, change)

        def get(name):
            old, change = source[name]
            return self._get(old) if change is None else change(self._get(old))
        return Checkpoint(self.path, shapes, get)

    def under(self, prefix):
        """Only what starts with prefix, without it."""
        return self.renamed(lambda n: n[len(prefix):] if n.startswith(prefix) else None) if prefix else self

    def joined(self, groups):
        """Concatenate tensors along rows: groups {new name: [old names]}, the old ones hidden."""
        hidden = {old for names in groups.values() for old in names}
        shapes = {n: s for n, s in self.shapes.items() if n not in hidden}
        for new, names in groups.items():
            parts = [self.shapes[n] for n in names]
            shapes[new] = (sum(p[0] for p in parts), *parts[0][1:])


        def get(name):
            return torch.cat([self._get(n) for n in groups[name]]) if name in groups else self._get(name)
        return Checkpoint(self.path, shapes, get)

    def count(self, prefix):
        """How many numbered parts follow prefix: blocks.0 .. blocks.27 -> 28."""
        found = {int(m[1]) for n in self.shapes if (m := re.match(re.escape(prefix) + r"(\d+)\.", n))}
        return max(found, default=-1) + 1

    def wrong_family(self, wanted, key):
        some = ", ".join(sorted(self.shapes)[:3]) or "nothing"
        return UserError(f"{self.path} is not {wanted}: expected a tensor '{key}', found {len(self.shapes)} "
                         f"others ({some} ...)")

    def sha256(self):
        path = Path(self.path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return {f.name: sha256_file(f) for f in files}


def _weight_map(index):
    """The file names in an index of shards; a name may not lead out of its folder."""
    names = read_json(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n and len(n) < 256 for n in names):
        raise UserError(f"{index} is no index of weight files: expected 'weight_map' with names in its "
                        "folder")
    return set(names)


def _safetensors(path):
    shapes = check_header(path)

    def get(name):
        try:                                                 # opened anew: its pages can go again
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
    return {name: (shape, functools.partial(get, name)) for name, shape in shapes.items()}


def _torch(path):
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError,
            AttributeError, AssertionError, OverflowError) as error:      # where damaged opcodes lead
        line = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path}: not a plain PyTorch weight file: {line}") from None
    for key in ("ema", "state_dict", "model"):  # training checkpoints: the averaged weights first
        tree = tree[key] if isinstance(tree, dict) and isinstance(tree.get(key), dict) else tree
    return {n: (tuple(t.shape), lambda t=t: t) for n, t in tree.items() if isinstance(t, torch.Tensor)}


class Outline(torch.overrides.TorchFunctionMode):
    """with Outline(): modules get shapes and no numbers; `fill` gives them theirs.

    Beside torch.device("meta") it skips the drawing of initial numbers: on that device they load torch's
    reference operators in Python, 80 MB and more than a second."""

    def __enter__(self):
        self.meta = torch.device("meta")
        self.meta.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.meta.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def fill(module, files, dtype, ignore=(), quantise=None, skip="$^", least=LEAST):
    """Give a module built on the meta device its weights, one tensor at a time -> module.

    Every key must be there with its shape and none left over (but `ignore`, a prefix each); otherwise one
    line says what was expected and found. quantise: int8 or fp8 for linears and embeddings of `least` weights
    or more whose names `skip` does not match; a file that `quantise` wrote loads as it is.
    Peak memory is the model plus one tensor."""
    for path in {n.rpartition(".")[0] for n in files.shapes if n.endswith(".q")}:  # stored in 8 bits already
        kind = QEmbedding if type(module.get_submodule(path)) is nn.Embedding else QLinear
        replace(module, path, like(kind, files.shapes, path))
    want = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    have = {n: s for n, s in files.shapes.items() if not n.startswith(tuple(ignore))}
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [n for n in want.keys() & have.keys() if want[n] != have[n]]
    if missing or extra or wrong:
        facts = [f"{len(missing)} missing, e.g. '{missing[0]}'"] if missing else []
        facts += [f"{len(extra)} unexpected, e.g. '{extra[0]}'"] if extra else []
        facts += [f"'{n}' is {have[n]}, expected {want[n]}" for n in sorted(wrong)[:1]]
        raise UserError(f"{files.path} does not fit {type(module).__name__} ({len(want)} tensors): "
                        + "; ".join(facts))
    fine = fine_layers(module) if quantise == "int8" else ()
    for path, part in list(module.named_modules()):
        for leaf in (*part._parameters, *part._buffers):
            name = f"{path}.{leaf}" if path else leaf
            if name in want:
                kept = isinstance(part, (QLinear, QEmbedding)) and leaf != "bias"
                _assign(part, leaf, files.get(name) if kept else _cast(files.get(name), dtype))
        if quantise and (new := small(part, path, quantise, skip, least, fine)) is not None:
            replace(module, path, new)
    if quantise and isinstance(getattr(module, "pos_embed", None), torch.Tensor):
        module.pos_embed = module.pos_embed.half()
    return module


def like(kind, shapes, path):
    """An empty QLinear or QEmbedding of the shapes stored under path, on the meta device."""
    parts = [torch.empty(shapes[f"{path}.{leaf}"], device="meta") if f"{path}.{leaf}" in shapes else None
             for leaf in ("q", "scale", "base", "bias")]
    return QEmbedding(*parts[:3]) if kind is QEmbedding else QLinear(*parts)


def _cast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _assign(owner, leaf, tensor):
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
