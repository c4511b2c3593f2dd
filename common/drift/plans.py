"""What a step takes, counted on the meta device: FLOP, and the memory of a rank under each way to run it."""

import json
import math
from resource import RUSAGE_SELF, getrusage

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.files import write_atomic
from common.graph import saved

WAYS = [(how, remat) for how in ("ddp", "fsdp2") for remat in (False, True)]


def numel(net):
    return sum(p.numel() for p in net.parameters())


def flops(call):
    """FLOP of call(), 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def modes(weights_gb, other_gb, graph_gb, world, gpu_gb):
    """Memory of a rank for every way to run -> {"ddp": GB, "ddp+remat": ..., ...} and the first that fits.

    weights_gb: parameters, gradients, moments, averages. other_gb: what no way changes. graph_gb: (without,
    with remat).
    """
    share = dict(ddp=1, fsdp2=world)
    table = {how + "+remat" * remat: weights_gb / share[how] + other_gb + graph_gb[remat]
             for how, remat in WAYS}
    table = table if world > 1 else {k: v for k, v in table.items() if not k.startswith("fsdp2")}
    return table, next((name for name, gb in table.items() if gb <= gpu_gb), None)


def gpu_gb(device):
    """Memory of this machine's GPU, or of the common 80 GB card; a tenth is left to the allocator."""
    cuda = device != "cpu" and torch.cuda.is_available()
    return 0.9 * (torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else 80)


def disk_gb(net, averages):
    """Two checkpoints of net, averages and Adam's moments, and the exported weights."""
    return numel(net) * 4e-9 * (2 * (3 + averages) + averages + 1)


def report(cfg, world, gen, encoder, mae, calls, mae_call):
    """The plan of a preset: {name: number} for run.print_plan; all networks on the meta device.

    calls: generate() one image, encode(x) -> features of one; mae_call(): the MAE's loss of one.
    """
    made, real = cfg.labels * cfg.gen, cfg.labels * (cfg.pos + cfg.unc)
    samples, averages = (cfg.micro or max(1, cfg.labels // world)) * cfg.gen, len(cfg.ema)
    generate, encode = calls
    image = torch.empty(1, cfg.channels, cfg.size, cfg.size, device="meta", requires_grad=True)
    with torch.no_grad():
        feats = encode(image.detach())
    numbers = sum(math.prod(f.shape[1:]) for f in feats.values())
    gen_flops, enc_flops = flops(generate), flops(lambda: encode(image))
    # the generator runs forward and backward (3 forwards), the encoder backward towards its input only (2)
    step = 3 * made * gen_flops + (2 * made + real) * enc_flops
    graph, mae_graph = [], []
    encoder.requires_grad_(False)
    for remat in (False, True):
        remat_all(remat, gen, encoder)
        graph.append(samples * (saved(generate, gen) + saved(lambda: encode(image), encoder)) / 1e9)
    mae.requires_grad_(True)
    for remat in (False, True):
        remat_all(remat, mae)
        at_once = cfg.mae_micro or max(1, cfg.mae_batch // world)
        mae_graph.append(at_once * saved(mae_call, mae) / 1e9)
    # bf16 features of the whole batch wait between the two passes, those of samples with a gradient
    other = (2 * numbers * (2 * made + real) // world + 2 * numel(encoder)) / 1e9
    gb, way = gpu_gb(cfg.device), None
    table, way = modes(numel(gen) * 4e-9 * (4 + averages), other, graph, world, gb)
    mae_table, mae_way = modes(numel(mae) * 4e-9 * 5, 0, mae_graph, world, gb)
    now = cfg.shard * (world > 1) or "ddp"
    return dict(
        params=numel(gen), flops_per_step=step, memory_gb_per_rank=table[now + "+remat" * cfg.remat],
        disk_gb=disk_gb(gen, averages), hours_at_mfu=step * cfg.steps / (400e12 * world) / 3600,
        mfu_assumed="400 TFLOP/s a rank", mae_params=numel(mae), generator_flops=gen_flops,
        encoder_flops=enc_flops, feature_keys=len(feats),
        feature_vectors=sum(f.shape[1] for f in feats.values()), ranks=world,
        memory_gb_of_features=other, **{f"generator_gb_{k}": v for k, v in table.items()},
        **{f"encoder_gb_{k}": v for k, v in mae_table.items()},
        generator_needs=way or f"over {world} ranks", encoder_needs=mae_way or f"over {world} ranks")


def remat_all(on, *nets):
    for module in (m for net in nets for m in net.modules()):
        if hasattr(module, "remat"):
            module.remat = on


# --- measured ----------------------------------------------------------

def memory_gb(device):
    """Peak memory of the GPU, or of the process."""
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 1e9 if cuda else getrusage(RUSAGE_SELF).ru_maxrss / 1e6


HEAD = "| variant | parameters | img/s | memory GB | log10 lambda | accuracy | fd |\n|" + "---|" * 7 + "\n"


def add_row(out, name, params, score):
    """The run OUT/NAME as one more row of OUT/ablate.md, in the place of an older one -> the row."""
    with open(f"{out}/{name}/log.jsonl") as file:
        last = [r for r in map(json.loads, file) if r["kind"] == "train"][-1]
    row = dict(accuracy=math.nan, fd=math.nan) | score | last           # img/s of training
    cells = "| {name} | {params:,} | {img_s:.1f} | {mem_gb:.2f} | {lam_mean:.3f} | {accuracy:.3f} | "
    line = (cells + "{fd:.2f} |").format(name=name, params=params, **row)
    try:
        with open(f"{out}/ablate.md") as file:
            rows = [r for r in file.read().splitlines()[2:] if not r.startswith(f"| {name} |")]
    except FileNotFoundError:
        rows = []
    write_atomic(f"{out}/ablate.md", (HEAD + "\n".join([*rows, line]) + "\n").encode())
    return line
