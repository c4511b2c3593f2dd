"""The parity tests use recipes of tests/test_*.py, and torchvision without its compiled operators."""

import pathlib
import sys

sys.path += [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from eval import _torchvision  # noqa: E402

_torchvision.lenient()
