"""The reference networks: what ships is what it says it is, loads strictly, and can be made again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import fxinvert.models as zoo
from fxinvert.errors import DataError
from fxinvert.models.data import ImageData, stratified_split
from fxinvert.models.train import RECIPES, Recipe, reproducible, train, training_steps

FOLDER = Path(zoo.__file__).parent
FACTORIES = {"digits_cnn": zoo.digits_cnn, "digits_mlp": zoo.digits_mlp}
ACCURACY = {"early": (0.82, 0.87), "converged": (0.965, 0.985)}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return zoo.digits()


# --- the shipped weights ------------------------------------------------------------------------------------


def test_available_lists_every_file() -> None:
    assert zoo.available() == [
        ("digits_cnn", "early"),
        ("digits_cnn", "converged"),
        ("digits_mlp", "early"),
        ("digits_mlp", "converged"),
    ]
    named = {f"{name}_{state}.safetensors" for name, state in zoo.available()}
    assert {file.name for file in FOLDER.glob("*.safetensors")} == named


@pytest.mark.parametrize(("name", "state"), zoo.available())
def test_accuracy_is_in_range_and_as_noted(name: str, state: str, data: ImageData) -> None:
    model = zoo.load(name, state)
    low, high = ACCURACY[state]
    measured = zoo.accuracy(model, data.x_test, data.y_test)
    assert low <= measured <= high
    card = zoo.card(name, state)
    assert (card["network"], card["state"]) == (name, state)
    assert card["test_accuracy"] == pytest.approx(measured, abs=1 / len(data.y_test))


@pytest.mark.parametrize(("name", "state"), zoo.available())
def test_loads_strictly_into_its_factory(name: str, state: str) -> None:
    model, fresh = zoo.load(name, state), FACTORIES[name]()
    assert type(model) is type(fresh)
    assert not model.training
    assert all(weight.requires_grad and weight.device.type == "cpu" for weight in model.parameters())
    fresh.load_state_dict(model.state_dict(), strict=True)


def test_load_owns_its_weights_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, two = zoo.load("digits_cnn"), zoo.load("digits_cnn")
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(two.parameters()).abs().sum() > 0
    assert next(zoo.load("digits_cnn").parameters()).abs().sum() > 0
    storages = {weight.untyped_storage().data_ptr() for weight in two.parameters()}
    assert len(storages) == len(list(two.parameters()))


def test_load_names_what_is_known() -> None:
    with pytest.raises(DataError, match=r"'resnet'.*digits_cnn, digits_mlp"):
        zoo.load("resnet")
    with pytest.raises(DataError, match=r"'late'.*early, converged"):
        zoo.load("digits_cnn", "late")


def test_load_says_how_to_make_a_missing_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fxinvert.models.zoo.FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"python -m fxinvert\.models\.train"):
        zoo.load("digits_cnn")


def test_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) < 200_000


# --- the networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("digits_cnn", ["conv1", "relu1", "conv2", "relu2", "flatten", "fc1", "relu3", "fc2"]),
        ("digits_mlp", ["flatten", "fc1", "tanh1", "fc2", "tanh2", "fc3"]),
    ],
)
def test_networks_trace_to_their_attributes(name: str, nodes: list[str]) -> None:
    model = zoo.load(name)
    graph = fx.symbolic_trace(model)
    assert [node.name for node in graph.graph.nodes if node.op == "call_module"] == nodes
    images = torch.rand(3, 1, 8, 8)
    assert model(images).shape == (3, 10)
    assert torch.equal(graph(images), model(images))


def test_factories_draw_from_the_global_generator() -> None:
    def first(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return next(zoo.digits_cnn().parameters()).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_import_is_cheap() -> None:
    code = "import sys, fxinvert.models.zoo as z; z.load('digits_cnn'); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the data -----------------------------------------------------------------------------------------------


def test_digits_have_the_stated_form(data: ImageData) -> None:
    assert data.x_train.shape == (1347, 1, 8, 8)
    assert data.x_test.shape == (450, 1, 8, 8)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert (x.dtype, y.dtype, len(x)) == (torch.float32, torch.int64, len(y))
        assert (x.min().item(), x.max().item()) == (0.0, 1.0)
        assert set(y.tolist()) == set(range(10))


def test_split_is_stratified(data: ImageData) -> None:
    train = torch.bincount(data.y_train) / len(data.y_train)
    test = torch.bincount(data.y_test) / len(data.y_test)
    assert (train - test).abs().max() < 1 / len(data.y_test)


def test_split_is_disjoint(data: ImageData) -> None:
    kept, held = stratified_split(data.y_train, 270)
    assert (len(kept), len(held)) == (1077, 270)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(1347))
    train, test = ({tuple(image.tolist()) for image in x.flatten(1)} for x in (data.x_train, data.x_test))
    assert not train & test


def test_split_is_fixed(data: ImageData) -> None:
    again = zoo.digits()
    assert torch.equal(data.x_train, again.x_train)
    assert torch.equal(data.y_test, again.y_test)
    order = bytes(torch.cat([data.y_train, data.y_test]).tolist())
    assert hashlib.sha256(order).hexdigest()[:16] == "6123769e6b662932"


def test_batches_keep_order_and_can_be_iterated_again(data: ImageData) -> None:
    cut = zoo.batches(data.x_test, data.y_test, 200)
    assert [len(y) for _, y in cut] == [200, 200, 50]
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in cut]), data.x_test)
        assert torch.equal(torch.cat([y for _, y in cut]), data.y_test)
    assert zoo.batches(data.x_test[:0], data.y_test[:0]) == []


def test_bad_batches_are_refused(data: ImageData) -> None:
    with pytest.raises(DataError, match="450 inputs but 449 labels"):
        zoo.batches(data.x_test, data.y_test[1:])
    with pytest.raises(DataError, match="batch_size is 0"):
        zoo.batches(data.x_test, data.y_test, 0)
    with pytest.raises(DataError, match="no samples"):
        zoo.accuracy(zoo.digits_mlp(), data.x_test[:0], data.y_test[:0])


# --- the training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_a_few_steps_are_deterministic(name: str, data: ImageData) -> None:
    def few_steps() -> dict[str, Tensor]:
        recipe = RECIPES[name]
        with reproducible(recipe.seed):
            model = FACTORIES[name]()
            assert list(islice(training_steps(model, data.x_train, data.y_train, recipe), 3)) == [1, 2, 3]
        return model.state_dict()

    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    one, two = few_steps(), few_steps()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(random_state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize("name", FACTORIES)
def test_early_weights_come_from_the_recipe(name: str, data: ImageData) -> None:
    """Retrain up to the noted step: the same net as the one shipped (up to rounding, on another machine)."""
    shipped, recipe = zoo.load(name, "early"), RECIPES[name]
    kept, _ = stratified_split(data.y_train, recipe.held_out)
    with reproducible(recipe.seed):
        model = FACTORIES[name]()
        steps = training_steps(model, data.x_train[kept], data.y_train[kept], recipe)
        for _ in islice(steps, zoo.card(name, "early")["step"]):
            pass
    agree = model(data.x_test).argmax(1) == shipped(data.x_test).argmax(1)
    assert agree.float().mean() > 0.98


def test_train_writes_the_same_bytes_again(data: ImageData) -> None:
    recipe = Recipe(seed=3, steps=10, early_accuracy=0.0)
    one, two = (train("digits_mlp", recipe, data) for _ in range(2))
    assert list(one) == ["early", "converged"]
    assert one == two
    assert one["early"] != one["converged"]
