"""Cases in a forked worker that may crash, hang or eat memory without taking the drill along."""

import os
import re
import resource
import select
import signal
import traceback
from pathlib import Path

import numpy as np

from common.run import USER_ERRNO

GIB = 1 << 30
LIMIT_S = 180  # without a word for so long, a worker hangs


def guarded(work, start, stop, limit=GIB):
    """Yield (i, outcome) of work(i) for start <= i < stop, each outcome a line of text.

    A worker has `limit` bytes of address space beyond what it starts with (0: no limit).  One that dies or
    hangs costs the case it was at, and the next worker goes on behind it.
    """
    while start < stop:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            _work(work, start, stop, limit, write)
        os.close(write)
        buffer, hung = b"", False
        while True:
            if not select.select([read], [], [], LIMIT_S)[0]:
                hung = True
                os.kill(pid, signal.SIGKILL)
                break
            data = os.read(read, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                yield start, line.decode(errors="replace")
                start += 1
        os.close(read)
        status = os.waitpid(pid, 0)[1]
        if start < stop:
            yield start, "hang" if hung else f"crash: status {os.waitstatus_to_exitcode(status)}"
            start += 1


def _work(work, start, stop, limit, write):
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)
        if limit:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            room = pages * resource.getpagesize() + limit
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
        for i in range(start, stop):
            os.write(write, (" ".join(work(i).split())[:300] + "\n").encode(errors="replace"))
    finally:
        os._exit(0)


def judged(call, says, wrong=lambda value: None):
    """call() as an outcome: "read", "refused: ...", "WRONG: ...", "MEMORY: ..." or "TRACEBACK: ..."."""
    try:
        value = call()
    except says as error:
        return f"refused: {error}"
    except MemoryError as error:
        return f"MEMORY: {where(error)}"
    except OSError as error:                    # run.main prints some as one line: a file that is not there
        known = error.errno in USER_ERRNO
        return f"refused: {error}" if known else f"TRACEBACK: {where(error)}: {error}"
    except Exception as error:
        if "allocate memory" in str(error):
            return f"MEMORY: {where(error)}"
        return f"TRACEBACK: {type(error).__name__} {where(error)}: {error}"
    found = wrong(value)
    return f"WRONG: {found}" if found else "read"


def where(error):
    """file:line of the last frame of ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    ours = [f for f in frames if re.search(r"/common/|/eval/|/[a-z_0-9]+\.py$", f.filename)] or frames
    return f"at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "at ?"


def bad(outcome):
    return not outcome.startswith(("read", "refused", "recovered", "resumed"))


# --- damage ------------------------------------------------------------------------

NUMBERS = (
    b"-1",
    b"0",
    b"1e999",
    b"99999999999999999999",
    b"4294967296",
    b"0.5",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"[" * 2000,
    b"Infinity",
    b"-99999999999999999999999999",
)


def mutate(data, rng):
    """A few random changes to bytes, of the kinds that break readers."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        n, kind = len(data), rng.integers(10)
        at = int(rng.integers(max(1, n)))
        span = int(rng.integers(1, 33))
        if kind <= 1 and n:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2 and n:
            data[at] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 3:
            width, order = int(rng.choice([2, 4, 8])), str(rng.choice(["little", "big"]))
            top = 256**width
            value = (top - 1, top // 2, top // 2 - 1, 0, 1)[int(rng.integers(5))]
            data[at : at + width] = value.to_bytes(width, order)
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            del data[at : at + span]
        elif kind == 6:
            data[at:at] = data[at : at + span]
        elif kind == 7:
            data[at:at] = rng.bytes(span)
        else:  # text: another value in the place of a number or a word
            found = list(re.finditer(rb"-?\d+(\.\d+)?|\"[^\"]{0,40}\"|null", bytes(data[at : at + 400])))
            if found:
                one = found[int(rng.integers(len(found)))]
                data[at + one.start() : at + one.end()] = NUMBERS[int(rng.integers(len(NUMBERS)))]
    return bytes(data)


def harm(path, kind, rng):
    """flip one bit of a file, cut it short, or delete it; an empty file can only be deleted."""
    data = bytearray(Path(path).read_bytes())
    if kind == "delete" or not data:
        Path(path).unlink()
    elif kind == "flip":
        bit = int(rng.integers(len(data) * 8))
        data[bit // 8] ^= 1 << bit % 8
        Path(path).write_bytes(data)
    else:
        os.truncate(path, int(rng.integers(len(data))))


def rng_of(*key):
    return np.random.default_rng([int.from_bytes(str(k).encode()[-8:], "little") for k in key])
