"""Many predictions of the same test samples, scored alike: metrics with group-bootstrap intervals, paired
differences."""

import math

import numpy as np

from common.bootstrap import bootstrap
from common.classify import binary_metrics, calibration_noise_floor, count_metrics, mcc_sweep


def rounded(value):
    """Floats to 10 digits, nan and infinity to None: JSON that is equal when the numbers are."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 10) if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


class Resampled:
    """Metrics of many predictions of the same samples on the same group resamples, each computed once.

    cells: {name: (prob, threshold)}; pairs: {name: [(a, b), ...]}, the mean of a - b over the list of cells.
    resamples 0: values without intervals.
    """

    def __init__(self, cells, label, group, resamples, seed, pairs=None, level=0.95, method="percentile"):
        self.cells, self.label, self.resamples = cells, np.asarray(label, bool), resamples
        measures, whole = [], {}
        key = {name: (np.asarray(p).tobytes(), float(t)) for name, (p, t) in cells.items()}
        for k in dict.fromkeys(key.values()):
            p, t = next(cells[name] for name in cells if key[name] == k)
            # another threshold of the same probabilities moves the counts alone: areas and calibration stay
            measures.append((whole[k[0]], self._counts(p, t)) if k[0] in whole else
                            (None, binary_metrics(p, label, t)))
            whole.setdefault(k[0], len(measures) - 1)
        self.place = {name: list(dict.fromkeys(key.values())).index(k) for name, k in key.items()}

        def statistic(w):
            rows = []
            for base, measure in measures:
                rows.append(dict({} if base is None else rows[base], **measure(w)))
            out = {(i, m): v for i, row in enumerate(rows) for m, v in row.items()}
            for name, list_ in (pairs or {}).items():
                ends = [(rows[self.place[a]], rows[self.place[b]]) for a, b in list_]
                out |= {("pair", name, m): sum(x[m] - y[m] for x, y in ends) / len(ends) for m in rows[0]}
            return out
        self.full = bootstrap(statistic, len(self.label), group, max(resamples, 1), level,
                              method if resamples else "percentile", seed)

    def _counts(self, prob, threshold):
        hit, y = np.asarray(prob) >= threshold, self.label
        columns = np.stack([hit & y, ~hit & ~y, hit & ~y, ~hit & y], 1).astype(np.float64)
        return lambda w: count_metrics(*(np.asarray(w, np.float64) @ columns).T)

    def score(self, name):
        """dict(metrics, counts, ci, threshold) of one cell: all of binary_metrics at its threshold."""
        prob, threshold = self.cells[name]
        hit, y, i = np.asarray(prob) >= threshold, self.label, self.place[name]
        counts = dict(tp=hit & y, tn=~hit & ~y, fp=hit & ~y, fn=~hit & y)
        mine = {k[1]: v for k, v in self.full.items() if k[0] == i}
        ci = {k: {end: v[end] for end in ("lower", "upper", "std")} for k, v in mine.items()}
        return rounded(dict(metrics={k: v["value"] for k, v in mine.items()},
                            counts={k: int(v.sum()) for k, v in counts.items()},
                            ci=ci if self.resamples else {}, threshold=float(threshold)))

    def pair(self, name):
        """{metric: dict(diff, lower, upper, supported)}; supported: the interval excludes 0."""
        return rounded({k[2]: dict(diff=v["value"], lower=v["lower"], upper=v["upper"],
                                   supported=bool(v["lower"] > 0 or v["upper"] < 0))
                        for k, v in self.full.items() if k[:2] == ("pair", name)})


def score(prob, label, threshold, group, resamples, seed, level=0.95):
    """Resampled.score of a single prediction."""
    return Resampled({"": (prob, threshold)}, label, group, resamples, seed, level=level).score("")


def paired(a, b, label, group, resamples, seed, level=0.95):
    """Resampled.pair of two predictions (prob, threshold): a - b of every metric."""
    return Resampled({"a": a, "b": b}, label, group, resamples, seed, {"": [("a", "b")]}, level).pair("")


def calibration_gain(conf, p_conf, tau, resamples, seed):
    """ECE, Brier, NLL and MCC on CALIB_CONF before and after, their paired differences, and ECE's noise
    floor."""
    y, names = conf["label"], ("ece", "nll", "brier", "mcc")
    before, after = binary_metrics(conf["prob"], y)(), binary_metrics(p_conf, y, tau)()
    floor = calibration_noise_floor(p_conf, y, seed=seed)
    gain = paired((p_conf, tau), (conf["prob"], 0.5), y, conf["group"], max(resamples, 200), seed)
    out = {f"{k}_{when}": m[k] for k in names for when, m in (("pre", before), ("post", after))}
    out |= dict(ece_noise_mean=floor["mean"], ece_noise_p95=floor["p95"], ece_p_value=floor["p_value"])
    return out | {f"{k}_gain_{end}": gain[k][end] for k in names for end in ("diff", "lower", "upper")}


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


def selective(prob, label, threshold, accepted, sets, group, resamples, seed, level=0.95,
              method="percentile"):
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
    full = bootstrap(statistic, len(y), group, max(resamples, 1), level,
                     method if resamples else "percentile", seed)
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
