"""Functions that act on every value by itself: roots on all branches, the closest where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import own_output
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.linalg.scalar import LITTLE, Roots, roots
from fxinvert.passes.region import Region
from fxinvert.rules import Status

Function = Callable[[Tensor], Tensor]

#: as people write them out
FUNCTIONS: dict[str, Function] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu (tanh)": lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "cube": lambda x: x * x * x,
    "lisht": lambda x: x * torch.tanh(x),
    "snake": lambda x: x + torch.sin(x) ** 2,
    "bump": lambda x: x * torch.exp(-x * x),
    "square of relu": lambda x: torch.relu(x) * torch.relu(x),
}
GRID = torch.linspace(-20, 20, 8001, dtype=torch.float64)


def found(function: Function, anchor: Tensor, target: Tensor) -> Roots:
    return roots(function, anchor, function(anchor), target)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 300, generator=generator, dtype=dtype)
    return 2 * first, second


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=st.integers(0, 2**31))
def test_a_target_in_reach_is_reached(name: str, seed: int) -> None:
    function, (anchor, noise) = FUNCTIONS[name], draw(seed)
    target = function(anchor + noise)
    answer = found(function, anchor, target)
    assert answer.closest.all()
    assert float((function(answer.value) - target).abs().max()) <= 1e-9


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=st.integers(0, 2**31))
def test_no_value_of_a_grid_comes_closer(name: str, seed: int) -> None:
    function, (anchor, noise) = FUNCTIONS[name], draw(seed)
    target = 2 * noise
    error = (function(found(function, anchor, target).value) - target).abs()
    least = (function(GRID) - target[:, None]).abs().amin(1)
    gained = ((function(anchor) - target).abs() - least).clamp(min=0)
    assert (error <= least + LITTLE * gained + 1e-9).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nearly_always_no_root_of_a_grid_is_nearer(name: str) -> None:
    function, (anchor, noise) = FUNCTIONS[name], draw(0)
    target = function(anchor + noise)
    value = found(function, anchor, target).value
    error = function(GRID) - target[:, None]
    crosses = error[:, 1:].sign() * error[:, :-1].sign() < 0
    distance = (torch.minimum(GRID[1:], GRID[:-1]) - anchor[:, None]).abs().where(crosses, torch.inf).amin(1)
    assert int(((value - anchor).abs() > distance + 0.01).sum()) <= 6  # two roots between two looks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_the_output_stays_and_values_do_not_see_one_another(name: str, dtype: torch.dtype) -> None:
    function, (anchor, noise) = FUNCTIONS[name], draw(1, dtype)
    assert torch.equal(found(function, anchor, function(anchor)).value, anchor)
    together = found(function, anchor, noise).value
    alone = torch.cat(
        [found(function, *pair).value for pair in zip(anchor[:20, None], noise[:20, None], strict=True)]
    )
    close = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(function(together[:20]), function(alone), rtol=0, atol=close)


def test_the_near_end_of_a_plateau_is_taken() -> None:
    anchor = torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64)
    for target in ([0.0, 1.0, 1.0], [0.0, 1.5, 2.0]):
        answer = found(lambda x: x.clamp(-1, 1) * 1.0, anchor, torch.tensor(target, dtype=torch.float64))
        torch.testing.assert_close(answer.value, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
        assert answer.closest.all()


def test_a_limit_is_approached_and_not_claimed() -> None:
    anchor = torch.zeros(3, dtype=torch.float64)
    answer = found(torch.sigmoid, anchor, torch.tensor([1.5, -0.5, 0.9], dtype=torch.float64))
    assert answer.closest.tolist() == [False, False, True]
    assert float(answer.value.abs().max()) < 12


def test_what_is_not_finite_is_no_value() -> None:
    """log of a negative number, and 1/x on both sides of its pole."""
    anchor = torch.tensor([0.5, 2.0], dtype=torch.float64)
    target = torch.tensor([-3.0, 1.0], dtype=torch.float64)
    answer = found(lambda x: x.log() * 1.0, anchor, target)
    torch.testing.assert_close(answer.value, target.exp())
    nothing = found(lambda x: x * torch.nan, anchor, target)
    assert torch.equal(nothing.value, anchor)
    assert not nothing.closest.any()


class Written(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_an_activation_that_is_written_out_is_inverted_as_the_one_of_torch() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(6, 5), torch.randn(6, 5)
    answers = [
        fxinvert.invert(activation, x, output_target="regression", reconstruction="nodewise")(x, target)
        for activation in (nn.SiLU(), Written(FUNCTIONS["silu"]))
    ]
    outputs = [F.silu(rec.targets["x" if "x" in rec.targets else "input"]) for rec in answers]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)
    (certificate,) = [c for c in answers[1].certificates.values() if c.iterations]
    assert certificate.status is Status.LEAST_SQUARES


def test_only_regions_in_which_values_go_their_own_ways_are_inverted_by_value() -> None:
    def entrywise(function: Function) -> list[bool]:
        inverse = fxinvert.invert(Written(function), torch.randn(3, 4), output_target=own_output)
        return [module.entrywise for module in inverse.graph_module.modules() if isinstance(module, Region)]

    scale = torch.randn(4)
    assert entrywise(lambda x: x * torch.sigmoid(scale * x)) == [True]
    assert entrywise(lambda x: x * torch.softmax(x, 1)) == [False]
    assert entrywise(lambda x: x - x.mean(1, keepdim=True)) == [False]
    assert entrywise(lambda x: x * x.flip(1)) == [False]
    assert entrywise(lambda x: x * F.linear(x, torch.eye(4))) == [False]
