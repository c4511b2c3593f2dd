"""Read the msgpack files that Flax writes (`ema_params.msgpack`) without flax, jax or msgpack.

Flax stores a parameter tree as one msgpack map of maps. An array is an extension value of type 1 (a NumPy
scalar: type 3) whose payload is itself msgpack: [shape, dtype name, raw row-major bytes]. An array above 1
GiB is a map {"__msgpack_chunked_array__": true, "shape": {"0": n0, ...}, "chunks": {"0": array, ...}}.

The file comes from the internet, so nothing is trusted: every length is checked against the bytes that are
left before anything is allocated, depth is bounded, keys are unique strings, and types that a parameter tree
does not need are refused. All errors are MsgpackError and carry the byte offset.
"""

import math
import mmap
import struct

import numpy as np
import torch

MAX_DEPTH = 32  # a Flax parameter tree is about six levels deep
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {name: getattr(torch, name) for name in (
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32")}
NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
           0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
# first byte -> (kind, bytes of the length field)
SIZED = {0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2),
         0xC9: ("ext", 4), 0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("array", 2),
         0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
FIXEXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class MsgpackError(ValueError):
    """The file is not a Flax parameter tree; the message says where and why."""


class Reader:
    """A cursor over `data` that never reads outside [pos, end)."""

    def __init__(self, data, pos, end):
        self.data, self.pos, self.end = data, pos, end

    def fail(self, why):
        raise MsgpackError(f"byte {self.pos}: {why}")

    def take(self, n):
        """The next n bytes as a view."""
        if n > self.end - self.pos:
            self.fail(f"{n} bytes wanted, {self.end - self.pos} left")
        self.pos += n
        return self.data[self.pos - n:self.pos]

    def value(self, depth=0):
        """One msgpack value: dict, list, str, bytes view, number, bool, None or a torch tensor."""
        if depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH}")
        first = self.take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 256
        if first in NUMBERS:
            return struct.unpack(NUMBERS[first], self.take(struct.calcsize(NUMBERS[first])))[0]
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first <= 0x8F:
            kind, n = "map", first & 0x0F
        elif first <= 0x9F:
            kind, n = "array", first & 0x0F
        elif first <= 0xBF:
            kind, n = "str", first & 0x1F
        elif first in FIXEXT:
            kind, n = "ext", FIXEXT[first]
        elif first in SIZED:
            kind, width = SIZED[first]
            n = int.from_bytes(self.take(width), "big")
        else:
            self.fail(f"unknown type byte 0x{first:02x}")
        return getattr(self, "read_" + kind)(n, depth)

    def read_bin(self, n, depth):
        return self.take(n)

    def read_str(self, n, depth):
        try:
            return bytes(self.take(n)).decode("utf-8")
        except UnicodeDecodeError:
            self.fail("text is not UTF-8")

    def read_array(self, n, depth):
        if n > self.end - self.pos:  # every element takes a byte at least
            self.fail(f"array of {n} elements in {self.end - self.pos} bytes")
        return [self.value(depth + 1) for _ in range(n)]

    def read_map(self, n, depth):
        if 2 * n > self.end - self.pos:
            self.fail(f"map of {n} pairs in {self.end - self.pos} bytes")
        out = {}
        for _ in range(n):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                self.fail("map key is not text")
            if key in out or "/" in key:
                self.fail(f"key {key!r} appears twice or holds a slash")
            out[key] = self.value(depth + 1)
        return self.join_chunks(out) if CHUNKED in out else out

    def read_ext(self, n, depth):
        kind = self.take(1)[0]
        if kind not in (1, 3):
            self.fail(f"extension type {kind} is not an array")
        start = self.pos
        self.take(n)
        inner = Reader(self.data, start, self.pos)
        parts = inner.value(depth + 1)
        if inner.pos != inner.end:
            inner.fail("bytes after the array")
        return inner.tensor(parts)

    def tensor(self, parts):
        """[shape, dtype name, bytes] -> a tensor that owns its memory."""
        if not (isinstance(parts, list) and len(parts) == 3 and isinstance(parts[0], list)):
            self.fail("an array is [shape, dtype, bytes]")
        shape, name, raw = parts
        name = bytes(name).decode("ascii", "replace") if isinstance(name, memoryview) else name
        if not isinstance(name, str) or name not in DTYPES:
            self.fail(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(raw, memoryview) or not valid_shape(shape):
            self.fail("bad shape or bytes")
        if math.prod(shape) * DTYPES[name].itemsize != len(raw):
            self.fail(f"{name} array of shape {shape} does not fill {len(raw)} bytes")
        if not len(raw):
            return torch.empty(shape, dtype=DTYPES[name])
        owned = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())  # the copy also restores alignment
        return owned.view(DTYPES[name]).reshape(shape)

    def join_chunks(self, node):
        """The three-key map of an array above 1 GiB -> the array."""
        if set(node) != {CHUNKED, "shape", "chunks"} or node[CHUNKED] is not True:
            self.fail("malformed chunked array")
        shape, chunks = (self.counted(node[key]) for key in ("shape", "chunks"))
        flat = all(isinstance(c, torch.Tensor) and c.ndim == 1 for c in chunks)
        if not valid_shape(shape) or not chunks or not flat:
            self.fail("malformed chunked array")
        if len({c.dtype for c in chunks}) > 1 or sum(c.numel() for c in chunks) != math.prod(shape):
            self.fail(f"chunks do not fill shape {shape}")
        return torch.cat(chunks).reshape(shape)

    def counted(self, node):
        """{"0": a, "1": b} -> [a, b]."""
        if not isinstance(node, dict) or any(str(i) not in node for i in range(len(node))):
            self.fail("malformed chunked array")
        return [node[str(i)] for i in range(len(node))]


def valid_shape(shape):
    return len(shape) <= 8 and all(type(n) is int and 0 <= n < 2 ** 40 for n in shape)


def flatten(tree, prefix=""):
    """Nested dict -> {"a/b/c": tensor}; anything that is neither dict nor tensor is refused."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, torch.Tensor):
            out[prefix + key] = value
        else:
            raise MsgpackError(f"{prefix}{key} is {type(value).__name__}, not an array")
    return out


def read(path):
    """Flax msgpack file -> {"Embed_0/embedding": tensor, ...}, each tensor in the file's dtype and layout.

    The file is memory-mapped, so peak memory is one copy of the parameters. Raises MsgpackError.
    """
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise MsgpackError(f"{path}: empty file") from None
    return parse(memoryview(mapped))


def parse(data):
    """The same for bytes in memory."""
    reader = Reader(memoryview(data), 0, len(data))
    tree = reader.value()
    if reader.pos != reader.end:
        reader.fail("bytes after the tree")
    if not isinstance(tree, dict):
        raise MsgpackError(f"the file holds a {type(tree).__name__}, not a parameter tree")
    return flatten(tree)
