"""Zero-shot tasks by lm-evaluation-harness's rules: prompts, choices, and which score counts."""

import json
import math
import re
from pathlib import Path

import numpy as np


def hellaswag_text(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def lettered(d, field):
    return list(d["choices"]["text"]), list(d["choices"]["label"]).index(d["answerKey"].strip()), d[field]


def arc(d):
    choices, gold, question = lettered(d, "question")
    return f"Question: {question}\nAnswer:", choices, gold


def csqa(d):
    texts, gold, question = lettered(d, "question")
    letters = [chr(65 + i) for i in range(len(texts))]
    listed = "".join(f"{a}. {t}\n" for a, t in zip(letters, texts))
    return f"Question: {question.strip()}\n{listed}Answer:", letters, gold


def openbookqa(d):
    choices, gold, stem = lettered(d, "question_stem")
    return stem, choices, gold


def hellaswag(d):
    context = hellaswag_text(f"{d['activity_label']}: {d['ctx_a']} {d['ctx_b'].capitalize()}")
    return context, [hellaswag_text(e) for e in d["endings"]], int(d["label"])


CHOICE = {                                          # item -> (context, choices, index of the right one)
    "piqa": lambda d: (f"Question: {d['goal']}\nAnswer:", [d["sol1"], d["sol2"]], int(d["label"])),
    "hellaswag": hellaswag, "arc_easy": arc, "arc_challenge": arc, "csqa": csqa, "openbookqa": openbookqa,
    "boolq": lambda d: (f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:", ["no", "yes"],
                        int(d["label"] if "label" in d else d["answer"])),
    "siqa": lambda d: (f"Q: {d['context']} {d['question']}\nA:", [d["answerA"], d["answerB"], d["answerC"]],
                       int(d["label"]) - 1)}
NORMED = {"hellaswag", "arc_challenge"}             # the paper's column is acc_norm
MEAN8 = ("lambada", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "siqa", "boolq")


def multiple_choice(scorer, item):
    """(hit of acc, hit of acc_norm): argmax of the summed log p, and of it over the choice's characters."""
    context, choices, gold = item
    scores = [scorer.loglikelihood(context, " " + c)[0] for c in choices]
    by_length = [s / len(c) for s, c in zip(scores, choices)]
    return int(np.argmax(scores) == gold), int(np.argmax(by_length) == gold)


def winogrande(scorer, d):
    """The suffix after _ is scored under each option: partial evaluation."""
    at = d["sentence"].index("_")
    rest = " " + d["sentence"][at + 1:].strip()
    scores = [scorer.loglikelihood(d["sentence"][:at] + d[f"option{i}"], rest)[0] for i in (1, 2)]
    return int(np.argmax(scores) == int(d["answer"]) - 1)


def detokenize(page):
    """WikiText's page without its tokenisation artefacts, as lm-eval does it."""
    for a, b in (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "),
                 (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", ")):
        page = page.replace(a, b)
        if a == "s '":
            page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)
    for pattern, to in ((r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
                        (r"{\s*([^}]*?)\s*}", r"{\1}"),
                        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'")):
        page = re.sub(pattern, to, page)
    for a, b in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" " + chr(176) + " ", chr(176)),
                 (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(a, b)
    return page


def zero_shot(scorer, folder, items):
    """Every task whose JSONL is in the folder -> {task: {...}}; absent ones are None."""
    found = {}
    for task in (*CHOICE, "winogrande", "lambada", "wikitext"):
        file = Path(folder or ".") / f"{task}.jsonl"
        if not folder or not file.is_file():
            found[task] = None
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line][:items]
        if task == "wikitext":
            scores = [scorer.rolling(detokenize(d["page"]))[0] for d in rows]
            words = sum(len(re.split(r"\s+", d["page"])) for d in rows)
            found[task] = dict(n=len(rows), word_ppl=math.exp(-sum(scores) / words))
        elif task == "lambada":
            pairs = [scorer.loglikelihood(*re.match(r"(?s)(.*)( \S+)$", d["text"]).groups()) for d in rows]
            found[task] = dict(n=len(rows), acc=np.mean([g for _, g in pairs]),
                               ppl=math.exp(-np.mean([s for s, _ in pairs])))
        elif task == "winogrande":
            found[task] = dict(n=len(rows), acc=np.mean([winogrande(scorer, d) for d in rows]))
        else:
            hits = np.array([multiple_choice(scorer, CHOICE[task](d)) for d in rows])
            found[task] = dict(n=len(rows), acc=hits[:, 0].mean(), acc_norm=hits[:, 1].mean())
        if "acc" in found[task]:
            found[task]["interval"] = interval(found[task]["acc"], len(rows))
    if all(found[t] for t in MEAN8):
        found["mean8"] = dict(acc=np.mean([found[t]["acc_norm" if t in NORMED else "acc"] for t in MEAN8]))
    return found


def interval(p, n, z=1.96):
    """Wilson 95% interval of a share."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]
