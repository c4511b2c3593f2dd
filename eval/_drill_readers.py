"""Every reader of files, for eval.drills: how to make a sound input, how to read all of it, what is hostile.

make(folder) writes a sound input and returns the files to damage.  read(folder) reads every byte that a run
would and returns what it found; a damaged input is a UserError (or what the reader's docstring names).
checked: the format carries a checksum or a strict grammar of its own, so a damaged file is either refused or
found to hold the same; without one (a pixel of an IDX file) other bytes are simply other data.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import struct
import tarfile
import typing

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from common import images, ilsvrc, run, sources
from common.archive import Tape, walk
from common.arc import tasks
from common.ckpt import load, save
from common.files import sha256_file
from common.sealed import load_weights
from common.drift import flax_msgpack
from common.hope import text
from common.latents import Latents, LatentWriter
from common.metrics import Moments
from common.run import Ranks, UserError
from common.street import bundle, splits
from common.t2i import captions, clip, pictures, t5, weights
from eval._shared import last_scores, read_run
from eval.status import stages

ONE = Ranks(0, 1, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Reader:
    make: typing.Callable
    read: typing.Callable
    says: tuple = (UserError,)  # beside it, what the reader documents
    checked: bool = False


def picture(seed=0, size=24):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8).repeat(2, 0).repeat(2, 1))


def encoded(format, **how):
    buffer = io.BytesIO()
    picture().save(buffer, format, **how)
    return buffer.getvalue()


# --- weights -----------------------------------------------------------------


def make_safetensors(folder):
    run.save_weights(
        folder / "w.safetensors",
        {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)},
        dict(config=dict(width=8)),
    )
    return [folder / "w.safetensors"]


def read_checkpoint_files(folder):
    files = weights.Checkpoint.open(folder / "w.safetensors")
    return {name: files.get(name).tolist() for name in sorted(files.shapes)}


def make_sharded(folder):
    make_safetensors(folder)
    index = dict(weight_map={"a.weight": "w.safetensors", "b": "w.safetensors"})
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    return [folder / "m.safetensors.index.json"]


def read_sharded(folder):
    files = weights.Checkpoint.open(folder)
    return {name: files.get(name).tolist() for name in sorted(files.shapes)}


def make_pt(folder):
    torch.save({"a": torch.arange(12.0), "n": {"b": torch.ones(2)}}, folder / "w.pt")
    return [folder / "w.pt"]


def read_pt(folder):
    files = weights.Checkpoint.open(folder / "w.pt")
    return {name: files.get(name).tolist() for name in sorted(files.shapes)}


def flax_bytes():
    array = (
        lambda shape, data: b"\x93"
        + bytes([0x90 + len(shape), *shape])
        + b"\xa7float32"
        + bytes([0xC4, len(data)])  # noqa: E731
        + data
    )
    ext = lambda payload: bytes([0xC7, len(payload), 1]) + payload  # noqa: E731
    leaf = lambda shape: ext(array(shape, np.arange(np.prod(shape), dtype="<f4").tobytes()))  # noqa: E731
    return (
        b"\x82\xa5Dense\x82\xa6kernel"
        + leaf([3, 4])
        + b"\xa4bias"
        + leaf([4])
        + b"\xa4norm\x81\xa5scale"
        + leaf([4])
    )


def make_msgpack(folder):
    (folder / "w.msgpack").write_bytes(flax_bytes())
    return [folder / "w.msgpack"]


# --- arrays --------------------------------------------------------------------


def make_npz(folder):
    rng = np.random.default_rng(0)
    np.savez_compressed(
        folder / "x.npz", images=rng.integers(0, 256, (8, 6, 6), np.uint8), labels=np.arange(8) % 2
    )
    return [folder / "x.npz"]


def read_images_npz(folder):
    read, labels, classes, _ = sources.open_npz(folder / "x.npz", ("train",))
    return [np.asarray(read(i)).tolist() for i in range(len(labels))], labels.tolist(), classes


def make_moments(folder):
    moments = Moments(4)
    moments.update(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))
    moments.save(folder / "s.npz")
    return [folder / "s.npz"]


def read_moments(folder):
    moments = Moments.load(folder / "s.npz")
    return moments.mean.tolist(), moments.cov.tolist()


def make_idx(folder, zip=False):
    rng, name = np.random.default_rng(0), "-idx{}-ubyte" + ".gz" * zip
    x, y = rng.integers(0, 256, (8, 6, 6), np.uint8), np.arange(8, dtype=np.uint8) % 2
    files = []
    for stem, array in (("train-images", x), ("train-labels", y)):
        data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        files.append(folder / (stem + name.format(array.ndim)))
        files[-1].write_bytes(gzip.compress(data, mtime=0) if zip else data)
    return files


def read_idx(folder):
    read, labels, classes, _ = sources.open_idx(folder, "train")
    return [np.asarray(read(i)).tolist() for i in range(len(labels))], labels.tolist(), classes


# --- pictures --------------------------------------------------------------------


def pictures_reader(format, checked=False, **how):
    def make(folder):
        (folder / "x").write_bytes(encoded(format, **how))
        return [folder / "x"]

    def read(folder):
        image, digest = images.decode(str(folder / "x")), hashlib.sha256()
        for top in range(0, image.height, 64):              # in strips: there may be 89 million pixels
            digest.update(image.crop((0, top, image.width, min(top + 64, image.height))).tobytes())
        return image.size, digest.hexdigest()

    return Reader(make, read, (OSError, ValueError), checked)


def make_recipe(folder):
    info = PngImagePlugin.PngInfo()
    info.add_text(pictures.KEY, json.dumps(dict(prompt="a red circle", seed=1)))
    picture().save(folder / "x.png", pnginfo=info)
    return [folder / "x.png"]


# --- archives ----------------------------------------------------------------------


def tar_of(members, last=None):
    """A ustar of {name: bytes}; last: a TarInfo to add as it is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if last:
            tar.addfile(last)
    return buffer.getvalue()


def shard():
    return tar_of(
        {
            f"{i:03d}.{kind}": data
            for i in range(3)
            for kind, data in (("png", encoded("PNG")), ("cls", str(i % 2).encode()))
        }
    )


def make_shard(folder):
    (folder / "a.tar").write_bytes(shard())
    return [folder / "a.tar"]


def read_shard(folder):
    (folder / "a.tar.json").unlink(missing_ok=True)  # the index would answer for the tar
    return read_indexed_shard(folder)


def read_indexed_shard(folder):
    read, labels, classes = sources.open_shards(folder / "a.tar")
    found = []
    for i in range(len(labels)):
        try:
            found.append(np.asarray(read(i)).tolist())
        except (OSError, ValueError):  # common.data replaces the picture, and says so
            found.append(None)
    return found, labels.tolist()


def make_index(folder):
    make_shard(folder)
    sources.open_shards(folder / "a.tar")
    return [folder / "a.tar.json"]


def read_walk(folder):
    with Tape.open(folder / "a.tar") as tape:
        return list(walk(tape, "a.tar"))


def make_devkit(folder):
    from scipy.io import savemat

    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = np.array(
        [(1, "n00000001", "a", "b", 0), (2, "n00000002", "c", "d", 0)], [(n, object) for n in fields]
    )
    mat = io.BytesIO()
    savemat(mat, dict(synsets=rows))
    data = tar_of(
        {"data/meta.mat": mat.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n1\n"}
    )
    (folder / "kit.tar.gz").write_bytes(gzip.compress(data, mtime=0))
    return [folder / "kit.tar.gz"]


def read_kit(folder):
    classes, labels = ilsvrc.read_devkit(folder / "kit.tar.gz")
    return classes, labels.tolist()


# --- JSON and text -------------------------------------------------------------------


def make_arc(folder):
    pair = dict(input=[[0, 1], [2, 3]], output=[[9]])
    (folder / "t.json").write_text(json.dumps(dict(train=[pair, pair], test=[pair])))
    return [folder / "t.json"]


def read_arc(folder):
    found = tasks.read_tasks(folder / "t.json", 30)
    return found.grids.tolist(), found.shapes.tolist()


def make_arc_npz(folder):
    grids = np.full((4, 5, 5), 10, np.uint8)
    grids[:, :3, :2] = np.arange(4)[:, None, None]
    np.savez(folder / "g.npz", grids=grids, task=np.array([0, 0, 1, 1]), task_ids=np.array(["a", "b"]))
    return [folder / "g.npz"]


def read_arc_npz(folder):
    found = tasks.read_npz(folder / "g.npz", 30)
    return found.grids.tolist(), found.task.tolist(), [str(t) for t in found.task_ids]


def make_bpe(folder):
    text.BPE.train(["the cat sat on the mat, the cat sat"] * 9, 270).save(folder / "b.json")
    return [folder / "b.json"]


def read_bpe(folder):
    bpe = text.BPE.load(folder / "b.json")
    return bpe.merges, bpe.encode("the cat"), bpe.decode(bpe.encode("the mat"))


def make_clip(folder):
    base = list(clip.byte_symbols().values())
    words = base + [c + "</w>" for c in base] + ["th", "the</w>", clip.START, clip.END]
    added = [dict(content=w, id=words.index(w)) for w in (clip.START, clip.END)]
    tree = dict(
        model=dict(vocab={w: i for i, w in enumerate(words)}, merges=["t h", "th e</w>"]), added_tokens=added
    )
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(pad_token="<|endoftext|>")))
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def read_clip(folder):
    return clip.CLIPTokenizer(folder)(["the cat, 3 dogs"]).tolist()


def make_t5(folder):
    vocab = [
        ["<pad>", 0.0],
        ["</s>", 0.0],
        ["<unk>", 0.0],
        ["\u2581the", -2.0],
        ["\u2581", -3.0],
        ["c", -4.0],
        ["at", -4.5],
    ]
    tree = dict(
        model=dict(type="Unigram", unk_id=2, vocab=vocab),
        added_tokens=[dict(content=w, special=True) for w in ("<pad>", "</s>", "<unk>")],
    )
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return [folder / "tokenizer.json"]


def read_t5(folder):
    return [x.tolist() for x in t5.T5Tokenizer(folder)(["the cat"], 8)]


def make_spiece(folder):
    varint = lambda n: bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)  # noqa: E731
    field = lambda n, data: varint(n << 3 | 2) + varint(len(data)) + data  # noqa: E731
    pieces = [
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("\u2581the", -2.0, 1),
        ("\u2581", -3.0, 1),
        ("c", -4.0, 1),
        ("at", -4.5, 1),
    ]
    rows = [field(1, p.encode()) + b"\x15" + struct.pack("<f", s) + b"\x18" + varint(k) for p, s, k in pieces]
    (folder / "spiece.model").write_bytes(b"".join(field(1, row) for row in rows))
    return [folder / "spiece.model"]


def make_lines(folder):
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9)))
    return [folder / "c.jsonl"]


def make_captions(folder):
    (folder / "a.tar").write_bytes(
        tar_of(
            {
                f"{i}.{kind}": data
                for i in range(3)
                for kind, data in (("png", encoded("PNG")), ("json", b'{"caption": "a red circle"}'))
            }
        )
    )
    return [folder / "a.tar"]


def read_captions(folder):
    return [(item.key, item.caption) for item in captions.items(folder / "a.tar", 32, 8)]


def make_table(folder):
    picture().save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a circle"}\n' * 3)
    return [folder / "metadata.jsonl"]


def make_streets(folder):
    (folder / "index.jsonl").write_text(
        "".join(json.dumps(dict(path=f"{i}.jpg", label=i % 2, vid_id=f"v{i}")) + "\n" for i in range(6))
    )
    return [folder / "index.jsonl"]


def make_street_json(folder):
    bundle.write_json(folder / "a.json", dict(threshold=0.5, split={"a": "TRAIN"}, list=[1, 2, {"x": None}]))
    return [folder / "a.json"]


# --- runs ------------------------------------------------------------------------------


def state_of(step):
    return dict(
        net=dict(w=torch.full((4,), float(step)), name="x"),
        optim=dict(step=step, parts=[torch.arange(3) + step]),
    )


def make_checkpoints(folder):
    for step in (1, 2):
        save(folder, step, state_of(step), ONE)
    return sorted(p for p in (folder / "ckpt/00000002").iterdir())


def read_checkpoints(folder):
    """The state of step 2, or that of step 1, or a fresh start; anything else is a wrong result."""
    state = dict(net={}, optim={})
    step = load(folder, state, ONE)
    same = step == 0 or str(state) == str(state_of(step))
    assert same and step in (0, 1, 2), f"step {step} holds {state}"
    return "whole"


def make_resealed(folder):
    make_checkpoints(folder)
    return [folder / "ckpt/00000002/net.json", folder / "ckpt/00000002/net.safetensors"]


def read_resealed(folder):
    """A checkpoint whose author made the hashes fit."""
    at = folder / "ckpt/00000002"
    meta = json.loads((at / "meta.json").read_text())
    for name in meta["files"]:
        if (at / name).is_file():
            meta["files"][name]["sha256"] = sha256_file(at / name)
    (at / "meta.json").write_text(json.dumps(meta))
    return load(folder, dict(net={}, optim={}), ONE)


def make_run(folder):
    at = folder / "runs/a/b"
    at.mkdir(parents=True)
    rows = [
        dict(kind="header", config=dict(preset="x", steps=2), argv=["a.py"], world=1),
        *(dict(kind="train", time_s=1.0 * i, step=i, loss=0.5) for i in (1, 2)),
        dict(kind="eval", step=2, fid=3.0),
    ]
    (at / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (at / "config.json").write_text(json.dumps(dict(config=dict(preset="x"))))
    return [at / "log.jsonl", at / "config.json"]


def read_log(folder):
    found = read_run(folder / "runs/a/b")
    return [last_scores(found), stages(found), found.hardware, found.preset] and None


def make_latents(folder):
    writer = LatentWriter(folder, [0, 1, 1], ["a", "b"], ["x", "y", "z"], (2, 3, 3), dict(codec="none"))
    writer.write(0, torch.arange(108.0).reshape(3, 2, 2, 3, 3))
    writer.finish()
    return [folder / n for n in ("manifest.json", "labels.i16", "latents.f16.bin", "keys.txt")]


def read_latents(folder):
    cache = Latents(folder)
    cache.verify()
    return cache.batch(range(3))[0].tolist(), cache.labels.tolist(), cache.classes


def read_safetensors(folder):
    tensors, meta = load_weights(folder / "w.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}, meta["config"]


READERS = {
    "safetensors": Reader(make_safetensors, read_safetensors, checked=True),
    "safetensors, foreign": Reader(make_safetensors, read_checkpoint_files),
    "safetensors index": Reader(make_sharded, read_sharded),
    "torch zip": Reader(make_pt, read_pt),
    "flax msgpack": Reader(
        make_msgpack,
        lambda f: {k: v.tolist() for k, v in flax_msgpack.read(f / "w.msgpack").items()},
        (flax_msgpack.MsgpackError,),
    ),
    "npz of images": Reader(make_npz, read_images_npz, checked=True),
    "npz of moments": Reader(make_moments, read_moments, (UserError, ValueError), checked=True),
    "npz of grids": Reader(make_arc_npz, read_arc_npz, checked=True),
    "IDX": Reader(make_idx, read_idx),
    "IDX, gzip": Reader(lambda f: make_idx(f, zip=True), read_idx, checked=True),
    **{
        format: pictures_reader(format, format == "PNG")
        for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
    },
    "PNG with a recipe": Reader(make_recipe, lambda f: pictures.read_recipe(f / "x.png"), checked=True),
    "tar shard": Reader(make_shard, read_shard),
    "tar shard's index": Reader(make_index, read_indexed_shard, checked=True),
    "tar of archives": Reader(make_shard, read_walk),
    "devkit": Reader(make_devkit, read_kit, checked=True),
    "JSON grids": Reader(make_arc, read_arc),
    "BPE JSON": Reader(make_bpe, read_bpe),
    "CLIP tokenizer JSON": Reader(make_clip, read_clip),
    "T5 tokenizer JSON": Reader(make_t5, read_t5),
    "T5 spiece.model": Reader(make_spiece, read_t5),
    "text lines": Reader(make_lines, lambda f: list(text.documents(str(f / "c.jsonl")))),
    "captioned tar": Reader(make_captions, read_captions),
    "captioned table": Reader(
        make_table, lambda f: [i.caption for i in captions.items(f / "metadata.jsonl", 32, 8)]
    ),
    "street index": Reader(make_streets, lambda f: splits.read_index(f)),
    "street JSON": Reader(make_street_json, lambda f: bundle.read_json(f / "a.json")),
    "checkpoint": Reader(make_checkpoints, read_checkpoints, checked=True),
    "checkpoint, resealed": Reader(make_resealed, read_resealed),
    "log of a run": Reader(make_run, read_log),
    "latent cache": Reader(make_latents, read_latents, checked=True),
}
