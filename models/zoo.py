"""The reference networks by name, with weights in two states: stopped early, and fully trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fxinvert.errors import DataError
from fxinvert.models.networks import digits_cnn, digits_mlp

NETWORKS: dict[str, Callable[[], nn.Module]] = {"digits_cnn": digits_cnn, "digits_mlp": digits_mlp}
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
        model = NETWORKS[name]()
    model.to_empty(device="cpu").load_state_dict(load_file(file), strict=True)
    return model.eval()


def card(name: str, state: str = "converged") -> dict[str, Any]:
    """How the weights were made and how good they are, as `fxinvert.models.train` noted it in the file."""
    with safe_open(_shipped(name, state), framework="pt") as file:
        noted: dict[str, Any] = json.loads(file.metadata()[CARD_KEY])
    return noted


def file_name(name: str, state: str) -> str:
    """The name of the file with these weights; DataError if there is no such network or no such state."""
    if name not in NETWORKS:
        raise DataError(f"no reference network is called {name!r}; there are: {', '.join(NETWORKS)}")
    if state not in STATES:
        raise DataError(f"{name} has no weights in the state {state!r}; there are: {', '.join(STATES)}")
    return f"{name}_{state}.safetensors"


def _shipped(name: str, state: str) -> Path:
    file = FOLDER / file_name(name, state)
    if not file.is_file():
        raise DataError(f"the weights {file} are missing; make them with: python -m fxinvert.models.train")
    return file
