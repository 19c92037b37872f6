"""Models and data of other libraries: used as they are where they are installed, and missed with a reason where not."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cli_folder import invoke, make_folder
from PIL import Image
from torch import nn

from fxinvert.errors import DataError
from fxinvert.sources import (
    DataOptions,
    Preprocessing,
    load_data,
    load_model,
    no_better_than_chance,
    open_model,
)
from fxinvert.sources.libraries import MODELS, library_of


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    # torchvision's CUDA build is imported beside a CPU torch, if these are declared
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            library.define(  # type: ignore[no-untyped-call]
                f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    try:
        return importlib.import_module(name), library
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


# any library, here a stand-in


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in that makes linear layers of any width."""
    found: Any = ModuleType("timm")
    found.__file__ = "timm.py"

    def create_model(name: str, pretrained: bool, num_classes: int = 2, **others: Any) -> nn.Module:
        if name != "linear" or others:
            raise RuntimeError(f"Unknown model ({name})\nmore lines")
        model = nn.Linear(4, num_classes)
        nn.init.constant_(model.weight, float(pretrained))
        return model

    class Told:
        @staticmethod
        def resolve_model_data_config(model: nn.Module) -> dict[str, Any]:
            return {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 8, 8)}

    found.create_model, found.data = create_model, Told
    monkeypatch.setitem(sys.modules, "timm", found)
    return found  # type: ignore[no-any-return]


def test_names_of_libraries() -> None:
    assert library_of("timm:resnet18", tuple(MODELS)) == "timm"
    assert library_of("my_timm:resnet18", tuple(MODELS)) is None
    assert library_of("timm", tuple(MODELS)) is None


def test_arguments_and_weights(timm: ModuleType) -> None:
    model, expected = open_model("timm:linear?num_classes=7", pretrained=True)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 7
    assert not model.training
    assert model.weight.eq(1).all()
    assert expected == Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8))
    assert load_model("timm:linear").weight.eq(0).all()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:nonsense", r"timm says RuntimeError: Unknown model \(nonsense\)$"),
        ("timm:linear?colour=red", "Unknown model"),
        (
            "transformers:nowhere",
            "there is no folder nowhere; --pretrained would fetch it|needs transformers",
        ),
    ],
)
def test_models_that_are_not_known(timm: ModuleType, spec: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_model(spec)


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18", "transformers:.", "datasets:."])
def test_libraries_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    name = spec.partition(":")[0]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=f"needs {name}, which cannot be imported .* pip install {name}"):
        load_data(spec) if name == "datasets" else load_model(spec)
    folder = ModuleType(name)  # a folder of the user's of that name
    folder.__file__ = None
    monkeypatch.setitem(sys.modules, name, folder)
    with pytest.raises(DataError, match=f"needs {name}, which is not installed"):
        load_data(spec) if name == "datasets" else load_model(spec)


def test_pretrained_is_for_libraries() -> None:
    with pytest.raises(DataError, match="--pretrained is for models of timm, torchvision, transformers"):
        load_model("my_nets:net", pretrained=True)


# what models expect


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": (0.5,), "std": (0.25,) * 3}, None),
        ({"mean": (0.5,), "std": (0.25,), "resize": (8, 8)}, None),
        ({"std": (0.25,)}, "--mean 0.5,0.5,0.5"),
        ({"mean": (0.5,), "std": (0.25,), "resize": (9, 9)}, "--resize 8,8"),
        ({}, "--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25"),
    ],
)
def test_inputs_that_a_model_was_not_made_for(options: dict[str, Any], said: str | None) -> None:
    expected = Preprocessing((0.5,) * 3, (0.25,) * 3, (8, 8))
    found = expected.differs(DataOptions(**options))
    assert found is None if said is None else found is not None and found.endswith(said)


@pytest.mark.parametrize(
    ("hits", "samples", "classes", "most", "flagged"),
    [
        (50, 500, 10, 50, True),
        (60, 500, 10, 50, True),  # a tenth, give or take 1.3 %
        (100, 500, 10, 50, False),
        (440, 500, 2, 450, True),  # always the same answer is as good
        (490, 500, 2, 450, False),
        (2, 3, 2, 2, True),  # too few to say
        (5, 5, 3, 5, False),  # of a single class, nothing wrong
    ],
)
def test_chance(hits: int, samples: int, classes: int, most: int, flagged: bool) -> None:
    found = no_better_than_chance(hits, samples, classes, most)
    assert (found is not None) == flagged


def test_answers_at_chance_are_flagged_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, monkeypatch)
    run = ("--sweeps", "1", "--no-export", "--no-report", "--run-directory")
    done = invoke("post-train", "cli_nets:Net", "photos", *run, "a", "--json")
    assert done.exit_code == 0, done.output
    assert "Warning: before training" in done.stderr
    assert "the classes in another order; here it is class0, class1, class2" in done.stderr
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "no better than chance" in warning
    better = ("--weights", "a/weights.safetensors")
    done = invoke("post-train", "cli_nets:Net", "photos", *better, *run, "b")
    assert done.exit_code == 0, done.output
    assert "Warning" not in done.output


# the libraries themselves


def test_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = imported("torchvision", monkeypatch)
    model = load_model("torchvision:resnet18?num_classes=5")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(DataError, match="torchvision says ValueError: Unknown model"):
        load_model("torchvision:resnet18x")


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = imported("timm", monkeypatch)
    model, expected = open_model("timm:test_vit?num_classes=5")
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 5)
    assert expected is not None
    assert expected.size == (160, 160)
    with pytest.raises(DataError, match="Unknown model"):
        load_model("timm:no_such_model")


def test_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers, _ = imported("transformers", monkeypatch)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    given = transformers.ViTForImageClassification(config).eval()
    given.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}})
    )
    model, expected = open_model(f"transformers:{tmp_path / 'vit'}")
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(model(x).logits, given(x).logits)
    assert expected == Preprocessing((0.5,) * 3, (0.5,) * 3, (8, 8))
    (tmp_path / "vit" / "config.json").write_text("{")
    with pytest.raises(DataError, match="transformers says"):
        load_model(f"transformers:{tmp_path / 'vit'}")
    monkeypatch.chdir(tmp_path)
    given.save_pretrained(tmp_path / "vit")
    np.savez(
        "d.npz",
        x=np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8),
        y=np.arange(40) % 3,
    )
    done = invoke(
        *("post-train", "transformers:vit", "d.npz", "--sweeps", "1", "--no-export", "--no-report"),
        *("--test", "d.npz"),
    )
    assert done.exit_code == 0, done.output
    assert "the model was made for other inputs: --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5" in done.output.replace(
        "\n", " "
    )


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, _ = imported("datasets", monkeypatch)
    images = [Image.new("RGB", (4, 3), (10 * i, 0, 0)) for i in range(6)]
    made = datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 2, 0, 1, 2], "price": [i / 2 for i in range(6)], "text": ["a"] * 6},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(3),
                "price": datasets.Value("float32"),
                "text": datasets.Value("string"),
            }
        ),
    )
    both = datasets.DatasetDict({"train": made, "test": made.select([0, 1])})
    both.save_to_disk(str(tmp_path / "both"))
    options = DataOptions(seed=None, label_columns=("label",))
    data = load_data(f"datasets:{tmp_path / 'both'}", options)
    ((x, y),) = data.train
    assert torch.allclose(x[:, 0, 0, 0], torch.arange(6) * 10 / 255)
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test is not None
    assert [len(y) for _, y in data.test] == [2]
    options = DataOptions(seed=None, label_columns=("price",))
    ((_, y),) = load_data(f"datasets:{tmp_path / 'both'}", options).train
    assert y.flatten().tolist() == [i / 2 for i in range(6)]

    tokens = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [3, 4]], "label": [0, 1], "ragged": [[1], [1, 2]]}
    )
    tokens.save_to_disk(str(tmp_path / "tokens"))
    options = DataOptions(seed=None, input_columns=("input_ids",), label_columns=("label",))
    ((x, y),) = load_data(f"datasets:{tmp_path / 'tokens'}", options).train
    assert x.tolist() == [[1, 2], [3, 4]]
    assert x.dtype == y.dtype == torch.int64
    options = DataOptions(seed=None, input_columns=("ragged",), label_columns=("label",))
    with pytest.raises(DataError, match="rows of different lengths"):
        list(load_data(f"datasets:{tmp_path / 'tokens'}", options).train)
    with pytest.raises(DataError, match=r"none that Dataset\.save_to_disk has written"):
        load_data(f"datasets:{tmp_path}")
    with pytest.raises(DataError, match="there is no folder"):
        load_data(f"datasets:{tmp_path / 'nowhere'}")


# exported programs


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
        )

    def forward(self, images: torch.Tensor) -> Any:
        return self.inner(images)


def exported(path: Path) -> nn.Module:
    torch.manual_seed(0)
    model = Hidden().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.rand(4, 1, 4, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return model


def test_an_exported_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, monkeypatch)
    model = exported(tmp_path / "net.pt2")
    torch.save({k: v + 1 for k, v in model.state_dict().items()}, "other.pt")
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(load_model("net.pt2")(x), model(x))
    other = load_model("net.pt2", Path("other.pt")).state_dict()
    assert all(torch.equal(other[name], value + 1) for name, value in model.state_dict().items())
    done = invoke("post-train", "net.pt2", "data.npz", "--sweeps", "1", "--run-directory", "run")
    assert done.exit_code == 0, done.output
    assert "ONNX proven" in done.output
    assert (tmp_path / "run" / "report.html").exists()


def test_exported_programs_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with pytest.raises(DataError, match="is not there"):
        load_model(str(path))
    exported(path)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged, no exported program, or holds more than tensors"):
            load_model(str(path))


class Harm:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_an_exported_program_runs_nothing(tmp_path: Path) -> None:
    import zipfile

    exported(tmp_path / "net.pt2")
    victim = tmp_path / "victim"
    torch.save((Harm(str(victim)),), tmp_path / "harm.pt")
    with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            harmful = name.endswith("sample_inputs/model.pt")
            new.writestr(name, (tmp_path / "harm.pt").read_bytes() if harmful else old.read(name))
    with pytest.raises(DataError, match="could run"):
        load_model(str(tmp_path / "bad.pt2"))
    assert not victim.exists()
    with zipfile.ZipFile(tmp_path / "net.pt2", "a") as archive:
        archive.writestr("net/data/constants/opaque_obj_0", b"anything")
    with pytest.raises(DataError, match="a Python object, which is not loaded"):
        load_model(str(tmp_path / "net.pt2"))
