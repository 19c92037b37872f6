"""Weights behind a weight norm: solved for as they are, and taken apart into length and direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxinvert
from fxinvert.training.weight_norm import split

F64 = torch.float64


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("step", [1.0, 0.3])
def test_the_changes_give_the_weight_and_keep_to_its_line(dim: int, step: float) -> None:
    torch.manual_seed(0)
    v, change = torch.randn(2, 4, 3, dtype=F64)
    g = torch.randn_like(torch.norm_except_dim(v, 2, dim))
    wanted = torch._weight_norm(v, g, dim) + step * change
    dv, dg = split(v, g, change, dim)
    found = torch._weight_norm(v + step * dv, g + step * dg, dim)
    if step == 1:
        torch.testing.assert_close(found, wanted)
    lengths = [torch.norm_except_dim(w, 2, dim) for w in (found, wanted)]
    torch.testing.assert_close(found / lengths[0] * (found * wanted).sum().sign(), wanted / lengths[1])


def test_a_weight_of_no_length_takes_the_direction_of_its_change() -> None:
    torch.manual_seed(0)
    v, change, g = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64), torch.tensor([[0.0], [2], [0]])
    change[2] = 0
    dv, dg = split(v, g.double(), change, 0)
    torch.testing.assert_close(
        torch._weight_norm(v + dv, g + dg, 0), torch._weight_norm(v, g.double(), 0) + change
    )


def network(*, normed: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    if normed:
        parametrizations.weight_norm(model[0])
        parametrizations.weight_norm(model[3], dim=1)
    return model


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(200, 2, 6)
    return x, (x.flatten(1) @ torch.randn(12, 3)).argmax(1)


@pytest.mark.parametrize("method", ["closed_form", "gauss_newton", "gradient"])
def test_they_are_trained(method: str) -> None:
    result = fxinvert.post_train(network(normed=True), [data()], method=method, sweeps=1, progress=False)
    originals = {f"{i}.parametrizations.weight.original{k}" for i in (0, 3) for k in (0, 1)}
    assert set(result.plan.segments[0].parameters + result.plan.segments[1].parameters) >= originals
    assert originals <= set(result.changed)
    assert result.final.loss < result.baseline.loss


def test_the_solution_is_that_of_the_plain_weight() -> None:
    found = [
        fxinvert.post_train(
            network(normed=normed),
            [data()],
            method="closed_form",
            sweeps=1,
            schedule="sequential",
            progress=False,
        )
        for normed in (True, False)
    ]
    normed, plain = (result.final.loss / result.baseline.loss for result in found)
    assert normed == pytest.approx(plain, rel=0.05)


def test_spectral_norm_is_said_to_stay() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)))
    with pytest.raises(fxinvert.FxInvertError, match=r"as by spectral_norm.*, stay"):
        fxinvert.post_train(model, [(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))])
