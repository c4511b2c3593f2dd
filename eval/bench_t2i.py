"""SD3 pipelines, two programs: time and peak memory of dit_t2i.py against diffusers, same weights and noise.

    python -m eval.bench_t2i --json out.json [--rounds 3] [--small]

Two cases: without T5 (its tokens are zeros; ours attends to one of them, weighted) and with a small T5.
Random weights in the public folder layout, written once. Each round runs either side in a process of its own,
in alternating order: load, make one picture to warm up, then time two and keep the faster. Ratios are medians
over rounds of (theirs / ours); memory is the peak resident set of the process, imports and all, and what lies
above the imports. The pictures must agree (PSNR above 50 dB). Needs the parity environment.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from eval import _torchvision

PROMPT, NEGATIVE, STEPS, SCALE = "a lighthouse at dusk, oil on canvas", "blurry", 8, 5.0


def small_t5(folder):
    """A T5 encoder with random weights, and a unigram tokenizer learnt from this repository's text."""
    import sentencepiece
    import transformers

    Path(folder).mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(Path(__file__).parents[1] / "dit_t2i.py"), model_prefix=str(Path(folder, "spiece")),
        vocab_size=900, model_type="unigram", normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2)
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=1200, d_model=256, d_kv=32, d_ff=512, num_layers=4, num_heads=8,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    return encoder, transformers.T5Tokenizer.from_pretrained(folder)


def write_pipeline(folder, small, with_t5=False):
    """A StableDiffusion3Pipeline with random weights, with or without T5 (both sides then use zeros)."""
    _torchvision.lenient()
    import diffusers
    import transformers

    from common.t2i.clip import END, START, byte_symbols
    base = list(byte_symbols().values())
    vocabulary = Path(folder, "words")
    vocabulary.mkdir(parents=True)
    words = base + [c + "</w>" for c in base] + [START, END]
    (vocabulary / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77)
    torch.manual_seed(0)
    text = [transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, projection_dim=width, eos_token_id=len(words) - 1)) for width in (64, 128)]
    t5 = small_t5(Path(folder, "words5")) if with_t5 else (None, None)
    depth, heads, widths = (2, 2, (16, 32, 32, 32)) if small else (8, 6, (32, 64, 128, 128))
    net = diffusers.SD3Transformer2DModel(
        sample_size=32, in_channels=4, out_channels=4, num_layers=depth, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=256, caption_projection_dim=64 * heads,
        pooled_projection_dim=192, pos_embed_max_size=32)
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=8, sample_size=256, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=text[0], text_encoder_2=text[1], text_encoder_3=t5[0], tokenizer=tokenizer,
        tokenizer_2=tokenizer, tokenizer_3=t5[1]).save_pretrained(folder)


def ours(folder, size):
    import dit_t2i as t2i
    after_import = resident_mb()
    cfg = t2i.Config(model=str(folder), device="cpu", steps=STEPS, cfg=SCALE, negative=NEGATIVE)
    model = t2i.load_model(cfg, torch.device("cpu"))
    return after_import, lambda: t2i.generate(model, [PROMPT], cfg, torch.device("cpu"), [0], (size, size))[0]


def theirs(folder, size):
    _torchvision.lenient()
    import diffusers
    import transformers  # noqa: F401

    import dit_t2i as t2i
    after_import = resident_mb()
    absent = dict(feature_extractor=None, image_encoder=None)
    if not Path(folder, "text_encoder_3").is_dir():
        absent |= dict(text_encoder_3=None, tokenizer_3=None)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    noise = t2i.start_noise(0, (1, 4, size // 8, size // 8))

    def make():
        out = pipe(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=SCALE,
                   height=size, width=size, latents=noise, output_type="np").images[0]
        return (out * 255).round().astype(np.uint8)
    return after_import, make


def resident_mb():
    """What the process holds now (Linux), to tell the model from the imports."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(side, folder, size, out):
    torch.set_num_threads(1)
    after_import, make = dict(ours=ours, theirs=theirs)[side](folder, size)
    make()
    walls, cpus = [], []
    for _ in range(2):                                       # the less disturbed of two
        wall, cpu = time.perf_counter(), time.process_time()
        picture = make()
        walls.append(time.perf_counter() - wall), cpus.append(time.process_time() - cpu)
    facts = dict(wall_s=min(walls), cpu_s=min(cpus), peak_mb=peak_mb(),
                 above_import_mb=peak_mb() - after_import)
    np.savez(out, picture=picture, facts=json.dumps(facts))


def measure(rounds, small, with_t5):
    size, runs = 128 if small else 256, dict(ours=[], theirs=[])
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "model")
        write_pipeline(folder, small, with_t5)
        pictures = {}
        for k in range(rounds):
            for side in ("ours", "theirs")[::1 if k % 2 else -1]:
                out = Path(work, f"{side}.npz")
                subprocess.run([sys.executable, "-m", "eval.bench_t2i", "--child", side, "--folder",
                                str(folder), "--size", str(size), "--json", str(out)], check=True)
                with np.load(out) as saved:
                    runs[side].append(json.loads(str(saved["facts"])))
                    pictures[side] = saved["picture"].astype(float)
    error = ((pictures["ours"] - pictures["theirs"]) ** 2).mean()
    psnr = float(10 * np.log10(255**2 / max(error, 1e-12)))
    cases = {}
    for key, what in (("wall_s", "seconds a picture"), ("cpu_s", "CPU seconds a picture"),
                      ("peak_mb", "peak memory of the process, MB"),
                      ("above_import_mb", "peak memory above the imports, MB")):
        a, b = ([r[key] for r in runs[side]] for side in ("ours", "theirs"))
        ratio = statistics.median(y / x for x, y in zip(a, b))
        name = f"{key}_t5" if with_t5 else key
        setting = f"SD3 pipeline {'with' if with_t5 else 'without'} T5, {size} px, {STEPS} steps"
        cases[name] = dict(what=f"{setting}: {what}", ratio=ratio, goal=1.0,
                          met=ratio >= 1.0, agree=psnr > 50, psnr_db=psnr, ours=statistics.median(a),
                          theirs=statistics.median(b), rounds=rounds)
    return cases


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the bench itself")
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        return child(flags.child, flags.folder, flags.size, flags.json)
    try:
        cases = measure(flags.rounds, flags.small, False) | measure(flags.rounds, flags.small, True)
    except ImportError as error:
        cases = {"sd3_pipeline": dict(skipped=f"not installed: {error.name}")}
    Path(flags.json).write_text(json.dumps(dict(cases=cases), indent=1))
    for name, row in cases.items():
        print(name, json.dumps(row))


if __name__ == "__main__":
    main()
