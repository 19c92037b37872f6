"""Copies of the user's model: it is never changed itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxinvert.errors import DataError
from fxinvert.passes.capture import attribute
from fxinvert.result import Record
from fxinvert.training.context import State


def copy_of(model: nn.Module) -> nn.Module:
    """A copy.

    Raises:
        DataError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        computed = [
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        raise DataError(
            f"{type(model).__name__} cannot be copied ({str(error).split('. ')[0].strip('. ')}): "
            f"{', '.join(computed) or 'something on it'} is computed from other tensors. Where a hook does that, make it a "
            "parameter: torch.nn.utils.prune.remove(module, name) after pruning (keep_zeros=True keeps what was pruned), "
            "torch.nn.utils.remove_weight_norm(module) or torch.nn.utils.parametrizations.weight_norm; anything else "
            "keep detached"
        ) from error


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
