"""Methods and schedules: what each promises, whatever the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from runs import data, network, train, weights
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert import CutError, DataError, RuleError, models
from fxinvert.output_target import output_target
from fxinvert.passes.plan import Segment
from fxinvert.scheduling import waves
from fxinvert.training import (
    Auto,
    Back,
    ClosedForm,
    GaussNewton,
    Gradient,
    Joint,
    NormalEquations,
    Optimizer,
    Proposal,
    Update,
    Work,
)
from fxinvert.training.auto import NORMALIZED, SOLVED
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.data import Batches
from fxinvert.training.gradient import fit_segment
from fxinvert.training.joint import Average, fit_jointly, parameters_before, target_weight
from fxinvert.training.op_sums import sums
from fxinvert.training.recalibrate import moments

QUICK = Optimizer(epochs=1)
EVERY_METHOD = [
    ClosedForm(),
    ClosedForm(every=80),
    ClosedForm(error="weighted"),
    ClosedForm(ops="in_turn"),
    GaussNewton(),
    Gradient(QUICK),
    Gradient(Optimizer("SGD", 0.1, {"momentum": 0.9}, epochs=1), loss="weighted"),
    Joint(alpha=0.3, optimizer=QUICK),
    Auto(learning_rates=(1e-2,), optimizer=QUICK),
]


def context_of(model: nn.Module, samples: Any = None) -> tuple[Context, Batches]:
    given = data() if samples is None else samples
    return Context(model, {"train": source_of(given)}), Batches(given, torch.device("cpu"))


def with_norm() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    return model.eval()


@pytest.mark.parametrize("method", EVERY_METHOD, ids=repr)
@pytest.mark.parametrize("inputs", ["updated", "original"])
def test_every_method_learns_and_harms_nothing(method: Any, inputs: str) -> None:
    result = train(method=method, inputs=inputs)
    assert result.final.loss < result.baseline.loss
    assert result.final.no_worse_than(result.baseline)
    for record in result.history:
        assert record.after.loss <= record.before.loss


@pytest.mark.parametrize("method", EVERY_METHOD, ids=repr)
def test_wrong_labels_harm_nothing(method: Any) -> None:
    good = train().model
    wrong = [(x, y.flip(0)) for x, y in data()]
    result = fxinvert.post_train(good, wrong, validation_data=data(), method=method, sweeps=1)
    assert result.final.no_worse_than(result.baseline)


@pytest.mark.parametrize("share", ["searched", "equal", "explained", "none"])
def test_every_way_to_share_learns_and_harms_nothing(share: str) -> None:
    result = train(schedule="parallel", share=share)
    assert result.final.loss < result.baseline.loss
    sizes = [sum(record.sizes.values()) for record in result.history]
    if share in ("equal", "explained"):
        assert max(sizes) <= 1 + 1e-9


@pytest.mark.parametrize(
    "name", ["digits_mlp", "digits_cnn", pytest.param("digits_resnet", marks=pytest.mark.slow)]
)
def test_parallel_comes_within_a_point_of_sequential_after_twice_the_sweeps(name: str) -> None:
    digits = models.digits()
    batches = models.batches(digits.x_train, digits.y_train)
    model = models.load(name, "early")
    one_by_one = fxinvert.post_train(model, batches, sweeps=2)
    together = fxinvert.post_train(model, batches, schedule="parallel", sweeps=4)
    assert together.final.accuracy is not None
    assert one_by_one.final.accuracy is not None
    assert together.final.accuracy >= one_by_one.final.accuracy - 0.01
    assert together.final.no_worse_than(together.baseline)


def test_parallel_trains_all_from_one_snapshot() -> None:
    """The statistics of the second segment are the same whatever the first one's update."""
    undamped: dict[str, Any] = {"method": ClosedForm(damping=0.0, last_layer=False), "sweeps": 1}
    together = train(schedule="parallel", **undamped)
    alone = train(schedule="single", only="2", **undamped)
    assert together.history[0].explained["2"] == alone.history[0].explained["2"]


def test_original_inputs_are_those_of_the_sweeps_beginning() -> None:
    undamped: dict[str, Any] = {"method": ClosedForm(damping=0.0, last_layer=False), "sweeps": 1}
    alone = train(schedule="single", only="2", **undamped)
    original = train(inputs="original", **undamped)
    updated = train(inputs="updated", **undamped)
    assert original.history[1].explained == alone.history[0].explained
    assert updated.history[1].explained != alone.history[0].explained


def test_ops_in_turn_are_ops_as_segments() -> None:
    graph = fxinvert.trace(network(), data()[0][0])
    whole = fxinvert.partition(graph, segments=1)
    in_turn, by_segment = ClosedForm(ops="in_turn", last_layer=False), ClosedForm(last_layer=False)
    assert weights(train(plan=whole, method=in_turn)) == weights(train(method=by_segment))


def test_recursive_solutions_use_all_samples_so_far() -> None:
    """On an affine model with its regression target, recursive least squares ends where one solve of all data does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 3, generator=generator, dtype=torch.float64) + torch.randn(
        400, 3, generator=generator
    )
    batches = list(zip(torch.split(x, 20), torch.split(y, 20), strict=True))
    settings: dict[str, Any] = {"sweeps": 1, "chunk": 2, "validation_data": batches}
    once = fxinvert.post_train(nn.Linear(6, 3).double(), batches, method=ClosedForm(0.0), **settings)
    torch.manual_seed(0)
    often = fxinvert.post_train(
        nn.Linear(6, 3).double(), batches, method=ClosedForm(0.0, every=100), **settings
    )
    assert len(often.history) == 4
    assert all(record.step == 1 for record in often.history)
    assert torch.allclose(once.model.weight, often.model.weight)  # type: ignore[arg-type]


def test_weighted_errors_weigh_by_what_the_output_feels() -> None:
    """A layer before a ReLU that is shut for some samples: those samples' errors there do not count."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))  # type: ignore[operator]
    x = torch.tensor([[1.0, 2.0], [-1.0, 5.0]], dtype=torch.float64)
    context, batches = context_of(model, [(x, torch.ones(2, 1, dtype=torch.float64))])
    target = output_target("regression")
    (of_target,) = sums(
        context, batches, output_targets=[target], paths=["0"], satisfied_weight=1.0, weighted=True
    )
    (found,) = of_target.values()
    assert isinstance(found, NormalEquations)
    gram = found.gram[0]
    open_only = x[0][:, None] * x[0]
    assert torch.allclose(gram / gram[0, 0], open_only / open_only[0, 0])


def test_no_gradient_crosses_a_cut() -> None:
    context, batches = context_of(network())
    before = context.state()
    changes, explained = fit_segment(
        context,
        batches,
        output_target=output_target("cross_entropy"),
        exit_path="2",
        names=["2.weight", "2.bias"],
        optimizer=QUICK,
        satisfied_weight=1.0,
    )
    assert set(changes) == {"2.weight", "2.bias"}
    assert all(change.abs().max() > 0 for change in changes.values())
    assert explained <= 1
    assert all(torch.equal(value, before[name]) for name, value in context.state().items())
    assert all(parameter.grad is None for parameter in context.graph.parameters())


@pytest.mark.parametrize("kind", ["LBFGS", "SGD", "RMSprop", "NAdam"])
def test_any_optimizer_of_torch_can_be_used(kind: str) -> None:
    optimizer = Optimizer(kind, 1e-2, epochs=1)
    for method in (Gradient(optimizer), Joint(optimizer=optimizer)):
        result = train(method=method, sweeps=1)
        assert result.final.loss < result.baseline.loss


def test_joint_training_without_a_target_is_plain_fine_tuning() -> None:
    """α = 0 is what a loop with cross-entropy and AdamW gives, in training mode, step by step."""
    optimizer = Optimizer(learning_rate=1e-2, epochs=2, batch_size=16, options={"weight_decay": 0.05})
    context, batches = context_of(with_norm())
    (_, changes), _ = fit_jointly(
        context,
        batches,
        output_target=output_target("nearest"),
        exit_path="5",
        names=parameters_before(context, context.nodes["5"]),
        alpha=0.0,
        optimizer=optimizer,
    )
    model = with_norm().train()
    usual = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.05)
    for batch in optimizer.steps(batches):
        usual.zero_grad()
        F.cross_entropy(model(*batch.inputs), batch.labels).backward()  # type: ignore[no-untyped-call]
        usual.step()
    begun = with_norm().state_dict()
    for name, value in model.state_dict().items():
        # the gradient of a bias before a batch norm is rounding, which AdamW blows up; the mean takes it away again
        if value.is_floating_point() and name not in ("0.bias", "3.bias") and "running_mean" not in name:
            assert torch.allclose(begun[name] + changes[name], value, atol=1e-5), name


def test_joint_training_freezes_what_comes_after_the_cut() -> None:
    context, batches = context_of(with_norm())
    (changes,), _ = fit_jointly(
        context,
        batches,
        output_target=output_target("nearest"),
        exit_path="2",
        names=parameters_before(context, context.nodes["2"]),
        alpha=0.3,
        optimizer=QUICK,
    )
    # batch-norm statistics move everywhere, parameters up to the cut only
    assert {name for name in changes if not name.split(".")[1].startswith("running")} == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }
    assert {"1.running_mean", "4.running_var"} <= set(changes)


def fitted(
    context: Context, batches: Batches, epochs: int, **settings: Any
) -> tuple[list[dict[str, Tensor]], Any]:
    """A gradient run of everything."""
    names = parameters_before(context, context.nodes["5"])
    optimizer = Optimizer(learning_rate=1e-2, epochs=epochs)
    target = output_target("nearest")
    return fit_jointly(
        context,
        batches,
        output_target=target,
        exit_path="5",
        names=names,
        alpha=0.0,
        optimizer=optimizer,
        **settings,
    )


def test_a_gradient_run_goes_on_where_it_ended() -> None:
    """Two runs of one pass each do what one run of two passes that are shuffled alike would do."""
    context, batches = context_of(with_norm(), [(x[:8], y[:8]) for x, y in data()])
    settings: dict[str, Any] = {"average": 0.9}
    (first,), course = fitted(context, batches, 1, **settings)
    (second,), _ = fitted(context, batches, 1, course=course, **settings)
    (_, first_pass), _ = fitted(context, batches, 2, **settings)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    assert torch.allclose(first_pass["0.weight"], second["0.weight"], rtol=0.3, atol=1e-3)
    assert course.steps == len(data())


def test_few_samples_are_passed_over_more_often() -> None:
    context, batches = context_of(with_norm(), data()[:2])
    snapshots, course = fitted(context, batches, 1, steps=9)
    assert course.steps == 10
    assert len(snapshots) == 4  # after 1, 2, 4 and 5 passes


def test_averaged_weights_forget_where_they_began() -> None:
    context, batches = context_of(with_norm())
    (plain,), _ = fitted(context, batches, 1)
    (averaged,), _ = fitted(context, batches, 1, average=0.9)
    assert 0 < averaged["5.weight"].norm() < plain["5.weight"].norm()


def test_a_gradient_run_can_leave_running_statistics_alone() -> None:
    """The step of a network in evaluation mode, as torch alone would take it."""
    (x, y), *_ = data()
    context, batches = context_of(with_norm(), [(x, y)])
    (changes,), course = fitted(context, batches, 1, normalize_by_batch=False)
    model = with_norm()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
    optimizer.step()
    assert set(changes) == set(before)
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] + changes[name], p.detach(), rtol=1e-4, atol=1e-6)
    assert not any("running" in name for name in course.tensors)


def test_auto_trains_batch_norm_by_both_statistics_and_proposes_their_mean() -> None:
    """From the learning rate on that short runs found best, downwards."""
    seen: list[list[Proposal]] = []

    class Watched(Auto):
        def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal] | Back]:
            for step in super().train(work, segments):
                assert not isinstance(step, Back)
                seen.append(step)
                yield step

    result = fxinvert.post_train(with_norm(), data(), method=Watched(runs=1, optimizer=QUICK), sweeps=1)
    stages = [name for record in result.history for name in record.sizes]
    assert stages[0] == "batch-norm statistics"
    names = [[update.op for (update,) in proposals] for proposals in seen]
    rates = [f"gradient, learning rate {rate:g}, " for rate in NORMALIZED.rates]
    assert names[1] == [rate + "trial" for rate in rates]
    begin = names[1].index(stages[1])
    assert result.history[1].step > 0
    assert [own[0] for own in names[2:]] == [rate + "mean" for rate in rates[begin:]]
    third = len(seen[2]) // 3
    for (mean,), (by_batch,), (by_running,) in zip(
        seen[2][:third], seen[2][third : 2 * third], seen[2][2 * third :], strict=True
    ):
        assert "1.running_mean" in by_batch.changes
        assert "1.running_mean" not in by_running.changes
        expected = (by_batch.changes["0.weight"] + by_running.changes["0.weight"]) / 2
        torch.testing.assert_close(mean.changes["0.weight"], expected)
        torch.testing.assert_close(mean.changes["1.running_mean"], by_batch.changes["1.running_mean"] / 2)


def test_without_closed_form_auto_does_not_ask_which_output_target() -> None:
    method = Auto(None, learning_rates=(1e-2,), runs=1, optimizer=QUICK)
    result = train(method=method, sweeps=1, output_target="auto")
    assert [record.sweep for record in result.history] == [1]


def test_auto_trains_what_was_solved_and_the_model_as_given() -> None:
    """With the rates that a short run tells, and ends with the best on the way between what both lead to."""
    rates = (1e-2, 1e-8, 1e-3)
    result = train(method=Auto(learning_rates=rates, runs=1, optimizer=QUICK), sweeps=1)
    names = [tuple(record.sizes) for record in result.history]
    runs = [f"gradient, learning rate {rate:g}" for rate in rates]
    assert names[:4] == [("0", "2"), *((f"{run}, {SOLVED}",) for run in runs)]
    assert result.history[4].before.loss == pytest.approx(result.baseline.loss, rel=1e-6)
    (begin,) = (i for i, run in enumerate(runs) if names[4] == (f"{run}, trial",))
    assert names[5:] == [*((run,) for run in runs[begin:]), (SOLVED,)]
    assert result.final.loss <= min(record.after.loss for record in result.history) + 1e-6
    assert train(method="auto", sweeps=1).final.loss < train(schedule="parallel", sweeps=1).final.loss


def test_what_was_solved_is_kept_where_gradients_reach_nothing() -> None:
    solved = train(method=Auto(learning_rates=(1e-8,), runs=1, optimizer=QUICK), sweeps=1)
    last = solved.history[-1]
    assert solved.final.loss < 0.9 * solved.baseline.loss
    assert solved.final.loss == pytest.approx(solved.history[0].after.loss, rel=1e-3)
    assert last.after.loss == pytest.approx(solved.final.loss, rel=1e-5)
    assert last.before.loss == pytest.approx(solved.baseline.loss, rel=1e-3)


def test_auto_trains_the_model_as_given_alone_where_a_solve_reaches_nothing() -> None:
    """Runs go on with the learning rate of the short run that was taken."""
    rates = (1e-8, 1e-2, 1e-3)
    nothing = ClosedForm(satisfied_weight=1.0, damping=1e30, last_layer=False)
    method = Auto(nothing, learning_rates=rates, runs=1, optimizer=QUICK)
    names = [name for record in train(method=method, sweeps=1).history for name in record.sizes]
    gradients = [f"gradient, learning rate {rate:g}" for rate in rates]
    assert names == ["0", "2", f"{gradients[1]}, trial", *gradients[1:]]


def test_the_solve_alone_tells_output_targets_apart() -> None:
    """Of the last segment."""
    method = Auto(learning_rates=(1e-2,), runs=1, optimizer=QUICK)
    history = train(method=method, sweeps=1, output_target="auto").history
    told = [record for record in history if record.sweep == 0]
    assert len({record.output_target for record in told}) > 1
    assert {tuple(record.sizes) for record in told} == {("2",)}


def test_auto_trains_the_chosen_segments_only() -> None:
    assert train(method="auto", sweeps=1, only="2").changed == ("2.weight", "2.bias")


def test_closed_form_can_be_made_of_the_first_samples() -> None:
    few = train(data()[:4], method=ClosedForm(), sweeps=1, validation_data=data(), chunk=4)
    many = train(data(), method=ClosedForm(samples=50), sweeps=1, validation_data=data(), chunk=4)
    assert weights(few) == weights(many)


def test_the_weight_of_the_target_is_the_papers() -> None:
    average = Average()
    assert [average.add(value) for value in (2.0, 1.0)] == [2.0, pytest.approx(1.9)]
    assert target_weight(0.1, 2.0, 0.5) == pytest.approx(0.4)
    assert target_weight(0.1, 2.0, 0.0) == 10.0
    assert target_weight(0.1, 0.0, 0.5) == 1e-5
    assert target_weight(0.0, 2.0, 0.5) == 0.0


def test_runs_side_by_side_go_through_the_data_equally_often() -> None:
    """A last batch of one sample has no variance, so that only the run with running statistics takes it."""
    x, y = (torch.cat(parts)[:9] for parts in zip(*data(), strict=True))
    context, batches = context_of(with_norm(), [(x[:8], y[:8]), (x[8:], y[8:])])
    shared: dict[str, Any] = {
        "exit_path": "5",
        "names": ["0.weight"],
        "alpha": 0.0,
        "optimizer": QUICK,
        "steps": 5,
    }
    target = output_target("cross_entropy")
    by_batch, by_running = (
        fit_jointly(context, batches, output_target=target, normalize_by_batch=own, **shared)
        for own in (True, False)
    )
    assert len(by_batch[0]) == len(by_running[0]) > 1


def test_joint_training_of_several_segments_at_once_is_refused() -> None:
    with pytest.raises(DataError, match="everything up to a cut"):
        train(method="joint", schedule="parallel")


def test_recalibration_estimates_the_statistics_of_the_data() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    context, batches = context_of(model, [(x[:40], torch.zeros(40).long()), (x[40:], torch.zeros(24).long())])
    mean, variance = moments(context, batches)["0"].mean_and_variance
    assert torch.allclose(mean, x.double().mean(0), atol=1e-6)
    assert torch.allclose(variance, x.double().var(0, unbiased=False), atol=1e-5)
    assert torch.equal(model[0].running_mean, torch.zeros(3))  # type: ignore[arg-type]


def test_recalibration_mends_statistics_that_are_off() -> None:
    model = fxinvert.post_train(with_norm(), data(), sweeps=1).model
    model.get_buffer("1.running_mean").add_(3.0)
    fitted = fxinvert.post_train(model, data(), sweeps=1, recalibrate=True)
    assert "1.running_mean" in fitted.changed
    assert fitted.final.loss < fxinvert.post_train(model, data(), sweeps=1).final.loss


class Shrinking:
    """A user's own method: makes the weights a bit smaller."""

    name, schedule = "shrinking", "sequential"

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        tensors = work.context.tensors
        yield [
            [Update(s.name, {name: -0.1 * tensors[name].detach() for name in s.parameters}) for s in segments]
        ]


def test_users_can_bring_their_own_method() -> None:
    result = train(method=Shrinking())
    assert result.final.no_worse_than(result.baseline)
    assert result.history


def test_what_is_no_method_is_named() -> None:
    with pytest.raises(DataError, match=r"<object.*> has no name, schedule, train"):
        train(method=object())


def test_a_method_knows_the_sweep_and_its_own_schedule() -> None:
    seen: list[tuple[int, int]] = []

    class Looking(Shrinking):
        schedule = "parallel"

        def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
            seen.append((work.sweep, len(segments)))
            yield from super().train(work, segments)

    result = train(method=Looking(), output_target="auto", sweeps=2, patience=2)
    count = len(result.plan.segments)
    tries = [own for own in seen if own[0] == 0]
    assert len(tries) > 1  # output targets are told apart by the last segment
    assert set(tries) == {(0, 1)}
    assert next(own for own in seen if own[0] > 0) == (1, count)
    assert {record.sweep for record in result.history} == {sweep for sweep, _ in seen}


def test_sweeps_end_early_when_they_bring_too_little() -> None:
    ran = [
        max(r.sweep for r in train(sweeps=9, least_gain=g, patience=p).history)
        for g, p in ((0.9, 1), (0.9, 3))
    ]
    assert ran == [2, 4]


# schedules


class Fork(nn.Module):
    """Two branches between a first and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        result: Tensor = self.last(torch.tanh(self.left(x)) + torch.tanh(self.right(x)))
        return result


def test_waves_hold_segments_that_do_not_feed_one_another() -> None:
    graph = fxinvert.trace(Fork(), torch.randn(2, 6))
    named = {segment.name: segment for segment in fxinvert.partition(graph).segments}
    example = next(iter(named.values()))
    own = {name: [n.meta["path"] for n in graph.graph.nodes if n.meta.get("path") == name] for name in
           ("first", "left", "right", "last")}  # fmt: skip
    plan = fxinvert.Plan(
        tuple(
            Segment(**vars(example) | {"name": name, "nodes": tuple(paths), "trained": (name,)})
            for name, paths in own.items()
        )
    )
    names = [[segment.name for segment in wave] for wave in waves(plan, "waves", graph.graph)]
    assert names == [["first"], ["left", "right"], ["last"]]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"only": "3"},
            CutError,
            "no segment '3' to train: the plan has none of this name; those to train are 0, 2",
        ),
        ({"only": ["0", "0"]}, CutError, "named twice"),
        ({"only": []}, CutError, "only names no segment"),
        ({"only": 5}, CutError, "only=5; a name, or a list of names"),
        ({"schedule": "single"}, DataError, "say which of 0, 2"),
        ({"schedule": "random"}, DataError, "known are sequential, parallel, waves, single"),
        ({"inputs": "both"}, DataError, "unknown inputs 'both'; known are updated, original"),
        ({"share": "half"}, DataError, "unknown share 'half'"),
        ({"schedule": ["parallel"]}, DataError, r"unknown schedule \['parallel'\]"),
        (
            {"reconstruction": "linear"},
            DataError,
            "unknown reconstruction 'linear'; known are auto, nodewise",
        ),
        ({"rules": {}}, RuleError, "rules is dict; a RuleSet is needed"),
        ({"solvers": "qr"}, DataError, "solvers='qr'; a mapping of nodes to solvers"),
        ({"confidence": "0.9"}, DataError, "confidence='0.9'; a probability from 0.5 to below 1"),
        ({"least_gain": -1}, DataError, "least_gain=-1; a share of at least 0"),
        ({"run_directory": 5}, DataError, "run_directory=5; give a path"),
        (
            {"method": ClosedForm},
            DataError,
            r"method is the class ClosedForm; an object of it is needed: ClosedForm\(",
        ),
        ({"sweeps": "3"}, DataError, "sweeps='3' is str; a whole number is needed"),
        ({"sweeps": True}, DataError, "sweeps=True is bool"),
        ({"patience": 0}, DataError, "patience=0; a whole number of at least 1"),
        ({"method": "magic"}, DataError, "known are auto, closed_form, gauss_newton, gradient, joint"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer("Nadamax"), "no optimizer 'Nadamax'"),
        (lambda: Optimizer(learning_rate=0), "learning_rate=0; a number above 0"),
        (lambda: ClosedForm(every=0), "every=0; a whole number of at least 1"),
        (lambda: ClosedForm(error="loud"), "unknown error 'loud'; known are plain, weighted"),  # type: ignore[arg-type]
        (lambda: ClosedForm(damping=math.nan), "damping=nan; a number of at least 0"),
        (lambda: Gradient(loss="loud"), "unknown loss 'loud'; known are mse, weighted"),  # type: ignore[arg-type]
        (lambda: Joint(alpha=-1), "alpha=-1; a weight of at least 0"),
        (lambda: Auto(average=1.0), "average=1.0; a share from 0 to below 1"),
        (lambda: Auto(learning_rates=()), r"learning_rates=\(\); a tuple"),
        (lambda: Auto(learning_rates=(0.1, -1)), "learning_rates=-1; .* above 0"),
        (lambda: ClosedForm(samples=0), "samples=0; a whole number of at least 1"),
    ],
)
def test_bad_settings_of_methods_are_refused(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_segments_of_the_same_name_are_refused() -> None:
    graph = fxinvert.trace(network(), data()[0][0])
    (first, _) = fxinvert.partition(graph).segments
    with pytest.raises(CutError, match="several segments of the name 0"):
        train(plan=fxinvert.Plan((first, first)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)], "segment '0' has 140 parameters there and 84 here"),
        ([nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)], "'1' is relu there and tanh here"),
        ([nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3), nn.Tanh()], "this one has no '3'"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_what_differs(other: list[nn.Module], message: str) -> None:
    plan = fxinvert.partition(fxinvert.trace(nn.Sequential(*other), data()[0][0]))
    with pytest.raises(CutError, match=message):
        train(plan=plan)


@pytest.mark.parametrize(
    "method", [*EVERY_METHOD, "auto"], ids=lambda m: m if isinstance(m, str) else repr(m)[:60]
)
def test_what_was_pruned_can_stay_zero(method: Any) -> None:
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    settings: dict[str, Any] = {"schedule": "single", "only": "2"} if isinstance(method, Joint) else {}
    result = fxinvert.post_train(
        model,
        data(),
        method=method,
        sweeps=1,
        chunk=4,
        output_target="cross_entropy",
        keep_zeros=True,
        **settings,
    )
    assert result.final.loss < result.baseline.loss
    for before, after in zip(model.parameters(), result.model.parameters(), strict=True):
        assert not after[before == 0].any()


def test_the_automatic_method_is_over_after_a_sweep() -> None:
    method = Auto(learning_rates=(1e-8,), runs=1, optimizer=QUICK)
    once, twice = (train(method=method, sweeps=sweeps).history for sweeps in (1, 2))
    assert [tuple(r.sizes) for r in once] == [tuple(r.sizes) for r in twice]


def test_methods_may_go_back_and_the_best_of_all_is_kept() -> None:
    """Updates are judged against the values that they went back to."""

    @dataclass(frozen=True)
    class Returning:
        name: str = "returning"
        schedule: str = "parallel"

        def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal] | Back]:
            yield from ClosedForm(last_layer=False).train(work, segments)
            yield Back({"2.weight": work.begun["2.weight"]})
            assert torch.equal(work.context.tensors["2.weight"], work.begun["2.weight"])
            assert not torch.equal(work.context.tensors["0.weight"], work.begun["0.weight"])
            yield [[Update("nothing", {"2.bias": torch.tensor([1e3, 0.0, -1e3])})]]

    result = train(method=Returning(), sweeps=1)
    solved, nothing = result.history
    assert solved.after.loss < min(nothing.before.loss, solved.before.loss)
    assert nothing.before == nothing.after
    assert result.final == solved.after


def test_a_group_norm_of_single_values_is_trained() -> None:
    """Torch's own function refuses one sample of it; a batch is normalized to zeros."""
    model = nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(4, 4), nn.Linear(4, 2))
    batches = [(torch.randn(8, 6), torch.arange(8) % 2) for _ in range(2)]
    result = fxinvert.post_train(model, batches, method="closed_form", sweeps=1)
    assert result.final.loss <= result.baseline.loss
