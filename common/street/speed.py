"""What a model costs: an estimate, and times on this machine (eager in float32, at another precision,
compiled)."""

import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common.street import bundle, pipeline, serving


def cost(cfg, params, D, depth, tokens):
    """Estimate of phase 1 for `plan`: floating-point operations of a step, memory of a rank, disk."""
    forward = 2 * params * tokens + 4 * depth * tokens**2 * D
    backward = {"head": 0, "peft": 1, "full": 2}[cfg.phase1_mode]
    trained = params if cfg.phase1_mode == "full" else params // 50
    act = 2 * cfg.phase1_batch * tokens * D * depth * 16 * (backward > 0)
    return dict(params=params,
                flops_per_step=forward * (1 + backward) * cfg.phase1_batch * cfg.phase1_accumulate,
                memory_gb_per_rank=round((4 * params + 16 * trained + act) / 1e9, 3),
                disk_gb=round((16 * params + 8 * params) / 1e9, 3), hours_at_mfu=None)


def clock(work, warmup, steps, device):
    """Seconds of each of `steps` calls after `warmup` untimed ones."""
    seconds = []
    for k in range(warmup + steps):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k >= warmup:
            seconds.append(time.perf_counter() - began)
    return seconds


def measure(net, x, precision, train, warmup, steps):
    """dict(ms_mean, ms_std, images_per_s) of net on the batch x; train: forward, backward and AdamW."""
    device, label = x.device, torch.arange(len(x), device=x.device) % 2
    optim = torch.optim.AdamW(net.parameters(), 1e-5) if train else None
    net.train(train)

    def work():
        with torch.set_grad_enabled(train), serving.autocast(precision, device):
            out = net(x)
        if train:
            optim.zero_grad()
            F.cross_entropy(out.float(), label).backward()
            optim.step()
    ms = [1000 * s for s in clock(work, warmup, steps, device)]
    return dict(ms_mean=statistics.mean(ms), ms_std=statistics.pstdev(ms),
                images_per_s=1000 * len(x) / statistics.mean(ms))


def bench(cfg, make, device, warmup=10):
    """eager-fp32, eager-auto and compile-auto -> rows, also in OUT/bench.json.  make: () -> a fresh model.

    --steps timed steps (50), batch --phase1-batch.  compile_s: the first call.  No speed-up is promised.
    """
    steps, rows = cfg.steps or 50, []
    x = torch.zeros(cfg.phase1_batch, 3, cfg.model_image, cfg.model_image, device=device)
    for name, precision in (("eager-fp32", "fp32"), ("eager-auto", cfg.hardware_precision),
                            ("compile-auto", cfg.hardware_precision)):
        torch.manual_seed(cfg.seed)
        net, compile_s = make().to(device), None
        if name == "compile-auto":
            began = time.perf_counter()
            fast = pipeline.maybe_compile(net, x[:2], True, cfg.hardware_compile_mode, cfg.hardware_stance)
            compile_s, failed, net = time.perf_counter() - began, fast is net, fast
            if failed:
                rows.append(dict(case=name, skipped="torch.compile failed; see the warning"))
                continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for train in (False, True):
            row = dict(case=name, step="train" if train else "forward", batch=len(x), compile_s=compile_s,
                       **measure(net, x, precision, train, warmup, steps))
            cuda = device.type == "cuda"
            row["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None
            rows.append(row)
    result = dict(device=str(device), torch=torch.__version__, threads=torch.get_num_threads(),
                  size=cfg.model_size, image=cfg.model_image, steps=steps, warmup=warmup, rows=rows)
    bundle.write_json(Path(cfg.out, "bench.json"), json.loads(json.dumps(result)))
    return rows


def table(rows):
    """Rows of bench as lines of text."""
    lines = [f"{'case':<14}{'step':<9}{'ms':>9}{'std':>8}{'images/s':>10}{'compile s':>11}{'GB':>7}"]
    number = lambda v, f: "-" if v is None else format(v, f)
    for r in rows:
        if "skipped" in r:
            lines.append(f"{r['case']:<14}{r['skipped']}")
            continue
        lines.append(f"{r['case']:<14}{r['step']:<9}{r['ms_mean']:>9.1f}{r['ms_std']:>8.1f}"
                     f"{r['images_per_s']:>10.1f}{number(r['compile_s'], '.1f'):>11}"
                     f"{number(r['memory_gb'], '.2f'):>7}")
    return "\n".join(lines)
