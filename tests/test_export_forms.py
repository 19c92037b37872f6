"""Properties of the export: any form of inputs and outputs, other axes, half precision, what a mismatch says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from reference import NAMES, inputs_of, parts_of
from torch import Tensor, nn

import fxinvert
from fxinvert import models
from fxinvert.errors import DataError, ExportMismatchError, TraceError
from fxinvert.export import ExportReport, export_onnx, onnx_file, session, verify_onnx

ROWS = torch.linspace(-1, 1, 12).reshape(4, 3)


def axes_of(path: Path) -> dict[str, list[int | str]]:
    """The shape of every input, sizes and names."""
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(path).graph.input
    }


def names_in(report: ExportReport) -> list[str]:
    return list(dict.fromkeys(entry.output for entry in report.differences))


# the reference networks


QUICK = ("digits_lstm", "digits_two_head", "char_transformer", "digits_resnet")


@pytest.mark.parametrize("state", [pytest.param("early", marks=pytest.mark.slow), "converged"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_every_reference_network_exports(name: str, state: str, tmp_path: Path) -> None:
    model, example = models.load(name, state), inputs_of(name, 4)
    report = export_onnx(model, example, tmp_path / "net.onnx")
    assert (report.atol, report.rtol, report.batch_sizes) == (1e-5, 1e-4, (1, 2, 7))
    assert verify_onnx(tmp_path / "net.onnx", model, example, seed=1).max_abs < 1e-3
    assert names_in(report) == list(parts_of(name).test.labels)
    other = models.load(name, "early" if state == "converged" else "converged")
    with pytest.raises(ExportMismatchError, match="The first node where the two differ"):
        verify_onnx(tmp_path / "net.onnx", other, example, batch_sizes=(2,))


# inputs


class ByName(nn.Module):
    """Takes what it needs by name, nested, with a switch that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(
        self, x: Tensor, extra: dict[str, Tensor], pair: tuple[Tensor, Tensor], *, negate: bool = False
    ) -> Tensor:
        y = self.first(x) + self.second(extra["shift"]) * pair[0] - pair[1]
        result: Tensor = -y if negate else y
        return result


@pytest.mark.parametrize("negate", [True, False])
def test_inputs_by_name_and_nested(negate: bool, tmp_path: Path) -> None:
    example = {
        "x": ROWS,
        "extra": {"shift": ROWS.flip(0)},
        "pair": (ROWS[:, :2], ROWS[:, 1:]),
        "negate": negate,
    }
    net = ByName()
    export_onnx(net, example, tmp_path / "net.onnx")
    axes = axes_of(tmp_path / "net.onnx")
    assert list(axes) == ["x", "extra_shift", "pair_0", "pair_1"]
    assert all(shape[0] == "batch" for shape in axes.values())
    verify_onnx(tmp_path / "net.onnx", net, example, seed=3)
    with pytest.raises(ExportMismatchError):
        verify_onnx(tmp_path / "net.onnx", net, {**example, "negate": not negate})


def test_order_of_names_does_not_matter(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    export_onnx(Difference(), {"b": ROWS, "a": ROWS.flip(1)}, tmp_path / "net.onnx", batch_sizes=(2,))
    verify_onnx(tmp_path / "net.onnx", Difference(), (ROWS.flip(0), ROWS), batch_sizes=(2,))


# outputs


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, Tensor | None]


class Answers(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give, self.linear = give, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.give(self.linear(x))


@pytest.mark.parametrize(
    ("give", "names"),
    [
        (lambda y: (y, y.relu()), ["output_0", "output_1"]),
        (lambda y: {"b": y, "a": [y * 2, None]}, ["b", "a_0"]),
        (lambda y: Answer(y, (y.tanh(), None)), ["logits", "hidden_0"]),
        (lambda y: {"x": y}, ["x_out"]),
        (lambda y: (y, y), ["output_0", "output_1"]),
    ],
    ids=["tuple", "nested", "dataclass", "name of an input", "twice the same"],
)
def test_several_outputs(give: Callable[[Tensor], Any], names: list[str], tmp_path: Path) -> None:
    report = export_onnx(Answers(give), ROWS, tmp_path / "net.onnx", batch_sizes=(1, 3))
    assert names_in(report) == names
    assert [entry.shape for entry in report.differences] == [(1, 3)] * len(names) + [(3, 3)] * len(names)


@pytest.mark.parametrize(
    "give",
    [lambda y: "text", lambda y: {"a": {"b": y}, "a_b": y}, lambda y: None, lambda y: ()],
    ids=["text", "one name twice", "nothing", "empty"],
)
def test_outputs_that_cannot_be_exported(give: Callable[[Tensor], Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"output|return"):
        export_onnx(Answers(give), ROWS, tmp_path / "net.onnx")
    assert not os.listdir(tmp_path)


# axes


class OverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = self.head(self.embedding(tokens) * scale).cumsum(1)
        return result


TOKENS = torch.arange(24).reshape(4, 6) % 9


def test_other_axes_vary_too(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    axes: Any = {"tokens": {1: "length"}, "scale": {0: None}}
    example = (TOKENS, torch.tensor([0.5, 1, 2, 3]))
    report = export_onnx(OverTime(), example, path, dynamic_axes=axes, axis_sizes={"length": (1, 11)})
    assert axes_of(path) == {"tokens": ["batch", "length"], "scale": [4]}
    assert [entry.shape for entry in report.differences] == [
        (1, 6, 2),
        (2, 6, 2),
        (7, 6, 2),
        (7, 1, 2),
        (7, 11, 2),
    ]


def test_images_of_any_size_that_fits(tmp_path: Path) -> None:
    (example,) = inputs_of("digits_unet", 2)
    net = models.load("digits_unet")
    axes: Any = {"images": {2: "height", 3: "width"}}
    export_onnx(
        net, example, tmp_path / "net.onnx", dynamic_axes=axes, axis_sizes={"height": (12,), "width": (16,)}
    )
    assert axes_of(tmp_path / "net.onnx")["images"][2:] == ["height", "width"]


BAD_AXES: list[tuple[dict[str, Any], str]] = [
    ({"dynamic_axes": {"nothing": {1: "a"}}}, "no input"),
    ({"dynamic_axes": {"tokens": {2: "a"}}}, "2 dimensions"),
    ({"dynamic_axes": {"tokens": {1: "a-b"}}}, "no name"),
    ({"dynamic_axes": {"tokens": {0: None}, "scale": {0: None}}}, "no example input has an axis"),
    ({"dynamic_axes": {"scale": {0: "batch"}}}, "must share their batch size"),
    ({"dynamic_axes": {"scale": {0: None}}, "axis_sizes": {"length": (3,)}}, "named axes"),
    ({"dynamic_axes": {"scale": {0: None}, "tokens": {1: "n"}}, "axis_sizes": {"n": (0,)}}, "positive"),
    ({"precision": "float8"}, "precision"),
]


@pytest.mark.parametrize(("settings", "says"), BAD_AXES, ids=[says for _, says in BAD_AXES])
def test_axes_that_do_not_fit(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        export_onnx(OverTime(), (TOKENS, torch.ones(1)), tmp_path / "net.onnx", **settings)
    assert not os.listdir(tmp_path)


def test_an_axis_that_forward_fixes_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(DataError, match="does not run at batch size 7, length 3"):
        export_onnx(net, TOKENS.float(), tmp_path / "net.onnx", dynamic_axes={"input": {1: "length"}})
    assert not os.listdir(tmp_path)


# opset, precision, external data


@pytest.mark.parametrize("opset", [18, 21])
def test_opset(opset: int, tmp_path: Path) -> None:
    report = export_onnx(nn.Linear(3, 2), ROWS, tmp_path / "net.onnx", opset=opset, batch_sizes=(2,))
    assert report.opset == opset


class Asking(nn.Module):
    """Its mask, which it makes itself, hides nothing, and it checks what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x)
        assert x.isfinite().all()
        result: Tensor = self.fc(x) if mask.all() else self.fc(x * mask)
        return result


@pytest.mark.parametrize("precision", ["own", "float16"])
def test_what_a_model_asks_of_tensors_is_answered_as_it_runs(precision: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(Asking(), ROWS, path, precision=precision)
    assert axes_of(path) == {"x": ["batch", 3]}


class Otherwise(nn.Module):
    """Goes another way where its tensors have no values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x) * (2 if isinstance(x, torch._subclasses.FakeTensor) else 3)
        return result


class Broadcasting(Otherwise):
    """Asks whether it needs to repeat a row that it has one of, too."""

    def forward(self, x: Tensor) -> Tensor:
        row = torch.arange(3.0).unsqueeze(0)
        return super().forward(x + (row.expand(x.shape[0], -1) if x.shape[0] != row.shape[0] else row))


@pytest.mark.parametrize("model", [Otherwise, Broadcasting])
def test_a_model_that_goes_other_ways_while_it_is_captured_is_exported_as_it_runs(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    report = export_onnx(model(), ROWS, tmp_path / "m.onnx")
    assert report.max_abs < 1e-5


def test_half_precision_is_proven_against_the_model_itself(tmp_path: Path) -> None:
    model, example = models.load("digits_cnn"), inputs_of("digits_cnn", 4)
    report = export_onnx(model, example, tmp_path / "half.onnx", precision="float16")
    assert 1e-5 < report.max_abs < 0.1
    assert (report.atol, report.rtol) == (1e-2, 1e-2)
    file = onnx.load(tmp_path / "half.onnx").graph
    kinds = {value.type.tensor_type.elem_type for value in (*file.input, *file.output)}
    assert kinds == {onnx.TensorProto.FLOAT}
    weights = [value for value in file.initializer if value.name.endswith("weight")]
    assert len(weights) == 4
    assert {value.data_type for value in weights} == {onnx.TensorProto.FLOAT16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (tmp_path / "half.onnx").stat().st_size < 30_000
    with pytest.raises(ExportMismatchError):
        export_onnx(model, example, tmp_path / "net.onnx", precision="float16", atol=1e-6, rtol=1e-6)


class Attended(nn.Module):
    """What onnxruntime 1.32 dies of in half precision: a layer norm, a transpose, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.norm(x).transpose(0, 1)).transpose(0, 1)
        return result


def test_a_file_that_onnxruntime_dies_of_is_proven_all_the_same(tmp_path: Path) -> None:
    report = export_onnx(Attended(), torch.randn(2, 16, 32), tmp_path / "half.onnx", precision="float16")
    dies = session.crashes(tmp_path / "half.onnx")
    assert ("ORT_ENABLE_EXTENDED" in str(report)) == dies
    assert (report.to_dict()["note"] != "") == dies


def test_a_process_that_dies_is_told_from_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none.onnx").write_bytes(b"nonsense")
    assert not session.crashes(tmp_path / "none.onnx")
    (tmp_path / "onnxruntime.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert session.crashes(tmp_path / "none.onnx")


def test_external_data_on_request(tmp_path: Path) -> None:
    net = nn.Linear(300, 5)
    export_onnx(net, torch.randn(2, 300), tmp_path / "net.onnx", external_data=True)
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    verify_onnx(tmp_path / "net.onnx", net, torch.randn(2, 300))


# what a mismatch says


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.head, self.other = nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.second(self.first(x))
        return {"head": self.head(y), "other": self.other(y)}


@pytest.mark.parametrize("weight", ["first.0.weight", "second.0.weight", "head.weight"])
def test_a_mismatch_names_outputs_and_the_first_node(weight: str, tmp_path: Path) -> None:
    net = Deep()
    export_onnx(net, ROWS, tmp_path / "net.onnx", batch_sizes=(2,))
    with torch.no_grad():
        net.get_parameter(weight)[1] += 0.5
    with pytest.raises(ExportMismatchError) as caught:
        verify_onnx(tmp_path / "net.onnx", net, ROWS, batch_sizes=(2,))
    message = str(caught.value)
    assert "output 'head' (1 of 2)" in message
    assert ("output 'other' (2 of 2)" in message) == (weight != "head.weight")
    assert ("The other 1 of 2 outputs are equal" in message) == (weight == "head.weight")
    assert f"(aten.linear.default in module {weight.removesuffix('.weight')!r}) of the model" in message
    assert "(Gemm) of the file" in message


def test_fused_nodes_are_not_taken_for_a_difference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    with torch.no_grad():
        net(torch.randn(8, 1, 5, 5) * 2 + 1)
    example = torch.randn(3, 1, 5, 5)
    export_onnx(net, example, tmp_path / "net.onnx", batch_sizes=(2,))
    with torch.no_grad():
        net.get_parameter("4.bias").add_(1)
    with pytest.raises(ExportMismatchError, match=r"in module '4'\) of the model"):
        verify_onnx(tmp_path / "net.onnx", net, example, batch_sizes=(2,))


# metadata


def facts_in(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_metadata_by_default(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(nn.Linear(3, 2), ROWS, path, batch_sizes=(2,), metadata={"model": "mine"})
    facts = facts_in(path)
    assert facts["fxinvert.version"] == fxinvert.__version__
    assert facts["fxinvert.model"] == "mine"
    assert facts["fxinvert.parameters"] == "8"
    assert len(facts["fxinvert.weights"]) == 64
    assert facts["fxinvert.proven"] == "batch sizes 2; atol 1e-05, rtol 0.0001"


def test_a_result_brings_its_metrics_and_segments(tmp_path: Path) -> None:
    digits = models.digits()
    train = models.batches(digits.x_train[:300], digits.y_train[:300])
    result = fxinvert.post_train(models.load("digits_mlp", "early"), train, sweeps=1)
    export_onnx(result, digits.x_test[:2], tmp_path / "net.onnx", batch_sizes=(2,))
    facts = facts_in(tmp_path / "net.onnx")
    assert facts["fxinvert.output_target"] == result.output_target
    assert "loss" in facts["fxinvert.held_out"]
    named = [
        entry.value
        for node in onnx.load(tmp_path / "net.onnx").graph.node
        for entry in node.metadata_props
        if entry.key == "fxinvert.segment"
    ]
    assert named == [segment.name for segment in result.plan.segments if segment.parameters]


def test_the_limit_for_external_data_is_below_protobufs() -> None:
    assert onnx_file.EXTERNAL_BYTES < 2**31


class Constrained(nn.Module):
    """Weights that follow from parameters by ops which ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        self.square, self.last = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        basis, size = torch.linalg.qr(self.square)
        y: Tensor = self.last(self.first(x) @ basis @ torch.linalg.inv(size))
        return y


def test_weights_that_a_file_cannot_compute_are_computed_beforehand(tmp_path: Path) -> None:
    export_onnx(Constrained(), torch.randn(3, 4), tmp_path / "net.onnx")
    names = {value.name for value in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert {"first.bias", "last.bias"} <= names, "what is as in the model is called as there"


def test_values_that_a_file_cannot_compute_are_refused(tmp_path: Path) -> None:
    class Factors(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.linalg.qr(x.reshape(-1, 2, 2))[0]
            return y

    with pytest.raises(TraceError, match="linalg_qr"):
        export_onnx(Factors(), torch.randn(3, 4), tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["amax", "amin"])
@pytest.mark.parametrize("dims", [(), (0, 1), (1,)])
def test_extremes_of_all_values(name: str, dims: tuple[int, ...], tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x * getattr(self.weight, name)(dims)
            return y

    export_onnx(Scaled(), torch.randn(3, 4), tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127),
        lambda x: torch.fake_quantize_per_tensor_affine(x, torch.tensor(0.5), torch.tensor(1), -2, 1),
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.arange(4, dtype=torch.int32), 1, -8, 7
        ),
        lambda x: torch.take_along_dim(x, x.argsort(1), 1),
        lambda x: torch.take_along_dim(x, x.argmax(1, keepdim=True), -1),
        lambda x: x.cumprod(1),
        lambda x: x.prod(1),
        lambda x: torch.rrelu(x),
    ],
)
def test_ops_that_torch_has_no_form_for(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Applied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    report = export_onnx(Applied(), torch.randn(5, 4), tmp_path / "net.onnx")
    assert not report.note


def test_convolutions_of_volumes_without_a_bias(tmp_path: Path) -> None:
    first, second = nn.Conv3d(2, 4, 3, (1, 2, 2), padding=1, bias=False), nn.Conv3d(4, 6, (1, 3, 2), groups=2)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Flatten())
    export_onnx(model, torch.randn(2, 2, 3, 7, 9), tmp_path / "net.onnx")


def test_a_value_that_is_clipped_again_in_several_ways(tmp_path: Path) -> None:
    class Clipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (2 * x).clamp(-1.0, 1.0)
            return y.clamp(-0.5, 0.5) + y.clamp(-2.0, 0.25) + y.clamp(0.125, 0.75)

    export_onnx(Clipped(), torch.randn(5, 4), tmp_path / "net.onnx")
