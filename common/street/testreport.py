"""The one look at the test split: every fusion mode under every policy, paired differences, slices, plots, a
report."""

from pathlib import Path

import numpy as np

from common import draw
from common.street import plots, scorecard
from common.street.bundle import write_csv, write_json
from common.classify import calibration_noise_floor
from common.street.splits import Samples, read_index
from common.street.subnet import natix_perturb, simulate_reward


class Perturbed:
    """Samples as the competition's validator would send them at one level."""

    def __init__(self, samples, level, size, seed):
        self.samples, self.level, self.size, self.seed = samples, level, size, seed

    def __len__(self):
        return len(self.samples)

    def image(self, i):
        rng = np.random.default_rng([self.seed, self.level, i])
        return natix_perturb(self.samples.image(i), self.level, rng, self.size)


def answers(predictor, f, boxes):
    """{mode: {policy: (prob, threshold)}} of features of all views; logits of the views are computed once."""
    config = predictor.config
    tau, raw = predictor.params["decision_threshold"], config["raw_threshold"]
    modes = {"single_view": "single_view", "multiview_mean": "simple_mean",
             "cvfm_inference": config["best_untrained"],
             "cvfm_trained": "trained" if predictor.modules else None,
             "bundle": predictor.bundle["fusion_mode"]}
    out = {}
    for name, mode in modes.items():
        if mode is not None:
            plain = predictor.fused(f, boxes, mode, mac=False)[0]
            own = predictor.fused(f, boxes, mode)[0]
            out[name] = {"raw_argmax": (plain, 0.5), "scrc": (predictor.calibrate(own), tau)}
            out[name] |= {"threshold": (plain, raw)} if raw is not None else {}
    return out


def comparisons(answer):
    """What each phase is meant to gain, as pairs of (prob, threshold)."""
    pairs = {"fusion (phase4c): bundle - single_view": (answer["bundle"]["scrc"],
                                                        answer["single_view"]["scrc"]),
             "calibration (phase5): scrc - raw_argmax": (answer["bundle"]["scrc"],
                                                         answer["bundle"]["raw_argmax"])}
    if "cvfm_trained" in answer:
        pairs["cvfm_trained - single_view"] = (answer["cvfm_trained"]["scrc"], answer["single_view"]["scrc"])
    if "threshold" in answer["single_view"]:
        one = answer["single_view"]
        pairs["threshold (phase2): threshold - raw_argmax"] = (one["threshold"], one["raw_argmax"])
    return pairs


def extra_slices(predictor, test, data, resamples, seed):
    """Single view under the validator's four levels of distortion, and on DATA/shift where no guarantee
    holds."""
    sets = [("perturb_level", str(k), Perturbed(test, k, predictor.config["image"], seed), test)
            for k in range(4)]
    if (Path(data) / "shift" / "index.jsonl").is_file():
        samples = Samples(read_index(Path(data) / "shift"), Path(data) / "shift")
        sets.append(("shift", "style B", samples, samples))
    out = []
    for name, value, pictures, samples in sets:
        f_NF = predictor.features(pictures, views=False)
        prob = predictor.fused(f_NF[:, None], None, "single_view")[0]
        p, y = predictor.calibrate(prob), samples.labels()
        rows = scorecard.slices([{name: value}] * len(y), (name,), p, y,
                                predictor.params["decision_threshold"],
                                samples.groups(), resamples, seed, least=1)
        final = predictor.policy(prob, samples.ids())
        taken = final["accepted"]
        missed = ~final["sets"][np.arange(len(y)), y]
        out += [dict(r, coverage=float(taken.mean()),
                     risk=float(missed[taken].mean()) if taken.any() else None)
                for r in rows]
    return out


def report(predictor, test, out, data, *, quick, resamples, windows, seed, bundle_sha256, warning=None):
    """Score everything, write evaluation_report.json, predictions.csv, slices.csv and, unless quick, five
    plots."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    resamples = 0 if quick else resamples
    y, group = test.labels(), test.groups()
    f, boxes = predictor.features(test)
    answer = answers(predictor, f, boxes)
    results = {mode: {policy: scorecard.score(p, y, t, group, resamples, seed)
                      for policy, (p, t) in row.items()}
               for mode, row in answer.items()}
    pairs = {name: scorecard.paired(*ab, y, group, resamples, seed)
             for name, ab in comparisons(answer).items()} if resamples else {}
    prob = predictor.fused(f, boxes)[0]
    final = predictor.policy(prob, test.ids())
    p, tau = final["p_cal"], predictor.params["decision_threshold"]
    choose = scorecard.selective(p, y, tau, final["accepted"], final["sets"], group, resamples, seed)
    targets = dict(coverage=predictor.params["selection"]["xi"], risk=predictor.params["risk"]["alpha"])
    warnings = [warning] if warning else []
    for name, sign in (("coverage", -1), ("risk", 1)):
        seen = choose[name]["value"]
        if seen is not None and sign * (seen - targets[name]) > 0:
            warnings.append(f"{name} is {seen:.3f}, target {targets[name]}: one test set is one draw; "
                            "the guarantee is for the mean over draws")
    few = min(resamples, 500)
    table = scorecard.slices(test.rows, ("city", "daytime", "weather", "source"), p, y, tau, group, few, seed)
    table = [dict(r, coverage=None, risk=None) for r in table]
    table += [] if quick else extra_slices(predictor, test, data, few, seed)
    value = scorecard.rounded(dict(
        schema="streetvision/evaluation@1", dataset="val_test", n_samples=len(y), n_groups=len(set(group)),
        prevalence=float(y.mean()), bundle_sha256=bundle_sha256, policy_type="scrc",
        fusion_mode=predictor.bundle["fusion_mode"], results=results, paired=pairs, selective=choose,
                                   targets=targets,
        slices=table, leakage_check="pass", warnings=warnings,
                                   noise_floor=calibration_noise_floor(p, y, seed=seed),
        reward_simulation=simulate_reward(final["p_out"], y, windows, seed) if windows else None,
        bootstrap=dict(n_resamples=resamples, confidence_level=0.95, unit="group", seed=seed)))
    single = answer["single_view"]["raw_argmax"][0]
    write_csv(out / "predictions.csv", [
        dict(id=name, group=group[i], label=int(y[i]), p_raw=float(single[i]), p_fused=float(prob[i]),
             p_cal=float(p[i]),
             p_out=float(final["p_out"][i]), pred=int(final["pred"][i]), accepted=int(final["accepted"][i]),
             set="".join(str(k) for k in (0, 1) if final["sets"][i, k]))
                                        for i, name in enumerate(test.ids())])
    write_csv(out / "slices.csv", table)
    if not quick:
        rates = {k: (s["metrics"]["fpr"], s["metrics"]["recall"]) for k, s in results["bundle"].items()}
        at = (choose["coverage"]["value"], choose["error"]["value"])
        for name, picture in (
                ("roc_curve", plots.roc_curve(p, y, rates)), ("pr_curve", plots.pr_curve(p, y)),
                ("confusion_matrix", plots.confusion(**results["bundle"]["scrc"]["counts"],
                                                     classes=("None", "Roadwork"))),
                ("reliability_diagram", plots.reliability_diagram(prob, p, y)),
                ("risk_coverage", plots.risk_coverage(p, y, tau, at if None not in at else None))):
            draw.save(picture, out / f"{name}.png")
    write_json(out / "evaluation_report.json", value)
    return value
