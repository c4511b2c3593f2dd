"""Commands and ranks of a test in forked processes: they start in milliseconds, with torch imported."""

import atexit
import os
import pathlib
import socket
import tempfile
import time
import types

import torch

from eval._forked import become

ROOT = pathlib.Path(__file__).parents[1]


def two_ranks(function, *args):
    """function(rank, *args) in two processes at once; raises what they raise."""
    torch.multiprocessing.start_processes(_rank, (function, args), nprocs=2, start_method="fork")


def _rank(rank, function, args):
    atexit._clear()                     # what the parent registered, such as emptying folders, is its own
    function(rank, *args)


def command(name, *words, check=None, ranks=1, cwd=ROOT, timeout=300):
    """`python NAME WORDS...` with the checkout's script -> returncode, stdout, stderr.

    check: the exit status to assert; ranks: so many of it, as torchrun starts them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pids = []
        for rank in range(ranks):
            pids.append(os.fork())
            if not pids[-1]:
                os.chdir(cwd)
                become(ROOT / name, words, out.fileno(), err.fileno(), ranks, rank, port)
        status = [_wait(pid, time.time() + timeout) for pid in pids]
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
    done = types.SimpleNamespace(returncode=max(status, key=abs), stdout=texts[0], stderr=texts[1])
    if check is not None:
        assert done.returncode == check, done.stderr[-2000:]
    return done


def _wait(pid, until):
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} still ran")
