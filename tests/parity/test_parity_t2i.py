"""dit_t2i.py against transformers, diffusers and sentencepiece with the same random weights.

Tolerances: 1e-4 absolute on outputs of order one (both sides float32, other order of sums); 1e-5 for
samplers, whose public tables are float32; PSNR above 50 dB for a whole pipeline, the bound of the task.
"""
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import dit_t2i as t2i  # noqa: E402
from common import run  # noqa: E402
from common.t2i import clip, public  # noqa: E402

torch.set_num_threads(1)


def randomise(net, scale=0.1, seed=0):
    torch.manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(0, scale)
    return net.eval().requires_grad_(False)


def save(net, folder):
    net.save_pretrained(folder)
    return folder


def hard_strings(count=2000, seed=0):
    """Emoji, CJK, Hangul, combining marks, fullwidth, controls, URLs, 10,000 characters, nothing."""
    rng = random.Random(seed)
    ranges = [(32, 127), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (1, 0x250), (0x2000, 0x2100), (0x300, 0x36F),
              (0x370, 0x5FF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF)]
    words = [" ", "  ", "\n", "'s", "'RE", " 12", "http://a.b/c?d=e&f#g", "&amp;", "\u200b", "\ufeff",
             "\u03a3",
             "\u0130", "\u00df", "\u01c5", "\u00bd", "\ufb01", "a photo of a cat", "<|endoftext|>"]
    texts = ["", " ", "   ", "a" * 10_000, "word " * 2000, "\x00\x01\x1c\x1d\x1e\x1f",
             "\u65e5\u672c\u8a9e" * 500]
    while len(texts) < count:
        some = rng.sample(ranges, rng.randrange(1, 4))

        def piece(some=some):
            return chr(rng.randrange(*rng.choice(some))) if rng.random() < 0.8 else rng.choice(words)

        texts.append("".join(piece() for _ in range(rng.randrange(1, 60))))
    return texts


# --- tokenizers ----------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """1,500 merges learnt greedily from this repository's own text, in the public layout."""
    folder = tmp_path_factory.mktemp("clip")
    text = open(t2i.__file__, encoding="utf-8").read().lower()
    symbols = clip.byte_symbols()
    words = {}
    for word in clip.split_words(text):
        parts = [symbols[b] for b in word.encode()]
        words[tuple(parts[:-1] + [parts[-1] + "</w>"])] = words.get(tuple(parts[:-1] + [parts[-1] + "</w>"]),
                                                                    0) + 1
    merges = []
    for _ in range(300):
        counts = {}
        for parts, n in words.items():
            for pair in zip(parts, parts[1:]):
                counts[pair] = counts.get(pair, 0) + n
        best = max(counts, key=lambda p: (counts[p], p))
        merges.append(best)
        joined = {}
        for parts, n in words.items():
            out, i = [], 0
            while i < len(parts):
                hit = parts[i:i + 2] == best
                out.append("".join(best) if hit else parts[i])
                i += 2 if hit else 1
            joined[tuple(out)] = n
        words = joined
    base = list(symbols.values())
    vocabulary = base + [c + "</w>" for c in base] + ["".join(m) for m in merges] + [clip.START, clip.END]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return folder


def test_clip_tokenizer_equals_transformers_on_2000_hard_strings(clip_folder):
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(clip_folder), t2i.CLIPTokenizer(clip_folder)
    texts = hard_strings()
    wrong = [t for t in texts if theirs(t).input_ids != [ours.start, *ours.tokens(t), ours.end]]
    assert not wrong, (len(wrong), ascii(wrong[0])[:200])
    padded = theirs(texts[:50], padding="max_length", max_length=77, truncation=True,
                    return_tensors="pt").input_ids
    assert torch.equal(padded, ours(texts[:50], warn=False))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A unigram model with the real nmt_nfkc normaliser, trained by sentencepiece on this repository's
    text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("t5")
    rare = "\nhttp://example.com \u65e5\u672c\u8a9e \u00bd \ufb01 12345\n" * 20
    text = open(t2i.__file__, encoding="utf-8").read() + rare
    (folder / "text").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=900, model_type="unigram",
        normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return folder


def test_t5_tokenizer_equals_sentencepiece_on_2000_hard_strings(t5_folder):
    import sentencepiece
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    ours = t2i.T5Tokenizer(t5_folder)
    texts = hard_strings()
    wrong = [t for t in texts if theirs.encode(t) != ours.tokens(t)]
    assert not wrong, (len(wrong), ascii(wrong[0])[:200])


def test_t5_tokenizer_equals_transformers_where_that_equals_sentencepiece(t5_folder):
    """transformers normalises whole grapheme clusters and loses marks after compatibility characters: there,
    and only there, it leaves sentencepiece, which trained the model and which we follow."""
    import sentencepiece
    slow = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    fast, ours = transformers.T5Tokenizer.from_pretrained(t5_folder), t2i.T5Tokenizer(t5_folder)
    texts = [*hard_strings(), "</s> hi", "<extra_id_0> x <extra_id_99>", "<unk>"]
    differs = [t for t in texts if fast(t).input_ids[:-1] != ours.tokens(t)]
    assert all(slow.encode(t) == ours.tokens(t) for t in differs)
    assert len(differs) < 0.1 * len(texts), len(differs)


# --- encoders ------------------------------------------------------------


@pytest.mark.parametrize("act, project", [("quick_gelu", 24), ("gelu", 40)])
def test_clip_text_encoder_equals_transformers(tmp_path, act, project):
    config = transformers.CLIPTextConfig(vocab_size=600, hidden_size=64, intermediate_size=96,
                                         num_hidden_layers=3,
                                         num_attention_heads=4, hidden_act=act, projection_dim=project,
                                         eos_token_id=599)
    theirs = randomise(transformers.CLIPTextModelWithProjection(config))
    ours = t2i.CLIPTextEncoder.load(save(theirs, tmp_path))
    ids = torch.randint(0, 590, (3, 77), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((5, 40, 76)):
        ids[row, end:] = 599
    want, got = theirs(ids, output_hidden_states=True), ours(ids)
    for a, b in ((want.hidden_states[-2], got["penultimate"]), (want.last_hidden_state, got["last"]),
                 (want.text_embeds, got["projected"])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_t5_encoder_equals_transformers(tmp_path):
    config = transformers.T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4,
                                   feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    theirs = randomise(transformers.T5EncoderModel(config), 0.2)
    ours = t2i.T5Encoder.load(save(theirs, tmp_path))
    ids = torch.randint(0, 200, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(150)[None] < torch.tensor([[20], [150]])
    torch.testing.assert_close(theirs(ids).last_hidden_state, ours(ids), rtol=0, atol=1e-4)
    want = theirs(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(want[mask], ours(ids, mask)[mask], rtol=0, atol=1e-4)


def test_safety_checker_equals_diffusers(tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    vision = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  image_size=56,
                  patch_size=14, hidden_act="quick_gelu")
    config = transformers.CLIPConfig(vision_config=vision, projection_dim=32)
    theirs = randomise(StableDiffusionSafetyChecker(config))
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(theirs, name).data.normal_()
        getattr(theirs, name + "_weights").data.fill_(1.0)
    pictures = [np.random.default_rng(k).integers(0, 255, (70, 90, 3), np.uint8) for k in range(12)]
    # thresholds that flag about half, one way or the other
    first = t2i.SafetyChecker.load(save(theirs, tmp_path))
    unit = torch.nn.functional.normalize
    cosine = unit(first.embed(pictures)) @ unit(first.concept_embeds).T
    theirs.concept_embeds_weights.data[0] = cosine[:, 0].median()
    theirs.special_care_embeds_weights.data[0] = -1.0  # every picture trips it: later thresholds get stricter
    ours = t2i.SafetyChecker.load(save(theirs, tmp_path))
    pixels = torch.stack([ours.preprocess(p) for p in pictures])
    embedding = theirs.visual_projection(theirs.vision_model(pixels)[1])
    torch.testing.assert_close(embedding, ours.embed(pictures), rtol=0, atol=1e-4)
    _, flags = theirs(clip_input=pixels, images=np.zeros((12, 8, 8, 3)))
    assert flags == ours(pictures) and 0 < sum(flags) < 12
    from transformers import CLIPImageProcessor
    processor = CLIPImageProcessor(size=dict(shortest_edge=56), crop_size=56)
    theirs_pixels = processor(pictures, return_tensors="pt").pixel_values
    # transformers resizes on another library than pillow in this version: mean, not bits
    assert (theirs_pixels - pixels).abs().mean() < 0.02


# --- transformers --------------------------------------------------------


def test_dit_equals_diffusers(tmp_path):
    theirs = randomise(diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, activation_fn="gelu-approximate", attention_bias=True))
    first = theirs.transformer_blocks[0].norm1.emb  # the public files repeat one embedder in every block
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        # where diffusers leaves the authors' code: frequencies over 127 instead of 128, norms with eps 1e-5
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    family, ours, _ = public.open_transformer(save(theirs, tmp_path), t2i.DiT, t2i.sincos_2d, torch.float32)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 9])
    want = theirs(x, timestep=t, class_labels=y).sample
    assert family == "dit"
    torch.testing.assert_close(ours(x, t, label=y), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sample, stretch", [(16, None), (16, 2)])
def test_pixart_equals_diffusers(tmp_path, sample, stretch):
    theirs = randomise(diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        sample_size=sample,
        patch_size=2, cross_attention_dim=32, caption_channels=24, interpolation_scale=stretch,
        use_additional_conditions=False))
    family, ours, _ = public.open_transformer(save(theirs, tmp_path), t2i.DiT, t2i.sincos_2d, torch.float32)
    x, t, text = torch.randn(2, 4, 16, 12), torch.tensor([30.0, 700.0]), torch.randn(2, 7, 24)
    mask = torch.arange(7)[None] < torch.tensor([[4], [7]])
    want = theirs(x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask.long(),
                  added_cond_kwargs=dict(resolution=None, aspect_ratio=None)).sample
    assert family == "pixart"
    torch.testing.assert_close(ours(x, t, text=text, mask=mask), want, rtol=0, atol=1e-4)


def test_pixart_alpha_1024_equals_diffusers(tmp_path):
    """The picture's size and aspect ratio join the time; ours reads both off the latents."""
    theirs = randomise(diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        sample_size=128,
        patch_size=2, cross_attention_dim=48, caption_channels=24, use_additional_conditions=True))
    _, ours, _ = public.open_transformer(save(theirs, tmp_path), t2i.DiT, t2i.sincos_2d, torch.float32)
    x, t, text = torch.randn(2, 4, 16, 12), torch.tensor([30.0, 700.0]), torch.randn(2, 7, 24)
    size = dict(resolution=torch.tensor([[128.0, 96.0]] * 2), aspect_ratio=torch.tensor([[128 / 96]] * 2))
    want = theirs(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=size).sample
    assert ours.micro
    torch.testing.assert_close(ours(x, t, text=text), want, rtol=0, atol=1e-4)


def flux_transformer(guidance, in_channels=16):
    return diffusers.FluxTransformer2DModel(
        in_channels=in_channels, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=48, pooled_projection_dim=24, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6))


@pytest.mark.parametrize("dev", [True, False])
def test_flux_equals_diffusers_in_both_spellings(tmp_path, dev):
    from safetensors.torch import save_file
    theirs = randomise(flux_transformer(dev), 0.2)
    family, ours, _ = public.open_transformer(save(theirs, tmp_path), t2i.DiT, t2i.sincos_2d, torch.float32)
    x, t, text, pooled = (torch.randn(2, 4, 8, 12), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48),
                          torch.randn(2, 24))
    guidance = torch.tensor([3.5, 1.0]) if dev else None
    packed = diffusers.FluxPipeline._pack_latents(x, 2, 4, 8, 12)
    places = diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    want = theirs(packed, encoder_hidden_states=text, pooled_projections=pooled, timestep=t / 1000,
                  img_ids=places, txt_ids=torch.zeros(7, 3), guidance=guidance).sample
    want = diffusers.FluxPipeline._unpack_latents(want, 64, 96, 8)
    got = ours(x, t, text, pooled, guidance)
    assert family == "flux"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    theirs_of = ((r"ln_q.weight", "norm.query_norm.scale"), (r"ln_k.weight", "norm.key_norm.scale"),
                 ("_in.0", "_in.in_layer"), ("_in.2", "_in.out_layer"), ("_mod.", "_mod.lin."),
                 (".fc1", ".0"),
                 (".fc2", ".2"), ("modulation.weight", "modulation.lin.weight"),
                 ("modulation.bias", "modulation.lin.bias"))
    names = {}
    for name, tensor in ours.state_dict().items():           # the spelling of the authors' own files
        for old, new in theirs_of:
            name = name.replace(old, new)
        names[name] = tensor.contiguous()
    (tmp_path / "bfl").mkdir()
    save_file(names, tmp_path / "bfl" / "flux.safetensors")
    (tmp_path / "bfl" / "config.json").write_text(json.dumps(dict(num_attention_heads=3,
                                                                  axes_dims_rope=[4, 6, 6])))
    _, again, _ = public.open_transformer(tmp_path / "bfl", t2i.DiT, t2i.sincos_2d, torch.float32)
    assert torch.equal(again(x, t, text, pooled, guidance), got)


def test_flux_has_the_published_number_of_parameters():
    from common.t2i.flux import Flux
    with torch.device("meta"):
        ours, theirs = Flux(), diffusers.FluxTransformer2DModel(guidance_embeds=True)
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert counts == [11_901_408_320] * 2


@pytest.mark.parametrize("options", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))])
def test_sd3_equals_diffusers(tmp_path, options):
    theirs = randomise(sd3_transformer(**options))
    family, ours, _ = public.open_transformer(save(theirs, tmp_path), t2i.DiT, t2i.sincos_2d, torch.float32)
    x, t = torch.randn(2, 4, 16, 12), torch.tensor([500.0, 20.0])
    text, pooled = torch.randn(2, 7, 48), torch.randn(2, 40)
    want = theirs(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    assert family == "sd3"
    torch.testing.assert_close(ours(x, t, text, pooled), want, rtol=0, atol=1e-4)


def sd3_transformer(**options):
    sizes = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
                 attention_head_dim=8,
                 num_attention_heads=4, joint_attention_dim=48, caption_projection_dim=32,
                 pooled_projection_dim=40, pos_embed_max_size=12)
    return diffusers.SD3Transformer2DModel(**(sizes | options))


# --- samplers ------------------------------------------------------------


def net_eps(x, sigma):
    """A smooth stand-in for a network in ve space: noise prediction of x."""
    return torch.tanh(0.7 * x / (1 + sigma**2) ** 0.5) + 0.1


def run_scheduler(scheduler, x_unit, steps, scaled=True):
    scheduler.set_timesteps(steps)
    x = x_unit * scheduler.init_noise_sigma
    g = torch.Generator().manual_seed(0)
    levels = [float(s) for s in scheduler.sigmas]
    for k, t in enumerate(scheduler.timesteps):
        sigma = levels[k]
        state = x if scaled else x * (1 + sigma**2) ** 0.5   # these schedulers carry x / sqrt(1 + sigma^2)
        kw = dict(generator=g) if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(net_eps(state, sigma), t, x, **kw).prev_sample
    return x, torch.tensor(levels, dtype=torch.float64)


@pytest.mark.parametrize("name, scheduler, options", [
    ("euler", "EulerDiscreteScheduler", {}),
    ("euler", "EulerDiscreteScheduler", dict(use_karras_sigmas=True)),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    ("unipc", "UniPCMultistepScheduler", dict(solver_order=2, use_karras_sigmas=True)),
    ("unipc", "UniPCMultistepScheduler", dict(solver_order=3, use_karras_sigmas=True))])
def test_deterministic_samplers_equal_diffusers(name, scheduler, options):
    extra = dict(euler_at_final=False, lower_order_final=True) if "DPM" in scheduler else {}
    extra |= dict(final_sigmas_type="zero") if "Euler" not in scheduler else {}
    made = getattr(diffusers, scheduler)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         **options,
                                         **extra)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    scaled = "Euler" in scheduler
    want, levels = run_scheduler(made, x, 12, scaled)
    start = x * made.init_noise_sigma if scaled else x * (1 + levels[0]**2) ** 0.5
    order = dict(order=options["solver_order"]) if "solver_order" in options else {}
    got = t2i.SAMPLERS[name](lambda x, s: x - s * net_eps(x, s), start, levels, space="ve", **order)
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-5)


def test_ancestral_and_sde_samplers_equal_diffusers(monkeypatch):
    """The same noise on both sides."""
    for name, scheduler, scaled in (
            ("euler_ancestral", diffusers.EulerAncestralDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), True),
            ("dpmpp_2m_sde", diffusers.DPMSolverMultistepScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                algorithm_type="sde-dpmsolver++",
                use_karras_sigmas=True), False)):
        x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(5))
        want, levels = run_scheduler(scheduler, x, 10, scaled)
        g = torch.Generator().manual_seed(0)
        monkeypatch.setattr(t2i.Noise, "like", lambda self, x: torch.randn(x.shape, generator=g))
        start = x * scheduler.init_noise_sigma if scaled else x * (1 + levels[0]**2) ** 0.5
        got = t2i.SAMPLERS[name](lambda x, s: x - float(s) * net_eps(x, float(s)), start, levels, space="ve")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)      # float32 states of size 15


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_and_its_grid_equal_diffusers(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(9)
    grid = t2i.sigmas("sd3", 9, shift_by=shift)
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=0, atol=1e-6)
    x = want = torch.randn(2, 5)
    for k, t in enumerate(scheduler.timesteps):
        want = scheduler.step(torch.tanh(want) + float(scheduler.sigmas[k]), t, want).prev_sample
    got = t2i.SAMPLERS["euler"](lambda x, s: x - s * (torch.tanh(x) + s), x, grid, space="flow")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_apg_equals_diffusers():
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
    c, u = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    for eta, norm in ((0.0, 0.0), (0.5, 3.0), (1.0, 0.0)):
        want = normalized_guidance(c, u, 5.0, None, eta, norm, True)  # the paper's form: c + (w - 1) update
        torch.testing.assert_close(t2i.guide(c, u, 6.0, "apg", eta=eta, norm=norm), want, rtol=1e-4,
                                   atol=1e-4)


def test_apg_momentum_equals_diffusers():
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
    theirs, ours = MomentumBuffer(-0.75), t2i.Momentum(-0.75)
    for _ in range(3):
        c, u = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
        want = normalized_guidance(c, u, 5.0, theirs, 0.0, 3.0, True)
        torch.testing.assert_close(t2i.guide(c, u, 6.0, "apg", norm=3.0, momentum=ours), want, rtol=1e-4,
                                   atol=1e-4)


# --- a whole pipeline ----------------------------------------------------


def tiny_t5():
    """A T5 v1.1 encoder of random weights; its vocabulary is that of `t5_folder`."""
    return randomise(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=1200, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)), 0.2, 3)


def tiny_vae(**factors):
    """A VAE of random weights in the way SD3 and FLUX have them: no convolutions around the latents."""
    vae = randomise(diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64,
        latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, use_quant_conv=False, use_post_quant_conv=False,
        **factors), 0.1, 4)
    vae.decoder.conv_out.weight.data *= 3                    # enough contrast to compare
    return vae


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory, clip_folder, t5_folder):
    """A tiny StableDiffusion3Pipeline with random weights, saved in the public layout."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder, model_max_length=77)
    t5_tokenizer = transformers.T5Tokenizer.from_pretrained(t5_folder)
    encoders = [randomise(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=act, projection_dim=20, eos_token_id=tokenizer.eos_token_id)), 0.2, seed)
        for width, act, seed in ((16, "quick_gelu", 1), (24, "gelu", 2))]
    t5 = tiny_t5()
    vae = tiny_vae(scaling_factor=1.5305, shift_factor=0.0609)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=randomise(sd3_transformer(), 0.1, 5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=t5, tokenizer=tokenizer,
        tokenizer_2=tokenizer, tokenizer_3=t5_tokenizer)
    folder = tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


PROMPTS = ["a lighthouse at dusk, oil on canvas", "def forward(self, x):"]


def ours_like(folder, **flags):
    cfg = t2i.Config(model=str(folder), device="cpu", steps=8, cfg=5.0, negative="blurry", **flags)
    return cfg, t2i.load_model(cfg, torch.device("cpu"))


def psnr(a, b):
    return float(10 * np.log10(255**2 / max(((a.astype(float) - b.astype(float)) ** 2).mean(), 1e-12)))


@pytest.mark.parametrize("offload", ["none", "block"])
def test_the_sd3_pipeline_makes_the_same_pictures(sd3_folder, offload):
    folder, pipe = sd3_folder
    cfg, model = ours_like(folder, offload=offload)
    noise = t2i.start_noise(0, (2, 4, 8, 12))
    want = pipe(PROMPTS, negative_prompt=["blurry"] * 2, num_inference_steps=8, guidance_scale=5.0, height=64,
                width=96,
                latents=noise, output_type="np").images
    made = t2i.generate(model, PROMPTS, cfg, torch.device("cpu"), [0, 1], (96, 64))
    assert made.std() > 10                                   # a picture, not a flat field
    assert psnr(made, (want * 255).round()) > 50


def test_quantised_and_t5_free_loading_of_the_pipeline(sd3_folder):
    folder, _ = sd3_folder
    cfg, model = ours_like(folder)
    base = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64))
    cfg, small = ours_like(folder, quantise="int8")
    near = t2i.generate(small, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64))
    cfg, without = ours_like(folder, t5=False)
    far = t2i.generate(without, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64))
    assert 25 < psnr(base, near) and psnr(base, far) < psnr(base, near)


def test_the_pixart_pipeline_makes_the_same_pictures(tmp_path, t5_folder):
    transformer = randomise(diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=48, use_additional_conditions=False))
    t5 = randomise(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=1200, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False)), 0.2)
    vae = randomise(diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4))
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(t5_folder), text_encoder=t5, vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02,
                                                        use_karras_sigmas=True,
                                                        final_sigmas_type="zero", euler_at_final=False))
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise = t2i.start_noise(0, (1, 4, 8, 8))
    want = pipe(PROMPTS[:1], negative_prompt="", num_inference_steps=10, guidance_scale=4.5, height=64,
                width=64,
                latents=noise, output_type="np", use_resolution_binning=False, clean_caption=False).images
    cfg = t2i.Config(model=str(tmp_path), device="cpu", steps=10, cfg=4.5)
    model = t2i.load_model(cfg, torch.device("cpu"))
    # the pipeline's scheduler cleans captions to lower case before T5
    made = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64))
    assert made.std() > 10 and psnr(made, (want * 255).round()) > 50


def test_skip_layer_guidance_makes_the_same_pictures(sd3_folder):
    folder, pipe = sd3_folder
    noise = t2i.start_noise(0, (1, 4, 8, 8))
    plain = dict(num_inference_steps=15, guidance_scale=4.0, height=64, width=64, output_type="np")
    cfg, model = ours_like(folder, skip_layers=(0.0, 1.0), skip_scale=20.0)
    cfg = dataclasses.replace(cfg, steps=15, cfg=4.0)
    want = pipe(PROMPTS[:1], negative_prompt="blurry", latents=noise, skip_guidance_layers=[0, 1],
                skip_layer_guidance_scale=20.0, **plain).images
    without = pipe(PROMPTS[:1], negative_prompt="blurry", latents=noise, **plain).images
    made = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64))
    assert psnr(made, (want * 255).round()) > 50 > psnr(made, (without * 255).round())


def test_an_inpainting_checkpoint_makes_the_same_pictures(sd3_folder):
    """SD3 with 33 input channels: latents, mask, latents of the picture with the hole grey."""
    folder, pipe = sd3_folder
    vae = randomise(diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64,
        latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609), 0.1, 4)
    vae.decoder.conv_out.weight.data *= 3
    net = randomise(sd3_transformer(in_channels=33, out_channels=16), 0.1, 5)
    parts = {k: v for k, v in pipe.components.items() if k not in ("transformer", "vae")}
    painter = diffusers.StableDiffusion3InpaintPipeline(transformer=net, vae=vae, **parts)
    where = folder.parent / "sd3-inpaint"
    painter.save_pretrained(where)
    painter.set_progress_bar_config(disable=True)
    init = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    init[8:40, 8:40] = (200, 30, 30)
    mask = np.zeros((64, 64), bool)
    mask[10:45, 5:37] = True
    cfg, model = ours_like(where, strength=1.0)
    image = t2i.to_images(init[None])
    hole = torch.from_numpy(mask).float()[None, None]
    held = model.vae.encode(image * (1 - hole))[0]           # both sides: the mean, not a draw
    noise = t2i.start_noise(0, (1, 16, 8, 8))
    want = painter(PROMPTS[0], negative_prompt="blurry", image=image, mask_image=hole,
                   masked_image_latents=held,
                   num_inference_steps=8, guidance_scale=5.0, height=64, width=64, strength=1.0,
                   latents=noise,
                   output_type="latent").images
    # this pipeline of diffusers 0.42.1 decodes without adding the VAE's shift, as its text-to-image one does
    want = vae.decode(want / 1.5305 + 0.0609).sample.permute(0, 2, 3, 1).numpy().clip(-1, 1) / 2 + 0.5
    made = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64), init, mask)[0]
    assert model.net.extra == 17 and made[mask].std() > 10
    assert psnr(made[mask], (want[0] * 255).round()[mask]) > 50 and np.array_equal(made[~mask], init[~mask])
    whole = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (64, 64))
    assert whole.std() > 10                                  # without a picture all of it is repainted


def flux_parts(clip_folder, t5_folder, dev, **sizes):
    """Components of a tiny FLUX pipeline with random weights."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder, model_max_length=77)
    clip_text = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id)), 0.2, 1)
    t5 = tiny_t5()
    vae = tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
    return dict(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0,
                                                            use_dynamic_shifting=dev),
        vae=vae, text_encoder=clip_text, tokenizer=tokenizer, text_encoder_2=t5,
        tokenizer_2=transformers.T5Tokenizer.from_pretrained(t5_folder),
        transformer=randomise(flux_transformer(dev, **sizes), 0.1, 5))


@pytest.mark.parametrize("dev", [True, False])
def test_the_flux_pipeline_makes_the_same_pictures(tmp_path, clip_folder, t5_folder, dev):
    pipe = diffusers.FluxPipeline(**flux_parts(clip_folder, t5_folder, dev))
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise = t2i.start_noise(0, (1, 4, 8, 12))
    packed = pipe._pack_latents(noise, 1, 4, 8, 12)
    want = pipe(PROMPTS[0], num_inference_steps=6, guidance_scale=3.5, height=64, width=96, latents=packed,
                max_sequence_length=512 if dev else 256, output_type="np").images
    cfg = t2i.Config(model=str(tmp_path), device="cpu", steps=6)
    made = t2i.generate(t2i.load_model(cfg, torch.device("cpu")), PROMPTS[:1], cfg, torch.device("cpu"), [0],
                        (96, 64))
    assert made.std() > 10 and psnr(made, (want * 255).round()) > 50


def means_of(vae):
    """diffusers draws latents of the pictures a model reads; here both sides take their mean."""
    encode = vae.encode

    def mean(x, **kw):
        out = encode(x, **kw)
        out.latent_dist.sample = lambda generator=None: out.latent_dist.mean
        return out
    vae.encode = mean


def test_flux_fill_makes_the_same_pictures(tmp_path, clip_folder, t5_folder):
    """A token reads noise, the masked picture's latents and all 256 pixels of its mask."""
    pipe = diffusers.FluxFillPipeline(**flux_parts(clip_folder, t5_folder, True, in_channels=16 + 16 + 256))
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    means_of(pipe.vae)
    rng = np.random.default_rng(0)
    init, mask = rng.integers(0, 255, (64, 96, 3)).astype(np.uint8), np.zeros((64, 96), bool)
    mask[10:45, 5:37] = mask[3, 90] = True
    noise = t2i.start_noise(0, (1, 4, 8, 12))
    want = pipe(PROMPTS[0], image=t2i.to_images(init[None]),
                mask_image=torch.from_numpy(mask).float()[None, None],
                num_inference_steps=6, guidance_scale=30.0, height=64, width=96, strength=1.0,
                latents=pipe._pack_latents(noise, 1, 4, 8, 12), output_type="np").images[0]
    cfg = t2i.Config(model=str(tmp_path), device="cpu", steps=6, distilled=30.0, strength=1.0)
    model = t2i.load_model(cfg, torch.device("cpu"))
    made = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (96, 64), init, mask)[0]
    assert model.net.extra == 4 + 64 and made[mask].std() > 10
    assert psnr(made[mask], (want * 255).round()[mask]) > 50 and np.array_equal(made[~mask], init[~mask])


def test_flux_control_makes_the_same_pictures(tmp_path, clip_folder, t5_folder):
    pipe = diffusers.FluxControlPipeline(**flux_parts(clip_folder, t5_folder, True, in_channels=32))
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    means_of(pipe.vae)
    edges = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    Image.fromarray(edges).save(tmp_path / "edges.png")
    noise = t2i.start_noise(0, (1, 4, 8, 12))
    want = pipe(PROMPTS[0], control_image=t2i.to_images(edges[None]), num_inference_steps=6,
                guidance_scale=10.0,
                height=64, width=96, latents=pipe._pack_latents(noise, 1, 4, 8, 12),
                output_type="np").images[0]
    cfg = t2i.Config(model=str(tmp_path), device="cpu", steps=6, distilled=10.0)
    model = t2i.load_model(cfg, torch.device("cpu"))
    with pytest.raises(run.UserError, match="give it with --control"):
        t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (96, 64))
    cfg = dataclasses.replace(cfg, control=str(tmp_path / "edges.png"))
    made = t2i.generate(model, PROMPTS[:1], cfg, torch.device("cpu"), [0], (96, 64))[0]
    assert model.net.extra == 4 and made.std() > 10 and psnr(made, (want * 255).round()) > 50


def test_mimic_with_its_schedules_equals_the_published_formula():
    """The sums of sd-dynamic-thresholding for the whole run: both scales move, AD about the mean."""
    from common.t2i.guidance import scheduled
    g, at = torch.Generator().manual_seed(0), np.linspace(1, 0.1, 6)
    cfg, mimic = scheduled(9.0, "half_cosine_down", 3.0, 1.0, at), scheduled(6.0, "linear_up", 1.0, 1.0, at)
    for step, sigma in enumerate(at):
        c, u = (torch.randn(2, 4, 5, 6, generator=g) for _ in "cu")
        strong = 3 + 6 * np.cos(step / 5)
        weak = 1 + 5 * step / 5
        T, M = (u + w * (c - u) for w in (strong, weak))
        T, M = T.flatten(2), M.flatten(2)
        mean = T.mean(2, keepdim=True)
        m = (M - M.mean(2, keepdim=True)).abs().amax(2, keepdim=True)
        s = torch.maximum(m, (T - mean).abs().amax(2, keepdim=True))
        want = ((T - mean).clamp(-s, s) / s * m + mean).view_as(c)
        got = t2i.guide(c, u, cfg(sigma), "mimic", mimic=mimic(sigma))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_long_prompts_are_windows_of_the_public_encoder(sd3_folder):
    folder, pipe = sd3_folder
    _, model = ours_like(folder)
    encode, long = model.encode, "a lighthouse at dusk, " * 30
    tokens = encode.tokenizer(t2i.CLIPTokenizer, "tokenizer").tokens(long)
    n = encode.windows([long])
    assert n > 1 and encode([long])["text"].shape[1] == n * 77 + 256
    states, _ = encode.clip([long, "short"], 1, "", n)
    from common.t2i import prompts
    rows = prompts.windows(long, encode.tokenizer(t2i.CLIPTokenizer, "tokenizer"))
    assert [i for r in rows for i, _ in r] == tokens and max(map(len, rows)) <= 75
    start, end = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id
    ids = torch.full((n, 77), pipe.tokenizer.pad_token_id)
    for k, row in enumerate(rows):
        ids[k, :len(row) + 2] = torch.tensor([start, *(i for i, _ in row), end])
    want = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(states[0], want.flatten(0, 1), rtol=0, atol=1e-4)
    short = encode(["short"], n)                             # alone or beside a long one: the same
    torch.testing.assert_close(encode([long, "short"])["text"][1], short["text"][0], rtol=0, atol=1e-5)


def test_prompt_weights_scale_the_distance_from_the_empty_prompt(sd3_folder):
    folder, _ = sd3_folder
    _, model = ours_like(folder)
    encode = model.encode
    plain, empty = encode(["a red door"])["text"][0], encode([""])["text"][0]
    for text in ("a (red:1) door", "(a red door:1.0)"):
        got = encode([text])["text"][0]
        # T5 cuts words at the brackets
        torch.testing.assert_close(got[:77], plain[:77], rtol=0, atol=1e-5)
    strong = encode(["(a red door:1.5)"])["text"][0]
    count = len(encode.tokenizer(t2i.CLIPTokenizer, "tokenizer").tokens("a red door"))
    torch.testing.assert_close(strong[1:count + 1], empty[1:count + 1] + 1.5 * (plain - empty)[1:count + 1],
                               rtol=0, atol=1e-4)
    torch.testing.assert_close(strong[count + 1:77], plain[count + 1:77], rtol=0, atol=1e-5)


def test_the_text_cache_changes_nothing_and_encodes_once(sd3_folder, tmp_path):
    folder, _ = sd3_folder
    cfg, model = ours_like(folder)
    want = t2i.generate(model, PROMPTS, cfg, torch.device("cpu"), [0, 1], (64, 64))
    cfg, model = ours_like(folder, cache=str(tmp_path))
    assert np.array_equal(t2i.generate(model, PROMPTS, cfg, torch.device("cpu"), [0, 1], (64, 64)), want)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3   # two prompts and the negative one
    cfg, model = ours_like(folder, cache=str(tmp_path))
    assert np.array_equal(t2i.generate(model, PROMPTS, cfg, torch.device("cpu"), [0, 1], (64, 64)), want)
    assert not model.encode.loaded                           # no encoder was opened
