"""What a chunk teaches a memory: the answers of an MLP, the gradient rows of its error, and their backward.

Memories that learn the same keys are taught together: layer 1 of all is one wide matrix, the deeper layers
of like ones are stacked [B,H,M,O,I].  Their own gradient is part of the model, so the outer gradient needs
second derivatives.  They are written out here: autograd's graph of the same lines has three times the
tensors, and on a CPU reading and writing tensors is what costs.  Products are kept, elementwise parts redone.

B sequences  H heads  M memories  C tokens of a chunk  K head width  O, I rows out, in
"""

from typing import NamedTuple

import torch

from common.hope.scan import acc, add, chunk_rule


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
    turn = torch.lerp(y, first, 2.0)                # one pass: y + 2 (s' - y)
    return torch.addcmul(turn, turn, p, value=-1)


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


class Rule(NamedTuple):
    """How a memory learns, and when it is read."""
    delta: bool = True              # DGD (NL 57-88), else gradient descent
    momentum: bool = True
    kind: str = "scan"              # scan: exact per token; delta_momentum, dmgd: once a chunk (NL 49, 50)
    normal: str = "proximal"        # step eta/(1+eta|x|^2), exact minimiser; "unit" eta/|x|^2; "none" eta
    clip: float = 1.0               # cap of a token's gradient norm |g| |x|; 0: none
    threshold: float = 0.0          # surprise gate: no write of a memory whose mean |e| is below
    before: bool = False            # tokens read the state before their write (NL 86), else after it (T 15)
    boundary: bool = False          # tokens read the state at the chunk's start (NL 90)


class Plan(NamedTuple):
    """How memories that learn the same rows stand side by side, and the rule they learn by."""
    groups: tuple                   # of like ones: (how many, outputs of layer 1 of each, adds its input)
    rule: Rule
    own: bool = True                # regress on M(v) (NL 84), else on v

    def depth(self, Ws):
        """Layers of a memory in [layer 1 of all, deeper layers of group 0, 1, ...]."""
        return 1 + (len(Ws) - 1) // len(self.groups)

    def gated(self, threshold):
        return self._replace(rule=self.rule._replace(threshold=threshold))


def alone(plan, *lists):
    """The memory that q asks, by itself: the last of the first group -> plan, Ws (Ss, ...; None as it is)."""
    M, O, residual = plan.groups[0]

    def last(W, i):
        return W if W is None else W[:, :, M - 1:] if i else W[..., M * O - O:M * O, :]
    one = [Ws and [last(W, i) for i, W in enumerate(Ws[:plan.depth(Ws)])] for Ws in lists]
    return plan._replace(groups=((1, O, residual),)), *one


def asks(plan, i):
    """advance()'s part for q in layer i: the last memory of the first group; None: there is but one."""
    M, O, _ = plan.groups[0]
    if i == 0:
        return None if len(plan.groups) == 1 and M == 1 else (M * O - O, M * O, False)
    return None if M == 1 else (M - 1, M, True)


def sides(plan, gates, depth):
    """The gates [B,H,M,1] as factors of every layer's rows; None: no gate is ever shut."""
    if not plan.rule.threshold:
        return [None] * (1 + (depth - 1) * len(plan.groups))
    split = gates.split([M for M, _, _ in plan.groups], 2)
    wide = torch.cat([g.expand(-1, -1, -1, O).flatten(2) for g, (_, O, _) in zip(split, plan.groups)], 2)
    return [wide[:, :, None, None], *(g[..., None] for g in split for _ in range(depth - 1))]


def summed(plan, W, S, x, w, log_keep, log_mom, wide):
    """One layer under a rule that acts once a chunk, on the sum of its writes; layer 1: memory by memory."""
    kind, keep = plan.rule.kind, log_keep.sum(-1).exp()
    if not wide:
        return chunk_rule(kind, W, S, -(w.mT @ x), keep, log_mom)
    moved, at = [], slice(0, 0)
    for j, (M, O, _) in enumerate(plan.groups):
        at = slice(at.stop, at.stop + M * O)
        g = -(apart(w[..., at], M, 4).mT @ x)
        moved.append(chunk_rule(kind, apart(W[..., at, :], M, 3), S and S[j], g, keep, log_mom))
    return torch.cat([together(W, 3) for W, _ in moved], 3), [S for _, S in moved]


def stepped(rule, eta, square):
    """-> step, its derivatives by eta and by square = |x|^2."""
    if rule.normal == "proximal":
        share = 1 / (1 + eta * square)
        step = eta * share
        return step, share * share, -step * step
    if rule.normal == "unit":
        floor = square.clamp(min=1e-4)
        step = eta / floor
        return step, 1 / floor, -step / floor * (square >= 1e-4)
    return eta.expand_as(square), torch.ones_like(square), torch.zeros_like(square)


def scaled(rule, step, square, size, gate):
    """w = s g -> s = -step, clipped, 0 where the gate is shut; s / step; where the clip cuts (None: none)."""
    cap, over = step.new_ones(()), None
    if rule.clip:
        load = size * square.clamp(min=1e-12).sqrt()
        cap, over = rule.clip / load.clamp(min=rule.clip), load >= rule.clip
    cap = cap if gate is None else cap * gate
    return -step * cap, -cap, over


def of_step(rule, eta, square, g, size, gate, gw, gstep):
    """Gradients at g, |x|^2 and eta of w = s g [B,H,M,C,O] and of the step."""
    step, by_eta, by_square = stepped(rule, eta, square)
    gg = gsquare = None
    if gw is not None:
        scale, bare, over = scaled(rule, step, square, size, gate)
        along = (gw * g).sum(-1)
        gg, gstep = scale[..., None] * gw, add(gstep, along * bare)
        if over is not None:
            pull, size = -along * scale * over, size.clamp(min=torch.finfo(size.dtype).tiny)
            gg.addcmul_((pull / size / size)[..., None], g)
            gsquare = pull / (2 * square.clamp(min=1e-12))
    if gstep is None:
        return gg, gsquare, None
    return gg, add(gsquare, gstep * by_square), gstep * by_eta


class Lesson(torch.autograd.Function):
    """Rows k, v [B,H,1,C,K], eta [B,H,1,C], W [B,H,1,O,K] (layer 1 of all memories) and, group by group,
    deeper layers [B,H,M,O,I] -> W k, w, step, k k^T of layer 1; x, W x, w, step, x x^T of each deeper; gates.

    x_1 = k, x_{i+1} = s(W_i x_i); e = M(k) - M(v) (own) or M(k) - v; g_n = e and
    g_i = (g_{i+1} W_{i+1}) s'(W_i x_i): the gradient of 1/2|e|^2 is g x^T, and w = -step g, clipped.  gates
    [B,H,M,1]: 1 or 0 (no threshold: [1]).
    """

    @staticmethod
    def forward(ctx, plan, k, v, eta, W, *deep):
        C, n = k.shape[-2], len(deep) // len(plan.groups)
        row = torch.cat([k, v], -2) if plan.own else k          # M answers k and v in one product
        wide, gram = row @ W.mT, k @ k.mT
        square = gram.diagonal(dim1=-2, dim2=-1).clone()
        step = stepped(plan.rule, eta, square)[0]
        w = wide.new_empty(*wide.shape[:-2], C, wide.shape[-1])
        kept, made, gates, at = [], [], [], slice(0, 0)
        for j, (M, O, residual) in enumerate(plan.groups):
            Vs, at = deep[j * n:j * n + n], slice(at.stop, at.stop + M * O)
            z, p, x = [apart(wide[..., at], M, 4).contiguous()], [], []
            for V in Vs:
                p.append(torch.sigmoid(z[-1]))
                x.append(z[-1] * p[-1])
                z.append(x[-1] @ V.mT)
            error = z[-1][..., :C, :] - (z[-1][..., C:, :] if plan.own else v)
            if residual:
                error += k - v if plan.own else k
            g, before = [error], []                             # before: g_{i+1} W_{i+1}, without the slope
            for V, y, part in zip(*map(reversed, (Vs, x, p))):
                before.insert(0, g[0] @ V)
                g.insert(0, before[0] * slope(part[..., :C, :], y[..., :C, :]))
            sizes, squares = [torch.linalg.vector_norm(t, dim=-1) for t in g], []
            gate = None
            if plan.rule.threshold:
                gate = (sizes[-1].mean(-1, keepdim=True) >= plan.rule.threshold).to(eta.dtype)
                gates.append(gate)
            scale = scaled(plan.rule, step, square, sizes[0], gate)[0]
            apart(w[..., at], M, 4).copy_(g[0] * scale[..., None])
            for y, answer, t, size in zip(x, z[1:], g[1:], sizes[1:]):
                x_k = y[..., :C, :]
                grams = x_k @ x_k.mT
                squares.append(grams.diagonal(dim1=-2, dim2=-1).clone())
                pace = stepped(plan.rule, eta, squares[-1])[0]
                scale = scaled(plan.rule, pace, squares[-1], size, gate)[0]
                made += [x_k, answer[..., :C, :], t * scale[..., None], pace, grams]
            kept += [*p, *x, *before, *g, *sizes, *squares, gate]
        gates = torch.cat(gates, 2) if gates else eta.new_ones(1)
        ctx.save_for_backward(row, eta, square, W, *deep, *kept)
        ctx.plan, ctx.C, ctx.n = plan, C, n
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        return wide[..., :C, :], w, step, gram, *made, gates

    @staticmethod
    def backward(ctx, gwide, gw, gstep, ggram, *grads):
        plan, C, n, saved, grads = ctx.plan, ctx.C, ctx.n, iter(ctx.saved_tensors), iter(grads)
        take = lambda count: [next(saved) for _ in range(count)]            # noqa: E731
        row, eta, square, W = take(4)
        deep, down, at = take(n * len(plan.groups)), None, slice(0, 0)
        _, gsquare, geta = of_step(plan.rule, eta, square, None, None, None, None, gstep)
        gdeep, ge_residual, ge_all = [], None, None
        for M, O, residual in plan.groups:
            Vs, at = deep[len(gdeep):len(gdeep) + n], slice(at.stop, at.stop + M * O)
            p, x, before, g, sizes, squares, (gate,) = map(take, (n, n, n, n + 1, n + 1, n, 1))
            theirs = [[next(grads) for _ in range(5)] for _ in range(n)]
            gx, gz, gws, gsteps, ggrams = zip(*theirs) if n else [()] * 5
            side = [None if t is None else apart(t[..., at], M, 4) for t in (gwide, gw)]
            gg = []
            for i, (gw_i, gstep_i) in enumerate(zip((side[1], *gws), (None, *gsteps))):
                sq = squares[i - 1] if i else square
                rows, gsq, by = of_step(plan.rule, eta, sq, g[i], sizes[i], gate, gw_i, gstep_i)
                gg.append(rows)
                geta = add(geta, None if by is None else by.sum(2, keepdim=True))
                if i:
                    squares[i - 1] = gsq
                else:
                    gsquare = add(gsquare, None if gsq is None else gsq.sum(2, keepdim=True))
            curves = [of_gram(a, b, y[..., :C, :]) for a, b, y in zip(ggrams, squares, x)]
            turn, ge, gVs = of_gradients(C, Vs, p, x, before, g, gg)
            below = of_answers(C, plan.own, Vs, p, x, (side[0], *gz), gx, curves, turn, ge, gVs)
            if down is None:
                down = row.new_empty(*row.shape[:-1], W.shape[-2])
            apart(down[..., at], M, 4).copy_(below)
            gdeep, ge = gdeep + gVs, ge.sum(2, keepdim=True)
            ge_residual, ge_all = add(ge_residual, ge if residual else None), add(ge_all, ge)
        grow = down @ W
        gk = add(add(grow[..., :C, :], of_gram(ggram, gsquare, row[..., :C, :])), ge_residual)
        gv = add(grow[..., C:, :], None if ge_residual is None else -ge_residual) if plan.own else -ge_all
        return None, gk, gv, geta, down.mT @ row, *gdeep


def of_gradients(C, Vs, p, x, before, g, gg):
    """Back through the gradient rows, first layer to last, from gradients gg at them -> those at every W x
    but the last, at e, and at the layers V."""
    turn, gVs, flow = [], [], None
    for i, V in enumerate(Vs):
        up, flow = add(gg[i], flow), None
        turn.append(None)
        gVs.append(None)
        if up is not None:
            a, b = p[i][..., :C, :], x[i][..., :C, :]
            c = slope(a, b)
            turn[i] = (up * before[i]).mul_(bend(a, b, c))
            below = c.mul_(up)
            gVs[i], flow = g[i + 1].mT @ below, below @ V.mT
    ge = add(gg[-1], flow)
    return turn, torch.zeros_like(g[-1]) if ge is None else ge, gVs


def of_answers(C, own, Vs, p, x, gz, gx, curves, turn, ge, gVs):
    """Back through the answers, last layer to first -> gradient at W x of the first, k's rows above v's; gVs
    is added to.  gz, turn: gradients at W x of k; gx, curves: at the inputs x."""
    last = add(gz[-1], ge)
    down = torch.cat([last, -ge], -2) if own else last
    for i in reversed(range(len(Vs))):
        gVs[i] = acc(gVs[i], down.mT, x[i])
        down = down @ Vs[i]
        down_k = down[..., :C, :]
        for t in (gx[i], curves[i]):
            if t is not None:
                down_k += t
        down *= slope(p[i], x[i])
        for t in (turn[i], gz[i]):
            if t is not None:
                down_k += t
    return down


def of_gram(grad, gsquare, x):
    """Gradient at the rows x of x x^T and of its diagonal."""
    if grad is None:
        return None if gsquare is None else 2 * gsquare[..., None] * x
    grad = grad + grad.mT
    if gsquare is not None:
        grad.diagonal(dim1=-2, dim2=-1).add_(gsquare, alpha=2)
    return grad @ x
