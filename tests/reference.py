"""The reference networks by name, with their samples, read once."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from fxinvert import models

NAMES = [
    "digits_cnn",
    "digits_mlp",
    "digits_resnet",
    "digits_mbconv",
    "digits_densenet",
    "digits_vit",
    "digits_mixer",
    "digits_lstm",
    "digits_unet",
    "digits_two_head",
    "char_transformer",
    "driving",
]


@cache
def parts_of(name: str) -> models.Parts:
    """The samples of a network."""
    return models.data_of(name)


def inputs_of(name: str, count: int) -> tuple[Tensor, ...]:
    """The first inputs of a network's test part, each `(count, …)`."""
    return tuple(values[:count] for values in parts_of(name).test.inputs)
