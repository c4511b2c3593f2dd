"""What one idea is worth on VAL_SELECT: runs with and without it, and the paired difference of their
scores."""

import dataclasses
from pathlib import Path

import numpy as np

from common.street import bundle, scorecard
from common.street.paths import Paths
from common.street.serving import read_logits

PAIRS = {"explora": ("model_init_from_explora", True, False), "augment": ("data_augment", "strong", "basic")}


def ablate(cfg, train, data, seeds=3):
    """cfg.what -> OUT/ablation.json.  train: the function that runs phases of a config; data: the data
    folder.

    explora, augment: phase 1 with and without, `seeds` seeds, difference of VAL_SELECT MCC by group bootstrap
    of each seed and of their mean; cvfm, calibration: the tables that the run itself left.
    """
    home, n = Paths(cfg.out), max(cfg.eval_resamples, 200)
    if cfg.what not in PAIRS:
        source = home.cvfm_report if cfg.what == "cvfm" else home.calibration_summary
        report = bundle.read_json(source)
        result = report["modes"] if cfg.what == "cvfm" else {r["method"]: r for r in report["methods"]}
    else:
        field, *values = PAIRS[cfg.what]
        result, stacked = {}, []
        for seed in range(cfg.seed, cfg.seed + seeds):
            z = [_one(cfg, train, data, seed, field, value) for value in values]
            stacked.append(z)
            d = scorecard.paired((z[0]["prob"], 0.5), (z[1]["prob"], 0.5), z[0]["label"], z[0]["group"], n,
                                 cfg.seed)["mcc"]
            result[str(seed)] = dict(d, n=len(z[0]["label"]), groups=len(set(z[0]["group"])))
        result["mean"] = _mean(stacked, n, cfg.seed)
    path = Path(cfg.out, "ablation.json")
    old = bundle.read_json(path) if path.is_file() else {}
    bundle.write_json(path, dict(old, **{cfg.what: result}))
    return result


def _one(cfg, train, data, seed, field, value):
    """Logits of VAL_SELECT after the phases that `value` needs, in a run directory of their own."""
    out = Path(cfg.out, "ablate", f"{cfg.what}_{seed}_{value}")
    train(dataclasses.replace(
        cfg, seed=seed, out=str(out), data=str(data), preset="", **{field: value},
        phases="phase4a_explora,phase1" if value is True else "phase1"))
    return read_logits(Paths(str(out)).val_select_logits)


def _mean(stacked, resamples, seed):
    """Difference of the MCC averaged over seeds: all seeds see the same resamples of groups."""
    names = [z["id"].tolist() for pair in stacked for z in pair]
    # another seed drew another selection split
    if any(name != names[0] for name in names):
        return None
    label, group = stacked[0][0]["label"], stacked[0][0]["group"]
    cells = {f"{k}{side}": (pair[side]["prob"], 0.5) for k, pair in enumerate(stacked) for side in (0, 1)}
    mean = {"mean": [(f"{k}0", f"{k}1") for k in range(len(stacked))]}
    d = scorecard.Resampled(cells, label, group, resamples, seed, mean).pair("mean")["mcc"]
    return dict(d, n=len(label), groups=len(set(np.asarray(group).tolist())), seeds=len(stacked))
