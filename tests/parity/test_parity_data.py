"""common/images.py and common/imagenet.py against torchvision: RandomResizedCrop, the devkit's labels, the
whole ImageNet."""

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

torchvision = pytest.importorskip("torchvision")

from torchvision.datasets import ImageNet  # noqa: E402
from torchvision.datasets import imagenet as theirs  # noqa: E402
from torchvision.transforms import InterpolationMode, RandomResizedCrop  # noqa: E402
from torchvision.transforms.functional import resized_crop  # noqa: E402

from common import images  # noqa: E402
from common.data import open_images  # noqa: E402
from common.images import center_crop, crop_box, random_resized_crop  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_imagenet import archives, prepare  # noqa: E402, F401


def test_crop_boxes_have_the_same_distribution():
    torch.manual_seed(0)
    rng, image = np.random.default_rng(0), Image.new("RGB", (300, 200))
    n = 4000
    ours = np.array([crop_box(300, 200, rng) for _ in range(n)])                    # left, top, w, h
    peer = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    peer = peer[:, [1, 0, 3, 2]]                                                    # from top, left, h, w
    for name, f in dict(left=lambda b: b[:, 0], top=lambda b: b[:, 1], area=lambda b: b[:, 2] * b[:, 3],
                        aspect=lambda b: b[:, 2] / b[:, 3]).items():
        assert scipy.stats.ks_2samp(f(ours), f(peer)).pvalue > 1e-3, name  # one false alarm in 250 seeds
    for size in ((1000, 10), (10, 1000)):  # ten tries fail: the same centre
        top, left, h, w = RandomResizedCrop.get_params(Image.new("RGB", size), (0.2, 1.0), (3 / 4, 4 / 3))
        assert crop_box(*size, rng) == (left, top, w, h)


def test_the_crop_of_a_box_has_the_same_pixels(monkeypatch):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8))
    for left, top, w, h in ((0, 0, 120, 90), (13, 7, 40, 50), (100, 80, 20, 10)):
        monkeypatch.setattr(images, "crop_box", lambda *a, box=(left, top, w, h): box)
        expected = resized_crop(image, top, left, h, w, [32, 32], InterpolationMode.BICUBIC)
        assert np.array_equal(np.asarray(random_resized_crop(image, 32, None)), np.asarray(expected))


def test_prepared_archives_equal_torchvisions_imagenet(archives, tmp_path, monkeypatch):  # noqa: F811
    """Both read the same three archives; every crop and its WordNet id must agree, in train and in val."""
    prepare(archives, tmp_path / "ours")
    (tmp_path / "peer").mkdir()
    meta = dict(theirs.ARCHIVE_META)
    for kind, name in dict(train="ILSVRC2012_img_train.tar", val="ILSVRC2012_img_val.tar",
                           devkit="ILSVRC2012_devkit_t12.tar.gz").items():
        source = archives / (name + (".1" if kind == "train" else ""))
        shutil.copy(source, tmp_path / "peer" / name)
        meta[kind] = (name, hashlib.md5(source.read_bytes()).hexdigest())
    monkeypatch.setattr(theirs, "ARCHIVE_META", meta)
    for split, count in dict(train=30, val=6).items():
        peer = ImageNet(tmp_path / "peer", split)
        expected = []
        for path, label in peer.samples:
            try:
                crop = center_crop(Image.open(path).convert("RGB"), 32)
            except OSError:  # the image that is cut off
                continue
            expected.append((peer.wnids[label], np.asarray(crop).tobytes()))
        ours = open_images(tmp_path / "ours", size=32, split="train" if split == "train" else "test")
        got = [(ours.classes[ours.labels[i]], ours.get(i).tobytes()) for i in range(len(ours))]
        assert sorted(got) == sorted(expected) and len(got) == count
