"""common/imagenet.py on small archives of the real nesting: labels, damage, hostile tars, kills, cleaning."""

import gzip
import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from common import archive, ilsvrc, imagenet
from common.data import ClassOrder, batches, open_images
from common.images import center_crop
from common.run import UserError

WNIDS = ("n02105855", "n01440764", "n01443537")             # as the archive lists them: not sorted
PER_CLASS = 11


def picture(seed, mode="RGB"):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return small.resize((int(rng.integers(30, 60)), int(rng.integers(30, 60))), Image.BICUBIC).convert(mode)


def encoded(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def tar_of(files, **kw):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **kw) as tar:
        for name, data in files:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(data, tarfile.TarInfo) else data
            info.name, info.size = name, len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def photo(wnid, n):
    """The n-th image of a class, in the odd forms ImageNet has: a PNG, a CMYK and a grey one; number 5 is cut
    off."""
    image = picture(100 * WNIDS.index(wnid) + n, {3: "CMYK", 4: "L"}.get(n, "RGB"))
    data = encoded(image, "PNG" if n == 2 else "JPEG")
    return data[:len(data) // 2] if n == 5 else data


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """train (under its second-download name), val and devkit, ids in another order than the WordNet ids."""
    root = tmp_path_factory.mktemp("ilsvrc")
    inner = [(f"{w}.tar", tar_of([(f"{w}_{n}.JPEG", photo(w, n)) for n in range(PER_CLASS)])) for w in WNIDS]
    (root / "ILSVRC2012_img_train.tar.1").write_bytes(tar_of(inner))
    ids = {"n01440764": 3, "n01443537": 1, "n02105855": 2}
    truth = [2, 3, 3, 1, 2, 1]
    by_id = {v: k for k, v in ids.items()}
    val = [(f"ILSVRC2012_val_{i:08d}.JPEG", photo(by_id[truth[i - 1]], i + 5)) for i in (2, 1, 3, 4, 6, 5)]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    rows = np.zeros(4, [("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("gloss", object),
                        ("num_children", int), ("children", object), ("wordnet_height", int),
                        ("num_train_images", int)])
    synsets = [(number, wnid, 0) for wnid, number in ids.items()] + [(1001, "n00001740", 3)]
    for row, (number, wnid, children) in zip(rows, synsets, strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["num_children"] = number, wnid, children
        row["words"], row["gloss"], row["children"] = "word", "gloss", np.arange(children)
    mat = io.BytesIO()
    savemat(mat, {"synsets": rows})
    kit = [("ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue()),
           ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
            "".join(f"{i}\n" for i in truth).encode())]
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(kit), mtime=0))
    return root


def run(*words):
    return imagenet.main([str(w) for w in words])


SMALL = ("--size", 32, "--per-shard", 4, "--workers", 0)


def prepare(source, out, *words):
    return run("prepare", source, "--out", out, *SMALL, "--unofficial", *words)


def content(out):
    """Every file below out that is not a lock, as bytes."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


# --- the straight way --------------------------------------------------

def test_archives_become_shards_with_the_right_pixels_labels_and_counts(archives, tmp_path, capsys):
    assert prepare(archives, tmp_path) == 0
    said = capsys.readouterr()
    assert "30 images in 9 shards" in said.out and "3 damaged images skipped" in said.out
    assert all(f"skipped {w}_5" in said.err for w in WNIDS)
    train, val = open_images(tmp_path, size=32), open_images(tmp_path, size=32, split="test")
    assert train.classes == val.classes == sorted(WNIDS)
    names = [train.read.name(i).rpartition("/")[2] for i in range(len(train))]
    assert names == [f"{w}_{n}" for w in WNIDS for n in range(PER_CLASS) if n != 5]
    assert [train.classes[label] for label in train.labels] == [name.partition("_")[0] for name in names]
    for i in (0, 2, 3, 4, 29):                              # plain, PNG, CMYK, grey, last
        wnid, _, n = names[i].partition("_")
        crop = center_crop(Image.open(io.BytesIO(photo(wnid, int(n)))).convert("RGB"), 32)
        assert np.array_equal(train.get(i), np.asarray(crop))
    truth = {1: "n02105855", 2: "n01440764", 3: "n01440764", 4: "n01443537", 5: "n02105855", 6: "n01443537"}
    for i in range(6):
        number = int(val.read.name(i)[-8:])
        assert val.classes[val.labels[i]] == truth[number]


def test_prepared_shards_feed_the_loader_in_worker_processes(archives, tmp_path):
    prepare(archives, tmp_path)
    data = open_images(tmp_path, size=24, augment="rrc")
    order = ClassOrder(data.labels, classes=2, per_class=3)
    got = [list(batches(data, order, 0, 6, workers=workers)) for workers in (0, 2)]
    for (step, x, label), (_, x2, label2) in zip(*got, strict=True):
        assert x.shape == (6, 3, 24, 24) and label.tolist() == np.repeat(order.classes(step), 3).tolist()
        assert torch.equal(x, x2) and torch.equal(label, label2)


def test_manifests_record_hashes_offsets_and_archives(archives, tmp_path):
    prepare(archives, tmp_path)
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    assert manifest["images"] == 30 and manifest["skipped"] == 3 and manifest["size"] == 32
    source = (archives / "ILSVRC2012_img_train.tar.1").read_bytes()
    for shard in manifest["shards"]:
        data = (tmp_path / "train" / shard["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == shard["bytes"]
        index = json.loads((tmp_path / "train" / f"{shard['name']}.json").read_text())
        for (key, _, _, _), (offset, size) in zip(index["samples"], index["sources"], strict=True):
            wnid, _, n = key.partition("_")
            assert source[offset:offset + size] == photo(wnid, int(n))
    kept = json.loads((tmp_path / "imagenet_archives.json").read_text())
    for kind, entry in kept.items():
        data = (archives / entry["name"]).read_bytes()
        assert entry["md5"] == hashlib.md5(data).hexdigest() and entry["bytes"] == len(data)
        assert entry["ok"] is False and entry["expected"] == ilsvrc.PUBLISHED[kind][1]
    with tarfile.open(tmp_path / "train" / "train-000000.tar") as tar:         # plain WebDataset
        assert tar.getnames()[:2] == ["n02105855_0.png", "n02105855_0.cls"]
        assert tar.extractfile("n02105855_0.cls").read() == b"2"


def test_preparing_again_reads_and_changes_nothing(archives, tmp_path, monkeypatch):
    prepare(archives, tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(imagenet, "write_shard", lambda *a: pytest.fail("wrote a shard again"))
    monkeypatch.setattr(ilsvrc, "train_members", lambda *a: pytest.fail("read the archive again"))
    (tmp_path / "val" / "unfinished.json").write_text("{}")         # killed between the two last steps
    assert prepare(archives, tmp_path) == 0 and content(tmp_path) == before


def test_a_folder_and_its_archive_give_the_same_crops(archives, tmp_path):
    for wnid in WNIDS:
        (tmp_path / "in" / wnid).mkdir(parents=True)
        for n in range(PER_CLASS):
            (tmp_path / "in" / wnid / f"{wnid}_{n}.JPEG").write_bytes(photo(wnid, n))
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    folder = open_images(tmp_path / "out", size=32)
    prepare(archives, tmp_path / "tar")
    packed = open_images(tmp_path / "tar", size=32)

    def crops(data):
        return sorted((int(data.labels[i]), data.get(i).tobytes()) for i in range(len(data)))

    assert crops(folder) == crops(packed) and folder.classes == packed.classes
    (tmp_path / "in" / WNIDS[0] / "extra.png").write_bytes(photo(WNIDS[0], 0))
    assert prepare(tmp_path / "in", tmp_path / "out") == 2          # another source: refused, nothing lost
    assert len(open_images(tmp_path / "out", size=32)) == 30


def test_the_kaggle_folder_is_understood(tmp_path):
    data = tmp_path / "in" / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid in WNIDS:
        (data / "train" / wnid).mkdir(parents=True)
        (data / "train" / wnid / f"{wnid}_1.JPEG").write_bytes(photo(wnid, 1))
    (data / "val").mkdir()
    (data / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(photo(WNIDS[0], 7))
    assert prepare(tmp_path / "in", tmp_path / "out") == 2          # no labels
    (tmp_path / "in" / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n"
                                                          f"ILSVRC2012_val_00000001,{WNIDS[0]} 1 2 3 4 \n")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert len(open_images(tmp_path / "out", size=32)) == 3
    assert open_images(tmp_path / "out", size=32, split="test").labels.tolist() == [2]


def test_jpeg_shards_are_near_the_crops(archives, tmp_path):
    prepare(archives, tmp_path / "png")
    prepare(archives, tmp_path / "jpg", "--format", "jpg")
    exact, near = (open_images(tmp_path / f, size=32).tensor()[0].float() for f in ("png", "jpg"))
    error = (exact - near).abs().mean()
    assert 0 < error < 4                                    # quality 95, smooth pictures: about 1 grey level


# --- verification ------------------------------------------------------

def test_archives_that_are_not_the_published_ones_are_refused(archives, tmp_path, capsys, monkeypatch):
    words = ["prepare", archives, "--out", tmp_path, *SMALL]
    assert run(*words) == 2
    assert "147897477120" in capsys.readouterr().err
    sizes = {f.name: f.stat().st_size for f in archives.iterdir()}
    names = dict(train="ILSVRC2012_img_train.tar.1", val="ILSVRC2012_img_val.tar",
                 devkit="ILSVRC2012_devkit_t12.tar.gz")
    right = {kind: hashlib.md5((archives / name).read_bytes()).hexdigest() for kind, name in names.items()}
    published = dict(train=(sizes["ILSVRC2012_img_train.tar.1"], "0" * 32), val=(None, right["val"]),
                     devkit=(None, right["devkit"]))
    monkeypatch.setattr(ilsvrc, "PUBLISHED", published)
    assert run(*words) == 2                         # the wrong sum is known after the pass: nothing is sealed
    assert "MD5" in capsys.readouterr().err and not (tmp_path / "train" / "manifest.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        open_images(tmp_path, size=32)
    with monkeypatch.context() as m:
        m.setattr(ilsvrc, "train_members", lambda *a: pytest.fail("read the archive again"))
        assert run(*words) == 2 and "MD5" in capsys.readouterr().err            # remembered
    published["train"] = (published["train"][0], right["train"])
    assert run(*words) == 0
    kept = json.loads((tmp_path / "imagenet_archives.json").read_text())
    assert all(entry["ok"] for entry in kept.values())
    assert run("verify", *archives.iterdir(), "--out", tmp_path / "sums") == 0
    assert run("verify", "--out", tmp_path) == 0


def test_verify_writes_sums_and_finds_a_damaged_shard(archives, tmp_path, capsys):
    assert run("verify", archives / "ILSVRC2012_img_val.tar", "--out", tmp_path) == 2
    entry = json.loads((tmp_path / "imagenet_archives.json").read_text())["val"]
    assert entry["md5"] == hashlib.md5((archives / "ILSVRC2012_img_val.tar").read_bytes()).hexdigest()
    out = tmp_path / "out"
    prepare(archives, out)
    assert run("verify", "--out", out) == 0
    before = content(out)
    shard = out / "train" / "train-000003.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert run("verify", "--out", out) == 2 and "train-000003.tar" in capsys.readouterr().err
    shard.unlink()
    assert prepare(archives, out) == 0 and content(out) == before


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_the_tape_hashes_every_byte_once_whatever_the_order_of_reading(tmp_path, order):
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "x").write_bytes(data)
    digest = hashlib.md5()
    with archive.Tape.open(tmp_path / "x", digest) as tape:
        places = [0, 100, 1_500_000, 2_999_990]
        inner = tape.window(1_000_000, 900_000)
        for at in places if order == "forward" else places[::-1]:
            tape.seek(at)
            assert tape.read(10) == data[at:at + 10]
            inner.seek(at // 4)
            assert inner.read(10) == data[1_000_000 + at // 4:][:10]
        assert inner.seek(-5, os.SEEK_END) and inner.read(100) == data[1_899_995:1_900_000]
        tape.hash_to(tape.size)
    assert digest.hexdigest() == hashlib.md5(data).hexdigest()


# --- hostile and damaged archives --------------------------------------

def member(kind, **kw):
    info = tarfile.TarInfo()
    info.type = kind
    for key, value in kw.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("name,entry,why", [
    ("/etc/n01440764_1.JPEG", b"x", "points outside"), ("../n01440764_1.JPEG", b"x", "points outside"),
    ("a/../../b.JPEG", b"x", "points outside"), ("bad\x1b[2Jname", b"x", "points outside"),
    ("l", member(tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    ("h", member(tarfile.LNKTYPE, linkname="other"), "is a link"), ("d", member(tarfile.CHRTYPE), "device"),
    ("f", member(tarfile.FIFOTYPE), "device")])
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_members_are_refused_and_write_nothing_outside(tmp_path, name, entry, why, nested, capsys):
    inner = tar_of([("n01440764_1.JPEG", photo(WNIDS[0], 0)), (name, entry)])
    outer = [("n01440764.tar", inner)] if nested else [("n01440764.tar", tar_of([])), (name, entry)]
    (tmp_path / "in.tar").write_bytes(tar_of(outer))
    assert prepare(tmp_path / "in.tar", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1 and "\x1b" not in err
    assert {p.name for p in tmp_path.iterdir()} <= {"in.tar", "out"}
    assert not list(tmp_path.glob("out/*/manifest.json"))


def test_bombs_by_count_header_and_nesting_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(archive, "MEMBER_LIMIT", 20)
    many = tar_of([(f"n01440764_{i}.JPEG", b"") for i in range(30)])
    comment = {"comment": "x" * (2 << 20)}
    pax = tar_of([("n01440764_1.JPEG", b"")], format=tarfile.PAX_FORMAT, pax_headers=comment)
    liar = bytearray(tar_of([("n01440764_1.JPEG", b"x" * 600)]))
    liar[124:136] = b"77777777777\0"                        # a size of 8 GiB
    liar[148:156] = b"        "
    liar[148:156] = f"{sum(liar[:512]):06o}\0 ".encode()
    deep = tar_of([("x" * 300, b"")], format=tarfile.GNU_FORMAT)[:1024] * 3000  # long names of long names ...
    bombs = {many: "more than 20", pax: "a header of", bytes(liar): "truncated", deep: "n01440764.tar"}
    for n, (inner, why) in enumerate(bombs.items()):
        (tmp_path / f"{n}.tar").write_bytes(tar_of([("n01440764.tar", inner)]))
        assert prepare(tmp_path / f"{n}.tar", tmp_path / f"out{n}") == 2
        err = capsys.readouterr().err
        assert why in err and err.count("\n") == 1, err


def test_a_decompression_bomb_and_an_oversized_member_are_skipped_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet, "IMAGE_LIMIT", 100_000)
    bomb = bytearray(encoded(picture(0), "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    files = [("n01440764_1.JPEG", photo(WNIDS[0], 0)), ("n01440764_2.JPEG", bytes(bomb)),
             ("n01440764_3.JPEG", b"x" * 200_000), ("odd name.JPEG", photo(WNIDS[0], 1)),
             ("n01440764_9.tar", tar_of([])), ("n01440764_10.JPEG", b"")]
    (tmp_path / "in.tar").write_bytes(tar_of([("n01440764.tar", tar_of(files))]))
    assert prepare(tmp_path / "in.tar", tmp_path / "out") == 0
    said = capsys.readouterr().err
    for text in ("n01440764_2: refused as a decompression bomb", "_3: 200000 bytes", "_9: ", "_10: "):
        assert text in said
    data = open_images(tmp_path / "out", size=32)
    assert [data.read.name(i).rpartition("/")[2] for i in range(2)] == ["n01440764_1", "n01440764_x000003"]


def test_cut_and_wrong_archives_are_one_line(archives, tmp_path, capsys):
    train = (archives / "ILSVRC2012_img_train.tar.1").read_bytes()
    val = (archives / "ILSVRC2012_img_val.tar").read_bytes()
    kit = (archives / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()
    cases = {"half": (train[:len(train) // 2],), "no end": (train[:-20 * 512],), "empty": (b"",),
             "noise": (os.urandom(5000),), "val alone": (val,), "kit alone": (kit,), "twice": (train, train),
             "cut kit": (val, kit[:len(kit) // 2]), "no kit": (val, b"\x1f\x8b" + os.urandom(50)),
             "cut val": (val[:val.rindex(b"ILSVRC2012_val")], kit)}
    for name, parts in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for i, part in enumerate(parts):
            (folder / f"{i}.tar").write_bytes(part)
        assert prepare(folder, tmp_path / "out" / name) == 2, name
        err = capsys.readouterr().err
        assert err.startswith("common.imagenet: error:") and err.count("\n") == 1, (name, err)
    assert prepare(tmp_path / "nothing", tmp_path / "out") == 2
    assert run("prepare", "--siz", "3") == 2 and run("shrink") == 2


# --- kills and cleaning ------------------------------------------------

def start(archives, out, workers):
    """prepare in a forked child -> its pid; what it says goes to a file beside out."""
    pid = os.fork()
    if pid == 0:
        try:
            sink = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            code = prepare(archives, out, "--size", 64, "--per-shard", 1, "--workers", workers)
        except BaseException:
            code = 99
        os._exit(code)
    return pid


def test_killed_ten_times_at_random_it_ends_with_the_same_bytes(archives, tmp_path):
    assert os.waitpid(start(archives, tmp_path / "straight", 0), 0)[1] == 0
    out, rng, alive, seen = tmp_path / "killed", random.Random(), 0, set()

    def shards():
        return len(list(out.glob("*/*.tar")))

    for kill in range(10):
        wanted = shards() + rng.randrange(3)                # by progress: a slow machine is killed as well
        workers = 2 if kill % 3 == 2 else 0
        pid = start(archives, out, workers)
        while shards() < wanted and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        alive += os.waitpid(pid, 0)[1] == signal.SIGKILL
        seen.add(shards())
        time.sleep(0.5 if workers else 0)                   # orphans notice within 0.2 s
    assert alive >= 5 and len(seen) >= 3                  # the kills hit a working process at several stages
    assert os.waitpid(start(archives, out, 0), 0)[1] == 0, (tmp_path / "killed.txt").read_text()
    straight, killed = content(tmp_path / "straight"), content(tmp_path / "killed")
    assert straight.keys() == killed.keys() and len(straight) > 80
    for name in straight:
        assert straight[name] == killed[name], name


def test_two_at_once_are_refused(archives, tmp_path, capsys):
    code = ("import pathlib, sys; from common.archive import alone\n"
            "with alone(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert holder.stdout.readline() == b"held\n"
    assert prepare(archives, tmp_path) == 2 and "another process" in capsys.readouterr().err
    holder.communicate()
    assert prepare(archives, tmp_path) == 0


def test_clean_removes_unfinished_work_and_only_prepared_archives(archives, tmp_path, monkeypatch):
    copies, out = tmp_path / "copies", tmp_path / "out"
    copies.mkdir()
    for file in archives.iterdir():
        (copies / file.name).write_bytes(file.read_bytes())
    with monkeypatch.context() as m:
        m.setattr(imagenet, "sha256_file", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(copies, out)
    (out / "train" / "mine.txt").write_text("kept")
    assert list(out.glob("train/*.tmp")) and run("clean", "--out", out) == 0
    assert [p.name for p in out.glob("train/*")] == ["mine.txt"]
    assert prepare(copies, out) == 2                        # a folder with other files is not taken over
    (out / "train" / "mine.txt").unlink()
    assert run("clean", copies / "ILSVRC2012_img_val.tar", "--out", out) == 2       # nothing is sealed yet
    prepare(copies, out)
    before = content(out)
    (copies / "other.tar").write_bytes(b"mine")
    assert run("clean", copies / "other.tar", "--out", out) == 2 and (copies / "other.tar").exists()
    (out / "train" / "train-000000.tar").write_bytes(b"damaged")
    assert run("clean", copies / "ILSVRC2012_img_train.tar.1", "--out", out) == 2
    (out / "train" / "train-000000.tar").write_bytes(before["train/train-000000.tar"])
    assert run("clean", copies / "ILSVRC2012_img_train.tar.1", "--out", out) == 0
    left = {p.name for p in copies.iterdir()}
    assert left == {"ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz", "other.tar"}
    assert content(out) == before and run("clean", "--out", out) == 0 and content(out) == before


def test_a_full_disk_is_told_before_the_work(archives, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: type("U", (), dict(free=1000)))
    assert prepare(archives, tmp_path) == 2 and "GB are free" in capsys.readouterr().err
