"""A model named on the command line: a factory, an exported program, or one of a library; weights; a device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fxinvert.errors import DataError
from fxinvert.sources.exported import load_exported
from fxinvert.sources.factory import call_factory, is_factory
from fxinvert.sources.libraries import MODELS, from_library, library_of
from fxinvert.sources.preprocessing import Preprocessing
from fxinvert.sources.weights import load_weights


def load_model(
    spec: str, weights: Path | None = None, device: str = "cpu", pretrained: bool = False
) -> nn.Module:
    """A model in eval mode, on its device; see `open_model`."""
    return open_model(spec, weights, device, pretrained)[0]


def open_model(
    spec: str, weights: Path | None = None, device: str = "cpu", pretrained: bool = False
) -> tuple[nn.Module, Preprocessing | None]:
    """A model in eval mode, on its device, and what it expects of its inputs, where that is known.

    Args:
        spec: `package.module:factory` of an `nn.Module` (the current folder is importable), a `.pt2` file that
            `torch.export.save` has written, `timm:NAME`, `torchvision:NAME`, or `transformers:DIR`.
        weights: a `.safetensors`, `.pt` or `.pth` file whose names and shapes are exactly the model's.
        device: as in torch, e.g. `"cpu"` or `"cuda:0"`.
        pretrained: of a library's model: whether to use the library's own weights, fetched where they are not here.

    Raises:
        DataError: no such model, it is no module, the weights do not fit, or the device is not there.
    """
    place = find_device(device)
    if weights is not None and not weights.is_file():  # before anything slow
        raise DataError(
            f"the weights {weights} are not there" if not weights.exists() else f"{weights} is no file"
        )
    library, expected = library_of(spec, tuple(MODELS)), None
    if pretrained and library is None:
        raise DataError(f"--pretrained is for models of {', '.join(MODELS)}, not for {spec!r}")
    if library is not None:
        model, expected = from_library(spec, pretrained)
    elif spec.endswith(".pt2"):
        model = load_exported(Path(spec))
    elif is_factory(spec):
        model = call_factory(spec, "model")
    else:
        raise DataError(
            f"model {spec!r}: write it as package.module:factory, e.g. my_package.networks:small_cnn; or give a .pt2 "
            "file, timm:NAME, torchvision:NAME or transformers:DIR"
        )
    if not isinstance(model, nn.Module):
        raise DataError(f"model {spec!r} gave {type(model).__name__}; a torch.nn.Module is needed")
    if weights is not None:
        load_weights(model, weights)
    for module in model.modules():  # exported programs refuse `eval()`
        module.training = False
    try:
        return model.to(place), expected
    except (RuntimeError, NotImplementedError) as error:  # out of memory, or parameters on "meta"
        raise DataError(f"model {spec!r} cannot be moved to {place}: {error}") from error


def find_device(name: str) -> torch.device:
    """The device with this name, after trying it.

    Raises:
        DataError: the name means nothing, or there is no such device here.
    """
    here = ", ".join(_devices())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"there is no device {name!r}; here are: {here}") from error
    if device.type == "meta":
        raise DataError(f"on device 'meta' nothing can be computed; here are: {here}")
    try:
        torch.zeros(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DataError(f"the device {name!r} is not there or does not work; here are: {here}") from error
    return device


def _devices() -> list[str]:
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found
