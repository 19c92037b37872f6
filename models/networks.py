"""Two small networks for 8x8 digits: enough layers to be interesting, few enough weights to read.

Both are plain chains of named modules without normalization layers, so that every node of the traced graph
carries the name of the attribute it came from, and a sample's output never depends on its batch.
"""

from __future__ import annotations

from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers, 7,462 weights: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(192, 32)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> (N, 8, 6, 6) -> (N, 12, 4, 4) -> (N, 192) -> (N, 32) -> logits (N, 10)."""
        x = self.relu1(self.conv1(images))
        x = self.relu2(self.conv2(x))
        x = self.flatten(x)
        x = self.relu3(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits


class DigitsMLP(nn.Module):
    """Three linear layers with tanh between them, 5,018 weights: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64, 48)
        self.tanh1 = nn.Tanh()
        self.fc2 = nn.Linear(48, 32)
        self.tanh2 = nn.Tanh()
        self.fc3 = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> (N, 64) -> (N, 48) -> (N, 32) -> logits (N, 10)."""
        x = self.flatten(images)
        x = self.tanh1(self.fc1(x))
        x = self.tanh2(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def digits_cnn() -> DigitsCNN:
    """A :class:`DigitsCNN` with fresh weights from torch's global generator; for trained ones see `load`."""
    return DigitsCNN()


def digits_mlp() -> DigitsMLP:
    """A :class:`DigitsMLP` with fresh weights from torch's global generator; for trained ones see `load`."""
    return DigitsMLP()
