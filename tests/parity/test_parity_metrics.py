"""Every number of common/metrics.py against the public tool that defines it: same features, same weights."""

import json
import warnings

import numpy as np
import pytest
import torch

from common import metrics
from common.dino import DinoV3
from common.inception import InceptionV3
from test_metrics import A, B, IMAGES, LABEL, PROB, features, inception_state, moments

EXACT = dict(rel=1e-8, abs=1e-10)        # same definition in float64; sums in another order


# --- features ------------------------------------------------------------

def test_frechet_equals_pytorch_fid():
    score = pytest.importorskip("pytorch_fid.fid_score")
    scale = np.logspace(0, -1.5, 256)
    for x, y in ((A, B), (features(0, 3000, 256) * scale, features(1, 2500, 256, 0.02, 1.05) * scale)):
        theirs = score.calculate_frechet_distance(*moments(x), *moments(y))
        # sqrtm's own error
        assert metrics.frechet_distance(*moments(x), *moments(y)) == pytest.approx(theirs, rel=1e-6)


def test_frechet_equals_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    stats = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (A, B)]
    theirs = fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert metrics.frechet_distance(*moments(A), *moments(B)) == pytest.approx(theirs, rel=1e-8)


def test_inception_score_equals_torch_fidelity_and_torchmetrics():
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.from_numpy(np.random.RandomState(4).standard_normal((1003, 50)) * 3)
    theirs = isc.isc_features_to_metric(logits)
    assert metrics.inception_score(logits) == pytest.approx(tuple(theirs.values()), **EXACT)
    image = pytest.importorskip("torchmetrics.image.inception")
    metric = image.InceptionScore(feature=torch.nn.Identity(), splits=1)    # it shuffles without a seed
    metric.update(logits.float())
    ours = metrics.inception_score(logits.float(), splits=1)[0]
    assert ours == pytest.approx(metric.compute()[0].item(), rel=1e-5)       # its float32


@pytest.mark.parametrize("seed", [0, 2020])
def test_kernel_distance_equals_torch_fidelity(seed):
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    theirs = kid.kid_features_to_metric(torch.from_numpy(A), torch.from_numpy(B), kid_subsets=20,
                                        kid_subset_size=500, rng_seed=seed, verbose=False)
    assert metrics.kernel_distance(A, B, 20, 500, seed) == pytest.approx(tuple(theirs.values()), **EXACT)


def test_precision_recall_equal_torch_fidelity():
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = features(6, 900, 16), features(5, 700, 16, 0.3, 0.8)
    theirs = prc.prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3,
                                        prc_batch_size=10_000, save_cpu_ram=False, verbose=False)
    theirs = theirs["precision"], theirs["recall"]
    assert metrics.precision_recall(real, fake) == pytest.approx(theirs, **EXACT)


def test_nearest_neighbours_equal_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    distance, index = metrics.nearest_neighbours(B, A, 5)
    theirs = neighbors.NearestNeighbors(n_neighbors=5).fit(A).kneighbors(B)
    assert np.array_equal(index, theirs[1])
    np.testing.assert_allclose(distance, theirs[0], rtol=1e-12)


# --- networks ------------------------------------------------------------

def peaks(ours, theirs):
    return (ours - theirs).abs().max().item() / theirs.abs().max().item()


@torch.no_grad()
def test_inception_tf_equals_torch_fidelity(tmp_path):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception_state(), tmp_path / "w.pth")
    theirs = extractor.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased", "logits"],
                                                   feature_extractor_weights_path=tmp_path / "w.pth")
    net = InceptionV3.load(tmp_path / "w.pth")
    for images in (IMAGES, torch.randint(0, 256, (1, 3, 400, 310), dtype=torch.uint8)):
        pool, logits, biased = theirs(images)
        ours = net(images)
        assert max(peaks(ours[0], pool), peaks(ours[1], logits), peaks(ours[1] + net.fc.bias, biased)) < 1e-5


def pytorch_fid_network(monkeypatch, fid, state):
    """pytorch-fid's InceptionV3 with our weights instead of a download."""
    module = pytest.importorskip("pytorch_fid.inception")
    if fid:
        monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: state)
    else:
        build = module._inception_v3

        def loaded(weights):
            network = build(weights=None, aux_logits=False, num_classes=1000, transform_input=False)
            network.load_state_dict(state)
            return network

        monkeypatch.setattr(module, "_inception_v3", loaded)
    return module.InceptionV3(use_fid_inception=fid).eval()


@pytest.mark.parametrize("fid", [True, False])
@torch.no_grad()
def test_inception_half_pixel_equals_pytorch_fid_for_both_weight_layouts(monkeypatch, tmp_path, fid):
    state = inception_state(1008 if fid else 1000)
    theirs = pytorch_fid_network(monkeypatch, fid, state)(IMAGES / 255)[0].flatten(1)
    torch.save(state, tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # the label of the ImageNet weights
        net = InceptionV3.load(tmp_path / "w.pth", "half_pixel", imagenet=True)
    assert net.comparable == fid and peaks(net(IMAGES)[0], theirs) < 1e-5


@torch.no_grad()
def test_imagenet_layout_equals_torchvision_with_its_own_normalisation():
    """torchvision normalises by mean and deviation, then undoes it inside (transform_input): 2x - 1."""
    models = pytest.importorskip("torchvision.models")
    theirs = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    state = inception_state(1000)
    theirs.load_state_dict(state, strict=False)
    net = InceptionV3("half_pixel", fid=False)
    net.load_state_dict(state)
    image = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    logits = theirs((image / 255 - mean) / std)
    assert peaks(net(image)[1] + net.fc.bias, logits) < 1e-5


def test_tf_resize_equals_torch_fidelity_bit_for_bit():
    compat = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    from common.inception import resize_tf
    for size in ((64, 48), (299, 299), (600, 400), (17, 301)):
        x = torch.randint(0, 256, (2, 3, *size)).float()
        theirs = compat.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        assert (resize_tf(x) - theirs).abs().max() < 1e-4        # of 255: the last bit or two of float32


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_dino_equals_transformers(tmp_path, gated):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
                                          intermediate_size=192, num_register_tokens=4,
                                          use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")
    theirs = transformers.DINOv3ViTModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 2
    net = DinoV3.load(tmp_path)
    x = torch.randn(2, 3, 64, 96)
    assert peaks(net.tokens(x), theirs(x).last_hidden_state) < 1e-5
    processor = transformers.DINOv3ViTImageProcessor()
    for images in (IMAGES, torch.randint(0, 256, (2, 3, 300, 400), dtype=torch.uint8)):
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        assert (net.preprocess(images) - pixels).abs().max() < 1e-5
        assert peaks(net(images), theirs(pixels).pooler_output) < 1e-5


# --- classification ------------------------------------------------------

def scikit(prob, label, weight=None, threshold=0.5):
    sk = pytest.importorskip("sklearn.metrics")
    hit, w = prob >= threshold, dict(sample_weight=weight)
    return dict(accuracy=sk.accuracy_score(label, hit, **w),
                precision=sk.precision_score(label, hit, zero_division=0, **w),
                balanced_accuracy=sk.balanced_accuracy_score(label, hit, **w),
                recall=sk.recall_score(label, hit, **w),
                f1=sk.f1_score(label, hit, **w), mcc=sk.matthews_corrcoef(label, hit, **w),
                roc_auc=sk.roc_auc_score(label, prob, **w),
                average_precision=sk.average_precision_score(label, prob, **w),
                brier=sk.brier_score_loss(label, prob, **w), nll=sk.log_loss(label, prob, **w))


def test_every_score_equals_scikit_learn_with_and_without_weights():
    prob = np.round(PROB, 2).clip(0.01, 0.99)                    # many ties
    weights = np.random.RandomState(0).multinomial(2000, np.full(2000, 1 / 2000), 5)
    ours = metrics.binary_metrics(prob, LABEL)
    resampled = ours(weights)
    for row, weight in enumerate([None, *weights], -1):
        theirs = scikit(prob, LABEL, weight)
        got = {k: ours()[k] if weight is None else resampled[k][row] for k in theirs}
        assert got == pytest.approx(theirs, **EXACT)


def test_mcc_sweep_equals_a_loop_over_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    curve = metrics.mcc_sweep(PROB, LABEL, 200)["curve"]
    slow = [sk.matthews_corrcoef(LABEL, PROB >= t) for t in np.linspace(0, 1, 200)]
    np.testing.assert_allclose(curve["mcc"], slow, atol=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_calibration_errors_equal_torchmetrics(norm):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    prob, label = torch.from_numpy(PROB), torch.from_numpy(LABEL)
    theirs = functional.binary_calibration_error(prob, label, n_bins=15, norm=norm)
    ours = metrics.expected_calibration_error(PROB, LABEL, norm=norm)
    assert ours == pytest.approx(theirs.item(), rel=1e-8)
    logits = np.random.RandomState(0).standard_normal((500, 7))
    many = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = np.random.RandomState(1).randint(0, 7, 500)
    prob, label = torch.from_numpy(many), torch.from_numpy(target)
    theirs = functional.multiclass_calibration_error(prob, label, 7, 15, norm)
    ours = metrics.expected_calibration_error(many, target, norm=norm)
    assert ours == pytest.approx(theirs.item(), rel=1e-6)        # torchmetrics rounds confidences to float32
