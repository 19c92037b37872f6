"""Few samples: sweeps are repeated without each fold of them, and what was left out confirms a gain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import data, events, network, train, weights
from torch import Tensor, nn

import fxinvert
from fxinvert import DataError
from fxinvert.feed import folds_of
from fxinvert.scheduling import SerialExecutor
from fxinvert.survey import survey_here
from fxinvert.training import Auto, ClosedForm, Optimizer
from fxinvert.training.batch import Batch, tensors_of
from fxinvert.training.best import Best
from fxinvert.training.chunks import source_of
from fxinvert.training.confirm import MANY, Differences, Gain
from fxinvert.training.context import Context
from fxinvert.training.metrics import Metrics
from fxinvert.training.repeat import FEW, MEAN, SOME, mean, repeated

QUICK = Auto(closed_form=ClosedForm(), learning_rates=(1e-2,), runs=1, steps=8, optimizer=Optimizer(epochs=1))
FEW_DATA = data(80)


def means(result: fxinvert.PostTrainingResult) -> list[float]:
    """The steps of the records of means."""
    return [record.step for record in result.history if MEAN in record.sizes]


def folds_over(batches: Any, count: int) -> list[tuple[Tensor, Tensor]]:
    """The inputs outside and inside each fold."""
    context = Context(network(), {"train": source_of(batches)})
    feed = survey_here("train", context.sources["train"], context, SerialExecutor(), False, None)
    parts = folds_of(feed, context, count)
    return [(_inputs(outside), _inputs(inside)) for outside, inside in parts]


def _inputs(batches: list[Batch]) -> Tensor:
    return torch.cat([tensors_of(batch.inputs)[0] for batch in batches])


def rows(x: Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.tolist()))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_sample_is_in_one_fold_and_its_copies_with_it(count: int) -> None:
    twice = [*FEW_DATA, *data(80, batch=5)]
    folds = folds_over(twice, count)
    every = torch.cat([x for x, _ in twice])
    assert len(folds) == count
    assert rows(torch.cat([inside for _, inside in folds])) == rows(every)
    for outside, inside in folds:
        assert rows(torch.cat([outside, inside])) == rows(every)
        assert not set(rows(outside)) & set(rows(inside))


def test_a_fold_that_is_everything_is_none() -> None:
    x, y = FEW_DATA[0]
    assert folds_over([(x[:1].expand(8, -1), y[:1].expand(8))], 3) == []


class Fold:
    """Work with a model, that knows nothing of data."""

    def __init__(self) -> None:
        self.context = Context(network(), {"train": source_of(FEW_DATA)})


def test_what_was_left_out_is_measured_half_the_way() -> None:
    place, samples = Fold(), [Batch((x,), y) for x, y in FEW_DATA]
    begun = place.context.state()
    end = {name: value + 0.1 * torch.ones_like(value) for name, value in begun.items()}

    def sweep(own: Fold) -> Any:
        own.context.load(end)
        return end

    gained, states = repeated(begun, [(place, samples[:2]), (place, samples[2:])], sweep)  # type: ignore[type-var]
    half = network()
    half.load_state_dict({name: value + 0.05 for name, value in begun.items()})
    x, y = torch.cat([x for x, _ in FEW_DATA]), torch.cat([y for _, y in FEW_DATA])
    before, after = (nn.functional.cross_entropy(own(x), y).item() for own in (network(), half))
    assert gained.loss.samples == len(x)
    assert gained.loss.mean == pytest.approx(before - after, rel=1e-3)
    assert all(torch.equal(value, end[name]) for state in states for name, value in state.items())


def test_the_mean_of_equal_states_is_one_of_them() -> None:
    state = network().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mean([state] * 3).items())


def test_of_few_samples_the_mean_is_a_step_like_any_other() -> None:
    result = train(FEW_DATA, method=QUICK)
    ((step),) = means(result)
    last = result.history[-1]
    assert last.after.loss <= last.before.loss
    assert (step > 0) == (last.after.loss < last.before.loss)
    assert result.final == last.after
    assert result.final.no_worse_than(result.baseline)


class Samples:
    """What held-out samples gain is told beforehand."""

    def __init__(self, gained: Gain) -> None:
        self.gained = gained

    def state(self) -> Any:
        return {}

    def use(self, state: Any) -> None:
        self.used = state

    def gain(self, state: Any) -> Gain:
        return self.gained


@pytest.mark.parametrize(
    ("unseen", "confidence", "confirmed"),
    [((0.3, 0.2, 0.4), 0.95, True), ((-0.3, 0.2, -0.4), 0.95, False), ((-0.3, 0.2, -0.4), 0.5, True), ((), 0.95, True)],
    ids=["gain", "lose", "lose, any gain is enough", "none"],
)  # fmt: skip
def test_what_unseen_samples_lose_by_is_not_confirmed(
    unseen: tuple[float, ...], confidence: float, confirmed: bool
) -> None:
    place: Any = Samples(Gain(Differences.of(torch.tensor([1.0, 1.1, 0.9, 1.0]))))
    best = Best(Metrics(2.0, 0.5, 4), {"w": torch.zeros(1)})
    best.see(Metrics(1.0, 0.5, 4), {"w": torch.ones(1)})
    assert best.confirmed(place, 0.95)
    best.unseen = Gain(Differences.of(torch.tensor(unseen)))
    assert best.confirmed(place, confidence) == confirmed


@pytest.mark.parametrize(("samples", "lost"), [(MANY, False), (MANY + 1, True)])
def test_answers_that_many_unseen_samples_lose_count(samples: int, lost: bool) -> None:
    loss, right = Differences.of(torch.ones(samples)), torch.zeros(samples)
    right[:3] = torch.tensor([1.0, -1.0, -1.0])
    assert Gain(loss, Differences.of(right)).lost == lost
    assert not Gain(loss, Differences.of(-right)).lost
    assert Gain(Differences.of(-torch.ones(samples)), Differences.of(-right)).lost


@pytest.mark.parametrize(
    ("samples", "method"), [(80, Auto(closed_form=None, learning_rates=(1e-2,), runs=1, folds=1)), (80, "closed_form"), (400, QUICK)]
)  # fmt: skip
def test_nothing_is_repeated_of_more_samples_without_doubt_and_by_others(samples: int, method: Any) -> None:
    assert max(FEW) < 0.75 * 400
    assert not means(train(data(samples), method=method, sweeps=1))


def test_of_some_more_it_is_repeated_where_there_is_doubt() -> None:
    training = data(max(SOME))
    (x, y), *_ = training
    doubt, none = (
        train(training, method=QUICK, validation_data=own, sweeps=1) for own in ([(x[:1], y[:1])], training)
    )
    assert none.changed
    assert means(doubt)
    assert not means(none)


def test_what_held_out_samples_confirm_may_be_in_doubt() -> None:
    settings: dict[str, Any] = {"validation_data": FEW_DATA[1:2], "sweeps": 1}
    assert train(data(max(SOME)), method=replace(QUICK, folds=1), **settings).changed
    assert means(train(data(max(SOME)), method=QUICK, **settings))


def test_where_any_gain_does_there_is_no_doubt() -> None:
    settings: dict[str, Any] = {"validation_data": FEW_DATA[1:2], "sweeps": 1, "method": QUICK}
    found = train(data(max(SOME)), confidence=0.5, **settings)
    assert found.changed
    assert not means(found)


def test_of_many_samples_it_is_never_repeated() -> None:
    x, y = FEW_DATA[0]
    settings: dict[str, Any] = {"validation_data": [(x[:1], y[:1])], "sweeps": 1}
    result = train(data(max(SOME) + 1), method=QUICK, **settings)
    assert not result.changed
    assert not means(result)


@pytest.mark.parametrize("training", [FEW_DATA[1:], data(max(SOME))], ids=["few", "some more"])
def test_what_was_left_out_confirms_what_a_single_held_out_sample_cannot(training: Any) -> None:
    x, y = FEW_DATA[0]
    alone, together = (
        train(training, method=method, validation_data=[(x[:1], y[:1])], sweeps=1, confidence=0.9)
        for method in (replace(QUICK, folds=1), QUICK)
    )
    assert not alone.changed
    assert together.changed
    assert together.final.no_worse_than(together.baseline)


def test_labels_that_mean_nothing_are_not_confirmed() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [(x, torch.randint(0, 3, y.shape, generator=generator)) for x, y in data(128)]
    model = network()
    nn.init.zeros_(model[2].weight)  # type: ignore[index]
    nn.init.zeros_(model[2].bias)  # type: ignore[index]
    result = fxinvert.post_train(
        model, noise, method=QUICK, validation_data=[(x[:1], y[:1]) for x, y in noise[:1]], sweeps=1
    )
    assert not result.changed
    assert "do not confirm" in result.notes[-1]


def test_it_is_the_same_in_other_processes_and_when_it_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": QUICK, "sweeps": 1}
    here = train(FEW_DATA, **settings)
    assert weights(here) == weights(train(FEW_DATA, executor="processes", workers=1, **settings))
    first = train(FEW_DATA, run_directory=tmp_path, **settings)
    again = train(FEW_DATA, run_directory=tmp_path, **settings)
    assert weights(here) == weights(first) == weights(again)
    assert [r.sizes for r in again.history] == [r.sizes for r in here.history]
    assert len(events(tmp_path, "wave")) == 4  # a sweep, and one without each fold: none of them twice


def test_zeros_stay() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[::2] = 0  # type: ignore[index]
    result = fxinvert.post_train(model, FEW_DATA, method=QUICK, keep_zeros=True, sweeps=1, confidence=0.5)
    assert means(result)
    assert not result.model[0].weight[::2].any()  # type: ignore[index]


def test_at_least_one_fold() -> None:
    with pytest.raises(DataError, match="folds=0"):
        Auto(folds=0)
