"""streetvision.py against what it replaces: DINOv3 in transformers, TrivialAugmentWide in torchvision.

    python -m eval.bench_streetvision --json bench.json [--rounds 12] [--batch 2] [--only NAME ...]

vit_forward, vit_step   ViT-B/16 at 224, the same weights, float32: forward pass; forward, backward and AdamW
trivial_small, _large   decode a JPEG of 160 x 160 or 1280 x 960 from memory and TrivialAugmentWide: same
                        images, same draws
evaluation              every score of a test report with 2,000 group resamples at n = 2,300; the goal is 5 s

Paired: every round runs both sides one after the other, the order turns, and the ratio of process CPU seconds
is taken within the round; the median counts.  One thread.  `agree`: same outputs (pixels exactly) on both
sides. Torchvision's Python transforms do not need its compiled operators, so a wheel for another torch will
do.
"""

import argparse
import io
import json
import statistics
import sys
import time

import numpy as np
import torch

import streetvision as sv
from common import images, run
from common.files import write_atomic
from common.street import augment, scorecard, streets, testreport
from eval import _torchvision


def paired(ours, theirs, rounds, warmup=2):
    """CPU seconds of both in every round after the warm-up -> (ours [rounds], theirs [rounds])."""
    seconds = ([], [])
    for turn in range(rounds + warmup):
        for side in (0, 1) if turn % 2 else (1, 0):
            began = time.process_time()
            (ours, theirs)[side](turn)
            if turn >= warmup:
                seconds[side].append(time.process_time() - began)
    return seconds


def case(what, goal, agree, ours, theirs):
    """The record of one comparison: the ratio theirs / ours of each round, its median and quartiles."""
    ratios = np.array(theirs) / np.array(ours)
    value, (low, high) = float(np.median(ratios)), np.quantile(ratios, [0.25, 0.75]).tolist()
    return dict(what=what, value=value, ratio="theirs / ours", goal=goal, met=value >= goal,
                agree=bool(agree),
                quartiles=[low, high], rounds=len(ratios), ours_s=statistics.median(ours),
                theirs_s=statistics.median(theirs))


def bench_vit(args):
    """The same ViT-B/16 in both libraries: forward pass and training step."""
    _torchvision.lenient()
    import transformers as hf
    torch.manual_seed(0)
    theirs = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=16,
        num_register_tokens=4, layerscale_value=1.0, image_size=224)).eval()
    ours = sv.ViT.sized("vitb16").eval()
    ours.load_state_dict({k.removeprefix("model."): v for k, v in theirs.state_dict().items()})
    x, ask = torch.randn(args.batch, 3, 224, 224), (lambda m: m(x)["cls"], lambda m: m(x).pooler_output)
    with torch.no_grad():
        gap = float((ask[0](ours) - ask[1](theirs)).abs().max())

    def forward(model, answer):
        def work(turn):
            with torch.no_grad():
                answer(model)
        return work

    def training(model, answer):
        optim = torch.optim.AdamW(model.train().parameters(), 1e-6)

        def work(turn):
            optim.zero_grad()
            answer(model).square().mean().backward()
            optim.step()
        return work
    ours.rope_stretch = 2.0                                     # as transformers does in training
    for name, make in (("vit_forward", forward), ("vit_step", training)):
        seconds = paired(make(ours, ask[0]), make(theirs, ask[1]), args.rounds)
        word = "forward" if make is forward else "training step"
        yield name, case(f"ViT-B/16 {word}, batch {args.batch}, against transformers", 1.0, gap < 1e-4,
                         *seconds)


def bench_trivial(args, count=48):
    """Decode and TrivialAugmentWide: the same JPEGs and the same draws on both sides."""
    _torchvision.lenient()
    from PIL import Image
    from torchvision.transforms import v2
    peer = v2.TrivialAugmentWide()
    for name, size in (("trivial_small", (160, 160)), ("trivial_large", (1280, 960))):
        files = []
        for k in range(count):
            file = io.BytesIO()
            streets.frame(0, k, 0)[0].resize(size, Image.BICUBIC).save(file, "JPEG", quality=90)
            files.append(file.getvalue())

        def ours(turn, keep=None):
            for k, data in enumerate(files):
                g = torch.Generator().manual_seed(turn * count + k)
                out = augment.trivial_augment_wide(images.decode(data), g)
                if keep is not None:
                    keep.append(np.asarray(out))

        def theirs(turn, keep=None):
            for k, data in enumerate(files):
                torch.manual_seed(turn * count + k)
                out = peer(Image.open(io.BytesIO(data)).convert("RGB"))
                if keep is not None:
                    keep.append(np.asarray(out))
        a, b = [], []
        ours(0, a), theirs(0, b)
        agree = all(np.array_equal(x, y) for x, y in zip(a, b))
        what = f"JPEG decode and TrivialAugmentWide, {size[0]} x {size[1]}, against torchvision"
        yield name, case(what, 1.0, agree, *paired(ours, theirs, args.rounds))


def bench_evaluation(args, n=2300, resamples=2000, goal_s=5.0):
    """Every score of a report: 5 modes x 3 policies, 2 baselines, 7 paired differences, selective risk."""
    rng = np.random.default_rng(0)
    y, group = (rng.random(n) < 0.85).astype(int), np.arange(n) // 5
    margin = lambda: 2 * (2 * y - 1) + rng.normal(0, 2, n)
    prob = lambda: 1 / (1 + np.exp(-margin()))
    modes = ("single_view", "multiview_mean", "cvfm_inference", "cvfm_trained", "bundle")
    answer = {m: dict(raw_argmax=(p, 0.5), threshold=(p, 0.4), scrc=(prob(), 0.45)) for m in modes
              for p in [prob()]}
    probes = {"probe_before": (prob(), 0.5), "probe_after": (prob(), 0.4)}
    p = answer["bundle"]["scrc"][0]
    accepted, sets = np.maximum(p, 1 - p) > 0.7, np.stack([p < 0.8, p > 0.2], 1)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        out = testreport.scores(answer, probes, y, group, resamples, 42)
        chosen = scorecard.selective(p, y, 0.45, accepted, sets, group, resamples, 42)
        seconds.append(time.process_time() - began)
    complete = len(out["results"]) == 5 and len(out["paired"]) == 7 and "risk" in chosen
    median = statistics.median(seconds)
    yield "evaluation", dict(
        what=f"all scores of a report, {resamples} group resamples, n = {n}", value=goal_s / median,
        ratio=f"{goal_s:g} s / ours", goal=1.0, met=median < goal_s, agree=complete, ours_s=median,
        theirs_s=goal_s)


def main():
    parser = argparse.ArgumentParser("eval.bench_streetvision", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=("vit", "trivial", "evaluation"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    run.seed_all(0)
    cases = {}
    for name, body in (("evaluation", bench_evaluation), ("trivial", bench_trivial), ("vit", bench_vit)):
        if args.only and name not in args.only:
            continue
        try:
            for key, record in body(args):
                cases[key] = record
                print(f"{key:<14} {record['value']:.3f} ({record['ratio']}), goal {record['goal']:g}, ours "
                      f"{record['ours_s']:.4f} s, theirs {record['theirs_s']:.4f} s, agree {record['agree']}",
                      flush=True)
        except ImportError as error:
            cases[name] = dict(skipped=f"{error.name or error}")
            print(f"{name:<14} not run: {error}", file=sys.stderr)
    if args.json:
        record = dict(cases=cases, rounds=args.rounds, batch=args.batch, threads=1)
        write_atomic(args.json, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
