"""Properties of the exported inverse: it reconstructs what the inverse graph does, or is refused by the node's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from reference import inputs_of
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert import models
from fxinvert.errors import DataError, ExportMismatchError, NoRuleError
from fxinvert.export import export_inverse, inverse_scalar, inverse_steps, translate
from fxinvert.export.inverse_steps import step_of

ROWS = torch.linspace(-1, 1, 24).reshape(4, 6)


def run(path: Path, feature: Tensor, target: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(
        None, {"feature": feature.detach().numpy(), "output_target": target.detach().numpy()}
    )
    return torch.from_numpy(found)


@pytest.mark.parametrize(("name", "at"), [("digits_cnn", "relu1"), ("digits_mlp", None)])
def test_it_explains_labels_as_the_inverse_graph_does(name: str, at: str | None, tmp_path: Path) -> None:
    model, (images,) = models.load(name, "early"), inputs_of(name, 30)
    labels = models.digits().y_test[:30]
    path = tmp_path / "inverse.onnx"
    export_inverse(model, images[:4], path, at=at)
    rec = fxinvert.invert(model, images[:4])(images, labels)
    node = at or rec.names[0]
    found = run(path, rec.anchors[node], rec.output_target)
    wrong = (rec.output_target - rec.anchors[rec.names[-1]]).abs().amax(1) > 1e-3
    assert 0 < int(wrong.sum()) < 30
    assert torch.allclose(found[wrong], rec.targets[node][wrong], atol=1e-4, rtol=1e-3)
    assert torch.equal(found[~wrong], rec.anchors[node][~wrong])
    assert {o.op_type for o in onnx.load(path).graph.node} >= {"MatMul"}


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "wide": (nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3)), ROWS),
    "narrow": (nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 12)), ROWS),
    "over time": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten()), ROWS.reshape(4, 2, 3)),
    "images": (
        nn.Sequential(
            nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten()
        ),
        torch.rand(4, 2, 5, 5),
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Tanh()), torch.rand(4, 2, 5)),
    "with maxima": (
        nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.GELU(), nn.MaxPool2d(2), nn.SiLU(), nn.AdaptiveMaxPool2d((1, 2)), nn.Flatten()
        ),
        torch.rand(4, 1, 6, 10),
    ),
}  # fmt: skip


EXPORTED = [
    nn.ReLU6(),
    nn.ELU(0.7),
    nn.GELU(),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Tanhshrink(),
    nn.Hardshrink(0.4),
]
ACTIVATIONS = [
    *(nn.ReLU(), nn.Hardtanh(-0.3, 0.4), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.3), nn.PReLU(), nn.Threshold(0.1, 0.4)),
    *(nn.CELU(0.5), nn.SELU(), nn.Softplus(), nn.Softplus(3.0, 2.0), nn.Softsign(), nn.LogSigmoid(), nn.Tanh()),
    *(nn.Sigmoid(), nn.Hardsigmoid(), nn.GELU("tanh"), nn.Mish(), nn.Softshrink(0.4)),
]  # fmt: skip


class Steps(nn.Module):
    """The exported steps of some activations, beside one another."""

    def __init__(self, activations: Sequence[nn.Module], rows: Tensor) -> None:
        super().__init__()
        self.activations = nn.ModuleList(activations)
        self.steps = nn.ModuleList()
        for activation in activations:
            inverse = fxinvert.invert(activation, rows)
            op = inverse.op(inverse.output_node, inverse.forward(rows))
            self.steps.append(step_of(inverse.inverse_op(inverse.output_node).rule, op, str(activation)))

    def forward(self, target: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.activations, self.steps, strict=True)
        return tuple(step(target, activation(anchor), anchor) for activation, step in pairs)


def test_every_activation(tmp_path: Path) -> None:
    """Targets within and beyond what is reached; from both ends of it, and from within."""
    rows = 4 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    targets = torch.linspace(-4, 4, 240).reshape(6, 40).T
    for activations in (EXPORTED, ACTIVATIONS):
        steps = Steps(activations, rows).eval().requires_grad_(False)
        for activation, found in zip(activations, steps(targets, rows), strict=True):
            inverse = fxinvert.invert(activation, rows, output_target=lambda outputs, labels: labels)
            assert torch.allclose(found, inverse(rows, targets).targets["input"], atol=1e-4, rtol=1e-3), (
                activation
            )
            assert not torch.allclose(found, rows, atol=0.1)
    steps = Steps(EXPORTED, rows).eval().requires_grad_(False)
    fxinvert.export_onnx(
        steps, (targets, rows), tmp_path / "steps.onnx", batch_sizes=(40,), atol=1e-4, rtol=1e-3
    )


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def moves(x: Tensor) -> Tensor:
    x = x.reshape(-1, 2, 3).permute(0, 2, 1).flip(1)[:, 1:].roll(1, 1)
    return F.pad(x, (2, 3), mode="replicate").repeat(1, 2, 1)


def combines(x: Tensor) -> Tensor:
    return x.reshape(-1, 2, 3, 2, 5).mean((1, 3)).sum(1, keepdim=True)


def chooses(x: Tensor) -> Tensor:
    x = F.max_pool1d(x[:, None], 2, stride=3, padding=1)
    return F.max_pool2d(x.reshape(-1, 2, 7, 6), (2, 3), (4, 6), dilation=2).amax(2).amin(1)


@pytest.mark.parametrize(("function", "size"), [(moves, 6), (combines, 60), (chooses, 250)])
def test_ops_that_move_combine_or_choose(
    function: Callable[[Tensor], Tensor], size: int, tmp_path: Path
) -> None:
    path, model, rows = tmp_path / "inverse.onnx", Call(function), torch.randn(4, size)
    export_inverse(model, rows, path, batch_sizes=(2,))
    inverse = fxinvert.invert(model, rows, output_target=lambda outputs, labels: labels)
    output = function(rows)
    targets = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found = run(path, rows, targets)
    assert torch.allclose(found, inverse(rows, targets).targets["x"], atol=1e-5)
    assert not torch.allclose(found, rows, atol=0.1)


@pytest.mark.parametrize("net", [*list(NETS)[:-1], pytest.param("with maxima", marks=pytest.mark.slow)])
def test_chains(net: str, tmp_path: Path) -> None:
    model, example = NETS[net]
    report = export_inverse(model.eval(), example, tmp_path / "inverse.onnx")
    assert [entry.shape for entry in report.differences] == [(n, *example.shape[1:]) for n in (1, 2, 7)]


def test_ill_conditioned_corrections_are_damped_as_in_torch(tmp_path: Path) -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        left, right = (torch.linalg.qr(torch.randn(n, n)).Q for n in (4, 6))
        layer.weight.copy_(left @ torch.diag(torch.tensor([1, 0.1, 1e-3, 1e-5])) @ right[:4])
    path = tmp_path / "inverse.onnx"
    export_inverse(layer, ROWS, path)
    size = onnx.load(path).ByteSize()
    inverse = fxinvert.invert(layer, ROWS, output_target=lambda outputs, labels: labels)
    outputs = layer(ROWS).detach()
    targets = outputs + left[:, 3] * 0.1  # what only the smallest singular value reaches
    rec = inverse(ROWS, targets)
    assert "damped" in str(rec.certificates["input"])
    assert torch.allclose(run(path, ROWS, targets), rec.targets["input"], atol=1e-4, rtol=1e-3)
    export_inverse(nn.Linear(6, 4), ROWS, path)
    assert onnx.load(path).ByteSize() < size  # one matrix is enough


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = self.second(y + y.tanh())
        return result


class Residual(nn.Module):
    """x + body(x), and what follows."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x + self.body(x))
        return result


def pooled() -> nn.Module:
    """Every kind of backward pass that torch leaves to kernels."""
    body = nn.Sequential(
        nn.Conv2d(4, 4, 2, 2), nn.SiLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.MaxPool2d(3, 1, 1)
    )
    head = nn.Sequential(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.AvgPool2d(2, 1, 1), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(36, 5)
    )  # fmt: skip
    return Residual(body, head).eval()


LINEARIZED: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "digits_resnet": (lambda: models.load("digits_resnet", "early"), "layer1.0.relu@2"),
    "digits_vit": (lambda: models.load("digits_vit", "early"), None),
    "digits_mixer": (lambda: models.load("digits_mixer", "early"), "patches"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in LINEARIZED])
def test_reference_networks_that_branch(name: str, tmp_path: Path) -> None:
    make, at = LINEARIZED[name]
    (images,) = inputs_of(name, 12)
    model, labels, path = make(), models.digits().y_test[:12], tmp_path / "inverse.onnx"
    inverse = fxinvert.invert(model, images, reconstruction="linearized")
    rec = inverse(images, labels)
    node = at or rec.names[0]
    export_inverse(model, images[:2], path, at=node)
    assert torch.allclose(
        run(path, rec.anchors[node], rec.output_target), rec.targets[node], atol=1e-4, rtol=1e-3
    )
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert facts["fxinvert.inverse_is"] == "linearized"


@pytest.mark.slow
def test_branches_with_pooling(tmp_path: Path) -> None:
    x = torch.rand(4, 4, 8, 8)
    report = export_inverse(pooled(), x, tmp_path / "inverse.onnx", batch_sizes=(1, 3))
    assert report.max_abs < 1e-4


def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inverse.onnx"
    with pytest.raises(NoRuleError, match=r"paths branch between '\w+' and 'add'"):
        export_inverse(Branches(), ROWS, path, reconstruction="nodewise")
    with pytest.raises(NoRuleError, match=r"as paths branch between 'x' and 'add'.*at most 64 .* has 70"):
        export_inverse(Residual(nn.Tanh(), nn.Linear(6, 70)), ROWS, path)
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    with pytest.raises(NoRuleError, match=r"node '1'.*layer_norm.*Take a node behind it"):
        export_inverse(net, ROWS, path)
    with pytest.raises(NoRuleError, match=r"node '0'.*max_pool1d.*its windows overlap"):
        export_inverse(nn.Sequential(nn.MaxPool1d(3, 1)), torch.rand(2, 2, 5), path)
    with monkeypatch.context() as patch:
        patch.setattr(translate, "translations", dict)
        with pytest.raises(NoRuleError, match=r"no form for the inverse of one of the nodes 'erf'.*erf_inv"):
            export_inverse(Call(torch.erf), ROWS, path)
    with pytest.raises(DataError, match=r"no node 'nowhere'.*those that do: input, 0, 1"):
        export_inverse(net, ROWS, path, at="nowhere")
    monkeypatch.setattr(inverse_steps, "MATRIX_LIMIT", 20)
    with pytest.raises(NoRuleError, match="exceeds 20"):
        export_inverse(nn.Sequential(nn.Conv1d(2, 3, 2)), torch.rand(2, 2, 5), path)
    assert not os.listdir(tmp_path)


def test_a_wrong_step_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: object, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        return target

    monkeypatch.setattr(inverse_scalar.Nearest, "forward", wrong)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ExportMismatchError, match="'reconstructed'"):
        export_inverse(net, ROWS, tmp_path / "inverse.onnx")
    assert not os.listdir(tmp_path)
