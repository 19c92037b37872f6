"""Invert: targets, anchors and certificates of whole networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import own_output
from torch import Tensor, fx, nn

import fxinvert
import fxinvert.models as zoo
from fxinvert.errors import DataError
from fxinvert.inversion import ByName, InverseGraph, Reconstruction
from fxinvert.rules import Status
from fxinvert.rules.certificate import relative

NETWORKS = [(name, state) for name in ("digits_cnn", "digits_mlp") for state in ("early", "converged")]


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
    name: str, state: str, digits_batch: tuple[Tensor, Tensor]
) -> None:
    rec = fxinvert.invert(zoo.load(name, state), digits_batch[0], output_target=own_output)(*digits_batch)
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
    name: str, dtype: torch.dtype, tolerance: float, target: str, digits_batch: tuple[Tensor, Tensor]
) -> None:
    x, y = digits_batch[0].to(dtype), digits_batch[1]
    inverse = fxinvert.invert(zoo.load(name, "early").to(dtype), x, output_target=target)
    together = inverse(x, y)
    alone = [inverse(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    for node in together.names:
        separate = torch.cat([rec.targets[node] for rec in alone])
        assert float(relative(separate - together.targets[node], together.targets[node]).max()) < tolerance


def test_satisfied_samples_keep_their_anchors(
    rec: Reconstruction, digits_batch: tuple[Tensor, Tensor]
) -> None:
    right = rec.anchors["fc2"].argmax(1) == digits_batch[1]
    assert 0 < int(right.sum()) < len(right)
    for node in rec.names:
        moved = (rec.targets[node] != rec.anchors[node]).flatten(1).any(1)
        assert torch.equal(moved, ~right)


def test_names_targets_and_anchors(rec: Reconstruction, digits_batch: tuple[Tensor, Tensor]) -> None:
    model: Any = zoo.load("digits_cnn", "early")
    assert rec.names == ["images", *(name for name, _ in model.named_children())]
    assert torch.equal(rec.anchors["images"], digits_batch[0])
    value = digits_batch[0]
    with torch.no_grad():
        for name, child in model.named_children():
            value = child(value)
            assert torch.equal(rec.anchors[name], value)
            assert rec.targets[name].shape == value.shape
            assert isinstance(rec.certificates[name], fxinvert.rules.Certificate)
    assert list(rec.targets) == list(rec.anchors) == list(rec.certificates) == rec.names
    assert rec.output_target is rec.targets["fc2"]
    assert rec.certificates["fc2"].status is Status.PASSED_THROUGH
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
    with pytest.raises(KeyError, match=r"no node '1.2'; did you mean 1\.\d") as refused:
        rec.targets["1.2"]
    assert isinstance(refused.value, fxinvert.FxInvertError)
    assert str(refused.value).startswith("no node")
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
        certificate = rec.certificates[before]
        with torch.no_grad():
            left = (child(rec.targets[before]) - rec.targets[name]).flatten(1).norm(dim=1)
        expected = left / rec.targets[name].flatten(1).norm(dim=1)
        torch.testing.assert_close(certificate.residual, expected, rtol=1e-3, atol=2e-5)
        distance = (rec.targets[before] - rec.anchors[before]).flatten(1).norm(dim=1)
        torch.testing.assert_close(certificate.distance, distance, rtol=1e-4, atol=1e-5)
        before = name


def test_a_float64_model_is_inverted_in_float64(digits_batch: tuple[Tensor, Tensor]) -> None:
    x = digits_batch[0].double()
    rec = fxinvert.invert(zoo.load("digits_mlp", "early").double(), x)(x, digits_batch[1])
    assert all(rec.targets[name].dtype == torch.float64 for name in rec.names)
    assert float(rec.consistency("tanh2").max()) < 1e-12


def test_the_model_is_not_touched(digits_batch: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(zoo.load("digits_cnn", "early"), nn.Dropout(0.5), nn.BatchNorm1d(10)).train()
    state, x = copy.deepcopy(model.state_dict()), digits_batch[0].clone()
    generator = torch.get_rng_state()
    rec = fxinvert.invert(model, x)(x, digits_batch[1])
    rec.consistency("0.conv1")
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, digits_batch[0])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(rec.targets[name].requires_grad for name in rec.names)


# --- failures stay where they are ---------------------------------------------------------------------------


def test_a_sample_that_is_not_a_number_fails_alone(
    early: InverseGraph, digits_batch: tuple[Tensor, Tensor]
) -> None:
    broken = digits_batch[0].clone()
    broken[5, 0, 3, 3] = torch.nan
    clean, dirty = early(*digits_batch), early(broken, digits_batch[1])
    rest = torch.arange(len(broken)) != 5
    for name in clean.names:
        assert torch.equal(dirty.targets[name][rest], clean.targets[name][rest]), name
        if name != "fc2":
            assert dirty.certificates[name].status is Status.FAILED
            assert dirty.certificates[name].failed.nonzero().tolist() == [[5]]
            assert torch.equal(
                dirty.certificates[name].residual[rest], clean.certificates[name].residual[rest]
            )
        torch.testing.assert_close(
            dirty.targets[name][5], dirty.anchors[name][5], equal_nan=True, rtol=0, atol=0
        )
        assert torch.equal(dirty.consistency(name)[rest], clean.consistency(name)[rest])


def test_an_empty_batch_has_empty_targets(early: InverseGraph, digits_batch: tuple[Tensor, Tensor]) -> None:
    rec = early(digits_batch[0][:0], digits_batch[1][:0])
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
        (
            (torch.randn(2, 1, 8, 8),) * 2,
            torch.tensor([0, 1]),
            r"the model takes \(tensor\).* given \(tensor, tensor\)",
        ),
        (
            torch.randn(2, 1, 8, 8).double(),
            torch.tensor([0, 1]),
            "does not run on these inputs.*type.*input 'images' is torch.float64, and torch.float32 was traced",
        ),
        ([[1.0]], torch.tensor([0]), r"the model takes \(tensor\).* given"),
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
    with pytest.raises(DataError, match="condition_limit=-1; a condition number"):
        fxinvert.invert(model, x, condition_limit=-1)


def test_both_graphs_print_as_tables(early: InverseGraph, capsys: pytest.CaptureFixture[str]) -> None:
    for module, op in ((early.graph, "aten.conv2d.default"), (early.graph_module, "conv1_inverse")):
        module.print_tabular()  # type: ignore[operator]
        assert op in capsys.readouterr().out
