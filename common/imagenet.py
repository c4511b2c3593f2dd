"""ImageNet from the published archives to shards of 256x256 crops: prepare, verify, clean.

    python -m common.imagenet prepare TRAIN.tar VAL.tar DEVKIT.tar.gz --out DIR   (or one image folder)
    python -m common.imagenet verify  ARCHIVE ... | --out DIR    MD5 of archives; SHA-256 of prepared shards
    python -m common.imagenet clean   [ARCHIVE ...] --out DIR    unfinished work; archives whose shards verify

Archives are read in place: the extra disk is the output alone. One pass reads, hashes, crops. Shard k holds
the source's members k N ... (k+1) N - 1, so a killed run continues with the missing shards and ends with the
same bytes. A damaged image is named, counted and left out.

    DIR/classes.txt, DIR/imagenet_archives.json        WordNet ids in order; name, size, MD5 of each archive
    DIR/train/manifest.json                            sizes, counts, hashes, what was skipped
    DIR/train/train-000000.tar, train-000000.tar.json  NAME.png, NAME.cls; where each image lies and came from

open_images(DIR, size=256, split="train") reads the result; so does any WebDataset reader.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from PIL import features
from tqdm import tqdm

from common import images
from common.archive import alone, read_at, read_json, sweep, write_whole
from common.files import sha256_file
from common.flags import UserError
from common.ilsvrc import find_splits, judge, md5_file, record, role
from common.sources import check

IMAGE_LIMIT = 64 << 20                                              # a larger member is no photograph


# --- one shard ---------------------------------------------------------

def write_shard(file, root, members, size, format):
    """Crop the members into the tar `file`; its index, written last, is the mark that the shard is whole."""
    temporary, samples, sources, skipped = f"{file}.{os.getpid()}.tmp", [], [], []
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, label, name, offset, length in members:
            wanted = None if length is None else min(length, IMAGE_LIMIT)
            source = read_at(os.path.join(root, name) if name else root, offset, wanted)
            try:
                if len(source) >= IMAGE_LIMIT:
                    raise ValueError(f"{length or len(source)} bytes are no photograph")
                data = encode(images.center_crop(images.decode(source), size), format)
            except (OSError, ValueError) as e:
                skipped.append([name or key, str(e)])
                continue
            samples.append([key, tar.offset + 512, len(data), label])
            sources.append(name or [offset, length])
            for suffix, content in ((format, data), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with open(temporary, "rb") as done:
        os.fsync(done.fileno())
    keys = [sample[0] for sample in samples] or [None]
    entry = dict(name=file.name, bytes=os.path.getsize(temporary), sha256=sha256_file(temporary),
                 count=len(samples), first=keys[0], last=keys[-1], skipped=skipped)
    os.replace(temporary, file)
    index = dict(entry, task=signature(members, size, format), check=check(samples), samples=samples,
                 sources=sources)
    write_whole(f"{file}.json", json.dumps(index).encode())
    return entry


def encode(image, format):
    """png keeps every pixel; level 1 takes a seventh of the time of level 6 for a sixth more bytes."""
    buffer = io.BytesIO()
    how = dict(png=dict(format="PNG", compress_level=1), jpg=dict(format="JPEG", quality=95, subsampling=0))
    image.save(buffer, **how[format])
    return buffer.getvalue()


def signature(members, size, format):
    return hashlib.sha256(repr((members, size, format)).encode()).hexdigest()


def finished(file, members, size, format):
    """The entry of a shard that is already whole, else None."""
    try:
        index = json.loads(Path(f"{file}.json").read_text())
        if index["task"] == signature(members, size, format) and file.stat().st_size == index["bytes"]:
            return {k: v for k, v in index.items() if k not in ("task", "check", "samples", "sources")}
    except (OSError, ValueError, KeyError):
        pass
    return None


# --- one split ---------------------------------------------------------

def write_shards(split, folder, prefix, want, workers, digest):
    """All shards of a split, the missing ones in worker processes -> their entries in order."""
    entries, running, members = {}, {}, split.members(digest)
    how = want["size"], want["format"]
    pool = ProcessPoolExecutor(max(workers, 1), initializer=follow, initargs=(os.getpid(),))
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = stack.enter_context(tqdm(desc=prefix, unit="img", total=split.count, disable=None))
        for k in itertools.count():
            batch = list(itertools.islice(members, want["per_shard"]))
            if not batch:
                break
            file = folder / f"{prefix}-{k:06d}.tar"
            entries[k] = finished(file, batch, *how)
            if entries[k] is None and workers:
                running[pool.submit(write_shard, file, split.root, batch, *how)] = k
            elif entries[k] is None:
                entries[k] = write_shard(file, split.root, batch, *how)
            while len(running) > 2 * workers:                       # the walk must not run away from the work
                for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                    entries[running.pop(future)] = future.result()
            bar.update(len(batch))
        for future, k in running.items():
            entries[k] = future.result()
    return [entries[k] for k in sorted(entries)]


def follow(parent):
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare_split(out, name, split, want, workers, archives, unofficial):
    """One split to shards and a sealing manifest; continues unfinished work, leaves finished work alone."""
    folder, want = out / name, dict(want, **split.identity)
    folder.mkdir(exist_ok=True)
    sweep(folder)
    sealed, unfinished = folder / "manifest.json", folder / "unfinished.json"
    before = read_json(sealed) or read_json(unfinished)
    if not before and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; take another --out")
    for key, value in want.items():
        if before and before.get(key) != value:
            raise UserError(f"{folder} has {key} {before.get(key)}, not {value}; take another --out")
    if sealed.exists() and all((folder / s["name"]).is_file() for s in before["shards"]):
        unfinished.unlink(missing_ok=True)
        return before
    write_whole(unfinished, json.dumps(want).encode())
    sealed.unlink(missing_ok=True)
    check_disk(folder, split.count, want["size"], want["format"])
    digest = None
    if split.archive and not archives[split.archive]["md5"]:
        digest = hashlib.md5(usedforsecurity=False)
    shards = write_shards(split, folder, name, want, workers, digest)
    if digest:
        try:
            judge(archives[split.archive], split.archive, digest.hexdigest(), unofficial)
        finally:
            write_whole(out / "imagenet_archives.json", json.dumps(archives, indent=1).encode())
    manifest = dict(want, images=sum(s["count"] for s in shards),
                    skipped=sum(len(s["skipped"]) for s in shards), source=archives.get(split.archive),
                    codecs={name: features.version(name) for name in ("pil", "jpg", "zlib")}, shards=shards)
    write_whole(sealed, json.dumps(manifest, indent=1).encode())
    unfinished.unlink()
    sweep(folder)
    return manifest


def check_disk(folder, count, size, format):
    """Refuse to start on a disk too small: 2/3 of the raw bytes as PNG, 1/3 as JPEG, and tar headers."""
    done, free = sum(p.stat().st_size for p in folder.glob("*.tar")), shutil.disk_usage(folder).free
    need = count * (size * size * 3 * dict(png=0.67, jpg=0.33)[format] + 2048) - done
    if free < need:
        raise UserError(f"{folder} needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; jpg: half")


# --- commands ----------------------------------------------------------

def prepare(paths, out, size=256, format="png", per_shard=1000, workers=None, unofficial=False):
    """Archives or a folder -> shards under `out`; {split: manifest}. Safe to kill and to repeat."""
    workers, out = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers, Path(out)
    splits, files = find_splits([Path(p) for p in paths])
    with alone(out):
        known = read_json(out / "imagenet_archives.json") or {}
        archives = known | {kind: record(path, kind, known, unofficial) for kind, path in files.items()}
        if "devkit" in files and not archives["devkit"]["md5"]:
            judge(archives["devkit"], "devkit", md5_file(files["devkit"]), unofficial)
        if files:
            write_whole(out / "imagenet_archives.json", json.dumps(archives, indent=1).encode())
        classes = next(iter(splits.values())).classes
        if any(split.classes != classes for split in splits.values()):
            raise UserError("the splits have different classes")
        names = "\n".join(classes) + "\n"
        if (out / "classes.txt").exists() and (out / "classes.txt").read_text() != names:
            raise UserError(f"{out} holds shards of other classes; take another --out")
        write_whole(out / "classes.txt", names.encode())
        want = dict(size=size, format=format, per_shard=per_shard, crop="ADM centre crop",
                    classes=len(classes))
        done = {name: prepare_split(out, name, split, want, workers, archives, unofficial)
                for name, split in splits.items()}
        sweep(out)
    for name, manifest in done.items():
        shards = manifest["shards"]
        print(f"{out / name}: {manifest['images']} images in {len(shards)} shards, "
              f"{sum(s['bytes'] for s in shards) / 1e9:.3f} GB, {manifest['skipped']} damaged images skipped")
        for image, why in itertools.chain.from_iterable(shard["skipped"] for shard in shards):
            print(f"warning: skipped {image}: {why}", file=sys.stderr)
    return done


def verify(paths, out, unofficial=False):
    """MD5 of archives into OUT/imagenet_archives.json; without archives the SHA-256 of OUT's shards."""
    out = Path(out)
    if not paths:
        check_shards(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    known = read_json(out / "imagenet_archives.json") or {}
    for path in map(Path, paths):
        kind = role(path)
        known[kind] = record(path, kind, {}, unofficial=True)
        judge(known[kind], kind, md5_file(path), unofficial=True)
        write_whole(out / "imagenet_archives.json", json.dumps(known, indent=1).encode())
        verdict = "as published" if known[kind]["ok"] else "NOT the published one"
        print(f"{path}: {kind}, MD5 {known[kind]['md5']}, {verdict}")
    if not unofficial and not all(entry["ok"] for entry in known.values()):
        raise UserError("not every archive is the published one")


def check_shards(out):
    """{split: manifest} of a folder whose shards are as written. UserError naming the first that is not."""
    manifests = {p.parent.name: read_json(p) for p in sorted(out.glob("*/manifest.json"))}
    if not manifests or list(out.glob("*/unfinished.json")):
        raise UserError(f"{out} holds no finished shards; run prepare")
    for name, manifest in manifests.items():
        for shard in tqdm(manifest["shards"], desc=name, disable=None):
            file = out / name / shard["name"]
            if not file.is_file() or sha256_file(file) != shard["sha256"]:
                raise UserError(f"{file} is damaged or missing; delete it and run prepare again")
        print(f"{out / name}: {len(manifest['shards'])} shards as written")
    return manifests


def clean(paths, out):
    """Without archives: remove unfinished splits. With: remove the archives, once their shards verify."""
    out, freed = Path(out), 0
    if not out.is_dir():
        raise UserError(f"no data at {out}")
    with alone(out):
        doomed = [Path(p) for p in paths]
        if doomed:
            sources = [manifest["source"] or {} for manifest in check_shards(out).values()]
            used = [(source.get("bytes"), source.get("mtime_ns")) for source in sources]
            for path in doomed:
                if not path.is_file() or (path.stat().st_size, path.stat().st_mtime_ns) not in used:
                    raise UserError(f"the shards in {out} were not made from {path}; it stays")
        else:
            for mark in out.glob("*/unfinished.json"):
                sweep(mark.parent)
                doomed += [*mark.parent.glob(f"{mark.parent.name}-??????.tar*"), mark]
        for path in doomed:
            freed += path.stat().st_size
            path.unlink()
    print(f"removed {len(doomed)} files, {freed / 1e9:.3f} GB")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def main(argv=None):
    parser = Parser(prog="python -m common.imagenet", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "verify", "clean"])
    parser.add_argument("paths", nargs="*", help="archives, or one folder")
    parser.add_argument("--out", default="imagenet256", help="folder of the shards [imagenet256]")
    parser.add_argument("--size", type=int, default=256, help="side of a crop in pixels [256]")
    parser.add_argument("--format", choices=["png", "jpg"], default="png", help="png keeps every pixel [png]")
    parser.add_argument("--per-shard", type=int, default=1000, help="source images a shard [1000]")
    parser.add_argument("--workers", type=int, help="processes that crop [cores - 1]; 0: none")
    parser.add_argument("--unofficial", action="store_true", help="take other archives than the published")
    try:
        a = parser.parse_args(argv)
        if a.command == "prepare" and (not a.paths or a.size < 1 or a.per_shard < 1):
            raise UserError("prepare needs archives or a folder, and positive sizes")
        if a.command == "prepare":
            prepare(a.paths, a.out, a.size, a.format, a.per_shard, a.workers, a.unofficial)
        elif a.command == "verify":
            verify(a.paths, a.out, a.unofficial)
        else:
            clean(a.paths, a.out)
    except (UserError, OSError) as e:
        print(f"common.imagenet: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("common.imagenet: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
