"""Image metrics and classifier scores against closed forms, slow versions and numbers of public tools.

"Golden" constants were computed once with pytorch-fid, torch-fidelity, scikit-learn or SciPy on
features(seed, ...) below, whose generator NumPy keeps frozen; tests/parity/test_parity_metrics.py runs those
tools again.
"""

import json
import tracemalloc
import zlib

import numpy as np
import pytest
import scipy.stats
import torch
from forked import two_ranks
from scipy.spatial import cKDTree

from common import classify, inception, metrics, run
from common.dino import DinoV3
from common.metrics import Moments


def features(seed, n, d, shift=0., scale=1.):
    return np.random.RandomState(seed).standard_normal((n, d)) * scale + shift


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


A, B = features(0, 2000, 64), features(1, 1500, 64, 0.1, 1.2)


# --- Frechet distance ----------------------------------------------------

def test_frechet_is_the_mean_shift_for_equal_covariances():
    eye = np.eye(2048)
    assert metrics.frechet_distance(np.zeros(2048), eye, np.ones(2048), eye) == pytest.approx(2048, rel=1e-12)


def test_frechet_of_diagonal_gaussians_is_the_sum_of_squared_deviation_differences():
    zero = np.zeros(3)
    distance = metrics.frechet_distance(zero, np.diag([1., 4, 9]), zero, np.diag([4., 4, 1]))
    assert distance == pytest.approx(5, abs=1e-12)


def test_frechet_equals_the_golden_value_and_is_symmetric():
    forth = metrics.frechet_distance(*moments(A), *moments(B))
    assert forth == pytest.approx(4.8162476885, abs=1e-8)
    assert metrics.frechet_distance(*moments(B), *moments(A)) == pytest.approx(forth, abs=1e-10)


def test_frechet_of_few_rows_equals_the_nuclear_norm_of_the_data():
    x, y = features(10, 50, 64), features(11, 40, 64, 0.2)
    (mu, cov), (nu, tau) = moments(x), moments(y)
    root = np.linalg.svd((x - mu) @ (y - nu).T / np.sqrt(49 * 39), compute_uv=False).sum()
    exact = ((mu - nu) ** 2).sum() + np.trace(cov) + np.trace(tau) - 2 * root
    assert metrics.frechet_distance(mu, cov, nu, tau) == pytest.approx(exact, abs=1e-9)
    assert exact == pytest.approx(52.49639, abs=1e-4)         # public tools differ here in the 7th digit


@pytest.mark.parametrize("n", [20, 64, 500])
def test_frechet_of_a_set_to_itself_is_zero(n):
    mu, cov = moments(features(2, n, 64, 3., 5.))
    assert abs(metrics.frechet_distance(mu, cov, mu, cov)) < 1e-10 * np.trace(cov)


def test_frechet_keeps_small_eigenvalues():
    """Spectrum over 12 decades in a rotated basis; the closed form is sum (sqrt l - sqrt m)^2. The
    eigenvalues of the product S1 S2, as public tools take them, are wrong by 1e-7 here."""
    rs = np.random.RandomState(0)
    basis = np.linalg.qr(rs.standard_normal((200, 200)))[0]
    one = np.logspace(0, -12, 200)
    two = rs.permutation(one)
    cov = [(basis * v) @ basis.T for v in (one, two)]
    got = metrics.frechet_distance(np.zeros(200), cov[0], np.zeros(200), cov[1])
    assert got == pytest.approx(((one ** 0.5 - two ** 0.5) ** 2).sum(), abs=1e-9)


def test_frechet_of_statistics_stored_in_float32_clips_what_rounding_made_negative():
    """41 rows in 98 dimensions, rounded, are indefinite; Cholesky runs into rounding errors (1e-3)."""
    scale = np.logspace(0, -0.65, 98)
    x, y = features(3, 41, 98) * scale, features(4, 300, 98) * scale
    mu, cov = (v.astype(np.float32).astype(np.float64) for v in moments(x))
    value, vector = np.linalg.eigh(cov)
    assert value.min() < 0
    root = (vector * np.sqrt(value.clip(0))) @ vector.T
    nu, tau = moments(y)
    cross = np.sqrt(np.linalg.eigvalsh(root @ tau @ root).clip(0)).sum()
    slow = ((mu - nu) ** 2).sum() + np.trace(cov + tau) - 2 * cross
    # its own small eigenvalues are good to sqrt(1e-16) of the largest
    assert metrics.frechet_distance(mu, cov, nu, tau) == pytest.approx(slow, abs=1e-6)
    assert slow == pytest.approx(metrics.frechet_distance(*moments(x), nu, tau), rel=1e-3)


def test_mismatched_or_broken_statistics_are_one_clear_line():
    with pytest.raises(ValueError, match=r"means \(64,\) and \(32,\)"):
        metrics.frechet_distance(*moments(A), *moments(A[:, :32]))
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(np.full(64, np.nan), np.eye(64), *moments(A))


@pytest.mark.parametrize("n, measured", [(500, 4.43), (2000, 1.083), (10_000, 0.2223)])
def test_frechet_bias_predicts_what_sampling_alone_adds(n, measured):
    """Measured: mean of 5 pairs of samples of one 64-d Gaussian; 3 % is their scatter and higher orders."""
    assert metrics.frechet_bias(np.eye(64), n, n) == pytest.approx(measured, rel=0.03)


def test_frechet_infinity_removes_the_bias():
    x = features(12, 4000, 16)
    biased = metrics.frechet_distance(*moments(x), np.zeros(16), np.eye(16))
    assert biased > 0.015                                      # expected 0.02
    assert abs(metrics.frechet_infinity(x, np.zeros(16), np.eye(16))) < biased / 2


# --- moments -------------------------------------------------------------

@pytest.mark.parametrize("cuts", [[], [300, 601, 1200], [1], [0, 0, 7, 1999]])
def test_moments_equal_numpy_under_any_split(cuts):
    total = Moments(64)
    for part in np.split(A, cuts):
        total.merge(Moments(64).update(part[:len(part) // 3]).update(part[len(part) // 3:]))
    assert total.n == 2000
    np.testing.assert_allclose(total.mean, A.mean(0), atol=1e-14)
    np.testing.assert_allclose(total.cov, np.cov(A, rowvar=False), atol=1e-12)


def test_moments_of_float32_with_a_large_mean_keep_their_digits():
    x = features(5, 5000, 8, 30., 0.1).astype(np.float32)      # a one-pass float32 sum is off by 4e-3 here
    total = Moments(8)
    for part in np.array_split(x, 50):
        total.update(torch.from_numpy(part))
    np.testing.assert_allclose(total.cov, np.cov(x.astype(np.float64), rowvar=False), atol=1e-12)


def _rank(rank, world, rendezvous, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank,
                                         world_size=world)
    part = Moments(64).update(A[:1300] if rank == 0 else A[1300:]).all_reduce()
    part.save(f"{out}{rank}.npz")
    run.leave_together()


def test_two_gloo_ranks_end_with_the_moments_of_one(tmp_path):
    two_ranks(_rank, 2, tmp_path / "rendezvous", tmp_path / "rank")
    for rank in range(2):
        total = Moments.load(tmp_path / f"rank{rank}.npz")
        assert total.n == 2000
        np.testing.assert_allclose(total.mean, A.mean(0), atol=1e-14)
        np.testing.assert_allclose(total.cov, np.cov(A, rowvar=False), atol=1e-12)


def test_moments_refuse_other_widths_and_values_that_are_not_finite():
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        Moments(64).update(A[:, :5])
    with pytest.raises(ValueError, match="64 and 5 wide"):
        Moments(64).merge(Moments(5))
    with pytest.raises(ValueError, match="not finite"):
        Moments(1).update([[0.], [np.inf]])
    assert np.isnan(Moments(2).update([[1., 2]]).cov).all()


def test_saved_moments_load_and_go_on_merging(tmp_path):
    Moments(64).update(A[:500]).save(tmp_path / "a.npz", dict(weights="x"),
                                     spatial=Moments(3).update(features(1, 9, 3)))
    loaded = Moments.load(tmp_path / "a.npz").update(A[500:])
    np.testing.assert_allclose(loaded.cov, np.cov(A, rowvar=False), atol=1e-12)
    assert Moments.load(tmp_path / "a.npz", spatial=True).cov.shape == (3, 3)
    with np.load(tmp_path / "a.npz") as z:                      # what pytorch-fid and ADM read
        assert z["mu"].dtype == z["sigma"].dtype == np.float64
        assert json.loads(str(z["meta"])) == dict(weights="x")


def test_statistics_of_other_tools_load_but_do_not_merge(tmp_path):
    mu, cov = moments(A)
    np.savez(tmp_path / "meanflow.npz", ref_mu=mu.astype(np.float32), ref_sigma=cov.astype(np.float32))
    np.savez(tmp_path / "neither.npz", arr_0=np.zeros(3))
    loaded = Moments.load(tmp_path / "meanflow.npz")
    np.testing.assert_allclose(loaded.cov, cov, atol=1e-6)
    for step in (lambda: loaded.update(A), lambda: Moments(64).update(A).merge(loaded)):
        with pytest.raises(ValueError, match="without a count"):
            step()
    with pytest.raises(ValueError, match="holds arr_0; expected mu and sigma or ref_mu"):
        Moments.load(tmp_path / "neither.npz")


def test_fewer_rows_than_features_are_warned_about_with_the_bias():
    reference = Moments(64).update(A)
    with pytest.warns(UserWarning, match=r"50 rows for 64 features: .* about 2\d\.\d apart"):
        Moments(64).update(features(7, 50, 64)).distance(reference)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_stream_in_constant_memory(tmp_path, save):
    images = np.random.RandomState(0).randint(0, 256, (203, 32, 48, 3)).astype(np.uint8)
    save(tmp_path / "x.npz", arr_0=images, other=np.zeros(3))
    tracemalloc.start()
    for start, batch in enumerate(metrics.npz_images(tmp_path / "x.npz", 4)):
        assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images[4 * start:4 * start + 4])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert start == 50 and peak < images.nbytes / 2  # zip buffers take a constant 0.2 MB beside a batch
    for key, message in (("labels", "holds no labels, only arr_0, other"), ("other", "expected uint8")):
        with pytest.raises(ValueError, match=message):
            next(metrics.npz_images(tmp_path / "x.npz", key=key))


# --- scores of features --------------------------------------------------

def test_inception_score_equals_the_golden_values():
    logits = np.random.RandomState(4).standard_normal((1000, 10)) * 2
    assert metrics.inception_score(logits) == pytest.approx((2.592286689, 0.158370224), abs=1e-8)
    assert metrics.inception_score(logits, seed=None) == pytest.approx((2.582342378, 0.118500544), abs=1e-8)
    assert metrics.inception_score(logits, splits=1)[0] == pytest.approx(2.619169875, abs=1e-8)
    assert metrics.inception_score(logits[::-1].copy(), splits=1)[0] == pytest.approx(2.619169875, abs=1e-8)


def test_inception_score_is_classes_on_one_hot_and_one_on_constant_logits():
    one_hot = (np.eye(10)[np.arange(1000) % 10] * 2 - 1) * 1e4
    assert metrics.inception_score(one_hot, seed=None) == pytest.approx((10, 0), abs=1e-9)
    assert metrics.inception_score(np.zeros((50, 7))) == pytest.approx((1, 0), abs=1e-12)
    with pytest.raises(ValueError, match="9 rows do not make 10 splits"):
        metrics.inception_score(np.zeros((9, 7)))


def test_kernel_distance_equals_the_golden_values():
    assert metrics.kernel_distance(A, B) == pytest.approx((0.0422604874, 0.0030290287), abs=1e-10)
    assert metrics.kernel_distance(A, B, seed=2020) == pytest.approx((0.0419301258, 0.0023811101), abs=1e-10)
    with pytest.raises(ValueError, match="subset_size 1000 exceeds the 900 rows"):
        metrics.kernel_distance(A, B[:900])


def test_kernel_distance_is_unbiased_so_sometimes_negative():
    pairs = [features(seed, 40, 4).reshape(2, 20, 4) for seed in range(200)]
    values = [metrics.kernel_distance(*pair, subsets=1, subset_size=20)[0] for pair in pairs]
    assert min(values) < 0 and abs(np.mean(values)) < 3 * np.std(values) / 200 ** 0.5


def test_cmmd_equals_the_golden_values():
    assert metrics.cmmd(A[:500], B[:400]) == pytest.approx(0.120142616, abs=1e-8)
    assert metrics.cmmd(A[:500], features(7, 400, 64, 0.5)) == pytest.approx(2.043259457, abs=1e-8)


# --- neighbours ----------------------------------------------------------

def test_precision_recall_equal_the_golden_values_and_swap():
    real, fake = features(6, 1000, 8), features(5, 800, 8, 0.5, 0.7)
    assert metrics.precision_recall(real, fake) == (0.945, pytest.approx(0.396, abs=1e-12))
    assert metrics.precision_recall(fake, real) == (pytest.approx(0.396, abs=1e-12), 0.945)
    assert metrics.precision_recall(A[:1000], B[:800]) == (0.08875, pytest.approx(0.984, abs=1e-12))


def test_identical_sets_score_one_and_distant_sets_zero():
    real = features(6, 300, 8)
    assert metrics.manifold_metrics(real, real.copy())["coverage"] == 1
    assert metrics.precision_recall(real, real.copy()) == (1, 1)
    assert metrics.precision_recall(real.astype(np.float32), real.astype(np.float32)) == (1, 1)
    assert metrics.manifold_metrics(real, real + 100) == dict(precision=0, recall=0, density=0, coverage=0)


@pytest.mark.parametrize("tile", [7, 100, 10_000])
def test_manifold_metrics_equal_brute_force_at_any_tile(tile):
    real, fake, k = features(6, 211, 5), features(5, 150, 5, 0.3, 0.8), 4
    radius = [cKDTree(x).query(x, k + 1)[0][:, k] for x in (real, fake)]
    distance = np.linalg.norm(real[:, None] - fake[None], axis=2)
    balls = distance <= radius[0][:, None]
    expected = dict(precision=balls.any(0).mean(), recall=(distance <= radius[1]).any(1).mean(),
                    density=balls.sum() / k / 150, coverage=balls.any(1).mean())
    assert metrics.manifold_metrics(real, fake, k, tile) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tile", [5, 64, 4096])
def test_nearest_neighbours_equal_a_tree_at_any_tile(tile):
    query, data = features(1, 60, 6), features(2, 500, 6)
    expected, where = cKDTree(data).query(query, 4)
    distance, index = metrics.nearest_neighbours(query, data, 4, tile)
    assert distance.dtype == torch.float64 and np.array_equal(index, where)
    np.testing.assert_allclose(distance, expected, atol=1e-12)


def test_neighbours_closer_than_float32_can_tell_come_in_order():
    direction = features(1, 16, 64)
    step = 1 + 1e-7 * np.random.RandomState(0).permutation(16)[:, None]
    query = features(2, 1, 64, shift=1000.)
    data = query + direction / np.linalg.norm(direction, axis=1, keepdims=True) * step
    distance, index = metrics.nearest_neighbours(query, data, 10)
    assert np.array_equal(index[0], step[:, 0].argsort()[:10]) and (distance.diff() > 0).all()


def test_neighbours_far_from_the_origin_are_found():
    """|a|^2 + |b|^2 - 2ab in float32 is off by 4 here, the distances are near 0.6: centring is needed."""
    query, data = features(1, 50, 64, 1000., 0.1), features(2, 2000, 64, 1000., 0.1)
    assert np.array_equal(metrics.nearest_neighbours(query, data, 3)[1], cKDTree(data).query(query, 3)[1])


def test_copies_are_found_at_distance_zero_in_a_memmap_of_images(tmp_path):
    """float32 |a|^2 + |b|^2 - 2ab alone would put a copy 3 grey levels away from itself."""
    data = np.random.RandomState(0).randint(0, 256, (300, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "data.npy", data)
    query = data[[17, 250]].copy()
    query[1, 0, 0, 0] ^= 1                                       # one pixel off by one
    mapped = np.load(tmp_path / "data.npy", mmap_mode="r")
    distance, index = metrics.nearest_neighbours(query, mapped, 2, tile=64)
    assert index[:, 0].tolist() == [17, 250] and distance[:, 0].tolist() == [0, 1]
    mirrored = metrics.nearest_neighbours(query[:, :, ::-1].copy(), data[:, :, ::-1].copy())
    assert mirrored[1][:, 0].tolist() == [17, 250]
    with pytest.raises(ValueError, match="301 neighbours wanted of 300"):
        metrics.nearest_neighbours(query, data, 301)


# --- Inception -----------------------------------------------------------

def inception_state(classes=1008):
    """Weights by recipe (each tensor from the CRC of its name), so every machine has the same network."""
    state = {}
    for key, value in inception.InceptionV3(fid=classes == 1008).state_dict().items():
        g = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(value.shape))
        if key.endswith("conv.weight"):
            g = g * np.sqrt(2 / np.prod(value.shape[1:]))
        elif key.endswith("bn.weight"):
            g = 1 + 0.1 * g
        elif key.endswith("running_var"):
            g = 1 + 0.1 * np.abs(g)
        elif key == "fc.weight":
            g = 0.02 * g
        else:
            g = 0.1 * g
        state[key] = value if key.endswith("tracked") else torch.from_numpy(np.asarray(g, np.float32))
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(inception_state(), path)
    return path


IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 64, 48)).astype(np.uint8))
# float32 through 94 convolutions; the constants are torch-fidelity's module in float64
CLOSE = dict(abs=1e-4)


@torch.no_grad()
def test_inception_with_recipe_weights_equals_the_golden_values(weights):
    net = inception.InceptionV3.load(weights)
    assert len(net.state_dict()) == 566 and sum(p.numel() for p in net.parameters()) == 23_850_960
    out = net.features(IMAGES)
    assert out["pool"].mean(1).tolist() == pytest.approx([0.262360, 0.261618], **CLOSE)
    assert out["pool"].std(1).tolist() == pytest.approx([0.345869, 0.345175], **CLOSE)
    assert out["pool"][0, :4].tolist() == pytest.approx([0, 0.72521, 0.03680, 0], **CLOSE)
    assert out["logits"][0, :3].tolist() == pytest.approx([0.29788, 0.72208, -0.29211], **CLOSE)
    biased = out["logits"] + net.fc.bias
    assert biased[0, :3].tolist() == pytest.approx([0.24231, 0.63904, -0.35091], **CLOSE)
    assert out["spatial"].shape == (2, 2023)
    assert out["spatial"].mean().item() == pytest.approx(0.535394, **CLOSE)
    pool, logits = net(IMAGES)
    assert torch.equal(pool, out["pool"]) and torch.equal(logits, out["logits"])
    big = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (1, 3, 600, 400)).astype(np.uint8))
    assert net(big)[0].mean().item() == pytest.approx(0.295864, **CLOSE)


@torch.no_grad()
def test_half_pixel_resize_equals_the_golden_values(weights):
    pool, logits = inception.InceptionV3.load(weights, resize="half_pixel")(IMAGES)
    assert pool.mean(1).tolist() == pytest.approx([0.262530, 0.262316], **CLOSE)
    assert pool[0, :4].tolist() == pytest.approx([0, 0.72673, 0.03731, 0], **CLOSE)
    assert logits[0, :3].tolist() == pytest.approx([0.29847, 0.72363, -0.29184], **CLOSE)


@pytest.mark.parametrize("changed, pool, mean", [("5b 5c 5d 6b 6c 6d 6e 7b", "mean", 0.255264),
                                                 ("7c", "fid_mean", 0.255183)])
@torch.no_grad()
def test_each_departure_from_torchvision_shows_in_the_numbers(weights, changed, pool, mean):
    """Constants of the two wrong networks: padding counted in the averages; no max pool in 7c."""
    net = inception.InceptionV3.load(weights)
    for name in changed.split():
        getattr(net, f"Mixed_{name}").pool = pool
    assert net(IMAGES[:1])[0].mean().item() == pytest.approx(mean, **CLOSE)


def test_inception_loads_with_and_without_batch_counts_and_as_safetensors(weights, tmp_path):
    from safetensors.torch import save_file
    state = {k: v for k, v in inception_state().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 472
    save_file(state, tmp_path / "w.safetensors")
    net = inception.InceptionV3.load(tmp_path / "w.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items() if k in state)


def test_torchvision_weights_are_refused_unless_asked_for_and_then_labelled(tmp_path):
    state = inception_state(1000)
    state["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
    torch.save(state, tmp_path / "inception_v3_google.pth")
    with pytest.raises(ValueError, match="1000-class ImageNet network, not the 1008-class FID network"):
        inception.InceptionV3.load(tmp_path / "inception_v3_google.pth")
    with pytest.warns(UserWarning, match="NOT FID"):
        net = inception.InceptionV3.load(tmp_path / "inception_v3_google.pth", "half_pixel", imagenet=True)
    assert not net.comparable and net.fc.out_features == 1000
    assert net.Mixed_7c.pool == net.Mixed_5b.pool == "mean"


def test_wrong_inception_files_and_inputs_are_one_clear_line(weights, tmp_path):
    state = inception_state()
    torch.save({**state, "Mixed_5b.branch1x1.conv.weight": torch.zeros(64, 192, 3, 3)},
               tmp_path / "shape.pth")
    state.pop("Mixed_6a.branch3x3.conv.weight")
    torch.save(state, tmp_path / "short.pth")
    torch.save(inception.Unit(3, 4), tmp_path / "module.pth")  # a pickled module is never unpickled
    for name, message in (("shape", r"branch1x1.conv.weight is \(64, 192, 3, 3\)"),
                          ("short", "missing .*Mixed_6a.branch3x3"),
                          ("module", "not a plain state dict")):
        with pytest.raises(ValueError, match=message):
            inception.InceptionV3.load(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="no weights file absent.pth"):
        inception.InceptionV3.load("absent.pth")
    net = inception.InceptionV3()
    for bad in (IMAGES.float(), IMAGES[:, :1], IMAGES[0]):
        with pytest.raises(ValueError, match=r"uint8 \[N, 3, H, W\]"):
            net(bad)
    with pytest.raises(ValueError, match="'tf' or 'half_pixel'"):
        inception.InceptionV3("bicubic")


def test_resizes_equal_the_hand_case_and_leave_299_alone():
    ramp = torch.arange(12.).reshape(1, 1, 3, 4)
    rows = {"tf": ([0, 0.6667, 1.3333, 2, 2.6667, 3], [2.4, 3.0667, 3.7333, 4.4, 5.0667, 5.4]),
            "half_pixel": ([0, 0.5, 1.1667, 1.8333, 2.5, 3], [1.6, 2.1, 2.7667, 3.4333, 4.1, 4.6])}
    for name, expected in rows.items():
        resize = getattr(inception, f"resize_{name}")
        # constants have 4 digits
        np.testing.assert_allclose(resize(ramp, (5, 6))[0, 0, :2], expected, atol=1e-4)
        image = torch.rand(1, 3, 299, 299)
        assert torch.equal(resize(image), image)


# --- DINO ----------------------------------------------------------------

def dino_files(folder, gated):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    net = DinoV3(64, 2, 2, 96, gated, patch=8, registers=3, side=32)
    state = {("model." if key.startswith("layer.") else "") + key: torch.randn(value.shape) * 0.2
             for key, value in net.state_dict().items()}
    save_file({**state, "embeddings.mask_token": torch.zeros(1, 1, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(num_attention_heads=2)))
    return state


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_dino_reads_both_key_layouts_and_its_own_sizes(tmp_path, gated):
    state = dino_files(tmp_path, gated)
    net = DinoV3.load(tmp_path, side=32)
    assert net.patch == 8 and net.layer[0].heads == 2 and ("gate_proj" in net.layer[0].mlp) == gated
    assert torch.equal(net.layer[1].mlp["up_proj"].weight, state["model.layer.1.mlp.up_proj.weight"])
    assert net(torch.randint(0, 256, (3, 3, 50, 40), dtype=torch.uint8)).shape == (3, 64)


@torch.no_grad()
def test_dino_position_is_relative_and_registers_have_none(tmp_path):
    """Scores depend on the offset of two patches; class and register tokens are not turned."""
    from common.dino import rope_table, rotate
    cos, sin = rope_table(4, 4, 32, skip=3)
    t = torch.randn(1, 1, 19, 32)
    # channel k turns with k + K/2; the table's sine is negated in its first half
    turn = torch.complex(cos, sin)[:, 16:]
    assert torch.equal(sin[:, :16], -sin[:, 16:]) and torch.all(turn[:3] == 1)
    pair = torch.complex(t[..., :16], t[..., 16:]) * turn
    assert torch.allclose(rotate(t, cos, sin), torch.cat([pair.real, pair.imag], -1), atol=1e-6)
    q, k = (torch.randn(1, 1, 1, 32).expand(1, 1, 19, 32) for _ in range(2))
    score = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]
    assert torch.allclose(score[:3, :3], score[0, 0].expand(3, 3))
    grid = score[3:, 3:].reshape(4, 4, 4, 4)
    assert grid[0, 0, 2, 1].item() == pytest.approx(grid[1, 2, 3, 3].item(), abs=1e-4)  # same offset (2, 1)
    assert abs(grid[0, 0, 2, 1] - grid[0, 0, 1, 2]) > 1e-2


def test_a_file_that_is_no_dino_is_one_clear_line(tmp_path):
    from safetensors.torch import save_file
    save_file(dict(x=torch.zeros(1)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not DINOv3 in Hugging Face layout"):
        DinoV3.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no .safetensors file"):
        DinoV3.load(tmp_path / "absent")


# --- thresholds ----------------------------------------------------------

_rs = np.random.RandomState(8)
LABEL = (_rs.rand(2000) < 0.3).astype(int)
PROB = 1 / (1 + np.exp(-(_rs.standard_normal(2000) + 1.5 * (LABEL - 0.5))))


def test_the_recipe_makes_the_data_of_the_golden_values():
    assert LABEL.sum() == 580 and PROB[:3] == pytest.approx([0.32639322, 0.54621748, 0.11940339], abs=1e-8)


def test_classifier_scores_equal_the_golden_values():
    scores = metrics.binary_metrics(PROB, LABEL)()
    expected = dict(mcc=0.519799696, roc_auc=0.865406751, average_precision=0.730933693, f1=0.670204701,
                    brier=0.155606341, nll=0.479553251, ece=0.144344463, ece_top=0.073886109)
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    plain = dict(roc_auc=metrics.roc_auc, average_precision=metrics.average_precision,
                 brier=metrics.brier_score, nll=metrics.negative_log_likelihood,
                 ece=metrics.expected_calibration_error)
    for name, function in plain.items():
        assert function(PROB, LABEL) == pytest.approx(expected[name], abs=1e-9)


def test_mcc_is_zero_without_a_denominator_and_right_for_huge_counts():
    assert metrics.mcc(10, 0, 0, 0) == metrics.mcc(0, 5, 0, 5) == 0
    assert metrics.mcc(3, 4, 0, 0) == 1 and metrics.mcc(0, 0, 3, 4) == -1
    # int64 products overflow
    assert metrics.mcc(10 ** 6, 10 ** 6, 0, 10 ** 6) == pytest.approx(0.5, rel=1e-12)
    assert metrics.mcc(*np.full((4, 2, 3), 7)).shape == (2, 3)
    tpr = tnr = 0.95
    shifted = [metrics.mcc_at_prior(tpr, tnr, prior) for prior in (0.5, 0.8, 0.9)]
    assert shifted == pytest.approx([0.9, 0.855, 0.778], abs=1e-3)


def slow_mcc(label, predicted):
    return np.corrcoef(label, predicted)[0, 1] if 0 < predicted.sum() < len(predicted) else 0


def test_mcc_sweep_equals_a_loop_and_the_golden_optimum():
    out = metrics.mcc_sweep(PROB, LABEL)
    assert (out["mcc"], out["index"]) == (pytest.approx(0.5359164350, abs=1e-10), 2771)
    assert out["threshold"] == pytest.approx(0.5543108622, abs=1e-10)
    assert out["exact_mcc"] == pytest.approx(0.5359164350, abs=1e-10)
    curve = metrics.mcc_sweep(PROB, LABEL, 101)["curve"]
    slow = [slow_mcc(LABEL, (PROB >= t).astype(int)) for t in np.linspace(0, 1, 101)]
    np.testing.assert_allclose(curve["mcc"], slow, atol=1e-12)
    assert np.array_equal(curve["tp"], [(LABEL[PROB >= t] == 1).sum() for t in curve["threshold"]])
    assert np.array_equal(curve["tp"] + curve["tn"] + curve["fp"] + curve["fn"], np.full(101, 2000))


def test_mcc_sweep_takes_the_middle_of_the_best_run_and_sees_between_the_grid():
    out = metrics.mcc_sweep([0.2, 0.2, 0.8, 0.8], [0, 0, 1, 1], 11)  # every cut from 0.3 to 0.8 is perfect
    assert out["mcc"] == 1 and out["threshold"] == pytest.approx(0.5)
    # as good at 0.2 and 0.3 as from 0.5 to 0.9
    two = metrics.mcc_sweep([0.15, 0.35, 0.45, 0.95], [0, 1, 0, 1], 11)
    assert two["threshold"] == pytest.approx(0.7)
    crowded = metrics.mcc_sweep([1e-6, 2e-6, 3e-6, 4e-6], [0, 0, 1, 1], 11)
    assert crowded["mcc"] == 0 and crowded["exact_mcc"] == 1
    assert crowded["exact_threshold"] == pytest.approx(2.5e-6)


def test_mcc_sweep_at_another_prior_equals_a_reweighted_sample():
    # 580 * 142 = 1420 * 58
    balanced = np.concatenate([np.flatnonzero(LABEL)] * 142 + [np.flatnonzero(LABEL == 0)] * 58)
    a = metrics.mcc_sweep(PROB, LABEL, 201, prior=0.5)
    b = metrics.mcc_sweep(PROB[balanced], LABEL[balanced], 201)
    np.testing.assert_allclose(a["curve"]["mcc"], b["curve"]["mcc"], atol=1e-12)
    assert a["threshold"] == b["threshold"]


def test_areas_with_ties_equal_their_definitions():
    rs = np.random.RandomState(0)
    score, label = rs.randint(0, 6, 80) / 5, rs.randint(0, 2, 80)
    positive, negative = score[label == 1][:, None], score[label == 0]
    pairs = ((positive > negative) + 0.5 * (positive == negative)).mean()
    assert metrics.roc_auc(score, label) == pytest.approx(pairs, abs=1e-12)
    area = before = 0
    for cut in sorted(set(score), reverse=True):
        chosen = label[score >= cut]
        recall = chosen.sum() / label.sum()
        area, before = area + (recall - before) * chosen.mean(), recall
    assert metrics.average_precision(score, label) == pytest.approx(area, abs=1e-12)
    both = metrics.binary_metrics(score, label)()
    assert (both["roc_auc"], both["average_precision"]) == pytest.approx((pairs, area), abs=1e-12)
    assert np.isnan(metrics.roc_auc([0.1, 0.2], [1, 1])) and np.isnan(metrics.average_precision([0.1], [0]))


def test_bad_scores_and_labels_are_one_clear_line():
    for prob, label, message in (([0.1], [0, 1], "1 scores and 2 labels"),
                                 ([np.nan], [0], "1 scores are not finite"),
                                 ([0.5], [2], "labels must be 0 or 1")):
        with pytest.raises(ValueError, match=message):
            metrics.roc_auc(prob, label)
    with pytest.raises(ValueError, match="span -3 to 2, expected 0 to 1"):
        metrics.expected_calibration_error([-3., 2.], [0, 1])


# --- calibration ---------------------------------------------------------

def test_calibration_errors_equal_three_bins_by_hand():
    # bins: .1 .3 | .5 | .7 .9 1.0, gaps .3 .5 .2
    prob, label = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0], [0, 1, 1, 0, 1, 1]
    ece = metrics.expected_calibration_error
    assert ece(prob, label, 3) == pytest.approx((2 * 0.3 + 0.5 + 3 * 0.2) / 6)
    assert ece(prob, label, 3, norm="max") == pytest.approx(0.5)
    assert ece(prob, label, 3, norm="l2") == pytest.approx(np.sqrt((2 * 0.09 + 0.25 + 3 * 0.04) / 6))
    # equal mass: .1 .3 | .5 .7 | .9 1.0
    assert ece(prob, label, 3, "mass") == pytest.approx((2 * 0.3 + 2 * 0.1 + 2 * 0.05) / 6)
    # confidence .9 .7 .5 .7 .9 1.0, right 1 0 1 0 1 1
    assert ece(prob, label, 3, kind="top") == pytest.approx((0.5 + 5 * abs(3 / 5 - 4.2 / 5)) / 6)
    table = metrics.reliability(prob, label, 4)
    assert table["count"].tolist() == [1, 1, 2, 2] and table["label"].tolist() == [0, 1, 0.5, 1]
    assert ece(np.full(1000, 0.7), np.arange(1000) < 700) == pytest.approx(0, abs=1e-12)


def test_equal_mass_bins_keep_ties_together():
    prob = np.repeat([0.2, 0.6, 0.9], [50, 30, 20])
    table = metrics.reliability(prob, np.zeros(100, int), 10, "mass")
    assert table["count"][table["count"] > 0].tolist() == [50, 30, 20]


def test_multiclass_errors_reduce_to_the_binary_ones():
    two = np.c_[1 - PROB, PROB]
    ece = metrics.expected_calibration_error
    assert ece(two, LABEL) == pytest.approx(ece(PROB, LABEL, kind="top"), abs=1e-12)
    mean = (ece(PROB, LABEL) + ece(1 - PROB, 1 - LABEL)) / 2
    assert ece(two, LABEL, kind="classwise") == pytest.approx(mean, abs=1e-12)


def test_debiased_error_of_a_calibrated_predictor_is_nearer_zero():
    errors = []
    for seed in range(20):
        rs = np.random.RandomState(seed)
        prob = rs.rand(2000)
        label = rs.rand(2000) < prob
        errors.append([metrics.expected_calibration_error(prob, label, norm="l2", debias=d)
                       for d in (False, True)])
    rough, fair = np.mean(errors, 0)
    assert rough == pytest.approx((15 / 2000 / 6) ** 0.5, rel=0.1)                     # E p (1 - p) = 1/6
    assert fair < 0.5 * rough


def test_sweep_error_stops_at_the_last_monotone_binning():
    assert metrics.sweep_calibration_error([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == pytest.approx(0.15)
    # one bin only
    assert metrics.sweep_calibration_error([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]) == pytest.approx(0)


@pytest.mark.parametrize("n, mean, p95", [(200, 0.075, 0.097), (1000, 0.034, 0.046), (5000, 0.015, 0.020)])
def test_noise_floor_equals_the_measured_table(n, mean, p95):
    """Calibrated predictors with p ~ Beta(1/2, 1/2); one draw of p moves the mean by a few percent."""
    floor = metrics.calibration_noise_floor(np.random.RandomState(1).beta(0.5, 0.5, n))
    assert (floor["mean"], floor["p95"]) == pytest.approx((mean, p95), rel=0.08)


def test_noise_floor_rejects_the_uncalibrated_and_keeps_the_calibrated():
    assert metrics.calibration_noise_floor(PROB, LABEL)["p_value"] == pytest.approx(1 / 1001)
    rs = np.random.RandomState(3)
    values = []
    for seed in range(40):
        prob = rs.rand(300)
        floor = metrics.calibration_noise_floor(prob, rs.rand(300) < prob, draws=100, seed=seed)
        values.append(floor["p_value"])
    assert 0.35 < np.mean(values) < 0.65  # uniform: 0.5 +- 3 standard errors of 0.046


# --- bootstrap -----------------------------------------------------------

def test_weighted_metrics_equal_metrics_of_the_repeated_items():
    """A weight is a number of copies. Equal-mass bins stay those of the data, so they are summed by hand."""
    prob = np.round(PROB[:300], 2)                                       # with ties
    label, rs = LABEL[:300], np.random.RandomState(0)
    weights = rs.multinomial(300, np.full(300, 1 / 300), 20)
    fast = metrics.binary_metrics(prob, label, 0.4)(weights)
    for row, w in enumerate(weights):
        p, y = np.repeat(prob, w), np.repeat(label, w)
        hit = (p >= 0.4).astype(int)
        tp, tn, fp, fn = (int(((hit == a) & (y == b)).sum()) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
        ece = metrics.expected_calibration_error
        slow = dict(accuracy=(hit == y).mean(), precision=tp / (tp + fp), recall=tp / (tp + fn),
                    specificity=tn / (tn + fp), f1=2 * tp / (2 * tp + fp + fn),
                    balanced_accuracy=(tp / (tp + fn) + tn / (tn + fp)) / 2,
                    mcc=slow_mcc(y, hit), mcc_prior50=metrics.mcc_at_prior(tp / (tp + fn), tn / (tn + fp)),
                    fnr=fn / (tp + fn), fpr=fp / (tn + fp), roc_auc=metrics.roc_auc(p, y),
                    average_precision=metrics.average_precision(p, y), brier=metrics.brier_score(p, y),
                    nll=metrics.negative_log_likelihood(p, y), ece=ece(p, y), ece_top=ece(p, y, kind="top"),
                    mce=ece(p, y, norm="max"))
        assert {k: fast[k][row] for k in slow} == pytest.approx(slow, abs=1e-12)
        bins = classify._bins(prob, 15, "mass")
        gaps = np.bincount(bins, w * (label - prob), 15)
        assert fast["ece_mass"][row] == pytest.approx(np.abs(gaps).sum() / 300, abs=1e-12)


def mean_of(x):
    return lambda w: dict(mean=w @ x / w.sum(1))


def test_percentile_intervals_cover_as_often_as_they_say():
    """1000 experiments: a standard error of 0.007 around the 0.945 that 200 items give."""
    rs = np.random.RandomState(0)
    hits = []
    for seed in range(1000):
        out = metrics.bootstrap(mean_of(rs.standard_normal(200)), 200, resamples=500, seed=seed)["mean"]
        hits.append(out["lower"] <= 0 <= out["upper"])
    assert 0.93 < np.mean(hits) < 0.97


@pytest.mark.parametrize("method, golden", [("percentile", (0.855325, 1.089243)),
                                            ("BCa", (0.860806, 1.096118))])
def test_intervals_equal_scipys_digit_for_digit(method, golden):
    """The draws of the same generator in the same order, so this is no matter of chance."""
    z = np.random.RandomState(9).exponential(size=200)
    out = metrics.bootstrap(mean_of(z), 200, resamples=9999, method=method.lower(), seed=0)["mean"]
    theirs = scipy.stats.bootstrap((z,), np.mean, method=method, rng=np.random.default_rng(0))
    ends = theirs.confidence_interval
    assert (out["lower"], out["upper"]) == pytest.approx((ends.low, ends.high), rel=1e-12)
    assert (out["lower"], out["upper"]) == pytest.approx(golden, abs=1e-6)
    assert (out["value"], out["std"]) == pytest.approx((z.mean(), theirs.standard_error), rel=1e-12)
    with pytest.raises(ValueError, match="'percentile' or 'bca', not 'bc'"):
        metrics.bootstrap(mean_of(z), 200, method="bc")


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_dependent_items_widen_the_interval_only_when_grouped(method):
    x = np.repeat(np.random.RandomState(0).standard_normal(50), 20)     # 50 videos of 20 equal frames
    group = np.repeat([f"video{i}" for i in range(50)], 20)
    alone, grouped = (metrics.bootstrap(mean_of(x), 1000, g, method=method)["mean"] for g in (None, group))
    assert grouped["std"] == pytest.approx(x.std() / 50 ** 0.5, rel=0.1)
    assert alone["std"] == pytest.approx(x.std() / 1000 ** 0.5, rel=0.1)
    assert grouped["upper"] - grouped["lower"] > 4 * (alone["upper"] - alone["lower"])


def test_paired_differences_see_the_same_resamples():
    better = np.clip(PROB + 0.05 * (LABEL - 0.5), 0, 1)
    one, two = metrics.binary_metrics(better, LABEL), metrics.binary_metrics(PROB, LABEL)

    def difference(w):
        a, b = one(w), two(w)
        return {name: a[name] - b[name] for name in ("roc_auc", "brier")}

    pair = metrics.bootstrap(difference, 2000, resamples=300)
    single = metrics.bootstrap(two, 2000, resamples=300)
    assert pair["roc_auc"]["lower"] > 0 > pair["brier"]["upper"]
    assert pair["roc_auc"]["std"] < 0.2 * single["roc_auc"]["std"]


def test_resamples_of_one_class_are_left_out_of_areas_and_counted():
    out = metrics.bootstrap(metrics.binary_metrics([0.1, 0.4, 0.8], [0, 0, 1]), 3, resamples=1000)
    expected = 1000 * (8 + 1) / 27                               # no positive, or nothing else; 4 deviations
    assert out["roc_auc"]["undefined"] == pytest.approx(expected, abs=4 * 15)
    assert out["roc_auc"]["lower"] == 1
    assert out["mcc"]["undefined"] == 0


# --- benchmark -----------------------------------------------------------

def test_bench_writes_its_record(tmp_path):
    from eval import bench_metrics
    assert bench_metrics.main(["--small", "--only", "frechet", "neighbours", "--rounds", "1",
                               "--json", str(tmp_path / "b.json")]) == 0
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert set(record["cases"]) == {"frechet", "neighbours"}
    for case in record["cases"].values():
        assert case["agree"] and case["value"] > 0 and len(case["ratios"]) == 1
