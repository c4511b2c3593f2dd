"""Inception-v3 as the FID tools use it, in plain torch, and the two public resize rules.

The FID network is the TensorFlow graph of 2015-12-05. Its PyTorch copy (pt_inception-2015-12-05-6726825d.pth,
published with pytorch-fid; torch-fidelity's weights file is the same) has exactly the key names of
torchvision's Inception-v3, so a wrong forward pass loads without a complaint. What differs from torchvision:
average pools that leave the padding out of the mean, a max pool in the last block, 1008 classes, no auxiliary
head.

N images  C channels  H, W pixels  K classes (1008)
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 299                       # every image is resized to this before the network
SPATIAL_CHANNELS = 7             # sFID keeps the first 7 of 192 channels of a 17x17 map: 2023 numbers


# --- resize --------------------------------------------------------------

def resize_tf(x_NCHW, size=(SIDE, SIDE)):
    """TensorFlow 1.x bilinear resize -> [N, C, *size]. It is inside the FID graph: ADM, torch-fidelity, EDM.

    Source coordinate i * in / out: no half-pixel shift, no anti-aliasing, edge clamp.
    """
    def taps(old, new):
        at = torch.arange(new, device=x_NCHW.device, dtype=x_NCHW.dtype) * (old / new)
        low = at.long().clamp_max(old - 1)
        return low, (low + 1).clamp_max(old - 1), at - low

    top, bottom, fraction_H = taps(x_NCHW.shape[2], size[0])
    left, right, fraction_W = taps(x_NCHW.shape[3], size[1])
    x_NCHW = x_NCHW[..., left] + (x_NCHW[..., right] - x_NCHW[..., left]) * fraction_W
    upper, lower = x_NCHW[:, :, top], x_NCHW[:, :, bottom]
    return upper + (lower - upper) * fraction_H[:, None]


def resize_half_pixel(x_NCHW, size=(SIDE, SIDE)):
    """Bilinear resize with pixel centres at i + 1/2, no anti-aliasing -> [N, C, *size]: pytorch-fid's."""
    return F.interpolate(x_NCHW, size, mode="bilinear", align_corners=False)


# --- network -------------------------------------------------------------

class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """What the mixed blocks share: the pool in front of `branch_pool`. pool: fid_mean | mean | max."""

    def __init__(self, pool="fid_mean"):
        super().__init__()
        self.pool = pool

    def pooled(self, x):
        if self.pool == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.pool == "mean")


class BlockA(Block):
    """Mixed_5b, 5c, 5d at 35x35."""

    def __init__(self, c_in, c_pool, pool):
        super().__init__(pool)
        self.branch1x1 = Unit(c_in, 64)
        self.branch5x5_1, self.branch5x5_2 = Unit(c_in, 48), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(c_in, 64), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(c_in, c_pool)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(self.pooled(x))], 1)


class BlockB(Block):
    """Mixed_6a, 35x35 to 17x17."""

    def __init__(self, c_in):
        super().__init__()
        self.branch3x3 = Unit(c_in, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(c_in, 64), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, 2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, 2)], 1)


class BlockC(Block):
    """Mixed_6b to 6e at 17x17, with 7x7 convolutions split into 1x7 and 7x1."""

    def __init__(self, c_in, c, pool):
        super().__init__(pool)
        wide, tall = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Unit(c_in, 192)
        self.branch7x7_1, self.branch7x7_2 = Unit(c_in, c), Unit(c, c, **wide)
        self.branch7x7_3 = Unit(c, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(c_in, c), Unit(c, c, **tall)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(c, c, **wide), Unit(c, c, **tall)
        self.branch7x7dbl_5 = Unit(c, 192, **wide)
        self.branch_pool = Unit(c_in, 192)

    def forward(self, x):
        y = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(y)), self.branch_pool(self.pooled(x))], 1)


class BlockD(Block):
    """Mixed_7a, 17x17 to 8x8."""

    def __init__(self, c_in):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(c_in, 192), Unit(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(c_in, 192), Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1), padding=(3, 0)), Unit(192, 192, 3, 2)

    def forward(self, x):
        y = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), y, F.max_pool2d(x, 3, 2)], 1)


class BlockE(Block):
    """Mixed_7b and 7c at 8x8, with 3x3 convolutions fanned out into 1x3 beside 3x1."""

    def __init__(self, c_in, pool):
        super().__init__(pool)
        wide, tall = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = Unit(c_in, 320)
        self.branch3x3_1 = Unit(c_in, 384)
        self.branch3x3_2a, self.branch3x3_2b = Unit(384, 384, **wide), Unit(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(c_in, 448), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, **wide), Unit(384, 384, **tall)
        self.branch_pool = Unit(c_in, 192)

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y),
                          self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z),
                          self.branch_pool(self.pooled(x))], 1)


class InceptionV3(nn.Module):
    """net(uint8_NCHW) -> (pool_N2048, logits_NK).

    resize      "tf": resize_tf, then (x - 128) / 128, as ADM, torch-fidelity, EDM
                "half_pixel": resize_half_pixel of x / 255, then 2x - 1, as pytorch-fid
    fid         True: the FID graph. False: torchvision's ImageNet network, 1000 classes, not FID
    comparable  False for that network; a record of its numbers has to say so
    logits      WITHOUT the bias of the last layer, as Inception Scores use them; probabilities need
                net.fc.bias added
    """

    def __init__(self, resize="tf", fid=True):
        super().__init__()
        if resize not in ("tf", "half_pixel"):
            raise ValueError(f"resize must be 'tf' or 'half_pixel', not {resize!r}")
        self.resize, self.comparable = resize, fid
        mean = "fid_mean" if fid else "mean"
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = BlockA(192, 32, mean), BlockA(256, 64, mean)
        self.Mixed_5d, self.Mixed_6a = BlockA(288, 64, mean), BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128, mean), BlockC(768, 160, mean)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160, mean), BlockC(768, 192, mean)
        self.Mixed_7a, self.Mixed_7b = BlockD(768), BlockE(1280, mean)
        self.Mixed_7c = BlockE(2048, "max" if fid else mean)
        self.fc = nn.Linear(2048, 1008 if fid else 1000)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path, resize="tf", imagenet=False):
        """Network in eval mode from a state dict (.pth read with weights_only=True, or .safetensors).

        imagenet: accept torchvision's inception_v3_google-0cc3c7bd.pth as well (net.comparable is then False,
        and a warning says so). Raises ValueError on a 1000-class file without it, on missing or misshapen
        tensors, on a pickled module.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no weights file {path}")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            try:
                state = dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:
                raise ValueError(f"{path} is not a plain state dict; "
                                 "pt_inception-2015-12-05-6726825d.pth is one "
                                 f"({(str(error) or type(error).__name__).splitlines()[0][:80]})") from error
        state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
        classes = state["fc.weight"].shape[0] if "fc.weight" in state else None
        if classes == 1000 and not imagenet:
            raise ValueError(f"{path} is torchvision's 1000-class ImageNet network, not the 1008-class FID "
                             "network: its distances are not FID and compare with no published number; pass "
                             "imagenet=True to use it anyway")
        net = cls(resize, fid=classes != 1000)
        missing, unexpected = net.load_state_dict(_reject_shapes(net, state, path), strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # unused in eval mode
        if missing or unexpected:
            raise ValueError(f"{path} is no Inception-v3: missing {missing[:3]}, unexpected {unexpected[:3]}")
        if not net.comparable:
            warnings.warn("torchvision's ImageNet Inception: distances are NOT FID and not comparable",
                          stacklevel=2)
        return net.to(memory_format=torch.channels_last)         # a third faster on CPU, same numbers

    def preprocess(self, image_NCHW):
        """uint8 [N, 3, H, W] -> [N, 3, 299, 299] in about [-1, 1], in the dtype of the weights."""
        if image_NCHW.dtype != torch.uint8 or image_NCHW.ndim != 4 or image_NCHW.shape[1] != 3:
            raise ValueError(f"expected uint8 [N, 3, H, W], got {image_NCHW.dtype} {tuple(image_NCHW.shape)}")
        x_NCHW = image_NCHW.to(self.fc.weight.dtype)
        if self.resize == "tf":
            return (resize_tf(x_NCHW) - 128) / 128
        return resize_half_pixel(x_NCHW / 255) * 2 - 1

    def features(self, image_NCHW):
        """uint8 [N, 3, H, W] -> dict(pool [N, 2048], logits [N, K], spatial [N, 2023] for sFID)."""
        x = self.preprocess(image_NCHW)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]        # TensorFlow's mixed_6/conv
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return dict(pool=pool, logits=pool @ self.fc.weight.T, spatial=spatial.flatten(1))

    def forward(self, image_NCHW):
        out = self.features(image_NCHW)
        return out["pool"], out["logits"]


def _reject_shapes(net, state, path):
    """state unchanged, or ValueError naming the first tensor of another shape."""
    for key, value in net.state_dict().items():
        if key in state and state[key].shape != value.shape:
            raise ValueError(f"{path}: {key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}")
    return state
