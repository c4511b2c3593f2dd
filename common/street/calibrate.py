"""Calibrators of a binary classifier: p = P(y = 1) in, a better p out; fitted, saved as JSON, reloaded bit
for bit.

With s = logit p, p kept 1e-7 away from 0 and 1:

    temperature     sigma(s / T)                       1706.04599    one parameter; order and cut 1/2 stay
    platt           sigma(a s + b)                                   targets pulled in as Platt proposed
    beta            sigma(a ln p - b ln(1 - p) + c)    Kull 2017     a, b >= 0
    beta_am         the same with a = b (platt without pulled targets);  beta_ab: with c = 0
    dirichlet       softmax(W (ln(1 - p), ln p) + v)   1910.12656    off-diagonal of W and v are penalised
    isotonic        pool adjacent violators          any increasing map; as scikit-learn's, clipped outside
    isotonic_pchip  a monotone cubic through blocks of the isotonic fit
    ensemble        sigma(sum_k w_k logit q_k) of the best three, w = softmax(theta) fitted out of fold
    ensemble_linear sum_k w_k q_k of the same three, weights fitted for this sum
"""

import numpy as np
import scipy

from common.bootstrap import bootstrap
from common.classify import binary_metrics, mcc_sweep, negative_log_likelihood
from common.street.splits import unit


def margin(prob):
    return scipy.special.logit(np.clip(np.asarray(prob, np.float64), 1e-7, 1 - 1e-7))


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
        found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded",
                                options=dict(xatol=1e-10))
        self.params = dict(T=float(np.exp(found.x)))
        return self

    def __call__(self, prob):
        return scipy.special.expit(margin(prob) / self.params["T"])


def _logistic(features_NK, target, start):
    """Weights of sigma(X w) that minimise the cross-entropy with soft targets."""
    def loss(w):
        z = features_NK @ w
        slope_K = features_NK.T @ (scipy.special.expit(z) - target) / len(z)
        return np.mean(np.logaddexp(0, z) - target * z), slope_K
    return scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B",
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
        return scipy.special.expit(self.params["a"] * margin(prob) + self.params["b"])


class Beta(Calibrator):
    def fit(self, prob, label, group=None):
        x, y = self.features(prob), np.asarray(label, np.float64)
        w = _logistic(x, y, np.array([1.0, 1.0, 0.0]))
        if w[0] < 0:
            w = np.r_[0.0, _logistic(x[:, 1:], y, np.array([1.0, 0.0]))]
        elif w[1] < 0:
            w = np.insert(_logistic(x[:, [0, 2]], y, np.array([1.0, 0.0])), 1, 0.0)
        return self.keep(w)

    def keep(self, w):
        self.params = dict(a=max(float(w[0]), 0.0), b=max(float(w[1]), 0.0), c=float(w[2]))
        return self

    @staticmethod
    def features(prob):
        """ln p, -ln(1 - p), 1."""
        s = margin(prob)
        return np.c_[-np.logaddexp(0, -s), np.logaddexp(0, s), np.ones_like(s)]

    def __call__(self, prob):
        return scipy.special.expit(self.features(prob) @ [self.params[k] for k in "abc"])


class BetaAM(Beta):
    def fit(self, prob, label, group=None):
        x, y = self.features(prob), np.asarray(label, np.float64)
        a, c = _logistic(np.c_[x[:, 0] + x[:, 1], x[:, 2]], y, np.array([1.0, 0.0]))
        return self.keep((a, a, c))


class BetaAB(Beta):
    def fit(self, prob, label, group=None):
        x, y = self.features(prob)[:, :2], np.asarray(label, np.float64)
        w = _logistic(x, y, np.ones(2))
        if w.min() < 0:
            k = int(w[0] < 0)                                       # the other one alone
            w = np.where(np.arange(2) == k, _logistic(x[:, [k]], y, np.ones(1)), 0.0)
        return self.keep((*w, 0.0))


class Dirichlet(Calibrator):
    PENALTY = 1e-3

    def fit(self, prob, label, group=None):
        x_N2 = self.logs(prob)
        hot_N2 = np.eye(2)[np.asarray(label, np.int64)]
        spared = np.r_[np.eye(2).ravel(), 0.0, 0.0]                 # the diagonal of W goes free

        def loss(w):
            z = x_N2 @ w[:4].reshape(2, 2).T + w[4:]
            logp = z - np.logaddexp(z[:, :1], z[:, 1:])
            slope = (np.exp(logp) - hot_N2) / len(z)
            extra = self.PENALTY * (1 - spared) * w
            grad = np.r_[(slope.T @ x_N2).ravel(), slope.sum(0)] + extra
            return -np.mean((hot_N2 * logp).sum(1)) + extra @ w / 2, grad
        w = scipy.optimize.minimize(loss, np.r_[np.eye(2).ravel(), 0.0, 0.0], jac=True, method="L-BFGS-B",
                     options=dict(maxiter=2000, ftol=1e-15, gtol=1e-10)).x
        self.params = dict(W=w[:4].tolist(), v=w[4:].tolist())
        return self

    @staticmethod
    def logs(prob):
        s = margin(prob)
        return np.c_[-np.logaddexp(0, s), -np.logaddexp(0, -s)]     # ln(1 - p), ln p

    def __call__(self, prob):
        z = self.logs(prob) @ np.reshape(self.params["W"], (2, 2)).T + self.params["v"]
        return scipy.special.expit(z[:, 1] - z[:, 0])


def pava(prob, label):
    """Isotonic fit -> (mean p, value, weight) of its blocks and the x, y of their two ends."""
    x, inverse, count = np.unique(np.asarray(prob, np.float64), return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, np.asarray(label, np.float64)) / count
    fit = scipy.optimize.isotonic_regression(mean, weights=count.astype(np.float64))
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
        return np.clip(scipy.interpolate.PchipInterpolator(x, y)(np.clip(prob, x[0], x[-1])), 0, 1)


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
        oof = {m: np.clip(out_of_fold(m, prob, label, group), 1e-7, 1 - 1e-7) for m in self.MEMBERS}
        best = sorted(oof, key=lambda m: negative_log_likelihood(oof[m], label))[:3]
        q_NK = np.stack([oof[m] for m in best], 1)
        loss = lambda theta: negative_log_likelihood(self.mix(q_NK, scipy.special.softmax(theta)), label)
        theta = scipy.optimize.minimize(loss, np.zeros(len(best)), method="L-BFGS-B").x
        weights = scipy.special.softmax(theta)
        self.params = dict(weights=weights.tolist(),
                           members=[CALIBRATORS[m]().fit(prob, label).to_json() for m in best])
        return self

    @staticmethod
    def mix(q_NK, weight_K):
        return scipy.special.expit(margin(q_NK) @ weight_K)

    def __call__(self, prob):
        q_NK = np.stack([Calibrator.from_json(m)(prob) for m in self.params["members"]], 1)
        return self.mix(q_NK, np.asarray(self.params["weights"]))


class EnsembleLinear(Ensemble):
    @staticmethod
    def mix(q_NK, weight_K):
        return q_NK @ weight_K


CALIBRATORS = {"identity": Identity, "temperature": Temperature, "platt": Platt, "beta": Beta,
               "beta_am": BetaAM, "beta_ab": BetaAB, "dirichlet": Dirichlet, "isotonic": Isotonic,
               "isotonic_pchip": IsotonicPchip, "ensemble": Ensemble, "ensemble_linear": EnsembleLinear}


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
