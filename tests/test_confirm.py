"""A gain that held-out samples do not confirm is not taken."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import data, network, train, weights
from torch import Tensor, nn

import fxinvert
from fxinvert import DataError
from fxinvert.heads import Heads
from fxinvert.training.batch import Batch
from fxinvert.training.chunks import source_of
from fxinvert.training.confirm import Differences, Gain, gain
from fxinvert.training.context import Context
from fxinvert.training.metrics import sample_classes

LOSSES = st.lists(st.floats(-5, 5).map(lambda v: round(v, 3)), min_size=2, max_size=30)


def gain_of(fallen: list[float]) -> Gain:
    return sum((Gain(Differences.of(torch.tensor([d], dtype=torch.float64))) for d in fallen), Gain())


@given(LOSSES, st.floats(0.5, 0.99))
def test_it_is_the_paired_test(fallen: list[float], confidence: float) -> None:
    d = torch.tensor(fallen, dtype=torch.float64)
    found = gain_of(fallen)
    assert found.loss.mean == pytest.approx(float(d.mean()), abs=1e-9)
    assert found.loss.error == pytest.approx(float(d.std() / len(d) ** 0.5), abs=1e-6)
    margin = float(d.mean()) - NormalDist().inv_cdf(confidence) * float(d.std() / len(d) ** 0.5)
    if abs(margin) > 1e-6:
        assert found.confirmed(confidence) == (margin > 0)


@given(LOSSES)
def test_more_confidence_confirms_less(fallen: list[float]) -> None:
    told = [gain_of(fallen).confirmed(c) for c in (0.5, 0.7, 0.9, 0.99)]
    assert told == sorted(told, reverse=True)


def test_a_single_sample_confirms_nothing_but_any_gain() -> None:
    assert not gain_of([1.0]).confirmed(0.9)
    assert gain_of([1.0]).confirmed(0.5)
    assert not gain_of([-1.0]).confirmed(0.5)


def test_two_sets_of_samples_confirm_together_what_neither_does() -> None:
    one, other = [0.0] * 18 + [1.0] * 2, [0.0] * 18 + [0.01] * 2
    assert not gain_of(one).confirmed(0.95)
    assert gain_of(one).confirmed(0.95, gain_of(other))
    assert not gain_of(one).confirmed(0.95, gain_of([-d for d in other]))
    assert not gain_of(one).confirmed(0.95, gain_of([]))
    assert not gain_of(one).confirmed(0.95, gain_of([0.0] * 9))


def changed(turned_right: int, turned_wrong: int) -> Gain:
    """A clear fall of the loss of 200 samples, of which some answers change."""
    changes = torch.tensor([1.0] * turned_right + [-1.0] * turned_wrong)
    losses = 0.1 + 0.01 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    return Gain(Differences.of(losses), Differences.of(torch.cat([changes, torch.zeros(200 - len(changes))])))


@pytest.mark.parametrize(
    ("right", "wrong", "confirmed"),
    [
        (0, 0, True),
        (2, 2, True),
        (20, 0, True),
        (14, 7, True),
        (13, 13, False),
        (60, 55, False),
        (2, 6, False),
    ],
)
def test_answers_that_turn_wrong_about_as_often_as_right_confirm_nothing(
    right: int, wrong: int, confirmed: bool
) -> None:
    assert changed(right, wrong).confirmed(0.95) == confirmed
    assert changed(right, wrong).confirmed(0.5)


def test_gains_say_what_changed() -> None:
    assert str(changed(13, 12)).startswith("the held-out loss fell by 0.")
    assert str(changed(13, 12)).endswith("± 0.0007, right answers rose by 1 ± 5.0")
    assert "answers" not in str(gain_of([0.1, 0.2]))


def test_changes_are_told_of_every_sample_and_position() -> None:
    """Of two positions a sample, one turns right: half of its answers."""
    model = nn.Conv1d(2, 2, 1, bias=False)
    x, labels = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 2).long()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2)[:, :, None])
        labels[:, 1] = model(x).argmax(1)[:, 1]
        labels[:, 0] = 1 - model(x).argmax(1)[:, 0]
    context, batches = Context(model, {"train": source_of([(x, labels)])}), [Batch((x,), labels)]
    found = gain(context, batches, state={"weight": -model.weight.detach()})
    assert (found.right.samples, found.right.total, found.right.squares) == (8, 0.0, 0.0)
    labels[:, 1] = labels[:, 0]
    found = gain(context, [Batch((x,), 1 - model(x).argmax(1))], state={"weight": -model.weight.detach()})
    assert (found.right.total, found.right.squares) == (8.0, 8.0)


def noise(samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs that tell nothing of their labels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    return list(zip(torch.split(x, 16), torch.split(y, 16), strict=True))


def on_noise(seed: int, confidence: float) -> fxinvert.PostTrainingResult:
    """A run with nothing to learn but by chance: the model begins as the best there is, all classes alike."""
    last = nn.Linear(8, 3)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Linear(6, 8)
    return fxinvert.post_train(
        nn.Sequential(first, nn.Tanh(), last), noise(160, seed), validation_data=noise(32, 100 + seed), sweeps=1,
        confidence=confidence, output_target="cross_entropy",
    )  # fmt: skip


def test_what_is_chance_is_not_taken_and_the_result_says_why() -> None:
    changed = [seed for seed in range(12) if on_noise(seed, 0.5).changed]
    assert len(changed) >= 3
    for seed in changed:
        sure = on_noise(seed, 0.99)
        assert not sure.changed
        assert sure.final == sure.baseline
        (note,) = (n for n in sure.notes if "confidence" in n)
        assert note.startswith("the model is returned as it was: the held-out loss fell by")
        assert any(record.step for record in sure.history)  # what was tried is told


def test_a_clear_gain_is_taken_whatever_the_executor() -> None:
    result = train(confidence=0.99)
    assert result.changed
    assert weights(result) == weights(train(confidence=0.99, executor="processes", workers=2))


@pytest.mark.parametrize("confidence", [0.4, 1.0, -1.0])
def test_a_confidence_that_is_none(confidence: float) -> None:
    with pytest.raises(DataError, match=r"confidence=.* a probability from 0\.5 to below 1"):
        fxinvert.post_train(network(), data(), confidence=confidence)


@given(LOSSES, st.lists(st.integers(0, 2), min_size=30, max_size=30), st.data())
def test_the_spread_within_classes_tells_what_is_chance(
    fallen: list[float], names: list[int], data: st.DataObject
) -> None:
    """Against the analysis of variance, whatever batches the samples come in."""
    d, classes = torch.tensor(fallen, dtype=torch.float64), torch.tensor(names[: len(fallen)])
    cut = data.draw(st.integers(1, len(d) - 1))
    found = Differences.of(d[:cut], classes[:cut]) + Differences.of(d[cut:], classes[cut:])
    n, parts = len(d), sorted(set(classes.tolist()))
    if n < 2 * len(parts):
        expected = float(d.var()) / n
    else:
        within = sum(float((d[classes == c] - d[classes == c].mean()).square().sum()) for c in parts)
        expected = within / (n - len(parts)) / n
    assert found.samples == n
    assert found.mean == pytest.approx(float(d.mean()), abs=1e-9)
    assert found.error == pytest.approx(expected**0.5, abs=1e-6)


def test_a_class_that_gains_alone_is_no_noise() -> None:
    """The missing one of ten classes, two samples each: its large gain hides itself where classes are not told apart."""
    noise = 0.01 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(10).repeat(2)
    fallen = noise + 3.0 * (classes == 7)
    assert not Gain(Differences.of(fallen)).confirmed(0.95)
    assert Gain(Differences.of(fallen, classes)).confirmed(0.95)
    assert not Gain(Differences.of(noise - noise.mean(), classes)).confirmed(0.95)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_classes_are_told_by_labels_of_which_every_sample_has_one(shape: tuple[int, ...]) -> None:
    one_each = torch.arange(6).remainder(2).bool().reshape(shape)
    outputs, heads = torch.zeros(6, 1), Heads(())
    found = sample_classes(outputs, Batch((outputs,), one_each), heads)
    assert found is not None
    assert found.tolist() == one_each.flatten().tolist()
    assert sample_classes(outputs, Batch((outputs,), outputs), heads) is None
    assert sample_classes(outputs, Batch((outputs,), torch.zeros(6, 4).long()), heads) is None
