"""FSDP2 state as plain tensors: what this rank holds of a sharded module, to average, to save and to load."""
import torch


def shard(module, blocks):
    """Split every block's parameters over the ranks, then what is left of the module; in place."""
    from torch.distributed.fsdp import fully_shard              # takes as long to import as torch itself
    for block in (*blocks, module):
        fully_shard(block)


def local(tensor):
    """This rank's part of a sharded tensor (a DTensor); a plain tensor is itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """The full tensor, gathered: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(module):
    return {name: whole(t) for name, t in module.state_dict().items()}


class Sharded:
    """Net, average and optimizer as one state per rank (run.save's `ranked`): resume needs the same world
    size."""

    def __init__(self, net, ema, optim):
        self.modules, self.optim = dict(net=net, ema=ema), optim

    def state_dict(self):
        tree = self.optim.state_dict()
        state = {i: {k: local(v) for k, v in s.items()} for i, s in tree["state"].items()}
        parts = {n: {k: local(t) for k, t in m.state_dict().items()} for n, m in self.modules.items()}
        return dict(parts, state=state, groups=tree["param_groups"])

    def load_state_dict(self, saved):
        with torch.no_grad():
            for name, module in self.modules.items():
                for key, tensor in module.state_dict().items():
                    local(tensor).copy_(saved[name][key])
        params = [p for g in self.optim.param_groups for p in g["params"]]
        state = {i: {k: _like(v, params[i]) for k, v in s.items()} for i, s in saved["state"].items()}
        self.optim.load_state_dict(dict(state=state, param_groups=saved["groups"]))


def _like(value, param):
    """A saved local tensor as a shard of param; scalars such as the step stay as they are."""
    sharded = hasattr(param, "to_local") and torch.is_tensor(value)
    if not sharded or value.shape != param.to_local().shape:
        return value
    return type(param).from_local(value, param.device_mesh, param.placements, run_check=False,
                                  shape=param.shape,
                              stride=param.stride())
