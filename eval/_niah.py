"""Needles in haystacks in RULER's format, and the passkey prompt: text, references, one distractor.

RULER (github.com/NVIDIA/RULER) fixes wording, haystacks and counts; lengths are tokens of the model's own
tokenizer, found by bisection so that prompt and 128 generated tokens fit.
"""

import uuid

from common.hope.text import rng

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = ("able brave calm dark eager fine glad huge idle keen late mild neat odd pale quick rare shy "
              "tall warm").split()
NOUNS = ("apple bird cloud door eagle field glass house island jewel king lamp moon night ocean pearl queen "
         "road ship tower").split()

# variant: (haystack, kind of key, kind of value, keys, values a key, keys asked for)
VARIANTS = {"single_1": ("noise", "words", "numbers", 1, 1, 1),
            "single_2": ("essay", "words", "numbers", 1, 1, 1),
            "single_3": ("essay", "words", "uuids", 1, 1, 1),
            "multikey_1": ("essay", "words", "numbers", 4, 1, 1),
            "multikey_2": ("needle", "words", "numbers", 1, 1, 1),
            "multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
            "multivalue": ("essay", "words", "numbers", 1, 4, 1),
            "multiquery": ("essay", "words", "numbers", 4, 1, 4)}


def make(kind, draw):
    if kind == "words":
        return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    if kind == "numbers":
        return str(draw.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=draw.bytes(16), version=4))


def sentence(kind, key, value):
    return f"One of the special magic {kind} for {key} is: {value}."


def longest(fits, high):
    """The largest n in [0, high] with fits(n), which is true up to some n and false after."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def ruler_prompt(variant, length, depth, draw, count, essay, reserve=128):
    """-> dict(prompt, answers, distractor).  depth in [0, 1]: where the first needle stands;
    count: text -> tokens."""
    haystack, key_kind, value_kind, n_keys, n_values, n_asked = VARIANTS[variant]
    keys = []
    while len(keys) < n_keys:
        key = make(key_kind, draw)
        keys += [key] if key not in keys else []
    values = {key: [make(value_kind, draw) for _ in range(n_values)] for key in keys}
    asked = keys[:n_asked]
    answers = [v for key in asked for v in values[key]]
    needles = [sentence(value_kind, key, v) for key in keys for v in values[key]]
    places = [depth] + list(draw.random(len(needles) - 1))
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    one = len(answers) == 1
    kind = value_kind[:-1] if one else value_kind
    head = (f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within the "
            f"following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n")
    tail = (f"\nWhat {'is' if one else 'are all'} the special magic {kind} for {query} mentioned in the "
            f"provided text? The special "
            f"magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}")
    words, salt = essay.split(), int(draw.integers(1 << 30))

    def text(n):
        """The haystack of n units with the needles put in."""
        if haystack == "essay":
            units = words[:n]
        elif haystack == "noise":
            units = [NOISE] * n
        else:
            other = rng(salt)
            units = [sentence(value_kind, make(key_kind, other), make(value_kind, other)) for _ in range(n)]
        for place, needle in sorted(zip(places, needles), reverse=True):
            units.insert(round(place * len(units)), needle)
        return head + (" " if haystack == "essay" else "\n").join(units) + tail

    # no more units than tokens: each has one at least
    most = min(len(words), length) if haystack == "essay" else length
    n = longest(lambda n: count(text(n)) + reserve <= length, most)
    return dict(prompt=text(n), answers=answers, distractor=make(value_kind, draw), units=n,
                fits=count(text(n)) + reserve <= length)


def passkey_prompt(key, length, depth, count):
    """Landmark-attention's prompt with the key at a relative depth, as long as fits in `length` tokens."""
    head = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
            "I will quiz you about "
            "the important information there.\n")
    info = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    tail = "What is the pass key? The pass key is"

    def text(n):
        before = round(depth * n)
        return head + (NOISE + "\n") * before + info + (NOISE + "\n") * (n - before) + tail

    return text(longest(lambda n: count(text(n)) + 8 <= length, length))
