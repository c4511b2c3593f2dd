"""Selective conformal risk control for binary answers: accept some samples, bound the risk among those
accepted.

p calibrated, g = max(p, 1 - p), sets C(x) = {y : 1 - p_y <= lambda2}.  Everything here needs exchangeable
samples and nothing else; none of it holds for each class alone or after a shift.  Ties of g are broken by a
fixed hash.
"""

import hashlib
import math

import numpy as np


def tie_key(ids):
    """A fixed pseudo-random number of each id, to order equal scores."""
    return np.array([int.from_bytes(hashlib.sha256(f"tie|{i}".encode()).digest()[:6], "big") / 2**48
                     for i in ids])


def scrc_thresholds(prob_N, label_N, tie_N, xi=0.8, alpha=0.05):
    """(a) Exact and marginal: P(accept) = k / (n + 1) >= xi and P(y not in C | accept) <= alpha -> dict.

    k = ceil(xi (n + 1)); lambda1 is the k-th largest calibration g.  The k - 1 above it and an accepted test
    point are exchangeable, so lambda2 lets floor(alpha k - 1) of them miss.  When not even none may miss,
    lambda2 = 1: both labels.
    """
    p, y, n = np.asarray(prob_N, np.float64), np.asarray(label_N), len(prob_N)
    g = np.maximum(p, 1 - p)
    order = np.lexsort((tie_N, g))[::-1]
    k = math.ceil(xi * (n + 1) - 1e-9)
    bound = (float(g[order[k - 1]]), float(tie_N[order[k - 1]])) if k <= n else (-1.0, -1.0)
    error = np.sort(1 - np.where(y == 1, p, 1 - p)[order[:k - 1]])[::-1]
    j = math.floor(alpha * k - 1 + 1e-9)
    lambda2 = float(error[j]) if 0 <= j < len(error) else 1.0 if j < 0 else 0.0
    return dict(xi=xi, alpha=alpha, k=k, n=n, m=k - 1, lambda1=bound[0], lambda1_tie=bound[1],
                lambda2=lambda2,
                status="infeasible" if j < 0 else "ok")


def accepts(prob, tie, lambda1, lambda1_tie):
    """Is (g, tie) above (lambda1, its tie), in lexicographic order?"""
    g = np.maximum(prob, 1 - np.asarray(prob))
    return (g > lambda1) | ((g == lambda1) & (np.asarray(tie) > lambda1_tie))


def label_set(prob, lambda2):
    """Booleans [..., 2]: is class 0, class 1 in the set; an empty set becomes both, which only lowers the
    risk."""
    p = np.asarray(prob, np.float64)
    inside = np.stack([p <= lambda2, 1 - p <= lambda2], -1)
    return inside | ~inside.any(-1, keepdims=True)


def pac_threshold(grid, g_N, wrong_N, alpha=0.05, delta=0.1):
    """(c) With probability >= 1 - delta over calibration draws, the error among accepted (g >= t) is <=
    alpha.

    grid: thresholds fixed beforehand, tried from the strictest; p-value BinomCDF(errors; accepted, alpha);
    stop at the first above delta (learn-then-test, fixed sequence) -> dict(threshold or None, pvalues).
    """
    from scipy.stats import binom               # takes half as long to import as torch

    best, pvalues = None, []
    for t in sorted(grid, reverse=True):
        keep = np.asarray(g_N) >= t
        pvalues.append(float(binom.cdf(np.sum(np.asarray(wrong_N)[keep]), keep.sum(), alpha)) if keep.any()
                       else 1.0)
        if pvalues[-1] > delta:
            break
        best = float(t)
    return dict(threshold=best, alpha=alpha, delta=delta, grid=sorted(map(float, grid), reverse=True),
                pvalues=pvalues)


def fnr_threshold(positive_prob_N, alpha=0.05, group_N=None):
    """(d) Answer {0} only if p < t_lo: then P(answer {0} | y = 1) <= alpha exactly -> dict(t_lo or None,
    n_pos).

    t_lo: the largest p with (sum over groups of the share of their p below it + 1) / (groups + 1) <= alpha;
    without groups every sample is one, and t_lo the floor(alpha (n + 1))-th smallest p.
    """
    p = np.asarray(positive_prob_N, np.float64)
    group = np.unique(np.arange(len(p)) if group_N is None else group_N, return_inverse=True)[1]
    share = 1 / np.bincount(group)[group] if len(p) else p
    order = np.argsort(p, kind="stable")
    p, below = p[order], np.r_[0, np.cumsum(share[order])]
    units = len(np.unique(group))
    ok = below[np.searchsorted(p, p)] + 1 <= alpha * (units + 1) + 1e-9
    return dict(alpha=alpha, n_pos=units, t_lo=float(p[ok].max()) if ok.any() else None,
                status="ok" if ok.any() else "infeasible")


def one_per_group(group, ids):
    """Index of one sample of every group, picked by the hash of its id."""
    order = np.argsort(tie_key(ids), kind="stable")
    return np.sort(order[np.unique(np.asarray(group)[order], return_index=True)[1]])


def guarantees(conf, p_conf, p_select, tau, *, xi, alpha, delta, fnr_alpha, unit="group", exchangeable=True):
    """The four statements of a calibration half -> dict(selection, risk, fnr, pac) for scrc_params.

    conf: dict(label, group, id).  unit "group": frames of one group resemble each other, so only one frame of
    each group (all of them, averaged, for fnr) may speak: exact for any frame of a new group.  "frame": exact
    if frames are exchangeable one by one.  exchangeable False: the test split is known to be of another kind.
    """
    group = conf["group"] if unit == "group" else np.arange(len(p_conf))
    at = one_per_group(group, conf["id"])
    p, y, positive = p_conf[at], conf["label"][at], conf["label"] == 1
    chosen = scrc_thresholds(p, y, tie_key(conf["id"][at]), xi, alpha)
    sure = np.maximum(p_select, 1 - p_select)
    grid = sorted({float(np.quantile(sure, 1 - c)) for c in np.arange(0.30, 1.0001, 0.05).clip(max=1)})
    holds = "marginal_exact" if chosen["status"] == "ok" and exchangeable else "none"
    return dict(
        unit=unit, exchangeable=exchangeable,
        selection=dict(score="max_prob", **{k: chosen[k]
                                            for k in ("xi", "lambda1", "lambda1_tie", "k", "n")}),
        risk=dict(loss="miscoverage", alpha=alpha, lambda2=chosen["lambda2"], m=chosen["m"],
                  status=chosen["status"], guarantee=holds),
        fnr=fnr_threshold(p_conf[positive], fnr_alpha, group[positive]),
        pac=pac_threshold(grid, np.maximum(p, 1 - p), (p >= tau) != (y == 1), alpha, delta))


def crc_threshold(grid, loss_NG, alpha, bound=1.0):
    """(e) inf {lambda : (n mean loss + B) / (n + 1) <= alpha} for losses that fall as lambda grows; None if
    none."""
    n = len(loss_NG)
    ok = np.flatnonzero((np.sum(loss_NG, 0) + bound) / (n + 1) <= alpha)
    return float(np.asarray(grid)[ok[0]]) if len(ok) else None
