"""Network shapes that no package offers here without pulling another torch: DenseNet, MobileNetV3, U-Net.

Written as their papers draw them, with random weights: for tracing, grouping and cutting, not for answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# kernel, expansion, channels out, squeeze-excite, hard swish, stride: Howard et al. 2019, arXiv:1905.02244, table 1
MOBILENET_V3_LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3: `growth` new channels behind those that came in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input and the new channels, one behind the other."""
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al. 2017, arXiv:1608.06993); the default is DenseNet-121."""

    def __init__(self, blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32, classes: int = 1000) -> None:
        super().__init__()
        channels = 2 * growth
        parts: list[nn.Module] = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        for i, count in enumerate(blocks):
            for _ in range(count):
                parts.append(DenseLayer(channels, growth))
                channels += growth
            if i < len(blocks) - 1:
                narrow = nn.Conv2d(channels, channels // 2, 1, bias=False)
                parts.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), narrow, nn.AvgPool2d(2)))
                channels //= 2
        self.features = nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class SqueezeExcite(nn.Module):
    """Every channel times a gate that the mean over space decides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = _rounded(channels / 4)
        self.reduce, self.expand = nn.Conv2d(channels, narrow, 1), nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The gated input."""
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-excite, projection; the input is added where the shapes agree."""

    def __init__(
        self, narrow: int, kernel: int, wide: int, out: int, excite: bool, hard_swish: bool, stride: int
    ) -> None:
        super().__init__()
        active = nn.Hardswish if hard_swish else nn.ReLU
        parts: list[nn.Module] = []
        if wide != narrow:
            parts += [nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide), active()]
        depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        parts += [depthwise, nn.BatchNorm2d(wide), active()]
        parts += [SqueezeExcite(wide)] if excite else []
        parts += [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.body = nn.Sequential(*parts)
        self.adds = stride == 1 and narrow == out

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.body(x)
        return x + y if self.adds else y


class MobileNetV3(nn.Module):
    """MobileNetV3-Large."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()]
        blocks, channels = [], 16
        for kernel, wide, out, excite, hard_swish, stride in MOBILENET_V3_LARGE:
            blocks.append(InvertedResidual(channels, kernel, wide, out, excite, hard_swish, stride))
            channels = out
        last = [nn.Conv2d(channels, 960, 1, bias=False), nn.BatchNorm2d(960), nn.Hardswish()]
        self.features = nn.Sequential(*stem, *blocks, *last)
        self.head = nn.Sequential(nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.head(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    """U-Net with padded convolutions (Ronneberger et al. 2015, arXiv:1505.04597), batch norms, transposed convolutions."""

    def __init__(self, width: int = 32, levels: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList(
            _double(a, b) for a, b in zip([3, *widths[: levels - 1]], widths[:levels], strict=True)
        )
        self.bottom = _double(widths[levels - 1], widths[levels])
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2) for i in reversed(range(levels)))
        self.merge = nn.ModuleList(_double(2 * widths[i], widths[i]) for i in reversed(range(levels)))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One score per class and pixel."""
        kept = []
        for part in self.down:
            x = part(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.last(x)


def _double(narrow: int, wide: int) -> nn.Sequential:
    first = [nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second)


def _rounded(value: float, divisor: int = 8) -> int:
    """To the nearest multiple of 8, never more than a tenth below."""
    near = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * value else near
