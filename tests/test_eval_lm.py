"""eval.lm: scoring rules on fixtures, needles, memorisation."""

import json
import math

import numpy as np
import pytest
import torch

import hope_lm as h
from common.hope.text import BPE, rng
from eval import _niah, lm
from eval._context import by_position, losses, recalled
from eval._continual import classes, continual, domains, labelled, picks
from eval._scorer import Scorer
from eval._zeroshot import CHOICE, interval, multiple_choice, winogrande, zero_shot

torch.set_num_threads(1)


class Table:
    """A scorer whose log-likelihoods are given: what acc and acc_norm make of them."""

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def loglikelihood(self, context, continuation):
        self.asked.append((context, continuation))
        return self.scores[len(self.asked) - 1], False


def test_acc_sums_and_acc_norm_divides_by_characters():
    item = ("Question: q\nAnswer:", ["no", "a much longer answer"], 1)
    table = Table([-4.0, -9.0])
    assert multiple_choice(table, item) == (0, 1)               # -4 > -9, but -9/20 > -4/2
    assert table.asked == [(item[0], " no"), (item[0], " a much longer answer")]


def test_winogrande_scores_the_same_suffix_under_each_option():
    d = dict(sentence="Ann met Eve because _ was late .", option1="Ann", option2="Eve", answer="2")
    table = Table([-3.0, -2.0])
    assert winogrande(table, d) == 1
    assert table.asked == [("Ann met Eve because Ann", " was late ."), ("Ann met Eve because Eve",
                                                                        " was late .")]


def test_prompts_are_the_published_ones():
    d = dict(passage="P.", question="is it", label=1)
    assert CHOICE["boolq"](d) == ("P.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1)
    d = dict(question="Where?", choices=dict(text=["sea", "sky"], label=["A", "B"]), answerKey="B")
    assert CHOICE["csqa"](d) == ("Question: Where?\nA. sea\nB. sky\nAnswer:", ["A", "B"], 1)
    d = dict(activity_label="Run", ctx_a="[header] He runs.", ctx_b="he", endings=["x  y [title] z"] * 4,
             label="3")
    assert CHOICE["hellaswag"](d) == ("Run: He runs. He", ["x y. z"] * 4, 3)


def small(**kw):
    torch.manual_seed(0)
    return h.LM(h.Config(**{**dict(width=16, heads=2, depth=1, chunk=8, chunk_self=8, periods=(8, 16, 32, 64),
                                   cms_levels=2), **kw})).eval()


def test_loglikelihood_is_the_sum_over_the_continuation_and_greedy_means_every_token():
    net, bpe = small(), BPE()
    score, greedy = Scorer(net, bpe, 64).loglikelihood("ab ", "cd")  # the space moves to the continuation
    logp = net(torch.tensor([list(b"ab cd")]))[0].double().log_softmax(-1)
    want = sum(float(logp[i, c]) for i, c in zip((1, 2, 3), b" cd"))
    assert abs(score - want) < 1e-6 and not greedy
    made = bpe.decode(h.generate(net, list(b"ab"), 3))
    if len(made.encode()) == 3 and made.isascii():
        assert Scorer(net, bpe, 64).loglikelihood("ab", made)[1]


def test_rolling_scores_every_token_once():
    net, bpe, text = small(), BPE(), "a tale of two windows"
    total, parts = Scorer(net, bpe, 8).rolling(text)
    assert sum(map(len, parts)) == len(text) and abs(total + float(torch.cat(parts).sum())) < 1e-4
    whole, _ = Scorer(net, bpe, 64).rolling(text)
    loss = h.nll(net(torch.tensor([[0, *text[:-1].encode()]])), torch.tensor([list(text.encode())]))
    assert abs(whole + float(loss.sum())) < 1e-3


MODELS = dict(hope={}, context=dict(cms="context"), lmm=dict(variant="lmm"), mac=dict(variant="mac"),
              mal=dict(variant="mal", window=8), full=dict(variant="full"),
              gated=dict(variant="gated_deltanet"))
ITEMS = [("the sun is", [" hot", " a star", " cold and far away"]), ("x", [" y", " zz"]), ("", ["ab", "cd"]),
         ("a longer tale of a fox, and of a dog it met: the fox was", [" red", " sly"]),
         ("a longer tale of a fox, and of a dog it met. the fox is ", ["red", "brown"])]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memorize,window,steps", [(False, 20, 1), (True, 64, 1), (True, 20, 2)])
def test_batched_choices_equal_one_by_one(name, memorize, window, steps):
    """Prefix in common, padded ends, shared contexts, truncation on the left: the same sums, in float64."""
    net, bpe = small(**MODELS[name]).double(), BPE()
    with torch.no_grad():                           # logits that differ in the first digits
        net.embed.mul_(20)
    one, many = (Scorer(net, bpe, window, memorize, steps=steps) for _ in range(2))
    want = [[one.loglikelihood(context, c) for c in some] for context, some in ITEMS]
    got = many.choices(ITEMS, rows=3)
    for a, b in zip(sum(want, []), sum(got, [])):
        assert abs(a[0] - b[0]) < 1e-8 and a[1] == b[1]
    if memorize:                                    # a context is taken in once, not once a continuation
        assert 0 <= many.events["seen"] <= one.events["seen"]


def test_batched_labels_equal_the_one_by_one_pick():
    net, bpe = small().double(), BPE()
    scorer = Scorer(net, bpe, 64, memorize=True)
    scorer.take_in(bpe.encode("Text: a fox\nLabel: red\n"))
    prompts = [f"Text: {t}\nLabel:" for t in ("a fox", "two dogs", "the cat sat", "x")]
    labels = ["red", "blue1", "longer-label", "q"]
    for state in (scorer.state, None):
        want = []
        for prompt in prompts:
            scores = []
            for label in labels:
                head, tail = bpe.encode(prompt), bpe.encode(" " + label)
                logits, _ = net(torch.tensor([(head + tail)[:-1]]), state or net.fresh(1))
                logp = logits[0, -len(tail):].log_softmax(-1).gather(1, torch.tensor(tail)[:, None])
                scores.append(float(logp.sum()) / len(tail))
            want.append(labels[int(np.argmax(scores))])
        assert picks(scorer, state, prompts, labels, rows=3) == want


def test_rolling_in_batches_equals_window_by_window():
    net, bpe, text = small().double(), BPE(), "a tale of two windows and of five more of them"
    (a, parts), (b, alone) = (Scorer(net, bpe, 8).rolling(text, rows) for rows in (4, 1))
    assert abs(a - b) < 1e-9 and len(parts) == len(alone) == -(-len(text) // 8)
    assert all((p - q).abs().max() < 1e-9 for p, q in zip(parts, alone))


def test_events_count_every_write_of_the_items_context_once():
    net, bpe = small(), BPE()                      # chunks of 8 tokens; memories: the store, k, v, eta, alpha
    scorer = Scorer(net, bpe, 64, memorize=True, steps=2)
    scorer.take_in(list(range(20)))
    assert scorer.events["seen"] == 2 * 3 * 5       # two passes, ceil(20 / 8) writes of five memories


def test_context_gain_is_zero_beyond_what_a_window_can_see():
    rows = torch.randint(1, 200, (6, 257), generator=torch.Generator().manual_seed(0)).numpy()
    data = h.Task("parity", 0)
    data.validation = lambda T: rows
    net = small(variant="swa", window=16, depth=2, persistent=0).double()   # persistent keys know positions
    with torch.no_grad():                           # attention that matters
        net.embed.mul_(50)
    other = small(variant="full").double()
    found = by_position(net, data, 256, other)
    assert found["rows"] == 6 and list(found["gain"]) == ["32", "64", "128"]
    assert all(abs(g["mean"]) < 1e-6 for g in found["gain"].values())   # two layers of 16 see 31 tokens;
    # rotary angles are float32
    full, theirs = losses(net, torch.from_numpy(rows)), losses(other, torch.from_numpy(rows))
    assert abs(found["loss"]["64-128"]["mean"] - float(full[:, 64:128].mean())) < 1e-12
    gap = (theirs - full)[:, 128:].mean(1)
    assert abs(found["other_minus_this"]["128-256"]["mean"] - float(gap.mean())) < 1e-12
    assert abs(found["other_minus_this"]["128-256"]["se"] - float(gap.std() / 6**0.5)) < 1e-12
    whole = by_position(other, data, 256)["gain"]
    want = 0.0                                      # by hand: block b of the last 128 tokens behind 64 others
    for b in range(4):
        at = 128 + 32 * b
        near = losses(other, torch.from_numpy(rows)[:, at - 64:at + 33])[:, 64:]
        want += float((near - theirs[:, at:at + 32]).mean()) / 4
    assert abs(whole["64"]["mean"] - want) < 1e-12 and abs(want) > 1e-6


def test_absent_tasks_are_skipped_and_present_ones_counted(tmp_path):
    (tmp_path / "lambada.jsonl").write_text(json.dumps(dict(text="the cat sat on the mat")) + "\n")
    (tmp_path / "wikitext.jsonl").write_text(json.dumps(dict(page=" = Title = \n Some text , here . "))
                                             + "\n")
    found = zero_shot(Scorer(small(), BPE(), 64), tmp_path, 5)
    assert found["piqa"] is None and found["lambada"]["n"] == 1 and "mean8" not in found
    assert 1 < found["wikitext"]["word_ppl"] < math.inf


def test_wilson_interval_covers():
    draw = np.random.default_rng(0)
    cover = np.mean([lo <= 0.7 <= hi for lo, hi in (interval(draw.binomial(40, 0.7) / 40, 40)
                                                    for _ in range(2000))])
    assert 0.93 < cover < 0.97


def test_needle_prompts_have_their_needles_depth_and_length():
    essay, count = " ".join(f"w{i}" for i in range(3000)), lambda t: len(t.split())
    for variant, (_, _, _, keys, values, asked) in _niah.VARIANTS.items():
        for depth in (0.0, 0.5, 1.0):
            item = _niah.ruler_prompt(variant, 600, depth, rng(1), count, essay)
            assert 400 < count(item["prompt"]) <= 600 - 128, variant            # full, with room to answer
            assert len(item["answers"]) == asked * values and item["distractor"] not in item["prompt"]
            assert all(f"is: {a}." in item["prompt"] for a in item["answers"])
            if variant.startswith("single"):
                at = item["prompt"].index("One of the special magic") / len(item["prompt"])
                assert abs(at - depth) < 0.25
        assert item["prompt"].endswith(" is" if asked * values == 1 else " are")
    prompt = _niah.passkey_prompt("12345", 300, 0.5, count)
    assert 250 < count(prompt) <= 300 and prompt.count("12345") == 2


def recall_net(variant, steps=0, **kw):
    """A small net taught key-value recall: pairs, noise, then a key that asks for its value."""
    torch.manual_seed(0)
    cfg = h.Config(**{**dict(variant=variant, width=32, heads=1, depth=1, vocab=64, chunk=16, chunk_self=16,
                             cms_levels=1, task="recall", eta=0.5, periods=(16, 32)), **kw})
    net, data = h.LM(cfg), h.Task("recall", 0)
    outer = h.optim.Outer(net, "muon", 5e-3, 0.02, 0.0)
    for step in range(1, steps + 1):
        x, y = h.pairs(data.batch((0, step), range(32), 64), "cpu")
        loss = net.score(x, y)[0].sum() / (y >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        outer.step(step, min(1.0, step / 20))
    return net.eval(), data


def recalled_with_base_weights_kept(net, data):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = recalled(net, data)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and found["n"] == 512
    return found["gain"]


@pytest.mark.parametrize("variant,steps,chunk", [("lmm", 200, 16), ("hope", 120, 32)])
def test_memorising_raises_the_right_value(variant, steps, chunk):
    gain = recalled_with_base_weights_kept(*recall_net(variant, steps, chunk=chunk, chunk_self=chunk))
    assert gain["mean"] > 0.1 and gain["mean"] > 5 * gain["se"]


def test_memorising_changes_no_bit_of_a_transformer():
    assert recalled_with_base_weights_kept(*recall_net("full", 5)) == dict(mean=0, se=0)


def test_memorising_counts_events_and_keeps_base_weights():
    net = small(cms="context")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    scorer = Scorer(net, BPE(), 64, memorize=True)
    said = "the key is 7 and so on. " * 3
    with_memory, without = scorer.loglikelihood(said, "7"), Scorer(net, BPE(), 64).loglikelihood(said, "7")
    assert scorer.events["seen"] > 0 and with_memory != without
    shut = Scorer(net, BPE(), 64, memorize=True, paths=("titan",), threshold=1e9)
    shut.loglikelihood("the key is 7 and so on. " * 3, "7")
    assert shut.events["open"] < shut.events["seen"]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_continual_matrix_and_forgetting():
    texts = domains()
    assert len(set(texts)) == 5 and domains() == texts and all(len(t) >= 20_000 for t in texts.values())
    found = continual(small(), BPE(), 32, steps=3, batch=2, lr=5e-3)
    for key in ("on", "off"):
        a = np.array(found[key]["matrix"])
        assert a.shape == (5, 5) and min(found[key]["forgetting"]) >= 0
        assert a[0, 0] < 5.4                        # three steps on prose: below log 256 = 5.55
    assert found["on"]["matrix"] != found["off"]["matrix"]


def test_class_incremental_matrix_memorises_between_tasks_and_keeps_base_weights():
    corpus = labelled(labels=4, examples=4)
    assert corpus == labelled(labels=4, examples=4) and len(corpus) == 4
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    scorer = Scorer(net, BPE(), 64, memorize=True)
    found = classes(scorer, corpus, per_task=2, shown=2, asked=2)
    for key in ("on", "off"):
        assert [len(row) for row in found[key]["matrix"]] == [1, 2] and min(found[key]["forgetting"]) >= 0
        assert all(0 <= x <= 1 for row in found[key]["matrix"] for x in row)
    assert scorer.events["seen"] > 0            # 4 labels x 2 texts went through the memories
    fresh = Scorer(net, BPE(), 64, memorize=True)
    fresh.take_in(BPE().encode("Text: x\nLabel: y"))
    said = torch.tensor([list(b"Text: x")])
    assert not torch.equal(net(said, scorer.state)[0], net(said, fresh.state)[0])   # what it took in is there
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_whole_suite_writes_a_bundle_and_memorising_leaves_the_base_scores(tmp_path, monkeypatch, capsys):
    (tmp_path / "story.txt").write_text("once there was a fox who read a book about a dog. " * 200)
    (tmp_path / "intents.jsonl").write_text("".join(json.dumps(dict(label=f"l{i % 3}", text=f"t{i}")) + "\n"
                                                    for i in range(9)))
    h.train(h.Config(width=16, heads=2, depth=1, chunk=32, chunk_self=32, cms_levels=2, length=64, batch=2,
                     steps=2, eval_rows=2, data=str(tmp_path / "story.txt"), device="cpu",
                     out=str(tmp_path / "run")))
    found = {}
    for name, more in (("plain", ()), ("memorised", ("--memorize",))):
        argv = ["eval.lm", str(tmp_path / "run"), "--out", str(tmp_path / name), "--lengths", "512",
                "--samples", "1", "--depths", "1", "--continual-steps", "1", "--tasks", str(tmp_path), *more]
        monkeypatch.setattr("sys.argv", argv)
        lm.main()
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        summary = (tmp_path / name / "SUMMARY.md").read_text()
        assert capsys.readouterr().out == summary + "\n"
        pictures = {p.name for p in (tmp_path / name).glob("*.png")}
        assert pictures == {"forgetting_on.png", "forgetting_off.png", "classes.png", "ruler.png",
                            "context.png", "nll_by_position.png"}
    plain, memorised = found["plain"]["scores"], found["memorised"]["scores"]
    assert plain == memorised and set(plain) == set(lm.PARTS) - {"recall"}
    assert set(found["memorised"]["memorized"]) == set(lm.TWICE) and found["plain"]["memorized"] == {}
    assert found["memorised"]["memorized"]["passkey"] != plain["passkey"]
    assert found["memorised"]["meta"]["memorize"]["events"]["ruler"]["seen"] > 0
    assert plain["context"]["rows"] == 15 and plain["books"]["tokens"] == 1000      # a tenth of 10,000
    cells = [r for r in plain["ruler"] if r["length"] == 512 and r["variant"] == "multiquery"]
    assert [r["score"] for r in cells] == [None] and "| ruler | multiquery 512 |" in summary    # too short


def test_a_recall_run_has_one_part_and_state_tracking_none(tmp_path):
    recall, parity, text = (h.Config(task=t) for t in ("recall", "parity", "text"))
    assert lm.parts("", recall) == ["recall"] and "recall" not in lm.parts("", text)
    for only, cfg, said in (("ruler", recall, "it has recall"), ("", parity, "evaluate"),
                            ("rular", text, "ruler")):
        with pytest.raises(h.run.UserError, match=said):
            lm.parts(only, cfg)
