"""The evaluation suite of hope_lm runs: one command, one bundle of numbers, a summary and plots.

    python -m eval.lm RUN --tasks DIR --out bundle
                      [--only zeroshot,ruler,passkey,books,context,continual,classes]
    python -m eval.lm RUN --memorize [--memorize-paths titan,cms] [--memorize-steps 1]
                                     [--memorize-surprise-threshold 0.02]

DIR holds piqa.jsonl, hellaswag.jsonl, winogrande.jsonl, arc_easy.jsonl, arc_challenge.jsonl, boolq.jsonl,
siqa.jsonl, csqa.jsonl, openbookqa.jsonl, lambada.jsonl, wikitext.jsonl (fields of the public datasets) and
books/*.txt; a task without its file is skipped and said so.  Scores follow lm-evaluation-harness: sum of log
p of the continuation, acc_norm by characters, no end-of-text between prompt and answer.  --memorize scores
every item twice: fresh, and after the fast weights took in the item's context (never the text that is scored,
unless --memorize-use-correct-answer, an oracle).  A run of --task recall has one part, recall.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

import hope_lm
from common import run
from common.files import sha256_file, write_atomic
from common.hope.text import BPE, Text, documents, rng, standard_library
from common.runlog import environment
from eval._bundle import plots, summary
from eval._context import by_position, recalled
from eval._continual import classes, continual
from eval._niah import VARIANTS as RULER, passkey_prompt, ruler_prompt
from eval._scorer import Scorer, bar
from eval._shared import Parser, cli
from eval._zeroshot import interval, zero_shot

# --- long context -------------------------------------------------------------------------------------------


def needles(scorer, lengths, depths, samples, essay, generate):
    """RULER's eight retrieval variants: share of reference strings generated, or (log-prob mode) of true
    values that beat one distractor, chance 0.5; by length and depth.  A length that does not hold the
    wording of a variant and its answer has no score."""
    grid, count = [], lambda t: len(scorer.bpe.encode(t))
    for variant, length in bar([(v, n) for v in RULER for n in lengths], "ruler"):
        items = [ruler_prompt(variant, length, depth, rng(7, i, length, round(1000 * depth)), count, essay)
                 for depth in depths for i in range(samples)]       # no two cells of a row ask the same
        if not all(item["fits"] for item in items):
            grid.append(dict(variant=variant, length=length, n=0, score=None,
                             why="the wording alone is longer"))
            continue
        if generate:
            made = [scorer.bpe.decode(hope_lm.generate(scorer.net, scorer.bpe.encode(item["prompt"]), 128))
                    for item in items]
            hits = [np.mean([a.lower() in text.lower() for a in item["answers"]])
                    for item, text in zip(items, made)]
        else:
            pairs = scorer.choices([(item["prompt"], [" " + item["answers"][0], " " + item["distractor"]])
                                    for item in items])
            hits = [true > other for (true, _), (other, _) in pairs]
        for depth, some in zip(depths, np.array_split(np.array(hits, float), len(depths))):
            grid.append(dict(variant=variant, length=length, depth=depth, n=samples, score=float(some.mean()),
                             interval=interval(float(some.mean()), samples)))
    return grid


def passkeys(scorer, lengths, samples):
    """Exact match of the greedy digits, log p of the key, its margin over a distractor; all depths."""
    rows = []
    for length in bar(lengths, "passkey"):
        items = []
        for i in range(samples):
            draw_ = rng(11, i, length)
            key, other = (str(k) for k in draw_.choice(np.arange(10_000, 100_000), 2, replace=False))
            prompt = passkey_prompt(key, length, i / max(1, samples - 1), lambda t: len(scorer.bpe.encode(t)))
            items.append((prompt, [" " + key, " " + other]))
        pairs = scorer.choices(items)
        exact = float(np.mean([greedy for (_, greedy), _ in pairs]))
        rows.append(dict(length=length, n=samples, exact=exact, interval=interval(exact, samples),
                         logp=float(np.mean([score for (score, _), _ in pairs])),
                         margin=float(np.mean([score - other for (score, _), (other, _) in pairs]))))
    return rows


def books(scorer, texts, limit, most):
    """PG-19's word perplexity, exp(total NLL / words), and NLL by position inside a window: of `limit` texts
    and at most `most` tokens (0: no end)."""
    nll, words, tokens, by_position = 0.0, 0, 0, []
    for book in bar(itertools.islice(texts, limit), "books"):
        book = book[:most and most - tokens] if most else book      # a token has at least one character
        total, parts = scorer.rolling(book)
        nll, words, tokens = nll - total, words + len(book.split()), tokens + sum(map(len, parts))
        by_position += [p for p in parts if len(p) == scorer.length]
        if most and tokens >= most:
            break
    edges = [0] + [e for e in (64 * 2**i for i in range(20)) if e < scorer.length] + [scorer.length]
    mean = torch.stack(by_position).mean(0) if by_position else None
    return dict(word_ppl=math.exp(min(700.0, nll / max(1, words))), words=words, tokens=tokens,
                nll_by_position={f"{a}-{b}": float(mean[a:b].mean()) for a, b in zip(edges, edges[1:])
                                 if mean is not None})


def intents(folder):
    """label -> texts of DIR/intents.jsonl (CLINC, Banking: rows of text and label); None: generated ones."""
    file, found = Path(folder or ".") / "intents.jsonl", {}
    for line in file.read_text(encoding="utf-8").splitlines() if folder and file.exists() else ():
        row = json.loads(line)
        found.setdefault(str(row["label"]), []).append(row["text"])
    return found or None


# --- the bundle ---------------------------------------------------------------------------------------------

PARTS = ("zeroshot", "ruler", "passkey", "books", "context", "continual", "classes", "recall")
TWICE = ("zeroshot", "ruler", "passkey")        # scored after memorising too; the rest memorise as they go


def suite(net, cfg, data, args, memorize):
    """All parts asked for -> (dict of results, memory events)."""
    bpe = BPE.load(cfg.tokenizer) if cfg.tokenizer else BPE()
    essay = " ".join(documents(args.essay)) if args.essay else " ".join(standard_library(200_000))
    depths, lengths = np.linspace(0, 1, args.depths).round(3).tolist(), args.lengths
    T, far = args.length or cfg.length, args.length or max(*lengths, cfg.length)
    jobs = dict(                                    # part: (window, its function of a scorer)
        zeroshot=(T, lambda s: zero_shot(s, args.tasks, args.items)),
        ruler=(far, lambda s: needles(s, lengths, depths, args.samples, essay, args.generate)),
        passkey=(far, lambda s: passkeys(s, lengths, args.samples)),
        books=(T, lambda s: books(s, long_texts(data, bpe, args.books), args.items, args.book_tokens)),
        context=(T, lambda s: data and by_position(net, data, T, args.against)),
        continual=(T, lambda s: continual(net, bpe, T, args.continual_steps)),
        classes=(T, lambda s: classes(s, intents(args.tasks))),
        recall=(T, lambda s: recalled(net, data, T)))
    found, events = {}, {}
    for part in args.only:
        if memorize and part not in TWICE:
            continue
        window, job = jobs[part]
        scorer = Scorer(net, bpe, window, memorize, tuple(args.memorize_paths.split(",")),
                        args.memorize_steps, args.memorize_surprise_threshold, not args.memorize_no_reset,
                        args.memorize_use_correct_answer)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        found[part] = job(scorer)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "base weights moved"
        events[part] = scorer.events
    return found, events


def long_texts(data, bpe, folder):
    """Books of a folder; without one, what the run's own text held out, or the standard library's sources."""
    if folder or not isinstance(data, Text):
        return documents(folder)
    return [bpe.decode(data.held.tolist())]


def own_data(cfg, facts):
    """The data that a run was trained on, or None when it is not on this machine."""
    with contextlib.suppress(run.UserError):
        data = hope_lm.open_data(cfg)
        return data if run.plain(data.facts) == facts else None


def options():
    p = Parser("eval.lm", __doc__)
    p.add_argument("run", help="run directory of hope_lm.py")
    p.add_argument("--out", default="", help="bundle directory [RUN/bundle]")
    p.add_argument("--only", default="", help="parts, comma separated [all that the run can have]")
    p.add_argument("--tasks", default="", help="folder of task JSONL files")
    p.add_argument("--books", default="", help="folder of books [the text that the run held out]")
    p.add_argument("--book-tokens", type=int, default=200_000, help="tokens read of the books; 0: all")
    p.add_argument("--essay", default="", help="text the needles hide in [the standard library's sources]")
    p.add_argument("--items", type=int, default=256)
    p.add_argument("--lengths", default="",
                   help="tokens of needle and passkey prompts [as trained but at least 512, and twice that]")
    p.add_argument("--depths", type=int, default=5)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--generate", action="store_true", help="needles: generate and match, not log-prob")
    p.add_argument("--length", type=int, default=0,
                   help="window of the model [as trained; needles, passkeys: the whole prompt]")
    p.add_argument("--against", default="", help="context: a second run, compared on the same rows")
    p.add_argument("--continual-steps", type=int, default=20)
    p.add_argument("--memorize", action="store_true")
    p.add_argument("--memorize-steps", type=int, default=1)
    p.add_argument("--memorize-paths", default="titan,cms")
    p.add_argument("--memorize-surprise-threshold", type=float, default=None)
    p.add_argument("--memorize-no-reset", action="store_true")
    p.add_argument("--memorize-use-correct-answer", action="store_true", help="oracle")
    return p.parse_args()


def parts(only, cfg):
    """The parts asked for, refused when the run cannot have them."""
    if cfg.task not in ("text", "recall"):
        raise run.UserError(f"a run of --task {cfg.task} reads no text; try hope_lm.py evaluate RUN")
    fit = [p for p in PARTS if (p == "recall") == (cfg.task == "recall")]
    for part in only.split(",") if only else ():
        if part not in PARTS:
            raise run.UserError(run.unknown("part", part, PARTS))
        if part not in fit:
            raise run.UserError(f"a run of --task {cfg.task} has no part {part}; it has {', '.join(fit)}")
    return only.split(",") if only else fit


def contextual(net, cfg):
    """The same weights with CMS levels that move inside a context: what --memorize-paths cms writes to."""
    cfg = dataclasses.replace(cfg, cms="context")
    moving = hope_lm.LM(cfg).eval()
    moving.load_state_dict(net.state_dict())
    return moving


def main():
    args, begun = options(), time.process_time()
    net, cfg = hope_lm.load_run(args.run)
    args.only, T = parts(args.only, cfg), max(512, cfg.length)
    args.lengths = [int(x) for x in args.lengths.split(",")] if args.lengths else [T, 2 * T]
    out, weights = Path(args.out or Path(args.run) / "bundle"), Path(args.run) / "weights.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    log = [json.loads(line) for line in (Path(args.run) / "log.jsonl").read_text().splitlines()]
    _, meta = run.load_weights(weights)
    data = own_data(cfg, meta["data"])
    args.against = hope_lm.load_run(args.against)[0] if args.against else None
    base, _ = suite(net, cfg, data, args, False)
    memorized, memory = {}, {}
    if args.memorize and set(args.only) & set(TWICE):
        moves = "cms" in args.memorize_paths and cfg.levels and cfg.cms != "context"
        memorized, events = suite(contextual(net, cfg) if moves else net, cfg, data, args, True)
        memory = dict(memorize=dict(paths=args.memorize_paths, threshold=args.memorize_surprise_threshold,
                                    steps=args.memorize_steps, reset=not args.memorize_no_reset,
                                    oracle=args.memorize_use_correct_answer, events=events))
    env = environment(out)
    facts = dict(run=str(Path(args.run).name), variant=cfg.variant,
                 params=sum(q.numel() for q in net.parameters()), step=meta["step"],
                 data=meta["data"], weights=sha256_file(weights), trained_length=cfg.length,
                 command=" ".join(["python -m eval.lm", *sys.argv[1:]]),
                 machine=f"{env['cpu']}, {env['threads']} thread(s)",
                 cpu_s=time.process_time() - begun,
                 last_train=[r for r in log if r["kind"] == "train"][-1], **memory)
    bundle = run.plain(dict(meta=facts, scores=base, memorized=memorized))
    write_atomic(out / "metrics.json", json.dumps(bundle, indent=1).encode())
    write_atomic(out / "SUMMARY.md", summary(facts, base, memorized).encode())
    plots(base, out)
    print((out / "SUMMARY.md").read_text())


if __name__ == "__main__":
    cli("eval.lm", main)
