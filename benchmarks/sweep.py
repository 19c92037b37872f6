"""One closed-form sweep, against one epoch of AdamW on the same data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

import fxinvert
from benchmarks.measure import Ratio, ratio
from benchmarks.studies.networks import cifar_cnn
from fxinvert import models


def run(samples: int = 2048, batch: int = 256) -> Iterator[Ratio]:
    """Reconstruct, sum, solve and search the step, over forward, backward and update."""
    torch.manual_seed(0)
    for name, model, shape in (
        ("digits_cnn", models.load("digits_cnn", "early"), (1, 8, 8)),
        ("cifar_cnn", cifar_cnn(), (3, 32, 32)),
    ):
        x, y = torch.rand(samples, *shape), torch.randint(0, 10, (samples,))
        data = models.batches(x, y, batch)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

        def epoch(model=model, data=data, optimizer=optimizer) -> None:  # type: ignore[no-untyped-def]
            for inputs, labels in data:
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(inputs), labels))
                optimizer.step()

        for schedule in ("parallel", "sequential"):
            yield ratio(
                f"{name}: closed-form sweep, {schedule}",
                lambda m=model, d=data, s=schedule: fxinvert.post_train(  # type: ignore[misc]
                    m, d, schedule=s, sweeps=1, output_target="cross_entropy"
                ),
                "AdamW epoch",
                epoch,
                aim=3.0 if schedule == "parallel" else None,
            )
