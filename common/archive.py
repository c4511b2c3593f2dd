"""Reading other people's tar files without believing them; writing one's own whole or not at all, alone.

Nothing is ever extracted: members are located by offset and size. Refused by name: links, devices, sparse
files, absolute names, "..", headers of more than a MiB, tars of more than a quarter of a million members.
"""

import contextlib
import fcntl
import io
import json
import os
import tarfile

from common.flags import UserError

HEADER_LIMIT, MEMBER_LIMIT, BLOCK = 1 << 20, 250_000, 1 << 20


class Tape(io.RawIOBase):
    """Bytes [start, start + size) of an open file as a seekable file object; windows can be nested.

    With a digest, every byte of the file up to the furthest one read is hashed once and in order, whatever
    the order of reading: the hash of an archive comes with the walk over it.
    """

    def __init__(self, fd, start, size, digest=None):
        self.fd, self.start, self.size, self.digest, self.at = fd, start, size, digest, 0
        self.hashed = [0]                                           # shared with the windows

    @classmethod
    @contextlib.contextmanager
    def open(cls, path, digest=None):
        fd = os.open(path, os.O_RDONLY)
        try:
            yield cls(fd, 0, os.fstat(fd).st_size, digest)
        finally:
            os.close(fd)

    def window(self, start, size):
        inner = Tape(self.fd, self.start + start, min(size, self.size - start), self.digest)
        inner.hashed = self.hashed
        return inner

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def read(self, n=-1):
        """Up to n bytes; more than a MiB at once is asked for only by a hostile header."""
        n = max(0, min(n if n >= 0 else self.size, self.size - self.at))
        if n > HEADER_LIMIT:
            raise ValueError(f"a header of {n} bytes")
        data = os.pread(self.fd, n, self.start + self.at)
        self.at += len(data)
        self.hash_to(self.start + self.at)
        return data

    def hash_to(self, end):
        while self.digest and self.hashed[0] < end:
            data = os.pread(self.fd, min(BLOCK, end - self.hashed[0]), self.hashed[0])
            if not data:
                raise ValueError("the file became shorter while it was read")
            self.digest.update(data)
            self.hashed[0] += len(data)


def walk(tape, name):
    """Yield (member name, offset within the tape, size) of a tar's regular files. UserError on anything
    untrusted."""
    try:
        with tarfile.open(fileobj=tape, mode="r:") as tar:
            for count, member in enumerate(tar):
                path = member.name.split("/")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise UserError(f"{name} is refused: member {member.name!r} is a link, device or sparse")
                if member.name.startswith("/") or ".." in path or not member.name.isprintable():
                    raise UserError(f"{name} is refused: member {member.name!r} points outside of it")
                if count >= MEMBER_LIMIT:
                    raise UserError(f"{name} is refused: more than {MEMBER_LIMIT} members")
                if member.offset_data + member.size > tape.size:
                    raise UserError(f"{name} is truncated within {member.name!r}")
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            tape.seek(-512, os.SEEK_END)
            if any(tape.read(512)):
                raise UserError(f"{name} is truncated: it has no end-of-archive mark")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as e:
        raise UserError(f"{name} is not a whole tar archive: {e}") from None


def read_at(path, offset, size):
    """size bytes of a file from offset (None: all of it). UserError when the file is shorter."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size if size is None else size, offset)
    if size is not None and len(data) != size:
        raise UserError(f"{path} became shorter while it was read")
    return data


def write_whole(path, data):
    """Write bytes so that `path` either keeps its old content or has all of the new, also after a power
    cut."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def alone(out):
    """Hold out/.lock; another process at work there is a UserError."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not inherited by the workers
        except OSError:
            raise UserError(f"another process is at work in {out}") from None
        yield


def sweep(folder):
    """Remove what killed writers left: NAME.PID.tmp."""
    for stale in folder.glob("*.[0-9]*.tmp"):
        stale.unlink(missing_ok=True)
