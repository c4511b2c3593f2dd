"""The JAX release of Drifting Models (github.com/lambertae/drifting) as PyTorch tensors: names and layouts.

An artifact is a folder with `metadata.json` (the model's configuration) and `ema_params.msgpack` (its
weights). Which module the configuration describes is the script's business; here Flax paths are matched with
parameter names.
"""

import json
import os

import torch

from common.drift import flax_msgpack
from common.run import UserError

DENSE = "TorchLinear_{}/Dense_0"
ROOT = "LightningDiT_0"
LINEAR = {"alpha_mlp.0": "TimestepEmbedder_0/" + DENSE.format(0),
          "alpha_mlp.2": "TimestepEmbedder_0/" + DENSE.format(1),
          "patch_in": f"{ROOT}/" + DENSE.format(0), "context_in": f"{ROOT}/" + DENSE.format(1),
          "ada_out": f"{ROOT}/FinalLayer_0/" + DENSE.format(0),
          "patch_out": f"{ROOT}/FinalLayer_0/" + DENSE.format(1)}
DIRECT = {"class_embed.weight": "Embed_0/embedding", "alpha_norm.weight": "RMSNorm_0/weight",
          "norm_out.weight": f"{ROOT}/FinalLayer_0/RMSNorm_0/weight", "pos": f"{ROOT}/pos_embed",
          "context": f"{ROOT}/cls_embed"}
IN_BLOCK = {"norm1": "RMSNorm_0", "norm2": "RMSNorm_1", "attn.q_norm": "Attention_0/q_norm",
            "attn.k_norm": "Attention_0/k_norm", "attn.qkv": "Attention_0/" + DENSE.format(0),
            "attn.out": "Attention_0/" + DENSE.format(1), "mlp.w1": "SwiGLUFFN_0/" + DENSE.format(0),
            "mlp.w3": "SwiGLUFFN_0/" + DENSE.format(1), "mlp.w2": "SwiGLUFFN_0/" + DENSE.format(2),
            "ada": DENSE.format(0)}


def generator_path(name):
    """Parameter name of Generator -> Flax path; None for the style tables, which are many tensors there."""
    if name == "style_embed.weight":
        return None
    if name in DIRECT:
        return DIRECT[name]
    module, leaf = name.rsplit(".", 1)
    norm = "norm" in module
    if module.startswith("blocks."):
        _, i, module = module.split(".", 2)
        path = f"{ROOT}/blocks_{i}/{IN_BLOCK[module]}"
    else:
        path = LINEAR[module]
    return path + ("/bias" if leaf == "bias" else "/weight" if norm else "/kernel")


def mae_path(name):
    """Parameter name of MAE -> Flax path."""
    module, leaf = name.rsplit(".", 1)
    parts = module.split(".")
    norm = parts[-1].startswith("gn") or parts[0] == "norms" or parts[-1] == "norm"
    if parts[0] == "stages":
        norm = norm or parts[-2:] == ["skip", "1"]
        last = {"0": "proj_conv", "1": "proj_gn"}[parts[4]] if parts[3] == "skip" else parts[3]
        path = f"encoder/stages_{parts[1]}/layers_{parts[2]}/{last}"
    elif parts[0] in ("conv1", "gn1"):
        path = f"encoder/{parts[0]}"
    elif parts[0] == "norms":
        path = f"encoder/layer{int(parts[1]) + 1}_norm"
    elif parts[0] == "ups":
        up = ("up43", "up32", "up21", "up10")[int(parts[1])]
        path = "/".join(["decoder", up, *("concat_norm_fn" if p == "norm" else p for p in parts[2:])])
    else:
        path = "fc" if parts[0] == "fc" else "decoder/" + "/".join(parts)
    return path + ("/bias" if leaf == "bias" else "/scale" if norm else "/kernel")


def describe(folder):
    """metadata.json -> ("generator" or "mae", constructor arguments, the metadata). Raises UserError."""
    try:
        with open(os.path.join(folder, "metadata.json")) as file:
            meta = json.load(file)
        config = dict(meta["model_config"])
        kind = "generator" if "hidden_size" in config else "mae"
        return kind, generator_sizes(config) if kind == "generator" else mae_sizes(config), meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not an official artifact: metadata.json: {error!r}") from None


def generator_sizes(config):
    """`model_config` of a released generator -> arguments of Generator. Refuses switches that Generator does
    not have.
    """
    c = dict(dict(mlp_ratio=4.0, noise_classes=0, noise_coords=1, n_cls_tokens=0, num_classes=1001,
                  use_qknorm=False, use_swiglu=False, use_rope=False, use_rmsnorm=False, attn_fp32=True,
                  input_size=32, patch_size=2), **config)
    if (not c["use_swiglu"] or c["mlp_ratio"] != 4.0 or c["cond_dim"] != c["hidden_size"]
            or c["in_channels"] != c["out_channels"] or c["use_qknorm"] and not c["use_rmsnorm"]):
        raise ValueError("needs SwiGLU, mlp_ratio 4, cond_dim = hidden_size, in = out channels, "
                         "RMSNorm with QK-norm")
    names = dict(size="input_size", channels="in_channels", patch="patch_size", width="hidden_size",
                 depth="depth", heads="num_heads", classes="num_classes", context="n_cls_tokens",
                 style_codes="noise_classes")
    whole = {ours: whole_number(c, theirs) for ours, theirs in names.items()}
    if (whole["size"] % max(1, whole["patch"]) or whole["width"] % max(1, 2 * whole["heads"])
            or whole["width"] % 4):
        raise ValueError("sizes do not divide")
    tables = whole_number(c, "noise_coords") if c["noise_classes"] else 0
    return dict(whole, style_tables=tables, qk_norm=c["use_qknorm"], rope=c["use_rope"],
                rms_norm=c["use_rmsnorm"], attn_fp32=c["attn_fp32"])


def mae_sizes(config):
    """`model_config` of a released feature encoder -> arguments of MAE."""
    c = dict(dict(num_classes=1000, input_patch_size=1), **config)
    blocks = tuple(c["layers"])
    if len(blocks) != 4 or not all(type(n) is int and 0 < n < 100 for n in blocks):
        raise ValueError(f"layers {blocks}")
    names = dict(channels="in_channels", width="base_channels", classes="num_classes",
                 patch="input_patch_size")
    return dict({ours: whole_number(c, theirs) for ours, theirs in names.items()}, blocks=blocks)


def whole_number(config, name):
    if type(config[name]) is not int or not 0 <= config[name] < 100_000:
        raise ValueError(f"{name} is {config[name]!r}")
    return config[name]


def load(folder, net, kind):
    """Fill net (on the meta device) with the artifact's weights, float32, in eval mode.

    Every tensor must be there in the right shape, and none may be left over. Raises UserError.
    """
    path_of = generator_path if kind == "generator" else mae_path
    try:
        flat = flax_msgpack.read(os.path.join(folder, "ema_params.msgpack"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an official artifact: {error}") from None
    flat = {key.removeprefix("params/"): value for key, value in flat.items()}
    state = {}
    for name, param in net.named_parameters():
        path = path_of(name)
        paths = [path] if path else [f"noise_embeds_{i}/embedding" for i in range(net.style_tables)]
        missing = [p for p in paths if p not in flat]
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing")
        tensors = [to_torch(flat.pop(p).float(), p) for p in paths]
        tensor = tensors[0] if path else torch.cat(tensors)
        if tensor.ndim == param.ndim + 1 and len(tensor) == 1:  # pos and context are [1, L, D] there
            tensor = tensor[0]
        if tensor.shape != param.shape:
            raise UserError(f"{folder}: {paths[0]} has shape {tuple(tensor.shape)}, metadata.json implies "
                            f"{tuple(param.shape)}")
        state[name] = tensor.contiguous()
    if flat:
        raise UserError(f"{folder}: {next(iter(flat))} has no place in this model")
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval()


def to_torch(tensor, path):
    """Dense kernels (in, out) -> (out, in); conv kernels HWIO -> OIHW; everything else as it is."""
    if not path.endswith("/kernel"):
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor
