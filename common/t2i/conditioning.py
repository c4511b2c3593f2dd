"""Prompts -> what the transformer of a public family reads: which encoders, which outputs, joined how."""
from pathlib import Path

import torch
import torch.nn.functional as F

from common.flags import UserError
from common.t2i import prompts as weighted
from common.t2i.clip import LENGTH, CLIPTextEncoder, CLIPTokenizer
from common.t2i.memory import Residency, placed
from common.t2i.t5 import EOS, PAD, T5Encoder, T5Tokenizer
from common.t2i.weights import Checkpoint

IN_SINGLE = {1: "text_encoders.clip_l.transformer.", 2: "text_encoders.clip_g.transformer.",
             3: "text_encoders.t5xxl.transformer."}


class Conditioning:
    """prompts -> dict of tensors, one row a prompt. An encoder is loaded when needed and, with offload, freed
    after use (block: its layers pass through the device one by one).

    Prompts may be longer than CLIP's 75 tokens and may hold weights (common/t2i/prompts.py)."""

    def __init__(self, family, folder, text, dtype, device, offload, net, quantise=None, t5=True,
                 t5_length=256, distilled=3.5):
        self.family, self.dtype, self.device, self.net, self.t5_length = family, dtype, device, net, t5_length
        self.roots = [Path(p) for p in (text, folder) if p]
        self.offload, self.quantise, self.t5, self.distilled = offload, quantise, t5, distilled
        self.loaded, self.tokenizers, self.ledger = {}, {}, Residency()

    def __call__(self, prompts, windows=None):
        if self.family == "dit":
            return dict(label=self.labels(prompts))
        with torch.inference_mode():
            if self.family == "sd3":
                return self.sd3(prompts, windows or self.windows(prompts))
            return dict(pixart=self.pixart, flux=self.flux)[self.family](prompts)

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

    # --- where the parts are ---------------------------------------------

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
        with placed(encoder, self.device, self.offload, self.ledger, encoder.blocks):
            return call(encoder)

    def tokenizer(self, kind, name):
        if name not in self.tokenizers:
            folder = self.find(name)
            if folder is None:
                raise UserError(f"no {name} in {', '.join(map(str, self.roots))}; "
                                "give its folder with --text")
            self.tokenizers[name] = kind(folder)
        return self.tokenizers[name]

    # --- what they give ---------------------------------------------------

    def windows(self, prompts):
        """CLIP windows of the longest prompt, where the family reads CLIP token by token."""
        if self.family != "sd3":
            return 1
        tokenizer = self.tokenizer(CLIPTokenizer, "tokenizer")
        return max(len(weighted.windows(p, tokenizer)) for p in prompts)

    def clip(self, prompts, number, tail, windows):
        """-> (penultimate states [B, 77 windows, D], outputs of the first window). Empty windows fill up."""
        tokenizer = self.tokenizer(CLIPTokenizer, "tokenizer" + tail)
        rows = [r for p in prompts for r in (weighted.windows(p, tokenizer) + [[]] * windows)[:windows]]
        plain = [[]] if any(w != 1 for r in rows for _, w in r) else []
        ids, weights = weighted.to_ids(rows + plain, tokenizer.start, tokenizer.end, tokenizer.pad, LENGTH)
        out = self.run(CLIPTextEncoder, number, "text_encoder" + tail, lambda e: e(ids.to(self.device)))
        states = out["penultimate"][:len(rows)]
        if plain:
            states = weighted.weigh(states, weights[:len(rows)].to(states.device), out["penultimate"][-1])
        first = {k: v[:len(rows):windows] for k, v in out.items()}
        return states.unflatten(0, (-1, windows)).flatten(1, 2), first

    def t5_states(self, prompts, tail, length, masked=False):
        """-> (states [B, length, D], mask); masked: padding is hidden from the encoder too."""
        tokenizer = self.tokenizer(T5Tokenizer, "tokenizer" + tail)
        rows = [weighted.weighted_tokens(p, tokenizer.tokens) for p in prompts]
        for row in rows:
            tokenizer.report([i for i, _ in row], length)
        plain = [[]] if any(w != 1 for r in rows for _, w in r) else []
        rows = [r[:length - 1] for r in rows] + plain
        ids, weights = weighted.to_ids(rows, None, EOS, PAD, length)
        mask = torch.arange(length)[None] <= torch.tensor([len(r) for r in rows])[:, None]
        ids, mask = ids.to(self.device), mask.to(self.device)
        out = self.run(T5Encoder, 3, "text_encoder" + tail, lambda e: e(ids, mask if masked else None))
        if plain:
            out, mask = weighted.weigh(out[:-1], weights[:-1].to(out.device), out[-1]), mask[:-1]
        return out, mask

    def sd3(self, prompts, windows):
        """[CLIP-L | bigG, padded to the width of T5; T5 or zeros] and the two pooled vectors, joined."""
        made = [self.clip(prompts, 1, "", windows), self.clip(prompts, 2, "_2", windows)]
        width = self.net.context_embedder.in_features
        text = torch.cat([states for states, _ in made], -1)
        text = F.pad(text, (0, width - text.shape[-1]))
        found = dict(pooled=torch.cat([first["projected"] for _, first in made], -1))
        if self.t5 and (self.find("text_encoder_3") or not self.find("text_encoder_2")):
            t5, _ = self.t5_states(prompts, "_3", self.t5_length)
        elif text.device.type == "cpu":
            # Without T5 its tokens are zeros, all alike and without position, so they stay alike: one token
            # that attention counts t5_length times gives the same output. (A mask costs CUDA its flash.)
            t5 = text.new_zeros(len(prompts), 1, width)
            found["last_counts"] = torch.full((len(prompts),), self.t5_length)
        else:                                                # trained with each encoder dropped at times
            t5 = text.new_zeros(len(prompts), self.t5_length, width)
        return dict(found, text=torch.cat([text, t5.to(text)], 1))

    def pixart(self, prompts):
        held = getattr(self.net.y_embedder, "y_embedding", None)
        text, mask = self.t5_states(prompts, "", 120 if held is None else held.shape[0], masked=True)
        return dict(text=text, mask=mask)

    def flux(self, prompts):
        """T5 without a mask, and CLIP-L's pooled vector before its projection."""
        _, first = self.clip(prompts, 1, "", 1)
        text, _ = self.t5_states(prompts, "_2", self.t5_length)
        found = dict(text=text, pooled=first["pooled"])
        if hasattr(self.net, "guidance_in"):
            found["guidance"] = torch.full((len(prompts),), self.distilled, device=text.device)
        return found
