"""Public text-to-image models from local files: which family a file is, and its sizes.

DiT (class-conditional), PixArt, SD3 / SD3.5 and FLUX.1, in the spelling of their authors or of diffusers.
Everything is read off tensor names and shapes; nothing is downloaded. The transformer class comes from the
script.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common.files import read_json
from common.flags import UserError
from common.t2i import memory
from common.t2i.conditioning import Conditioning
from common.t2i.flux import Flux
from common.t2i.mmdit import MMDiT
from common.t2i.textcache import TextCache, fingerprint
from common.t2i.weights import Checkpoint, Outline, fill
from common.vae import AutoencoderKL

SINGLE = "model.diffusion_model."                            # prefix inside single-file releases


@dataclass
class Public:
    """A loaded model: net, vae, and encode(prompts) -> conditioning of net as a dict of tensors."""
    family: str
    net: torch.nn.Module
    vae: torch.nn.Module
    encode: object
    schedule: str
    prediction: str
    defaults: dict = field(default_factory=dict)             # sampler, grid, cfg, steps, size, shift


def family_of(files):
    """'dit', 'pixart', 'sd3', 'flux' or a UserError that says what the file holds."""
    signs = {"double_blocks.0.img_attn.qkv.weight": "flux",
             "single_transformer_blocks.0.proj_mlp.weight": "flux",
             "blocks.0.cross_attn.q_linear.weight": "pixart", "adaln_single.linear.weight": "pixart",
             "y_embedder.embedding_table.weight": "dit", "joint_blocks.0.x_block.attn.qkv.weight": "sd3",
             "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": "dit",
             "transformer_blocks.0.attn.add_q_proj.weight": "sd3"}
    for sign, family in signs.items():
        if sign in files.shapes:
            return family
    raise files.wrong_family("a DiT, PixArt, SD3 or FLUX transformer",
                             "joint_blocks.0.x_block.attn.qkv.weight")


# --- DiT and PixArt ------------------------------------------------------

RENAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."), (r"adaln_single\.linear", "t_block.1"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"adaln_single\.emb\.resolution_embedder", "csize_embedder"),
    (r"adaln_single\.emb\.aspect_ratio_embedder", "ar_embedder"),
    (r"(csize|ar)_embedder\.linear_1", r"\1_embedder.mlp.0"),
    (r"(csize|ar)_embedder\.linear_2", r"\1_embedder.mlp.2"),
    (r"caption_projection\.linear_([12])", r"y_embedder.y_proj.fc\1"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"norm1\.linear", "adaLN_modulation.1"), (r"proj_out_1", "final_layer.adaLN_modulation.1"),
    (r"proj_out(_2)?\.", "final_layer.linear."), (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn1\.to_([qkv])", r"attn.\1"),
    (r"attn2\.to_out\.0", "cross_attn.proj"), (r"attn2\.to_q", "cross_attn.q_linear"),
    (r"attn2\.to_([kv])", r"cross_attn.\1"), (r"ff\.net\.0\.proj", "mlp.fc1"), (r"ff\.net\.2", "mlp.fc2"),
    (r"transformer_blocks", "blocks"))


def from_diffusers(files):
    """diffusers' spelling of DiT and PixArt -> the authors'. Their DiT repeats the embedders in every
    block."""
    def rule(name):
        if re.match(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.", name):
            return None
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        return name
    files = files.renamed(rule)
    groups = {}
    for n in files.shapes:
        if m := re.match(r"(.*\.attn\.)q\.(weight|bias)$", n):
            groups[f"{m[1]}qkv.{m[2]}"] = [f"{m[1]}{k}.{m[2]}" for k in "qkv"]
        if m := re.match(r"(.*\.cross_attn\.)k\.(weight|bias)$", n):
            groups[f"{m[1]}kv_linear.{m[2]}"] = [f"{m[1]}{k}.{m[2]}" for k in "kv"]
    return files.joined(groups)


def dit_settings(files, config, positions):
    """Constructor arguments of the script's DiT for a public DiT or PixArt, off the shapes."""
    shapes = files.shapes
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = config.get("num_attention_heads") or {1152: 16}.get(width, max(width // 64, 1))
    found = dict(channels=channels, out=shapes["final_layer.linear.weight"][0] // patch**2, patch=patch,
                 width=width,
                 heads=heads, depth=files.count("blocks."))
    if "y_embedder.embedding_table.weight" in shapes:
        return dict(found, arch="label", classes=shapes["y_embedder.embedding_table.weight"][0] - 1)
    null = shapes.get("y_embedder.y_embedding", (0,))[0]
    sample = config.get("sample_size")
    stretch = config.get("interpolation_scale") or max((sample or 64) // 64, 1)
    base = sample // patch if sample else 0
    if "pos_embed" in shapes:                                # the stored table tells base and stretch
        base, stored = int(shapes["pos_embed"][1] ** 0.5), files.get("pos_embed")[0]
        fits = {s: float((positions(width, base, base, base, s) - stored).abs().max())
                for s in (1, 2, 0.5, 4)}
        stretch = min(fits, key=fits.get)
    return dict(found, arch="cross", mod="adaln_single", text_width=shapes["y_embedder.y_proj.fc1.weight"][1],
                null_tokens=null, base=base, stretch=stretch, micro="csize_embedder.mlp.0.weight" in shapes)


def load_dit(files, DiT, positions, dtype, config, **storage):
    files = from_diffusers(files) if files.count("transformer_blocks.") else files
    with Outline():
        net = DiT(**dit_settings(files, config, positions))
    return fill(net, files, dtype, ignore=("pos_embed",), skip=memory.KEEP, **storage).eval()


# --- the whole model -----------------------------------------------------


def open_transformer(path, DiT, positions, dtype, quantise=None):
    """A transformer folder or file of any family -> (family, net, Checkpoint)."""
    path = Path(path)
    files = Checkpoint.open(path)
    if any(n.startswith(SINGLE) for n in files.shapes):
        files = files.under(SINGLE)
    config = _json(path / "config.json") if path.is_dir() else {}
    family = family_of(files)
    if family == "sd3":
        return family, MMDiT.load(files, dtype, config.get("num_attention_heads", 0),
                                  quantise=quantise), files
    if family == "flux":
        return family, Flux.load(files, dtype, config, quantise=quantise), files
    return family, load_dit(files, DiT, positions, dtype, config, quantise=quantise), files


def _json(path):
    return read_json(path) if path.is_file() else {}


def open_model(path, DiT, positions, dtype, device, *, text="", vae="", offload="none", quantise=None,
               t5=True, t5_length=0, cache="", distilled=3.5):
    """A diffusers folder, a single-file SD3 or a transformer file -> Public. vae, text: folders or files for
    parts that the model does not hold; cache: a folder that keeps text embeddings."""
    path = Path(path)
    part = path / "transformer" if (path / "transformer").is_dir() else path
    family, net, files = open_transformer(part, DiT, positions, dtype, quantise)
    single = any(n.startswith(SINGLE) for n in Checkpoint.open(part).shapes)
    config = _json(part / "config.json") if part.is_dir() else {}
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    where = Path(vae) if vae else path / "vae" if (path / "vae").is_dir() else path if single else None
    if where is None:
        raise UserError(f"{path} holds no VAE; give one with --vae FILE")
    ae = AutoencoderKL.load(where,
                            dtype=torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    ae = ae.to(memory_format=torch.channels_last)            # a fifth faster on CPU; the values stay
    dev = hasattr(net, "guidance_in")                        # FLUX.1-dev; schnell has no guidance input
    encode = Conditioning(family, path, text, dtype, device, offload, net, quantise, t5,
                          t5_length or (512 if dev else 256), distilled)
    if cache and family != "dit":
        known = [fingerprint(r) for r in encode.roots], family, t5, encode.t5_length, distilled, quantise
        encode = TextCache(cache, [str(k) for k in known], encode)
    size = (config.get("sample_size") or (64 if family == "pixart" else 128)) * ae.factor
    if family == "dit":
        side = int(files.shapes.get("pos_embed", (1, 256, 1))[1] ** 0.5) * net.patch
        size = (config.get("sample_size") or side) * ae.factor
    defaults = dict(sd3=dict(sampler="euler", grid="sd3", cfg=5.0, steps=28,
                             shift=scheduler.get("shift", 3.0)),
                    flux=dict(sampler="euler", grid="flow", cfg=1.0, steps=28 if dev else 4,
                              shift=flux_shift if scheduler.get("use_dynamic_shifting", dev) else 1.0),
                    pixart=dict(sampler="dpmpp_2m", grid="karras", cfg=4.5, steps=20),
                    dit=dict(sampler="dpmpp_2m", grid="karras", cfg=4.0, steps=30))[family]
    schedule, prediction = ("flow", "flow") if family in ("sd3", "flux") else ("linear", "eps")
    return Public(family, net, ae, encode, schedule, prediction, dict(defaults, size=size))


def flux_shift(tokens):
    """FLUX.1-dev's time shift: its logarithm runs from 0.5 at 256 image tokens to 1.15 at 4096."""
    return float(np.exp(0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5)))


def describe(path):
    """What a file or folder holds, one line a part: family, settings, parameters."""
    lines = []
    path = Path(path)
    parts = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    for part in [p for p in parts if list(p.glob("*.safetensors")) or list(p.glob("*.bin"))] or [path]:
        files = Checkpoint.open(part)
        count = sum(int(np.prod(s)) for s in files.shapes.values())
        inner = files.under(SINGLE) if any(n.startswith(SINGLE) for n in files.shapes) else files
        try:
            kind = family_of(inner)
        except UserError:
            marks = dict(clip="embeddings.token_embedding", t5="DenseReluDense.wi_0", vae="decoder.conv_in",
                         safety="concept_embeds")
            kind = next((k for k, m in marks.items() if any(m in n for n in files.shapes)), "unknown")
        first = next(iter(files.shapes.items()), ("-", ()))
        lines.append(f"{part}: {kind}, {len(files.shapes)} tensors, {count:,} numbers, "
                     f"first {first[0]} {list(first[1])}")
    return "\n".join(lines)
