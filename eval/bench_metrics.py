"""Speed of common/metrics.py against what people use instead: same machine, same inputs, same results.

    python -m eval.bench_metrics --json out.json [--only frechet sweep] [--rounds 3] [--small]

Each round runs both sides one after the other, in alternating order; a ratio is the median over rounds of
(theirs / ours) in wall time, so a machine that slows down for a while slows both; CPU time stands
beside it. The slow side of `sweep` runs 100 of the 5000 thresholds and that of `bootstrap` 40 of the 2000
resamples; their times are multiplied up, which the record says (`scaled`). These two need scikit-learn
(tests/parity/requirements.txt) and are skipped without it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings

import numpy as np
import scipy.linalg
import torch

from common import metrics


def frechet(small):
    """frechet_distance against SciPy's matrix square root, the route of pytorch-fid, ADM and EDM."""
    d = 256 if small else 2048
    rs = np.random.RandomState(0)
    stats = []
    for shift in (0., 0.01):                                  # spectrum over 1.7 decades, full rank
        mix = rs.standard_normal((d, d)) / d ** 0.5 * np.arange(1, d + 1) ** -0.5
        x = rs.standard_normal((2 * d, d)) @ mix + shift
        stats.append((x.mean(0), np.cov(x, rowvar=False)))
    (m1, s1), (m2, s2) = stats

    def scipy_route():
        root = scipy.linalg.sqrtm(s1 @ s2).real
        return ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)

    return dict(ours=lambda: metrics.frechet_distance(m1, s1, m2, s2), theirs=scipy_route, rtol=1e-6, goal=5,
                what=f"Frechet distance, D={d}, against scipy.linalg.sqrtm")


def classifier(n):
    rs = np.random.RandomState(8)
    label = (rs.rand(n) < 0.3).astype(int)
    return 1 / (1 + np.exp(-(rs.standard_normal(n) + 1.5 * (label - 0.5)))), label


def sweep(small):
    """mcc_sweep of 5000 thresholds against a loop over sklearn.metrics.matthews_corrcoef."""
    from sklearn.metrics import matthews_corrcoef
    n, some = (2000, 20) if small else (100_000, 100)
    prob, label = classifier(n)
    chosen = np.linspace(0, 4999, some).astype(int)
    grid = np.linspace(0, 1, 5000)

    def compare(ours, theirs):
        return np.allclose(ours["curve"]["mcc"][chosen], theirs, atol=1e-12)

    return dict(ours=lambda: metrics.mcc_sweep(prob, label, 5000),
                theirs=lambda: [matthews_corrcoef(label, prob >= grid[i]) for i in chosen],
                compare=compare, scaled=5000 / some, goal=100,
                what=f"MCC at 5000 thresholds, n={n}, against a loop over scikit-learn")


def bootstrap(small):
    """bootstrap of all 18 metrics against a loop that resamples and calls scikit-learn, 10 of the 18."""
    import sklearn.metrics as sk
    n, resamples, some = (500, 200, 10) if small else (10_000, 2000, 40)
    prob, label = classifier(n)
    decisions = dict(accuracy=sk.accuracy_score, balanced_accuracy=sk.balanced_accuracy_score,
                     precision=sk.precision_score, recall=sk.recall_score, f1=sk.f1_score,
                     mcc=sk.matthews_corrcoef)
    scores = dict(roc_auc=sk.roc_auc_score, average_precision=sk.average_precision_score,
                  brier=sk.brier_score_loss, nll=sk.log_loss)

    def loop():
        rng, rows = np.random.default_rng(1), []
        for _ in range(some):
            pick = rng.integers(0, n, n)
            p, y = prob[pick], label[pick]
            hit = p >= 0.5
            rows.append([f(y, hit) for f in decisions.values()] + [f(y, p) for f in scores.values()])
        return np.mean(rows, 0)

    def compare(ours, theirs):                    # the loop's mean lies within 5 standard errors of our value
        names = [*decisions, *scores]
        return all(abs(ours[name]["value"] - mean) < 5 * ours[name]["std"] / some ** 0.5
                   for name, mean in zip(names, theirs))

    return dict(ours=lambda: metrics.bootstrap(metrics.binary_metrics(prob, label), n, resamples=resamples),
                theirs=loop, compare=compare, scaled=resamples / some, goal=50,
                what=f"{resamples} resamples of 18 metrics, n={n}, against a scikit-learn loop over 10")


def neighbours(small):
    """nearest_neighbours against its matrix product alone: what selection and exact re-scoring cost."""
    q, n, d = (100, 2000, 256) if small else (1000, 50_000, 2048)
    generator = torch.Generator().manual_seed(0)
    query, data = (torch.randn(rows, d, generator=generator) for rows in (q, n))

    def compare(ours, product):
        return bool((ours[1][:, 0] == (data.square().sum(1) - 2 * product).argmin(1)).all())

    return dict(ours=lambda: metrics.nearest_neighbours(query, data, 5), theirs=lambda: query @ data.T,
                compare=compare, goal=1.5, inverse=True,
                what=f"5 nearest of {q} in {n}, D={d}, against the float32 matrix product alone")


CASES = dict(frechet=frechet, sweep=sweep, bootstrap=bootstrap, neighbours=neighbours)


def measure(case, rounds):
    """Run both sides `rounds` times, alternating -> record."""
    wall, cpu, results = dict(ours=[], theirs=[]), dict(ours=[], theirs=[]), {}
    for number in range(rounds + 1):  # round 0 warms caches and is compared, not timed
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            start, cpu_start = time.perf_counter(), time.process_time()
            results[side] = case[side]()
            wall[side].append(time.perf_counter() - start)
            cpu[side].append(time.process_time() - cpu_start)
    compare = case.get("compare", lambda a, b: bool(np.isclose(a, b, rtol=case.get("rtol", 0), atol=0)))
    scaled, inverse = case.get("scaled", 1), case.get("inverse", False)

    def ratios(times):
        pairs = [scaled * b / a for a, b in zip(times["ours"][1:], times["theirs"][1:])]
        return [1 / p for p in pairs] if inverse else pairs

    value = statistics.median(ratios(wall))
    return dict(what=case["what"], agree=bool(compare(results["ours"], results["theirs"])), scaled=scaled,
                ours_s=statistics.median(wall["ours"][1:]),
                theirs_s=scaled * statistics.median(wall["theirs"][1:]),
                ratio="ours / theirs" if inverse else "theirs / ours", value=value, goal=case["goal"],
                met=value <= case["goal"] if inverse else value >= case["goal"], ratios=ratios(wall),
                cpu_value=statistics.median(ratios(cpu)))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.bench_metrics", description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true",
                        help="small inputs: a check of the benchmark, not a measurement")
    args = parser.parse_args(argv)
    machine = dict(cpu=platform.processor() or platform.machine(), cores=os.cpu_count(),
                   threads=torch.get_num_threads(), python=platform.python_version(),
                   torch=torch.__version__, numpy=np.__version__, scipy=scipy.__version__)
    record = dict(machine=machine, small=args.small, cases={})
    for name in args.only:
        try:
            case = CASES[name](args.small)
        except ImportError as error:
            record["cases"][name] = dict(skipped=str(error))
            print(f"{name:12} skipped: {error}", file=sys.stderr)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                   # scikit-learn's about empty classes
            result = record["cases"][name] = measure(case, args.rounds)
        verdict = "met" if result["met"] else "NOT met"
        agree = "agree" if result["agree"] else "DIFFER"
        print(f"{name:12}{result['value']:9.2f} {result['ratio']} (CPU time {result['cpu_value']:.2f}; goal "
              f"{result['goal']}: {verdict}; results {agree})  {result['what']}", file=sys.stderr)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(record, f, indent=1)
    return 0 if all(r.get("agree", True) for r in record["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
