"""Calibrators of a binary classifier: p = P(y = 1) in, a better p out; fitted, saved as JSON, reloaded bit
for bit.

With s = logit p, p kept 1e-7 away from 0 and 1:

    temperature     sigma(s / T)                       1706.04599    one parameter; order and cut 1/2 stay
    platt           sigma(a s + b)                                   targets pulled in as Platt proposed
    beta            sigma(a ln p - b ln(1 - p) + c)    Kull 2017     a, b >= 0
    isotonic        pool adjacent violators          any increasing map; as scikit-learn's, clipped outside
    isotonic_pchip  a monotone cubic through blocks of the isotonic fit
    ensemble        sigma(sum_k w_k logit q_k) of the best three, w = softmax(theta) fitted out of fold
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression, minimize, minimize_scalar
from scipy.special import expit, logit, softmax

from common import run
from common.bootstrap import bootstrap
from common.classify import binary_metrics, mcc_sweep, negative_log_likelihood
from common.street.splits import unit
from common.street.views import step_indices


def margin(prob):
    return logit(np.clip(np.asarray(prob, np.float64), 1e-7, 1 - 1e-7))


class Calibrator:
    """fit(prob, label) -> self; self(prob) -> prob.  All parameters are floats or lists of floats in
    self.params."""

    def __init__(self, params=None):
        self.params = params or {}

    def to_json(self):
        return dict(method=next(k for k, v in CALIBRATORS.items() if v is type(self)), params=self.params,
                    input="prob")

    @staticmethod
    def from_json(value):
        """The calibrator that to_json described.  Raises ValueError on an unknown method."""
        if value.get("method") not in CALIBRATORS:
            raise ValueError(f"unknown calibrator {value.get('method')!r}")
        return CALIBRATORS[value["method"]](value["params"])


class Identity(Calibrator):
    def fit(self, prob, label, group=None):
        return self

    def __call__(self, prob):
        return np.asarray(prob, np.float64)


class Temperature(Calibrator):
    def fit(self, prob, label, group=None):
        s = margin(prob)
        y = np.asarray(label)
        loss = lambda t: np.mean(np.logaddexp(0, s / np.exp(t)) - y * s / np.exp(t))
        found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded",
                                options=dict(xatol=1e-10))
        self.params = dict(T=float(np.exp(found.x)))
        return self

    def __call__(self, prob):
        return expit(margin(prob) / self.params["T"])


def _logistic(features_NK, target, start):
    """Weights of sigma(X w) that minimise the cross-entropy with soft targets."""
    def loss(w):
        z = features_NK @ w
        return np.mean(np.logaddexp(0, z) - target * z), features_NK.T @ (expit(z) - target) / len(z)
    return minimize(loss, start, jac=True, method="L-BFGS-B",
                    options=dict(maxiter=2000, ftol=1e-15, gtol=1e-10)).x


class Platt(Calibrator):
    def fit(self, prob, label, group=None):
        y = np.asarray(label, bool)
        n1, n0 = y.sum(), (~y).sum()
        target = np.where(y, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
        s = margin(prob)
        a, b = _logistic(np.c_[s, np.ones_like(s)], target, np.array([0.0, np.log((n1 + 1) / (n0 + 1))]))
        self.params = dict(a=float(a), b=float(b))
        return self

    def __call__(self, prob):
        return expit(self.params["a"] * margin(prob) + self.params["b"])


class Beta(Calibrator):
    def fit(self, prob, label, group=None):
        s = margin(prob)
        x = np.c_[-np.logaddexp(0, -s), np.logaddexp(0, s), np.ones_like(s)]         # ln p, -ln(1 - p), 1
        y = np.asarray(label, np.float64)
        w = _logistic(x, y, np.array([1.0, 1.0, 0.0]))
        if w[0] < 0:
            w = np.r_[0.0, _logistic(x[:, 1:], y, np.array([1.0, 0.0]))]
        elif w[1] < 0:
            w = np.insert(_logistic(x[:, [0, 2]], y, np.array([1.0, 0.0])), 1, 0.0)
        w[:2] = np.maximum(w[:2], 0)
        self.params = dict(zip("abc", map(float, w)))
        return self

    def __call__(self, prob):
        s, w = margin(prob), self.params
        return expit(-w["a"] * np.logaddexp(0, -s) + w["b"] * np.logaddexp(0, s) + w["c"])


def pava(prob, label):
    """Isotonic fit -> (mean p, value, weight) of its blocks and the x, y of their two ends."""
    x, inverse, count = np.unique(np.asarray(prob, np.float64), return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, np.asarray(label, np.float64)) / count
    fit = isotonic_regression(mean, weights=count.astype(np.float64))
    start, stop = fit.blocks[:-1], fit.blocks[1:]
    weight = np.add.reduceat(count, start)
    centre = np.add.reduceat(x * count, start) / weight
    value = fit.x[start]
    ends = np.unique(np.r_[start, stop - 1])
    return centre, value, weight, x[ends], fit.x[ends]


class Isotonic(Calibrator):
    def fit(self, prob, label, group=None):
        *_, x, y = pava(prob, label)
        self.params = dict(x=x.tolist(), y=y.tolist())
        return self

    def __call__(self, prob):
        return np.interp(prob, self.params["x"], self.params["y"])


class IsotonicPchip(Calibrator):
    def fit(self, prob, label, group=None):
        centre, value, weight, *_ = pava(prob, label)
        blocks = []
        for x, y, w in zip(centre, value, weight):
            # too small: join with its neighbour
            if blocks and (blocks[-1][2] < 10 or w < 10 and x == centre[-1]):
                a, b, v = blocks.pop()
                x, y, w = (a * v + x * w) / (v + w), (b * v + y * w) / (v + w), v + w
            blocks.append((x, y, w))
        if len(blocks) < 2:
            self.params = dict(platt=Platt().fit(prob, label).params)
        else:
            self.params = dict(x=[float(b[0]) for b in blocks], y=[float(b[1]) for b in blocks])
        return self

    def __call__(self, prob):
        if "platt" in self.params:
            return Platt(self.params["platt"])(prob)
        x, y = self.params["x"], self.params["y"]
        return np.clip(PchipInterpolator(x, y)(np.clip(prob, x[0], x[-1])), 0, 1)


def folds(group, n, parts=5):
    """Fold of every item by the hash of its group."""
    group = np.arange(n) if group is None else group
    return np.array([int(unit("fold", str(g)) * parts) for g in group])


def out_of_fold(method, prob, label, group=None):
    """Every item's probability from a calibrator fitted on the other folds."""
    prob, label = np.asarray(prob, np.float64), np.asarray(label)
    fold, out = folds(group, len(prob)), np.empty(len(prob))
    for k in np.unique(fold):
        rest = fold != k
        rest = rest if len(set(label[rest])) == 2 else np.ones_like(rest)
        own = None if group is None else group[rest]
        out[fold == k] = CALIBRATORS[method]().fit(prob[rest], label[rest], own)(prob[fold == k])
    return out


class Ensemble(Calibrator):
    MEMBERS = ("temperature", "platt", "beta", "isotonic", "isotonic_pchip")

    def fit(self, prob, label, group=None):
        label = np.asarray(label)
        oof = {m: out_of_fold(m, prob, label, group) for m in self.MEMBERS}
        best = sorted(oof, key=lambda m: negative_log_likelihood(np.clip(oof[m], 1e-7, 1 - 1e-7), label))[:3]
        z_NK = np.stack([margin(oof[m]) for m in best], 1)

        def loss(theta):
            z = z_NK @ softmax(theta)
            return np.mean(np.logaddexp(0, z) - label * z)
        weights = softmax(minimize(loss, np.zeros(len(best)), method="L-BFGS-B").x)
        self.params = dict(weights=weights.tolist(),
                           members=[CALIBRATORS[m]().fit(prob, label).to_json() for m in best])
        return self

    def __call__(self, prob):
        z = np.stack([margin(Calibrator.from_json(m)(prob)) for m in self.params["members"]])
        return expit(np.tensordot(self.params["weights"], z, 1))


CALIBRATORS = {"identity": Identity, "temperature": Temperature, "platt": Platt, "beta": Beta,
               "isotonic": Isotonic,
               "isotonic_pchip": IsotonicPchip, "ensemble": Ensemble}


def compare_calibrators(z, n_thresholds, prior=None):
    """Cross-validated scores of every calibrator on CALIB_FIT -> rows with status, and the name of the
    choice.

    Rejected: MCC more than 0.02 below raw.  Dominated: another is no worse in ECE, NLL, MCC and FNR.  Among
    the rest the smallest ECE + 0.5 (NLL - best) + max(0, FNR - raw) wins, unless temperature is within one
    standard error of ECE.
    """
    candidates = {m: (z["prob"], m) for m in CALIBRATORS}
    if z["prob_mac"] is not None:
        candidates["mac_cal"] = (z["prob_mac"], "identity")
    rows, kept = [], {}
    for name, (prob, method) in candidates.items():
        p = out_of_fold(method, prob, z["label"], z["group"])
        sweep = mcc_sweep(p, z["label"], n_thresholds, prior)
        m = binary_metrics(p, z["label"], sweep["threshold"])()
        rows.append(dict(method=name, cv_ece=m["ece_mass"], cv_nll=m["nll"], cv_brier=m["brier"],
                         mcc=m["mcc"], fnr=m["fnr"],
                         status="candidate", reason=""))
        kept[name] = p
    raw = rows[0]
    for r in rows:
        if r["mcc"] < raw["mcc"] - 0.02:
            r.update(status="rejected", reason="MCC falls by more than 0.02")
    cost = lambda r: (r["cv_ece"], r["cv_nll"], -r["mcc"], r["fnr"])
    alive = [r for r in rows if r["status"] == "candidate" and r["method"] != "identity"]
    for r in alive:
        if any(all(a <= b for a, b in zip(cost(o), cost(r))) and cost(o) != cost(r) for o in alive):
            r.update(status="dominated", reason="another is no worse in all four")
    alive = [r for r in alive if r["status"] == "candidate"] or [rows[0]]
    least = min(r["cv_nll"] for r in alive)
    price = lambda r: r["cv_ece"] + 0.5 * (r["cv_nll"] - least) + max(0.0, r["fnr"] - raw["fnr"])
    best = min(alive, key=price)
    plain = next(r for r in rows if r["method"] == "temperature")
    noise = bootstrap(binary_metrics(kept[best["method"]], z["label"]), len(z["label"]), z["group"],
                      200)["ece_mass"]["std"]
    if plain["status"] != "rejected" and price(plain) - price(best) <= noise and best is not plain:
        best["reason"] = "within one standard error of temperature"
        best = plain
    best.update(status="selected")
    return rows, best["method"]

# --- MaC-Cal ---------------------------------------------------------------


def mac_cal(head, features_NF, label_N, select_NF, select_label_N, seed, epochs=10, lr=1e-3, batch=64):
    """MaC-Cal (2508.09116) as far as published: retrain a head under random masks of its last matrix -> last
    rho.

    W' = (M * W) / rho, M ~ Bernoulli(rho), features fixed; after an epoch rho <- retention(rho, confidence -
    accuracy) on the selection split, so over-confidence makes it sparser.  The update rule is ours, the
    paper's was not available. Train in place; at inference there is no mask.
    """
    rho, per_epoch = 1.0, math.ceil(len(features_NF) / batch)
    head.cpu().requires_grad_(True)
    optim = torch.optim.AdamW(head.parameters(), lr)
    for step in range(1, epochs * per_epoch + 1):
        _, ids = step_indices(len(features_NF), batch, step, seed)
        run.seed_all(seed, 5, step)
        head.train()
        last = head[-1]
        mask = torch.bernoulli(torch.full_like(last.weight, rho))
        logits = F.linear(head[:-1](features_NF[ids]), mask * last.weight / rho, last.bias)
        loss = F.cross_entropy(logits, torch.from_numpy(label_N[ids]))
        optim.zero_grad()
        loss.backward()
        optim.step()
        if step % per_epoch == 0:
            with torch.no_grad():
                p = head.eval()(select_NF).softmax(1)
            sure, right = p.amax(1).mean(), (p.argmax(1).numpy() == select_label_N).mean()
            rho = retention(rho, float(sure) - float(right))
    return rho


def retention(rho, gap):
    """rho - gap / 2, kept in [0.5, 1]."""
    return min(max(rho - 0.5 * gap, 0.5), 1.0)
