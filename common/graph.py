"""What a forward pass leaves in memory for its backward."""

import torch
from torch.autograd.graph import saved_tensors_hooks


def saved(call, *nets):
    """Bytes that autograd keeps between forward and backward of call(), parameters of nets left out."""
    known = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
    total, held = 0, []

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            held.append(storage)            # alive, so that its address stays its own
            total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        out = call()
    del out
    return total
