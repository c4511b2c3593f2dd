"""Scale on paper: `python -m eval.scale [--docs] [--json FILE]` asks every large preset for its plan.

Large: more than 1e18 FLOPs of training.  From `plan` come parameters, FLOPs, memory and disk; hours, traffic
and cost follow from the assumptions below, which the page repeats.  --docs rewrites docs/scale.md.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from common import run
from common.files import write_atomic
from eval._shared import ROOT, SCRIPTS, Parser, cli, load, markdown_table, replace_block, text_table

LARGE = 1e18  # FLOPs of a training
PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 or H200, as published
LINK = 50e9  # bytes/s a GPU sends between nodes: one 400 Gb/s card each
DISK = 2e9  # bytes/s to shared storage, one writer
PRICE = 2.5  # dollars a GPU hour, an assumption: put in your own
BATCH = dict(drift_latent="labels", drift_pixel="labels", streetvision="phase1_batch")
DATA = dict(
    drift_latent="ImageNet: 1,281,167 images, 155 GB of archives once, 21 GB of float16 latents",
    drift_pixel="ImageNet: 155 GB of archives once, 110 GB of PNG shards or 30 GB of JPEG",
    streetvision="street photographs: 8,000 of about 100 kB each are 1 GB",
    dit_t2i="captioned pictures: a million of 300 kB are 300 GB",
)


@contextlib.contextmanager
def world(n):
    """plan as one of n ranks would print it."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(n)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE") if before is None else os.environ.update(WORLD_SIZE=before)


def plan(path, module, preset, ranks=8):
    """(what `SCRIPT.py plan --preset NAME --json` prints, the config) in this process."""
    argv, out = sys.argv, io.StringIO()
    sys.argv = [path.name]
    try:
        _, cfg = run.parse(module.Config, module.PRESETS, ("plan",), ["plan", "--preset", preset, "--json"])
        with world(ranks), contextlib.redirect_stdout(out):
            module.plan(cfg)
    finally:
        sys.argv = argv
    return json.loads(out.getvalue().strip().splitlines()[-1]), cfg


def facts(script, preset, found, cfg, mfu, price):
    """One row: the plan, and what follows from it."""
    total = found["flops_per_step"] * found["steps"]
    hours = total / (8 * PEAK * mfu) / 3600
    batch = getattr(cfg, BATCH.get(script, "batch"))
    row = dict(
        script=script,
        preset=preset,
        params=found["params"],
        flops_per_step=found["flops_per_step"],
        steps=found["steps"],
        memory_gb=found["memory_gb_per_rank"],
        disk_gb=found["disk_gb"],
        hours_8=hours,
        cost=8 * hours * price,
        batch=batch,
        tokens=found.get("tokens"),
    )
    for gpus in (64, 1024):
        step_s = found["flops_per_step"] / (gpus * PEAK * mfu)
        send_s = 2 * 4 * found["params"] / LINK  # a ring sends every float32 gradient about twice
        row[f"at_{gpus}"] = dict(
            step_s=step_s, send_s=send_s, batch=batch / gpus, first=first(script, batch, gpus, step_s, send_s)
        )
    return row


def first(script, batch, gpus, step_s, send_s):
    """What breaks first on so many GPUs, in words."""
    name = BATCH.get(script, "batch").replace("_", "-")
    if batch % gpus:
        return (
            f"the batch: --{name} {batch} does not divide over {gpus} ranks, refused before a GPU is touched"
        )
    if send_s > step_s:
        return f"gradients: {send_s:.2g} s to send, {step_s:.2g} s to compute"
    if send_s > 0.3 * step_s:
        return f"gradients take {send_s / step_s:.0%} of a step unless they overlap with the backward pass"
    return f"nothing of these: {batch // gpus} of the batch a GPU, gradients {send_s / step_s:.0%} of a step"


def survey(root, mfu, price):
    """Rows of all large presets, and (script, preset, why) of those whose plan tells no FLOPs."""
    rows, silent = [], []
    for name in SCRIPTS:
        path = root / f"{name}.py"
        if not path.is_file():
            continue
        module = load(path)
        for preset in module.PRESETS:
            try:
                found, cfg = plan(path, module, preset)
            except run.UserError:               # ten labels a step do not divide over eight ranks: not large
                found, cfg = plan(path, module, preset, ranks=1)
            if not found["flops_per_step"] or not found["steps"]:
                silent.append((name, preset))
            elif found["flops_per_step"] * found["steps"] > LARGE:
                rows.append(facts(name, preset, found, cfg, mfu, price))
    return rows, silent


def data_of(row):
    """What lies on disk before the first step."""
    if row["tokens"]:
        return f"{row['tokens'] / 1e9:.0f} B tokens, {2e-9 * row['tokens']:.0f} GB as uint16 shards"
    return DATA.get(row["script"], "-")


def number(value, unit=""):
    return "-" if value is None else f"{value:,.3g}{unit}" if value < 1000 else f"{value:,.0f}{unit}"


def blocks(rows, silent, mfu, price):
    """{marked block of docs/scale.md: text}."""
    every = f"Plans without a FLOP count: {', '.join(map(' '.join, silent))}." if silent else ""
    assume = (f"Assumed: {mfu:.0%} of {PEAK / 1e12:.0f} TFLOP/s a GPU (H100 and H200 alike; no GPU was "
              f"measured here), {LINK / 1e9:.0f} GB/s between nodes a GPU, {price} dollars an hour. "
              f"Large means more than {LARGE:.0e} FLOPs. {every}")
    cost = markdown_table(
        [
            "script",
            "preset",
            "parameters",
            "FLOPs a step",
            "steps",
            "GB a GPU of 8",
            "GB of disk",
            "hours on 8",
            "dollars",
        ],
        [
            [
                r["script"],
                r["preset"],
                f"{r['params'] / 1e6:,.0f} M",
                f"{r['flops_per_step']:.2e}",
                f"{r['steps']:,}",
                number(r["memory_gb"]),
                number(r["disk_gb"]),
                number(r["hours_8"]),
                number(r["cost"]),
            ]
            for r in rows
        ],
    )
    wide = markdown_table(
        ["script", "preset", "batch", "first to break on 64 GPUs", "on 1,024 GPUs"],
        [[r["script"], r["preset"], r["batch"], r["at_64"]["first"], r["at_1024"]["first"]] for r in rows],
    )
    data = markdown_table(
        ["script", "preset", "data on disk", "one checkpoint, written by rank 0"],
        [
            [
                r["script"],
                r["preset"],
                data_of(r),
                f"{r['disk_gb'] / 2:.1f} GB, " f"{r['disk_gb'] / 2e-9 / DISK:.0f} s",
            ]
            for r in rows
        ],
    )
    return dict(cost=f"{assume}\n\n{cost}", wide=wide, data=data)


def main(argv=None):
    parser = Parser("eval.scale", __doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project [where this file lies]")
    parser.add_argument("--docs", action="store_true", help="rewrite the tables of docs/scale.md")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that training reaches [0.4]"
    )
    parser.add_argument("--price", type=float, default=PRICE, help=f"dollars a GPU hour [{PRICE}]")
    args = parser.parse_args(argv)
    if not 0 < args.mfu <= 1:
        raise run.UserError(f"--mfu {args.mfu} is no share; try 0.4")
    rows, silent = survey(args.root, args.mfu, args.price)
    if args.json:
        write_atomic(args.json, (json.dumps(rows, indent=1) + "\n").encode())
    if args.docs:
        path = args.root / "docs" / "scale.md"
        if not path.is_file():
            raise run.UserError(f"no {path} with the blocks to fill")
        text = path.read_text()
        for name, body in blocks(rows, silent, args.mfu, args.price).items():
            text = replace_block(text, name, body, path)
        write_atomic(path, text.encode())
    print(
        text_table(
            ["script", "preset", "parameters", "hours on 8", "dollars", "64 GPUs", "1,024 GPUs"],
            [
                [
                    r["script"],
                    r["preset"],
                    f"{r['params']:,}",
                    number(r["hours_8"]),
                    number(r["cost"]),
                    r["at_64"]["first"].split(":")[0],
                    r["at_1024"]["first"].split(":")[0],
                ]
                for r in rows
            ],
        )
    )


if __name__ == "__main__":
    cli("eval.scale", main)
