"""Tables of noise: signal power of the discrete schedules, and the levels a sampler visits."""
import math

import torch

from common.flags import UserError, unknown

SIGMAS = ("karras", "exponential", "beta", "linspace", "leading", "trailing", "flow", "sd3")


def alpha_bar(schedule, steps=1000, zero_snr=False):
    """Signal power of a discrete VP schedule: linear (DiT), scaled_linear (SD), cosine -> float64 [steps].

    zero_snr shifts and stretches sqrt(alpha_bar) so that the last step holds no signal (arXiv:2305.08891)."""
    if schedule == "cosine":
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise UserError(unknown("schedule", schedule, ("linear", "scaled_linear", "cosine")))
    abar = torch.cumprod(1 - beta, 0)
    if zero_snr:
        a = abar.sqrt()
        abar = ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2
        abar[-1] = 2.0**-24                     # a finite sigma; only v-prediction means anything there
    return abar


def shift(u, k):
    """Time shift of rectified flow: k > 1 spends more steps at high noise; 1/k undoes k."""
    return k * u / (1 + (k - 1) * u)


def sigmas(kind, steps, sigma_min=0.0291675, sigma_max=14.61465, rho=7.0, shift_by=1.0, abar=None):
    """The noise levels a sampler visits, float64 [steps + 1], falling and ending in 0.

    karras, exponential, beta: between sigma_max and sigma_min (ve). linspace, leading, trailing: at timesteps
    of the discrete schedule abar (default scaled_linear). flow: shift_by applied to 1 .. 0; sd3: applied
    twice, as SD3's own code does, so that the last level is lower."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if kind == "karras":
        s = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    elif kind == "exponential":
        s = torch.exp(math.log(sigma_max) + ramp * math.log(sigma_min / sigma_max))
    elif kind == "beta":                        # quantiles of Beta(0.6, 0.6): dense at both ends
        from scipy.stats import beta            # takes half as long to import as torch
        quantile = torch.from_numpy(beta.ppf(1 - ramp.numpy(), 0.6, 0.6))
        s = sigma_min + quantile * (sigma_max - sigma_min)
    elif kind in ("linspace", "leading", "trailing"):
        abar = alpha_bar("scaled_linear") if abar is None else abar
        T = len(abar)
        t = {"linspace": (T - 1) * (1 - ramp),
             "leading": (torch.arange(steps - 1, -1, -1) * (T // steps)).double(),
             "trailing": (T - torch.arange(steps, dtype=torch.float64) * T / steps).round() - 1}[kind]
        table = ((1 - abar) / abar).sqrt()
        low = t.floor().long().clamp(max=T - 1)
        s = torch.lerp(table[low], table[(low + 1).clamp(max=T - 1)], t - low)
    elif kind == "flow":
        s = shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], shift_by)
    elif kind == "sd3":
        s = shift(torch.linspace(1, float(shift(1e-3, shift_by)), steps, dtype=torch.float64), shift_by)
    else:
        raise UserError(unknown("sigmas", kind, SIGMAS))
    return torch.cat([s, torch.zeros(1, dtype=torch.float64)])
