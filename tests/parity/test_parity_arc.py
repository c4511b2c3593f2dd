"""PCA, t-SNE and trustworthiness against scikit-learn."""

import numpy as np
import pytest

from common.arc import embed

decomposition = pytest.importorskip("sklearn.decomposition")
manifold = pytest.importorskip("sklearn.manifold")


def blobs(n=300):
    rs = np.random.RandomState(0)
    centre, label = rs.standard_normal((5, 10)) * 4, np.arange(n) % 5
    return centre[label] + rs.standard_normal((n, 10))


def latents(n=300):
    """Skewed, correlated, heavy-tailed: more like posterior means than clusters are."""
    rs = np.random.RandomState(1)
    mixed = rs.standard_normal((n, 30)) @ rs.standard_normal((30, 30))
    return (mixed * 0.3 + rs.standard_t(4, (n, 30))) * np.linspace(0.2, 2, 30)


@pytest.mark.parametrize("x", [blobs(), latents(), latents(20)], ids=["blobs", "latents", "wide"])
def test_pca_equals_scikit_learn(x):
    k = min(x.shape) - 1
    want = decomposition.PCA(k, svd_solver="full").fit(x)
    mean, axes, share = embed.pca(x, k)
    sign = np.sign((axes * want.components_).sum(1))[:, None]
    assert np.abs(mean - want.mean_).max() < 1e-12 and np.abs(axes - sign * want.components_).max() < 1e-6
    assert np.abs(share - want.explained_variance_ratio_).max() < 1e-12


def test_tsne_probabilities_equal_scikit_learn():
    from sklearn.manifold._t_sne import _joint_probabilities
    x = blobs()
    squared = ((x[:, None] - x[None])**2).sum(-1)
    want = _joint_probabilities(squared.astype(np.float32), 30, 0)
    got = embed.joint_probabilities(x, 30)
    got = got[np.triu_indices(300, 1)]
    # scikit-learn works in float32 and bisects to 1e-5 in entropy
    assert np.abs(got - want).max() < 2e-8


@pytest.mark.parametrize("x", [blobs(), latents()], ids=["blobs", "latents"])
def test_tsne_reaches_the_divergence_of_scikit_learn(x):
    reference = manifold.TSNE(perplexity=30, method="exact", init="pca", learning_rate="auto", random_state=0)
    theirs = reference.fit_transform(x)
    ours, cost = embed.tsne(x, 30)
    P = np.maximum(embed.joint_probabilities(x, 30), 1e-12)
    want = embed.tsne_gradient(P, theirs.astype(np.float64))[1]     # both maps under one definition
    assert abs(want - reference.kl_divergence_) < 0.01 * want
    assert cost <= 1.05 * want                  # within 5 %, or lower
    quality = [manifold.trustworthiness(x, y, n_neighbors=10) for y in (ours, theirs)]
    assert quality[0] >= quality[1] - 0.01
