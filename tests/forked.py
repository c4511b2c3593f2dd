"""Commands and ranks of a test in forked processes: they start in milliseconds, with torch imported."""

import atexit
import os
import pathlib
import runpy
import socket
import sys
import tempfile
import time
import traceback
import types

import torch

ROOT = pathlib.Path(__file__).parents[1]


def two_ranks(function, *args):
    """function(rank, *args) in two processes at once; raises what they raise."""
    torch.multiprocessing.start_processes(_rank, (function, args), nprocs=2, start_method="fork")


def command(name, *words, check=None, ranks=0, cwd=ROOT, timeout=300):
    """`python NAME WORDS...` in the checkout -> returncode, stdout, stderr; ranks: as torchrun starts them.

    One thread each.  check: the exit status to assert; cwd: where it stands, the script is the checkout's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pids = []
        for rank in range(ranks or 1):
            pids.append(os.fork())
            if not pids[-1]:
                world = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1",
                             MASTER_PORT=port) if ranks else {}
                _become([name, *map(str, words)], {k: str(v) for k, v in world.items()}, cwd, out, err)
        status = [_wait(pid, time.time() + timeout) for pid in pids]
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
    done = types.SimpleNamespace(returncode=max(status, key=abs), stdout=texts[0], stderr=texts[1])
    if check is not None:
        assert done.returncode == check, done.stderr[-2000:]
    return done


def _rank(rank, function, args):
    atexit._clear()                     # what the parent registered, such as emptying folders, is its own
    function(rank, *args)


def _become(argv, world, cwd, out, err):
    """This forked process runs the script as __main__ and ends; it never returns into the tests."""
    status = 1
    try:
        atexit._clear()
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.chdir(cwd)
        os.environ.update(world)
        sys.argv = [str(ROOT / argv[0]), *argv[1:]]
        torch.set_num_threads(1)        # OpenMP's threads did not come along
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _wait(pid, until):
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} still ran")
