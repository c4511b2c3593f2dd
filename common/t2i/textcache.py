"""Texts encoded once: embeddings on disk, and a frozen public encoder as the text side of training."""
import hashlib
import json
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.flags import UserError
from common.t2i.clip import CLIPTextEncoder, CLIPTokenizer
from common.t2i.t5 import T5Encoder, T5Tokenizer
from common.t2i.weights import Checkpoint


class TextCache:
    """encode(list[str]) -> dict of tensors [B, ...], where each text goes through the encoder once.

    One file a text, named by the hash of the text and of ident, so caches of different encoders never mix.
    Tokens that mask leaves out are not kept: they come back as zeros, which no attention reads. A damaged
    file is made again."""

    def __init__(self, folder, ident, encode, batch=16):
        self.folder, self.ident, self.encode, self.batch = Path(folder), ident, encode, batch

    def __getattr__(self, name):                             # what else the encoder knows: ledger, windows
        return getattr(self.__dict__["encode"], name)

    def path(self, text, size):
        name = hashlib.sha256(json.dumps([self.ident, size, text]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def fill(self, texts, size=None):
        """Encode what is not on disk yet -> how many texts that were."""
        new = [t for t in dict.fromkeys(texts) if not self.path(t, size).is_file()]
        for i in range(0, len(new), self.batch):
            part = new[i:i + self.batch]
            coded = self.encode(part) if size is None else self.encode(part, size)
            for k, text in enumerate(part):
                row = {name: v[k].cpu() for name, v in coded.items()}
                if "mask" in row:
                    row["text"] = row["text"][:int(row["mask"].sum())]
                path = self.path(text, size)
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_suffix(f".{os.getpid()}")  # ranks may fill one folder together
                save_file({name: v.contiguous() for name, v in row.items()}, draft)
                draft.rename(path)
        return len(new)

    def read(self, text, size):
        try:
            row = load_file(self.path(text, size))
        except SafetensorError:
            self.path(text, size).unlink()
            self.fill([text], size)
            row = load_file(self.path(text, size))
        if "mask" in row:
            row["text"] = F.pad(row["text"], (0, 0, 0, len(row["mask"]) - len(row["text"])))
        return row

    def __call__(self, texts, device="cpu"):
        size = self.encode.windows(texts) if hasattr(self.encode, "windows") else None
        self.fill(texts, size)
        rows = [self.read(t, size) for t in texts]
        return {name: torch.stack([r[name] for r in rows]).to(device) for name in rows[0]}


def fingerprint(folder):
    """Names, sizes and times of the weight files below a folder: enough to tell encoders apart."""
    kinds = (".safetensors", ".bin", ".pt", ".model")
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in kinds)
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


class PublicText:
    """texts -> dict(text [B, L, E], mask [B, L]) by the T5 or CLIP in a folder (text_encoder/, tokenizer/).

    The encoder comes into memory with the first text that is not cached and leaves with `free`."""

    def __init__(self, folder, length, device):
        self.folder, self.length, self.device, self.parts = Path(folder), length, device, None
        inner = self.folder / "text_encoder"
        self.encoder_at = inner if inner.is_dir() else self.folder
        shapes = Checkpoint.open(self.encoder_at).shapes
        self.t5 = any("DenseReluDense" in n for n in shapes)
        sign = r"shared\.weight|embed_tokens\.weight" if self.t5 else r"token_embedding\.weight"
        found = [s for n, s in shapes.items() if re.search(sign, n)]
        if not found:
            raise UserError(f"{folder} holds no T5 or CLIP text encoder: "
                            "expected text_encoder/ and tokenizer/")
        self.width = found[0][1]

    def cache(self, folder):
        return TextCache(folder, [fingerprint(self.encoder_at), self.length], self)

    def free(self):
        self.parts = None

    @torch.no_grad()
    def __call__(self, texts):
        if self.parts is None:
            at = self.folder / "tokenizer" if (self.folder / "tokenizer").is_dir() else self.folder
            kinds = (T5Tokenizer, T5Encoder) if self.t5 else (CLIPTokenizer, CLIPTextEncoder)
            self.parts = kinds[0](at), kinds[1].load(self.encoder_at).to(self.device)
        tokenizer, encoder = self.parts
        if self.t5:
            ids, mask = (v.to(self.device) for v in tokenizer(texts, self.length))
            return dict(text=encoder(ids, mask).half(), mask=mask)
        ids = tokenizer(texts).to(self.device)
        ends = (ids == tokenizer.end).int().argmax(1)        # the padding after the end says nothing
        mask = torch.arange(ids.shape[1], device=ids.device)[None] <= ends[:, None]
        return dict(text=encoder(ids)["last"].half(), mask=mask)
