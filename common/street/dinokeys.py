"""DINOv3 weights: read the layout of Hugging Face, or Meta's own files under those names; strict about
both."""

from pathlib import Path

import torch

from common import run
from common.files import read_json


def read(path):
    """A Hugging Face directory, a .safetensors file or Meta's .pth -> (state, sizes).

    sizes: (D, depth, hidden, gated, patch, registers, heads or None).  Raises run.UserError when it is no
    DINOv3.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise run.UserError(f"no DINOv3 weights at {path}")
    if files[0].suffix in (".pth", ".pt"):
        state = from_meta(torch.load(files[0], map_location="cpu", weights_only=True))
    else:
        state = {k.removeprefix("model."): v for f in files for k, v in run.load_weights(f)[0].items()}
    config = path / "config.json"
    heads = read_json(config).get("num_attention_heads") if config.is_file() else None
    try:
        D, _, patch, _ = state["embeddings.patch_embeddings.weight"].shape
        hidden = state["layer.0.mlp.up_proj.weight"].shape[0]
        registers = state["embeddings.register_tokens"].shape[1]
    except KeyError as error:
        raise run.UserError(f"{path} is not DINOv3 in Hugging Face layout: no tensor {error}") from None
    depth = len({k.split(".")[1] for k in state if k.startswith("layer.")})
    return state, (D, depth, hidden, "layer.0.mlp.gate_proj.weight" in state, patch, registers, heads)


def check(state, own, path):
    """UserError that lists every missing or unexpected tensor and every wrong shape."""
    faults = [f"missing {k}" for k in own if k not in state]
    faults += [f"unexpected {k}" for k in state if k not in own]
    faults += [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in own
               if k in state and state[k].shape != own[k].shape]
    if faults:
        raise run.UserError(f"{path} does not fit: " + "; ".join(faults))


def from_meta(state):
    """Tensors of Meta's own .pth under Hugging Face names: qkv split in three, the masked key bias
    dropped."""
    names = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
             "mlp.fc1": "mlp.up_proj",
             "mlp.fc2": "mlp.down_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj",
             "mlp.w3": "mlp.down_proj",
             "attn.proj": "attention.o_proj", "blocks.": "layer."}
    top = {"cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens",
           "mask_token": "embeddings.mask_token",
           "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
           "patch_embed.proj.bias": "embeddings.patch_embeddings.bias"}
    out = {}
    for key, value in state.items():
        if key.endswith("bias_mask") or key.startswith(("rope_embed", "local_cls_norm")):
            continue
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3)):
                if not (name == "k" and key.endswith("bias")):
                    out[key.replace("attn.qkv",
                                    f"attention.{name}_proj").replace("blocks.", "layer.")] = part.clone()
            continue
        new = top.get(key, key)
        for old, name in names.items() if new == key else ():
            new = new.replace(old, name)
        out[new] = value.reshape(1, 1, -1) if key == "mask_token" else value
    return out
