"""What the tests of the drifting scripts share: tiny pictures, comparisons, runs as commands and their files.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch

from common import run
from common.kernels import drift_loss_reference

ROOT = pathlib.Path(__file__).parents[1]
ONE = run.Ranks(0, 1, torch.device("cpu"))


def tiny_images(folder):
    """64 + 32 images of 16 x 16 in four classes that differ in mean and slope -> the path of an .npz."""
    rng, path = np.random.default_rng(0), folder / "tiny.npz"
    label = np.arange(96) % 4
    ramp = np.linspace(0, 1, 16)[None, :, None]
    x = 40 * label[:, None, None] + 60 * ramp * (label % 2)[:, None, None] + rng.uniform(0, 60, (96, 16, 16))
    x = x.clip(0, 255).astype(np.uint8)
    np.savez(path, train_images=x[:64], train_labels=label[:64], test_images=x[64:], test_labels=label[64:])
    return str(path)


# --- networks and gradients ----------------------------------------------------


def inventory(mae, size, channels, sets="abcd"):
    """[(key, vectors F, channels C)] of one image, found on the meta device without computing anything."""
    feats = mae.to("meta").features(torch.empty(1, channels, size, size, device="meta"), sets)
    return [(key, f.shape[1], f.shape[2]) for key, f in feats.items()]


def opened(net, seed=0):
    """Random values in every zero-initialised parameter, so that all of the network acts."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=gen) * (0.02 if p.ndim == 1 else p.shape[1] ** -0.5))
    return net


def conditions(cfg, g):
    """The part of a fixed batch that no data enters: labels, guidance scales, noise, styles."""
    N = cfg.labels
    return dict(label=torch.arange(N) % cfg.classes, alpha=torch.linspace(1, 3, N),
                eps=torch.randn(N, cfg.gen, cfg.channels, cfg.size, cfg.size, generator=g),
                style=torch.randint(cfg.style_codes, (N, cfg.gen, cfg.style_tables), generator=g))


def generated(net, b, G):
    """net on a whole batch b at once, [N G, C, H, W]."""
    return net(b["label"].repeat_interleave(G), b["alpha"].repeat_interleave(G), b["eps"].flatten(0, 1),
               b["style"].flatten(0, 1))


def slow_total(fake, pos, unc, alpha, cfg):
    """The step's loss key by key, label by label, through the ten-line reference.

    fake: {key: [N G, F, C]}; pos, unc: the same of each label's real pictures, a list of N.
    """
    total, G = 0, cfg.gen
    for key, f in fake.items():
        rows = [(f[i * G:(i + 1) * G, at], pos[i][key][:, at], unc[i][key][:, at],
                 (alpha[i] - 1) * (G - 1) / cfg.unc)
                for i in range(cfg.labels) for at in range(f.shape[1])]
        g, p, u, w = (torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in range(4))
        total = total + drift_loss_reference(g, p, u, w, cfg.taus, cfg.floor).mean()
    return total


def gradients_of(net):
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def compare(a, b, tolerance):
    """Two dicts of gradients agree to `tolerance` of the largest number in b."""
    assert a.keys() == b.keys()
    scale = max(g.abs().max() for g in b.values())
    assert max((a[n] - b[n]).abs().max() for n in b) <= tolerance * scale


# --- runs as commands ----------------------------------------------------------


def flags(cfg, *leave):
    """A Config as command-line words."""
    words = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.name in ("words", *leave) or value == "":
            continue
        name = "--" + f.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(name if value else "--no-" + name[2:])
        else:
            words += [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def kill_after_three_steps(name, words, out, steps):
    """Start a run that saves every step, SIGKILL it between its third and its last."""
    child = subprocess.Popen([sys.executable, name, "train", *words, "--out", out], cwd=ROOT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    began = time.time()
    while not list(pathlib.Path(out).glob("ckpt/0000000[3-9]")) and time.time() - began < 120:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sorted(p.name for p in pathlib.Path(out, "ckpt").glob("0*") if p.name.isdigit())
    assert done and int(done[-1]) < steps


# --- what a run leaves ---------------------------------------------------------


def weights(out):
    return {p.name: run.load_weights(p)[0] for p in pathlib.Path(out).glob("ema*.safetensors")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f])


def newest(out):
    """The bytes of every file of the newest checkpoint, but for its times."""
    folder = sorted(p for p in pathlib.Path(out, "ckpt").iterdir() if p.name.isdigit())[-1]
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "meta.json"}


def forget(out, step):
    """Remove a run's checkpoint `step` and its final weights, as if it had been stopped before."""
    shutil.rmtree(pathlib.Path(out, "ckpt", f"{step:08d}"))
    for name in weights(out):
        pathlib.Path(out, name).unlink()


def rows_of(out):
    return [json.loads(line) for line in pathlib.Path(out, "log.jsonl").read_text().splitlines()]


def check_files_and_scores(out, name):
    """A finished run of six steps has the files and scores of STYLE -> its rows of kind train."""
    out = pathlib.Path(out)
    for file in ("config.json", name, "log.jsonl", "RUN.md", "ema.safetensors", "ema_0.9.safetensors",
                 "samples/00000006.png", "mae/mae.safetensors", "mae/mae_before_cls.safetensors",
                 "weights/00000006.safetensors", "ckpt/00000006/meta.json"):
        assert (out / file).exists(), file
    rows = rows_of(out)
    assert {"accuracy", "fd", "floor_fd", "precision", "recall", "judge_accuracy"} <= set(
        [r for r in rows if r["kind"] == "eval"][-1])
    train = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    return train
