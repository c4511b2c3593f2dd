"""Training throughput of beta_vae_arc.py against the way it is usually written: same model, same batch.

    python -m eval.bench_arc --json bench_arc.json [--data ARC.json,RE-ARC.npz] [--rounds 12]

The plain peer: a Dataset that augments one grid at a time in NumPy and pads it to 30x30, a DataLoader,
float32, the model on the whole canvas.  Ours: a batch augmented at once, cropped to its grids, and bfloat16
where the CPU multiplies in it (else that case is skipped).  Both take full steps (data, forward, backward,
clip, Adam).  Paired: in every round each peer takes the same number of steps of the same mean area after one
that is not timed, in an order that turns, and the ratio of process CPU seconds a cell is taken within the
round.  A cell, not a grid: our batches hold many small grids or few large ones, theirs the mixture.  One
thread, loader workers 0: the same core does everything.  `agree`: crop and canvas give the same loss.
"""

import argparse
import itertools
import json
import statistics
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import beta_vae_arc as arc
from common import run
from common.arc.tasks import OUTSIDE, load_corpus
from common.files import write_atomic


class PlainGrids(Dataset):
    """One grid at a time: random symmetry and renaming in NumPy, then padding to the canvas."""

    def __init__(self, corpus):
        self.grids = [g[:h, :w] for g, (h, w) in zip(corpus.grids, corpus.shapes)]
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return len(self.grids)

    def __getitem__(self, i):
        g = np.rot90(self.grids[i], self.rng.integers(4))
        g = np.fliplr(g) if self.rng.random() < 0.5 else g
        g = self.rng.permutation(10)[g]
        canvas = np.full((30, 30), OUTSIDE, np.int64)
        canvas[:g.shape[0], :g.shape[1]] = g
        return torch.from_numpy(canvas)


def learner(bf16, fused):
    """A function that takes one optimizer step on a batch [B, H, W]."""
    run.seed_all(0)
    net = arc.BetaVAE(arc.Config())
    optim = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)

    def step(grid):
        with arc.precision("cpu", bf16):
            logits, mu, logvar = net(grid)
        R_B, K_B = arc.elbo_terms(logits, grid, mu, logvar)
        optim.zero_grad(set_to_none=True)
        ((R_B + 0.01 * K_B).mean() / 100).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
    return step


def agreement(corpus):
    """Largest relative difference of R + K per grid between crop and canvas, float32, z = mu."""
    net = arc.BetaVAE(arc.Config()).eval()
    index = np.argsort(corpus.shapes.astype(int).prod(1))[:64]
    h, w = -(-corpus.shapes[index].max(0).astype(int) // 2) * 2
    costs = []
    for grid in (torch.from_numpy(corpus.grids[index, :h, :w]), torch.from_numpy(corpus.grids[index])):
        with torch.no_grad():
            logits, mu, logvar = net(grid)
        costs.append(sum(arc.elbo_terms(logits, grid, mu, logvar)))
    return float(((costs[0] - costs[1]).abs() / costs[1]).max())


def main():
    parser = argparse.ArgumentParser("eval.bench_arc", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--data", default="", help="as of beta_vae_arc.py; empty: 4000 procedural grids")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each peer a round")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(args.data, 30, 4000).part("train")
    loader = DataLoader(PlainGrids(corpus), args.batch, shuffle=True, num_workers=0, drop_last=True)
    plain = iter(itertools.chain.from_iterable(itertools.repeat(loader)))
    feed, order = arc.Feed(corpus, 2, "all"), arc.batches(corpus.shapes, args.batch, 2, 0)
    steps = dict(ours_float32=learner(False, True), plain=learner(False, None))
    bf16 = isinstance(arc.precision("cpu"), torch.autocast)
    if bf16:
        steps["ours"] = learner(True, True)
    seconds = {name: [] for name in steps}                      # CPU seconds a real cell
    for turn in range(args.rounds + 1):
        for name in np.roll(list(steps), turn):
            cells = 0
            for i in range(args.steps + 1):
                if i == 1:                      # the first step warms caches and the allocator
                    began, cells = time.process_time(), 0
                grid = next(plain) if name == "plain" else feed(next(order), run.generator(turn, i))
                steps[name](grid)
                cells += int((grid != OUTSIDE).sum())
            if turn:
                seconds[name].append((time.process_time() - began) / cells)
    gap, cases = agreement(corpus), {}
    mean = float(corpus.shapes.astype(int).prod(1).mean())
    if not bf16:
        cases["ours"] = dict(skipped="this CPU has no bfloat16 products")
    for name in seconds.keys() - {"plain"}:
        ratios = sorted(t / o for t, o in zip(seconds["plain"], seconds[name]))
        ours, theirs, value = (statistics.median(x) for x in (seconds[name], seconds["plain"], ratios))
        low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
        cases[name] = dict(what=f"training step, {name}", value=value, ratio="plain / ours", goal=3.0,
                           met=value >= 3.0, agree=gap < 1e-4, ours_s=ours, theirs_s=theirs,
                           quartiles=[low, high])
        print(f"{name:<14} {1 / ours:8.0f} cells a CPU second, plain {1 / theirs:6.0f}: {value:.2f} times "
              f"(middle half {low:.2f} to {high:.2f})")
    print(f"same loss on crop and canvas to {gap:.1e} relative")
    if args.json:
        record = dict(cases=cases, batch=args.batch, rounds=args.rounds, loss_gap=gap,
                      cells_a_grid=mean, data=args.data or "procedural")
        write_atomic(args.json, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
