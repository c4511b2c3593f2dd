"""The Stable Diffusion safety checker, from its public files: CLIP's image tower, 17 concepts, 3 special
ones.

Parameter names are those of the Hugging Face files, with one or two vision_model. before them.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.t2i.clip import layers, read_config
from common.t2i.weights import Checkpoint, Outline, fill


# --- image tower ---------------------------------------------------------


class CLIPVision(nn.Module):
    """net(images [B, 3, S, S], normalised) -> class token after the last norm [B, D]."""

    def __init__(self, width=1024, depth=24, heads=16, hidden=4096, patch=14, tokens=257, quick=True):
        super().__init__()
        self.embeddings = nn.ModuleDict(dict(patch_embedding=nn.Conv2d(3, width, patch, patch, bias=False),
                                             position_embedding=nn.Embedding(tokens, width)))
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)      # sic
        self.encoder = layers(width, depth, heads, hidden, quick)

    def forward(self, image):
        e = self.embeddings
        x = e["patch_embedding"](image).flatten(2).transpose(1, 2)
        x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], 1) + e["position_embedding"].weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


# --- safety checker ------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class SafetyChecker(nn.Module):
    """The Stable Diffusion safety checker: checker(images) -> list[bool]; checker.scores() also explains.

    An image is flagged when its embedding is nearer to a concept than that concept's threshold; `offset` (say
    -0.07 lenient .. +0.07 strict) moves all thresholds. Images: PIL, or uint8 arrays [H, W, 3]."""

    def __init__(self, width=1024, depth=24, heads=16, hidden=4096, patch=14, tokens=257, project=768,
                 concepts=17, special=3):
        super().__init__()
        self.vision_model = CLIPVision(width, depth, heads, hidden, patch, tokens)
        self.visual_projection = nn.Linear(width, project, bias=False)
        for name, n in (("concept_embeds", concepts), ("special_care_embeds", special)):
            self.register_buffer(name, torch.zeros(n, project))
            self.register_buffer(f"{name}_weights", torch.zeros(n))
        self.size = patch * round((tokens - 1) ** 0.5)

    @classmethod
    def load(cls, source, dtype=torch.float32):
        files = Checkpoint.open(source).renamed(lambda n: n.replace("vision_model.vision_model.",
                                                                    "vision_model."))
        if "concept_embeds" not in files.shapes:
            raise files.wrong_family("a safety checker", "concept_embeds")
        width, _, patch, _ = files.shapes["vision_model.embeddings.patch_embedding.weight"]
        config = read_config(source).get("vision_config", {})
        with Outline():
            net = cls(width, files.count("vision_model.encoder.layers."),
                      config.get("num_attention_heads", max(width // 64, 1)),
                      files.shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0], patch,
                      files.shapes["vision_model.embeddings.position_embedding.weight"][0],
                      files.shapes["visual_projection.weight"][0], files.shapes["concept_embeds"][0],
                      files.shapes["special_care_embeds"][0])
        return fill(net, files, dtype, ignore=("vision_model.embeddings.position_ids",)).eval()

    def preprocess(self, image):
        """Shortest side to S (bicubic), centre crop S x S, normalise -> [3, S, S]."""
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        image, S = image.convert("RGB"), self.size
        w, h = image.size
        w, h = (S, int(S * h / w)) if w <= h else (int(S * w / h), S)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        left, top = (w - S) // 2, (h - S) // 2
        pixels = np.asarray(image.crop((left, top, left + S, top + S)), np.float32) / 255
        return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)

    @torch.no_grad()
    def embed(self, images):
        x = torch.stack([self.preprocess(i) for i in images]).to(self.visual_projection.weight)
        return self.visual_projection(self.vision_model(x)).float()

    def scores(self, images, offset=0.0):
        """[dict(special [3], concept [17], flagged)]: cosine minus threshold, rounded to 3 digits as
        published."""
        e = F.normalize(self.embed(images))
        special, concept = ((e @ F.normalize(v.float()).T - w.float()).tolist() for v, w in (
            (self.special_care_embeds, self.special_care_embeds_weights),
            (self.concept_embeds, self.concept_embeds_weights)))
        rows = []
        for s_row, c_row in zip(special, concept):
            adjust, s_out = offset, []
            for s in s_row:                                  # one hit makes all later comparisons stricter
                s_out.append(round(s + adjust, 3))
                adjust = 0.01 + offset if s_out[-1] > 0 else adjust
            c_out = [round(c + adjust, 3) for c in c_row]
            rows.append(dict(special=s_out, concept=c_out, flagged=any(c > 0 for c in c_out)))
        return rows

    def forward(self, images, offset=0.0):
        return [row["flagged"] for row in self.scores(images, offset)]
