"""Files that somebody built to hurt: bombs, pickles, absurd headers, links (for eval.drills)."""

import functools
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from eval._drill_readers import encoded, shard, tar_of


class Bomb:
    """Unpickling it would leave a mark: the drills look for it."""

    def __reduce__(self):
        return os.mkdir, ("UNPICKLED",)


PICKLES = lambda: {
    "pickle": pickle.dumps(Bomb()),
    "old pickle": pickle.dumps(Bomb(), 0),  # noqa: E731
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"hello\n" * 99,
}
DEEP = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "huge number": b"9" * 100_000,
    "not a number": b"[NaN, Infinity, 1e999]",
    "lone surrogate": b'{"a": "\\ud800"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "a number": b"7",
    "null": b"null",
    "wide": b"[" + b"[]," * 100_000 + b"[]]",
}
JSONS = lambda: {**PICKLES(), **DEEP}  # noqa: E731


def headers():
    row = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
    make = (
        lambda tree, data=bytes(8): struct.pack("<Q", len(t := json.dumps(tree).encode())) + t + data
    )  # noqa: E731
    return {
        **PICKLES(),
        "header of 2^63": struct.pack("<Q", 2**63) + bytes(64),
        "header of 99 MB": struct.pack("<Q", 99 << 20) + bytes(64),
        "2^60 elements": make({"a": {**row, "shape": [2**60]}}),
        "negative": make({"a": {**row, "shape": [-2]}}),
        "overlap": make({"a": row, "b": row}),
        "outside": make({"a": {**row, "data_offsets": [0, 2**50]}}),
        "backwards": make({"a": {**row, "data_offsets": [8, 0]}}),
        "no rows": make([]),
        "deep": struct.pack("<Q", 400_000) + b'{"a":' * 80_000,
        "unknown type": make({"a": {**row, "dtype": "F99"}}),
    }


def msgpacks():
    return {
        **PICKLES(),
        "array of 4 G": b"\xdd\xff\xff\xff\xff",
        "map of 4 G": b"\xdf\xff\xff\xff\xff",
        "text of 4 G": b"\xdb\xff\xff\xff\xff",
        "deep": b"\x91" * 100_000,
        "deep maps": b"\x81\xa1a" * 50_000,
        "extension of 4 G": b"\xc9\xff\xff\xff\xff\x01",
        "wide": b"\xdd\x00\x10\x00\x00" + b"\x90" * (1 << 20),
    }


def npz_with(member, name="images.npy"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, member)
    return buffer.getvalue()


def npy(shape, data=b"", descr="|u1"):
    head = repr(dict(descr=descr, fortran_order=False, shape=shape)).encode()
    head = head.ljust(-(-(len(head) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def npzs(key="images"):
    name = f"{key}.npy"
    objects = io.BytesIO()
    np.savez(objects, **{key: np.array([Bomb()], object)})
    bomb = npy((1 << 31,)) + bytes(1 << 16)
    return {
        **PICKLES(),
        "2^60 elements": npz_with(npy((2**60,)), name),
        "2^40 x 2^40": npz_with(npy((2**40, 2**40)), name),
        "3 GiB that are not there": npz_with(npy((3, 1 << 30)), name),
        "short bomb": npz_with(bomb, name),
        "negative": npz_with(npy((-4, 4)), name),
        "deep header": npz_with(npy(0).replace(b"0", b"(" * 5000, 1), name),
        "objects": objects.getvalue(),
        "object header": npz_with(npy((1,), pickle.dumps(Bomb()), "|O"), name),
        "void": npz_with(npy((4,), bytes(64), "|V16"), name),
        **({"1.25 GiB of zeros": zeros_bomb(name)} if key == "images" else {}),
    }


def zeros_bomb(name):
    """A real decompression bomb, 1.25 GiB of zeros in 6 MB."""
    buffer = io.BytesIO()
    head, block = npy((1280, 1024, 1024)), bytes(1 << 20)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            member.write(head)
            for _ in range(1280):
                member.write(block)
    return buffer.getvalue()


def idxs(zip=False):
    pack = gzip.compress if zip else bytes
    head = lambda *shape: bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)  # noqa: E731
    cases = {
        "4 G x 4 G x 4 G": pack(head(2**32 - 1, 2**32 - 1, 2**32 - 1)),
        "3 GiB told": pack(head(3, 1 << 15, 1 << 15)),
        "no pictures": pack(head(0, 6, 6)),
        "other type": pack(bytes([0, 0, 13, 3]) + bytes(64)),
    }
    if zip:  # 2 GiB of zeros, 2048 members of the same MiB
        cases["2 GiB of zeros"] = pack(head(2, 1 << 15, 1 << 15)) + gzip.compress(bytes(1 << 20), 9) * 2048
    return {**PICKLES(), **cases}


@functools.cache
def picture_bombs():
    chunk = (
        lambda kind, data: struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )  # noqa: E731,E501
    png = (
        lambda w, h, *more: b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
        + b"".join(more)  # noqa: E731,E501
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
        + chunk(b"IEND", b"")
    )
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300 << 20), 1))
    return {
        **PICKLES(),
        "PNG 2^31 x 2^31": png(2**31 - 1, 2**31 - 1),
        "PNG 60000 x 60000": png(60000, 60000),
        "PNG 9000 x 9000, cut": png(9000, 9000),
        "PNG of no size": png(0, 0),
        "PNG with 300 MiB of text": png(4, 4, text),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "GIF 65535 x 65535": b"GIF89a\xff\xff\xff\xff\xf0\x00\x00"
        + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0;",
        "BMP 2^31 x 2^31": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
        "PPM 10^6 x 10^6": b"P6 1000000 1000000 255\n" + bytes(99),
    }


def strange_tars():
    def entry(name, **how):
        info = tarfile.TarInfo(name)
        for key, value in how.items():
            setattr(info, key, value)
        return tar_of({"000.png": encoded("PNG")}, info)

    header = bytearray(shard())
    header[124:136] = b"\x80" + bytes(3) + (2**62).to_bytes(8, "big")  # a member of 2^62 bytes
    return {
        **PICKLES(),
        "member of 2^62 bytes": bytes(header),
        "symbolic link": entry("001.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard link": entry("001.png", type=tarfile.LNKTYPE, linkname="../../x"),
        "device": entry("001.png", type=tarfile.CHRTYPE),
        "absolute name": tar_of({"/etc/000.png": encoded("PNG")}),
        "two dots": tar_of({"../../000.png": encoded("PNG")}),
        "gzip": gzip.compress(shard()),
        "long name of 2^30": entry("x", type=tarfile.GNUTYPE_LONGNAME, size=1 << 30),
        "pax header of 2^30": entry("x", type=tarfile.XHDTYPE, size=1 << 30),
        "bomb in gzip": gzip.compress(bytes(1 << 20), 9) * 2048,
        "10^5 members": tar_of({str(i): b"" for i in range(100_000)}),
    }


HOSTILE = {
    "safetensors": headers,
    "safetensors, foreign": headers,
    "safetensors index": JSONS,
    "torch zip": PICKLES,
    "flax msgpack": msgpacks,
    "npz of images": npzs,
    "npz of moments": lambda: npzs("mu"),
    "npz of grids": lambda: npzs("grids"),
    "IDX": idxs,
    "IDX, gzip": lambda: idxs(zip=True),
    **dict.fromkeys(("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "PNG with a recipe"), picture_bombs),
    **dict.fromkeys(("tar shard", "tar of archives", "devkit", "captioned tar"), strange_tars),
    **dict.fromkeys(
        (
            "tar shard's index",
            "JSON grids",
            "BPE JSON",
            "CLIP tokenizer JSON",
            "T5 tokenizer JSON",
            "T5 spiece.model",
            "text lines",
            "captioned table",
            "street index",
            "street JSON",
            "checkpoint",
            "checkpoint, resealed",
            "log of a run",
            "latent cache",
        ),
        JSONS,
    ),
}
