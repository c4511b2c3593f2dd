"""Selective conformal risk control for binary answers: accept some samples, bound the risk among those accepted.

p calibrated, g = max(p, 1 - p), sets C(x) = {y : 1 - p_y <= lambda2}.  Everything here needs exchangeable samples
and nothing else; none of it holds for each class alone or after a shift.  Ties of g are broken by a fixed hash.
"""

import hashlib
import math

import numpy as np


def tie_key(ids):
    """A fixed pseudo-random number of each id, to order equal scores."""
    return np.array([int.from_bytes(hashlib.sha256(f"tie|{i}".encode()).digest()[:6], "big") / 2**48 for i in ids])


def scrc_thresholds(prob_N, label_N, tie_N, xi=0.8, alpha=0.05):
    """(a) Exact and marginal: P(accept) = k / (n + 1) >= xi and P(y not in C | accept) <= alpha -> dict.

    k = ceil(xi (n + 1)); lambda1 is the k-th largest calibration g.  The k - 1 above it and an accepted test point are
    exchangeable, so lambda2 lets floor(alpha k - 1) of them miss.  When not even none may miss, lambda2 = 1: both labels.
    """
    p, y, n = np.asarray(prob_N, np.float64), np.asarray(label_N), len(prob_N)
    g = np.maximum(p, 1 - p)
    order = np.lexsort((tie_N, g))[::-1]
    k = math.ceil(xi * (n + 1) - 1e-9)
    bound = (float(g[order[k - 1]]), float(tie_N[order[k - 1]])) if k <= n else (-1.0, -1.0)
    error = np.sort(1 - np.where(y == 1, p, 1 - p)[order[:k - 1]])[::-1]
    j = math.floor(alpha * k - 1 + 1e-9)
    lambda2 = float(error[j]) if 0 <= j < len(error) else 1.0 if j < 0 else 0.0
    return dict(xi=xi, alpha=alpha, k=k, n=n, m=k - 1, lambda1=bound[0], lambda1_tie=bound[1], lambda2=lambda2,
                status="infeasible" if j < 0 else "ok")


def accepts(prob, tie, lambda1, lambda1_tie):
    """Is (g, tie) above (lambda1, its tie), in lexicographic order?"""
    g = np.maximum(prob, 1 - np.asarray(prob))
    return (g > lambda1) | ((g == lambda1) & (np.asarray(tie) > lambda1_tie))


def label_set(prob, lambda2):
    """Booleans [..., 2]: is class 0, class 1 in the set; an empty set becomes both, which only lowers the risk."""
    p = np.asarray(prob, np.float64)
    inside = np.stack([p <= lambda2, 1 - p <= lambda2], -1)
    return inside | ~inside.any(-1, keepdims=True)


def pac_threshold(grid, g_N, wrong_N, alpha=0.05, delta=0.1):
    """(c) With probability >= 1 - delta over calibration draws, the error among accepted (g >= t) is <= alpha.

    grid: thresholds fixed beforehand, tried from the strictest; p-value BinomCDF(errors; accepted, alpha); stop at the
    first above delta (learn-then-test, fixed sequence) -> dict(threshold or None, pvalues).
    """
    best, pvalues = None, []
    for t in sorted(grid, reverse=True):
        keep = np.asarray(g_N) >= t
        from scipy.stats import binom           # takes half as long to import as torch
        pvalues.append(float(binom.cdf(np.sum(np.asarray(wrong_N)[keep]), keep.sum(), alpha)) if keep.any() else 1.0)
        if pvalues[-1] > delta:
            break
        best = float(t)
    return dict(threshold=best, alpha=alpha, delta=delta, grid=sorted(map(float, grid), reverse=True), pvalues=pvalues)


def fnr_threshold(positive_prob_N, alpha=0.05):
    """(d) Answer {0} only if p < t_lo: then P(answer {0} | y = 1) <= alpha exactly -> dict(t_lo or None, n_pos)."""
    p = np.sort(np.asarray(positive_prob_N, np.float64))
    kk = math.floor(alpha * (len(p) + 1) + 1e-9)
    return dict(alpha=alpha, n_pos=len(p), t_lo=float(p[kk - 1]) if kk else None, status="ok" if kk else "infeasible")


def crc_threshold(grid, loss_NG, alpha, bound=1.0):
    """(e) inf {lambda : (n mean loss + B) / (n + 1) <= alpha} for losses that fall as lambda grows; None if none."""
    n = len(loss_NG)
    ok = np.flatnonzero((np.sum(loss_NG, 0) + bound) / (n + 1) <= alpha)
    return float(np.asarray(grid)[ok[0]]) if len(ok) else None
