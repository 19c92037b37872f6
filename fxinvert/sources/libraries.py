"""Models and data by way of other libraries, used if they are installed: timm, torchvision, transformers, datasets."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor, nn

from fxinvert.errors import DataError
from fxinvert.sources.options import DataOptions
from fxinvert.sources.preprocessing import Preprocessing
from fxinvert.sources.tables import Column, Rows, Table

#: splits of a dataset that are taken to test on, the first that is there
TESTS = ("test", "validation")


def library_of(spec: str, known: Sequence[str]) -> str | None:
    """Which library a name such as `timm:resnet18` is for; None: it is none of those."""
    name, colon, _ = spec.partition(":")
    return name if colon and name in known else None


def from_library(spec: str, pretrained: bool) -> tuple[nn.Module, Preprocessing | None]:
    """A model of timm, torchvision or transformers, and what it expects of its inputs, where that is known.

    Args:
        spec: `timm:NAME`, `torchvision:NAME`, either with arguments as in `timm:resnet18?num_classes=10`; or
            `transformers:DIR`.
        pretrained: whether to use the library's own weights, which it fetches where it has to. Nothing is fetched
            otherwise.

    Raises:
        DataError: the library is not installed, knows no such model, or refuses the arguments.
    """
    source, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    module, make = _library(source, spec), MODELS[source]
    try:
        return make(module, name, {key: _value(text) for key, text in parse_qsl(query)}, pretrained)
    except DataError:
        raise
    except Exception as error:  # whatever a library raises on a name it does not know, or without a network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"model {spec!r}: {source} says {type(error).__name__}: {reason}") from error


Found = tuple[nn.Module, Preprocessing | None]


def _timm(timm: Any, name: str, arguments: dict[str, Any], pretrained: bool) -> Found:
    model = timm.create_model(name, pretrained=pretrained, **arguments)
    told = timm.data.resolve_model_data_config(model)
    return model, Preprocessing(tuple(told["mean"]), tuple(told["std"]), tuple(told["input_size"][1:]))


def _torchvision(torchvision: Any, name: str, arguments: dict[str, Any], pretrained: bool) -> Found:
    models = torchvision.models
    if not pretrained:
        return models.get_model(name, weights=None, **arguments), None
    weights = models.get_model_weights(name).DEFAULT
    told = weights.transforms()
    size = tuple(told.crop_size * 2)[:2] if hasattr(told, "crop_size") else None
    expected = Preprocessing(tuple(told.mean), tuple(told.std), size) if hasattr(told, "mean") else None
    return models.get_model(name, weights=weights, **arguments), expected


def _transformers(transformers: Any, name: str, arguments: dict[str, Any], pretrained: bool) -> Found:
    if not pretrained and not Path(name).is_dir():
        raise DataError(
            f"model 'transformers:{name}': there is no folder {name}; --pretrained would fetch it by that name"
        )
    local = {"local_files_only": not pretrained}
    config = transformers.AutoConfig.from_pretrained(name, **local, **arguments)
    kinds = config.architectures or []
    if not kinds or not hasattr(transformers, kinds[0]):
        raise DataError(
            f"model 'transformers:{name}': its config.json names no model of transformers: {kinds}"
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False  # caches are no answers
    model = getattr(transformers, kinds[0]).from_pretrained(name, config=config, **local)
    return model, _processor(Path(name) / "preprocessor_config.json")


MODELS: dict[str, Callable[[Any, str, dict[str, Any], bool], Found]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _processor(path: Path) -> Preprocessing | None:
    """What an image processor of transformers does."""
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    size = told.get("crop_size") or told.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    both = (size, size) if isinstance(size, int) else size
    if not told.get("do_normalize", True) or "image_mean" not in told:
        return Preprocessing((), (), both)
    return Preprocessing(tuple(told["image_mean"]), tuple(told["image_std"]), both)


def from_datasets(spec: str, options: DataOptions) -> tuple[Table, Table | None]:
    """The training split of a dataset on disk, and its test split if it has one.

    Args:
        spec: `datasets:DIR`, a folder that `save_to_disk` of datasets has written.
        options: which columns are inputs and labels, and how they are read.

    Raises:
        DataError: datasets is not installed, or the folder is not such a one.
    """
    path = Path(spec.partition(":")[2])
    datasets = _library("datasets", spec)
    if not path.is_dir():
        raise DataError(f"data {spec!r}: there is no folder {path}")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library raises on a damaged folder
        raise DataError(
            f"data {spec!r}: {path} is none that Dataset.save_to_disk has written: {error}"
        ) from error
    if not isinstance(found, dict):
        return _table(datasets, found, options, str(path)), None
    if "train" not in found:
        raise DataError(f"data {spec!r} has the splits {', '.join(found)}; one called train is needed")
    test = next((found[name] for name in TESTS if name in found), None)
    train = _table(datasets, found["train"], options, f"{path}, train")
    return train, None if test is None else _table(datasets, test, options, f"{path}, test")


def _table(datasets: Any, dataset: Any, options: DataOptions, name: str) -> Table:
    columns = {}
    for key, feature in dataset.features.items():
        read = partial(_cells, dataset.select_columns([key]), key)
        if isinstance(feature, datasets.Image):
            columns[key] = Column("image", read)
        elif _holds_numbers(datasets, feature):
            columns[key] = Column("number", partial(_tensor, read, f"column {key!r} of {name}"))
        else:
            columns[key] = Column("other", read)
    return Table(columns, len(dataset), options, name)


def _cells(dataset: Any, key: str, rows: Rows) -> Any:
    return dataset[list(rows)][key]


def _holds_numbers(datasets: Any, feature: Any) -> bool:
    while hasattr(feature, "feature"):  # a list of something
        feature = feature.feature
    kind = getattr(feature, "dtype", "")
    return isinstance(feature, datasets.ClassLabel) or kind.startswith(("int", "uint", "float"))


def _tensor(read: Callable[[Rows], Any], what: str, rows: Rows) -> Tensor:
    try:
        array = np.asarray(read(rows))
    except ValueError as error:
        raise DataError(f"{what} holds rows of different lengths") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} has rows without a number")
    return torch.from_numpy(array).to(torch.int64 if array.dtype.kind in "iu" else torch.get_default_dtype())


def _library(name: str, spec: str) -> Any:
    """A library, if it is installed."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a library that does not fit the torch that is here can raise anything
        raise DataError(
            f"{spec!r} needs {name}, which cannot be imported ({error}); install it with: pip install {name}"
        ) from error
    if module.__file__ is None:  # a folder of the user's of the same name
        raise DataError(f"{spec!r} needs {name}, which is not installed: pip install {name}")
    return module


def _value(text: str) -> Any:
    """An argument as Python writes it; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
