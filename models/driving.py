"""A small driving network: it sees the road and knows how it moves, and says how to steer and how fast to go."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Planner(nn.Module):
    """Scene features (N, 32) -> {"steering": (N, 1), "speed": (N, 1)}."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(32, 24), nn.ReLU())
        self.steering = nn.Linear(24, 1)
        self.speed = nn.Linear(24, 1)

    def forward(self, scene: Tensor) -> dict[str, Tensor]:
        """(N, 32) -> (N, 24) -> twice (N, 1)."""
        x = self.hidden(scene)
        return {"steering": self.steering(x), "speed": self.speed(x)}


class DrivingNet(nn.Module):
    """Camera images (N, 1, 16, 24) and ego states (N, 4) -> {"steering": (N, 1), "speed": (N, 1)}.

    Units and the meaning of the ego state are in `fxinvert.models.road`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.perception = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(384, 32),
            nn.ReLU(),
        )
        self.ego = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.fusion = nn.Sequential(nn.Linear(48, 32), nn.ReLU())
        self.planning = Planner()

    def forward(self, camera: Tensor, ego: Tensor) -> dict[str, Tensor]:
        """(N, 1, 16, 24) and (N, 4) -> (N, 32) and (N, 16) -> (N, 32) -> steering (N, 1) and speed (N, 1)."""
        scene = self.fusion(torch.cat([self.perception(camera), self.ego(ego)], 1))
        plan: dict[str, Tensor] = self.planning(scene)
        return plan
