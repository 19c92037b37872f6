"""Logs of drives: a rendered drive that was written to files comes back as it was."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxinvert.errors import DataError
from fxinvert.models.drivelog import COLUMNS, EGO, LABELS, read_drives
from fxinvert.models.road import drives
from fxinvert.models.samples import Samples


def write(folder: Path, samples: Samples, scale: int = 2) -> Path:
    """A log of the samples, in SI units; pictures in colour, and larger than the network takes."""
    (camera, ego), labels = samples.inputs, (samples.labels["steering"], samples.labels["speed"])
    values = {name: ego[:, i] * unit for i, (name, unit) in enumerate(EGO.items())}
    values |= {name: label[:, 0] * unit for label, (name, unit) in zip(labels, LABELS.items(), strict=True)}
    log = folder / "log.csv"
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "weather"])
        for i in range(len(samples)):
            grey = np.kron(np.round(255 * camera[i, 0].numpy()), np.ones((scale, scale))).astype(np.uint8)
            Image.fromarray(np.stack([grey] * 3, 2)).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", *(float(values[name][i]) for name in COLUMNS[1:]), "dry"])
    return log


def test_a_drive_comes_back_as_it_was(tmp_path: Path) -> None:
    drive = drives(5, seed=3)
    read = read_drives(write(tmp_path, drive))
    assert torch.allclose(read.inputs[0], drive.inputs[0], atol=0.5 / 255 + 1e-6)
    assert torch.allclose(read.inputs[1], drive.inputs[1], atol=1e-5)
    for name, label in drive.labels.items():
        assert torch.allclose(read.labels[name], label, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("yaw_rate", "yaw", "no column yaw_rate"),
        ("0.png", "gone.png", "gone.png"),
        ("dry", "dry\r\n1.png,fast,0,0,0,0,0,wet", "line 3: speed is 'fast'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    log = write(tmp_path, drives(1, seed=3))
    log.write_bytes(log.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(DataError, match=said):
        read_drives(log)


def test_a_log_without_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(",".join(COLUMNS))
    with pytest.raises(DataError, match="no lines"):
        read_drives(tmp_path / "log.csv")
