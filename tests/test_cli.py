"""The command line, as a user meets it: help, looking, and whole runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from cli_folder import invoke, make_folder, names
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fxinvert
import fxinvert.commands.run
from fxinvert.cli import app
from fxinvert.commands.config import OF_METHODS, MethodName, PostTrainConfig, SolverName, read_settings
from fxinvert.commands.inputs import method_of
from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.linalg.anchored import Method as SolverMethod
from fxinvert.scheduling.run_directory import is_finished
from fxinvert.training import ClosedForm

FILES = [
    "config.yaml",
    "finished",
    "log.jsonl",
    "metrics.json",
    "model.onnx",
    "plan.json",
    "plan.txt",
    "report.html",
    "report.json",
    "run.json",
    "timing.json",
    "weights.safetensors",
]
WITHOUT_REPORT = [name for name in FILES if not name.startswith("report")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# looking


def test_help() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)
    assert "Exit codes" in result.output


COMMANDS = [
    *("demo", "post-train", "resume", "status", "plan"),
    *("explain", "export", "verify", "report", "rules"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands_has_examples(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"fxinvert {command} " in result.output
    assert "Example" in result.output


def test_help_tells_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = invoke("post-train", "--help").output
    assert "[default: closed_form]" in output
    assert "[default: 3]" in output
    assert "runs/<time>" in output


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output == f"fxinvert {fxinvert.__version__}\n"


def test_the_command_line_itself_needs_no_torch() -> None:
    """`--help` must be quick, so torch is imported inside the commands only."""
    code = (
        "import sys, types, importlib.util as u;"
        "package = types.ModuleType('fxinvert');"
        "package.__path__ = u.find_spec('fxinvert').submodule_search_locations;"
        "sys.modules['fxinvert'] = package;"
        "import fxinvert.cli;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("rules_as_found")
def test_rules(here: Path) -> None:
    (here / "cli_rules.py").write_text(
        "import fxinvert\n@fxinvert.inverse_rule('digamma')\ndef f(op, target): return target\n"
    )
    output = invoke("rules", "--import", "cli_rules").output
    assert "fxinvert/rules/linear.py:" in output
    assert str(Path(fxinvert.__file__).parent) not in output
    (line,) = (line for line in output.splitlines() if "digamma" in line)
    assert "user rule" in line
    assert "cli_rules.py:2" in line
    assert invoke("rules", "--import", "cli_no_such_module").exit_code == 2


@pytest.mark.parametrize("source", [["--shape", "1,4,4"], ["data.npz"], ["photos"], ["cli_nets:batches"]])
def test_plan(here: Path, source: list[str]) -> None:
    result = invoke("plan", "cli_nets:Net", *source, "--segments", "2")
    assert result.exit_code == 0, result.output
    (node,) = (line for line in result.output.splitlines() if line.strip().startswith("hidden"))
    assert node.split() == ["hidden", "linear", "6", "linear", "solve", "yes"]
    assert "images → leaky_relu" in result.output
    assert [name for name in names(here) if name != "__pycache__"] == ["cli_nets.py", "data.npz", "photos"]


def test_plan_of_what_does_not_follow_its_input_says_so(here: Path) -> None:
    result = invoke("plan", "cli_nets:Strange", "--shape", "1,4,4")
    assert result.exit_code == 2, result.output
    assert "the way ends at node 'round'" in result.output


# for machines


def test_json_of_what_is_looked_at(here: Path) -> None:
    told = json.loads(invoke("plan", "cli_nets:Net", "--shape", "1,4,4", "--json").stdout)
    assert [segment["name"] for segment in told["segments"]] == ["hidden", "head"]
    assert told["nodes"][-1] == {
        "node": "head",
        "op": "linear",
        "shape": [3],
        "rule": "linear solve",
        "trained": True,
    }
    assert told["sweep"]["seconds"]["1"] > 0
    assert told["problem"] == ""
    listed = json.loads(invoke("rules", "--json").stdout)
    assert {"op", "rule", "trained", "origin"} == set(listed[0])
    assert len(listed) == len(fxinvert.default_rules())


def test_json_of_a_run(here: Path) -> None:
    command = ("post-train", "cli_nets:Net", "data.npz", "--run-directory", "run", "--sweeps", "1")
    done = invoke(*command, "--no-export", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["run"] == "run"
    assert told["metrics"] == read(here / "run" / "metrics.json")["metrics"]
    assert "Report: " in done.stderr
    told = json.loads(invoke("status", "run", "--json").stdout)
    assert told["state"] == "finished"
    assert told["tasks_done"] >= told["waves_done"] > 0  # numbers, for machines
    assert told["error"] is told["holder"] is None


@pytest.mark.slow
def test_a_pipe_gets_plain_text_and_may_close(here: Path) -> None:
    command = [sys.executable, "-m", "fxinvert", "rules"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert b"\x1b" not in running.stdout.readline()
        running.stdout.close()
        assert b"Traceback" not in running.stderr.read()


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "post-train"), ("zsh", "post-train"), ("fish", "post-train")]
)
def test_shells_complete_commands(shell: str, word: str) -> None:
    variables = {
        "_FXINVERT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "fxinvert post",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "fxinvert post",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = CliRunner(env=variables).invoke(app, prog_name="fxinvert")
    assert word in done.stdout


def test_faults_of_ours_are_told_from_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(fxinvert, "partition", broken)
    result = invoke("plan", "cli_nets:Net", "--shape", "1,4,4")
    assert result.exit_code == 1
    assert "fault in fxinvert; please report" in result.stderr
    assert "Traceback" not in result.output
    result = invoke("--debug", "plan", "cli_nets:Net", "--shape", "1,4,4")
    assert isinstance(result.exception, ZeroDivisionError)


# whole runs


def test_post_train_on_arrays(here: Path) -> None:
    torch.manual_seed(5)
    from cli_nets import Net  # type: ignore[import-not-found]

    given = Net()
    save_file(given.state_dict(), here / "given.safetensors")
    result = invoke(
        *(
            "post-train",
            "cli_nets:Net",
            "data.npz",
            "--weights",
            "given.safetensors",
            "--run-directory",
            "run",
        ),
        *("--mean", "0.5", "--std", "0.25", "--batch-size", "32"),
        *("--position-fraction", "0.5", "--solvers", "head=qr,hidden=spectral"),
    )
    assert result.exit_code == 0, result.output
    assert names(here / "run") == FILES
    assert is_finished(here / "run")
    assert "ONNX proven" in result.output
    assert "report.html (open it in a browser)" in result.output

    config = PostTrainConfig.of(**read_settings(here / "run" / "config.yaml"))
    assert config.mean == (0.5,)
    assert config.weights == Path("given.safetensors")
    assert config.solvers == {"head": "qr", "hidden": "spectral"}
    method = method_of(config)
    assert isinstance(method, ClosedForm)
    assert method.position_fraction == config.position_fraction == 0.5

    metrics = read(here / "run" / "metrics.json")
    before, after = (metrics["metrics"]["test"][when] for when in ("before", "after"))
    assert after["samples"] == 30
    assert after["accuracy"] > before["accuracy"]
    assert metrics["metrics"]["held_out"]["after"]["loss"] < metrics["metrics"]["held_out"]["before"]["loss"]
    assert metrics["onnx"]["max_abs"] <= 1e-5
    assert metrics["fxinvert"] == fxinvert.__version__

    model = Net()
    model.load_state_dict(load_file(here / "run" / "weights.safetensors"), strict=True)
    with np.load(here / "data.npz") as data:
        x = torch.tensor(data["x_test"], dtype=torch.float32)[:, None] / 255
        hits = (model((x - 0.5) / 0.25).argmax(1).numpy() == data["y_test"]).mean()
    assert hits == pytest.approx(after["accuracy"])

    with safe_open(here / "run" / "weights.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["fxinvert"])
    assert about["method"] == "closed_form"
    facts = {entry.key: entry.value for entry in onnx.load(here / "run" / "model.onnx").metadata_props}
    assert facts["fxinvert.version"] == fxinvert.__version__
    assert json.loads(facts["fxinvert.segments"]) == about["segments"] != []
    assert json.loads(facts["fxinvert.held_out"]) == metrics["metrics"]["held_out"]
    assert [s["name"] for s in read(here / "run" / "plan.json")["segments"]] == ["hidden", "head"]
    assert "hidden" in (here / "run" / "plan.txt").read_text()
    assert read(here / "run" / "timing.json")["post_training"] > 0


def test_post_train_on_images(here: Path) -> None:
    result = invoke(
        *(
            "post-train",
            "cli_nets:Net",
            "photos",
            "--validation",
            "photos",
            "--test",
            "data.npz",
            "--no-export",
            "--no-report",
        ),
        *(
            "--schedule",
            "parallel",
            "--cuts",
            "hidden",
            "--output-target",
            "cli_nets:towards_class",
            "--sweeps",
            "1",
        ),
    )
    assert result.exit_code == 0, result.output
    (run,) = (here / "runs").iterdir()
    assert names(run) == [name for name in WITHOUT_REPORT if name != "model.onnx"]
    metrics = read(run / "metrics.json")
    assert metrics["onnx"] is None
    assert metrics["metrics"]["held_out"]["after"]["samples"] == 45
    assert metrics["metrics"]["test"]["after"]["samples"] == 30
    assert metrics["post_training"]["output_target"] == "towards_class"
    assert [s["exit"] for s in read(run / "plan.json")["segments"]] == ["hidden", "head"]


def test_batches_by_name(here: Path) -> None:
    """Of a loader that gives mappings with the labels among the inputs, as those of the transformers library do."""
    planned = invoke("plan", "cli_nets:Net", "cli_nets:by_name")
    assert planned.exit_code == 0, planned.output
    done = invoke("post-train", "cli_nets:Net", "cli_nets:by_name", "--sweeps", "1", "--run-directory", "run")
    assert done.exit_code == 0, done.output
    assert {"model.onnx", "report.html"} <= set(names(here / "run"))
    for more in (["explain", "--run", "run", "--sample", "3"], ["report", "run"]):
        found = invoke(*more)
        assert found.exit_code == 0, found.output


def test_a_run_whose_export_fails_can_end_without(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ExportMismatchError("onnxruntime cannot load it")

    monkeypatch.setattr(fxinvert.commands.run, "export_onnx", refused)
    begun = invoke("post-train", "cli_nets:Net", "data.npz", "--run-directory", "run", "--sweeps", "1")
    assert begun.exit_code == 3
    assert "fxinvert resume run --no-export" in " ".join(begun.stderr.replace("│", " ").split())
    before = (here / "run" / "weights.safetensors").read_bytes()
    done = invoke("resume", "run", "--no-export")
    assert done.exit_code == 0, done.output
    assert is_finished(here / "run")
    assert (here / "run" / "report.html").is_file()
    assert (here / "run" / "weights.safetensors").read_bytes() == before


def test_one_of_two_outputs(here: Path) -> None:
    refused = invoke("post-train", "cli_nets:Two", "data.npz")
    assert refused.exit_code == 2
    assert "answer" in refused.stderr
    result = invoke(
        *(
            "post-train",
            "cli_nets:Two",
            "data.npz",
            "--supervised-output",
            "answer",
            "--run-directory",
            "run",
            "--no-report",
        ),
    )
    assert result.exit_code == 0, result.output
    assert read(here / "run" / "metrics.json")["metrics"]["test"]["after"]["samples"] == 30


def test_the_same_run_writes_the_same_files(here: Path) -> None:
    for name in ("a", "b"):
        command = ("post-train", "cli_nets:Net", "data.npz", "--no-report")
        assert invoke(*command, "--run-directory", name).exit_code == 0
    for name in WITHOUT_REPORT:
        if name not in ("finished", "log.jsonl", "timing.json"):
            assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes(), name


def test_in_a_process_of_its_own_with_a_models_folder_of_the_users(here: Path) -> None:
    (here / "models").mkdir()
    (here / "models" / "__init__.py").write_text("from cli_nets import Net")
    (here / "passes.py").write_text("raise RuntimeError('the wrong passes')")
    command = [
        sys.executable,
        "-m",
        "fxinvert",
        "post-train",
        "models:Net",
        "data.npz",
        "--run-directory",
        "run",
        "--no-report",
    ]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert names(here / "run") == WITHOUT_REPORT


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    result = invoke("demo", "--run-directory", tmp_path / "run")
    assert result.exit_code == 0, result.output
    own = [name for name in FILES if name not in ("config.yaml", "log.jsonl", "run.json")]
    assert names(tmp_path / "run") == sorted([*own, "demo.json"])
    metrics = read(tmp_path / "run" / "metrics.json")
    before, after = (metrics["metrics"]["test"][when]["accuracy"] for when in ("before", "after"))
    assert after >= 0.94
    assert after >= before + 0.10
    assert (
        metrics["converged"]["test"]["after"]["accuracy"]
        >= metrics["converged"]["test"]["before"]["accuracy"]
    )
    assert [row["method"] for row in metrics["comparison"]] == ["as given", "fxinvert", *["AdamW"] * 3]
    assert metrics["onnx"]["max_rel"] <= 2e-6


# configuration


def test_configuration_names_every_problem() -> None:
    with pytest.raises(DataError, match=r"sweeps: .*; colour: "):
        PostTrainConfig.of(model="m:f", data="d.npz", sweeps=0, colour="red")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle": "m:f"}, "modle: there is no such setting; did you mean model?"),
        (
            {"learning_rate": 1.0},
            "learning_rate is a setting of method gradient and joint; closed_form has none",
        ),
        ({"method": "auto", "epochs": 9}, "epochs is a setting of method gradient and joint; auto has none"),
        ({"method": "joint", "every": 9}, "every is a setting of method closed_form; joint has none"),
        ({"address": "ray://head:1"}, "address is a setting of executor ray; serial has none"),
    ],
)
def test_nothing_in_a_configuration_is_ignored(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        PostTrainConfig.of(**{"model": "m:f", "data": "d.npz"} | settings)


def test_settings_of_methods_are_those_that_reach_them() -> None:
    """Each of the table's changes the method that a configuration makes, for the methods named, and only these."""
    other = {"damping": 1.0, "satisfied_weight": 1.0, "error": "weighted", "every": 9, "ops": "in_turn"}
    other |= {"position_fraction": 0.5, "optimizer": "SGD", "learning_rate": 1.0, "epochs": 9, "alpha": 1.0}
    assert other.keys() == OF_METHODS.keys()
    for method in get_args(MethodName):
        plain = PostTrainConfig(model="", data="", method=method)
        for name, value in other.items():
            changes = method_of(plain.model_copy(update={name: value})) != method_of(plain)
            assert changes == (method in OF_METHODS[name]), (method, name)


def test_the_solvers_of_the_configuration_are_all_there_are() -> None:
    assert get_args(SolverName) == get_args(SolverMethod)


def test_configuration_survives_json() -> None:
    config = PostTrainConfig.of(model="m:f", data="d.npz", cuts=["a", "b"], resize=[4, 5], weights="w.pt")
    assert PostTrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config.cuts == ("a", "b")
    with pytest.raises(ValueError, match="frozen"):
        config.sweeps = 4
