"""What a chunk teaches a memory: the answers of an MLP, the gradient rows of its error, and their backward.

A memory is stacked [B,H,M,O,I]: M MLPs a head.  Its own gradient is part of the model, so the outer gradient
needs second derivatives.  They are written out here: autograd's graph of the same lines has three times the
tensors, and on a CPU reading and writing tensors is what costs.  Products are kept, elementwise parts redone.

B sequences  H heads  M memories  C tokens of a chunk  K head width  O, I rows out, in
"""

import torch

from common.hope.scan import acc, add


class SiLU(torch.autograd.Function):
    """s(z) = z sigmoid(z) and its slope s'(z): a memory's own gradient needs both and is differentiated."""

    @staticmethod
    def forward(ctx, z):
        p = torch.sigmoid(z)
        y = z * p
        ctx.save_for_backward(p, y)
        ctx.set_materialize_grads(False)
        return y, slope(p, y)

    @staticmethod
    def backward(ctx, gy, gslope):
        p, y = ctx.saved_tensors
        first = slope(p, y)
        return add(None if gy is None else gy * first, None if gslope is None else gslope * bend(p, y, first))


def slope(p, y):
    """s'(z) = p + y - p y from p = sigmoid(z) and y = z p."""
    return torch.lerp(y, y.new_ones(()).expand_as(y), p)


def bend(p, y, first):
    """s''(z) = (1 - p)(2 s' - y)."""
    turn = torch.sub(y, first, alpha=2)
    return torch.addcmul(turn.neg(), turn, p)


def together(x, axis):
    """M stacked memories [B,H,M,..] as one wide one: M joins the outputs, axis 3 of a W and 4 of rows."""
    return None if x is None else x.movedim(2, axis - 1).flatten(axis - 1, axis)[:, :, None]


def apart(x, M, axis):
    """together() undone."""
    return None if x is None else x[:, :, 0].unflatten(axis - 1, (M, -1)).movedim(axis - 1, 2)


def shared(W, z):
    """W z of stacked memories [B,H,M,O,I] on rows z [B,H,M or 1,C,I]; one z for all: one product."""
    if z.shape[2] == W.shape[2]:
        return z @ W.mT
    return apart(z @ together(W, 3).mT, W.shape[2], 4).contiguous()


class Lesson(torch.autograd.Function):
    """Rows k, v [B,H,1,C,K] and layers W_1..W_n -> for every layer: x, z = W x, g, x x^T, |x|^2, |g|.

    x_1 = k, x_{i+1} = s(z_i); e = M(k) - M(v) (own) or M(k) - v; g_n = e, g_i = (g_{i+1} W_{i+1}) s'(z_i):
    the gradient of 1/2|e|^2 is g x^T.  Layer 1 has one input for all M memories: z and g are wide (together).
    Returned flat: n - 1 times x (x_1 is k itself), n times z, n times g, ...
    """

    @staticmethod
    def forward(ctx, residual, own, k, v, *Ws):
        C, M, n = k.shape[-2], Ws[0].shape[2], len(Ws)
        row = torch.cat([k, v], -2) if own else k           # M answers k and v in one product
        wide = row @ together(Ws[0], 3).mT
        z, p, x = [apart(wide, M, 4).contiguous()], [], [row]
        for W in Ws[1:]:
            p.append(torch.sigmoid(z[-1]))
            x.append(z[-1] * p[-1])
            z.append(x[-1] @ W.mT)
        error = z[-1][..., :C, :] - (z[-1][..., C:, :] if own else v)
        if residual:
            error += k - v if own else k
        g, before = [error], []                             # before: g_{i+1} W_{i+1}, without the slope
        for W, y, part in zip(reversed(Ws[1:]), reversed(x[1:]), reversed(p)):
            before.insert(0, g[0] @ W)
            g.insert(0, before[0] * slope(part[..., :C, :], y[..., :C, :]))
        x_k = [k] + [y[..., :C, :] for y in x[1:]]
        gram = [y @ y.mT for y in x_k]
        size = [torch.linalg.vector_norm(t, dim=-1) for t in g]
        ctx.save_for_backward(*Ws, row, *x_k[1:], *z[:-1], *p, *before, *g, *size)
        ctx.residual, ctx.own, ctx.n = residual, own, n
        ctx.set_materialize_grads(False)
        outputs = [wide[..., :C, :], *(t[..., :C, :] for t in z[1:])]
        return (*x_k[1:], *outputs, together(g[0], 4), *g[1:], *gram,
                *(t.diagonal(dim1=-2, dim2=-1).clone() for t in gram), *size)

    @staticmethod
    def backward(ctx, *grads):
        n, own, saved = ctx.n, ctx.own, iter(ctx.saved_tensors)
        take = lambda count: [next(saved) for _ in range(count)]            # noqa: E731
        Ws, (row,), x_k, z, p, before, g, size = map(take, (n, 1, n - 1, n - 1, n - 1, n - 1, n, n))
        grads = iter(grads)
        gx, gz, gg, ggram, gsquare, gsize = ([next(grads) for _ in range(count)]
                                             for count in (n - 1, n, n, n, n, n))
        M, C = Ws[0].shape[2], g[0].shape[-2]
        gz[0], gg[0] = apart(gz[0], M, 4), apart(gg[0], M, 4)
        gW, turned, flow = [None] * n, [], None
        x = [a * b for a, b in zip(z, p)]
        firsts = [slope(a, b) for a, b in zip(p, x)]
        for i in range(n):                                  # gradient rows, first layer to last
            if gsize[i] is not None:
                ratio = (gsize[i] / size[i].clamp(min=torch.finfo(row.dtype).tiny))[..., None]
                gg[i] = ratio * g[i] if gg[i] is None else torch.addcmul(gg[i], ratio, g[i])
            up = add(gg[i], flow)
            if i == n - 1 or up is None:
                turned.append(None)
                flow = None
                continue
            a, b, c = (t[..., :C, :] for t in (p[i], x[i], firsts[i]))
            turned.append((up * before[i]).mul_(bend(a, b, c)))
            below = up * c
            gW[i + 1], flow = g[i + 1].mT @ below, below @ Ws[i + 1].mT
        ge = up
        if ge is None:
            ge = torch.zeros_like(g[-1])
        down = torch.cat([add(gz[-1], ge), -ge], -2) if own else add(gz[-1], ge)
        for i in reversed(range(1, n)):                     # answers, last layer to first
            gW[i] = acc(gW[i], down.mT, x[i - 1])
            down = down @ Ws[i]
            down_k = down[..., :C, :]
            if gx[i - 1] is not None:
                down_k += gx[i - 1]
            curve = of_gram(ggram[i], gsquare[i], x_k[i - 1])
            if curve is not None:
                down_k += curve
            down *= firsts[i - 1]
            for t in (turned[i - 1], gz[i - 1]):
                if t is not None:
                    down_k += t
        wide = together(down, 4)
        gW[0] = (wide.mT @ row).view(Ws[0].shape)
        grow = wide @ together(Ws[0], 3)
        ge = ge.sum(2, keepdim=True)
        gk = add(grow[..., :C, :], of_gram(ggram[0], gsquare[0], row[..., :C, :]))
        if ctx.residual:
            gk = gk + ge
        gv = (grow[..., C:, :] - ge if ctx.residual else grow[..., C:, :]) if own else -ge
        return None, None, gk, gv, *gW


def of_gram(grad, gsquare, x):
    """Gradient at the rows x of x x^T and of its diagonal."""
    if grad is None:
        return None if gsquare is None else 2 * gsquare[..., None] * x
    grad = grad + grad.mT
    if gsquare is not None:
        grad.diagonal(dim1=-2, dim2=-1).add_(gsquare, alpha=2)
    return grad @ x
