"""Frechet distance, Inception score and friends of saved samples against a reference.

    python -m eval.fid SAMPLES --ref REF --inception FILE       each a folder, .tar, .npz; REF also statistics
    python -m eval.fid FOLDER --save ref.npz --inception FILE   statistics of a folder, for later
    python -m eval.fid RUN --ref REF --inception FILE --last 3  the newest three sample sets of a run

FILE is pt_inception-2015-12-05-6726825d.pth of the pytorch-fid releases.  Images stream through: memory does
not grow with their number, except with --manifold.  For a run the result is also added to its log.
"""

import contextlib
import hashlib
import json
import re
import statistics
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from scipy.special import xlogy
from tqdm import tqdm

from common.files import sha256_file, write_atomic
from common.dino import DinoV3
from common.metrics import (InceptionV3, Moments, frechet_bias, frechet_distance, kernel_distance,
                            manifold_metrics)
from common.run import UserError, init
from common.runlog import record
from eval._images import Images, npz_shapes, sample_sets
from eval._shared import Parser, cli, text_table

SPLITS, SEED = 10, 2020                                         # of the Inception score, as torch-fidelity
WEIGHTS = {"6726825d": "pt_inception-2015-12-05, pytorch-fid release fid_weights",
           "0cc3c7bd": "torchvision Inception_V3_Weights.IMAGENET1K_V1, not the FID network"}


@contextlib.contextmanager
def one_line():
    """What the metrics refuse with ValueError is a mistake in the user's files here."""
    try:
        yield
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(str(error)) from None


class Score:
    """Inception score of a stream of n rows of logits: what inception_score gives, without keeping them.

    Row r belongs to the split its place in RandomState(2020)'s permutation of n falls in.
    """

    def __init__(self, n):
        place = np.argsort(np.random.RandomState(SEED).permutation(n))
        edges = [i * n // SPLITS for i in range(1, SPLITS)]
        self.split, self.count = np.searchsorted(edges, place, side="right"), np.zeros(SPLITS)
        self.sum_p = self.sum_plogp = 0.0

    def update(self, rows, logits_NK):
        log_p = torch.log_softmax(logits_NK.double().cpu(), 1).numpy()
        member = np.eye(SPLITS)[self.split[rows]]               # [N, splits]
        self.count += member.sum(0)
        self.sum_p = self.sum_p + member.T @ np.exp(log_p)
        self.sum_plogp = self.sum_plogp + member.T @ (np.exp(log_p) * log_p).sum(1)

    def result(self):
        """(mean, std) over the splits that hold rows."""
        ok = self.count > 0
        p = self.sum_p[ok] / self.count[ok, None]
        kl = self.sum_plogp[ok] / self.count[ok] - xlogy(p, p).sum(1)
        return float(np.exp(kl).mean()), float(np.exp(kl).std())


@torch.no_grad()
def measure(source, net, device, batch=64, spatial=False, keep=False):
    """Features of all images of a source -> dict(moments, spatial, score, features, n, unreadable)."""
    moments = tap = score = None
    features, where = [], device if device.type == "cuda" else "cpu"        # others lack float64
    for rows, x_NCHW in tqdm(source.batches(batch), total=-(-source.n // batch), desc=source.path.name,
                             disable=None):
        with one_line():
            out = net.features(x_NCHW.to(device))
            moments = (moments or Moments(out["pool"].shape[1], where)).update(out["pool"])
            if spatial:
                tap = (tap or Moments(out["spatial"].shape[1], where)).update(out["spatial"])
        if "logits" in out:
            score = score or Score(source.n)
            score.update(rows, out["logits"])
        if keep:
            features.append(out["pool"].cpu())
    if moments is None:
        raise UserError(f"none of the {source.n} images in {source.path} can be read")
    return dict(moments=moments, spatial=tap, score=score and score.result(), n=moments.n,
                unreadable=list(source.bad), features=torch.cat(features) if keep else None)


class Dino:
    """DINOv3's class token behind the interface of the Inception network."""
    comparable, layer, name = True, "DINOv3 class token", "fd_dino"

    def __init__(self, path, device):
        self.net = DinoV3.load(path).to(device)

    def features(self, x_NCHW):
        return dict(pool=self.net(x_NCHW))


def reference(path, net, device, args):
    """Statistics of REF: loaded when it is an .npz that holds them, else measured from its images."""
    keys = npz_shapes(path) if Path(path).suffix == ".npz" else {}
    ready = "mu" in keys or "ref_mu" in keys
    out = dict(moments=None, spatial=None, features=None, unreadable=[],
               kind="statistics" if ready else "images")
    with one_line():
        if ready:
            out["moments"] = Moments.load(path)
            out["n"] = out["moments"].n
        if ready and args.spatial:
            out["spatial"] = Moments.load(path, spatial=True)
    if ready and args.manifold and "arr_0" not in keys:
        raise UserError(f"{path} holds statistics only; --manifold needs reference images")
    if not ready or args.manifold:
        if net is None:
            raise UserError(f"{path} holds images: name the network with --inception FILE or --dino DIR")
        found = measure(Images(path, args.limit), net, device, args.batch, args.spatial, args.manifold)
        out = {**found, **{k: v for k, v in out.items() if v not in (None, [])}}
    return out


def compare(sample, ref, args):
    """The numbers: fid, its bias, Inception score and, when asked for, sfid, manifold measures and KID."""
    mine, theirs = sample["moments"], ref["moments"]
    n, m, dim = mine.n, theirs.n, len(mine.mean)
    out = {}
    with one_line():
        out[args.name] = frechet_distance(mine.mean, mine.cov, theirs.mean, theirs.cov)
        out[f"{args.name}_bias"] = bias = frechet_bias(theirs.cov, n or np.inf, m or np.inf)
        if sample.get("score"):
            out["isc"], out["isc_std"] = sample["score"]
        if args.spatial:
            tap, other = sample["spatial"], ref["spatial"]
            out["sfid"] = frechet_distance(tap.mean, tap.cov, other.mean, other.cov)
        if args.manifold:
            real, fake = ref["features"], sample["features"]
            out.update(manifold_metrics(real, fake))
            size = min(1000, len(real), len(fake))
            out["kid"], out["kid_std"] = kernel_distance(real, fake, subset_size=size)
    for count, what in ((n, "samples"), (m, "reference images")):
        if count is not None and count <= dim:
            print(f"warning: {count} {what} for {dim} features: sampling alone puts two sets of these sizes "
                  f"from one Gaussian with the reference covariance about {bias:.3g} apart", file=sys.stderr)
    return {**out, "n": sample["n"], "n_reference": ref["n"]}


def provenance(path, sample, ref, net, args):
    """What a reader needs to repeat or distrust the numbers: names, sizes and hashes, no folders."""
    weights = None
    if net is not None:
        weights = identity(args.dino or args.inception)
        weights["source"] = WEIGHTS.get(weights.get("sha256", "")[:8], "unknown")
    return dict(
        samples=identity(path), unreadable=len(sample["unreadable"]),
        unreadable_names=sample["unreadable"][:100],
        reference=dict(identity(args.ref), kind=ref["kind"]), reference_unreadable=len(ref["unreadable"]),
        weights=weights, comparable=net is None or net.comparable,
        resize=args.resize if args.inception else None,
        layer=f"{getattr(net, 'layer', 'pool3')}, {len(sample['moments'].mean)}",
        dtype="float32 network without TF32, float64 statistics",
        quantisation="uint8 as stored", seed=SEED, splits=SPLITS, batch=args.batch, torch=torch.__version__,
        torchvision=None, device=torch.cuda.get_device_name() if args.on == "cuda" else args.on)


def identity(path):
    """Name, bytes and SHA-256 of a file; of a folder the SHA-256 of its sorted listing with sizes."""
    path = Path(path)
    if path.is_file():
        return dict(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
    files = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
    listing = "".join(f"{name}\0{size}\n" for name, size in files)
    return dict(name=path.name, bytes=sum(size for _, size in files),
                listing_sha256=hashlib.sha256(listing.encode()).hexdigest())


def load_network(args, device):
    """The network that makes the features, or None when none is named."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if getattr(args, "dino", None):
        with one_line():
            return Dino(args.dino, device)
    if not args.inception:
        return None
    if not Path(args.inception).is_file():
        raise UserError(f"no Inception weights at {args.inception}")
    with one_line(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # said once, below, in our own words
        net = InceptionV3.load(args.inception, args.resize, imagenet=args.imagenet).to(device)
    if not net.comparable:
        print("warning: ImageNet weights: these distances are not FID and compare with no published number",
              file=sys.stderr)
    return net


def score_one(path, net, ref, device, args):
    """One sample set -> flat record, ready for JSON."""
    keys = npz_shapes(path) if Path(path).suffix == ".npz" else {}
    if "mu" in keys and "arr_0" not in keys:
        with one_line():
            moments = Moments.load(path)
        sample = dict(moments=moments, n=moments.n, unreadable=[])
        if args.spatial or args.manifold or args.save:
            raise UserError(f"{path} holds statistics only; --spatial, --manifold and --save need images")
    else:
        if net is None:
            raise UserError(f"{path} holds images: name the network with --inception FILE "
                            "(pt_inception-2015-12-05-6726825d.pth of the pytorch-fid releases)")
        sample = measure(Images(path, args.limit), net, device, args.batch, args.spatial, args.manifold)
    if sample["unreadable"]:
        names = ", ".join(sample["unreadable"][:5]) + (", ..." if len(sample["unreadable"]) > 5 else "")
        print(f"warning: {len(sample['unreadable'])} unreadable in {path}: {names}", file=sys.stderr)
    if args.save:
        weights = dict(identity(args.dino or args.inception), resize=args.resize if args.inception else None)
        sample["moments"].save(args.save, meta=dict(weights=weights, source=Path(path).name),
                               spatial=sample["spatial"])
        print(f"{args.save}: statistics of {sample['n']} images")
    if ref is None:
        return None
    return {**compare(sample, ref, args), "record": provenance(path, sample, ref, net, args)}


def show(records, steps):
    """The numbers for a reader: one row a sample set; mean and spread below several."""
    keys = [k for k, v in records[0].items() if isinstance(v, float)] + ["n", "n_reference"]
    form = lambda v: "-" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v)
    rows = [[r["record"]["samples"]["name"] if s is None or s < 0 else s, *(form(r[k]) for k in keys)]
            for s, r in zip(steps, records)]
    if len(records) > 1:
        for name, f in (("mean", statistics.fmean), ("std", statistics.stdev)):
            rows.append([name, *(form(f(r[k] for r in records)) if isinstance(records[0][k], float) else ""
                                 for k in keys)])
    print(text_table(["samples", *keys], rows))


def arguments(argv):
    parser = Parser("eval.fid", __doc__)
    parser.add_argument("samples", help="folder, .tar, .npz (arr_0 uint8 [N, H, W, 3] or mu, sigma) or a run")
    parser.add_argument("--ref", help="reference: .npz with mu and sigma, or images in any of those forms")
    parser.add_argument("--inception", metavar="FILE", help="the FID network, .pth or .safetensors")
    parser.add_argument("--resize", choices=("tf", "half_pixel"), default="tf",
                        help="to 299 pixels: tf as ADM, EDM, torch-fidelity; half_pixel as pytorch-fid [tf]")
    parser.add_argument("--dino", metavar="DIR", help="DINOv3 ViT in Hugging Face layout instead: FD-DINO")
    parser.add_argument("--imagenet", action="store_true",
                        help="accept torchvision's weights; not comparable")
    parser.add_argument("--spatial", action="store_true", help="also sFID")
    parser.add_argument("--manifold", action="store_true",
                        help="also precision, recall, density, coverage, KID; keeps features, 8 KB an image")
    parser.add_argument("--last", type=int, metavar="K", help="of a run: its newest K sample sets")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images of each set")
    parser.add_argument("--save", metavar="NPZ", help="keep the statistics of SAMPLES")
    parser.add_argument("--out", metavar="JSON", help="write the record [metrics.json in a run, else none]")
    parser.add_argument("--batch", type=int, default=64, help="images at once [64]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    args = parser.parse_args(argv)
    for name in ("last", "limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.dino and (args.inception or args.spatial):
        raise UserError("--dino stands instead of --inception, and has no --spatial")
    if args.save and (args.last or 1) > 1:
        raise UserError("--save keeps the statistics of one set; --last asks for several")
    args.name = Dino.name if args.dino else "fid"
    if not args.ref and not args.save:
        raise UserError("nothing to compare with: give --ref, or --save to keep the statistics")
    return args


def main(argv=None):
    args = arguments(argv)
    path = Path(args.samples)
    run = path if (path / "log.jsonl").is_file() else None
    if args.last and not run:
        raise UserError(f"--last needs a run directory; {path} holds no log.jsonl")
    if not path.exists():
        raise UserError(f"nothing at {path}")
    if args.ref and not Path(args.ref).exists():
        raise UserError(f"no reference at {args.ref}")
    sets = sample_sets(path)[-(args.last or 1):] if run else [(None, path)]
    device = init(args.device).device
    args.on = device.type
    net = load_network(args, device)
    ref = reference(args.ref, net, device, args) if args.ref else None
    records = []
    for step, source in sets:
        result = score_one(source, net, ref, device, args)
        if result is None:
            continue
        scale = re.fullmatch(r"alpha(\d+(?:\.\d+)?)", source.stem)          # as drift_latent names its sets
        names = dict(step=step) if run and step >= 0 else dict(alpha=float(scale[1])) if run and scale else {}
        records.append(result | names)
        if run:
            record(run, "eval", **{k: v for k, v in records[-1].items() if v is not None})
    if not records:
        return
    show(records, [s for s, _ in sets])
    out = args.out or (run / "metrics.json" if run else None)
    if out:
        write_atomic(out, json.dumps(records if args.last else records[0], indent=1).encode())


if __name__ == "__main__":
    cli("eval.fid", main)
