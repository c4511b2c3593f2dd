"""Whose weights are these? Files, key spellings, sizes and scales of the autoencoders of common/vae.py."""

import re
import sys

from safetensors import SafetensorError, safe_open

from common.files import read_json
from common.run import UserError

# latent channels, scale, shift of the published models
FAMILIES = {"sd1": (4, 0.18215, 0.0), "sdxl": (4, 0.13025, 0.0), "sd3": (16, 1.5305, 0.0609),
            "flux": (16, 0.3611, 0.1159)}
# parts of whole checkpoints that tell the family
CHECKPOINTS = {"joint_blocks.": "sd3", "double_blocks.": "flux", "conditioner.embedders.": "sdxl",
               "cond_stage_model.": "sd1"}
IGNORED = re.compile(r"(loss|model_ema)\.|.*position_ids$|logit_scale$")
OLD_NAMES = [(r"(attentions\.\d+)\.query\.", r"\1.to_q."), (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
             (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
             (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0.")]
LDM_NAMES = [(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
             (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
             (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
             (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
             (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
             (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
             (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
             (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
             (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out.")]


def find_weights(path):
    """A file, a diffusers VAE folder or a pipeline folder -> (weights file, its config or {})."""
    if path.is_file():
        return path, {}
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not path.exists():
        raise UserError(f"no VAE weights at {path}")
    usual, found = folder / "diffusion_pytorch_model.safetensors", sorted(folder.glob("*.safetensors"))
    if not usual.exists() and len(found) != 1:
        raise UserError(f"{folder} holds {len(found)} .safetensors files and no {usual.name}; name the file")
    listing = folder / "config.json"
    config = read_json(listing) if listing.exists() else {}
    return usual if usual.exists() else found[0], config


def open_weights(file):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"cannot read {file} as safetensors: {e}") from None


def canonical_names(keys, file):
    """Keys of a file -> ({diffusers name: name in the file}, key style, family a whole checkpoint tells)."""
    told = next((family for part, family in CHECKPOINTS.items() if any(part in key for key in keys)), None)
    prefixes = [p for p in ("first_stage_model.", "vae.") if any(k.startswith(p + "decoder.") for k in keys)]
    prefix = prefixes[0] if prefixes else ""
    mine = [key for key in keys if key.startswith(prefix) and not IGNORED.match(key[len(prefix):])]
    ldm = any(".mid.block_1." in key for key in mine)
    top = max((int(at) for key in mine for at in re.findall(r"encoder\.down\.(\d+)\.", key)), default=0)
    names = {}
    for key in mine:
        new = key[len(prefix):]
        for pattern, replacement in LDM_NAMES if ldm else OLD_NAMES:
            new = re.sub(pattern, replacement, new)
        if ldm:                                         # LDM counts the decoder's levels from the image down
            new = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{top - int(m[1])}", new)
        if new in names:
            raise UserError(f"{file}: {key} and {names[new]} are both {new}")
        names[new] = key
    return names, prefix + ("ldm" if ldm else "diffusers"), told


def detect_sizes(shapes, file, config):
    """Constructor arguments from the tensors' shapes; only the number of groups needs the config (32 without
    one)."""
    try:
        levels = 1 + max(int(at) for n in shapes for at in re.findall(r"^encoder\.down_blocks\.(\d+)\.", n))
        widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
        z, channels = shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_in.weight"][1]
    except (KeyError, ValueError, IndexError):
        first = ", ".join(sorted(shapes)[:3])
        raise UserError(f"{file} holds no KL autoencoder; its first tensors are {first}") from None
    blocks = len({at for n in shapes for at in re.findall(r"^encoder\.down_blocks\.0\.resnets\.(\d+)\.", n)})
    groups = config.get("norm_num_groups", 32)
    if any(width % groups for width in widths):
        raise UserError(f"{file}: widths {widths} do not divide into {groups} groups")
    return dict(z=z, widths=widths, blocks=blocks, groups=groups, channels=channels,
                attention=any(".attentions." in n for n in shapes), quant="quant_conv.weight" in shapes)


def choose_scale(z, family, scale, shift, config, told, style, file):
    """(scale, shift) by argument, family, config, the rest of the checkpoint, or assumption, in this
    order."""
    if family and (family not in FAMILIES or FAMILIES[family][0] != z):
        fits = [name for name, row in FAMILIES.items() if row[0] == z]
        raise UserError(f"{file} has {z} latent channels and is no {family} autoencoder; these fit: {fits}")
    if not family and not config.get("scaling_factor") and scale is None:
        family = told or {4: "sd1", 16: "flux" if style == "ldm" else "sd3"}.get(z)
        if not family or FAMILIES[family][0] != z:
            raise UserError(f"{file}: no family has {z} latent channels; give its scale")
        why = "by the rest of the checkpoint" if told else "assumed; its shapes fit others too"
        print(f"note: {file.name} read as {family}, scale {FAMILIES[family][1]} ({why})", file=sys.stderr)
    if family:
        found = FAMILIES[family][1:]
    else:
        found = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    return found[0] if scale is None else scale, found[1] if shift is None else shift


def check_names(expected, shapes, file):
    """Raise UserError unless the names are the same and the shapes equal up to trailing ones (LDM's 1x1
    attention)."""
    def squeeze(shape):
        shape = list(shape)
        while len(shape) > 2 and shape[-1] == 1 and shape[-2] == 1:
            shape = shape[:-2]
        return shape

    problems = {"missing": sorted(expected.keys() - shapes.keys()),
                "unexpected": sorted(shapes.keys() - expected.keys()),
                "misshapen": [f"{n} {shapes[n]}" for n in expected if n in shapes
                              and squeeze(expected[n].shape) != squeeze(shapes[n])]}
    lines = [f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
             for kind, names in problems.items() if names]
    if lines:
        raise UserError(f"{file} does not fit the autoencoder its sizes tell; " + "; ".join(lines))


def origin(path):
    """Repository and revision, where the path lies in a Hugging Face cache:
    models--ORG--NAME/snapshots/REVISION."""
    parts = path.absolute().parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            return dict(repo=part[len("models--"):].replace("--", "/"), revision=parts[i + 2])
    return dict(repo=None, revision=None)
