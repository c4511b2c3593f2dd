"""Exact nearest neighbours and the measures built on them, in tiles: no N x M matrix is ever held.

N rows of real data  M rows of fake data  Q queries  D features  k neighbours
"""

import contextlib

import numpy as np
import torch


def _tensor(x):
    """Tensor of an array (copied when read-only, as a memmap is) or of a tensor."""
    return torch.as_tensor(x.copy() if isinstance(x, np.ndarray) and not x.flags.writeable else x)


def double(x):
    """float64 tensor on the device of x, except where the device has no float64."""
    x = _tensor(x)
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextlib.contextmanager
def _full_float32():
    """No TF32 in here: a distance of 10 mantissa bits reorders neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rows(x, start, stop, like):
    """Rows [start, stop) of an array, memmap or tensor, flattened; dtype and device as `like`."""
    return _tensor(x[start:stop]).to(like.device, like.dtype).flatten(1)


def _square_norm(x):
    """[N] squared lengths; ten times faster on CPU than x.square().sum(1)."""
    return torch.linalg.vector_norm(x, dim=1).square()


def _smallest(a_QD, b, k, tile, centre=0.):
    """k smallest squared distances from rows of a to rows of b - centre -> ([Q, k], index [Q, k])."""
    best = None
    for start in range(0, len(b), tile):
        part = _rows(b, start, start + tile, a_QD) - centre
        score = torch.addmm(_square_norm(part), a_QD, part.T, alpha=-2)     # |b|^2 - 2ab; |a|^2 ranks nothing
        value, index = score.topk(min(k, score.shape[1]), 1, largest=False)
        index += start
        if best is not None:                                               # best of before and this tile
            value, index = torch.cat([best[0], value], 1), torch.cat([best[1], index], 1)
            value, order = value.topk(min(k, value.shape[1]), 1, largest=False)
            index = index.gather(1, order)
        best = value, index
    return (best[0] + _square_norm(a_QD)[:, None]).clamp_min_(0), best[1]


@torch.no_grad()
def nearest_neighbours(query, data, k=1, tile=4096):
    """The k rows of data nearest to each row of query -> (distance [Q, k] float64, index [Q, k]), sorted.

    Rows may have any shape and dtype (uint8 images, features); `data` may be a memmap. k + 8 candidates are
    selected by float32 matrix products around the mean of the queries, which lose a distance of 0 in
    rounding, and re-scored in float64 by subtraction: a copy scores exactly 0.
    """
    if len(data) < k:
        raise ValueError(f"{k} neighbours wanted of {len(data)} rows")
    distances, indices = [], []
    with _full_float32():
        for start in range(0, len(query), tile):
            exact = double(query[start:start + tile]).flatten(1)
            centre = exact.mean(0)
            index = _smallest((exact - centre).float(), data, min(k + 8, len(data)), tile, centre.float())[1]
            distance = torch.empty(index.shape, dtype=torch.float64, device=exact.device)
            where = index.to(data.device) if torch.is_tensor(data) else index.cpu().numpy()
            for row, candidates in enumerate(where):
                picked = double(data[candidates]).to(exact.device).flatten(1)
                distance[row] = (picked - exact[row]).square().sum(1).sqrt()
            distance, order = distance.sort(dim=1, stable=True)
            distances.append(distance[:, :k])
            indices.append(index.gather(1, order)[:, :k])
    return torch.cat(distances), torch.cat(indices)


@torch.no_grad()
def manifold_metrics(real_ND, fake_MD, k=3, tile=4096):
    """Improved precision, recall (arXiv 1904.06991), density, coverage (arXiv 2002.09797) -> dict of floats.

    Every set is the union of balls around its rows that reach their k-th neighbour. precision: share of fakes
    in a real ball; recall: share of reals in a fake ball; density: real balls around a fake, over k;
    coverage: share of real balls holding a fake. Runs in float64 for float64 rows, else float32 without TF32;
    memory tile x tile beside the features.
    """
    real, fake = _tensor(real_ND), _tensor(fake_MD)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features do not match: {real.shape[1]} and {fake.shape[1]} wide")
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{min(len(real), len(fake))} rows are too few for the {k}-th neighbour")
    dtype = torch.float64 if real.dtype == fake.dtype == torch.float64 else torch.float32
    centre = real.to(dtype).mean(0)             # distances do not change, their rounding errors shrink
    real, fake = real.to(dtype) - centre, fake.to(dtype) - centre
    with _full_float32():
        radius_N, radius_M = (torch.cat([_smallest(part, x, k + 1, tile)[0][:, k] for part in x.split(tile)])
                              for x in (real, fake))     # entry 0 is the row itself
        recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
        balls = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
        norm_N, norm_M = _square_norm(real), _square_norm(fake)
        for i in range(0, len(real), tile):
            for j in range(0, len(fake), tile):
                rows, cols = slice(i, i + tile), slice(j, j + tile)
                square = torch.addmm(norm_M[cols], real[rows], fake[cols].T, alpha=-2) + norm_N[rows, None]
                inside = square <= radius_N[rows, None]
                balls[cols] += inside.sum(0)
                covered[rows] |= inside.any(1)
                recalled[rows] |= (square <= radius_M[None, cols]).any(1)
    return dict(precision=(balls > 0).double().mean().item(), recall=recalled.double().mean().item(),
                density=balls.double().mean().item() / k, coverage=covered.double().mean().item())


def precision_recall(real_ND, fake_MD, k=3):
    """Improved precision and recall -> (precision, recall). Swapping the sets swaps the two."""
    out = manifold_metrics(real_ND, fake_MD, k)
    return out["precision"], out["recall"]
