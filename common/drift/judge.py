"""Scores of generated images: against a small classifier trained here on the real training set, or the FID
network.

Both return a function (images uint8 [B, C, H, W], asked labels, name) -> dict of scores that also writes
pictures.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, draw, metrics, run


class Judge(nn.Module):
    """Classifier of real images, uint8 [B, C, H, W] -> (features [B, 128], logits); its features compare
    small sets.
    """

    def __init__(self, colors, classes):
        super().__init__()
        widths = (colors, 32, 64, 64, 128)
        layers = []
        for cin, cout, stride in zip(widths, widths[1:], (2, 2, 1, 2)):
            layers += [nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x_BCHW):
        pool_BD = self.body(x_BCHW.float() / 127.5 - 1).mean((2, 3))
        return pool_BD, self.out(pool_BD)


@torch.no_grad()
def run_all(net, x_BCHW, batch=500):
    """net over many images -> its two outputs, float32 on the CPU."""
    device = next(net.parameters()).device
    pairs = [net(part.to(device)) for part in x_BCHW.split(batch)]
    return tuple(torch.cat(side).float().cpu() for side in zip(*pairs))


def train_judge(path, real, epochs, seed, device):
    """Train on the real training images alone, never on a sample; kept at path and reused for the same set.
    """
    meta = dict(data=real.fingerprint(), epochs=epochs, seed=seed)
    x, label = real.tensor()
    run.seed_all(seed, 6)
    judge = Judge(x.shape[1], len(real.classes)).to(device)
    if Path(path).exists():
        tensors, found = run.load_weights(path)
        if found == meta:
            judge.load_state_dict(tensors)
            return judge.eval()
    batch = min(128, len(x))
    steps = epochs * (len(x) // batch)
    optim = torch.optim.AdamW(judge.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 4e-3, total_steps=steps + 1)
    order = data.Order(len(x), batch, seed)
    for step in range(1, steps + 1):
        rows = torch.from_numpy(order(step)[1])
        loss = F.cross_entropy(judge(x[rows].to(device))[1], label[rows].to(device))
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    run.save_weights(path, judge.state_dict(), meta)
    return judge.eval()


def distances(real, fake):
    """Frechet distance of two feature sets [., D], and precision and recall (k = 3) on equally many rows of
    each.
    """
    moments = [(f.double().mean(0).numpy(), f.double().T.cov().numpy()) for f in (real, fake)]
    n = min(len(real), len(fake), 10_000)
    every = torch.linspace(0, len(real) - 1, n).long()
    precision, recall = metrics.precision_recall(real[every], fake[:n], k=3)
    return dict(fd=metrics.frechet_distance(*moments[0], *moments[1]), precision=precision, recall=recall)


def picture(x_BCHW, columns):
    """uint8 [B, C, H, W] -> one picture, small images enlarged."""
    images = x_BCHW.permute(0, 2, 3, 1).numpy()
    return draw.grid(images[..., 0] if images.shape[-1] == 1 else images, columns=columns,
                     scale=max(1, 64 // images.shape[1]))


def hundred(label_B):
    """Rows of (at most) a hundred images, sorted by label: ten rows of ten where there are ten classes."""
    return label_B.argsort(stable=True)[torch.linspace(0, len(label_B) - 1, min(100, len(label_B))).long()]


def rows_of_classes(n, classes):
    """n labels, equally many of each class, in a fixed shuffled order."""
    return torch.from_numpy(np.random.default_rng(0).permutation(np.arange(n) % classes))


def save_samples(name, images, label_B):
    """NAME.npz (arr_0 uint8 NHWC, labels; whole or not there) and NAME.png, a grid of a hundred -> NAME."""
    name.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{name}.tmp", "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), labels=label_B.numpy())
    os.replace(f"{name}.tmp", f"{name}.npz")
    draw.save(picture(images[hundred(label_B)], 10), f"{name}.png")
    return name


def classifier_test(train, test, out, count, epochs, seed, device):
    """(scores function, what real test images score) from a classifier trained on the real training set.

    accuracy: share of samples it gives the label asked for. fd, precision, recall: in its features against
    the real training set; floor_*: the same for `count` real test images. neighbour_match: label agreement of
    the ten nearest training images of ten samples, which NAME_neighbours.png shows.
    """
    judge = train_judge(Path(out) / "judge.safetensors", train, epochs, seed, device)
    (train_x, train_label), (test_x, test_label) = train.tensor(), test.tensor()
    train_f, (test_f, test_logit) = run_all(judge, train_x)[0], run_all(judge, test_x)
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(test_f))[:count])
    floor = {f"floor_{k}": v for k, v in distances(train_f, test_f[rows]).items()}
    right = (test_logit.argmax(1) == test_label).float().mean()
    base = dict(judge_accuracy=float(right), floor_n=len(rows), **floor)

    def score(images, label_B, name):
        fake_f, logit = run_all(judge, images)
        near = torch.as_tensor(metrics.nearest_neighbours(fake_f[:10], train_f, k=10)[1])
        rows = torch.cat([torch.cat([images[i:i + 1], train_x[row]]) for i, row in enumerate(near)])
        draw.save(picture(rows, 11), Path(out) / "samples" / f"{name}_neighbours.png")
        draw.save(picture(images[hundred(label_B)], 10), Path(out) / "samples" / f"{name}.png")
        hit = logit.argmax(1) == label_B
        worst = min(float(hit[label_B == c].float().mean()) for c in label_B.unique())
        return dict(accuracy=float(hit.float().mean()), worst_class=worst, **distances(train_f, fake_f),
                    neighbour_match=float((train_label[near] == label_B[:10, None]).float().mean()))
    return score, base


def inception_test(weights, fid_stats, out, device):
    """The same with the FID network (drift.md 8): fid against fid_stats (.npz), isc the inception score."""
    net = metrics.InceptionV3.load(weights, resize="tf").to(device)
    reference = metrics.Moments.load(fid_stats) if fid_stats else None

    def score(images, label_B, name):
        pool, logits = run_all(net, images.expand(-1, 3, -1, -1), 100)
        fake = metrics.Moments(pool.shape[1])
        fake.update(pool)
        isc, isc_std = metrics.inception_score(logits)
        draw.save(picture(images[hundred(label_B)], 10), Path(out) / "samples" / f"{name}.png")
        pair = reference and (reference.mean, reference.cov, fake.mean, fake.cov)
        return dict(fid=metrics.frechet_distance(*pair) if pair else None, isc=isc, isc_std=isc_std)
    return score, {}
