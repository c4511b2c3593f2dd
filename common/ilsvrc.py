"""What lies in the ILSVRC2012 archives and folders, and which image has which label (used by
common/imagenet.py).

Class index = place of the WordNet id in ascending order. The devkit counts classes in another order: its
numbers go through meta.mat. Archives are known by content and size, never by name (a second download is
called ... .tar.1). A member is (key, label, path below the root, offset, size): where an image lies and what
it is called from now on.
"""

import csv
import dataclasses
import gzip
import hashlib
import io
import re
import tempfile
import typing
import zlib
from pathlib import Path

import numpy as np
import scipy

from common.archive import Tape, read_at, walk
from common.flags import UserError
from common.sources import open_folder

PUBLISHED = {"train": (147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),        # bytes, MD5
             "val": (6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
             "devkit": (None, "fa75699e90414af021442c21a62c3abf")}


@dataclasses.dataclass
class Split:
    """One split of a source. members(digest) yields its members in a fixed order."""
    classes: list
    root: str                       # the archive itself, or the folder its members' paths start from
    members: typing.Callable
    identity: dict                  # what must be equal for a killed run to be continued
    count: int                      # images, for archives a guess from the size
    archive: str = ""               # role, for archives


def find_splits(paths):
    """Archives, an image folder or the Kaggle folder -> {"train": Split, "val": Split}, and {role:
    archive}."""
    for path in paths:
        if not path.exists():
            raise UserError(f"no data at {path}")
    if len(paths) == 1 and paths[0].is_dir():
        inside = sorted(p for p in paths[0].iterdir() if not p.name.startswith("."))
        if not inside:
            raise UserError(f"{paths[0]} is empty")
        kaggle = next((b for b in (paths[0], paths[0] / "ILSVRC") if (b / "Data" / "CLS-LOC").is_dir()), None)
        if kaggle or any(p.is_dir() for p in inside):
            return (kaggle_splits(paths[0], kaggle) if kaggle else folder_splits(paths[0])), {}
        paths = inside
    archives = {}
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give one folder, or archives")
        kind = role(path)
        if kind in archives:
            raise UserError(f"{archives[kind]} and {path} are both the {kind} archive; name one")
        archives[kind] = path
    return archive_splits(archives), archives


# --- archives ----------------------------------------------------------

def role(path):
    """train, val or devkit, by what the archive holds first."""
    if read_at(path, 0, min(2, path.stat().st_size)) == b"\x1f\x8b":
        return "devkit"
    with Tape.open(path) as tape:
        first = next(walk(tape, path.name), ("nothing",))[0].rpartition("/")[2]
    for kind, pattern in dict(train=r"n\d{8}\.tar", val=r"ILSVRC2012_val_\d{8}\.JPEG").items():
        if re.fullmatch(pattern, first):
            return kind
    raise UserError(f"{path} is no ILSVRC2012 archive: its first member is {first!r}")


def archive_splits(archives):
    splits = {}
    if "val" in archives and "devkit" not in archives:
        raise UserError("the val archive has no labels without ILSVRC2012_devkit_t12.tar.gz; give both")
    if "train" not in archives and "val" not in archives:
        raise UserError("nothing to prepare: give the train archive, or the val archive and the devkit")
    if "train" in archives:
        path = archives["train"]
        classes = train_classes(path)
        splits["train"] = Split(classes, str(path), lambda digest: train_members(path, classes, digest),
                                head(path), path.stat().st_size // 110_000, "train")
    if "val" in archives:
        classes, labels = read_devkit(archives["devkit"])
        if "train" in splits and splits["train"].classes != classes:
            raise UserError(f"{archives['train']} and {archives['devkit']} name different classes")
        splits["val"] = Split(classes, str(archives["val"]),
                              lambda digest: val_members(archives["val"], labels, digest),
                              head(archives["val"]), len(labels), "val")
    return splits


def head(path):
    """What tells one archive from another before 148 GB are read: its length and first MiB."""
    size = path.stat().st_size
    return dict(bytes=size, head=hashlib.sha256(read_at(path, 0, min(size, 1 << 20))).hexdigest())


def record(path, kind, known, unofficial):
    """{name, bytes, mtime_ns, md5, expected, ok} of an archive; md5 from `known` while size and time are the
    same.

    Raises UserError when its size, or the MD5 already known, is not the published one, unless unofficial.
    """
    stat, (size, expected) = path.stat(), PUBLISHED[kind]
    if size and stat.st_size != size and not unofficial:
        raise UserError(f"{path} has {stat.st_size} bytes, the published {kind} archive {size}: incomplete? "
                        "(--unofficial takes it as it is)")
    entry = dict(name=path.name, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, expected=expected)
    entry.update(md5=None, ok=None)
    before = known.get(kind, {})
    if all(before.get(key) == entry[key] for key in ("bytes", "mtime_ns", "expected")):
        entry = dict(before, name=path.name)
        if entry["md5"]:
            judge(entry, kind, entry["md5"], unofficial)
    return entry


def judge(entry, kind, md5, unofficial):
    """Write the verdict into the record. Raises UserError on a wrong sum, unless unofficial."""
    entry.update(md5=md5, ok=md5 == entry["expected"])
    if not entry["ok"] and not unofficial:
        raise UserError(f"{entry['name']} has MD5 {md5}, the published {kind} archive {entry['expected']}: "
                        "damaged? (--unofficial takes it as it is)")


def md5_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def train_classes(path):
    """Sorted WordNet ids of a train archive, from the headers of the outer tar."""
    with Tape.open(path) as tape:
        names = [Path(name).name for name, _, _ in walk(tape, path.name)]
    for name in names:
        if not re.fullmatch(r"n\d{8}\.tar", name):
            raise UserError(f"{path}: {name!r} is no class archive n########.tar")
    if len(set(names)) != len(names):
        raise UserError(f"{path} holds a class twice")
    return sorted(name.removesuffix(".tar") for name in names)


def train_members(path, classes, digest=None):
    """Members of the tar of tars in its own order; the digest sees every byte of the file on the way."""
    index = {wnid: i for i, wnid in enumerate(classes)}
    with Tape.open(path, digest) as tape:
        for name, start, size in walk(tape, path.name):
            wnid = Path(name).stem
            inner = walk(tape.window(start, size), f"{path.name}/{name}")
            for n, (image, offset, length) in enumerate(inner):
                stem = Path(image).name.partition(".")[0]
                key = stem if re.fullmatch(rf"{wnid}_[0-9]{{1,9}}", stem) else f"{wnid}_x{n:06d}"
                yield key, index[wnid], "", start + offset, length
        tape.hash_to(tape.size)


def val_members(path, labels, digest=None):
    """Members of the flat val archive; image number i has the label of line i of the ground truth."""
    seen = set()
    with Tape.open(path, digest) as tape:
        for name, offset, length in walk(tape, path.name):
            number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", name)
            if not number or not 1 <= int(number[1]) <= len(labels) or int(number[1]) in seen:
                raise UserError(f"{path}: {name!r} is not one of the {len(labels)} images the devkit labels")
            seen.add(int(number[1]))
            yield f"ILSVRC2012_val_{number[1]}", int(labels[int(number[1]) - 1]), "", offset, length
        tape.hash_to(tape.size)
    if len(seen) != len(labels):
        raise UserError(f"{path} holds {len(seen)} images, the devkit labels {len(labels)}")


def read_devkit(path, limit=256 << 20):
    """devkit .tar.gz -> (sorted WordNet ids, class index of each val image).

    Line i of the ground truth is an ILSVRC2012_ID; meta.mat gives its WordNet id (rows without children are
    classes).
    """
    try:
        with gzip.open(path) as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} is not a whole .tar.gz: {e}") from None
    if len(data) > limit:
        raise UserError(f"{path} unpacks to more than {limit >> 20} MiB and is no devkit")
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        found = {Path(name).name: data[offset:offset + size]
                 for name, offset, size in walk(Tape(file.fileno(), 0, len(data)), path.name)}
    try:
        rows = np.atleast_1d(scipy.io.loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"])
        wnid = {int(row[0]): str(row[1]) for row in rows if int(row[4]) == 0}
        numbers = [int(line) for line in found["ILSVRC2012_validation_ground_truth.txt"].split()]
        classes = sorted(wnid.values())
        return classes, np.array([classes.index(wnid[number]) for number in numbers])
    except Exception as e:                      # SciPy's reader has many ways to say "damaged"
        raise UserError(f"{path} holds no readable meta.mat and ground truth: {type(e).__name__}") from None


# --- folders -----------------------------------------------------------

def listed(root, files, labels, classes):
    members = [(f"{label:04d}_{n:07d}", int(label), file, 0, None)
               for n, (file, label) in enumerate(zip(files, labels, strict=True))]
    identity = dict(files=len(members), names=hashlib.sha256(repr(members).encode()).hexdigest())
    return Split(list(classes), str(root), lambda _: iter(members), identity, len(members))


def folder_splits(root):
    """root/train and root/val, each one subfolder a class; without them the whole folder is train."""
    below = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    splits = {}
    for name in below or ["train"]:
        at = root / name if below else root
        read, labels, classes = open_folder(at)
        splits[name] = listed(at, read.names, labels, classes)
    return splits


def kaggle_splits(root, base):
    """ILSVRC/Data/CLS-LOC/{train,val}: train one folder a class, val flat with its labels in
    LOC_val_solution.csv."""
    data = base / "Data" / "CLS-LOC"
    read, labels, classes = open_folder(data / "train")
    splits = {"train": listed(data / "train", read.names, labels, classes)}
    if (data / "val").is_dir():
        tables = [b / "LOC_val_solution.csv" for b in (root, base) if (b / "LOC_val_solution.csv").exists()]
        if not tables:
            raise UserError(f"{data / 'val'} has no labels without LOC_val_solution.csv in {root}")
        try:
            with open(tables[0], newline="") as file:
                wnid = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
            names = sorted(wnid)
            labels = [classes.index(wnid[name]) for name in names]
        except (KeyError, IndexError, ValueError, AttributeError) as e:
            raise UserError(f"{tables[0]} is not Kaggle's table of labels: {e}") from None
        splits["val"] = listed(data / "val", [f"{name}.JPEG" for name in names], labels, classes)
    return splits
