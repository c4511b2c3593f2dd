"""Of a hope_lm Config alone: what it refuses and what its run costs; and table and curves of past runs."""

import dataclasses
import json
import math
import statistics

import torch

from common import draw
from common.flags import UserError
from common.graph import saved


def check(cfg, ddp):
    """Refuse what would silently mean something else."""
    if cfg.width % cfg.heads or (cfg.width // cfg.heads) % 2:
        raise UserError(f"--width {cfg.width} / --heads {cfg.heads} must be an even whole number")
    if cfg.inner in ("delta_momentum", "dmgd") and not cfg.boundary and cfg.variant != "hope_attention":
        raise UserError(f"--inner {cfg.inner} has no exact token form; add --boundary")
    if cfg.cms_wiring == "nested" and cfg.cms != "context":
        raise UserError("--cms-wiring nested restarts levels inside a context; add --cms context")
    if len(cfg.periods) < cfg.levels or cfg.cms == "outer" and len(cfg.outer_periods) < cfg.levels:
        raise UserError(f"--cms-levels {cfg.levels} needs that many --periods and --outer-periods")
    if cfg.compile and torch.__version__.startswith("2.6."):
        raise UserError("--compile: the compiler of torch 2.6 fails on the chunk body; 2.13 is known to work")
    periods = cfg.periods[:cfg.levels]
    if any(p % periods[0] or p < periods[0] for p in periods) and cfg.cms == "context":
        raise UserError(f"--periods {cfg.periods}: each must be a multiple of the first")
    if cfg.cms == "context" and cfg.levels and ddp.world > 1 and cfg.shard == "fsdp2":
        raise UserError("--cms context keeps a copy of the weights a sequence; use --shard ddp or zero1")
    for T in cfg.curriculum or ():
        if cfg.batch * cfg.length % T:
            raise UserError(f"--curriculum {T}: {cfg.batch} rows of {cfg.length} make no whole row")
    if cfg.task == "recall" and cfg.length < 64:
        raise UserError("--task recall needs --length 64 or more")


def copies(cfg):
    """Weights that a row's CMS levels leave behind in one layer, a copy a move (--cms context)."""
    moves = sum(cfg.length / p for p in cfg.periods[:cfg.levels]) if cfg.cms == "context" else 0
    return moves * cfg.matrices * cfg.hidden * cfg.width


def kept(make, cfg):
    """Numbers that the forward pass of a row keeps for backward -> (of one layer, of the rest).

    Counted, not modelled: make(Config) runs, all zeros, with one and two layers on two and three chunks of
    one row; both are linear.  Copies of CMS levels are left out.
    """
    span = math.lcm(cfg.chunk, cfg.chunk_self, cfg.periods[0] if cfg.cms == "context" else 1)
    small = dataclasses.replace(cfg, hidden_width=cfg.hidden, params=0, periods=tuple(
        min(p, span) for p in cfg.periods), remat="chunk" if cfg.remat == "chunk" else "none")

    def counted(depth, n):
        at = dataclasses.replace(small, depth=depth, length=n * span)
        with torch.device("meta"):
            net = make(at)
        with torch.no_grad():
            for p in net.to_empty(device="cpu").parameters():
                p.zero_()
        tokens = torch.zeros(1, n * span, dtype=torch.long)
        return saved(lambda: net.score(tokens, tokens), net) / 4 - depth * copies(at)
    one, two = counted(1, 2), counted(2, 2)
    layer, rest = two - one, (2 * one - two) / 2 * cfg.length / span        # embedding and head: no start
    slope = counted(1, 3) - one - (2 * one - two) / 2
    return layer + slope * (cfg.length / span - 2), rest


def estimate(cfg, P, a_row):
    """Parameters P, numbers a row keeps (of a layer, of the rest) -> dict of FLOP a step, GB a rank by kind
    (float32, nothing sharded), disk and hours at 40% of an H100's bfloat16 peak."""
    D, K, tokens = cfg.width, cfg.width // cfg.heads, cfg.batch * cfg.length
    memories = dict(lmm=1, mac=1, mag=1, mal=1, hope=1 + len(set(cfg.adapt) & set("qkv"))
                    + ("g" in cfg.adapt) / 2)
    memories = memories.get(cfg.variant, 0)
    window = cfg.window * (cfg.variant in ("swa", "mag", "mal"))
    seen = cfg.length / 2 if cfg.variant in ("full", "hope_attention") else window
    per_token = memories * D * (14 * cfg.memory_width * K + 12 * cfg.chunk)  # recalls and writes; Gram terms
    flops = 6 * P * tokens + 6 * cfg.depth * tokens * (per_token + 2 * D * seen)
    rows, (layer, rest) = cfg.micro or cfg.batch, a_row
    if cfg.remat == "chunk":                        # the checkpoints hold every chunk's first weights
        layer += cfg.length / cfg.chunk * memories * 4 * cfg.memory_width * K * D
    if cfg.remat == "block":        # all inputs; one layer while it is redone, its gradients (0.4, measured)
        layer, rest = cfg.length * D, rest + 1.4 * layer + copies(cfg)
    gb = dict(cms_copies_gb=4e-9 * rows * cfg.depth * copies(cfg),
              activations_gb=4e-9 * rows * (cfg.depth * layer + rest))
    states = dict(muon=1, adamw=2, m3=5)[cfg.optimizer]
    return dict(params=P, hidden=cfg.hidden, flops_per_step=float(flops), tokens=tokens * cfg.steps, **gb,
                memory_gb_per_rank=P * 4e-9 * (2 + states) + sum(gb.values()),
                disk_gb=P * 4e-9 * (3 + 2 * states), hours_at_mfu=flops * cfg.steps / (0.4 * 989e12) / 3600)


def finished(root, arms, want, free):
    """Finished runs under ROOT/ARM/SEED, of whichever command -> {arm: [dict(seed, val_bpb, ...)]}.

    arms: arm -> the fields it sets.  A run whose other fields are not `want`'s is refused: a table has one
    budget.
    """
    own, rows = {"seed", *free, *(key for fields in arms.values() for key in fields)}, {}
    for arm in arms:
        seeds = [p.parent for p in (root / arm.replace(" ", "_")).glob("*/weights.safetensors")]
        for out in sorted(seeds, key=lambda p: int(p.name)):
            was = json.loads((out / "config.json").read_text())["config"]
            for key in sorted(set(want) - own):
                if key in was and was[key] != json.loads(json.dumps(want[key])):
                    raise UserError(f"{out} was trained with {key} {was[key]}, not {want[key]}; "
                                    f"another budget needs another --out")
            log = [*map(json.loads, (out / "log.jsonl").read_text().splitlines())]
            start, last = ([r for r in log if r["kind"] == kind] for kind in ("start", "eval"))
            rows.setdefault(arm, []).append(dict(
                seed=int(out.name), val_bpb=last[-1]["val_bpb"], accuracy=last[-1].get("accuracy"),
                time_s=last[-1]["time_s"], params=start[-1]["params"],
                loss_by_position=last[-1]["loss_by_position"]))
    return rows


def shares(sums, bytes_per_token, answers):
    """Sums by position [3, T] of loss, hits and targets -> loss, bits per byte, by position, accuracy."""
    T = sums.shape[1]
    edges = [0] + [e for e in (64 * 2**i for i in range(20)) if e < T] + [T]
    share = lambda i, a, b: float(sums[i, a:b].sum() / sums[2, a:b].sum())   # noqa: E731
    by_position = {f"{a}-{b}": share(0, a, b) for a, b in zip(edges, edges[1:]) if sums[2, a:b].sum()}
    loss = share(0, 0, T)
    found = dict(val_loss=loss, val_bpb=loss / math.log(2) / bytes_per_token, loss_by_position=by_position)
    if answers:
        found.update(accuracy=share(1, 0, T), accuracy_second_half=share(1, T // 2, T))
    return found


def report(title, root, arms, want, free):
    """table.json, table.md and curves.png of the arms trained so far under root -> the table."""
    rows = finished(root, arms, want, free)
    made = table(title, rows)
    (root / "table.json").write_text(json.dumps(rows, indent=1))
    (root / "table.md").write_text(made)
    curves(root, rows)
    return made


def table(title, rows):
    """Markdown of an ablation: arm -> list of runs, dict(val_bpb, accuracy, time_s, params)."""
    lines = [f"# {title}", "",
             "| arm | seeds | parameters | bits per byte, mean | s.d. | accuracy | seconds |",
             "|---|---|---|---|---|---|---|"]
    for arm, runs in rows.items():
        bpb = [r["val_bpb"] for r in runs]
        spread = f"{statistics.stdev(bpb):.4f}" if len(bpb) > 1 else "-"
        right = [r["accuracy"] for r in runs if r["accuracy"] is not None]
        lines.append(f"| {arm} | {len(runs)} | {runs[0]['params']:,} | {statistics.mean(bpb):.4f} | "
                     f"{spread} | {format(statistics.mean(right), '.4f') if right else '-'} | "
                     f"{statistics.mean(r['time_s'] for r in runs):.0f} |")
    return "\n".join(lines) + "\n"


def curves(root, arms):
    """ROOT/curves.png: validation of every arm, mean over its seeds; where a run has fewer than four
    evaluations, the training batches of the first seed.  The first 5% are left out."""
    logs = {arm: [[*map(json.loads, (root / arm.replace(" ", "_") / str(r["seed"]) / "log.jsonl")
                        .read_text().splitlines())] for r in runs] for arm, runs in arms.items()}
    points = lambda log, kind, key: {r["step"]: r[key] for r in log if r["kind"] == kind}  # noqa: E731
    held = {arm: [points(log, "eval", "val_bpb") for log in each] for arm, each in logs.items()}
    kind = "validation"
    if min(len(seed) for seeds in held.values() for seed in seeds) < 4:
        held, kind = {arm: [points(each[0], "train", "bpb")] for arm, each in logs.items()}, "training batch"
    series = {}
    for arm, seeds in held.items():
        steps = sorted(set.intersection(*map(set, seeds)))      # a resumed step counts once
        kept = [x for x in steps if x >= 0.05 * steps[-1]]
        series[arm] = kept, [statistics.mean(seed[x] for seed in seeds) for x in kept]
    draw.save(draw.lines(series, xlabel="optimizer steps", ylabel=f"bits per byte, {kind}"),
              root / "curves.png")
