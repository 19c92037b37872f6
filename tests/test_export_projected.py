"""Export of LSTMs whose state is projected, for which ONNX has no op."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxinvert
from fxinvert.errors import TraceError
from fxinvert.export import export_onnx, update_onnx

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Projected(nn.Module):
    """An LSTM with `proj_size` that starts from a state of the model's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, proj_size=2, batch_first=True, **settings)
        self.first = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        state = self.first(x[:, 0]).expand(cells, -1, -1)
        found, (hidden, cell) = self.rnn(x, (state, torch.cat([state, state], -1)))
        return found, hidden[-1], cell[-1]


@pytest.mark.parametrize("settings", [{"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_projected_lstms_are_written_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """Both directions and every layer, in a file that takes new weights."""
    example = torch.rand(3, 3, 3)
    model = Projected(**settings)
    file = tmp_path / "model.onnx"
    assert len(export_onnx(model, example, file, batch_sizes=(1, 3)).differences) == 6
    updated = copy.deepcopy(model)
    with torch.no_grad():
        updated.rnn.get_parameter("weight_hr_l0").mul_(2)
    update_onnx(updated, model, example, file, file, batch_sizes=(2,))


def test_a_projected_lstm_has_as_many_steps_as_the_example(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"'proj_size'.*fixed length.*leave its length out of dynamic_axes"):
        export_onnx(Projected(), torch.rand(3, 4, 3), tmp_path / "m.onnx", dynamic_axes={"x": {1: "time"}})


def test_a_captured_one_is_written_out_too(tmp_path: Path) -> None:
    layer, example = nn.LSTM(3, 4, proj_size=2), torch.rand(5, 3, 3)
    graph = fxinvert.trace(nn.Sequential(Transposed(), layer, First()), example.transpose(0, 1))
    export_onnx(graph, example.transpose(0, 1), tmp_path / "m.onnx", batch_sizes=(1, 3))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class First(nn.Module):
    def forward(self, found: tuple[Tensor, Any]) -> Tensor:
        return found[0].transpose(0, 1)
