"""The names that notebooks and outside scripts rely on exist and take what they are documented to take."""

import contextlib
import importlib
import inspect
import io
import json
import pathlib
import re
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ["drift_toy", "drift_latent", "drift_pixel", "dit_t2i", "hope_lm", "beta_vae_arc", "streetvision"]
CALLS = """
common.kernels.drift_loss(gen_RGC, pos_RPC, unc_RUC=None, weight_R=None, taus=(0.02,), floor=1e-6, group=None)
common.kernels.drift_field(x_ND, pos_PD, neg_MD, tau, mask_self=False, attract=1.0, repel=1.0)
common.metrics.frechet_distance(mu1, cov1, mu2, cov2)
common.metrics.Moments(dim)
common.metrics.Moments.load(npz)
common.metrics.inception_score(logits_NK, splits=10, seed=2020)
common.metrics.precision_recall(real_ND, fake_MD, k=3)
common.metrics.kernel_distance(real_ND, fake_MD, subsets=100, subset_size=1000, seed=0)
common.metrics.InceptionV3.load(path, resize="tf")
common.metrics.mcc(tp, tn, fp, fn)
common.metrics.mcc_sweep(prob_N, label_N, n_thresholds=5000)
common.metrics.expected_calibration_error(prob_N, label_N, bins=15)
common.metrics.bootstrap(statistic, n)
common.vae.AutoencoderKL.load(path)
drift_latent.Generator()
drift_latent.MAE()
drift_latent.load_official(folder)
drift_latent.alpha_weight(alpha, n_gen, n_unc)
drift_pixel.Generator()
drift_pixel.MAE()
drift_pixel.load_official(folder)
drift_pixel.alpha_weight(alpha, n_gen, n_unc)
dit_t2i.CLIPTokenizer(folder)
dit_t2i.CLIPTextEncoder.load(folder)
dit_t2i.T5Tokenizer(folder)
dit_t2i.T5Encoder.load(folder)
dit_t2i.sigmas(kind, steps)
dit_t2i.guide(cond, uncond, scale, method="cfg")
dit_t2i.SafetyChecker.load(folder)
hope_lm.build(cfg)
hope_lm.BPE.train(texts, vocab_size)
hope_lm.BPE.load(json)
beta_vae_arc.BetaVAE(cfg)
beta_vae_arc.beta(epoch)
streetvision.ViT.load(path)
streetvision.adapt(module, kind="lora", rank=1, alpha=1.0, rslora=False, init="default", targets=())
streetvision.merge(module)
streetvision.nt_xent(z1, z2, temperature)
streetvision.focal_loss(logits, target, alpha, gamma)
""".strip().splitlines()


def find(path):
    """The object behind a dotted path whose first parts are modules."""
    parts = path.split(".")
    depth = 2 if parts[0] == "common" else 1
    thing = importlib.import_module(".".join(parts[:depth]))
    for name in parts[depth:]:
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.split("(")[0])
def test_documented_call_binds(call):
    path, words = call.split("(", 1)
    names = eval(f"(lambda *a, **k: (a, k))({words}", Names())
    inspect.signature(find(path)).bind(*names[0], **names[1])


class Names(dict):
    def __missing__(self, name):
        return name


def test_registries_hold_the_documented_entries():
    t2i, street = find("dit_t2i"), find("streetvision")
    names = "euler euler_ancestral heun ddim dpmpp_2m dpmpp_2m_sde dpmpp_sde unipc"
    assert set(names.split()) <= set(t2i.SAMPLERS)
    for name, calibrator in street.CALIBRATORS.items():
        methods = "fit", "__call__", "to_json", "from_json"
        assert all(hasattr(calibrator, method) for method in methods), name


def output_of(script, *words):
    """What `python SCRIPT.py WORDS` prints, in this process."""
    old, sys.argv = sys.argv, [f"{script}.py", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = old
    return out.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_plan_prints_one_object_with_the_documented_keys(script):
    plan = json.loads(output_of(script, "plan", "--json", "--preset", "smoke"))
    assert {"script", "preset", "params", "flops_per_step", "memory_gb_per_rank", "disk_gb", "steps",
            "hours_at_mfu"} <= set(plan)
    assert (plan["script"], plan["preset"]) == (f"{script}.py", "smoke")
    assert plan["params"] > 0 and plan["flops_per_step"] > 0


COMMANDS = {"hope_lm": "corpus tokenizer shard validate verify ablate", "beta_vae_arc": "corpus plots",
            "streetvision": "demo-data splits run predict validate config doctor"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_commands_and_common_flags(script):
    text = output_of(script, "--help")
    for word in f"train sample evaluate plan {COMMANDS.get(script, '')}".split():
        assert re.search(rf"\b{word}\b", text), word
    for flag in "out data seed device steps compile wandb preset".split():
        assert re.search(rf"--{flag}\b", text), flag
