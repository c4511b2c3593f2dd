"""Confidence intervals of a statistic by resampling; a resample is a row of weights (common/classify.py).

n items  B resamples
"""

import numpy as np
import scipy

from common.classify import chunks, ratio


def bootstrap(statistic, n, group=None, resamples=2000, level=0.95, method="percentile", seed=42):
    """Confidence intervals of a weighted statistic -> dict name -> dict(value, std, lower, upper, undefined).

    statistic  function weights [B, n] -> dict of arrays [B], as binary_metrics returns; a difference of two
               such functions gives a paired comparison, since both see the same weights.
    group      [n] labels of dependent items (frames of one video); whole groups are drawn. Default: every
               item on its own.
    method     "percentile" or "bca" (bias-corrected and accelerated; one more evaluation per group).
    undefined  resamples in which the value was nan; they are left out.
    """
    group = np.arange(n) if group is None else np.unique(np.asarray(group), return_inverse=True)[1]
    if len(group) != n:
        raise ValueError(f"{n} items and {len(group)} group labels")
    if method not in ("percentile", "bca"):
        raise ValueError(f"method must be 'percentile' or 'bca', not {method!r}")
    groups, alone, rng = int(group.max()) + 1, len(np.unique(group)) == n, np.random.default_rng(seed)

    def draw(rows):
        picked = rng.integers(0, groups, (rows, groups)) + np.arange(rows)[:, None] * groups
        weight = np.bincount(picked.ravel(), minlength=rows * groups).reshape(rows, groups)
        return weight if alone else weight[:, group]

    def collect(weights):
        parts = [statistic(w) for w in weights]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    values = {name: value[0] for name, value in statistic(np.ones((1, n))).items()}
    drawn = collect(draw(rows) for rows in chunks(resamples, n))
    left_out = {}
    if method == "bca":
        starts = np.cumsum([0, *chunks(groups, n)])
        left_out = collect(1. - (group == np.arange(a, b)[:, None]) for a, b in zip(starts, starts[1:]))
    out = {}
    for name, sample in drawn.items():
        kept = sample[np.isfinite(sample)]
        tail = np.array([(1 - level) / 2, (1 + level) / 2])
        if method == "bca" and len(kept):
            tail = _bca(tail, kept, values[name], left_out[name])
        lower, upper = np.quantile(kept, tail) if len(kept) else (np.nan, np.nan)
        std = float(kept.std(ddof=1)) if len(kept) > 1 else float("nan")
        out[name] = dict(value=float(values[name]), std=std, lower=float(lower), upper=float(upper),
                         undefined=int(len(sample) - len(kept)))
    return out


def _bca(tail, sample, value, jackknife):
    """Quantiles that replace `tail` (Efron 1987): z0 is the bias of the resamples, a the jackknife's skew."""
    below = (np.mean(sample < value) + np.mean(sample <= value)) / 2
    z0 = scipy.special.ndtri(np.clip(below, 0.5 / len(sample), 1 - 0.5 / len(sample)))
    d = np.nanmean(jackknife) - jackknife
    a = ratio(np.nansum(d ** 3), 6 * np.nansum(d ** 2) ** 1.5)
    z = z0 + scipy.special.ndtri(tail)
    return scipy.special.ndtr(z0 + z / (1 - a * z))
