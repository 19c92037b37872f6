"""What a model leaves open, as which of equal values it takes, a file settles: the proof knows it from a wrong file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxinvert
from fxinvert.export import verify_onnx
from fxinvert.export.ties import FirstOfEqual


class Chosen(nn.Module):
    """Keeps the entries whose scores are largest; scores that start at zero are equal."""

    def __init__(self, kept: int, *, ordered: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.kept, self.ordered = kept, ordered
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scale * x
        chosen = scores.topk(self.kept, dim=-1, sorted=self.ordered).indices
        y: Tensor = self.last(x * torch.zeros_like(x).scatter(-1, chosen, 1.0))
        return y


def test_of_equal_values_the_first_ones_are_proven(tmp_path: Path) -> None:
    model, x = Chosen(5).eval(), torch.randn(4, 12)
    with FirstOfEqual():
        first = model(x)
    assert not torch.allclose(first, model(x)), "torch takes the first ones here: choose other sizes"
    report = fxinvert.export_onnx(model, x, tmp_path / "m.onnx")
    assert "leaves open which of equal values" in report.note
    assert "batch size 7" in report.note


def test_scores_that_differ_are_no_ties(tmp_path: Path) -> None:
    model, x = Chosen(5).eval(), torch.randn(4, 12)
    nn.init.ones_(model.scale)
    report = fxinvert.export_onnx(model, x, tmp_path / "m.onnx")
    assert not report.note
    nn.init.constant_(model.scale, -1.0)  # a file that is wrong, with ties or without
    with pytest.raises(fxinvert.ExportMismatchError) as raised:
        verify_onnx(tmp_path / "m.onnx", model, x)
    assert "equal values" not in str(raised.value)
    nn.init.zeros_(model.scale)
    with pytest.raises(fxinvert.ExportMismatchError, match="leaves open which of equal values"):
        verify_onnx(tmp_path / "m.onnx", model, x)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_first_of_equal_values(dim: int, largest: bool) -> None:
    values = torch.randint(0, 3, (6, 40)).float()
    with FirstOfEqual():
        found = values.topk(4, dim, largest)
    assert torch.equal(found.values, values.topk(4, dim, largest).values)
    wanted = values.sort(dim=dim, descending=largest, stable=True).indices.narrow(dim, 0, 4)
    assert torch.equal(found.indices, wanted)


@pytest.mark.parametrize("largest", [True, False])
def test_a_choice_without_an_order_is_written_in_order(largest: bool, tmp_path: Path) -> None:
    class Unordered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.topk(30, dim=1, largest=largest, sorted=False).values

    fxinvert.export_onnx(Unordered(), torch.randn(4, 40), tmp_path / "m.onnx")
