"""The pictures of a binary classifier: ROC, precision-recall, confusion, reliability, risk-coverage,
threshold sweep."""

import numpy as np

from common import draw
from common.classify import reliability, roc_auc, average_precision


def _sorted_counts(prob, label):
    order = np.argsort(-prob, kind="stable")
    p, y = prob[order], label[order].astype(bool)
    last = np.r_[np.flatnonzero(np.diff(p)), len(p) - 1]
    return np.cumsum(y)[last], np.cumsum(~y)[last]


def cross(x, y, high):
    """A small cross at (x, y) on axes that end at 1 and `high`: one marker is too small to see."""
    arm = np.array([-0.015, 0.015, 0, 0, 0])
    return x + arm, y + high * arm[[2, 2, 2, 0, 1]]


def roc_curve(prob, label, points=None):
    """points: {name: (fpr, tpr)} operating points."""
    tp, fp = _sorted_counts(prob, label)
    rates = fp / max(fp[-1], 1), tp / max(tp[-1], 1)
    series = {f"AUC {roc_auc(prob, label):.3f}": tuple(np.r_[0, r] for r in rates),
              "chance": ([0, 1], [0, 1])}
    series |= {name: cross(*at, 1.0) for name, at in (points or {}).items()}
    return draw.lines(series, title="ROC", xlabel="false positive rate", ylabel="true positive rate",
                      size=(560, 520))


def pr_curve(prob, label):
    tp, fp = _sorted_counts(prob, label)
    share = float(np.mean(label))
    return draw.lines({f"AP {average_precision(prob, label):.3f}": (tp / max(tp[-1], 1), tp / (tp + fp)),
                       f"prevalence {share:.3f}": ([0, 1], [share, share])},
                      title="precision and recall", xlabel="recall", ylabel="precision", size=(560, 520))


def confusion(tp, tn, fp, fn, classes):
    """Counts beside row percentages."""
    m = np.array([[tn, fp], [fn, tp]], float)
    share = 100 * m / np.maximum(m.sum(1, keepdims=True), 1)
    return draw.sheet([draw.heat(m, classes, classes, title="count", xlabel="answer", ylabel="label"),
                       draw.heat(share, classes, classes, title="% of the row", xlabel="answer",
                                 ylabel="label")])


def wilson(rate, n, level=0.95):
    """Wilson interval of a rate of n trials."""
    from scipy.stats import norm                # takes half as long to import as torch
    z = norm.ppf((1 + level) / 2)
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def reliability_diagram(before, after, label, bins=15):
    """Share of positives against probability before and after calibration, Wilson bands, histogram below."""
    curves, shares, edges = {}, {}, np.linspace(0, 1, bins + 1)
    for name, prob in (("before", before), ("after", after)):
        table = reliability(prob, label, bins)
        keep = table["count"] > 0
        low, high = wilson(table["label"][keep], table["count"][keep])
        curves[name] = (table["prob"][keep], table["label"][keep], low, high)
        share = table["count"] / len(prob)
        shares[name] = (np.repeat(edges, 2), np.r_[0, np.repeat(share, 2), 0])
    top = draw.lines(curves | {"ideal": ([0, 1], [0, 1])}, title="reliability, Wilson 95 % bands",
                     xlabel="probability", ylabel="share of roadwork", size=(640, 420))
    below = draw.lines(shares, xlabel="probability", ylabel="share of images", size=(640, 240))
    return draw.sheet([top, below], columns=1)


def risk_coverage(prob, label, threshold, operating=None):
    """Error among the most confident share of samples; operating: (coverage, risk) of the policy."""
    confidence, wrong = np.maximum(prob, 1 - prob), (prob >= threshold) != label
    order = np.argsort(-confidence, kind="stable")
    n = np.arange(1, len(prob) + 1)
    error = np.cumsum(wrong[order]) / n
    series = {"error of the accepted": (n / len(n), error)}
    if operating:
        series["policy"] = cross(*operating, max(error.max(), 1e-3))
    return draw.lines(series, title="risk and coverage", xlabel="share accepted", ylabel="error rate")


def mcc_curve(curve, threshold, value):
    """MCC against threshold with the chosen one marked, and the four counts beside it."""
    t = curve.threshold
    line = lambda low, high: ([threshold, threshold], [low, high])
    best = f"best {value:.4f} at {threshold:.4f}"
    left = draw.lines({"MCC": (t, curve.mcc), best: line(min(curve.mcc.min(), 0), value)},
                      title="MCC", xlabel="threshold", ylabel="MCC", size=(600, 420))
    top = max(c.max() for c in (curve.tp, curve.tn, curve.fp, curve.fn))
    right = draw.lines({"TP": (t, curve.tp), "TN": (t, curve.tn), "FP": (t, curve.fp), "FN": (t, curve.fn),
                        "chosen": line(0, top)}, title="counts", xlabel="threshold", size=(600, 420))
    return draw.sheet([left, right])


def gains(paired):
    """Paired differences of MCC with their intervals, one bar a phase."""
    return draw.bars({name: (d["diff"], d["lower"], d["upper"]) for name, d in paired.items()},
                     title="gain of each phase, test MCC, 95 % group bootstrap", xlabel="difference of MCC",
                     size=(860, 110 + 34 * max(len(paired), 1)))
