"""The parity tests use recipes of tests/test_*.py, and torchvision without its compiled operators.

torchvision's wheel may have been built for another torch than the one here. Only its Python code (transforms,
model definitions) is compared with, so fakes of operators that are not there are not registered.
"""

import pathlib
import sys

import torch

sys.path.append(str(pathlib.Path(__file__).parents[1]))

_register_fake = torch.library.register_fake


def _register_fake_of_present_operators(op, *args, **kwargs):
    space, _, name = str(op).partition("::")
    if space == "torchvision" and not hasattr(torch.ops.torchvision, name):
        return lambda function: function
    return _register_fake(op, *args, **kwargs)


torch.library.register_fake = _register_fake_of_present_operators
