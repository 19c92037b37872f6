"""Estimates: the operations that runs do are those that were told before, whatever the method, and who does them when."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_folder import invoke, make_folder
from runs import data, network
from torch.utils.flop_counter import FlopCounterMode

import fxinvert
from fxinvert import CutError, DataError, Estimate, estimates, models
from fxinvert.estimates import WORKERS, Wave
from fxinvert.passes.plan import Segment
from fxinvert.training import (
    Auto,
    ClosedForm,
    Cost,
    GaussNewton,
    Gradient,
    Joint,
    Method,
    Optimizer,
    Probe,
    Proposal,
    Stage,
    Update,
    Work,
)
from fxinvert.training.auto import PLAIN, SOLVED

QUICK = Optimizer(epochs=2)
METHODS: dict[str, tuple[Method, str]] = {
    "closed form": (ClosedForm(), "sequential"),
    "closed form of a snapshot": (ClosedForm(), "parallel"),
    "and the last layer": (ClosedForm(last_layer=True), "sequential"),
    "recursive": (ClosedForm(every=400), "sequential"),
    "op by op, weighted, of some samples": (
        ClosedForm(ops="in_turn", error="weighted", samples=300),
        "parallel",
    ),
    "Gauss-Newton": (GaussNewton(steps=1), "parallel"),
    "gradient": (Gradient(QUICK), "parallel"),
    "joint": (Joint(optimizer=QUICK), "sequential"),
    "plain": (Joint(alpha=0.0, optimizer=QUICK), "sequential"),
    "auto": (Auto(learning_rates=(1e-3,), runs=1, optimizer=Optimizer(epochs=1)), "auto"),
}


def ratio(name: str, method: Method, schedule: str, samples: int | None = None, **settings: Any) -> float:
    """Estimated operations over those that were counted in a run, of so many samples or all."""
    digits, model = models.digits(), models.load(name, "early")
    x, y = digits.x_train[:samples], digits.y_train[:samples]
    settings = {"method": method, "schedule": schedule, **settings}
    told = fxinvert.estimate(model, x[:4], samples=len(x), batch=64, **settings)
    batches = models.batches(x, y, 64)
    with FlopCounterMode(display=False) as counter:
        fxinvert.post_train(model, batches, sweeps=1, output_target="cross_entropy", **settings)
    done: float = counter.get_total_flops() / 2
    return told.operations / done


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_does_the_operations_that_were_told(kind: str) -> None:
    assert 0.8 < ratio("digits_mlp", *METHODS[kind]) < 1.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("digits_cnn", "closed form"),
        ("digits_cnn", "gradient"),
        ("digits_resnet", "closed form"),
        ("digits_resnet", "auto"),
    ],
)
def test_convolutions_and_branches_do_the_operations_that_were_told(name: str, kind: str) -> None:
    method, _ = METHODS[kind]
    assert 0.8 < ratio(name, method, "parallel", recalibrate=kind == "auto") < 1.25


def test_targets_that_are_found_otherwise_cost_otherwise() -> None:
    ways: tuple[Any, ...] = ("nodewise", "linearized")
    costs = {how: ratio("digits_mlp", ClosedForm(), "parallel", reconstruction=how) for how in ways}
    assert all(0.8 < found < 1.25 for found in costs.values())


@pytest.mark.parametrize("samples", [100, 400])
def test_what_is_repeated_of_few_samples_is_told(samples: int) -> None:
    method, _ = METHODS["auto"]
    assert 0.8 < ratio("digits_mlp", method, "auto", samples=samples) < 1.25


def told(**settings: Any) -> Estimate:
    return fxinvert.estimate(network(), data()[0][0], samples=10_000, batch=100, **settings)


def test_what_a_method_does_is_told_in_order() -> None:
    rows = list(told(method="auto").rows())
    tasks = [row.task.strip() for row in rows]
    assert tasks[:4] == ["statistics of 0, 2", "add up and solve", "judge 7 candidates", "measure the best"]
    rates = [f"gradient, learning rate {rate:g}" for rate in PLAIN.rates]
    solved = [f"{rate}, {SOLVED}" for rate in rates]
    told_rates = [task for task in tasks if task.startswith("gradient")]
    assert told_rates == [*solved, *(f"{r}, trial" for r in rates), *rates]
    trials = [row for row in rows if "trial" in row.task]
    assert len({row.after for row in trials}) == 1  # side by side
    several = {trials[-1].number + 1}
    others = [row for row in rows[1:] if row not in trials and row.number not in several]
    assert all(row.after == (row.number - 1,) for row in others)
    assert rows[tasks.index(rates[0])].times == Auto().runs
    together = list(told(method="gradient", schedule="parallel").rows())
    assert [row.after for row in together] == [(), (), (1, 2), (3,)]


def test_segments_of_a_snapshot_are_trained_at_the_same_time() -> None:
    stage = Stage((("a", Cost(1, 3e-3)), ("b", Cost(1, 2e-3)), ("c", Cost(1, 1e-3))), False, 1000, 0, 0)
    times = [one_stage(stage).seconds(workers) for workers in (1, 2, 3, 100)]
    assert times == pytest.approx([6, 3, 3, 3], rel=0.01)


def one_stage(stage: Stage) -> Estimate:
    forward = Cost(10, 1e-9)
    return Estimate("own", (Wave(("a",), (stage,), forward),), forward, 0, 10**6, 1000, 100, 64)


def by_chunk(**change: Any) -> Estimate:
    stage = Stage(
        tasks=(("statistics of a", Cost(10, 1e-3)),), by_chunk=True, samples=800_000, memory=1000, sent=10**6,
        add_seconds=1e-4, solve_seconds=0.1,
    )  # fmt: skip
    return replace(one_stage(replace(stage, **change)), state=10**6)


def test_more_workers_take_no_longer_until_what_they_send_takes_over() -> None:
    times = [by_chunk().seconds(workers) for workers in (1, 2, 4, 16, 64)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] == pytest.approx(2, rel=0.01)
    sent = by_chunk(sent=10**9)
    bound = sent.chunks * 10**9 / estimates.BANDWIDTH
    assert sent.seconds(10**4) > bound
    assert sent.seconds(10**4) == pytest.approx(sent.seconds(100), rel=0.05)


class Shrinking:
    """A method of a user's own."""

    name, schedule = "shrinking", "sequential"

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        yield [[Update(own.name, {}) for own in segments]]


class Telling(Shrinking):
    """The same, and it tells what it costs."""

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        yield Stage((("shrink", Cost(0, 1e-6)),), False, probe.samples, 0, 0)


def test_methods_that_do_not_tell_are_named() -> None:
    unknown = told(method=Shrinking())
    for text in (str(unknown), unknown._repr_html_()):
        assert "shrinking" in text
        assert "is not estimated" in text
    assert math.isnan(unknown.seconds(4))
    assert unknown.to_dict()["seconds"] == {}
    known = told(method=Telling())
    assert "shrink" in str(known)
    assert 0 < known.seconds(1) < math.inf


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "magic"}, DataError, "unknown method 'magic'"),
        ({"method": "joint", "schedule": "parallel"}, DataError, "everything up to a cut"),
        ({"only": "3"}, CutError, "no segment '3'"),
        ({"chunk": 0}, DataError, "chunk=0; a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        told(**settings)


# on the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


def test_a_plan_shows_what_a_sweep_costs(here: Path) -> None:
    result = invoke("plan", "cli_nets:Net", "data.npz", "--samples", "100000", "--schedule", "parallel")
    assert result.exit_code == 0, result.output
    assert "statistics of hidden, head" in result.output
    assert "method 'closed_form' over 100,000 samples in 49 chunks" in result.output


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("gradient", "train hidden"),
        ("joint", "train everything up to head"),
        ("auto", f"gradient, learning rate {PLAIN.rates[-1]:g}"),
    ],
)
def test_a_plan_shows_what_other_methods_cost(here: Path, method: str, task: str) -> None:
    command = ("plan", "cli_nets:Net", "--shape", "1,4,4", "--method", method)
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.output
    assert task in shown.output
    sweep = json.loads(invoke(*command, "--json").stdout)["sweep"]
    (row,) = (row for row in sweep["tasks"] if row["task"] == task)
    assert row["operations"] > 0
    assert row["seconds"] > 0
    assert row["memory"] > 0
    assert list(sweep["seconds"]) == [str(workers) for workers in WORKERS]
