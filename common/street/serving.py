"""A classifier at work: features of a split, logits on disk, and the predictor that runs from a bundle alone.

N samples  V views of a sample  F features
"""

from pathlib import Path

import numpy as np
import scipy
import torch

from common import run
from common.classify import binary_metrics, mcc_sweep
from common.street import bundle, conformal, fusion
from common.street.calibrate import Calibrator
from common.street.subnet import returned
from common.street.views import frames_of, make_views, resized, stack


def autocast(precision, device):
    """auto trusts compute capability 8.0: emulated bfloat16 is slow, and also counts as supported."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    if precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return run.autocast(device, precision == "auto")


def scaler(precision, device):
    """The gradient scaler of a training run: float16 needs one, all else gets one that does nothing."""
    if precision == "fp16" and device.type != "cuda":
        raise run.UserError("--hardware-precision fp16 needs a CUDA device; use fp32 or bf16")
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


@torch.no_grad()
def infer(net, samples, device, size, how="square", views=None, precision="auto", workers=0, chunk=64):
    """Features of all samples, float32 on the CPU: [N, F], or ([N, V, F], boxes [N, V, 4]) when views are
    wanted.

    views: dict(source, canvas, grid, overlap) of common.street.views.make_views.  Of frames every one goes
    through the net once, however many samples it is a view of.
    """
    net.eval()

    def embed(x):
        with autocast(precision, device):
            return net.features(x.to(device)).float().cpu()
    if views and views["source"] == "tiles":
        features, boxes = [], []
        for a in range(0, len(samples), chunk):
            made = [make_views(samples, i, size, how, **views)
                    for i in range(a, min(a + chunk, len(samples)))]
            x_NVCHW, box_NV4 = (torch.stack(t) for t in zip(*made))
            features.append(embed(x_NVCHW.flatten(0, 1)).unflatten(0, x_NVCHW.shape[:2]))
            boxes.append(box_NV4)
        return torch.cat(features), torch.cat(boxes)
    wanted_NV = np.array([frames_of(samples, i) if views else [i] for i in range(len(samples))])
    need, place = np.unique(wanted_NV, return_inverse=True)
    boxes = {}

    def picture(i):
        image = samples.image(i)
        boxes[i] = (0.0, 0.0, *image.size)
        return resized(image, size, how)
    need = need.tolist()
    f_MF = torch.cat([embed(stack(picture, need[a:a + chunk], workers)) for a in range(0, len(need), chunk)])
    if not views:
        return f_MF
    place_NV = torch.from_numpy(place.reshape(wanted_NV.shape))
    return f_MF[place_NV], torch.tensor([boxes[i] for i in need])[place_NV]


@torch.no_grad()
def head_logits(head, features):
    """Logits of features [..., F] in float32 on the head's device, back on the CPU."""
    device = next(head.parameters()).device
    return head.eval()(features.to(device)).float().cpu()


def probability(logits_NC):
    """P(roadwork) of logits [N, 2], float64."""
    return scipy.special.softmax(np.asarray(logits_NC, np.float64), 1)[:, 1]


def fuse_features(mode, f_NVF, boxes_NV4, net, module=None, mac=False, inverse=False):
    """Features of all views -> (logits [N, 2], weights [N, V]); module: the trained one, mac: use the second
    head, inverse: of fusion.fuse."""
    head = net.head_mac if mac else net.head
    if mode not in fusion.TRAINED:
        return fusion.fuse(mode, head_logits(head, f_NVF), boxes_NV4, inverse=inverse)
    with torch.no_grad():
        logits, weights, _ = module.eval()(f_NVF, head.eval())
    return logits, weights


def select_threshold_max_mcc(logits_NC: np.ndarray, labels_N: np.ndarray, n_thresholds: int = 5000,
                             return_curve: bool = False, target_prior: float | None = None,
                             space: str = "prob") -> tuple:
    """(tau, mcc, metrics[, curve]) of the rule p >= tau with the highest MCC on a grid; ties: mid-plateau.

    space "logit": thresholds are equally spaced quantiles of the scores, for scores that crowd near 0 or 1.
    """
    prob = probability(logits_NC)
    grid = np.quantile(prob, np.linspace(0, 1, n_thresholds)) if space == "logit" else None
    found = mcc_sweep(prob, labels_N, n_thresholds, target_prior, grid)
    row = found["curve"][found["index"]]
    m = binary_metrics(prob, labels_N, found["threshold"])()
    keep = ("mcc", "mcc_prior50", "accuracy", "precision", "recall", "f1", "fnr", "fpr")
    metrics = {k: m[k] for k in keep} | {k: int(row[k]) for k in ("tp", "tn", "fp", "fn")}
    metrics |= dict(exact_threshold=found["exact_threshold"], exact_mcc=found["exact_mcc"])
    return (found["threshold"], found["mcc"], metrics) + ((found["curve"],) if return_curve else ())


def answers(logits_NC, label_N):
    """Scores of logits [N, 2] at 0.5; val_mcc_best, at the threshold that suits these samples best, is only
    logged."""
    p = probability(logits_NC)
    m = binary_metrics(p, label_N)()
    return dict(val_loss=m["nll"], val_acc=m["accuracy"], val_mcc=m["mcc"], val_fnr=m["fnr"],
                val_fpr=m["fpr"],
                val_mcc_best=mcc_sweep(p, label_N, 101)["exact_mcc"])


# --- logits on disk ----------------------------------------------------------


def save_logits(path, net, features_NF, samples, fused=None):
    """logits [N, 2], labels, features, with MaC-Cal the second head's logits; ids and groups in the
    metadata."""
    heads = {"logits": net.head} | ({"logits_mac": net.head_mac} if net.head_mac is not None else {})
    tensors = fused or {name: head_logits(head, features_NF) for name, head in heads.items()}
    bundle.save_tensors(path, {**tensors, "labels": torch.from_numpy(samples.labels()),
                               "features": features_NF},
                        dict(ids=samples.ids(), groups=samples.groups().tolist()))


def read_logits(path, samples=None):
    """dict(prob, prob_mac or None, label, group, id) of a logits file, float64, cut down to the ids of
    samples."""
    tensors, meta = bundle.load_tensors(path)
    keep = np.isin(meta["ids"], samples.ids()) if samples is not None else np.ones(len(meta["ids"]), bool)
    prob = {k: probability(v.double())[keep] for k, v in tensors.items() if k.startswith("logits")}
    return dict(logits=tensors["logits"].double().numpy()[keep], prob=prob["logits"],
                prob_mac=prob.get("logits_mac"), label=tensors["labels"].numpy()[keep],
                group=np.array(meta["groups"])[keep], id=np.array(meta["ids"])[keep])


# --- prediction ----------------------------------------------------------------


class Loose:
    """Images in hand, with the face of common.street.splits.Samples: one sample, the others are its
    context."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return 1

    def image(self, i):
        return self.pictures[i]

    def of_group(self, i):
        return range(len(self.pictures))


class Predictor:
    """A bundle, ready: predictor(image) -> the float to return; predictor.explain(image) -> what is behind
    it.

    load_model: path of model.safetensors -> module with .features, .head, .head_mac.  context: more frames of
    the same pass, used when the bundle fuses frames.  Raises run.UserError on an unsound bundle.
    """

    def __init__(self, path, load_model, device="cpu"):
        path = Path(path)
        if errors := bundle.bundle_errors(path):
            raise run.UserError(f"{path}: {errors[0]}")
        self.bundle, root, self.device = bundle.read_json(path), path.parent, torch.device(device)
        self.config = bundle.read_json(root / self.bundle["model_config"])
        self.params = bundle.read_json(root / self.bundle["policy"]["path"])["scrc_params"]
        self.net = load_model(root / self.bundle["model_checkpoint"])
        self.calibrate = Calibrator.from_json(self.params["calibrator"])
        self.probes = {Path(p["path"]).stem: load_model(root / p["path"])
                       for p in (self.bundle.get("probes") or {}).values()}
        self.modules = {}
        if self.bundle["cvfm_weights"]:
            tensors, m = bundle.load_tensors(root / self.bundle["cvfm_weights"])
            for mode, kind in fusion.TRAINED.items():
                self.modules[mode] = kind(m["V"], m["F"], m["hidden"], m["latent"])
                own = {k.removeprefix(mode + "."): v for k, v in tensors.items() if k.startswith(mode + ".")}
                self.modules[mode].load_state_dict(own)

    def features(self, samples, views=True, net=None):
        """infer with the bundle's own settings; the net stays on the CPU between calls."""
        net = (net or self.net).to(self.device)
        out = infer(net, samples, self.device, self.config["image"], self.config["preprocess"],
                    self.config["views"] if views else None, "fp32")
        net.cpu()
        return out

    def probe(self, name, samples):
        """P(roadwork) of the logistic regression on a frozen backbone, and its threshold."""
        net = self.probes[name]
        f = self.features(samples, views=False, net=net)
        return probability(head_logits(net.head, f).double()), net.meta["threshold"]

    def fused(self, f_NVF, boxes_NV4, mode=None, mac=None):
        """P(roadwork) before calibration [N] and view weights [N, V] in a fusion mode, the bundle's by
        default."""
        mode = mode or self.bundle["fusion_mode"]
        mac = self.params["head"] == "head_mac" if mac is None else mac
        logits, weights = fuse_features(mode, f_NVF, boxes_NV4, self.net, self.modules.get(mode), mac,
                                        self.config["inverse"])
        return probability(logits.double()), weights.numpy()

    def policy(self, prob, ids):
        """Calibrated p, returned float, answer, accepted, sets, surely_none (the FNR rule) of fused
        probabilities."""
        p, s = self.calibrate(prob), self.params["selection"]
        tau, t_lo = self.params["decision_threshold"], self.params["fnr"]["t_lo"]
        return dict(p_cal=p, p_out=returned(p, tau), pred=(p >= tau).astype(int),
                    accepted=conformal.accepts(p, conformal.tie_key(ids), s["lambda1"], s["lambda1_tie"]),
                    sets=conformal.label_set(p, self.params["risk"]["lambda2"]),
                    surely_none=p < (-1.0 if t_lo is None else t_lo))

    def explain(self, image, context=(), name="image"):
        f, boxes = self.features(Loose([im.convert("RGB") for im in (image, *context)]))
        prob, weights = self.fused(f, boxes)
        out = {k: v[0] for k, v in self.policy(prob, [name]).items()}
        return dict(p_raw=float(prob[0]), p_cal=float(out["p_cal"]), p_out=float(out["p_out"]),
                    pred=int(out["pred"]),
                    accepted=bool(out["accepted"]), set=[c for c in (0, 1) if out["sets"][c]],
                    surely_none=bool(out["surely_none"]), weights=weights[0].tolist())

    def __call__(self, image, context=()):
        return self.explain(image, context)["p_out"]
