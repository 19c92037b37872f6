"""Data named on the command line: files of arrays, a table, a folder of images, a dataset, or a factory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.sources.arrays import load_npz
from fxinvert.sources.cifar import cifar_files, load_cifar
from fxinvert.sources.factory import call_factory, is_factory
from fxinvert.sources.idx import idx_files, load_idx
from fxinvert.sources.images import ImageFolder
from fxinvert.sources.libraries import from_datasets, library_of
from fxinvert.sources.options import DataOptions
from fxinvert.sources.tables import load_csv
from fxinvert.training.batch import Arguments
from fxinvert.training.chunks import Shards, is_shards
from fxinvert.training.data import beginning_of, first_batch

Loader = Iterable[tuple[Any, Tensor]]


@dataclass(frozen=True)
class Data:
    """Data, ready to be iterated any number of times.

    Attributes:
        train: batches of (inputs, labels).
        test: batches that the source keeps for testing, if it does.
        classes: the names of the classes, where the source knows them.
    """

    train: Loader
    test: Loader | None = None
    classes: tuple[str, ...] | None = None

    def example_inputs(self, rows: int, device: str = "cpu") -> Arguments:
        """The inputs of the first samples, at most `rows` of them and of the first training batch.

        Raises:
            DataError: there is no batch, or it is none of inputs and labels.
        """
        return first_batch(beginning_of(self.train), "the data", rows, torch.device(device)).inputs


def load_data(spec: str, options: DataOptions | None = None, classes: tuple[str, ...] | None = None) -> Data:
    """Opens data; batches are read when they are iterated.

    Args:
        spec: an `.npz` file with x and y arrays; a `.csv` file of image paths and numbers; a folder of MNIST's IDX files,
            of CIFAR's batches, or of class folders of images; `datasets:DIR`; or `package.module:factory` of an iterable
            of (inputs, labels) batches that can be iterated more than once, or of a list of factories, one for each shard.
        options: how files are read; a factory's batches are taken as they are.
        classes: the class names in the order of their numbers, where other data has set it.

    Raises:
        DataError: it is not there, of no known kind, or damaged.
    """
    options = options or DataOptions()
    if library_of(spec, ("datasets",)):
        return Data(*from_datasets(spec, options))
    path = Path(spec)
    try:
        if path.is_dir():
            return _folder(path, options, classes)
    except OSError as error:
        raise DataError(f"the folder {path} cannot be read: {error}") from error
    if path.is_file():
        return _file(path, options)
    if is_factory(spec):
        return Data(_loader(spec))
    raise DataError(
        f"the data {spec!r} is not there; give an .npz or .csv file, a folder of images, datasets:DIR, or "
        "package.module:factory of a loader"
    )


def _folder(path: Path, options: DataOptions, classes: tuple[str, ...] | None) -> Data:
    if found := idx_files(path):
        return Data(*load_idx(path, found, options))
    batches = cifar_files(path)
    if any(batches):
        return Data(*load_cifar(path, batches, options))
    folder = ImageFolder(path, options, classes)
    return Data(folder, None, folder.classes)


def _file(path: Path, options: DataOptions) -> Data:
    match path.suffix.lower():
        case ".npz":
            return Data(*load_npz(path, options))
        case ".csv":
            return Data(load_csv(path, options))
    raise DataError(f"data is read from .npz and .csv files and from folders; {path} is neither")


def _loader(spec: str) -> Loader:
    loader = call_factory(spec, "data")
    if is_shards(loader):
        return Shards(loader)
    if isinstance(loader, Iterator):
        raise DataError(
            f"data {spec!r} gave {type(loader).__name__}, which can be iterated only once; give a list or a DataLoader"
        )
    if not isinstance(loader, Iterable):
        raise DataError(
            f"data {spec!r} gave {type(loader).__name__}; an iterable of (inputs, labels) batches is needed"
        )
    return loader
