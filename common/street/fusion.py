"""Fusing the views of one sample into one decision: fixed rules and small trained modules.

Weights over views sum to 1 and every rule returns logits.  `trained` averages the views in a shared latent
space, decodes one reconstruction per view and mixes it with the feature (cross-view fusion module, CVFM).

B samples  V views  F features  L latent  H heads
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import run
from common.street.views import step_indices


def fuse(mode, logits_BVC, boxes_BV4=None, topk=2, inverse=False):
    """Untrained rules: logits [B, V, 2] -> (logits [B, 2], weights [B, V]).

    weighted_uncertainty: softmax(-H / 0.5) of the entropies at temperature 2, or 1 / H with inverse.
    """
    B, V, _ = logits_BVC.shape
    even = logits_BVC.new_full((B, V), 1 / V)
    if mode == "single_view":
        return logits_BVC[:, 0], F.one_hot(torch.zeros(B, dtype=torch.long), V).to(even)
    if mode == "simple_mean":
        return logits_BVC.mean(1), even
    if mode == "soft_vote":
        return logits_BVC.softmax(-1).mean(1).clamp_min(1e-12).log(), even
    if mode == "topk_mean":
        top = logits_BVC.softmax(-1).amax(-1).topk(min(topk, V), 1).indices
        weight = torch.zeros_like(even).scatter_(1, top, 1 / min(topk, V))
    elif mode == "weighted_uncertainty":
        p = (logits_BVC / 2.0).softmax(-1)
        entropy = -(p * p.clamp_min(1e-10).log()).sum(-1)
        weight = 1 / (entropy + 1e-2) if inverse else (-entropy / 0.5).softmax(1)
        weight = weight / weight.sum(1, keepdim=True)
    elif mode == "content_aware":
        area = (boxes_BV4[..., 2] - boxes_BV4[..., 0]) * (boxes_BV4[..., 3] - boxes_BV4[..., 1])
        weight = area / area.sum(1, keepdim=True)
    else:
        raise ValueError(f"unknown fusion {mode!r}")
    return (weight[..., None] * logits_BVC).sum(1), weight


class AttentionFusion(nn.Module):
    """Weights from a small network on each view's probabilities, applied to the logits of the frozen head."""

    def __init__(self, V, width, hidden, latent):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def forward(self, f_BVF, head):
        logits_BVC = head(f_BVF)
        weight = self.score(logits_BVC.softmax(-1)).squeeze(-1).softmax(1)
        return (weight[..., None] * logits_BVC).sum(1), weight, logits_BVC.new_zeros(())


class TrainableCVFM(nn.Module):
    """z_v = E(f_v), zbar their mean, fhat_v = D_v(zbar); f = sum_v a_v ((1 - rho) f_v + rho fhat_v), a =
    softmax(omega).

    forward(f, head) -> (logits of the frozen head, weights, 0.1 * mean square of fhat_v - f_v).
    """

    def __init__(self, V, width, hidden=512, latent=256):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(),
                                     nn.Dropout(0.1),
                                     nn.Linear(hidden, latent))
        self.decoders = nn.ModuleList(nn.Sequential(nn.Linear(latent, hidden), nn.GELU(),
                                                    nn.Linear(hidden, width))
                                      for _ in range(V))
        self.omega, self.rho = nn.Parameter(torch.zeros(V)), nn.Parameter(torch.tensor(-2.0))

    def reconstruct(self, f_BVF):
        z_BL = self.encoder(f_BVF).mean(1)
        return torch.stack([decode(z_BL) for decode in self.decoders], 1)

    def forward(self, f_BVF, head):
        hat_BVF, a_V, rho = self.reconstruct(f_BVF), self.omega.softmax(0), self.rho.sigmoid()
        fused_BF = (a_V[:, None] * ((1 - rho) * f_BVF + rho * hat_BVF)).sum(1)
        return head(fused_BF), a_V.expand(len(f_BVF), -1), 0.1 * (hat_BVF - f_BVF.detach()).square().mean()


class FlexFusion(nn.Module):
    """Attention across views with a learned bias per head and pair of views, then the mean and a linear
    head."""

    def __init__(self, V, width, hidden=512, latent=256, heads=4):
        super().__init__()
        self.heads, self.project, self.qkv = heads, nn.Linear(width, latent), nn.Linear(latent, 3 * latent)
        self.bias, self.out = nn.Parameter(torch.zeros(heads, V, V)), nn.Linear(latent, 2)

    def attend(self, f_BVF, flex):
        """flex: FlexAttention with the bias as score_mod (it has no backward on a CPU); else the same by
        SDPA."""
        q, k, v = self.qkv(self.project(f_BVF)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if not flex:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q.dtype)[None])
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + self.bias[h, i, j])

    def forward(self, f_BVF, head=None, flex=False):
        o_BHVK = self.attend(f_BVF, flex)
        logits = self.out(o_BHVK.transpose(1, 2).flatten(2).mean(1))
        B, V = f_BVF.shape[:2]
        return logits, logits.new_full((B, V), 1 / V), logits.new_zeros(())


TRAINED = {"attention": AttentionFusion, "trained": TrainableCVFM, "flex": FlexFusion}


def train_fusion(mode, net, train, y_train, cfg, judge, batch=64):
    """Train one module on cached features, backbone and head frozen; its best epoch by VAL_SELECT MCC.

    judge: (mode, module) -> that MCC.
    """
    place = 6 + list(TRAINED).index(mode)
    run.seed_all(cfg.seed, 6, place)
    f_NVF = train[0]
    module = TRAINED[mode](f_NVF.shape[1], f_NVF.shape[2], cfg.phase4c_hidden, cfg.phase4c_latent)
    optim = torch.optim.AdamW(module.parameters(), cfg.phase4c_lr, weight_decay=0.01)
    per_epoch, best, rows = math.ceil(len(f_NVF) / batch), (-2.0, None), []
    for step in range(1, cfg.phase4c_epochs * per_epoch + 1):
        epoch, ids = step_indices(len(f_NVF), batch, step, cfg.seed)
        run.seed_all(cfg.seed, 6, place, step)
        logits, _, extra = module.train()(f_NVF[ids], net.head.eval())
        loss = F.cross_entropy(logits, torch.from_numpy(y_train[ids])) + extra
        optim.zero_grad()
        loss.backward()
        optim.step()
        if step % per_epoch == 0:
            value = judge(mode, module)
            rows.append(dict(mode=mode, epoch=epoch, loss=float(loss.detach()), val_mcc=value))
            if value > best[0] or best[1] is None:
                best = value, copy.deepcopy(module.state_dict())
    module.load_state_dict(best[1])
    return module.eval(), rows
