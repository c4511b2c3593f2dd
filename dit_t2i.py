"""Text to image: a diffusion transformer that trains from nothing, and an engine for public weights.

Idea        A VAE squeezes pictures into small latents; a transformer learns to turn noise into latents while
            it reads the caption token by token. Sampling integrates the learnt velocity to a picture.
Paper       DiT arXiv:2212.09748, PixArt-alpha arXiv:2310.00426, rectified flow and SD3 arXiv:2403.03206
Run         smoke   python dit_t2i.py --preset smoke           half a minute, every stage once
            2 CPUs  python dit_t2i.py                          VAE, transformer, score of composition
            then    python dit_t2i.py sample --prompt "a large red circle left of a small blue square"
            public  python dit_t2i.py sample --model sd3_medium/ --prompt "a lighthouse" --offload block
Differs     docs/dit_t2i.md says what, and why each part was chosen

B batch  C channels  H, W height, width  N image tokens  L text tokens  D width  K head dim  E text width
"""

import copy
import dataclasses
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import draw, run
from common.t2i import captions, memory, pictures, public, rounding, scenes, shards, studio
from common.files import write_atomic
from common.run import opt
from common.t2i.captions import Words, to_images, to_pixels
from common.t2i.clip import CLIPTextEncoder, CLIPTokenizer  # noqa: F401  (for importers)
from common.t2i.dit_blocks import (MLP, Attention, CrossAttention, modulate, norm, patches_to_image, rope_2d,
                                   sincos_2d, time_features)
from common.t2i.guidance import GUIDANCE, MODES, Momentum, guide, scheduled
from common.t2i.safety import SafetyChecker  # noqa: F401  (for importers)
from common.t2i.schedules import SIGMAS, alpha_bar, shift, sigmas  # noqa: F401
from common.t2i.t5 import T5Encoder, T5Tokenizer  # noqa: F401  (for importers)
from common.t2i.textcache import PublicText
from common.t2i.tinyvae import TinyVAE
from common.t2i.weights import Outline
from common.vae import AutoencoderKL


# --- config -------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = opt("scenes", "a row of PRESETS")
    out: str = opt("", "run directory", free=True)
    data: str = opt("", "captioned folder, .jsonl or .tar shards; empty: the procedural scenes")
    seed: int = opt(0, "image k of a batch uses seed + k")
    device: str = opt("auto", "auto, cpu, cuda, mps", free=True)
    steps: int = opt(0, "steps of train or sample; 0: train_steps, sample_steps", free=True)
    compile: bool = opt(False, "torch.compile the transformer", free=True)
    wandb: str = opt("", "project; empty: off", free=True)
    json: bool = opt(False, "plan as one JSON object", free=True)
    # data and VAE
    size: int = opt(32, "pixels a side in training; buckets keep this area")
    pool: int = opt(100_000, "scenes drawn for training")
    bucket_step: int = opt(0, "sides of buckets are multiples of this; 0: about an eighth of --size")
    vae: str = opt("", "public VAE, file or folder; empty: train a small one")
    vae_steps: int = opt(4000, "steps of the small VAE")
    vae_width: int = opt(32, "its first width")
    vae_batch: int = opt(16, "pictures a step")
    vae_lr: float = opt(3e-3, "its peak learning rate")
    latent: int = opt(4, "its latent channels")
    kl: float = opt(1e-4, "weight of KL(posterior | N(0, 1)) per latent number beside the pixel loss")
    # transformer
    patch: int = opt(2, "latent cells a token side")
    width: int = opt(128, "D")
    depth: int = opt(4, "blocks")
    heads: int = opt(4, "attention heads")
    text_depth: int = opt(3, "layers of the text encoder; word order needs 3")
    text_len: int = opt(12, "text tokens")
    text_model: str = opt("", "frozen public T5 or CLIP, folder; empty: train a text encoder along")
    arch: str = opt("cross", "text by cross-attention or in one stream", choices=("cross", "joint"))
    mod: str = opt("adaln_zero", "modulation", choices=("adaln_zero", "adaln_single", "adaln"))
    time_embed: str = opt("sin", "time features", choices=("sin", "fourier"))
    rope: bool = opt(True, "rotate q and k by 2-D position, beside the fixed positions")
    # objective and optimizer
    schedule: str = opt("flow", "noise", choices=("flow", "linear", "scaled_linear", "cosine"))
    prediction: str = opt("flow", "what the network outputs", choices=("flow", "x0", "eps", "v"))
    zero_snr: bool = opt(False, "VP schedules: no signal at the last step; needs --prediction v or x0")
    t_mean: float = opt(1.0, "logit-normal noise level: mean; high noise decides layout")
    t_std: float = opt(1.0, "its standard deviation")
    train_steps: int = opt(8000, "optimizer steps of the transformer")
    batch: int = opt(64, "pictures a step, all ranks together")
    lr: float = opt(1.5e-3, "peak learning rate")
    warmup: int = opt(200, "steps of linear warm-up")
    decay: float = opt(0.4, "last part of the run, over which the rate falls")
    inpaint: bool = opt(False, "train to repaint: the net also reads a mask and the rest of the picture")
    drop: float = opt(0.1, "captions dropped, for guidance")
    ema: float = opt(0.998, "decay of the averaged weights")
    clip: float = opt(1.0, "gradient norm bound")
    fsdp: bool = opt(False, "shard parameters and optimizer over ranks (FSDP2) instead of DDP")
    save_every: int = opt(500, "steps between checkpoints", free=True)
    eval_every: int = opt(1000, "steps between scores on validation captions", free=True)
    validate: int = opt(1000, "validation pictures a guidance scale, when training chooses one", free=True)
    # sample
    model: str = opt("", "public model, or a run directory; empty: --out", free=True)
    text: str = opt("", "folder of text encoders and tokenizers the model does not hold", free=True)
    prompt: str = opt("", "caption, or a class number for DiT", free=True)
    prompts: str = opt("", "file with one prompt a line", free=True)
    negative: str = opt("", "what to avoid", free=True)
    count: int = opt(1, "pictures a prompt, seeds seed, seed + 1, ...", free=True)
    at_once: int = opt(4, "pictures a batch", free=True)
    shape: str = opt("", "WxH; empty: the model's", free=True)
    sampler: str = opt("", "empty: the model's default", free=True)
    grid: str = opt("", "sigmas: karras, flow, sd3, ...; empty: the model's default", free=True)
    shift: float = opt(0.0, "flow shift; 0: the model's default", free=True)
    sample_steps: int = opt(0, "sampler steps; 0: the model's default", free=True)
    cfg: float = opt(-1.0, "guidance scale; -1: the model's default", free=True)
    guidance: str = opt("cfg", "how predictions combine", free=True)
    interval: tuple = opt((0.0, 1e9), "guide for sigma in (lo, hi] only", free=True)
    mimic: float = opt(7.0, "scale that --guidance mimic imitates", free=True)
    phi: float = opt(0.7, "mix of --guidance rescale", free=True)
    distilled: float = opt(3.5, "FLUX.1-dev: guidance as an input of the network", free=True)
    apg: tuple = opt((0.0, 0.0, 0.0), "--guidance apg: eta, bound of the norm (0: none), momentum", free=True)
    cfg_mode: str = opt("constant", "how --cfg runs to --cfg-min over the steps", tuple(MODES), free=True)
    cfg_min: float = opt(1.0, "its other end", free=True)
    mimic_mode: str = opt("constant", "how --mimic runs to --mimic-min", tuple(MODES), free=True)
    mimic_min: float = opt(1.0, "its other end", free=True)
    power: float = opt(1.0, "of the power modes; repeats of the repeating ones", free=True)
    skip_layers: tuple = opt((), "skip-layer guidance: blocks left out, 7,8,9 for SD3.5-medium", free=True)
    skip_scale: float = opt(2.5, "its weight, in steps between 1 and 20 % of the run", free=True)
    init: str = opt("", "picture to start from", free=True)
    strength: float = opt(0.6, "how far from --init: 0 returns it, 1 ignores it", free=True)
    strength_mode: str = opt("truncate", "skip steps, or respace all", ("truncate", "respace"), free=True)
    control: str = opt("", "picture that a FLUX control model follows: edges, depth", free=True)
    mask: str = opt("", "white: repaint this part of --init", free=True)
    feather: float = opt(0.0, "pixels over which the edge of the mask fades, inside it", free=True)
    repaint: tuple = opt((1, 1), "RePaint: go back so many steps and do them so many times", free=True)
    crop: int = opt(0, "repaint only the mask and so many pixels around it, at the model's size", free=True)
    preview: int = opt(0, "save the estimate every so many steps", free=True)
    recipe: str = opt("", "PNG made here: repeat it", free=True)
    safety: str = opt("", "folder of the safety checker", free=True)
    safety_action: str = opt("report", "on a flagged picture", ("report", "blur", "black"), free=True)
    safety_offset: float = opt(0.0, "added to its scores; above 0 is stricter", free=True)
    dtype: str = opt("fp32", "compute dtype of a public model", ("fp32", "bf16", "fp16"), free=True)
    quantise: str = opt("", "store linears as int8 or fp8", ("", *memory.STORAGE), free=True)
    offload: str = opt("none", "weights wait in CPU memory", ("none", "model", "block"), free=True)
    t5: bool = opt(True, "SD3: use the T5 encoder when its weights are there", free=True)
    cache: str = opt("", "folder that keeps text embeddings of public models between calls", free=True)

PRESETS = {
    "scenes": dict(paper="-", expect={}, set={}, goal=dict(colour=0.99, shape=0.98, relation=0.99,
                                                           exact=0.97)),
    "smoke": dict(paper="-", expect={}, set=dict(
        train_steps=20, vae_steps=20, pool=256, width=32, depth=2, text_depth=1, vae_width=8, warmup=5,
        batch=16, eval_every=20, sample_steps=4, validate=8)),
    "pixart_xl": dict(paper="PixArt-alpha table 1, PixArt-XL/2", expect={}, set=dict(
        vae="sd-vae-ft-mse", width=1152, depth=28, heads=16, size=256, text_len=64, text_depth=12, batch=256,
        lr=1e-4, ema=0.9999, mod="adaln_single", train_steps=400_000, warmup=1000, t_mean=0.0, t_std=1.0)),
}


# --- noise: schedules, sigmas -------------------------------------------
#
# Tables (alpha_bar, sigmas, shift) stand in common/t2i/schedules.py.
# One denoiser interface D(x, sigma) -> x0 and two spaces; lambda = ln(alpha / sigma) is half the log-SNR.
#   ve    x = x0 + sigma eps,               alpha = 1          (VP models too: x_vp = x / sqrt(1 + sigma^2))
#   flow  x = (1 - sigma) x0 + sigma eps,   alpha = 1 - sigma  (rectified flow)

LAMBDA_EDGE = 1e-5            # flow: lambda is taken at most this near sigma = 1, where it is -infinity


def alpha(sigma, space):
    return 1.0 if space == "ve" else 1.0 - sigma


def lam(sigma, space):
    """ln(alpha / sigma); sigma > 0."""
    if space == "ve":
        return -math.log(sigma)
    sigma = min(sigma, 1 - LAMBDA_EDGE)
    return math.log((1 - sigma) / sigma)


@dataclass(frozen=True)
class Process:
    """What the network was trained to do: a schedule and a prediction (eps, v, x0 or flow velocity)."""
    schedule: str = "flow"
    prediction: str = "flow"
    zero_snr: bool = False

    def __post_init__(self):
        good = ("flow", "x0") if self.schedule == "flow" else ("eps", "v", "x0")
        if self.prediction not in good:
            raise run.UserError(f"--schedule {self.schedule} takes --prediction {' or '.join(good)}, "
                                f"not {self.prediction}")
        if self.zero_snr and self.prediction == "eps":
            raise run.UserError("--zero-snr leaves nothing to predict eps from; use --prediction v or x0")

    @property
    def space(self):
        return "flow" if self.schedule == "flow" else "ve"

    @functools.cached_property
    def abar(self):
        return alpha_bar(self.schedule, zero_snr=self.zero_snr)

    @functools.cached_property
    def log_sigma(self):
        return ((1 - self.abar) / self.abar).sqrt().log().numpy()

    def time(self, sigma):
        """Model time 0..1000 of a noise level: 1000 sigma, or the schedule inverted in log sigma."""
        if self.space == "flow":
            return 1000.0 * sigma
        return float(np.interp(math.log(max(sigma, 1e-10)), self.log_sigma, np.arange(len(self.log_sigma))))

    def x0(self, out, x, sigma):
        """Clean image from the network's output; x in this process's space."""
        if self.prediction == "x0":
            return out
        if self.space == "flow":
            return x - sigma * out
        if self.prediction == "eps":
            return x - sigma * out
        return (x / math.sqrt(1 + sigma**2) - sigma * out) / math.sqrt(1 + sigma**2)

    def predict(self, net, x, sigma, cond):
        """D(x, sigma): calls net once at the scale and time it expects -> x0 float32."""
        sigma = float(sigma)
        x_in = x if self.space == "flow" else x / math.sqrt(1 + sigma**2)
        t = torch.full((x.shape[0],), self.time(sigma), device=x.device, dtype=torch.float32)
        dtype = next(net.parameters()).dtype
        out = net(x_in.to(dtype), t, **cond).float()
        return self.x0(out[:, :x.shape[1]], x, sigma)       # a learned variance (public DiT) is not needed

    def train_terms(self, x0, noise, sample):
        """One training step's x_t, model time, target and loss weight; sample [B] in (0, 1) is the noise
        level.

        flow: sigma = sample. VP: timestep = sample * T and min-SNR weights (gamma 5, arXiv:2303.09556)."""
        view = (-1,) + (1,) * (x0.ndim - 1)
        if self.space == "flow":
            s = sample.view(view)
            x = (1 - s) * x0 + s * noise
            if self.prediction == "x0":          # x0 network, velocity loss: the division weighs low noise
                return x, 1000 * sample, x0, 1 / s.clamp(min=0.05) ** 2
            return x, 1000 * sample, noise - x0, torch.ones_like(s)
        t = (sample * len(self.abar)).long().clamp(max=len(self.abar) - 1)
        abar = self.abar.to(x0.device)[t].float().view(view)
        a, s, snr = abar.sqrt(), (1 - abar).sqrt(), abar / (1 - abar)
        target = {"eps": noise, "v": a * noise - s * x0, "x0": x0}[self.prediction]
        weight = snr.clamp(max=5) / {"eps": snr, "v": snr + 1, "x0": 1.0}[self.prediction]
        return a * x0 + s * noise, t.float(), target, weight


# --- samplers -----------------------------------------------------------
#
# A step goes from noise level a to b > 0, knowing d = D(x, a); the last step, to 0, always returns d.
# h = lambda(b) - lambda(a). Names are those of k-diffusion.


class Noise:
    """Per-image noise from CPU generators: image k of a batch equals a batch of one with seed + k."""

    def __init__(self, seed, count, stream):
        seeds = [seed + k for k in range(count)] if isinstance(seed, int) else list(seed)
        self.generators = [run.generator(s, stream) for s in seeds]

    def like(self, x):
        draws = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in self.generators]
        return torch.stack(draws).to(x)


def start_noise(seed, shape):
    """Unit noise [B, ...]; stream 0, the samplers' own noise is stream 1."""
    return Noise(seed, shape[0], 0).like(torch.empty(shape))


def ancestral(a, b, eta, space):
    """Split the step a -> b into a fall to `down` and fresh noise `up` -> (down, up, scale of the state)."""
    if space == "ve":
        up = min(b, eta * math.sqrt(max(b**2 * (a**2 - b**2) / a**2, 0)))
        return math.sqrt(b**2 - up**2), up, 1.0
    down = b * (1 + (b / a - 1) * eta)
    scale = (1 - b) / (1 - down)
    return down, math.sqrt(max(b**2 - (down * scale) ** 2, 0)), scale


def euler(x, d, a, b, **_):
    return (b / a) * x + (1 - b / a) * d


def heun(x, d, a, b, denoise, **_):
    x_next = euler(x, d, a, b)
    return x + (b - a) / 2 * ((x - d) / a + (x_next - denoise(x_next, b)) / b)


def euler_ancestral(x, d, a, b, space, noise, eta=1.0, **_):
    down, up, scale = ancestral(a, b, eta, space)
    x = scale * euler(x, d, a, down)
    return x + up * noise.like(x) if up else x


def ddim(x, d, a, b, space, noise, eta=0.0, **_):
    """DDIM; in these spaces eta = 0 is Euler and eta = 1 the ancestral sampler."""
    return euler_ancestral(x, d, a, b, space, noise, eta)


def dpmpp_2m(x, d, a, b, space, past, **_):
    """DPM-Solver++(2M), arXiv:2211.01095: extrapolates d with the previous one."""
    h = lam(b, space) - lam(a, space)
    slope = 0 if not past else (d - past[-1]["d"]) * h / (2 * past[-1]["h"])
    return (b / a) * x + (alpha(b, space) - (b / a) * alpha(a, space)) * (d + slope)


def dpmpp_2m_sde(x, d, a, b, space, past, noise, eta=1.0, **_):
    """Its SDE, midpoint form; eta scales the fresh noise, 0 is dpmpp_2m."""
    h = lam(b, space) - lam(a, space)
    q = -math.expm1(-h * (1 + eta))
    x = (b / a) * math.exp(-eta * h) * x + alpha(b, space) * q * d
    if past:
        x = x + 0.5 * alpha(b, space) * q * (d - past[-1]["d"]) * h / past[-1]["h"]
    return x + b * math.sqrt(-math.expm1(-2 * eta * h)) * noise.like(x) if eta else x


def dpmpp_sde(x, d, a, b, space, noise, denoise, eta=1.0, **_):
    """DPM-Solver++ SDE, two evaluations a step; flow is treated as ve after dividing the state by alpha."""
    ea, eb = math.exp(-lam(a, space)), math.exp(-lam(b, space))
    em = math.sqrt(ea * eb)
    m = em if space == "ve" else em / (1 + em)               # the middle in lambda, as a sigma of this space
    y = x / ea if space == "ve" else x / a  # x / (alpha e) is x / sigma, finite at sigma = 1 too
    down, up, _ = ancestral(ea, em, eta, "ve")
    mid = down * y + (1 - down / ea) * d
    mid = mid + up * noise.like(x) if up else mid
    d2 = denoise(mid * alpha(m, space), m)
    down, up, _ = ancestral(ea, eb, eta, "ve")
    x = down * y + (1 - down / ea) * d2                      # r = 1/2: the weight of d, 1 - 1/(2r), is 0
    return alpha(b, space) * (x + up * noise.like(x) if up else x)


def unipc(x, d, a, b, space, past, order=2, left=1, **_):
    """UniPC (arXiv:2302.04867), B2, data prediction: correct x with the new d, then predict."""
    if past:
        x = _unipc_update(past[-1]["x"], past[-1]["a"], a, past, min(order, len(past)), space, correct=d)
    here = [*past, dict(d=d, a=a)]
    return _unipc_update(x, a, b, here, min(order, len(here), left), space), x


def _unipc_update(x, a, b, points, order, space, correct=None):
    """x at a -> x at b from outputs at points, newest last; correct: the output at b, if known already."""
    now, l_a = points[-1], lam(a, space)
    h = lam(b, space) - l_a
    older = points[-2:-order - 1:-1]
    r = [(lam(p["a"], space) - l_a) / h for p in older]
    diff = [(p["d"] - now["d"]) / rk for p, rk in zip(older, r)]
    if correct is not None:
        r, diff = [*r, 1.0], [*diff, correct - now["d"]]
    phi1, phi, f, target = math.expm1(-h), math.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, len(r) + 1):
        target.append(phi * f / phi1)
        f *= k + 1
        phi = phi / -h - 1 / f
    # one term has the published closed form 1/2; more solve sum_k rho_k r_k^j = target_j
    rho = [0.5] if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, target) if r else []
    move = sum(float(w) * dk for w, dk in zip(rho, diff)) if diff else 0
    return (b / a) * x - alpha(b, space) * phi1 * (now["d"] + move)


def renoise(x, b, a, noise, space):
    """From level b back up to a, by the forward process."""
    keep = alpha(a, space) / alpha(b, space)
    return keep * x + math.sqrt(max(a**2 - (keep * b) ** 2, 0)) * noise.like(x)


def walk(steps, jump=1, times=1):
    """Step numbers in the order of RePaint (arXiv:2201.09865): every `jump` steps are done `times` times."""
    parts = [range(i, min(i + jump, steps)) for i in range(0, steps, jump)]
    return [i for part in parts for _ in range(times) for i in part]


def sample_loop(step, denoise, x, sigmas, seed=0, space=None, after=None, repaint=(1, 1), **options):
    """Integrate from sigmas[0] to sigmas[-1] -> x.

    denoise(x, sigma) -> x0; seed: an int (image k uses seed + k) or one per image; space: ve, flow or None
    (flow when no sigma exceeds 1); after(i, x, x0) -> x is called after every step (preview, inpainting);
    repaint: see `walk`."""
    levels = [float(s) for s in sigmas]
    space = space or getattr(denoise, "space", None) or ("flow" if levels[0] <= 1 else "ve")
    noise, past = Noise(seed, x.shape[0], 1), []

    def call(x, s):
        return denoise(x, torch.tensor(s, dtype=torch.float64))
    now = levels[0]
    for i in walk(len(levels) - 1, *repaint):
        a, b = levels[i:i + 2]
        if now != a:                                         # back to an earlier step
            x, past = renoise(x, now, a, noise, space), []
        d, now = call(x, a), b
        if b == 0:
            x = d
        else:
            start = x
            x = step(x=x, d=d, a=a, b=b, space=space, past=past, noise=noise, denoise=call,
                     left=len(levels) - 1 - i if levels[-1] == 0 else len(levels), **options)
            if isinstance(x, tuple):  # unipc also hands back the corrected start of the step
                x, start = x
            past = [*past[-3:], dict(x=start, d=d, a=a, h=lam(b, space) - lam(a, space))]
        x = x if after is None else after(i, x, d)
    return x

SAMPLERS = {name: functools.partial(sample_loop, step) for name, step in dict(
    euler=euler, euler_ancestral=euler_ancestral, heun=heun, ddim=ddim, dpmpp_2m=dpmpp_2m,
    dpmpp_2m_sde=dpmpp_2m_sde, dpmpp_sde=dpmpp_sde, unipc=unipc).items()}


# --- guidance -----------------------------------------------------------


class Denoiser:
    """D(x, sigma) -> x0 with guidance: one batched network call of 2B, or of B where guidance is off.

    scale: a number or a function of sigma. interval: guide only for lo < sigma_ve <= hi (arXiv:2404.07724),
    sigma_ve = sigma / alpha. skip: (blocks, weight, sigmas): at these sigmas a third call leaves blocks out,
    and D moves on by weight times what they change (skip-layer guidance)."""

    def __init__(self, net, process, cond, uncond=None, scale=1.0, method="cfg", interval=(0.0, math.inf),
                 skip=((), 0.0, ()), **options):
        self.net, self.process, self.cond, self.method = net, process, cond, method
        self.scale = scale if callable(scale) else lambda _: scale
        self.space, self.interval, self.skip, self.options = process.space, interval, skip, options
        self.both = None
        if uncond is not None and (callable(scale) or scale != 1):
            self.both = {k: torch.cat([uncond[k], cond[k]]) for k in cond}

    def __call__(self, x, sigma):
        sigma = float(sigma)
        ve = sigma if self.space == "ve" else sigma / max(1 - sigma, LAMBDA_EDGE)
        if self.both is None or not self.interval[0] < ve <= self.interval[1]:
            return self.process.predict(self.net, x, sigma, self.cond)
        uncond, cond = self.process.predict(self.net, torch.cat([x, x]), sigma, self.both).chunk(2)
        mimic = self.options.get("mimic")
        options = dict(self.options, mimic=mimic(sigma)) if callable(mimic) else self.options
        d = guide(cond, uncond, self.scale(sigma), self.method, **options)
        blocks, weight, at = self.skip
        if blocks and sigma in at:
            d = d + weight * (cond - self.process.predict(self.net, x, sigma, dict(self.cond, skip=blocks)))
        return d


# --- model: the diffusion transformer -----------------------------------
#
# One class covers the public class-conditional DiT, PixArt and this file's own model: they differ in
# settings, not in code. Parameter names are those of the DiT and PixArt files.


class Block(nn.Module):
    """x += g1 attn(mod1 LN x);  x += cross(x, text);  x += g2 mlp(mod2 LN x)

    mod  adaln_zero    (shift1, scale1, gate1, shift2, scale2, gate2) = Linear(SiLU(c)), zero at the start
         adaln_single  the same six = a table of this block + one global projection of the time (PixArt)
         adaln         no gates: the ablation without the zero start
    """

    def __init__(self, width, heads, mod="adaln_zero", cross=False, qk_norm=False):
        super().__init__()
        self.mod, self.cross = mod, cross
        self.attn, self.mlp = Attention(width, heads, qk_norm), MLP(width, 4 * width)
        if cross:
            self.cross_attn = CrossAttention(width, heads, qk_norm)
        if mod == "adaln_single":
            self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(6, width), std=width**-0.5))
        else:
            out = (4 if mod == "adaln" else 6) * width
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, out))

    def forward(self, x, c, text=None, mask=None, rope=None, key_mask=None):
        if self.mod == "adaln_single":                       # c [B, 6, D]
            shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + c).unbind(1)
        elif self.mod == "adaln":
            shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, -1)
            gate1 = gate2 = torch.ones_like(shift1)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1[:, None] * self.attn(modulate(norm(x), shift1, scale1), rope, key_mask)
        if self.cross:
            x = x + self.cross_attn(x, text, mask)           # neither normalised nor gated; starts at zero
        return x + gate2[:, None] * self.mlp(modulate(norm(x), shift2, scale2))


class TimeEmbed(nn.Module):
    """sin: fixed frequencies, then Linear-SiLU-Linear. fourier: random ones N(0, 16^2) of t / 1000, kept."""

    def __init__(self, width, kind="sin"):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        if kind == "fourier":
            self.register_buffer("frequency", 16 * torch.randn(128))
        self.kind = kind

    def forward(self, t_B):
        if self.kind == "fourier":
            angle = 2 * math.pi * (t_B.float() / 1000)[:, None] * self.frequency.float()
            features = torch.cat([angle.cos(), angle.sin()], -1)
        else:
            features = time_features(t_B)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, width, out, mod):
        super().__init__()
        self.linear = nn.Linear(width, out)
        if mod == "adaln_single":
            self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(2, width), std=width**-0.5))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.mod = mod

    def forward(self, x, c):
        if self.mod == "adaln_single":
            shift, scale = (self.scale_shift_table + c[:, None]).unbind(1)
        else:
            shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(norm(x), shift, scale))


class DiT(nn.Module):
    """net(x_BCHW, t_B, text_BLE, mask_BL, label_B) -> [B, out, H, W]; H, W multiples of patch.

    arch: label (class embedding joins the time), cross (text through cross-attention in every block), joint
    (text and image tokens in one stream). Fixed sin-cos positions are added; rope turns q and k as well.
    micro: the picture's height, width and aspect ratio join the time. skip: blocks left out."""

    def __init__(self, channels=4, out=4, patch=2, width=128, depth=4, heads=4, arch="cross",
                 mod="adaln_zero", qk_norm=False, rope=False, time="sin", base=0, stretch=1.0, classes=0,
                 text_width=0, null_tokens=0, micro=False, extra=0):
        super().__init__()
        if width % heads or width % 4:
            raise run.UserError(f"--width {width} does not divide over {heads} heads and 4; try {heads * 32}")
        self.patch, self.width, self.heads, self.arch, self.mod = patch, width, heads, arch, mod
        self.rope, self.base, self.stretch, self.channels, self.micro = rope, base, stretch, channels, micro
        self.extra = extra                                   # channels read beside the noisy ones
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(channels + extra, width, patch, patch)))
        self.t_embedder = TimeEmbed(width, time)
        if micro:                                            # PixArt-alpha 1024 is told the picture's size
            self.csize_embedder, self.ar_embedder = TimeEmbed(width // 3), TimeEmbed(width // 3)
        if mod == "adaln_single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if classes:                                          # one more row: no class
            self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(classes + 1, width)))
        elif text_width:
            self.y_embedder = nn.ModuleDict(dict(y_proj=MLP(text_width, width, width)))
            if null_tokens:                                  # PixArt's learnt empty caption
                self.y_embedder.register_buffer("y_embedding", torch.zeros(null_tokens, text_width))
        self.blocks = nn.ModuleList(Block(width, heads, mod, arch == "cross", qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * out, mod)

    def init(self):
        """Xavier linears, N(0, 0.02) time MLP; zero modulation, cross output and last layer: net = 0."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.data.view(self.width, -1))
        nn.init.zeros_(self.x_embedder["proj"].bias)
        for m in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        if self.arch == "label":
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        zero = [self.final_layer.linear, *(b.cross_attn.proj for b in self.blocks if b.cross)]
        if self.mod != "adaln_single":
            zero += [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1]]
        for m in zero:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
        return self

    def forward(self, x_BCHW, t_B, text=None, mask=None, label=None, skip=()):
        rows, cols = x_BCHW.shape[2] // self.patch, x_BCHW.shape[3] // self.patch
        x = self.x_embedder["proj"](x_BCHW).flatten(2).transpose(1, 2)
        x = x + sincos_2d(self.width, rows, cols, self.base, self.stretch).to(x)
        c = self.t_embedder(t_B)
        if self.micro:
            high, wide = (torch.full_like(t_B, 8.0 * n, dtype=torch.float32) for n in x_BCHW.shape[2:])
            sizes = [self.csize_embedder(high), self.csize_embedder(wide), self.ar_embedder(high / wide)]
            c = c + torch.cat(sizes, -1)
        if label is not None:
            c = c + self.y_embedder["embedding_table"](label)
        elif hasattr(self, "y_embedder"):
            text = self.y_embedder["y_proj"](text.to(x.dtype))
        words, key_mask = 0, None
        if self.arch == "joint":
            words = text.shape[1]
            x = torch.cat([text.to(x.dtype), x], 1)
            key_mask = F.pad(mask.bool(), (0, rows * cols), value=True)[:, None, None]
        rope = rope_2d(self.width // self.heads, rows, cols, words) if self.rope else None
        block_c = self.t_block(c).view(len(c), 6, -1) if self.mod == "adaln_single" else c
        for i, block in enumerate(self.blocks):
            if i not in skip:
                x = block(x, block_c, text, mask, rope, key_mask)
        return patches_to_image(self.final_layer(x[:, words:], c), rows, cols, self.patch)


# --- model: the text encoder trained with it ----------------------------


class TextEncoder(nn.Module):
    """ids_BL -> (text_BLD, mask_BL): pre-LN transformer with learnt positions."""

    def __init__(self, words, length, width, depth, heads):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.position = nn.Parameter(nn.init.normal_(torch.empty(length, width), std=0.02))
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(width), attn=Attention(width, heads), norm2=nn.LayerNorm(width),
            mlp=MLP(width, 4 * width))) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids_BL):
        mask = ids_BL > 0
        x = self.embed(ids_BL) + self.position
        for layer in self.layers:
            x = x + layer["attn"](layer["norm1"](x), mask=mask[:, None, None])
            x = x + layer["mlp"](layer["norm2"](x))
        return self.norm(x), mask


class CaptionedDiT(nn.Module):
    """Text encoder and transformer trained together: net(x_BCHW, t_B, ids_BL); with text_width the text comes
    from a frozen public encoder: net(x_BCHW, t_B, text_BLE, mask_BL)."""

    def __init__(self, cfg, words, channels, text_width=0):
        super().__init__()
        if not text_width:
            self.text = TextEncoder(words, cfg.text_len, cfg.width, cfg.text_depth, cfg.heads)
        self.dit = DiT(channels, channels, cfg.patch, cfg.width, cfg.depth, cfg.heads, cfg.arch, cfg.mod,
                       qk_norm=True, rope=cfg.rope, time=cfg.time_embed, text_width=text_width,
                       extra=(1 + channels) * cfg.inpaint).init()

    def forward(self, x, t, text, mask=None):
        if mask is None:
            text, mask = self.text(text)
        return self.dit(x, t, text=text, mask=mask)


# --- data ---------------------------------------------------------------


def bucket_step(cfg):
    """--bucket-step, or about an eighth of the size in whole tokens."""
    unit = (8 if cfg.vae else TinyVAE.factor) * cfg.patch
    step = cfg.bucket_step or max(unit, cfg.size // 8 // unit * unit)
    if step % unit or cfg.size < step:
        raise run.UserError(f"--bucket-step {step} must be a multiple of {unit}, at most --size {cfg.size}")
    return step


def load_pixels(cfg):
    """-> [Bucket] with pixels in memory: --data, or the procedural scenes."""
    if cfg.data:
        return captions.pixel_buckets(cfg.data, cfg.size, bucket_step(cfg))
    pixels, texts = scenes.scenes(cfg.pool, cfg.seed, size=cfg.size)
    return [captions.Bucket(texts, pixels)]


def load_latents(cfg, vae, buckets, device):
    """-> [Bucket] with posteriors: training never runs the VAE. User data goes through a cache on disk."""
    if not cfg.data:
        return captions.encode(buckets, vae, device)
    source = captions.items(cfg.data, cfg.size, bucket_step(cfg))
    return captions.cached(source, vae, device, Path(cfg.out, "latents"), cfg.vae or f"tiny {vae.scale!r}",
                           pixels=cfg.inpaint)


def load_texts(cfg, texts, ddp):
    """-> (Words or PublicText, read): read(list[str]) -> what the network takes, ids or (text, mask).

    A public encoder reads every caption once, before training; it is not in memory while the steps run."""
    if not cfg.text_model:
        words = Words.of(texts, cfg.text_len)
        return words, lambda some: (words(some),)
    public_text = PublicText(cfg.text_model, cfg.text_len, ddp.device)
    cache = public_text.cache(Path(cfg.out, "texts"))
    cache.fill(["", *texts])
    public_text.free()

    def read(some):
        rows = cache(some)
        return rows["text"].float(), rows["mask"]
    return public_text, read


def new_scenes(cfg, count, part="validation"):
    return scenes.scenes(count, cfg.seed + 1, part, size=cfg.size)


# --- train --------------------------------------------------------------


def learning_rate(cfg, step, steps, peak):
    """Linear warm-up, constant, then a cosine to 1 % over the last `decay` of the run."""
    rest = (steps - step) / max(cfg.decay * steps, 1)
    return peak * min(1, step / cfg.warmup) * (0.01 + 0.99 * math.sin(math.pi / 2 * min(1, rest)) ** 2)


def parallel(net, cfg, ddp, sharded=False):
    """compile, then DDP over ranks; sharded: FSDP2 has already split the module in place."""
    net = torch.compile(net, dynamic=False) if cfg.compile else net
    return nn.parallel.DistributedDataParallel(net) if ddp.world > 1 and not sharded else net


def train_vae(cfg, ddp, log, buckets):
    """Small VAE: L1 pixels + kl KL; scale and shift, measured at the end, bring latents to unit variance."""
    vae = TinyVAE(cfg.vae_width, cfg.latent).to(ddp.device)
    optim = torch.optim.AdamW(vae.parameters(), cfg.vae_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state, folder = dict(vae=vae, optim=optim), str(Path(cfg.out, "vae"))
    start = run.load(folder, state, ddp)
    model = parallel(vae, cfg, ddp)
    batch = run.per_rank(cfg.vae_batch, ddp, "--vae-batch")
    for step in run.progress(start, cfg.vae_steps, ddp, "vae"):
        run.seed_all(cfg.seed, ddp.rank, step, 1)
        b = captions.pick(buckets, cfg.seed, step)
        image = to_images(b.pixels[np.random.randint(len(b.captions), size=batch)]).to(ddp.device)
        recon, mean, logvar = model(image)
        pixel = (recon - image).abs().mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        optim.zero_grad()
        (pixel + cfg.kl * kl).backward()
        for group in optim.param_groups:
            group["lr"] = learning_rate(cfg, step, cfg.vae_steps, cfg.vae_lr)
        optim.step()
        if step % 100 == 0 or step == 1:
            run.check_finite(step, vae_loss=pixel.item() + kl.item())
            log("vae", step=step, pixel=pixel.item(), kl=kl.item())
        run.save_if_due(folder, step, cfg.vae_steps, cfg.save_every, state, ddp)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_images(b.pixels[:512]).to(ddp.device))[0].flatten() for b in buckets])
        vae.stats.copy_(torch.stack([1 / z.std(), z.mean()]))
        test, texts = (buckets[0].pixels[:256], None) if cfg.data else new_scenes(cfg, 256)
        seen = to_pixels(vae.decode(vae.encode(to_images(test).to(ddp.device))[0]))
    mse = ((seen.astype(float) - test) ** 2).mean((1, 2, 3))
    judged = {f"judge_{k}": v for k, v in scenes.judge_all(seen, texts).items()} if texts else {}
    log("vae_done", psnr=float((10 * np.log10(255**2 / mse)).mean()), scale=vae.scale, **judged)
    if ddp.rank == 0:
        run.save_weights(Path(cfg.out, "vae.safetensors"), vae.state_dict(),
                         dict(kind="tiny_vae", width=cfg.vae_width, latent=cfg.latent))
    return vae.eval()


def captioned(cfg, words, channels):
    return CaptionedDiT(cfg, *((0, channels, words.width) if cfg.text_model else (len(words), channels)))


def build(cfg, words, channels, ddp):
    """-> (net, ema, optimizer); norms, biases and tables are not decayed."""
    run.seed_all(cfg.seed, 0, 0, 2)
    net = captioned(cfg, words, channels).to(ddp.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    if cfg.fsdp:
        for module in (net, ema):
            shards.shard(module, module.dit.blocks)
    groups = [dict(params=[p for p in net.parameters() if (p.ndim >= 2) == matrix],
                   weight_decay=0.01 * matrix)
              for matrix in (True, False)]
    return net, ema, torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.99), fused=True)


def train(cfg):
    """VAE, latents, transformer; the same command continues a stopped run at either stage."""
    steps = cfg.steps or cfg.train_steps
    process = Process(cfg.schedule, cfg.prediction, cfg.zero_snr)
    ddp = run.init(cfg.device)
    batch = run.per_rank(cfg.batch, ddp, "--batch")
    log = run.Log(cfg, ddp, need_gb=0.5)
    run.seed_all(cfg.seed, 0, 0)
    buckets = [] if cfg.data and cfg.vae else load_pixels(cfg)
    vae = AutoencoderKL.load(cfg.vae, device=ddp.device) if cfg.vae else train_vae(cfg, ddp, log, buckets)
    buckets = load_latents(cfg, vae, buckets, ddp.device)
    words, read = load_texts(cfg, [c for b in buckets for c in b.captions], ddp)

    net, ema, optim = build(cfg, words, buckets[0].mean.shape[1], ddp)
    state, ranked = dict(net=net, ema=ema, optim=optim), None
    if cfg.fsdp:
        state, ranked = {}, dict(shard=shards.Sharded(net, ema, optim))
    start = run.load(cfg.out, state, ddp, ranked)
    model = parallel(net, cfg, ddp, cfg.fsdp)
    judged = not (cfg.data or cfg.fsdp) and ddp.rank == 0
    total, clock = 0.0, time.time()
    for step in run.progress(start, steps, ddp):
        run.seed_all(cfg.seed, ddp.rank, step, 2)
        b = captions.pick(buckets, cfg.seed, step)
        rows = torch.randint(len(b.captions), (batch,))
        mean, logvar = b.mean[rows].float(), b.logvar[rows].float()
        x0 = (mean + torch.randn_like(mean) * (logvar / 2).exp() - vae.shift) * vae.scale
        dropped = torch.rand(batch, 1)[:, 0] < cfg.drop
        text = read(["" if gone else b.captions[r] for r, gone in zip(rows.tolist(), dropped.tolist())])
        level = torch.sigmoid(cfg.t_mean + cfg.t_std * torch.randn(batch))
        noise = torch.randn_like(x0)
        x0, level, noise, *text = (v.to(ddp.device) for v in (x0, level, noise, *text))

        x, t, target, weight = process.train_terms(x0, noise, level)
        if cfg.inpaint:
            x = torch.cat([x, pictures.holes(b.pixels[rows.numpy()], vae)], 1)
        with run.autocast(ddp.device):
            out = model(x, t, *text)
        loss = (weight * (out.float() - target) ** 2).mean()
        optim.zero_grad()
        loss.backward()
        norm = shards.whole(nn.utils.clip_grad_norm_(net.parameters(), cfg.clip))
        for group in optim.param_groups:
            group["lr"] = learning_rate(cfg, step, steps, cfg.lr)
        optim.step()
        with torch.no_grad():                                # a young average forgets faster
            decay = min(cfg.ema, (1 + step) / (10 + step))
            ours, theirs = ([shards.local(p) for p in m.parameters()] for m in (ema, net))
            torch._foreach_lerp_(ours, theirs, 1 - decay)

        total += loss.item()
        if step % 100 == 0 or step == 1:
            run.check_finite(step, loss=total, gradient=norm.item())
            log("train", step=step, loss=total / (1 if step == 1 else 100), norm=norm.item(), lr=group["lr"],
                img_s=cfg.batch * (step - start) / (time.time() - clock), cpu_s=time.process_time())
            total = 0.0
        if judged and (step % cfg.eval_every == 0 or step == 1):
            scores, *seen = score(cfg, Trained(ema, vae, words, process), 64 if step > 1 else 8, 2.0)
            log("eval", step=step, **scores)
            draw.save(studio.labelled(*seen), Path(cfg.out, "samples", f"{step:06d}.png"))
        run.save_if_due(cfg.out, step, steps, cfg.save_every, state, ddp, ranked)
    weights = shards.full_state(ema)
    if ddp.rank == 0:
        scale = choose_scale(cfg, Trained(ema, vae, words, process), log) if judged else 2.0
        meta = dict(kind="captioned_dit", config=dataclasses.asdict(cfg),
                    words=getattr(words, "vocabulary", []), channels=buckets[0].mean.shape[1], guidance=scale)
        run.save_weights(Path(cfg.out, "ema.safetensors"), weights, meta)
    log.finish()


# --- sample -------------------------------------------------------------


@dataclass
class Trained:
    """This file's own model as the engine sees every model: net, vae, process, encode(prompts), defaults."""
    model: CaptionedDiT
    vae: nn.Module
    words: object                        # Words, or the PublicText that read the captions
    process: Process
    size: int = 32
    guidance: float = 2.0
    family: str = "own"

    def __post_init__(self):
        self.net, flow = self.model.dit, self.process.space == "flow"
        # on the validation captions fresh noise at every step leaves fewer stray objects than an ODE does
        self.defaults = dict(sampler="euler_ancestral", grid="flow" if flow else "trailing", steps=20,
                             cfg=self.guidance, shift=1.0, size=self.size)

    @torch.no_grad()
    def encode(self, prompts):
        device = next(self.net.parameters()).device
        if isinstance(self.words, PublicText):
            return {k: v.to(device) for k, v in self.words(prompts).items()}
        self.words.warn(prompts)
        return dict(zip(("text", "mask"), self.model.text(self.words(prompts).to(device))))


def load_model(cfg, device):
    """A run directory of `train`, or a public model -> Trained or Public, both with a process."""
    path = Path(cfg.model or cfg.out)
    if (path / "ema.safetensors").is_file():
        tensors, meta = run.load_weights(path / "ema.safetensors")
        known = {f.name for f in dataclasses.fields(Config)}
        old = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()
                        if k in known})
        words = (PublicText(cfg.text or old.text_model, old.text_len, device) if old.text_model
                 else Words(meta["words"], old.text_len))
        net = captioned(old, words, meta["channels"])
        net.load_state_dict(tensors)
        public_vae = cfg.vae or old.vae
        vae = AutoencoderKL.load(public_vae) if public_vae else TinyVAE.load(path / "vae.safetensors")
        net, vae = (m.to(device).eval().requires_grad_(False) for m in (net, vae))
        model = Trained(net, vae, words, Process(old.schedule, old.prediction, old.zero_snr), old.size,
                        meta.get("guidance", 2.0))
        return rounding.quantise(model, cfg.quantise) if cfg.quantise else model
    if not cfg.model:
        raise run.UserError(f"no weights in {path}; train first, or name a model with --model")
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[cfg.dtype]
    model = public.open_model(path, DiT, sincos_2d, dtype, device, text=cfg.text, vae=cfg.vae,
                              offload=cfg.offload, quantise=cfg.quantise or None, t5=cfg.t5, cache=cfg.cache,
                              distilled=cfg.distilled)
    model.process = Process(model.schedule, model.prediction)
    if cfg.offload == "none":
        model.net.to(device), model.vae.to(device)
    return model


def levels(cfg, model, shape, partial=False):
    """Sigmas of the run from flags and the model's defaults; partial: only the part below --strength."""
    kind, flow = cfg.grid or model.defaults["grid"], model.process.space == "flow"
    if (kind in ("flow", "sd3")) != flow:
        raise run.UserError(f"--grid {kind} does not suit a {model.process.schedule} model; try --grid "
                            + ("flow" if flow else "karras"))
    steps = cfg.steps or cfg.sample_steps or model.defaults["steps"]
    keep = max(1, min(steps, int(steps * cfg.strength + 1e-6))) if partial else steps
    if partial and cfg.strength_mode == "respace":           # all the steps, below the same noise level
        steps, keep = round(steps / cfg.strength), steps
    if flow:
        by = cfg.shift or model.defaults.get("shift", 1.0)
        by = by(shape[0] * shape[1] // (model.vae.factor * model.net.patch) ** 2) if callable(by) else by
        s = sigmas(kind, steps, shift_by=by)
    else:
        table = np.exp(model.process.log_sigma)
        s = sigmas(kind, steps, sigma_min=table[0], sigma_max=table[-1], abar=model.process.abar)
    return s[-keep - 1:]


def guided(cfg, model, net, texts, negative, scale, s):
    """The Denoiser that the flags ask for; every text is encoded once, with the negative prompt's length."""
    unique = list(dict.fromkeys([*texts, *[negative] * (scale != 1)]))
    coded = model.encode(unique)
    cond = {k: v[[unique.index(p) for p in texts]] for k, v in coded.items()}
    uncond = {k: v[[unique.index(negative)] * len(texts)] for k, v in coded.items()} if scale != 1 else None
    n, at = len(s) - 1, s[:-1].numpy()
    scale = scheduled(scale, cfg.cfg_mode, cfg.cfg_min, cfg.power, at)
    mimic = scheduled(cfg.mimic, cfg.mimic_mode, cfg.mimic_min, cfg.power, at)
    eta, norm, beta = cfg.apg
    options = dict(mimic=mimic, phi=cfg.phi, eta=eta, norm=norm,
                   momentum=Momentum(beta) if beta else None)
    early = [float(v) for i, v in enumerate(at) if n < 100 * i < 20 * n]
    skip = tuple(map(int, cfg.skip_layers)), cfg.skip_scale, early
    return Denoiser(net, model.process, cond, uncond, scale, cfg.guidance, cfg.interval, skip, **options)


@torch.inference_mode()
def generate(model, prompts, cfg, device, seeds, shape, init=None, mask=None, preview=None, ledger=None):
    """Prompts and seeds [B] -> pixels uint8 [B, H, W, 3]; a picture does not depend on the batch it is in.

    shape (W, H). init uint8 [H, W, 3] and cfg.strength: image to image. mask bool [H, W]: only this part
    changes, the rest keeps its bytes. preview(step, pixels) is called every cfg.preview steps."""
    scale = cfg.cfg if cfg.cfg >= 0 else model.defaults["cfg"]
    vae, process, sampler = model.vae, model.process, cfg.sampler or model.defaults["sampler"]
    if sampler not in SAMPLERS:
        raise run.UserError(run.unknown("sampler", sampler, SAMPLERS))
    if init is not None and cfg.strength == 0:
        return np.repeat(init[None], len(prompts), 0)
    s = levels(cfg, model, shape, partial=init is not None)
    first, ledger = float(s[0]), ledger or memory.Residency()

    def to_latent(image):
        return (vae.encode(image.to(device))[0].float() - vae.shift) * vae.scale

    def to_picture(z):
        return vae.decode(z / vae.scale + vae.shift)
    extra = model.net.extra                                  # channels for a picture to follow, or a mask and
    inpainter = extra not in (0, model.net.channels)         # what it leaves of the picture
    with memory.placed(vae, device, cfg.offload, ledger):
        z = None if init is None else to_latent(to_images(init[None]))
        beside = pictures.beside(model.net, cfg.control, init, mask, shape, vae, to_latent)
    size = (len(prompts), model.net.channels, shape[1] // vae.factor, shape[0] // vae.factor)
    noise = start_noise(seeds, size).to(device)
    if z is not None:
        x = alpha(first, process.space) * z + first * noise
    else:                                                    # the spread of a noised unit-variance latent
        x = noise * (math.sqrt(1 + first**2) if process.space == "ve" else 1.0)
    cells = None if mask is None or inpainter else pictures.latent_mask(mask, vae.factor).to(device)

    def after(i, x, d):
        if cells is not None:                                # outside the mask: the original at this level
            b = float(s[i + 1])
            x = cells * x + (1 - cells) * (alpha(b, process.space) * z + b * noise)
        if not torch.isfinite(x).all():
            raise run.UserError(f"non-finite latents after sampler step {i + 1}; try --dtype fp32")
        if preview and cfg.preview and (i + 1) % cfg.preview == 0:
            preview(i + 1, to_pixels(to_picture(d)))
        return x

    net = torch.compile(model.net, dynamic=False) if cfg.compile else model.net
    net = pictures.WithChannels(net, beside) if extra else net
    denoiser = guided(cfg, model, net, prompts, cfg.negative, scale, s)
    with memory.placed(model.net, device, cfg.offload, ledger, model.net.blocks):
        x = SAMPLERS[sampler](denoiser, x, s, seeds, after=after, repaint=[int(n) for n in cfg.repaint])
    with memory.placed(vae, device, cfg.offload, ledger):
        made = to_pixels(torch.cat([to_picture(one) for one in x.split(1)]))
    return made if mask is None else np.stack([pictures.composite(m, init, mask, cfg.feather) for m in made])


# --- evaluate -----------------------------------------------------------


SCALES = (1.25, 1.5, 2.0, 2.5, 3.0)


def score(cfg, model, count, scale, part="validation", batch=64):
    """Captions never trained on -> (judged fractions, pixels, captions); picture k uses seed k."""
    _, texts = new_scenes(cfg, count, part)
    device = next(model.net.parameters()).device
    cfg = dataclasses.replace(cfg, cfg=scale, steps=0, preview=0, offload="none", compile=False)
    parts = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
    made = np.concatenate([generate(model, [texts[k] for k in part], cfg, device, list(part), (cfg.size,) * 2)
                           for part in parts])
    return scenes.judge_all(made, texts), made, texts


def choose_scale(cfg, model, log):
    """The guidance scale whose worst distance to a goal is best on the validation captions (guidance trades
    missing objects for stray ones); the test captions stay unseen."""
    rows = {scale: score(cfg, model, cfg.validate, scale)[0] for scale in SCALES}
    for scale, row in rows.items():
        log("validation", scale=scale, n=cfg.validate, **row)
    goal = PRESETS["scenes"]["goal"]
    return max(rows, key=lambda scale: (min(rows[scale][field] - goal[field] for field in goal), -scale))


def sample(cfg):
    """Prompts to PNG files that carry their recipe; --init and --mask edit a picture. -> list of pixels"""
    cfg = studio.repeat(cfg) if cfg.recipe else cfg
    if cfg.guidance not in GUIDANCE:
        raise run.UserError(run.unknown("guidance", cfg.guidance, GUIDANCE))
    device = run.init(cfg.device).device
    return studio.sample(cfg, load_model(cfg, device), generate, device)


def evaluate(cfg, count=0):
    """Composition on 2 x --validate test captions: judge on real renders; pictures, guidance off and on."""
    device = run.init(cfg.device).device
    model = load_model(cfg, device)
    if model.family != "own":
        raise run.UserError("evaluate scores a model trained on the scenes; use sample for a public one")
    real, texts = new_scenes(cfg, count := count or 2 * cfg.validate, "test")
    rows, panels = dict(real_renders=scenes.judge_all(real, texts)), {}
    chosen = cfg.cfg if cfg.cfg >= 0 else model.defaults["cfg"]
    for name, scale in (("guidance_off", 1.0), ("guidance_on", chosen)):
        rows[name], *seen = score(cfg, model, count, scale, "test")
        title = f"{name.replace('_', ' ')} ({scale:g}): {rows[name]['exact']:.1%} of {count} exact; x: wrong"
        panels[title] = studio.labelled(*seen)
    for name, row in rows.items():
        print(f"{name:<14}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    for field, least in PRESETS["scenes"]["goal"].items():
        print(f"goal {field} {least:.2f}  {rows['guidance_on'][field] - least:+.3f}")
    draw.save(draw.sheet(panels, title="L large, s small; < left of, > right of, ^ above, v below"),
              Path(cfg.out, "samples", "evaluate.png"))
    facts = json.dumps(dict(count=count, scale=chosen, **rows), indent=1)
    write_atomic(Path(cfg.out, "evaluate.json"), facts.encode())
    if Path(cfg.out, "log.jsonl").exists():                 # scores of a run belong to its log too
        run.record(cfg.out, "eval", n=count, scale=chosen, **rows["guidance_on"])


# --- tools --------------------------------------------------------------


def plan(cfg):
    """Parameters, work and memory of a training run, without allocating the model."""
    steps, channels = cfg.steps or cfg.train_steps, 4 if cfg.vae else cfg.latent
    with Outline():
        net = CaptionedDiT(cfg, 22, channels)
    params = sum(p.numel() for p in net.parameters())
    once = sum(p.numel() for n, p in net.dit.named_parameters() if "adaLN" in n or n.startswith("t_"))
    N = (cfg.size // (8 if cfg.vae else TinyVAE.factor) // cfg.patch) ** 2
    text = cfg.text_len * sum(p.numel() for p in net.text.layers.parameters())
    image = N * (sum(p.numel() for p in net.dit.parameters()) - once) + 2 * cfg.depth * N * N * cfg.width
    flops = 6 * cfg.batch * (image + once + text)  # 2 a multiplication, backward costs twice forward
    activations = 40 * 4 * cfg.batch * N * cfg.width * cfg.depth
    run.print_plan(dataclasses.replace(cfg, steps=steps), dict(
        params=params, flops_per_step=flops, memory_gb_per_rank=(params * 4 * 5 + activations) / 1e9,
        disk_gb=params * 4 * 9 / 1e9, hours_at_mfu=flops * steps / 3600 / 20e9,
        assumes="one rank at 20 GFLOP/s, what a CPU core reaches on the sizes of the default preset"))


def overfit(cfg, steps=400, count=8):
    """The first test of any change: memorise 8 pictures, in pixels, without VAE or text encoder."""
    run.seed_all(cfg.seed, 0, 0)
    net = DiT(3, 3, 4, 64, 2, 4, arch="label", qk_norm=True, classes=count).init()

    def sample(net, shape, **cond):
        start = start_noise(cfg.seed, shape).to(next(net.parameters()))
        return SAMPLERS["heun"](Denoiser(net.eval(), Process(), cond), start, sigmas("flow", 20))
    return studio.overfit(cfg, net, Process(), sample, steps, count)


def shapes(cfg):
    """Tensor shapes end to end, from a forward pass of the model that the flags describe."""
    studio.shapes(cfg, CaptionedDiT(cfg, 22, cfg.latent), TinyVAE(cfg.vae_width, cfg.latent))


def demo(cfg):
    """All of it on the scenes: train, evaluate, sample, image to image, inpaint, repeat a picture."""
    train(cfg)
    evaluate(cfg)
    studio.demo(cfg, sample)


COMMANDS = dict(
    train=train, sample=sample, evaluate=evaluate, plan=plan, overfit=overfit, shapes=shapes, demo=demo,
    inspect=studio.inspect,
    noise_strip=functools.partial(studio.noise_strip, alpha_bar=alpha_bar, shift=shift),
    quantise=functools.partial(studio.quantise, DiT=DiT, positions=sincos_2d, load=load_model))

if __name__ == "__main__":
    run.main(Config, PRESETS, COMMANDS)
