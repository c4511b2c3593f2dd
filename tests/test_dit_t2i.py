"""dit_t2i.py and the mechanisms it stands on: samplers against exact solutions, loaders against hostile
files."""
import dataclasses
import functools
import json
import math
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from forked import two_ranks
from safetensors.torch import load_file, save_file

import dit_t2i as t2i
from common import run
from common.t2i import (captions, clip, flux, guidance, memory, mmdit, pictures, prompts, public, rounding,
                        safety, scenes, studio, t5, textcache, weights)

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


# --- samplers against an analytic mixture --------------------------------

CENTRES = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.9]], dtype=torch.float64)
VARIANCE = 0.04


def mixture(space):
    """Exact D(x, sigma) of three Gaussians, and a count of its calls."""
    def denoise(x, sigma):
        s = float(sigma)
        a = t2i.alpha(s, space)
        v = VARIANCE * a**2 + s**2
        away = x[:, None] - a * CENTRES
        weight = torch.softmax(-(away**2).sum(-1) / (2 * v), 1)
        return (weight[..., None] * (CENTRES + a * VARIANCE / v * away)).sum(1)
    return denoise


@functools.cache
def start_and_end(space):
    """Points at the first noise level and where the exact ODE takes them (Heun, 2000 steps)."""
    first, last = (20.0, 0.05) if space == "ve" else (0.98, 0.05)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * first
    grid = levels(space, 2000)
    return x, t2i.SAMPLERS["heun"](mixture(space), x, grid, space=space)


def levels(space, n):
    if space == "ve":
        return t2i.sigmas("karras", n + 1, sigma_min=0.05, sigma_max=20.0)[:-1]
    return torch.linspace(0.98, 0.05, n + 1, dtype=torch.float64)


@pytest.mark.parametrize("space", ["ve", "flow"])
@pytest.mark.parametrize("name, options, least", [
    ("euler", {}, 0.9), ("ddim", {}, 0.9), ("heun", {}, 1.8), ("dpmpp_2m", {}, 1.8), ("unipc", {}, 2.5),
    ("unipc", dict(order=3), 3.0)])
def test_deterministic_samplers_converge_at_their_order(space, name, options, least):
    x, exact = start_and_end(space)
    error = [float((t2i.SAMPLERS[name](mixture(space), x, levels(space, n), space=space, **options) - exact)
                   .pow(2).mean().sqrt()) for n in (80, 160)]
    assert math.log2(error[0] / error[1]) > least, error


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"])
@pytest.mark.parametrize("space", ["ve", "flow"])
def test_stochastic_samplers_reach_the_right_mean_and_variance(space, name):
    mean, var = 0.7, 0.25

    def denoise(x, sigma):
        a = t2i.alpha(float(sigma), space)
        return mean + a * var / (a**2 * var + float(sigma)**2) * (x - a * mean)
    first = 20.0 if space == "ve" else 1.0
    x = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)) * first
    if space == "ve":
        x = x + mean
    ratios = []
    for n in (20, 80):
        grid = t2i.sigmas("karras", n, sigma_min=0.03,
                          sigma_max=20.0) if space == "ve" else t2i.sigmas("flow", n)
        y = t2i.SAMPLERS[name](denoise, x, grid, seed=3, space=space)
        ratios.append(float(y.var()) / var)
        # 50,000 draws of variance 1/4: the mean is known to 0.0022; 5 of that, plus sigma_max 20 remembering
        # mean/20
        assert abs(float(y.mean()) - mean) < 0.012
    # discretisation still shows at 80 steps (ancestral 0.90, SDE 1.00-1.02 by the closed-form recursion)
    assert abs(ratios[1] - 1) < 0.12 and abs(ratios[1] - 1) <= abs(ratios[0] - 1) + 0.02, ratios


@pytest.mark.parametrize("name", sorted(t2i.SAMPLERS))
@pytest.mark.parametrize("space", ["ve", "flow"])
def test_every_sampler_ends_at_a_constant_denoiser(space, name):
    c = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    grid = t2i.sigmas("karras", 6) if space == "ve" else t2i.sigmas("flow", 6)
    x = torch.randn(1, 2, dtype=torch.float64)
    assert torch.equal(t2i.SAMPLERS[name](lambda x, s: c, x, grid, space=space), c)
    one = t2i.SAMPLERS[name](lambda x, s: 2 * x, x, torch.tensor([0.9, 0.0]), space=space)
    assert torch.equal(one, 2 * x)                           # a single step to 0 is the denoiser itself


def test_without_noise_the_stochastic_samplers_are_their_ode():
    x, _ = start_and_end("ve")
    for space in ("ve", "flow"):
        for noisy, plain in (("euler_ancestral", "euler"), ("dpmpp_2m_sde", "dpmpp_2m")):
            a = t2i.SAMPLERS[noisy](mixture(space), x, levels(space, 10), eta=0.0, space=space)
            b = t2i.SAMPLERS[plain](mixture(space), x, levels(space, 10), space=space)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    a = t2i.SAMPLERS["ddim"](mixture("ve"), x, levels("ve", 10), seed=5, eta=1.0, space="ve")
    assert torch.equal(a,
                       t2i.SAMPLERS["euler_ancestral"](mixture("ve"), x, levels("ve", 10), seed=5,
                                                       space="ve"))


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"])
def test_an_image_gets_the_same_noise_alone_and_in_a_batch(name):
    x = t2i.start_noise(7, (3, 2, 4))
    assert torch.equal(x[2:], t2i.start_noise(9, (1, 2, 4)))
    both = t2i.SAMPLERS[name](lambda x, s: 0.5 * x, x, t2i.sigmas("karras", 5), seed=7)
    alone = t2i.SAMPLERS[name](lambda x, s: 0.5 * x, x[2:], t2i.sigmas("karras", 5), seed=9)
    assert torch.equal(both[2:], alone)
    again = t2i.SAMPLERS[name](lambda x, s: 0.5 * x, x, t2i.sigmas("karras", 5), seed=7)
    assert torch.equal(both, again)
    first = t2i.Noise(7, 1, 1).like(x[:1])
    assert not torch.equal(first, x[:1])                     # the sampler's stream is not the start noise


# --- schedules -----------------------------------------------------------


def test_schedules_match_the_published_tables():
    abar = t2i.alpha_bar("scaled_linear")
    golden = [0.999150, 0.673793, 0.276333, 0.056170, 0.004660]
    np.testing.assert_allclose(abar[[0, 250, 500, 750, 999]], golden, atol=1e-6)
    linear, cosine = t2i.alpha_bar("linear"), t2i.alpha_bar("cosine")
    np.testing.assert_allclose([linear[-1], cosine[0], cosine[-1]], [4.0358e-5, 0.999959, 2.43e-9], rtol=2e-3)
    zero = t2i.alpha_bar("scaled_linear", zero_snr=True)
    np.testing.assert_allclose(zero[[0, 250, 500, 750]], [0.99915, 0.652457, 0.241019, 0.032799], atol=1e-6)
    assert float(zero[-1]) < 1e-6
    for table in (abar, linear, cosine, zero):
        assert (table.diff() < 0).all()                      # SNR falls


def test_sigma_grids_match_the_published_numbers():
    karras = t2i.sigmas("karras", 10, sigma_min=0.0292, sigma_max=14.6146)
    golden = [14.6146, 9.1034, 5.479, 3.1692, 1.7499, 0.9144, 0.4471, 0.2015, 0.082, 0.0292, 0]
    np.testing.assert_allclose(karras, golden, atol=6e-5)    # the table has four digits
    flow = t2i.sigmas("flow", 8, shift_by=3.0)
    np.testing.assert_allclose(flow, [1, .9545, .9, .8333, .75, .6429, .5, .3, 0], atol=6e-5)
    sd3 = t2i.sigmas("sd3", 8, shift_by=3.0)
    np.testing.assert_allclose(sd3, [1, .94754, .88279, .80084, .69379, .54805, .33797, .00893, 0], atol=6e-6)
    for kind in t2i.SIGMAS:
        s = t2i.sigmas(kind, 7)
        assert s.shape == (8,) and s[-1] == 0 and (s.diff() < 0).all(), kind
    u = torch.linspace(0, 1, 9)
    torch.testing.assert_close(t2i.shift(t2i.shift(u, 3.0), 1 / 3), u)


@pytest.mark.parametrize("schedule, prediction", [
    ("flow", "flow"), ("flow", "x0"), ("linear", "eps"), ("scaled_linear", "v"), ("cosine", "x0"),
    ("linear", "v")])
def test_exact_targets_give_back_the_clean_image(schedule, prediction):
    """Network output = training target -> the denoiser returns x0, for every schedule and prediction."""
    p = t2i.Process(schedule, prediction)
    x0, noise = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    level = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
    x, t, target, weight = p.train_terms(x0, noise, level)
    assert (weight > 0).all()
    for k in range(5):
        if p.space == "flow":
            sigma, state = float(level[k]), x[k]
        else:
            sigma = float(np.exp(p.log_sigma[int(t[k])]))
            state = x[k] * math.sqrt(1 + sigma**2)
            assert abs(p.time(sigma) - float(t[k])) < 1e-6
        # 1e-4: the training terms of VP schedules are float32
        torch.testing.assert_close(p.x0(target[k], state, sigma), x0[k], rtol=1e-4, atol=1e-4 * (1 + sigma))


def test_min_snr_weights_follow_the_paper():
    for prediction, weight in dict(eps=lambda s: np.minimum(s, 5) / s, v=lambda s: np.minimum(s, 5) / (s + 1),
                                   x0=lambda s: np.minimum(s, 5)).items():
        p = t2i.Process("linear", prediction)
        level = torch.tensor([0.1, 0.5, 0.9])
        *_, w = p.train_terms(torch.zeros(3, 1), torch.zeros(3, 1), level)
        abar = p.abar[(level * 1000).long()].numpy()
        np.testing.assert_allclose(w[:, 0], weight(abar / (1 - abar)), rtol=1e-4)


# --- guidance ------------------------------------------------------------


def test_guidance_identities():
    g = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 4, 5, 6, generator=g), torch.randn(2, 4, 5, 6, generator=g)
    torch.testing.assert_close(t2i.guide(c, u, 0.0), u)
    torch.testing.assert_close(t2i.guide(c, u, 1.0), c)
    plain = t2i.guide(c, u, 5.0)
    torch.testing.assert_close(plain, u + 5 * (c - u))
    full = t2i.guide(c, u, 5.0, "rescale", phi=1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), c.std((1, 2, 3)))
    torch.testing.assert_close(t2i.guide(c, u, 5.0, "apg", eta=1.0), plain, rtol=1e-4, atol=1e-4)
    ortho = t2i.guide(c, u, 5.0, "apg") - c
    assert ((ortho * c).sum((1, 2, 3)).abs() / c.flatten(1).norm(dim=1) < 1e-4).all()
    dynamic = t2i.guide(c, u, 5.0, "dynamic")
    assert dynamic.abs().max() <= 1
    small = 0.2 * c.clamp(-1, 1)
    torch.testing.assert_close(t2i.guide(small, small, 3.0, "dynamic"), small)
    star = t2i.guide(c, 3 * c, 5.0, "zero_star")             # u parallel to c: the best scale makes u = c
    torch.testing.assert_close(star, c, rtol=1e-4, atol=1e-4)
    for measure in ("AD", "STD"):                            # mimicking its own scale changes nothing
        for start in ("MEAN", "ZERO"):
            for per in (True, False):
                same = t2i.guide(c, u, 5.0, "mimic", mimic=5.0, measure=measure, startpoint=start,
                                 per_channel=per)
                torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    mimic = t2i.guide(c, u, 9.0, "mimic", mimic=3.0)
    weak = u + 3 * (c - u)
    spread = lambda v: (v.flatten(2) - v.flatten(2).mean(2, keepdim=True)).abs().amax(2)      # noqa: E731
    assert (spread(mimic) <= spread(weak) + 1e-4).all()
    with pytest.raises(run.UserError, match="did you mean 'cfg'"):
        t2i.guide(c, u, 2.0, "cgf")


def test_scales_run_over_the_steps_as_their_names_say():
    at = np.linspace(1, 0.2, 5)                              # f = 0, 1/4, ... 1

    def run_of(mode, power=1.0):
        scale = guidance.scheduled(7.0, mode, 3.0, power, at)
        return [(scale(s) - 3) / 4 for s in at]
    assert guidance.scheduled(7.0, "constant", 3.0, 1.0, at) == 7.0
    for mode, want in dict(linear_down=[1, 0.75, 0.5, 0.25, 0], linear_up=[0, 0.25, 0.5, 0.75, 1],
                           cosine_down=np.cos(np.arange(5) * np.pi / 8),
                           half_cosine_down=np.cos(np.arange(5) / 4),
                           cosine_up=1 - np.cos(np.arange(5) * np.pi / 8),
                           half_cosine_up=1 - np.cos(np.arange(5) / 4)).items():
        np.testing.assert_allclose(run_of(mode), want, atol=1e-9)
    np.testing.assert_allclose(run_of("power_up", 2), [0, 1 / 16, 1 / 4, 9 / 16, 1])
    np.testing.assert_allclose(run_of("power_down", 2), [1, 15 / 16, 3 / 4, 7 / 16, 0])
    np.testing.assert_allclose(run_of("linear_repeating", 2), [1, 0, 1, 0, 1], atol=1e-9)
    np.testing.assert_allclose(run_of("cosine_repeating", 2), [1, 0, 1, 0, 1], atol=1e-9)
    np.testing.assert_allclose(run_of("sawtooth", 2), [0, 0.5, 0, 0.5, 0], atol=1e-9)
    # between two steps
    assert abs(guidance.scheduled(7.0, "linear_down", 3.0, 1.0, at)(0.9) - 6.5) < 1e-9


def test_guidance_costs_one_call_where_it_is_off():
    calls = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, t, y):
            calls.append(len(x))
            return x * 0
    cond, uncond = dict(y=torch.ones(2)), dict(y=torch.zeros(2))
    x = torch.randn(2, 1, 2, 2)
    t2i.Denoiser(Net(), t2i.Process(), cond, uncond, 1.0)(x, 0.5)
    t2i.Denoiser(Net(), t2i.Process(), cond, uncond, 4.0)(x, 0.5)
    limited = t2i.Denoiser(Net(), t2i.Process(), cond, uncond, 4.0, interval=(0.28, 5.4))
    limited(x, 0.9), limited(x, 0.5), limited(x, 0.1)        # sigma_ve 9, 1, 0.11
    assert calls == [2, 4, 2, 4, 2]


# --- transformer ---------------------------------------------------------


def tiny(**kw):
    return t2i.DiT(**{**dict(channels=4, out=4, width=32, depth=2, heads=4), **kw})


@pytest.mark.parametrize("arch", ["cross", "joint"])
@pytest.mark.parametrize("mod", ["adaln_zero", "adaln_single", "adaln"])
def test_the_network_starts_at_zero_and_learns_from_text(arch, mod):
    torch.manual_seed(0)
    net = tiny(arch=arch, mod=mod, qk_norm=True, rope=True).init()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0]), torch.randn(2, 3, 32)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert (net(x, t, text=text, mask=mask) == 0).all()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    out = net(x, t, text=text, mask=mask)
    assert not torch.equal(out, net(x, t, text=text + 1, mask=mask))
    assert not torch.equal(out, net(x, t + 50, text=text, mask=mask))
    hidden = torch.tensor([[True, True, False]] * 2)
    changed = text.clone()
    changed[:, 2] += 100
    # padding is silent
    assert torch.equal(net(x, t, text=text, mask=hidden), net(x, t, text=changed, mask=hidden))


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        sizes = {(12, 384, 6, 2): 32_865_056, (12, 384, 6, 8): 33_142_016, (12, 768, 12, 4): 130_426_496,
                 (24, 1024, 16, 2): 457_840_672, (28, 1152, 16, 2): 674_834_720}
        for (depth, width, heads, patch), count in sizes.items():
            net = t2i.DiT(4, 8, patch, width, depth, heads, arch="label", classes=1000)
            assert sum(p.numel() for p in net.parameters()) == count
        pixart = t2i.DiT(4, 8, 2, 1152, 28, 16, mod="adaln_single", text_width=4096)
        assert sum(p.numel() for p in pixart.parameters()) == 610_856_096
        sd3 = {2_028_328_000: {}, 2_243_171_520: dict(table=384, qk_norm=True, dual=range(13)),
               8_056_627_520: dict(depth=38, width=2432, heads=38, qk_norm=True)}
        for count, kw in sd3.items():
            assert sum(p.numel() for p in mmdit.MMDiT(**kw).parameters()) == count
        assert sum(p.numel() for p in t5.T5Encoder().parameters()) == 4_762_310_656
        assert sum(p.numel() for p in clip.CLIPTextEncoder().parameters()) == 123_060_480
        big = clip.CLIPTextEncoder(1280, 32, 20, 5120, project=1280, quick=False)
        assert sum(p.numel() for p in big.parameters()) == 694_659_840
        checker = safety.SafetyChecker()
        assert sum(t.numel() for t in checker.state_dict().values()) == 303_981_588


def test_patch_order_in_and_out():
    y = torch.arange(2 * 6 * 12.0).view(2, 6, 12)            # 2 x 3 patches of 2 x 2 x 3
    image = t2i.patches_to_image(y, 2, 3, 2)
    for row, col, i, j, c in ((0, 0, 0, 0, 0), (1, 2, 1, 0, 2), (0, 1, 0, 1, 1)):
        assert image[1, c, 2 * row + i, 2 * col + j] == y[1, row * 3 + col, (i * 2 + j) * 3 + c]


def test_position_embeddings():
    table = t2i.sincos_2d(16, 2, 3)
    w = 1 / 10000 ** (np.arange(4) / 4)
    row, col = 1, 2
    want = np.concatenate([np.sin(col * w), np.cos(col * w), np.sin(row * w), np.cos(row * w)])
    np.testing.assert_allclose(table[row * 3 + col], want, atol=1e-6)
    features = t2i.time_features(torch.tensor([500.0]))[0]
    np.testing.assert_allclose(features[:3], [-0.88385, 0.94595, 0.84851], atol=1e-4)
    np.testing.assert_allclose(features[128:131], [-0.46777, 0.32432, -0.52918], atol=1e-4)
    from common.t2i.dit_blocks import rope_2d, rotate
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = rope_2d(16, 6, 6)
    turn = lambda v, r, c: rotate(v, (cos[r * 6 + c], sin[r * 6 + c]))        # noqa: E731
    near = (turn(q, 1, 2) * turn(k, 3, 1)).sum()             # the product depends on the difference only
    far = (turn(q, 2, 4) * turn(k, 4, 3)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert abs(float(near - (turn(q, 1, 2) * turn(k, 3, 2)).sum())) > 1e-4


def test_attention_equals_the_slow_formula():
    net = t2i.Attention(16, 2, qk_norm=True)
    x = torch.randn(2, 5, 16)
    q, k, v = net.project(x)
    slow = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) @ v
    torch.testing.assert_close(net(x), net.proj(slow.transpose(1, 2).reshape(2, 5, 16)), rtol=1e-5, atol=1e-6)


# --- tokenizers and text encoders ----------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP vocabulary in the public layout: bytes, a few merges, the two special tokens."""
    folder = tmp_path_factory.mktemp("clip")
    base = list(clip.byte_symbols().values())
    merges = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("t", "h"), ("th", "e</w>"), ("a", "t</w>"),
              ("c", "at</w>")]
    words = base + [c + "</w>" for c in base] + ["".join(m) for m in merges] + [clip.START, clip.END]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return folder


def slow_bpe(word, rank):
    parts = list(word[:-1]) + [word[-1] + "</w>"]
    while True:
        pairs = [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i:i + 2] = ["".join(parts[i:i + 2])]


def test_clip_tokenizer_equals_a_slow_byte_pair_encoder(clip_folder):
    tokenizer = t2i.CLIPTokenizer(clip_folder)
    rng = np.random.default_rng(0)
    for _ in range(300):
        word = "".join(rng.choice(list("lowerthca"), rng.integers(1, 14)))
        want = [tokenizer.vocabulary[p] for p in slow_bpe(word, tokenizer.rank)]
        assert tokenizer.tokens(word) == want
    ids = tokenizer(["The cat", ""])
    assert ids.shape == (2, 77)
    assert ids[1].tolist() == [tokenizer.start] + [tokenizer.end] * 76
    assert tokenizer.decode(ids[0, 1:3].tolist()) == "the cat"


def test_clip_words_split_like_the_published_pattern():
    assert list(clip.split_words("it's 2024: don't!?")) == ["it", "'s", "2", "0", "2", "4", ":", "don", "'t",
                                                            "!?"]
    assert list(clip.split_words("\u65e5\u672c caf\u00e9\u0301")) == ["\u65e5\u672c", "caf\u00e9", "\u0301"]


def test_a_cut_caption_is_reported(clip_folder, capsys):
    t2i.CLIPTokenizer(clip_folder)(["cat " * 80])
    assert "lost: cat cat cat cat cat" in capsys.readouterr().err


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, wire, data):
    return varint(number << 3 | wire) + (varint(len(data)) + data if wire == 2 else data)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A unigram model written by hand as a protocol buffer."""
    folder = tmp_path_factory.mktemp("t5")
    pieces = [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2)]
    pieces += [(p, s, 1) for p, s in (("\u2581", -3.0), ("\u2581the", -2.0), ("\u2581cat", -4.0), ("c", -5.0),
                                      ("a", -5.0), ("t", -5.0), ("at", -6.0), ("h", -5.5), ("e", -5.0),
                                      ("s", -5.1))]
    data = b"".join(field(1, 2,
                          field(1, 2, p.encode()) + field(2, 5, struct.pack("<f", s)) + field(3, 0,
                                                                                              varint(k)))
                    for p, s, k in pieces)
    (folder / "spiece.model").write_bytes(data)
    return folder


def test_t5_tokenizer_finds_the_best_segmentation(t5_folder):
    tokenizer = t2i.T5Tokenizer(t5_folder)

    def slow(text):                                          # every segmentation, best total score
        if not text:
            return 0.0, []
        best = (-math.inf, [])
        for j in range(1, len(text) + 1):
            if text[:j] in tokenizer.normal:
                score, rest = slow(text[j:])
                best = max(best,
                           (score + tokenizer.normal[text[:j]][0], [tokenizer.normal[text[:j]][1]] + rest))
        return best
    for text in ("the cat", "cats", "hatchet at the", "tea"):
        marked = "".join("\u2581" + w for w in text.split())
        assert tokenizer.tokens(text) == slow(marked)[1]
    ids, mask = tokenizer(["the cat", "the \u96e8\u96e8 cat"], 8)
    assert ids[0].tolist() == [4, 5, 1, 0, 0, 0, 0, 0] and mask.sum(1).tolist() == [3, 5]
    assert ids[1].tolist()[:5] == [4, 3, 2, 5, 1]            # a run of unknown characters is one token
    assert tokenizer.tokens("</s>") == [1]


def test_damaged_tokenizer_files_are_one_line(tmp_path, t5_folder):
    whole = (t5_folder / "spiece.model").read_bytes()
    for cut in (whole[:-3], b"\xff" * 40, b"", b"\x0a\xff\xff\xff\xff\x7fabc"):
        (tmp_path / "spiece.model").write_bytes(cut)
        with pytest.raises(run.UserError, match="not a unigram tokenizer"):
            t2i.T5Tokenizer(tmp_path)
    with pytest.raises(run.UserError, match="expected vocab.json and merges.txt"):
        t2i.CLIPTokenizer(tmp_path)


def test_t5_buckets_are_the_published_ones():
    r = torch.tensor([-200, -128, -100, -64, -20, -9, -8, -7, -1, 0, 1, 7, 8, 9, 20, 64, 100, 128, 200])
    assert t5.bucket(r).tolist() == [15, 15, 15, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 26, 30, 31, 31, 31]


def randomised(net, scale=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data = scale * torch.randn(tensor.shape, generator=g)
    return net.eval().requires_grad_(False)


def test_text_encoders_round_trip_and_respect_order_and_padding(tmp_path):
    net = randomised(clip.CLIPTextEncoder(64, 2, 1, 96, 600, project=24, end=599))
    save_file({("text_model." if not k.startswith("text_projection") else "") + k: v.contiguous()
               for k, v in net.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(hidden_act="quick_gelu", num_attention_heads=1)))
    again = t2i.CLIPTextEncoder.load(tmp_path)
    ids = torch.randint(1, 590, (1, 77))
    ids[0, 40:] = 599
    a, b = net(ids), again(ids)
    for k in a:  # 1e-6: memory alignment may change the order of sums
        torch.testing.assert_close(a[k], b[k], rtol=1e-6, atol=1e-6)
    assert a["projected"].shape == (1, 24)
    later = ids.clone()
    later[0, 30] += 1
    torch.testing.assert_close(again(later)["last"][:, :30], a["last"][:, :30])          # causal
    assert torch.equal(a["pooled"], a["last"][:, 40])        # the first end token

    net = randomised(t5.T5Encoder(32, 2, 16, 48, 2, 64))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "t5.safetensors")
    again = t2i.T5Encoder.load(tmp_path / "t5.safetensors")
    ids, mask = torch.randint(3, 60, (1, 12)), torch.arange(12)[None] < 7
    other = torch.where(mask, ids, 5)
    torch.testing.assert_close(net(ids, mask)[mask], again(other, mask)[mask])  # pads have no influence
    with pytest.raises(run.UserError, match="overflows in fp16"):
        t2i.T5Encoder.load(tmp_path / "t5.safetensors", torch.float16)


# --- weights -------------------------------------------------------------


def test_hostile_and_wrong_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(dict(a=torch.zeros(4, 4), b=torch.zeros(3)), path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for data, words in ((whole[:-5], "truncated"), (whole[:20], "not a safetensors"),
                        (b"abc", "not a safetensors"),
                        (struct.pack("<Q", 1 << 60) + whole[8:], "not a safetensors"),
                        (whole + b"x" * 9, "padded"),
                        (whole[:8] + b"{" * header + whole[8 + header:], "damaged")):
        path.write_bytes(data)
        with pytest.raises(run.UserError, match=words) as error:
            weights.Checkpoint.open(path)
        assert "\n" not in str(error.value) and "w.safetensors" in str(error.value)
    path.write_bytes(whole)
    with pytest.raises(run.UserError, match="expected a tensor"):
        public.family_of(weights.Checkpoint.open(path))
    with torch.device("meta"):
        net = torch.nn.Linear(4, 4)
    with pytest.raises(run.UserError, match="missing, e.g. 'bias'.*unexpected, e.g. 'a'"):
        weights.fill(net, weights.Checkpoint.open(path), torch.float32)
    with pytest.raises(run.UserError, match=r"'bias' is \(4, 4\), expected \(4,\)"):
        weights.fill(net, weights.Checkpoint.open(path).renamed(dict(a="bias", b="weight").get),
                     torch.float32)
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'echo hi'\ntR.")
    with pytest.raises(run.UserError, match="not a plain PyTorch weight file"):
        weights.Checkpoint.open(tmp_path / "evil.pt")


def test_a_published_dit_file_loads_under_its_own_names(tmp_path):
    net = randomised(t2i.DiT(4, 8, 2, 64, 2, 1, arch="label", classes=10))
    tensors = {k: v.contiguous() for k, v in net.state_dict().items()}
    tensors["pos_embed"] = t2i.sincos_2d(64, 4, 4)[None].contiguous()
    torch.save(dict(ema=tensors, opt=None), tmp_path / "DiT.pt")
    family, loaded, _ = public.open_transformer(tmp_path / "DiT.pt", t2i.DiT, t2i.sincos_2d, torch.float32)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0])
    assert family == "dit"
    assert torch.equal(loaded(x, t, label=torch.tensor([3, 10])), net(x, t, label=torch.tensor([3, 10])))


def wide_net():
    torch.manual_seed(0)
    net = t2i.DiT(4, 4, 2, 256, 8, 4, qk_norm=True).init()
    for p in net.parameters():  # modulation and output away from zero, as after training
        if p.ndim >= 2 and not p.any():
            p.data = torch.randn_like(p) * 0.3 / p.shape[1] ** 0.5
    return net.eval().requires_grad_(False)


def test_quantised_models_are_small_and_close(tmp_path):
    net = wide_net()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 800.0]), torch.randn(2, 5, 256)
    want, full = net(x, t, text=text), memory.size_bytes(net)
    # int8: 0.5 % is the bound; fp8 keeps 3 mantissa bits, 2.6 % a layer
    for kind, bound in (("int8", 5e-3), ("fp8", 5e-2)):
        small = memory.quantise(wide_net(), kind, skip=memory.KEEP)
        error = float((small(x, t, text=text) - want).norm() / want.norm())
        assert error < bound, (kind, error)
        assert memory.size_bytes(small) < 0.3 * full
        path = tmp_path / f"{kind}.safetensors"
        save_file({k: v.contiguous() for k, v in small.state_dict().items()}, path)
        with torch.device("meta"):
            again = t2i.DiT(4, 4, 2, 256, 8, 4, qk_norm=True)
        weights.fill(again, weights.Checkpoint.open(path), torch.float32)
        assert torch.equal(again(x, t, text=text), small(x, t, text=text))
    tiny_weights = torch.nn.Linear(64, 64)
    tiny_weights.weight.data *= 1e-3  # a plain fp8 cast would flush most of these to zero
    stored = memory.QLinear.of(tiny_weights, "fp8").weight
    assert (stored - tiny_weights.weight).norm() / tiny_weights.weight.norm() < 0.03


@pytest.mark.parametrize("name, make, params", [
    ("DiT-XL/2", lambda: t2i.DiT(4, 8, 2, 1152, 28, 16, arch="label", classes=1000), 674_834_720),
    ("SD3-medium", mmdit.MMDiT, 2_028_328_000),
    ("SD3.5-medium", lambda: mmdit.MMDiT(table=384, qk_norm=True, dual=tuple(range(13))), 2_243_171_520),
    ("FLUX.1-dev", flux.Flux, 11_901_408_320), ("CLIP-L", clip.CLIPTextEncoder, 123_060_480),
    ("T5 XXL", t5.T5Encoder, 4_762_310_656),
    ("own", lambda: t2i.CaptionedDiT(t2i.Config(), 22, 4), 2_138_128)])
def test_int8_takes_less_than_three_tenths_at_real_size(name, make, params):
    with torch.device("meta"):                               # sizes without memory
        net = make()
        full = memory.size_bytes(net)
        assert sum(p.numel() for p in net.parameters()) == params
        assert memory.size_bytes(memory.quantise(net, "int8", skip=memory.KEEP)) < 0.3 * full


def test_quantise_measures_a_run_of_this_program(trained, model, capsys):
    t2i.COMMANDS["quantise"](dataclasses.replace(trained, model=trained.out, quantise="int8"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:5]] == ["0.9:", "0.7:", "0.5:", "0.3:", "0.1:"]
    z, texts = torch.randn(4, 4, 8, 8), [PROMPT] * 4
    assert set(memory.errors(model, model, z, texts).values()) == {(0.0, 0.0)}
    other = t2i.load_model(dataclasses.replace(trained, quantise="fp8"), torch.device("cpu"))
    velocity, clean = memory.errors(model, other, z, texts)[0.1]
    assert 0 < clean < velocity < 0.1


# int8 with error feedback


def correlated(rows, width, seed=0):
    """Inputs whose Gram matrix is far from diagonal: a few directions carry most of them, as in networks."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(rows, width, generator=g) @ mix


def feedback_slowly(w, H, group):
    """One column at a time: invert H of the columns left, move all of them (OBQ, arXiv:2210.17323 eq. 2)."""
    w, top, stored = w.double().clone(), w.abs().amax(1), memory.pack(w, "int8")
    H = H.double() + rounding.DAMP * H.diagonal().mean() * torch.eye(len(H))
    for j in range(w.shape[1]):
        if j % group == 0:
            below = (-16 * torch.log2(w[:, j:j + group].abs().amax(1) / top)).clamp(0, 255).floor()
            unit = stored[2][:, 0].double() * 2 ** (-below / 16)
        inverse = torch.linalg.inv(H[j:, j:])
        error = w[:, j] - (w[:, j] / unit).round().clamp(-127, 127) * unit
        w[:, j:] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return w                                                 # what a column has become is what is stored


def test_error_feedback_equals_its_slow_reference():
    for width in (96, 40):                                   # groups of 16; one group, as 40 does not divide
        x = correlated(500, width).double()
        w = torch.randn(32, width, generator=torch.Generator().manual_seed(1))
        if width == 40:
            w[:, :24] /= 8                                   # a scale that only the last columns need
        got = memory.unpack(*rounding.feedback(w, x.T @ x), torch.float64)
        want = feedback_slowly(w, x.T @ x, memory.GROUP if width == 96 else width)
        same = torch.isclose(got, want, rtol=1e-4, atol=1e-9).double().mean()
        assert same > 0.999, (width, same)                   # a tie that float32 breaks the other way


def test_error_feedback_halves_the_output_error_on_correlated_inputs_and_is_plain_on_white_ones():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    x, fresh = correlated(2000, 128), correlated(4000, 128)[2000:]
    plain, better = memory.pack(w, "int8"), rounding.feedback(w, (x.T @ x).double())
    error = [float((fresh @ (memory.unpack(*p, torch.float32) - w).T).norm()) for p in (plain, better)]
    assert error[1] < 0.5 * error[0], error
    white = rounding.feedback(w, torch.eye(128, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(plain, white))
    dead = rounding.feedback(w, torch.zeros(128, 128, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(plain, dead))


@pytest.mark.parametrize("process", [t2i.Process(), t2i.Process("cosine", "v")], ids=("flow", "vp"))
def test_int8_with_feedback_is_repeatable_as_small_and_closer(process):
    def trained(seed=0):
        torch.manual_seed(seed)
        cfg = t2i.Config(width=64, depth=2, text_depth=1)
        net = t2i.CaptionedDiT(cfg, 8, 4).eval().requires_grad_(False)
        for p in net.parameters():                           # as wide_net
            if p.ndim >= 2 and not p.any():
                p.data = torch.randn_like(p) * 0.3 / p.shape[1] ** 0.5
        return t2i.Trained(net, t2i.TinyVAE(8, 4), captions.Words("abcde", 12), process)
    full, once, again, plain = (trained() for _ in range(4))
    for m in (once, again):
        state = torch.random.get_rng_state()
        assert rounding.quantise(m, "int8") is m and m.net is m.model.dit
        assert torch.equal(state, torch.random.get_rng_state())
    memory.quantise(plain.model, "int8", skip=memory.KEEP)
    states = [m.model.state_dict() for m in (once, again, plain)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    facts = [{k: (v.shape, v.dtype) for k, v in s.items()} for s in states]
    assert facts[0] == facts[2] and memory.size_bytes(once.model) == memory.size_bytes(plain.model)
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0] if k.startswith("text."))
    g, texts = torch.Generator().manual_seed(5), ["c a", "e e b", "", "d"]
    error = {"once": 0.0, "plain": 0.0}
    for s in (0.9, 0.5, 0.1):
        x = torch.randn(4, 4, 8, 8, generator=g)
        want, *got = (m.process.predict(m.net, x, s, m.encode(texts)) for m in (full, once, plain))
        for name, out in zip(error, got):
            error[name] += float((out - want).norm())
    assert error["once"] < 0.75 * error["plain"], error


def test_int8_without_inputs_of_its_own_rounds_to_nearest(trained):
    """A model that reads a mask, or captions through a frozen encoder, cannot imagine its inputs."""
    cfg = dataclasses.replace(trained, inpaint=True)
    for change in ("mask", "encoder"):
        nets = []
        for _ in range(2):
            torch.manual_seed(0)
            net = t2i.CaptionedDiT(cfg if change == "mask" else trained, 8, 4).eval().requires_grad_(False)
            nets.append(net)
        words = captions.Words("abcde", 12) if change == "mask" else object()
        rounding.quantise(t2i.Trained(nets[0], None, words, t2i.Process()), "int8")
        memory.quantise(nets[1], "int8", skip=memory.KEEP)
        a, b = (n.state_dict() for n in nets)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert any(k.endswith(".q") for k in a)


def test_an_embedding_in_8_bits_looks_up_the_same_rows_of_a_table_in_8_bits():
    torch.manual_seed(3)                                     # exp2 of row 7 alone differed in its last bit
    table = torch.nn.Embedding(300, 64)
    ids = torch.tensor([[0, 299], [7, 7]])
    for kind, bound in (("int8", 6e-3), ("fp8", 3e-2)):      # as for linear layers of Gaussian weights
        small = memory.QEmbedding.of(table, kind)
        assert torch.equal(small(ids), memory.unpack(small.q, small.scale, small.base, torch.float32)[ids])
        assert (small(ids) - table(ids)).norm() / table(ids).norm() < bound


def test_offload_changes_memory_not_results():
    net = wide_net()
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([300.0]), torch.randn(1, 5, 256)
    want = net(x, t, text=text)
    peak = {}
    for policy in ("model", "block"):
        ledger = memory.Residency()
        before = {id(p) for p in net.parameters()}
        with memory.placed(net, "cpu", policy, ledger, net.blocks):
            assert torch.equal(net(x, t, text=text), want)
        assert ledger.now == 0 and {id(p) for p in net.parameters()} == before
        peak[policy] = ledger.peak
    block = memory.size_bytes(net.blocks[0])
    rest = memory.size_bytes(net) - block * len(net.blocks)
    assert peak["model"] == memory.size_bytes(net) and peak["block"] == rest + block
    ledger = memory.Residency()
    with pytest.raises(ZeroDivisionError):
        with memory.placed(net, "cpu", "block", ledger, net.blocks):
            1 / 0
    assert ledger.now == 0


# --- prompts ---------------------------------------------------------------


def test_weights_in_prompts_and_brackets_that_are_none():
    cut = prompts.segments
    assert cut("a (red:1.3) door") == [("a ", 1.0), ("red", 1.3), (" door", 1.0)]
    assert cut("(x:.5)(y: 2 )") == [("x", 0.5), ("y", 2.0)]
    for plain in ("def f(self, x):", "a (small) cat", "", "(: )"):
        assert cut(plain) == [(plain, 1.0)]
    assert cut(r"at \(12:30\)") == [("at (12:30)", 1.0)]


def test_windows_keep_every_token_and_whole_words(clip_folder):
    tokenizer = t2i.CLIPTokenizer(clip_folder)
    text = "a photo of (the cat:1.2) and the thing " * 12
    rows = prompts.windows(text, tokenizer)
    tokens = [i for part, _ in prompts.segments(text) for i in tokenizer.tokens(part)]
    assert [i for row in rows for i, _ in row] == tokens and len(rows) > 1
    assert all(len(row) <= 75 and tokenizer.ends_word(row[-1][0]) for row in rows)
    assert prompts.windows("", tokenizer) == [[]]
    ids, weights_ = prompts.to_ids(rows, tokenizer.start, tokenizer.end, tokenizer.pad, 77)
    assert (ids[:, 0] == tokenizer.start).all()
    assert set(weights_.unique().tolist()) == {1.0, float(np.float32(1.2))}
    hidden, empty = torch.randn(len(rows), 77, 4), torch.randn(77, 4)
    got = prompts.weigh(hidden, weights_, empty)
    assert torch.equal(got[weights_ == 1], hidden[weights_ == 1])
    torch.testing.assert_close((got - empty)[weights_ != 1], 1.2 * (hidden - empty)[weights_ != 1])


def test_one_counted_token_equals_many_equal_ones():
    """SD3 without T5: its 256 zero tokens have no position, so one that counts 256 times gives the same."""
    torch.manual_seed(0)
    for options in ({}, dict(qk_norm=True, dual=(0,))):
        net = randomised(mmdit.MMDiT(4, 2, 3, 64, 2, 24, 16, table=8, **options), 0.2)
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 30.0])
        text, pooled = torch.randn(2, 5, 24), torch.randn(2, 16)
        many = torch.cat([text, torch.zeros(2, 256, 24)], 1)
        one = torch.cat([text, torch.zeros(2, 1, 24)], 1)
        want = net(x, t, many, pooled)
        torch.testing.assert_close(net(x, t, one, pooled, last_counts=torch.full((2,), 256)), want,
                                   rtol=1e-4, atol=1e-5)
        assert (net(x, t, one, pooled) - want).abs().max() > 1e-3


def test_the_text_cache_reads_back_what_it_wrote(tmp_path):
    calls = []

    def encode(texts):
        calls.append(len(texts))
        mask = torch.arange(6)[None] < torch.tensor([[len(t)] for t in texts])
        return dict(text=torch.randn(len(texts), 6, 3) * mask[..., None], mask=mask)
    cache = textcache.TextCache(tmp_path, "a", encode, batch=2)
    first = cache(["ab", "abcd", "ab", "abc"])
    assert calls == [2, 1] and torch.equal(first["text"][0],
                                           first["text"][2]) and first["text"].shape == (4, 6, 3)
    again = cache(["abc", "ab"])
    assert calls == [2, 1] and torch.equal(again["text"][0],
                                           first["text"][3]) and torch.equal(again["mask"][1],
                                                                             first["mask"][0])
    damaged = cache.path("ab", None)
    damaged.write_bytes(damaged.read_bytes()[:40])
    cache(["ab"])
    textcache.TextCache(tmp_path, "b", encode)(["ab"])
    assert calls == [2, 1, 1, 1]                             # made again; another encoder has its own


# --- safety --------------------------------------------------------------


def test_safety_checker_layouts_offset_and_actions(tmp_path):
    net = randomised(safety.SafetyChecker(32, 1, 2, 48, 8, 17, 16, 5, 2), 0.3)
    new = {k: v.contiguous() for k, v in net.state_dict().items()}
    old = {k.replace("vision_model.", "vision_model.vision_model."): v for k, v in new.items()}
    pixels = [np.random.default_rng(k).integers(0, 255, (40, 50, 3), np.uint8) for k in range(6)]
    (tmp_path / "config.json").write_text(json.dumps(dict(vision_config=dict(num_attention_heads=2))))
    for tensors in (new, old):
        save_file(tensors, tmp_path / "model.safetensors")
        checker = t2i.SafetyChecker.load(tmp_path)
        assert checker.scores(pixels) == net.scores(pixels)
    flags = [sum(checker(pixels, offset)) for offset in (-3, -0.3, 0.0, 0.3, 3)]
    assert flags == sorted(flags) and flags[0] == 0 and flags[-1] == 6
    e = F.normalize(checker.embed(pixels[:1]))
    care, least = checker.special_care_embeds[:1], checker.special_care_embeds_weights[0]
    cosine = float(e @ F.normalize(care).T) - float(least)
    assert checker.scores(pixels[:1])[0]["special"][0] == round(cosine, 3)
    assert (pictures.block(pixels[0], "black") == 0).all()
    assert np.array_equal(pictures.block(pixels[0], "report"), pixels[0])
    assert 0 < pictures.block(pixels[0], "blur").std() < pixels[0].std() / 3


# --- scenes and their judge ----------------------------------------------


def test_the_judge_reads_real_renders_and_sees_every_mistake():
    made, texts = scenes.scenes(200, 5, "test")
    assert min(scenes.judge_all(made, texts).values()) >= 0.99
    noisy = np.clip(made + np.random.default_rng(0).normal(0, 6, made.shape), 0, 255).astype(np.uint8)
    assert min(scenes.judge_all(noisy, texts).values()) >= 0.97
    truth = "a large red circle left of a small blue square"
    picture = scenes.draw(truth, 3)
    assert scenes.judge(picture, truth)["exact"] == 1
    for wrong, field_ in (("a large red circle right of a small blue square", "relation"),
                          ("a large green circle left of a small blue square", "colour"),
                          ("a large red square left of a small blue square", "shape"),
                          ("a small red circle left of a small blue square", "size"),
                          ("a large red circle", "count")):
        verdict = scenes.judge(picture, wrong)
        assert verdict["exact"] == 0 and verdict[field_] < 1
    empty = np.broadcast_to(np.uint8(scenes.GROUND), (32, 32, 3))
    assert scenes.judge(empty, truth) == dict(size=0, colour=0, shape=0, relation=0, count=0, exact=0)


def test_validation_and_test_captions_are_never_drawn_for_training():
    train, tuning, test = (set(scenes.captions(part)) for part in ("train", "validation", "test"))
    assert not (train & test or train & tuning or tuning & test) and len(test) > 300 and len(tuning) > 150
    assert all(zlib.crc32(c.encode()) % 10 == 0
               for c in test) and len(train | tuning | test) == 36 + 36 * 30 * 4
    _, texts = scenes.scenes(2000, 1)
    assert set(texts) <= train
    single = sum(" a " not in t for t in texts) / 2000
    assert abs(single - 0.25) < 0.05                         # 2000 draws: 5 standard deviations
    with pytest.raises(ValueError, match="not a scene caption"):
        scenes.parse("a huge red circle")


# --- captioned data ------------------------------------------------------


def picture_bytes(colour, size=(40, 30)):
    import io
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_folders_jsonl_and_shards_give_the_same_pictures(tmp_path, capsys):
    red, blue = picture_bytes("red"), picture_bytes("blue", (30, 60))
    for folder in ("folder", "table", "tar"):
        (tmp_path / folder).mkdir()
    for name, data, text in (("a", red, "one  red\n"), ("b", blue, "one blue")):
        (tmp_path / "folder" / f"{name}.png").write_bytes(data)
        (tmp_path / "folder" / f"{name}.txt").write_text(text)
        (tmp_path / "table" / f"{name}.png").write_bytes(data)
    (tmp_path / "folder" / "bad.png").write_bytes(red[:40])
    (tmp_path / "folder" / "bad.txt").write_text("cut")
    (tmp_path / "folder" / "silent.png").write_bytes(red)
    rows = [dict(file_name="a.png", text="one red"), dict(image="b.png", caption="one blue")]
    (tmp_path / "table" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import io
    for k, (data, text) in enumerate(((red, "one red"), (blue, "one blue"))):
        with tarfile.open(tmp_path / "tar" / f"p-0{k}.tar", "w") as tar:
            for suffix, blob in ((".png", data), (".json", json.dumps(dict(caption=text)).encode())):
                info = tarfile.TarInfo(f"x{k}{suffix}")
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))
    seen = [[(i.key, i.bucket, i.caption) for i in captions.items(p, 32, 8)] for p in
            (tmp_path / "folder", tmp_path / "table", tmp_path / "tar", tmp_path / "tar" / "p-{00..01}.tar")]
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert [s[2] for s in seen[0]] == ["one red", "one blue"] and seen[0][0][1] != seen[0][1][1]
    said = capsys.readouterr().err
    assert "bad.png: left out" in said and "no caption" in said and "2 of 4 pictures left out" in said
    with pytest.raises(run.UserError, match="expected a folder"):
        list(captions.items(tmp_path / "nothing", 32, 8))


def test_buckets_keep_the_area_and_cover_the_picture():
    sizes = captions.bucket_sizes(512, 64, 256, 1024)
    assert (512, 512) in sizes and (256, 1024) in sizes and (1024, 256) in sizes
    assert all(w % 64 == 0 and h % 64 == 0 and w * h <= 512 * 512 for w, h in sizes)
    bucket, pixels = captions.into_bucket(Image.new("RGB", (1600, 900), "red"), sizes)
    assert pixels.shape == (bucket[1], bucket[0],
                            3) and (pixels == [255, 0, 0]).all() and bucket[0] > bucket[1]


def test_the_latent_cache_encodes_once_and_keeps_vaes_apart(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(3):
        (tmp_path / "in" / f"{k}.png").write_bytes(picture_bytes((k * 60, 9, 9), (32, 32)))
        (tmp_path / "in" / f"{k}.txt").write_text(f"number {k}")
    calls = []

    class VAE:
        def encode(self, x):
            calls.append(len(x))
            return x[:, :, ::4, ::4], x[:, :, ::4, ::4] - 5

    def read(name):
        return captions.cached(captions.items(tmp_path / "in", 32, 8), VAE(), "cpu", tmp_path / "c", name)
    first, second = read("one"), read("one")
    assert calls == [3] and torch.equal(first[0].mean,
                                        second[0].mean) and first[0].captions == second[0].captions
    damaged = next((tmp_path / "c").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    third = read("one")
    assert calls == [3, 1] and sorted(third[0].captions) == first[0].captions
    read("two")
    assert calls == [3, 1, 3]


# --- the engine, end to end ----------------------------------------------


@pytest.fixture(scope="module")
def captioned_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for k in range(8):
        Image.fromarray(scenes.draw(scenes.captions()[k * 50], k, 32)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("the cat sat at the hat" if k % 2 else "cat")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory of the smoke preset: every stage once."""
    out = str(tmp_path_factory.mktemp("run") / "a")
    cfg = t2i.Config(**{**t2i.PRESETS["smoke"]["set"], "preset": "smoke", "out": out, "device": "cpu"})
    t2i.train(cfg)
    return cfg


@pytest.fixture(scope="module")
def model(trained):
    return t2i.load_model(trained, torch.device("cpu"))


PROMPT = "a large red circle left of a small blue square"


def make(model, cfg, prompts=(PROMPT,), seeds=(0,), **kw):
    return t2i.generate(model, list(prompts), cfg, torch.device("cpu"), list(seeds), (32, 32), **kw)


def test_training_leaves_a_complete_run(trained):
    out = Path(trained.out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"header", "vae", "vae_done", "train", "eval"} <= {r["kind"] for r in rows}
    for name in ("config.json", "RUN.md", "vae.safetensors", "ema.safetensors", "dit_t2i.py",
                 "samples/000020.png"):
        assert (out / name).is_file(), name
    t2i.train(trained)                                       # the same command again: nothing left to do
    with pytest.raises(run.UserError, match="width"):
        t2i.train(dataclasses.replace(trained, width=64))


def test_resume_is_bit_exact(trained, tmp_path):
    cfg = dataclasses.replace(trained, out=str(tmp_path / "b"), save_every=7)

    class Stop(Exception):
        pass
    real = run.save_if_due

    def stop_at(out, step, *args, **kw):
        real(out, step, *args, **kw)
        if step == 14:
            raise Stop
    for _ in range(2):                                       # once in the VAE, once in the transformer
        with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "save_if_due", stop_at if not (tmp_path / "b/vae/ckpt/00000020").is_dir() else
                          lambda out, step, *a,
                          **k: stop_at(out, step if "vae" not in str(out) else 0, *a, **k))
            t2i.train(cfg)
    t2i.train(cfg)
    for name in ("ema", "vae"):
        a, b = (load_file(Path(c.out, f"{name}.safetensors")) for c in (trained, cfg))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_training_on_a_captioned_folder_in_two_buckets(tmp_path, trained):
    (tmp_path / "in").mkdir()
    for k in range(12):
        picture = Image.fromarray(scenes.draw(scenes.captions()[k * 50], k, 64))
        picture.crop((0, 0, 64, 64 if k % 2 else 32)).save(tmp_path / "in" / f"{k}.png")
        (tmp_path / "in" / f"{k}.txt").write_text(scenes.captions()[k * 50])
    cfg = dataclasses.replace(trained, data=str(tmp_path / "in"), out=str(tmp_path / "o"), vae_steps=4,
                              train_steps=4)
    t2i.train(cfg)
    assert len(list((tmp_path / "o/latents").rglob("*.safetensors"))) == 12
    made = make(t2i.load_model(cfg, torch.device("cpu")), cfg, ("a small red square",))
    assert made.shape == (1, 32, 32, 3)
    with pytest.raises(run.UserError, match="multiple of 8"):
        t2i.train(dataclasses.replace(cfg, bucket_step=12, out=str(tmp_path / "p")))


def test_pictures_repeat_and_do_not_depend_on_the_batch(model, trained):
    both = make(model, trained, (PROMPT, "a small green triangle"), (3, 4))
    again = make(model, trained, (PROMPT, "a small green triangle"), (3, 4))
    assert np.array_equal(both, again)
    alone = make(model, trained, ("a small green triangle",), (4,))
    # the matrix products of one and of two rows may round differently: at most one grey level
    assert np.abs(alone[0].astype(int) - both[1]).max() <= 1
    assert not np.array_equal(both[0], make(model, trained, seeds=(5,))[0])


def test_image_to_image_honours_strength(model, trained):
    init = scenes.draw("a large yellow square", 1)
    change = dataclasses.replace
    assert np.array_equal(make(model, change(trained, strength=0.0), init=init)[0], init)
    for mode in ("truncate", "respace"):
        far = [np.abs(make(model, change(trained, strength=s, strength_mode=mode),
                           init=init)[0].astype(int) - init).mean()
               for s in (0.01, 0.25, 1.0)]
        assert far == sorted(far)                            # 0.01 of 4 steps is still one step, not a crash
    whole = make(model, change(trained, strength=1.0), init=init)
    assert np.array_equal(whole, make(model, trained))  # flow: at strength 1 nothing of the picture is left


def test_inpainting_keeps_every_byte_outside_the_mask(model, trained):
    init = scenes.draw(PROMPT, 1)
    mask = np.zeros((32, 32), bool)
    mask[5:17, 9:22] = True
    for feather in (0.0, 2.0):
        cfg = dataclasses.replace(trained, strength=1.0, feather=feather)
        made = make(model, cfg, ("a small green triangle",), init=init, mask=mask)[0]
        assert np.array_equal(made[~mask], init[~mask]) and not np.array_equal(made[mask], init[mask])
    cells = pictures.latent_mask(mask, 4)[0, 0].bool().numpy()
    assert (np.kron(cells, np.ones((4, 4))).astype(bool) | ~mask).all()  # touched cells are repainted


def test_repaint_goes_back_and_keeps_the_distribution():
    """The walk of the paper's figure; and jumps of an exact Gaussian denoiser leave its mean and variance."""
    assert t2i.walk(4) == [0, 1, 2, 3] and t2i.walk(5, 2, 2) == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    for space, levels in (("flow", torch.linspace(1, 0, 41)), ("ve", torch.linspace(5, 0, 81) ** 2)):
        def exact(x, s, space=space):                        # data N(0.5, 0.3^2)
            a = t2i.alpha(float(s), space)
            return 0.5 + a * 0.09 / (a * a * 0.09 + s * s) * (x - a * 0.5)
        calls, x = [], torch.randn(20, 1000, generator=torch.Generator().manual_seed(1)) * levels[0]
        end = t2i.SAMPLERS["heun"](lambda x, s: (calls.append(s), exact(x, s).float())[1], x, levels, 0,
                                   space,
                                   repaint=(5, 3))
        assert len(calls) == 3 * 2 * (len(levels) - 1) - 3   # one call in the last step, done three times
        # 20,000 draws: the mean is known to 0.002, the spread to 0.0015; the last step narrows it by 1 %
        assert abs(float(end.mean()) - 0.5) < 0.008 and abs(float(end.std()) - 0.3) < 0.008


def test_repaint_changes_the_masked_part_only(model, trained):
    init, mask = scenes.draw(PROMPT, 1), np.zeros((32, 32), bool)
    mask[5:17, 9:22] = True
    plain, again = (make(model, dataclasses.replace(trained, strength=1.0, repaint=r), init=init,
                         mask=mask)[0]
                    for r in ((1, 1), (2, 3)))
    assert np.array_equal(again[~mask], init[~mask]) and not np.array_equal(again[mask], plain[mask])


def test_an_inpainting_model_is_trained_and_reads_mask_and_picture(tmp_path, trained, captioned_folder):
    out = str(tmp_path / "o")
    cfg = dataclasses.replace(trained, out=out, inpaint=True, train_steps=6, vae_steps=4)
    t2i.train(cfg)
    model = t2i.load_model(cfg, torch.device("cpu"))
    assert model.net.extra == 5 and model.net.x_embedder["proj"].weight.shape[1] == 9
    init, other, mask = scenes.draw(PROMPT, 1), scenes.draw(PROMPT, 2), np.zeros((32, 32), bool)
    mask[5:17, 9:22] = True
    change = dataclasses.replace(cfg, strength=1.0)
    made = [make(model, change, init=i, mask=mask)[0] for i in (init, other)]
    assert all(np.array_equal(m[~mask], i[~mask]) for m, i in zip(made, (init, other)))
    assert not np.array_equal(made[0][mask], made[1][mask])  # what is around the hole reaches what fills it
    assert make(model, cfg).std() > 0                        # without a picture all of it is painted
    onto = dataclasses.replace(cfg, data=str(captioned_folder), out=str(tmp_path / "d"), train_steps=2)
    t2i.train(onto)
    assert t2i.load_model(onto, torch.device("cpu")).net.extra == 5


def test_holes_hide_exactly_what_the_mask_says():
    class VAE(torch.nn.Module):                              # latents that are the picture itself, 4x smaller
        scale, shift, factor = 2.0, 0.5, 4

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def encode(self, image):
            return F.avg_pool2d(image, 4), None
    np.random.seed(0)
    rest = pictures.holes(np.full((400, 32, 32, 3), 255, np.uint8), VAE())
    mask, held = rest[:, :1], rest[:, 1:] / 2 + 0.5
    assert rest.shape == (400, 4, 8, 8) and set(mask.unique().tolist()) == {0.0, 1.0}
    gone = (held == 0).all(1, keepdim=True)                  # grey: every pixel of the cell is masked
    assert (mask[gone] == 1).all() and (held[(mask == 0).expand_as(held)] > 0).all()
    whole = mask.flatten(1).all(1).float().mean()
    assert 0.06 < whole < 0.2 and 0.2 < float(mask.mean()) < 0.6
    painted = pictures.masked(torch.ones(1, 3, 32, 32), torch.eye(32)[None, None], 4,
                              lambda v: F.avg_pool2d(v, 4),
                              whole=True)
    assert painted.shape == (1, 3 + 16, 8, 8)                # FLUX fill: every pixel of the mask
    assert torch.equal(F.pixel_shuffle(painted[:, 3:], 4), torch.eye(32)[None, None])


def test_nothing_non_finite_reaches_a_picture(model, trained):
    def broken(x):
        return torch.full((len(x), 3, 32, 32), float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.vae, "decode", broken)
        with pytest.raises(run.UserError, match="non-finite values out of the VAE"):
            make(model, trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.net, "forward", lambda x, t, **kw: x * float("inf"))
        with pytest.raises(run.UserError, match="non-finite latents after sampler step 1"):
            make(model, trained)


@pytest.mark.parametrize("guidance", t2i.GUIDANCE)
def test_every_guidance_runs_in_the_engine(model, trained, guidance):
    assert make(model, dataclasses.replace(trained, guidance=guidance, steps=2)).shape == (1, 32, 32, 3)


def test_sample_writes_recipes_and_repeats_them(trained, tmp_path, capsys):
    listing = tmp_path / "prompts.txt"
    listing.write_text(f"{PROMPT}\n\na small white circle\n")
    cfg = dataclasses.replace(trained, model=trained.out, out=str(tmp_path / "o"), prompts=str(listing),
                              count=2, seed=5,
                              at_once=3, preview=2)
    t2i.sample(cfg)
    made = sorted((tmp_path / "o/samples").glob("0???.png"))
    assert len(made) == 4 and (tmp_path / "o/samples/grid.png").is_file()
    assert (tmp_path / "o/samples/0001-step002.png").is_file()
    recipe = pictures.read_recipe(made[3])
    assert recipe["prompt"] == "a small white circle" and recipe["seed"] == 6 and recipe["sha256"]
    with Image.open(made[3]) as image:
        assert image.text["parameters"].startswith("a small white circle\n")
    t2i.sample(t2i.Config(out=str(tmp_path / "again"), recipe=str(made[3]), device="cpu"))
    a, b = (np.asarray(Image.open(p)).astype(int) for p in (made[3], tmp_path / "again/samples/0000.png"))
    assert np.abs(a - b).max() <= 1                          # made in another batch size
    assert "peak memory" in capsys.readouterr().out
    with pytest.raises(run.UserError, match="holds no recipe"):
        pictures.read_recipe(tmp_path / "o/samples/grid.png")


def test_user_mistakes_are_one_line_and_exit_2(trained, tmp_path):
    cases = [(["sample", "--out", str(tmp_path / "none")], "no weights in"),
             (["sample", "--model", trained.out, "--sampler", "eulr"], "did you mean 'euler'"),
             (["sample", "--model", trained.out, "--shape", "30x32"], "try --shape 24x32"),
             (["sample", "--model", trained.out, "--mask", "x.png"], "--mask needs"),
             (["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "t")],
              "no captioned pictures"),
             (["train", "--schedule", "linear", "--out", str(tmp_path / "t")], "prediction")]
    code = "import sys, dit_t2i\n" \
           "for argv in {cases!r}:\n" \
           "    sys.argv = ['dit_t2i.py', *argv]\n" \
           "    try: dit_t2i.run.main(dit_t2i.Config, dit_t2i.PRESETS, dit_t2i.COMMANDS)\n" \
           "    except SystemExit as stop: print('exit', stop.code, file=sys.stderr)\n"
    done = subprocess.run([sys.executable, "-c", code.format(cases=[c for c, _ in cases])], cwd=ROOT,
                          capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[1::2] == ["exit 2"] * len(cases), done.stderr
    for line, (_, words) in zip(lines[::2], cases):
        assert line.startswith("dit_t2i.py: error: ") and words in line


def test_training_reads_captions_through_a_frozen_public_encoder_once(tmp_path, trained, captioned_folder,
                                                                      t5_folder):
    tower = tmp_path / "tower"
    (tower / "text_encoder").mkdir(parents=True)
    (tower / "tokenizer").mkdir()
    (tower / "tokenizer" / "spiece.model").write_bytes((t5_folder / "spiece.model").read_bytes())
    net = randomised(t5.T5Encoder(32, 2, 16, 48, 2, 200), 0.3)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()},
              tower / "text_encoder" / "model.safetensors")
    cfg = dataclasses.replace(trained, data=str(captioned_folder), out=str(tmp_path / "o"), vae_steps=2,
                              train_steps=3,
                              text_model=str(tower), text_len=16)
    with pytest.MonkeyPatch.context() as patch:
        count = []
        forward = t5.T5Encoder.forward
        patch.setattr(t5.T5Encoder, "forward", lambda self, ids,
                      mask=None: (count.append(len(ids)), forward(self, ids, mask))[1])
        t2i.train(cfg)
        assert sum(count) == 3                               # two captions and the empty one
    assert len(list((tmp_path / "o/texts").rglob("*.safetensors"))) == 3
    model = t2i.load_model(cfg, torch.device("cpu"))
    assert not any(n.startswith("text.") for n, _ in model.model.named_parameters())
    made = make(model, cfg, ("the cat", "hat"), (0, 1))
    assert made.shape == (2, 32, 32, 3) and not np.array_equal(made[0], made[1])
    with pytest.raises(run.UserError, match="expected text_encoder/"):
        textcache.PublicText(trained.out + "/vae.safetensors", 16, "cpu")


def test_the_demo_keeps_its_promises(trained, tmp_path, capsys):
    studio.demo(dataclasses.replace(trained, steps=2), t2i.sample)
    assert "kept every byte" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch, pytest.raises(run.UserError, match="outside the mask"):
        patch.setattr(pictures, "composite", lambda made, *_: made)
        studio.demo(dataclasses.replace(trained, steps=2), t2i.sample)


def test_a_crop_is_repainted_at_full_size_and_pasted_back(model, trained, tmp_path):
    whole = np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype(np.uint8)
    mask = np.zeros((70, 90), bool)
    mask[20:31, 60:85] = True
    Image.fromarray(whole).save(tmp_path / "whole.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    left, top, right, bottom = pictures.region(mask, 5, 1.0)
    assert right - left == bottom - top == 35
    assert left <= 60 - 5 and right >= 85 and top <= 15 and bottom >= 36
    assert pictures.region(mask, 500, 2.0) == (0, 0, 90, 70)
    cfg = dataclasses.replace(trained, init=str(tmp_path / "whole.png"), mask=str(tmp_path / "mask.png"),
                              crop=5,
                              strength=1.0, out=str(tmp_path / "o"), model=trained.out, prompt=PROMPT)
    made, = t2i.sample(cfg)
    assert made.shape == whole.shape and np.array_equal(made[~mask], whole[~mask])
    assert not np.array_equal(made[mask], whole[mask])
    with pytest.raises(run.UserError, match="--crop works around a mask"):
        t2i.sample(dataclasses.replace(cfg, mask=""))


def test_guidance_can_fall_and_blocks_can_be_skipped(model, trained):
    calls = []
    forward = model.net.forward

    def spy(x, t, skip=(), **cond):
        calls.append((len(x), tuple(skip)))
        return forward(x, t, skip=skip, **cond)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.net, "forward", spy)
        base = dataclasses.replace(trained, steps=10, cfg=4.0, skip_layers=(1.0,), sampler="euler")
        make(model, base)
        assert calls == [(2, ()), (2, ()), (1, (1,)), *[(2, ())] * 8]        # step 1 lies in (0.1, 2) of 10
    scales = []
    real = t2i.guide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t2i, "guide", lambda c, u, w, *a, **k: (scales.append(w), real(c, u, w, *a, **k))[1])
        make(model, dataclasses.replace(trained, steps=5, cfg=4.0, cfg_mode="linear_down", cfg_min=2.0,
                                         sampler="euler"))
    np.testing.assert_allclose(scales, [4.0, 3.5, 3.0, 2.5, 2.0])
    seen = []
    with pytest.MonkeyPatch.context() as patch:              # the scale that is imitated runs as well
        patch.setattr(t2i, "guide", lambda *a, mimic,
                      **k: (seen.append(mimic), real(*a, mimic=mimic, **k))[1])
        make(model, dataclasses.replace(trained, steps=5, guidance="mimic", cfg=9.0, mimic=5.0, mimic_min=1.0,
                                        mimic_mode="linear_down", sampler="euler"))
    np.testing.assert_allclose(seen, [5.0, 4.0, 3.0, 2.0, 1.0])


def test_the_noise_strip_has_the_variance_of_every_schedule(tmp_path):
    from functools import partial
    rows = partial(studio.noise_strip, alpha_bar=t2i.alpha_bar, shift=t2i.shift)(
        dataclasses.replace(t2i.Config(), out=str(tmp_path)))
    assert len(rows) == 5 * 8 and rows[0].shape == (96, 96, 3)
    clean = scenes.draw("a large red circle left of a small blue square", 0, 96) / 127.5 - 1
    for k, name in enumerate(("linear", "scaled_linear", "cosine")):
        abar = t2i.alpha_bar(name).numpy()[np.linspace(0, 999, 8).round().astype(int)]
        want = np.sqrt(abar * clean.var() + 1 - abar)
        np.testing.assert_allclose([r.std() for r in rows[8 * k:8 * k + 8]], want, rtol=0.02)
        assert (np.diff(np.log(abar / (1 - abar))) < 0).all()
    with Image.open(tmp_path / "noise.png") as image:
        assert image.width > 8 * 96 and image.height > 5 * 96


def _fsdp_rank(rank, port, folder):
    """A straight run, and one stopped in the transformer and continued; two ranks share the parameters."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)
    torch.set_num_threads(1)
    base = t2i.Config(**{**t2i.PRESETS["smoke"]["set"], "preset": "smoke", "device": "cpu", "fsdp": True,
                         "vae_steps": 4, "train_steps": 12, "save_every": 5, "out": folder + "/straight"})
    t2i.train(base)
    stopped, real = dataclasses.replace(base, out=folder + "/stopped"), run.save_if_due

    class Stop(Exception):
        pass

    def stop_at(out, step, *args, **kw):
        real(out, step, *args, **kw)
        if step == 5 and "vae" not in str(out):
            raise Stop
    run.save_if_due = stop_at
    with pytest.raises(Stop):
        t2i.train(stopped)
    run.save_if_due = real
    t2i.train(stopped)
    run.leave_together()


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
                    reason="FSDP2 on a CPU needs torch 2.7")
def test_two_sharded_ranks_resume_bit_for_bit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two_ranks(_fsdp_rank, port, str(tmp_path))
    a, b = (load_file(tmp_path / name / "ema.safetensors") for name in ("straight", "stopped"))
    assert len(a) > 50 and all(torch.equal(a[k], b[k]) for k in a)
    # whole tensors, no shards
    t2i.load_model(t2i.Config(out=str(tmp_path / "straight")), torch.device("cpu"))


def test_every_preset_builds_and_plans(capsys):
    for name, preset in t2i.PRESETS.items():
        t2i.plan(t2i.Config(**{**preset["set"], "preset": name, "json": True}))
        row = json.loads(capsys.readouterr().out)
        assert row["params"] > 0 and row["flops_per_step"] > 0 and row["preset"] == name


def test_the_small_vae_learns_scenes():
    """120 steps on 16 scenes must halve the error of the mean picture twice; the full budget reaches 38
    dB."""
    torch.manual_seed(0)
    vae = t2i.TinyVAE(16, 4)
    x = t2i.to_images(scenes.scenes(4, 0)[0])
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (4, 4, 8, 8) and torch.equal(vae.encode(x)[0], mean)
    optim = torch.optim.AdamW(vae.parameters(), 4e-3)
    for _ in range(150):
        recon, _, _ = vae(x)
        optim.zero_grad()
        F.l1_loss(recon, x).backward()
        optim.step()
    with torch.no_grad():
        assert F.mse_loss(vae.decode(vae.encode(x)[0]), x) < F.mse_loss(x.mean(0, keepdim=True).expand_as(x),
                                                                        x) / 2
