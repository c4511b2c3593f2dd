"""Scores of binary classifiers: Matthews correlation, ROC and PR areas, calibration error, of resamples too.

A resample is a row of weights (how often each item was drawn), so thousands of resamples are one matrix:
everything that is a sum over items becomes a matrix product, everything that needs a ranking becomes a prefix
sum over items sorted once.

N items  B resamples  C columns  K classes  T thresholds
"""

import numpy as np


def _check(prob, label, binary=True):
    """float64 scores and bool labels (or int classes) of equal length, or ValueError."""
    prob, label = np.asarray(prob, np.float64), np.asarray(label)
    if len(prob) != len(label) or not len(prob):
        raise ValueError(f"{len(prob)} scores and {len(label)} labels")
    if not np.isfinite(prob).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(prob))} scores are not finite")
    if binary and not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return prob, label.astype(bool) if binary else label.astype(np.int64)


def ratio(a, b):
    """a / b in float64, 0 where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.zeros(a.shape), where=b != 0)[()]


# --- one threshold, all thresholds ---------------------------------------

def mcc(tp, tn, fp, fn):
    """Matthews correlation (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) of counts; 0 where that
    root is 0. Arrays of any shape; in float64, since the product of four counts of 60 000 overflows int64."""
    tp, tn, fp, fn = (np.asarray(x, np.float64) for x in (tp, tn, fp, fn))
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def mcc_at_prior(tpr, tnr, prior=0.5):
    """MCC that the same true positive and true negative rates give at another share of positives."""
    predicted = prior * tpr + (1 - prior) * (1 - np.asarray(tnr, np.float64))
    return (tpr + tnr - 1) * np.sqrt(ratio(prior * (1 - prior), predicted * (1 - predicted)))


def mcc_sweep(prob_N, label_N, n_thresholds=5000, prior=None, grid_T=None):
    """MCC of "prob >= t" at every t of linspace(0, 1, n_thresholds) -> dict.

    threshold, mcc, index       the best: the middle of the longest run of thresholds within 1e-12 of it
    curve                       record array [T] with fields threshold, mcc, tp, tn, fp, fn
    exact_threshold, exact_mcc  the best of all cuts (midpoints of distinct scores); a grid misses it when
                                scores crowd near 0 or 1
    prior: maximise the MCC at this share of positives instead of the sample's.  grid_T: other thresholds.
    """
    prob, label = _check(prob_N, label_N)
    positive, negative = np.sort(prob[label]), np.sort(prob[~label])

    def at(threshold):
        tp = len(positive) - np.searchsorted(positive, threshold)
        fp = len(negative) - np.searchsorted(negative, threshold)
        tn, fn = len(negative) - fp, len(positive) - tp
        value = mcc(tp, tn, fp, fn) if prior is None else \
            mcc_at_prior(ratio(tp, len(positive)), ratio(tn, len(negative)), prior)
        return np.rec.fromarrays([threshold, value, tp, tn, fp, fn], names="threshold,mcc,tp,tn,fp,fn")

    curve = at(np.linspace(0, 1, n_thresholds) if grid_T is None else np.asarray(grid_T, np.float64))
    best = np.flatnonzero(curve.mcc >= curve.mcc.max() - 1e-12)
    run = max(np.split(best, np.flatnonzero(np.diff(best) > 1) + 1), key=len)
    index = int(run[(len(run) - 1) // 2])
    scores = np.unique(prob)
    exact = at(np.r_[scores[0], (scores[1:] + scores[:-1]) / 2])
    top = int(exact.mcc.argmax())
    return dict(threshold=float(curve.threshold[index]), mcc=float(curve.mcc[index]), index=index,
                curve=curve, exact_threshold=float(exact.threshold[top]), exact_mcc=float(exact.mcc[top]))


def roc_auc(score_N, label_N):
    """Area under the ROC curve: P(positive scores above negative) + P(equal) / 2; nan with one class only."""
    score, label = _check(score_N, label_N)
    positive, negative = score[label], np.sort(score[~label])
    if not len(positive) or not len(negative):
        return float("nan")
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def average_precision(score_N, label_N):
    """sum_i (R_i - R_{i-1}) P_i over distinct scores from high to low; nan without positives."""
    score, label = _check(score_N, label_N)
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score[order])), len(score) - 1]     # of every group of ties
    tp = np.cumsum(label[order])[last]
    return float(np.sum(np.diff(tp, prepend=0) * tp / (last + 1)) / tp[-1]) if tp[-1] else float("nan")


# --- probabilities -------------------------------------------------------

def brier_score(prob_N, label_N):
    """mean (p - y)^2."""
    prob, label = _check(prob_N, label_N)
    return float(np.mean((prob - label) ** 2))


def _log_loss(prob, label):
    """-log of the probability given to the label, with p kept 2e-16 away from 0 and 1."""
    eps = np.finfo(np.float64).eps
    return -np.log(np.clip(np.where(label, prob, 1 - prob), eps, 1 - eps))


def negative_log_likelihood(prob_N, label_N):
    """-mean (y log p + (1 - y) log(1 - p)) in nats."""
    return float(np.mean(_log_loss(*_check(prob_N, label_N))))


def _bins(prob, bins, binning):
    """Bin of every item: widths [k/M, (k+1)/M) with 1.0 in the last, or equal mass with ties together."""
    if prob.min() < 0 or prob.max() > 1:
        raise ValueError(f"probabilities span {prob.min():.3g} to {prob.max():.3g}, expected 0 to 1")
    if binning == "width":
        return np.minimum(np.searchsorted(np.linspace(0, 1, bins + 1), prob, "right") - 1, bins - 1)
    if binning == "mass":
        return np.searchsorted(np.sort(prob), prob, "left") * bins // len(prob)
    raise ValueError(f"binning must be 'width' or 'mass', not {binning!r}")


def reliability(prob_N, label_N, bins=15, binning="width"):
    """Reliability diagram: dict(count, prob, label) of arrays [bins]; means are nan in empty bins."""
    prob, label = _check(prob_N, label_N)
    index = _bins(prob, bins, binning)
    count, *sums = (np.bincount(index, w, bins) for w in (None, prob, label))
    with np.errstate(invalid="ignore"):
        return dict(count=count, prob=sums[0] / count, label=sums[1] / count)


def _top(prob, label):
    """Confidence of the predicted class and whether it was right; prob [N] (1 from 1/2 up) or [N, K]."""
    if prob.ndim == 1:
        return np.maximum(prob, 1 - prob), (prob >= 0.5) == label
    return prob.max(1), prob.argmax(1) == label


def expected_calibration_error(prob_N, label_N, bins=15, binning="width", kind=None, norm="l1", debias=False):
    """sum_b n_b / n |mean label - mean p| over bins -> float.

    kind     "positive": p is the probability of class 1 (default for prob [N]); "top": confidence of the
             predicted class against being right (default for [N, K]); "classwise": mean over the K classes of
             one-against-rest errors.
    binning  "width", or "mass": bins of equal counts, which is less biased.
    norm     "l1" (ECE), "l2" (root mean square), "max" (MCE). debias: l2 only, subtract the variance of each
             bin's mean label.
    """
    prob = np.asarray(prob_N, np.float64)
    kind = kind or ("positive" if prob.ndim == 1 else "top")
    if kind == "classwise":
        one_to_rest = [(prob[:, c], np.asarray(label_N) == c) for c in range(prob.shape[1])]
        return float(np.mean([expected_calibration_error(p, y, bins, binning, "positive", norm, debias)
                              for p, y in one_to_rest]))
    prob, label = _check(prob, label_N, binary=prob.ndim == 1)
    prob, label = _top(prob, label) if kind == "top" else (prob, label)
    table = reliability(prob, label, bins, binning)
    n, p, y = (x[table["count"] > 0] for x in table.values())
    gap = np.abs(y - p)
    if norm == "max":
        return float(gap.max())
    if norm == "l2":
        square = gap ** 2 - (ratio(y * (1 - y), n - 1) if debias else 0)
        return float(np.sqrt(max(np.sum(n * square) / n.sum(), 0)))
    return float(np.sum(n * gap) / n.sum())


def sweep_calibration_error(prob_N, label_N):
    """ECE_sweep (arXiv 2012.08668): equal-mass bins, as many as keep their mean labels ascending."""
    prob, label = _check(prob_N, label_N)
    bins = 1
    while bins < len(prob):
        rate = reliability(prob, label, bins + 1, "mass")["label"]
        if np.any(np.diff(rate[~np.isnan(rate)]) < 0):
            break
        bins += 1
    return expected_calibration_error(prob, label, bins, "mass")


def calibration_noise_floor(prob_N, label_N=None, bins=15, binning="width", draws=1000, seed=0):
    """ECE that a perfectly calibrated predictor with these probabilities would show -> dict(mean, p95).

    Labels are drawn from Bernoulli(p). With label_N also p_value: share of draws at least as bad, +1 rule.
    """
    prob = np.asarray(prob_N, np.float64)
    member_NM = _one_hot(_bins(prob, bins, binning), bins)
    expected, rng = prob @ member_NM, np.random.default_rng(seed)
    drawn = [(rng.random((rows, len(prob))) < prob).astype(np.float64) @ member_NM
             for rows in chunks(draws, len(prob))]
    errors = np.abs(np.concatenate(drawn) - expected).sum(1) / len(prob)
    out = dict(mean=float(errors.mean()), p95=float(np.quantile(errors, 0.95)))
    if label_N is not None:
        seen = expected_calibration_error(prob, label_N, bins, binning)
        out["p_value"] = float((1 + np.count_nonzero(errors >= seen)) / (1 + draws))
    return out


def _prefix(w_NB):
    """Sums of the first 0, 1 .. N rows -> [N + 1, B]."""
    out = np.empty((len(w_NB) + 1, w_NB.shape[1]))
    out[0] = 0
    np.cumsum(w_NB, 0, out=out[1:])
    return out


def _one_hot(index, size):
    return (index[:, None] == np.arange(size)).astype(np.float64)


def chunks(rows, width, cells=1 << 18):
    """Split rows so that a [chunk, width] float64 matrix stays near the size of a CPU cache."""
    step = max(1, cells // max(width, 1))
    return [min(step, rows - start) for start in range(0, rows, step)]


# --- every metric, of resamples too --------------------------------------

def count_metrics(tp, tn, fp, fn):
    """Every metric that needs only the four counts, arrays of any shape; ratios without denominator are 0."""
    tpr, tnr, total = ratio(tp, tp + fn), ratio(tn, tn + fp), tp + tn + fp + fn
    return dict(accuracy=ratio(tp + tn, total), balanced_accuracy=(tpr + tnr) / 2,
                precision=ratio(tp, tp + fp), recall=tpr, specificity=tnr, fnr=ratio(fn, tp + fn),
                fpr=ratio(fp, tn + fp), f1=ratio(2 * tp, 2 * tp + fp + fn), mcc=mcc(tp, tn, fp, fn),
                mcc_prior50=mcc_at_prior(tpr, tnr))


def binary_metrics(prob_N, label_N, threshold=0.5, bins=15):
    """Function weights [B, N] -> dict of arrays [B], every metric of a binary classifier under item weights.

    Called without weights it returns the plain metrics as floats. Predicts 1 from `threshold` up. Ratios
    without a denominator are 0, areas with one class only are nan. Calibration bins are those of the data,
    also in resamples.
    """
    prob, label = _check(prob_N, label_N)
    order = np.argsort(-prob, kind="stable")
    p, y = prob[order], label[order]
    positive, hit = np.flatnonzero(y), p >= threshold
    edge = np.r_[0, np.flatnonzero(np.diff(p)) + 1, len(p)]  # first item of every group of ties
    tied = len(edge) <= len(p)
    stop = edge[np.searchsorted(edge, positive, "right")]   # first item below the group of each positive
    start = edge[np.searchsorted(edge, positive, "right") - 1]
    below, above = np.searchsorted(positive, stop), np.searchsorted(positive, start)    # among positives
    confidence, right = _top(p, y)
    wide, mass = (_bins(p, bins, kind) for kind in ("width", "mass"))
    gap = (y - p)[:, None]
    sums = [np.c_[hit & y, ~hit & ~y, hit & ~y, ~hit & y],                    # tp tn fp fn
            np.c_[(p - y) ** 2, _log_loss(p, y)],
            gap * _one_hot(wide, bins), _one_hot(wide, bins), gap * _one_hot(mass, bins),
            (right - confidence)[:, None] * _one_hot(_bins(confidence, bins, "width"), bins)]
    matrix_CN = np.ascontiguousarray(np.concatenate([c.astype(np.float64) for c in sums], 1).T)
    cuts = np.cumsum([c.shape[1] for c in sums])[:-1]

    def measure(weight_BN=None):
        if weight_BN is None:
            return {name: float(value[0]) for name, value in measure(np.ones((1, len(p)))).items()}
        w_NB = np.ascontiguousarray(np.asarray(weight_BN).T, np.float64)[order]     # rows add up fast
        total = w_NB.sum(0)
        count, loss, wide, in_wide, mass, top = np.split((matrix_CN @ w_NB).T, cuts, 1)
        tp, tn, fp, fn = count.T
        w_PB = w_NB[positive]                                   # prefix sums from the highest score down
        true_PB, all_NB = _prefix(w_PB)[below], _prefix(w_NB)
        all_PB = all_NB[stop]
        false_PB = all_PB - true_PB
        if tied:                                                # negatives above; equal ones count half
            false_PB = (false_PB + all_NB[start] - _prefix(w_PB)[above]) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            auc = 1 - np.einsum("pb,pb->b", w_PB, false_PB) / ((tp + fn) * (tn + fp))
            np.maximum(all_PB, 1e-300, out=all_PB)              # 0 only where the item's own weight is 0
            ap = np.einsum("pb,pb->b", w_PB, np.divide(true_PB, all_PB, out=all_PB)) / (tp + fn)
        return dict(count_metrics(tp, tn, fp, fn), roc_auc=auc, average_precision=ap,
                    brier=loss[:, 0] / total, nll=loss[:, 1] / total,
                    ece=np.abs(wide).sum(1) / total, ece_mass=np.abs(mass).sum(1) / total,
                    ece_top=np.abs(top).sum(1) / total, mce=np.abs(ratio(wide, in_wide)).max(1))

    return measure
