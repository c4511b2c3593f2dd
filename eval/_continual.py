"""Continual learning: domains one after the other by training, and new classes by memorising alone.

    continual(net, ...)     a copy of the net trains through five generated domains: loss matrix, forgetting
    classes(scorer, ...)    no training: fast weights take in labelled texts, ten new labels at a time
"""

import copy

import numpy as np
import torch

import hope_lm
from common.hope.text import Text, rng


def domains(seed=0, size=20_000):
    """Five generated streams that share an alphabet and little else: name -> text."""
    d = rng(seed, 5)
    words = "river stone quiet morning garden letter winter bread music window silver harbour story".split()
    people = ("Ann", "Ben", "Cleo", "Dan")

    def brackets(depth=0):
        return "".join(a + (brackets(depth + 1) if depth < 4 and d.random() < 0.6 else "") + b
                       for a, b in (("()", "[]", "{}")[d.integers(3)] for _ in range(d.integers(1, 3))))
    plus = lambda a, b: f"{a}+{b}={a + b}\n"     # noqa: E731
    make = dict(prose=lambda: "The " + " ".join(d.choice(words, 7)) + ". ",
                code=lambda: f"def {d.choice(words)}(x):\n    return x + {d.integers(100)}\n",
                dialogue=lambda: f"{d.choice(people)}: is the {d.choice(words)} near the "
                                 f"{d.choice(words)}?\n",
                arithmetic=lambda: plus(int(d.integers(50)), int(d.integers(50))),
                brackets=lambda: brackets() + "\n")
    texts = {}
    for name, one in make.items():
        texts[name] = ""
        while len(texts[name]) < size:
            texts[name] += one()
    return texts


def continual(net, bpe, length, steps, batch=4, lr=1e-3, seed=0):
    """Train a copy of the net through the domains in turn -> loss matrices a[i][j] (domain i
    after training through j).

    "on": fast weights learn while scoring; "off": their gates are shut.  Forgetting is final minus best loss.
    """
    net = copy.deepcopy(net).train()
    texts, matrices = domains(seed), dict(on=[], off=[])
    streams = {k: Text([t], bpe) for k, t in texts.items()}
    opt = torch.optim.AdamW(net.parameters(), lr=lr)
    objective = hope_lm.Objective(net)
    for j, (name, stream) in enumerate(streams.items()):
        for step in range(steps):
            loss = objective(*hope_lm.pairs(stream.batch((seed, j, step), range(batch), length), "cpu"))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        for key, threshold in (("on", net.cfg.surprise_threshold), ("off", 1e9)):
            with torch.no_grad(), gates(net, threshold):
                matrices[key].append([float(objective(*hope_lm.pairs(s.validation(length)[:8], "cpu")))
                                      for s in streams.values()])
    found = dict(domains=list(streams), steps=steps)
    for key, after in matrices.items():
        a = np.array(after).T
        found[key] = dict(matrix=a.tolist(), mean_final=float(a[:, -1].mean()),
                          forgetting=(a[:, -1] - a.min(1)).tolist(),
                          backward_transfer=float(np.mean([a[i, i] - a[i, -1] for i in range(len(a) - 1)])))
    return found


class gates:
    """Within: every memory's surprise threshold is `threshold`."""

    def __init__(self, net, threshold):
        self.families, self.threshold = hope_lm.families(net), threshold

    def __enter__(self):
        self.old = [family.plan for family in self.families]
        for family in self.families:
            family.plan = family.plan.gated(self.threshold)

    def __exit__(self, *_):
        for family, plan in zip(self.families, self.old):
            family.plan = plan


def labelled(seed=0, labels=30, examples=30):
    """A generated intent corpus: label -> texts, seven words each, four of them from the label's own ten."""
    d = rng(seed, 7)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    word = lambda: "".join(d.choice(syllables, 2))      # noqa: E731
    common, made = [word() for _ in range(40)], {}
    for i in range(labels):
        own = [word() for _ in range(10)]
        texts = [" ".join(d.permutation([*d.choice(own, 4), *d.choice(common, 3)])) for _ in range(examples)]
        made[f"{word()}{i}"] = texts
    return made


@torch.no_grad()
def classes(scorer, corpus=None, per_task=10, shown=25, asked=5):
    """Class-incremental learning: accuracy[i][j] on the labels of task i after memorising tasks 0..j.

    label = argmax log p(label | "Text: ... Label:") over the labels met so far, from the fast weights
    alone; "off" asks a fresh context the same questions.  corpus: label -> texts, of which the last
    `asked` are the questions.
    """
    corpus = corpus or labelled()
    names, tasks = list(corpus), range(-(-len(corpus) // per_task))
    prompt = lambda t: f"Text: {t}\nLabel:"     # noqa: E731
    scorer.reset, scorer.state = False, None
    found = dict(labels=len(names), shown=shown, on=[], off=[])
    for j in tasks:
        for label in names[j * per_task:(j + 1) * per_task]:
            for text in corpus[label][:shown]:
                scorer.take_in(scorer.bpe.encode(f"{prompt(text)} {label}\n"))
        met = names[:(j + 1) * per_task]
        asks = [(i, text) for i, label in enumerate(met) for text in corpus[label][-asked:]]
        for key, state in (("on", scorer.state), ("off", None)):
            picked = picks(scorer, state, [prompt(t) for _, t in asks], met)
            right = [[p == met[i] for (i, _), p in zip(asks, picked) if i // per_task == task]
                     for task in range(j + 1)]
            found[key].append([float(np.mean(hits)) for hits in right])
    for key in ("on", "off"):
        last = found[key][-1]
        found[key] = dict(matrix=found[key], mean_final=float(np.mean(last)),
                          forgetting=[max(row[i] for row in found[key][i:]) - last[i] for i in tasks])
    return found


def picks(scorer, state, prompts, labels, rows=32):
    """Per prompt the label of the largest mean log p a token, all asked from the same fast weights."""
    heads, found = [scorer.bpe.encode(p) for p in prompts], []
    tails = [scorer.bpe.encode(" " + label) for label in labels]
    for lo in range(0, len(heads), rows):
        some = heads[lo:lo + rows]
        scores = scorer.score_tails(some, [tails] * len(some), state and [state] * len(some))
        found += [labels[int(np.argmax([p / len(t) for (p, _), t in zip(row, tails)]))] for row in scores]
    return found
