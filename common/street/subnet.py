"""The competition's side: how its validator distorts an image, how it rewards, and the number a miner
returns.

Facts from github.com/natixnetwork/streetvision-subnet at 28a1755: image_transforms.py, reward.py,
miner_performance_tracker.py.  The cut is fixed at 0.5, labels are balanced, and abstaining earns nothing.
"""

import io

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from PIL import Image

from common.classify import mcc


def natix_perturb(image, level, rng, size=224):
    """The validator's distortion of level 0..3: PIL RGB -> PIL RGB of size x size, through one JPEG encode.

    rng: numpy Generator.  0 centre square crop; 1 rotation and random crop; 2 also saturation, contrast and
    down-and-up scaling of strength 0..1; 3 strengths 0..2 and noise and blur.  (Its flips never fire.)
    """
    if level not in (0, 1, 2, 3):
        raise ValueError(f"level must be 0..3, not {level!r}")
    image = image.convert("RGB")
    if level == 0:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BILINEAR)
    else:
        image = image.rotate(rng.uniform(-20, 20), Image.NEAREST)
        side = max(1, min(round((image.width * image.height * rng.uniform(0.2, 1.0)) ** 0.5), *image.size))
        left, top = (int(rng.integers(n - side + 1)) for n in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BILINEAR)
    # each operation draws 0 .. strength - 1
    strength = {2: 2, 3: 3}.get(level, 1)
    saturation, contrast, codec, noise, blur = (
        int(rng.integers(strength if k < 3 or level == 3 else 1)) for k in range(5))
    x = np.asarray(image.convert("YCbCr"), np.float32)
    if saturation:
        x = x.copy()
        x[..., 1:] = 128 + (x[..., 1:] - 128) * (0.4, 0.3)[saturation - 1]
    if contrast:
        x = _bytes(_rgb(x)).astype(np.float32) * (0.85, 0.725)[contrast - 1]
        x = np.asarray(Image.fromarray(_bytes(x)).convert("YCbCr"), np.float32)
    if noise:
        x = x + rng.normal(0, (0.001, 0.002)[noise - 1] ** 0.5, x.shape).astype(np.float32) * 255
    image = Image.fromarray(_bytes(_rgb(x)))
    if codec:
        small = size // (codec + 1)
        image = image.resize((small, small), Image.BILINEAR).resize((size, size), Image.BILINEAR)
    if blur:
        kernel = (7, 9)[blur - 1]
        at = torch.arange(kernel) - kernel // 2
        taps = torch.exp(-0.5 * (at / (kernel / 6)) ** 2)
        taps /= taps.sum()
        y = F.pad(torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[:, None], [kernel // 2] * 4,
                  "reflect")
        y = F.conv2d(F.conv2d(y, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[:, 0]
        image = Image.fromarray(_bytes(y.permute(1, 2, 0).numpy()))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return Image.open(buffer).convert("RGB")


def _bytes(x):
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def _rgb(ycbcr):
    return np.asarray(Image.fromarray(_bytes(ycbcr), "YCbCr").convert("RGB"), np.float32)


def returned(prob, threshold):
    """The float to return: sigma(logit p - logit tau), increasing in p, above 0.5 exactly where p >= tau;
    never 0.5.

    prob: number or array in [0, 1].
    """
    p = np.asarray(prob, np.float64)
    tau = np.clip(threshold, 1e-6, 1 - 1e-6)
    out = scipy.special.expit(scipy.special.logit(np.clip(p, 1e-12, 1 - 1e-12)) - scipy.special.logit(tau))
    return np.where(p >= threshold, np.maximum(out, 0.5 + 1e-6), np.minimum(out, 0.5 - 1e-6))[()]


def natix_reward(prediction_N, label_N):
    """(0.5 MCC of the last 100 + 0.5 accuracy of the last 10)^3, MCC floored at 0; predictions of -1 do not
    count.

    Hard answers are numpy.round of the number, so exactly 0.5 means no roadwork.
    """
    p, y = np.asarray(prediction_N, np.float64), np.asarray(label_N)
    if not len(p) or p[-1] == -1 or not 0 <= p[-1] <= 1:
        return 0.0
    p, y = p[-100:], y[-100:]
    p, y = p[p != -1], y[p != -1]
    hard = np.round(p)
    tp, tn = np.sum((hard == 1) & (y == 1)), np.sum((hard == 0) & (y == 0))
    fp, fn = np.sum((hard == 1) & (y == 0)), np.sum((hard == 0) & (y == 1))
    score = max(0.0, float(mcc(tp, tn, fp, fn))) if len(set(y)) > 1 and len(set(hard)) > 1 else 0.0
    return (0.5 * score + 0.5 * float(np.mean(hard[-10:] == y[-10:]))) ** 3


def simulate_reward(prediction_N, label_N, windows=2000, seed=0):
    """Reward of `windows` histories of 100 images, labels balanced as in the competition -> dict(mean, p5,
    p95).

    Images are drawn with replacement within a class; None when a class is absent.
    """
    p, y = np.asarray(prediction_N, np.float64), np.asarray(label_N)
    if len(set(y)) < 2:
        return None
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(y == c) for c in (0, 1)]
    rewards = []
    for _ in range(windows):
        label = rng.integers(0, 2, 100)
        pick = np.where(label, rng.choice(classes[1], 100), rng.choice(classes[0], 100))
        rewards.append(natix_reward(p[pick], label))
    return dict(mean=float(np.mean(rewards)), p5=float(np.quantile(rewards, 0.05)),
                p95=float(np.quantile(rewards, 0.95)))
