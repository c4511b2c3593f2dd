"""The drifting field and its loss: fast closed forms, each beside its ten-line reference.

A drift is the step a sample should take: a kernel-weighted pull towards data minus the same pull towards the
model's own samples (Generative Modeling via Drifting, arXiv:2602.04770). `drift_field` is the field of one
set of points, as printed in the paper; `drift_loss` is what the released ImageNet code trains on: many
independent rows at once, three temperatures, every scale taken from the data.

R rows (label x location)  g generated  u unconditional  p positive  t = g + u + p targets  C channels
n temperatures  N queries  M targets  D dimensions
"""

import contextlib

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

SELF_MASK = 100.0  # added to a sample's distance from itself, in units of the mean distance
MIN_SQUARED_DISTANCE, MIN_SCALE, MIN_LAM2 = 1e-8, 1e-3, 1e-8
SMALL, FEW = 64, 32  # a Gram matrix of so few targets stays whole; so few channels never need one
NORMALIZE = ("both", "targets", "none")


# --- the field of one set of points (toy, ablations) -----------------------


def drift_field(x_ND, pos_PD, neg_MD, tau, mask_self=False, attract=1.0, repel=1.0, normalize="both"):
    """Drift V = attract V+ - repel V- of x_ND -> V_ND, detached: the step that moves x towards pos, away from
    neg.

    A = sqrt(softmax(-d/tau over targets) softmax(-d/tau over queries)) on the union of both target sets, d
    the Euclidean distance; V+ = sum_j rowsum(A-) A+_j (pos_j - x), V- likewise.  Both are measured from x, so
    unequal weights do not depend on the origin.  tau > 0, in the units of x.  mask_self: neg is x itself, and
    a sample does not repel itself.  normalize: "both" softmaxes (the paper), over the "targets" alone, or
    "none", the bare kernel exp(-d/tau) averaged over the targets.  float32 at least, autocast off.  Leading
    axes batch. Raises ValueError on an empty target set, tau <= 0, an unknown normalize, or mask_self with M
    != N.
    """
    if min(pos_PD.shape[-2], neg_MD.shape[-2]) == 0:
        raise ValueError("drift_field needs at least one positive and one negative")
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if mask_self and neg_MD.shape[-2] != x_ND.shape[-2]:
        raise ValueError("mask_self means neg is x: their numbers of points must agree")
    with torch.no_grad(), _exact(x_ND.device):
        x_ND, pos_PD, neg_MD = (v.to(_dtype(x_ND)) for v in (x_ND, pos_PD, neg_MD))
        y_MD = torch.cat([pos_PD, neg_MD], -2)
        center_1D = y_MD.mean(-2, keepdim=True)  # moves no distance; float32 keeps its digits far from 0
        x_ND, y_MD = x_ND - center_1D, y_MD - center_1D
        n_pos = pos_PD.shape[-2]
        # Exact differences: the norms-and-dot form loses near duplicates, and in the toy those decide.
        logit_NM = torch.cdist(x_ND, y_MD, compute_mode="donot_use_mm_for_euclid_dist").div_(-tau)
        if mask_self:
            logit_NM[..., n_pos:].diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        if normalize == "both":
            # A column that holds nothing but its masked self (N = 1) has no softmax: it weighs nothing.
            a_NM = (logit_NM.softmax(-1) * logit_NM.softmax(-2).nan_to_num_(0.0)).sqrt_()
        else:
            a_NM = logit_NM.softmax(-1) if normalize == "targets" else logit_NM.exp() / y_MD.shape[-2]
        ap_NP, an_NM = a_NM[..., :n_pos], a_NM[..., n_pos:]
        sp_N1, sn_N1 = ap_NP.sum(-1, keepdim=True), an_NM.sum(-1, keepdim=True)
        towards_ND = (ap_NP @ y_MD[..., :n_pos, :] - sp_N1 * x_ND) * sn_N1
        away_ND = (an_NM @ y_MD[..., n_pos:, :] - sn_N1 * x_ND) * sp_N1
        return attract * towards_ND - repel * away_ND


def drift_field_reference(x_ND, pos_PD, neg_MD, tau, mask_self=False, attract=1.0, repel=1.0,
                          normalize="both"):
    """The same, pair by pair: V_i = sum_jk A+_ij A-_ik (attract (pos_j - x_i) - repel (neg_k - x_i))."""
    y_MD = torch.cat([pos_PD, neg_MD])
    k_NM = torch.exp(-(x_ND[:, None] - y_MD[None]).square().sum(-1).sqrt() / tau)
    if mask_self:
        k_NM[:, len(pos_PD):].fill_diagonal_(0)
    rows_N1, cols_1M = k_NM.sum(1, keepdim=True), k_NM.sum(0, keepdim=True)
    divide = {"both": (rows_N1 * cols_1M).sqrt(), "targets": rows_N1, "none": len(y_MD)}[normalize]
    ap_NP, an_NM = (k_NM / divide)[:, :len(pos_PD)], (k_NM / divide)[:, len(pos_PD):]
    to_pos_NP1D, to_neg_N1MD = (pos_PD - x_ND[:, None])[:, :, None], (neg_MD - x_ND[:, None])[:, None]
    weight_NPM1 = (ap_NP[:, :, None] * an_NM[:, None])[..., None]
    return (weight_NPM1 * (attract * to_pos_NP1D - repel * to_neg_N1MD)).sum((1, 2))


# --- the training loss ------------------------------------------------------


def drift_loss(gen_RGC, pos_RPC, unc_RUC=None, weight_R=None, taus=(0.02, 0.05, 0.2), floor=1e-6, group=None,
               key_R=None):
    """Drifting loss of R independent problems -> (loss_R, info); differentiable in gen alone.

    Per row, with D the distances of gen to the targets Y = [gen, unc, pos], m their mean over all rows and s
    = m / sqrt(C), each temperature gives weights K (rows sum to 0), a force f = K Y / s and its mean square
    lam2 over all rows; F = sum over tau of f / sqrt(lam2), loss = mean F^2, d loss_R / d gen = -2 F / (s g
    C).

    weight_R: weight of that row's unconditional negatives (default 1).  taus: relative to the mean distance,
    > 0. floor: lower bound of the product of the two softmaxes; 1e-6 is the released value, use 0 in few
    dimensions. group: a torch.distributed group over which m and lam2 are global; every member must call.
    None: this rank. key_R: the feature 0, 1, ... that a row belongs to, each with an m and lam2 of its own:
    one call then does for many small features of one width. info: "m" and "lam2/<tau>", scalar tensors, or
    one value a feature.  float32 (float64 for float64 input), autocast and TF32 off. Raises ValueError on
    shapes that do not fit, no positives, or a tau <= 0.
    """
    R, g, C = gen_RGC.shape
    unc_RUC = gen_RGC.new_empty(R, 0, C) if unc_RUC is None else unc_RUC
    weight_R = gen_RGC.new_ones(R, dtype=_dtype(gen_RGC)) if weight_R is None else weight_R
    for name, v, want in (("pos", pos_RPC, (R, pos_RPC.shape[1], C)), ("weight", weight_R, (R,)),
                          ("unc", unc_RUC, (R, unc_RUC.shape[1], C))):
        if tuple(v.shape) != want:
            raise ValueError(f"drift_loss: {name} is {tuple(v.shape)}; gen {(R, g, C)} wants {want}")
    if min(R, g, C, pos_RPC.shape[1]) == 0:
        raise ValueError("drift_loss needs at least one row, generated sample, channel and positive")
    if not taus or min(taus) <= 0:
        raise ValueError(f"taus must be > 0, got {taus}")
    of_RK = weight_R.new_ones(R, 1) if key_R is None else torch.nn.functional.one_hot(key_R)
    loss_R, m_K, lam2_Kn = _DriftLoss.apply(gen_RGC, pos_RPC, unc_RUC, weight_R, of_RK, tuple(taus), floor,
                                            group)
    info = {"m": m_K, **{f"lam2/{tau}": lam2_K for tau, lam2_K in zip(taus, lam2_Kn.unbind(1))}}
    return loss_R, info if key_R is not None else {name: v_K[0] for name, v_K in info.items()}


class _DriftLoss(torch.autograd.Function):
    """Value and gradient in closed form.

    What makes it cheap: the force is linear in Y, so the temperatures' weights are combined first and Y is
    multiplied once, in backward, straight into the gradient.  What is needed before, lam2 and the loss, are
    quadratic forms sum_i K_a Y Y^T K_b^T of temperatures a, b in the Gram matrix of Y: nothing of size [..,
    C] is made for one temperature.  With C <= t ("narrow") the products K Y are smaller than the Gram matrix
    and take its place.  Rows are worked through in blocks; beside one block live, per row, [n,g,t] weights
    and [t,t] products, or [n,g,C] and [g,t].
    """

    @staticmethod
    def forward(ctx, gen_RGC, pos_RPC, unc_RUC, weight_R, of_RK, taus, floor, group):
        (R, g, C), u = gen_RGC.shape, unc_RUC.shape[1]
        t, n, dtype = g + u + pos_RPC.shape[1], len(taus), _dtype(gen_RGC)
        weight_R, of_RK, narrow = weight_R.to(dtype), of_RK.to(dtype), C <= max(t, FEW)
        weight_RT = torch.cat([weight_R.new_ones(R, g), weight_R[:, None].expand(R, u),
                               weight_R.new_ones(R, t - g - u)], 1)
        with _exact(gen_RGC.device):
            blocks = _blocks(R, g, t, n, C, gen_RGC.device)
            center_R1C = gen_RGC.mean(1, keepdim=True, dtype=dtype)
            buffer = gen_RGC.new_empty((blocks[0].stop, t, C), dtype=dtype)
            sums_R2 = torch.stack([weight_R, g * weight_RT.sum(1)], 1)
            kept = []  # distances, and Gram blocks where those are smaller than features, wait for m
            for rows in blocks:
                y_RTC = _targets(gen_RGC, pos_RPC, unc_RUC, center_R1C, rows, buffer)
                kept.append(_geometry(y_RTC, g, narrow))
                sums_R2[rows, 0] = (kept[-1][0].sum(1) * weight_RT[rows]).sum(1)
            sums_K2 = of_RK.T @ sums_R2
            _sum_over(group, sums_K2)
            m_K = sums_K2[:, 0] / sums_K2[:, 1]
            m_R = of_RK @ m_K
            s_R = (m_R / C ** 0.5).clamp_min(MIN_SCALE)

            mix_RnGX = gen_RGC.new_empty((R, n, g, C if narrow else t), dtype=dtype)  # K Y if narrow, or K
            once = gen_RGC.new_empty((blocks[0].stop, n, g, t), dtype=dtype) if narrow else None
            form_Rnn = gen_RGC.new_empty((R, n, n), dtype=dtype)
            for i, rows in enumerate(blocks):
                (dist_RGT, gram), kept[i] = kept[i], None
                k_RnGT = once[:len(dist_RGT)] if narrow else mix_RnGX[rows]
                _weights(dist_RGT, m_R[rows], weight_R[rows], g, u, taus, floor, k_RnGT)
                if narrow:
                    if len(blocks) > 1:
                        y_RTC = _targets(gen_RGC, pos_RPC, unc_RUC, center_R1C, rows, buffer)
                    torch.bmm(k_RnGT.flatten(1, 2), y_RTC, out=mix_RnGX[rows].flatten(1, 2))
                other = mix_RnGX[rows] if narrow else _times_gram(k_RnGT, gram)
                torch.bmm(mix_RnGX[rows].flatten(2), other.flatten(2).mT, out=form_Rnn[rows])

            power_Rn = form_Rnn.diagonal(dim1=1, dim2=2) / s_R[:, None] ** 2
            sums_KX = of_RK.T @ torch.cat([power_Rn, torch.full_like(s_R[:, None], g * C)], 1)
            _sum_over(group, sums_KX)
            lam2_Kn = sums_KX[:, :n] / sums_KX[:, n:]
            c_Rn = of_RK @ lam2_Kn.clamp_min(MIN_LAM2).rsqrt() / s_R[:, None]
            loss_R = (c_Rn[:, None] @ form_Rnn @ c_Rn[:, :, None])[:, 0, 0].clamp_min(0) / (g * C)
            if ctx.needs_input_grad[0]:
                sum_RGX = (c_Rn[:, None] @ mix_RnGX.flatten(2)).view(R, g, -1)  # sum of K / sqrt(lam2)
                inputs = () if narrow else (gen_RGC, pos_RPC, unc_RUC, center_R1C)
                ctx.save_for_backward(sum_RGX, -2 / (s_R * g * C), *inputs)
                ctx.blocks, ctx.narrow = blocks, narrow
        ctx.dtype = gen_RGC.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(m_K, lam2_Kn)
        return loss_R, m_K, lam2_Kn

    @staticmethod
    @once_differentiable
    def backward(ctx, up_R, _m, _lam2):
        sum_RGX, factor_R, *inputs = ctx.saved_tensors
        up_R11 = (up_R * factor_R)[:, None, None]
        if ctx.narrow:
            return (sum_RGX * up_R11).to(ctx.dtype), *[None] * 7
        grad_RGC = torch.empty_like(inputs[0], dtype=sum_RGX.dtype)
        buffer = grad_RGC.new_empty(ctx.blocks[0].stop, sum_RGX.shape[2], grad_RGC.shape[2])
        with _exact(up_R.device):
            for rows in ctx.blocks:
                y_RTC = _targets(*inputs, rows, buffer)
                torch.bmm(sum_RGX[rows] * up_R11[rows], y_RTC, out=grad_RGC[rows])
        return grad_RGC.to(ctx.dtype), *[None] * 7


def _targets(gen_RGC, pos_RPC, unc_RUC, center_R1C, rows, buffer):
    """[gen, unc, pos] of some rows less the mean sample: no distance moves, float32 keeps its digits."""
    y_RTC = buffer[:rows.stop - rows.start]
    torch.cat([part[rows].to(y_RTC.dtype) for part in (gen_RGC, unc_RUC, pos_RPC)], 1, out=y_RTC)
    return y_RTC.sub_(center_R1C[rows])


def _geometry(y_RTC, g, narrow):
    """Distances of the first g targets to all -> dist_RGT, the Gram matrix (None when narrow).

    Gram: the block rows of the upper triangle, (start, block), doubled right of the diagonal blocks: the
    symmetric forms made of it are those of Y Y^T, for two thirds of the products. A small one stays whole.
    """
    t = y_RTC.shape[1]
    edges = [0, g] if narrow else [0, t] if t <= SMALL else [0, g, (g + t) // 2, t]
    gram = [(a, y_RTC[:, a:b].bmm(y_RTC[:, a:].mT)) for a, b in zip(edges, edges[1:])]
    sq_RT = (torch.linalg.vector_norm(y_RTC, dim=2).square_() if narrow
             else torch.cat([v.diagonal(dim1=1, dim2=2) for _, v in gram], 1))
    dist_RGT = torch.add(sq_RT[:, :g, None], gram[0][1][:, :g], alpha=-2).add_(sq_RT[:, None])
    dist_RGT.clamp_min_(MIN_SQUARED_DISTANCE).sqrt_()
    if narrow:
        return dist_RGT, None
    for _, block in gram:
        block[:, :, block.shape[1]:].mul_(2)
    return dist_RGT, gram


def _weights(dist_RGT, m_R, weight_R, g, u, taus, floor, a_RnGT):
    """Writes weights K_RnGT of the targets to a_RnGT; every row of K sums to 0.  Overwrites dist_RGT."""
    m_R = m_R.clamp_min(MIN_SCALE)
    taus_n = torch.tensor(taus, dtype=m_R.dtype, device=m_R.device)
    rate_Rn11 = (-1 / (m_R[:, None] * taus_n))[..., None, None]
    high_R, itself_RG = dist_RGT.amax((1, 2)), dist_RGT[:, :, :g].diagonal(dim1=1, dim2=2)
    itself_RG.copy_(high_R[:, None])
    low_R = dist_RGT.amin((1, 2))
    # Two softmaxes need two exponentials; where those of the nearest and the farthest target are ordinary
    # numbers, seen from the middle, one will do, and a masked sample's is 0.  Not asked on a GPU: the answer
    # would have to come back, and there exponentials are free.
    if (m_R.device.type == "cpu" and g > 1 and max(taus) <= 1
            and bool((high_R - low_R < 140 * min(taus) * m_R).all())):
        dist_RGT.sub_((high_R + low_R)[:, None, None] / 2)
        torch.mul(dist_RGT[:, None], rate_Rn11, out=a_RnGT).exp_()
        a_RnGT[..., :g].diagonal(dim1=-2, dim2=-1).zero_()
        rows, cols = a_RnGT.sum(-1, keepdim=True), a_RnGT.sum(-2, keepdim=True)
        a_RnGT.mul_(rows.rsqrt_()).mul_(cols.rsqrt_()).clamp_min_(floor ** 0.5)
    else:
        itself_RG.copy_(SELF_MASK * m_R[:, None] + MIN_SQUARED_DISTANCE ** 0.5)
        logit_RnGT = dist_RGT[:, None] * rate_Rn11
        torch.mul(logit_RnGT.softmax(-1), logit_RnGT.softmax(-2), out=a_RnGT).clamp_min_(floor).sqrt_()
    if u:
        a_RnGT[..., g:g + u].mul_(weight_R[:, None, None, None])
    an, ap = a_RnGT[..., :g + u], a_RnGT[..., g + u:]
    sn, sp = an.sum(-1, keepdim=True), ap.sum(-1, keepdim=True)
    an.mul_(-sp)
    ap.mul_(sn)


def _times_gram(k_RnGT, gram):
    """K times the block triangle of _geometry."""
    k = k_RnGT.flatten(1, 2)
    out = torch.empty_like(k)
    for a, block in gram:
        out[:, :, a:].baddbmm_(k[:, :, a:a + block.shape[1]], block, beta=int(a > 0))
    return out.view_as(k_RnGT)


def drift_loss_reference(gen_RGC, pos_RPC, unc_RUC, weight_R, taus=(0.02, 0.05, 0.2), floor=1e-6):
    """The same loss, one line a step, for autograd: slow, and what tests and benchmarks compare with."""
    (R, g, C), u, p = gen_RGC.shape, unc_RUC.shape[1], pos_RPC.shape[1]
    x = gen_RGC.detach()
    y = torch.cat([x, unc_RUC, pos_RPC], 1)
    w = torch.cat([x.new_ones(R, g), weight_R[:, None].expand(R, u), x.new_ones(R, p)], 1)[:, None]
    d = (x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None] - 2 * x @ y.mT).clamp_min(1e-8).sqrt()
    m = (d * w).mean() / w.mean()
    s, force = (m / C ** 0.5).clamp_min(1e-3), 0
    e = d / m.clamp_min(1e-3) + 100 * torch.eye(g, g + u + p, dtype=d.dtype, device=d.device)
    for tau in taus:
        a = ((-e / tau).softmax(-1) * (-e / tau).softmax(-2)).clamp_min(floor).sqrt() * w
        an, ap = a[..., :g + u], a[..., g + u:]
        f = torch.cat([-an * ap.sum(-1, keepdim=True), ap * an.sum(-1, keepdim=True)], -1) @ (y / s)
        force = force + f / f.square().mean().clamp_min(1e-8).sqrt()
    return (gen_RGC / s - (x / s + force)).square().mean((1, 2))


# --- helpers -----------------------------------------------------------------


def _dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(R, g, t, n, C, device):
    """Slices of rows: on a CPU two MB, near the caches; on a GPU 1 GB, full kernels."""
    most = max(1, (1 << 19 if device.type == "cpu" else 1 << 28) // max(n * g * t, t * C))
    rows = -(-R // -(-R // most))  # as even as they come
    return [slice(i, min(i + rows, R)) for i in range(0, R, rows)]


def _sum_over(group, x):
    if group is not None:
        dist.all_reduce(x, group=group)


@contextlib.contextmanager
def _exact(device):
    """Full float32 products: a distance is a difference of large numbers, divided by tau in an exponent."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
