"""Repairing one segment at a time: it finds the layer that was damaged, and the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_folder import invoke, make_folder
from torch import nn

from fxinvert import DataError, Repairs, TraceError, models, repair_alone
from fxinvert.training import Metrics


def damaged(layer: str, size: float) -> nn.Module:
    """A converged network with noise on the weights of one layer."""
    model = models.load("digits_mlp")
    weight = dict(model.named_parameters())[f"{layer}.weight"]
    with torch.no_grad():
        weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize(("layer", "size"), [("fc1", 0.35), ("fc2", 0.7), ("fc3", 0.8)])
def test_the_damaged_layer_gains_most(layer: str, size: float) -> None:
    model = damaged(layer, size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    digits = models.digits()
    found = repair_alone(model, models.batches(digits.x_train[:600], digits.y_train[:600]))
    assert found.baseline.accuracy is not None
    assert found.baseline.accuracy < 0.9
    assert next(iter(found.gained)) == layer
    assert found.gained[layer] == found.baseline.loss - found.repaired[layer].loss
    assert list(found.repaired) == ["fc1", "fc2", "fc3"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_have_no_classes() -> None:
    x = torch.randn(80, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    found = repair_alone(model, [(x, x.sum(1, keepdim=True))])
    assert all(metrics.accuracy is None for metrics in found.repaired.values())
    assert max(found.gained.values()) > 0


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Flatten(), DataError, "no segment with parameters that can be trained"),
        (None, TraceError, "the model is NoneType; a torch.nn.Module"),
    ],
)
def test_what_cannot_be_repaired_is_refused(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        repair_alone(model, (torch.randn(20, 4, 3), torch.randint(2, (20, 4))))


def test_it_shows_itself() -> None:
    found = Repairs(Metrics(2.0, 0.5, 10), {"a": Metrics(1.5, 0.6, 10), "b<b>": Metrics(0.5, 0.9, 10)})
    assert list(found.gained.items()) == [("b<b>", 1.5), ("a", 0.5)]
    assert "b<b>  gains 1.5000: accuracy 90.00 %" in repr(found)
    assert "b&lt;b&gt;" in found._repr_html_()
    assert [segment["segment"] for segment in found.to_dict()["segments"]] == ["b<b>", "a"]


def test_a_run_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_folder(tmp_path, monkeypatch)
    done = invoke(
        "post-train", "cli_nets:Net", "data.npz", "--run-directory", "run", "--no-export", "--sweeps", "1"
    )
    assert done.exit_code == 0, done.output
    assert "Not measured for this run" in (here / "run" / "report.html").read_text()
    told = json.loads(invoke("explain", "--run", "run", "--repair-alone", "--json").output)
    assert {segment["segment"] for segment in told["repaired_alone"]["segments"]} == {"hidden", "head"}
    assert invoke("report", "run").exit_code == 0
    assert json.loads((here / "run" / "report.json").read_text())["repairs"] == told["repaired_alone"]
    assert 'id="repairs-table"' in (here / "run" / "report.html").read_text()
