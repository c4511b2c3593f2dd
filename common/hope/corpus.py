"""From raw documents to a corpus worth training on: language, length, exact and near
duplicates, overlap, provenance.

    clean(documents, rules)      -> kept documents, counts per rule
    english(text)                -> P(English), naive Bayes over character 1-3-grams of
                                    common/hope/languages.json
    near_duplicates(texts)       -> indices to drop: MinHash of word 5-grams, 14 bands of 8, first of a
                                    cluster stays
    validate(folder, evaluation) -> problems of a shard folder: files, hashes, counts, licences, 13-gram
                                    overlap
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re

import numpy as np

from common.files import sha256_file, write_atomic
from common.flags import UserError
from common.hope.text import BPE, coverage, documents, guard, read_manifest, shard

# --- language -----------------------------------------------------------------------------------------------


def grams(text):
    """Counts of the character 1-, 2- and 3-grams of lower-cased letters; every run of
    anything else is one space."""
    text = " " + re.sub(r"[\W\d_]+", " ", text.lower()).strip() + " "
    return collections.Counter(text[i:i + n] for n in (1, 2, 3) for i in range(len(text) - n + 1))


@functools.lru_cache(maxsize=1)
def _models():
    samples = json.loads(pathlib.Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
    counts = {language: grams(" ".join(sentences)) for language, sentences in samples.items()}
    vocabulary = len(set().union(*counts.values()))
    return {language: (c, math.log(sum(c.values()) + 0.5 * vocabulary)) for language, c in counts.items()}


STOP_WORDS = frozenset("the of and to in a is that for it as was with be by on not he his but at are this "
                       "have from or"
                       " had an they which you we her she all their one there been if more when will would "
                       "who so no".split())


def english(text, limit=2000):
    """P(English | first `limit` characters), uniform over the known languages; 0 for a text without letters.

    The evidence of overlapping grams is tempered by 1/3, and a text without English stop words halves the
    odds.
    """
    found = grams(text[:limit])
    if sum(n for g, n in found.items() if g.strip()) == 0:
        return 0.0
    scores = {}
    for language, (counts, total) in _models().items():
        scores[language] = sum(n * (math.log(counts.get(g, 0) + 0.5) - total) for g, n in found.items()) / 3
    words = re.findall(r"[a-z']+", text[:limit].lower())
    if sum(w in STOP_WORDS for w in words) < 0.05 * len(words):
        scores["en"] -= math.log(2)
    top = max(scores.values())
    weights = {language: math.exp(s - top) for language, s in scores.items()}
    return weights["en"] / sum(weights.values())


# --- duplicates ---------------------------------------------------------------------------------------------

P61 = np.uint64((1 << 61) - 1)


def _fold(x):
    """x mod 2^61 - 1 for uint64 x."""
    x = (x & P61) + (x >> np.uint64(61))
    return np.where(x >= P61, x - P61, x)


def permute(a, b, x):
    """(a x + b) mod (2^61 - 1) in uint64 without overflow: a, b < 2^61 - 1, x < 2^32."""
    high, low = a >> np.uint64(32), a & np.uint64(0xFFFFFFFF)
    y = _fold(high * x)
    y = ((y & np.uint64((1 << 29) - 1)) << np.uint64(32)) | (y >> np.uint64(29))    # times 2^32 is a rotation
    return _fold(_fold(y + _fold(low * x)) + b)


def minhash(text, hashes=112, seed=0):
    """Signature [hashes] of the set of word 5-grams (the whole text when it is shorter)."""
    words = text.lower().split()
    shingles = {" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))}
    code = lambda s: s.encode("utf-8", "surrogatepass")     # noqa: E731
    x = np.array([int.from_bytes(hashlib.blake2b(code(s), digest_size=4).digest(), "big")
                  for s in shingles], np.uint64)
    draw = np.random.default_rng(seed)
    a = draw.integers(1, int(P61), (hashes, 1), dtype=np.uint64)
    b = draw.integers(0, int(P61), (hashes, 1), dtype=np.uint64)
    return permute(a, b, x[None]).min(1)


def near_duplicates(texts, bands=14, rows=8):
    """Indices of texts that share a band of their MinHash with an earlier text of the same cluster."""
    parent, buckets = list(range(len(texts))), {}

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, text in enumerate(texts):
        signature = minhash(text, bands * rows).reshape(bands, rows)
        for band in range(bands):
            first = buckets.setdefault((band, signature[band].tobytes()), i)
            a, b = sorted((root(first), root(i)))
            parent[b] = a
    return [i for i in range(len(texts)) if root(i) != i]


def clean(documents, min_chars=200, max_chars=8000, min_english=0.85, code=False, near=True, seen=None):
    """Normalise and filter documents -> (kept texts, counts per rule).

    code: keep line breaks and indentation, P(English) >= 0.5, up to 16 000 characters.  seen: set of
    blake2b-64 hashes shared between sources, so that exact duplicates go over the whole corpus; it is filled
    here.
    """
    if code:
        max_chars, min_english = max(max_chars, 16_000), min(min_english, 0.5)
    counts, kept, seen = collections.Counter(), [], set() if seen is None else seen
    for text in documents:
        counts["documents"] += 1
        text = text.strip() if code else " ".join(text.split())
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        reason = ("too_short" if len(text) < min_chars else "too_long" if len(text) > max_chars
                  else "exact_duplicate" if digest in seen else "language" if english(text) < min_english
                  else "")
        counts[reason or "passed"] += 1
        if not reason:
            seen.add(digest)
            kept.append(text)
    drop = set(near_duplicates(kept)) if near else set()
    kept = [text for i, text in enumerate(kept) if i not in drop]
    return kept, {**counts, "near_duplicate": len(drop), "kept": len(kept)}


# --- overlap and provenance ---------------------------------------------------------------------------------


def windows(tokens, n=13):
    """Set of hashed n-token windows, as a sorted uint64 array."""
    tokens = np.asarray(tokens, np.uint64)
    if len(tokens) < n:
        return np.zeros(0, np.uint64)
    factor = np.random.default_rng(13).integers(1, 1 << 63, n, dtype=np.uint64) | np.uint64(1)
    return np.unique((np.lib.stride_tricks.sliding_window_view(tokens, n) * factor).sum(1, dtype=np.uint64))


def overlap(a, b):
    """Share of the smaller set of windows that the other one holds too."""
    return len(np.intersect1d(a, b, assume_unique=True)) / max(1, min(len(a), len(b)))


def validate(folder, evaluation=(), limit=0.05):
    """Check a shard folder -> list of problems, each naming its file or source; empty when all is well.

    evaluation: name -> token ids of texts that must not occur in training.  limit: overlap that is a problem.
    """
    root, problems, seen = pathlib.Path(folder), [], {}
    manifest = read_manifest(root)
    missing = {"length", "vocab_size", "tokenizer", "sources"} - manifest.keys()
    if missing:
        return [f"manifest.json: no {', '.join(sorted(missing))}"]
    for source in manifest["sources"]:
        name, rows = source["name"], []
        problems += [f"{name}: no {key}" for key in ("licence", "url") if not source.get(key)]
        for entry in source["shards"]:
            path = root / entry["file"]
            if not path.is_file():
                problems.append(f"{entry['file']} is missing")
            elif sha256_file(path) != entry["sha256"]:
                problems.append(f"{entry['file']} does not match its hash")
            else:
                array = np.load(path, mmap_mode="r")
                if array.shape != (entry["rows"], manifest["length"] + 1):
                    problems.append(f"{entry['file']} has shape {array.shape}")
                rows.append((entry["split"], array))
        total = sum(len(a) for _, a in rows) * manifest["length"]
        if total > source["tokens"] or total < source["tokens"] - 2 * manifest["length"] - 2:
            problems.append(f"{name}: shards hold {total} tokens, the manifest says {source['tokens']}")
        seen[name] = np.unique(np.concatenate([windows(a.ravel()) for split, a in rows if split == "train"]
                                              or [np.zeros(0, np.uint64)]))
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            share = overlap(seen[a], seen[b])
            if share >= limit:
                problems.append(f"{a} and {b} share {share:.1%} of their 13-token windows")
        for b, ids in dict(evaluation).items():
            share = overlap(seen[a], windows(ids))
            if share > 0:
                problems.append(f"{a} contains {share:.1%} of the 13-token windows of evaluation text {b}")
    return problems


# --- commands -----------------------------------------------------------------------------------------------


def sources(path):
    """Sources under a path -> dicts with name, documents, weight, licence, url, code.

    A sources.json (or a folder that holds one) lists objects with name, path, weight, licence, url and
    optionally sha256 and code; anything else is one source.  "": the Python standard library.
    """
    root = pathlib.Path(path) if path else None
    listing = root / "sources.json" if root and root.is_dir() else root
    if not root or listing.suffix != ".json" or not listing.is_file():
        facts = ("PSF-2.0", "https://docs.python.org/3/library")
        facts = ("unknown", f"file:{root.name}") if path else facts
        return [dict(name=root.stem if root else "stdlib", documents=documents(path), weight=1.0,
                     licence=facts[0], url=facts[1], code=not path)]
    found = []
    for entry in json.loads(listing.read_text()):
        missing = {"name", "path", "weight", "licence", "url"} - entry.keys()
        if missing:
            raise UserError(f"{listing}: source {entry.get('name', '?')} has no {', '.join(sorted(missing))}")
        file = listing.parent / entry["path"]
        if entry.get("sha256") and (not file.is_file() or sha256_file(file) != entry["sha256"]):
            raise UserError(f"{file} is missing or not the file {listing} expects "
                            f"(sha256 {entry['sha256'][:12]}...)")
        found.append({"code": False, **entry, "documents": documents(str(file))})
    return found


def build(path, out, min_english, limit=0):
    """Clean every source into out/NAME.jsonl; writes sources.json and counts.json."""
    out, seen, listing, counts = pathlib.Path(out), set(), [], {}
    out.mkdir(parents=True, exist_ok=True)
    for source in sources(path):
        kept, counts[source["name"]] = clean(itertools.islice(source["documents"], limit or None),
                                             min_english=min_english, code=source["code"], seen=seen)
        file = out / f"{source['name']}.jsonl"
        write_atomic(file, "".join(json.dumps({"text": t}) + "\n" for t in kept).encode())
        listing.append(dict(path=file.name, sha256=sha256_file(file),
                            **{k: source[k] for k in ("name", "weight", "licence", "url", "code")}))
    write_atomic(out / "counts.json", json.dumps(counts, indent=1).encode())
    write_atomic(out / "sources.json", json.dumps(listing, indent=1).encode())
    print(json.dumps(counts, indent=1))


def train_tokenizer(path, out, vocab):
    """BPE on the combined sources -> out/tokenizer.json, coverage.json; never worse than before."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = [t for source in sources(path) for t in source["documents"]]
    bpe = BPE.train(texts, vocab)
    found, baseline = coverage(bpe, texts), out / "coverage.json"
    if baseline.exists():
        worse = guard(found, json.loads(baseline.read_text()))
        if worse:
            raise UserError(f"the new tokenizer is worse than {baseline} in {', '.join(worse)}; "
                            "move that file to accept it")
    bpe.save(out / "tokenizer.json")
    facts = dict(found, vocab_size=bpe.vocab_size, sha256=bpe.sha256)
    write_atomic(baseline, json.dumps(facts, indent=1).encode())
    print(json.dumps(found, indent=1))


# --- commands of hope_lm.py ---------------------------------------------------------------------------------


def make_corpus(cfg):
    """Filter and deduplicate --data (text, folder, sources.json) into OUT/NAME.jsonl and lists."""
    build(cfg.data, cfg.out, cfg.min_english, cfg.limit)


def make_tokenizer(cfg):
    """Train a byte-level BPE of --vocab tokens on --data; coverage.json in --out is a guard."""
    train_tokenizer(cfg.data, cfg.out, cfg.vocab)


def make_shards(cfg):
    """Tokenise the sources of --data into rows of --length + 1 tokens under --out, with a manifest."""
    shard(sources(cfg.data), BPE.load(cfg.tokenizer) if cfg.tokenizer else BPE(), cfg.out, cfg.length)


def make_check(cfg):
    """Check the shards of --data: files, hashes, counts, licences, overlap also with the texts named."""
    root = pathlib.Path(cfg.data)
    bpe = BPE.load(root / "tokenizer.json")
    problems = validate(root, {w: bpe.encode("\n".join(documents(w))) for w in cfg.words})
    print("\n".join(problems) or f"{root}: no problems")
    if problems:
        raise SystemExit(1)
