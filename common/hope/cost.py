"""What a run of hope_lm costs, from its Config alone: nothing is allocated; and the
table of runs that were."""

import statistics


def estimate(cfg, P):
    """Parameters P -> dict of FLOP a step, GB a rank by kind, disk and hours at 40% of an
    H100's bfloat16 peak."""
    D, K, tokens = cfg.width, cfg.width // cfg.heads, cfg.batch * cfg.length
    memories = dict(lmm=1, mac=1, mag=1, mal=1, hope=1 + len(set(cfg.adapt) & set("qkv"))
                    + ("g" in cfg.adapt) / 2)
    memories = memories.get(cfg.variant, 0)
    window = cfg.window * (cfg.variant in ("swa", "mag", "mal"))
    seen = cfg.length / 2 if cfg.variant in ("full", "hope_attention") else window
    per_token = memories * D * (14 * cfg.memory_width * K + 12 * cfg.chunk)  # recalls and writes; Gram terms
    flops = 6 * P * tokens + 6 * cfg.depth * tokens * (per_token + 2 * D * seen)
    rows, moves = cfg.micro or cfg.batch, sum(cfg.length / p for p in cfg.periods[:cfg.levels])
    boundary = rows * cfg.depth * cfg.length / cfg.chunk * memories * 4 * cfg.memory_width * K * D
    copies = rows * cfg.depth * moves * 2 * cfg.hidden * D if cfg.cms == "context" else 0
    activations = rows * cfg.length * (D * cfg.depth * (2 if cfg.remat == "block" else 40) + 3 * cfg.vocab)
    gb = dict(boundary_states_gb=4e-9 * boundary, cms_copies_gb=4e-9 * copies,
              activations_gb=4e-9 * activations)
    states = dict(muon=1, adamw=2, m3=5)[cfg.optimizer]
    return dict(params=P, hidden=cfg.hidden, flops_per_step=float(flops), tokens=tokens * cfg.steps, **gb,
                memory_gb_per_rank=P * 4e-9 * (2 + states) + sum(gb.values()),
                disk_gb=P * 4e-9 * (3 + 2 * states), hours_at_mfu=flops * cfg.steps / (0.4 * 989e12) / 3600)


def table(title, rows):
    """Markdown of an ablation: arm -> list of runs, dict(val_bpb, accuracy, time_s, params)."""
    lines = [f"# {title}", "", "| arm | parameters | bits per byte, mean | s.d. | accuracy | seconds |",
             "|---|---|---|---|---|---|"]
    for arm, runs in rows.items():
        bpb = [r["val_bpb"] for r in runs]
        spread = statistics.stdev(bpb) if len(bpb) > 1 else 0.0
        right = [r["accuracy"] for r in runs if r["accuracy"] is not None]
        lines.append(f"| {arm} | {runs[0]['params']:,} | {statistics.mean(bpb):.4f} | {spread:.4f} | "
                     f"{format(statistics.mean(right), '.4f') if right else '-'} | "
                     f"{statistics.mean(r['time_s'] for r in runs):.0f} |")
    return "\n".join(lines) + "\n"
