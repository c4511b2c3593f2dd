"""Memory for big models: weights in 8 bits, weights that wait in CPU memory, a ledger of what is where.

    quantise(module, "int8")                              linears and embeddings in 8 bits, in place
    with placed(net, device, "block", ledger, net.blocks): ...     none, model or block offload, one call
"""
import contextlib
import re
import resource
import sys

import torch
import torch.nn.functional as F
from torch import nn

# --- small storage -------------------------------------------------------

GROUP = 16                    # int8: weights that share a scale of 8 bits; 8.5 bits a weight
STEPS = 16                    # these scales count in sixteenths of an octave below the row's largest
STORAGE = ("int8", "fp8")
LEAST = 4096                  # smaller layers stay as they are
KEEP = r"final_layer\.linear"  # so does the last one: its error is the output's
# the last block's way out, kept in 16 bits: no later layer averages its error
FINE = r"(^|\.)(x_block\.)?(attn\.proj|mlp\.fc[12]|linear[12])$"


class QLinear(nn.Module):
    """A linear layer stored in 8 bits and computed in the dtype of its input: y = x (q scale)^T + bias.

    int8: symmetric, one scale per GROUP of inputs, about 0.45 % error on Gaussian weights. fp8: e4m3 with a
    scale per row, about 2.6 %; without the scale small weights would underflow to zero. half: fp16, for the
    few layers that matter most. QLinear.of(linear, kind)."""

    def __init__(self, q, scale, base, bias):
        super().__init__()
        self.out_features, self.in_features = q.shape
        for name, tensor in dict(q=q, scale=scale, base=base, bias=bias).items():
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, linear, kind):
        return cls(*pack(linear.weight.detach(), kind), None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self):
        """The weight it stands for, float32."""
        return self.dequantise(torch.float32)

    def dequantise(self, dtype):
        return unpack(self.q, self.scale, self.base, dtype)

    def forward(self, x):
        return F.linear(x, self.dequantise(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class QEmbedding(nn.Module):
    """A table stored like a QLinear; a lookup unpacks only the rows it needs, to the dtype the table had."""

    def __init__(self, q, scale, base, dtype=torch.float32):
        super().__init__()
        self.dtype, self.num_embeddings = dtype, len(q)
        for name, tensor in dict(q=q, scale=scale, base=base).items():
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, table, kind):
        return cls(*pack(table.weight.detach(), kind), table.weight.dtype)

    def forward(self, ids):
        rows = (t if t is None else rows_of(t, ids.flatten()) for t in (self.q, self.scale, self.base))
        return unpack(*rows, self.dtype).view(*ids.shape, -1)


def rows_of(table, ids):
    """table[ids]; 8-bit numbers as bytes, because older torch cannot index float8 on a CPU."""
    return table.view(torch.uint8)[ids].view(table.dtype) if table.itemsize == 1 else table[ids]


def pack(weight, kind):
    """Weight [out, in] -> (q [out, in], scale, base): the weight is q * base * 2^(-scale / STEPS), the scale
    one a group (int8), or q * base (fp8), or q (half)."""
    w = weight.float()
    if kind == "half":
        return w.half(), None, None
    top = row_top(w)
    if kind == "fp8":
        return (w / (top / 448)).to(torch.float8_e4m3fn), None, top / 448
    groups = w.unflatten(1, (-1, GROUP if w.shape[1] % GROUP == 0 else w.shape[1]))
    # both roundings go up, 2.6 % in the mean, so that no weight is clipped
    base = (top / 127 * (1 + 2**-8)).bfloat16()
    scale = scale_of(groups, top)
    each = unit(scale, base)
    return (groups / each[..., None]).round().clamp(-127, 127).to(torch.int8).flatten(1), scale, base


def row_top(w):
    """Largest size of a weight in every row [out, 1]."""
    return w.abs().amax(1, keepdim=True).clamp(min=1e-12)


def scale_of(groups, top):
    """Groups of weights [out, n, G] or [out, G] -> their scales [out, n] or [out]: steps below the row's
    largest."""
    top = top if groups.ndim == 3 else top[:, 0]
    return (-STEPS * torch.log2(groups.abs().amax(-1) / top)).clamp(0, 255).floor().to(torch.uint8)


def unit(scale, base):
    """What one step of q is worth. From a table: exp2 may differ in its last bit with the place of a number
    in a tensor, and a row looked up must equal that row of the whole."""
    return base * torch.exp2(torch.arange(256, device=scale.device) / -STEPS)[scale.long()]


def unpack(q, scale, base, dtype):
    if base is None:
        return q.to(dtype)
    each = base if scale is None else unit(scale, base)
    return (q.to(dtype).unflatten(1, (each.shape[1], -1)) * each.to(dtype)[..., None]).flatten(1)


def fine_layers(module):
    """Names of the layers of a transformer that 8 bits would hurt most; none for text encoders."""
    for path, part in module.named_modules():
        if hasattr(part, "final_layer"):
            last = {id(m) for m in part.blocks[-1].modules()}
            return {n for n, m in module.named_modules() if id(m) in last and re.search(FINE, n)
                    and "context_block" not in n}
    return set()


def small(part, path, kind, skip="$^", least=LEAST, fine=()):
    """The 8-bit stand-in for a loaded part (16 bits if it is in `fine`), or None where it stays as it is."""
    known = {nn.Linear: QLinear, nn.Embedding: QEmbedding}.get(type(part))
    if known is None or part.weight.numel() < least or re.search(skip, path):
        return None
    return known.of(part, "half" if path in fine else kind)


def replace(module, path, new):
    """Put `new` where module has the submodule `path`."""
    parent, _, leaf = path.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = new


def quantise(module, kind, skip="$^", least=LEAST):
    """Replace linears and embeddings of a loaded module in place, and keep position tables in 16 bits
    -> module. skip: regular expression over names that stay."""
    fine = fine_layers(module) if kind == "int8" else ()
    for path, part in list(module.named_modules()):
        new = small(part, path, kind, skip, least, fine)
        if new is not None:
            replace(module, path, new)
    if isinstance(getattr(module, "pos_embed", None), torch.Tensor):
        module.pos_embed = module.pos_embed.half()
    return module


def size_bytes(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def errors(full, small, x0, texts, seed=0, levels=(0.9, 0.7, 0.5, 0.3, 0.1)):
    """Relative error of a small copy of a model trained here, on clean latents x0 and their captions
    -> {sigma: (of the velocity, of the denoised latents)}."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    conds, found = [m.encode(texts) for m in (full, small)], {}
    for s in levels:
        x, t = (1 - s) * x0 + s * noise, torch.full((len(x0),), 1000 * s)
        a, b = (m.net(x, t, **cond) for m, cond in zip((full, small), conds))
        wrong = (b - a).norm()
        found[s] = float(wrong / a.norm()), float(s * wrong / (x - s * a).norm())
    return found


# --- offload -------------------------------------------------------------


class Residency:
    """Bytes of weights on the compute device: now and at most."""

    def __init__(self):
        self.now = self.peak = 0

    def add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


def _tensors(module):
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield store, name, tensor


def _move_in(module, device, ledger):
    """Copy every tensor to the device -> the masters, which stay in CPU memory and are put back by
    _move_out."""
    masters = [(store, name, tensor) for store, name, tensor in _tensors(module)]
    for store, name, tensor in masters:
        copy = tensor.detach().to(device, copy=True, non_blocking=True)
        store[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        ledger.add(copy.numel() * copy.element_size())
    return masters


def _move_out(masters, ledger):
    for store, name, tensor in masters:
        ledger.add(-tensor.numel() * tensor.element_size())
        store[name] = tensor


@contextlib.contextmanager
def placed(module, device, offload, ledger, blocks=None):
    """The module ready to run on the device, by policy: none (it is there), model (moved in whole), block
    (streamed)."""
    with contextlib.ExitStack() as stack:
        if offload == "block" and blocks is not None:
            stack.enter_context(streamed(module, blocks, device, ledger))
        elif offload != "none":
            stack.enter_context(on(module, device, ledger))
        yield module


@contextlib.contextmanager
def on(module, device, ledger):
    """Whole-model offload: the module lives on the device inside the block, in CPU memory outside it; never
    copied back."""
    masters = _move_in(module, device, ledger)
    try:
        yield module
    finally:
        _move_out(masters, ledger)


@contextlib.contextmanager
def streamed(module, blocks, device, ledger):
    """Sequential offload: each of `blocks` is on the device only while it runs; the rest of the module stays
    there."""
    inside = {id(t) for b in blocks for _, _, t in _tensors(b)}
    rest = [(s, n, t) for s, n, t in _tensors(module) if id(t) not in inside]
    for store, name, tensor in rest:
        copy = tensor.detach().to(device, copy=True)
        store[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        ledger.add(copy.numel() * copy.element_size())
    held, handles = {}, []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(
            lambda b, _: held.__setitem__(id(b), _move_in(b, device, ledger))))
        handles.append(block.register_forward_hook(lambda b, _, out: _move_out(held.pop(id(b)), ledger)))
    try:
        yield module
    finally:
        for handle in handles:
            handle.remove()
        for masters in held.values():                        # a block that raised is still on the device
            _move_out(masters, ledger)
        _move_out(rest, ledger)


def peak_gb(device):
    """Most memory held so far: CUDA allocations, or the resident set of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
