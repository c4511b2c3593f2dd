"""Low-rank adapters for linear maps: LoRA, DoRA, rank-stabilised scaling, PiSSA start; attach, merge, save.

With A [r, in], B [out, r], scaling s = alpha / r (alpha / sqrt(r) when rank-stabilised):

    LoRA   y = W x + b + s B A drop(x)                                             arXiv 2106.09685
    DoRA   V = W + s B A;  y = (m / |V|_row) V x + b, the row norm a constant for the gradient   2402.09353
    PiSSA  A, B start as the r leading singular directions of W, and W keeps the rest            2404.02948

An adapted layer is still an nn.Linear with the same parameter names, so checkpoints of the plain model keep
their keys; merge() turns it back.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LowRank(nn.Linear):
    """An nn.Linear, its weight frozen, plus trained A, B (and row magnitudes m for DoRA). See the equations
    above."""

    def __init__(self, linear, kind, rank, alpha, rslora=False, init="default", dropout=0.0,
                 svd_iterations=None):
        out, width = linear.weight.shape
        super().__init__(width, out, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        for p in (self.weight, self.bias):
            if p is not None:
                p.requires_grad_(False)
        self.kind, self.rank, self.dropout = kind, rank, dropout
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        new = dict(device=self.weight.device, dtype=torch.float32)
        self.A = nn.Parameter(torch.empty(rank, width, **new))
        self.B = nn.Parameter(torch.zeros(out, rank, **new))
        self.pissa = init == "pissa"
        if self.pissa:
            self._principal(svd_iterations)
        elif init == "gaussian":
            nn.init.normal_(self.A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if kind == "dora":
            self.m = nn.Parameter(self.full().norm(dim=1))

    @torch.no_grad()
    def _principal(self, iterations):
        """sqrt(s) B and sqrt(s) A share the leading singular values; the frozen weight keeps the residual."""
        w = self.weight.float()
        if iterations is None:
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(w, self.rank, niter=iterations)
            vt = v.T
        root = (s[:self.rank] / self.scaling).sqrt()
        self.A.copy_(root[:, None] * vt[:self.rank])
        self.B.copy_(u[:, :self.rank] * root)
        for name, start in (("A0", self.A), ("B0", self.B)):
            self.register_buffer(name, start.detach().clone(), persistent=False)
        # a new tensor: the caller may still hold the original weight
        self.weight = nn.Parameter((w - self.scaling * self.B @ self.A).to(self.weight.dtype),
                                   requires_grad=False)

    @torch.no_grad()
    def full(self):
        """V = W + s B A, float32."""
        return self.weight.float() + self.scaling * self.B.float() @ self.A.float()

    def gain(self):
        """DoRA's m / |V|_row, float32; the norm is detached (section 4.3 of the paper)."""
        return self.m.float() / self.full().norm(dim=1)

    def forward(self, x):
        base = F.linear(x, self.weight)
        dropped = F.dropout(x, self.dropout, self.training)
        low = self.scaling * F.linear(F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype))
        if self.kind == "dora":
            gain = self.gain().to(x.dtype)
            same = not (self.training and self.dropout)
            base, low = base + (gain - 1) * (base if same else F.linear(dropped, self.weight)), gain * low
        return base + low if self.bias is None else base + low + self.bias

    @torch.no_grad()
    def merged(self):
        """A plain nn.Linear that computes the same without dropout."""
        w = self.full()
        if self.kind == "dora":
            w = self.gain()[:, None] * w
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(w.to(self.weight.dtype)), self.bias
        for p in plain.parameters():
            p.requires_grad_(True)
        return plain


def linears(module, targets, blocks=None):
    """[(parent, name, path, linear)] of every linear called t or t_proj for t in targets, inside the blocks
    given.

    blocks: indices N of paths `layer.N.`; None for all.  Raises ValueError on a target that names no linear.
    """
    found, seen = [], set()
    for path, child in module.named_modules():
        parent_path, _, name = path.rpartition(".")
        target = name.removesuffix("_proj")
        if isinstance(child, nn.Linear) and target in targets:
            seen.add(target)
            parts = path.split(".")
            index = int(parts[parts.index("layer") + 1]) if "layer" in parts else None
            if blocks is None or index in blocks:
                found.append((module.get_submodule(parent_path), name, path, child))
    if missing := [t for t in targets if t not in seen]:
        raise ValueError(f"no linear layer called {missing[0]} or {missing[0]}_proj; "
                         "containers cannot be adapted")
    return found


def adapt(module, kind="lora", rank=16, alpha=32.0, rslora=False, init="default", targets=("q", "k", "v"),
          dropout=0.0, blocks=None, svd_iterations=None):
    """Freeze module and put adapters on its target linears, in place -> module.

    kind "lora" | "dora"; init "default" | "gaussian" | "pissa".  Without dropout the outputs are those before
    (2e-7 for PiSSA, which moves part of W into B A).  Use no dropout with DoRA or PiSSA.
    """
    if kind not in ("lora", "dora") or init not in ("default", "gaussian", "pissa"):
        raise ValueError(f"unknown adapter {kind!r} with init {init!r}")
    module.requires_grad_(False)
    for parent, name, _, linear in linears(module, targets, blocks):
        if rank > min(linear.weight.shape):
            raise ValueError(f"rank {rank} is above the smaller side of {tuple(linear.weight.shape)}")
        replace(parent, name, LowRank(linear, kind, rank, alpha, rslora, init, dropout, svd_iterations))
    return module


def replace(parent, name, child):
    """Put child where parent's submodule `name` was."""
    child.train(parent.training)
    if isinstance(parent, nn.ModuleDict):
        parent[name] = child
    else:
        setattr(parent, name, child)


def adapted(module):
    """{path: LowRank} of a module."""
    return {path: child for path, child in module.named_modules() if isinstance(child, LowRank)}


def merge(module):
    """Fold every adapter into its weight, in place -> module, plain and trainable again."""
    for path, layer in adapted(module).items():
        parent, _, name = path.rpartition(".")
        replace(module.get_submodule(parent), name, layer.merged())
    return module.requires_grad_(True)


def adapter_tensors(module):
    """(tensors, meta) to save: `path.A`, `path.B`, DoRA's `path.m`, PiSSA's start `path.A0`, `path.B0`."""
    layers = adapted(module)
    names = ("A", "B", "m", "A0", "B0")
    tensors = {f"{path}.{n}": getattr(x, n).detach().cpu() for path, x in layers.items()
               for n in names if hasattr(x, n)}
    first = next(iter(layers.values()))
    meta = dict(r=first.rank, scaling=first.scaling, kind=first.kind,
                init="pissa" if first.pissa else "default",
                layers=sorted(layers))
    return tensors, meta


@torch.no_grad()
def apply_adapters(module, tensors, meta):
    """Fold saved adapters into a plain module that holds the ORIGINAL weights, in place -> module.

    PiSSA adapters act as W + s (B A - B0 A0): an ordinary LoRA of rank 2 r.
    """
    for path in meta["layers"]:
        weight = module.get_submodule(path).weight
        part = {n: tensors[f"{path}.{n}"].to(weight.device) for n in ("A", "B", "m", "A0", "B0")
                if f"{path}.{n}" in tensors}
        w = weight.float() + meta["scaling"] * part["B"] @ part["A"]
        if "A0" in part:
            w -= meta["scaling"] * part["B0"] @ part["A0"]
        if "m" in part:
            w *= (part["m"] / w.norm(dim=1))[:, None]
        weight.copy_(w)
    return module


def trainable_report(module):
    """dict(trainable, total, share, adapters): parameter counts."""
    total = sum(p.numel() for p in module.parameters())
    on = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return dict(trainable=on, total=total, share=on / max(total, 1), adapters=len(adapted(module)))
