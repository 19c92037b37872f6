"""Bad input on the command line: one readable error that says what and where, and nothing half-written left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_folder import invoke, make_folder, names
from safetensors.torch import save_file
from torch import nn

import fxinvert
import fxinvert.commands.run
from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.scheduling.run_directory import is_finished


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


def damage_image(here: Path) -> None:
    (here / "photos" / "class1" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")


def misfit_weights(here: Path) -> None:
    save_file(nn.Linear(16, 6).state_dict(), here / "w.safetensors")


def plain_file(here: Path) -> None:
    (here / "file").write_text("")


def full_folder(here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("")


def unnamed_arrays(here: Path) -> None:
    np.savez(here / "z.npz", np.zeros((3, 16)), np.zeros(3))


def uneven_arrays(here: Path) -> None:
    np.savez(here / "z.npz", x=np.zeros((3, 1, 4, 4)), y=np.zeros(2))


def other_images(here: Path) -> None:
    np.savez(here / "z.npz", x=np.zeros((3, 1, 5, 5), np.float32), y=np.zeros(3, int))


def other_labels(here: Path) -> None:
    np.savez(here / "z.npz", x=np.zeros((3, 1, 4, 4), np.float32), y=np.full(3, 7))


def empty_list(here: Path) -> None:
    (here / "cli_empty.py").write_text("def nothing(): return []")


BAD: list[tuple[Callable[[Path], None] | None, str, list[str]]] = [
    (None, "post-train cli_nets:Net nowhere.npz", ["nowhere.npz", "not there"]),
    (None, "post-train cli_nets:Net data.npz --weights nowhere.pt", ["nowhere.pt", "not there"]),
    (
        misfit_weights,
        "post-train cli_nets:Net data.npz --weights w.safetensors",
        ["hidden.weight", "not in the model"],
    ),
    (None, "post-train cli_nets:Nett data.npz", ["no 'Nett'", "Net"]),
    (None, "post-train nowhere:net data.npz", ["no module 'nowhere'"]),
    (None, "post-train net data.npz", ["package.module:factory"]),
    (None, "post-train cli_nets:out_of_memory data.npz", ["MemoryError: model too large", "cli_nets.py:"]),
    (None, "post-train cli_nets:Net data.npz --device cuda:7", ["'cuda:7'", "cpu"]),
    (damage_image, "post-train cli_nets:Net photos", ["class1", "1.png", "cannot be read"]),
    (plain_file, "post-train cli_nets:Net data.npz --run-directory file/run", ["cannot write file/run"]),
    (plain_file, "post-train cli_nets:Net data.npz --run-directory file", ["is a file"]),
    (full_folder, "post-train cli_nets:Net data.npz --run-directory full", ["full is not empty"]),
    (unnamed_arrays, "post-train cli_nets:Net z.npz", ["arr_0, arr_1", "x and y are needed"]),
    (uneven_arrays, "post-train cli_nets:Net z.npz", ["(3, 1, 4, 4)", "(2,)"]),
    (
        other_images,
        "post-train cli_nets:Net data.npz --test z.npz",
        ["does not run on the test data", "3x25"],
    ),
    (
        other_labels,
        "post-train cli_nets:Net data.npz --test z.npz",
        ["labels range from 7 to 7", "about the test data"],
    ),
    (empty_list, "post-train cli_nets:Net cli_empty:nothing", ["no batches"]),
    (None, "post-train cli_nets:Net cli_nets:once", ["only once"]),
    (None, "post-train cli_nets:Net cli_nets:not_a_number", ["NaN", "batch 1", "sample 10"]),
    (None, "post-train cli_nets:Net cli_nets:five_classes", ["0 to 4", "3 classes"]),
    (None, "post-train cli_nets:Net cli_nets:wide_labels", ["(30, 7)|labels of shape", "do not fit"]),
    (None, "post-train cli_nets:Net cli_nets:other_shape", ["'hidden'", "8x20 and 16x6"]),
    (None, "post-train cli_nets:Strange data.npz", ["the way ends at node 'round'"]),
    (None, "post-train cli_nets:Net data.npz --cuts hiden", ["'hiden'", "hidden"]),
    (None, "post-train cli_nets:Net data.npz --segments 9", ["2 segments at most"]),
    (None, "post-train cli_nets:Net data.npz --segments 2 --cuts hidden", ["not both"]),
    (None, "post-train cli_nets:Net data.npz --output-target nearby", ["'nearby'", "nearest"]),
    (None, "post-train cli_nets:Net data.npz --output-target cli_nets:nowhere", ["no 'nowhere'"]),
    (None, "post-train cli_nets:Net data.npz --mean a,b", ["--mean 'a,b'"]),
    (None, "post-train cli_nets:Net data.npz --damping nan", ["damping"]),
    (None, "post-train cli_nets:Net photos --resize 1,2,3", ["--resize '1,2,3'"]),
    (None, "plan cli_nets:Net", ["--shape"]),
    (None, "plan cli_nets:Net data.npz --shape 1,4,4", ["not both"]),
    (None, "plan cli_nets:Net --shape 1,a", ["--shape '1,a'"]),
    (None, "plan cli_nets:Net --shape 0,4", ["at least 1"]),
    (None, "plan cli_nets:Net --shape 1,5,5", ["'hidden'", "2x25 and 16x6"]),
    (plain_file, "demo --run-directory file/run", ["cannot write file/run"]),
]


@pytest.mark.parametrize(("prepare", "command", "said"), BAD, ids=[command for _, command, _ in BAD])
def test_bad_input(here: Path, prepare: Callable[[Path], None] | None, command: str, said: list[str]) -> None:
    if prepare is not None:
        prepare(here)
    before = [path for path in sorted(here.rglob("*")) if "__pycache__" not in path.parts]
    result = invoke(*command.split())
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for words in said:
        assert any(word in result.stderr for word in words.split("|")), result.stderr
    after = [path for path in sorted(here.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before


@pytest.mark.parametrize(
    "option", ["--sweeps=0", "--schedule=sideways", "--satisfied-weight=2", "--nonsense"]
)
def test_bad_options_are_refused_with_usage(here: Path, option: str) -> None:
    result = invoke("post-train", "cli_nets:Net", "data.npz", option)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_an_export_that_differs_keeps_the_weights_and_is_not_finished(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*_: Any, **__: Any) -> None:
        raise ExportMismatchError("differs by 0.5")

    monkeypatch.setattr(fxinvert.commands.run, "export_onnx", differ)
    result = invoke("post-train", "cli_nets:Net", "data.npz", "--run-directory", "run")
    assert result.exit_code == 3
    assert "ExportMismatchError" in result.stderr
    own = [
        "config.yaml",
        "failed",
        "log.jsonl",
        "plan.json",
        "plan.txt",
        "run.json",
        "tasks",
        "weights.safetensors",
    ]
    assert names(here / "run") == own
    assert not is_finished(here / "run")


def test_control_c(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fxinvert, "post_train", interrupt)
    result = invoke("post-train", "cli_nets:Net", "data.npz", "--run-directory", "run")
    assert result.exit_code == 130
    assert not (here / "run").exists()


def test_debug_lets_the_error_through(here: Path) -> None:
    result = invoke("--debug", "post-train", "cli_nets:Net", "nowhere.npz")
    assert isinstance(result.exception, DataError)
    assert result.exception.__traceback__ is not None
