"""The run directory: files whole or absent, `finished` last, and nothing left that could be taken for a result."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fxinvert
from fxinvert.errors import DataError
from fxinvert.scheduling.run_directory import FAILED, FINISHED, RunDirectory, is_finished
from fxinvert.sources.weights import load_weights


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_finished_is_written_last(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a" / "b") as run:
        run.write_text("plan.txt", "two segments\n")
        run.write_json("config.json", {"sweeps": 3})
        run.write_weights(nn.Linear(2, 2), {"method": "closed_form"})
        assert names(run.path) == ["config.json", "plan.txt", "weights.safetensors"]
        assert not is_finished(run.path)
    assert is_finished(run.path)
    assert names(run.path) == ["config.json", FINISHED, "plan.txt", "weights.safetensors"]
    assert (run.path / "plan.txt").read_text() == "two segments\n"


def test_directories_by_time_are_distinct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [RunDirectory.create() for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == Path("runs") for run in runs)


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path).path == tmp_path
    assert names(tmp_path) == []


def test_a_directory_with_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not empty"):
        RunDirectory.create(tmp_path)
    assert names(tmp_path) == ["thesis.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        RunDirectory.create(tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot write .*choose a path that you may write to"):
        RunDirectory.create(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot write"):
        RunDirectory.create(tmp_path / "run")


def test_a_failure_before_any_result_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with RunDirectory.create(path) as run:
            run.write_json("config.json", {})
            raise ValueError("bad data")

    with pytest.raises(ValueError, match="bad data"):
        fail(tmp_path / "new" / "run")
    assert names(tmp_path) == []
    (tmp_path / "existing").mkdir()
    with pytest.raises(ValueError, match="bad data"):
        fail(tmp_path / "existing")
    assert names(tmp_path) == ["existing"]
    assert names(tmp_path / "existing") == []


def test_only_what_was_written_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with RunDirectory.create(tmp_path / "run") as run:
            run.write_json("config.json", {})
            (run.path / "notes.txt").write_text("the user's own")
            raise ValueError("bad data")

    with pytest.raises(ValueError, match="bad data"):
        fail()
    assert names(tmp_path / "run") == ["notes.txt"]


def test_a_failure_after_the_weights_keeps_them_and_says_why(tmp_path: Path) -> None:
    def fail() -> None:
        with RunDirectory.create(tmp_path / "run") as run:
            run.write_weights(nn.Linear(2, 2), {})
            raise ValueError("the export differs")

    with pytest.raises(ValueError, match="the export differs"):
        fail()
    assert names(tmp_path / "run") == [FAILED, "weights.safetensors"]
    assert (tmp_path / "run" / FAILED).read_text() == "ValueError: the export differs\n"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run = RunDirectory.create(tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(DataError, match=r"cannot write .*plan.txt: No space left"):
        run.write_text("plan.txt", "…")
    assert names(run.path) == []


def test_weights_load_strictly_even_if_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    path = RunDirectory.create(tmp_path / "run").write_weights(
        model, {"loss": math.nan, "method": "closed_form"}
    )
    nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).load_state_dict(load_file(path), strict=True)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["fxinvert"]) == {"loss": None, "method": "closed_form"}
        assert len(file.metadata()) == 1


class Versioned(nn.Linear):
    """Its state dict holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 2}


def test_what_else_a_state_dict_holds_is_no_weight(tmp_path: Path) -> None:
    model, other = Versioned(2, 2), Versioned(2, 2)
    load_weights(other, RunDirectory.create(tmp_path / "run").write_weights(model, {}))
    assert torch.equal(other.weight, model.weight)
    fxinvert.export_onnx(other, torch.randn(2, 2), tmp_path / "model.onnx")


def test_weights_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, about = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), {"b": 1, "a": [1.5]}
    first, second = (RunDirectory.create(tmp_path / name).write_weights(model, about) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = RunDirectory.create(tmp_path / "run").write_json(
        "metrics.json", {"loss": math.inf, "steps": (1, math.nan), "path": Path("x"), 3: "é"}
    )
    assert json.loads(path.read_text()) == {"loss": None, "steps": [1, None], "path": "x", "3": "é"}


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = RunDirectory.create(tmp_path / "run").write_text("plan.txt", "")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
