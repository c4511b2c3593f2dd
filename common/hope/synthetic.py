"""Synthetic sequence tasks with known answers: state tracking and associative recall."""

import numpy as np

from common.hope.text import rng


class Task:
    """Synthetic rows (input, target; -1: not scored), endless and seeded by (key, row) like text.

    parity  bits; target: parity of the bits so far           aa  the letter a; target: is the length even,
            (aa)*
    recall  8 key-value pairs, noise, then keys: the value follows; the distance is most of the row
    """

    vocab_size, bytes_per_token = 64, 1.0

    def __init__(self, task, seed):
        self.task, self.seed, self.facts = task, seed, dict(task=task)

    def batch(self, key, rows, T):
        pairs = [self.row(rng(*key, r), T) for r in rows]
        return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])

    def row(self, draw, T):
        if self.task == "parity":
            bits = draw.integers(0, 2, T)
            return bits, bits.cumsum() % 2
        if self.task == "aa":
            return np.full(T, 2), np.arange(1, T + 1) % 2
        n = 8
        keys, values = 32 + draw.permutation(16)[:n], 48 + draw.integers(0, 16, n)
        asked = draw.permutation(n)
        pairs, ask = np.stack([keys, values], 1).ravel(), np.stack([keys[asked], values[asked]], 1).ravel()
        tokens = np.concatenate([pairs, draw.integers(0, 32, T - 4 * n), ask])
        target = np.full(T, -1)
        target[T - 2 * n::2] = values[asked]
        return tokens, target

    def validation(self, T):
        return self.batch((2**31, self.seed), range(64), T)
