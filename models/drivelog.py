"""Recorded drives: a table of what a car's camera saw, how the car moved, and what its driver did."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.models.road import (
    ACCELERATION_UNIT,
    HEIGHT,
    SPEED_UNIT,
    STEERING_UNIT,
    WIDTH,
    YAW_RATE_UNIT,
)
from fxinvert.models.samples import Samples

#: columns that are the ego state, and those that are labels, with what 1 means to the network
EGO = {
    "speed": SPEED_UNIT,
    "yaw_rate": YAW_RATE_UNIT,
    "acceleration": ACCELERATION_UNIT,
    "limit": SPEED_UNIT,
}
LABELS = {"steering": STEERING_UNIT, "next_speed": SPEED_UNIT}
COLUMNS = ("image", *EGO, *LABELS)


def read_drives(file: str | Path) -> Samples:
    """The samples of a log, as the driving network takes them: (N, 1, 16, 24) and (N, 4), "steering" and "speed" (N, 1).

    A log is a CSV file with a line for each moment and the columns `image` (a picture's path, from the log's folder),
    `speed` (m/s), `yaw_rate` (rad/s, positive to the right), `acceleration` (m/s²), `limit` (m/s), and what the driver
    did: `steering` (rad of the front wheels, positive to the right) and `next_speed` (m/s). Other columns are left
    alone. Pictures become grey, and are scaled to 16 × 24 pixels.

    Raises:
        DataError: the log or a picture cannot be read, or a column or a number is missing; it is said which.
    """
    log = Path(file)
    try:
        with log.open(newline="", encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the log {log} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"the log {log} has no lines; needed are a header and a line for each moment")
    missing = [name for name in COLUMNS if name not in lines[0]]
    if missing:
        raise DataError(f"the log {log} has no column {', '.join(missing)}; needed are {', '.join(COLUMNS)}")

    def column(name: str, unit: float) -> Tensor:
        return torch.tensor([_number(log, i, name, line[name]) / unit for i, line in enumerate(lines)])

    ego = torch.stack([column(name, unit) for name, unit in EGO.items()], 1)
    steering, speed = (column(name, unit)[:, None] for name, unit in LABELS.items())
    camera = torch.stack([_picture(log.parent / line["image"]) for line in lines])
    return Samples((camera, ego), {"steering": steering, "speed": speed})


def _number(log: Path, index: int, name: str, text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{log}, line {index + 2}: {name} is {text!r}; a number is needed") from None


def _picture(file: Path) -> Tensor:
    """Grey, (1, 16, 24) in [0, 1]."""
    try:
        with Image.open(file) as opened:
            grey = opened.convert("L").resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"the picture {file} cannot be read: {error}") from error
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)[None]
