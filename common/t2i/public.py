"""Public text-to-image models from local files: which family a file is, its sizes, its text conditioning.

DiT (class-conditional), PixArt and SD3 / SD3.5, in the spelling of their authors or of diffusers. Everything
is read off tensor names and shapes; nothing is downloaded. The transformer class comes from the script.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common.t2i.clip import CLIPTextEncoder, CLIPTokenizer
from common.files import read_json
from common.flags import UserError
from common.t2i.mmdit import MMDiT
from common.t2i.t5 import T5Encoder, T5Tokenizer
from common.vae import AutoencoderKL
from common.t2i.memory import Residency, on
from common.t2i.weights import Checkpoint, fill

SINGLE = "model.diffusion_model."                            # prefix inside single-file releases
IN_SINGLE = {1: "text_encoders.clip_l.transformer.", 2: "text_encoders.clip_g.transformer.",
             3: "text_encoders.t5xxl.transformer."}


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
    """'dit', 'pixart', 'sd3' or a UserError that says what the file holds."""
    signs = {"blocks.0.cross_attn.q_linear.weight": "pixart", "adaln_single.linear.weight": "pixart",
             "y_embedder.embedding_table.weight": "dit", "joint_blocks.0.x_block.attn.qkv.weight": "sd3",
             "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": "dit",
             "transformer_blocks.0.attn.add_q_proj.weight": "sd3"}
    for sign, family in signs.items():
        if sign in files.shapes:
            return family
    raise files.wrong_family("a DiT, PixArt or SD3 transformer", "joint_blocks.0.x_block.attn.qkv.weight")


# --- DiT and PixArt ------------------------------------------------------

RENAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."), (r"adaln_single\.linear", "t_block.1"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
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
                null_tokens=null, base=base, stretch=stretch)


def load_dit(files, DiT, positions, dtype, config, **storage):
    files = from_diffusers(files) if files.count("transformer_blocks.") else files
    if "csize_embedder.mlp.0.weight" in files.shapes or any("resolution_embedder" in n for n in files.shapes):
        raise UserError(f"{files.path}: PixArt-alpha 1024 conditions on picture size: not supported; "
                        "use PixArt-sigma or PixArt-alpha 512")
    with torch.device("meta"):
        net = DiT(**dit_settings(files, config, positions))
    return fill(net, files, dtype, ignore=("pos_embed",), skip=KEEP, **storage).eval()


# --- text ----------------------------------------------------------------


class Conditioning:
    """Prompts -> conditioning of one family. An encoder is loaded when needed and, with offload, freed after
    use."""

    def __init__(self, family, folder, text, dtype, device, offload, net, quantise=None, t5=True,
                 t5_length=256):
        self.family, self.dtype, self.device, self.net, self.t5_length = family, dtype, device, net, t5_length
        self.roots = [Path(p) for p in (text, folder) if p]
        self.offload, self.quantise, self.t5 = offload, quantise, t5
        self.loaded, self.tokenizers, self.ledger = {}, {}, Residency()

    def __call__(self, prompts):
        if self.family == "dit":
            return dict(label=self.labels(prompts))
        with torch.inference_mode():
            return self.sd3(prompts) if self.family == "sd3" else self.pixart(prompts)

    def labels(self, prompts):
        """Class numbers; the empty prompt is the extra class 'none'."""
        table = self.net.y_embedder.embedding_table.num_embeddings
        try:
            rows = [int(p) if p.strip() else table - 1 for p in prompts]
        except ValueError:
            raise UserError("this model takes class numbers as prompts, e.g. --prompt 207") from None
        if not all(0 <= r < table for r in rows):
            raise UserError(f"class numbers go from 0 to {table - 2}")
        return torch.tensor(rows, device=self.device)

    def find(self, name):
        """The folder `name` (text_encoder, tokenizer_2 ...) in --text or in the model."""
        return next((r / name for r in self.roots if (r / name).is_dir()), None)

    def part(self, loader, number, name):
        source = self.find(name)
        single = next((r for r in self.roots if r.is_file()), None)
        prefix = ""
        if source is None and single is not None:
            source, prefix = single, IN_SINGLE[number]
            if not any(n.startswith(prefix) for n in Checkpoint.open(single).shapes):
                source = None
        if source is None:
            raise UserError(f"no {name} in {', '.join(map(str, self.roots)) or 'the model'}; "
                            "give the folder that holds it with --text")
        dtype = torch.bfloat16 if loader is T5Encoder and self.dtype == torch.float16 else self.dtype
        return loader.load(source, dtype, prefix, quantise=self.quantise)

    def run(self, loader, number, name, call):
        """call(encoder) with the encoder on the device; kept for the next prompt unless offloading."""
        encoder = self.loaded.get(name) or self.part(loader, number, name)
        if self.offload == "none":
            self.loaded[name] = encoder.to(self.device)
            return call(encoder)
        with on(encoder, self.device, self.ledger):
            return call(encoder)

    def tokenizer(self, kind, name):
        if name not in self.tokenizers:
            folder = self.find(name)
            if folder is None:
                raise UserError(f"no {name} in {', '.join(map(str, self.roots))}; give its folder with --text")
            self.tokenizers[name] = kind(folder)
        return self.tokenizers[name]

    def sd3(self, prompts):
        """[CLIP-L | bigG, padded to the width of T5; T5 or zeros] and the two pooled vectors, joined."""
        states, pooled = [], []
        for number in (1, 2):
            tail = "" if number == 1 else f"_{number}"
            ids = self.tokenizer(CLIPTokenizer, "tokenizer" + tail)(prompts).to(self.device)
            out = self.run(CLIPTextEncoder, number, "text_encoder" + tail, lambda e: e(ids))
            states.append(out["penultimate"])
            pooled.append(out["projected"])
        width = self.net.context_embedder.in_features
        text = torch.cat(states, -1)
        text = torch.nn.functional.pad(text, (0, width - text.shape[-1]))
        if self.t5 and (self.find("text_encoder_3") or not self.find("text_encoder_2")):
            ids, _ = self.tokenizer(T5Tokenizer, "tokenizer_3")(prompts, self.t5_length)
            t5 = self.run(T5Encoder, 3, "text_encoder_3", lambda e: e(ids.to(self.device)))
        else:                                                # trained with each encoder dropped at times
            t5 = text.new_zeros(len(prompts), self.t5_length, width)
        return dict(text=torch.cat([text, t5.to(text)], 1), pooled=torch.cat(pooled, -1))

    def pixart(self, prompts):
        length = self.net.y_embedder.y_embedding.shape[0] if hasattr(self.net.y_embedder,
                                                                     "y_embedding") else 120
        ids, mask = self.tokenizer(T5Tokenizer, "tokenizer")(prompts, length)
        ids, mask = ids.to(self.device), mask.to(self.device)
        return dict(text=self.run(T5Encoder, 3, "text_encoder", lambda e: e(ids, mask)), mask=mask)


# --- the whole model -----------------------------------------------------


KEEP = "final|embed"                                       # never quantised: small, first and last


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
    return family, load_dit(files, DiT, positions, dtype, config, quantise=quantise), files


def _json(path):
    return read_json(path) if path.is_file() else {}


def open_model(path, DiT, positions, dtype, device, *, text="", vae="", offload="none", quantise=None,
               t5=True,
               t5_length=256):
    """A diffusers folder, a single-file SD3 or a transformer file -> Public. vae, text: folders or files for
    parts that the model does not hold."""
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
    encode = Conditioning(family, path, text, dtype, device, offload, net, quantise, t5, t5_length)
    size = (config.get("sample_size") or (128 if family == "sd3" else 64)) * ae.factor
    if family == "dit":
        side = int(files.shapes.get("pos_embed", (1, 256, 1))[1] ** 0.5) * net.patch
        size = (config.get("sample_size") or side) * ae.factor
    defaults = dict(sd3=dict(sampler="euler", grid="sd3", cfg=5.0, steps=28,
                             shift=scheduler.get("shift", 3.0)),
                    pixart=dict(sampler="dpmpp_2m", grid="karras", cfg=4.5, steps=20),
                    dit=dict(sampler="dpmpp_2m", grid="karras", cfg=4.0, steps=30))[family]
    schedule, prediction = ("flow", "flow") if family == "sd3" else ("linear", "eps")
    return Public(family, net, ae, encode, schedule, prediction, dict(defaults, size=size))


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
