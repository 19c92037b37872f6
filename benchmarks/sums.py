"""The sums of closed-form training: by lags against by rows, and their speed against that of a large matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

import fxinvert
from benchmarks.measure import Ratio, ratio, ratio_in_turn
from fxinvert.rules import ByPosition
from fxinvert.training import NormalEquations
from fxinvert.training.blocks import equations_over
from fxinvert.training.grams import COLUMNS, Shifts

#: channels in and out, kernel, pixels, samples
LAYERS = ((32, 3, 16, 128), (64, 3, 16, 64), (64, 3, 8, 256), (64, 5, 16, 64), (128, 3, 16, 64))
#: features and outputs
SHAPES = ((76, 10), (91, 10), (577, 64), (1153, 128))
ROWS, LARGE = 8192, 2048


def run() -> Iterator[Ratio]:
    """Processor time of G and C of whole maps, patches included; and of products alone."""
    torch.manual_seed(0)
    yield from _lags()
    yield from _products()


def _lags() -> Iterator[Ratio]:
    for channels, kernel, size, samples in LAYERS:
        layer, x = (
            nn.Conv2d(channels, channels, kernel, padding=1),
            torch.randn(samples, channels, size, size),
        )
        inverse = fxinvert.invert(layer, x[:2])
        node = inverse.output_node
        op, trainable = inverse.op(node, inverse.forward(x)), inverse.inverse_op(node).rule.trainable
        assert isinstance(trainable, ByPosition)
        window, _ = trainable.sliding(op)
        assert window.steps is not None
        shifts = Shifts(window.kernel, tuple(op.output.shape[2:]), window.steps)
        errors, weights = trainable.outputs(op, torch.randn_like(op.output)), torch.ones(samples)

        def sums(shifts: Shifts | None, op=op, trainable=trainable, errors=errors, weights=weights) -> object:  # type: ignore[no-untyped-def]
            return equations_over(
                lambda own: trainable.features(op.samples(own)), errors, weights, len(op.output), shifts
            )

        rows = samples * op.output[0, 0].numel()
        pays = shifts.pay(channels * kernel**2 + 1, rows)
        yield ratio_in_turn(
            f"G and C of a convolution {channels}→{channels} k{kernel} {size}², {samples} samples",
            lambda s=shifts, sums=sums: sums(s),  # type: ignore[misc]
            "by rows alone",
            lambda sums=sums: sums(None),  # type: ignore[misc]
            aim=1.0,
            note="by lags" if pays else "lags would not pay: by rows",
        )


def _products() -> Iterator[Ratio]:
    large = torch.randn(LARGE, LARGE)
    for n, m in SHAPES:
        features, errors, weights = torch.randn(1, ROWS, n), torch.randn(1, ROWS, m), torch.ones(ROWS)
        done = ROWS * ((n * (n + min(n, COLUMNS)) / 2) + m * n) / LARGE**3
        measured = ratio(
            f"products of the sums, {n} features, {m} outputs, for every operation that is done",
            lambda f=features, e=errors, w=weights: NormalEquations.of(f, e, w),  # type: ignore[misc]
            f"a float32 matrix product of {LARGE} cubed",
            lambda a=large: a @ a,  # type: ignore[misc]
            aim=2.0,
        )
        share = done / measured.ratio
        yield replace(measured, ratio=1 / share, note=f"{100 * share:.0f} % of its speed")
