"""Roadwork or not: a classifier of street images, from unlabelled adaptation to a bundle with guarantees.

Idea        Adapt a DINOv3 transformer to street images without labels, train it on few labels, then spend the
            rest of the labels on honesty: one split picks, one calibrates, one gives guarantees, and one is
            opened once, at the end.
Paper       DINOv3 2508.10104, ExPLoRA 2406.10973, SimCLR 2002.05709, DoRA 2402.09353, selective conformal
            risk control 2512.12844, learn-then-test 2110.01052; task: NATIX StreetVision, Bittensor subnet 72
Reproduces  no paper number: the data set is the competition's.  Demo numbers: docs/streetvision.md
Run         1 CPU   python streetvision.py run --preset smoke     all phases on street scenes that it draws
            1 GPU   python streetvision.py run --preset vitl --data DATA --model-weights DINOV3_DIR
            then    python streetvision.py evaluate --preset vitl --data DATA
Differs     docs/streetvision.md lists where the original plan is not followed, and why

B batch  N samples  V views of a sample  D width  F features  H heads  L tokens  P patches  C classes
"""

import collections
import copy
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import draw, images, run
from common.files import sha256_file
from common.classify import mcc_sweep
from common.dino import Backbone
from common.run import opt
from common.street import (ablation, augment, bundle, conformal, dinokeys, export, fusion, pipeline, plots,
                           probe, scorecard, selfsup, serving, speed, streets, testreport)
from common.street.adapters import adapt, adapter_tensors, adapted, merge, trainable_report
from common.street.commands import bundle_path, data_folder, demo_data, show_config, splits, validate
from common.street.calibrate import CALIBRATORS, compare_calibrators
from common.street.maccal import MaskedHead, mac_cal
from common.street.paths import ARTIFACTS, Paths  # noqa: F401
from common.street.pipeline import Step
from common.street.selfsup import average_gradients
from common.street.serving import (answers, fuse_features, head_logits, probability, read_logits, save_logits,
                                   select_threshold_max_mcc)
from common.street.splits import SplitStore, check_access_log
from common.street.subnet import natix_perturb
from common.street.views import normalised, resized, stack, step_indices

# --- config ------------------------------------------------------------

# D, depth, heads, FFN hidden, gated FFN, patch: the published DINOv3 sizes and one for laptops
SIZES = {"vits16": (384, 12, 6, 1536, False, 16), "vits16plus": (384, 12, 6, 1536, True, 16),
         "vitb16": (768, 12, 12, 3072, False, 16), "vitl16": (1024, 24, 16, 4096, False, 16),
         "vith16plus": (1280, 32, 20, 5120, True, 16), "vitt8": (64, 3, 4, 256, False, 8)}
PHASES = ("phase4a_explora", "phase1", "phase2", "phase4c_cvfm", "phase5", "phase6")
CLASSES = ("None", "Roadwork")
# simple ones first: ties go to them
MODES = ("single_view", "simple_mean", "soft_vote", "topk_mean", "weighted_uncertainty", "content_aware",
         "attention", "trained", "flex")

# Who may open what, and for which purpose (the table of section 3.1 of the plan): the leakage contract
ROLES = {("phase4a_explora", "TRAIN_OUTER"): ("grad",), ("phase4a_explora", "TRAIN_INNER"): ("select",),
         ("phase1", "TRAIN"): ("grad",), ("phase1", "VAL_SELECT"): ("select",),
         ("phase1", "VAL_CALIB"): ("infer_frozen",),
         ("phase2", "CALIB_FIT"): ("fit",),
         ("phase4c_cvfm", "TRAIN"): ("grad",), ("phase4c_cvfm", "VAL_SELECT"): ("select",),
         ("phase4c_cvfm", "VAL_CALIB"): ("infer_frozen",),
         ("phase5", "CALIB_FIT"): ("fit",), ("phase5", "CALIB_CONF"): ("fit",),
         ("phase5", "VAL_SELECT"): ("select",),
         ("evaluate", "VAL_TEST"): ("report",)}


@dataclass(frozen=True)
class Config:
    """A field's prefix names the phase that reads it; changing it makes that phase and later ones stale."""
    preset: str = opt("", "a row of PRESETS")
    out: str = opt("", "run directory")
    data: str = opt("", "data set; empty: draw one under OUT/data")
    seed: int = opt(42, "seed of everything random")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    steps: int = opt(0, "cap on the optimizer steps of each training phase; 0: the epochs decide")
    compile: bool = opt(False, "torch.compile the task model")
    wandb: str = opt("", "wandb project")
    json: bool = opt(False, "plan: print JSON")
    phases: str = opt("", "run: comma list of phases, empty for all", free=True)
    force: bool = opt(False, "run: repeat phases that are complete", free=True)
    bundle: str = opt("", "evaluate, predict: bundle.json (default OUT/export/bundle.json)", free=True)
    mode: str = opt("full", "evaluate: quick leaves out resampling and plots", ("full", "quick"), free=True)
    what: str = opt("explora", "ablate", ("explora", "cvfm", "augment", "calibration"), free=True)
    words: tuple = opt((), "images to predict, or files to validate", positional=True, free=True)
    scenes: int = opt(700, "demo-data: scenes")
    frames: int = opt(3, "demo-data: frames a scene")
    size: int = opt(160, "demo-data: side in pixels")
    prior: float = opt(0.5, "demo-data: share of scenes with roadwork")
    shift_scenes: int = opt(60, "demo-data: scenes of the shifted style B")
    split_mode: str = opt("group", "hash of the group; hash_stratified: per class; official_test: the data's "
                          "own test rows; image: leaky, to see the detector work",
                          ("group", "hash_stratified", "official_test", "image"))
    data_near_duplicates: bool = opt(False, "join groups whose images look alike before splitting")
    data_augment: str = opt("basic", "training pictures; gate: try both, keep what VAL_SELECT prefers",
                            ("basic", "strong", "rand", "gate"))
    data_trivial: bool = opt(True, "TrivialAugmentWide in strong pictures")
    data_trivial_bins: int = opt(31, "strengths of TrivialAugmentWide")
    data_augmix: bool = opt(True, "AugMix in strong pictures")
    data_augmix_severity: int = opt(3, "AugMix strengths, of 10")
    data_augmix_width: int = opt(3, "AugMix chains")
    data_augmix_alpha: float = opt(1.0, "AugMix Dirichlet parameter")
    data_multiscale: bool = opt(False, "draw the side of a step's pictures from 0.8 .. 1.2 of model_image")
    data_crop_min: float = opt(0.8, "smallest area of the random crop; 0.1 when tiles are to be fused")
    data_perturb: float = opt(0.0, "probability of the validator's own perturbations in training")
    data_erasing: float = opt(0.0, "probability of random erasing (strong pictures only)")
    data_erasing_max: float = opt(0.33, "largest erased area; large ones remove the only cone")
    data_scale_to_size: bool = opt(False, "scale the 32-pixel shifts of TrivialAugment to side/224")
    model_size: str = opt("vitl16", "backbone", tuple(SIZES))
    model_weights: str = opt("", "DINOv3 directory or file, Hugging Face layout, or Meta's .pth")
    model_features: str = opt("cls_mean", "head input", ("cls", "cls_mean"))
    model_image: int = opt(224, "side of the network's input")
    model_preprocess: str = opt("square", "how an image becomes square",
                                ("square", "shorter_crop", "letterbox"))
    model_head: str = opt("mlp", "task head", ("mlp", "linear"))
    model_hidden: int = opt(256, "width of the mlp head")
    model_dropout: float = opt(0.3, "dropout in the head")
    model_init_from_explora: bool = opt(True, "phase1 starts from phase4a's backbone")
    source_steps: int = opt(0, "pretrain the laptop backbone on drawn shapes for so many steps")
    phase4a_variant: str = opt("plan", "plan: LoRA on q,k,v; paper: on q,v, last block free; full: all",
                               ("plan", "paper", "full"))
    phase4a_epochs: int = opt(30, "epochs")
    phase4a_batch: int = opt(64, "images a micro-batch, all ranks together")
    phase4a_accumulate: int = opt(1, "micro-batches a step")
    phase4a_negatives: str = opt("gradcache", "gradcache: all micro-batches are negatives; microbatch: own",
                                 ("gradcache", "microbatch"))
    phase4a_objective: str = opt("simclr", "byol, swav and byol_swav are the alternatives",
                                 ("simclr", "byol", "swav", "byol_swav"))
    phase4a_temperature: float = opt(0.1, "of NT-Xent, useful from 0.07 to 0.2")
    phase4a_strength: str = opt("mild", "colour changes of the two views", ("mild", "sim", "su"))
    phase4a_rank: int = opt(32, "LoRA rank (paper: 64)")
    phase4a_alpha: float = opt(64.0, "LoRA alpha")
    phase4a_dropout: float = opt(0.05, "LoRA dropout")
    phase4a_blocks: int = opt(12, "LoRA on the last so many blocks (plan)")
    phase4a_norms: bool = opt(False, "also train all LayerNorms (paper, version 1)")
    phase4a_lr: float = opt(1e-4, "peak learning rate")
    phase4a_decay: float = opt(0.05, "weight decay")
    phase4a_hidden: int = opt(4096, "hidden width of BYOL's networks")
    phase4a_prototypes: int = opt(3000, "SwAV prototypes")
    phase1_mode: str = opt("peft", "what is trained", ("head", "peft", "full"))
    phase1_epochs: int = opt(150, "epochs")
    phase1_batch: int = opt(32, "images a micro-batch, all ranks together")
    phase1_accumulate: int = opt(2, "micro-batches a step")
    phase1_lr: float = opt(3e-4, "peak learning rate of head and adapters")
    phase1_backbone_lr: float = opt(3e-4, "peak learning rate of the backbone in mode full")
    phase1_decay: float = opt(0.05, "weight decay of matrices")
    phase1_warmup: float = opt(0.1, "share of steps")
    phase1_loss: str = opt("ce", "task loss", ("ce", "weighted_ce", "focal"))
    phase1_class_weights: tuple = opt((), "of no roadwork, roadwork; empty: n / (2 n_c)")
    phase1_focal_alpha: float | None = opt(0.25, "weight of class 1, 1 - alpha of class 0; none: 1 for both")
    phase1_focal_gamma: float = opt(2.0, "focal exponent")
    phase1_smoothing: float = opt(0.0, "label smoothing")
    phase1_mix: bool = opt(False, "MixUp or CutMix, each on half of the batches")
    phase1_js: float = opt(0.0, "weight of the Jensen-Shannon loss over a clean picture and two AugMix ones "
                           "(paper: 12)")
    phase1_patience: int = opt(15, "epochs without progress of VAL_SELECT MCC before stopping")
    phase1_gate_epochs: int = opt(2, "epochs of each trial of the augmentation gate")
    phase1_mac_cal: bool = opt(False, "MaC-Cal: a second head retrained under random masks")
    phase1_mac_masks: int = opt(0, "masks whose answers that head averages (16); 0: the expected mask")
    peft_kind: str = opt("dora", "adapter", ("lora", "dora"))
    peft_rank: int = opt(16, "rank")
    peft_alpha: float = opt(32.0, "alpha")
    peft_dropout: float = opt(0.0, "the plan says 0.05; PiSSA and DoRA want none")
    peft_use_rslora: bool = opt(True, "alpha / sqrt(r)")
    peft_init: str = opt("pissa", "start of A and B", ("default", "gaussian", "pissa"))
    peft_targets: str = opt("q,k,v,o", "linears of a block")
    peft_blocks: int = opt(8, "the last so many blocks")
    phase2_n_thresholds: int = opt(5000, "grid of the sweep", free=True)
    phase2_optimize_metric: str = opt("mcc", "what the sweep maximises", ("mcc",), free=True)
    phase2_space: str = opt("prob", "thresholds equally spaced in probability, or quantiles of the scores",
                            ("prob", "logit"), free=True)
    phase2_save_sweep_curve: bool = opt(True, "write threshold_sweep.csv", free=True)
    phase2_save_mcc_plot: bool = opt(True, "write mcc_curve.png", free=True)
    phase2_target_prior: float | None = opt(None, "maximise the MCC at this share of positives; none: as is",
                                            free=True)
    phase4c_mode: str = opt("auto", "fusion; auto: VAL_SELECT decides", ("auto", *MODES), free=True)
    phase4c_views: str = opt("tiles", "tiles of one image, or the frames of its group", ("tiles", "frames"),
                             free=True)
    phase4c_canvas: int = opt(0, "letterbox tiles on a square of this side; 0: the image itself", free=True)
    phase4c_grid: int = opt(3, "tiles a side", free=True)
    phase4c_overlap: float = opt(0.15, "share of a tile added on each side", free=True)
    phase4c_inverse: bool = opt(False, "weighted_uncertainty by 1 / H, not softmax(-2 H)", free=True)
    phase4c_epochs: int = opt(3, "epochs of the trained fusions", free=True)
    phase4c_lr: float = opt(1e-4, "learning rate of the trained fusions", free=True)
    phase4c_hidden: int = opt(512, "encoder width", free=True)
    phase4c_latent: int = opt(256, "latent width", free=True)
    phase5_method: str = opt("auto", "calibrator; auto: the multi-objective choice",
                             ("auto", *CALIBRATORS, "mac_cal"), free=True)
    phase5_xi: float = opt(0.8, "share of samples to accept", free=True)
    phase5_alpha: float = opt(0.05, "risk among accepted samples", free=True)
    phase5_delta: float = opt(0.1, "failure probability of the PAC threshold", free=True)
    phase5_fnr_alpha: float = opt(0.05, "share of roadwork that may be answered 'none'", free=True)
    phase5_unit: str = opt("group", "what is exchangeable: groups, or single frames", ("group", "frame"),
                           free=True)
    phase6_probes: bool = opt(True, "put the frozen backbones of the baselines into the bundle", free=True)
    phase6_compress: bool = opt(False, "also write bundle.tar.gz", free=True)
    phase6_license: str = opt("", "DINOv3 licence text, needed to export a model made from its weights",
                              free=True)
    phase6_name: str = opt("onefile-streetvision", "model card: name", free=True)
    phase6_version: str = opt("0.1.0", "model card: version X.Y.Z", free=True)
    phase6_submitter: str = opt("", "model card: hotkey address", free=True)
    eval_resamples: int = opt(1000, "bootstrap resamples of groups", free=True)
    eval_confidence: float = opt(0.95, "level of the intervals", free=True)
    eval_interval: str = opt("percentile", "bca: bias-corrected and accelerated, for the same resamples",
                             ("percentile", "bca"), free=True)
    eval_windows: int = opt(2000, "simulated 100-image windows of the competition", free=True)
    hardware_precision: str = opt("auto", "auto: bfloat16 where the GPU has it; fp16: scaled gradients",
                                  ("auto", "fp32", "bf16", "fp16"))
    hardware_workers: int = opt(0, "threads that decode images", free=True)
    hardware_compile_mode: str = opt("default", "torch.compile mode",
                                     ("default", "reduce-overhead", "max-autotune"))
    hardware_stance: str = opt("default", "torch.compiler stance", (
        "default", "force_eager", "eager_on_recompile", "fail_on_recompile", "performance"))


LAPTOP = dict(model_size="vitt8", model_image=64, model_hidden=64, model_dropout=0.1, source_steps=150,
              phase4a_variant="full", phase4a_lr=5e-4, phase4a_hidden=256, phase4a_prototypes=32,
              phase4a_epochs=2, phase1_mode="full", phase1_batch=64, phase1_accumulate=1, phase1_lr=1.5e-3,
              phase1_backbone_lr=1.5e-3, phase1_mac_cal=True, size=128, data_scale_to_size=True,
              data_erasing_max=0.1, phase4c_views="frames", phase4c_epochs=20, phase4c_lr=1e-3,
              phase4c_hidden=64, phase4c_latent=32)
PRESETS = {
    "demo": dict(paper="streets that it draws", expect={}, goal=dict(mcc=0.70), set=dict(
        LAPTOP, scenes=3300, shift_scenes=100, model_image=96, phase4a_epochs=1, phase1_epochs=5)),
    "smoke": dict(paper="-", expect={}, set=dict(
        LAPTOP, scenes=400, shift_scenes=20, source_steps=60, phase1_batch=32, phase1_epochs=14,
        phase4c_epochs=8)),
    "vitb": dict(paper="-", expect={}, set=dict(model_size="vitb16")),
    "vitl": dict(paper="ExPLoRA table 1, ViT-L (another data set)", expect={}, set=dict(model_size="vitl16")),
    "vith": dict(paper="-", expect={}, set=dict(model_size="vith16plus", phase1_batch=16,
                                                phase1_accumulate=4)),
}


# --- model -------------------------------------------------------------


class ViT(Backbone):
    """DINOv3 in the layout of Hugging Face: vit(x_BCHW) -> dict(cls [B, D], patches [B, P, D]), normed.

    rope_stretch: in train() mode positions are scaled by one log-uniform factor from [1/s, s] per call.
    """

    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.rope_stretch = None
        self.embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, self.D))

    def reset(self):
        """Random start: normal of std 0.02, layer scale 1 (the published 1e-5 keeps a small model asleep)."""
        for name, p in self.named_parameters():
            if p.ndim > 1 and "mask_token" not in name:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    @classmethod
    def sized(cls, name):
        D, depth, heads, hidden, gated, patch = SIZES[name]
        return cls(D, depth, heads, hidden, gated, patch)

    @classmethod
    def load(cls, path, heads=None):
        """A Hugging Face directory, a .safetensors file, or Meta's .pth -> ViT in eval mode.

        Sizes come from the tensors; heads are D / 64 unless config.json or `heads` says otherwise.  Raises
        run.UserError that lists every missing or unexpected tensor and every wrong shape.
        """
        state, sizes = dinokeys.read(path)
        D, depth, hidden, gated, patch, registers, said = sizes
        vit = cls(D, depth, heads or said or max(D // 64, 1), hidden, gated, patch, registers)
        state.setdefault("embeddings.mask_token", vit.embeddings.mask_token.detach())
        dinokeys.check(state, vit.state_dict(), path)
        vit.load_state_dict(state)
        return vit.eval()

    def forward(self, x_BCHW):
        moving = self.training and self.rope_stretch
        stretch = self.rope_stretch ** float(torch.empty(()).uniform_(-1, 1)) if moving else 1.0
        t_BLD = self.tokens(x_BCHW, stretch)
        return dict(cls=t_BLD[:, 0], patches=t_BLD[:, 1 + self.embeddings.register_tokens.shape[1]:])


def make_head(kind, F_in, hidden, dropout):
    """Linear - LayerNorm - GELU - Dropout - Linear, or Dropout - Linear; two logits."""
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(F_in, 2))
    if kind == "mlp":
        head = nn.Sequential(nn.Linear(F_in, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout),
                             nn.Linear(hidden, 2))
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return head


class Classifier(nn.Module):
    """Backbone and head: net(x_BCHW) -> logits [B, 2]; net.features(x_BCHW) -> [B, F]."""

    def __init__(self, vit, features="cls_mean", head="mlp", hidden=256, dropout=0.3, mac=False, masks=0):
        super().__init__()
        self.backbone, self.kind = vit, features
        self.width = vit.D * (2 if features == "cls_mean" else 1)
        self.head = make_head(head, self.width, hidden, dropout)
        self.head_mac = MaskedHead(make_head(head, self.width, hidden, dropout), masks) if mac else None

    def features(self, x_BCHW):
        out = self.backbone(x_BCHW)
        return torch.cat([out["cls"], out["patches"].mean(1)], 1) if self.kind == "cls_mean" else out["cls"]

    def forward(self, x_BCHW):
        return self.head(self.features(x_BCHW))


def build(cfg, vit):
    return Classifier(vit, cfg.model_features, cfg.model_head, cfg.model_hidden, cfg.model_dropout,
                      cfg.phase1_mac_cal, cfg.phase1_mac_masks)


def load_model(path):
    """A classifier's .safetensors -> Classifier in eval mode, gradients off."""
    tensors, m = bundle.load_tensors(path)
    net = Classifier(ViT.sized(m["size"]), m["features"], m["head"], m["hidden"], 0.0, m["mac"], m["masks"])
    net.load_state_dict(tensors)
    net.meta = m
    return net.eval().requires_grad_(False)


# --- loss --------------------------------------------------------------


def focal_loss(logits_BC, target, alpha=0.25, gamma=2.0):
    """mean alpha_t (1 - p_t)^gamma (-log p_t), alpha_t = alpha for class 1, 1 - alpha for class 0; None: 1.

    target: class indices [B], or soft targets [B, C]: then the sum of the terms of the classes, weighted by
    them.
    """
    logp_BC = F.log_softmax(logits_BC.float(), 1)
    soft_BC = F.one_hot(target, 2).float() if target.ndim == 1 else target
    weight_C = logp_BC.new_tensor([1.0, 1.0] if alpha is None else [1 - alpha, alpha])
    return -(soft_BC * weight_C * (1 - logp_BC.exp()) ** gamma * logp_BC).sum(1).mean()


def task_loss(logits_BC, soft_BC, cfg, weight_C):
    """Cross-entropy, class-weighted cross-entropy (sum w l / sum w) or focal loss; soft targets, float32."""
    soft_BC = (1 - cfg.phase1_smoothing) * soft_BC + cfg.phase1_smoothing / 2
    if cfg.phase1_loss == "focal":
        return focal_loss(logits_BC, soft_BC, cfg.phase1_focal_alpha, cfg.phase1_focal_gamma)
    w = soft_BC * (weight_C if cfg.phase1_loss == "weighted_ce" else 1.0)
    return -(w * F.log_softmax(logits_BC.float(), 1)).sum() / w.sum()


def jensen_shannon(logits_KBC):
    """Mean KL of K answers about the same B pictures to their average: AugMix's consistency, in nats."""
    logp_KBC = F.log_softmax(logits_KBC.float(), -1)
    middle_BC = logp_KBC.exp().mean(0).clamp_min(1e-7).log()
    return (logp_KBC.exp() * (logp_KBC - middle_BC)).sum(-1).mean()


def nt_xent(z1_ND, z2_ND, temperature=0.1):
    """NT-Xent of SimCLR: mean over the 2N rows of -z_i z_pos / T + log sum_{j != i} exp(z_i z_j / T).

    Rows are normalised here, in float32.  ln(2N - 1) when all rows are equal.
    """
    z = F.normalize(torch.cat([z1_ND, z2_ND]).float(), dim=1)
    N = len(z1_ND)
    score = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positive = torch.arange(2 * N, device=z.device).roll(N)
    return F.cross_entropy(score, positive)


# --- data --------------------------------------------------------------

def train_picture(image, cfg, g, strong, side=None):
    """Crop, flip, colour or TrivialAugment + AugMix, perturbation, erasing; a function of the generator g."""
    side = side or cfg.model_image
    image = augment.flip(augment.resized_crop(image, g, side, (cfg.data_crop_min, 1.0), (0.75, 1.33)), g)
    if strong == "strong":
        if cfg.data_trivial:
            image = augment.trivial_augment_wide(image, g, cfg.data_trivial_bins, cfg.data_scale_to_size)
        image = mixed(image, cfg, g) if cfg.data_augmix else image
    elif strong == "rand":
        image = augment.rand_augment(image, g)
    else:
        image = image.rotate(augment.rand(g, -15, 15), Image.BILINEAR)
        image = augment.color_jitter(image, g, 0.2, 0.2, 0.2, 0.1) if augment.rand(g) < 0.8 else image
    if augment.rand(g) < cfg.data_perturb:
        rng = np.random.default_rng(augment.randint(g, 0, 2**31))
        image = natix_perturb(image, int(rng.integers(4)), rng, side)
    x_CHW = normalised(image)
    if strong == "strong" and cfg.data_erasing:
        x_CHW = augment.random_erasing(x_CHW, g, cfg.data_erasing, (0.02, cfg.data_erasing_max))
    return x_CHW


def mixed(image, cfg, g):
    return augment.aug_mix(image, g, cfg.data_augmix_severity, cfg.data_augmix_width,
                           alpha=cfg.data_augmix_alpha)


def consistent_pictures(image, cfg, g, side):
    """[3, C, H, W]: a cropped, flipped picture and two independent AugMix versions of it."""
    clean = augment.flip(augment.resized_crop(image, g, side, (cfg.data_crop_min, 1.0), (0.75, 1.33)), g)
    return torch.stack([normalised(v) for v in (clean, mixed(clean, cfg, g), mixed(clean, cfg, g))])


def simclr_views(image, cfg, g):
    """Two independent crops with flip, colour, grey and blur.  mild: hue, the cue, barely moves."""
    jitter, grey, blur = {"mild": ((0.4, 0.4, 0.4, 0.05), 0.1, 0.5), "sim": ((0.8, 0.8, 0.8, 0.2), 0.2, 0.5),
                          "su": ((0.8, 0.8, 0.8, 0.1), 0.2, 0.8)}[cfg.phase4a_strength]

    def view():
        x = augment.flip(augment.resized_crop(image, g, cfg.model_image, (0.2, 1.0)), g)
        x = augment.color_jitter(x, g, *jitter) if augment.rand(g) < 0.8 else x
        x = augment.grayscale(x) if augment.rand(g) < grey else x
        if augment.rand(g) < blur:
            x = augment.gaussian_blur(x, max(3, cfg.model_image // 10 | 1), augment.rand(g, 0.1, 2.0))
        return normalised(x)
    return torch.stack([view(), view()])


def views_of(cfg):
    return dict(source=cfg.phase4c_views, canvas=cfg.phase4c_canvas, grid=cfg.phase4c_grid,
                overlap=cfg.phase4c_overlap)


def infer(net, samples, cfg, device, views=False):
    """Features of a split, float32 on the CPU: [N, F], or with views ([N, V, F], boxes [N, V, 4])."""
    return serving.infer(net, samples, device, cfg.model_image, cfg.model_preprocess,
                         views_of(cfg) if views else None, cfg.hardware_precision, cfg.hardware_workers)


# --- phase 4a: adaptation without labels ----------------------------------
#
# ExPLoRA continues self-supervised training on the target images through adapters; here the objective is
# SimCLR.  Negatives are the batch's own, 2 N world - 2 of them: no queue.  Future work: hard negatives.
# Without labels they could only be balanced by clusters of features (k-means), not by class.


class Job(tuple):
    """What every phase works with: cfg, ddp, paths, store, log."""
    cfg, ddp, paths, store, log = (property(lambda self, i=i: self[i]) for i in range(5))


def starting_backbone(cfg, paths, ddp):
    """The backbone before adaptation: DINOv3 weights, a small one pretrained on drawn shapes, or random."""
    if cfg.model_weights:
        return ViT.load(cfg.model_weights)
    if not cfg.source_steps:
        run.seed_all(cfg.seed, 1)
        return ViT.sized(cfg.model_size).reset()
    if ddp.rank == 0 and not paths.source_weights.is_file():
        vit = probe.pretrain_on_shapes(ViT.sized(cfg.model_size), cfg.model_image, cfg.source_steps, cfg.seed)
        bundle.save_tensors(paths.source_weights, vit.state_dict(), dict(steps=cfg.source_steps))
    if ddp.world > 1:
        dist.barrier()
    return ViT.load(paths.source_weights, SIZES[cfg.model_size][2])


def make_projector(D, out=256):
    return nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, out))


def open_backbone(vit, cfg):
    """Choose what phase 4a trains, in place.

    plan: LoRA on q, k, v of the last blocks; paper: on q, v of all but the last, which is free; full: all.
    """
    last = len(vit.layer) - 1
    if cfg.phase4a_variant == "full":
        return vit.requires_grad_(True)
    lora = dict(kind="lora", rank=cfg.phase4a_rank, alpha=cfg.phase4a_alpha, dropout=cfg.phase4a_dropout)
    if cfg.phase4a_variant == "plan":
        return adapt(vit, **lora, targets=("q", "k", "v"),
                     blocks=range(max(0, last + 1 - cfg.phase4a_blocks), last + 1))
    adapt(vit, **lora, targets=("q", "v"), blocks=range(last))
    vit.layer[last].requires_grad_(True)
    for name, p in vit.named_parameters():
        if cfg.phase4a_norms and "norm" in name:
            p.requires_grad_(True)
    return vit


def lr_at(step, steps, lr, warmup=0.1, lowest=1e-6):
    """Linear from 1 % of lr over ceil(warmup K) steps, then a cosine to `lowest`; step counts from 0."""
    w = math.ceil(warmup * steps)
    if step < w:
        return lr * (0.01 + 0.99 * step / w)
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * (step - w) / max(steps - w, 1))) / 2


def simclr_step(embed, micro, cfg, seed, scale=lambda loss: loss):
    """Backward of NT-Xent over micro-batches [(2, b, C, H, W)] of two views -> (loss, z1, z2).

    Negatives come from all ranks.  Several micro-batches: gradcache lets every image see every other one;
    microbatch is the plain, smaller problem.  scale: of the loss, before backward (float16).
    """
    def loss_of(z1, z2):
        return nt_xent(selfsup.gather_with_grad(z1), selfsup.gather_with_grad(z2), cfg.phase4a_temperature)
    together = cfg.phase4a_negatives == "gradcache" and len(micro) > 1
    return (selfsup.gradcache if together else selfsup.each_alone)(embed, micro, loss_of, seed, scale)


def run_phase4a(job):
    """TRAIN images without labels -> explora_checkpoint.safetensors, the adapted backbone."""
    cfg, ddp, paths, store, log = job
    train = store.open("TRAIN_OUTER", "phase4a_explora", "grad")
    inner = store.open("TRAIN_INNER", "phase4a_explora", "select")
    vit = open_backbone(starting_backbone(cfg, paths, ddp), cfg).to(ddp.device).train()
    vit.rope_stretch = 2.0
    run.seed_all(cfg.seed, 3)
    goal = selfsup.Objective(cfg.phase4a_objective, make_projector(vit.D), vit.D, cfg.phase4a_hidden,
                             cfg.phase4a_prototypes).to(ddp.device)
    shadow_vit, shadow_goal = (copy.deepcopy(m).requires_grad_(False) for m in (vit, goal))
    params = [p for m in (vit, goal) for p in m.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(params, cfg.phase4a_lr, weight_decay=cfg.phase4a_decay)
    group = min(cfg.phase4a_batch * cfg.phase4a_accumulate, len(train))
    per_epoch = math.ceil(len(train) / group)
    steps = min(cfg.steps or math.inf, cfg.phase4a_epochs * per_epoch)
    book, scaler = dict(rows=[]), serving.scaler(cfg.hardware_precision, ddp.device)
    state = dict(vit=vit, goal=goal, optim=optim, scaler=scaler, book=book)
    state |= {} if goal.kind == "simclr" else dict(shadow_vit=shadow_vit, shadow_goal=shadow_goal)
    start = run.load(paths.phase4a_dir, state, ddp)
    simclr = lambda x: goal.projector(vit(x)["cls"])
    for step in run.progress(start, steps, ddp, label="phase4a"):
        epoch, ids = step_indices(len(train), group, step, cfg.seed)
        for g in optim.param_groups:
            g["lr"] = lr_at(step - 1, steps, cfg.phase4a_lr)
        micro = [ids[a:a + cfg.phase4a_batch] for a in range(0, len(ids), cfg.phase4a_batch)]
        micro = [chunk[:len(chunk) // ddp.world * ddp.world][ddp.rank::ddp.world] for chunk in micro]
        micro = [two_views(train, chunk, cfg, step).to(ddp.device) for chunk in micro if len(chunk) > 1]
        optim.zero_grad()
        if not micro:
            continue
        if goal.kind == "simclr":
            with serving.autocast(cfg.hardware_precision, ddp.device):
                loss, z1, z2 = simclr_step(simclr, micro, cfg, (cfg.seed, ddp.rank, step), scaler.scale)
        else:
            run.seed_all(cfg.seed, ddp.rank, step)
            x1, x2 = torch.cat(micro, 1)
            with torch.no_grad():
                target = [shadow_goal.projector(shadow_vit(x)["cls"]) for x in (x1, x2)]
            loss, z1, z2 = goal.alternative(vit(x1)["cls"], vit(x2)["cls"], target,
                                            warm=step <= min(313, per_epoch))
            scaler.scale(loss).backward()
        average_gradients(params, ddp)
        scaler.unscale_(optim)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optim), scaler.update()
        for shadow, live in ((shadow_vit, vit), (shadow_goal, goal)) if goal.kind != "simclr" else ():
            selfsup.average_into(dict(shadow.named_parameters()), dict(live.named_parameters()),
                                 selfsup.byol_momentum(step, steps))
        run.check_finite(step, loss=loss)
        if step % per_epoch == 0 or step == steps:
            book["rows"].append(dict(epoch=epoch, step=step, loss=float(loss), lr=optim.param_groups[0]["lr"],
                                     val_loss=inner_loss(vit, goal, inner, cfg, ddp),
                                     **selfsup.contrast_scores(z1, z2)))
            log("phase4a", **book["rows"][-1])
        run.save_if_due(paths.phase4a_dir, step, steps, per_epoch, state, ddp)
    if ddp.rank:
        return {}, {}
    bundle.write_csv(paths.phase4a_dir / "metrics.csv", book["rows"])
    few = torch.stack([resized(train.image(i), cfg.model_image, cfg.model_preprocess)
                       for i in range(min(8, len(train)))])
    outputs, off = save_adapted(vit.cpu().float().eval(), few, paths)
    outputs["metrics"] = paths.phase4a_dir / "metrics.csv"
    return outputs, dict(merge_max_diff=off, **{k: book["rows"][-1][k] for k in ("loss", "val_loss", "top1")})


@torch.no_grad()
def save_adapted(vit, x_BCHW, paths):
    """Write the adapters alone and the merged backbone -> (outputs, change of features by merging)."""
    outputs, before = dict(explora_checkpoint=paths.explora_checkpoint), vit(x_BCHW)["cls"]
    if adapted(vit):
        bundle.save_tensors(paths.explora_lora, *adapter_tensors(vit))
        outputs["explora_lora"] = paths.explora_lora
    bundle.save_tensors(paths.explora_checkpoint, merge(vit).state_dict(), dict(D=vit.D))
    off = float((ViT.load(paths.explora_checkpoint, vit.heads)(x_BCHW)["cls"] - before).abs().max())
    if off > 1e-4:
        raise RuntimeError(f"merging the adapters changed the features by {off:.1e}")
    return outputs, off


def two_views(samples, ids, cfg, key):
    """[2, b, C, H, W]: two views of each sample, a function of (seed, key, sample)."""
    make = lambda i: simclr_views(samples.image(i), cfg, run.generator(cfg.seed, key, int(i)))
    return stack(make, ids, cfg.hardware_workers).transpose(0, 1)


@torch.no_grad()
def inner_loss(vit, goal, inner, cfg, ddp):
    """NT-Xent on TRAIN_INNER with fixed views; for the alternatives too, as a common yardstick."""
    if len(inner) < 2:
        return None
    vit.eval(), goal.eval()
    x = two_views(inner, range(min(len(inner), 256)), cfg, 2**31).to(ddp.device)
    z1, z2 = goal.projector(vit(x.flatten(0, 1))["cls"]).chunk(2)
    vit.train(), goal.train()
    return float(nt_xent(z1, z2, cfg.phase4a_temperature))


# --- phase 1: the task ----------------------------------------------------


def prepare(cfg, paths, ddp):
    """The classifier with what phase 1 trains switched on."""
    explora = cfg.model_init_from_explora and paths.explora_checkpoint.is_file()
    heads = SIZES[cfg.model_size][2] if not cfg.model_weights else None
    vit = ViT.load(paths.explora_checkpoint, heads) if explora else starting_backbone(cfg, paths, ddp)
    run.seed_all(cfg.seed, 4)
    net = build(cfg, vit)
    if cfg.phase1_mode == "peft":
        blocks = range(max(0, len(vit.layer) - cfg.peft_blocks), len(vit.layer))
        adapt(vit, cfg.peft_kind, cfg.peft_rank, cfg.peft_alpha, cfg.peft_use_rslora, cfg.peft_init,
              cfg.peft_targets.split(","), cfg.peft_dropout, blocks)
    else:
        vit.requires_grad_(cfg.phase1_mode == "full")
    return net.to(ddp.device)


def param_groups(net, cfg):
    """AdamW groups: backbone and head, each with and without decay (no decay on vectors and tokens)."""
    groups = collections.defaultdict(list)
    for name, p in net.named_parameters():
        if p.requires_grad and not name.startswith("head_mac"):
            full = name.startswith("backbone") and cfg.phase1_mode == "full"
            groups[full, p.ndim > 1 and "token" not in name].append(p)
    return [dict(params=ps, peak=cfg.phase1_backbone_lr if full else cfg.phase1_lr,
                 weight_decay=cfg.phase1_decay if decay else 0.0) for (full, decay), ps in groups.items()]


def batch_of(train, chunk, cfg, epoch, step, pictures):
    """Pictures [B or 3B, C, H, W] and soft targets [B, 2]; a function of (seed, epoch, step, samples)."""
    soft_BC = F.one_hot(torch.from_numpy(train.labels()[chunk]), 2).float()
    side = cfg.model_image
    if cfg.data_multiscale:                                     # one side a step, a multiple of the patch
        scale = 0.8 + 0.1 * augment.randint(run.generator(cfg.seed, 8, step), 0, 5)
        side = max(1, round(scale * side / SIZES[cfg.model_size][5])) * SIZES[cfg.model_size][5]
    if cfg.phase1_js:
        make = lambda i: consistent_pictures(train.image(i), cfg, run.generator(cfg.seed, epoch, int(i)),
                                             side)
        return stack(make, chunk, cfg.hardware_workers).transpose(0, 1).flatten(0, 1), soft_BC
    make = lambda i: train_picture(train.image(i), cfg, run.generator(cfg.seed, epoch, int(i)), pictures,
                                   side)
    x = stack(make, chunk, cfg.hardware_workers)
    if cfg.phase1_mix and len(chunk) > 1:
        g = run.generator(cfg.seed, 7, step, int(chunk[0]))
        x, soft_BC = (augment.mixup if augment.rand(g) < 0.5 else augment.cutmix)(x, soft_BC, g)
    return x, soft_BC


def judge(net, ema, select, cfg, device, best, book, epoch, live):
    """Score the weights and their average on VAL_SELECT -> their scores.

    book["top"]: the three best epochs [MCC, epoch, did the average win, slot]; best: "slot.name" -> weights.
    """
    scores = {}
    for name, values in (("net", {}), ("ema", ema)):
        with selfsup.swapped(net, values):
            scores[name] = answers(head_logits(net.head, infer(net, select, cfg, device)), select.labels())
    won = scores["ema"]["val_mcc"] > scores["net"]["val_mcc"]
    mcc, top = scores["ema" if won else "net"]["val_mcc"], book["top"]
    if not top or mcc > top[0][0] + 0.001:
        book["epoch"] = epoch                                   # progress, for the patience
    if len(top) < 3 or mcc > top[-1][0]:
        slot = top.pop()[3] if len(top) == 3 else len(top)
        top.append([mcc, epoch, won, slot])
        top.sort(key=lambda row: (-row[0], row[1]))
        best.update({f"{slot}.{n}": (ema if won else live)[n].detach().clone() for n in live})
    return dict(scores["net"], ema_mcc=scores["ema"]["val_mcc"])


def fit_task(job, net, train, select, pictures, epochs, folder, label="phase1"):
    """Train, judge by VAL_SELECT every epoch -> dict(best [weights of up to 3], ema, rows, mcc, ema_won).

    Resumes from folder/ckpt.
    """
    cfg, ddp, _, _, log = job
    live = {n: p for n, p in net.named_parameters() if p.requires_grad and not n.startswith("head_mac")}
    optim = torch.optim.AdamW(param_groups(net, cfg))
    group = cfg.phase1_batch * cfg.phase1_accumulate
    run.per_rank(cfg.phase1_batch, ddp, "--phase1-batch")
    per_epoch = math.ceil(len(train) / group)
    steps = min(cfg.steps or math.inf, epochs * per_epoch)
    share_C = np.bincount(train.labels(), minlength=2) / len(train)
    weight_C = torch.tensor(cfg.phase1_class_weights or tuple(0.5 / np.maximum(share_C, 1e-9)),
                            device=ddp.device).float()
    head_only = cfg.phase1_mode == "head"                       # then no pictures change: features once
    frozen = infer(net, train, cfg, ddp.device) if head_only else None
    ema = {n: p.detach().clone() for n, p in live.items()}
    best, book = {}, dict(top=[], epoch=-1, rows=[])
    scaler = serving.scaler(cfg.hardware_precision, ddp.device)
    state = dict(net=net, optim=optim, ema=ema, best=best, scaler=scaler, book=book)
    start, began = run.load(folder, state, ddp), time.time()
    example = torch.zeros(2, 3, cfg.model_image, cfg.model_image, device=ddp.device)
    forward = pipeline.maybe_compile(net, example, cfg.compile, cfg.hardware_compile_mode,
                                     cfg.hardware_stance)
    for step in run.progress(start, steps, ddp, label):
        epoch, ids = step_indices(len(train), group, step, cfg.seed)
        run.seed_all(cfg.seed, ddp.rank, step)
        net.train(not head_only), net.head.train()
        for g in optim.param_groups:
            g["lr"] = lr_at(step - 1, steps, g["peak"], cfg.phase1_warmup)
        optim.zero_grad()
        seen = np.zeros(3)                                      # images, right answers, loss
        micro = [ids[a:a + cfg.phase1_batch] for a in range(0, len(ids), cfg.phase1_batch)]
        for chunk in (m[ddp.rank::ddp.world] for m in micro if len(m) > ddp.rank):
            if head_only:
                soft_BC = F.one_hot(torch.from_numpy(train.labels()[chunk]), 2).float()
                logits = net.head(frozen[chunk].to(ddp.device))
            else:
                x, soft_BC = batch_of(train, chunk, cfg, epoch, step, pictures)
                with serving.autocast(cfg.hardware_precision, ddp.device):
                    logits = forward(x.to(ddp.device))
            loss = task_loss(logits[:len(chunk)], soft_BC.to(ddp.device), cfg, weight_C)
            if len(logits) > len(chunk):
                loss = loss + cfg.phase1_js * jensen_shannon(logits.unflatten(0, (3, len(chunk))))
            scaler.scale(loss * len(chunk) * ddp.world / len(ids)).backward()   # sums to the batch's mean
            right = (logits[:len(chunk)].argmax(1).cpu() == soft_BC.argmax(1)).sum()
            seen += [len(chunk), float(right), float(loss.detach()) * len(chunk)]
        average_gradients(live.values(), ddp)
        scaler.unscale_(optim)
        torch.nn.utils.clip_grad_norm_(live.values(), 1.0)
        scaler.step(optim), scaler.update()
        selfsup.average_into(ema, live, min(0.9999, (1 + step) / (10 + step)))
        run.check_finite(step, loss=seen[2])
        if step % per_epoch == 0 or step == steps:
            spent, n = time.time() - began, max(seen[0], 1)
            row = dict(epoch=epoch, step=step, train_loss=seen[2] / n, train_acc=seen[1] / n,
                       lr=optim.param_groups[0]["lr"], effective_batch=group, seconds=spent,
                       images_per_s=(step - start) * group / spent,
                       **judge(net, ema, select, cfg, ddp.device, best, book, epoch, live))
            book["rows"].append(row)
            log(label, **row)
        run.save_if_due(folder, step, steps, per_epoch, state, ddp)
        if epoch - book["epoch"] > cfg.phase1_patience:
            break
    best = [{n: best[f"{slot}.{n}"] for n in live} for *_, slot in book["top"]]
    return dict(best=best, ema=ema, rows=book["rows"], mcc=book["top"][0][0], ema_won=book["top"][0][2])


def gate(job, train, select):
    """Train on 'basic' and 'strong' briefly; strong stays if VAL_SELECT agrees -> (choice, decision)."""
    cfg, ddp, paths = job[:3]
    result = {}
    for pictures in ("basic", "strong"):
        folder, net = paths.phase1_dir / f"gate_{pictures}", prepare(cfg, paths, ddp)
        rows = fit_task(job, net, train, select, pictures, cfg.phase1_gate_epochs, folder, "gate")["rows"]
        result[pictures] = {k: rows[-1][k] for k in ("val_mcc", "val_fnr")}
        shutil.rmtree(folder / "ckpt", ignore_errors=True)
    accept = gate_accepts(result["basic"], result["strong"])
    return ("strong" if accept else "basic"), dict(accepted=accept, **result)


def gate_accepts(basic, strong):
    """Strong pictures stay iff MCC rises, or falls by at most 0.03 while FNR falls."""
    change = strong["val_mcc"] - basic["val_mcc"]
    return change > 0 or (change >= -0.03 and strong["val_fnr"] < basic["val_fnr"])


def run_phase1(job):
    """TRAIN -> model_best.safetensors by VAL_SELECT; then, frozen, the logits of VAL_CALIB."""
    cfg, ddp, paths, store, log = job
    train, select = store.open("TRAIN", "phase1", "grad"), store.open("VAL_SELECT", "phase1", "select")
    pictures, decision = cfg.data_augment, None
    if pictures == "gate":
        pictures, decision = gate(job, train, select)
    net = prepare(cfg, paths, ddp)
    report = trainable_report(net)
    fit = fit_task(job, net, train, select, pictures, cfg.phase1_epochs, paths.phase1_dir)
    if ddp.rank:
        return {}, {}
    outputs = {n: getattr(paths, n) for n in ("phase1_metrics", "val_calib_logits", "val_select_logits")}
    if decision:
        bundle.write_json(paths.gate_json, decision)
        outputs["gate"] = paths.gate_json
    outputs |= save_trained(net.cpu(), fit, cfg, paths, train, select, log)
    outputs |= fit_probes(cfg, paths, ddp, train, select)
    bundle.write_csv(paths.phase1_metrics, fit["rows"])
    frozen = load_model(paths.model_best).to(ddp.device)
    calib = store.open("VAL_CALIB", "phase1", "infer_frozen", paths.model_best, sha256_file(paths.model_best),
                       frozen)
    for samples, path in ((select, paths.val_select_logits), (calib, paths.val_calib_logits)):
        save_logits(path, frozen, infer(frozen, samples, cfg, ddp.device), samples)
    return outputs, dict(mcc_val_select=fit["mcc"], ema_won=fit["ema_won"], pictures=pictures, **report)


def save_trained(net, fit, cfg, paths, train, select, log):
    """Write the last, averaged and three best weights, adapters merged; the best one gets its MaC-Cal head.

    -> outputs.
    """
    outputs, meta = {}, facts(cfg, cfg.model_head, cfg.phase1_mac_cal)
    kept = dict(zip(("model_best", "model_second", "model_third"), fit["best"]))
    for name, values in (kept | dict(model_ema=fit["ema"], model_last={})).items():
        path = outputs[name] = getattr(paths, name)
        with selfsup.swapped(net, {n: t.cpu() for n, t in values.items()}):
            done = copy.deepcopy(net).eval()
        if adapted(done) and path == paths.model_best:
            bundle.save_tensors(paths.peft_adapters, *adapter_tensors(done))
            outputs["peft_adapters"] = paths.peft_adapters
        merge(done)
        if cfg.phase1_mac_cal and path == paths.model_best:
            f = [infer(done, s, cfg, torch.device("cpu")) for s in (train, select)]
            done.head_mac.load_state_dict(done.head.state_dict() | dict(masks=done.head_mac.masks))
            log("mac_cal", rho=mac_cal(done.head_mac, f[0], train.labels(), f[1], select.labels(), cfg.seed))
        bundle.save_tensors(path, done.state_dict(), meta)
    return outputs


def facts(cfg, head, mac):
    """What load_model must know beside the tensors."""
    return dict(size=cfg.model_size, features=cfg.model_features, head=head, hidden=cfg.model_hidden, mac=mac,
                masks=cfg.phase1_mac_masks, image=cfg.model_image, preprocess=cfg.model_preprocess)


def fit_probes(cfg, paths, ddp, train, select):
    """Logistic regression on the frozen backbone before and, if there is one, after phase 4a -> outputs."""
    alone = run.Ranks(0, 1, ddp.device)                         # the other ranks are not here: no barrier
    backbones = {"probe_before": starting_backbone(cfg, paths, alone)}
    if paths.explora_checkpoint.is_file():
        backbones["probe_after"] = ViT.load(paths.explora_checkpoint, backbones["probe_before"].heads)
    for name, vit in backbones.items():
        net = Classifier(vit, cfg.model_features, "linear", 0, 0.0).to(ddp.device)
        parts = [(infer(net, s, cfg, ddp.device), s.labels()) for s in (train, select)]
        chosen = probe.fit_probe(net.cpu().head[1], *parts)
        bundle.save_tensors(getattr(paths, name), net.state_dict(), facts(cfg, "linear", False) | chosen)
    return {name: getattr(paths, name) for name in backbones}


# --- phase 2: the threshold -------------------------------------------------


def run_phase2(job):
    """CALIB_FIT logits -> thresholds.json, the sweep and its curve."""
    cfg, _, paths, store, _ = job
    z = read_logits(paths.val_calib_logits, store.open("CALIB_FIT", "phase2", "fit"))
    n, prior = cfg.phase2_n_thresholds, cfg.phase2_target_prior
    found = select_threshold_max_mcc(z["logits"], z["label"], n, True, prior, cfg.phase2_space)
    tau, best, metrics, curve = found
    metrics["mcc_optimism"] = scorecard.optimism(z["prob"], z["label"], z["group"], min(n, 1000), prior)
    bundle.write_json(paths.thresholds_json, dict(
        schema="streetvision/policy@1", policy_type="threshold", threshold=tau, n_thresholds=n,
        metrics=scorecard.rounded(metrics), optimize_metric=cfg.phase2_optimize_metric, target_prior=prior,
        split_used="val_calib/fit", n_samples=len(z["label"]), model_sha256=sha256_file(paths.model_best),
        decision="p>=threshold"))
    outputs = dict(thresholds=paths.thresholds_json)
    if cfg.phase2_save_sweep_curve:
        outputs["sweep"] = paths.threshold_sweep_csv
        rows = [dict(zip(curve.dtype.names, row.tolist())) for row in curve]
        bundle.write_csv(paths.threshold_sweep_csv, rows)
    if cfg.phase2_save_mcc_plot:
        outputs["curve"] = paths.mcc_curve_plot
        draw.save(plots.mcc_curve(curve, tau, best), paths.mcc_curve_plot)
    return outputs, dict(threshold=tau, mcc=best, mcc_optimism=metrics["mcc_optimism"])


# --- phase 4c: several views ------------------------------------------------


def choose_fusion(report, wanted):
    """The simplest mode within 0.002 MCC of the best on VAL_SELECT, or the one asked for."""
    top = max(r["mcc"] for r in report.values())
    return wanted if wanted != "auto" else next(m for m in MODES if report[m]["mcc"] >= top - 0.002)


def run_phase4c(job):
    """Every fusion mode on VAL_SELECT; the best, simplest one is frozen and fuses VAL_CALIB."""
    cfg, ddp, paths, store, _ = job
    net = load_model(paths.model_best).to(ddp.device)
    train = store.open("TRAIN", "phase4c_cvfm", "grad")
    select = store.open("VAL_SELECT", "phase4c_cvfm", "select")
    f_train, f_select = (infer(net, s, cfg, ddp.device, views=True) for s in (train, select))
    net, y_train, y_select, odd = net.cpu(), train.labels(), select.labels(), cfg.phase4c_inverse
    modules, rows, report = {}, [], {}

    def judge(mode, module):
        return answers(fuse_features(mode, *f_select, net, module, inverse=odd)[0], y_select)["val_mcc"]
    for mode in MODES:
        if mode in fusion.TRAINED:
            modules[mode], new = fusion.train_fusion(mode, net, f_train, y_train, cfg, judge)
            rows += new
        logits, weights = fuse_features(mode, *f_select, net, modules.get(mode), inverse=odd)
        s = scorecard.score(probability(logits.double()), y_select, 0.5, select.groups(), cfg.eval_resamples,
                            cfg.seed)
        report[mode] = dict(mcc=s["metrics"]["mcc"], ci=s["ci"].get("mcc"), weights=weights.mean(0).tolist())
    chosen = choose_fusion(report, cfg.phase4c_mode)
    untrained = max(MODES[1:6], key=lambda m: (report[m]["mcc"], -MODES.index(m)))
    tensors = {f"{mode}.{k}": v for mode, m in modules.items() for k, v in m.state_dict().items()}
    V, width = f_train[0].shape[1:]
    bundle.save_tensors(paths.cvfm_weights, tensors,
                        dict(mode=chosen, V=V, F=width, hidden=cfg.phase4c_hidden, latent=cfg.phase4c_latent))
    bundle.write_json(paths.cvfm_report, scorecard.rounded(dict(
        chosen=chosen, best_untrained=untrained, n=len(select), split="val_select", modes=report,
        rho=float(modules["trained"].rho.detach().sigmoid()))))
    bundle.write_csv(paths.cvfm_metrics, rows)
    frozen = net.to(ddp.device)
    calib = store.open("VAL_CALIB", "phase4c_cvfm", "infer_frozen", paths.cvfm_weights,
                       sha256_file(paths.cvfm_weights), frozen)
    f_calib = infer(frozen, calib, cfg, ddp.device, views=True)
    net = net.cpu()
    for samples, f, path in ((select, f_select, paths.val_select_fused),
                             (calib, f_calib, paths.val_calib_fused)):
        fused = {"logits_mac" if mac else "logits":
                 fuse_features(chosen, *f, net, modules.get(chosen), mac, odd)[0]
                 for mac in (False, True)[:1 + (net.head_mac is not None)]}
        save_logits(path, net, f[0], samples, fused)
    names = ("cvfm_weights", "cvfm_report", "cvfm_metrics", "val_calib_fused", "val_select_fused")
    return {n: getattr(paths, n) for n in names}, dict(mode=chosen, mcc=report[chosen]["mcc"])


# --- phase 5: calibration and guarantees -------------------------------------


def run_phase5(job):
    """CALIB_FIT picks and fits calibrator and cut; CALIB_CONF, untouched by that, gives guarantees."""
    cfg, _, paths, store, log = job
    fused = (paths.phase4c_dir / "manifest.json").is_file()
    calib, select = ((paths.val_calib_fused, paths.val_select_fused) if fused
                     else (paths.val_calib_logits, paths.val_select_logits))
    fit = read_logits(calib, store.open("CALIB_FIT", "phase5", "fit"))
    conf = read_logits(calib, store.open("CALIB_CONF", "phase5", "fit"))
    scores = read_logits(select, store.open("VAL_SELECT", "phase5", "select"))
    rows, method = compare_calibrators(fit, cfg.phase2_n_thresholds, cfg.phase2_target_prior)
    method = method if cfg.phase5_method == "auto" else cfg.phase5_method
    source, name = ("prob_mac", "identity") if method == "mac_cal" else ("prob", method)
    if fit[source] is None:
        raise run.UserError("--phase5-method mac_cal needs a model trained with --phase1-mac-cal")
    calibrate = CALIBRATORS[name]().fit(fit[source], fit["label"], fit["group"])
    p_fit, p_conf, p_select = (calibrate(z[source]) for z in (fit, conf, scores))
    tau = mcc_sweep(p_fit, fit["label"], cfg.phase2_n_thresholds, cfg.phase2_target_prior)["threshold"]
    params = conformal.guarantees(
        conf, p_conf, p_select, tau, xi=cfg.phase5_xi, alpha=cfg.phase5_alpha, delta=cfg.phase5_delta,
        fnr_alpha=cfg.phase5_fnr_alpha, unit=cfg.phase5_unit, exchangeable=cfg.split_mode != "official_test")
    params |= dict(calibrator=calibrate.to_json(), head="head_mac" if method == "mac_cal" else "head",
                   decision_threshold=tau, tie_break="hash")
    metrics = scorecard.rounded(scorecard.calibration_gain(conf, p_conf, tau, cfg.eval_resamples, cfg.seed))
    bundle.write_json(paths.scrc_params_json, dict(
        schema="streetvision/policy@1", policy_type="scrc", metrics=metrics, scrc_params=params,
        split_used="val_calib", n_fit=len(fit["label"]), n_conf=len(conf["label"]),
        model_sha256=sha256_file(paths.model_best),
        cvfm_sha256=sha256_file(paths.cvfm_weights) if fused else None,
        fusion_mode=bundle.read_json(paths.cvfm_report)["chosen"] if fused else "single_view"))
    bundle.write_json(paths.calibration_summary,
                      dict(chosen=method, split="val_calib/fit", methods=scorecard.rounded(rows)))
    draw.save(plots.reliability_diagram(conf["prob"], p_conf, conf["label"]), paths.reliability_plot)
    log("phase5", method=method, threshold=tau, **metrics)
    return dict(scrc_params=paths.scrc_params_json, summary=paths.calibration_summary,
                plot=paths.reliability_plot), dict(metrics, method=method)


# --- phase 6: the bundle ---------------------------------------------------------


def run_phase6(job):
    """Copy what prediction needs into export/, every file with its hash in bundle.json."""
    cfg, _, paths, store, _ = job
    config = facts(cfg, cfg.model_head, cfg.phase1_mac_cal) | dict(
        views=views_of(cfg), inverse=cfg.phase4c_inverse, class_names=CLASSES)
    card = dict(model_name=cfg.phase6_name, version=cfg.phase6_version, submitted_by=cfg.phase6_submitter)
    manifests = {p: getattr(paths, STEPS[p].folder) / "manifest.json" for p in PHASES[:-1]}
    return export.write_bundle(
        paths, store.sha256, manifests, config=config, card=card, trained_on_weights=bool(cfg.model_weights),
        license=cfg.phase6_license, compress=cfg.phase6_compress, probes=cfg.phase6_probes), {}


# --- evaluate ------------------------------------------------------------


def RoadworkPredictor(path, device="cpu"):
    """A bundle, ready: predictor(image) -> the float to return; .explain(image) -> what is behind it."""
    return serving.Predictor(path, load_model, device)


def evaluate(cfg):
    """Open VAL_TEST once, with nothing but the bundle: modes, policies, intervals, plots, report."""
    path, cfg = bundle_path(cfg)
    ddp, paths = run.init(cfg.device), Paths(cfg.out)
    predictor = RoadworkPredictor(path, ddp.device)
    check_access_log(paths.run)
    store = SplitStore(data_folder(cfg), paths.run, ROLES)
    if store.sha256 != predictor.bundle["splits_sha256"]:
        raise run.UserError(f"{paths.splits_json} is not the split that this bundle was made with")
    test = store.open("VAL_TEST", "evaluate", "report")
    report = testreport.report(predictor, test, paths.evaluation_dir, store.data, quick=cfg.mode == "quick",
                               resamples=cfg.eval_resamples, windows=cfg.eval_windows, seed=cfg.seed,
                               level=cfg.eval_confidence, method=cfg.eval_interval,
                               bundle_sha256=sha256_file(path), warning=store.splits["warning"])
    if Path(paths.run, "log.jsonl").is_file():
        best = dict(report["results"]["bundle"]["scrc"]["metrics"])     # MCC first: the task's own score
        run.record(paths.run, "eval", mcc=best.pop("mcc"), n=len(test), n_groups=report["n_groups"], **best)
    print(testreport.summary(report, paths.evaluation_report_json))
    return report


# --- commands --------------------------------------------------------------


TRAINED_ON = "data_ model_ source_ hardware_precision"
STEPS = {"phase4a_explora": Step(run_phase4a, "phase4a_dir", f"{TRAINED_ON} phase4a_", all_ranks=True),
         "phase1": Step(run_phase1, "phase1_dir", f"{TRAINED_ON} phase1_ peft_", (), ("explora_checkpoint",),
                        True),
         "phase2": Step(run_phase2, "phase2_dir", "phase2_", ("model_best", "val_calib_logits")),
         "phase4c_cvfm": Step(run_phase4c, "phase4c_dir", "model_ phase4c_ hardware_precision",
                              ("model_best",)),
         "phase5": Step(run_phase5, "phase5_dir", "phase2_ phase5_ split_mode",
                        ("model_best", "val_calib_logits"), ("val_calib_fused", "cvfm_report")),
         "phase6": Step(run_phase6, "export_dir", "phase4c_ phase6_ model_",
                        ("model_best", "scrc_params_json"),
                        ("cvfm_weights", "thresholds_json", "probe_before", "probe_after"))}


def train(cfg):
    """The requested phases in run-time order; what is complete and unchanged is skipped.  Presets that draw
    their own data end with the evaluation."""
    wanted = pipeline.wanted_phases(cfg.phases, STEPS)
    if not 0 < cfg.phase4a_temperature <= 1:
        raise run.UserError(f"--phase4a-temperature must be in (0, 1], not {cfg.phase4a_temperature}")
    ddp, paths = run.init(cfg.device), Paths(cfg.out)
    serving.scaler(cfg.hardware_precision, ddp.device)          # refuses fp16 without CUDA
    log = run.Log(cfg, ddp)
    paths.ensure_dirs()
    if ddp.rank == 0:
        splits(cfg)
    if ddp.world > 1:
        dist.barrier()
    store = SplitStore(data_folder(cfg), paths.run, ROLES, blind=("phase4a_explora",), write=ddp.rank == 0)
    pipeline.run_phases(STEPS, wanted, cfg, ddp, paths, store, log, Job((cfg, ddp, paths, store, log)))
    if ddp.rank == 0 and not cfg.data and not cfg.phases:
        evaluate(cfg)
    log.finish()


def predict(cfg):
    """One float a line for every image given."""
    predictor = RoadworkPredictor(bundle_path(cfg)[0], run.init(cfg.device).device)
    if not cfg.words:
        raise run.UserError("predict needs images: predict --bundle RUN/export/bundle.json IMAGE...")
    for name in cfg.words:
        try:
            image = images.decode(Path(name).read_bytes())
        except ValueError as error:
            raise run.UserError(f"{name}: {error}") from None
        print(f"{predictor(image):.9f}")


def sample(cfg):
    """Freshly drawn street scenes with the bundle's answers -> samples/predictions.png."""
    predictor = RoadworkPredictor(bundle_path(cfg)[0], run.init(cfg.device).device)
    made = [streets.frame(cfg.seed + 1, k, 0, "A", cfg.size, 0.5) for k in range(8)]
    text, path = [], Path(cfg.out, "samples/predictions.png")
    for image, about in made:
        p, y = predictor(image), about["label"]
        text.append(f"{CLASSES[y]}: {p:.2f}{'' if (p > 0.5) == y else '  WRONG'}")
    draw.save(draw.grid([image for image, _ in made], 4, text, scale=2), path)
    print(path)


def plan(cfg):
    """Size and cost of phase 1 without allocating the model."""
    with torch.device("meta"):
        net = build(cfg, ViT.sized(cfg.model_size))
    D, depth, *_, patch = SIZES[cfg.model_size]
    params = sum(p.numel() for p in net.parameters())
    run.print_plan(cfg, speed.cost(cfg, params, D, depth, 5 + (cfg.model_image // patch) ** 2))


def ablate(cfg):
    """What one idea is worth on VAL_SELECT, as a paired difference -> ablation.json."""
    print(json.dumps({cfg.what: ablation.ablate(cfg, train, data_folder(cfg))}, indent=1))


def bench(cfg):
    """Times of a training step and a forward pass: float32, at --hardware-precision, compiled."""
    print(speed.table(speed.bench(cfg, lambda: build(cfg, ViT.sized(cfg.model_size)),
                                  run.init(cfg.device).device)))


COMMANDS = {"run": train, "train": train, "evaluate": evaluate, "predict": predict, "sample": sample,
            "splits": splits, "demo-data": demo_data, "validate": validate, "config": show_config,
            "doctor": pipeline.doctor, "ablate": ablate, "bench": bench, "plan": plan}

if __name__ == "__main__":
    try:
        sys.argv[1:] = pipeline.translate(sys.argv[1:], Config)
    except run.UserError as error:
        print(f"{run.script_name()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    run.main(Config, PRESETS, COMMANDS)
