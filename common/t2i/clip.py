"""CLIP's text side in plain Python and torch, from the public files: byte-pair tokenizer and text tower.

Parameter names are those of the Hugging Face files; the prefixes that different releases put before them go.
"""
import functools
import gzip
import heapq
import sys
import unicodedata
from html import unescape
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.files import read_json
from common.flags import UserError
from common.t2i.weights import Checkpoint, Outline, fill

START, END, LENGTH = "<|startoftext|>", "<|endoftext|>", 77
# the regular expression \s of the published tokenizers is White_Space; str.isspace() adds four control
# characters
SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c)
                                                                                for c in range(0x2000,
                                                                                               0x200b)}
SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


# --- tokenizer -----------------------------------------------------------


def byte_symbols():
    """The 256 printable characters that stand for bytes, in vocabulary order -> {byte: character}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(other)}}


def split_words(text):
    """Special tokens, 's 't 're ..., runs of letters, single digits, runs of anything else but space."""
    i, n = 0, len(text)
    while i < n:
        c = text[i]
        if c in SPACE:
            i += 1
            continue
        special = next((s for s in (START, END, *SUFFIXES) if text.startswith(s, i)), None)
        if special:
            yield special
            i += len(special)
            continue
        kind, j = unicodedata.category(c)[0], i + 1
        if kind == "L":
            while j < n and unicodedata.category(text[j])[0] == "L":
                j += 1
        elif kind != "N":
            while j < n and text[j] not in SPACE and unicodedata.category(text[j])[0] not in "LN":
                j += 1
        yield text[i:j]
        i = j


def read_vocabulary(folder):
    """-> ({token: id}, [(left, right)]) from any of the three public layouts."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        return _sound(read_json(folder / "vocab.json"), merges, folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        tree = read_json(folder / "tokenizer.json")
        try:
            merges = [tuple(m.split() if isinstance(m, str) else m) for m in tree["model"]["merges"]]
            vocabulary = tree["model"]["vocab"] | {t["content"]: t["id"] for t in tree["added_tokens"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'tokenizer.json'} is not CLIP's: {type(error).__name__} "
                            f"{error}") from None
        return _sound(vocabulary, merges, folder / "tokenizer.json")
    if (folder / "bpe_simple_vocab_16e6.txt.gz").is_file():
        with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1:49152 - 256 - 2 + 1]]
        base = list(byte_symbols().values())
        words = base + [c + "</w>" for c in base] + ["".join(m) for m in merges] + [START, END]
        return {w: i for i, w in enumerate(words)}, merges
    raise UserError(f"{folder} holds no CLIP vocabulary: expected vocab.json and merges.txt, or "
                    "tokenizer.json")


def _sound(vocabulary, merges, path):
    """(vocabulary, merges), or UserError: every byte and both ends must have an id, or a caption has none."""
    base = byte_symbols().values()
    missing = [w for w in (START, END, *base, *(c + "</w>" for c in base)) if w not in vocabulary]
    odd = [w for w, i in vocabulary.items() if type(i) is not int or not 0 <= i < 1 << 20]
    pairs = [m for m in merges if len(m) != 2 or not all(isinstance(p, str) for p in m)]
    if missing or odd or pairs:
        what = (f"no id for '{missing[0]}'" if missing else f"'{odd[0]}' has no id" if odd
                else f"merge {str(pairs[0])[:60]}")
        raise UserError(f"{path} is not CLIP's: {what}")
    return vocabulary, merges


class CLIPTokenizer:
    """tokenizer(list[str]) -> ids [B, 77]. folder: vocab.json and merges.txt, or
    bpe_simple_vocab_16e6.txt.gz.

    pad: id after the end token: the end token itself for ViT-L, 0 for bigG (None: read from the folder).
    html: unescape entities first, as OpenAI's code does and the Hugging Face one does not.
    A cut caption is reported with the words that were lost."""

    def __init__(self, folder, pad=None, html=False):
        folder = Path(folder)
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        self.vocabulary, merges = read_vocabulary(folder)
        self.rank = {m: i for i, m in enumerate(merges)}
        self.bytes, self.html = byte_symbols(), html
        self.start, self.end = self.vocabulary[START], self.vocabulary[END]
        self.unknown = self.end
        self.pad = self._published_pad(folder) if pad is None else pad
        self.cache = functools.lru_cache(maxsize=65536)(self._merge)
        self.last = {i for w, i in self.vocabulary.items() if w.endswith("</w>")}

    def _published_pad(self, folder):
        path = folder / "tokenizer_config.json"
        token = read_json(path).get("pad_token") if path.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        return self.vocabulary.get(token, self.end) if isinstance(token, str) else self.end

    def ends_word(self, token):
        return token in self.last

    def tokens(self, text):
        """Ids of one text without start, end, padding and limit."""
        if self.html:
            text = unescape(unescape(text))
        ids = []
        for i, part in enumerate(self._special_parts(text)):
            if i % 2:  # a special token spelt out, before any normalising
                ids.append(self.vocabulary[part])
                continue
            part = unicodedata.normalize("NFC", part)
            # by character: no final-sigma rule
            part = "".join(" " if c in SPACE else c.lower() for c in part)
            for word in split_words(part):
                ids += [self.vocabulary[word]] if word in (START, END) else self.cache(word)
        return ids

    def _special_parts(self, text):
        parts = [text]
        for token in (START, END):
            parts = [q for i,
                     p in enumerate(parts)
                     for q in (_interleave(p.split(token), token) if not i % 2 else [p])]
        return parts

    def _merge(self, word):
        """Byte-pair encoding of one word: join the neighbours of lowest rank until none is left.

        Candidates wait in a heap, so a run of n characters costs n log n."""
        parts = [self.bytes[b] for b in word.encode("utf-8", "surrogatepass")]
        parts[-1] += "</w>"
        after = list(range(1, len(parts))) + [-1]
        before = list(range(-1, len(parts) - 1))
        heap = [(self.rank[p], i, p) for i, p in enumerate(zip(parts, parts[1:])) if p in self.rank]
        heapq.heapify(heap)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i] if parts[i] is not None else -1
            if j < 0 or (parts[i], parts[j]) != pair:        # a neighbour has changed since
                continue
            parts[i], parts[j] = parts[i] + parts[j], None
            after[i] = after[j]
            if after[j] >= 0:
                before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right >= 0 and (parts[left], parts[right]) in self.rank:
                    found = parts[left], parts[right]
                    heapq.heappush(heap, (self.rank[found], left, found))
        return [self.vocabulary.get(p, self.unknown) for p in parts if p is not None]

    def __call__(self, texts, warn=True):
        rows = torch.full((len(texts), LENGTH), self.pad, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = self.tokens(text)
            if warn and len(ids) > LENGTH - 2:
                lost = self.decode(ids[LENGTH - 2:])
                print(f"CLIP reads {LENGTH - 2} tokens; lost: {lost[:200]}", file=sys.stderr)
            ids = [self.start, *ids[:LENGTH - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids):
        names, back = {i: w for w, i in self.vocabulary.items()}, {c: b for b, c in self.bytes.items()}
        text = "".join(names[i] for i in ids).replace("</w>", " ")
        return bytes(back.get(c, 32) for c in text).decode("utf-8", "replace").strip()


def _interleave(pieces, token):
    return [q for p in pieces for q in (p, token)][:-1]


# --- towers --------------------------------------------------------------


class Layer(nn.Module):
    """Pre-LN transformer layer; ViT-L uses quick_gelu x sigmoid(1.702 x), bigG the exact gelu."""

    def __init__(self, width, heads, hidden, quick):
        super().__init__()
        self.heads, self.quick = heads, quick
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({k: nn.Linear(width, width)
                                        for k in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width)))

    def forward(self, x_BND, causal=False):
        h, a = self.layer_norm1(x_BND), self.self_attn
        q, k, v = (a[n](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for n in ("q_proj", "k_proj", "v_proj"))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x_BND = x_BND + a["out_proj"](h.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x_BND))
        return x_BND + self.mlp["fc2"](h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


def layers(width, depth, heads, hidden, quick):
    return nn.ModuleDict(dict(layers=nn.ModuleList(Layer(width, heads, hidden, quick) for _ in range(depth))))


class CLIPTextEncoder(nn.Module):
    """enc(ids [B, 77]) -> dict(last [B, 77, D], penultimate [B, 77, D], pooled [B, D], projected [B, P]).

    last: after the final norm; penultimate: before the last layer, no norm; pooled: last at the first end
    token."""

    def __init__(self, width=768, depth=12, heads=12, hidden=3072, vocabulary=49408, project=0, quick=True,
                 end=49407):
        super().__init__()
        self.embeddings = nn.ModuleDict(dict(token_embedding=nn.Embedding(vocabulary, width),
                                             position_embedding=nn.Embedding(LENGTH, width)))
        self.encoder = layers(width, depth, heads, hidden, quick)
        self.final_layer_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, project, bias=False) if project else None
        self.end = end

    @classmethod
    def load(cls, source, dtype=torch.float32, prefix="", **storage):
        """From a diffusers folder, a file, or a part (prefix) of a single-file model; the sizes are read off
        the shapes."""
        files = Checkpoint.open(source).under(prefix).renamed(_plain_name)
        config = read_config(source)
        if "embeddings.token_embedding.weight" not in files.shapes:
            raise files.wrong_family("a CLIP text encoder", "embeddings.token_embedding.weight")
        vocabulary, width = files.shapes["embeddings.token_embedding.weight"]
        project = files.shapes.get("text_projection.weight", (0,))[0]
        quick = config.get("hidden_act", "quick_gelu" if width == 768 else "gelu") == "quick_gelu"
        heads = config.get("num_attention_heads", max(width // 64, 1))
        with Outline():
            net = cls(width, files.count("encoder.layers."), heads,
                      files.shapes["encoder.layers.0.mlp.fc1.weight"][0],
                      vocabulary, project, quick, end=vocabulary - 1)
        return fill(net, files, dtype, ignore=("embeddings.position_ids", "logit_scale"), **storage).eval()

    @property
    def blocks(self):
        return self.encoder["layers"]

    def forward(self, ids_BL):
        x = self.embeddings["token_embedding"](ids_BL)
        x = x + self.embeddings["position_embedding"](torch.arange(ids_BL.shape[1], device=ids_BL.device))
        for layer in self.encoder["layers"]:
            penultimate, x = x, layer(x, causal=True)
        last = self.final_layer_norm(x)
        pooled = last[torch.arange(len(ids_BL)), (ids_BL == self.end).int().argmax(1)]
        projected = pooled if self.text_projection is None else self.text_projection(pooled)
        return dict(last=last, penultimate=penultimate, pooled=pooled, projected=projected)


def _plain_name(name):
    return name.removeprefix("text_model.")


def read_config(source):
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source).with_name("config.json")
    return read_json(path) if path.is_file() else {}
