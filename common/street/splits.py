"""Who may see which image: hash splits by group, and a store that enforces roles.

A group (the frames of one video) falls into a split by the hash of its own name, so adding data moves
nothing. SplitStore.open is the only door to samples; it checks a table of roles, writes every grant to
access_log.jsonl and raises LeakageError otherwise.
"""

import collections
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import read_json, sha256_file, write_atomic
from common.flags import UserError
from common.images import decode
from common.street.index import read_index

SHARES = {"TRAIN": 0.60, "VAL_SELECT": 0.15, "VAL_CALIB": 0.15, "VAL_TEST": 0.10}
# parts of a split, cut by a second hash of the group name: (split, lower, upper end of the unit interval)
PARTS = {"TRAIN_INNER": ("TRAIN", 0.0, 0.05), "TRAIN_OUTER": ("TRAIN", 0.05, 1.0),
         "CALIB_FIT": ("VAL_CALIB", 0.0, 0.5), "CALIB_CONF": ("VAL_CALIB", 0.5, 1.0)}


class LeakageError(Exception):
    """A phase asked for data it must not see."""


# --- near duplicates ----------------------------------------------------------


def dhash(image):
    """64-bit difference hash: grey 9 x 8, is each pixel brighter than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.BILINEAR), np.int16)
    return int("".join("01"[int(b)] for b in (grey[:, :-1] > grey[:, 1:]).ravel()), 2)


def merge_duplicates(rows, data, distance=4, aspect=0.02):
    """Join groups that share a file or look alike (dHash within `distance`, aspect ratio within 2 %), in
    place -> number of joins.  Candidates are found through equal 13-bit pieces: 4 changed bits leave one of 5
    whole."""
    parent = {r["group"]: r["group"] for r in rows}

    def root(g):
        while parent[g] != g:
            parent[g] = parent[parent[g]]
            g = parent[g]
        return g

    joins, seen, pieces = 0, {}, collections.defaultdict(list)

    def join(a, b):
        nonlocal joins
        a, b = sorted((root(a), root(b)))
        joins += a != b
        parent[b] = a

    for row in rows:
        raw = (Path(data) / row["path"]).read_bytes()
        join(row["group"], seen.setdefault(hashlib.sha256(raw).digest(), row["group"]))
        image = decode(raw)
        code, shape = dhash(image), image.width / image.height
        for k in range(5):
            for other, other_shape, group in pieces[k, code >> 13 * k & 8191]:
                if (code ^ other).bit_count() <= distance and abs(shape / other_shape - 1) <= aspect:
                    join(row["group"], group)
            pieces[k, code >> 13 * k & 8191].append((code, shape, row["group"]))
    for row in rows:
        row["group"] = root(row["group"])
    return joins


# --- splits ------------------------------------------------------------------


def unit(salt, group):
    """A number in [0, 1) that depends on the names alone: the first 8 bytes of a SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{salt}|{group}".encode()).digest()[:8], "big") / 2**64


def split_of(group, salt, shares=SHARES):
    """The first interval of cumulative shares that holds unit(salt, group)."""
    u, end = unit(salt, group), 0.0
    for name, share in shares.items():
        end += share
        if u < end:
            return name
    return name


def assign(rows, mode, salt):
    """{id: split}.  group: by the hash of the group, so new groups move none.

    hash_stratified: the groups of each class in the order of their hash, cut at quantiles: better balance,
    but not stable under growth.  official_test: rows with official_split "test" are VAL_TEST, the others are
    hashed into the other three.  image: frames of one group apart; exists to show what the leak detector
    finds.
    """
    if mode == "image":
        return {r["id"]: split_of(r["id"], salt) for r in rows}
    if mode == "group":
        return {r["id"]: split_of(r["group"], salt) for r in rows}
    if mode == "official_test":
        official = {r["group"] for r in rows if r.get("official_split") == "test"}
        if not official or len(official) == len({r["group"] for r in rows}):
            raise UserError("split_mode official_test needs rows with official_split test, and others")
        rest = 1 - SHARES["VAL_TEST"]
        three = {name: share / rest for name, share in SHARES.items() if name != "VAL_TEST"}
        return {r["id"]: "VAL_TEST" if r["group"] in official else split_of(r["group"], salt, three)
                for r in rows}
    positive, place = {r["group"] for r in rows if r["label"]}, {}
    for members in (positive, {r["group"] for r in rows} - positive):
        order, end, low = sorted(members, key=lambda g: unit(salt, g)), 0.0, 0
        for name, share in SHARES.items():
            end += share
            high = round(end * len(order))
            place |= dict.fromkeys(order[low:high], name)
            low = high
    return {r["id"]: place[r["group"]] for r in rows}


def make_splits(rows, mode="group", images=20, groups=5, tries=50):
    """Assign every row -> dict for splits.json: salt, shares, counts, warning, split of every id.

    Salts "0", "1", ... are tried until every split holds `images` images and `groups` groups of each class.
    mode: "group", "hash_stratified", "official_test", "image", see assign.
    """
    best = None
    for salt in map(str, range(tries)):
        split = assign(rows, mode, salt)
        members = collections.defaultdict(list)
        for r in rows:
            members[split[r["id"]], r["label"]].append(r["group"])
        cells = [members[name, label] for name in SHARES for label in (0, 1)]
        short = sum(max(0, images - len(c)) + max(0, groups - len(set(c))) for c in cells)
        if best is None or short < best[0]:
            best = short, salt, split
        if not short:
            break
    short, salt, split = best
    counts = collections.Counter(split.values())
    warning = None if not short else (f"no salt of {tries} gives every split {images} images and {groups} "
                                      "groups of each class; intervals and guarantees will be weak")
    return dict(schema="streetvision/splits@1", salt=salt, shares=SHARES, mode=mode, warning=warning,
                counts={name: counts[name] for name in SHARES}, split=split,
                group={r["id"]: r["group"] for r in rows})


def leaks(splits):
    """Groups whose images lie in more than one split."""
    where = collections.defaultdict(set)
    for name, split in splits["split"].items():
        where[splits["group"][name]].add(split)
    return sorted(g for g, names in where.items() if len(names) > 1)


# --- the only door -----------------------------------------------------------


class Samples:
    """A granted set of rows.  image(i) decodes one; labels() and row["label"] exist only if labels were
    granted."""

    def __init__(self, rows, data, frozen_model=None):
        self.rows, self.data, self.frozen_model = rows, Path(data), frozen_model
        self.members = collections.defaultdict(list)

    def __len__(self):
        return len(self.rows)

    def image(self, i):
        m = self.frozen_model
        if m is not None and (m.training or torch.is_grad_enabled()):
            raise LeakageError("these samples are for a frozen model: call eval() and disable gradients")
        return decode((self.data / self.rows[i]["path"]).read_bytes())

    def of_group(self, i):
        """Indices of all samples of sample i's group."""
        if not self.members:
            for j, row in enumerate(self.rows):
                self.members[row["group"]].append(j)
        return self.members[self.rows[i]["group"]]

    def labels(self):
        return np.array([r["label"] for r in self.rows], np.int64)

    def groups(self):
        return np.array([r["group"] for r in self.rows])

    def ids(self):
        return [r["id"] for r in self.rows]


class SplitStore:
    """Samples by role.  roles: {(phase, split): purposes}; blind: phases that get no labels.

    Raises LeakageError on a combination that the table does not hold.
    """

    def __init__(self, data, run, roles, blind=(), write=True):
        self.data, self.run, self.roles, self.blind, self.write = Path(data), Path(run), roles, blind, write
        path = self.run / "splits.json"
        if not path.is_file():
            raise UserError(f"no {path}; run the splits command first")
        self.splits, self.sha256 = read_json(path), sha256_file(path)
        self.rows = read_index(data)
        unknown = [r["id"] for r in self.rows if r["id"] not in self.splits["split"]]
        if unknown:
            raise UserError(f"{unknown[0]} is not in {path}; "
                            "make the splits anew or give the data they were made of")
        self.grants = []

    def part(self, split):
        """Rows of a split or of one of its PARTS."""
        whole, low, high = PARTS.get(split, (split, 0.0, 1.0))
        salt = self.splits["salt"] + "|" + whole
        group = self.splits["group"]
        return [dict(r, group=group[r["id"]]) for r in self.rows if self.splits["split"][r["id"]] == whole
                and low <= unit(salt, group[r["id"]]) < high]

    def open(self, split, phase, purpose, checkpoint=None, sha256=None, model=None):
        """Samples of `split` for `phase`.  purpose infer_frozen: checkpoint must exist with this sha256, and
        its images come only while `model` is in eval mode and gradients are off."""
        if purpose not in self.roles.get((phase, split), ()):
            raise LeakageError(f"{phase} must not open {split} for {purpose}")
        if purpose == "infer_frozen":
            if checkpoint is None or model is None or not Path(checkpoint).is_file():
                raise LeakageError(f"{split} opens for infer_frozen only after the checkpoint is written")
            if sha256_file(checkpoint) != sha256:
                raise LeakageError(f"{checkpoint} is not the frozen one")
        rows = self.part(split)
        if phase in self.blind:
            rows = [{k: v for k, v in r.items() if k != "label"} for r in rows]
        ids = hashlib.sha256("\n".join(r["id"] for r in rows).encode()).hexdigest()
        grant = dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), phase=phase, split=split,
                     purpose=purpose, n=len(rows), ids_sha256=ids)
        self.grants.append(grant)
        if self.write:
            with open(self.run / "access_log.jsonl", "a") as file:
                file.write(json.dumps(grant, sort_keys=True) + "\n")
        return Samples(rows, self.data, model if purpose == "infer_frozen" else None)


def check_access_log(run, split="VAL_TEST", phase="evaluate"):
    """Raise LeakageError when any other phase ever opened `split`."""
    path = Path(run) / "access_log.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        grant = json.loads(line)
        if grant["split"] == split and grant["phase"] != phase:
            raise LeakageError(f"{split} was opened by {grant['phase']} at {grant['time']}; "
                               "no honest test is left")


def write_splits(rows, run, mode="group"):
    """Write run/splits.json, or leave an equal one alone -> the splits."""
    splits = make_splits(rows, mode)
    text = (json.dumps(splits, sort_keys=True, indent=1) + "\n").encode()
    Path(run).mkdir(parents=True, exist_ok=True)
    path = Path(run) / "splits.json"
    if not path.is_file() or path.read_bytes() != text:
        write_atomic(path, text)
    return splits
