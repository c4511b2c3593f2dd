"""Drifting in two dimensions: train a generator whose samples walk, step by step, onto the data.

Idea        A generator maps noise to a point in one pass.  While it trains, every sample it makes is pulled
            towards data and pushed off the other samples; the network is regressed onto the moved samples.
            When data and samples have one law the two forces cancel, and training has reached its goal.
Paper       Generative Modeling via Drifting, arXiv:2602.04770, figures 3 and 4, table 1
Reproduces  figure 3: three starts, none ends in mode collapse.  Measured here: docs/drift_toy.md
Run         2 cores  python drift_toy.py --preset demo              about a minute, pictures
            1 core   python drift_toy.py --target spirals --tau 0.05
            1 core   python drift_toy.py ablate                     every comparison, about five minutes
Differs     figure 3 gives no settings: ours are the defaults below.  Table 1 is an ImageNet experiment; here
            its six cases run on two Gaussians, both forces measured from the sample, whatever the origin.

The whole idea:

    x = f(eps)                                           a sample, one pass
    A(x, y) = sqrt( softmax_y(-|x-y|/tau) softmax_x(-|x-y|/tau) )    how much x minds y: data y+, samples y-
    V+(x) = sum_y+ A(x, y+) (y+ - x)  sum_y- A(x, y-)    pull: mean shift to data
    V-(x) = sum_y- A(x, y-) (y- - x)  sum_y+ A(x, y+)    the same to one's own samples
    V = V+ - V-                                          the drift; swapping data and samples flips its sign,
                                                         so it is 0 when they have one law
    loss = mean | f(eps) - stopgrad( f(eps) + V ) |^2    equals mean |V|^2; its gradient in x is -2 V / N

N samples  P data points  D = 2 dimensions  F frames of the film  K modes of the target
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from common import draw, run
from common.kernels import drift_field, drift_field_reference, drift_loss
from common.run import opt

# --- config ------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = opt("", "named settings, see below")
    out: str = opt("", "run directory (default runs/drift_toy/PRESET)")
    data: str = opt("", "points [N, 2] in a .npy file, instead of --target; scaled to largest coordinate 1")
    target: str = opt("bimodal", "law of the data",
                      ("bimodal", "eight", "checkerboard", "swissroll", "spirals"))
    init: str = opt("middle", "where the samples start", ("middle", "far", "collapsed", "random"))
    suite: str = opt("", "train every case of these comparisons, joined by +: starts, antisymmetry, "
                         "temperature, normalize, floor, shapes")
    tau: float = opt(0.3, "kernel temperature, in the units of the data")
    attract: float = opt(1.0, "factor of the pull to data")
    repel: float = opt(1.0, "factor of the push off the other samples")
    normalize: str = opt("both", "softmax over targets and over samples, over targets only, or none",
                         ("both", "targets", "none"))
    loss: str = opt("field", "field: the loss above; imagenet: the released one, which scales itself",
                    ("field", "imagenet"))
    floor: float = opt(0.0, "least A^2 in the imagenet loss; the release has 1e-6, wrong in two dimensions")
    steps: int = opt(1000, "optimizer steps")
    batch: int = opt(256, "samples a step, all ranks together")
    positives: int = opt(1024, "data points a step, all ranks together; few make the balance of modes waver")
    lr: float = opt(4e-3, "peak learning rate of Adam")
    cosine: bool = opt(True, "learning rate rises, then falls to 0 as half a cosine; else constant")
    noise: int = opt(2, "dimensions of the noise")
    width: int = opt(128, "width of the network")
    depth: int = opt(4, "hidden layers")
    save_every: int = opt(1000, "steps between checkpoints")
    count: int = opt(5000, "points that sample writes")
    pictures: bool = opt(True, "draw the run when it ends")
    seed: int = opt(0, "of weights, noise and data")
    device: str = opt("cpu", "cpu (fastest for a network this small), cuda, mps or auto")
    compile: bool = opt(False, "torch.compile the network")
    wandb: str = opt("", "Weights & Biases project; empty: off")
    json: bool = opt(False, "plan prints one JSON object")


NOTEBOOK = dict(init="random", tau=0.05, steps=2000, batch=2048, positives=2048, lr=1e-3,
                cosine=False, noise=32, width=256, depth=3)
PRESETS = {
    "demo": dict(paper="figure 3; table 1 in two dimensions", expect={},
                 set=dict(suite="starts+antisymmetry")),
    "smoke": dict(paper="-", expect={}, set=dict(steps=20, batch=64, positives=64, width=32, depth=2)),
    "long": dict(paper="-", expect={}, set=dict(target="checkerboard", tau=0.05, steps=50_000, batch=512,
                                                positives=512, lr=2e-3, width=256, noise=8, save_every=5000)),
    "notebook_swissroll": dict(paper="figure 4, authors' notebook", expect=dict(loss_average=1.63e-5),
                               set=dict(target="swissroll", **NOTEBOOK)),
    "notebook_checkerboard": dict(paper="figure 4, authors' notebook", expect=dict(loss_average=3.56e-5),
                                  set=dict(target="checkerboard", **NOTEBOOK)),
}

# Comparisons: name -> case -> what it changes.  A case that changes nothing is one run, shared by all.
SUITES = {
    "starts": {"start between the modes": {}, "start far from both": dict(init="far"),
               "start collapsed on one": dict(init="collapsed")},
    "antisymmetry": {f"pull {a:g}, push {b:g}": dict(attract=a, repel=b) if (a, b) != (1, 1) else {}
                     for a, b in ((1.0, 1.0), (1.5, 1.0), (1.0, 1.5), (2.0, 1.0), (1.0, 2.0), (1.0, 0.0))},
    "temperature": {f"tau {tau:g}": dict(init="collapsed", tau=tau)
                    for tau in (0.02, 0.05, 0.1, 0.3, 0.6, 1.2)},
    "normalize": {f"softmax: {name}": dict(init="collapsed", tau=0.2, normalize=name)
                  for name in ("both", "targets", "none")},
    "floor": {f"imagenet loss, floor {floor:g}": dict(loss="imagenet", floor=floor) for floor in (0.0, 1e-6)},
    "shapes": {name: dict(target=name, init="random", tau=0.05, steps=2000, noise=8)
               for name in ("eight", "checkerboard", "swissroll", "spirals")},
}
INITS = {"middle": (0.0, 0.0), "far": (0.0, 3.0), "collapsed": (1.0, 0.0)}
INIT_STD, INIT_STEPS = 0.1, 300
WARM = 50                    # steps in which the learning rate rises: the first forces are the largest
TAUS = (0.02, 0.05, 0.2)     # of the imagenet loss, relative to the mean distance: the paper's
FRAMES, SHOWN = 33, 600      # pictures a run keeps, and the points of each
SCORED = 5000                # points a metric compares
NOISE = 1e-4                 # energy distance of two draws of 5000 points of one law, twice its deviation

# --- data --------------------------------------------------------------


def gaussians(centers_KD, std):
    return lambda n: centers_KD[torch.randint(len(centers_KD), (n,))] + std * torch.randn(n, 2)


def checkerboard(n):
    """Eight cells of a 4 x 4 board on [-1, 1]^2, edges softened by 0.05 (the authors' notebook)."""
    half, cell = torch.randint(2, (n, 1)), torch.randint(2, (n, 2))
    return (2 * cell + half + torch.rand(n, 2) - 2) / 2 + 0.05 * torch.randn(n, 2)


def swissroll(n):
    """One spiral of two turns with noise 0.03 (the authors' notebook)."""
    t = math.pi * (0.5 + 4 * torch.rand(n, 1))
    return t * torch.cat([t.cos(), t.sin()], 1) / (4.5 * math.pi) + 0.03 * torch.randn(n, 2)


def spirals(n):
    """Two interleaved arms of a turn and a half, noise 0.02."""
    t, arm = 3 * math.pi * torch.rand(n, 1).sqrt(), 2.0 * torch.randint(2, (n, 1)) - 1
    return arm * t * torch.cat([t.cos(), t.sin()], 1) / (3 * math.pi) + 0.02 * torch.randn(n, 2)


CIRCLE = torch.arange(8) * math.pi / 4
MODES = {"bimodal": (torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.15),       # centres and std of each mode
         "eight": (torch.stack([CIRCLE.cos(), CIRCLE.sin()], 1), 0.1)}
TARGETS = {**{name: gaussians(*modes) for name, modes in MODES.items()},
           "checkerboard": checkerboard, "swissroll": swissroll, "spirals": spirals}


def data_law(cfg):
    """A function n -> n fresh data points [n, 2], from torch's global generator."""
    if not cfg.data:
        return TARGETS[cfg.target]
    try:
        points = np.load(cfg.data, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise run.UserError(f"--data {cfg.data}: {error or 'not a .npy file'}; "
                            "save points with numpy.save") from None
    if points.ndim != 2 or points.shape[1] != 2 or not points.size or not np.isfinite(points).all():
        raise run.UserError(f"--data {cfg.data} holds {list(points.shape)}; finite points [N, 2] are wanted")
    points_ND = torch.from_numpy(points.astype(np.float32))
    points_ND = points_ND / points_ND.abs().max().clamp_min(1e-12)
    return lambda n: points_ND[torch.randint(len(points_ND), (n,))]


# --- model -------------------------------------------------------------


class Generator(nn.Module):
    """Noise [N, Z] -> points [N, 2]: a plain network, used once per sample."""

    def __init__(self, noise, width, depth):
        super().__init__()
        sizes = [noise] + [width] * depth
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.noise, self.layers = noise, nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, eps_NZ):
        return self.layers(eps_NZ)

    @torch.no_grad()
    def sample(self, n):
        weight = self.layers[0].weight
        return self(torch.randn(n, self.noise).to(weight)).cpu()


def move_to(net, center, seed):
    """Regress the fresh network onto a small Gaussian, so that training starts from a law we chose."""
    optim = torch.optim.Adam(net.parameters(), 1e-3)
    device = net.layers[0].weight.device
    for step in range(INIT_STEPS):
        run.seed_all(seed, 1, step, 0)
        eps_NZ = torch.randn(256, net.noise, device=device)
        goal_ND = torch.tensor(center, device=device) + INIT_STD * eps_NZ[:, :2]
        optim.zero_grad()
        (net(eps_NZ) - goal_ND).square().mean().backward()
        optim.step()


# --- loss --------------------------------------------------------------


def drifting_loss(cfg, x_ND, pos_PD):
    """Loss of samples x_ND [requires grad] against data pos_PD: the equations at the top of this file."""
    if cfg.loss == "imagenet":                  # three temperatures, each force scaled to unit size
        loss_R, _ = drift_loss(x_ND[None], pos_PD[None], taus=TAUS, floor=cfg.floor)
        return loss_R.mean()
    fixed_ND = x_ND.detach()
    v_ND = drift_field(fixed_ND, pos_PD, fixed_ND, cfg.tau, mask_self=True, attract=cfg.attract,
                       repel=cfg.repel, normalize=cfg.normalize)
    return (x_ND - (fixed_ND + v_ND)).square().mean()


def all_ranks(x_ND, ddp):
    """The samples of every rank, one's own with their gradient: each sample is pushed by all the others."""
    if ddp.world == 1:
        return x_ND
    parts = [torch.empty_like(x_ND) for _ in range(ddp.world)]
    dist.all_gather(parts, x_ND.detach())
    parts[ddp.rank] = x_ND
    return torch.cat(parts)


# --- train -------------------------------------------------------------


def train(cfg):
    """Train one generator -> its scores; with --suite, one for every case of the comparisons."""
    if cfg.suite:
        return compare(cfg)
    ddp = run.init(cfg.device)
    share = run.per_rank(cfg.batch, ddp, "--batch")
    share_pos = run.per_rank(cfg.positives, ddp, "--positives")
    check(cfg)
    data = data_law(cfg)
    run.seed_all(cfg.seed)
    net = Generator(cfg.noise, cfg.width, cfg.depth).to(ddp.device)
    optim = torch.optim.Adam(net.parameters(), cfg.lr)
    film = {"points": torch.zeros(FRAMES, SHOWN, 2), "loss": torch.zeros(FRAMES), "average": torch.zeros(())}
    state = dict(net=net, optim=optim, film=film)  # all that changes
    log = run.Log(cfg, ddp)
    start = run.load(cfg.out, state, ddp)
    if start == 0:
        if cfg.init != "random":
            move_to(net, INITS[cfg.init], cfg.seed)
        film["points"][:] = show(net, cfg)
    model = nn.parallel.DistributedDataParallel(net) if ddp.world > 1 else net
    model = torch.compile(model) if cfg.compile else model

    for step in run.progress(start, cfg.steps, ddp, label=Path(cfg.out).name):
        run.seed_all(cfg.seed, ddp.rank, step)
        for group in optim.param_groups:
            group["lr"] = learning_rate(cfg, step)
        eps_NZ = torch.randn(share, cfg.noise).to(ddp.device)
        pos_PD = all_ranks(data(share_pos).to(ddp.device), ddp)
        x_ND = all_ranks(model(eps_NZ), ddp)
        loss = drifting_loss(cfg, x_ND, pos_PD)
        optim.zero_grad()
        (loss * ddp.world).backward()              # ranks average their gradients, the batch wants their sum
        optim.step()

        value = float(loss.detach())
        run.check_finite(step, loss=value)
        film["average"].mul_(0.96).add_(0.04 * value)
        for frame in (k for k in range(1, FRAMES) if frame_step(k, cfg.steps) == step):
            film["points"][frame], film["loss"][frame] = show(net, cfg), value
            log("train", step=step, loss=value, lr=optim.param_groups[0]["lr"],
                **scores(film["points"][frame], fresh(data, SHOWN, cfg.seed), cfg))
        run.save_if_due(cfg.out, step, cfg.steps, cfg.save_every, state, ddp)

    if ddp.rank == 0:
        meta = dict(target=cfg.target, noise=cfg.noise, width=cfg.width, depth=cfg.depth, steps=cfg.steps,
                    loss_average=float(film["average"]))
        run.save_weights(Path(cfg.out, "generator.safetensors"), net.state_dict(), meta)
        run.save_weights(Path(cfg.out, "film.safetensors"), film, dict(steps=cfg.steps))
    points_ND, result = final_scores(net, data, cfg)
    result["loss_average"] = float(film["average"])
    digest = hashlib.sha256(points_ND.numpy().tobytes()).hexdigest()  # the same seed gives the same
    log("eval", step=cfg.steps, n=SCORED, **result, sha256=digest)
    if cfg.pictures and ddp.rank == 0:
        draw_run(cfg, data)
    log.finish()
    return result


def learning_rate(cfg, step):
    """Linear rise over the first WARM steps, then half a cosine down to 0; or constant."""
    if not cfg.cosine:
        return cfg.lr
    return cfg.lr * min(1.0, step / WARM) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.steps))


def check(cfg):
    """Mistakes that would surface late."""
    for name in ("steps", "batch", "positives", "noise", "width", "depth", "tau", "lr", "save_every",
                 "count"):
        if not getattr(cfg, name) > 0:
            raise run.UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(cfg, name)}")
    if cfg.init != "random" and cfg.noise < 2:
        raise run.UserError("--noise 1 cannot start on a Gaussian blob; use --init random or --noise 2")
    if cfg.batch < 2:
        raise run.UserError("--batch 1 leaves a sample nothing to be pushed by; use 2 or more")


def frame_step(k, steps):
    """Step of frame k: close together at the start, where samples move fastest."""
    return round(steps * (k / (FRAMES - 1)) ** 3)


def show(net, cfg):
    """Points of the same noise at every step: a film of moving samples."""
    run.seed_all(cfg.seed, 2)
    return net.sample(SHOWN)


def fresh(data, n, seed):
    """n data points that training never sees."""
    run.seed_all(seed, 3)
    return data(n)


# --- sample, evaluate ---------------------------------------------------


def energy_distance(x_ND, y_MD):
    """2 E|x-y| - E|x-x'| - E|y-y'|, unbiased: its mean is 0 for equal laws, so it may fall below 0."""
    n, m = len(x_ND), len(y_MD)
    pairs = (x_ND, y_MD), (x_ND, x_ND), (y_MD, y_MD)
    cross, own_x, own_y = (torch.cdist(a, b).sum(dtype=torch.float64) for a, b in pairs)
    return float(2 * cross / (n * m) - own_x / (n * (n - 1)) - own_y / (m * (m - 1)))


def sliced_w1(x_ND, y_ND, directions=200):
    """Mean over directions of the Wasserstein-1 distance of the projections; equal numbers of points."""
    angle = torch.arange(directions) * math.pi / directions
    to_DS = torch.stack([angle.cos(), angle.sin()])
    return float(((x_ND @ to_DS).sort(0)[0] - (y_ND @ to_DS).sort(0)[0]).abs().mean())


def mode_scores(x_ND, centers_KD, std):
    """How well samples x_ND fill Gaussian modes -> dict of three.

    coverage: the share of the target's mass that samples cover, mode by mode, so that neither a lost mode nor
    points between modes go unseen.  near: share of samples within 10/3 std of a mode.  spread: their root
    mean square deviation from it, per axis; the target's own is a little below std.
    """
    distance_N, mode_N = torch.cdist(x_ND, centers_KD).min(1)
    near_N = distance_N < std * 10 / 3
    share_K = torch.bincount(mode_N[near_N], minlength=len(centers_KD)) / len(x_ND)
    full = (1 - math.exp(-0.5 * (10 / 3) ** 2)) / len(centers_KD)    # of a 2-D Gaussian inside 10/3 std
    return dict(coverage=float(share_K.clamp(max=full).sum()) / (full * len(centers_KD)),
                near=float(near_N.float().mean()),
                spread=float(distance_N[near_N].square().mean().div(2).sqrt()) if near_N.any() else math.nan)


def scores(x_ND, y_ND, cfg):
    modes = {} if cfg.data or cfg.target not in MODES else mode_scores(x_ND, *MODES[cfg.target])
    return dict(energy_distance=energy_distance(x_ND, y_ND), **modes)


def final_scores(net, data, cfg):
    """The samples that are scored, and their scores against as many data points."""
    run.seed_all(cfg.seed, 4)
    points_ND = net.sample(SCORED)
    target_ND = fresh(data, SCORED, cfg.seed)
    return points_ND, scores(points_ND, target_ND, cfg) | dict(sliced_w1=sliced_w1(points_ND, target_ND))


def load(cfg):
    """The generator of a finished run, built from what its weights file says."""
    if cfg.suite:
        raise run.UserError(f"{cfg.out} compares runs; name one of them: --out {cfg.out}/cases/base, "
                            "without --preset")
    tensors, meta = run.load_weights(Path(cfg.out, "generator.safetensors"))
    net = Generator(meta["noise"], meta["width"], meta["depth"])
    net.load_state_dict(tensors)
    return net, meta


def sample(cfg):
    """Write --count points of a trained generator as samples/points.npy and a picture."""
    check(cfg)
    net, meta = load(cfg)
    run.seed_all(cfg.seed, 5)
    points = net.sample(cfg.count)
    folder = Path(cfg.out, "samples")
    folder.mkdir(exist_ok=True)
    np.save(folder / "points.npy", points.numpy())
    draw.save(draw.scatter({"samples": points[:5000]}, title=f"{meta['target']}: {cfg.count} samples"),
              folder / "points.png")
    print(f"{cfg.count} points: {folder / 'points.npy'}, {folder / 'points.png'}")


def evaluate(cfg):
    """Score a trained generator on fresh noise and data, next to the number of the preset if it has one."""
    net, meta = load(cfg)
    result = final_scores(net, data_law(cfg), cfg)[1] | dict(loss_average=meta["loss_average"])
    expect = PRESETS[cfg.preset]["expect"] if cfg.preset else {}
    for name, value in result.items():
        print(f"{name:<16} {value:10.3g}" + (f"   paper {expect[name]:.3g}" if name in expect else ""))
    run.record(cfg.out, "eval", step=meta["steps"], n=SCORED, **result)


# --- ablate -------------------------------------------------------------


def compare(cfg):
    """Train every case of --suite, one after another, and put their scores and pictures side by side."""
    names = cfg.suite.split("+")
    for name in names:
        if name not in SUITES:
            raise run.UserError(run.unknown("--suite", name, SUITES))
    ddp = run.init(cfg.device)
    log = run.Log(cfg, ddp)
    tables = {}
    for name in names:
        table = tables[name] = {}
        for case in SUITES[name]:
            table[case] = train(case_of(cfg, name, case))
            log("case", suite=name, case=case, **table[case])
            if ddp.rank == 0:
                print(f"{case:<28} {score_line(name, table)}", flush=True)
    total = worst(tables)
    log("eval", step=cfg.steps, n=SCORED, **total)
    if ddp.rank == 0:
        draw_suites(cfg, tables)
        if total:
            print("worst of all: " + ", ".join(f"{k} {v:.3g}" for k, v in total.items()))
        print(f"pictures: {Path(cfg.out, 'samples')}")
    log.finish()
    return tables


def case_of(cfg, name, case):
    changes = SUITES[name][case]
    folder = "_".join(f"{k}-{v}" for k, v in changes.items()) or "base"
    return replace(cfg, suite="", pictures=False, out=str(Path(cfg.out, "cases", folder)), **changes)


def worst(tables):
    """The weakest start, and how many times worse than equal forces the mildest broken pair is."""
    result = {}
    if "starts" in tables:
        starts = tables["starts"].values()
        result.update(coverage=min(r["coverage"] for r in starts),
                      energy_distance=max(r["energy_distance"] for r in starts))
    if "antisymmetry" in tables:
        whole, *broken = (r["energy_distance"] for r in tables["antisymmetry"].values())
        result["broken_times"] = min(broken) / max(whole, NOISE)
    return result


def score_line(name, table):
    """The newest case of a table; where symmetry is broken, how many times worse than the whole one."""
    (first, *_), (*_, last) = table.values(), table.values()
    line = f"energy distance {last['energy_distance']:8.4f}"
    if "coverage" in last:
        line += f"   mode coverage {last['coverage']:6.1%}   spread {last['spread']:.3f}"
    if name == "antisymmetry" and last is not first:
        times = last["energy_distance"] / max(first["energy_distance"], NOISE)
        line += f"   {times:.0f} times pull 1, push 1"
    return line


def ablate(cfg):
    """Every comparison, and what number formats and temperatures do to the field."""
    precision_table()
    train(replace(cfg, suite=cfg.suite or "+".join(SUITES)))


def precision_table(n=64, d=16):
    """Print the error of V by number format, computed in it and as drift_field does, and |V| by tau."""
    run.seed_all(0, 6)
    x, pos = torch.randn(n, d), torch.randn(n, d)
    want = drift_field(x.double(), pos.double(), x.double(), 0.2, mask_self=True)
    print("relative error of V at tau 0.2, 64 points in 16 dimensions\n"
          "format     computed in it   inputs in it, computed in float32")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low, low_pos = x.to(dtype), pos.to(dtype)
        error = [float((v.double() - want).norm() / want.norm()) for v in
                 (drift_field_reference(low, low_pos, low, 0.2, mask_self=True),
                  drift_field(low, low_pos, low, 0.2, mask_self=True))]
        print(f"{str(dtype)[6:]:<10} {error[0]:14.1e}   {error[1]:14.1e}")
    print("root mean square of V by tau: " + "  ".join(
        f"{tau:g}: {float(drift_field(x, pos, x, tau, mask_self=True).square().mean().sqrt()):.1e}"
        for tau in (1e-6, 1e-3, 0.05, 0.2, 1.0, 10.0, 1e3, 1e6)))


# --- pictures -----------------------------------------------------------


def film_of(out):
    """(points [F, N, 2], loss [F], steps) of a run."""
    film, meta = run.load_weights(Path(out, "film.safetensors"))
    return film["points"], film["loss"], meta["steps"]


def window(*clouds):
    """Limits that hold several clouds with room around, never a thin strip: dict(xlim, ylim)."""
    both = torch.cat([c.reshape(-1, 2) for c in clouds])
    low, high = both.quantile(0.002, 0), both.quantile(0.998, 0)
    middle, half = (low + high) / 2, (high - low) / 2 + 0.1 * (high - low).max()
    half = half.maximum(0.6 * half.max())
    (x0, y0), (x1, y1) = (middle - half).tolist(), (middle + half).tolist()
    return dict(xlim=(x0, x1), ylim=(y0, y1))


def stages():
    """Five frames that tell the story: the early ones lie closer, that is where samples move."""
    return 0, FRAMES // 4, FRAMES * 3 // 8, FRAMES // 2, FRAMES - 1


def cloud(points, target, title, limits, width):
    (x0, x1), (y0, y1) = limits["xlim"], limits["ylim"]
    height = 90 + (width - 70) * (y1 - y0) / (x1 - x0)       # title and legend above the plot
    return draw.scatter({"data": target, "samples": points}, title=title, size=(width, round(height)),
                        radius=1.8, **limits)


def strip(out, target, limits, frames, size=250):
    """Pictures of a run at some frames, left to right."""
    points, _, steps = film_of(out)
    return [cloud(points[k], target, f"step {frame_step(k, steps)}", limits, size) for k in frames]


def save_gif(rows, path, hold=12):
    """Animated GIF of frames, each a list of pictures side by side; the last one stays."""
    pages = [draw.grid(row, columns=len(row)).quantize(32) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pages[0].save(path, save_all=True, append_images=pages[1:] + [pages[-1]] * hold, duration=120, loop=0)


def draw_field(target, tau, path):
    """The pull, the push and their sum, as arrows on a cloud of samples that has not been trained yet."""
    run.seed_all(7)
    points = 0.5 * torch.randn(100, 2)
    forces = {"pull to data": (1, 0), "push off the other samples": (0, 1), "drift: both together": (1, 1)}
    fields = {title: drift_field(points, target, points, tau, mask_self=True, attract=a, repel=b)
              for title, (a, b) in forces.items()}
    longest = max(float(v.norm(dim=1).max()) for v in fields.values())
    panels = [draw.arrows(points, v, {"data": target[:400], "samples": points}, title=title, size=(440, 440),
                          scale=0.5 / longest) for title, v in fields.items()]
    draw.save(draw.sheet(panels), path)


def draw_run(cfg, data):
    """film.png, field.png, curve.png and drift.gif of one run."""
    folder = Path(cfg.out, "samples")
    points, loss, steps = film_of(cfg.out)
    target = fresh(data, SHOWN, cfg.seed)
    limits = window(points, target)
    draw.save(draw.grid(strip(cfg.out, target, limits, stages()), columns=5), folder / "film.png")
    draw_field(target, cfg.tau, folder / "field.png")
    frames = [k for k in range(FRAMES) if frame_step(k, steps) > 0]
    at = [frame_step(k, steps) for k in frames]
    distance = [max(energy_distance(points[k], target), NOISE) for k in frames]
    curves = {"energy distance to data": (at, distance), "loss = mean V^2": (at, loss[frames].tolist())}
    draw.save(draw.lines(curves, title="distance to the data, and the loss, which need not fall with it",
                         xlabel="step", logx=True, logy=True), folder / "curve.png")
    save_gif([strip(cfg.out, target, limits, [k], 320) for k in range(FRAMES)], folder / "drift.gif")


def draw_suites(cfg, tables):
    """For each comparison the final samples of every case; for the starts the way there, page and film."""
    folder = Path(cfg.out, "samples")
    for name, table in tables.items():
        cases = {case: case_of(cfg, name, case) for case in table}
        targets = {case: fresh(data_law(one), SHOWN, cfg.seed) for case, one in cases.items()}
        if name == "starts":
            limits = {case: window(targets[case], film_of(one.out)[0][0]) for case, one in cases.items()}
            strips = {case: draw.grid(strip(one.out, targets[case], limits[case], stages()), columns=5)
                      for case, one in cases.items()}
            title = "samples drift onto both modes, wherever they start"
            draw.save(draw.sheet(strips, columns=1, title=title), folder / "starts.png")
            widest = window(*targets.values(), *(film_of(one.out)[0][0] for one in cases.values()))
            save_gif([[strip(one.out, targets[case], widest, [k], 330)[0] for case, one in cases.items()]
                      for k in range(FRAMES)], folder / "starts.gif")
            draw_field(next(iter(targets.values())), cfg.tau, folder / "field.png")
        else:
            panels = [cloud(film_of(one.out)[0][-1], targets[case],
                            f"{case}: ED {table[case]['energy_distance']:.4f}", window(targets[case]), 330)
                      for case, one in cases.items()]
            title = f"{name}: ED = energy distance to the data, 0 is best"
            draw.save(draw.sheet(panels, columns=3, title=title), folder / f"{name}.png")


# --- plan, main ----------------------------------------------------------


def plan(cfg):
    sizes = [cfg.noise] + [cfg.width] * cfg.depth + [2]
    weights = sum(a * b for a, b in zip(sizes, sizes[1:]))
    params = weights + sum(sizes[1:])
    pairs = cfg.batch * (cfg.batch + cfg.positives)
    flops = 6 * weights * cfg.batch + 24 * pairs     # network, forward and backward; field, 24 a pair
    run.print_plan(cfg, dict(params=params, flops_per_step=flops, disk_gb=6e-8 * params + 1e-3,
                             memory_gb_per_rank=16e-9 * params + 32e-9 * pairs))


COMMANDS = dict(train=train, sample=sample, evaluate=evaluate, ablate=ablate, plan=plan)

if __name__ == "__main__":
    run.main(Config, PRESETS, COMMANDS)
