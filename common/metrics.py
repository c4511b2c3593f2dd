"""Numbers that say how close generated samples are to real ones: features in, floats out.

Everything is float64 unless it says otherwise, and takes arrays or tensors of shape [rows, features].
Neighbour searches are in common/neighbours.py, scores of classifiers in common/classify.py, the networks that
make features in common/inception.py and common/dino.py; `from common.metrics import X` finds them too.

N rows of real data  M rows of fake data  D features  K classes or neighbours
"""

import json
import math
import os
import warnings
import zipfile

import numpy as np
import scipy
import torch

# One import for every measure; these names are defined elsewhere.
from common.bootstrap import bootstrap  # noqa: F401
from common.classify import (average_precision, binary_metrics, brier_score,  # noqa: F401
                             calibration_noise_floor, expected_calibration_error, mcc, mcc_at_prior,
                             mcc_sweep, negative_log_likelihood, reliability, roc_auc,
                             sweep_calibration_error)
from common.dino import DinoV3  # noqa: F401
from common.files import read_npz
from common.inception import InceptionV3  # noqa: F401
from common.neighbours import double as _double
from common.neighbours import manifold_metrics, nearest_neighbours, precision_recall  # noqa: F401


# --- Frechet distance ----------------------------------------------------

def _factor(cov):
    """L [D, rank] with L L^T = cov.

    Pivoted Cholesky stops at the numerical rank, so a covariance from fewer rows than features costs nothing
    in accuracy, and small eigenvalues keep their relative precision. Statistics stored in float32 may be
    slightly indefinite, where Cholesky means nothing: then negative eigenvalues are clipped instead.
    """
    packed, pivot, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
    L = np.empty((len(cov), rank))
    L[pivot - 1] = np.tril(packed)[:, :rank]
    if rank < len(cov) and np.linalg.norm(cov - L @ L.T) > 1e-9 * np.linalg.norm(cov):
        value, vector = np.linalg.eigh(cov)
        L = vector * np.sqrt(value.clip(0))
    return L


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2) -> float; mu [D], cov [D, D].

    With cov = L L^T the last trace is the sum of the singular values of L1^T L2, taken here as square roots
    of symmetric eigenvalues. May come out as -1e-12 for equal inputs. Raises ValueError on shapes that do not
    match or values that are not finite.
    """
    mu1, cov1, mu2, cov2 = (_double(x).cpu().numpy() for x in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != mu1.shape * 2:
        raise ValueError(f"features do not match: means {mu1.shape} and {mu2.shape}, "
                         f"covariances {cov1.shape} and {cov2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("means or covariances are not finite: fewer than 2 rows, or features with nan")
    cross = _factor(cov1).T @ _factor(cov2)
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    root = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def frechet_bias(cov, n, m=np.inf):
    """Distance between n and m rows of ONE Gaussian on average: what sampling alone adds to a score -> float.

    To first order in 1/n: (1/n + 1/m) (tr S + 1/2 sum_ij l_i l_j / (l_i + l_j)), l the eigenvalues of S.
    """
    value = np.linalg.eigvalsh(_double(cov).cpu().numpy()).clip(1e-300)
    curvature = 0.5 * sum(float((v * value / (v + value)).sum()) for v in value)
    return float((1 / n + 1 / m) * (value.sum() + curvature))


def frechet_infinity(features_ND, mu, cov, points=15, seed=0):
    """Distance to (mu, cov) extrapolated to infinitely many rows (FID_inf, arXiv 1911.07023) -> float.

    Fits a line in 1 / size to the distances of random subsets of `points` sizes, min(5000, N / 10) to N.
    """
    x = _double(features_ND)
    rng = np.random.RandomState(seed)
    sizes = np.linspace(min(5000, len(x) // 10), len(x), points).astype(int)
    values = []
    for size in sizes:
        part = Moments(x.shape[1]).update(x[rng.choice(len(x), size, replace=False)])
        values.append(frechet_distance(part.mean, part.cov, mu, cov))
    return float(np.polyfit(1 / sizes, values, 1)[1])


class Moments:
    """Mean and covariance of a stream of rows in constant memory: (n, mean, M2) in float64, Chan's update.

    n is None for statistics from a file that does not say how many rows made them; those do not merge.
    """

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x_ND):
        """Add rows. Returns self. Raises ValueError on another width or on values that are not finite."""
        x_ND = _double(x_ND).to(self._mean.device)
        if x_ND.ndim != 2 or x_ND.shape[1] != len(self._mean):
            raise ValueError(f"features are {tuple(x_ND.shape)}, expected [rows, {len(self._mean)}]")
        if not torch.isfinite(x_ND).all():
            raise ValueError("features are not finite")
        if len(x_ND):
            mean = x_ND.mean(0)
            self._shift(len(x_ND), mean)
            centred = x_ND - mean
            self._m2.addmm_(centred.T, centred)
        return self

    def merge(self, other):
        """Add another Moments. Returns self."""
        if len(other._mean) != len(self._mean):
            raise ValueError(f"features do not match: {len(self._mean)} and {len(other._mean)} wide")
        self._shift(other.n, other._mean.to(self._mean.device))
        self._m2 += other._m2.to(self._mean.device)
        return self

    def _shift(self, n, mean):
        """Move count and mean to include n rows with this mean; M2 still lacks their scatter."""
        if self.n is None or n is None:
            raise ValueError("statistics without a count n cannot be merged or updated")
        delta, total = mean - self._mean, max(self.n + n, 1)
        self._m2.addr_(delta, delta, alpha=self.n * n / total)
        self._mean += delta * (n / total)
        self.n += n

    def all_reduce(self, group=None):
        """Every rank ends with the moments of all ranks' rows. Returns self."""
        import torch.distributed as dist
        total = torch.tensor([float(self.n)], dtype=torch.float64, device=self._mean.device)
        dist.all_reduce(total, group=group)
        mean = self._mean * (self.n / total.clamp_min(1))
        dist.all_reduce(mean, group=group)
        delta = self._mean - mean
        self._m2.addr_(delta, delta, alpha=self.n)
        dist.all_reduce(self._m2, group=group)
        self.n, self._mean = int(total), mean
        return self

    @property
    def mean(self):
        """[D]."""
        return self._mean.cpu().numpy().copy()

    @property
    def cov(self):
        """[D, D] with divisor n - 1; nan below two rows."""
        if self.n is None:
            return self._m2.cpu().numpy().copy()
        return self._m2.cpu().numpy() / (self.n - 1) if self.n > 1 else np.full(self._m2.shape, np.nan)

    def distance(self, reference):
        """Frechet distance to another Moments; warns, with the bias, when rows are fewer than features."""
        value = frechet_distance(self.mean, self.cov, reference.mean, reference.cov)
        for part in (self, reference):
            if part.n is not None and part.n <= len(self._mean):
                bias = frechet_bias(reference.cov, part.n)
                warnings.warn(f"{part.n} rows for {len(self._mean)} features: two samples of one Gaussian "
                              f"with the reference covariance would be about {bias:.3g} apart by "
                              "sampling alone", stacklevel=2)
        return value

    def save(self, npz, meta=None, spatial=None):
        """Write mu, sigma (what pytorch-fid, ADM, EDM and MeanFlow read), n and meta (JSON).

        spatial: the sFID Moments, written as mu_s, sigma_s as ADM does.
        """
        arrays = dict(mu=self.mean, sigma=self.cov, meta=np.array(json.dumps(meta or {})))
        if self.n is not None:
            arrays["n"] = np.array(self.n)
        if spatial is not None:
            arrays.update(mu_s=spatial.mean, sigma_s=spatial.cov)
        part = f"{npz}.tmp"
        with open(part, "wb") as f:
            np.savez(f, **arrays)
        os.replace(part, npz)

    @classmethod
    def load(cls, npz, spatial=False):
        """From keys mu, sigma or ref_mu, ref_sigma; with spatial mu_s, sigma_s. ValueError if absent."""
        z = read_npz(npz)
        pairs = [("mu_s", "sigma_s")] if spatial else [("mu", "sigma"), ("ref_mu", "ref_sigma")]
        found = [(z[a], z[b]) for a, b in pairs if a in z and b in z]
        if not found:
            raise ValueError(f"{npz} holds {', '.join(sorted(z))}; "
                             f"expected {' or '.join(' and '.join(p) for p in pairs)}")
        counted = "n" in z and not spatial and z["n"].dtype.kind in "iu" and z["n"].ndim == 0
        n = int(z["n"]) if counted else None
        if any(x.dtype.kind not in "fiu" for x in found[0]):
            raise ValueError(f"{npz}: {found[0][0].dtype} and {found[0][1].dtype} are no numbers")
        mu, sigma = (torch.from_numpy(np.asarray(x, np.float64)) for x in found[0])
        if mu.ndim != 1 or sigma.shape != mu.shape * 2:
            raise ValueError(f"{npz}: mean {tuple(mu.shape)}, covariance {tuple(sigma.shape)} do not fit")
        moments = cls(len(mu))
        moments.n, moments._mean = n, mu
        moments._m2 = sigma if n is None else sigma * (n - 1)
        return moments


def npz_images(npz, batch=64, key="arr_0"):
    """Yield uint8 [<= batch, 3, H, W] from the [N, H, W, 3] array of an ADM sample or reference file.

    Reads a batch at a time out of the zip member (the ImageNet file holds 2 GB). Raises ValueError when the
    member is not such an array.
    """
    with zipfile.ZipFile(npz) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if key not in names:
            raise ValueError(f"{npz} holds no {key}, only {', '.join(names)}")
        with archive.open(f"{key}.npy") as f:
            version = np.lib.format.read_magic(f)[0]
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(f)
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"{npz}: {key} is {dtype} {shape}, expected uint8 [N, H, W, 3]")
            for start in range(0, shape[0], batch):
                size = (min(batch, shape[0] - start), *shape[1:])
                data = f.read(math.prod(size))
                if len(data) < math.prod(size):
                    raise ValueError(f"{npz} is truncated: {key} ends before image {start + size[0]}")
                yield torch.from_numpy(np.frombuffer(data, np.uint8).reshape(size).copy()).permute(0, 3, 1, 2)


# --- scores of logits and of feature sets --------------------------------

def inception_score(logits_NK, splits=10, seed=2020):
    """exp(mean KL(p(y|x) || p(y))) per split -> (mean, std) over splits.

    The field scores logits without the bias of the last layer. Rows are first permuted by RandomState(seed),
    as torch-fidelity and the drifting evaluation do; seed None keeps their order.
    """
    log_p = torch.log_softmax(_double(logits_NK).cpu(), 1)
    if not 0 < splits <= len(log_p):
        raise ValueError(f"{len(log_p)} rows do not make {splits} splits")
    if seed is not None:
        log_p = log_p[np.random.RandomState(seed).permutation(len(log_p))]
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits:(i + 1) * len(log_p) // splits]
        log_marginal = torch.logsumexp(part, 0) - np.log(len(part))
        scores.append(float((part.exp() * (part - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(real_ND, fake_MD, subsets=100, subset_size=1000, seed=0):
    """KID: unbiased MMD^2 with kernel (x.y / D + 1)^3 over random subsets -> (mean, std), not times 1000.

    May be negative. Draws its subsets as torch-fidelity does, so equal features give equal digits. Raises
    ValueError when a set is smaller than a subset.
    """
    real_ND, fake_MD = _double(real_ND), _double(fake_MD)
    size, dim = subset_size, real_ND.shape[1]
    if size > min(len(real_ND), len(fake_MD)):
        smaller = min(len(real_ND), len(fake_MD))
        raise ValueError(f"subset_size {size} exceeds the {smaller} rows of the smaller set")

    def kernel(a, b):
        return (a @ b.T).div_(dim).add_(1).pow_(3)

    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = real_ND[rng.choice(len(real_ND), size, replace=False)]
        y = fake_MD[rng.choice(len(fake_MD), size, replace=False)]
        within = sum(float(k.sum() - k.trace()) for k in (kernel(x, x), kernel(y, y)))
        values.append(within / (size * (size - 1)) - 2 * float(kernel(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


def cmmd(real_ND, fake_MD, sigma=10., scale=1000.):
    """CMMD (arXiv 2401.09603) of CLIP embeddings -> float.

    Biased MMD^2 of the unit rows with kernel exp(-|x - y|^2 / 2 sigma^2), times scale.
    """
    x, y = (torch.nn.functional.normalize(_double(z), dim=1) for z in (real_ND, fake_MD))

    def mean_kernel(a, b):
        total = sum(((part @ b.T - 1) / sigma ** 2).exp().sum() for part in a.split(4096))
        return float(total) / (len(a) * len(b))

    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
