"""What a context is worth: loss by position, the gain from text further back, recall from fast weights.

    by_position(net, data, T)   held-out rows of T tokens: loss in nats by position; the same tokens again
                                with only the last c before them, c = 32, 64, ...: what the rest was worth
    recalled(net, data, T)      --task recall: log p of the right value, fresh and from what the pairs left
"""

import math

import torch

import hope_lm
from eval._scorer import bar

BLOCK = 32      # tokens scored behind one cut-off context: they see c to c + 31 tokens


@torch.no_grad()
def losses(net, rows, some=32, name="context"):
    """Loss in nats [rows, T] of token rows [rows, T + 1], each a fresh context, in float64."""
    parts = [net.score(part[:, :-1], part[:, 1:])[0].double() for part in bar(rows.split(some), name)]
    return torch.cat(parts)


def mean(x_R):
    """Mean over rows with its standard error."""
    return dict(mean=float(x_R.mean()), se=float(x_R.std() / math.sqrt(len(x_R))) if len(x_R) > 1 else None)


def by_position(net, data, T, other=None):
    """-> dict(rows, loss: {"0-64": mean, se}, gain: {c: mean, se}); other: a second net on the same rows.

    gain[c]: nats a token that the second half of the rows loses when it sees only the last c to c + 31
    tokens.  Rows do not overlap; a standard error is that of the mean over rows.
    """
    rows = torch.from_numpy(data.validation(T))
    full = losses(net, rows)
    edges = [0] + [e for e in (64 * 2**i for i in range(20)) if e < T] + [T]
    spans = {f"{a}-{b}": slice(a, b) for a, b in zip(edges, edges[1:])}
    found = dict(rows=len(rows), length=T, gain={},
                 loss={k: mean(full[:, at].mean(1)) for k, at in spans.items()})
    half = T // 2 // BLOCK * BLOCK                          # the last `half` tokens of a row are compared
    c = BLOCK
    while c <= T - half:
        # row r, block b: its BLOCK scored tokens and the c before them
        cut = rows[:, T - half - c:].unfold(1, c + BLOCK + 1, BLOCK)
        near = losses(net, cut.reshape(-1, c + BLOCK + 1), 32 * T // (c + BLOCK), f"last {c}")[:, c:]
        found["gain"][str(c)] = mean(near.reshape(len(rows), half).mean(1) - full[:, T - half:].mean(1))
        c *= 2
    if other is not None:
        theirs = losses(other, rows, name="the other run")
        found["other_minus_this"] = {k: mean((theirs - full)[:, at].mean(1)) for k, at in spans.items()}
    return found


@torch.no_grad()
def recalled(net, data, T=64, n=64):
    """log p of the right values of n rows, asked in a fresh context and from the fast weights that the pairs
    and the noise left behind (no caches) -> dict(n, fresh, memorised, gain: mean and se)."""
    x, y = hope_lm.pairs(data.batch((1, 0), range(n), T), "cpu")
    ask = T - 16                                            # the last 16 tokens are 8 keys and their values
    _, state = net(x[:, :ask], net.fresh(n))
    told, y = net.remember(state), y[:, ask:]
    fresh, told = (-hope_lm.nll(net(x[:, ask:], s)[0], y)[y >= 0].double() for s in (net.fresh(n), told))
    return dict(n=len(fresh), fresh=mean(fresh), memorised=mean(told), gain=mean(told - fresh),
                share_higher=float((told > fresh).double().mean()))
