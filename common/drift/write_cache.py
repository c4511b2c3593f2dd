"""Fill a latent cache (common/latents.py) from a dataset: resumable, from any number of ranks, with a bar."""

import torch
import torch.distributed as dist

from common import run
from common.latents import LatentWriter


def write_cache(out, images, shape, meta, latents, ddp):
    """latents(ids) -> float32 [B, *shape] of id = 2 * row + mirrored; both of every image go to the cache at
    `out`.
    """
    keys = [images.read.name(i) for i in range(len(images))]
    writer = LatentWriter(out, images.labels, images.classes, keys, shape, meta, ddp.rank, ddp.world)
    todo = writer.todo()
    for i in run.progress(0, len(todo), ddp, "cache"):
        chunk, rows = todo[i - 1]
        ids = 2 * torch.tensor(list(rows))
        writer.write(chunk, torch.stack([latents(ids), latents(ids + 1)], dim=1))
        if run.stop_requested(ddp):
            raise run.Interrupted(f"stopped after {i} of {len(todo)} chunks; the same command continues")
    if ddp.world > 1:
        dist.barrier()
    if ddp.rank == 0:
        writer.finish()
        print(f"{len(images)} images and their mirrors in {out}; {len(images.skipped)} damaged ones replaced")
