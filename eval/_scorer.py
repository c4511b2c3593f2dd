"""Log-likelihoods under a hope_lm net, fresh or after its fast weights took in the context; one by one or in
batches."""

import torch
from tqdm import tqdm

import hope_lm


def bar(items, name, total=None):
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(items, desc=name, total=total, disable=None, leave=False)


class Scorer:
    """Log-likelihoods under a net; with memorize, from the fast weights that the context leaves behind."""

    def __init__(self, net, bpe, length, memorize=False, paths=("titan", "cms"), steps=1, threshold=None,
                 reset=True, oracle=False):
        self.net, self.bpe, self.length, self.memorize = net, bpe, length, memorize
        self.paths, self.steps, self.reset, self.oracle = paths, steps, reset, oracle
        self.state, self.events = None, dict(open=0.0, seen=0)
        self.teaches = net.cfg.cms == "context" and net.cfg.levels > 0
        for family in hope_lm.families(net) if threshold is not None else ():
            family.plan = family.plan.gated(threshold)

    def split(self, context, continuation):
        """Token ids of both, encoded together; the context's trailing spaces belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return [self.bpe.eos], self.bpe.encode(continuation)
        whole, head = self.bpe.encode(context + continuation), self.bpe.encode(context)
        return whole[:len(head)], whole[len(head):]

    # --- one by one: the order and the sums of lm-evaluation-harness ----------------------------------------

    def take_in(self, ids):
        """Let the fast weights learn from ids; what remains is in self.state, base weights are untouched."""
        self.state = self.take_in_many([ids], None if self.reset else self.state)[0]

    @torch.no_grad()
    def loglikelihood(self, context, continuation):
        """(sum of log p(continuation | context), every token is the likeliest)."""
        head, tail = self.split(context, continuation)
        if self.memorize:
            self.take_in(head + tail if self.oracle else head)
        ids = (head + tail)[-(self.length + 1):]
        tokens = torch.tensor([ids])
        logits, _ = self.net(tokens[:, :-1], self.state if self.memorize else self.net.fresh(1))
        logp = logits[0, -len(tail):].double().log_softmax(-1)
        target = tokens[0, -len(tail):]
        return float(logp.gather(1, target[:, None]).sum()), bool((logp.argmax(-1) == target).all())

    # --- in batches: the same numbers up to rounding --------------------------------------------------------

    @torch.no_grad()
    def choices(self, items, rows=32):
        """[(context, [continuation, ...])] -> per item loglikelihood()'s pair of each continuation.

        `rows` items go through the model at once, and a context once for all its continuations.  Memories
        that are kept from item to item, or that saw the answer, are taken one by one.
        """
        if self.memorize and (self.oracle or not self.reset):
            return [[self.loglikelihood(context, c) for c in some] for context, some in items]
        found, groups = [[None] * len(some) for _, some in items], {}
        for i, (context, some) in enumerate(items):
            for j, (head, tail) in enumerate(self.split(context, c) for c in some):
                seen = (head + tail)[-(self.length + 1):][:-len(tail)]      # equally long tails share one
                groups.setdefault((i, tuple(head), tuple(seen)), []).append((j, tail))
        groups = sorted(groups.items(), key=lambda g: len(g[0][1]))         # equal lengths side by side
        cut = sum(len(head) < 2 for (_, head, _), _ in groups)              # one token teaches nothing
        for batch in (part[lo:lo + rows] for part in (groups[:cut], groups[cut:])
                      for lo in range(0, len(part), rows)):
            states = self.take_in_many([list(head) for (_, head, _), _ in batch]) if self.memorize else None
            scores = self.score_tails([list(seen) for (_, _, seen), _ in batch],
                                      [[tail for _, tail in some] for _, some in batch], states)
            for ((i, _, _), some), pairs in zip(batch, scores):
                for (j, _), pair in zip(some, pairs):
                    found[i][j] = pair
        return found

    @torch.no_grad()
    def score_tails(self, heads, tails, states=None):
        """heads [ids], tails [[ids, ...]], states of one row each (None: fresh) -> per head, per tail
        (sum of log p, every token is the likeliest)."""
        n, found = min(map(len, heads)) - 1, []             # what all have in common goes as one batch
        state = self.net.fresh(len(heads)) if states is None else join(states)
        if n > 0:
            state = self.net(torch.tensor([head[:n] for head in heads]), state)[1]
        for i, (head, some) in enumerate(zip(heads, tails)):
            rest, width = head[n:], len(head) - n + max(map(len, some)) - 1
            # shorter tails are padded behind their end, where no causal model looks
            tokens = torch.tensor([(rest + tail[:-1] + [0] * width)[:width] for tail in some])
            logits, _ = self.net(tokens, rows_of(state, [i] * len(some)))
            found.append([])
            for row, tail in zip(logits, some):
                logp = row[len(rest) - 1:len(rest) - 1 + len(tail)].double().log_softmax(-1)
                target = torch.tensor(tail)
                found[-1].append((float(logp.gather(1, target[:, None]).sum()),
                                  bool((logp.argmax(-1) == target).all())))
        return found

    @torch.no_grad()
    def take_in_many(self, heads, state=None):
        """The fast weights that each of the heads leaves behind, all starting from `state` (None: fresh)."""
        state = self.net.fresh(len(heads)) if state is None else rows_of(state, [0] * len(heads))
        states = [rows_of(state, [i]) for i in range(len(heads))]
        n = min(map(len, heads)) - self.teaches             # a token teaches when its successor is known
        if self.teaches:                                    # cut where the levels move anyway
            n -= n % min(self.net.cfg.periods[:self.net.cfg.levels])
        for _ in range(self.steps if min(map(len, heads)) > 1 else 0):
            start = hope_lm.sum_gates(states[0]["blocks"])
            state = self._learn(torch.tensor([head[:n + self.teaches] for head in heads]), join(states))
            for i, head in enumerate(heads):
                own = self._learn(torch.tensor([head[n:]]), rows_of(state, [i]))
                states[i] = self.net.remember(own, self.paths)
                opened, seen = hope_lm.sum_gates(states[i]["blocks"])
                self._count(float(opened - start[0]), seen - start[1])
        return states

    def _learn(self, tokens, state):
        """The state after tokens; CMS levels that move inside a context learn to predict tokens[:, 1:]."""
        if tokens.shape[1] <= self.teaches:
            return state
        if not self.teaches:
            return self.net(tokens, state)[1]
        _, state, info = self.net.score(tokens[:, :-1], tokens[:, 1:], state)
        self._count(float(info["gates"][0]) * len(tokens), info["gates"][1] * len(tokens))
        return state

    def _count(self, opened, seen):
        self.events = dict(open=self.events["open"] + opened, seen=self.events["seen"] + seen)

    @torch.no_grad()
    def rolling(self, document, rows=32):
        """Sum of log p of a whole document, every token once: windows of `length`, each with
        one token of context."""
        ids = [self.bpe.eos] + self.bpe.encode(document)
        n = (len(ids) - 1) // self.length * self.length
        whole = torch.tensor(ids[:n + 1]).unfold(0, self.length + 1, self.length) if n else ()
        batches = [whole[lo:lo + rows] for lo in range(0, len(whole), rows)]
        batches += [torch.tensor([ids[n:]])] if n < len(ids) - 1 else []
        by_token = [row for w in batches for row in self.net.score(w[:, :-1], w[:, 1:])[0]]
        return -float(sum(row.double().sum() for row in by_token)), by_token


def rows_of(tree, index):
    """Those sequences of a state, which is a tree of tensors [B, ...]; single numbers are of all of them."""
    if torch.is_tensor(tree):
        return tree[index] if tree.ndim else tree
    if isinstance(tree, dict):
        return {k: rows_of(v, index) for k, v in tree.items()}
    return type(tree)(rows_of(v, index) for v in tree) if isinstance(tree, (list, tuple)) else tree


def join(trees):
    """One state of many."""
    first = trees[0]
    if torch.is_tensor(first):
        return torch.cat(trees) if first.ndim else first
    if isinstance(first, dict):
        return {k: join([t[k] for t in trees]) for k in first}
    return type(first)(map(join, zip(*trees))) if isinstance(first, (list, tuple)) else first
