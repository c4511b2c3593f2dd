"""Text to tokens to batches: byte-level BPE, uint16 shards with a manifest, loaders whose order
is a function of the step.

    BPE.train(texts, 4096).save("bpe.json")        merges learned on any text; lossless on all text
    shard(sources, bpe, "shards", length=512)      rows of length + 1 tokens, hashes, licences, weights
    Text(documents, bpe) / Mixture("shards")       .batch(key, n, T) -> int64 [n, T + 1];  .validation(T)

Nothing holds a cursor: row r of step s comes from the generator (seed, s, r), so a resumed run reads on where
it stopped, and the rows of a step are the same for every number of ranks.
"""

import functools
import gzip
import hashlib
import heapq
import json
import pathlib
import re
import sysconfig

import numpy as np

from common.files import read_json, sha256_file, write_atomic
from common.flags import UserError

# --- byte-level BPE -----------------------------------------------------------------------------------------

WORDS = re.compile(r" ?[^\W\d_]+| ?\d{1,3}| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")


class BPE:
    """Byte-level byte-pair encoding: ids 0-255 are bytes, 256.. merges in order, the last one is end-of-text.

    Without merges it is the identity on bytes, and byte 0 ends a text.
    """

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.bytes = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.eos = len(self.bytes) if self.merges else 0
        self.vocab_size = self.eos + 1 if self.merges else 256
        self._word = functools.lru_cache(maxsize=1 << 18)(self._encode_word)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn vocab_size - 257 merges (fewer when the text runs out of pairs that occur twice)."""
        counts = {}
        for text in texts:
            for word in WORDS.findall(text):
                counts[word] = counts.get(word, 0) + 1
        words = [(list(word.encode("utf-8", "surrogatepass")), n) for word, n in sorted(counts.items())]
        pairs, where = {}, {}
        for i, (ids, n) in enumerate(words):
            for pair in zip(ids, ids[1:]):
                pairs[pair] = pairs.get(pair, 0) + n
                where.setdefault(pair, set()).add(i)
        heap = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(heap)
        merges = []
        while heap and len(merges) < vocab_size - 257:
            n, pair = heapq.heappop(heap)
            if pairs.get(pair, 0) != -n:
                continue                            # an old count; the true one is in the heap too
            if -n < 2:
                break
            merges.append(pair)
            for changed in cls._merge_everywhere(words, pairs, where, pair, 255 + len(merges)):
                if pairs[changed] > 0:
                    heapq.heappush(heap, (-pairs[changed], changed))
        return cls(merges)

    @staticmethod
    def _merge_everywhere(words, pairs, where, pair, new):
        changed = set()
        for i in where.pop(pair):
            ids, n = words[i]
            for old in zip(ids, ids[1:]):
                pairs[old] -= n
                changed.add(old)
            ids[:] = _merge(ids, pair, new)
            for fresh in zip(ids, ids[1:]):
                pairs[fresh] = pairs.get(fresh, 0) + n
                where.setdefault(fresh, set()).add(i)
                changed.add(fresh)
        return changed

    def _encode_word(self, word):
        ids = list(word.encode("utf-8", "surrogatepass"))
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, len(self.merges)))
            if pair not in self.rank:
                break
            ids = _merge(ids, pair, 256 + self.rank[pair])
        return tuple(ids)

    def encode(self, text):
        if not self.merges:
            return list(text.encode("utf-8", "surrogatepass"))
        return [i for word in WORDS.findall(text) for i in self._word(word)]

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids if i < len(self.bytes)).decode("utf-8", "replace")

    def save(self, path):
        write_atomic(path, json.dumps(dict(kind="byte-level BPE", merges=self.merges, eos=self.eos)).encode())

    @classmethod
    def load(cls, path):
        merges = read_json(path).get("merges")
        if not isinstance(merges, list) or not all(
                isinstance(m, list) and len(m) == 2 and all(type(i) is int and 0 <= i < 256 + n for i in m)
                for n, m in enumerate(merges)):
            raise UserError(f"{path} is not a tokenizer written by `tokenizer`: no merges of earlier tokens")
        return cls(merges)

    @property
    def sha256(self):
        return hashlib.sha256(json.dumps(self.merges).encode()).hexdigest()


def _merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def coverage(bpe, texts):
    """tokens/word, share of words that are one token, at most two, and bytes/token over some texts."""
    words = [word.encode() for text in texts for word in text.split()]
    counts = np.array([len(bpe.encode(" " + word.decode())) for word in words] or [0])
    return dict(words=len(words), tokens_per_word=float(counts.mean()), single=float((counts == 1).mean()),
                within_two=float((counts <= 2).mean()),
                bytes_per_token=float((sum(map(len, words)) + len(words)) / counts.sum()))


GUARD = dict(tokens_per_word=0.05, single=-0.02, within_two=-0.02)      # allowed change against the baseline


def guard(now, baseline):
    """Names of the coverage numbers that got worse than their tolerance."""
    return [k for k, slack in GUARD.items() if (now[k] - baseline[k]) / slack > 1]


# --- documents ----------------------------------------------------------------------------------------------


def documents(path):
    """Texts under a path: a text file, .jsonl(.gz) with a "text" field, or a folder of those.  "":
    the standard library."""
    if not path:
        yield from standard_library()
        return
    root = pathlib.Path(path)
    if not root.exists():
        raise UserError(f"no text at {path}")
    for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        name = file.name.removesuffix(".gz")
        if not name.endswith((".txt", ".md", ".py", ".jsonl", ".rst")):
            continue
        opener = gzip.open if file.name.endswith(".gz") else open
        with opener(file, "rt", encoding="utf-8", errors="replace") as lines:
            if not name.endswith(".jsonl"):
                yield lines.read()
                continue
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UserError(f'{file}, line {number}: not a JSON object with a "text" field') from None


def standard_library(limit=4_000_000):
    """Python's own sources: text that is on every machine.  At most `limit` characters, in order of path."""
    root, total = pathlib.Path(sysconfig.get_paths()["stdlib"]), 0
    for file in sorted(root.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        total += len(text)
        if total > limit:
            return
        yield text


# --- batches ------------------------------------------------------------------------------------------------


def rng(*key):
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))


class Text:
    """One stream of documents in memory; the last tenth validates.  batch() draws
    windows with replacement."""

    def __init__(self, texts, bpe, validation=0.1):
        parts, size = [], 0
        for text in texts:
            parts += [np.array(bpe.encode(text) + [bpe.eos], np.uint16 if bpe.vocab_size <= 1 << 16
                               else np.uint32)]
            size += len(text.encode("utf-8", "surrogatepass")) + 1
        tokens = np.concatenate(parts)[:-1]
        cut = int(len(tokens) * (1 - validation))
        self.train, self.held, self.vocab_size = tokens[:cut], tokens[cut:], bpe.vocab_size
        self.bytes_per_token = size / len(tokens)
        self.facts = dict(tokens=len(tokens), sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
                          tokenizer=bpe.sha256)

    def batch(self, key, rows, T):
        """rows: which rows of this step, e.g. range(8) -> [n, T + 1] int64; key: (seed, step)."""
        if len(self.train) < T + 2:
            raise UserError(f"the text has {len(self.train)} training tokens, too few for rows of {T}")
        starts = [int(rng(*key, r).integers(len(self.train) - T)) for r in rows]
        return np.stack([self.train[s:s + T + 1] for s in starts]).astype(np.int64)

    def validation(self, T):
        n = (len(self.held) - 1) // T
        if n < 1:
            raise UserError(f"the text has {len(self.held)} validation tokens, too few for rows of {T}")
        return np.stack([self.held[i * T:(i + 1) * T + 1] for i in range(n)]).astype(np.int64)


class Mixture:
    """Shards of several sources: every row picks a source by weight, then one of its
    rows, with replacement."""

    def __init__(self, folder):
        self.root = pathlib.Path(folder)
        self.manifest = read_manifest(self.root)
        self.length, self.vocab_size = self.manifest["length"], self.manifest["vocab_size"]
        self.names = [s["name"] for s in self.manifest["sources"]]
        weights = np.array([s["weight"] for s in self.manifest["sources"]], float)
        self.edges = np.cumsum(weights / weights.sum())
        self.shards = {split: [[np.load(self.root / f["file"], mmap_mode="r")
                                for f in s["shards"] if f["split"] == split]
                               for s in self.manifest["sources"]] for split in ("train", "validation")}
        total = lambda key: sum(s[key] for s in self.manifest["sources"])   # noqa: E731
        self.bytes_per_token = total("bytes") / total("tokens")
        self.facts = dict(manifest=sha256_file(self.root / "manifest.json"),
                          tokenizer=self.manifest["tokenizer"])

    def batch(self, key, rows, T):
        if T > self.length:
            raise UserError(f"{self.root} holds rows of {self.length} tokens; --length {T} needs new shards")
        return np.stack([self._row(rng(*key, r), T) for r in rows]).astype(np.int64)

    def _row(self, draw, T):
        source = self.shards["train"][self.source(draw)]
        index = int(draw.integers(sum(map(len, source))))
        for shard in source:
            if index < len(shard):
                start = int(draw.integers(self.length - T + 1))
                return shard[index, start:start + T + 1]
            index -= len(shard)

    def source(self, draw):
        return min(int(np.searchsorted(self.edges, draw.random(), side="right")), len(self.edges) - 1)

    def validation(self, T):
        rows = [shard[:, :T + 1] for source in self.shards["validation"] for shard in source]
        if not rows or not sum(map(len, rows)):
            raise UserError(f"{self.root} holds no validation rows")
        return np.concatenate(rows).astype(np.int64)


def read_manifest(root):
    try:
        return read_json(pathlib.Path(root) / "manifest.json")
    except UserError as error:
        raise UserError(f"{root} has no readable manifest.json: {error}; run `shard` first") from None


def shard(sources, bpe, folder, length, rows_per_shard=2048, validation=0.01):
    """Tokenise sources into rows and write manifest.json, last -> the manifest.

    sources: dicts with name, documents (iterable of texts), weight, licence, url.  Documents end with
    end-of-text and are concatenated; a row has length + 1 tokens and the next starts on its last, so every
    token is predicted once.
    A document validates when its hash says so: the split does not depend on order.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype, entries = np.uint16 if bpe.vocab_size <= 1 << 16 else np.uint32, []
    for source in sources:
        entry = {k: source[k] for k in ("name", "weight", "licence", "url")}
        entry |= dict(documents=0, tokens=0, bytes=0, shards=[])
        streams = dict(train=[], validation=[])
        for text in source["documents"]:
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest()
            held = int.from_bytes(digest, "big") / 2**32 < validation
            ids = bpe.encode(text) + [bpe.eos]
            streams["validation" if held else "train"] += ids
            entry["documents"] += 1
            entry["tokens"] += len(ids)
            entry["bytes"] += len(text.encode("utf-8", "surrogatepass")) + 1
        for split, ids in streams.items():
            n = max(0, (len(ids) - 1) // length)
            tokens = np.array(ids[:n * length + 1], dtype)
            for lo in range(0, n, rows_per_shard):
                some = range(lo, min(n, lo + rows_per_shard))
                rows = np.stack([tokens[i * length:(i + 1) * length + 1] for i in some])
                name = f"{source['name']}-{split}-{lo // rows_per_shard:04d}.npy"
                np.save(folder / name, rows)
                entry["shards"].append(dict(file=name, split=split, rows=len(rows),
                                            sha256=sha256_file(folder / name)))
        if not any(s["split"] == "train" for s in entry["shards"]):
            raise UserError(f"source {source['name']} has {entry['tokens']} tokens: not one row of {length}")
        entries.append(entry)
    manifest = dict(format=1, length=length, vocab_size=bpe.vocab_size, tokenizer=bpe.sha256, sources=entries)
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    bpe.save(folder / "tokenizer.json")
    return manifest
