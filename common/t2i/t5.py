"""T5 v1.1 text encoder and its unigram tokenizer in plain Python and torch, read from the public files.

The tokenizer file, a protocol buffer (spiece.model) or tokenizer.json, is parsed here, every length checked.
"""
import base64
import functools
import math
import re
import struct
import sys
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.files import read_json
from common.flags import UserError
from common.t2i.weights import Checkpoint, Outline, fill

MARK = "\u2581"                                              # stands for a space
NORMAL, UNKNOWN, CONTROL, USER, PAD, EOS, UNK = 1, 2, 3, 4, 0, 1, 2      # kinds of pieces; ids


# --- tokenizer file ------------------------------------------------------

def fields(data):
    """Walk a protocol buffer message -> (field number, wire type, value); ValueError when it is cut."""
    def varint(i):
        value = shift = 0
        while True:
            if i >= len(data) or shift > 63:
                raise ValueError("cut varint")
            value |= (data[i] & 127) << shift
            i, shift = i + 1, shift + 7
            if data[i - 1] < 128:
                return value, i
    i = 0
    while i < len(data):
        tag, i = varint(i)
        wire = tag & 7
        if wire == 0:
            value, i = varint(i)
        else:
            if wire not in (1, 2, 5):
                raise ValueError(f"wire type {wire}")
            length, i = varint(i) if wire == 2 else ({1: 8, 5: 4}[wire], i)
            value, i = data[i:i + length], i + length
            if i > len(data):
                raise ValueError("a field runs past the end")
        yield tag >> 3, wire, value


def read_pieces(folder):
    """-> ([(piece, score, kind)], charsmap bytes) from spiece.model or tokenizer.json in folder."""
    folder = Path(folder)
    places = [folder, *(folder / f"tokenizer{tail}" for tail in ("", "_2", "_3"))]
    for path in (p / name for p in places for name in ("spiece.model", "tokenizer.json")):
        if path.is_file():
            try:
                return _from_json(path) if path.suffix == ".json" else _from_protobuf(path.read_bytes())
            except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
                raise UserError(f"{path} is not a unigram tokenizer: {error}") from None
    raise UserError(f"{folder} holds no T5 vocabulary: expected spiece.model or tokenizer.json")


def _from_protobuf(data):
    pieces, charsmap = [], b""
    for number, _, value in fields(data):
        if number == 1:
            piece, score, kind = "", 0.0, NORMAL
            for n, _, v in fields(value):
                if n == 1:
                    piece = v.decode("utf-8")
                elif n == 2:
                    score = struct.unpack("<f", v)[0]
                elif n == 3:
                    kind = v
            pieces.append((piece, score, kind))
        elif number == 3:
            charsmap = next((v for n, w, v in fields(value) if n == 2 and w == 2), b"")
    if pieces:
        return pieces, charsmap
    raise ValueError("no pieces in it")


def _from_json(path):
    tree = read_json(path)
    if tree["model"].get("type", "Unigram") != "Unigram":
        raise ValueError(f"its model is {tree['model']['type']}")
    special = {t["content"] for t in tree.get("added_tokens", []) if t.get("special")}
    pieces = [(p, s, UNKNOWN if i == tree["model"]["unk_id"] else CONTROL if p in special else NORMAL)
              for i, (p, s) in enumerate(tree["model"]["vocab"])]
    rules = tree.get("normalizer") or {}
    rules = rules.get("normalizers", [rules])
    charsmap = next((r["precompiled_charsmap"] for r in rules if r.get("type") == "Precompiled"), "")
    return pieces, base64.b64decode(charsmap or "")


class CharsMap:
    """SentencePiece's normaliser: a double-array trie of byte strings and what replaces the longest match.

    Without a map, NFKC of the standard library (32 code points differ)."""

    def __init__(self, blob):
        size = struct.unpack("<I", blob[:4])[0] if len(blob) > 4 else 0
        if blob and (size > len(blob) - 4 or size % 4):
            raise UserError("the tokenizer's character map is cut")
        self.units = struct.unpack(f"<{size // 4}I", blob[4:4 + size]) if blob else ()
        self.strings = blob[4 + size:]

    def __call__(self, text):
        if not self.units:
            return unicodedata.normalize("NFKC", text)
        data, out, i = text.encode("utf-8", "replace"), [], 0
        while i < len(data):
            length, at = self._match(data, i)
            if length:
                out.append(self.strings[at:self.strings.index(b"\0", at)])
                i += length
            else:
                width = next(n for n, top in enumerate((0x80, 0xE0, 0xF0, 0x100), 1) if data[i] < top)
                out.append(data[i:i + width])
                i += width
        return b"".join(out).decode("utf-8", "replace")

    def _match(self, data, start):
        """Longest prefix of data[start:] in the trie -> (bytes, offset of its replacement)."""
        units, best, at = self.units, 0, 0
        position = _child(units[0])
        for i in range(start, len(data)):
            position ^= data[i]
            if position >= len(units) or units[position] & 0x800000FF != data[i]:
                break
            unit = units[position]
            position ^= _child(unit)
            if unit >> 8 & 1 and position < len(units):
                best, at = i + 1 - start, units[position] & 0x7FFFFFFF
        return best, at


def _child(unit):
    return (unit >> 10) << ((unit & 0x200) >> 6)


class T5Tokenizer:
    """tokenizer(list[str], length) -> (ids [B, length], mask [B, length]); 0 pads, 1 ends.

    folder: holds spiece.model or tokenizer.json. A text longer than length - 1 pieces is cut, with a word."""

    def __init__(self, folder):
        pieces, charsmap = read_pieces(folder)
        fits = all(isinstance(p, str) and isinstance(s, (int, float)) and math.isfinite(s)
                   for p, s, _ in pieces)
        if not fits or not any(p and k == NORMAL for p, _, k in pieces):
            raise UserError(f"{folder}: its vocabulary is no list of pieces with finite scores")
        self.pieces = [p for p, _, _ in pieces]
        self.normal = {p: (s, i) for i, (p, s, k) in enumerate(pieces) if k in (NORMAL, USER) and p}
        self.longest = max(map(len, self.normal))
        self.unknown_score = min(s for p, s, k in pieces if k == NORMAL) - 10
        self.normalise = CharsMap(charsmap)
        # special tokens are found in any text, also the 100 sentinels that the library adds after the pieces
        self.special = {f"<extra_id_{99 - k}>": len(pieces) + k for k in range(100)}
        self.special |= {p: i for i, (p, _, k) in enumerate(pieces) if k in (CONTROL, UNKNOWN)}
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.special))) + ")").split

    def tokens(self, text):
        """Ids of one text without the end token."""
        ids = []
        for i, part in enumerate(self.split(text)):
            ids += [self.special[part]] if i % 2 else self.segment(part)
        return ids

    def segment(self, text):
        """Viterbi over the pieces: the segmentation of highest total score."""
        text = "".join(MARK + w for w in self.normalise(text).split(" ") if w)
        n = len(text)
        best, back = [0.0] + [-math.inf] * n, [(0, UNK)] * (n + 1)
        for i in range(n):
            for j in range(i + 1, min(n, i + self.longest) + 1 if best[i] > -math.inf else 0):
                hit = self.normal.get(text[i:j])
                if hit and best[i] + hit[0] > best[j]:
                    best[j], back[j] = best[i] + hit[0], (i, hit[1])
            if text[i] not in self.normal and best[i] + self.unknown_score > best[i + 1]:
                best[i + 1], back[i + 1] = best[i] + self.unknown_score, (i, UNK)
        ids, at = [], n
        while at:
            at, piece = back[at]
            if piece != UNK or ids[-1:] != [UNK]:            # a run of unknown characters is one token
                ids.append(piece)
        return ids[::-1]

    def report(self, row, length):
        """Say which words do not fit into `length` tokens with their end."""
        if len(row) > length - 1:
            lost = "".join(self.pieces[i] for i in row[length - 1:]).replace(MARK, " ").strip()
            print(f"T5 reads {length - 1} tokens; lost: {lost[:200]}", file=sys.stderr)

    def __call__(self, texts, length):
        ids, mask = torch.full((len(texts), length), PAD), torch.zeros(len(texts), length, dtype=torch.bool)
        for k, text in enumerate(texts):
            row = self.tokens(text)
            self.report(row, length)
            row = [*row[:length - 1], EOS]
            ids[k, :len(row)], mask[k, :len(row)] = torch.tensor(row), True
        return ids, mask


# --- encoder -------------------------------------------------------------

class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x.float() * scale).to(self.weight.dtype)


_linear = functools.partial(nn.Linear, bias=False)


class SelfAttention(nn.Module):
    def __init__(self, width, heads, head, buckets=0):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (_linear(width, heads * head) for _ in "qkv")
        self.o = _linear(heads * head, width)
        if buckets:
            self.relative_attention_bias = nn.Embedding(buckets, heads)

    def forward(self, x, bias):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)     # no 1/sqrt(d) in T5
        return self.o(out.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.wi_0, self.wi_1, self.wo = _linear(width, hidden), _linear(width, hidden), _linear(hidden, width)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    def __init__(self, width, heads, head, hidden, buckets):
        super().__init__()
        self.layer = nn.ModuleList([
            nn.ModuleDict(dict(SelfAttention=SelfAttention(width, heads, head, buckets),
                               layer_norm=Norm(width))),
            nn.ModuleDict(dict(DenseReluDense=Gated(width, hidden), layer_norm=Norm(width)))])

    def forward(self, x, bias):
        attention, mlp = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + mlp["DenseReluDense"](mlp["layer_norm"](x))


def bucket(distance, buckets=32, limit=128):
    """Relative position key - query -> bucket: exact to 8, then logarithmic; a half for each direction."""
    half, exact, far = buckets // 2, buckets // 4, distance.abs()
    log = torch.log(far.clamp(min=1) / exact) / math.log(limit / exact) * (half - exact)
    near = torch.where(far < exact, far, (exact + log.long()).clamp(max=half - 1))
    return near + half * (distance > 0)


class T5Encoder(nn.Module):
    """enc(ids [B, L], mask [B, L] or None) -> hidden [B, L, D]; in bfloat16 or float32, float16 overflows."""

    def __init__(self, width=4096, heads=64, head=64, hidden=10240, depth=24, vocabulary=32128, buckets=32):
        super().__init__()
        self.shared = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleDict(dict(
            block=nn.ModuleList(Block(width, heads, head, hidden, 0 if i else buckets) for i in range(depth)),
            final_layer_norm=Norm(width)))

    @classmethod
    def load(cls, source, dtype=torch.float32, prefix="", **storage):
        """From a folder, a file, or a part (prefix) of a single-file model; sizes are read off the shapes."""
        if dtype == torch.float16:
            raise UserError("T5 overflows in fp16 (its residuals pass 65504); use --dtype bf16 or fp32")
        files, first = Checkpoint.open(source).under(prefix), "encoder.block.0.layer."
        if first + "1.DenseReluDense.wi_0.weight" not in files.shapes:
            raise files.wrong_family("a T5 v1.1 encoder", first + "1.DenseReluDense.wi_0.weight")
        if "shared.weight" not in files.shapes:
            files = files.renamed(lambda n: "shared.weight" if n == "encoder.embed_tokens.weight" else n)
        shapes = files.shapes
        buckets, heads = shapes[first + "0.SelfAttention.relative_attention_bias.weight"]
        with Outline():
            net = cls(shapes["shared.weight"][1], heads,
                      shapes[first + "0.SelfAttention.q.weight"][0] // heads,
                      shapes[first + "1.DenseReluDense.wi_0.weight"][0], files.count("encoder.block."),
                      shapes["shared.weight"][0], buckets)
        unused = ("encoder.embed_tokens.", "decoder.", "lm_head.")
        return fill(net, files, dtype, ignore=unused, **storage).eval()

    @property
    def blocks(self):
        return self.encoder["block"]

    def bias(self, length, device):
        """Position bias [1, heads, L, L]: stored in the first block, used by all."""
        at = torch.arange(length, device=device)
        table = self.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
        return table(bucket(at[None, :] - at[:, None], table.num_embeddings)).permute(2, 0, 1)[None]

    def forward(self, ids_BL, mask_BL=None):
        x, bias = self.shared(ids_BL), self.bias(ids_BL.shape[1], ids_BL.device)
        if mask_BL is not None:
            bias = bias.masked_fill(~mask_BL[:, None, None].bool(), torch.finfo(bias.dtype).min)
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)
