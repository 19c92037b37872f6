"""The reference networks' weights can be made again."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from reference import NAMES, parts_of
from torch import Tensor

import fxinvert.models as zoo
from fxinvert.errors import FxInvertError
from fxinvert.labels import class_axis
from fxinvert.models.samples import by_name
from fxinvert.models.train import RECIPES, Recipe, main, reproducible, train, training_steps
from fxinvert.models.zoo import NETWORKS

SLOW = {"char_transformer"}  # to retrain up to its early state


def test_every_network_has_a_recipe() -> None:
    assert list(RECIPES) == list(NETWORKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_are_deterministic(name: str) -> None:
    def few_steps() -> dict[str, Tensor]:
        recipe = RECIPES[name]
        with reproducible(recipe.seed):
            model = zoo.create(name)
            assert list(islice(training_steps(model, parts_of(name).train, recipe), 3)) == [1, 2, 3]
        return model.state_dict()

    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    one, two = few_steps(), few_steps()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(random_state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES]
)
def test_early_weights_come_from_the_recipe(name: str) -> None:
    """Retrain up to the noted step: the same net as the one shipped (up to rounding, on another machine)."""
    shipped, recipe, parts = zoo.load(name, "early"), RECIPES[name], parts_of(name)
    with reproducible(recipe.seed):
        model = zoo.create(name)
        for _ in islice(training_steps(model, parts.train, recipe), zoo.card(name, "early")["step"]):
            pass
    decided = {
        key: value.detach() if labels.is_floating_point() else value.argmax(class_axis(value, labels))
        for (key, value), labels in zip(
            by_name(shipped(*parts.test.inputs)).items(), parts.test.labels.values(), strict=True
        )
    }
    assert min(zoo.scores(model, zoo.Samples(parts.test.inputs, decided)).values()) > 0.98


def test_train_writes_the_same_bytes_again() -> None:
    recipe = Recipe(seed=3, steps=10, early_score=-100.0)
    for name in ("digits_mlp", "digits_resnet", "driving"):
        one, two = (train(name, recipe, parts_of(name)) for _ in range(2))
        assert list(one) == ["early", "converged"]
        assert one == two
        assert one["early"] != one["converged"]


def test_training_that_falls_short_is_an_error() -> None:
    with pytest.raises(FxInvertError, match="digits_mlp missed 100% in 5 steps"):
        train("digits_mlp", Recipe(seed=0, steps=5, early_score=1.0), parts_of("digits_mlp"))


def test_command_writes_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "digits_lstm", Recipe(seed=0, steps=5, early_score=0.0))
    main(["digits_lstm"], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "digits_lstm_converged.safetensors",
        "digits_lstm_early.safetensors",
    ]
