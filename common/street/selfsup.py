"""Parts for adapting a backbone without labels: gathered negatives, scores, and BYOL and SwAV beside SimCLR.

BYOL 2006.07733: an online network predicts the projection of an averaged copy of itself.  SwAV 2006.09882:
one view predicts the balanced cluster code of the other.
"""

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import run


def byol_net(width, hidden, out=256):
    """Linear - BatchNorm - ReLU - Linear: BYOL's projector and predictor."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def byol_loss(q1, q2, z1, z2):
    """Mean over both directions of 2 - 2 cos(q(view a), target(view b)); targets get no gradient."""
    return 2 - (F.cosine_similarity(q1, z2.detach()) + F.cosine_similarity(q2, z1.detach())).mean()


def byol_momentum(step, steps, base=0.996):
    """1 - (1 - base) (cos(pi k / K) + 1) / 2: from base to 1."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


@torch.no_grad()
def average_into(shadow, live, decay):
    """shadow = decay * shadow + (1 - decay) * live, over dicts of tensors."""
    for name, tensor in shadow.items():
        tensor.mul_(decay).add_(live[name].detach(), alpha=1 - decay)


@torch.no_grad()
def sinkhorn(score_BK, epsilon=0.05, rounds=3):
    """Codes Q [B, K] of exp(score / epsilon): every row sums to 1, columns nearly to B / K."""
    q = (score_BK.float() - score_BK.float().amax(1, keepdim=True)) / epsilon
    q_KB = q.exp().T
    q_KB /= q_KB.sum()
    K, B = q_KB.shape
    for _ in range(rounds):
        q_KB /= q_KB.sum(1, keepdim=True).clamp_min(1e-12) * K
        q_KB /= q_KB.sum(0, keepdim=True).clamp_min(1e-12) * B
    return (q_KB * B).T


def swav_loss(s1_BK, s2_BK, temperature=0.1, epsilon=0.05):
    """Mean of CE(code of view 1, scores of view 2 / T) and the reverse."""
    q1, q2 = sinkhorn(s1_BK, epsilon), sinkhorn(s2_BK, epsilon)
    swap = (q1 * F.log_softmax(s2_BK / temperature,
                               1)).sum(1) + (q2 * F.log_softmax(s1_BK / temperature, 1)).sum(1)
    return -0.5 * swap.mean()


class Gather(torch.autograd.Function):
    """All ranks' rows; backward sums the incoming gradients over ranks and keeps one's own rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(x_ND):
    """Rows of all ranks [N * world, D], rank after rank.  Averaged over ranks, the gradients are those of one
    process."""
    return Gather.apply(x_ND) if dist.is_initialized() and dist.get_world_size() > 1 else x_ND


def average_gradients(params, ddp):
    """Mean of the gradients over ranks.  By hand, not DDP: GradCache runs backward several times a step."""
    for p in params if ddp.world > 1 else ():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= ddp.world


@torch.no_grad()
def contrast_scores(z1, z2):
    """alignment mean |z_i - z_pos|^2, uniformity log mean exp(-2 |z_i - z_j|^2), retrieval top-1 among 2N -
    1."""
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    score, pair = (z @ z.T).fill_diagonal_(-torch.inf), torch.arange(len(z), device=z.device).roll(len(z1))
    return dict(align=float((z - z[pair]).square().sum(1).mean()),
                top1=float((score.argmax(1) == pair).float().mean()),
                uniform=float(F.pdist(z).square().mul(-2).exp().mean().log()))


class Objective(nn.Module):
    """Projection head and whatever else the self-supervised objective needs; thrown away afterwards.

    kind: simclr (just the projector), byol, swav, byol_swav.
    """

    def __init__(self, kind, projector, width, hidden, prototypes):
        super().__init__()
        self.kind, self.projector = kind, projector
        if kind != "simclr":
            self.projector, self.predictor = byol_net(width, hidden), byol_net(256, hidden)
            self.prototypes = nn.Linear(256, prototypes, bias=False)

    def alternative(self, f1, f2, target, warm):
        """BYOL, SwAV or half of each, from features of two views and the averaged network's projections of
        both."""
        z1, z2 = self.projector(f1), self.projector(f2)
        loss = f1.new_zeros(())
        if self.kind != "swav":
            loss = loss + byol_loss(self.predictor(z1), self.predictor(z2), *target)
        if self.kind != "byol":
            # prototypes rest while the codes settle
            W = F.normalize(self.prototypes.weight, dim=1)
            s1, s2 = (F.normalize(z, dim=1) @ (W.detach() if warm else W).T for z in (z1, z2))
            loss = loss + swav_loss(s1, s2)
        return loss / (2 if self.kind == "byol_swav" else 1), z1.detach(), z2.detach()


@contextlib.contextmanager
def swapped(net, tensors):
    """The net with other values of some parameters, for a while."""
    live = {n: p for n, p in net.named_parameters() if n in tensors}
    kept = {n: p.detach().clone() for n, p in live.items()}
    try:
        with torch.no_grad():
            [live[n].copy_(t) for n, t in tensors.items()]
        yield net
    finally:
        with torch.no_grad():
            [live[n].copy_(t) for n, t in kept.items()]


# --- accumulation ------------------------------------------------------------


def each_alone(embed, micro, loss_of, seed, scale=lambda loss: loss):
    """Backward of scale(mean of loss_of(z1, z2) over micro-batches [(2, b, ...)]) -> (loss, z1, z2)."""
    parts = []
    for k, x in enumerate(micro):
        run.seed_all(*seed, k)
        z1, z2 = embed(x.flatten(0, 1)).chunk(2)
        loss = loss_of(z1, z2)
        scale(loss / len(micro)).backward()
        parts.append((loss.detach(), z1.detach(), z2.detach()))
    losses, z1, z2 = zip(*parts)
    return torch.stack(losses).mean(), torch.cat(z1), torch.cat(z2)


def gradcache(embed, micro, loss_of, seed, scale=lambda loss: loss):
    """Backward of loss_of over all micro-batches together, in the memory of one (GradCache, 2101.06983).

    Embed everything without a graph, take the gradient of the loss of the embeddings, then embed each
    micro-batch again (same seed, hence the same dropout) and push its share of that gradient through.
    """
    leaves = []
    with torch.no_grad():
        for k, x in enumerate(micro):
            run.seed_all(*seed, k)
            leaves.append(embed(x.flatten(0, 1)))
    leaves = [z.detach().requires_grad_(True) for z in leaves]
    z1, z2 = (torch.cat(z) for z in zip(*(leaf.chunk(2) for leaf in leaves)))
    loss = loss_of(z1, z2)
    scale(loss).backward()
    for k, x in enumerate(micro):
        run.seed_all(*seed, k)
        embed(x.flatten(0, 1)).backward(leaves[k].grad)
    return loss.detach(), z1.detach(), z2.detach()
