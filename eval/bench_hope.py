"""Training speed of hope_lm on this machine, one thread: HOPE, its peers, its cost against
length, and the reference.

    python -m eval.bench_hope --json bench_hope.json [--rounds 3] [--lengths 256,4096] [--reference DIR]

Config: V 256, D 256, L 4, H 4, T 512, batch 4, CMS 4 x 4, random bytes; a step is forward, backward through
the writes and AdamW.  Time is process time: the cores are shared and a wall clock would count other people's
work.  The cost against length (D 128, L 2) is taken twice: at equal rows, as the sequences of one batch grow,
and at equal tokens of a step, fewer rows as they are longer.  Every case has a process of its own; those of a
round step one after the other and ratios are taken within the round (median over rounds).

DIR (or ONEFILE_NESTED_LEARNING): a checkout of github.com/kmccleary3301/nested_learning; needs omegaconf.
Its step is that of its training loop, offline: forward, backward, clip, AdamW, teach signal, second forward
with the writes.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import hope_lm as h
from common import run

SIZE = dict(width=256, depth=4, heads=4, chunk=64, chunk_self=64)
CASES = {"hope": dict(variant="hope"), "hope, no momentum": dict(variant="hope", inner="dgd"),
         "hope, linear, no momentum": dict(variant="hope", inner="dgd", memory_depth=1),
         "hope, CMS width 2D": dict(variant="hope", cms_mult=2.0),
         "hope_attention": dict(variant="hope_attention"), "lmm": dict(variant="lmm"),
         "deltanet": dict(variant="deltanet"), "swa": dict(variant="swa"), "full": dict(variant="full")}
REFERENCE = dict(transformer=512, hope_attention=512, hope_selfmod=128)     # tokens of a row
ROWS = 4                                            # rows of the longest sequence
SHORT = "hope, T 128"                               # its self-modifying step takes minutes at 512
ALIKE = "hope, no momentum, T 128"                  # NL 88 as printed; nor has its path a momentum


def stepper(batch=4, T=512, compiled=False, **kw):
    """A function that runs one training step of a fresh net on random bytes -> tokens of it;
    and the parameter count."""
    torch.manual_seed(0)
    net = h.LM(h.Config(**{**SIZE, **kw}))
    if compiled:
        h.compiled(net)
    opt, data = torch.optim.AdamW(net.parameters(), fused=True), torch.randint(0, 256, (batch, T + 1))

    def step():
        net.score(data[:, :-1], data[:, 1:])[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        return batch * T
    return step, sum(p.numel() for p in net.parameters())


def reference(root, variant, batch=4, T=512):
    """The same for the reference's block of that name, in the order of its own offline training step."""
    sys.path.insert(0, str(pathlib.Path(root) / "src"))
    from nested_learning.levels import LevelSpec
    from nested_learning.model import HOPEModel, ModelConfig
    from nested_learning.training import compute_teach_signal
    level = lambda name, period: LevelSpec(name=name, update_period=period)     # noqa: E731
    torch.manual_seed(0)
    net = HOPEModel(ModelConfig(
        vocab_size=256, dim=256, num_layers=4, heads=4, titan_level=level("titan", 8), block_variant=variant,
        cms_levels=[level(f"cms{p}", p) for p in (8, 32, 128, 512)], teach_scale=0.1, teach_clip=5.0,
        qk_l2_norm=True, self_mod_chunk_size=8, self_mod_chunk_size_memory=64, self_mod_use_skip=False))
    opt, data = torch.optim.AdamW(net.parameters(), fused=True), torch.randint(0, 256, (batch, T))

    def step():
        logits = net(data)
        opt.zero_grad()
        F.cross_entropy(logits[:, :-1].reshape(-1, 256), data[:, 1:].reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            net(data, teach_signal=compute_teach_signal(net, logits, data))
        return batch * T
    return step, sum(p.numel() for p in net.parameters())


class Case:
    """One case in a process of its own, as a training has it: a heap that other cases have not cut up.

    helped: freed memory is kept and denormals are flushed, as train() of the script has it.
    """

    def __init__(self, name, make, helped=True):
        fork = multiprocessing.get_context("fork")      # daemons: they end with the bench
        self.name, (self.pipe, theirs) = name, fork.Pipe()
        fork.Process(target=self.serve, args=(theirs, make, helped), daemon=True).start()
        theirs.close()
        self.params = self.pipe.recv()

    def serve(self, pipe, make, helped):
        self.pipe.close()
        torch.set_num_threads(1)                        # OpenMP's threads did not come along
        torch.set_flush_denormal(helped)
        if helped:
            run.keep_freed_memory()
        step, params = make()
        pipe.send(params)
        with contextlib.suppress(EOFError):             # the bench is over
            while pipe.recv():
                wall, began = time.time(), time.process_time()
                tokens = step()
                pipe.send((tokens / (time.process_time() - began), time.time() - wall))

    def rate(self):
        """One step -> tokens a CPU-second, seconds of wall time."""
        self.pipe.send(True)
        rate, wall = self.pipe.recv()
        print(f"{self.name}: {rate:.1f} tokens a CPU-second", file=sys.stderr, flush=True)
        return rate, wall


def by_length(lengths, equal_tokens):
    """(rows, T) of every length; the longest has ROWS rows."""
    return [(ROWS * max(lengths) // T if equal_tokens else ROWS, T) for T in lengths]


def named(rows, T):
    return f"{rows} x {T}"


def case(what, ratio, value, goal, met):
    return dict(what=what, ratio=ratio, value=value, goal=goal, met=met(value, goal), agree=True)


def cases(median, lengths, ran, paired):
    """The goals; ran, paired: our cases and the reference's models of these rounds."""
    at_least, at_most = (lambda v, goal: v >= goal), (lambda v, goal: v <= goal)
    over = lambda a, b: median(lambda r: r[a] / r[b])   # noqa: E731
    found = {f"speed, {name}": case(f"{name}, tokens a CPU-second (a rate, not a ratio)", name,
                                    median(lambda r, name=name: r[name]), 1000.0, at_least)
             for name in ran if name.split(",")[0] == "hope" and "T 128" not in name}
    for kind in ("rows", "tokens") if len(lengths) > 1 else ():
        first, last = (named(*by_length(lengths, kind == "tokens")[i]) for i in (0, -1))
        found[f"length_equal_{kind}"] = case(f"HOPE, cost of a token at T={lengths[-1]} over T={lengths[0]}, "
                                             f"equal {kind} a step", "T long / short", over(first, last),
                                             1.15, at_most)
    if not paired:
        return found | dict(reference=dict(skipped="no checkout of kmccleary3301/nested_learning named"))
    for ours in ran:
        short, hope = "T 128" in ours, ours.startswith("hope") and "hope_" not in ours
        theirs, goal = (("transformer", 1.0) if ours == "full" else ("hope_selfmod", 25.0) if short
                        else ("hope_attention", 2.5))
        if theirs in paired and (hope or ours == "full"):
            found[f"{ours} / {theirs}"] = case(f"{ours} over the reference's {theirs}, offline",
                                               "tokens a CPU-second", over(ours, f"reference {theirs}"), goal,
                                               at_least)
    return found


def main():
    p = argparse.ArgumentParser(prog="python -m eval.bench_hope", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", default="")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", default=";".join(CASES), help="cases, separated by ;")
    p.add_argument("--theirs", default=";".join(REFERENCE), help="its models; hope_selfmod is slow")
    p.add_argument("--as-shipped", action="store_true", help="denormals are flushed and freed memory is "
                   "kept for ours alone, as each one's training does; else for both")
    p.add_argument("--compile", action="store_true", help="HOPE's cases a second time as --compile runs "
                   "them; the first step of each takes minutes")
    p.add_argument("--lengths", default="256,512,1024,2048,4096")
    p.add_argument("--reference", default=os.environ.get("ONEFILE_NESTED_LEARNING", ""))
    args = p.parse_args()
    torch.set_num_threads(1)
    lengths = [int(x) for x in args.lengths.split(",")]
    ours = {name: CASES[name] for name in args.only.split(";")}
    if args.reference and "hope_selfmod" in args.theirs.split(";"):
        ours |= {SHORT: dict(CASES["hope"], T=128), ALIKE: dict(CASES["hope, no momentum"], T=128)}
    if args.compile:
        ours |= {f"{name}, compiled": dict(kw, compiled=True) for name, kw in ours.items()
                 if kw["variant"] == "hope"}
    made = {name: Case(name, functools.partial(stepper, **kw)) for name, kw in ours.items()}
    shapes = dict.fromkeys(by_length(lengths, False) + by_length(lengths, True)) if len(lengths) > 1 else ()
    small = dict(width=128, depth=2, heads=2, cms_levels=2)
    grown = {named(*shape): Case(named(*shape), functools.partial(stepper, *shape, **small))
             for shape in shapes}
    paired = args.theirs.split(";") if args.reference else []
    theirs = {f"reference {name}": Case(f"reference {name}", functools.partial(
        reference, args.reference, name, T=REFERENCE[name]), not args.as_shipped) for name in paired}
    first = {name: case.rate()[1] for name, case in (made | grown).items()}     # warm-up; compiles
    first |= {name: case.rate()[1] for name, case in theirs.items() if "selfmod" not in name}   # long enough
    cases_run = made | grown | theirs
    rounds = [{name: case.rate()[0] for name, case in cases_run.items()} for _ in range(args.rounds)]
    median = lambda f: statistics.median(f(r) for r in rounds)   # noqa: E731
    out = dict(tokens_per_cpu_s={k: median(lambda r: r[k])
                                 for k in made | theirs},    # noqa: B023, called at once
               params={k: case.params for k, case in (made | theirs).items()},
               hope_by_length={k: median(lambda r: r[k]) for k in grown},          # noqa: B023
               rounds=rounds, torch=torch.__version__, as_shipped=args.as_shipped,
               first_step_s={k: s for k, s in first.items() if k.endswith("compiled")},
               cases=cases(median, lengths, made, paired))
    print(json.dumps(out, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
