"""hope_lm against public code: DeltaNet layers of flash-linear-attention, scoring of lm-evaluation-harness.

ONEFILE_FLA: a checkout of github.com/fla-org/flash-linear-attention (its naive references are plain torch +
einops); without it, or without lm_eval and transformers, the tests skip.
"""

import importlib.util
import os
import pathlib

import pytest
import torch
import torch.nn.functional as F

import hope_lm as h
from common.hope.blocks import DeltaNet, cut, glue, rates, unit
from common.hope.text import BPE

torch.set_num_threads(1)


def naive(name):
    pytest.importorskip("einops")
    root = os.environ.get("ONEFILE_FLA", "")
    file = pathlib.Path(root, "fla", "ops", name, "naive.py")
    if not root or not file.is_file():
        pytest.skip("ONEFILE_FLA does not name a checkout of flash-linear-attention")
    spec = importlib.util.spec_from_file_location(f"fla_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(layer, x):
    """The layer's own q (unscaled), k, v, beta: what both sides of the comparison start from."""
    c, _ = layer.conv(layer.qkv(x), None)
    q, k, v = (cut(p, layer.heads) for p in F.silu(c).chunk(3, -1))
    return unit(q), unit(k), v, rates(layer.beta, x, 1)[0].sigmoid()


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_delta_net_layer_equals_fla(chunk):
    reference = naive("delta_rule").delta_rule_recurrence
    torch.manual_seed(0)
    layer, x = DeltaNet(64, 4, chunk=chunk), torch.randn(2, 50, 64)
    q, k, v, beta = (t.squeeze(2) for t in inputs(layer, x))
    o, S = reference(q, k, v, beta)                 # scales q by K^-1/2 itself; S is [K, V], ours [V, K]
    want = layer.out(glue(layer.norm(o.unsqueeze(2))))
    got, state = layer(x, {})
    assert (got - want).abs().max() < 1e-5
    assert (state["memory"].squeeze(2).mT - S).abs().max() < 1e-5
    assert S.abs().max() > 0.1


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_gated_delta_net_layer_equals_fla(chunk):
    reference = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    torch.manual_seed(0)
    layer, x = DeltaNet(64, 4, gated=True, chunk=chunk), torch.randn(2, 50, 64)
    q, k, v, beta = (t.squeeze(2) for t in inputs(layer, x))
    g = -layer.log_rate.exp()[:, None] * F.softplus(rates(layer.decay, x, 1)[0].squeeze(2))
    o, S = reference(*(t.transpose(1, 2) for t in (q, k, v, beta, g)), output_final_state=True)
    want = layer.out(glue(layer.norm(o.transpose(1, 2).unsqueeze(2))) * F.silu(layer.open(x)))
    got, state = layer(x, {})
    assert (got - want).abs().max() < 1e-5
    assert (state["memory"].squeeze(2).mT - S).abs().max() < 1e-5


class Toy:
    """A GPT-2-shaped toy for the harness and the same model behind hope_lm's interface."""

    def __init__(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=2,
                                         bos_token_id=256, eos_token_id=256)
        self.hf = transformers.GPT2LMHeadModel(config).eval().double()
        with torch.no_grad():  # spread the logits: scores that differ in the first digits
            self.hf.transformer.wte.weight.mul_(20)
        self.cfg = h.Config(cms_levels=0, vocab=300)

    def fresh(self, B):
        return {}

    def modules(self):
        return []

    def __call__(self, tokens, state=None):
        logits = self.hf(tokens).logits
        return logits if state is None else (logits, state)

    def score(self, tokens, target):
        return h.nll(self(tokens), target), None, {}


ITEMS = {
    "piqa": dict(goal="To open a jar", sol1="twist the lid.", sol2="hit the table with a spoon until it "
                                                                   "rains.", label=0),
    "arc_easy": dict(question="Which is hot?", choices=dict(text=["ice", "the sun", "snow at night"],
                                                            label=["A", "B", "C"]), answerKey="B"),
    "boolq": dict(passage="Cats are mammals.", question="are cats mammals", label=1),
    "siqa": dict(context="Ann fell.", question="What next?", answerA="stood up", answerB="flew",
                 answerC="ate a very large house", label="1"),
    "hellaswag": dict(activity_label="Cooking", ctx_a="[header] A man cooks.", ctx_b="he then", label="2",
                      endings=["eats  it [step] slowly.", "sleeps.", "adds salt [title] and stirs.",
                               "leaves."]),
    "openbookqa": dict(question_stem="The sun is", choices=dict(text=["a star", "a cold lamp"],
                                                                label=["A", "B"]), answerKey="A"),
    "csqa": dict(question="Where is bread?", choices=dict(text=["oven", "sea", "moon", "shoe", "sky"],
                                                          label=list("ABCDE")), answerKey="A"),
}


@pytest.mark.parametrize("context,continuation",
                         [("Question: a\nAnswer:", " the sun"), ("ends in a space ", "word"),
                                                  ("two  ", " more"), ("The lamp, a the lamp", " the lamp")])
def test_context_and_continuation_split_like_the_harness(context, continuation):
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM
    from eval.lm import Scorer
    bpe = BPE.train(["the lamp and the sun answer the question " * 5], 290)

    class Encoder(TemplateLM):
        eot_token_id, prefix_token_id, backend = bpe.eos, bpe.eos, "causal"
        tok_encode = lambda self, text, *_, **__: bpe.encode(text)     # noqa: E731
        loglikelihood_rolling = generate_until = lambda self, *a, **k: None     # noqa: E731
        _loglikelihood_tokens = loglikelihood_rolling
    assert Scorer(Toy(), bpe, 256).split(context, continuation) == tuple(Encoder()._encode_pair(context,
                                                                                                continuation))


@pytest.mark.parametrize("task", ITEMS)
def test_scores_equal_the_harness_to_the_last_digit(task):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from eval._zeroshot import CHOICE
    from eval.lm import Scorer
    toy, bpe = Toy(), BPE.train(["the lamp and the sun answer the question " * 5], 290)
    context, choices, gold = CHOICE[task](ITEMS[task])

    class Harness(TemplateLM):
        """TemplateLM's own loglikelihood and split; the token scores below are what HFLM
        computes for one row."""
        eot_token_id, prefix_token_id, backend = bpe.eos, bpe.eos, "causal"
        tok_encode = lambda self, text, *_, **__: bpe.encode(text)     # noqa: E731
        loglikelihood_rolling = generate_until = lambda self, *a, **k: None   # noqa: E731

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, **_):
            from lm_eval.models.huggingface import HFLM
            found = []
            for _, ctx, cont in requests:
                ids = torch.tensor((ctx + cont)[-257:][:-1])[None]
                logits = F.log_softmax(toy.hf(ids).logits, -1)
                part = HFLM._select_cont_toks(self, logits[0], contlen=len(cont), inplen=ids.shape[1])
                found.append((float(part.gather(1, torch.tensor(cont)[:, None]).sum()),
                              bool((part.argmax(-1) == torch.tensor(cont)).all())))
            return found
    requests = [Instance("loglikelihood", {}, (context, " " + c), i) for i, c in enumerate(choices)]
    want = Harness().loglikelihood(requests, disable_tqdm=True)
    scorer = Scorer(toy, bpe, 256)
    assert [scorer.loglikelihood(context, " " + c) for c in choices] == [tuple(w) for w in want]


def test_hellaswag_and_wikitext_cleaning_equal_the_harness():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.hellaswag.utils import preprocess
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    from eval._zeroshot import detokenize, hellaswag_text
    for s in (" [header] A man [title] cooks.  Then [step] rests. ", "plain", "[a][b] x"):
        assert hellaswag_text(s) == preprocess(s)
    page = (" = = Title = = \n The cat 's hat , 1 @,@ 000 @-@ fold ; it ( he said ) was \" fine \" . [ 1 ] N "
            "\n 3 @.@ 5 ! ? : ok s ' x ")
    assert detokenize(page) == wikitext_detokenizer(dict(page=page))
