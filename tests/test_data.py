"""common/data.py, images.py, sources.py, latents.py: what a batch is, and what a damaged file does to it."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from common import images
from common.data import ClassOrder, Images, Order, batches, eval_rows, open_images
from common.latents import CHUNK, Latents, LatentWriter
from common.run import UserError
from common.sources import Array


def picture(seed, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image, format="PNG", **kw):
    buffer = io.BytesIO()
    image.save(buffer, format, **kw)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes, four PNGs each."""
    for c, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            picture(10 * c + i).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def write_tar(path, samples):
    """samples: list of (key, image bytes, label or None) -> a WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for key, data, label in samples:
            files = [(f"{key}.png", data)] + ([] if label is None else [(f"{key}.cls", str(label).encode())])
            for name, content in files:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_idx(path, array):
    head = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(head + array.tobytes()))


# --- single images -----------------------------------------------------

def test_center_crop_gives_the_pixels_of_the_published_one():
    y, x = np.mgrid[:300, :400]
    image = Image.fromarray(np.stack([x * 255 // 399, y * 255 // 299, (x ^ y) & 255], 2).astype(np.uint8))
    crops = {s: np.array(images.center_crop(image, s)) for s in (64, 128, 256)}
    # 0.01: means taken with pillow 13; another version's bicubic may round a few pixels otherwise
    assert np.allclose(crops[256].mean((0, 1)), (126.6289, 127.0039, 126.3091), atol=0.01)
    if PIL.__version__.startswith("13."):
        assert [hashlib.sha256(c.tobytes()).hexdigest()[:16] for c in crops.values()] == [
            "33cacf8590469f89", "efa1cfa3155a994b", "c418b16cccb002d2"]


@pytest.mark.parametrize("width,height", [(64, 64), (640, 64), (65, 650), (5, 50), (257, 64), (1, 1)])
def test_center_crop_has_the_exact_size_for_every_aspect(width, height):
    assert images.center_crop(picture(0, width, height), 64).size == (64, 64)


def test_random_crops_keep_area_and_aspect_and_fall_back_on_thin_images():
    rng = np.random.default_rng(0)
    boxes = np.array([images.crop_box(500, 375, rng) for _ in range(2000)])
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= 500).all() and (top + h <= 375).all()
    area, aspect = w * h / (500 * 375), w / h
    assert 0.195 < area.min() and area.max() <= 1 and 0.74 < aspect.min() and aspect.max() < 1.35  # in pixels
    assert images.crop_box(1000, 10, rng) == ((1000 - 13) // 2, 0, 13, 10)
    assert images.crop_box(10, 1000, rng) == (0, (1000 - 13) // 2, 10, 13)


def test_decode_goes_by_content_and_makes_rgb():
    grey, cmyk = picture(0).convert("L"), picture(1).convert("CMYK")
    assert np.array_equal(np.array(images.decode(encoded(grey)))[..., 0], np.array(grey))
    assert images.decode(encoded(cmyk, "JPEG")).mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6                                              # "rotate by 90": not applied
    assert images.decode(encoded(picture(2), "JPEG", exif=turned)).size == (40, 30)


def test_decode_refuses_bombs_deep_images_and_other_formats():
    bomb = bytearray(encoded(picture(0)))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # the header's size; its CRC is repaired below
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(ValueError, match="bomb"):
        images.decode(bytes(bomb))
    with pytest.raises(ValueError, match="8 bits"):
        images.decode(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))
    with pytest.raises(OSError):
        images.decode(encoded(picture(0), "EPS"))


def test_damaged_bytes_raise_only_what_the_reader_expects():
    rng = np.random.default_rng(0)
    survived = 0
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        good = encoded(picture(3), format)
        for trial in range(60):
            bad = bytearray(good[:rng.integers(1, len(good))] if trial % 2 else good)
            for at in rng.integers(0, len(bad), 5):
                bad[at] = rng.integers(256)
            try:
                images.decode(bytes(bad))
                survived += 1
            except (OSError, ValueError):
                pass
    assert survived < 300


# --- sources -----------------------------------------------------------

def test_procedural_pictures_are_a_function_of_seed_split_and_index():
    a, b = open_images(size=24, count=40), open_images(size=24, count=20)
    assert np.bincount(a.labels).tolist() == [4] * 10 and len(a.classes) == 10
    assert all(np.array_equal(a.get(i), b.get(i)) for i in range(20))
    assert not np.array_equal(a.get(0), open_images(size=24, count=20, seed=1).get(0))
    assert not np.array_equal(a.get(0), open_images(size=24, count=20, split="test").get(0))
    assert open_images(size=100, count=10).get(3).shape == (100, 100, 3)


def test_procedural_shapes_stand_out_from_their_background():
    data = open_images(size=32, count=100)
    for i in range(100):
        grey = np.asarray(Image.fromarray(data.get(i)).convert("L"), float)
        assert np.percentile(grey, 98) - np.percentile(grey, 2) > 60


def test_folder_tar_and_npz_of_the_same_images_give_the_same_set(folder, tmp_path):
    data = open_images(folder, size=24)
    assert data.classes == ["ant", "bee", "cat"] and data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    x, label = data.tensor()
    assert x.shape == (12, 3, 24, 24) and x.dtype == torch.uint8

    shards = tmp_path / "shards"
    shards.mkdir()
    files = [(folder / data.read.name(i)).read_bytes() for i in range(12)]
    for s in range(2):
        samples = [(f"dir.v1/k{i}", files[i], int(label[i])) for i in range(6 * s, 6 * s + 6)]
        write_tar(shards / f"part-{s}.tar", samples)
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    raw = np.stack([np.array(picture(10 * (i // 4) + i % 4)) for i in range(12)])
    np.savez(tmp_path / "set.npz", images=raw, labels=label.numpy())
    for other in (open_images(shards, size=24), open_images(tmp_path / "set.npz", size=24)):
        assert torch.equal(other.tensor()[0], x) and torch.equal(other.tensor()[1], label)
    assert open_images(shards).classes == ["ant", "bee", "cat"]
    assert (shards / "part-0.tar.json").exists()


def test_folder_splits_holdout_and_count(folder, tmp_path):
    with pytest.raises(UserError, match="no test split"):
        open_images(folder, split="test")
    test = open_images(folder, size=8, split="test", holdout=4)
    train = open_images(folder, size=8, holdout=4)
    names = [[d.read.name(i) for i in range(len(d))] for d in (train, test)]
    assert test.labels.tolist() == [0, 1, 2] and len(train) == 9 and not set(names[0]) & set(names[1])
    few = [open_images(folder, size=8, count=5, seed=seed) for seed in (0, 0, 1)]
    assert len(few[0]) == 5 and few[0].fingerprint() == few[1].fingerprint() != few[2].fingerprint()
    root = tmp_path / "root"
    root.mkdir()
    folder.rename(root / "train")
    with pytest.raises(UserError, match="no test split"):
        open_images(root, split="test", holdout=2)
    (root / "val").mkdir()
    (root / "val" / "ant").mkdir()
    picture(99).save(root / "val" / "ant" / "x.jpg")
    assert len(open_images(root)) == 12 and len(open_images(root, split="test")) == 1


def test_idx_plain_and_gzip_are_read_and_cut_files_are_named(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", x)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1, 2, 1, 0], np.uint8))
    data = open_images(tmp_path)
    assert np.array_equal(data.tensor()[0][:, 0].numpy(), x) and data.labels.tolist() == [0, 1, 2, 1, 0]
    padded = open_images(tmp_path, size=32, fit="pad", channels=3).tensor()[0]
    assert torch.equal(padded[:, 1, 2:30, 2:30], data.tensor()[0][:, 0]) and padded[:, :, :2].max() == 0
    with pytest.raises(UserError, match="t10k-images"):
        open_images(tmp_path, split="test")
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz"):
        open_images(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    write_idx(tmp_path / "train-images-idx3-ubyte", x[:4])
    with pytest.raises(UserError, match="4 images but 5 labels"):
        open_images(tmp_path)


def test_npz_is_never_unpickled_and_wrong_arrays_are_named(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(tmp_path / "a.npz", images=np.array([Trap()], object))
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 8, 8), np.float32), labels=np.zeros(3, int))
    np.savez(tmp_path / "c.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(2, int))
    np.savez(tmp_path / "d.npz", weights=np.zeros(3))
    (tmp_path / "e.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:100])
    wrong = dict(a="Object arrays", b="float32", c="3 images but 2", d="expected images", e="cannot")
    for name, why in wrong.items():
        with pytest.raises(UserError, match=why):
            open_images(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "keras.npz", x_train=np.zeros((3, 8, 8), np.uint8), y_train=np.arange(3),
             x_test=np.ones((2, 8, 8), np.uint8), y_test=np.arange(2))
    assert len(open_images(tmp_path / "keras.npz")) == 3
    assert open_images(tmp_path / "keras.npz", split="test").tensor()[0].min() == 1


def test_missing_empty_and_foreign_paths_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("x")
    wrong = {"nothing": "no data at", "empty": "no images", "hollow": "every subfolder", "notes.txt": "nor"}
    for name, why in wrong.items():
        with pytest.raises(UserError, match=why) as e:
            open_images(tmp_path / name)
        assert "\n" not in str(e.value)


def test_a_damaged_shard_is_named_and_skipped_and_the_last_one_is_an_error(folder, tmp_path, capsys):
    data = [(folder / "ant" / f"{i}.png").read_bytes() for i in range(4)]
    shards = tmp_path / "shards"
    shards.mkdir()
    for s in range(3):
        write_tar(shards / f"{s}.tar", [(f"{s}{i}", data[i], i % 2) for i in range(4)])
    assert len(open_images(shards)) == 12                           # writes the indices
    whole = (shards / "1.tar").read_bytes()
    with tarfile.open(shards / "1.tar") as tar:
        between = tar.getmembers()[4].offset
    for cut in (len(whole) // 2, between, between + 512):           # in data, between samples, after a header
        (shards / "1.tar").write_bytes(whole[:cut])
        assert len(open_images(shards)) == 8
        assert "skipped shard 1.tar" in capsys.readouterr().err
        with pytest.raises(UserError, match="1.tar"):
            open_images(shards / "1.tar")
    (shards / "1.tar").write_bytes(whole)
    assert len(open_images(shards)) == 12


def test_samples_without_a_label_are_counted_out(folder, tmp_path, capsys):
    data = (folder / "ant" / "0.png").read_bytes()
    write_tar(tmp_path / "a.tar", [("a", data, 1), ("b", data, None), ("c", data, "x")])
    assert len(open_images(tmp_path / "a.tar")) == 1
    assert "2 samples without a label" in capsys.readouterr().err
    write_tar(tmp_path / "b.tar", [("a", data, None), ("b", data, None)])
    assert open_images(tmp_path / "b.tar").labels.tolist() == [0, 0]


def test_a_damaged_image_gives_way_to_the_next_of_its_class(folder, capsys):
    whole = open_images(folder, size=16)
    kept = {i: whole.get(i) for i in (0, 5)}
    (folder / "ant" / "3.png").write_bytes(b"not an image")
    (folder / "bee" / "0.png").write_bytes((folder / "bee" / "0.png").read_bytes()[:200])
    data = open_images(folder, size=16)
    assert np.array_equal(data.get(3), kept[0]) and np.array_equal(data.get(4), kept[5])
    x, label = data.batch([3, 4, 3])
    assert label.tolist() == [0, 1, 0]
    assert set(data.skipped) == {"ant/3.png", "bee/0.png"}
    err = capsys.readouterr().err
    assert err.count("skipped ant/3.png") == 1 and "(2 so far)" in err
    for i in range(4):
        (folder / "cat" / f"{i}.png").write_bytes(b"")
    assert open_images(folder, size=16).batch([8])[1].tolist() == [0]  # a whole class gone: the label tells
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="not one of 12 images"):
        open_images(folder, size=16).get(0)
    picture(0).save(folder / "ant" / "0.png")
    with pytest.raises(UserError, match="cannot pad a 40x30 image to 16x16"):
        open_images(folder, size=16, fit="pad").get(0)


def test_a_folder_of_rubbish_is_not_named_file_by_file(tmp_path, capsys):
    (tmp_path / "class").mkdir()
    for i in range(150):
        (tmp_path / "class" / f"{i:03d}.png").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not one of 100 images"):
        open_images(tmp_path, size=16).get(0)
    assert capsys.readouterr().err.count("skipped") == 100


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(folder, workers):
    data = open_images(folder, size=16, augment="rrc")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert len(list(batches(data, Order(len(data), 4), 0, 3, workers=workers))) == 3
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_an_interrupt_of_the_terminal_does_not_take_the_workers_away(folder):
    data = open_images(folder, size=16)
    stream = batches(data, Order(len(data), 4), 0, 40, workers=2)
    next(stream)
    children = multiprocessing.active_children()
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    assert len(children) == 2 and len(list(stream)) == 39


# --- order -------------------------------------------------------------

@pytest.mark.parametrize("n,batch", [(103, 8), (64, 64), (5, 16)])
def test_ranks_together_see_one_permutation_whatever_their_number(n, batch):
    whole = [Order(n, batch, seed=3)(step)[1] for step in range(1, 30)]
    for world in (2, 4, 8):
        for step, expected in enumerate(whole, 1):
            parts = [Order(n, batch, 3, rank, world)(step)[1] for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), expected)
    per_epoch = Order(n, batch).steps_per_epoch
    epoch = np.concatenate(whole[:per_epoch])
    times = np.bincount(epoch, minlength=n)
    assert times.max() == -(-len(epoch) // n) and times.min() >= len(epoch) // n
    assert not np.array_equal(whole[0], whole[per_epoch])
    assert Order(n, batch, seed=3)(17)[1].tolist() == whole[16].tolist()  # resuming: no state needed


def test_batches_that_do_not_divide_name_one_that_does():
    with pytest.raises(UserError, match="try 96"):
        Order(1000, 100, world=8)
    with pytest.raises(UserError, match="try 4"):
        ClassOrder(np.arange(10), 5, 2, world=4)


def test_class_order_draws_every_class_equally_and_only_its_images():
    labels = np.random.default_rng(0).integers(0, 7, 200)
    order = ClassOrder(labels, classes=4, per_class=5, seed=1)
    seen = Counter()
    for step in range(1, 71):
        classes, (key, rows) = order.classes(step), order(step)
        assert key == step and np.array_equal(labels[rows], np.repeat(classes, 5))
        assert all(len(set(r)) == 5 for r in rows.reshape(4, 5).tolist())  # no image twice within a class
        seen.update(classes.tolist())
        halves = [ClassOrder(labels, 4, 5, 1, rank, 2)(step)[1] for rank in range(2)]
        assert np.array_equal(np.concatenate(halves), rows)
    assert set(seen.values()) == {40}
    assert len(ClassOrder(labels[:9], 3, 50)(1)[1]) == 150  # few images: with replacement


@pytest.mark.parametrize("n,world", [(10, 3), (7, 8), (16, 4)])
def test_evaluation_covers_every_row_once(n, world):
    rows = np.concatenate([eval_rows(n, r, world) for r in range(world)])
    assert sorted(rows.tolist()) == list(range(n))


# --- loader ------------------------------------------------------------

def test_workers_and_resuming_change_nothing(folder, capfd):
    (folder / "bee" / "1.png").write_bytes(b"damaged")

    def run(start, workers):
        data = open_images(folder, size=16, augment="rrc")
        got = list(batches(data, Order(len(data), 4, seed=5), start, 9, workers=workers))
        return got, data.skipped

    straight, skipped = run(0, 0)
    assert [step for step, _, _ in straight] == list(range(1, 10)) and list(skipped) == ["bee/1.png"]
    for start, workers in ((0, 2), (4, 1)):
        got, skipped = run(start, workers)
        assert list(skipped) == ["bee/1.png"]
        for (s, x, label), (s0, x0, label0) in zip(got, straight[start:], strict=True):
            assert s == s0 and torch.equal(x, x0) and torch.equal(label, label0)
    assert capfd.readouterr().err.count("skipped bee/1.png") == 3  # once a run, not once a worker


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    data = open_images(folder, size=16, augment="rrc")
    assert np.array_equal(data.get(2, (0, 1)), data.batch([7, 2], (0, 1))[0][1].permute(1, 2, 0).numpy())
    others = [data.get(2, key) for key in ((0, 2), (1, 1))] + [data.get(2)]
    assert not any(np.array_equal(data.get(2, (0, 1)), other) for other in others)
    assert np.array_equal(data.get(2), open_images(folder, size=16).get(2))         # no seed: the centre crop
    ramp = Array(np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1), "ramp")
    flips = Images(ramp, [0], ["x"], channels=1, augment="flip")
    seen = [int(flips.get(0, (0, e))[0, 0, 0]) for e in range(400)]
    assert set(seen) == {0, 3} and 160 < seen.count(3) < 240  # binomial(400, 1/2): 4 sigma


# --- latent cache ------------------------------------------------------

def fill(folder, z, labels, rank=0, world=1, limit=None, **meta):
    keys = [f"k{i}" for i in range(len(z))]
    writer = LatentWriter(folder, labels, ["a", "b"], keys, z.shape[2:], meta, rank, world)
    for chunk, rows in writer.todo()[:limit]:
        writer.write(chunk, z[rows.start:rows.stop])
    return writer


def test_a_latent_cache_killed_and_continued_equals_a_straight_one(tmp_path):
    n = 2 * CHUNK + 50
    z = torch.randn(n, 2, 4, 3, 3)
    labels = np.arange(n) % 2
    fill(tmp_path / "a", z, labels, scale=0.18215).finish()
    writer = fill(tmp_path / "b", z, labels, limit=1, scale=0.18215)
    with open(tmp_path / "b" / "done.0.jsonl", "a") as torn:
        torn.write('\n[1, "ab')
    with pytest.raises(UserError, match="unfinished"):
        Latents(tmp_path / "b")
    with pytest.raises(ValueError, match="2 of 3 chunks"):
        writer.finish()
    with pytest.raises(UserError, match="another scale"):
        fill(tmp_path / "b", z, labels, scale=0.13025)
    for rank in range(2):
        writer = fill(tmp_path / "b", z, labels, rank, 2, scale=0.18215)
    writer.finish()
    for name in ("latents.f16.bin", "labels.i16", "keys.txt", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data = open_images(tmp_path / "a")
    data.verify()
    assert len(data) == n and data.labels.tolist() == labels.tolist() and data.manifest["scale"] == 0.18215
    assert np.array_equal(data.get(300), z[300, 0].half().float().numpy())
    drawn = [np.array_equal(data.get(7, (0, e)), z[7, 1].half().float().numpy()) for e in range(400)]
    assert 160 < sum(drawn) < 240
    got = list(batches(data, Order(n, 8), 0, 3, workers=0))
    assert got[0][1].shape == (8, 4, 3, 3) and got[0][1].dtype == torch.float32


def test_a_latent_cache_refuses_what_it_cannot_hold_and_finds_damage(tmp_path):
    z = torch.randn(10, 2, 4, 2, 2)
    bad = z.clone()
    bad[3, 0, 0, 0, 0] = 1e6                                         # infinite in float16
    with pytest.raises(ValueError, match="finite"):
        fill(tmp_path / "a", bad, np.zeros(10, int))
    fill(tmp_path / "a", z, np.zeros(10, int)).finish()
    file = tmp_path / "a" / "latents.f16.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(UserError, match="chunk 0"):
        Latents(tmp_path / "a").verify()
    file.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="truncated"):
        open_images(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["chunks"][0][0] == 0
