"""hope_lm: the mathematics against token-by-token float64 loops, then the pipeline around it."""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import command

import hope_lm as h
from common import graph, run
from common.hope import corpus, cost, lesson, optim, passes, sidecar, text
from common.hope.blocks import delta_net

torch.set_num_threads(1)
TINY = dict(width=16, heads=2, depth=2, vocab=31, chunk=8, chunk_self=4, window=6, periods=(4, 8, 16, 32))


def tiny(**kw):
    return h.Config(**{**TINY, **kw})


def net_of(seed=0, dtype=torch.float64, **kw):
    torch.manual_seed(seed)
    return h.LM(tiny(**kw)).to(dtype)


def tokens(n, t, seed=1, vocab=31):
    return torch.randint(0, vocab, (n, t), generator=torch.Generator().manual_seed(seed))


# --- references: one token after the other, straight from the equations -------------------------------------


def silu_prime(z):
    s = torch.sigmoid(z)
    return s + z * s * (1 - s)


def memory_loop(W1, W2, k, v, eta, keep, mom, q, rule, residual, own, C, written=False):
    """One head, one memory, written from T 9-15 / NL 83-97: gradients at the weights of the last chunk
    boundary.  written: decay and erasure leave the first weights alone."""
    S1, S2, zero = torch.zeros_like(W1), torch.zeros_like(W2), torch.zeros_like
    first = (W1, W2) if written else (zero(W1), zero(W2))
    outs, base = [], (W1, W2)
    M = lambda Ws, z: Ws[1] @ F.silu(Ws[0] @ z) + (z if residual else 0)   # noqa: E731
    for t in range(len(k)):
        if t % C == 0:
            base = (W1, W2)
        if rule.before:
            outs.append(M((W1, W2), q[t]))
        z = base[0] @ k[t]
        a = F.silu(z)
        e = M(base, k[t]) - (M(base, v[t]) if own else v[t])
        new = []
        for W0, W, S, x, g in ((first[0], W1, S1, k[t], (base[1].T @ e) * silu_prime(z)),
                               (first[1], W2, S2, a, e)):
            if rule.clip:
                g = g * min(1.0, float(rule.clip / (g.norm() * x.norm()).clamp(min=1e-12)))
            n = x @ x
            step = {"proximal": eta[t] / (1 + eta[t] * n), "unit": eta[t] / n, "none": eta[t]}[rule.normal]
            S = (mom[t] * S if rule.momentum else 0) - step * torch.outer(g, x)
            U = W - W0
            W = W0 + keep[t] * U - (step * torch.outer(U @ x, x) if rule.delta else 0) + S
            new += [W, S]
        W1, S1, W2, S2 = new
        if not rule.before:
            outs.append(M((W1, W2), q[t]))
    return W1, W2, torch.stack(outs)


def random_rows(T, K, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)   # noqa: E731
    return (F.normalize(r(T, K), dim=-1), F.normalize(r(T, K), dim=-1), r(T, K),
            torch.rand(T, generator=g, dtype=torch.float64),
            1 - 0.1 * torch.rand(T, generator=g, dtype=torch.float64),
            torch.rand(T, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("C", [1, 7, 16, 64])
@pytest.mark.parametrize("rule,own,residual,forget", [
    (h.Rule(delta=False, momentum=True), False, False, "all"),                          # Titans
    (h.Rule(delta=False, momentum=False, normal="none", clip=0.0), False, False, "all"),
    (h.Rule(delta=True, momentum=True, before=True), True, True, "all"),                # HOPE
    (h.Rule(delta=True, momentum=True, before=True), True, True, "written"),
    (h.Rule(delta=False, momentum=True), False, False, "written"),
    (h.Rule(delta=True, momentum=False, before=True), True, True, "all"),
    (h.Rule(delta=True, momentum=True, normal="unit"), True, True, "all")])
def test_chunks_equal_the_token_loop(C, rule, own, residual, forget):
    T, K = 37, 5                                    # 37: a ragged tail for every C but 1
    q, k, v, eta, keep, mom = random_rows(T, K)
    cfg = tiny(width=2 * K, heads=2, forget=forget)
    torch.manual_seed(3)
    memory = h.Memory(cfg, residual=residual).double()
    family = h.Family(cfg, C, rule, memory, own_target=own)
    with torch.no_grad():
        memory.layers[1].mul_(20)
    row = lambda x: x.expand(1, 2, 1, *x.shape)     # noqa: E731
    out, state = family.scan(family.start(1), row(q), row(k), row(v), row(0.5 * eta), row(keep.log()),
                             row(mom.log()) if rule.momentum else None)
    state = family.flush(state)
    for head in (0, 1):
        W1, W2, want = memory_loop(memory.layers[0][head, 0], memory.layers[1][head, 0], k, v, 0.5 * eta,
                                   keep, mom, q, rule, residual, own, C, forget == "written")
        assert (out[0, head, 0] - want).abs().max() < 1e-10
        for W, end in zip(family.weights(state[0]), (W1, W2)):
            assert (W[0, head, 0] - end).abs().max() < 1e-10


@pytest.mark.parametrize("rule,depth", [
    (h.Rule(before=True), 2), (h.Rule(before=True), 1), (h.Rule(momentum=False), 3),
    (h.Rule(delta=False, threshold=0.35), 2), (h.Rule(kind="delta_momentum", boundary=True), 2),
    (h.Rule(kind="dmgd", boundary=True, momentum=True), 2)])
def test_a_family_learns_as_its_memories_would_alone(rule, depth):
    """Maps, store and gates: weights after a chunk, what q and z are told, and every gradient."""
    cfg = tiny(memory_depth=depth)
    q, k, v, eta, keep, mom = (x.expand(1, 2, 1, *x.shape) for x in random_rows(19, 8))
    rows = k, v, eta, keep.log(), mom.log() if rule.momentum else None
    maps, store, gates = (h.Memory(cfg, *kind).double() for kind in ((2,), (1,), (2, True, False)))
    with torch.no_grad():
        for m in (maps, store, gates):
            m.layers[-1].mul_(20)
    family = h.Family(cfg, 8, rule, maps, store, gates)
    out, state = family.scan(family.start(1), q, *rows)
    told = family.recall(state, {m: v for m in (maps, store, gates)})
    layers = [W for m in (maps, store, gates) for W in m.layers]
    got = torch.autograd.grad(out.square().sum() + sum(t.square().sum() for t in told.values()), layers)
    total, wide = 0, 0
    for m in (maps, store, gates):
        one = h.Family(cfg, 8, rule, m)
        asked = q if m is store else None
        answer, after = one.scan(one.start(1), asked, *rows)
        said = one.recall(after, {m: v})[m]
        assert (said - told[m]).abs().max() < 1e-12
        width = after[0][0].shape[3]
        assert (after[0][0] - state[0][0][..., wide:wide + width, :]).abs().max() < 1e-12
        wide, total = wide + width, total + said.square().sum()
        if asked is not None:
            assert (answer - out).abs().max() < 1e-12
            total = total + answer.square().sum()
    for a, b in zip(got, torch.autograd.grad(total, layers)):
        assert (a - b).abs().max() < 1e-12 * b.abs().max().clamp(min=1)     # NL 49 grows to 1e11 here


@pytest.mark.parametrize("C", [1, 7, 16, 40])
def test_delta_net_equals_the_token_loop_for_every_chunk(C):
    q, k, v, beta, keep, _ = random_rows(33, 6)
    S, want = torch.zeros(6, 6, dtype=torch.float64), []
    for t in range(33):
        S = keep[t] * S
        S = S + beta[t] * torch.outer(v[t] - S @ k[t], k[t])
        want.append(S @ q[t])
    o, end = delta_net(q, k, v, beta, keep.log(), None, C)
    assert (o - torch.stack(want)).abs().max() < 1e-10 and (end - S).abs().max() < 1e-10


def test_linear_memories_reduce_to_delta_rules():
    """Zero start, no momentum: LMM with C = 1 and HOPE with C = T are S <- keep S - theta (S
    k) k^T + theta v k^T."""
    T, K = 21, 5
    q, k, v, eta, keep, _ = random_rows(T, K)
    S, want = torch.zeros(K, K, dtype=torch.float64), []
    for t in range(T):
        S = keep[t] * S - eta[t] * torch.outer(S @ k[t], k[t]) + eta[t] * torch.outer(v[t], k[t])
        want.append(S @ q[t])
    cfg, row = tiny(width=K, heads=1, memory_depth=1), lambda x: x.expand(1, 1, 1, *x.shape)   # noqa: E731
    for C, delta in ((1, False), (T, True)):
        rule = h.Rule(delta=delta, momentum=False, normal="none", clip=0.0)
        memory = h.Memory(cfg, residual=False).double()
        family = h.Family(cfg, C, rule, memory, own_target=False)
        torch.nn.init.zeros_(memory.layers[0])
        out, state = family.scan(family.start(1), row(q), row(k), row(v), row(eta), row(keep.log()), None)
        assert (out[0, 0, 0] - torch.stack(want)).abs().max() < 1e-10
        assert (state[0][0][0, 0, 0] - S).abs().max() < 1e-10
    ones = torch.zeros(T, dtype=torch.float64)      # keep = 1: DeltaNet itself
    rule = h.Rule(delta=True, momentum=False, normal="none", clip=0.0)
    memory = h.Memory(cfg, residual=False).double()
    family = h.Family(cfg, T, rule, memory, own_target=False)
    torch.nn.init.zeros_(memory.layers[0])
    out, _ = family.scan(family.start(1), row(q), row(k), row(v), row(eta), row(ones), None)
    assert (out[0, 0, 0] - delta_net(q, k, v, eta, ones, None, 7)[0]).abs().max() < 1e-10


def test_dgd_is_the_proximal_minimiser():
    """W' minimises 1/2|Wx - u|^2 + |W - W_t|^2/(2 eta): the optimality residual is
    zero and |Wx - u| falls."""
    g = torch.Generator().manual_seed(0)
    W, x, u = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 6), (6,), (4,)))
    eta = torch.tensor([0.7], dtype=torch.float64)
    step = eta / (1 + eta * (x @ x))
    zero = torch.zeros(1, dtype=torch.float64)
    new, _, _ = h.advance(W, None, x[None], (step * u)[None], step, h.decays(zero))
    residual = torch.outer(new @ x - u, x) + (new - W) / eta
    assert residual.abs().max() < 1e-12
    assert (new @ x - u).norm() < (W @ x - u).norm()


def test_gradcheck_of_one_chunk():
    cfg = tiny(width=4, heads=1)
    memory = h.Memory(cfg).double()
    plan = h.Family(cfg, 5, h.Rule(before=True), memory).plan
    q, k, v, eta, keep, mom = (x.expand(1, 1, 1, *x.shape).clone().requires_grad_()
                               for x in random_rows(5, 4))
    Ws = [W[None].detach().clone().requires_grad_() for W in memory.layers]

    def chunk(W1, W2, *rows):
        q, k, v, eta, keep, mom = rows
        Ws, Ss, out, _ = h.learn(plan, None, [W1, W2], [None, None], k, v, eta, keep.log(),
                                 mom.clamp(min=1e-3).log(), q)
        return *Ws, *Ss, out
    assert torch.autograd.gradcheck(chunk, (*Ws, q, k, v, eta, keep, mom), atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("delta,momentum,again,asked", [(True, True, True, True), (True, False, True, True),
                                                        (False, True, True, True), (True, True, False, True),
                                                        (True, True, True, False)])
def test_backward_of_a_chunk_is_its_gradient(delta, momentum, again, asked, late):
    """The backward written out in scan.Chunk against finite differences; two memories share one rate."""
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)    # noqa: E731
    W, S, x, w, q = r(2, 3, 4), r(2, 3, 4), r(1, 5, 4), r(2, 5, 3), r(2, 5, 4)
    rho, keep, mom = (torch.rand(1, 5, generator=g, dtype=torch.float64) for _ in range(3))
    inputs = [t.requires_grad_() for t in (W, S, x, w, q, rho, keep, mom)]

    def chunk(W, S, x, w, q, rho, keep, mom):
        rates = h.decays(-keep, -mom if momentum else None)
        Wx = x @ W.mT if delta else None
        made = h.advance(W, S if momentum and again else None, x, w, rho if delta else None, rates, Wx,
                         q if asked else None, late)
        return tuple(m for m in made if m is not None)
    assert torch.autograd.gradcheck(chunk, inputs, atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("part,M", [((1, 2, True), 2), ((1, 3, False), 1)])
def test_backward_of_a_chunk_that_asks_one_memory(part, M, late):
    """q asks the second of two stacked memories, or rows 1 and 2 of a wide one; all share one decay."""
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(1, 1, *s, generator=g, dtype=torch.float64)      # noqa: E731
    W, S, x, w, q = r(M, 3, 2), r(M, 3, 2), r(M, 4, 2), r(M, 4, 3), r(1, 4, 2)
    rho, keep, mom = (torch.rand(1, 1, m, 4, generator=g, dtype=torch.float64) for m in (M, 1, 1))
    inputs = [t.requires_grad_() for t in (W, S, x, w, q, rho, keep, mom)]

    def chunk(W, S, x, w, q, rho, keep, mom):
        return h.advance(W, S, x, w, rho, h.decays(-keep, -mom), None, q, late, part=part)
    everything = h.advance(W, S, x, w, rho, h.decays(-keep, -mom), None, q.expand(1, 1, M, 4, 2), late)[2]
    assert torch.equal(chunk(*inputs)[2], everything[:, :, 1:] if part[2] else everything[..., 1:3])
    assert torch.autograd.gradcheck(chunk, inputs, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("residual,own,normal,clip", [
    (True, True, "proximal", 0.8), (False, True, "unit", 0.8), (True, False, "none", 0.8),
    (False, False, "proximal", 0.0)])
def test_a_lesson_is_recall_and_surprise_and_its_backward_their_gradient(depth, residual, own, normal, clip):
    """Two groups, two memories and a narrower one: values of the script's lines, gradient by differences."""
    g = torch.Generator().manual_seed(depth)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()    # noqa: E731
    k, v, eta = r(1, 1, 1, 2, 3), r(1, 1, 1, 2, 3), r(1, 1, 1, 2)
    with torch.no_grad():
        eta.abs_()
    hidden = 3 if depth == 1 else 2                 # v meets M(k) in every group, so all have three outputs
    shapes = [(2, [3] * (depth + 1), residual), (1, [3] + [hidden] * (depth - 1) + [3], False)]
    Ws = [[r(1, 1, M, o, i) for i, o in zip(sizes, sizes[1:])] for M, sizes, _ in shapes]
    plan = lesson.Plan(tuple((M, sizes[1], res) for M, sizes, res in shapes),
                       lesson.Rule(normal=normal, clip=clip), own)

    def lines(k, v, eta, Ws):
        """-> W k, w, step, k k^T; x, W x, w, step, x x^T."""
        wide, rows, deeper = [], [], []
        paces = {"proximal": lambda n: eta / (1 + eta * n), "unit": lambda n: eta / n,
                 "none": lambda n: eta + 0 * n}
        for (_, _, res), group in zip(shapes, Ws):
            outputs, inputs, slopes = h.recall(group, k)
            error = outputs[-1] - (h.answer(group, v, False) if own else v)
            error = error + (k - v if own else k) if res else error
            grads, made = h.surprise(group, slopes, error), []
            for x, Wx, grad in zip(inputs, outputs, grads):
                n = x.square().sum(-1)
                step, load = paces[normal](n), grad.norm(dim=-1) * n.sqrt()
                w = -grad * (step * (clip / load.clamp(min=clip) if clip else 1))[..., None]
                made.append((x, Wx, w, step, x @ x.mT))
            wide.append(lesson.together(made[0][1], 4))
            rows.append(lesson.together(made[0][2], 4))
            deeper += [t for layer in made[1:] for t in layer]
        n = k.square().sum(-1)
        return [torch.cat(wide, -1), torch.cat(rows, -1), paces[normal](n), k @ k.mT, *deeper]

    def made(k, v, eta, *flat):
        first = torch.cat([lesson.together(W, 3) for W in flat[::depth]], 3)
        deep = [W for i, W in enumerate(flat) if i % depth]
        return lesson.Lesson.apply(plan, k, v, eta, first, *deep)[:-1]
    flat = [W for group in Ws for W in group]
    got, want = made(k, v, eta, *flat), lines(k, v, eta, Ws)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-12
    assert torch.autograd.gradcheck(made, (k, v, eta, *flat), atol=1e-6)


@pytest.mark.parametrize("P,T", [(0, 6), (0, 2), (3, 1), (3, 5)])
def test_convolution_and_its_gradient(P, T):
    g = torch.Generator().manual_seed(0)
    x, kernel = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
                 for s in ((2, P + T, 3), (4, 3)))
    want = F.conv1d(F.pad(x.mT, (3, 0)), kernel.T[:, None], groups=3).mT[:, P:]
    assert (passes.Taps.apply(x, kernel, T) - want).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda x, kernel: passes.Taps.apply(x, kernel, T), (x, kernel))


def test_root_mean_square_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 8), (8,)))
    assert (h.rms_norm(x, w, 0.1) - F.rms_norm(x, (8,), w, 0.1)).abs().max() < 1e-14
    assert (h.rms_norm(x) - F.rms_norm(x, (8,), None, 1e-6)).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda x, w: h.rms_norm(x, w, 0.1), (x, w))


def test_silu_and_its_slope_have_their_gradient():
    z = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    y, slope = lesson.SiLU.apply(z)
    assert (y - F.silu(z)).abs().max() < 1e-14 and (slope - silu_prime(z)).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lesson.SiLU.apply, z)


def test_unit_rows_and_their_gradient_are_those_of_normalize():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=g, dtype=torch.float64)
    x[1] *= 1e-8                                    # shorter than eps: divided by eps, no direction to keep
    x = x.requires_grad_()
    upstream = torch.randn(4, 5, generator=g, dtype=torch.float64)
    ours, theirs = h.unit(x), F.normalize(x, dim=-1, eps=1e-6)
    assert torch.equal(ours, theirs)
    a, b = (torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs))
    assert ((a - b).abs() <= 1e-12 * b.abs().amax(-1, keepdim=True)).all()


ONE = dict(variant="hope", chunk_self=8)            # maps, gates and store write the same chunks: one family


@pytest.mark.parametrize("kw", [*(dict(variant=v) for v in h.VARIANTS), ONE, dict(ONE, forget="written"),
                                dict(variant="hope", forget="written"), dict(variant="mac", forget="written"),
                                dict(ONE, surprise_threshold=0.5), dict(ONE, adapt="")], ids=str)
def test_every_variant_is_causal_streams_and_keeps_sequences_apart(kw):
    net, x = net_of(**kw), tokens(2, 37)
    logits = net(x)
    other = x.clone()
    other[:, 20] = (other[:, 20] + 1) % 31
    assert torch.equal(net(other)[:, :20], logits[:, :20])          # bit-equal before the change
    assert (net(other)[:, 20:] - logits[:, 20:]).abs().max() > 1e-6
    state, parts = net.fresh(2), []
    for part in x.split([5, 1, 13, 11, 7], 1):                      # any cut into calls
        out, state = net(part, state)
        parts.append(out)
    assert (torch.cat(parts, 1) - logits).abs().max() < 1e-12
    alone = torch.cat([net(x[:1]), net(x[1:])])
    assert (alone - logits).abs().max() < 1e-12
    assert torch.equal(net.eval()(x), net.train()(x))


@pytest.mark.parametrize("forget", ["all", "written"])
def test_one_family_is_maps_and_store_apart(forget):
    """The store beside the maps and gates that make its rows, and by itself: outputs and gradients."""
    net, x, results = net_of(**ONE, forget=forget), tokens(2, 37), []
    for _ in range(2):
        logits = net(x)
        results.append((logits, torch.autograd.grad(logits.square().sum(), list(net.parameters()))))
        for mixer in (block.mixer for block in net.blocks):
            family = mixer.family
            mixer.family = h.Family(net.cfg, family.chunk, family.plan.rule, mixer.maps, mixer.gates)
            mixer.answers = h.Family(net.cfg, family.chunk, family.plan.rule, mixer.store)
    (a, da), (b, db) = results
    assert (a - b).abs().max() < 1e-12
    for p, q in zip(da, db):
        assert (p - q).abs().max() < 1e-12 * q.abs().max().clamp(min=1)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its compiler fails on Functions with None")
def test_the_life_of_a_chunk_is_one_graph_for_the_compiler(monkeypatch):
    """--compile: no graph break in learn(); outputs and gradients are those of the plain call."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)     # pytest would keep it all
    family = net_of(**ONE).blocks[0].mixer.family
    q, k, v, eta, keep, mom = (x.expand(1, 2, 1, *x.shape).clone().requires_grad_()
                               for x in random_rows(8, 8))
    Ws, Ss, *_ = family.start(1)
    args = family.plan, None, Ws, Ss, k, v, eta, keep.log(), mom.log(), q
    results = []
    for body in (h.learn, torch.compile(h.learn, backend="eager", fullgraph=True)):
        W, S, out, _ = body(*args)
        total = sum(t.square().sum() for t in (*W, *S, out))
        results.append([out, *torch.autograd.grad(total, (q, k, v, eta, *family.groups[0][0].layers))])
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*results))


@pytest.mark.parametrize("variant", ["hope", "lmm", "mac", "mag", "mal"])
def test_outer_gradient_reaches_every_initial_memory(variant):
    net, x = net_of(variant=variant), tokens(2, 33)
    net.score(x[:, :-1], x[:, 1:])[0].mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_memory_mixes_tokens_far_beyond_the_convolution():
    net, x = net_of(variant="hope"), tokens(1, 40)
    other = x.clone()
    other[:, 3] = (other[:, 3] + 1) % 31
    moved = (net(other) - net(x)).abs().amax((0, 2))
    assert (moved[3:] > 0).all()                    # the reference: positions 3 to 6 only, without writes


def test_first_loss_is_the_uniform_one_and_order_matters():
    for variant in ("hope", "full"):
        net, x = net_of(variant=variant), tokens(4, 40)
        loss = net.score(x[:, :-1], x[:, 1:])[0].mean()
        # 0.02 embeddings: logits of the order of 0.02 sqrt(D)
        assert abs(float(loss.detach()) - math.log(31)) < 0.3
        swapped = x.clone()
        swapped[:, [3, 10]] = x[:, [10, 3]]
        # the reference: 4e-6 in float32, rounding
        assert (net(swapped)[:, -1] - net(x)[:, -1]).abs().max() > 1e-6


def test_memory_of_mac_tells_tokens_apart_before_training():
    """It reads the tokens and what attention adds: untrained attention alone is one average for all of them,
    and the memory could learn nothing from rows that are equal (mean cosine 0.9 without the residual)."""
    net, rows = net_of(variant="mac", width=64, chunk=32), []
    core = net.blocks[0].mixer.core
    scan = core.scan
    core.scan = lambda y, state: (rows.append(y.detach()), scan(y, state))[1]
    net(tokens(1, 64))
    for y in rows:
        unit = torch.nn.functional.normalize(y[0], dim=-1)
        n = len(unit)
        assert float((unit @ unit.T).sum() - n) / (n * n - n) < 0.3


def test_adapt_switch_removes_the_self_modifier():
    on, off = net_of(variant="hope"), net_of(variant="hope", adapt="")
    names = lambda net: {n for n, _ in net.named_parameters()}   # noqa: E731
    assert any(".maps." in n for n in names(on))
    assert not any(".maps." in n or ".gates." in n for n in names(off))
    assert any("slow_gates" in n for n in names(off))
    x = tokens(2, 20)
    assert net_of(variant="hope", adapt="kvqg")(x).shape == off(x).shape
    assert not torch.allclose(on(x), off(x))


@pytest.mark.parametrize("inner", ["gd", "momentum", "dgd", "dgd_momentum", "delta_momentum", "dmgd"])
@pytest.mark.parametrize("variant,cms", [("hope", "outer"), ("lmm", "outer"), ("hope_attention", "context")])
def test_every_inner_rule_learns_and_stays_causal(inner, variant, cms):
    boundary = inner in ("delta_momentum", "dmgd")
    net, x = net_of(variant=variant, cms=cms, inner=inner, boundary=boundary, cms_lr=0.1), tokens(2, 33)
    loss, _, _ = net.score(x[:, :-1], x[:, 1:])
    other = x.clone()
    other[:, 20] = (other[:, 20] + 1) % 31
    assert torch.equal(net.score(other[:, :-1], other[:, 1:])[0][:, :19], loss[:, :19])
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    plain = net_of(variant=variant, cms=cms, inner="gd", boundary=boundary, cms_lr=0.1)
    if inner != "gd":
        assert not torch.allclose(plain.score(x[:, :-1], x[:, 1:])[0], loss)


def test_chunk_rules_are_their_equations():
    g = torch.Generator().manual_seed(0)
    W, S, G = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(3))
    keep, mom = torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64).log()
    W1, S1 = h.chunk_rule("delta_momentum", W, S, G, keep, mom)
    # NL 49, P = I, step inside G
    want = S @ (torch.eye(6, dtype=torch.float64) * 0.8 - G.T @ G / G.square().sum()) - G
    assert (S1 - want).abs().max() < 1e-12 and (W1 - (0.9 * W + want)).abs().max() < 1e-12
    phi = torch.randn(6, 6, generator=g, dtype=torch.float64, requires_grad=True)
    deep = lambda phi: -G + F.silu(G) @ phi.T   # noqa: E731
    W2, phi2 = h.chunk_rule("dmgd", W, phi, G, keep, mom)
    dphi, = torch.autograd.grad(deep(phi).sum(), phi)  # L2(m; u, 1) = <m(u), 1>, NL 50
    assert (W2 - (0.9 * W + deep(phi))).abs().max() < 1e-12
    assert (phi2 - (0.8 * phi - dphi)).abs().max() < 1e-12


# --- continuum memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring,mlp", [("sequential", "silu"), ("nested", "silu"), ("headwise", "silu"),
                                        ("sequential", "swiglu"), ("nested", "swiglu")])
def test_cms_levels_move_floor_T_over_C_times_however_the_sequence_is_cut(wiring, mlp):
    net = net_of(variant="hope_attention", cms="context", cms_wiring=wiring, cms_mlp=mlp)
    x = tokens(2, 39)
    for cut in ([38], [3, 20, 15], [1] * 38):
        state = net.fresh(2)
        for a, b in zip(x[:, :-1].split(cut, 1), x[:, 1:].split(cut, 1)):
            _, state, _ = net.score(a, b, state)
        assert [level["updates"] for level in state["blocks"][0]["fast"]] == [38 // c for c in (4, 8, 16, 32)]
        flushed = net.remember(state)["blocks"][0]["fast"]
        assert [level["updates"] for level in flushed] == [38 // c + 1 for c in (4, 8, 16, 32)]


@pytest.mark.parametrize("mlp", ["silu", "swiglu"])
def test_cms_write_is_the_gradient_of_the_token_loss(mlp):
    """One level, plain gradient descent, one period: W moves by -lr dL/dW of the summed loss (NL 71)."""
    cfg = dict(variant="hope_attention", cms="context", cms_levels=1, periods=(16,), cms_lr=0.01, depth=1,
               teach_scale=1.0, teach_clip=0.0, cms_mlp=mlp)
    net, x = net_of(**cfg), tokens(1, 17)
    _, state, _ = net.score(x[:, :-1], x[:, 1:])
    level = net.blocks[0].cms.levels[0]
    frozen = net_of(**{**cfg, "cms": "frozen"})
    frozen.load_state_dict(net.state_dict())
    grads = torch.autograd.grad(frozen.score(x[:, :-1], x[:, 1:])[0].sum(),
                                list(frozen.blocks[0].cms.levels[0]))
    moved = state["blocks"][0]["fast"][0]["W"]
    assert len(level) == len(moved) == len(grads) == (3 if mlp == "swiglu" else 2)
    for W, after, g in zip(level, moved, grads):
        assert g.abs().max() > 1e-3 and (after[0] - (W - 0.01 * g)).abs().max() < 1e-12


def test_one_frozen_swiglu_level_is_the_feed_forward_of_transformer_pp():
    """A Transformer's MLP is CMS with one level that never moves (NL 7.1); and sizes are equal too."""
    cms = dict(variant="hope_attention", cms="frozen", cms_levels=1, cms_mlp="swiglu")
    net, full = (h.build(tiny(params=30_000, **kw)).double() for kw in (cms, dict(variant="full")))
    assert net.cfg.hidden == full.cfg.hidden == 288
    weights = full.state_dict()
    for i, block in enumerate(net.blocks):
        W_in, W_out, W_gate = block.cms.levels[0]
        weights[f"blocks.{i}.ffn.up.weight"] = torch.cat([W_in, W_gate])
        weights[f"blocks.{i}.ffn.down.weight"] = W_out
    theirs = net.state_dict()
    weights.update({k: theirs[k] for k in weights if k in theirs})
    full.load_state_dict(weights)
    x = tokens(2, 20)
    assert (net(x) - full(x)).abs().max() < 1e-12


@pytest.mark.parametrize("mlp", ["silu", "swiglu"])
def test_stacked_levels_start_as_the_trained_mlp(tmp_path, story, mlp):
    go(tmp_path / "one", data=story, variant="hope_attention", cms_levels=1, cms="frozen",
       cms_wiring="headwise", steps=3, cms_mlp=mlp)
    one, saved = h.load_run(tmp_path / "one")
    three = h.LM(dataclasses.replace(saved, cms_levels=3, cms="context", cms_lr=1e-6))
    h.stack(three, tmp_path / "one")
    x = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    assert (three.eval()(x) - one(x)).abs().max() < 1e-4        # three equal terms over three, in float32
    want, got = (net.score(x[:, :-1], x[:, 1:])[0] for net in (one, three))
    assert (got - want).abs().max() < 1e-3                      # a small inner step keeps the behaviour
    with pytest.raises(run.UserError, match="headwise"):
        h.stack(h.LM(dataclasses.replace(saved, cms_levels=3, cms_wiring="sequential")), tmp_path / "one")


def test_teach_signal_equals_autograd_at_the_head():
    torch.manual_seed(0)
    feature = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    head, target = torch.randn(31, 16, dtype=torch.float64), tokens(2, 5)
    target[0, 2] = -1
    loss = h.nll(feature @ head.T, target).sum()
    want, = torch.autograd.grad(loss, feature)
    assert (h.teach_signal(feature @ head.T, target, head) - want).abs().max() < 1e-12


@pytest.mark.parametrize("teach", ["layer", "global"])
def test_gates_do_not_depend_on_batch_or_length(teach):
    x = tokens(3, 65)
    for threshold, share in ((0.0, 1.0), (1e9, 0.0)):
        net = net_of(variant="hope", cms="context", teach=teach, surprise_threshold=threshold)
        loss, _, info = net.score(x[:, :-1], x[:, 1:])
        assert float(info["gates"][0].detach()) == share * info["gates"][1]
        alone = net.score(x[:1, :-1], x[:1, 1:])[0]
        short = net.score(x[:, :32], x[:, 1:33])[0]
        assert (alone - loss[:1]).abs().max() < 1e-12 and (short - loss[:, :32]).abs().max() < 1e-12


def test_context_memory_scores_a_token_before_learning_it():
    net, x = net_of(variant="hope_attention", cms="context", cms_lr=0.5), tokens(1, 33)
    with torch.no_grad():
        loss, _, _ = net.score(x[:, :-1], x[:, 1:])
        other = x.clone()
        other[:, 20] = (other[:, 20] + 1) % 31
        moved = net.score(other[:, :-1], other[:, 1:])[0]
    assert torch.equal(moved[:, :19], loss[:, :19])
    assert all(p.grad is None for p in net.parameters())


def test_nested_levels_restart_when_a_slower_level_moves():
    net, x = net_of(variant="hope_attention", cms="context", cms_wiring="nested", cms_lr=0.1), tokens(1, 17)
    _, state, _ = net.score(x[:, :8], x[:, 1:9])
    fast = state["blocks"][0]["fast"]
    for W, start, first in zip(fast[0]["W"], fast[0]["start"], net.blocks[0].cms.levels[0]):
        # moved by the slower clock, then restarted
        assert torch.equal(W, start) and not torch.equal(start[0], first)


# --- surprise gate of the memories, memorising --------------------------------------------------------------


def test_a_shut_gate_leaves_memories_to_decay_alone():
    cfg, rows = tiny(), [x.expand(1, 2, 1, *x.shape) for x in random_rows(16, 8)]
    memory = h.Memory(cfg).double()
    family = h.Family(cfg, 8, h.Rule(threshold=1e9), memory)
    _, (Ws, _, _, gates) = family.scan(family.start(1), *rows[:4], rows[4].log(), rows[5].log())
    keep = rows[4].log().sum(-1).exp()[..., None, None]
    assert gates[1] == 2 and float(gates[0].detach()) == 0.0
    for W, W0 in zip(Ws, memory.layers):
        assert (W - keep * W0).abs().max() < 1e-12


@pytest.mark.parametrize("variant", h.VARIANTS)
def test_remembering_keeps_fast_weights_only_and_base_weights_bit_identical(variant):
    net, x, probe = net_of(variant=variant), tokens(2, 21), tokens(2, 9, seed=5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        _, state = net(x, net.fresh(2))
        with_memory = net(probe, net.remember(state))[0]
        without = net(probe)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    has_memory = variant not in ("full", "swa", "hope_attention")
    assert torch.equal(with_memory, without) != has_memory


# --- optimizers ---------------------------------------------------------------------------------------------


def test_muon_equals_torch_muon():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(24.0).view(6, 4).cos()) for _ in range(2))
    a = optim.Muon([ours], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        g = torch.randn(6, 4)
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    # theirs iterates in bfloat16 (8 bits of mantissa) everywhere, ours in float32 on a CPU: 5 steps of 0.02 x
    # 1 x 2^-7
    assert (ours - theirs).abs().max() < 2e-3
    assert (ours - torch.arange(24.0).view(6, 4).cos()).abs().max() > 0.02


def test_newton_schulz_flattens_the_spectrum():
    torch.manual_seed(0)
    for shape in ((32, 64), (64, 32), (3, 16, 16)):
        s = torch.linalg.svdvals(optim.newton_schulz(torch.randn(*shape)))
        assert s.max() < 1.25 and s.min() > 0.4  # Muon's quintic aims at 1 +- 0.3; small singular values lag


def test_m3_follows_algorithm_1():
    torch.manual_seed(0)
    p, steps = torch.nn.Parameter(torch.randn(4, 6)), [torch.randn(4, 6) for _ in range(5)]
    q = p.detach().clone()
    opt = optim.M3([p], lr=0.1, every=2)
    M1 = V = M2 = total = O2 = torch.zeros(4, 6)
    for t, g in enumerate(steps, 1):
        p.grad = g.clone()
        opt.step()
        M1, V, total = M1 + 0.9 * g, V + 0.999 * g * g, total + g
        if t % 2 == 0:
            M2, total = M2 + 0.9 * total, torch.zeros(4, 6)
            O2 = optim.newton_schulz(M2, 3)
        update = (optim.newton_schulz(M1, 3) + O2) / (V.sqrt() + 1e-8)
        q = q - 0.1 * 0.2 * update / update.square().mean().sqrt()
    assert (p - q).abs().max() < 1e-5               # float32, five steps


def test_split_gives_every_parameter_one_optimizer_and_kernels_go_to_adamw():
    net = h.LM(tiny(variant="hope"))
    names = set(optim.split(net.named_parameters()))
    sizes = dict(net.named_parameters())
    assert names and all(sizes[n].ndim == 2 for n in names)
    assert not any("embed" in n or "kernel" in n or "layers" in n or "norm" in n for n in names)
    outer = optim.Outer(net, "muon", 1e-3, 0.02, 0.1)
    assert outer.counts["matrix"] + outer.counts["rest"] == sum(p.numel() for p in net.parameters())


def test_outer_clock_moves_levels_at_their_period_by_the_summed_gradient():
    cfg = tiny(variant="hope", cms_levels=2, outer_periods=(1, 3))
    net = h.LM(cfg)
    outer = optim.Outer(net, "adamw", 1e-3, 0.02, 0.0, lambda n: optim.level_period(cfg, n))
    slow = net.blocks[0].cms.levels[1][0]
    first, fast_first = slow.detach().clone(), net.blocks[0].cms.levels[0][0].detach().clone()
    for step in (1, 2, 3):
        for p in net.parameters():
            p.grad = torch.full_like(p, float(step))
        seen = dict(outer.held)
        moved = outer.step(step, 1.0)
        assert ("blocks.0.cms.levels.1.0" in moved) == (step == 3)
        assert torch.equal(slow, first) == (step < 3)
    assert not torch.equal(net.blocks[0].cms.levels[0][0], fast_first)
    assert float(seen["blocks.0.cms.levels.1.0"].mean()) == 3.0             # 1 + 2, kept until the third step


# --- presets, plan ------------------------------------------------------------------------------------------

SIZES = dict(smoke=93_228, parity=17_698, tiny=4_000_000, cms_sparse=58_428_944, pilot=160_000_000,
             mid=760_000_000, target=1_300_000_000)


@pytest.mark.parametrize("preset", h.PRESETS)
def test_presets_have_the_parameters_they_claim(preset):
    cfg = h.sized(h.Config(**h.PRESETS[preset]["set"]))
    assert abs(h.count(cfg) / SIZES[preset] - 1) < 0.01, h.count(cfg)


@pytest.mark.parametrize("arm", h.ABLATIONS["backbone"])
def test_backbones_share_a_parameter_budget(arm):
    cfg = h.sized(h.Config(**{**h.PRESETS["tiny"]["set"], **h.ABLATIONS["backbone"][arm]}))
    assert abs(h.count(cfg) / 4_000_000 - 1) < 0.01 and cfg.hidden_width % 8 == 0


def test_a_small_model_meets_its_budget_by_single_hidden_units():
    small = dict(width=64, depth=2, heads=2, params=200_000, cms_levels=2, cms_mlp="swiglu")
    cfg = h.sized(h.Config(**small))
    assert abs(h.count(cfg) / 200_000 - 1) < 0.01 and cfg.hidden_width % 8
    with pytest.raises(run.UserError, match="no feed-forward"):
        h.sized(h.Config(**{**small, "params": 20_000}))


@pytest.mark.parametrize("kw", [dict(), dict(variant="lmm"), dict(variant="mac"), dict(variant="full"),
                                dict(variant="gated_deltanet"), dict(forget="written", cms_mlp="swiglu"),
                                dict(cms="context", periods=(8, 32), through_writes=False)], ids=str)
def test_plan_counts_what_a_forward_pass_keeps(kw):
    """Counted on three chunks of two layers at most; here five chunks, three layers, two rows.  5%: MAC's
    and LMM's fixed tokens are counted with every chunk, and there is one write fewer than chunks."""
    small = dict(width=32, depth=3, heads=2, length=160, batch=2, chunk=32, chunk_self=32, cms_levels=2)
    cfg = h.Config(**{**small, **kw})
    layer, rest = cost.kept(h.LM, cfg)
    net, tokens = h.LM(cfg), torch.randint(0, 256, (2, 2, 160))
    real = graph.saved(lambda: net.score(*tokens), net) / 4
    assert real > 1e5 and abs(2 * (3 * (layer + cost.copies(cfg)) + rest) / real - 1) < 0.05


def test_plan_keeps_the_sparse_preset_below_49_gb(capsys):
    h.plan(h.Config(preset="cms_sparse", json=True, **h.PRESETS["cms_sparse"]["set"]))
    plan = json.loads(capsys.readouterr().out)
    assert 5 < plan["activations_gb"] < plan["cms_copies_gb"] < plan["memory_gb_per_rank"] < 49


# --- data ---------------------------------------------------------------------------------------------------


def test_bpe_round_trips_everything_and_merges_the_commonest_pair_first(tmp_path):
    texts = ["the cat sat on the mat, the end. " * 20, "Größe 12345 naïve 🙂\n\n\t x_y __init__\x00 \u00a0 ok"]
    bpe = text.BPE.train(texts, 300)
    assert bpe.bytes[256] == b"at" and 258 < bpe.vocab_size <= 300
    for t in (*texts, "", " ", "\n \n", "unseen wörds 日本語 \U0001f600" * 3):
        assert bpe.decode(bpe.encode(t)) == t
    bpe.save(tmp_path / "t.json")
    again = text.BPE.load(tmp_path / "t.json")
    assert again.sha256 == bpe.sha256 and again.encode(texts[1]) == bpe.encode(texts[1])
    assert len(bpe.encode(texts[0])) < 0.5 * len(texts[0])


def test_bpe_training_equals_recounting_after_every_merge():
    words = {"low": 5, "lowest": 2, "newer": 6, "wider": 3, "new": 2}
    bpe = text.BPE.train([" ".join([w] * n) for w, n in words.items()], 257 + 8)
    pieces = {}
    for w, n in words.items():
        for k, word in enumerate([w] * n):
            form = word if k == 0 else " " + word
            pieces[form] = pieces.get(form, 0) + 1
    ids = {w: list(w.encode()) for w in pieces}
    for new, pair in enumerate(bpe.merges, 256):
        counts = {}
        for w, n in pieces.items():
            for p in zip(ids[w], ids[w][1:]):
                counts[p] = counts.get(p, 0) + n
        best = max(counts.values())
        assert pair == min(p for p, n in counts.items() if n == best)
        ids = {w: text._merge(x, pair, new) for w, x in ids.items()}


def test_mixture_draws_sources_by_weight_and_rows_by_step(tmp_path):
    bpe = text.BPE()
    make = lambda name, letter, weight: dict(name=name, weight=weight, licence="CC0", url="x",   # noqa: E731
                                             documents=[letter * (40 + i) for i in range(60)])
    text.shard([make("a", "a", 0.7), make("b", "b", 0.3)], bpe, tmp_path, length=16, rows_per_shard=32,
               validation=0.1)
    mix = text.Mixture(tmp_path)
    rows = mix.batch((0, 5), range(4000), 16)
    share = np.isin(rows, [ord("a")]).any(1).mean()
    assert abs(share - 0.7) < 3 * math.sqrt(0.21 / 4000)            # three standard errors
    assert np.array_equal(rows[100:108], mix.batch((0, 5), range(100, 108), 16))     # any rank, any resume
    assert not np.array_equal(rows[:50], mix.batch((0, 6), range(50), 16))
    assert corpus.validate(tmp_path) == []
    with pytest.raises(run.UserError, match="rows of 16"):
        mix.batch((0, 1), range(2), 32)


def test_every_token_of_a_source_is_predicted_once(tmp_path):
    doc = "".join(chr(33 + i % 90) for i in range(1000))
    text.shard([dict(name="s", weight=1, licence="x", url="x", documents=[doc])], text.BPE(), tmp_path, 10,
               validation=0.0)
    rows = np.load(tmp_path / "s-train-0000.npy")
    assert rows.dtype == np.uint16 and rows.shape == (100, 11)
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    assert rows[:, 1:].ravel().tolist() == (list(doc.encode()) + [0])[1:]


def test_validate_names_flipped_bytes_missing_licences_overlap_and_contamination(tmp_path):
    a, b = ("".join(np.random.default_rng(s).choice(list("abcdefgh "), 3000)) for s in (0, 1))
    entry = lambda name, docs, licence="x": dict(name=name, weight=1, licence=licence,      # noqa: E731
                                                 url="u", documents=docs)
    text.shard([entry("one", [a]), entry("two", [b, a[:1500]], "")], text.BPE(), tmp_path, 50, validation=0.0)
    problems = corpus.validate(tmp_path, {"quiz": list(b[100:200].encode())})
    assert any("two: no licence" in p for p in problems) and any("one and two share" in p for p in problems)
    assert any("evaluation text quiz" in p and p.startswith("two") for p in problems)
    file = tmp_path / "one-train-0000.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert any("does not match its hash" in p for p in corpus.validate(tmp_path))


def test_english_is_recognised_on_sentences_it_was_not_built_from():
    english = ["Two old men were sitting on a bench in front of the church.",
               "The mayor promised to repair the roof of the school.",
               "Nobody could say where the ship had gone.", "Please send me the photographs when you find "
                                                            "them.",
               "We had soup and bread, and later a piece of cake.", "The gardener cut the hedge and watered "
                                                                    "the roses.",
               "Prices rose quickly during the first weeks of spring.", "A small dog followed us all the "
                                                                        "way to the station."]
    other = ["Zwei alte Männer saßen auf einer Bank vor der Kirche.", "Le maire a promis de réparer le toit "
                                                                      "de l'école.",
             "Nadie podía decir adónde había ido el barco.", "Per favore mandami le fotografie quando le "
                                                             "trovi.",
             "We aten soep met brood en daarna een stuk taart.", "O jardineiro cortou a sebe e regou as "
                                                                 "rosas.",
             "Die Preise stiegen in den ersten Wochen des Frühlings schnell.",
             "Un petit chien nous a suivis jusqu'à la gare.",
             "La alcaldesa prometió arreglar el techo.", "Niemand kon zeggen waar het schip was gebleven."]
    right = sum(corpus.english(t) >= 0.85 for t in english) + sum(corpus.english(t) < 0.5 for t in other)
    assert right >= 0.95 * (len(english) + len(other))
    assert corpus.english("12345 --- 678") == 0.0


def test_permutations_are_exact_modulo_the_mersenne_prime():
    p, draw = (1 << 61) - 1, np.random.default_rng(0)
    a, b, x = (draw.integers(0, hi, 200, dtype=np.uint64) for hi in (p, p, 1 << 32))
    want = [(int(i) * int(k) + int(j)) % p for i, j, k in zip(a, b, x)]
    assert corpus.permute(a, b, x).tolist() == want


def test_near_duplicates_are_found_and_strangers_are_not():
    draw = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(2000)])
    originals = [list(draw.choice(words, 300)) for _ in range(30)]
    near = [list(o) for o in originals]
    for n in near:  # 4 single-word edits spoil at most 20 of 296 shingles: J >= 0.87
        for i in draw.choice(300, 4, replace=False):
            n[i] = "edited"
    far = [o[:150] + list(draw.choice(words, 150)) for o in originals]  # half the shingles: J ~ 0.33
    drop = set(corpus.near_duplicates([" ".join(t) for t in (*originals, *near, *far)]))
    assert len([i for i in drop if 30 <= i < 60]) >= 27
    assert not [i for i in drop if i < 30] and len([i for i in drop if i >= 60]) <= 1


def test_corpus_counts_every_rule(tmp_path):
    good = "The old bridge was built by the people of the village and it is still in use today. " * 4
    texts = [good, good, "short", good + "x " * 9000, "Das Wetter war heute Morgen kalt und die Straßen "
                                                      "waren leer. " * 5]
    kept, counts = corpus.clean(texts)
    assert kept == [" ".join(good.split())]
    assert counts == dict(documents=5, passed=1, exact_duplicate=1, too_short=1, too_long=1, language=1,
                          near_duplicate=0, kept=1)


def test_guard_fails_a_worse_tokenizer(tmp_path):
    texts = ["the cat sat on the mat and the dog sat on the log"] * 3
    good, bad = text.coverage(text.BPE.train(texts, 330), texts), text.coverage(text.BPE(), texts)
    assert text.guard(good, good) == [] and set(text.guard(bad, good)) == {"tokens_per_word", "single",
                                                                           "within_two"}
    slightly = dict(good, tokens_per_word=good["tokens_per_word"] + 0.04)
    assert text.guard(slightly, good) == []


# --- training -----------------------------------------------------------------------------------------------

SMALL = dict(width=16, heads=2, depth=1, length=16, batch=4, chunk=8, chunk_self=8, steps=6, eval_every=3,
             eval_rows=2, save_every=2, log_every=1, cms_levels=2, cms_mult=1.0, params=0)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "story.txt"
    path.write_text("once there was a fox who read a book about a dog. " * 60)
    return str(path)


def rows_of(out, kind="train"):
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


def go(out, **kw):
    cfg = h.Config(**{**SMALL, "device": "cpu", "out": str(out), **kw})
    h.train(cfg)
    return cfg


@pytest.mark.parametrize("kw",
                         [dict(), dict(variant="mac", optimizer="m3", micro=2),
                          dict(optimizer="adamw", cms="context", periods=(4, 8), surprise_threshold=0.02),
                          dict(task="recall", length=64, vocab=64)])
def test_resume_is_bit_exact(tmp_path, story, kw, monkeypatch):
    go(tmp_path / "a", data=story, **kw)
    calls = []

    def stop(ddp):
        calls.append(1)
        return len(calls) == 3
    monkeypatch.setattr(run, "stop_requested", stop)
    with pytest.raises(run.Interrupted):
        go(tmp_path / "b", data=story, **kw)
    go(tmp_path / "b", data=story, **kw)
    a, b = (run.load_weights(tmp_path / d / "weights.safetensors")[0] for d in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r["loss"] for r in rows_of(tmp_path / "a")] == [r["loss"] for r in rows_of(tmp_path / "b")]
    start = rows_of(tmp_path / "a", "start")[0]
    assert {"params", "optimizer", "matrix_params", "rest_params", "bf16", "sdpa", "compile"} <= start.keys()
    assert rows_of(tmp_path / "b", "start")[-1]["resumed_at"] == 3


def test_loss_falls_and_gradient_accumulation_changes_nothing(tmp_path, story):
    go(tmp_path / "a", data=story, steps=25, optimizer="adamw", lr=0.01)
    go(tmp_path / "b", data=story, steps=2, optimizer="adamw", lr=0.01, log_every=1)
    go(tmp_path / "c", data=story, steps=2, optimizer="adamw", lr=0.01, log_every=1, micro=1)
    losses = [r["loss"] for r in rows_of(tmp_path / "a")]
    assert losses[-1] < losses[0] - 1.0
    for x, y in zip(rows_of(tmp_path / "b"), rows_of(tmp_path / "c")):
        # float32 sums
        assert abs(x["loss"] - y["loss"]) < 1e-5 and abs(x["grad_norm"] - y["grad_norm"]) < 1e-4


def test_curriculum_keeps_tokens_per_step(tmp_path, story):
    go(tmp_path / "a", data=story, curriculum=(8, 16, 32), length=16, batch=4)
    assert [r["length"] for r in rows_of(tmp_path / "a")] == [8, 8, 16, 16, 32, 32]


def test_gate_share_is_logged_and_a_dead_gate_warned_about(tmp_path, story):
    go(tmp_path / "a", data=story, variant="lmm", surprise_threshold=1e9)
    assert all(r["gate_open"] == 0.0 for r in rows_of(tmp_path / "a"))
    assert "never open" in rows_of(tmp_path / "a", "warning")[0]["text"]


def test_strict_verify_finds_every_kind_of_damage(tmp_path, story):
    bpe = text.BPE.train([open(story).read()], 280)
    bpe.save(tmp_path / "bpe.json")
    cfg = go(tmp_path / "a", data=story, tokenizer=str(tmp_path / "bpe.json"), vocab=280, steps=2)
    check = lambda strict=True: sidecar.verify(tmp_path / "a", strict, h.free_fields())[1]   # noqa: E731
    assert check() == []
    folder = tmp_path / "a/ckpt/00000002"
    whole = (folder / "net.safetensors").read_bytes()
    for damage in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / "net.safetensors").write_bytes(damage)
        assert "net.safetensors" in check(False)[0]
        with pytest.raises(SystemExit):
            h.verify(dataclasses.replace(cfg, words=(str(tmp_path / "a"),)))
    (folder / "net.safetensors").write_bytes(whole)
    side = (folder / "side.safetensors").read_bytes()
    (folder / "side.safetensors").unlink()
    assert "side.safetensors is missing" in check(False)[0]
    (folder / "side.safetensors").write_bytes(side)
    text.BPE(bpe.merges[:-1]).save(tmp_path / "bpe.json")
    assert "tokenizer" in check()[0]
    bpe.save(tmp_path / "bpe.json")
    facts = json.loads((tmp_path / "a/config.json").read_text())
    facts["config"]["lr"] = 1.0
    (tmp_path / "a/config.json").write_text(json.dumps(facts))
    assert "config" in check()[0] and check(False) == []


script = functools.partial(command, "hope_lm.py")


def flags(**kw):
    settings = {**SMALL, "device": "cpu", **kw}
    return [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.parametrize("shard", ["ddp", "zero1", "fsdp2"])
def test_two_gloo_ranks_equal_one_process(tmp_path, story, shard):
    done = script(*flags(data=story, shard=shard, steps=3, out=tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    go(tmp_path / "one", data=story, steps=3)
    two, one = ([r["loss"] for r in rows_of(tmp_path / d)] for d in ("two", "one"))
    assert np.allclose(two, one, atol=2e-5)  # the mean of two half-batch means, in float32, over three steps
    a, b = (run.load_weights(tmp_path / d / "weights.safetensors")[0] for d in ("two", "one"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 2e-3  # Muon turns rounding into up to lr 0.02 x 2^-5


def test_two_launches_of_two_gloo_ranks_have_one_loss_trace(tmp_path, story):
    for name in "ab":
        done = script(*flags(data=story, steps=3, out=tmp_path / name), ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
    assert [r["loss"] for r in rows_of(tmp_path / "a")] == [r["loss"] for r in rows_of(tmp_path / "b")]


def test_sigkill_then_the_same_command_ends_in_the_same_bits(tmp_path, story):
    kw = dict(data=story, steps=12, save_every=1, eval_every=100)
    root = pathlib.Path(h.__file__).parent
    child = subprocess.Popen([sys.executable, str(root / "hope_lm.py"), *flags(**kw, out=tmp_path / "a")],
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not (tmp_path / "a/ckpt/00000003").exists() and child.poll() is None:
        time.sleep(0.05)
    child.kill()
    assert child.wait() == -9                       # killed in flight, wherever it was
    for name in "ab":
        done = script(*flags(**kw, out=tmp_path / name))
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (run.load_weights(tmp_path / d / "weights.safetensors")[0] for d in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_curves_are_the_mean_of_the_seeds_validation(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(cost.draw, "lines", lambda series, **kw: drawn.update(series=series, **kw))
    monkeypatch.setattr(cost.draw, "save", lambda image, path: None)

    def log(arm, seed, steps):
        (tmp_path / arm / str(seed)).mkdir(parents=True)
        rows = [dict(kind="eval", step=s, val_bpb=s + seed) for s in steps]
        rows += [dict(kind="train", step=s, bpb=10 * s + seed) for s in (1, 50, 100)]
        (tmp_path / arm / str(seed) / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    log("a", 0, [1, 20, 40, 100])
    log("a", 2, [1, 20, 40, 60, 100])               # this seed was evaluated once more
    cost.curves(tmp_path, {"a": [dict(seed=0), dict(seed=2)]})
    assert drawn["series"] == {"a": ([20, 40, 100], [21, 41, 101])} and "validation" in drawn["ylabel"]
    log("b", 0, [1, 100])                           # too few to draw: all arms by their training batches
    cost.curves(tmp_path, {"a": [dict(seed=0), dict(seed=2)], "b": [dict(seed=0)]})
    assert drawn["series"] == {arm: ([50, 100], [500, 1000]) for arm in "ab"} and "batch" in drawn["ylabel"]


def test_an_ablation_table_holds_the_arms_of_every_command_and_one_budget(tmp_path, story, capsys):
    def ablate(arm, **kw):
        h.ablate(h.Config(**{**SMALL, "device": "cpu", "data": story, "steps": 2, "params": 40_000,
                             "out": str(tmp_path), "words": ("backbone", arm), **kw}))
    ablate("swa", seeds=1)
    ablate("deltanet", seeds=2)
    rows = json.loads((tmp_path / "backbone/table.json").read_text())
    assert {arm: [r["seed"] for r in runs] for arm, runs in rows.items()} == dict(deltanet=[0, 1], swa=[0])
    assert rows["swa"][0]["val_bpb"] == rows_of(tmp_path / "backbone/swa/0", "eval")[-1]["val_bpb"]
    table = (tmp_path / "backbone/table.md").read_text()
    assert "| swa | 1 |" in table and "| deltanet | 2 |" in table and capsys.readouterr().out.endswith(table)
    with pytest.raises(h.run.UserError, match="another --out"):
        ablate("swa", seeds=1, steps=3)             # another budget does not enter the same table


def test_mistakes_are_one_line(tmp_path, story):
    for words, found in ((["train", "--variant", "hopp"], "did you mean 'hope'"),
                         (["ablate", "optimiser"], "did you mean"),
                         (["train", "--data", "/nowhere"], "no text"),
                         (["evaluate", str(tmp_path)], "no weights"),
                         (["train", "--cms-wiring", "nested"], "--cms context"),
                         (["train", "--inner", "dmgd"], "--boundary")):
        done = script(*words, "--out", str(tmp_path / "x"))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and found in done.stderr, done.stderr


def test_corpus_tokenizer_shard_validate_train_from_the_command_line(tmp_path, story):
    for words in (["corpus", "--data", story, "--min-english", "0.1", "--out", "c"],
                  ["tokenizer", "--data", "c", "--vocab", "300", "--out", "c"],
                  ["shard", "--data", "c", "--tokenizer", "c/tokenizer.json", "--length", "16", "--out", "s"],
                  ["validate", "--data", "s"], ["verify", "nothing"]):
        done = script(*words, cwd=tmp_path)
        assert done.returncode == (words[0] == "verify"), (words, done.stderr)
    assert json.loads((tmp_path / "c/counts.json").read_text())["story"]["kept"] == 1
    data = h.open_data(h.Config(data=str(tmp_path / "s"), vocab=300))
    assert data.batch((0, 1), range(2), 16).shape == (2, 17)
