"""Properties of the ONNX export: it is proven, it leaves everything as found, and on failure it leaves nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnxscript import rewriter
from torch import Tensor, nn

from fxinvert.errors import DataError, ExportMismatchError, FxInvertError, TraceError
from fxinvert.export import ExportReport, OutputDifference, export_onnx, onnx_file, translate, verify_onnx
from fxinvert.export.called import Call
from fxinvert.export.compare import compare
from fxinvert.export.inputs import like
from fxinvert.export.rounding import Rounding


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 4)
    )
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 1, 5, 5) * 2 + 1)
    return net.eval()


class TwoHeads(nn.Module):
    """Two inputs (one of indices), two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.hidden(x + self.words(index)))
        return self.head(hidden), hidden.argmax(1)


class BakesBatch(nn.Module):
    """Runs at every batch size, but its graph is only that of the size that it was traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1) * 2 if x.shape[0] == 4 else x * 2


class NeedsFourRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("offset")


class BranchesOnValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


IMAGE = torch.linspace(-1, 1, 4 * 25).reshape(4, 1, 5, 5)
ROWS = torch.linspace(-1, 1, 12).reshape(4, 3)
LINEAR = nn.Linear(3, 2)


@contextlib.contextmanager
def nothing_changes(*folders: Path) -> Iterator[None]:
    """Random state, warnings filters, loggers, environment and the folders' contents stay as they are."""

    def state() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            [np.asarray(part).tolist() for part in np.random.get_state(legacy=True)],
            list(warnings.filters),
            [logging.getLogger(name).level for name in ("", "torch", "torch.onnx", "onnxscript")],
            [sorted(os.listdir(folder)) for folder in folders],
            (sys.stdout, sys.stderr, torch.is_grad_enabled(), torch.get_num_threads()),
        ]

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """The conv net, exported once for the tests that only read."""
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    metadata = {"recipe": "closed form", "fxinvert.metric.accuracy": "0.9"}
    segments = {"0.weight": "first", "0.bias": "first", "1.weight": "first", "5.weight": "last"}
    return path, export_onnx(conv_net(), IMAGE, path, metadata=metadata, segments=segments)


def test_report_covers_every_batch_size_and_output(exported: tuple[Path, ExportReport]) -> None:
    path, report = exported
    assert report.path == path
    assert report.opset == 20
    assert [entry.batch_size for entry in report.differences] == [1, 2, 7] == list(report.batch_sizes)
    assert [entry.shape for entry in report.differences] == [(1, 4), (2, 4), (7, 4)]
    assert report.max_abs == max(entry.max_abs for entry in report.differences) < 1e-5
    assert os.listdir(path.parent) == ["net.onnx"]
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["path"] == str(path)
    assert loaded["max_abs"] == report.max_abs
    assert len(loaded["differences"]) == 3


def test_report_reads_well() -> None:
    entry = OutputDifference(2, "logits", (2, 4), 1.5e-7, 3e-7, (1, 3))
    assert str(ExportReport(Path("net.onnx"), 20, (2,), (entry,), 1e-5, 1e-4)).splitlines() == [
        "net.onnx: opset 20, equal to the model at batch sizes 2",
        "  tolerance 1e-05 + 0.0001 * |expected|",
        "  largest difference 1.5e-07 (relative 3.0e-07)",
        "  batch  output   max abs   max rel  shape, worst at",
        "      2  logits   1.5e-07   3.0e-07  [2, 4], [1, 3]",
    ]


def test_file_has_a_batch_axis_metadata_and_segments(exported: tuple[Path, ExportReport]) -> None:
    model = onnx.load(exported[0])
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input] == ["batch"]
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["fxinvert.recipe"] == "closed form"
    assert facts["fxinvert.metric.accuracy"] == "0.9"
    assert facts["fxinvert.version"]
    segments = {
        node.op_type: entry.value
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == "fxinvert.segment"
    }
    assert segments == {"Conv": "first", "Gemm": "last"}


def test_same_model_gives_the_same_bytes_without_paths_of_this_machine(tmp_path: Path) -> None:
    for name in "ab":
        export_onnx(conv_net(), IMAGE, tmp_path / name, batch_sizes=(2,))
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    assert os.path.dirname(torch.__file__).encode() not in first


def test_segments_of_equal_layers_are_told_apart(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    # the optimizer makes them share one initializer
    net = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer))
    export_onnx(
        net, ROWS, tmp_path / "net.onnx", segments={"0.weight": "a", "2.weight": "b"}, batch_sizes=(2,)
    )
    nodes = [node for node in onnx.load(tmp_path / "net.onnx").graph.node if node.op_type == "Gemm"]
    named = [
        [entry.value for entry in node.metadata_props if entry.key == "fxinvert.segment"] for node in nodes
    ]
    assert named == [["a"], ["b"]]


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    net, example = TwoHeads(), (ROWS, torch.tensor([0, 1, 2, 4]))
    with nothing_changes():
        report = export_onnx(net, example, tmp_path / "net.onnx", batch_sizes=(3, 1))
    shapes = [(entry.batch_size, entry.shape) for entry in report.differences]
    assert shapes == [(3, (3, 2)), (3, (3,)), (1, (1, 2)), (1, (1,))]


def test_an_example_of_one_row_still_gives_a_dynamic_batch(tmp_path: Path) -> None:
    assert export_onnx(conv_net(), IMAGE[:1], tmp_path / "net.onnx").batch_sizes == (1, 2, 7)


def test_model_and_process_stay_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = conv_net().train()
    net[1].eval()
    net[5].weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with nothing_changes():
        export_onnx(net, IMAGE, tmp_path / "net.onnx", batch_sizes=(2,))
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_an_existing_file_is_replaced_by_the_new_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    net = nn.Linear(3, 2)
    export_onnx(net, ROWS, path, batch_sizes=(2,))
    with torch.no_grad():
        net.weight.add_(1)
    with pytest.raises(ExportMismatchError):
        verify_onnx(path, net, ROWS)
    export_onnx(net, ROWS, path, batch_sizes=(2,))
    assert verify_onnx(path, net, ROWS).max_abs < 1e-5


def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 1000)
    net = nn.Linear(300, 5)
    export_onnx(net, torch.randn(2, 300), tmp_path / "net.onnx", batch_sizes=(2,))
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    verify_onnx(tmp_path / "net.onnx", net, torch.randn(2, 300))


@pytest.fixture
def broken_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter whose files have other weights than the model."""
    original = translate.translate

    def broken(*args: Any, **options: Any) -> Any:
        for program in original(*args, **options):
            for value in program.model.graph.initializers.values():
                array = value.const_value.numpy().copy()
                array.flat[-1] += 0.5
                value.const_value = onnx_ir.tensor(array)
            yield program

    monkeypatch.setattr(onnx_file, "translate", broken)


@pytest.mark.usefixtures("broken_exporter")
@pytest.mark.parametrize("before", [None, b"the file of yesterday"])
def test_a_wrong_file_never_appears(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if before is not None:
        path.write_bytes(before)
    with nothing_changes(tmp_path), pytest.raises(ExportMismatchError) as caught:
        export_onnx(LINEAR, ROWS, path)
    message = str(caught.value)
    for part in (str(path), "'output' (1 of 1)", "batch size 1", "index [0, 1]", "atol 1e-05 + rtol 0.0001"):
        assert part in message
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (BakesBatch(), ExportMismatchError, "fixed the batch size of input 'x' at 4"),
        (NeedsFourRows(), DataError, "does not run at batch size 2"),
        (BranchesOnValue(), TraceError, "could not export BranchesOnValue"),
        (Noisy(), ExportMismatchError, "Remove randomness"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_models_that_cannot_be_exported(
    model: nn.Module, error: type[FxInvertError], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with nothing_changes(tmp_path), pytest.raises(error, match=says) as caught:
        export_onnx(model, ROWS, tmp_path / "net.onnx")
    assert (caught.value.__cause__ is not None) == (error is not ExportMismatchError)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_fixed_its_batch_size_is_refused_at_another(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(LINEAR, ROWS, path, batch_sizes=(2,))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    with pytest.raises(ExportMismatchError, match="does not run at batch size 7") as caught:
        verify_onnx(path, LINEAR, ROWS, batch_sizes=(2, 7))
    assert caught.value.__cause__ is not None


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file/net.onnx", "none/net.onnx", ".", "n" * 300):
        with nothing_changes(tmp_path), pytest.raises(DataError, match=r"cannot write|is a folder"):
            export_onnx(LINEAR, ROWS, tmp_path / name)
    os.mkfifo(tmp_path / "pipe")  # as root, a file put in the place of /dev/null would be there for all
    with nothing_changes(tmp_path), pytest.raises(DataError, match="pipe, which a file would replace"):
        export_onnx(LINEAR, ROWS, tmp_path / "pipe")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot write") as caught:
        export_onnx(LINEAR, ROWS, tmp_path / "net.onnx")
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_full_disk_is_our_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with nothing_changes(tmp_path), pytest.raises(DataError, match="No space left") as caught:
        export_onnx(LINEAR, ROWS, tmp_path / "net.onnx", batch_sizes=(1,))
    assert isinstance(caught.value.__cause__, OSError)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"batch_sizes": ()}, "batch_sizes must be positive integers, at least one"),
    ({"batch_sizes": (0,)}, r"batch_sizes must be .* got \(0,\)"),
    ({"batch_sizes": (1.5,)}, r"batch_sizes must be .* got \(1.5,\)"),
    ({"atol": -1.0}, "atol must be a finite number >= 0, not -1.0"),
    ({"rtol": float("nan")}, "rtol must be a finite number >= 0, not nan"),
    ({"opset": 17}, "opset 17 is too old"),
    ({"opset": 99}, "opset 99 is not available"),
    ({"metadata": {"version": "mine"}}, "the metadata key 'version' is taken"),
    ({"metadata": {"loss": 0.5}}, "metadata maps names to strings; got 'loss': 0.5"),
    ({"segments": {"nowhere.weight": "a"}}, "segments names 'nowhere.weight', which is no parameter"),
    ({"example_inputs": ()}, "needs an input 'input'"),
    ({"example_inputs": torch.tensor(1.0)}, "no example input has an axis that varies"),
    ({"example_inputs": torch.zeros(0, 3)}, "batch needs at least one entry"),
    ({"example_inputs": (ROWS, ROWS[:2])}, "takes 1 inputs; 2 were given"),
    ({"example_inputs": ("x",)}, "holds no tensor"),
    ({"example_inputs": {"x": ROWS}}, "takes no input 'x'"),
    ({"example_inputs": torch.zeros(2, 4)}, "does not run at batch size 1"),
    ({"model": nn.Linear(3, 2, device="meta")}, "Load its weights first"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[next(iter(s)) for s, _ in SETTINGS])
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with nothing_changes(tmp_path), pytest.raises(DataError, match=message):
        export_onnx(**{"model": LINEAR, "example_inputs": ROWS, "path": tmp_path / "net.onnx", **settings})


def test_arguments_in_another_order_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="path of the ONNX file is Tensor; a str or Path is needed"):
        export_onnx(conv_net(), str(tmp_path / "net.onnx"), IMAGE)  # type: ignore[arg-type]


def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no ONNX file"):
        verify_onnx(tmp_path / "none.onnx", LINEAR, ROWS)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportMismatchError, match="not a valid ONNX file"):
        verify_onnx(tmp_path / "bad.onnx", LINEAR, ROWS)
    with pytest.raises(DataError, match=r"only an nn\.Module"):
        export_onnx(torch.relu, ROWS, tmp_path / "net.onnx")  # type: ignore[arg-type]


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(LINEAR, ROWS, path, batch_sizes=(2,))
    for other, example, says in (
        (nn.Linear(3, 5), ROWS, "shapes"),
        (TwoHeads(), (ROWS, torch.zeros(4, dtype=torch.int64)), "takes 1 inputs"),
    ):
        with pytest.raises(ExportMismatchError, match=says):
            verify_onnx(path, other, example)


def test_compare_finds_the_element_farthest_beyond_its_own_tolerance() -> None:
    expected = np.array([[1000.0, 1.0], [0.0, 2.0]])
    actual = expected + np.array([[0.09, 0.0], [0.001, 0.05]])
    found = compare(actual, expected, atol=1e-5, rtol=1e-4)
    assert found.worst == (1, 1)
    assert "2 of 4 elements" in found.problem
    found = compare(actual, expected, atol=0.1, rtol=0.0)
    assert not found.problem
    assert (found.max_abs, found.largest) == pytest.approx((0.09, 1000.0))
    assert found.worst == (0, 0)


def test_compare_is_exact_for_integers_and_strict_about_nonfinite_values() -> None:
    big = np.array([2**60, 1])
    found = compare(big + np.array([1, 0]), big, atol=10.0, rtol=10.0)
    assert found.problem
    assert found.worst == (0,)
    values = np.array([np.nan, -np.inf, 1.0])
    found = compare(values.copy(), values, atol=0.0, rtol=0.0)
    assert (found.max_abs, found.largest, found.problem) == (0.0, 1.0, "")
    for wrong in (
        np.array([np.nan, np.inf, 1.0]),
        np.array([0.0, -np.inf, 1.0]),
        np.array([np.nan, -np.inf, np.nan]),
    ):
        assert compare(wrong, values, atol=1e9, rtol=1e9).problem
    nothing = compare(np.array([np.nan]), np.array([np.nan]), atol=1.0, rtol=1.0)
    assert "nothing can be proven" in nothing.problem
    assert "index []" in compare(np.array(1.0), np.array(2.0), atol=0.0, rtol=0.0).problem


def test_inputs_look_like_the_example() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x * index

    unit = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    call = Call.of(Two(), (unit, torch.tensor([3, 5])))
    rows, index = like(call, {"batch": 5}, seed=0)
    assert rows.shape == (5, 2)
    assert rows.min() >= 0
    assert rows.max() <= 1
    assert not torch.equal(rows[0], rows[2])
    assert index.tolist() == [3, 5, 3, 5, 3]
    assert torch.equal(like(call, {"batch": 5}, seed=0)[0], rows)
    zeros = Call.of(nn.ReLU(), torch.zeros(1, 2))
    assert like(zeros, {"batch": 3}, seed=0)[0].abs().max() > 0


def test_importing_the_room_is_cheap() -> None:
    code = "import sys, fxinvert.export; print([m for m in sys.modules if m.split('.')[0] in ('onnx', 'onnxruntime')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_large_graph_is_folded_without_looking_for_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate, "REWRITTEN", 0)
    monkeypatch.setattr(rewriter, "rewrite", lambda *_: pytest.fail("patterns are looked for"))

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y: Tensor = self.part(x + torch.arange(4).float().cos() * 2)
            return y, y

    export_onnx(Positions().eval(), torch.randn(2, 4), tmp_path / "model.onnx")
    ops = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "Cos" not in ops
    assert "Constant" not in ops


class Guarded(nn.Module):
    """x / (x + ε), which is 0 at 0, scaled by a number near one."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x + 1e-9) * 1.000009


def test_small_constants_and_those_near_one_stay(tmp_path: Path) -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    export_onnx(Guarded(), x, tmp_path / "net.onnx", rtol=1e-6, atol=1e-6)


class Cancelling(nn.Module):
    """The difference of two large products that are nearly equal: rounding takes it beyond the plain tolerance."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.up, self.norm = nn.Linear(8, 1024), nn.LayerNorm(1024)
        self.first, self.second = (nn.Linear(1024, 16, bias=False) for _ in range(2))
        with torch.no_grad():
            self.first.weight.copy_(20 * torch.randn(16, 1024))
            self.second.weight.copy_(self.first.weight + 0.1 * torch.randn(16, 1024))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(x))
        y: Tensor = self.first(h) - self.second(h)
        return y + self.noise * torch.randn_like(y) if self.noise else y


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cancelling, Tensor, Path]:
    torch.manual_seed(0)
    model, x = Cancelling().eval(), torch.randn(4, 8)
    path = tmp_path_factory.mktemp("rounding") / "net.onnx"
    report = export_onnx(model, x, path)
    assert "by rounding at batch size 1; batch size 2; batch size 7" in str(report)
    return model, x, path


def test_what_rounds_as_the_model_does_is_equal(cancelling: tuple[Cancelling, Tensor, Path]) -> None:
    model, x, path = cancelling
    report = verify_onnx(path, model, x, batch_sizes=(3,))
    assert "by rounding at batch size 3" in report.note
    assert report.max_abs > 1e-4  # not so if the tolerance had been met
    assert model.first.weight.dtype == torch.get_default_dtype() == torch.float32


def broken_weight(file: onnx.ModelProto) -> None:
    value = next(value for value in file.graph.initializer if "first" in value.name)
    array = onnx.numpy_helper.to_array(value).copy()
    array.flat[7] += 0.1
    value.CopyFrom(onnx.numpy_helper.from_array(array, value.name))


def broken_attribute(file: onnx.ModelProto) -> None:
    norm = next(node for node in file.graph.node if node.op_type == "LayerNormalization")
    epsilon = next(attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.02


@pytest.mark.parametrize("broken", [broken_weight, broken_attribute])
def test_a_wrong_graph_is_not_taken_for_rounding(
    broken: Callable[[onnx.ModelProto], None], cancelling: tuple[Cancelling, Tensor, Path], tmp_path: Path
) -> None:
    model, x, path = cancelling
    file = onnx.load(path)
    broken(file)
    onnx.save(file, tmp_path / "net.onnx")
    with pytest.raises(ExportMismatchError, match="more than 8 times the model's own rounding"):
        verify_onnx(tmp_path / "net.onnx", model, x)


def test_noise_is_no_rounding(cancelling: tuple[Cancelling, Tensor, Path]) -> None:
    model, x, path = cancelling
    noisy = copy.deepcopy(model)
    noisy.noise = 1e-2
    with pytest.raises(ExportMismatchError, match="draws random numbers"):
        verify_onnx(path, noisy, x)


def test_what_rounding_hides_is_not_proven(
    cancelling: tuple[Cancelling, Tensor, Path], tmp_path: Path
) -> None:
    model, x, _ = cancelling
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        hidden.second.weight.copy_(hidden.first.weight + 1e-3 * torch.randn(16, 1024))
    with pytest.raises(ExportMismatchError, match="model's own rounding"):
        export_onnx(hidden, x, tmp_path / "net.onnx")


def test_rounding_explains_no_more_than_a_hundredth_of_an_output() -> None:
    """Of each element by itself: one that rounds by more neither passes with it, nor keeps others from passing."""
    exact = np.full((1, 4), 100.0)
    rounding = Rounding(exact, np.array([[1e-3, 1e-3, 5.0, 5.0]]))
    explained = rounding.explains(exact + np.array([[8e-3, 9e-3, 0.99, 1.01]]))
    assert explained.tolist() == [[True, False, True, False]]


def test_what_stands_in_the_way_of_a_model_as_it_runs_is_told(tmp_path: Path) -> None:
    """Checks of values stop the first capture; what ONNX has no form for, the last."""

    class Likelihood(nn.Module):
        def forward(self, x: Tensor) -> Any:
            given = torch.distributions.StudentT(1 + x * x, x, validate_args=True)
            return torch.special.bessel_j0(given.log_prob(x))  # type: ignore[no-untyped-call]

    with pytest.raises(
        TraceError, match=r"data-dependent.*Captured as it runs: .*No ONNX function.*bessel_j0"
    ):
        export_onnx(Likelihood(), torch.randn(3, 4), tmp_path / "model.onnx")


class FromTwoOn(nn.Module):
    """A group norm of groups of one number does not run on one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 6), nn.GroupNorm(6, 6)

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        return x + self.norm(x)


class Shots(nn.Module):
    """Every four rows are the frames of one shot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        shots = self.layer(x).view(-1, 4, 4)
        return (shots - shots.mean(1, keepdim=True)).view(-1, 4)


@pytest.mark.parametrize(("model", "rows", "sizes"), [(FromTwoOn(), 3, (2, 3, 6, 7)), (Shots(), 4, (4, 8))])
def test_a_proof_takes_the_batch_sizes_that_the_model_runs_at(
    model: nn.Module, rows: int, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    x, path = torch.randn(rows, 4), tmp_path / "model.onnx"
    report = export_onnx(model, x, path)
    assert report.batch_sizes == sizes
    assert report.note.startswith("The model itself does not run at batch size 1 (")
    assert verify_onnx(path, model, x).note == report.note
    with pytest.raises(DataError, match="does not run at batch size 1"):
        export_onnx(model, x, path, batch_sizes=(1, 2))


def test_code_that_reads_data_is_exported(tmp_path: Path) -> None:
    class OfData(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return nn.functional.linear(self.layer(x.data).data, self.layer.weight.data)

    assert export_onnx(OfData(), torch.randn(2, 4), tmp_path / "model.onnx").max_abs < 1e-5


def test_a_batch_whose_parts_are_counted_is_exported(tmp_path: Path) -> None:
    class Frames(nn.Module):
        def forward(self, x: Tensor) -> Any:
            frames = x.exp().flatten(0, 1)  # three of each sample
            frames = frames.contiguous() if frames.shape[0] >= 64 else frames
            return frames.view(-1, 3, 4).mean(1)

    report = export_onnx(Frames(), torch.randn(2, 3, 4), tmp_path / "model.onnx", batch_sizes=(1, 7, 30))
    assert report.max_abs < 1e-5
