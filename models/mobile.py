"""Depthwise-separable convolutions with squeeze-and-excite gates: inverted bottlenecks as in MobileNetV3
(arXiv 1905.02244) and EfficientNet (arXiv 1905.11946)."""

from __future__ import annotations

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in (0, 1) computed from the means of all channels: (N, C, H, W) -> the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), through gates (N, C, 1, 1)."""
        gates: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
        return x * gates


class MBConv(nn.Module):
    """Expand 1x1, depthwise 3x3, gate, project 1x1; with a shortcut where the shapes allow one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 3) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_bn_silu(inputs, hidden, 1)
        self.depthwise = conv_bn_silu(hidden, hidden, 3, stride, groups=hidden)
        self.se = SqueezeExcite(hidden, hidden // 6)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.has_shortcut else y


class DigitsMBConv(nn.Module):
    """A stem, three inverted bottlenecks and a 1x1 convolution: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_silu(1, 12, 3)
        self.blocks = nn.Sequential(MBConv(12, 12), MBConv(12, 16, stride=2), MBConv(16, 16))
        self.top = conv_bn_silu(16, 32, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> (N, 12, 8, 8) -> (N, 16, 4, 4) -> (N, 32) -> logits (N, 10)."""
        x = self.top(self.blocks(self.stem(images)))
        logits: Tensor = self.head(self.dropout(self.pool(x).flatten(1)))
        return logits


def conv_bn_silu(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (divided by `stride`), batch normalization, SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )
