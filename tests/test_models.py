"""The reference networks: what ships is what it says it is and loads strictly; the digits are split once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import NAMES, parts_of

import fxinvert.models as zoo
from fxinvert.errors import DataError
from fxinvert.models.data import ImageData, stratified_split

FOLDER = Path(zoo.__file__).parent

# Scores on the test part: the early weights have room to improve, the converged ones little.
EARLY, CONVERGED = (0.82, 0.89), (0.96, 0.99)
SCORES = {
    "digits_unet": {"early": {"output": (0.80, 0.84)}, "converged": {"output": (0.92, 0.94)}},
    "digits_two_head": {
        "early": {"digit": (0.93, 0.96), "offset": (0.63, 0.70)},
        "converged": {"digit": (0.95, 0.97), "offset": (0.87, 0.91)},
    },
    "char_transformer": {"early": {"output": (0.65, 0.70)}, "converged": {"output": (0.78, 0.82)}},
    "driving": {
        "early": {"steering": (0.70, 0.80), "speed": (0.72, 0.82)},
        "converged": {"steering": (0.97, 1.0), "speed": (0.90, 0.95)},
    },
}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return zoo.digits()


# --- the shipped weights ------------------------------------------------------------------------------------


def test_available_lists_every_file() -> None:
    assert zoo.available() == [(name, state) for name in NAMES for state in ("early", "converged")]
    named = {f"{name}_{state}.safetensors" for name, state in zoo.available()}
    assert {file.name for file in FOLDER.glob("*.safetensors")} == named


@pytest.mark.parametrize(("name", "state"), zoo.available())
def test_scores_are_in_range_and_as_noted(name: str, state: str) -> None:
    test = parts_of(name).test
    measured = zoo.scores(zoo.load(name, state), test)
    default = {"early": {"output": EARLY}, "converged": {"output": CONVERGED}}
    expected = SCORES.get(name, default)[state]
    assert list(measured) == list(test.labels)
    assert measured.keys() == expected.keys()
    for output, (low, high) in expected.items():
        assert low <= measured[output] <= high
    card = zoo.card(name, state)
    assert (card["network"], card["state"]) == (name, state)
    assert card["test"] == pytest.approx(measured, abs=1 / len(test))


@pytest.mark.parametrize("name", NAMES)
def test_early_weights_can_be_improved(name: str) -> None:
    early, converged = (zoo.card(name, state)["test"] for state in ("early", "converged"))
    assert min(early.values()) <= min(converged.values()) - 0.1
    assert all(0.65 <= score <= 0.9 or name == "digits_two_head" for score in early.values())


@pytest.mark.parametrize(("name", "state"), zoo.available())
def test_loads_strictly_into_its_factory(name: str, state: str) -> None:
    model, fresh = zoo.load(name, state), zoo.create(name)
    assert type(model) is type(fresh)
    assert not any(module.training for module in model.modules())
    assert fresh.training
    assert all(weight.requires_grad and weight.device.type == "cpu" for weight in model.parameters())
    fresh.load_state_dict(model.state_dict(), strict=True)
    # what the files do not hold would be left uninitialized
    assert {key for key, _ in model.named_buffers()} <= set(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_load_and_data_leave_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    zoo.load(name)
    zoo.data_of(name)
    assert torch.equal(before, torch.get_rng_state())


def test_load_owns_its_weights() -> None:
    one, two = zoo.load("digits_cnn"), zoo.load("digits_cnn")
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(two.parameters()).abs().sum() > 0
    assert next(zoo.load("digits_cnn").parameters()).abs().sum() > 0
    storages = {weight.untyped_storage().data_ptr() for weight in two.parameters()}
    assert len(storages) == len(list(two.parameters()))


def test_load_names_what_is_known() -> None:
    with pytest.raises(DataError, match=r"'resnet'.*digits_cnn, digits_mlp"):
        zoo.load("resnet")
    for known in (zoo.create, zoo.data_of):
        with pytest.raises(DataError, match=r"'resnet'.*digits_cnn, digits_mlp"):
            known("resnet")
    with pytest.raises(DataError, match=r"'late'.*early, converged"):
        zoo.load("digits_cnn", "late")


def test_load_says_how_to_make_a_missing_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fxinvert.models.zoo.FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"python -m fxinvert\.models\.train"):
        zoo.load("digits_cnn")


def test_weights_are_small() -> None:
    sizes = [file.stat().st_size for file in FOLDER.glob("*.safetensors")]
    assert max(sizes) < 100_000
    assert sum(sizes) < 1_500_000


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
