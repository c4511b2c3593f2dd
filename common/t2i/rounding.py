"""8 bits with error feedback: GPTQ (arXiv:2210.17323), in the storage of memory.py and at its size.

    quantise(model, "int8")                               a model trained here, in place

Rounding to nearest keeps the weights close; what counts is that y = x W^T is close. With the inputs' Gram
matrix H = X^T X known, the columns of W are rounded in order, and what rounding one changes in the output is
made good, as far as possible, by the columns not yet rounded. H needs no data: the model makes its inputs.
"""
import contextlib

import torch
from torch import nn

from common.t2i import memory
from common.t2i.schedules import sigmas

DAMP = 0.01                   # added to H, times the mean of its diagonal; the paper's value
PICTURES, LEVELS = 64, 20     # what the model imagines to measure H


def feedback(weight, gram):
    """Weight [out, in], H [in, in] of its inputs -> (q, scale, base) as memory.pack returns them.

    With U^T U = H^-1, U upper triangular, the error e_j of column j moves column k > j by -e_j U_jk / U_jj;
    a group's scale is chosen when its first column is reached. On H = identity it is rounding to nearest."""
    w, (q, scale, base) = weight.float().clone(), memory.pack(weight, "int8")
    top, size = memory.row_top(w), w.shape[1] // scale.shape[1]
    damp = DAMP * gram.diagonal().mean().clamp(min=1e-12)
    H = gram.double() + damp.double() * torch.eye(len(gram), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True).float()
    for k, start in enumerate(range(0, w.shape[1], size)):
        end = start + size
        scale[:, k] = memory.scale_of(w[:, start:end], top)
        each = memory.unit(scale[:, k], base[:, 0])
        for j in range(start, end):
            q[:, j] = (w[:, j] / each).round().clamp(-127, 127)
            w[:, j] = (w[:, j] - q[:, j] * each) / U[j, j]   # from here on the column holds its error
            w[:, j + 1:end] -= torch.outer(w[:, j], U[j, j + 1:end])
        w[:, end:] -= w[:, start:end] @ U[start:end, end:]   # the later groups hear of it all at once
    return q, scale, base


@contextlib.contextmanager
def listening(module):
    """-> {path: sum of x x^T over all inputs x of that linear layer while inside}, float64 on the CPU."""
    grams, handles = {}, []
    for path, part in module.named_modules():
        if type(part) is nn.Linear:
            def hear(_, args, path=path):
                x = args[0].flatten(0, -2).float()
                grams[path] = grams.get(path, 0) + (x.T @ x).double().cpu()
            handles.append(part.register_forward_pre_hook(hear))
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def imagine(model, seed=0):
    """Run the model on inputs of its own: captions of random words of its vocabulary, every eighth empty;
    latents from pure noise down, at each level its last estimate with fresh noise."""
    g, device = torch.Generator().manual_seed(seed), next(model.net.parameters()).device
    known, flow = model.words.vocabulary, model.process.space == "flow"
    lengths = torch.randint(1, max(2, model.words.length), (PICTURES,), generator=g)
    lengths[::8] = 0
    texts = [" ".join(known[i] for i in torch.randint(len(known), (n,), generator=g)) for n in lengths]
    side = model.size // (model.vae.factor * model.net.patch) * model.net.patch
    x0, cond = torch.zeros(PICTURES, model.net.channels, side, side, device=device), model.encode(texts)
    levels = sigmas("flow", LEVELS) if flow else sigmas("trailing", LEVELS, abar=model.process.abar)
    for s in levels[:-1].tolist():
        noise = torch.randn(x0.shape, generator=g).to(device)
        x0 = model.process.predict(model.net, (1 - s if flow else 1) * x0 + s * noise, s, cond)


@torch.no_grad()
def quantise(model, kind):
    """Trained -> the same with 8-bit weights. int8: with error feedback, unless the model reads a frozen text
    encoder or a mask, which it cannot imagine; these, and fp8, round to nearest."""
    net, grams = model.model, {}
    if kind == "int8" and getattr(model.words, "vocabulary", ()) and not model.net.extra:
        with listening(net) as grams:
            imagine(model)
    weights = {path: net.get_submodule(path).weight for path in grams}
    memory.quantise(net, kind, skip=memory.KEEP)
    for path, gram in grams.items():
        part = net.get_submodule(path)
        if getattr(part, "scale", None) is not None:         # not the few kept in 16 bits or in full
            part.q, part.scale, part.base = (
                t.to(part.q.device) for t in feedback(weights[path].detach().cpu(), gram))
    return model
