"""The evaluation suite of hope_lm runs: one command, one bundle of numbers, a summary and plots.

    python -m eval.lm RUN --tasks DIR --out bundle [--only zeroshot,ruler,passkey,books,continual,classes]
    python -m eval.lm RUN --memorize [--memorize-paths titan,cms] [--memorize-steps 1]
                                     [--memorize-surprise-threshold 0.02]

DIR holds piqa.jsonl, hellaswag.jsonl, winogrande.jsonl, arc_easy.jsonl, arc_challenge.jsonl, boolq.jsonl,
siqa.jsonl, csqa.jsonl, openbookqa.jsonl, lambada.jsonl, wikitext.jsonl (fields of the public datasets) and
books/*.txt; a task without its file is skipped and said so.  Scores follow lm-evaluation-harness: sum of log
p of the continuation, acc_norm by characters, no end-of-text between prompt and answer.  --memorize scores
every item twice: fresh, and after the fast weights took in the item's context (never the text that is scored,
unless --memorize-use-correct-answer, an oracle).
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import hope_lm
from common import draw, run
from common.files import sha256_file, write_atomic
from common.hope.text import BPE, documents, rng, standard_library
from eval._continual import classes, continual
from eval._niah import VARIANTS as RULER, passkey_prompt, ruler_prompt
from eval._shared import Parser, cli
from eval._zeroshot import interval, zero_shot

# --- scoring ------------------------------------------------------------------------------------------------


class Scorer:
    """Log-likelihoods under a net; with memorize, from the fast weights that the context leaves behind."""

    def __init__(self, net, bpe, length, memorize=False, paths=("titan", "cms"), steps=1, threshold=None,
                 reset=True, oracle=False):
        self.net, self.bpe, self.length, self.memorize = net, bpe, length, memorize
        self.paths, self.steps, self.reset, self.oracle = paths, steps, reset, oracle
        self.state, self.events = None, dict(open=0.0, seen=0)
        for module in net.modules():
            if threshold is not None and isinstance(module, hope_lm.Memory):
                module.rule = module.rule._replace(threshold=threshold)

    def split(self, context, continuation):
        """Token ids of both, encoded together; the context's trailing spaces belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return [self.bpe.eos], self.bpe.encode(continuation)
        whole, head = self.bpe.encode(context + continuation), self.bpe.encode(context)
        return whole[:len(head)], whole[len(head):]

    @torch.no_grad()
    def take_in(self, ids):
        """Let the fast weights learn from ids; what remains is in self.state, base weights are untouched."""
        state = self.state if self.state is not None and not self.reset else self.net.fresh(1)
        tokens = torch.tensor([ids])
        for _ in range(self.steps if len(ids) > 1 else 0):
            if self.net.cfg.cms == "context" and self.net.cfg.levels:
                _, state, info = self.net.score(tokens[:, :-1], tokens[:, 1:], state)
                self.events["open"] += float(info["gates"][0])
                self.events["seen"] += info["gates"][1]
            else:
                _, state = self.net(tokens, state)
            opened, seen = hope_lm.sum_gates(state["blocks"])
            self.events = dict(open=self.events["open"] + opened, seen=self.events["seen"] + seen)
            state = self.net.remember(state, self.paths)
        self.state = state

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

    @torch.no_grad()
    def rolling(self, document):
        """Sum of log p of a whole document, every token once: windows of `length`, each with
        one token of context."""
        ids = [self.bpe.eos] + self.bpe.encode(document)
        total, by_token = 0.0, []
        for lo in range(0, len(ids) - 1, self.length):
            window = torch.tensor([ids[lo:lo + self.length + 1]])
            loss, _, _ = self.net.score(window[:, :-1], window[:, 1:])
            total -= float(loss.double().sum())
            by_token.append(loss[0])
        return total, by_token


# --- long context -------------------------------------------------------------------------------------------


def needles(scorer, lengths, depths, samples, essay, generate):
    """RULER's eight retrieval variants: share of reference strings generated, or (log-prob mode) of true
    values that beat one distractor, chance 0.5; by length and depth."""
    grid = []
    for variant in RULER:
        for length in lengths:
            for depth in depths:
                hits = []
                for i in range(samples):
                    item = ruler_prompt(variant, length, depth, rng(7, i, length),
                                        lambda t: len(scorer.bpe.encode(t)), essay)
                    if generate:
                        state = scorer.net.fresh(1)
                        made = scorer.bpe.decode(hope_lm.generate(scorer.net,
                                                                  scorer.bpe.encode(item["prompt"]), 128,
                                                                  state=state))
                        hits.append(np.mean([a.lower() in made.lower() for a in item["answers"]]))
                    else:
                        true, other = (scorer.loglikelihood(item["prompt"], " " + v)[0]
                                       for v in (item["answers"][0], item["distractor"]))
                        hits.append(true > other)
                grid.append(dict(variant=variant, length=length, depth=depth, n=samples,
                                 score=float(np.mean(hits)),
                                 interval=interval(float(np.mean(hits)), samples)))
    return grid


def passkeys(scorer, lengths, samples):
    """Exact match of the greedy digits, margin of the true key over a distractor, mean over depths."""
    rows = []
    for length in lengths:
        exact, margin = [], []
        for i in range(samples):
            draw_ = rng(11, i, length)
            key, other = (str(k) for k in draw_.choice(np.arange(10_000, 100_000), 2, replace=False))
            prompt = passkey_prompt(key, length, i / max(1, samples - 1), lambda t: len(scorer.bpe.encode(t)))
            score, greedy = scorer.loglikelihood(prompt, " " + key)
            exact.append(greedy)
            margin.append(score - scorer.loglikelihood(prompt, " " + other)[0])
        rows.append(dict(length=length, n=samples, exact=float(np.mean(exact)), margin=float(np.mean(margin)),
                         interval=interval(float(np.mean(exact)), samples)))
    return rows


def books(scorer, folder, limit):
    """PG-19's word perplexity, exp(total NLL / words), and NLL by position inside a window."""
    nll, words, by_position = 0.0, 0, []
    for i, book in enumerate(documents(folder)):
        if i == limit:
            break
        total, parts = scorer.rolling(book)
        nll, words = nll - total, words + len(book.split())
        by_position += [p for p in parts if len(p) == scorer.length]
    edges = [0] + [e for e in (64 * 2**i for i in range(20)) if e < scorer.length] + [scorer.length]
    mean = torch.stack(by_position).mean(0) if by_position else None
    return dict(word_ppl=math.exp(min(700.0, nll / max(1, words))), words=words,
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

PARTS = ("zeroshot", "ruler", "passkey", "books", "continual", "classes")


def suite(net, bpe, args, memorize):
    """All parts asked for -> (dict of results, memory events)."""
    paths, limit = tuple(args.memorize_paths.split(",")), args.memorize_surprise_threshold
    make = lambda: Scorer(net, bpe, args.length, memorize, paths, args.memorize_steps, limit,   # noqa: E731
                          not args.memorize_no_reset, args.memorize_use_correct_answer)
    essay = " ".join(documents(args.essay)) if args.essay else " ".join(standard_library(200_000))
    lengths = [int(x) for x in args.lengths.split(",")]
    depths = np.linspace(0, 1, args.depths).round(3).tolist()
    jobs = dict(zeroshot=lambda s: zero_shot(s, args.tasks, args.items),
                ruler=lambda s: needles(s, lengths, depths, args.samples, essay, args.generate),
                passkey=lambda s: passkeys(s, lengths, args.samples),
                books=lambda s: books(s, args.books, args.items),
                continual=lambda s: continual(net, bpe, args.length, args.continual_steps),
                classes=lambda s: classes(s, intents(args.tasks)))
    found, events = {}, {}
    for part in args.only.split(","):
        if part not in jobs:
            raise run.UserError(run.unknown("part", part, PARTS))
        if memorize and part in ("books", "continual", "classes"):
            continue                                # their memory is the ordinary one: scored as they stream
        scorer = make()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        found[part] = jobs[part](scorer)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "base weights moved"
        events[part] = scorer.events
    return found, events


def summary(meta, base, memorized):
    """Markdown of a bundle."""
    lines = [f"# Evaluation of {meta['run']}", "",
             f"{meta['variant']}, {meta['params']:,} parameters, step {meta['step']}, "
             f"trained on {json.dumps(meta['data'])}", "", "## Commands and environment", "",
             f"    {meta['command']}", "",
             f"torch {torch.__version__}; weights sha256 {meta['weights'][:16]}", "", "## Training", "",
             f"last training row: {json.dumps(meta['last_train'])}", ""]
    for title, found in (("Scores", base), ("Scores after memorising", memorized)):
        if not found:
            continue
        lines += [f"## {title}", "", "| part | task | value |", "|---|---|---|"]
        for part, value in found.items():
            name = lambda r: f"{r.get('variant', '')} {r['length']} {r.get('depth', '')}"     # noqa: E731
            rows = value.items() if isinstance(value, dict) else ((name(r), r) for r in value)
            for task, v in rows:
                if task in ("on", "off"):
                    v = {k: v[k] for k in ("mean_final", "backward_transfer", "forgetting") if k in v}
                v = "not run: no file" if v is None else json.dumps(run.plain(v))
                lines.append(f"| {part} | {task} | {v} |")
        lines.append("")
    if memorized:
        m = meta["memorize"]
        oracle = ", ORACLE: the right answer was memorised" if m["oracle"] else ""
        events = json.dumps(run.plain(m["events"]))
        lines += ["## Memory", "", f"paths {m['paths']}, threshold {m['threshold']}, "
                  f"steps {m['steps']}{oracle}; events {events}", ""]
    risks = "Small models score near chance on the zero-shot tasks; intervals are 95% Wilson."
    return "\n".join([*lines, "## Risks", "", risks]) + "\n"


def plots(found, out):
    if found.get("continual"):
        c = found["continual"]
        for key in ("on", "off"):
            xs = list(range(1, len(c["domains"]) + 1))
            curves = {d: (xs, row) for d, row in zip(c["domains"], c[key]["matrix"])}
            picture = draw.lines(curves, title=f"memory {key}", xlabel="domains trained", ylabel="loss, nats")
            draw.save(picture, out / f"forgetting_{key}.png")
    if found.get("classes"):
        c = found["classes"]
        xs = list(range(1, len(c["on"]["matrix"]) + 1))
        curves = {f"memory {key}": (xs, [float(np.mean(row)) for row in c[key]["matrix"]])
                  for key in ("on", "off")}
        picture = draw.lines(curves, xlabel="tasks memorised", ylabel="accuracy, labels so far")
        draw.save(picture, out / "classes.png")
    if found.get("ruler"):
        scores = {}
        for r in found["ruler"]:
            scores.setdefault(r["variant"], {}).setdefault(r["length"], []).append(r["score"])
        rows = [[float(np.mean(v)) for v in by.values()] for by in scores.values()]
        draw.save(draw.heat(np.array(rows), rows=list(scores),
                            cols=[str(k) for k in next(iter(scores.values()))]), out / "ruler.png")
    if found.get("books", {}).get("nll_by_position"):
        by = found["books"]["nll_by_position"]
        draw.save(draw.lines({"NLL": ([int(k.split("-")[1]) for k in by], list(by.values()))}, logx=True,
                             xlabel="position", ylabel="nats a token"), out / "nll_by_position.png")


def main():
    p = Parser("eval.lm", __doc__)
    p.add_argument("run", help="run directory of hope_lm.py")
    p.add_argument("--out", default="", help="bundle directory [RUN/bundle]")
    p.add_argument("--only", default=",".join(PARTS), help="parts, comma separated")
    p.add_argument("--tasks", default="", help="folder of task JSONL files")
    p.add_argument("--books", default="", help="folder of books [the standard library's sources]")
    p.add_argument("--essay", default="", help="text the needles hide in [the standard library's sources]")
    p.add_argument("--items", type=int, default=256)
    p.add_argument("--lengths", default="256,512", help="tokens of needle and passkey prompts")
    p.add_argument("--depths", type=int, default=5)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--generate", action="store_true", help="needles: generate and match, not log-prob")
    p.add_argument("--length", type=int, default=0, help="window of the model [as trained]")
    p.add_argument("--continual-steps", type=int, default=20)
    p.add_argument("--memorize", action="store_true")
    p.add_argument("--memorize-steps", type=int, default=1)
    p.add_argument("--memorize-paths", default="titan,cms")
    p.add_argument("--memorize-surprise-threshold", type=float, default=None)
    p.add_argument("--memorize-no-reset", action="store_true")
    p.add_argument("--memorize-use-correct-answer", action="store_true", help="oracle")
    args = p.parse_args()
    net, cfg = hope_lm.load_run(args.run)
    if args.memorize and "cms" in args.memorize_paths and cfg.levels and cfg.cms != "context":
        cfg = dataclasses.replace(cfg, cms="context")
        tensors = net.state_dict()
        net = hope_lm.LM(cfg).eval()
        net.load_state_dict(tensors)
    bpe = BPE.load(cfg.tokenizer) if cfg.tokenizer else BPE()
    args.length = args.length or cfg.length
    out = Path(args.out or Path(args.run) / "bundle")
    out.mkdir(parents=True, exist_ok=True)
    weights = Path(args.run) / "weights.safetensors"
    log = [json.loads(line) for line in (Path(args.run) / "log.jsonl").read_text().splitlines()]
    _, meta = run.load_weights(weights)
    facts = dict(run=str(Path(args.run).name), variant=cfg.variant,
                 params=sum(q.numel() for q in net.parameters()), step=meta["step"],
                 data=meta["data"], weights=sha256_file(weights),
                 command=" ".join(["python -m eval.lm", *sys.argv[1:]]),
                 last_train=[r for r in log if r["kind"] == "train"][-1])
    base, _ = suite(net, bpe, args, False)
    memorized = {}
    if args.memorize:
        memorized, events = suite(net, bpe, args, True)
        facts["memorize"] = dict(paths=args.memorize_paths, threshold=args.memorize_surprise_threshold,
                                 steps=args.memorize_steps, reset=not args.memorize_no_reset,
                                 oracle=args.memorize_use_correct_answer,
                                 events=events)
    bundle = run.plain(dict(meta=facts, scores=base, memorized=memorized))
    write_atomic(out / "metrics.json", json.dumps(bundle, indent=1).encode())
    write_atomic(out / "SUMMARY.md", summary(facts, base, memorized).encode())
    plots(base, out)
    print((out / "SUMMARY.md").read_text())


if __name__ == "__main__":
    cli("eval.lm", main)
