"""Properties of putting weights into a file of the user's: recognized by value whatever they are called, or refused."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from reference import NAMES, inputs_of
from torch import Tensor, nn

from fxinvert import models
from fxinvert.errors import DataError, ExportMismatchError, FxInvertError
from fxinvert.export import export_onnx, update_onnx, verify_onnx

Exporter = Literal["optimized", "plain", "older"]
EXPORTERS: tuple[Exporter, ...] = ("optimized", "plain", "older")
ROWS = torch.linspace(-1, 1, 12).reshape(4, 3)


def write(model: nn.Module, example: tuple[Tensor, ...], path: Path, exporter: Exporter) -> Path:
    """A file as users have them, by torch's own exporters."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        if exporter == "older":
            names = [f"in{i}" for i in range(len(example))]
            axes = {name: {0: "n"} for name in names}
            torch.onnx.export(
                model, example, path, dynamo=False, input_names=names, dynamic_axes=axes, opset_version=17
            )
        else:
            batch = torch.export.Dim("batch")
            program = torch.onnx.export(
                model,
                example,
                dynamo=True,
                verbose=False,
                optimize=exporter == "optimized",
                dynamic_shapes=tuple({0: batch} for _ in example),
            )
            assert program is not None
            program.save(path, external_data=False)
    return path


def shaken(model: nn.Module) -> nn.Module:
    """A copy with other weights and statistics."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for value in (*made.parameters(), *made.buffers()):
            if value.is_floating_point():
                value.mul_(1 + 0.3 * torch.rand_like(value)).add_(0.05 * torch.rand_like(value))
    return made


QUICK = ("digits_lstm", "digits_vit", "digits_resnet")


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_reference_networks(name: str, exporter: Exporter, tmp_path: Path) -> None:
    early, converged, example = models.load(name, "early"), models.load(name), inputs_of(name, 4)
    into = write(early, example, tmp_path / "old.onnx", exporter)
    content = into.read_bytes()
    update_onnx(converged, early, example, into, tmp_path / "new.onnx")
    assert into.read_bytes() == content
    verify_onnx(tmp_path / "new.onnx", converged, example, seed=5)
    with pytest.raises(ExportMismatchError):
        verify_onnx(tmp_path / "new.onnx", early, example)
    assert sorted(os.listdir(tmp_path)) == ["new.onnx", "old.onnx"]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.rnn(x)[0]
        return result


def normalized(kind: Callable[..., nn.Module], norm: Callable[..., nn.Module]) -> nn.Module:
    net = nn.Sequential(kind(3, 4, 2), norm(4), nn.ReLU(), kind(4, 4, 1, bias=False), norm(4, affine=False))
    return shaken(net).eval()


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: normalized(nn.Conv1d, nn.BatchNorm1d), torch.rand(3, 3, 6)),
    "conv2d": (lambda: normalized(nn.Conv2d, nn.BatchNorm2d), torch.rand(3, 3, 6, 6)),
    "transposed": (lambda: normalized(nn.ConvTranspose2d, nn.BatchNorm2d), torch.rand(3, 3, 4, 4)),
    "linear": (lambda: shaken(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))).eval(), ROWS),
    "attention": (lambda: shaken(Attends()), torch.rand(3, 5, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), torch.rand(3, 5, 3)),
    "gru": (lambda: Recurrent(nn.GRU), torch.rand(3, 5, 3)),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("net", NETS)
def test_folded_cut_and_reordered_weights(net: str, exporter: Exporter, tmp_path: Path) -> None:
    make, example = NETS[net]
    model = make().eval()
    into = write(model, (example,), tmp_path / "old.onnx", exporter)
    update_onnx(shaken(model), model, example, into, into)
    assert os.listdir(tmp_path) == ["old.onnx"]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_layers_that_were_alike_are_told_apart(exporter: Exporter, tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer), nn.Tanh(), copy.deepcopy(layer))
    into = write(model, (ROWS,), tmp_path / "old.onnx", exporter)
    update_onnx(shaken(model), model, ROWS, into, tmp_path / "new.onnx", batch_sizes=(2,))


def test_only_what_changed_has_to_be_found(tmp_path: Path) -> None:
    """A constant folded of two weights is no obstacle while they stay."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
            self.unused, self.linear = nn.Parameter(torch.rand(2)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(x) * (self.a + self.b)
            return result

    model = Sum()
    into = write(model, (ROWS,), tmp_path / "old.onnx", "optimized")
    updated = shaken(model)
    with torch.no_grad():
        updated.a.copy_(model.a)  # type: ignore[operator]
        updated.b.copy_(model.b)  # type: ignore[operator]
    update_onnx(updated, model, ROWS, into, tmp_path / "new.onnx", batch_sizes=(2,))
    with pytest.raises(DataError, match="original values of a, b: an optimizer has folded, merged"):
        update_onnx(shaken(model), model, ROWS, into, tmp_path / "new.onnx", batch_sizes=(2,))


def anonymize(path: Path) -> None:
    """Takes what tells of the model from a file's names and metadata."""
    file = onnx.load(path)
    renamed = {tensor.name: f"t{i}" for i, tensor in enumerate(file.graph.initializer)}
    for tensor in file.graph.initializer:
        tensor.name = renamed[tensor.name]
    for i, node in enumerate(file.graph.node):
        del node.metadata_props[:]
        node.name = f"n{i}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(file, path)


def test_names_that_tell_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    into = write(model, (ROWS,), tmp_path / "old.onnx", "plain")
    anonymize(into)
    update_onnx(shaken(model), model, ROWS, into, tmp_path / "new.onnx", batch_sizes=(2,))


def test_a_guess_is_refused(tmp_path: Path) -> None:
    """Two layers of one value, and neither names nor metadata tell which is which."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer))
    into = write(model, (ROWS,), tmp_path / "old.onnx", "optimized")
    anonymize(into)
    with pytest.raises(DataError, match="which now differ, and neither its name nor"):
        update_onnx(shaken(model), model, ROWS, into, tmp_path / "new.onnx", batch_sizes=(2,))
    assert os.listdir(tmp_path) == ["old.onnx"]


def test_external_data_stays_external(tmp_path: Path) -> None:
    model = nn.Linear(300, 4)
    example = torch.rand(2, 300)
    into = write(model, (example,), tmp_path / "old.onnx", "plain")
    file = onnx.load(into)
    onnx.save(file, into, save_as_external_data=True, location="weights.bin", size_threshold=100)
    update_onnx(shaken(model), model, example, into, tmp_path / "new.onnx", batch_sizes=(2,))
    assert sorted(os.listdir(tmp_path)) == ["new.onnx", "new.onnx.data", "old.onnx", "weights.bin"]


def test_files_in_half_precision(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    into = tmp_path / "half.onnx"
    export_onnx(model, ROWS, into, precision="float16", batch_sizes=(2,))
    update_onnx(shaken(model), model, ROWS, into, into, batch_sizes=(2,), atol=1e-2, rtol=1e-2)
    kinds = {tensor.data_type for tensor in onnx.load(into).graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_metadata_of_the_file_stays(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    into = write(model, (ROWS,), tmp_path / "old.onnx", "plain")
    file = onnx.load(into)
    onnx.helper.set_model_props(file, {"owner": "me"})
    onnx.save(file, into)
    update_onnx(shaken(model), model, ROWS, into, tmp_path / "new.onnx", metadata={"run": "7"})
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "new.onnx").metadata_props}
    assert facts["owner"] == "me"
    assert facts["fxinvert.run"] == "7"
    assert facts["fxinvert.into"] == "old.onnx"


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    into = write(model, (ROWS,), tmp_path / "old.onnx", "plain")
    content = into.read_bytes()
    with pytest.raises(DataError, match="do not have the same weights: weight, bias"):
        update_onnx(nn.Linear(3, 4), model, ROWS, into, into)
    with pytest.raises(ExportMismatchError, match="not a file of the original model"):
        update_onnx(model, shaken(model), ROWS, into, into)
    with pytest.raises(DataError, match="no ONNX file"):
        update_onnx(model, model, ROWS, tmp_path / "none.onnx", into)
    assert into.read_bytes() == content


def test_a_result_that_is_not_right_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxinvert.export import carriers

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    into = write(model, (ROWS,), tmp_path / "old.onnx", "plain")
    content = into.read_bytes()
    put = carriers.Carrier.write
    monkeypatch.setattr(carriers.Carrier, "write", lambda self, array: put(self, array * np.float32(1.01)))
    with pytest.raises(ExportMismatchError, match="not what the model computes"):
        update_onnx(shaken(model), model, ROWS, into, into, batch_sizes=(2,))
    assert into.read_bytes() == content
    assert os.listdir(tmp_path) == ["old.onnx"]


# broken files

Change = Callable[[bytes, random.Random], bytes]


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def other_shape(content: bytes, chance: random.Random) -> bytes:
    file = onnx.load_from_string(content)
    tensor = chance.choice(file.graph.initializer)
    size = chance.randrange(len(tensor.dims))
    tensor.dims[size] += chance.choice([-1, 1, 7])
    if chance.random() < 0.5:  # with as much data as it says
        numbers = np.random.default_rng(0).random(tuple(tensor.dims), dtype=np.float32)
        tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    return bytes(file.SerializeToString())


def swapped(content: bytes, chance: random.Random) -> bytes:
    file = onnx.load_from_string(content)
    a, b = chance.sample(list(file.graph.initializer), 2)
    a.name, b.name = b.name, a.name
    return bytes(file.SerializeToString())


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One number of a weight is another."""
    file = onnx.load_from_string(content)
    tensor = chance.choice(file.graph.initializer)
    numbers = numpy_helper.to_array(tensor).copy()
    numbers.flat[chance.randrange(numbers.size)] += chance.choice([0.5, -3.0, np.inf, np.nan])
    tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    return bytes(file.SerializeToString())


@pytest.mark.parametrize("change", [truncated, other_shape, swapped, flipped], ids=lambda c: c.__name__)
def test_fifty_broken_files_each_are_refused(change: Change, tmp_path: Path) -> None:
    """Broken in any of these ways, a file is refused by an error of ours, and stays as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    whole = write(model, (ROWS,), tmp_path / "whole.onnx", "plain").read_bytes()
    updated, into = shaken(model), tmp_path / "broken.onnx"
    for seed in range(50):
        into.write_bytes(broken := change(whole, random.Random(seed)))
        with pytest.raises(FxInvertError):
            update_onnx(updated, model, ROWS, into, into, batch_sizes=(1, 2))
        assert into.read_bytes() == broken
        assert sorted(os.listdir(tmp_path)) == ["broken.onnx", "whole.onnx"]


def test_operators_of_other_domains_are_our_error(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    into = write(model, (ROWS,), tmp_path / "old.onnx", "plain")
    file = onnx.load(into)
    file.graph.node[-1].domain = "somebody.else"
    file.opset_import.append(onnx.helper.make_opsetid("somebody.else", 1))
    onnx.save(file, into)
    tries: list[Callable[[], Any]] = [
        lambda: verify_onnx(into, model, ROWS),
        lambda: update_onnx(shaken(model), model, ROWS, into, into),
    ]
    for attempt in tries:
        with pytest.raises(ExportMismatchError, match="onnxruntime cannot load"):
            attempt()


@pytest.mark.parametrize("exporter", ["newer", "older"])
def test_a_file_for_one_batch_size_is_proven_at_that(exporter: str, tmp_path: Path) -> None:
    old, into = nn.Linear(3, 2), tmp_path / "old.onnx"
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        torch.onnx.export(old, (ROWS,), into, dynamo=exporter == "newer")  # as torch does by default
    report = update_onnx(shaken(old), old, ROWS[:2], into, tmp_path / "new.onnx")
    assert report.batch_sizes == (4,)
    assert "takes batches of 4 samples, and no others" in str(report)
    with pytest.raises(ExportMismatchError, match="does not run at batch size 2"):
        verify_onnx(into, old, ROWS, batch_sizes=(2,))
    into.write_text("no file of onnx")
    with pytest.raises(ExportMismatchError, match="not a valid ONNX file"):
        verify_onnx(into, old, ROWS)
