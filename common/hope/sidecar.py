"""What a checkpoint says about itself beside its tensors, and the strict check of it."""

import hashlib
import json
import pathlib
import random

import numpy as np
import torch

from common.ckpt import verify as rehash
from common.hope.text import BPE

PARTS = ("config", "data", "cursor", "torch_rng", "numpy_rng", "python_rng")


def config_hash(config, free):
    """SHA-256 of what makes a run itself: every field but the free ones, which may
    change when it continues."""
    kept = json.dumps({k: v for k, v in config.items() if k not in free}, sort_keys=True)
    return hashlib.sha256(kept.encode()).hexdigest()


def record(config, free, data, step):
    """Hashes of config, data and tokenizer; RNG states (for audits: noise is a function of the
    step); loader cursor."""
    _, keys, position, *_ = np.random.get_state()
    return dict(config=config_hash(config, free), data=data, cursor=dict(step=step, seed=config["seed"]),
                torch_rng=torch.get_rng_state(), numpy_rng=keys.astype(np.int64),
                numpy_position=int(position), python_rng=torch.tensor(random.getstate()[1]))


def verify(root, strict, free):
    """(number of checkpoints, problems) of a run directory; no checkpoint at all is a problem."""
    root, problems = pathlib.Path(root), []
    folders = sorted(p for p in (root / "ckpt").glob("*") if p.is_dir() and p.name.isdigit())
    for folder in folders:
        found = rehash(folder)
        if strict and not found:
            found = strict_problems(folder, json.loads((root / "config.json").read_text()), free)
        problems += [f"{folder}: {p}" for p in found]
    return len(folders), problems if folders else [f"{root}: no checkpoints"]


def strict_problems(folder, facts, free):
    """A sidecar against the run's config.json: every part is there, and config, data and
    tokenizer are the same."""
    try:
        side = dict(json.loads((folder / "side.json").read_text())["dict"])
    except (OSError, ValueError, KeyError) as error:
        return [f"side.json: {type(error).__name__}"]
    found = [f"no {part}" for part in PARTS if part not in side]
    if config_hash(facts["config"], free) != side.get("config", {}).get("value"):
        found.append("config.json is not the config this checkpoint was written under")
    data = {k: v.get("value") for k, v in side.get("data", {}).get("dict", [])}
    if data != facts["data"]:
        found.append("the data in config.json is not the data of this checkpoint")
    name = facts["config"]["tokenizer"] or pathlib.Path(facts["config"]["data"], "tokenizer.json")
    if pathlib.Path(name).is_file() and BPE.load(name).sha256 != data.get("tokenizer"):
        found.append(f"tokenizer {name} is not the one of training")
    return found
