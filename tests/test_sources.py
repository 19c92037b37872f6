"""Models and data by name: what fits is loaded as it is, what does not is refused with the reason and the place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxinvert.errors import DataError
from fxinvert.sources import find_device, find_object, load_data, load_model

MODULE = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight

def small():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

def needs(width):
    return nn.Linear(width, 3)

def broken():
    raise RuntimeError("no luck")

def no_model():
    return 3

made = nn.Linear(4, 3)

def loader():
    return [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]

def once():
    return iter(loader())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a module `sources_nets`."""
    (tmp_path / "sources_nets.py").write_text(MODULE)
    (tmp_path / "sources_bad.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "sources_worse.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


# models


def test_model_is_in_eval_mode(here: Path) -> None:
    model = load_model("sources_nets:small")
    assert isinstance(model, nn.Sequential)
    assert not model.training


def test_a_module_that_is_there_already_is_taken(here: Path) -> None:
    assert isinstance(load_model("sources_nets:made"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nonsense", "package.module:factory"),
        ("sources_nets:smal", "has no 'smal'; it has small"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("sources_nets.inner:f", "sources_nets"),
        ("sources_bad:f", "needs the module 'a_module_that_nobody_has', which is not installed"),
        ("sources_worse:f", "raised ZeroDivisionError: division by zero, at .*sources_worse.py:1"),
        ("sources_nets:needs", "needs the arguments width"),
        ("sources_nets:broken", "raised RuntimeError: no luck"),
        ("sources_nets:no_model", "gave int; a torch.nn.Module is needed"),
    ],
)
def test_bad_factory(here: Path, spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_model(spec)


def test_object_by_name(here: Path) -> None:
    assert find_object("sources_nets:Tied.forward", "method") is not None


@pytest.mark.parametrize("name", ["cuda:99", "nowhere", "meta", "xla"])
def test_device_that_is_not_there(here: Path, name: str) -> None:
    with pytest.raises(DataError, match="cpu"):
        load_model("sources_nets:small", device=name)


def test_device() -> None:
    assert find_device("cpu") == torch.device("cpu")


# weights

Saver = Callable[[dict[str, torch.Tensor], Path], None]


def as_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path.with_suffix(".safetensors"))


def as_pt(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path.with_suffix(".pt"))


def as_checkpoint(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": state}, path.with_suffix(".pth"))


def as_parallel(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in state.items()}, path.with_suffix(".pt"))


@pytest.mark.parametrize("save", [as_safetensors, as_pt, as_checkpoint, as_parallel])
def test_weights(here: Path, save: Saver) -> None:
    wanted = small().state_dict()
    save(wanted, here / "weights")
    (file,) = here.glob("weights.*")
    found = load_model("sources_nets:small", file).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_one_name_of_a_tied_parameter_is_enough(here: Path) -> None:
    save_file(
        {"a.weight": torch.ones(4, 4), "a.bias": torch.ones(4), "b.bias": torch.ones(4)},
        here / "tied.safetensors",
    )
    model = load_model("sources_nets:Tied", here / "tied.safetensors")
    assert torch.equal(model.get_parameter("b.weight"), torch.ones(4, 4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("0.bias"), "missing in the file: 0.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "not in the model: extra"),
        (
            lambda s: s.update({"0.weight": torch.zeros(3, 5)}),
            "of another shape: 0.weight is 3x5, the model's 3x4",
        ),
    ],
)
def test_weights_that_do_not_fit(here: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    state = dict(small().state_dict())
    change(state)
    save_file(state, here / "w.safetensors")
    with pytest.raises(DataError, match=f"w.safetensors do not fit Sequential; {said}"):
        load_model("sources_nets:small", here / "w.safetensors")


def test_long_lists_are_cut(here: Path) -> None:
    save_file({f"name{i}": torch.zeros(1) for i in range(50)}, here / "w.safetensors")
    with pytest.raises(DataError, match="and 44 more"):
        load_model("sources_nets:small", here / "w.safetensors")


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


def test_pickles_run_no_code(here: Path) -> None:
    torch.save({"state_dict": Harmful()}, here / "w.pt")
    with pytest.raises(DataError, match=r"holds more than tensors.*torch.save\(model.state_dict\(\)"):
        load_model("sources_nets:small", here / "w.pt")
    assert not (here / "harm").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.safetensors", b"not safetensors", "damaged or no safetensors"),
        ("w.pt", b"not a pickle", "damaged"),
        ("w.pt", b"", "damaged"),
        ("w.txt", b"1 2 3", "read from .safetensors, .pt and .pth files, not .txt"),
    ],
)
def test_damaged_weights(here: Path, name: str, content: bytes, said: str) -> None:
    (here / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_model("sources_nets:small", here / name)


def test_checkpoint_without_weights(here: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, here / "w.pt")
    with pytest.raises(DataError, match="epoch, lr are no tensors"):
        load_model("sources_nets:small", here / "w.pt")


def test_missing_weights_are_told_before_the_model_is_made(here: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.pt are not there"):
        load_model("sources_nets:broken", here / "nowhere.pt")
    with pytest.raises(DataError, match="is no file"):
        load_model("sources_nets:small", here)


# loaders


def test_loader_by_name(here: Path) -> None:
    data = load_data("sources_nets:loader")
    assert len(list(data.train)) == 1
    example = data.example_inputs(1)
    assert isinstance(example, tuple)
    assert [value.shape for value in example] == [(1, 4)]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sources_nets:once", "can be iterated only once"),
        ("sources_nets:no_model", "gave int; an iterable"),
        ("sources_nets:nothing", "has no 'nothing'"),
        ("nowhere.npz", "'nowhere.npz' is not there"),
        ("sources_nets.py", "is neither"),
    ],
)
def test_data_that_is_not_there(here: Path, spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_data(spec)
