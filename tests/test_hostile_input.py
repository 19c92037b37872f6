"""Hostile and unlucky input: whatever it is, one readable error, or a run whose page and files are right."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from cli_folder import invoke, make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from fxinvert.commands.config import PostTrainConfig, read_settings
from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.export import update_onnx, verify_onnx
from fxinvert.scheduling import run_directory, store
from fxinvert.sources import DataOptions, load_data

QUICK = ("--sweeps", "1", "--no-export", "--run-directory")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


# configurations

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from([*PostTrainConfig.model_fields, "modle", "", "__class__"])


def refused(act: Any) -> str:
    """What an error of ours says, if there is one; any other fails."""
    try:
        act()
    except DataError as error:
        return str(error)
    return ""


@given(st.dictionaries(fields, anything, max_size=6))
def test_a_configuration_is_whole_or_refused(chosen: dict[str, Any]) -> None:
    given = {"model": "m:f", "data": "d.npz"} | chosen
    if not refused(lambda: PostTrainConfig.of(**given)):
        config = PostTrainConfig.of(**given)
        assert PostTrainConfig.of(**yaml.safe_load(config.to_yaml())) == config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | anything.map(lambda value: yaml.safe_dump(value).encode()))
def test_a_file_of_settings_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    said = refused(lambda: read_settings(path))
    assert str(path) in said or all(isinstance(key, str) for key in read_settings(path))


@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.system [touch harm]",
        "a: &a [*a]",
        "? [x]\n: y",
        "- 1\n",
        "x: 1\n  y: 2",
        "[" * 3000,
    ],
)
def test_settings_that_are_none(here: Path, content: str) -> None:
    (here / "config.yaml").write_text(content)
    result = invoke("post-train", "--config", "config.yaml")
    assert result.exit_code == 2, result.output
    assert "DataError" in result.stderr
    assert not (here / "harm").exists()
    assert not (here / "runs").exists()


# names

HOSTILE = "<img src=x onerror=console.error(1)>[red]&amp;'\"{{7*7}}[-b]"


def test_names_are_only_text_all_the_way(here: Path) -> None:
    """Class folders, files, the data and the run are called what would be markup on a page or on a console."""
    from browser import opened

    data, run = here / HOSTILE, here / f"run {HOSTILE}"
    (here / "photos").rename(data)
    for folder in list(data.iterdir()):
        for file in list(folder.iterdir()):
            file.rename(folder / f"{HOSTILE}{file.name}")
        folder.rename(data / f"{folder.name}{HOSTILE}")
    done = invoke("post-train", "cli_nets:Net", data, *QUICK, run)
    assert done.exit_code == 0, done.output
    told = invoke("status", run)
    assert told.exit_code == 0, told.output
    assert HOSTILE in told.output
    told = invoke("explain", "--run", run, "--sample", "1")
    assert told.exit_code == 0, told.output
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "49" not in text.partition("<title>")[2].partition("</title>")[0]
    with opened(run / "report.html") as page:
        assert HOSTILE in page.locator("h1, header").first.inner_text() + page.title()


LATIN = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf_8(here: Path) -> None:
    data = here / LATIN
    try:
        (here / "photos").rename(data)
    except OSError:
        pytest.skip("the file system takes only UTF-8 names")
    (data / "class0" / "0.png").rename(data / "class0" / f"{LATIN}.png")
    (data / "class1").rename(data / f"class1{LATIN}")
    run = here / f"run{LATIN}"
    done = invoke("post-train", "cli_nets:Net", data, *QUICK, run)
    assert done.exit_code == 0, done.output
    assert (run / "report.html").exists()
    assert read_settings(run / "config.yaml")["data"] == str(data)
    for command in (
        ("post-train", "cli_nets:Net", "data.npz", "--run-directory", here / f"onnx{LATIN}"),
        ("export", "cli_nets:Net", f"{LATIN}.onnx", "--shape", "1,4,4"),
    ):
        refused = invoke(*command)
        assert refused.exit_code == 2
        assert "is not UTF-8, and onnx opens no such file" in refused.stderr
    assert not (here / f"onnx{LATIN}").exists()
    (data / "class0" / f"{LATIN}.png").write_text("no image")
    done = invoke("post-train", "cli_nets:Net", data, *QUICK, "other", "--json")
    assert done.exit_code == 2, done.output
    assert "cannot be read" in done.stderr


# images


def png(path: Path, width: int, height: int) -> None:
    """A picture that says how large it is, and has not a pixel."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    blocks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in blocks
        )
    )


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_huge_images_are_refused_before_they_are_decoded(here: Path, side: int) -> None:
    png(here / "photos" / "class1" / "1.png", side, side)
    result = invoke("post-train", "cli_nets:Net", "photos", "--resize", "4", *QUICK, "run")
    assert result.exit_code == 2
    assert f"({side * side} pixels) exceeds limit" in result.stderr
    assert not (here / "run").exists()


def test_images_of_all_modes_and_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("RGB", (8, 6), (51, 102, 255)).save(folder / "0.png")
    transparent, dark = (51, 102, 255, 7), (0, 0, 0, 0)
    modes = {"RGBA": transparent, "P": 5, "L": 51, "LA": (51, 3), "1": 1, "CMYK": dark, "I;16": 13107}
    for i, (mode, color) in enumerate(modes.items(), 1):
        image = Image.new(mode, (5 + i, 9 - i), color)  # type: ignore[arg-type]
        image.save(folder / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}")
    options = DataOptions(resize=(6, 7), seed=None)
    ((x, _),) = load_data(str(tmp_path), options).train
    assert x.shape == (8, 3, 6, 7)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert torch.allclose(x[1], x[0], atol=1e-6)  # transparency is left out
    for i, expected in ((3, 0.2), (4, 0.2), (5, 1.0), (6, 1.0), (7, 0.2)):
        assert torch.allclose(x[i], torch.tensor(expected), atol=1e-3)


def test_mislabelled_folders_are_flagged(here: Path) -> None:
    first = invoke("post-train", "cli_nets:Net", "photos", *QUICK, "run", "--no-report", "--sweeps", "3")
    assert first.exit_code == 0, first.output
    for number in range(3):
        (here / "photos" / f"class{number}").rename(here / "photos" / f"{2 - (number + 1) % 3}")
    again = invoke(
        *("post-train", "cli_nets:Net", "photos", "--weights", "run/weights.safetensors"),
        *(*QUICK, "again", "--no-report"),
    )
    assert "no better than chance" in again.output
    assert "classes in another order; here it is 0, 1, 2" in again.output


# disks


@pytest.mark.parametrize(
    "command", ["post-train cli_nets:Net data.npz --run-directory", "demo --run-directory"]
)
def test_a_read_only_disk(here: Path, command: str) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc, which nobody can write to")
    result = invoke(*command.split(), "/proc/run")
    assert result.exit_code == 2
    assert "cannot write /proc/run" in result.stderr


def test_a_read_only_disk_for_onnx(here: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc, which nobody can write to")
    result = invoke("export", "cli_nets:Net", "/proc/net.onnx", "--shape", "1,4,4")
    assert result.exit_code == 2
    assert "/proc/net.onnx" in result.stderr
    result = invoke("explain", "cli_nets:Net", "data.npz", "--sample", "1", "--out", "/proc/x.png")
    assert result.exit_code == 2
    assert "cannot write /proc/x.png" in result.stderr


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_disk_that_fills_up_during_a_run(here: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    write, count = store.write_durably, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(store, "write_durably", full)
    monkeypatch.setattr(run_directory, "write_durably", full)
    result = invoke("post-train", "cli_nets:Net", "data.npz", *QUICK, "run")
    assert result.exit_code == 2, result.output
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.output


# paths that lead out


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.ones(6, np.float32).tobytes())
    (tmp_path / "inside").mkdir()
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[3, 2], data_location=TensorProto.EXTERNAL
    )
    for place in ("../secret.bin", str(secret)):
        del weight.external_data[:]
        weight.external_data.add(key="location", value=place)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2])],
            [weight],
        )
        file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        path = tmp_path / "inside" / "net.onnx"
        path.write_bytes(file.SerializeToString())
        model = nn.Linear(3, 2, bias=False)
        nn.init.ones_(model.weight)  # as the secret has it: nothing else speaks against the file
        with pytest.raises(ExportMismatchError, match=r"points outside|absolute path"):
            verify_onnx(path, model, torch.rand(2, 3))
        with pytest.raises(ExportMismatchError, match=r"points outside|absolute path"):
            update_onnx(model, model, torch.rand(2, 3), path, path)
        assert onnx.load(path, load_external_data=False).graph.initializer[0].name == "w"


def test_a_run_that_names_files_outside_is_refused(here: Path) -> None:
    """What a run directory says of itself is checked before anything of it is read or written."""
    done = invoke("post-train", "cli_nets:Net", "data.npz", *QUICK, "run", "--no-report")
    assert done.exit_code == 0, done.output
    plan = json.loads((here / "run" / "plan.json").read_text())
    broken: list[Any] = [[], {"segments": [{"name": "../x"}]}, {"segments": 3}, plan | {"segments": [None]}]
    for content in broken:
        (here / "run" / "plan.json").write_text(json.dumps(content))
        result = invoke("report", "run")
        assert result.exit_code == 2, result.output
    for name in ("../run", "/tmp", "run/../.."):
        result = invoke("resume", name) if name != "../run" else invoke("report", "nowhere/../../..")
        assert result.exit_code == 2, result.output
