"""Modes of torch that a caller has switched on change nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxinvert

MODES: list[Callable[[], AbstractContextManager[Any]]] = [
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(x + self.inner(x).relu())
        return found


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def model() -> Residual:
    torch.manual_seed(0)
    return Residual()


@pytest.mark.parametrize("method", ["closed_form", "gauss_newton", "gradient"])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same(mode: Callable[[], AbstractContextManager[Any]], method: str) -> None:
    wanted, given = fxinvert.post_train(model(), data(), method=method, sweeps=1, confidence=0.5), model()
    with mode():
        found = fxinvert.post_train(given, data(), method=method, sweeps=1, confidence=0.5)
    assert wanted.changed == found.changed != ()
    for name, value in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)


@pytest.mark.parametrize("mode", MODES)
def test_targets_and_explanations_are_the_same(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    x, y = data()
    wanted, shares = (
        fxinvert.invert(model(), x[:2])(x[:8], y[:8]),
        fxinvert.explain(model(), x[:8], y[:8]).shares,
    )
    given = model()
    with mode():
        found = fxinvert.invert(given, x[:2])(x[:8], y[:8])
        assert torch.equal(fxinvert.explain(given, x[:8], y[:8]).shares, shares)
    for name in wanted.names:
        assert torch.equal(found.targets[name], wanted.targets[name])


@pytest.mark.parametrize("mode", MODES[1:])
def test_exports_are_the_same(mode: Callable[[], AbstractContextManager[Any]], tmp_path: Path) -> None:
    x, path = data()[0], tmp_path / "model.onnx"
    with mode():
        report = fxinvert.export_onnx(model(), x[:2], path)
        fxinvert.export.verify_onnx(path, model(), x[:2])
    assert report.max_abs < 1e-5
