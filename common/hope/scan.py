"""Fast weights: one linear recurrence, computed a chunk at a time.

    W_t = a_t W_{t-1} - rho_t (W_{t-1} x_t) x_t^T + S_t,      S_t = m_t S_{t-1} + w_t x_t^T

covers Titans (rho = 0), HOPE (DGD with momentum), DeltaNet and Gated DeltaNet (m = 0).  Inside a chunk of C
tokens the write rows w_t are known beforehand, so the recurrence is a few matrix products and one unit
triangular inverse, exact up to rounding (tests: the token loop, 1e-10); decay products stand in log space.
The backward is written out: autograd's own keeps and reads several times the memory.

C tokens of a chunk  O, I rows out, in
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Decay(NamedTuple):
    """Weights in W_t: A of W_0, B of S_0, C of write i (None without momentum: R), R of correction i."""
    A: torch.Tensor
    B: torch.Tensor | None
    C: torch.Tensor | None
    R: torch.Tensor


class End(NamedTuple):
    """The same at the chunk's last token; H, RH: weights of S_0 and of write i in S (no momentum: None)."""
    A: torch.Tensor
    B: torch.Tensor | None
    C: torch.Tensor | None
    R: torch.Tensor
    H: torch.Tensor | None
    RH: torch.Tensor | None


class Ratios(torch.autograd.Function):
    """exp(row_t - column_i) for i <= t + diagonal, else 0: [..., C], [..., C] (None: row) -> [..., C, C]."""

    @staticmethod
    def forward(ctx, row, column, diagonal):
        ctx.two, column = column is not None, row if column is None else column
        hide = row.new_full((row.shape[-1], row.shape[-1]), -torch.inf).triu_(diagonal + 1)
        out = (row[..., :, None] - column[..., None, :]).add_(hide).exp_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad * ctx.saved_tensors[0]
        row, column = grad.sum(-1), -grad.sum(-2)
        return (row, column, None) if ctx.two else (row + column, None, None)


def decays(log_keep, log_mom=None, before=True, now=True):
    """Decay products of a chunk in log space: log a_t, log m_t [..., C] -> (Decay at t-1, Decay at t, End).

    A_t = prod a, R_ti = A_t/A_i, H_t = prod m, RH_ti = H_t/H_i, C = R RH, B = R H.  None: not asked for.
    """
    total = log_keep.cumsum(-1)
    if log_mom is not None:
        momentum = log_mom.cumsum(-1)
        H, RH = momentum.exp()[..., None], Ratios.apply(momentum, None, 0)

    def at(log, diagonal):
        R = Ratios.apply(log, None if log is total else total, diagonal)    # no tensor twice: the compiler
        return Decay(log.exp(), *((None, None) if log_mom is None else ((R @ H)[..., 0], R @ RH)), R)

    R = (total[..., -1:] - total).exp()
    end = End(total[..., -1].exp(), None, None, R, None, None) if log_mom is None else \
        End(total[..., -1].exp(), (R * H[..., 0]).sum(-1), (R[..., None, :] @ RH)[..., 0, :], R,
            H[..., -1, 0], RH[..., -1, :])
    return at(total - log_keep, -1) if before else None, at(total, 0) if now else None, end


def into(grad, like):
    """grad summed over the axes along which `like` was broadcast."""
    return grad if grad is None or like is None or grad.shape == like.shape else grad.sum_to_size(like.shape)


def acc(total, a, b):
    """total + a @ b, summed inside the product and in place; total None: a @ b."""
    if total is None:
        return a @ b
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (a, b)]
    return total.view(-1, *total.shape[-2:]).baddbmm_(*flat).view(total.shape)


def plus(total, rate, b):
    """total + rate b, in place where there is a total."""
    return rate * b if total is None else total.addcmul_(rate, b)


def add(a, b):
    return b if a is None else a if b is None else a + b


def seen(at, scores):
    """What a row sees of the writes before it, and of their corrections: C and R times the scores."""
    past = at.R * scores
    return past if at.C is None else at.C * scores, past


def written(end, w, u):
    """Rows of everything the chunk leaves in W: C w + R u."""
    rows = (end.R if end.C is None else end.C)[..., None] * w
    return rows if u is None else rows.addcmul_(end.R[..., None], u)


def pick(t, part, axis):
    """What q asks: part = (first, last, stacked) of t; stacked: memories, on axis 2; else rows on `axis`."""
    if t is None or part is None:
        return t
    first, last, stacked = part
    if stacked:
        return t[:, :, first:last]
    return t if axis is None else t.narrow(axis, first, last - first)


def gain(total, like, part, axis, a, b):
    """total + a @ b in the picked part of it; total None: 0, shaped like `like`."""
    if part is None or axis is None and not part[2]:
        return acc(total, a, b)
    total = torch.zeros_like(like) if total is None else total
    pick(total, part, axis).add_(a @ b)
    return total


class Chunk(torch.autograd.Function):
    """advance() with its backward by hand; W, S, x, w share their leading axes, the rates may broadcast.

    see, past: what row t sees of write i and of correction i, C_ti and R_ti times x_t.x_i or q_t.x_i.
    Products are kept for the backward, what is elementwise is done again: reading it back would cost more.
    """

    @staticmethod
    def forward(ctx, late, part, W, S, x, gram, w, rho, gate, Wx, q, *rates):
        ctx.set_materialize_grads(False)
        before, now, end = Decay(*rates[:4]), Decay(*rates[4:8]), End(*rates[8:])
        u, T, r, out, score = None, None, None, None, None
        if rho is not None:
            see, past = seen(before, gram)
            right = acc(before.A[..., None] * Wx, see, w)
            if S is not None:
                acc(right, before.B[..., None] * x, S.mT)
            lower = past * rho[..., None, :]
            eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
            T = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
            r = T @ right
            u = corrections(r, rho, gate)
        if q is not None:
            Wq, Sq, xq = pick(W, part, -2), pick(S, part, -2), pick(x, part, None)
            at, score = now if late else before, q @ xq.mT
            see, past = seen(at, score)
            out = acc((at.A[..., None] * q) @ Wq.mT, see, pick(w, part, -1))
            if u is not None:
                acc(out, past, pick(u, part, -1))
            if S is not None:
                acc(out, at.B[..., None] * q, Sq.mT)
        W_new, S_new = acc(end.A[..., None, None] * W, written(end, w, u).mT, x), None
        if end.H is not None:
            S_new = acc(None if S is None else end.H[..., None, None] * S, (end.RH[..., None] * w).mT, x)
            if S is not None:
                W_new.addcmul_(end.B[..., None, None], S)
        ctx.late, ctx.part = late, part
        ctx.save_for_backward(W, S, x, gram, w, rho, gate, Wx, q, T, r, score, *rates)
        return W_new, S_new, out

    @staticmethod
    def backward(ctx, gW_new, gS_new, gout):
        W, S, x, gram, w, rho, gate, Wx, q, T, r, score, *rates = ctx.saved_tensors
        before, now, end = Decay(*rates[:4]), Decay(*rates[4:8]), End(*rates[8:])
        u, part = None if rho is None else corrections(r, rho, gate), ctx.part
        gW = gS = gx = ggram = gw = gu = gq = grho = gWx = None
        g_now, g_before, g_end = [None] * 4, [None] * 4, [None] * 6     # of A, B, C, R (, H, RH)
        dot = lambda a, b: (a * b).sum((-1, -2))    # noqa: E731
        if gW_new is not None:
            gW, g_end[0] = end.A[..., None, None] * gW_new, dot(gW_new, W)
            gx, grows = written(end, w, u) @ gW_new, x @ gW_new.mT
            gw = (end.R if end.C is None else end.C)[..., None] * grows
            along = (grows * w).sum(-1)
            if u is not None:
                gu, g_end[3] = end.R[..., None] * grows, (grows * u).sum(-1)
            g_end[2 if end.C is not None else 3] = along if end.C is not None else add(g_end[3], along)
            if S is not None:
                gS, g_end[1] = end.B[..., None, None] * gW_new, dot(gW_new, S)
        if gS_new is not None:
            grows = x @ gS_new.mT
            gx = acc(gx, end.RH[..., None] * w, gS_new)
            gw, g_end[5] = plus(gw, end.RH[..., None], grows), (grows * w).sum(-1)
            if S is not None:
                gS, g_end[4] = plus(gS, end.H[..., None, None], gS_new), dot(gS_new, S)
        if gout is not None:
            at, g_at = (now, g_now) if ctx.late else (before, g_before)
            see, past = seen(at, score)
            gqW = gout @ pick(W, part, -2)
            gq, g_at[0] = at.A[..., None] * gqW, (gqW * q).sum(-1)
            gW = gain(gW, W, part, -2, gout.mT, at.A[..., None] * q)
            gw = gain(gw, w, part, -1, see.mT, gout)
            gsee = gout @ pick(w, part, -1).mT
            if at.C is None:
                gpast = gsee if u is None else acc(gsee, gout, pick(u, part, -1).mT)
                gscore = gpast * at.R
            else:
                gpast = None if u is None else gout @ pick(u, part, -1).mT
                g_at[2], gscore = gsee * score, gsee * at.C
                if u is not None:
                    gscore.addcmul_(gpast, at.R)
            if gpast is not None:
                g_at[3] = gpast.mul_(score)
            if u is not None:
                gu = gain(gu, w, part, -1, past.mT, gout)
            gq, gx = acc(gq, gscore, pick(x, part, None)), gain(gx, x, part, None, gscore.mT, q)
            if S is not None:
                gqS = gout @ pick(S, part, -2)
                g_at[1], gq = (gqS * q).sum(-1), plus(gq, at.B[..., None], gqS)
                gS = gain(gS, S, part, -2, gout.mT, at.B[..., None] * q)
        if gu is not None:                  # r = (I + past rho)^-1 right, u = -rho r
            see, past = seen(before, gram)
            gu = gu if gate is None else gu * gate
            gright, grho = T.mT @ (gu * -rho[..., None]), -(gu * r).sum(-1)
            gpast = gright @ r.mT           # minus the gradient of past rho
            grho = grho - (gpast * past).sum(-2)
            gpast.mul_(-rho[..., None, :])
            gWx, gA = before.A[..., None] * gright, (gright * Wx).sum(-1)
            gw, gsee = acc(gw, see.mT, gright), gright @ w.mT
            if before.C is None:
                gpast.add_(gsee)
                gR, gC, ggram = gpast * gram, None, gpast.mul_(before.R)
            else:
                ggram = (gpast * before.R).addcmul_(gsee, before.C)
                gR, gC = gpast.mul_(gram), gsee.mul_(gram)
            gB = None
            if S is not None:
                gxS = gright @ S
                gB, gx = (gxS * x).sum(-1), plus(gx, before.B[..., None], gxS)
                gS = acc(gS, gright.mT, before.B[..., None] * x)
            theirs = zip(before, g_before, (gA, gB, gC, gR))    # of one memory, of all: not to be broadcast
            g_before = [add(into(a, like), into(b, like)) for like, a, b in theirs]
        grads = [gW, gS, gx, ggram, gw, grho, None, gWx, gq, *g_before, *g_now, *g_end]
        likes = [W, S, x, gram, w, rho, None, Wx, q, *before, *now, *end]
        return None, None, *(into(grad, like) for grad, like in zip(grads, likes))


def corrections(r, rho, gate):
    """u = -rho r; gate (None: open): 0 where a memory's gate is shut."""
    u = r * -rho[..., None]
    return u if gate is None else u * gate


def advance(W, S, x, w, rho, rates, Wx=None, q=None, late=True, gram=None, gate=None, part=None):
    """A chunk of writes w x^T and corrections -rho (W x) x^T -> (W [..,O,I], S, out).

    W, S: [..., O, I] at the chunk's start (S None: zero, or no momentum); x [..., C, I]; w [..., C, O]; rho
    [..., C] or None; rates: decays(...); Wx, gram: x W^T and x x^T where they are known already; gate: 0 or
    1 as a factor of the corrections.  out: W_t q_t of every token's q [..., C, I], after its write (late) or
    before it; part: of those memories alone (pick()).
    The corrections u_t = -rho_t r_t, r = W_{t-1} x_t, solve (I + R_{t-1,i} rho_i x_i.x_t) r = A_{t-1} W x +
    B_{t-1} S x + (C * x x^T) w.
    """
    before, now, end = (r or [None] * 4 for r in rates)
    x = x.expand(*W.shape[:-2], *x.shape[-2:])
    if rho is not None:
        Wx = x @ W.mT if Wx is None else Wx
        gram = (x @ x.mT if gram is None else gram).expand(*x.shape[:-1], x.shape[-2])
    return Chunk.apply(late, part, W, S, x, gram, w, rho, gate, Wx, q, *before, *now, *end)


def chunk_rule(kind, W, S, g, keep, log_mom):
    """Rules without an exact token form, applied once to a chunk's summed step eta g [..., O, I].

    delta_momentum (NL 49)   m <- m (a I - g^T g / |g|^2) - g;   W <- keep W + m
    dmgd (NL 50)   W <- keep W + m_phi(g), m_phi(g) = -g + s(g) phi^T;  phi <- a phi - d<m_phi(g), 1>/dphi
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
