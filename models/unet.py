"""A U-Net: a label for every pixel, from coarse features and fine ones. Ronneberger et al. 2015 (arXiv 1505.04597)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitsUNet(nn.Module):
    """Two steps down and two up, with a skip at each size: images (N, 1, 8, 8) -> logits (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = double_conv(1, 8)
        self.down2 = double_conv(8, 12)
        self.bottom = double_conv(12, 16)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.merge2 = double_conv(24, 12)
        self.up1 = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.merge1 = double_conv(16, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> (N, 8, 8, 8), (N, 12, 4, 4), (N, 16, 2, 2) -> logits (N, 3, 8, 8)."""
        fine = self.down1(images)
        middle = self.down2(self.pool(fine))
        coarse = self.bottom(self.pool(middle))
        middle = self.merge2(torch.cat([self.up2(coarse), middle], 1))
        fine = self.merge1(torch.cat([self.up1(middle), fine], 1))
        logits: Tensor = self.head(fine)
        return logits


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Twice convolution, batch normalization, ReLU: (N, inputs, H, W) -> (N, outputs, H, W)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
