"""A folder to work in, with models and data, as a user of the command line has it; and how to call that."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fxinvert.cli import app

MODULE = '''
import functools

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Images (B, 1, 4, 4) -> 3 classes."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        return self.head(F.leaky_relu(self.hidden(images.flatten(1)), 0.1))


class Two(Net):
    def forward(self, images):
        answer = super().forward(images)
        return {"answer": answer, "doubled": answer * 2}


class Strange(Net):
    def forward(self, images):
        return torch.round(super().forward(images))


def out_of_memory():
    raise MemoryError("model too large")


def batches(classes=3, **change):
    generator = torch.Generator().manual_seed(1)
    made = {
        "x": torch.rand(60, 1, 4, 4, generator=generator),
        "y": torch.randint(classes, (60,), generator=generator),
    } | change
    return [(made["x"][:30], made["y"][:30]), (made["x"][30:], made["y"][30:])]


def by_name():
    return [{"images": x, "labels": y} for x, y in batches()]


def shards():
    return [functools.partial(shard, i) for i in range(2)]


def shard(i):
    return batches()[i:i + 1]


class Shorter:
    """Batches of which the last is missing from the second pass on."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(batches()[:3 - min(self.passes, 2)])


def not_a_number():
    x = torch.rand(60, 1, 4, 4)
    x[40, 0, 1, 1] = float("nan")
    return batches(x=x)


def five_classes():
    return batches(classes=5)


def wide_labels():
    return batches(y=torch.zeros(60, 7, dtype=torch.long))


def other_shape():
    return batches(x=torch.rand(60, 1, 5, 4))


def once():
    return iter(batches())


def towards_class(outputs, labels):
    return outputs + F.one_hot(labels, outputs.shape[1])
'''


def make_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with models, data that has something to learn, and wide output."""
    (tmp_path / "cli_nets.py").write_text(MODULE)
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = generator.integers(0, 100, size=(120, 4, 4), dtype=np.uint8)
    x[np.arange(120), y] += 120  # the class is the brightest row
    np.savez(tmp_path / "data.npz", x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    for i in range(45):
        folder = tmp_path / "photos" / f"class{y[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(folder / f"{i}.png")
    for name in ("cli_nets", "cli_empty", "cli_rules"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    return tmp_path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())
