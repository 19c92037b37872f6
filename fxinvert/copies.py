"""Copies of the user's model: it is never changed itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
        copied = copy.deepcopy(model, {**_computed(model), **(memo or {})})
    except Exception as error:
        found = ", ".join(
            f"{prefix}.{name} ({type(value).__name__})".removeprefix(".")
            for prefix, module in model.named_modules()
            for name, value in {**vars(module), **module._buffers}.items()
            if name not in ("_parameters", "_buffers", "_modules") and not _copies(value)
        )
        why = f"{found or 'something on it'}. Set it to None meanwhile, or leave it out in the __getstate__ of its class"
        raise DataError(
            f"{type(model).__name__} cannot be copied ({str(error).split('. ')[0].strip('. ')}): {why}"
        ) from error
    for module in copied.modules():
        # whose copies have plain tensors, which no capture takes for parameters
        if isinstance(module, torch.jit.ScriptModule):
            for name, value in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(value.detach(), requires_grad=value.requires_grad))
    return copied


def _computed(model: nn.Module) -> dict[int, Tensor]:
    """Tensors that a model holds and that were computed from others, as values: what makes them, as a hook does of weights
    under the deprecated weight norm or pruning, makes the copy's own when it runs."""
    held = tree_leaves([[vars(module), module._buffers] for module in model.modules()])
    return {
        id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf
    }


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
