"""A recurrent network that reads an image row by row."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsLSTM(nn.Module):
    """An LSTM over the eight rows; its last hidden state decides: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> rows (N, 8, 8) -> hidden state (N, 32) -> logits (N, 10)."""
        _, (hidden, _) = self.lstm(images.squeeze(1))
        logits: Tensor = self.head(hidden[-1])
        return logits
