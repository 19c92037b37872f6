"""Convolutions of padded or repeated maps are one linear system: against the dense oracle, in graphs, trained and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_samples import Inverted, assert_is_dense_answer, assert_solves
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.export import export_inverse
from fxinvert.linalg import Convolution, PaddedConvolution, rows_of
from fxinvert.linalg.padded import index_of
from fxinvert.passes.flow import Flow
from fxinvert.rules.padded import PADDED
from fxinvert.testing import check_rule

F64 = torch.float64
CONVOLUTIONS: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("constant", "reflect", "replicate", "circular")


class Pad(nn.Module):
    def __init__(self, ends: list[int], mode: str, value: float | None = None) -> None:
        super().__init__()
        self.ends, self.mode, self.value = ends, mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.ends, self.mode, self.value)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution behind one or two ops that pad, crop or repeat, and the shape of a sample."""
    n, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    size = [draw(st.integers(3, {1: 7, 2: 5, 3: 3}[n])) for _ in range(n)]
    before: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        mode = draw(st.sampled_from([*MODES, "repeat"]))
        if mode == "repeat":
            before.append(nn.Upsample(scale_factor=2 if n < 3 else 1))
            continue
        least = -1 if mode == "constant" else 0
        axes = n if mode != "constant" else draw(st.integers(1, n))
        ends = [draw(st.integers(least, 2)) for _ in range(2 * axes)]
        before.append(Pad(ends, mode, 3.0 if mode == "constant" and draw(st.booleans()) else None))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    convolution = CONVOLUTIONS[n](
        groups,
        2 * groups,
        [draw(st.integers(1, 2)) for _ in range(n)],
        groups=groups,
        stride=[draw(st.integers(1, 2)) for _ in range(n)],
        padding=[draw(st.integers(0, 1)) for _ in range(n)],
    )
    return nn.Sequential(*before, convolution).double(), (groups, *size)


@given(networks())
def test_padding_and_convolution_are_inverted_as_one(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = case
    x = torch.randn(3, *shape, dtype=F64)
    inverted = Inverted(model, x)
    first = Flow(inverted.op).stretches[-1]
    assert inverted.inverse.inverse_of(first).rule.key == PADDED
    with torch.no_grad():
        reachable = model(torch.randn_like(x))
    assert_is_dense_answer(inverted, x, reachable)
    assert_is_dense_answer(inverted, x, torch.randn_like(reachable))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_what_can_be_reached_is_reached_in_single_precision(mode: Any, padding: Any) -> None:
    layer = nn.Conv2d(3, 5, (4, 3), padding=padding, padding_mode=mode)
    assert_solves(Inverted(layer, torch.randn(2, 3, 7, 6)), torch.randn(2, 3, 7, 6))


def test_channels_may_be_padded_too() -> None:
    model = nn.Sequential(Pad([1, 0, 0, 1, 1, 2], "constant"), nn.Conv2d(5, 3, 2)).double()
    assert_solves(Inverted(model, torch.randn(2, 2, 4, 5, dtype=F64)), torch.randn(2, 2, 4, 5, dtype=F64))


def test_by_its_own_properties() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect")
    assert check_rule(layer, torch.randn(4, 2, 6, 5)).op == PADDED


@pytest.mark.parametrize("rows", [[[2, 1, 0, 1, 2, 3, 2], [1, 0, 1, 2]], [[0, 0, 1, 1, 3, 3], [-1, 0, 2, 1]]])
def test_rows_of_an_axis_are_found_in_the_index(rows: list[list[int]]) -> None:
    index = index_of(rows, (2, 4, 3), torch.device("cpu"))
    assert rows_of(index, (2, 4, 3)) == rows
    assert rows_of(index.flip(0), (2, 4, 3)) is None  # of another channel


def test_a_circle_has_a_torus_and_a_mirror_has_none() -> None:
    weight = torch.randn(2, 2, 3)
    sliding: dict[str, Any] = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    around = PaddedConvolution(weight, (2, 4), [[3, 0, 1, 2, 3, 0]], **sliding).around
    assert isinstance(around, Convolution)
    assert (around.padding, around.after, around.out_shape) == ((1,), (1,), (2, 4))
    assert PaddedConvolution(weight, (2, 4), [[1, 0, 1, 2, 3, 2]], **sliding).around is None


class Twice(nn.Module):
    """The padded map is read by the convolution, and once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, [1, 1, 1, 1], "reflect")
        both: Tensor = self.conv(padded) + padded[:, :, 1:-1, 1:-1]
        return both


def test_a_padding_that_something_else_reads_is_part_of_a_region() -> None:
    graph = fxinvert.trace(Twice(), torch.randn(2, 2, 5, 5))
    assert not any(stretch.copies for stretch in Flow(graph).stretches)
    assert Flow(graph).branches


def chain() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.LeakyReLU(0.5),
        nn.ReflectionPad2d(1),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def test_every_value_on_the_way_has_a_target_that_leads_to_the_output() -> None:
    model, x = chain().double(), torch.randn(6, 4, 8, 8, dtype=F64)
    inverse = fxinvert.invert(model, x[:2])
    rec = inverse(x, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert rec.names == ["input", "0.pad", "0", "1", "2", "3", "4", "5"]
    for name in rec.names:
        assert float(rec.consistency(name).max()) < 1e-6, name
    assert "3 → 1: padded_convolution, linear solve" in repr(inverse)
    plan = fxinvert.partition(inverse.graph, cuts=["2"])
    assert [segment.exit for segment in plan.segments] == ["2", "5"]


def test_its_weights_are_trained_on_padded_maps() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    student = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    x = torch.randn(64, 1, 4, 4)
    with torch.no_grad():
        data = [(x, teacher(x))]
    result = fxinvert.post_train(student, data, output_target="regression", validation_data=data, sweeps=4)
    assert result.final.loss < 1e-3 * result.baseline.loss


def test_the_inverse_of_padding_and_convolution_is_exported(tmp_path: Path) -> None:
    report = export_inverse(chain(), torch.randn(3, 4, 8, 8), tmp_path / "inverse.onnx")
    assert (tmp_path / "inverse.onnx").exists()
    assert report
