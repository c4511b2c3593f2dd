"""HOPE and Titans language models: memories that are trained by the sequence they read.

Idea        A memory is a small MLP whose weights move inside the sequence, one gradient step a token, to map
            keys to values; the model around it is trained through those steps. HOPE lets memories produce
            their own keys, values, step sizes and targets, and follows them with MLPs that change at several
            slower clocks (CMS).
Paper       Nested Learning, arXiv:2512.24695 (HOPE, equations NL n); Titans, arXiv:2501.00663 (equations T n)
Reproduces  nothing at paper scale: that needs 30-100 B tokens.  Measured here: docs/hope_results.md
Run         1 CPU   python hope_lm.py --preset smoke                  20 s, loss falls
            1 CPU   python hope_lm.py --preset tiny --data ../shared/data/tinyshakespeare
            1 GPU   python hope_lm.py --preset pilot --data shards
            8 GPUs  torchrun --nproc_per_node=8 hope_lm.py --preset target --shard fsdp2 --data shards
Differs     head-wise memories (one small MLP a head) instead of full-width ones; values and memory inputs are
            l2-normalised (unnormalised ones diverge); gradients are 1/2|.|^2 everywhere
            (docs/hope.md has the list)

B sequences  T tokens  D width  H heads  M memories  C tokens of a chunk  K head width  V vocabulary
O, I rows out, in
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import run
from common.hope import corpus, cost, optim, sidecar, text
from common.hope.blocks import (Attention, Conv, DeltaNet, RMSNorm, SwiGLU, cut, detached, glue,
                                inverse_softplus, linear, log_sigmoid, nll, pairs, pieces, rates, rope,
                                stacked, sum_gates, teach_signal)
from common.run import opt
from common.hope.lesson import Lesson, Plan, Rule, SiLU, alone, apart, asks, shared, sides, summed
from common.hope.passes import rms_norm, unit
from common.hope.scan import advance, chunk_rule, decays, pick
from common.hope.synthetic import Task
from common.hope.text import BPE

# --- config ----------------------------------------------------------------------------------------

VARIANTS = ("hope", "hope_attention", "lmm", "mac", "mag", "mal", "gated_deltanet", "deltanet", "swa", "full")


@dataclass(frozen=True)
class Config:
    preset: str = opt("", "named settings, listed below")
    variant: str = opt("hope", "sequence mixer; full is Transformer++", VARIANTS)
    width: int = opt(256, "D")
    depth: int = opt(4, "blocks")
    heads: int = opt(4, "heads; each has its own memories of width D / heads")
    vocab: int = opt(256, "tokens; 256: bytes")
    params: int = opt(0, "size the feed-forward so that the model has this many parameters; 0: by --cms-mult")
    window: int = opt(64, "sliding attention: tokens visible")
    persistent: int = opt(4, "learned tokens that Titans and sliding attention always see")
    conv: int = opt(4, "taps of the causal convolution")
    chunk: int = opt(64, "tokens a write of the main memory (also MAC's segment and DeltaNet's block)")
    chunk_self: int = opt(64, "tokens a write of the memories that make k, v, eta, alpha")
    memory_width: float = opt(1.0, "hidden width of a memory over the head width")
    memory_depth: int = opt(2, "layers of a memory; 1: linear")
    adapt: str = opt("kvg", "HOPE: which of q, k, v, g (gates) are self-modified; empty: none")
    inner: str = opt("paper", "inner rule; paper: dgd_momentum in HOPE, momentum in Titans, gd in CMS",
                     ("paper", "gd", "momentum", "dgd", "dgd_momentum", "delta_momentum", "dmgd"))
    normal: str = opt("proximal", "inner step: eta/(1+eta|x|^2), eta/|x|^2 (eigenvalues to -1), or eta",
                      ("proximal", "unit", "none"))
    eta: float = opt(0.1, "inner step size at the start of training")
    inner_clip: float = opt(1.0, "cap of a token's inner gradient norm; 0: none")
    boundary: bool = opt(False, "read memories at the chunk's start (NL 90), not at each token")
    cms_levels: int = opt(4, "K; 0: a SwiGLU instead")
    cms_wiring: str = opt("sequential", "", ("sequential", "nested", "headwise"))
    cms: str = opt("outer", "what moves the levels: the optimizer's clock, the context, or every step",
                   ("outer", "context", "frozen"))
    cms_mlp: str = opt("silu", "a CMS level: W s(W x), or SwiGLU as in Transformer++", ("silu", "swiglu"))
    cms_mult: float = opt(4.0, "hidden width of a CMS level over D; SwiGLU: 2/3 of that")
    periods: tuple = opt((8, 32, 128, 512), "context clock: tokens a move, fastest first")
    outer_periods: tuple = opt((1, 1, 2, 4), "outer clock: optimizer steps a move")
    stack: str = opt("", "headwise CMS: a run of one level whose weights start every level here")
    cms_lr: float = opt(3e-4, "context clock: inner step size")
    through_writes: bool = opt(True, "context clock: gradients flow through the writes; off: first order")
    teach: str = opt("layer", "teach signal: true gradient at each level, or the head's for all",
                     ("layer", "global"))
    teach_scale: float = opt(0.1, "factor on the teach signal")
    teach_clip: float = opt(5.0, "cap of its norm per token; 0: none")
    surprise: str = opt("loss", "what the CMS gate weighs", ("loss", "delta", "entropy"))
    surprise_threshold: float = opt(0.0, "no write below this surprise (nats a token, or |M(k)-v|); 0: off")
    decay: bool = opt(True, "memories forget; off is the ablation")
    forget: str = opt("all", "decay and erasure act on the whole memory (NL 88, T 13) or on what was written",
                      ("all", "written"))
    remat: str = opt("none", "recompute activations in backward", ("none", "block", "chunk"))
    hidden_width: int = opt(0, "feed-forward hidden width; 0: from --cms-mult (CMS) or 8/3 D (SwiGLU)")
    # data
    data: str = opt("", "shard folder, text file or folder; empty: the standard library's sources")
    tokenizer: str = opt("", "tokenizer.json for raw text; empty: bytes")
    task: str = opt("text", "or a synthetic task with answers to score", ("text", "parity", "aa", "recall"))
    length: int = opt(512, "tokens of a row, T")
    curriculum: tuple = opt((), "lengths in equal shares of the run; tokens a step stay constant")
    batch: int = opt(8, "rows of --length a step, all ranks together")
    micro: int = opt(0, "rows of --length in one forward pass of one rank; 0: all")
    # optimization
    steps: int = opt(1000, "optimizer steps")
    optimizer: str = opt("muon", "muon: Muon hybrid; adamw: fused on CUDA; m3", ("muon", "adamw", "m3"))
    lr: float = opt(2e-3, "peak AdamW rate")
    matrix_lr: float = opt(0.02, "peak Muon rate (spectral units); M3's too")
    weight_decay: float = opt(0.1, "on matrices")
    warmup: float = opt(0.02, "share of the steps; cosine to a tenth after it")
    clip: float = opt(1.0, "gradient norm")
    teach_warmup: float = opt(0.01, "share of the steps over which the teach signal rises")
    teach_decay: float = opt(0.14, "share at the end over which it falls to 0")
    shard: str = opt("ddp", "what ranks share: nothing, optimizer state, or weights",
                     ("ddp", "zero1", "fsdp2"))
    bf16: bool = opt(True, "bfloat16 autocast where the GPU has it; memories stay float32")
    compile: bool = opt(False, "torch.compile the chunk body")
    # run
    seed: int = opt(0, "seed of weights and data order")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    out: str = opt("", "run directory")
    wandb: str = opt("", "W&B project")
    json: bool = opt(False, "plan: one JSON object")
    log_every: int = opt(10, "steps")
    eval_every: int = opt(100, "steps")
    eval_rows: int = opt(32, "validation rows in a training-time evaluation")
    save_every: int = opt(200, "steps")
    # commands
    words: tuple = opt((), "words after the command", positional=True, free=True)
    prompt: str = opt("def ", "sample: text to continue", free=True)
    tokens: int = opt(200, "sample: tokens to write", free=True)
    temperature: float = opt(0.8, "sample: 0 takes the likeliest", free=True)
    seeds: int = opt(3, "ablate: seeds an arm", free=True)
    eval_length: int = opt(0, "evaluate: tokens of a row; 0: as trained", free=True)
    min_english: float = opt(0.85, "corpus: smallest P(English)", free=True)
    limit: int = opt(0, "corpus: documents read of a source; 0: all", free=True)
    strict: bool = opt(False, "verify: config, tokenizer, data and RNG too", free=True)

    @property
    def levels(self):
        return self.cms_levels if self.variant.startswith("hope") else 0

    @property
    def out_std(self):
        return 0.02 / math.sqrt(2 * self.depth)

    @property
    def hidden(self):
        if self.hidden_width or not self.levels:
            return self.hidden_width or 8 * round(self.width / 3)
        return int(self.cms_mult * self.width * 2 / self.matrices)

    @property
    def matrices(self):
        """Weight matrices of a CMS level, or of the SwiGLU in its place."""
        return 2 if self.levels and self.cms_mlp == "silu" else 3


PAPER760, PAPER13 = "NL table 2, 760 M / 30 B tokens", "NL table 2, 1.3 B / 100 B tokens"
PRESETS = {
    "smoke": dict(paper="-", set=dict(width=32, depth=2, heads=2, length=64, batch=4, steps=20, chunk=16,
                                      chunk_self=16, eval_every=10, eval_rows=4, save_every=10, log_every=5)),
    "tiny": dict(paper="-", set=dict(width=192, depth=4, heads=3, params=4_000_000, length=256, batch=16,
                                     steps=1500, chunk=32, chunk_self=32, cms_levels=2)),
    "parity": dict(paper="NL tables 3-5, state tracking; also --task aa", goal=dict(accuracy=0.99),
                   set=dict(task="parity", vocab=64, width=32, depth=1, heads=1, length=32, batch=32,
                            steps=200, normal="unit", inner="dgd", eta=1.9, memory_depth=1, cms_levels=1,
                            adapt="g", chunk=8, chunk_self=8, decay=False, eval_every=200, eval_rows=64)),
    "cms_sparse": dict(paper="sparse-chunk ablation, below 49 GB", set=dict(
        width=384, depth=8, heads=6, vocab=32_000, length=1024, batch=2, cms="context", through_writes=False,
        optimizer="adamw", lr=2.5e-4, steps=5000)),
    "pilot": dict(paper="160 M / 3 B tokens; no published row", set=dict(
        width=512, depth=12, heads=8, vocab=32_000, params=160_000_000, length=2048, batch=256, micro=4,
        steps=5_700, surprise_threshold=0.02, warmup=0.01, lr=1e-3, seed=1337, save_every=500)),
    "mid": dict(paper=PAPER760, expect=dict(wiki_ppl=18.68, mean_acc=52.28), set=dict(
        width=1024, depth=24, heads=16, vocab=32_000, params=760_000_000, length=4096, batch=128, micro=2,
        steps=57_000, warmup=0.01, lr=6e-4, remat="block", shard="zero1", compile=True, seed=808,
        save_every=500)),
    "target": dict(paper=PAPER13, expect=dict(wiki_ppl=14.39, mean_acc=58.04), set=dict(
        width=1536, depth=32, heads=24, vocab=32_000, params=1_300_000_000, length=8192,
        curriculum=(2048, 4096, 8192), batch=64, micro=1, steps=190_000, warmup=0.01, lr=4e-4, remat="block",
        shard="fsdp2", compile=True, seed=9001, save_every=500)),
}


# --- memory: an MLP whose weights are the state ----------------------------------------------------


def recall(Ws, z):
    """W_n s(... s(W_1 z)), s = SiLU -> (outputs W x of each layer, its inputs x, slopes s' between them)."""
    outputs, inputs, slopes = [shared(Ws[0], z)], [z], []
    for W in Ws[1:]:
        x, slope = SiLU.apply(outputs[-1])
        inputs.append(x)
        slopes.append(slope)
        outputs.append(x @ W.mT)
    return outputs, inputs, slopes


def answer(Ws, z, residual):
    """M(z) = [z +] W_n s(... s(W_1 z))."""
    y = shared(Ws[0], z)
    for W in Ws[1:]:
        y = F.silu(y) @ W.mT
    return z + y if residual else y


def surprise(Ws, slopes, error):
    """Gradient rows of 1/2 |M(k) - v|^2 at each layer's output, by hand: error = M(k) - v at the last."""
    rows = [error]
    for W, slope in zip(reversed(Ws[1:]), reversed(slopes)):
        rows.insert(0, (rows[0] @ W) * slope)
    return rows


def learn(plan, base, Ws, Ss, k, v, eta, log_keep, log_mom, q):
    """One chunk of the life of a family -> (Ws, Ss, M(q) rows or None, gates: which memories wrote).

    Ws, Ss: as in a Family's state; k, v, q: [B,H,1,C,K]; eta, log_keep, log_mom: [B,H,1,C] (log_mom None: no
    momentum).  q asks the last memory of the first group.  All gradients stand at the chunk's first weights
    (NL 90).  base [1,H,..]: initial weights of which Ws is the difference (--forget written), else None.
    """
    rule, now = plan.rule, Ws if base is None else [W + W0 for W, W0 in zip(Ws, base)]
    # recall() and surprise() with their backward; in layer 1 all memories have the same input k
    Wk, w, step, gram, *made, gates = Lesson.apply(plan, k, v, eta, *now)
    layers = [(k, Wk, w, step, gram), *(made[i:i + 5] for i in range(0, len(made), 5))]
    depth, shut = plan.depth(Ws), sides(plan, gates, plan.depth(Ws))
    early, late = (q is not None and not rule.boundary and rule.before == when for when in (True, False))
    rates = decays(log_keep, log_mom, rule.delta or early, late) if rule.kind == "scan" else None
    W_new, S_new, h = [], [], q if early or late else None
    for i, (W, S, (x, Wx, w, step, gram)) in enumerate(zip(Ws, Ss, layers)):
        if rule.kind != "scan":
            W, S = summed(plan, W, S, x, w, log_keep, log_mom, wide=i == 0)
        else:
            part, z = asks(plan, i), (F.silu(h) if i else h) if i < depth and h is not None else None
            W, S, out = advance(W, S, x, w, step if rule.delta else None, rates,
                                Wx if base is None else None, z, late, gram, shut[i], part)
            if z is not None:
                h = out if base is None else out + z @ pick(base[i], part, -2).mT
        W_new.append(W)
        S_new.append(S)
    if q is not None:
        add = plan.groups[0][2]
        h = answer(alone(plan, now)[1], q, add) if rule.boundary else q + h if add else h
    return W_new, S_new, h, gates


class Memory(nn.Module):
    """`count` MLP memories a head.  The parameters are initial states: the outer loop learns them."""

    def __init__(self, cfg, count=1, scalar=False, residual=True):
        super().__init__()
        K = cfg.width // cfg.heads
        hidden = max(1, int(cfg.memory_width * K) // (4 if scalar else 1))  # a scalar needs fewer features
        self.sizes = [K] + [hidden] * (cfg.memory_depth - 1) + [1 if scalar else K]
        self.count, self.residual, sizes = count, residual, zip(self.sizes, self.sizes[1:])
        self.layers = nn.ParameterList(torch.randn(cfg.heads, count, o, i) for i, o in sizes)
        with torch.no_grad():                       # keys are unit vectors: unit rows keep s() in its range
            for W in self.layers[:-1]:
                W.mul_(0.5)
            self.layers[-1].mul_(0.02)              # near the identity (residual) or near zero


class Family:
    """Memories that learn the same rows: one pass over a chunk teaches all.  q asks the last of the first.

    A state is (Ws, Ss, rows of the unfinished chunk, [gates open, gates seen]).  Ws: layer 1 of all memories,
    one wide [B,H,1,O,I]; then, kind by kind, deeper layers stacked [B,H,M,O,I]; --forget written: of all of
    them the difference from the initial weights.
    """

    def __init__(self, cfg, chunk, rule, *members, own_target=True):
        kinds = itertools.groupby(members, lambda m: (m.sizes, m.residual))
        self.chunk, self.groups = chunk, [list(group) for _, group in kinds]
        rule = rule if rule.kind == "scan" else rule._replace(normal="none", clip=0.0)
        groups = ((sum(m.count for m in g), g[0].sizes[1], g[0].residual) for g in self.groups)
        self.plan = Plan(tuple(groups), rule, own_target)
        self.remat, self.written, self.body = cfg.remat == "chunk", cfg.forget == "written", learn

    def initial(self):
        """The memories as parameters have them, laid out as a state's Ws: [1,H,1,O,I], [1,H,M,O,I], ..."""
        wide = torch.cat([m.layers[0].flatten(1, 2) for g in self.groups for m in g], 1)[:, None]
        Ws = [wide] + [torch.cat(Ws, 1) for g in self.groups for Ws in zip(*(m.layers[1:] for m in g))]
        return [(W if W.dtype == torch.float64 else W.float())[None] for W in Ws]

    def start(self, B):
        Ws = [W.expand(B, *W.shape[1:]).contiguous() for W in self.initial()]
        Ws = [torch.zeros_like(W) for W in Ws] if self.written else Ws
        return Ws, [None] * len(Ws), None, [0.0, 0]

    def weights(self, Ws):
        return [W + W0 for W, W0 in zip(Ws, self.initial())] if self.written else Ws

    def recall(self, state, asked):
        """What memories answer as they stand: {memory: z [B,H,M or 1,C,K]} -> {memory: M(z)}."""
        (wide, *deep), depth = self.weights(state[0]), self.plan.depth(state[0])
        wide = iter(wide.split([m.count * m.sizes[1] for g in self.groups for m in g], 3))
        deep, said = iter(deep), {}
        for group in self.groups:
            stacks = [V.split([m.count for m in group], 2) for V in itertools.islice(deep, depth - 1)]
            for i, m in enumerate(group):
                Ws = [apart(next(wide), m.count, 3), *(stack[i] for stack in stacks)]
                if m in asked:
                    said[m] = answer(Ws, asked[m], m.residual)
        return said

    def room(self, state):
        """Tokens until the next write."""
        return self.chunk - (0 if state[2] is None else state[2][1].shape[-2])

    def scan(self, state, *rows, over=False):
        """Rows (q or None, k, v, eta, log_keep, log_mom or None) of any length -> (M(q) rows or None, state).

        over: nothing continues this context, so a write after its last token is left out.
        """
        Ws, Ss, held, gates = state
        new = rows[1].shape[-2]
        if held is not None:
            rows = [None if r is None else torch.cat([h, r], 3) for h, r in zip(held, rows)]
        outs, held = [], None
        parts = list(zip(*(itertools.repeat(None) if r is None else r.split(self.chunk, 3) for r in rows)))
        for i, part in enumerate(parts):
            if part[1].shape[3] == self.chunk and not (over and i == len(parts) - 1):
                Ws, Ss, out, gate = self._chunk(Ws, Ss, part)
                gates = self.count(gates, gate)
            else:
                held, out = part, None
                if part[0] is not None:             # nothing is written: ask the one memory alone
                    out = self._ask(Ws, Ss, part)
            outs.append(out)
        out = torch.cat(outs, 3)[..., -new:, :] if rows[0] is not None else None
        return out, (Ws, Ss, held, gates)

    def flush(self, state):
        """Write the unfinished chunk too: the end of a context that is to be remembered."""
        Ws, Ss, held, gates = state
        if held is None:
            return state
        Ws, Ss, _, gate = self._chunk(Ws, Ss, [None, *held[1:]])
        return Ws, Ss, None, self.count(gates, gate)

    def count(self, gates, gate):
        n = sum(m.count for group in self.groups for m in group)
        return [gates[0] + gate.mean() * n, gates[1] + n]

    def _ask(self, Ws, Ss, part):
        if self.plan.rule.boundary:
            return answer(alone(self.plan, self.weights(Ws))[1], part[0], self.plan.groups[0][2])
        return self._chunk(Ws, Ss, part, one=True)[2]

    def _chunk(self, Ws, Ss, part, one=False):
        (q, *rows), plan, base = part, self.plan, self.initial() if self.written else None
        if one:
            plan, Ws, Ss, base = alone(plan, Ws, Ss, base)
        args = (plan, base, Ws, Ss, *rows, q)
        if self.remat and self.groups[0][0].training:
            return checkpoint(self.body, *args, use_reentrant=False)
        return (self.body if torch.is_grad_enabled() else learn)(*args)     # --compile is for training


# --- model: sequence mixers ------------------------------------------------------------------------
#
# Every mixer maps (x [B,T,D], state dict) -> (y [B,T,D], state dict).  An empty state is a fresh context, a
# returned one continues it: training, scoring, sampling and memorising are the same forward pass.


def inner_rule(cfg, paper, before=False):
    """--inner as a Rule; `paper` is the rule of the variant's own paper."""
    name = paper if cfg.inner == "paper" else cfg.inner
    return Rule(delta="dgd" in name, momentum="momentum" in name or name == "dmgd",
                kind=name if name in ("delta_momentum", "dmgd") else "scan", normal=cfg.normal,
                clip=cfg.inner_clip, threshold=cfg.surprise_threshold, before=before, boundary=cfg.boundary)


class Titans(nn.Module):
    """Titans (LMM): fixed projections make q, k, v; M learns M(k) = v, with momentum, forgetting (T 9-15)."""

    def __init__(self, cfg, persistent, gate=True):
        super().__init__()
        D, H = cfg.width, cfg.heads
        self.heads, self.decay = H, float(cfg.decay)        # 0: nothing is forgotten, the ablation
        self.qkv, self.conv, self.rate = linear(D, 3 * D), Conv(3 * D, cfg.conv), linear(D, 3 * H)
        self.open = linear(D, D) if gate else None
        self.norm, self.out = RMSNorm(D // H), linear(D, D, cfg.out_std)
        bias = torch.tensor([inverse_softplus(cfg.eta), 4.5, 0.0])      # theta, forgetting, momentum
        self.bias = nn.Parameter(bias[:, None, None].repeat(1, H, 1))
        self.persistent = nn.Parameter(torch.randn(persistent, D) * 0.02) if persistent else None
        self.memory = Memory(cfg, residual=False)
        self.family = Family(cfg, cfg.chunk, inner_rule(cfg, "momentum"), self.memory, own_target=False)

    def scan(self, x, state):
        """Write x into the memory and read it back, token by token -> ([B, T, D], state)."""
        c, tail = self.conv(self.qkv(x), state.get("tail"))
        q, k, v = (cut(p, self.heads) for p in F.silu(c).chunk(3, -1))
        theta, keep, mom = (r + b[:, None] for r, b in zip(rates(self.rate, x, 3), self.bias))
        with torch.autocast(x.device.type, enabled=False):
            fast = state["family"] if "family" in state else self.family.start(len(x))
            o, fast = self.family.scan(fast, unit(q), unit(k), v, F.softplus(theta),
                                       log_sigmoid(keep) * self.decay,
                                       log_sigmoid(mom) if self.family.plan.rule.momentum else None,
                                       over=state.get("over", False))
        return glue(self.norm(o)).to(x.dtype), dict(tail=tail, family=fast)

    def forward(self, x, state):
        n = 0
        if "family" not in state and self.persistent is not None:   # the fixed tokens of [P; x] come first
            x, n = torch.cat([self.persistent.to(x.dtype).expand(len(x), -1, -1), x], 1), len(self.persistent)
        y, state = self.scan(x, state)
        return self.out(y[:, n:] * F.silu(self.open(x[:, n:]))), state


class MAC(nn.Module):
    """Memory as context: attention over [P; M(s W_Q); s] in a segment, y * M(y) after writing y (T 21-25).
    The product is MAG's gate (T 4.2); attention has a residual (T 4.4): untrained, it is one mean for all."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.heads = cfg.heads
        self.qkv, self.query = linear(D, 3 * D), linear(D, D)
        self.persistent = nn.Parameter(torch.randn(cfg.persistent, D) * 0.02)
        self.norm, self.core = RMSNorm(D), Titans(cfg, 0, gate=False)

    def forward(self, x, state):
        memory, family, outs, lo = self.core.memory, self.core.family, [], 0
        core, cache = state.get("core") or dict(tail=None, family=family.start(len(x))), state.get("cache")
        while lo < x.shape[1]:                              # segments end where the memory writes
            s = x[:, lo:lo + family.room(core["family"])]
            with torch.autocast(x.device.type, enabled=False):
                asked = {memory: unit(cut(self.query(s), self.heads))}
                h = family.recall(core["family"], asked)[memory]
            y, cache = self._attend(s, glue(h).to(x.dtype), cache)
            y = self.norm(s + y)
            m, core = self.core.scan(y, core)               # m is normalised there
            outs.append(self.core.out(F.silu(y) * F.silu(m)))
            cache = None if family.room(core["family"]) == family.chunk else cache
            lo += s.shape[1]
        return torch.cat(outs, 1), dict(core=core, cache=cache)

    def _attend(self, s, h, cache):
        """Token t of the segment sees P, h_1..t and s_1..t."""
        B, n, D = s.shape
        past = 0 if cache is None else cache[0].shape[2]
        split = lambda part: part.view(B, part.shape[1], self.heads, -1).transpose(1, 2)  # noqa: E731
        q, ks, vs = (split(p) for p in self.qkv(s).chunk(3, -1))
        _, kh, vh = (split(p) for p in self.qkv(h).chunk(3, -1))
        _, kp, vp = (split(p) for p in self.qkv(self.persistent.to(s.dtype).expand(B, -1, -1)).chunk(3, -1))
        new = rope(ks, past), vs, rope(kh, past), vh
        ks, vs, kh, vh = new if cache is None else (torch.cat(pair, 2) for pair in zip(cache, new))
        causal = torch.ones(n, past + n, dtype=torch.bool, device=s.device).tril(past)
        seen = torch.cat([causal.new_ones(n, kp.shape[2]), causal, causal], 1)
        y = F.scaled_dot_product_attention(rope(q, past), torch.cat([kp, kh, ks], 2),
                                           torch.cat([vp, vh, vs], 2), seen)
        return y.transpose(1, 2).reshape(B, n, D), (ks, vs, kh, vh)


class MAG(nn.Module):
    """Memory as gate: sliding-window attention and memory, multiplied after norm and SiLU (T 26-28)."""

    def __init__(self, cfg):
        super().__init__()
        self.attention, self.memory = sliding(cfg), Titans(cfg, cfg.persistent)
        self.norms = nn.ModuleList([RMSNorm(cfg.width), RMSNorm(cfg.width)])
        self.out = linear(cfg.width, cfg.width, cfg.out_std)

    def forward(self, x, state):
        y, a = self.attention(x, state.get("attention", {}))
        m, b = self.memory(x, state.get("memory", {}))
        return self.out(F.silu(self.norms[0](y)) * F.silu(self.norms[1](m))), dict(attention=a, memory=b)


class MAL(nn.Module):
    """Memory as layer: the memory first, sliding-window attention over what it returns (T 29-31)."""

    def __init__(self, cfg):
        super().__init__()
        self.memory, self.norm = Titans(cfg, cfg.persistent), RMSNorm(cfg.width)
        self.attention = sliding(cfg)

    def forward(self, x, state):
        m, b = self.memory(x, state.get("memory", {}))
        y, a = self.attention(self.norm(x + m), state.get("attention", {}))
        return m + y, dict(attention=a, memory=b)


class Hope(nn.Module):
    """Self-modifying Titans (NL 83-97): memories make k, v, eta, alpha, their own targets, and the answer.

    --adapt names the maps that are memories: k, v, q and g (the gates eta and alpha); the rest stay slow.
    """

    def __init__(self, cfg):
        super().__init__()
        D, H = cfg.width, cfg.heads
        self.heads, self.names = H, [n for n in "qkv" if n in cfg.adapt]
        self.conv, self.mix = Conv(D, cfg.conv), linear(D, (3 + ("g" in cfg.adapt)) * D)    # q, k, v, gates
        rule = inner_rule(cfg, "dgd_momentum", before=True)
        # --normal unit lets a write reflect what it finds along k.  Only the answer may turn over: a map of k
        # or of eta that is reflected by its own writes is another map after every odd number of them.
        steady = rule._replace(normal="proximal") if rule.normal == "unit" else rule
        self.rate = linear(D, H, bias=True) if rule.momentum else None
        self.maps = Memory(cfg, len(self.names)) if self.names else None
        self.gates, self.slow_gates = None, linear(D, 2 * H)
        if "g" in cfg.adapt:
            self.gates, self.slow_gates = Memory(cfg, 2, scalar=True, residual=False), None
        # unit: a step of exactly 0 or 2 must be in reach; 1.98 multiplies by -0.98 and fades with length
        self.hard = cfg.normal == "unit"
        bias = torch.tensor([cfg.eta if self.hard else inverse_softplus(cfg.eta), 4.5])     # alpha: 0.99
        self.bias = nn.Parameter(bias[:, None, None, None].repeat(1, H, 1, 1))
        self.store = Memory(cfg)
        makers = [m for m in (self.maps, self.gates) if m is not None]
        if not makers or (cfg.chunk, rule) == (cfg.chunk_self, steady):     # all learn the same rows alike
            members = [m for m in (self.maps, self.store, self.gates) if m is not None]
            self.family, self.answers = Family(cfg, cfg.chunk, rule, *members), None
        else:
            self.family = Family(cfg, cfg.chunk_self, steady, *makers)
            self.answers = Family(cfg, cfg.chunk, rule, self.store)
        self.open, self.norm, self.out = linear(D, D), RMSNorm(D // H), linear(D, D, cfg.out_std)
        self.decay = float(cfg.decay)

    def forward(self, x, state):
        B, T = x.shape[:2]
        c, tail = self.conv(x, state.get("tail"))
        c = F.silu(c)
        z = unit(cut(self.mix(c), self.heads, self.mix.out_features // self.mix.in_features))   # M: 3 or 4
        log_mom = log_sigmoid(rates(self.rate, c, 1)[0]) if self.rate is not None else None
        slow = None if self.slow_gates is None else torch.cat(rates(self.slow_gates, c, 2), 2)
        fast, answers = state.get("family") or self.family.start(B), state.get("answers")
        over = state.get("over", False)
        with torch.autocast(x.device.type, enabled=False):
            o, rows, fast = self._generate(z, slow, log_mom, fast, over)
            if self.answers is not None:
                o, answers = self.answers.scan(answers or self.answers.start(B), *rows, log_mom, over=over)
        y = glue(self.norm(o)).to(x.dtype) * F.silu(self.open(c))
        return self.out(y), dict(tail=tail, family=fast, answers=answers)

    def _generate(self, z, slow, log_mom, fast, over):
        """q, k, v, eta, log alpha of all tokens from the memories at their last boundary; these learn too.

        -> (M(q) rows where the store is one of the family, else None; the rows otherwise; state)
        """
        family, index, made, outs = self.family, ["qkv".index(n) for n in self.names], [], []
        sizes = [z.shape[3]] if not self.maps and not self.gates else \
            pieces(z.shape[3], family.room(fast), family.chunk)
        cutting = [[None] * len(sizes) if t is None else t.split(sizes, 3) for t in (z, slow, log_mom)]
        for i, (part, raw, mom) in enumerate(zip(*cutting)):
            rows = dict(zip("qkvg", part.split(1, 2)))
            asked = {m: z for m, z in ((self.maps, part[:, :, index]), (self.gates, rows.get("g"))) if m}
            said = family.recall(fast, asked)
            if self.maps is not None:
                rows.update(zip(self.names, unit(said[self.maps]).split(1, 2)))
            raw = raw if self.gates is None else said[self.gates][..., 0]
            eta, keep = (r + b for r, b in zip(raw.split(1, 2), self.bias))
            eta = eta.clamp(0.0, 2.0) if self.hard else F.softplus(eta)
            row = rows["q"], rows["k"], rows["v"], eta, log_sigmoid(keep) * self.decay
            q = rows["q"] if self.answers is None else None
            out, fast = family.scan(fast, q, *row[1:], mom, over=over and i == len(sizes) - 1)
            outs.append(out)
            made.append(row)
        if self.answers is None:
            return torch.cat(outs, 3), None, fast
        return None, [torch.cat(parts, 3) for parts in zip(*made)], fast


# --- model: feed-forward, blocks -------------------------------------------------------------------


class CMS(nn.Module):
    """Continuum memory: MLPs with slower and slower clocks (NL 70-74), fastest first.

    outer and frozen: ordinary weights (`outer`: train() steps level i every outer_periods[i] steps).
    context: every sequence has its own copy, moved after each period tokens by the summed gradient of its own
    loss (teach()).
    sequential: y <- y + f_i(norm y) along the chain; headwise: a learned sum; nested: sequential, and
    whenever a slower level moves, the next faster one restarts from an initial state that moves at the slower
    clock.
    """

    def __init__(self, cfg):
        super().__init__()
        D, h = cfg.width, cfg.hidden
        self.cfg, self.wiring, self.periods = cfg, cfg.cms_wiring, cfg.periods[:cfg.levels]
        shapes = [(h, D, 0.02), (D, h, cfg.out_std), (h, D, 0.02)][:cfg.matrices]
        level = lambda: [torch.randn(o, i) * std for o, i, std in shapes]       # noqa: E731
        self.levels = nn.ModuleList(nn.ParameterList(level()) for _ in range(cfg.levels))
        self.mix = nn.Parameter(torch.ones(cfg.levels)) if self.wiring == "headwise" else None

    def start(self, B):
        """Fast weights of a fresh context: per level weights, momenta, rows of the period, (nested) start."""
        fresh = [[W.expand(B, *W.shape) for W in level] for level in self.levels]
        return [dict(W=Ws, S=[None] * len(Ws), start=Ws, rows=[], slow=[], updates=0) for Ws in fresh]

    def forward(self, x, fast=None):
        """-> y, taps: per level (input rows, output) of this call when there are fast weights to teach."""
        taps, total = [], x
        for i, level in enumerate(self.levels):
            W_in, W_out, *W_gate = level if fast is None else fast[i]["W"]
            n = rms_norm(x if self.mix is None else total)
            y = F.silu(n @ W_in.mT)
            y = (y * (n @ W_gate[0].mT) if W_gate else y) @ W_out.mT
            taps.append((n, y))
            x = x + (y if self.mix is None else self.mix[i] * y)
        return x, taps

    def collect(self, fast, taps, deltas, surprise_B):
        """Keep the (input, delta, surprise) rows of a segment that has been scored.

        deltas: per level, gradient of the summed token loss at its output [B, n, D]; surprise_B: what the
        gate weighs.
        """
        return [dict(level, rows=level["rows"] + [(n, delta, surprise_B)])
                for level, (n, _), delta in zip(fast, taps, deltas)]

    def move(self, fast, end):
        """Move every level whose period is over at token `end` (0: all) -> fast, (gates open, gates seen)."""
        opened, seen, fast = 0.0, 0, [dict(level) for level in fast]
        for i, level in enumerate(fast):
            if end % self.periods[i] or not level["rows"]:
                continue
            gate = torch.stack([s for _, _, s in level["rows"]]).mean(0) >= self.cfg.surprise_threshold
            opened, seen = opened + gate.float().mean(), seen + 1
            x, delta = (torch.cat([row[j] for row in level["rows"]], 1) for j in (0, 1))
            delta = delta * gate[:, None, None]
            W, S = self._write(level["W"], level["S"], x, delta)
            level.update(W=W, S=S, rows=[], updates=level["updates"] + 1)
            if self.wiring == "nested" and i + 1 < len(fast):
                level["slow"] = level["slow"] + [(x, delta)]
                if end % self.periods[i + 1] == 0:  # the next slower level moves now too: restart below it
                    x, delta = (torch.cat([row[j] for row in level["slow"]], 1) for j in (0, 1))
                    start = self._write(level["start"], [None] * len(W), x, delta)[0]
                    level.update(W=start, S=[None] * len(W), start=start, slow=[])
        return fast, (opened, seen)

    def _write(self, Ws, Ss, x, delta):
        """A write of rows (x, delta), inner rule at keep = 1: W <- W - lr sum_t delta_t x_t^T (NL 71)."""
        rule = inner_rule(self.cfg, "gd")
        through = (lambda t: t) if self.cfg.through_writes else torch.Tensor.detach
        x, (W_in, W_out, *W_gate) = through(x), map(through, Ws)
        _, inputs, slopes = recall([W_in, W_out], x)
        grads = [] if W_gate else surprise([W_in, W_out], slopes, delta)
        if W_gate:                                          # y = W_out (s(W_in x) * W_gate x)
            s, gate, back = inputs[1], x @ W_gate[0].mT, delta @ W_out
            inputs, grads = [x, s * gate, x], [back * gate * slopes[0], delta, back * s]
        one, moved = x.new_zeros(x.shape[:2]), []
        mom = one + math.log(0.9) if rule.momentum else None
        for W, S, row, g in zip(Ws, Ss, inputs, grads):
            eta = one + self.cfg.cms_lr
            if rule.kind != "scan":
                moved.append(chunk_rule(rule.kind, W, S, (eta[..., None] * g).mT @ row, one[:, 0] + 1, mom))
                continue
            step = eta / (1 + eta * row.square().sum(-1)) if rule.delta else eta
            moved.append(advance(W, S, row, -step[..., None] * g, step if rule.delta else None,
                                 decays(one, mom, rule.delta, False))[:2])
        return [W for W, _ in moved], [S for _, S in moved]


def sliding(cfg):
    return Attention(cfg.width, cfg.heads, cfg.out_std, cfg.window, cfg.persistent)


MIXERS = dict(full=lambda cfg: Attention(cfg.width, cfg.heads, cfg.out_std), swa=sliding,
              deltanet=lambda cfg: DeltaNet(cfg.width, cfg.heads, cfg.out_std, False, cfg.chunk, cfg.conv),
              gated_deltanet=lambda cfg: DeltaNet(cfg.width, cfg.heads, cfg.out_std, True, cfg.chunk,
                                                  cfg.conv),
              lmm=lambda cfg: Titans(cfg, cfg.persistent), mac=MAC, mag=MAG, mal=MAL,
              hope=Hope, hope_attention=lambda cfg: Attention(cfg.width, cfg.heads, cfg.out_std))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm, self.mixer = RMSNorm(cfg.width), MIXERS[cfg.variant](cfg)
        self.cms = CMS(cfg) if cfg.levels else None
        self.ffn_norm = None if cfg.levels else RMSNorm(cfg.width)
        self.ffn = None if cfg.levels else SwiGLU(cfg.width, cfg.hidden, cfg.out_std)

    def forward(self, x, state):
        y, mixed = self.mixer(self.norm(x), state.get("mixer", {}))
        x, fast, taps = x + y, state.get("fast"), None
        if self.cms is not None:
            x, taps = self.cms(x, fast)
        else:
            x = x + self.ffn(self.ffn_norm(x))
        return x, dict(mixer=mixed, fast=fast, taps=taps if fast is not None else None)


class LM(nn.Module):
    """Embedding, blocks, norm, tied head.  net(tokens) -> logits; net(tokens, state) -> (logits, state)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.teach_scale = cfg, cfg.teach_scale
        self.embed = nn.Parameter(torch.randn(cfg.vocab, cfg.width) * 0.02)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.width)

    def fresh(self, B):
        """A new context for B sequences: every memory at its initial state."""
        fast = self.cfg.cms == "context" and self.cfg.levels > 0
        return dict(at=0, blocks=[dict(fast=block.cms.start(B)) if fast else {} for block in self.blocks])

    def forward(self, tokens_BT, state=None):
        x, blocks = F.embedding(tokens_BT, self.embed), []
        for i, block in enumerate(self.blocks):
            past = dict(mixer=dict(over=True)) if state is None else state["blocks"][i]  # over: no more comes
            again = self.cfg.remat == "block" and self.training
            x, new = checkpoint(block, x, past, use_reentrant=False) if again else block(x, past)
            blocks.append(new)
        logits_BTV = F.linear(self.norm(x), self.embed)
        if state is None:
            self.gates = sum_gates(blocks)
            return logits_BTV
        return logits_BTV, dict(at=state["at"] + tokens_BT.shape[1], blocks=blocks)

    def score(self, tokens_BT, target_BT, state=None):
        """Loss in nats of every target (-1: none, 0 nats) -> (nll_BT, state, info).

        Under --cms context the sequence is taken segment by segment; a segment is scored before the memories
        learn from it.  state: continue a context (None: fresh).
        """
        if self.cfg.cms != "context" or not self.cfg.levels:
            logits, state = (self(tokens_BT), None) if state is None else self(tokens_BT, state)
            return nll(logits, target_BT), state, dict(gates=getattr(self, "gates", (0.0, 0)))
        state, parts, lo = state or self.fresh(len(tokens_BT)), [], 0
        period = min(self.cfg.periods[:self.cfg.levels])
        info = dict(gates=[0.0, 0], teach=0.0)
        while lo < tokens_BT.shape[1]:
            at = slice(lo, lo + period - state["at"] % period)
            grad = torch.is_grad_enabled()
            with torch.enable_grad():
                logits, state = self(tokens_BT[:, at], state)
                part = nll(logits, target_BT[:, at])
                state = self.teach(state, logits, target_BT[:, at], part, info)
            if not grad:
                state, part = detached(state), part.detach()
            parts.append(part)
            lo = at.stop
        return torch.cat(parts, 1), state, info

    def teach(self, state, logits, target, part, info):
        """Give a CMS level its teach signal: dL/d(level output) or the head's (softmax - onehot) W for all.

        L sums over tokens: signal and gate do not depend on batch or length.  Clipped per token, then scaled.
        """
        cfg, blocks = self.cfg, state["blocks"]
        ys = [y for block in blocks for _, y in block["taps"]]
        if cfg.teach == "layer":
            deltas = torch.autograd.grad(part.sum(), ys, retain_graph=True)
        else:
            deltas = [teach_signal(logits, target, self.embed)] * len(ys)
        deltas = [self.teach_scale * d for d in deltas]
        sizes = [d.norm(dim=-1, keepdim=True) for d in deltas]
        if cfg.teach_clip:
            deltas = [d * (cfg.teach_clip / n.clamp(min=cfg.teach_clip)) for d, n in zip(deltas, sizes)]
        supervised = (target >= 0).sum(1).clamp(min=1)
        how_surprising = dict(loss=lambda: part.detach().sum(1) / supervised,
                              entropy=lambda: torch.special.entr(logits.detach().softmax(-1)).sum(-1).mean(1),
                              delta=lambda: torch.stack(sizes).mean((0, 2, 3)))
        surprise_B = how_surprising[cfg.surprise]()
        info["teach"] = torch.stack(sizes).mean().detach()
        moved, K = [], cfg.levels
        for i, (block, module) in enumerate(zip(blocks, self.blocks)):
            fast = module.cms.collect(block["fast"], block["taps"], deltas[i * K:(i + 1) * K], surprise_B)
            fast, (opened, seen) = module.cms.move(fast, state["at"])
            info["gates"] = [info["gates"][0] + opened, info["gates"][1] + seen]
            moved.append(dict(block, fast=fast, taps=None))
        return dict(state, blocks=moved)

    def remember(self, state, paths=("titan", "cms")):
        """What a context leaves behind: fast weights (unfinished chunks written), no caches or positions."""
        blocks = []
        for block, past in zip(self.blocks, state["blocks"]):
            kept = dict(mixer=fast_weights(block.mixer, past["mixer"])) if "titan" in paths else {}
            if past.get("fast") is not None:
                fast = past["fast"]
                fresh = block.cms.start(len(fast[0]["W"][0]))
                kept["fast"] = block.cms.move(fast, 0)[0] if "cms" in paths else fresh
            blocks.append(kept)
        return dict(at=0, blocks=blocks)


def fast_weights(module, state):
    """The memory part of a mixer's state; a state's keys are the names of the mixer's parts."""
    kept = {}
    for key, value in state.items():
        part = getattr(module, key, None)
        if isinstance(part, Family):
            kept[key] = part.flush(value)
        elif key == "memory" and torch.is_tensor(value):
            kept[key] = value
        elif isinstance(value, dict) and fast_weights(part, value):
            kept[key] = fast_weights(part, value)
    return kept


def families(net):
    return [f for module in net.modules() for f in vars(module).values() if isinstance(f, Family)]


def compiled(net):
    """--compile: the life of a chunk as one graph (minutes, once), on a CPU without Python in between."""
    cpu = next(net.parameters()).device.type == "cpu"
    body = torch.compile(learn, options=dict(cpp_wrapper=True) if cpu else None)
    for family in families(net):
        family.body = body


def build(cfg):
    """The model of a Config; --params sizes the feed-forward to that many parameters (within 1%)."""
    return LM(sized(cfg))


def stack(net, folder):
    """Start every level at the one MLP of a trained run (NL 7.3): at first the same function."""
    source, saved = load_run(folder)
    if saved.cms_levels != 1 or net.cfg.cms_wiring != "headwise":
        raise run.UserError(f"--stack {folder}: needs a run of one level, and --cms-wiring headwise here")
    net.load_state_dict(stacked(source.state_dict(), net.state_dict(), net.cfg.levels))


def sized(cfg):
    """cfg with hidden_width chosen so that the parameter count is nearest to cfg.params."""
    if not cfg.params:
        return cfg
    rows = cfg.depth * cfg.width * cfg.matrices * max(1, cfg.levels)    # parameters of a hidden unit
    hidden = cfg.hidden + (cfg.params - count(cfg)) / rows
    for unit in (8, 1):                             # eights where they come near enough
        cfg = dataclasses.replace(cfg, hidden_width=max(unit, unit * round(hidden / unit)))
        if abs(count(cfg) / cfg.params - 1) <= 0.01:
            return cfg
    raise run.UserError(f"--params {cfg.params}: no feed-forward at this width and depth is within 1% of it")


def count(cfg):
    """Parameters of the model, counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in LM(cfg).parameters())


# --- data ------------------------------------------------------------------------------------------


def open_data(cfg):
    """Task, shards or raw text by --task and --data; refuses a vocabulary that does not fit the model's."""
    if cfg.task != "text":
        data = Task(cfg.task, cfg.seed)
    elif cfg.data and (pathlib.Path(cfg.data) / "manifest.json").exists():
        data = text.Mixture(cfg.data)
    else:
        data = text.Text(text.documents(cfg.data), BPE.load(cfg.tokenizer) if cfg.tokenizer else BPE())
    if data.vocab_size > cfg.vocab:
        raise run.UserError(f"the data has {data.vocab_size} tokens, the model {cfg.vocab}; "
                            f"try --vocab {data.vocab_size}")
    return data


# --- train -----------------------------------------------------------------------------------------


class Objective(nn.Module):
    """tokens, target -> mean loss in nats: what DDP wraps, however many segments score() walks through."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, tokens, target):
        loss, _, self.info = self.net.score(tokens, target)
        return loss.sum() / (target >= 0).sum().clamp(min=1)


def free_fields():
    free = {f.name for f in dataclasses.fields(Config) if f.metadata.get("free")}
    return free | {"out", "device", "wandb", "json"}


def train(cfg):
    ddp = run.init(cfg.device)
    run.keep_freed_memory(1 << 20 if cfg.cms == "context" else 1 << 30)    # copies of levels outlive the rest
    torch.set_flush_denormal(True)                  # decays times small gradients go below 1e-38: slow there
    cost.check(cfg, ddp)
    data = open_data(cfg)
    run.seed_all(cfg.seed)
    net = build(cfg).to(ddp.device)
    if cfg.compile:
        compiled(net)
    if cfg.stack:
        stack(net, cfg.stack)
    size = sum(p.numel() for p in net.parameters())
    model, zero1, ranked = optim.distribute(Objective(net), net.blocks, cfg.shard, cfg.bf16, ddp)
    outer = optim.Outer(net, cfg.optimizer, cfg.lr, cfg.matrix_lr, cfg.weight_decay,
                        lambda name: optim.level_period(cfg, name), zero1)
    side = {}
    own = dict(ranked, optim=outer) if ranked or zero1 else {}
    state = dict(side=side, **({} if ranked else dict(net=net)), **({} if own else dict(optim=outer)))
    log = run.Log(cfg, ddp, need_gb=2e-9 * 4 * 3 * size, data=data.facts)
    start = run.load(cfg.out, state, ddp, own)
    log("start", params=size, optimizer=cfg.optimizer, matrix_params=outer.counts["matrix"],
        rest_params=outer.counts["rest"], bf16=cfg.bf16 and ddp.device.type == "cuda", sdpa=True,
        compile=cfg.compile, remat=cfg.remat, shard=cfg.shard, bytes_per_token=data.bytes_per_token,
        resumed_at=start)
    moves, opened, open_sum, seen_sum, tick, done = {}, 0.0, 0.0, 0, time.time(), start
    for step in run.progress(start, cfg.steps, ddp):
        run.seed_all(cfg.seed, ddp.rank, step)
        T = optim.length_at(cfg, step)
        share = run.per_rank(cfg.batch * cfg.length // T, ddp, "--batch")
        mine = range(ddp.rank * share, (ddp.rank + 1) * share)
        tokens, target = pairs(data.batch((cfg.seed, step), mine, T), ddp.device)
        net.teach_scale = cfg.teach_scale * optim.teach_rate(cfg, step)
        micro = max(1, cfg.micro * cfg.length // T) if cfg.micro else share
        parts, loss = list(zip(tokens.split(micro), target.split(micro))), 0.0
        for i, (a, b) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or ddp.world == 1 or ranked else model.no_sync(), \
                    run.autocast(ddp.device, cfg.bf16):
                part = model(a, b) * len(a) / len(tokens)
            part.backward()
            loss += part.detach()
            info = (model.module if hasattr(model, "module") else model).info
            opened, seen_sum = opened + info["gates"][0], seen_sum + info["gates"][1]
        norm = optim.whole(nn.utils.clip_grad_norm_(net.parameters(), cfg.clip))
        for name in outer.step(step, optim.rate(cfg, step)):
            if "levels" in name:
                level = f"level{name.split('levels.')[1][0]}"
                moves[level] = moves.get(level, 0) + (".0.cms" in name and name.endswith(".0"))
        if step % cfg.log_every == 0 or step in (1, cfg.steps):
            loss = float(run.all_mean(loss, ddp))
            run.check_finite(step, loss=loss, grad_norm=norm)
            open_sum, opened = open_sum + float(opened), 0.0    # float32 there: exact for so few steps
            speed = (step - done) * cfg.batch * cfg.length / (time.time() - tick)
            log("train", step=step, loss=loss, ppl=math.exp(min(loss, 50)), length=T,
                bpb=loss / math.log(2) / data.bytes_per_token, lr=cfg.lr * optim.rate(cfg, step),
                grad_norm=float(norm), teach_norm=float(info.get("teach", 0.0)),
                updates=moves, gate_open=open_sum / seen_sum if seen_sum else None,
                tok_s=round(speed, 1), eta_h=(cfg.steps - step) * cfg.batch * cfg.length / speed / 3600,
                mem_gb=torch.cuda.max_memory_allocated() / 1e9 if ddp.device.type == "cuda" else None)
            tick, done = time.time(), step
        if step == start + 1 or step % cfg.eval_every == 0 or step == cfg.steps:
            log("eval", step=step, **validate_loss(net, data, cfg, ddp, cfg.eval_rows))
            tick, done = time.time(), step
        side.update(sidecar.record(dataclasses.asdict(cfg), free_fields(), data.facts, step))
        run.save_if_due(cfg.out, step, cfg.steps, cfg.save_every, state, ddp, own)
    if cfg.surprise_threshold and seen_sum and open_sum in (0.0, float(seen_sum)):
        log("warning", text=f"the surprise gate was {'never' if not open_sum else 'always'} open")
    weights = {k: optim.whole(v) for k, v in net.state_dict().items()}
    if ddp.rank == 0:
        run.save_weights(pathlib.Path(cfg.out) / "weights.safetensors", weights,
                         dict(config=dataclasses.asdict(sized(cfg)), step=cfg.steps, data=data.facts))
    log.finish()


@torch.no_grad()
def validate_loss(net, data, cfg, ddp, rows=0, T=0):
    """Loss, bits per byte, accuracy of scored tokens, loss by position over held-out rows (0: all)."""
    T = T or cfg.length
    net.eval()
    tokens, target = pairs(data.validation(T), "cpu")
    tokens, target = (x[:rows] if rows else x for x in (tokens, target))
    sums = torch.zeros(3, T, dtype=torch.float64)       # loss, hits, scored, by position
    chunk = max(1, (cfg.micro or cfg.batch) * cfg.length // T)
    for a, b in zip(tokens[ddp.rank::ddp.world].split(chunk), target[ddp.rank::ddp.world].split(chunk)):
        with run.autocast(ddp.device, cfg.bf16):
            if cfg.task == "text":
                loss, hits = net.score(a.to(ddp.device), b.to(ddp.device))[0].cpu(), torch.zeros(a.shape)
            else:
                logits = net(a.to(ddp.device)).float().cpu()
                loss, hits = nll(logits, b), (logits.argmax(-1) == b).double()
        scored = (b >= 0).double()
        sums += torch.stack([(loss.double() * scored).sum(0), (hits * scored).sum(0), scored.sum(0)])
    sums = run.all_mean(sums, ddp) * ddp.world
    net.train()
    return dict(val_rows=len(tokens), **cost.shares(sums, data.bytes_per_token, cfg.task != "text"))


# --- sample, evaluate, plan, verify, ablate --------------------------------------------------------


def load_run(folder, device="cpu"):
    """(net in eval mode, cfg) of a finished run."""
    tensors, meta = run.load_weights(pathlib.Path(folder) / "weights.safetensors")
    known = {f.name for f in dataclasses.fields(Config)}
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()}
    cfg = Config(**{k: v for k, v in saved.items() if k in known})
    net = LM(cfg)
    net.load_state_dict(tensors)
    return net.to(device).eval(), cfg


def place(cfg):
    """The run directory a command means: the word after it, or --out."""
    return pathlib.Path(cfg.words[0] if cfg.words else cfg.out)


@torch.no_grad()
def generate(net, ids, n, temperature=0.0, seed=0, stop=None, state=None):
    """Continue a list of token ids by up to n tokens -> list; the carried state makes a token O(1)."""
    draw, made = run.generator(seed), []
    step = torch.tensor([ids], device=net.embed.device)
    state = state or net.fresh(1)
    for _ in range(n):
        logits, state = net(step, state)
        logit_V = logits[0, -1].float().cpu()
        pick = int(logit_V.argmax()) if temperature <= 0 else \
            int(torch.multinomial((logit_V / temperature).softmax(-1), 1, generator=draw))
        if pick == stop:
            break
        made.append(pick)
        step = step.new_tensor([[pick]])
    return made


def sample(cfg):
    net, saved = load_run(place(cfg), run.init(cfg.device).device)
    bpe = BPE.load(saved.tokenizer) if saved.tokenizer else BPE()
    made = generate(net, bpe.encode(cfg.prompt) or [bpe.eos], cfg.tokens, cfg.temperature, cfg.seed)
    written = cfg.prompt + bpe.decode(made)
    folder = place(cfg) / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"seed{cfg.seed}.txt").write_text(written, encoding="utf-8", errors="replace")
    print(written)


def evaluate(cfg):
    """All validation rows: loss, bits per byte, loss by position.  Tasks, RULER: python -m eval.lm."""
    ddp = run.init(cfg.device)
    net, saved = load_run(place(cfg), ddp.device)
    data = open_data(dataclasses.replace(saved, data=cfg.data or saved.data))
    found = validate_loss(net, data, saved, ddp, 0, cfg.eval_length)
    if ddp.rank == 0:
        run.record(place(cfg), "evaluate", length=cfg.eval_length or saved.length, **found)
        for name, value in found.items():
            print(f"{name:<22} {value if not isinstance(value, float) else round(value, 5)}")
        for name, value in PRESETS.get(saved.preset, {}).get("expect", {}).items():
            print(f"{name:<22} not run at this scale; paper {value}")
        for name, value in PRESETS.get(saved.preset, {}).get("goal", {}).items():
            print(f"{name:<22} goal {value}: {'met' if found[name] >= value else 'not met'}")


def plan(cfg):
    cfg = sized(cfg)
    run.print_plan(cfg, cost.estimate(cfg, count(cfg), cost.kept(LM, cfg)))


def verify(cfg):
    """Re-hash a run's checkpoints; --strict: config, tokenizer, data and RNG too.  Exit 1: a problem."""
    whole, problems = sidecar.verify(place(cfg), cfg.strict, free_fields())
    print("\n".join(problems) or f"{whole} checkpoints whole")
    if problems:
        raise SystemExit(1)


ABLATIONS = {
    "teach_scale": {str(s): dict(cms="context", teach_scale=s) for s in (0.05, 0.10, 0.15)},
    "self_modifier": {"on": {}, "off": dict(adapt="")},
    "cms_mlp": {name: dict(cms_mlp=name) for name in ("silu", "swiglu")},
    "cms_levels": {str(k): dict(cms_levels=k) for k in (0, 1, 2, 4)},
    "cms_clock": {name: dict(cms=name) for name in ("outer", "context", "frozen")},
    "optimizer": {name: dict(optimizer=name) for name in ("muon", "adamw", "m3")},
    "inner": {name: dict(inner=name, boundary="delta_m" in name or name == "dmgd")
              for name in ("gd", "momentum", "dgd", "dgd_momentum", "delta_momentum", "dmgd")},
    "backbone": {name: dict(variant=name) for name in VARIANTS}
    | dict(hope_tuned=dict(variant="hope", forget="written", inner="dgd", cms_mlp="swiglu")),
    "paper": {"full": {}, "no DGD": dict(inner="momentum"), "no momentum": dict(inner="dgd"),
              "no decay": dict(decay=False), "no CMS": dict(cms_levels=0), "k slow": dict(adapt="vg"),
              "v slow": dict(adapt="kg"), "q adaptive": dict(adapt="kvqg")},
}


def ablate(cfg):
    """Train the arms of an ablation (or those named) at one parameter budget, same seeds and data order.

    The table of the arms under OUT/NAME, of earlier commands too, is table.md and table.json there.
    """
    name, *chosen = cfg.words or ("",)
    if name not in ABLATIONS:
        raise run.UserError(run.unknown("ablation", name, ABLATIONS))
    for arm in chosen:
        if arm not in ABLATIONS[name]:
            raise run.UserError(run.unknown("arm", arm, ABLATIONS[name]))
    cfg = dataclasses.replace(cfg, params=cfg.params or count(cfg), words=())
    root = pathlib.Path(cfg.out) / name
    for arm in chosen or ABLATIONS[name]:
        for seed in range(cfg.seeds):
            out = root / arm.replace(" ", "_") / str(seed)
            if not (out / "weights.safetensors").exists():
                train(dataclasses.replace(cfg, seed=seed, out=str(out), **ABLATIONS[name][arm]))
        title = f"{name}: {cfg.steps} steps of {cfg.batch} x {cfg.length}"
        table = cost.report(title, root, ABLATIONS[name], dataclasses.asdict(cfg), free_fields())
    print(table, end="")


# --- main ------------------------------------------------------------------------------------------


if __name__ == "__main__":
    run.main(Config, PRESETS, dict(
        train=train, sample=sample, evaluate=evaluate, plan=plan, verify=verify, ablate=ablate,
        corpus=corpus.make_corpus, tokenizer=corpus.make_tokenizer, shard=corpus.make_shards,
        validate=corpus.make_check))
