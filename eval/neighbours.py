"""Are samples copies of training images?

    python -m eval.neighbours SAMPLES --data TRAINING [--held-out REAL] [--inception FILE]

For each sample the nearest training images, by pixels (plain and mirrored) and, with an Inception file, by
the cosine of its features.  Held-out real images go through the same search: the null.  A sample nearer to
the training set than all but 0.1 % of them is flagged.  Writes neighbours.json and neighbours.png.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import draw
from common.files import write_atomic
from common.metrics import nearest_neighbours
from common.run import UserError, init
from eval._images import Images, sample_sets
from eval._shared import Parser, cli, text_table
from eval.fid import identity, load_network

QUANTILE = 0.001


def small(x_NCHW, side):
    """uint8 [N, 3, H, W] -> uint8 [N, side, side, 3], box filtered: what pixels are compared in."""
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in x_NCHW]
    return np.stack([np.asarray(x if x.size == (side, side) else x.resize((side, side), Image.BOX))
                     for x in images])


@torch.no_grad()
def gather(path, args, net, device):
    """All images of a source -> dict(rows, pixels uint8 [N, side, side, 3], unit features [N, 2048])."""
    source = Images(path, args.limit)
    rows, pixels, features = [], [], []
    for part, x_NCHW in tqdm(source.batches(), total=-(-source.n // 64), desc=source.path.name, disable=None):
        rows += part
        pixels.append(small(x_NCHW, args.side))
        if net is not None:
            features.append(torch.nn.functional.normalize(net(x_NCHW.to(device))[0], dim=1).cpu())
    if not rows:
        raise UserError(f"none of the {source.n} images in {path} can be read")
    order = np.argsort(rows)
    return dict(source=source, rows=np.array(rows)[order], pixels=np.concatenate(pixels)[order],
                features=torch.cat(features)[torch.from_numpy(order)] if features else None)


def search(query, data, k):
    """Nearest k of data for each query -> dict(pixel, index, flip [Q, k]; cosine, cosine_index).

    pixel: root mean square difference in grey levels, the smaller over both orientations; flip: mirrored won.
    """
    q, d = query["pixels"], data["pixels"]
    scale = np.sqrt(q[0].size)
    plain, at = nearest_neighbours(q, d, k)
    mirror, at_mirror = nearest_neighbours(np.ascontiguousarray(q[:, :, ::-1]), d, k)
    both, where = torch.cat([plain, mirror], 1), torch.cat([at, at_mirror], 1)
    both, order = both.sort(dim=1, stable=True)
    flip, where = order >= k, where.gather(1, order)
    out = dict(pixel=(both[:, :k] / scale).numpy(), index=where[:, :k].numpy(), flip=flip[:, :k].numpy())
    if query["features"] is not None:
        distance, index = nearest_neighbours(query["features"], data["features"], k)
        out.update(cosine=(1 - distance ** 2 / 2).numpy(), cosine_index=index.numpy())
    return out


def verdict(found, null):
    """Which samples are suspiciously near -> (flags {space: [Q] bool}, thresholds {space: number}).

    Nearer than the 0.1 % quantile of the null; without a null only exact copies are.
    """
    if null is None:
        return dict(pixel=found["pixel"][:, 0] == 0), dict(pixel=0.0)
    flags, limits = {}, {}
    for space, sign in (("pixel", 1), ("cosine", -1)):          # small differences, large cosines
        if space in found:
            limits[space] = sign * float(np.quantile(sign * null[space][:, 0], QUANTILE))
            flags[space] = sign * found[space][:, 0] < sign * limits[space]
    return flags, limits


def report(sample, data, found, null, space):
    """The JSON: neighbours of each sample by name, distances, flags; the null; the share of equal labels."""
    flags, limits = verdict(found, null)
    names, index = data["source"].name, found["index" if space == "pixel" else "cosine_index"]
    items = []
    for i, row in enumerate(sample["rows"]):
        item = dict(sample=sample["source"].name(row), flagged=[s for s, f in flags.items() if f[i]],
                    pixel=[dict(image=names(data["rows"][j]), rms=round(float(v), 6), mirrored=bool(m))
                           for j, v, m in zip(found["index"][i], found["pixel"][i], found["flip"][i])])
        if "cosine" in found:
            item["features"] = [dict(image=names(data["rows"][j]), cosine=round(float(v), 6))
                                for j, v in zip(found["cosine_index"][i], found["cosine"][i])]
        items.append(item)
    labels = [(sample["source"].label(r), data["source"].label(data["rows"][j]))
              for r, j in zip(sample["rows"], index[:, 0])]
    known = [a == b for a, b in labels if a is not None and b is not None]
    flagged = np.any(list(flags.values()), axis=0)
    return dict(
        samples=len(items), training_images=len(data["rows"]), flagged=int(np.sum(flagged)),
        exact_copies=int((found["pixel"][:, 0] == 0).sum()),
        label_match=float(np.mean(known)) if known else None,
        thresholds=limits, quantile=QUANTILE, null_images=0 if null is None else len(null["pixel"]),
        median={s: float(np.median(found[s][:, 0])) for s in ("pixel", "cosine") if s in found},
        null_median=None if null is None else {s: float(np.median(null[s][:, 0]))
                                               for s in ("pixel", "cosine") if s in null},
        unreadable=dict(samples=sample["source"].bad, data=data["source"].bad), items=items)


def picture(sample, data, found, summary, space, rows=16):
    """A sheet: each sample, then its neighbours; the most suspicious samples on top."""
    score = found["pixel"][:, 0] if space == "pixel" else -found["cosine"][:, 0]
    index = found["index" if space == "pixel" else "cosine_index"]
    tiles, labels = [], []
    for i in np.argsort(score, kind="stable")[:rows]:
        tiles += [sample["pixels"][i], *data["pixels"][index[i]]]
        mark = "sample" + (" !" if summary["items"][i]["flagged"] else "")
        labels += [mark, *(f"{v:.3g}" + ("m" if space == "pixel" and m else "")
                           for v, m in zip(found[space][i], found["flip"][i]))]
    scale = max(1, round(72 / data["pixels"].shape[1]))
    title = "cosine of Inception features" if space == "cosine" else "RMS difference of pixels, m: mirrored"
    body = draw.grid(tiles, columns=1 + index.shape[1], labels=labels, scale=scale, pad=4)
    return draw.sheet([body], title=f"Samples and nearest training images: {title}")


def main(argv=None):
    parser = Parser("eval.neighbours", __doc__)
    parser.add_argument("samples", help="folder, .tar, .npz or a run")
    parser.add_argument("--data", required=True, help="training images: folder, .tar or .npz")
    parser.add_argument("--held-out", metavar="H", help="real images that were not trained on: the null")
    parser.add_argument("--inception", metavar="FILE", help="also compare features of this network")
    parser.add_argument("--resize", choices=("tf", "half_pixel"), default="tf", help="of that network [tf]")
    parser.add_argument("--imagenet", action="store_true", help="accept torchvision's weights")
    parser.add_argument("--k", type=int, default=10, help="neighbours for each sample [10]")
    parser.add_argument("--side", type=int, default=64, help="pixels are compared at this size [64]")
    parser.add_argument("--limit", type=int, help="the first N images of each source")
    parser.add_argument("--out", help="folder for neighbours.json and .png [the run, else the current one]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    args = parser.parse_args(argv)
    if min(args.k, args.side, args.limit or 1) < 1:
        raise UserError("--k, --side and --limit must be at least 1")
    path = Path(args.samples)
    out = Path(args.out or (path if (path / "log.jsonl").is_file() else "."))
    if (path / "log.jsonl").is_file():
        path = sample_sets(path)[-1][1]
    device = init(args.device).device
    net = load_network(args, device)
    sample, data = gather(path, args, net, device), gather(args.data, args, net, device)
    if len(data["rows"]) < args.k:
        raise UserError(f"--k {args.k}, but {args.data} holds {len(data['rows'])} readable images")
    found = search(sample, data, args.k)
    null = search(gather(args.held_out, args, net, device), data, 1) if args.held_out else None
    space = "cosine" if net is not None else "pixel"
    result = report(sample, data, found, null, space)
    result["record"] = dict(samples=identity(path), data=identity(args.data), side=args.side, k=args.k,
                            weights=identity(args.inception) if args.inception else None,
                            space="Inception pool3" if net is not None else f"pixels at {args.side}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "neighbours.json", json.dumps(result, indent=1).encode())
    draw.save(picture(sample, data, found, result, space), out / "neighbours.png")
    facts = ("samples", "training_images", "exact_copies", "flagged", "null_images", "label_match")
    print(text_table(["fact", "value"], [[k, "-" if result[k] is None else result[k]] for k in facts]))
    if null is None:
        print("no --held-out images: only exact copies are flagged, near ones have nothing to compare with")
    print(f"{out / 'neighbours.png'}")


if __name__ == "__main__":
    cli("eval.neighbours", main)
