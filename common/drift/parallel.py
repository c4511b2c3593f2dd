"""A network over several ranks: whole on each (ddp) or cut over them (fsdp2), and its checkpoint.

Under fsdp2 a checkpoint holds each rank's own pieces, so nothing is gathered to write or read one, and a run
continues on as many ranks as wrote it.
"""

import torch
import torch.distributed as dist
from torch import nn

WAYS = ("ddp", "fsdp2")


def wrap(net, kinds, ddp, how, emas=()):
    """net as the training loop calls it. Under fsdp2 net and its averages are cut in place, modules of the
    given kinds gathered one at a time; every rank must hold the same values."""
    if ddp.world == 1:
        return net
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    for whole in (net, *emas):
        cut(whole, [m for m in whole.modules() if isinstance(m, kinds)], ddp)
    return net


def cut(net, blocks, ddp):
    """Cut the parameters of net over all ranks, in place; blocks are gathered apart from the rest."""
    from torch.distributed.fsdp import fully_shard              # here: it imports half of torch.distributed
    mesh = dist.device_mesh.init_device_mesh(ddp.device.type, (ddp.world,))
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh)
    return net


def full(tensor):
    """A tensor cut over ranks -> the whole of it, on every rank; every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(net):
    return {name: full(value) for name, value in net.state_dict().items()}


class Local:
    """This rank's pieces of a cut network or of its optimizer, as something a checkpoint saves and fills."""

    def __init__(self, owner):
        self.owner = owner

    def tensors(self):
        """name -> tensor; an AdamW that has not stepped yet gets its zero moments first."""
        if isinstance(self.owner, nn.Module):
            return dict(self.owner.state_dict())
        params = [p for group in self.owner.param_groups for p in group["params"]]
        for p in params:
            if not self.owner.state[p]:
                self.owner.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p),
                                           exp_avg_sq=torch.zeros_like(p))
        return {f"{i}.{name}": v for i, p in enumerate(params) for name, v in self.owner.state[p].items()}

    @staticmethod
    def piece(tensor):
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def state_dict(self):
        return {name: self.piece(tensor.detach()) for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        own = self.tensors()
        if own.keys() != state.keys():
            raise ValueError(f"{next(iter(own.keys() ^ state.keys()))} is on one side only")
        for name, tensor in own.items():
            if self.piece(tensor).shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)} in the checkpoint, "
                                 f"{tuple(self.piece(tensor).shape)} on this rank")
            self.piece(tensor).copy_(state[name])


def states(state, ranked, ddp, how):
    """(state, ranked) for run.load and run.save: pieces go with the rank that holds them."""
    if ddp.world == 1 or how == "ddp":
        return state, ranked
    return {}, dict(ranked, **{name: Local(owner) for name, owner in state.items()})
