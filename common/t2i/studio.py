"""The commands around a text-to-image model: prompts in, PNG files with their recipes out; look into weight
files.

No science here: pictures come from the script's generate(model, prompts, cfg, device, seeds, shape, ...).
"""
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import draw, run
from common.t2i import captions, memory, pictures, public, scenes
from common.flags import UserError
from common.t2i.safety import SafetyChecker
from common.sealed import save_weights
from common.t2i.weights import Checkpoint

RECIPE = ("model", "vae", "text", "prompt", "negative", "seed", "steps", "sample_steps", "shape", "sampler",
          "grid", "shift", "cfg", "guidance", "interval", "mimic", "phi", "init", "strength", "strength_mode",
          "mask", "feather", "crop", "repaint", "control", "apg", "cfg_mode", "cfg_min", "mimic_mode",
          "mimic_min",
          "power", "distilled", "skip_layers", "skip_scale", "dtype", "quantise", "t5")


def repeat(cfg):
    """cfg with everything that --recipe IMAGE recorded; --model given by hand wins over the recorded one."""
    kept = pictures.read_recipe(cfg.recipe)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items() if k in RECIPE}
    if kept.get("cfg_end", -1) >= 0:                         # what --cfg-mode linear_down was called once
        values |= dict(cfg_mode="linear_down", cfg_min=kept["cfg_end"])
    values["model"] = cfg.model or kept.get("model") or kept.get("run", "")
    return dataclasses.replace(cfg, **values, count=1, prompts="")


def shape_of(cfg, unit, default):
    """(W, H) from --shape WxH, else of --init rounded down, else the default; multiples of unit or a
    UserError."""
    shape = (default, default)
    if cfg.shape:
        try:
            w, h = (int(v) for v in cfg.shape.lower().split("x"))
        except ValueError:
            raise UserError(f"--shape {cfg.shape}: expected WxH, e.g. 512x768") from None
        shape = w, h
    elif cfg.init:
        h, w = pictures.read_rgb(cfg.init).shape[:2]
        shape = w // unit * unit, h // unit * unit
    if min(shape) < unit or any(v % unit for v in shape):
        near = "x".join(str(max(1, v // unit) * unit) for v in shape)
        raise UserError(f"{shape[0]}x{shape[1]} does not divide into {unit}-pixel tokens; try --shape {near}")
    return shape


def jobs_of(cfg):
    """[(prompt, seed)]: every prompt of --prompts or --prompt, --count seeds each."""
    texts = [cfg.prompt]
    if cfg.prompts:
        try:
            lines = Path(cfg.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {cfg.prompts}: {error}") from None
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise UserError(f"--prompts {cfg.prompts}: no line in it")
    return [(text, cfg.seed + k) for text in texts for k in range(cfg.count)]


def sample(cfg, model, generate, device):
    """Every job to OUT/samples/NNNN.png, a grid when there are several, and what it cost; -> list of
    pixels."""
    if cfg.mask and not cfg.init:
        raise UserError("--mask needs the picture it belongs to: --init PICTURE")
    if not 0 <= cfg.strength <= 1:
        raise UserError(f"--strength {cfg.strength} is outside [0, 1]")
    shape, init, mask, finish = canvas(cfg, model)
    checker = SafetyChecker.load(cfg.safety) if cfg.safety else None
    if checker is None and model.family != "own":
        print("no safety model loaded; give its folder with --safety", file=sys.stderr)
    facts = dict(torch=torch.__version__, run=str(Path(cfg.out)), sha256=weights_hash(cfg),
                 defaults={k: str(v) for k, v in model.defaults.items()})
    jobs, folder, made = jobs_of(cfg), Path(cfg.out, "samples"), {}
    began, ledger = time.time(), memory.Residency()
    for part in batches(cfg, model, jobs):
        def preview(step, pixels, part=part):
            for k, p in zip(part, pixels):
                pictures.save_png(folder / f"{k:04d}-step{step:03d}.png", p, dict(step=step))
        pixels = generate(model, [jobs[k][0] for k in part], cfg, device, [jobs[k][1] for k in part], shape,
                          init, mask, preview, ledger)
        for k, p in zip(part, pixels):
            (text, seed), p, flag = jobs[k], finish(p), ""
            recipe = {name: getattr(cfg, name) for name in RECIPE} | facts | dict(prompt=text, seed=seed)
            path = folder / f"{k:04d}.png"
            if checker:
                recipe["safety"], = checker.scores([p], cfg.safety_offset)
                if recipe["safety"]["flagged"]:
                    p, flag = pictures.block(p, cfg.safety_action), f"  FLAGGED ({cfg.safety_action})"
            pictures.save_png(path, p, recipe)
            made[k] = p
            print(f"{path}  seed {seed}  {text}{flag}")
    made = [made[k] for k in range(len(jobs))]
    if len(made) > 1:
        draw.save(draw.grid(made, scale=max(1, 96 // made[0].shape[0])), folder / "grid.png")
    ledger.peak = max(ledger.peak, getattr(model.encode, "ledger", ledger).peak)
    print(f"{len(made)} pictures in {time.time() - began:.1f} s; peak memory {memory.peak_gb(device):.2f} GB"
          + (f", offloaded weights on the device at most {ledger.peak / 1e6:.1f} MB" if ledger.peak else ""))
    return made


def demo(cfg, sample):
    """Text to image, image to image, inpainting and a recipe on the model in OUT; UserError where a promise
    does not hold. Pictures go to OUT/demo."""
    caption, out = "a large red circle left of a small blue square", Path(cfg.out, "demo")

    def make(name, **flags):
        return sample(dataclasses.replace(cfg, model=cfg.out, out=str(out / name), **flags))
    grid = make("text", prompt=caption, count=8)
    first = out / "text" / "samples" / "0000.png"
    make("image", prompt=caption.replace("red", "green"), init=str(first), strength=0.7)
    mask = np.zeros(grid[0].shape, np.uint8)
    mask[:, :mask.shape[1] // 2] = 255
    draw.save(mask, out / "mask.png")
    half, = make("inpaint", prompt=caption.replace("red circle", "yellow triangle"), init=str(first),
                mask=str(out / "mask.png"), strength=1.0)
    if not np.array_equal(half[mask == 0], grid[0][mask == 0]):
        raise UserError("inpainting changed pixels outside the mask")
    again, = make("again", recipe=str(first))
    if np.abs(again.astype(int) - grid[0]).max() > 1:        # one grey level: another batch size
        raise UserError("a recipe did not repeat its picture")
    print(f"demo: inpainting kept every byte outside its mask, the recipe repeated its picture; see {out}")


def batches(cfg, model, jobs):
    """Job numbers in batches of --at-once; prompts of different length in windows never share one, so that a
    picture does not depend on its neighbours."""
    length = getattr(model.encode, "windows", lambda texts: 0)
    groups = {}
    for k, (text, _) in enumerate(jobs):
        groups.setdefault(length([text, cfg.negative]), []).append(k)
    return [g[i:i + cfg.at_once] for g in groups.values() for i in range(0, len(g), cfg.at_once)]


def canvas(cfg, model):
    """-> (shape, init, mask, finish): what generate works on, and what turns its picture into the final one.

    --crop: it works on the masked part and a margin, at the model's size; finish pastes it back."""
    unit, default = model.vae.factor * model.net.patch, model.defaults["size"]
    if cfg.crop and not cfg.mask:
        raise UserError("--crop works around a mask: give --mask and --init")
    shape = shape_of(dataclasses.replace(cfg, init="") if cfg.crop else cfg, unit, default)
    if not cfg.crop:
        init = pictures.read_rgb(cfg.init, shape) if cfg.init else None
        return shape, init, pictures.read_mask(cfg.mask, shape) if cfg.mask else None, lambda p: p
    whole = pictures.read_rgb(cfg.init)
    mask = pictures.read_mask(cfg.mask, whole.shape[1::-1])
    box = pictures.region(mask, cfg.crop, shape[0] / shape[1])
    return (shape, pictures.cut(whole, box, shape), pictures.cut(mask, box, shape),
            lambda p: pictures.paste(p, whole, mask, box, cfg.feather))


def labelled(made, texts, count=20):
    """The first pictures of a score with their captions in short; an x before what the judge finds wrong."""
    wrong = [scenes.judge(p, t)["exact"] < 1 for p, t in zip(made[:count], texts)]
    labels = [("x  " if bad else "") + scenes.short(t) for bad, t in zip(wrong, texts)]
    return draw.grid(made[:count], columns=5, labels=labels, scale=6, pad=4)


def weights_hash(cfg):
    path = Path(cfg.model or cfg.out)
    inside = (path / "ema.safetensors", path / "transformer", path)
    return Checkpoint.open(next(p for p in inside if p.exists())).sha256()


def overfit(cfg, net, process, sample, steps, count):
    """Fixed noise first: the loss must fall below 1 % of its start. Then fresh noise, and sampling must
    return the picture that belongs to each caption -> (ratio of losses, pictures returned)."""
    ddp = run.init(cfg.device)
    pixels, _ = scenes.scenes(count, cfg.seed, size=32)
    x0, label = captions.to_images(pixels).to(ddp.device), torch.arange(count, device=ddp.device)
    optim = torch.optim.AdamW(net.to(ddp.device).parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    fixed, losses = (torch.randn_like(x0), torch.rand(count, device=ddp.device)), []
    for step in run.progress(0, 4 * steps, ddp, "overfit"):
        fresh = step > steps
        noise, level = (torch.randn_like(x0), torch.rand_like(fixed[1]) ** 0.5) if fresh else fixed
        x, t, target, _ = process.train_terms(x0, noise, level)
        loss = ((net(x, t, label=label) - target) ** 2).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    with torch.no_grad():
        made = sample(net, x0.shape, label=label)
    nearest = (made[:, None] - x0[None]).flatten(2).norm(dim=2).argmin(1)
    right, ratio = int((nearest == label).sum()), losses[steps - 1] / losses[0]
    path = Path(cfg.out, "overfit.png")
    draw.save(draw.grid(np.concatenate([pixels, captions.to_pixels(made)]), columns=count, scale=3), path)
    print(f"fixed noise: loss {losses[0]:.3f} -> {losses[steps - 1]:.4f} ({100 * ratio:.2f} %); "
          f"sampling returns {right} of {count}: {path}")
    if ratio > 0.01 or right < count:
        raise UserError("overfitting one batch failed: the model cannot learn yet")
    return ratio, right


# --- looking into weights and shapes -------------------------------------


def inspect(cfg):
    """What a file or folder holds, without loading it."""
    if not cfg.model:
        raise UserError("inspect needs --model FILE or FOLDER")
    print(public.describe(cfg.model))


def quantise(cfg, DiT, positions, load):
    """Store a public transformer in 8 bits: OUT/transformer-KIND.safetensors; says its size and error. For a
    run of this program: the error of its outputs on 64 validation scenes."""
    if not (cfg.model and cfg.quantise):
        raise UserError("quantise needs --model TRANSFORMER and --quantise int8 or fp8")
    if Path(cfg.model, "ema.safetensors").is_file():
        full, less = (load(dataclasses.replace(cfg, quantise=q), torch.device("cpu"))
                      for q in ("", cfg.quantise))
        pixels, texts = scenes.scenes(64, cfg.seed + 1, "validation", size=full.size)
        z = (full.vae.encode(captions.to_images(pixels))[0] - full.vae.shift) * full.vae.scale
        for sigma, (out, clean) in memory.errors(full, less, z, texts, cfg.seed).items():
            print(f"sigma {sigma}: velocity {100 * out:.2f} %, denoised latents {100 * clean:.2f} %")
        print(f"memory {memory.size_bytes(less.model) / memory.size_bytes(full.model):.3f} of fp32")
        return
    part = Path(cfg.model, "transformer") if Path(cfg.model, "transformer").is_dir() else Path(cfg.model)
    _, net, _ = public.open_transformer(part, DiT, positions, torch.float32)
    before, errors = memory.size_bytes(net), []
    for linear in [m for m in net.modules() if type(m) is nn.Linear and m.weight.numel() >= memory.LEAST]:
        stored = memory.QLinear.of(linear, cfg.quantise).weight
        errors.append(float((stored - linear.weight).norm() / linear.weight.norm().clamp(min=1e-12)))
    memory.quantise(net, cfg.quantise, skip=memory.KEEP)
    path = Path(cfg.out, f"transformer-{cfg.quantise}.safetensors")
    save_weights(path, net.state_dict(), dict(kind=cfg.quantise))
    print(f"{path}: {before / 1e6:.1f} -> {memory.size_bytes(net) / 1e6:.1f} MB, "
          f"weight error median {100 * float(np.median(errors)):.2f} %")


def kernels(device):
    """Which attention kernels this machine offers, one line."""
    where = torch.device(device)
    if where.type != "cuda":
        return f"attention: scaled_dot_product_attention of torch {torch.__version__} on {where.type}"
    cuda = torch.backends.cuda
    names = dict(flash=cuda.flash_sdp_enabled(), memory_efficient=cuda.mem_efficient_sdp_enabled(),
                 math=cuda.math_sdp_enabled())
    found = ", ".join(n for n, on in names.items() if on)
    return f"attention on CUDA: {found}; flash wants bf16 or fp16 and no mask"


def trace(modules, forward):
    """Shapes that flow through named modules during forward(): prints a table -> [(name, class, in, out)]."""
    rows, handles = [], []

    def note(name):
        def hook(module, inputs, out):
            out = out[0] if isinstance(out, tuple) else out
            rows.append((name, type(module).__name__, list(inputs[0].shape), list(out.shape)))
        return hook
    for name, module in modules.items():
        handles.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    for name, kind, given, out in rows:
        print(f"{name:<20}{kind:<16}{str(given):<20} -> {out}")
    return rows


def shapes(cfg, net, vae):
    """The table of a model trained here: encode a picture, run the transformer, decode."""
    d = net.dit
    parts = {"vae encoder": vae.encoder, "caption": net.text, "patches": d.x_embedder["proj"],
             "time": d.t_embedder, "block 0 attention": d.blocks[0].attn, "block 0": d.blocks[0],
             "final layer": d.final_layer, "transformer": d, "vae decoder": vae.decoder}

    def forward():
        z, _ = vae.encode(torch.zeros(1, 3, cfg.size, cfg.size))
        vae.decode(net(z, torch.zeros(1), torch.ones(1, cfg.text_len, dtype=torch.long)))
    rows = trace(parts, forward)
    print(kernels("cuda" if torch.cuda.is_available() else "cpu"))
    return rows


def noise_strip(cfg, alpha_bar, shift, times=8):
    """Forward diffusion as pictures: a row a schedule, a column a time, and half the log-SNR of each as
    curves."""
    caption = "a large red circle left of a small blue square"
    image = pictures.read_rgb(cfg.init, (96, 96)) if cfg.init else scenes.draw(caption, 0, 96)
    x0 = captions.to_images(image[None])[0].permute(1, 2, 0).numpy()
    noise = np.random.default_rng(cfg.seed).standard_normal(x0.shape)
    rows, curves, u, fine = [], {}, np.linspace(0, 1, times), np.linspace(0.01, 0.99, 99)
    for name in ("linear", "scaled_linear", "cosine"):
        abar = alpha_bar(name).numpy()
        some = abar[(u * 999).round().astype(int)]
        rows += [p * x0 + q * noise for p, q in zip(some**0.5, (1 - some) ** 0.5)]
        curves[name] = fine, 0.5 * np.log(abar / (1 - abar))[(fine * 999).round().astype(int)]
    for k in (1.0, 3.0):
        rows += [(1 - s) * x0 + s * noise for s in shift(u, k)]
        curves[f"flow with shift {k:g}"] = fine, np.log(1 / shift(fine, k) - 1)
    cells = [((r.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8) for r in rows]
    strips = {name: draw.grid(cells[k * times:(k + 1) * times], columns=times)
              for k, name in enumerate(curves)}
    plot = draw.lines(curves, title="half log-SNR", xlabel="time", ylabel="ln(alpha / sigma)")
    path = Path(cfg.out, "noise.png")
    page = draw.sheet({**strips, "": plot}, columns=1, title="noise from time 0 (left) to 1 (right)")
    draw.save(page, path)
    print(path)
    return rows
