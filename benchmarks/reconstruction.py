"""One reconstruction of every node, against one forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import fxinvert
from benchmarks.measure import Ratio, ratio
from fxinvert import models


def cifar_cnn() -> nn.Module:
    """The small CNN of the paper's CIFAR-10 study, random weights."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 10, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 10, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(160, 128), nn.ReLU(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


def run(batch: int = 256) -> Iterator[Ratio]:
    """Reconstruction over forward, factorizations kept."""
    torch.manual_seed(0)
    for name, model, shape in (
        ("digits_cnn", models.load("digits_cnn", "early"), (1, 8, 8)),
        ("digits_mlp", models.load("digits_mlp", "early"), (1, 8, 8)),
        ("cifar_cnn", cifar_cnn(), (3, 32, 32)),
    ):
        x, y = torch.rand(batch, *shape), torch.randint(0, 10, (batch,))
        inverse = fxinvert.invert(model, x[:2], output_target="margin")
        rec = inverse(x, y)
        shares = [float((rec.consistency(node) < 1e-3).float().mean()) for node in rec.names[1:]]
        note = f"forward-consistent to 1e-3: {100 * min(shares):.0f} % of samples at the worst cut"
        with torch.no_grad():
            yield ratio(
                f"{name}: reconstruct",
                lambda i=inverse, x=x, y=y: i(x, y),
                "forward",
                lambda m=model, x=x: m(x),
                note=note,  # type: ignore[misc]
            )
