"""The commands export and verify, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from cli_folder import invoke, make_folder, names

from fxinvert.export import export_onnx

SHAPE = ("--shape", "1,4,4")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_folder(tmp_path, monkeypatch)
    from cli_nets import Net  # type: ignore[import-not-found]

    for name in ("old", "new"):
        torch.save(Net().state_dict(), folder / f"{name}.pt")
    return folder


def test_export_and_verify(here: Path) -> None:
    result = invoke("export", "cli_nets:Net", "net.onnx", "--weights", "old.pt", "--data", "data.npz")
    assert result.exit_code == 0, result.output
    assert "net.onnx: opset 20, equal to the model at batch sizes 1, 2, 7" in result.output
    common = "verify", "net.onnx", "--model", "cli_nets:Net", *SHAPE
    result = invoke(*common, "--weights", "old.pt", "--batch-sizes", "3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["batch_sizes"] == [3]
    result = invoke(*common, "--weights", "new.pt")
    assert result.exit_code == 3
    assert "ExportMismatchError" in result.output
    assert "The first node where the two differ" in result.output


def test_options_of_export(here: Path) -> None:
    result = invoke(
        "export", "cli_nets:Net", "net.onnx", *SHAPE, "--half", "--external-data", "--opset", "18"
    )
    assert result.exit_code == 0, result.output
    assert {"net.onnx", "net.onnx.data"} <= set(names(here))
    file = onnx.load(here / "net.onnx")
    assert file.opset_import[0].version == 18
    assert {tensor.data_type for tensor in file.graph.initializer} >= {onnx.TensorProto.FLOAT16}


def test_into(here: Path) -> None:
    assert (
        invoke("export", "cli_nets:Net", "old.onnx", "--weights", "old.pt", *SHAPE, "--seed", "1").exit_code
        == 0
    )
    given = ("export", "cli_nets:Net", "new.onnx", "--weights", "new.pt", "--into", "old.onnx", *SHAPE)
    result = invoke(*given, "--original-weights", "old.pt")
    assert result.exit_code == 0, result.output
    verified = ("verify", "new.onnx", "--model", "cli_nets:Net", *SHAPE, "--weights")
    assert invoke(*verified, "new.pt").exit_code == 0
    assert invoke(*verified, "old.pt").exit_code == 3
    result = invoke(*given, "--seed", "5")  # the factory's own weights are not those of the file
    assert result.exit_code == 3
    assert "is not a file of the original model" in result.output


def test_inverse(here: Path) -> None:
    result = invoke("export", "cli_nets:Net", "inverse.onnx", "--inverse", "--at", "hidden", *SHAPE)
    assert result.exit_code == 0, result.output
    assert [value.name for value in onnx.load(here / "inverse.onnx").graph.input] == [
        "feature",
        "output_target",
    ]
    result = invoke("export", "cli_nets:Net", "inverse.onnx", "--inverse", "--at", "none", *SHAPE)
    assert result.exit_code == 2
    assert "no node 'none'" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--into", "old.onnx", "--half"), "does not go with --into"),
        (("--into", "old.onnx", "--inverse"), "does not go with --into"),
        (("--original-weights", "old.pt"), "not given"),
        (("--at", "hidden"), "not given"),
        (("--inverse", "--half"), "do not go with --inverse"),
        (("--into", "none.onnx"), "no ONNX file"),
        (("--batch-sizes", "1,x"), "whole numbers"),
        (("--batch-sizes", "0"), "positive"),
        (("--axis", "images"), "INPUT:DIMENSION=NAME"),
        (("--axis", "other:1=n"), "no input"),
        (("--opset", "3"), "too old"),
        (("--data", "data.npz"), "not both"),
        (("--weights", "none.pt"), "not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(arguments: tuple[str, ...], says: str, here: Path) -> None:
    before = names(here)
    result = invoke("export", "cli_nets:Net", "net.onnx", *SHAPE, *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert names(here) == before


def test_bad_files(here: Path) -> None:
    from cli_nets import Net

    export_onnx(Net(), torch.rand(2, 1, 4, 4), here / "net.onnx", batch_sizes=(2,))
    (here / "cut.onnx").write_bytes((here / "net.onnx").read_bytes()[:500])
    (here / "folder.onnx").mkdir()
    for name, says, code in (
        ("cut.onnx", "not a valid ONNX file", 3),
        ("folder.onnx", "no ONNX file", 2),
        ("none.onnx", "no ONNX file", 2),
    ):
        result = invoke("verify", name, "--model", "cli_nets:Net", *SHAPE)
        assert result.exit_code == code
        assert says in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["export", "verify"])
def test_help_has_examples(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"fxinvert {command} " in result.output
