"""Lets pytest processes share the tests: with ONEFILE_QUEUE=FOLDER files go to whoever takes them first."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

QUEUE = os.environ.get("ONEFILE_QUEUE")
taken = {}                                      # file -> whether this process runs it


def mine(path):
    """True when no other process has taken the file; a new folder can be made only once."""
    if path not in taken:
        try:
            Path(QUEUE, path.stem).mkdir()
            taken[path] = True
        except FileExistsError:
            taken[path] = False
    return taken[path]


def pytest_collection_modifyitems(items):
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 7):
        for item in (i for i in items if "fsdp2" in i.name):
            item.add_marker(pytest.mark.skip(reason="FSDP2 on a CPU needs torch 2.7"))
    if QUEUE:                                   # the longest files first: both end at about the same time
        size = {path: path.stat().st_size for path in {item.path for item in items}}
        items.sort(key=lambda item: -size[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Anything but None means: this test has been dealt with."""
    return None if not QUEUE or mine(item.path) else True
