"""The small commands of streetvision.py: draw data, split it, check files, print the configuration."""

import dataclasses
import json
import sys
from pathlib import Path

from common import run
from common.street import bundle, pipeline, streets
from common.street.paths import Paths
from common.street.splits import leaks, merge_duplicates, read_index, write_splits


def data_folder(cfg):
    """--data, or OUT/data drawn on first use."""
    if cfg.data:
        return Path(cfg.data)
    if cfg.model_weights:
        raise run.UserError("--data is missing: a folder with index.jsonl, labels.json or class folders")
    out = Path(cfg.out, "data")
    if not (out / "index.jsonl").is_file():
        streets.write(out, cfg.scenes, cfg.frames, cfg.size, cfg.seed, cfg.prior, cfg.shift_scenes)
    return out


def splits(cfg):
    """Assign every group to a split, once; later runs keep splits.json."""
    data, paths = data_folder(cfg), Paths(cfg.out)
    if paths.splits_json.is_file():
        return
    rows = read_index(data)
    joined = merge_duplicates(rows, data) if cfg.data_near_duplicates else 0
    found = write_splits(rows, cfg.out, cfg.split_mode)
    print(f"splits  {found['counts']}  salt {found['salt']}  groups joined {joined}  "
          f"groups in two splits {len(leaks(found))}")
    if found["warning"]:
        print(f"splits  {found['warning']}", file=sys.stderr)


def demo_data(cfg):
    """Draw the demo data set into --out."""
    print(streets.write(cfg.out, cfg.scenes, cfg.frames, cfg.size, cfg.seed, cfg.prior, cfg.shift_scenes))


def bundle_path(cfg):
    """(bundle.json, cfg with its run directory as --out)."""
    if not cfg.bundle:
        return Paths(cfg.out).bundle_json, cfg
    path = Path(cfg.bundle)
    home = path.resolve().parent.parent
    return path, dataclasses.replace(cfg, out=str(home)) if (home / "splits.json").is_file() else cfg


def validate(cfg):
    """Check bundles, policies and archives; the first fault is the error."""
    for path in cfg.words or (str(bundle_path(cfg)[0]),):
        print(f"{path}: sound {bundle.check(path)}")


def show_config(cfg):
    """The effective configuration as JSON, grouped by prefix."""
    groups = {f.name.partition("_")[0] for f in dataclasses.fields(cfg) if "_" in f.name} - {"split", "shift"}
    print(json.dumps(pipeline.grouped(cfg, groups), indent=2, sort_keys=True))
