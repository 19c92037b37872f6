"""Runs on the command line: killed, resumed, repeated, looked at."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_folder import invoke, make_folder
from runs import events

import fxinvert
from fxinvert.commands.config import PostTrainConfig
from fxinvert.post_training import open_journal
from fxinvert.scheduling import store
from fxinvert.scheduling.run_directory import is_finished

#: what a run writes that holds no times
RESULTS = ("weights.safetensors", "metrics.json", "plan.json", "plan.txt", "run.json", "config.yaml")
WITHOUT = ("--no-export", "--no-report")
COMMAND = ("post-train", "cli_nets:Net", "data.npz", "--batch-size", "8", "--chunk", "2", *WITHOUT)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, *arguments: str) -> Any:
    """Runs a command in which Ctrl-C comes after some tasks were stored."""
    put, count = store.TaskStore.put, 0

    def pressed(self: store.TaskStore, key: str, result: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        put(self, key, result)

    with monkeypatch.context() as patch:
        patch.setattr(store.TaskStore, "put", pressed)
        return invoke(*arguments)


def test_a_run_that_was_interrupted_goes_on_and_ends_with_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke(*COMMAND, "--run-directory", "whole").exit_code == 0
    stopped = interrupt(monkeypatch, 10, *COMMAND, "--run-directory", "run")  # seven tasks and three waves
    assert stopped.exit_code == 130
    assert "fxinvert resume run" in stopped.output
    assert not is_finished(here / "run")
    told = invoke("status", "run").output
    assert "stopped (KeyboardInterrupt" in told
    assert "7, in" in told
    resumed = invoke("resume", "run")
    assert resumed.exit_code == 0, resumed.output
    for name in RESULTS:
        assert (here / "run" / name).read_bytes() == (here / "whole" / name).read_bytes(), name
    assert len(events(here / "run", "resumed")) == 1
    assert "finished" in invoke("status", "run").output
    assert "is finished" in invoke("resume", "run").output
    assert not (here / "run" / "tasks").exists()


def test_whoever_looks_for_a_run_in_the_wrong_way_is_told_the_right_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 9, *COMMAND, "--run-directory", "run")
    again = invoke(*COMMAND, "--run-directory", "run")
    assert again.exit_code == 2
    assert "or go on with: fxinvert resume run" in again.stderr
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    away = invoke("resume", "../run")
    assert away.exit_code == 2
    assert "as when the run was begun" in away.stderr


def test_a_second_process_leaves_the_run_of_the_first_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 9, *COMMAND, "--run-directory", "run")
    (here / "run" / "weights.safetensors").touch()  # the first is about to end
    with open_journal(here / "run"):
        before = sorted(path.name for path in (here / "run").iterdir())
        second = invoke("resume", "run")
        assert second.exit_code == 2
        assert "in use by process" in second.stderr
        assert "go on with" not in second.output
        assert sorted(path.name for path in (here / "run").iterdir()) == before


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(here: Path) -> None:
    command = [sys.executable, "-m", "fxinvert", *COMMAND]
    subprocess.run([*command, "--run-directory", "whole"], check=True, capture_output=True)
    killed = subprocess.Popen([*command, "--run-directory", "run"], stdout=subprocess.DEVNULL)
    while killed.poll() is None and len(events(here / "run", "task")) < 5:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not is_finished(here / "run")
    assert invoke("resume", "run", "--executor", "processes", "--workers", "2").exit_code == 0
    assert (here / "run" / "weights.safetensors").read_bytes() == (
        here / "whole" / "weights.safetensors"
    ).read_bytes()


def test_a_configuration_repeats_a_run(here: Path) -> None:
    first = invoke(*COMMAND, "--sweeps", "1", "--schedule", "parallel", "--run-directory", "first")
    assert first.exit_code == 0, first.output
    second = invoke("post-train", "--config", "first/config.yaml", "--run-directory", "second")
    assert second.exit_code == 0, second.output
    for name in RESULTS:
        assert (here / "first" / name).read_bytes() == (here / "second" / name).read_bytes(), name
    third = invoke("post-train", "--config", "first/config.yaml", "--sweeps", "2", "--run-directory", "third")
    assert third.exit_code == 0, third.output
    assert yaml.safe_load((here / "third" / "config.yaml").read_text())["sweeps"] == 2
    assert yaml.safe_load((here / "third" / "config.yaml").read_text())["schedule"] == "parallel"


def test_every_setting_survives_the_file() -> None:
    config = PostTrainConfig.of(model="m:f", data="d", cuts=["a"], mean=[0.5], resize=[4, 5], method="joint")
    assert PostTrainConfig.of(**yaml.safe_load(config.to_yaml())) == config


def test_settings_are_the_same_by_default_on_the_command_line_and_in_python() -> None:
    here = inspect.signature(fxinvert.post_train).parameters
    there = PostTrainConfig(model="", data="").model_dump()
    shared = here.keys() & there.keys() - {"model"}
    assert len(shared) > 10
    assert {name: here[name].default for name in shared} == {name: there[name] for name in shared}


def older(here: Path) -> None:
    (here / "old").mkdir()
    (here / "old" / "config.json").write_text("{}")


def other_format(here: Path) -> None:
    (here / "old").mkdir()
    (here / "old" / "config.yaml").write_text(
        PostTrainConfig(model="cli_nets:Net", data="data.npz").to_yaml()
    )
    (here / "old" / "run.json").write_text(json.dumps({"format": 1}))


def nothing(here: Path) -> None:
    """Everything is there as it should be."""


def odd_settings(here: Path) -> None:
    (here / "c.yaml").write_text("model: [1\n")


def list_of_settings(here: Path) -> None:
    (here / "c.yaml").write_text("- 1\n")


def newer_settings(here: Path) -> None:
    (here / "c.yaml").write_text("version: 7\nmodel: m:f\ndata: d\n")


def unknown_settings(here: Path) -> None:
    (here / "c.yaml").write_text("model: m:f\ndata: d\ncolour: red\n")


@pytest.mark.parametrize(
    ("prepare", "command", "said"),
    [
        (nothing, "resume nowhere", "no run directory nowhere"),
        (nothing, "resume photos", "no config.yaml"),
        (nothing, "status photos", "no run in photos"),
        (older, "resume old", "an older version of fxinvert has written it"),
        (other_format, "resume old", "was written in format 1"),
        (nothing, "post-train", "a model and data are needed"),
        (nothing, "post-train --config c.yaml", "c.yaml cannot be read"),
        (odd_settings, "post-train --config c.yaml", "is no YAML"),
        (list_of_settings, "post-train --config c.yaml", "holds no settings"),
        (newer_settings, "post-train --config c.yaml", "has version 7"),
        (unknown_settings, "post-train --config c.yaml", "colour"),
        (nothing, "post-train cli_nets:Net data.npz --only hiden", "no segment 'hiden' to train"),
        (nothing, "post-train cli_nets:Net data.npz --schedule single", "say which of hidden, head"),
        (nothing, "post-train cli_nets:Net data.npz --workers 3", "serial executor has one worker"),
    ],
)
def test_bad_input(here: Path, prepare: Any, command: str, said: str) -> None:
    prepare(here)
    result = invoke(*command.split())
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (here / "runs").exists() or not list((here / "runs").iterdir())


def test_a_run_with_other_data_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 10, *COMMAND, "--run-directory", "run")  # seven tasks and three waves
    (here / "data.npz").unlink()
    (here / "cli_nets.py").write_text((here / "cli_nets.py").read_text())
    import numpy as np

    np.savez(here / "data.npz", x=np.zeros((60, 4, 4), dtype=np.uint8), y=np.arange(60) % 3)
    result = invoke("resume", "run")
    assert result.exit_code == 2
    assert "begun with something else: data: train" in result.stderr
    assert (here / "run" / "tasks").exists()


def test_data_in_shards_give_the_same_bytes(here: Path) -> None:
    for name in ("batches", "shards"):
        command = ("post-train", "cli_nets:Net", f"cli_nets:{name}", "--chunk", "1", *WITHOUT)
        result = invoke(*command, "--run-directory", name)
        assert result.exit_code == 0, result.output
    first, second = (here / name / "weights.safetensors" for name in ("batches", "shards"))
    assert first.read_bytes() == second.read_bytes()


def test_a_loader_that_is_shorter_in_the_second_pass_is_found(here: Path) -> None:
    result = invoke("post-train", "cli_nets:Net", "cli_nets:Shorter", *WITHOUT)
    assert result.exit_code == 2
    assert "has 30 samples where there were 60 in a later pass than in the first" in result.stderr
