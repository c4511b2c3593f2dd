"""Outer optimizers: Muon and M3 beside AdamW, slow clocks, and one copy of the state over
all ranks (ZeRO-1, FSDP2).

    split(named parameters)          matrices -> Muon or M3; embeddings, norms, biases, kernels, stacks ->
                                     AdamW
    length_at, rate, ...             schedules
    Outer(groups, ...)               .step(step, factor): clocks, both optimizers, ZeRO-1 broadcast;
                                     .state_dict()
"""

import math

import torch
import torch.distributed as dist


def sharded(x):
    """A DTensor?  Asked without importing its module, which takes as long as torch and serves FSDP2 alone."""
    return hasattr(x, "full_tensor")


def whole(x):
    """The full tensor behind a shard; everything else as it is."""
    return x.full_tensor() if sharded(x) else x


def like(x, ref):
    """x laid out over ranks like ref."""
    if not sharded(ref):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, ref.device_mesh, ref.placements)


def newton_schulz(G, steps=5):
    """Nearest semi-orthogonal matrix of each G [..., O, I], roughly: the quintic iteration drives
    singular values to ~1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.mT if tall else X).to(G.dtype)


def orthogonal(updates, steps=5):
    """newton_schulz of a list of matrices, those of one shape together."""
    result, shapes = [None] * len(updates), {}
    for i, u in enumerate(updates):
        shapes.setdefault(u.shape, []).append(i)
    for members in shapes.values():
        for i, X in zip(members, newton_schulz(torch.stack([updates[i] for i in members]), steps)):
            result[i] = X
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov mix, orthogonalised; step lr max(1, O/I)^1/2, decoupled weight
    decay.  Matrices only."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            mixed = []
            for p in params:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                mixed.append(whole(p.grad.lerp(m, group["momentum"])))
            for p, O in zip(params, orthogonal(mixed)):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(like(O, p), alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class M3(torch.optim.Optimizer):
    """Multi-scale momentum Muon (NL Alg. 1): a fast and a slow momentum, both orthogonalised, over root of V.

    The moments only accumulate, as printed: M1 += b1 g, V += b2 g^2, and every `every` steps M2 += b3 sum(g).
    The update is brought to the RMS of Muon's (0.2): divided by root V alone its size would follow 1/|g|.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999, 0.9), slow=1.0, every=10, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, slow=slow, every=every, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2, b3 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                s = self.state[p]
                if not s:
                    s.update(step=0, **{k: torch.zeros_like(p) for k in ("M1", "V", "M2", "sum", "O2")})
                s["step"] += 1
                s["M1"].add_(p.grad, alpha=b1)
                s["V"].addcmul_(p.grad, p.grad, value=b2)
                s["sum"].add_(p.grad)
                if s["step"] % group["every"] == 0:
                    s["M2"].add_(s["sum"], alpha=b3)
                    s["sum"].zero_()
                    s["O2"].copy_(like(newton_schulz(whole(s["M2"]), 3), p))
            for p, O1 in zip(params, orthogonal([whole(self.state[p]["M1"]) for p in params], 3)):
                s = self.state[p]
                update = whole((like(O1, p) + group["slow"] * s["O2"]) / (s["V"].sqrt() + 1e-8))
                update = 0.2 * update / update.square().mean().sqrt().clamp(min=1e-12)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(like(update, p), alpha=-group["lr"])


def split(named, embedding=("embed", "persistent", "kernel"), gates=("rate", "beta", "decay", "slow_gates")):
    """Names of the hidden matrices: exactly two axes, in a block, and no table, kernel or per-head gate."""
    names = []
    for name, p in named:
        parts = set(name.split("."))
        if p.ndim == 2 and not parts & {*embedding, *gates}:
            names.append(name)
    return names


class Outer:
    """All parameters of a net under Muon + AdamW, M3 + AdamW or AdamW alone.

    period: name -> optimizer steps between moves; the gradients of the steps between are summed (NL 71).
    owner: ZeRO-1, every rank keeps the state of its own parameters only and broadcasts what it stepped.
    """

    def __init__(self, net, kind, lr, matrix_lr, weight_decay, period=lambda name: 1, zero1=None, **m3):
        self.named, self.period = dict(net.named_parameters()), {}
        self.held = {}
        matrices = [] if kind == "adamw" else split(self.named.items())
        self.owner = {}
        if zero1 is not None:                       # the next parameter to the rank with the fewest elements
            load = [0] * zero1.world
            for name in sorted(self.named, key=lambda n: -self.named[n].numel()):
                self.owner[name] = load.index(min(load))
                load[self.owner[name]] += self.named[name].numel()
        mine = [n for n in self.named if not self.owner or self.owner[n] == zero1.rank]
        self.period = {n: period(n) for n in self.named}
        self.counts = {k: sum(self.named[n].numel() for n in self.named
                              if (n in set(matrices)) == (k == "matrix"))
                       for k in ("matrix", "rest")}
        fused = next(iter(self.named.values())).is_cuda
        plain = [self.named[n] for n in mine if n not in matrices]
        groups = [dict(params=[p for p in plain if p.ndim > 1], weight_decay=weight_decay),
                  dict(params=[p for p in plain if p.ndim <= 1], weight_decay=0.0)]
        self.parts = {}
        if plain:
            self.parts["adamw"] = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr,
                                                    betas=(0.9, 0.95), fused=fused)
        chosen = [self.named[n] for n in mine if n in matrices]
        if chosen:
            make = Muon if kind == "muon" else M3
            self.parts["matrix"] = make(chosen, lr=matrix_lr, weight_decay=weight_decay,
                                        **(m3 if kind == "m3" else {}))
        self.base = {k: [g["lr"] for g in part.param_groups] for k, part in self.parts.items()}

    def step(self, step, factor):
        """Optimizer step number `step` (1, 2, ...) at factor x the base rates -> names that moved."""
        moved = []
        for name, p in self.named.items():
            if p.grad is None:
                continue
            if name in self.held:
                p.grad.add_(self.held.pop(name))
            if step % self.period[name]:
                self.held[name], p.grad = p.grad, None
            else:
                moved.append(name)
        for key, part in self.parts.items():
            for group, lr in zip(part.param_groups, self.base[key]):
                group["lr"] = lr * factor
            part.step()
        if self.owner:
            for name in moved:
                dist.broadcast(self.named[name].data, self.owner[name])
        for p in self.named.values():
            p.grad = None
        return moved

    def state_dict(self):
        return {"held": local(dict(self.held)),
                **{k: local(part.state_dict()) for k, part in self.parts.items()}}

    def load_state_dict(self, tree):
        self.held = {n: spread(g, self.named[n]) for n, g in tree["held"].items()}
        for key, part in self.parts.items():
            saved, params = tree[key], [p for g in part.param_groups for p in g["params"]]
            for i, entry in saved["state"].items():
                saved["state"][i] = {k: spread(v, params[int(i)]) if torch.is_tensor(v) and v.ndim else v
                                     for k, v in entry.items()}
            part.load_state_dict(saved)


def local(tree):
    """A tree of tensors with every DTensor replaced by this rank's part."""
    if isinstance(tree, dict):
        return {k: local(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(local(v) for v in tree)
    return tree.to_local() if sharded(tree) else tree


def spread(x, ref):
    """This rank's part back into a tensor laid out like ref."""
    x = x.to(ref.device)
    return type(ref).from_local(x, ref.device_mesh, ref.placements, shape=ref.shape, stride=ref.stride()) \
        if sharded(ref) else x


def distribute(objective, blocks, shard, bf16, ddp):
    """Wrap an objective (which holds .net) for the ranks -> (module, zero1 ranks or None,
    states each rank saves).

    ddp: gradients averaged; zero1: the same, optimizer state split (Outer); fsdp2: weights split too, by
    block, and the root keeps what blocks share, such as a tied embedding.
    """
    if ddp.world == 1:
        return objective, None, {}
    if shard == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) \
            if bf16 and ddp.device.type == "cuda" else MixedPrecisionPolicy()
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(objective.net, mp_policy=policy)
        return objective, None, dict(net=Shards(objective.net))
    ids = [ddp.device.index] if ddp.device.type == "cuda" else None
    wrapped = torch.nn.parallel.DistributedDataParallel(objective, device_ids=ids)
    return wrapped, ddp if shard == "zero1" else None, {}


class Shards:
    """A net's parameters as this rank holds them (FSDP2), for a checkpoint per rank."""

    def __init__(self, net):
        # taken while sharded: after a forward pass the root's are whole
        self.params = dict(net.named_parameters())

    def state_dict(self):
        return {n: p.detach().to_local() for n, p in self.params.items()}

    @torch.no_grad()
    def load_state_dict(self, tree):
        for n, p in self.params.items():
            p.to_local().copy_(tree[n])


def length_at(cfg, step):
    """Row length of a step: the curriculum in equal shares."""
    return cfg.curriculum[(step - 1) * len(cfg.curriculum) // cfg.steps] if cfg.curriculum else cfg.length


def rate(cfg, step):
    """Warm-up, then cosine to a tenth."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step <= warm:
        return step / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm))


def teach_rate(cfg, step):
    """The teach signal's schedule: linear up, constant, linear to 0."""
    up, down = cfg.teach_warmup * cfg.steps, cfg.teach_decay * cfg.steps
    return min(1.0, step / max(1.0, up), max(0.0, (cfg.steps - step) / max(1.0, down)))


def level_period(cfg, name):
    """Optimizer steps between moves of a parameter: the outer clock of its CMS level."""
    parts = name.split(".")
    slow = cfg.cms == "outer" and "levels" in parts
    return cfg.outer_periods[int(parts[parts.index("levels") + 1])] if slow else 1
