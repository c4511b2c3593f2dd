"""Prompts longer than a text encoder's window, and weights inside prompts: (a red door:1.3).

CLIP reads 75 tokens at a time; a longer prompt becomes several windows, each encoded by itself, side by
side. A weight w moves the embedding of its tokens away from that of the empty prompt,
e <- e_empty + w (e - e_empty).
Only the form (words:number) is a weight; other parentheses are text, and \\( is always text.
"""
import re

import torch

WEIGHT = re.compile(r"(?<!\\)\(([^()]*?):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(?<!\\)\)")


def segments(text):
    """'a (red:1.3) door' -> [('a ', 1.0), ('red', 1.3), (' door', 1.0)]."""
    found, at = [], 0
    for m in WEIGHT.finditer(text):
        found += [(text[at:m.start()], 1.0), (m[1], float(m[2]))]
        at = m.end()
    found.append((text[at:], 1.0))
    plain = [(part.replace("\\(", "(").replace("\\)", ")"), w) for part, w in found]
    return [p for p in plain if p[0]] or [("", 1.0)]


def weighted_tokens(text, tokens):
    """-> [(id, weight)]; tokens(str) -> ids. A prompt without weights is tokenised in one piece."""
    return [(i, w) for part, w in segments(text) for i in tokens(part)]


def windows(text, tokenizer, room=75):
    """-> [[(id, weight)]]: at least one chunk of at most `room` tokens; words stay whole if they can."""
    rest, found = weighted_tokens(text, tokenizer.tokens), []
    while len(rest) > room:
        cut = next((k for k in range(room, room - 20, -1) if tokenizer.ends_word(rest[k - 1][0])), room)
        found.append(rest[:cut])
        rest = rest[cut:]
    return [*found, rest]


def to_ids(rows, start, end, pad, length):
    """Windows [(id, weight)] -> ids and weights [n, length]; start, end and padding weigh 1."""
    ids, weights = torch.full((len(rows), length), pad), torch.ones(len(rows), length)
    for k, row in enumerate(rows):
        line = [start, *(i for i, _ in row), end] if start is not None else [*(i for i, _ in row), end]
        ids[k, :len(line)] = torch.tensor(line)
        first = 0 if start is None else 1
        weights[k, first:first + len(row)] = torch.tensor([w for _, w in row])
    return ids, weights


def weigh(hidden_BLD, weights_BL, empty_LD):
    """e_empty + w (e - e_empty) where a weight is not 1; elsewhere the embedding as it is, bit for bit."""
    w = weights_BL[..., None].to(hidden_BLD)
    return torch.where(w == 1, hidden_BLD, empty_LD + w * (hidden_BLD - empty_LD))
