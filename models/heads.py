"""Two inputs and two outputs, a class and a value: the shape of a network that sees, is told, and answers twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitsTwoHead(nn.Module):
    """Images (N, 1, 8, 8) and queries (N, 4) -> {"digit": logits (N, 10), "offset": values (N, 1)}.

    What the queries ask for is in `fxinvert.models.tasks.digit_queries`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(192, 32),
            nn.ReLU(),
        )
        self.query = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.fusion = nn.Sequential(nn.Linear(48, 48), nn.ReLU())
        self.digit_head = nn.Linear(48, 10)
        self.offset_head = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, images: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """(N, 1, 8, 8) and (N, 4) -> (N, 32) and (N, 16) -> (N, 48) -> the two outputs."""
        x = self.fusion(torch.cat([self.image(images), self.query(queries)], 1))
        return {"digit": self.digit_head(x), "offset": self.offset_head(x)}
