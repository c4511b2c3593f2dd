"""Files without torch: written whole or not at all, read without believing a word of them.

A damaged or hostile file is a UserError of one line: what is wrong, and where.
"""

import hashlib
import json
import os
import pathlib
import tokenize
import zipfile
import zlib

import numpy as np

from common.flags import UserError

LARGE = 1 << 30                                 # bytes: what unpacks to more has some size to start with
NPZ_DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, SyntaxError, IndexError, OverflowError,
              NotImplementedError, RuntimeError, RecursionError, tokenize.TokenError, zipfile.BadZipFile,
              zlib.error)


def sha256_file(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path):
    """Force a file or a directory entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path, data):
    """Replace path by the bytes data, or leave it as it was."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:                             # a full disk: half a file would only take room
        temporary.unlink(missing_ok=True)
        raise


def read_json(path, kind=dict):
    """The JSON value in a file, which must be of this kind (a type, or several)."""
    try:
        value = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:              # a pickle, half a file, a deep hole
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds {type(value).__name__}, which is not what belongs there")
    return value


def refuse_bomb(path, packed, unpacked):
    """UserError when so few bytes unpack to so many that only a bomb does: over 1 GiB and a hundredfold."""
    if unpacked > LARGE and unpacked > 100 * packed:
        raise UserError(f"{path} is refused: {packed} bytes that unpack to {unpacked}")


def read_npz(path, keys=None):
    """{key: array} of an .npz, those of `keys` that it has or all; never unpickled.

    A member's header is compared with the length that the archive tells before anything is allocated.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                refuse_bomb(f"{path}: {info.filename}", info.compress_size, info.file_size)
                with archive.open(info) as member:
                    _check_header(member, info.file_size)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if keys is None or key in keys}
    except NPZ_DAMAGE as error:
        why = error or type(error).__name__
        raise UserError(f"cannot read {path}: not a plain .npz of arrays ({why})") from None


def _check_header(member, size):
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("Object arrays are pickles, and never loaded")
    count = 1
    for n in shape:
        if not 0 <= n < 1 << 48:
            raise ValueError(f"shape {shape}")
        count *= n
    if count * dtype.itemsize + member.tell() != size:
        raise ValueError(f"an array of shape {shape}, {dtype} in {size} bytes")
