"""Weight files: read without running any code of theirs, and fitted to the model exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxinvert.content import tensors_of
from fxinvert.errors import DataError

#: where checkpoints keep the weights, next to optimizers and counters
INSIDE = ("state_dict", "model_state_dict", "model")

SHOWN = 6


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts the weights of a file into a model, all of them or none.

    Names and shapes must be exactly the model's. A parameter with several names (tied) needs one of them, the prefix
    `module.` that `DataParallel` adds is dropped, and the counters of batch norm may be missing.

    Args:
        model: changed in place.
        path: see `read_weights`.

    Raises:
        DataError: the file cannot be read, or does not fit; the message says which names and shapes.
    """
    given = _without_prefix(read_weights(path), model)
    own = tensors_of(model)
    reached = {id(own[name]) for name in given if name in own}
    missing = [
        name
        for name, value in own.items()
        if name not in given and id(value) not in reached and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in given if name not in own]
    misshapen = [
        f"{name} is {_shape(value)}, the model's {_shape(own[name])}"
        for name, value in given.items()
        if name in own and value.shape != own[name].shape
    ]
    problems = [
        f"{words}: {_listed(names)}"
        for words, names in (
            ("missing in the file", missing),
            ("not in the model", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise DataError(f"the weights {path} do not fit {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(given, strict=False)  # stricter than strict: checked above


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU.

    Args:
        path: `.safetensors`; or `.pt`, `.pth` with a state dict, or a dict that holds one under `state_dict`.

    Raises:
        DataError: no such file, another kind of file, damaged, or it holds more than tensors.
    """
    if not path.is_file():
        raise DataError(f"the weights {path} are not there" if not path.exists() else f"{path} is no file")
    match path.suffix.lower():
        case ".safetensors":
            return _safetensors(path)
        case ".pt" | ".pth":
            return _pickled(path)
        case other:
            raise DataError(
                f"weights are read from .safetensors, .pt and .pth files, not {other or 'no suffix'}: {path}"
            )


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        # the library takes only names in UTF-8
        return dict(load(path.read_bytes()) if is_raw(path) else load_file(path))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or no safetensors file: {error}") from error


def is_raw(path: Path) -> bool:
    """Whether a path holds bytes that are not UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is damaged, or holds more than tensors, which is not loaded as it could run code ({first}). "
            "Save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    for key in INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{path} holds {type(content).__name__}, not a state dict (tensors by name)")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise DataError(
            f"{path} is no state dict: {_listed(others)} are no tensors; the weights are looked for under "
            f"{', '.join(map(repr, INSIDE))}, or as the whole file"
        )
    return dict(content)


def _without_prefix(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    prefix = "module."
    if all(name.startswith(prefix) for name in given) and not hasattr(model, "module"):
        return {name.removeprefix(prefix): value for name, value in given.items()}
    return given


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"
