"""Many predictions of the same test samples, scored alike: metrics with group-bootstrap intervals, paired
differences."""

import math

import numpy as np

from common.classify import binary_metrics, bootstrap, mcc_sweep


def rounded(value):
    """Floats to 10 digits, nan and infinity to None: JSON that is equal when the numbers are."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 10) if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def score(prob, label, threshold, group, resamples, seed, level=0.95):
    """dict(metrics, counts, ci): all of binary_metrics at one threshold; ci empty when resamples is 0."""
    measure = binary_metrics(prob, label, threshold)
    hit, y = np.asarray(prob) >= threshold, np.asarray(label, bool)
    counts = dict(tp=int(np.sum(hit & y)), tn=int(np.sum(~hit & ~y)), fp=int(np.sum(hit & ~y)),
                  fn=int(np.sum(~hit & y)))
    ci = {}
    if resamples:
        full = bootstrap(measure, len(y), group, resamples, level, seed=seed)
        ci = {k: dict(lower=v["lower"], upper=v["upper"], std=v["std"]) for k, v in full.items()}
    return rounded(dict(metrics=measure(), counts=counts, ci=ci, threshold=float(threshold)))


def paired(a, b, label, group, resamples, seed, level=0.95):
    """a - b of every metric, both (prob, threshold) on the same resamples -> {metric: dict(diff, lower,
    upper, supported)}.

    supported: the interval excludes 0.
    """
    first, second = (binary_metrics(p, label, t) for p, t in (a, b))

    def statistic(w):
        x, y = first(w), second(w)
        return {k: x[k] - y[k] for k in x}
    full = bootstrap(statistic, len(label), group, resamples, level, seed=seed)
    return rounded({k: dict(diff=v["value"], lower=v["lower"], upper=v["upper"],
                            supported=bool(v["lower"] > 0 or v["upper"] < 0)) for k, v in full.items()})


def slices(rows, names, prob, label, threshold, group, resamples, seed, least=30):
    """Scores of every value of every named column that holds at least `least` samples."""
    out = []
    for name in names:
        values = np.array([str(r.get(name, "")) for r in rows])
        for value in sorted(set(values) - {""}):
            at = values == value
            if at.sum() >= least:
                s = score(prob[at], label[at], threshold, group[at], resamples, seed)
                out.append(dict(slice=name, value=value, n=int(at.sum()), mcc=s["metrics"]["mcc"],
                                mcc_prior50=s["metrics"]["mcc_prior50"], accuracy=s["metrics"]["accuracy"],
                                mcc_lower=s["ci"].get("mcc", {}).get("lower"),
                                mcc_upper=s["ci"].get("mcc", {}).get("upper")))
    return out


def selective(prob, label, threshold, accepted, sets, group, resamples, seed):
    """Coverage, risk (label not in the set) and error among the accepted, each with its interval; risk at
    coverages, AURC."""
    y = np.asarray(label, np.int64)
    confidence, wrong = np.maximum(prob, 1 - prob), (prob >= threshold) != (y == 1)
    missed, both = ~sets[np.arange(len(y)), y], sets.all(1)
    order = np.argsort(-confidence, kind="stable")
    curve = np.cumsum(wrong[order]) / np.arange(1, len(y) + 1)

    def statistic(w):
        w = np.asarray(w, np.float64)
        taken = w @ accepted
        with np.errstate(invalid="ignore", divide="ignore"):
            return dict(coverage=taken / w.sum(1), risk=(w @ (accepted & missed)) / taken,
                        error=(w @ (accepted & wrong)) / taken, set_size=1 + (w @ (accepted & both)) / taken)
    full = bootstrap(statistic, len(y), group, max(resamples, 1), seed=seed)
    out = {k: {n: v[n] for n in (("value", "lower", "upper") if resamples else ("value",))}
           for k, v in full.items()}
    at = {f"risk_at_{c}": float(curve[max(0, round(c * len(y)) - 1)]) for c in (0.5, 0.8, 0.9, 1.0)}
    return rounded(dict(out, **at, aurc=float(curve.mean()), abstention=1 - float(np.mean(accepted))))


def optimism(prob, label, group, grid, prior, resamples=200, seed=0):
    """How much the maximum flatters itself: mean over group resamples of (maximum there - that threshold back
    here)."""
    rng, names = np.random.default_rng(seed), np.unique(group)
    members, excess = [np.flatnonzero(group == g) for g in names], []
    for _ in range(resamples):
        at = np.concatenate([members[k] for k in rng.integers(0, len(names), len(names))])
        found = mcc_sweep(prob[at], label[at], grid, prior)
        here = binary_metrics(prob, label, found["threshold"])()["mcc" if prior is None else "mcc_prior50"]
        excess.append(found["mcc"] - here)
    return float(np.mean(excess))
