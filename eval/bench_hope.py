"""Training speed of hope_lm on this machine, one thread: HOPE, its peers, and HOPE's cost against sequence length.

    python -m eval.bench_hope --json bench_hope.json [--steps 3] [--lengths 256,512,1024,2048,4096]

Config: V 256, D 256, L 4, H 4, T 512, batch 4, CMS 4 x 4, random bytes; a step is forward, backward through the
writes and AdamW.  Time is process time: the cores are shared and a wall clock would count other people's work.  The
cost against length keeps 4 rows and makes them longer (D 128, L 2).  Cases of a round run one after the other and
ratios are taken within the round (median over rounds).  The ratio to the reference (kmccleary3301/nested_learning)
is not run here: a rate measured on another machine is no basis for one.
"""

import argparse
import json
import statistics
import time

import torch

import hope_lm as h

CASES = {"hope": dict(variant="hope"), "hope, CMS width 2D": dict(variant="hope", cms_mult=2.0),
         "hope_attention": dict(variant="hope_attention"), "lmm": dict(variant="lmm"), "deltanet": dict(variant="deltanet"),
         "swa": dict(variant="swa"), "full": dict(variant="full")}


def stepper(batch=4, T=512, **kw):
    """A function that runs one training step of a fresh net on random bytes -> tokens of it; and the parameter count."""
    torch.manual_seed(0)
    net = h.LM(h.Config(**{**dict(width=256, depth=4, heads=4, chunk=64, chunk_self=64), **kw}))
    opt, data = torch.optim.AdamW(net.parameters()), torch.randint(0, 256, (batch, T + 1))

    def step():
        net.score(data[:, :-1], data[:, 1:])[0].mean().backward()
        opt.step()
        opt.zero_grad()
        return batch * T
    return step, sum(p.numel() for p in net.parameters())


def measure(steps):
    """Tokens per CPU-second of one call of each step function, a round."""
    rates = {}
    for name, step in steps.items():
        began = time.process_time()
        tokens = step()
        rates[name] = tokens / (time.process_time() - began)
    return rates


def case(what, ratio, value, goal, met):
    return dict(what=what, ratio=ratio, value=value, goal=goal, met=met(value, goal), agree=True)


def main():
    p = argparse.ArgumentParser(prog="python -m eval.bench_hope", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", default="")
    p.add_argument("--steps", type=int, default=3, help="rounds")
    p.add_argument("--lengths", default="256,512,1024,2048,4096")
    args = p.parse_args()
    torch.set_num_threads(1)
    made = {name: stepper(**kw) for name, kw in CASES.items()}
    lengths = [int(x) for x in args.lengths.split(",")]
    by_length = {str(T): stepper(batch=4, T=T, width=128, depth=2, heads=2, cms_levels=2)[0] for T in lengths}
    steps = {name: step for name, (step, _) in made.items()} | by_length
    measure(steps)                                  # warm-up
    rounds = [measure(steps) for _ in range(args.steps)]
    median = lambda f: statistics.median(f(r) for r in rounds)   # noqa: E731
    first, last = str(lengths[0]), str(lengths[-1])
    out = dict(tokens_per_cpu_s={k: median(lambda r: r[k]) for k in made}, params={k: n for k, (_, n) in made.items()},
               hope_by_length={k: median(lambda r: r[k]) for k in by_length}, rounds=rounds, torch=torch.__version__,
               cases=dict(length=case(f"HOPE, cost of a token at T={last} over T={first}", "T long / short",
                                      median(lambda r: r[first] / r[last]), 1.15, lambda v, goal: v <= goal),
                          speed=case("HOPE, tokens a CPU-second (a rate, not a ratio)", "hope", median(lambda r: r["hope"]), 1000.0,
                                     lambda v, goal: v >= goal),
                          reference=dict(skipped="kmccleary3301/nested_learning is not installed beside this project")))
    print(json.dumps(out, indent=1))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(out, file, indent=1)


if __name__ == "__main__":
    main()
