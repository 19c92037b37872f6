"""A network of dense blocks, in which every layer sees all earlier ones: Huang et al. 2016 (arXiv 1608.06993)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Appends `growth` channels made by BN-ReLU-convolution: (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + growth, H, W)."""
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], 1)


class DigitsDenseNet(nn.Module):
    """Two dense blocks of three layers, a transition between them: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self, width: int = 12, growth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.block1 = dense_block(width, growth, 3)
        wide = width + 3 * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, width, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = dense_block(width, growth, 3)
        self.norm = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> (N, 30, 8, 8) -> (N, 12, 4, 4) -> (N, 30, 4, 4) -> (N, 30) -> logits (N, 10)."""
        x = self.transition(self.block1(self.stem(images)))
        x = self.relu(self.norm(self.block2(x)))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def dense_block(inputs: int, growth: int, layers: int) -> nn.Sequential:
    """(N, inputs, H, W) -> (N, inputs + layers · growth, H, W)."""
    return nn.Sequential(*(DenseLayer(inputs + index * growth, growth) for index in range(layers)))
