"""torchvision's Python code (transforms, models) beside a torch that its operators were not built for."""

import torch


def lenient():
    """From now on a fake of an operator that is not there is not registered; `import torchvision` works."""
    register = torch.library.register_fake

    def present_only(op, *args, **kwargs):
        space, _, name = str(op).partition("::")
        if space == "torchvision" and not hasattr(torch.ops.torchvision, name):
            return lambda function: function
        return register(op, *args, **kwargs)
    torch.library.register_fake = present_only
