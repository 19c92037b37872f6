"""Post-training: better on held-out data or unchanged, the user's model untouched, bad input refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import fxinvert
from fxinvert import CutError, DataError, TraceError, models
from fxinvert.linalg import SolveSettings
from fxinvert.result import Record

Data = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def train() -> Data:
    data = models.digits()
    return list(models.batches(data.x_train, data.y_train))


def regression_data(outputs: int = 2) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator)
    y = torch.tanh(x @ torch.randn(5, outputs, generator=generator))
    return [(x[i : i + 64], y[i : i + 64]) for i in range(0, 300, 64)]


def network(outputs: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs))


def test_early_digits_cnn_gains_ten_points_to_at_least_ninety_four(train: Data) -> None:
    data, model = models.digits(), models.load("digits_cnn", "early")
    result = fxinvert.post_train(model, train, sweeps=3)
    before = models.accuracy(model, data.x_test, data.y_test)
    after = models.accuracy(result.model, data.x_test, data.y_test)
    assert after >= max(before + 0.10, 0.94)
    assert type(result.model) is type(model)


@pytest.mark.slow
def test_what_is_exported_computes_the_same_to_five_digits(train: Data, tmp_path: Path) -> None:
    model = fxinvert.post_train(models.load("digits_cnn", "early"), train).model
    report = fxinvert.export_onnx(model, train[0][0][:8], tmp_path / "model.onnx")
    assert report.max_abs <= 1e-5


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp"])
@pytest.mark.parametrize("state", ["early", "converged"])
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_never_worse_on_held_out_data(train: Data, name: str, state: str, schedule: str) -> None:
    result = fxinvert.post_train(models.load(name, state), train, schedule=schedule, sweeps=2)
    assert result.final.loss <= result.baseline.loss
    assert result.final.accuracy is not None
    assert result.baseline.accuracy is not None
    assert result.final.accuracy >= result.baseline.accuracy
    for record in result.history:
        assert record.after.loss <= record.before.loss


def test_wrong_labels_leave_the_model_as_it_was(train: Data) -> None:
    """Held-out labels are right, training labels are shuffled: nothing that is learned helps."""
    data, model = models.digits(), models.load("digits_cnn", "converged")
    shuffled = [(x, y.flip(0)) for x, y in train]
    result = fxinvert.post_train(model, shuffled, validation_data=[(data.x_test, data.y_test)], sweeps=1)
    assert result.final.accuracy is not None
    assert result.baseline.accuracy is not None
    assert result.final.accuracy >= result.baseline.accuracy


def test_the_models_given_and_the_random_state_are_untouched(train: Data) -> None:
    model = models.load("digits_cnn", "early")
    model.train()
    model.get_submodule("fc1").eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    result = fxinvert.post_train(model, train, sweeps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in result.model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_same_input_same_bytes(train: Data) -> None:
    first, second = (
        fxinvert.post_train(models.load("digits_mlp", "early"), train, sweeps=1) for _ in range(2)
    )
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    assert first.final == second.final


@pytest.mark.parametrize("confidence", [0.5, 0.9, 1 - 1e-9])
def test_every_step_shows_what_would_be_returned(train: Data, confidence: float) -> None:
    model, shown = models.load("digits_cnn", "early"), list[tuple[Record, nn.Module]]()
    settings: dict[str, Any] = {"sweeps": 2, "confidence": confidence}
    result = fxinvert.post_train(model, train, **settings, watch=lambda *step: shown.append(step))
    alone = fxinvert.post_train(model, train, **settings)
    assert [replace(record, seconds=0) for record, _ in shown] == [
        replace(record, seconds=0) for record in alone.history
    ]
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])
        assert torch.equal(value, shown[-1][1].state_dict()[name])
    few = fxinvert.post_train(model, train, **settings | {"sweeps": 1})
    number = len(few.history) - 1
    for name, value in few.model.state_dict().items():
        assert torch.equal(value, shown[number][1].state_dict()[name])


def test_output_targets_are_told_apart_in_one_pass(train: Data) -> None:
    """Three output targets, one segment: as many passes over the data as for one and a sweep, two."""
    passes: list[int] = []

    class Counted:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            passes.append(1)
            return iter(train)

    settings: dict[str, Any] = {"sweeps": 1, "only": ["fc2"]}
    several = fxinvert.post_train(models.load("digits_cnn", "early"), Counted(), **settings)
    assert [record.sweep for record in several.history] == [0] * 4 + [1] * 2
    of_several = len(passes)
    passes.clear()
    fxinvert.post_train(
        models.load("digits_cnn", "early"), Counted(), **settings, output_target="cross_entropy"
    )
    assert of_several == len(passes) + 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        found: Tensor = self.last(x + torch.tanh(self.inner(x)))
        return found


@pytest.mark.parametrize(
    ("model", "schedule", "sweeps"), [(network(), "sequential", 3), (Residual(), "parallel", 6)]
)
def test_what_branches_is_trained_all_at_once_and_twice_as_often(
    model: nn.Module, schedule: str, sweeps: int
) -> None:
    by_default = fxinvert.post_train(model, regression_data(), patience=9)
    asked_for = fxinvert.post_train(model, regression_data(), patience=9, schedule=schedule, sweeps=sweeps)
    own, other = (
        [(r.sweep, r.segments, r.after) for r in found.history] for found in (by_default, asked_for)
    )
    assert own == other
    assert (max(sweep for sweep, _, _ in own) > 3) == (sweeps > 3)


def test_only_the_segments_of_the_plan_change(train: Data) -> None:
    model = models.load("digits_cnn", "early")
    graph = fxinvert.trace(model, train[0][0][:2])
    plan = fxinvert.partition(graph, cuts=["flatten"])
    head = fxinvert.Plan(plan.segments[1:])
    result = fxinvert.post_train(model, train, plan=head, sweeps=1)
    assert result.changed == ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def test_one_affine_layer_on_regression_is_solved_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    exact = nn.Linear(5, 3).double()
    data = [(x, exact(x).detach())]
    result = fxinvert.post_train(nn.Linear(5, 3).double(), data, sweeps=1, damping=0.0)
    assert result.output_target == "regression"
    assert result.final.loss < 1e-20
    assert torch.allclose(result.model.weight, exact.weight)  # type: ignore[arg-type]


def test_regression_network_improves_and_has_no_accuracy() -> None:
    result = fxinvert.post_train(network(), regression_data())
    assert result.final.loss < 0.5 * result.baseline.loss
    assert result.final.accuracy is None


def test_tied_parameters_are_updated_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.twice, self.leave = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            x = torch.tanh(self.twice(x))
            x = torch.tanh(self.twice(x))
            result: Tensor = self.leave(x)
            return result

    result = fxinvert.post_train(Tied(), regression_data())
    assert result.final.loss < result.baseline.loss
    assert [segment.trained for segment in result.plan.segments] == [
        ("enter",),
        ("twice", "twice@2"),
        ("leave",),
    ]


@pytest.mark.parametrize("wide", [5, 8])
def test_a_weight_that_is_used_in_two_ways_is_trained_for_each(wide: int) -> None:
    """Once transposed, and once with another bias: their normal equations are not the same problem's."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.again = nn.Linear(5, wide), nn.Linear(5, wide)
            self.again.weight = self.enter.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x)) @ self.enter.weight
            result: Tensor = self.again(torch.tanh(x))
            return result

    torch.manual_seed(0)
    result = fxinvert.post_train(Tied(), regression_data(wide))
    assert result.final.loss < 0.9 * result.baseline.loss
    assert set(result.changed) == {"enter.weight", "enter.bias", "again.bias"}


def test_an_output_layer_tied_to_the_embedding_is_trained_in_either_capture() -> None:
    class Text(nn.Module):
        def __init__(self, branches: bool) -> None:
            super().__init__()
            self.branches = branches
            self.head, self.mix, self.embed = nn.Linear(6, 7, bias=False), nn.Linear(6, 6), nn.Embedding(7, 6)
            self.embed.weight = self.head.weight
            self.embed.register_buffer("scale", torch.tensor(6.0))

        def forward(self, ids: Tensor) -> Tensor:
            if self.branches and len(ids.flatten(1).unbind(1)) < 3:
                raise ValueError("too short")
            x = self.embed(ids) * self.embed.scale
            result: Tensor = self.head(x + torch.tanh(self.mix(x)))
            return result

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (64, 4), generator=generator)
    for branches in (False, True):
        torch.manual_seed(0)
        model = Text(branches)
        assert ("captured" in fxinvert.trace(model, ids[:2]).meta) == branches
        result = fxinvert.post_train(model, (ids, (ids + 1) % 7), sweeps=1)
        assert result.final.loss < result.baseline.loss
        embed, head = (result.model.get_submodule(name) for name in ("embed", "head"))
        assert embed.weight is head.weight


def test_batch_norm_and_convolutions_are_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 2, 6, 6, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    result = fxinvert.post_train(model, [(x, y)], sweeps=2, confidence=0.5)
    assert [segment.name for segment in result.plan.segments] == ["0", "1", "5"]
    assert result.final.loss < result.baseline.loss


def test_samples_that_are_right_can_be_ignored(train: Data) -> None:
    """With weight 0 for satisfied samples, data that is right throughout leaves nothing to fit."""
    model = models.load("digits_cnn", "converged")
    x = models.digits().x_train
    agreed = [(x, model(x).argmax(1))]
    result = fxinvert.post_train(model, agreed, output_target="nearest", satisfied_weight=0.0, sweeps=1)
    assert result.changed == ()


def test_solvers_of_nodes_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}
    at = SolveSettings.at

    def noted(self: SolveSettings, path: str) -> SolveSettings:
        found = at(self, path)
        asked[path] = found.method or "chosen"
        return found

    monkeypatch.setattr(SolveSettings, "at", noted)
    x, y = regression_data()[0]
    result = fxinvert.post_train(network(), [(x, y)], sweeps=1, solvers={"2": "qr"})
    assert asked["2"] == "qr"
    assert set(asked.values()) == {"qr", "chosen"}
    assert result.final.loss <= result.baseline.loss
    with pytest.raises(DataError, match=r"the solvers are diagonal, .*, and the nodes "):
        fxinvert.post_train(network(), [(x, y)], solvers={"nowhere": "qr"})


def test_few_samples_are_judged_on_themselves_and_it_is_said() -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    result = fxinvert.post_train(network(), [(x, torch.randn(2, 2))], sweeps=1)
    assert result.final.loss <= result.baseline.loss
    assert str(result) == f"{result!r}\nNote: {result.notes[0]}."


def test_labels_and_outputs_that_most_likely_mean_something_else_are_noted() -> None:
    """What binary_cross_entropy_with_logits takes, floating-point 0 and 1, are values here; and labels ask for logits."""
    x = torch.cat([x for x, _ in regression_data()])
    sure = (x[:, :2] > 0).float()

    def notes(model: nn.Module, y: Tensor, **settings: Any) -> str:
        return " ".join(fxinvert.post_train(model, (x, y), sweeps=1, confidence=0.5, **settings).notes)

    assert "truth values, labels.bool()" in notes(network(), sure)
    probable = nn.Sequential(network(), nn.Sigmoid())
    assert "ends in sigmoid" in notes(nn.Sequential(probable, nn.Flatten()), sure.bool())
    assert "ends in softmax" in notes(nn.Sequential(network(), nn.Softmax(1)), sure[:, 0].long())
    for model, y, settings in (
        (network(), sure, {"output_target": "regression"}),
        (network(), sure.bool(), {}),
        (network(), 2 * sure, {}),
        (probable, sure, {}),
    ):
        assert not notes(model, y, **settings)


def test_labels_of_validation_data_are_of_the_kind_of_those_trained_on() -> None:
    data = [(x, y.argmax(1)) for x, y in regression_data()]
    with pytest.raises(
        DataError, match=r"batch 0 of validation_data: labels: floating-point numbers; .*: integers"
    ):
        fxinvert.post_train(network(), data, validation_data=regression_data())


def test_a_shuffling_loader_works() -> None:
    x, y = (torch.cat(parts) for parts in zip(*regression_data(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    result = fxinvert.post_train(network(), loader)
    assert result.final.loss < result.baseline.loss


def test_one_of_two_outputs_is_supervised() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = network(), network(3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"steering": self.a(x), "speed": self.b(x)}

    with pytest.raises(TraceError, match="returns 2 outputs \\('steering', 'speed'\\)"):
        fxinvert.post_train(Two(), regression_data())
    result = fxinvert.post_train(Two(), regression_data(), output="steering", sweeps=1)
    assert result.final.loss < result.baseline.loss
    assert all(name.startswith("a.") for name in result.changed)


class Frames(nn.Module):
    """Three frames of every sample as rows of their own, as audio models give their channels."""

    def __init__(self, by_sample: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.by_sample = nn.Linear(5, 16), nn.Linear(16, 4), by_sample

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x.flatten(0, 1))))
        return torch.unflatten(y, 0, (len(x), -1)) if self.by_sample else y


@pytest.mark.parametrize("classes", [True, False])
def test_several_rows_of_outputs_for_a_sample_are_trained_like_an_axis_of_its_own(classes: bool) -> None:
    x = torch.randn(120, 3, 5)
    y = torch.tanh(x @ torch.randn(5, 4))
    if classes:
        y = y.argmax(-1)
    traced, rows = fxinvert.trace(Frames(), x[:2]), y.flatten(0, 1)
    wanted = fxinvert.post_train(Frames(by_sample=True), [(x, y)], sweeps=1)
    assert wanted.final.loss < wanted.baseline.loss
    for model, labels in ((Frames(), rows), (Frames(), y), (traced, rows)):
        found = fxinvert.post_train(model, [(x, labels)], sweeps=1, plan=fxinvert.partition(traced))
        assert (found.baseline, found.final) == (wanted.baseline, wanted.final)
        assert found.model(x[:2]).shape == (6, 4)


@pytest.mark.parametrize(
    ("frames", "rows", "message"),
    [
        (3, 2, r"labels of shape \(20, 2\) do not fit outputs of shape \(20, 3, 4\)"),
        (4, 4, r"4 rows of outputs for each sample, and as many classes.*either axis"),
    ],
)
def test_rows_of_labels_that_may_not_be_those_of_outputs_are_refused(
    frames: int, rows: int, message: str
) -> None:
    labels = torch.zeros(20 * rows, dtype=torch.long)
    with pytest.raises(DataError, match=message):
        fxinvert.post_train(Frames(), [(torch.randn(20, frames, 5), labels)])


class Empty:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Empty(), "train_data has no batches"),
        ((pair for pair in regression_data()), "only once"),
        (
            [(torch.randn(8, 5), torch.full((8,), 2))],
            "labels range from 2 to 2; the model has 2 classes, 0 to 1",
        ),
        (
            [(torch.randn(8, 5), torch.zeros(8, 3, dtype=torch.int64))],
            r"labels of shape \(\d, 3\) do not fit",
        ),
        ([(torch.randn(8, 5), torch.zeros(8, 3))], r"labels of shape \(\d, 3\) do not fit"),
        ([(torch.randn(8, 5) / 0, torch.zeros(8))], "NaN or infinite"),
    ],
)
def test_bad_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fxinvert.post_train(network(), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"schedule": "random"}, "unknown schedule 'random'; known are sequential, parallel"),
        ({"executor": "cloud"}, "unknown executor 'cloud'"),
        ({"output_target": "best"}, "unknown output target 'best'"),
        ({"sweeps": 0}, "sweeps=0; a whole number of at least 1"),
        ({"run_directory": ""}, "run_directory=''; give a path"),
        ({"damping": -1.0}, "damping=-1.0; a number of at least 0"),
        (
            {"damping": 0.1, "method": "auto"},
            "damping and satisfied_weight are settings of method='closed_form'",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fxinvert.post_train(network(), regression_data(), **settings)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.cell(x[..., None])[0][:, -1])
        return found


def test_parameters_that_no_method_trains_are_noted() -> None:
    def kept(model: nn.Module) -> list[str]:
        notes = fxinvert.post_train(model, regression_data(), sweeps=1).notes
        return [note for note in notes if "keep their values" in note]

    (note,) = kept(Recurrent())
    assert note.startswith(
        "cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0 and 1 more, 89 % of the parameters"
    )
    assert not kept(network())
    frozen = Recurrent()
    frozen.cell.requires_grad_(False)
    assert not kept(frozen)


def test_what_was_computed_on_a_model_is_no_part_of_its_copy() -> None:
    model = network()
    wanted = fxinvert.post_train(model, regression_data(), sweeps=1).model.state_dict()
    model.hidden = {"last": [model(torch.randn(2, 5))]}  # type: ignore[assignment]
    result = fxinvert.post_train(model, regression_data(), sweeps=1)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert model.hidden["last"][0].grad_fn is not None  # type: ignore[index]


def test_weights_that_hooks_compute_are_trained_as_parametrized_ones() -> None:
    old, new = network(), network()
    new.load_state_dict(old.state_dict())
    nn.utils.weight_norm(old[0])  # type: ignore[index]
    nn.utils.parametrizations.weight_norm(new[0])  # type: ignore[index]
    trained, wanted = (fxinvert.post_train(m, regression_data(), sweeps=1).model for m in (old, new))
    assert not torch.equal(trained[0].weight_v, old[0].weight_v)  # type: ignore[index]
    assert torch.equal(trained[0].weight_v, wanted[0].parametrizations.weight.original1)  # type: ignore[index]
    x = torch.randn(4, 5)
    torch.testing.assert_close(trained(x), wanted(x))


def test_a_scripted_part_is_trained() -> None:
    model, data = network(), regression_data()
    scripted = nn.Sequential(torch.jit.script(model[:2]), model[2])  # type: ignore[index]
    trained, wanted = (fxinvert.post_train(m, data, sweeps=1).model for m in (scripted, model))
    for (name, value), other in zip(trained.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_what_is_pruned_stays_pruned() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    result = fxinvert.post_train(model, regression_data(), sweeps=1)
    result.model(torch.randn(2, 5))
    assert not result.model[0].weight[model[0].weight == 0].any()  # type: ignore[index]
    assert result.final.loss < result.baseline.loss
    assert "0.weight_orig" in result.changed


def test_what_is_no_model_and_what_is_no_plan_are_refused() -> None:
    with pytest.raises(TraceError, match="the model is the class Linear"):
        fxinvert.post_train(nn.Linear, regression_data())  # type: ignore[arg-type]
    trained = network()
    trained.trainer = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(
        DataError, match=r"cannot be copied \(cannot pickle .*\): trainer \(lock\)\. Set it to None"
    ):
        fxinvert.post_train(trained, regression_data())
    with pytest.raises(
        DataError, match=r"cannot be copied \(cannot pickle .*\): trainer \(lock\)\. Set it to None"
    ):
        fxinvert.export_onnx(trained, torch.randn(2, 5), "never.onnx")
    with pytest.raises(CutError, match=r"the plan is str; one from fxinvert.partition"):
        fxinvert.post_train(network(), regression_data(), plan="auto")  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_named() -> None:
    model = network()
    name, value = next(iter(model.named_parameters()))
    value.data.flatten()[0] = torch.nan
    with pytest.raises(DataError, match=rf"parameter '{name}' has NaN or infinite values in 1 of"):
        fxinvert.post_train(model, regression_data())


def test_a_plan_for_another_model_is_refused() -> None:
    plan = fxinvert.partition(fxinvert.trace(models.digits_cnn(), torch.rand(2, 1, 8, 8)))
    with pytest.raises(CutError, match="made for another graph: this one has no 'conv1"):
        fxinvert.post_train(network(), regression_data(), plan=plan)


MEMORY = """
import resource, sys, torch, fxinvert
from torch import nn
class Endless:
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(int(sys.argv[1])):
            x = torch.randn(200, 1, 16, 16, generator=generator)
            yield x, (x.mean((1, 2, 3)) > 0).long()
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 2))
fxinvert.post_train(net, Endless(), sweeps=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, count], capture_output=True, check=True, text=True
            ).stdout
        )
        for count in ("10", "100")
    ]
    # 18,000 more samples are 18 MB of input and ten times that of features; kilobytes here
    assert peaks[1] - peaks[0] < 15_000


def test_frozen_parameters_stay_and_a_model_frozen_throughout_is_trained() -> None:
    model = network()
    model.get_submodule("0").requires_grad_(False)
    result = fxinvert.post_train(model, regression_data(), sweeps=1)
    assert result.changed == ("2.weight", "2.bias")
    frozen = network().requires_grad_(False)
    assert len(fxinvert.post_train(frozen, regression_data(), sweeps=1).changed) == 4


def test_a_computed_weight_is_no_parameter() -> None:
    normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(5, 16))
    result = fxinvert.post_train(
        nn.Sequential(normed, nn.Tanh(), nn.Linear(16, 2)), regression_data(), sweeps=1
    )
    assert result.changed == ("2.weight", "2.bias")


def test_one_number_per_sample() -> None:
    data = [(x, y[:, 0]) for x, y in regression_data()]
    result = fxinvert.post_train(nn.Sequential(network(1), nn.Flatten(0)), data)
    assert result.final.loss < result.baseline.loss


def test_a_way_through_complex_numbers_is_a_region() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.fft.fft(x).real)
            return result

    result = fxinvert.post_train(Spectral(), regression_data())
    assert result.final.loss < result.baseline.loss
    assert result.changed == ("last.weight", "last.bias")


def test_an_output_target_that_raises_is_named() -> None:
    def wrong(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs @ labels

    with pytest.raises(DataError, match="output target 'wrong' raised RuntimeError"):
        fxinvert.post_train(network(), regression_data(), output_target=wrong)
