"""Fast weights: one linear recurrence, computed a chunk at a time.

    W_t = a_t W_{t-1} - rho_t (W_{t-1} x_t) x_t^T + S_t,      S_t = m_t S_{t-1} + w_t x_t^T

covers Titans (rho = 0), HOPE (DGD with momentum), DeltaNet and Gated DeltaNet (m = 0).  Inside a chunk of C
tokens the write rows w_t are known beforehand, so the recurrence is a few matrix products and one unit
triangular inverse, exact up to rounding; tests/test_hope_lm.py holds it to the token loop at 1e-10.  Decay
products stand in log space.

The chunk's backward is written out: autograd's own keeps three times the tensors and passes
over memory twice as often.

C tokens of a chunk  O, I rows out, in
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Decay(NamedTuple):
    """Weights of the past in W_t: A of W_0, B of S_0, C of write i (None without momentum:
    R), R of correction i."""
    A: torch.Tensor
    B: torch.Tensor | None
    C: torch.Tensor | None
    R: torch.Tensor


class End(NamedTuple):
    """The same at the chunk's last token, and H, RH: weights of S_0 and of write i in its S
    (None without momentum)."""
    A: torch.Tensor
    B: torch.Tensor | None
    C: torch.Tensor | None
    R: torch.Tensor
    H: torch.Tensor | None
    RH: torch.Tensor | None


class SiLU(torch.autograd.Function):
    """s(z) = z sigmoid(z) and its slope s'(z): a memory's own gradient needs both, and is
    itself differentiated."""

    @staticmethod
    def forward(ctx, z):
        gate = torch.sigmoid(z)
        y = z * gate
        slope = torch.addcmul(gate, y, 1 - gate)
        ctx.save_for_backward(z, gate, slope)
        ctx.set_materialize_grads(False)
        return y, slope

    @staticmethod
    def backward(ctx, gy, gslope):
        z, gate, slope = ctx.saved_tensors
        grad = gy * slope if gy is not None else torch.zeros_like(z)
        if gslope is not None:                      # s'' = sigmoid' (2 + z (1 - 2 sigmoid))
            second = (1 - 2 * gate).mul_(z).add_(2).mul_(gate).mul_(1 - gate)
            grad.addcmul_(gslope, second)
        return grad


class Ratios(torch.autograd.Function):
    """exp(row_t - column_i) for i <= t + diagonal, else 0: [..., C], [..., C] -> [..., C, C]."""

    @staticmethod
    def forward(ctx, row, column, diagonal):
        out = (row[..., :, None] - column[..., None, :]).exp_().tril_(diagonal)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad * ctx.saved_tensors[0]
        return grad.sum(-1), -grad.sum(-2), None


def decays(log_keep, log_mom=None, before=True, now=True):
    """Decay products of a chunk in log space: log a_t, log m_t [..., C] -> (Decay at t-1, Decay at t, End).

    A_t = prod a, R_ti = A_t/A_i, H_t = prod m, RH_ti = H_t/H_i, C = R RH, B = R H.  A Decay not asked for is
    None.
    """
    total = log_keep.cumsum(-1)
    if log_mom is not None:
        momentum = log_mom.cumsum(-1)
        H, RH = momentum.exp()[..., None], Ratios.apply(momentum, momentum, 0)

    def at(log, diagonal):
        R = Ratios.apply(log, total, diagonal)
        return Decay(log.exp(), *((None, None) if log_mom is None else ((R @ H)[..., 0], R @ RH)), R)

    R = (total[..., -1:] - total).exp()
    end = End(total[..., -1].exp(), None, None, R, None, None) if log_mom is None else \
        End(total[..., -1].exp(), (R * H[..., 0]).sum(-1), (R[..., None, :] @ RH)[..., 0, :], R,
            H[..., -1, 0], RH[..., -1, :])
    return at(total - log_keep, -1) if before else None, at(total, 0) if now else None, end


def into(grad, like):
    """grad summed over the axes along which `like` was broadcast."""
    return grad if grad is None or like is None or grad.shape == like.shape else grad.sum_to_size(like.shape)


def plus(total, a, b):
    """total + a b, in place where the shapes allow it."""
    return total.addcmul_(a, b) if total.shape == b.shape else total + a * b


def look(W, S, x, w, u, z, at, Wz=None):
    """W_t z_t of every token t, from the chunk's first W, S and its rows -> (out,
    what the backward needs)."""
    score = z @ x.mT
    Wz = z @ W.mT if Wz is None else Wz
    rows = w + u if u is not None and at.C is None else w
    seen_w = score * (at.R if at.C is None else at.C)
    out = (seen_w @ rows).addcmul_(at.A[..., None], Wz)
    seen_u = Sz = None
    if u is not None and at.C is not None:
        seen_u = score * at.R
        out += seen_u @ u
    if S is not None:
        Sz = z @ S.mT
        out.addcmul_(at.B[..., None], Sz)
    return out, (score, Wz, Sz, seen_w, seen_u)


def look_back(grad, W, S, x, w, u, z, at, kept, own_Wz=True):
    """Gradients of look() -> W, S, x, w, u, z, Wz (own_Wz False: it was given), and of the Decay."""
    score, Wz, Sz, seen_w, seen_u = kept
    rows = w + u if u is not None and at.C is None else w
    gA, gWz = (grad * Wz).sum(-1), at.A[..., None] * grad
    gB = gS = gu = gC = gR = gW = None
    gM, gw = grad @ rows.mT, seen_w.mT @ grad
    if at.C is None:
        gR, gu = gM * score, gw if u is not None else None
        gM *= at.R
    else:
        gC = gM * score
        gM *= at.C
    if seen_u is not None:
        gN, gu = grad @ u.mT, seen_u.mT @ grad
        gR = gN * score
        gM.addcmul_(gN, at.R)
    gz, gx = gM @ x, gM.mT @ z
    if own_Wz:
        gz, gW = gz + gWz @ W, gWz.mT @ z
    if S is not None:
        gB, gSz = (grad * Sz).sum(-1), at.B[..., None] * grad
        gz, gS = gz + gSz @ S, gSz.mT @ z
    return gW, gS, gx, gw, gu, gz, None if own_Wz else gWz, (gA, gB, gC, gR)


def add(*terms):
    """Sum of the terms that are not None; shapes broadcast."""
    terms = [t for t in terms if t is not None]
    total = terms[0] if terms else None
    for t in terms[1:]:
        total = total + t
    return total


class Chunk(torch.autograd.Function):
    """advance() with its backward by hand; inputs may be None and may broadcast over leading axes."""

    @staticmethod
    def forward(ctx, late, W, S, x, w, rho, Wx, q, *rates):
        ctx.set_materialize_grads(False)
        before, now, end = Decay(*rates[:4]), Decay(*rates[4:8]), End(*rates[8:])
        u = T = r = first = out = second = None
        if rho is not None:
            right, first = look(W, S, x, w, None, x, before, Wx)
            lower = before.R * first[0] * rho[..., None, :]
            eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
            T = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
            r = T @ right
            u = r * -rho[..., None]
        if q is not None:
            out, second = look(W, S, x, w, u, q, now if late else before)
        rows = (end.R if end.C is None else end.C)[..., None] * w
        if u is not None:
            rows = plus(rows, end.R[..., None], u)
        W_new, S_new = rows.mT @ x, None
        W_new = plus(W_new, end.A[..., None, None], W)
        if end.H is not None:
            S_new = (end.RH[..., None] * w).mT @ x
            if S is not None:
                W_new.addcmul_(end.B[..., None, None], S)
                S_new.addcmul_(end.H[..., None, None], S)
        ctx.late, ctx.sizes = late, [None if k is None else len(k) for k in (first, second)]
        ctx.save_for_backward(W, S, x, w, rho, Wx, q, u, T, r, rows, *rates, *(first or ()), *(second or ()))
        return W_new, S_new, out

    @staticmethod
    def backward(ctx, gW_new, gS_new, gout):
        W, S, x, w, rho, Wx, q, u, T, r, rows, *rest = ctx.saved_tensors
        before, now, end, kept = Decay(*rest[:4]), Decay(*rest[4:8]), End(*rest[8:14]), rest[14:]
        first, second = kept[:5 if ctx.sizes[0] else 0], kept[5 if ctx.sizes[0] else 0:]
        gW = gS = gx = gw = gu = gq = grho = gWx = None
        g_before, g_now, g_end = [None] * 4, [None] * 4, [None] * 6
        if gW_new is not None:
            dot = lambda a, b: (a * b).sum((-1, -2))    # noqa: E731
            gW, g_end[0] = end.A[..., None, None] * gW_new, dot(gW_new, W)
            gx, grows = rows @ gW_new, x @ gW_new.mT
            gw = (end.R if end.C is None else end.C)[..., None] * grows
            along_w = (grows * w).sum(-1)
            if u is not None:
                gu, g_end[3] = end.R[..., None] * grows, (grows * u).sum(-1)
            if end.C is None:
                g_end[3] = add(g_end[3], along_w)
            else:
                g_end[2] = along_w
            if S is not None:
                gS, g_end[1] = end.B[..., None, None] * gW_new, dot(gW_new, S)
        if gS_new is not None:
            grows = x @ gS_new.mT
            gx = add(gx, (end.RH[..., None] * w) @ gS_new)
            gw, g_end[5] = add(gw, end.RH[..., None] * grows), (grows * w).sum(-1)
            if S is not None:
                gS, g_end[4] = add(gS, end.H[..., None, None] * gS_new), (gS_new * S).sum((-1, -2))
        if gout is not None:
            part = look_back(gout, W, S, x, w, u, q, now if ctx.late else before, second)
            gW, gS, gx, gw, gu, gq = (add(a, b) for a, b in zip((gW, gS, gx, gw, gu, None), part))
            g_now, g_before = (part[7], g_before) if ctx.late else (g_now, part[7])
        if rho is not None and gu is not None:  # r = (I + L)^-1 right, L = R * x x^T * rho_i, u = -rho r
            gright = T.mT @ (gu * -rho[..., None])
            glow, gram = gright @ r.mT, first[0]        # minus the gradient of L
            part = look_back(gright, W, S, x, w, None, x, before, first, Wx is None)
            g_before = [add(a, b) for a, b in zip(g_before, part[7])]
            g_before[3] = add(g_before[3], glow * gram * -rho[..., None, :])
            glow *= before.R
            grho = -(gu * r).sum(-1) - (glow * gram).sum(-2)
            glow *= rho[..., None, :]
            gx = add(gx, part[2], part[5]) - (glow + glow.mT) @ x
            gW, gS, gw, gWx = add(gW, part[0]), add(gS, part[1]), add(gw, part[3]), part[6]
        grads = [gW, gS, gx, gw, grho, gWx, gq, *g_before, *g_now, *g_end]
        likes = [W, S, x, w, rho, Wx, q, *before, *now, *end]
        return None, *(into(g, like) for g, like in zip(grads, likes))


def advance(W, S, x, w, rho, rates, Wx=None, q=None, late=True):
    """A chunk of writes w x^T and corrections -rho (W x) x^T -> (W [..,O,I], S, out).

    W, S: [..., O, I] at the chunk's start (S None: zero, or no momentum); x [..., C, I]; w [..., C, O];
    rho [..., C] or None; Wx: x W^T where it is known already; rates: decays(...).  out: W_t q_t of every
    token's own q [..., C, I], after its write (late) or before it; None without q.  The corrections u_t =
    -rho_t W_{t-1} x_t solve (I + R_{t-1,i} rho_i x_i.x_t) r = A_{t-1} W x + B_{t-1} S x + (C_{t-1} * x x^T)
    w.
    """
    before, now, end = rates
    return Chunk.apply(late, W, S, x, w, rho, Wx, q, *(before or [None] * 4), *(now or [None] * 4), *end)


def chunk_rule(kind, W, S, g, keep, log_mom):
    """Rules without an exact token form, applied once to a chunk's summed step eta g [..., O, I].

    delta_momentum (NL 49)  m <- m (a I - g^T g / |g|^2) - g;   W <- keep W + m
    dmgd (NL 50)            W <- keep W + m_phi(g), m_phi(g) = -g + s(g) phi^T;  phi <- a phi - d<m_phi(g),
                            1>/dphi
    """
    a = 0.9 if log_mom is None else log_mom.mean(-1).exp()[..., None, None]
    keep = keep[..., None, None]
    if kind == "delta_momentum":
        if S is None:
            S = torch.zeros_like(W)
        S = a * S - (S @ g.mT) @ g / g.square().sum((-1, -2), keepdim=True).clamp(min=1e-12) - g
        return keep * W + S, S
    if S is None:
        S = W.new_zeros(*W.shape[:-2], W.shape[-1], W.shape[-1])
    hidden = F.silu(g)
    W = keep * W - g + hidden @ S.mT
    return W, a * S - hidden.sum(-2, keepdim=True).expand_as(S)
