"""The reference networks by name, with weights in two states: stopped early, and fully trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fxinvert.errors import DataError
from fxinvert.models.attention import CharTransformer, DigitsViT
from fxinvert.models.dense import DigitsDenseNet
from fxinvert.models.driving import DrivingNet
from fxinvert.models.heads import DigitsTwoHead
from fxinvert.models.mixer import DigitsMixer
from fxinvert.models.mobile import DigitsMBConv
from fxinvert.models.networks import digits_cnn, digits_mlp
from fxinvert.models.recurrent import DigitsLSTM
from fxinvert.models.residual import DigitsResNet
from fxinvert.models.samples import Parts
from fxinvert.models.tasks import characters, digit_classes, digit_pixels, digit_queries, driving
from fxinvert.models.unet import DigitsUNet


class Reference(NamedTuple):
    """A network with fresh weights from torch's global generator, and what it is shown."""

    create: Callable[[], nn.Module]
    data: Callable[[], Parts]


NETWORKS = {
    "digits_cnn": Reference(digits_cnn, digit_classes),
    "digits_mlp": Reference(digits_mlp, digit_classes),
    "digits_resnet": Reference(DigitsResNet, digit_classes),
    "digits_mbconv": Reference(DigitsMBConv, digit_classes),
    "digits_densenet": Reference(DigitsDenseNet, digit_classes),
    "digits_vit": Reference(DigitsViT, digit_classes),
    "digits_mixer": Reference(DigitsMixer, digit_classes),
    "digits_lstm": Reference(DigitsLSTM, digit_classes),
    "digits_unet": Reference(DigitsUNet, digit_pixels),
    "digits_two_head": Reference(DigitsTwoHead, digit_queries),
    "char_transformer": Reference(CharTransformer, characters),
    "driving": Reference(DrivingNet, driving),
}
STATES = ("early", "converged")
FOLDER = Path(__file__).parent

# safetensors writes its metadata in no fixed order: a single key keeps the files the same byte for byte.
CARD_KEY = "fxinvert"


def available() -> list[tuple[str, str]]:
    """Every (name, state) that `load` takes, in a fixed order."""
    return [(name, state) for name in NETWORKS for state in STATES]


def load(name: str, state: str = "converged") -> nn.Module:
    """The network `name` with its shipped weights, in eval mode, on the CPU; draws no random numbers."""
    file = _shipped(name, state)
    with torch.device("meta"):
        model = NETWORKS[name].create()
    model.to_empty(device="cpu").load_state_dict(load_file(file), strict=True)
    return model.eval()


def create(name: str) -> nn.Module:
    """The network `name` with fresh weights from torch's global generator, in train mode, on the CPU."""
    return _known(name).create()


def data_of(name: str) -> Parts:
    """What the network `name` is trained, chosen and tested on; always the same samples, made or read anew."""
    return _known(name).data()


def card(name: str, state: str = "converged") -> dict[str, Any]:
    """How the weights were made and how good they are, as `fxinvert.models.train` noted it in the file."""
    with safe_open(_shipped(name, state), framework="pt") as file:
        noted: dict[str, Any] = json.loads(file.metadata()[CARD_KEY])
    return noted


def file_name(name: str, state: str) -> str:
    """The name of the file with these weights; DataError if there is no such network or no such state."""
    _known(name)
    if state not in STATES:
        raise DataError(f"{name} has no weights in the state {state!r}; there are: {', '.join(STATES)}")
    return f"{name}_{state}.safetensors"


def _known(name: str) -> Reference:
    if name not in NETWORKS:
        raise DataError(f"no reference network is called {name!r}; there are: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _shipped(name: str, state: str) -> Path:
    file = FOLDER / file_name(name, state)
    if not file.is_file():
        raise DataError(f"the weights {file} are missing; make them with: python -m fxinvert.models.train")
    return file
