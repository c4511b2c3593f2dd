"""Fast weights: one linear recurrence, computed a chunk at a time.

    W_t = a_t W_{t-1} - rho_t (W_{t-1} x_t) x_t^T + S_t,      S_t = m_t S_{t-1} + w_t x_t^T

covers Titans (rho = 0), HOPE (DGD with momentum), DeltaNet and Gated DeltaNet (m = 0).  Inside a chunk of C tokens the
write rows w_t are known beforehand, so the recurrence is a few matrix products and one unit triangular inverse, exact
up to rounding; tests/test_hope_lm.py holds it to the token loop at 1e-10.  Decay products stand in log space.

C tokens of a chunk  O, I rows out, in
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Decay(NamedTuple):
    """Weights of the past in W_t: A of W_0, B of S_0 (None without momentum), C of write i, R of correction i."""
    A: torch.Tensor
    B: torch.Tensor | None
    C: torch.Tensor
    R: torch.Tensor


def decays(log_keep, log_mom=None):
    """Decay products of a chunk in log space: log a_t, log m_t [..., C] -> (at t, at t-1, (H_C, R^H_C) or None).

    A_t = prod a, R_ti = A_t/A_i, H_t = prod m, C = R R^H, B_t = sum_s R_ts H_s; one past row is a shift down.
    """
    def ratios(log):
        total = log.cumsum(-1)
        future = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
        return total.exp(), (total[..., :, None] - total[..., None, :]).masked_fill(future, -math.inf).exp()

    A, R = ratios(log_keep)
    if log_mom is None:
        now, tail = Decay(A, None, R, R), None
    else:
        H, RH = ratios(log_mom)
        now, tail = Decay(A, (R @ H[..., None])[..., 0], R @ RH, R), (H[..., -1], RH[..., -1, :])
    shift = [None if m is None else F.pad(m[..., :-1, :], (0, 0, 1, 0)) for m in (now.C, now.R)]
    before = Decay(F.pad(A[..., :-1], (1, 0), value=1.0),
                   None if log_mom is None else F.pad(now.B[..., :-1], (1, 0)), *shift)
    return now, before, tail


class UnitInverse(torch.autograd.Function):
    """(I + L)^-1 of a strictly lower L [..., C, C]; backward -T^T G T^T is two products instead of two solves."""

    @staticmethod
    def forward(ctx, lower):
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        T = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(T)
        return T

    @staticmethod
    def backward(ctx, grad):
        T, = ctx.saved_tensors
        return -(T.mT @ grad @ T.mT).tril(-1)


def write(W, S, x, w, rho, now, before, tail, Wx=None):
    """Weights after a chunk of writes w x^T and corrections -rho (W x) x^T -> (W [..,O,I], S, u [..,C,O]).

    W, S: [..., O, I] at the chunk's start (S None: zero, or no momentum); x [..., C, I]; w [..., C, O];
    rho [..., C] or None; Wx: x W^T where it is known already.  u are the correction rows that read() needs: u_t = -rho_t W_{t-1} x_t solves
    (I + R_{t-1,i} rho_i x_i.x_t) r = A_{t-1} W x + B_{t-1} S x + (C_{t-1} * x x^T) w.
    """
    rows, u = now.C[..., -1, :, None] * w, None
    if rho is not None:
        gram = x @ x.mT
        right = before.A[..., None] * (x @ W.mT if Wx is None else Wx) + (before.C * gram) @ w
        if S is not None:
            right = right + before.B[..., None] * (x @ S.mT)
        lower = before.R * gram * rho[..., None, :]
        narrow = right.shape[-1] < right.shape[-2] // 2
        r = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True) if narrow \
            else UnitInverse.apply(lower) @ right
        u = -rho[..., None] * r
        rows = rows + now.R[..., -1, :, None] * u
    W_new = now.A[..., -1, None, None] * W + rows.mT @ x
    if tail is None:
        return W_new, None, u
    H, RH = tail
    S_new = (RH[..., None] * w).mT @ x
    if S is not None:
        W_new, S_new = W_new + now.B[..., -1, None, None] * S, S_new + H[..., None, None] * S
    return W_new, S_new, u


def read(W, S, x, w, u, q, at):
    """W_t q_t for every token of a chunk, exactly: at = the Decay of t (after the write) or of t-1 (before)."""
    score = q @ x.mT
    if u is None or at.C is at.R:
        out = at.A[..., None] * (q @ W.mT) + (at.C * score) @ (w if u is None else w + u)
    else:
        out = at.A[..., None] * (q @ W.mT) + (at.C * score) @ w + (at.R * score) @ u
    return out if S is None else out + at.B[..., None] * (q @ S.mT)


def chunk_rule(kind, W, S, g, keep, log_mom):
    """Rules without an exact token form, applied once to a chunk's summed step eta g [..., O, I].

    delta_momentum (NL 49)  m <- m (a I - g^T g / |g|^2) - g;   W <- keep W + m
    dmgd (NL 50)            W <- keep W + m_phi(g), m_phi(g) = -g + s(g) phi^T;  phi <- a phi - d<m_phi(g), 1>/dphi
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
