"""Invert: targets, anchors and certificates of whole networks."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxinvert
import fxinvert.models as zoo
from fxinvert.errors import DataError, NoRuleError
from fxinvert.inverse import ByName, InverseGraph, Reconstruction
from fxinvert.linalg import anchored
from fxinvert.rules import Status, affine
from fxinvert.rules.certificate import relative

NETWORKS = [(name, state) for name in ("digits_cnn", "digits_mlp") for state in ("early", "converged")]


def own_output(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    digits = zoo.digits()
    return digits.x_test[:32], digits.y_test[:32]


@pytest.fixture(scope="module")
def early(data: tuple[Tensor, Tensor]) -> InverseGraph:
    return fxinvert.invert(zoo.load("digits_cnn", "early"), data[0])


@pytest.fixture(scope="module")
def rec(early: InverseGraph, data: tuple[Tensor, Tensor]) -> Reconstruction:
    return early(*data)


def forward_from(model: Any, name: str, value: Tensor) -> Tensor:
    """The rest of a digits network, from the value of one of its children on, by hand."""
    children = list(model.named_children())
    start = 0 if name == "images" else [path for path, _ in children].index(name) + 1
    for _, child in children[start:]:
        value = child(value)
    return value


# --- the contracts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "state"), NETWORKS)
def test_the_inverse_of_what_happened_is_what_happened(
    name: str, state: str, data: tuple[Tensor, Tensor]
) -> None:
    rec = fxinvert.invert(zoo.load(name, state), data[0], output_target=own_output)(*data)
    for node in rec.names:
        assert torch.equal(rec.targets[node], rec.anchors[node]), node
        assert float(rec.consistency(node).max()) == 0


@pytest.mark.parametrize("target", ["nearest", "margin", "cross_entropy"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("digits_cnn", torch.float32, 1e-5),
        ("digits_cnn", torch.float64, 1e-12),
        ("digits_mlp", torch.float32, 1e-4),  # the inverse of tanh magnifies rounding errors near ±1
        ("digits_mlp", torch.float64, 1e-9),
    ],
)
def test_a_samples_targets_do_not_depend_on_its_batch(
    name: str, dtype: torch.dtype, tolerance: float, target: str, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data[0].to(dtype), data[1]
    inverse = fxinvert.invert(zoo.load(name, "early").to(dtype), x, output_target=target)
    together = inverse(x, y)
    alone = [inverse(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    for node in together.names:
        separate = torch.cat([rec.targets[node] for rec in alone])
        assert float(relative(separate - together.targets[node], together.targets[node]).max()) < tolerance


def test_satisfied_samples_keep_their_anchors(rec: Reconstruction, data: tuple[Tensor, Tensor]) -> None:
    right = rec.anchors["fc2"].argmax(1) == data[1]
    assert 0 < int(right.sum()) < len(right)
    for node in rec.names:
        moved = (rec.targets[node] != rec.anchors[node]).flatten(1).any(1)
        assert torch.equal(moved, ~right)


def test_names_targets_and_anchors(rec: Reconstruction, data: tuple[Tensor, Tensor]) -> None:
    model: Any = zoo.load("digits_cnn", "early")
    assert rec.names == ["images", *(name for name, _ in model.named_children())]
    assert torch.equal(rec.anchors["images"], data[0])
    value = data[0]
    with torch.no_grad():
        for name, child in model.named_children():
            value = child(value)
            assert torch.equal(rec.anchors[name], value)
            assert rec.targets[name].shape == value.shape
            assert isinstance(rec.certificates[name], fxinvert.rules.Certificate)
    assert list(rec.targets) == list(rec.anchors) == list(rec.certificates) == rec.names
    assert rec.output_target is rec.targets["fc2"]
    assert rec.certificates["images"].status is Status.PASSED_THROUGH
    assert "conv1" in repr(rec)
    assert "least squares" in repr(rec)


def test_nodes_are_known_by_module_path_and_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 2)))
    x = torch.randn(4, 3)
    rec = fxinvert.invert(model, x)(x, torch.tensor([0, 1, 0, 1]))
    assert rec.names == ["input", "0", "1.0", "1.1"]
    assert rec.targets["1.0"] is rec.targets["_1_0"]
    assert rec.certificates["1.1"] is rec.certificates["_1_1"]
    assert torch.equal(rec.consistency("1.0"), rec.consistency("_1_0"))
    assert "1.0" in rec.targets
    assert "2.0" not in rec.targets
    with pytest.raises(KeyError, match=r"no node '1.2'; did you mean 1\.\d"):
        rec.targets["1.2"]
    with pytest.raises(KeyError, match="no node 'layer'; did you mean"):
        rec.consistency("layer")
    assert isinstance(rec.targets, ByName)
    assert len(rec.targets) == 4


def test_consistency_is_the_models_own_error(rec: Reconstruction) -> None:
    model = zoo.load("digits_cnn", "early")
    goal = rec.output_target
    for name in rec.names:
        with torch.no_grad():
            error = (forward_from(model, name, rec.targets[name]) - goal).norm(dim=1) / goal.norm(dim=1)
        assert rec.consistency(name).shape == (len(goal),)
        torch.testing.assert_close(rec.consistency(name), error, rtol=1e-4, atol=1e-6)
    assert float(rec.consistency("fc2").max()) == 0
    assert float(rec.consistency("relu3").max()) < 1e-5, "10 of 32 numbers: always attainable"


def test_certificates_state_what_was_achieved(rec: Reconstruction) -> None:
    model: Any = zoo.load("digits_cnn", "early")
    before = "images"
    for name, child in model.named_children():
        certificate = rec.certificates[name]
        with torch.no_grad():
            left = (child(rec.targets[before]) - rec.targets[name]).flatten(1).norm(dim=1)
        expected = left / rec.targets[name].flatten(1).norm(dim=1)
        torch.testing.assert_close(certificate.residual, expected, rtol=1e-3, atol=2e-5)
        distance = (rec.targets[before] - rec.anchors[before]).flatten(1).norm(dim=1)
        torch.testing.assert_close(certificate.distance, distance, rtol=1e-4, atol=1e-5)
        before = name


def test_a_float64_model_is_inverted_in_float64(data: tuple[Tensor, Tensor]) -> None:
    x = data[0].double()
    rec = fxinvert.invert(zoo.load("digits_mlp", "early").double(), x)(x, data[1])
    assert all(rec.targets[name].dtype == torch.float64 for name in rec.names)
    assert float(rec.consistency("tanh2").max()) < 1e-12


def test_the_model_is_not_touched(data: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(zoo.load("digits_cnn", "early"), nn.Dropout(0.5), nn.BatchNorm1d(10)).train()
    state, x = copy.deepcopy(model.state_dict()), data[0].clone()
    generator = torch.get_rng_state()
    rec = fxinvert.invert(model, x)(x, data[1])
    rec.consistency("0.conv1")
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, data[0])
    assert all(module.training for module in model.modules() if module is not model[0]) or model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(rec.targets[name].requires_grad for name in rec.names)


# --- failures stay where they are ---------------------------------------------------------------------------


def test_a_sample_that_is_not_a_number_fails_alone(early: InverseGraph, data: tuple[Tensor, Tensor]) -> None:
    broken = data[0].clone()
    broken[5, 0, 3, 3] = torch.nan
    clean, dirty = early(*data), early(broken, data[1])
    rest = torch.arange(len(broken)) != 5
    for name in clean.names:
        assert torch.equal(dirty.targets[name][rest], clean.targets[name][rest]), name
        if name != "images":
            assert dirty.certificates[name].status is Status.FAILED
            assert dirty.certificates[name].failed.nonzero().tolist() == [[5]]
            assert torch.equal(
                dirty.certificates[name].residual[rest], clean.certificates[name].residual[rest]
            )
        torch.testing.assert_close(
            dirty.targets[name][5], dirty.anchors[name][5], equal_nan=True, rtol=0, atol=0
        )
        assert torch.equal(dirty.consistency(name)[rest], clean.consistency(name)[rest])


def test_an_empty_batch_has_empty_targets(early: InverseGraph, data: tuple[Tensor, Tensor]) -> None:
    rec = early(data[0][:0], data[1][:0])
    assert [len(rec.targets[name]) for name in rec.names] == [0] * len(rec.names)
    assert rec.consistency("conv1").shape == (0,)
    assert "0 samples" in repr(rec)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (
            torch.randn(2, 1, 8, 8),
            torch.tensor([0, 10]),
            "labels range from 0 to 10; the model has 10 classes",
        ),
        (torch.randn(2, 1, 8, 8), torch.tensor([0, 1, 2]), r"labels of shape \(3,\) do not fit"),
        (torch.randn(2, 1, 8, 8), torch.tensor([0.0, 1.0]), "class numbers are integers"),
        (torch.randn(2, 1, 9, 8), torch.tensor([0, 1]), r"'images' has shape \(2, 1, 9, 8\).*\(B, 1, 8, 8\)"),
        (torch.randn(1, 8, 8), torch.tensor([0]), r"'images' has shape \(1, 8, 8\)"),
        (torch.tensor(1.0), torch.tensor([0]), r"'images' has shape \(\)"),
        ((torch.randn(2, 1, 8, 8),) * 2, torch.tensor([0, 1]), "the model takes 1 inputs; 2 were given"),
        (torch.randn(2, 1, 8, 8).double(), torch.tensor([0, 1]), "does not run on these inputs.*type"),
        ([[1.0]], torch.tensor([0]), "'images' has shape list"),
    ],
)
def test_what_does_not_fit_is_refused(early: InverseGraph, inputs: Any, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        early(inputs, labels)


def test_wrong_settings_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)
    with pytest.raises(DataError, match="unknown output target 'neares'"):
        fxinvert.invert(model, x, output_target="neares")
    with pytest.raises(DataError, match="needs example_inputs"):
        fxinvert.invert(model)
    with pytest.raises(DataError, match="needs example_inputs"):
        fxinvert.invert(fx.symbolic_trace(model))
    with pytest.raises(DataError, match="refine=-1"):
        fxinvert.invert(model, x, refine=-1)


# --- graphs that are not chains -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.fc(x) + x, r"node 'add'.* has 2 inputs .*\(fc, x\).*branching"),
        (lambda self, x: F.relu(h := self.fc(x)) + h.tanh(), r"'add'.* has 2 inputs .*branching"),
        (lambda self, x: (h := self.fc(x)) * h, r"'mul'.* takes 'fc' 2 times.*branching"),
        (lambda self, x: F.relu((h := x.chunk(2, 1))[0]) + h[1], r"has 2 inputs .*branching"),
        (lambda self, x: self.fc(x.chunk(2, 1)[0].repeat(1, 2)), r"no inverse rule for op 'repeat'"),
        (lambda self, x: torch.cat([self.fc(x)], 1), r"inside a list|no inverse rule for op 'cat'"),
        (lambda self, x: (self.fc(x) > 0).long(), "does not depend on a floating-point input"),
        (lambda self, x: x.new_zeros(x.size(0), 4) + self.b, "does not depend on|no inverse rule"),
    ],
)
def test_graphs_that_are_not_chains_of_known_ops_are_refused(forward: Any, message: str) -> None:
    model = Model(forward, fc=nn.Linear(4, 4), b=torch.ones(4))
    with pytest.raises(NoRuleError, match=message):
        fxinvert.invert(model, torch.randn(2, 4))


def test_ops_that_only_inform_are_no_branches() -> None:
    """Sizes, masks and indices may be read from a value that goes on along the chain."""
    model = Model(
        lambda self, x: (h := self.fc(x) * self.b.exp()).view(h.size(0), h.shape[1], 1) / h.shape[1],
        fc=nn.Linear(4, 4),
        b=torch.randn(4),
    )
    x = torch.randn(3, 4)
    inverse = fxinvert.invert(model, x, output_target="regression")
    rec = inverse(x, wanted := torch.randn(3, 4, 1))
    torch.testing.assert_close(model(rec.targets["x"]), wanted, rtol=1e-3, atol=1e-4)
    assert float(rec.consistency("x").max()) < 1e-3


# --- the graph module ---------------------------------------------------------------------------------------


def test_the_inverse_graph_is_printed_op_by_op(
    early: InverseGraph, capsys: pytest.CaptureFixture[str]
) -> None:
    early.graph_module.graph.print_tabular()
    printed = capsys.readouterr().out
    code, text = early.graph_module.code, repr(early)
    for name, _ in zoo.load("digits_cnn").named_children():
        assert f"{name}_inverse" in printed
        assert f"self.{name}_inverse(" in code
        assert f"  {name} → " in text
    assert "conv2 → relu1: conv2d, linear solve" in text


def test_the_inverse_graph_is_saved_and_loaded(
    early: InverseGraph, rec: Reconstruction, data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "inverse.pt"
    torch.save(early.graph_module, file)
    loaded = torch.load(file, weights_only=False)
    values = early.forward(data[0])
    by_name = {node.name: value for node, value in values.items()}
    inputs = [p.target for p in loaded.graph.find_nodes(op="placeholder")]
    assert inputs[0] == "output_target"
    targets, certificates = loaded(rec.output_target, *(by_name[str(name)] for name in inputs[1:]))
    assert list(targets) == rec.names[::-1]
    for name in rec.names:
        assert torch.equal(targets[name], rec.targets[name])
    assert all(str(certificates[name]) == str(rec.certificates[name]) for name in rec.names[1:])
    assert all(f"self.{name}_inverse(" in loaded.code for name in rec.names[1:])


def test_a_copy_is_independent(early: InverseGraph, rec: Reconstruction, data: tuple[Tensor, Tensor]) -> None:
    rules = fxinvert.default_rules().extend({Doubled: lambda op, target: target / 2})
    model = nn.Sequential(nn.Linear(4, 4), Doubled(), nn.Linear(4, 2))
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    for inverse, batch in ((early, data), (fxinvert.invert(model, x, rules=rules), (x, y))):
        first = inverse(*batch)
        twin = copy.deepcopy(inverse)
        with torch.no_grad():
            for parameter in twin.graph.parameters():
                parameter.mul_(1.5)
        again, other = inverse(*batch), twin(*batch)
        for name in first.names:
            assert torch.equal(again.targets[name], first.targets[name])
        assert not torch.equal(other.targets[first.names[0]], first.targets[first.names[0]])
        assert all(a is b for a, b in zip(twin.graph.parameters(), twin.graph.parameters(), strict=True))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Masked(nn.Module):
    """Names that the inverse graph uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.encoder_inverse = nn.Linear(4, 4)
        self.encoder_target = nn.Linear(4, 4)
        self.output_target = nn.Tanh()

    def forward(self, input: Tensor) -> Tensor:
        x: Tensor = self.encoder_inverse(self.output_target(self.encoder_target(self.encoder(input))))
        return x


def test_the_users_names_do_not_collide_with_those_of_the_inverse() -> None:
    x = torch.randn(3, 4)
    model = Masked()
    inverse = fxinvert.invert(model, x, output_target=own_output)
    rec = inverse(x, x)
    assert rec.names == ["input", "encoder", "encoder_target", "output_target", "encoder_inverse"]
    assert all(torch.equal(rec.targets[name], rec.anchors[name]) for name in rec.names)
    wanted = torch.randn(3, 4) / 10
    rec = fxinvert.invert(model, x, output_target="regression")(x, wanted)
    reached = rec.consistency("input")
    assert float(reached.max()) < 1e-3 or not rec.certificates["output_target"].status is Status.EXACT
    saved = io.BytesIO()
    torch.save(inverse.graph_module, saved)
    saved.seek(0)
    values = {node.name: value for node, value in inverse.forward(x).items()}
    loaded = torch.load(saved, weights_only=False)
    names = [str(p.target) for p in loaded.graph.find_nodes(op="placeholder")][1:]
    targets, _ = loaded(values["encoder_inverse"], *(values[name.removesuffix("_anchor")] for name in names))
    assert torch.equal(targets["input"], x)


def test_factorizations_are_reused_until_the_weights_change(
    monkeypatch: pytest.MonkeyPatch, data: tuple[Tensor, Tensor]
) -> None:
    built: list[tuple[int, int]] = []

    def counted(operator: Any, settings: Any) -> Any:
        built.append(operator.size)
        return anchored.factorize(operator, settings)

    monkeypatch.setattr(affine, "factorize", counted)
    model: Any = zoo.load("digits_cnn", "early")
    inverse = fxinvert.invert(model, data[0])
    assert built == [], "made when needed"
    first = inverse(*data)
    assert len(built) == 4, "two convolutions, two linear layers"
    inverse(data[0][:7], data[1][:7])
    inverse(*data)
    assert len(built) == 4
    with torch.no_grad():
        model.fc1.weight.mul_(2)
        model.conv2.bias.add_(1)
    second = inverse(*data)
    assert 5 <= len(built) <= 6, "of the layer whose weight has changed"
    assert not torch.equal(first.targets["relu2"], second.targets["relu2"])
    fresh = fxinvert.invert(model, data[0])(*data)
    assert all(torch.equal(fresh.targets[name], second.targets[name]) for name in fresh.names)


def test_some_targets_only(early: InverseGraph, rec: Reconstruction, data: tuple[Tensor, Tensor]) -> None:
    values = early.forward(data[0])
    nodes = {node.meta["path"]: node for node in early.graph.graph.nodes if node.meta.get("active")}
    wanted = [nodes["relu3"], nodes["fc2"], nodes["conv2"]]
    found = early.targets(values, data[1], wanted)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[node], rec.targets[node.name]) for node in wanted)
    op = early.op(nodes["fc1"], values)
    assert torch.equal(op(op.anchor), rec.anchors["fc1"])
    assert early.output_node is nodes["fc2"]
    outside = next(node for node in early.graph.graph.nodes if node.op == "get_attr")
    with pytest.raises(NoRuleError, match=r"'conv1.weight' does not lie on the way"):
        early.targets(values, data[1], [outside])
