"""A script in a forked child: the command itself, without the seconds that importing torch takes."""

import atexit
import os
import runpy
import sys
import traceback

import torch


def become(path, words, out, err, ranks=1, rank=0, port=0):
    """This forked process is `python PATH WORDS...` and ends; it never returns.

    out, err: file descriptors; ranks > 1: it is `rank` of them, as torchrun starts it, on `port`.
    """
    status = 1
    try:
        atexit._clear()                 # the parent's: a child that ran them would empty its folders
        os.dup2(out, 1), os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [str(path), *map(str, words)]
        torch.set_num_threads(1)        # OpenMP's threads did not come along
        runpy.run_path(str(path), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
