"""Sums over some positions of a map: unbiased, the same wherever they are made, and as good where rows abound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxinvert
from fxinvert import DataError
from fxinvert.output_target import output_target
from fxinvert.rules import ByPosition, Op
from fxinvert.training import ClosedForm, NormalEquations
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.data import Batches
from fxinvert.training.op_sums import sums
from fxinvert.training.positions import MOST, ROWS_PER_FEATURE, drawn_positions

F64 = torch.float64


def op_of(layer: nn.Module, x: Tensor) -> tuple[Op, ByPosition]:
    inverse = fxinvert.invert(layer.to(x.dtype), x[:2])
    node = inverse.output_node
    trainable = inverse.inverse_op(node).rule.trainable
    assert isinstance(trainable, ByPosition)
    return inverse.op(node, inverse.forward(x)), trainable


LAYERS = [
    (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (5, 2, 9)),
    (nn.Conv2d(3, 4, (3, 2), padding="same", bias=False), (4, 3, 5, 6)),
    (nn.Conv3d(1, 2, 2, dilation=2), (3, 1, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_rows_at_positions_are_those_of_all_positions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    op, trainable = op_of(layer, torch.randn(shape, dtype=F64))
    samples, positions = len(op.output), op.output[0, 0].numel()
    at = torch.randint(positions, (samples, 5))
    for whole, some in (
        (trainable.features(op), trainable.features(op, at)),
        (trainable.outputs(op, op.output), trainable.outputs(op, op.output, at)),
    ):
        by_sample = whole.reshape(len(whole), samples, positions, -1)
        expected = by_sample[:, torch.arange(samples)[:, None], at].flatten(1, 2)
        assert torch.equal(some, expected)


def test_every_position_is_as_likely_as_any_other() -> None:
    op, _ = op_of(nn.Conv2d(1, 1, 2), torch.randn(700, 1, 6, 4))
    drawn = [drawn_positions(op, 0.3, seed, len(op.output)) for seed in range(20)]
    counts = torch.stack([at.flatten().bincount(minlength=15) for at in drawn if at is not None]).sum(0)
    assert len(counts) == 15
    # binomial: 14,000 samples, 0.27 draws each (0.3 of 15 positions is 4, for all 15)
    expected = 14_000 * 4 / 15
    assert float((counts - expected).abs().max()) < 5 * expected**0.5


def test_sums_over_drawn_positions_are_unbiased() -> None:
    op, trainable = op_of(nn.Conv2d(2, 3, 3), torch.randn(20, 2, 9, 8, dtype=F64))
    errors, positions = torch.randn_like(op.output), op.output[0, 0].numel()
    weights = torch.rand(20, dtype=F64)

    def made(at: Tensor | None) -> NormalEquations:
        share = 1 if at is None else positions / at.shape[1]
        rows = (trainable.features(op, at), trainable.outputs(op, errors, at))
        return NormalEquations.of(*rows, weights * share)

    exact, drawn = made(None), [made(drawn_positions(op, 0.2, seed, 20)) for seed in range(400)]
    for name in ("gram", "cross"):
        values = torch.stack([getattr(equations, name) for equations in drawn])
        off = (values.mean(0) - getattr(exact, name)) / (values.std(0) / 400**0.5 + 1e-9)
        assert float(off.abs().max()) < 5
    mean = sum(equations.error for equations in drawn) / 400
    assert mean == pytest.approx(exact.error, rel=0.05)


def test_all_positions_are_taken_where_rows_are_few() -> None:
    few, _ = op_of(nn.Conv2d(2, 3, 3), torch.randn(4, 2, 9, 8))
    assert drawn_positions(few, None, 0, 4) is None
    assert drawn_positions(few, 1.0, 0, 4) is None
    many, _ = op_of(nn.Conv2d(2, 3, 3), torch.randn(64, 2, 30, 30))
    at = drawn_positions(many, None, 0, 64)
    assert at is not None
    assert ROWS_PER_FEATURE * 18 <= at.numel() <= MOST * 64 * 28 * 28


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 1, 8, 8, generator=generator)
    return list(zip(torch.split(x, 16), torch.split((x.mean((1, 2, 3)) > 0).long(), 16), strict=True))


def summed(batches: list[Any], fraction: float | None = 0.3) -> NormalEquations:
    context = Context(small(), {"train": source_of(images())})
    (found,) = sums(
        context,
        batches,
        output_targets=[output_target("cross_entropy")],
        paths=["0", "3"],
        satisfied_weight=1.0,
        weighted=True,
        position_fraction=fraction,
    )
    first = found["conv2d(weight=0.weight, bias=0.bias)"]
    assert isinstance(first, NormalEquations)
    return first


def test_the_same_positions_are_drawn_wherever_a_chunk_is_worked_on() -> None:
    first, second, *_ = Batches(images(), torch.device("cpu"))
    state = torch.get_rng_state()
    made = summed([first, second])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    again = summed([first, second])
    assert torch.equal(made.gram, again.gram)
    assert torch.equal(made.cross, again.cross)
    assert not torch.allclose(made.gram, summed([first, second], 1.0).gram)


def test_batches_of_a_chunk_draw_their_own() -> None:
    batch = next(iter(Batches(images(), torch.device("cpu"))))
    once, twice = (summed([batch] * n) for n in (1, 2))
    assert twice.rows == 2 * once.rows == 2 * 16 * 11
    assert not torch.allclose(twice.gram, 2 * once.gram)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(DataError, match="position_fraction"):
        ClosedForm(position_fraction=fraction)
