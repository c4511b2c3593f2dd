"""MaC-Cal (arXiv 2508.09116) as far as published: a head retrained under random masks, features fixed.

The update rule of the share of weights kept is ours, the paper's was not available.

N samples  F features  K masks  C classes  H width of the head
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import run
from common.street.views import step_indices


class MaskedHead(nn.Sequential):
    """A head whose last matrix wears K fixed random masks: head(f) -> log of the mean of their K answers.

    No masks (K = 0): the plain head, which is the answer of the expected mask.
    """

    def __init__(self, layers, masks=0):
        super().__init__(*layers)
        self.register_buffer("masks", torch.ones(masks, *self[-1].weight.shape))

    def draw(self, rho, seed):
        """Masks of Bernoulli(rho) / rho, a function of the seed."""
        g = run.generator(seed, 9)
        self.masks.copy_(torch.bernoulli(torch.full(self.masks.shape, rho), generator=g) / rho)

    def forward(self, f):
        if not len(self.masks):
            return super().forward(f)
        h = self.body(f)
        logits_KC = torch.stack([F.linear(h, m * self[-1].weight, self[-1].bias) for m in self.masks])
        return logits_KC.log_softmax(-1).logsumexp(0) - math.log(len(self.masks))

    def body(self, f):
        for layer in list(self)[:-1]:
            f = layer(f)
        return f


def mac_cal(head, features_NF, label_N, select_NF, select_label_N, seed, epochs=10, lr=1e-3, batch=64):
    """Retrain a MaskedHead in place under W' = (M * W) / rho, M ~ Bernoulli(rho) anew each step -> last rho.

    After an epoch rho <- retention(rho, confidence - accuracy) on the selection split, so over-confidence
    makes it sparser.  Last the head's own masks, if it has any, are drawn with that rho.
    """
    rho, per_epoch = 1.0, math.ceil(len(features_NF) / batch)
    head.cpu().requires_grad_(True)
    optim, last = torch.optim.AdamW(head.parameters(), lr), head[-1]
    for step in range(1, epochs * per_epoch + 1):
        _, ids = step_indices(len(features_NF), batch, step, seed)
        run.seed_all(seed, 5, step)
        head.train()
        mask = torch.bernoulli(torch.full_like(last.weight, rho))
        logits = F.linear(head.body(features_NF[ids]), mask * last.weight / rho, last.bias)
        loss = F.cross_entropy(logits, torch.from_numpy(label_N[ids]))
        optim.zero_grad()
        loss.backward()
        optim.step()
        if step % per_epoch == 0:
            head.eval()
            with torch.no_grad():
                p = F.linear(head.body(select_NF), last.weight, last.bias).softmax(1)
            sure, right = p.amax(1).mean(), (p.argmax(1).numpy() == select_label_N).mean()
            rho = retention(rho, float(sure) - float(right))
    head.draw(rho, seed)
    return rho


def retention(rho, gap):
    """rho - gap / 2, kept in [0.5, 1]."""
    return float(np.clip(rho - 0.5 * gap, 0.5, 1.0))
