"""A frozen backbone: pretraining on drawn shapes as a stand-in for DINOv3, and logistic regression on
features.

The logistic probe is the baseline that a trained model has to beat, and shows what adaptation without labels
is worth: the same probe on the backbone before and after it.
"""

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import nn

from common import images, run
from common.classify import mcc_sweep, negative_log_likelihood
from common.street.views import normalised


def pretrain_on_shapes(vit, side, steps, seed, batch=32):
    """Classify drawn shapes for a few steps, in place -> vit, so that phase 4a has something to adapt."""
    run.seed_all(seed, 2)
    vit.reset()
    head = nn.Linear(vit.D, len(images.SHAPES))
    optim = torch.optim.AdamW([*vit.parameters(), *head.parameters()], 1e-3, weight_decay=0.05)
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        label_B = torch.from_numpy(rng.integers(0, len(images.SHAPES), batch))
        x_BCHW = torch.stack([normalised(images.render(images.SHAPES[k], side, rng)) for k in label_B])
        loss = F.cross_entropy(head(vit(x_BCHW)["cls"]), label_B)
        optim.zero_grad()
        loss.backward()
        optim.step()
    return vit


def logistic(f_NF, label_N, decay):
    """Weights and bias of the logistic regression with penalty decay |w|^2 / 2 on the mean loss, float64."""
    y = np.asarray(label_N, np.float64)

    def loss(w):
        z = f_NF @ w[:-1] + w[-1]
        slope = (scipy.special.expit(z) - y) / len(y)
        value = np.mean(np.logaddexp(0, z) - y * z) + decay * (w[:-1] @ w[:-1]) / 2
        return value, np.r_[f_NF.T @ slope + decay * w[:-1], slope.sum()]
    w = scipy.optimize.minimize(loss, np.zeros(f_NF.shape[1] + 1), jac=True, method="L-BFGS-B",
                 options=dict(maxiter=500)).x
    return w[:-1], w[-1]


def fit_probe(linear, train, select, decays=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
    """Logistic regression on standardised features into a two-logit linear layer, in place.

    train, select: (features [N, F], labels [N]); the penalty is the one with the lowest loss on `select`
    -> dict(decay, threshold): the cut with the highest MCC there.
    """
    f, g = (np.asarray(part[0], np.float64) for part in (train, select))
    mean, std = f.mean(0), f.std(0) + 1e-6
    best = None
    for decay in decays:
        w, b = logistic((f - mean) / std, train[1], decay)
        prob = scipy.special.expit((g - mean) / std @ w + b)
        loss = negative_log_likelihood(prob, select[1])
        if best is None or loss < best[0]:
            best = loss, decay, w / std, b - mean / std @ w, prob
    _, decay, w, b, prob = best
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.stack([-w / 2, w / 2])))
        linear.bias.copy_(torch.tensor([-b / 2, b / 2]))
    return dict(decay=decay, threshold=mcc_sweep(prob, select[1], 1001)["threshold"])
