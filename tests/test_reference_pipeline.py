"""Every reference network, from capture to a trained model: the main job on graphs of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxinvert
import fxinvert.models as zoo
from fxinvert.rules import Status

#: many numbers per sample: a few samples do
LARGE_OUTPUTS = ("char_transformer", "digits_unet")
NETWORKS = list(dict.fromkeys(name for name, _ in zoo.available()))


def data_of(name: str, count: int) -> tuple[list[Any], list[Any], Any]:
    """Training and held-out batches, and which outputs are supervised."""
    parts = zoo.data_of(name)
    train, held_out = ([_first(next(iter(p.batches())), count)] for p in (parts.train, parts.held_out))
    labels = train[0][1]
    return train, held_out, tuple(labels) if isinstance(labels, dict) else None


def _first(batch: Any, count: int) -> Any:
    return torch.utils._pytree.tree_map(lambda value: value[:count], batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sweep_over_a_reference_network(name: str) -> None:
    model = zoo.load(name, "early")
    train, held_out, output = data_of(name, 32 if name in LARGE_OUTPUTS else 256)
    inputs, labels = train[0]
    graph = fxinvert.trace(model, _first(inputs, 2), output=output)
    plan = fxinvert.partition(graph)
    assert plan.segments
    rec = fxinvert.invert(graph, output_target=_target(labels), reconstruction="linearized")(inputs, labels)
    for segment in plan.segments:
        certificate = rec.certificates[segment.exit]
        assert certificate.status is not Status.FAILED
        assert bool(torch.isfinite(rec.targets[segment.exit]).all())
    result = fxinvert.post_train(
        model, train, plan=plan, schedule="parallel", sweeps=1, output=output, share="none",
        output_target=_target(labels), validation_data=held_out, progress=False,
    )  # fmt: skip
    assert type(result.model) is type(model)
    *_, record = result.history  # before it, perhaps, what the last layer alone can do
    assert record.segments == tuple(segment.name for segment in plan.segments)
    assert record.after.loss < record.before.loss
    # what is returned must not have lost a sample either
    assert result.final.no_worse_than(result.baseline)


def _target(labels: Any) -> str:
    own = list(labels.values()) if isinstance(labels, dict) else [labels]
    assert all(isinstance(value, Tensor) for value in own)
    return "cross_entropy" if any(not value.is_floating_point() for value in own) else "regression"
