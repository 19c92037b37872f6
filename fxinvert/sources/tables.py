"""Tables: named columns of images and numbers, some of which are inputs and some labels."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.sources.options import DataOptions
from fxinvert.sources.pictures import SUFFIXES, Pictures

Rows = Sequence[int]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        kind: what it holds; of "other" things nothing can be made.
        read: the images (paths or Pillow's) of some rows, or their numbers as a tensor `(B, …)`.
    """

    kind: Literal["image", "number", "other"]
    read: Callable[[Rows], Any]


class Table:
    """Batches of (inputs, labels) of a table; can be iterated any number of times.

    Images are float (B, C, H, W) in [0, 1]. Columns of numbers that are inputs together make one, (B, columns), and
    so do those of labels, unless they are a single column: whole numbers then are class numbers (B,).

    Args:
        columns: by name.
        count: how many rows there are.
        options: which columns are inputs and labels, and how they are read.
        name: how messages call the table.

    Raises:
        DataError: a column is not there or holds neither images nor numbers, or the first image cannot be read.
    """

    def __init__(self, columns: Mapping[str, Column], count: int, options: DataOptions, name: str) -> None:
        self.columns, self.count, self.options, self.name = columns, count, options, name
        if not count:
            raise DataError(f"{name} has no rows")
        self.inputs = self._chosen(options.input_columns) or self._first_image()
        numbers = [
            key for key, column in columns.items() if column.kind == "number" and key not in self.inputs
        ]
        self.labels = self._chosen(options.label_columns) or numbers
        unfit = next((key for key in self.labels if columns[key].kind != "number"), None)
        if unfit is not None or not self.labels:
            what = f"the label column {unfit!r} of {name}" if unfit else f"{name} but for its inputs"
            raise DataError(f"{what} holds no numbers; name others with --label-columns")
        self._order = options.order(count)
        self._pictures = {
            key: Pictures(columns[key].read([0])[0], options.resize)
            for key in self.inputs
            if columns[key].kind == "image"
        }
        if options.resize is not None and not self._pictures:
            raise DataError(f"--resize is for images; {name} has none among its inputs")

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for rows in torch.split(self._order, self.options.batch_size):
            chosen = rows.tolist()
            images = [self._images(key, chosen) for key in self._pictures]
            numbers = [self.columns[key].read(chosen) for key in self.inputs if key not in self._pictures]
            if not images:
                numbers = [self.options.normalized(_together(numbers), self.name)]
            inputs = [*images, *([_together(numbers)] if numbers else [])]
            labels = _together([self.columns[key].read(chosen) for key in self.labels], labels=True)
            yield inputs[0] if len(inputs) == 1 else tuple(inputs), labels

    def __len__(self) -> int:
        return math.ceil(self.count / self.options.batch_size)

    def _images(self, key: str, rows: Rows) -> Tensor:
        pictures = self._pictures[key]
        images = torch.stack([pictures.tensor(image) for image in self.columns[key].read(rows)])
        return self.options.normalized(images, f"column {key!r} of {self.name}")

    def _chosen(self, names: Sequence[str]) -> list[str]:
        for name in names:
            if name not in self.columns or self.columns[name].kind == "other":
                problem = "holds neither images nor numbers" if name in self.columns else "is not there"
                raise DataError(f"column {name!r} of {self.name} {problem}; it has {', '.join(self.columns)}")
        return list(names)

    def _first_image(self) -> list[str]:
        for name, column in self.columns.items():
            if column.kind == "image":
                return [name]
        raise DataError(
            f"{self.name} has no column of images; name the inputs with --input-columns: {', '.join(self.columns)}"
        )


def load_csv(path: Path, options: DataOptions) -> Table:
    """A CSV file whose columns hold image paths, absolute or from its folder, and numbers.

    The first line names the columns, unless it holds a number or an image path itself: then they are called 0, 1, ….

    Args:
        path: of the file, in UTF-8.
        options: which columns are inputs and labels, and how they are read.

    Raises:
        DataError: it cannot be read, its lines differ in length, or what `Table` refuses; a cell is named by its line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV file: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty")
    plain = any(_is_image(cell) or _number(cell) is not None for cell in lines[0])
    names = [str(i) for i in range(len(lines[0]))] if plain else lines[0]
    if len(set(names)) < len(names):
        raise DataError(f"{path} has columns of the same name: {', '.join(names)}")
    first = 1 if plain else 2  # the number of the first line with data
    cells = lines[first - 1 :]
    uneven = next((i for i, line in enumerate(cells) if len(line) != len(names)), None)
    if uneven is not None:
        raise DataError(
            f"line {uneven + first} of {path} has {len(cells[uneven])} cells; there are {len(names)} columns"
        )
    columns = {
        name: _csv_column(path, name, [line[i] for line in cells], first) for i, name in enumerate(names)
    }
    return Table(columns, len(cells), options, str(path))


def _csv_column(path: Path, name: str, cells: list[str], first: int) -> Column:
    if cells and _is_image(cells[0]):
        return Column("image", lambda rows: [path.parent / cells[row] for row in rows])
    if not cells or _number(cells[0]) is None:
        return Column("other", lambda rows: [cells[row] for row in rows])

    def numbers(rows: Rows) -> Tensor:
        found = [_number(cells[row]) for row in rows]
        if None in found:
            row = rows[found.index(None)]
            raise DataError(f"line {row + first} of {path}: {cells[row]!r} in column {name!r} is no number")
        return torch.tensor(found, dtype=torch.get_default_dtype())

    return Column("number", numbers)


def _is_image(cell: str) -> bool:
    return cell.lower().endswith(SUFFIXES)


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _together(numbers: list[Tensor], labels: bool = False) -> Tensor:
    """Columns of numbers as one tensor: a single one as it is, several side by side."""
    if len(numbers) == 1 and (numbers[0].dim() > 1 or (labels and not numbers[0].is_floating_point())):
        return numbers[0]
    return torch.cat([n.reshape(len(n), -1).to(torch.get_default_dtype()) for n in numbers], 1)
