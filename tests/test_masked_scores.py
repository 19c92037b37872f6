"""Scores that a mask hides: they stay, and the others are inverted as if the hidden ones were not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rule_samples import Inverted
from torch import Tensor, nn

import fxinvert
from fxinvert.rules import Status
from fxinvert.rules.certificate import apart

F64, F32 = torch.float64, torch.float32
LOWEST = torch.finfo(F32).min
SEEN = torch.ones(5, 5).tril().bool()
WAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "masked_fill": lambda scores, low: scores.masked_fill(~SEEN, low),
    "add": lambda scores, low: scores + torch.zeros(5, 5).masked_fill(~SEEN, low).to(scores),
    "where": lambda scores, low: torch.where(SEEN, scores, torch.full_like(scores, low)),
    "twice": lambda scores, low: (
        torch.where(SEEN, scores, torch.full_like(scores, low)) + torch.zeros(5, 5).masked_fill(~SEEN, low)
    ),
}
LOWS = pytest.mark.parametrize("low", [-torch.inf, LOWEST, -1e9, -1e4])


class Masked(nn.Module):
    """Causal attention of one head, its scores masked in one of the ways."""

    def __init__(self, way: str, low: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.way, self.low = WAYS[way], low

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        shares = torch.softmax(self.way(q @ k.transpose(-1, -2) / 6**0.5, self.low), -1)
        mixed: Tensor = self.out(shares @ v)
        return mixed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("low", [-torch.inf, LOWEST])
def test_no_way_of_masking_fails_or_moves_what_is_hidden(way: str, low: float) -> None:
    torch.manual_seed(0)
    model, x = Masked(way, low).eval(), torch.randn(4, 5, 6)
    labels = model(x).detach() + 0.3 * torch.randn(4, 5, 6)
    rec = fxinvert.invert(model, x, output_target="regression")(x, labels)
    assert all(certificate.status is not Status.FAILED for certificate in rec.certificates.values())
    scores = [name for name in rec.names if rec.anchors[name].shape == (4, 5, 5)]
    for name in scores:
        moved = apart(rec.targets[name], rec.anchors[name])
        assert float(moved.abs().max()) < 100
        if "softmax" not in name:
            assert not moved[:, ~SEEN].any()
        assert moved[:, SEEN].any()


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("op", [nn.Softmax(1), nn.LogSoftmax(1)], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("attainable", [True, False])
@LOWS
def test_the_others_are_inverted_as_if_alone(
    low: float, attainable: bool, op: nn.Module, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    seen, anchor = torch.tensor([0, 2, 3, 6]), 3 * torch.randn(8, 4, dtype=dtype)
    target = op(3 * torch.randn(8, 4, dtype=dtype)) + (0 if attainable else 0.3)
    x = torch.full((8, 7), low, dtype=dtype).index_copy(1, seen, anchor)
    wanted = op(x).index_copy(1, seen, target)
    value, certificate = Inverted(op, x)(x, wanted)
    expected, alone = Inverted(op, anchor)(anchor, target)
    # what the projection rounds in single precision, the logarithm of a small probability shows
    torch.testing.assert_close(value[:, seen], expected, rtol=0, atol=1e-9 if dtype == F64 else 1e-2)
    hidden = torch.ones(7, dtype=torch.bool).index_fill(0, seen, False)
    assert torch.equal(value[:, hidden], x[:, hidden])
    assert certificate.status is alone.status
    assert not certificate.failed.any()


@LOWS
def test_a_share_for_what_is_hidden_goes_to_the_others(low: float) -> None:
    """The nearest point of the face is the nearest point of the simplex of the others."""
    x = torch.tensor([[0.0, 1.0, low]])
    value, certificate = Inverted(nn.Softmax(1), x)(x, torch.tensor([[0.2, 0.4, 0.4]]))
    torch.testing.assert_close(value.softmax(1), torch.tensor([[0.4, 0.6, 0.0]]))
    assert certificate.status is Status.PROJECTED
    assert value[0, 2] == low


def test_a_row_of_which_all_is_hidden_stays() -> None:
    x = torch.full((2, 4), LOWEST)
    target = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.0, 0.0]])
    value, certificate = Inverted(nn.Softmax(1), x)(x, target)
    assert torch.equal(value, x)
    assert not certificate.failed.any()


def test_scores_far_apart_are_no_mask() -> None:
    """A probability that single precision calls 0 can still be raised."""
    x, target = torch.tensor([[0.0, -300.0]]), torch.tensor([[0.25, 0.75]])
    value, certificate = Inverted(nn.Softmax(1), x)(x, target)
    torch.testing.assert_close(value.softmax(1), target)
    assert certificate.status is Status.NEAREST


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.relu, nn.functional.elu])
def test_functions_of_hidden_scores_are_inverted_as_if_these_were_not_there(
    function: Callable[[Tensor], Tensor], compiled: bool
) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 5, 5, dtype=F64) - 1
    hidden = scores.masked_fill(~SEEN, -torch.inf)
    for noise in (0.0, -2.0, 0.1):  # of a hidden score's own value, out of reach, and in reach
        target = function(torch.randn(3, 5, 5, dtype=F64))
        target[:, ~SEEN] = function(hidden)[:, ~SEEN] + noise
        value, certificate = Inverted(function, hidden, compiled=compiled)(hidden, target)
        expected, _ = Inverted(function, scores, compiled=compiled)(scores, target)
        torch.testing.assert_close(value[:, SEEN], expected[:, SEEN])
        assert torch.equal(value[:, ~SEEN], hidden[:, ~SEEN])
        assert not certificate.failed.any()
        assert (float(certificate.residual.max()) > 1e-3) == (noise != 0)
