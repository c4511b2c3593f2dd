"""Two dimensions to look at: principal components, and exact t-SNE (van der Maaten & Hinton 2008)."""

import math

import numpy as np

from common.flags import UserError


def pca(x_ND, k):
    """Principal components -> (mean [D], axes [k, D], explained share [k]); largest loading positive."""
    mean = x_ND.mean(0)
    _, s, v = np.linalg.svd(x_ND - mean, full_matrices=False)
    v = v * np.sign(v[np.arange(len(v)), np.abs(v).argmax(1)])[:, None]
    share = s**2 / max(float((s**2).sum()), 1e-30)
    return mean, v[:k], share[:k]


def tsne(x_ND, perplexity=30.0, steps=1000, learning_rate=None):
    """Exact t-SNE, begun at the PCA -> (y [N, 2], KL(P || Q)).  O(N^2) a step."""
    n = len(x_ND)
    if perplexity >= (n - 1) / 3:
        raise UserError(f"perplexity {perplexity:g} needs more than {3 * perplexity + 1:.0f} points, not {n}")
    P = np.maximum(joint_probabilities(x_ND, perplexity), 1e-12)
    mean, axes, _ = pca(x_ND, 2)
    y = (x_ND - mean) @ axes.T
    y = y / max(y[:, 0].std(), 1e-30) * 1e-4
    rate = learning_rate or max(n / 12 / 4, 50.0)
    move, gain = np.zeros_like(y), np.ones_like(y)
    for step in range(steps):
        early = step < 250
        grad, _ = tsne_gradient(P * 12 if early else P, y)
        same = grad * move > 0
        gain = np.maximum(np.where(same, gain * 0.8, gain + 0.2), 0.01)
        move = (0.5 if early else 0.8) * move - rate * gain * grad
        y = y + move
    return y, tsne_gradient(P, y)[1]


def joint_probabilities(x_ND, perplexity):
    """Symmetric P [N, N], sum 1: Gaussian neighbourhoods whose entropy is log(perplexity), by bisection."""
    x = x_ND.astype(np.float64)
    D = np.maximum((x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T, 0)
    np.fill_diagonal(D, np.inf)
    D = D - D.min(1, keepdims=True)
    finite = np.where(np.isinf(D), 0, D)
    b, low, high = np.ones(len(x)), np.zeros(len(x)), np.full(len(x), np.inf)
    for _ in range(64):
        p = np.exp(-D * b[:, None])
        total = p.sum(1)
        entropy = np.log(total) + b * (finite * p).sum(1) / total
        flat = entropy > math.log(perplexity)
        low, high = np.where(flat, b, low), np.where(flat, high, b)
        done = np.abs(entropy - math.log(perplexity)) < 1e-5
        b = np.where(done, b, np.where(np.isinf(high), b * 2, (low + np.minimum(high, 1e300)) / 2))
    p = p / p.sum(1, keepdims=True)
    return (p + p.T) / (2 * len(x))


def tsne_gradient(P, y):
    """Gradient of KL(P || Q) in y [N, 2], and the KL."""
    d = (y**2).sum(1)[:, None] + (y**2).sum(1) - 2 * y @ y.T
    kernel = 1 / (1 + np.maximum(d, 0))
    np.fill_diagonal(kernel, 0)
    Q = np.maximum(kernel / kernel.sum(), 1e-12)
    pull = (P - Q) * kernel
    return 4 * (pull.sum(1)[:, None] * y - pull @ y), float((P * np.log(P / Q)).sum())
