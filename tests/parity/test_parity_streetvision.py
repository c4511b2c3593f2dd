"""streetvision.py and its common files against transformers, peft, torchvision, scikit-learn and
torchmetrics."""

import itertools

import numpy as np
import pytest
import torch

import streetvision as sv
from common import run
from common.street import augment, scorecard, streets, views

torch.set_num_threads(1)


def hf_model(gated, **more):
    hf = pytest.importorskip("transformers")
    config = hf.DINOv3ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=96, patch_size=8,
                                num_register_tokens=4, use_gated_mlp=gated,
                                hidden_act="silu" if gated else "gelu",
                                layerscale_value=0.7, image_size=64, **more)
    torch.manual_seed(0)
    return hf.DINOv3ViTModel(config).eval()


@pytest.mark.parametrize("gated", [False, True])
def test_vit_equals_transformers_on_a_wide_image(tmp_path, gated):
    net = hf_model(gated)
    net.save_pretrained(tmp_path)
    vit, x = sv.ViT.load(tmp_path), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want, got = net(x), vit(x)
    assert torch.allclose(got["cls"], want.pooler_output, atol=1e-5)         # float32 rounding; 2e-6 seen
    assert torch.allclose(got["patches"], want.last_hidden_state[:, 5:], atol=1e-5)
    # the prefix model.layer.N of state_dict
    run.save_weights(tmp_path / "again.safetensors", net.state_dict(), {})
    assert torch.equal(sv.ViT.load(tmp_path / "again.safetensors", 4)(x)["cls"], got["cls"])


def test_explora_checkpoint_goes_back_into_transformers(tmp_path):
    from safetensors.torch import load_file
    net = hf_model(False)
    net.save_pretrained(tmp_path)
    vit = sv.adapt(sv.ViT.load(tmp_path), "lora", 4, 8.0)
    for p in vit.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(1, 3, 64, 64)
    want = vit(x)["cls"]
    run.save_weights(tmp_path / "m.safetensors", sv.merge(vit).state_dict(), {})
    state = load_file(tmp_path / "m.safetensors")
    prefix = "model." if any(k.startswith("model.layer") for k in net.state_dict()) else ""
    net.load_state_dict({(prefix if k.startswith("layer.") else "") + k: v for k, v in state.items()})
    assert torch.allclose(net(x).pooler_output, want, atol=1e-5)


@pytest.mark.parametrize("kind, rslora, init", list(itertools.product(("lora", "dora"), (False, True),
                                                                      (True, "gaussian", "pissa"))))
def test_adapters_equal_peft(kind, rslora, init):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(24, 16)})
    ours = torch.nn.ModuleDict({"q": torch.nn.Linear(24, 16)})
    ours.load_state_dict(base.state_dict())

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = base["q"]

        def forward(self, x):
            return self.q(x)
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q"],
                                                        use_rslora=rslora,
                                                        use_dora=kind == "dora", init_lora_weights=init))
    sv.adapt(ours, kind, 4, 8.0, rslora, {True: "default"}.get(init, init), ("q",))
    layer, x = theirs.base_model.model.q, torch.randn(7, 24)
    assert torch.allclose(ours["q"](x), theirs(x), atol=1e-5)                # the start
    with torch.no_grad():
        # singular vectors have a free sign
        if init == "pissa":
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert torch.allclose(ours["q"].B @ ours["q"].A, product, atol=1e-5)
            ours["q"].weight.copy_(layer.base_layer.weight)
        ours["q"].A.copy_(layer.lora_A["default"].weight + 0.1 * torch.randn(4, 24))
        ours["q"].B.copy_(layer.lora_B["default"].weight + 0.1 * torch.randn(16, 4))
        layer.lora_A["default"].weight.copy_(ours["q"].A)
        layer.lora_B["default"].weight.copy_(ours["q"].B)
    assert torch.allclose(ours["q"](x), theirs(x), atol=1e-5)
    ours["q"](x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert torch.allclose(ours["q"].A.grad, layer.lora_A["default"].weight.grad, atol=1e-4)
    merged = theirs.merge_and_unload()
    assert torch.allclose(sv.merge(ours)["q"].weight, merged.q.weight, atol=1e-5)


@pytest.fixture(scope="module")
def v2():
    return pytest.importorskip("torchvision.transforms.v2")


def test_trivial_augment_and_rand_augment_equal_torchvision_pixel_by_pixel(v2):
    for seed in range(120):
        image = streets.frame(0, seed % 7, 0, size=64)[0]
        for theirs, ours in ((v2.TrivialAugmentWide(), augment.trivial_augment_wide),
                             (v2.RandAugment(), augment.rand_augment)):
            torch.manual_seed(seed)
            want = np.asarray(theirs(image))
            assert np.array_equal(np.asarray(ours(image, torch.Generator().manual_seed(seed))),
                                  want), (theirs, seed)


def test_augmix_is_within_a_grey_level_of_torchvision(v2):
    import torchvision.transforms.v2.functional as TF
    for seed in range(25):
        image = streets.frame(0, seed % 5, 0, size=64)[0]
        torch.manual_seed(seed)
        want = np.asarray(TF.to_pil_image(v2.AugMix()(TF.pil_to_tensor(image)))).astype(float)
        got = np.asarray(augment.aug_mix(image, torch.Generator().manual_seed(seed))).astype(float)
        # it works on tensors, we on Pillow images
        assert np.abs(got - want).mean() < 1


def test_crop_and_blur_equal_torchvision(v2):
    for seed in range(30):
        image = streets.frame(0, seed, 0, size=80)[0].resize((80, 60))
        torch.manual_seed(seed)
        want = v2.RandomResizedCrop(32, (0.2, 1.0))(image)
        assert np.array_equal(np.asarray(augment.resized_crop(image, torch.Generator().manual_seed(seed), 32,
                                                              (0.2, 1.0))), want)
    want = np.asarray(v2.functional.gaussian_blur(image, [5, 5], [1.2, 1.2])).astype(int)
    assert np.abs(np.asarray(augment.gaussian_blur(image, 5, 1.2)).astype(int) - want).max() <= 1


def test_colour_jitter_equals_torchvision_pixel_by_pixel(v2):
    for seed in range(40):
        image = streets.frame(0, seed % 7, 0, size=48)[0]
        torch.manual_seed(seed)
        want = np.asarray(v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(image))
        got = augment.color_jitter(image, torch.Generator().manual_seed(seed), 0.4, 0.4, 0.4, 0.1)
        assert np.array_equal(np.asarray(got), want), seed


def test_erasing_and_batch_mixing_equal_torchvision(v2):
    x, label = torch.rand(4, 3, 24, 32), torch.arange(4)
    for seed in range(60):
        g = lambda: torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        assert torch.equal(augment.random_erasing(x[0], g(), 0.5), v2.RandomErasing(0.5)(x[0])), seed
        for theirs, ours in ((v2.MixUp(alpha=0.2, num_classes=4),
                              lambda: augment.mixup(x, torch.eye(4), g())),
                             (v2.CutMix(alpha=1.0, num_classes=4),
                              lambda: augment.cutmix(x, torch.eye(4), g()))):
            torch.manual_seed(seed)
            want, mine = theirs(x, label), ours()
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, want)), (theirs, seed)


def test_focal_loss_equals_torchvision_on_the_margin(v2):
    from torchvision.ops import sigmoid_focal_loss
    torch.manual_seed(0)
    logits, y = torch.randn(50, 2), torch.randint(0, 2, (50,))
    want = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], y.float(), 0.25, 2.0, "mean")
    assert torch.allclose(sv.focal_loss(logits, y, 0.25, 2.0), want, atol=1e-6)


def test_preprocessing_equals_the_released_processor(v2):
    hf = pytest.importorskip("transformers")
    image = streets.frame(0, 1, 0, size=150)[0].resize((150, 100))
    try:
        processor = hf.DINOv3ViTImageProcessorFast(size=dict(height=64, width=64))
    except (AttributeError, ImportError):
        processor = hf.DINOv3ViTImageProcessor(size=dict(height=64, width=64))
    want = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(views.resized(image, 64), want, atol=1e-5)


def toy(n=400, seed=0):
    rng = np.random.default_rng(seed)
    s = rng.normal(0, 2, n).round(1)                                         # ties
    return 1 / (1 + np.exp(-2 * s)), (rng.random(n) < 1 / (1 + np.exp(-s))).astype(int)


def test_calibrators_equal_scikit_learn():
    pytest.importorskip("sklearn")
    from sklearn.calibration import _sigmoid_calibration
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression
    p, y = toy()
    s, grid = np.log(p / (1 - p)), np.linspace(0, 1, 301)
    want = IsotonicRegression(out_of_bounds="clip").fit(p, y).predict(grid)
    assert np.allclose(sv.CALIBRATORS["isotonic"]().fit(p, y)(grid), want, atol=1e-12)
    A, B = _sigmoid_calibration(s, y)
    ours = sv.CALIBRATORS["platt"]().fit(p, y).params
    assert (ours["a"], ours["b"]) == pytest.approx((-A, -B), abs=1e-4)       # their optimiser stops earlier
    x = np.c_[np.log(p), -np.log(1 - p)]
    fit = LogisticRegression(C=1e11, tol=1e-12, max_iter=5000).fit(x, y)
    ours = sv.CALIBRATORS["beta"]().fit(p, y)
    if fit.coef_.min() >= 0:
        assert np.allclose(ours(p), fit.predict_proba(x)[:, 1], atol=1e-5)


def test_beta_variants_and_dirichlet_equal_scikit_learn(monkeypatch):
    linear = pytest.importorskip("sklearn.linear_model")
    p, y = toy()
    logs = np.c_[np.log(p), -np.log(1 - p)]
    exact = dict(C=1e11, tol=1e-12, max_iter=5000)
    for name, x, more in (("beta_am", logs.sum(1)[:, None], {}), ("beta_ab", logs, dict(fit_intercept=False)),
                          ("dirichlet", logs, {})):
        monkeypatch.setattr(sv.CALIBRATORS["dirichlet"], "PENALTY", 0.0)     # then a plain regression
        fit = linear.LogisticRegression(**exact, **more).fit(x, y)
        assert name == "dirichlet" or fit.coef_.min() >= 0                   # else ours is constrained
        got = sv.CALIBRATORS[name]().fit(p, y)(p)
        assert np.allclose(got, fit.predict_proba(x)[:, 1], atol=1e-5), name


def test_linear_ensemble_has_the_weights_of_a_direct_search():
    """The NLL of sum_k w_k q_k on out-of-fold answers is no worse than on a fine grid of the simplex."""
    metrics = pytest.importorskip("sklearn.metrics")
    from common.street.calibrate import out_of_fold
    p, y = toy()
    fitted = sv.CALIBRATORS["ensemble_linear"]().fit(p, y)
    names = [m["method"] for m in fitted.params["members"]]
    q = np.stack([np.clip(out_of_fold(m, p, y), 1e-7, 1 - 1e-7) for m in names], 1)
    grid = [(a / 20, b / 20, (20 - a - b) / 20) for a in range(21) for b in range(21 - a)]
    best = min(metrics.log_loss(y, q @ np.array(w)) for w in grid)
    # the best mixture may lie on a side of the simplex, which softmax only approaches
    assert metrics.log_loss(y, q @ np.array(fitted.params["weights"])) <= best + 1e-5


def test_scores_equal_scikit_learn_under_bootstrap_weights():
    m = pytest.importorskip("sklearn.metrics")
    p, y = toy(200)
    got = scorecard.score(p, y, 0.4, np.arange(200), 0, 0)["metrics"]
    hard = p >= 0.4
    want = dict(mcc=m.matthews_corrcoef(y, hard), f1=m.f1_score(y, hard), roc_auc=m.roc_auc_score(y, p),
                average_precision=m.average_precision_score(y, p), brier=m.brier_score_loss(y, p),
                nll=m.log_loss(y, p))
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-8), name


def test_scores_equal_torchmetrics():
    tm = pytest.importorskip("torchmetrics.classification")
    p, y = toy(300, 3)
    p, y = p[p != 0.5], y[p != 0.5]                   # at the threshold theirs says no, ours yes
    got = scorecard.score(p, y, 0.5, np.arange(len(p)), 0, 0)["metrics"]
    prob, label = torch.from_numpy(p), torch.from_numpy(y)
    peers = dict(ece=tm.BinaryCalibrationError(n_bins=15, norm="l1"),
                 mce=tm.BinaryCalibrationError(15, norm="max"),
                 mcc=tm.BinaryMatthewsCorrCoef(), f1=tm.BinaryF1Score(), roc_auc=tm.BinaryAUROC(),
                 average_precision=tm.BinaryAveragePrecision())
    for name, peer in peers.items():
        assert got[name] == pytest.approx(float(peer(prob, label)), abs=1e-6), name    # they sum in float32
