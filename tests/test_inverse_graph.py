"""The inverse graph as a graph: which models have one, how it is printed, saved, copied, and what it keeps."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Model, own_output
from torch import Tensor, nn

import fxinvert
import fxinvert.models as zoo
from fxinvert.errors import NoRuleError
from fxinvert.inversion import InverseGraph, Reconstruction
from fxinvert.linalg import choice
from fxinvert.rules import affine

# --- graphs that are not chains -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: (self.fc(x) > 0).long(), "does not depend on a floating-point input"),
        (lambda self, x: x.new_zeros(x.size(0), 4) + self.b, "does not depend on|no inverse rule"),
    ],
)
def test_outputs_without_a_way_to_the_input_are_refused(forward: Any, message: str) -> None:
    model = Model(forward, fc=nn.Linear(4, 4), b=torch.ones(4))
    with pytest.raises(NoRuleError, match=message):
        fxinvert.invert(model, torch.randn(2, 4), rules=fxinvert.default_rules().without_fallback())


def _windows(self: Any, x: Tensor) -> Tensor:
    """Two windows of tokens, each with the same token of the model's own in front."""
    tokens = torch.cat([self.token.expand(x.shape[0], 1, 4), x], 1) + self.positions
    own = tokens[:, :1].repeat(2, 1, 1)  # rows of any samples, which do not matter: all are alike
    windows = torch.cat([own, tokens[:, 1:].reshape(-1, 2, 4)], 1)
    found: Tensor = self.fc(windows.flatten(1)).reshape(x.shape[0], -1)
    return found


def test_entries_that_the_model_puts_in_itself_are_constants() -> None:
    torch.manual_seed(0)
    model = Model(_windows, token=torch.randn(1, 1, 4), positions=torch.randn(1, 5, 4), fc=nn.Linear(12, 4))
    x = torch.randn(3, 4, 4)
    graph = fxinvert.trace(model, x)
    assert [n.meta["op"] for n in graph.graph.nodes if "repeat" in n.name and not n.meta["active"]] == [
        "repeat"
    ]
    inverse = fxinvert.invert(graph, output_target="regression", refine=8)
    rec = inverse(x, wanted := model(x) + 0.1 * torch.randn(3, 8))
    torch.testing.assert_close(model(rec.targets["x"]), wanted, rtol=1e-3, atol=1e-4)


def test_entries_that_data_choose_are_no_constants() -> None:
    """Which of the tokens, the model's own ones too, is taken for an example says nothing of other data."""
    model = Model(
        lambda self, x: self.fc(
            (t := torch.cat([self.token.expand(x.shape[0], 1, 4), x], 1)).gather(
                1, t.sum(2, keepdim=True).argmax(1, keepdim=True).expand(-1, 1, 4)
            )
        )[:, 0],
        token=torch.full((1, 1, 4), 9.0),
        fc=nn.Linear(4, 2),
    )
    graph = fxinvert.trace(model, torch.randn(3, 4, 4))  # here it is the model's own token for all samples
    assert next(n for n in graph.graph.nodes if n.meta.get("op") == "gather").meta["active"]


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
    early: InverseGraph, rec: Reconstruction, digits_batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "inverse.pt"
    torch.save(early.graph_module, file)
    loaded = torch.load(file, weights_only=False)
    values = early.forward(digits_batch[0])
    by_name = {node.name: value for node, value in values.items()}
    inputs = [p.target for p in loaded.graph.find_nodes(op="placeholder")]
    assert inputs[0] == "output_target"
    targets, certificates = loaded(rec.output_target, *(by_name[str(name)] for name in inputs[1:]))
    assert list(targets) == rec.names[::-1]
    for name in rec.names:
        assert torch.equal(targets[name], rec.targets[name])
    assert all(str(certificates[name]) == str(rec.certificates[name]) for name in rec.names[:-1])
    assert all(f"self.{name}_inverse(" in loaded.code for name in rec.names[1:])


def test_a_copy_is_independent(
    early: InverseGraph, rec: Reconstruction, digits_batch: tuple[Tensor, Tensor]
) -> None:
    rules = fxinvert.default_rules().extend({Amplified: lambda op, target: target / op.parameters["gain"]})
    model = nn.Sequential(nn.Linear(4, 4), Amplified(), nn.Linear(4, 2))
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    for inverse, batch in ((early, digits_batch), (fxinvert.invert(model, x, rules=rules), (x, y))):
        first = inverse(*batch)
        twin = copy.deepcopy(inverse)
        with torch.no_grad():
            for parameter in twin.graph.parameters():
                parameter.mul_(1.5)
        again, other = inverse(*batch), twin(*batch)
        for name in first.names:
            assert torch.equal(again.targets[name], first.targets[name])
        assert not torch.equal(other.targets[first.names[0]], first.targets[first.names[0]])
    assert float(other.consistency("input").max()) < 1e-3, "its own parameters throughout"


class Amplified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


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
    saved = io.BytesIO()
    torch.save(inverse.graph_module, saved)
    saved.seek(0)
    values = {node.name: value for node, value in inverse.forward(x).items()}
    loaded = torch.load(saved, weights_only=False)
    names = [str(p.target) for p in loaded.graph.find_nodes(op="placeholder")][1:]
    targets, _ = loaded(values["encoder_inverse"], *(values[name.removesuffix("_anchor")] for name in names))
    assert torch.equal(targets["input"], x)


def test_factorizations_are_reused_until_the_weights_change(
    monkeypatch: pytest.MonkeyPatch, digits_batch: tuple[Tensor, Tensor]
) -> None:
    built: list[tuple[int, int]] = []

    def counted(operator: Any, settings: Any) -> Any:
        built.append(operator.size)
        return choice.factorize(operator, settings)

    monkeypatch.setattr(affine, "factorize", counted)
    model: Any = zoo.load("digits_cnn", "early")
    inverse = fxinvert.invert(model, digits_batch[0])
    assert built == [], "made when needed"
    first = inverse(*digits_batch)
    assert len(built) == 4, "two convolutions, two linear layers"
    inverse(digits_batch[0][:7], digits_batch[1][:7])
    inverse(*digits_batch)
    assert len(built) == 4
    with torch.no_grad():
        model.fc1.weight.mul_(2)
        model.conv2.bias.add_(1)
    second = inverse(*digits_batch)
    assert 5 <= len(built) <= 6, "of the layer whose weight has changed"
    assert not torch.equal(first.targets["relu2"], second.targets["relu2"])
    fresh = fxinvert.invert(model, digits_batch[0])(*digits_batch)
    assert all(torch.equal(fresh.targets[name], second.targets[name]) for name in fresh.names)


def test_parameters_may_be_replaced_by_others() -> None:
    """In a chain and inside of a region."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            result: Tensor = self.head(x + 0.3 * torch.tanh(self.fc(x)))
            return result

    x, y, model = torch.randn(4, 6), torch.tensor([0, 1, 2, 0]), Block()
    inverse = fxinvert.invert(model, x)
    before = inverse(x, y)
    other = Block()
    for name in ("stem", "fc", "head"):
        inverse.graph.get_submodule(name).weight = getattr(other, name).weight
        getattr(model, name).weight = getattr(other, name).weight
    expected, found = fxinvert.invert(model, x)(x, y), inverse(x, y)
    for name in found.names:
        torch.testing.assert_close(found.targets[name], expected.targets[name])
    assert not torch.allclose(found.targets["x"], before.targets["x"])


@pytest.mark.parametrize("copied", [False, True])
def test_parameters_that_the_model_replaces_are_noticed(copied: bool) -> None:
    x, y, model = (
        torch.randn(4, 6),
        torch.tensor([0, 1, 2, 0]),
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
    )
    inverse = fxinvert.invert(model, x)
    inverse = copy.deepcopy(inverse) if copied else inverse
    before = inverse(x, y)
    model[0].weight = nn.Parameter(torch.randn(5, 6))
    expected, found = fxinvert.invert(model, x)(x, y), inverse(x, y)
    for name in found.names:
        same = torch.equal(found.targets[name], (before if copied else expected).targets[name])
        assert same, "a copy keeps its own" if copied else name
    own = nn.Parameter(torch.randn(3, 5))
    inverse.graph.get_submodule("1").weight = own
    inverse(x, y)
    assert inverse.graph.get_submodule("1").weight is own, "the model's is the same as before"


def test_some_targets_only(
    early: InverseGraph, rec: Reconstruction, digits_batch: tuple[Tensor, Tensor]
) -> None:
    values = early.forward(digits_batch[0])
    nodes = {node.meta["path"]: node for node in early.graph.graph.nodes if node.meta.get("active")}
    wanted = [nodes["relu3"], nodes["fc2"], nodes["conv2"]]
    found = early.targets(values, digits_batch[1], wanted)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[node], rec.targets[node.name]) for node in wanted)
    op = early.op(nodes["fc1"], values)
    assert torch.equal(op(op.anchor), rec.anchors["fc1"])
    assert early.output_node is nodes["fc2"]
    outside = next(node for node in early.graph.graph.nodes if node.op == "get_attr")
    with pytest.raises(NoRuleError, match=r"'conv1.weight' does not lie on the way"):
        early.targets(values, digits_batch[1], [outside])
