"""The networks of the studies that are no reference networks of the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mnist_cnn() -> nn.Module:
    """The small CNN of the paper's MNIST study, 796 parameters: images (N, 1, 28, 28) -> logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 3, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def cifar_cnn() -> nn.Module:
    """The small CNN of the paper's CIFAR-10 study, 24,478 parameters: images (N, 3, 32, 32) -> logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 10, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 10, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(160, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class Block(nn.Module):
    """relu(x + F(x)); where the shape changes, the shortcut takes every other pixel and adds channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.changes, self.more = stride != 1 or inputs != outputs, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.changes:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al. 2015, option A), 270 thousand parameters: (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) -> logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
