"""Small post-training runs, for tests of where and how they work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxinvert
from fxinvert import PostTrainingResult
from fxinvert.scheduling.journal import read_log
from fxinvert.training import ClosedForm, Gradient, Joint, Optimizer
from fxinvert.training.context import digest_of

Data = list[tuple[Tensor, Tensor]]

#: settings of runs that do all kinds of tasks
KINDS: dict[str, dict[str, Any]] = {
    "closed_form": {"schedule": "parallel"},
    "recursive": {"method": ClosedForm(every=100)},
    "gradient": {"method": Gradient(Optimizer(epochs=1)), "schedule": "parallel"},
    "gauss_newton": {"method": "gauss_newton"},
    "auto": {"method": "auto", "sweeps": 1},
    "joint": {"method": Joint(optimizer=Optimizer(epochs=1)), "schedule": "single", "only": "2"},
}


def data(samples: int = 320, batch: int = 16, shift: float = 0.0) -> Data:
    """Three classes of points; reproducible, in batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator) + shift
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return list(zip(torch.split(x, batch), torch.split(y, batch), strict=True))


def network() -> nn.Module:
    """Two trained layers; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def train(given: Any = None, **settings: Any) -> PostTrainingResult:
    """A run with small chunks, one output target and two sweeps, unless settings say otherwise."""
    defaults: dict[str, Any] = {"sweeps": 2, "chunk": 4, "output_target": "cross_entropy"}
    return fxinvert.post_train(network(), data() if given is None else given, **(defaults | settings))


def weights(result: PostTrainingResult) -> str:
    """A digest of every bit of the trained weights."""
    return digest_of(dict(result.model.named_parameters()))


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run's log with this event."""
    return [line for line in read_log(folder) if line["event"] == name]
