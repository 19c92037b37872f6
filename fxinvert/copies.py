"""Copies of the user's model: it is never changed itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fxinvert.errors import DataError
from fxinvert.passes.capture import attribute
from fxinvert.result import Record
from fxinvert.training.context import State


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy.

    Args:
        model: any module.
        memo: of `copy.deepcopy`: what takes the place of objects, by their ids.

    Raises:
        DataError: the model cannot be copied; the message names what on it cannot.
    """
    try:
        return copy.deepcopy(model, dict(memo or {}))
    except Exception as error:
        found = [
            (f"{prefix}.{name}".removeprefix("."), value)
            for prefix, module in model.named_modules()
            for name, value in {**vars(module), **module._buffers}.items()
            if name not in ("_parameters", "_buffers", "_modules") and not _copies(value)
        ]
        computed = ", ".join(name for name, value in found if isinstance(value, Tensor))
        others = ", ".join(
            f"{name} ({type(value).__name__})" for name, value in found if not isinstance(value, Tensor)
        )
        why = (
            f"{computed} is computed from other tensors. Where a hook does that, make it a parameter: "
            "torch.nn.utils.prune.remove(module, name) after pruning (keep_zeros=True keeps what was pruned), "
            "torch.nn.utils.remove_weight_norm(module) or torch.nn.utils.parametrizations.weight_norm; anything else keep detached"
        )
        if not computed:
            why = f"{others or 'something on it'}. Set it to None meanwhile, or leave it out in the __getstate__ of its class"
        raise DataError(
            f"{type(model).__name__} cannot be copied ({str(error).split('. ')[0].strip('. ')}): {why}"
        ) from error


def _copies(value: Any) -> bool:
    with suppress(Exception):
        copy.deepcopy(value)
        return True
    return False


def showing(watch: Callable[[Record, nn.Module], None], model: nn.Module) -> Callable[[Record, State], None]:
    """Shows states as models: copies of a model that have them."""

    def show(record: Record, state: State) -> None:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in state.items():
                attribute(copied, name).copy_(value)
        watch(record, copied)

    return show


def changed(before: nn.Module, after: nn.Module) -> tuple[str, ...]:
    """The names of parameters and buffers that differ."""
    pairs = [*before.named_parameters(), *before.named_buffers()]
    return tuple(name for name, value in pairs if not torch.equal(value, attribute(after, name)))
