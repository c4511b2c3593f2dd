"""Ways to combine a prediction with the caption and one without it."""
import math

import numpy as np
import torch

from common.flags import UserError, unknown

GUIDANCE = ("cfg", "rescale", "dynamic", "mimic", "apg", "zero_star")


def guide(cond, uncond, scale, method="cfg", *, phi=0.7, percentile=0.995, mimic=7.0, mimic_percentile=1.0,
          measure="AD", startpoint="MEAN", per_channel=True, eta=0.0, norm=0.0, momentum=None):
    """Combine two predictions [B, C, ...] into a guided one; scale 1 is cond, 0 is uncond.

    cfg        u + w (c - u)
    rescale    mixed (phi) with itself at cond's standard deviation, arXiv:2305.08891
    dynamic    Imagen's percentile thresholding of x0, arXiv:2205.11487; for pixels, not for latents
    mimic      statistics of guidance `mimic` put on guidance w (sd-dynamic-thresholding)
    apg        keeps the part of c - u orthogonal to c (eta 0), arXiv:2410.02416; norm > 0 bounds it, and
               momentum (a Momentum of this picture) mixes it with those of earlier steps
    zero_star  u scaled by <c, u> / |u|^2 first, arXiv:2503.18886
    """
    c, u, axes = cond.float(), uncond.float(), tuple(range(1, cond.ndim))
    if method not in GUIDANCE:
        raise UserError(unknown("guidance", method, GUIDANCE))
    if method == "zero_star":
        u = u * (c * u).sum(axes, keepdim=True) / ((u * u).sum(axes, keepdim=True) + 1e-8)
    if method == "apg":
        delta, length = c - u, torch.linalg.vector_norm
        delta = delta if momentum is None else momentum(delta)
        if norm > 0:
            delta = delta * (norm / length(delta, dim=axes, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        unit = c / length(c, dim=axes, keepdim=True).clamp(min=1e-12)
        parallel = (delta * unit).sum(axes, keepdim=True) * unit
        return (c + (scale - 1) * (delta - parallel + eta * parallel)).to(cond.dtype)
    g = u + scale * (c - u)
    if method == "rescale":
        g = phi * g * c.std(axes, keepdim=True) / g.std(axes, keepdim=True) + (1 - phi) * g
    elif method == "dynamic":
        s = torch.quantile(g.abs().flatten(1), percentile, dim=1).clamp(min=1).view((-1,) + (1,) * len(axes))
        g = g.clamp(-s, s) / s
    elif method == "mimic":
        g = _mimic(g, u + mimic * (c - u), mimic_percentile, measure, startpoint, per_channel)
    return g.to(cond.dtype)


# What a scale does over the steps of a run: f goes from 0 to 1, p is --power. Names and formulas are those of
# sd-dynamic-thresholding; its half cosines end at cos(1).
MODES = dict(
    constant=lambda f, p: 1.0,
    linear_down=lambda f, p: 1 - f, linear_up=lambda f, p: f,
    cosine_down=lambda f, p: math.cos(f * math.pi / 2), cosine_up=lambda f, p: 1 - math.cos(f * math.pi / 2),
    half_cosine_down=lambda f, p: math.cos(f), half_cosine_up=lambda f, p: 1 - math.cos(f),
    power_down=lambda f, p: 1 - f**p, power_up=lambda f, p: f**p,
    linear_repeating=lambda f, p: abs(1 - 2 * (f * p % 1)), sawtooth=lambda f, p: f * p % 1,
    cosine_repeating=lambda f, p: 0.5 + 0.5 * math.cos(2 * math.pi * f * p))


def scheduled(scale, mode, least, power, sigmas):
    """A scale that runs between itself and `least` over the steps -> the number, or a function of sigma.

    sigmas: the falling levels at which steps start; between them (samplers of two calls) it is linear."""
    if mode == "constant":
        return scale
    at, n = -np.asarray(sigmas, float), max(len(sigmas) - 1, 1)
    values = [least + (scale - least) * MODES[mode](i / n, power) for i in range(len(sigmas))]
    return lambda sigma: float(np.interp(-sigma, at, values))


class Momentum:
    """APG's running difference: d <- (c - u) + beta d; beta below 0 pushes away from earlier directions."""

    def __init__(self, beta):
        self.beta, self.delta = beta, 0

    def __call__(self, delta):
        self.delta = delta + self.beta * self.delta
        return self.delta


def _mimic(strong, weak, percentile, measure, startpoint, per_channel):
    """strong with the spread of weak, per channel or whole; AD: largest deviations, STD: standard ones."""
    T, M = strong.flatten(2), weak.flatten(2)
    mean = T.mean(2, keepdim=True)
    tc, mc = T - mean, M - M.mean(2, keepdim=True)
    flat = (lambda v: v) if per_channel else (lambda v: v.flatten(1)[:, None])
    if measure == "AD":
        weak_s = flat(mc).abs().amax(2, keepdim=True)
        strong_s = torch.quantile(flat(tc).abs(), percentile, dim=2, keepdim=True)
    else:
        weak_s, strong_s = flat(mc).std(2, keepdim=True), flat(tc).std(2, keepdim=True)
    if startpoint == "ZERO":
        out = T * weak_s / strong_s
    elif measure == "STD":
        out = tc / strong_s * weak_s + mean
    else:
        s = torch.maximum(weak_s, strong_s)
        out = tc.clamp(-s, s) / s * weak_s + mean
    return out.view_as(strong)
