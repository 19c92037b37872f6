"""Causes: which op makes a model random, or its samples depend on one another, and where a graph parts from its model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxinvert.passes.capture import called_at
from fxinvert.passes.inputs import Flat
from fxinvert.passes.leaves import copied
from fxinvert.passes.spared import advice, sparing


@dataclass(frozen=True)
class Step:
    """What one op of a run gave: its name, the user's line, whether it drew random numbers, and the size of every row.

    `spared` has the optional inputs that would have kept the model from drawing.
    """

    op: str
    place: str | None
    random: bool
    spared: tuple[str, ...]
    shape: tuple[int, ...]
    rows: Tensor

    def __str__(self) -> str:
        return f"{self.op}, at {self.place}" if self.place else self.op


class _Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the steps of a run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.found: list[Step] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # also of attention, which only draws for dropout
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        before = _random_states() if seeded else []
        result = func(*args, **(kwargs or {}))
        drew = seeded and not all(map(torch.equal, before, _random_states()))
        spared = sparing(self.model) if drew else ()
        name = func.overloadpacket.__name__.removesuffix("_")
        for value in tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            if "empty" in name:  # what memory held tells nothing
                value.zero_()
            if value.is_floating_point() or drew:
                rows = value.double().reshape(value.shape[0] if value.dim() else 1, -1).norm(dim=1)
                self.found.append(Step(name, called_at(), drew, spared, tuple(value.shape), rows))
        return result


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _steps(model: Flat, inputs: tuple[Any, ...]) -> list[Step]:
    """The steps of a run; those up to where it fails, if it does."""
    steps = _Steps(model.model)
    with suppress(Exception), steps:
        model(*copied(inputs))
    return steps.found


def first_draw(model: Flat, inputs: tuple[Any, ...]) -> tuple[str, str]:
    """The first op that draws random numbers, and where, or in words that none was found; and which inputs would spare that."""
    draws = (step for step in _steps(model, inputs) if step.random)
    return next(((str(step), advice(step.spared)) for step in draws), ("an op that does not tell", ""))


def first_mix(model: Flat, inputs: tuple[Any, ...], one: tuple[Any, ...], number: int, size: int) -> str:
    """The first op whose result for a sample changes with the others, and where; or in words that none was found.

    Args:
        model: a function of tensors.
        inputs: a batch.
        one: one of its samples, alone.
        number: which.
        size: of the batch.
    """
    runs = [_steps(model, given) for given in (inputs, one)]
    counts = [Counter(map(str, steps)) for steps in runs]
    # what a run has more of than the other, as copies of what lies in memory otherwise, tells nothing
    alike = ([step for step in steps if counts[0][str(step)] == counts[1][str(step)]] for steps in runs)
    for step, alone in zip(*alike, strict=False):
        if str(step) != str(alone):
            break
        rows = step.rows
        if step.shape[:1] == (size * (alone.shape or (0,))[0],) and step.shape[1:] == alone.shape[1:]:
            rows = rows[number * alone.shape[0] :][: alone.shape[0]]
        elif step.shape != alone.shape:
            continue
        if not torch.allclose(rows, alone.rows, rtol=1e-3, atol=1e-6, equal_nan=True):
            return str(step)
    return "an op that does not tell"


def first_parting(
    flat: Flat, graph: fx.GraphModule, values: Mapping[fx.Node, Any], inputs: tuple[Any, ...]
) -> str | None:
    """The path of the first module whose result in a run is not what a graph has for it; None: none is.

    Args:
        flat: the model.
        graph: what was captured of it.
        values: of the graph's nodes, for the inputs.
        inputs: of the run.
    """
    gave: dict[str, Any] = {}

    def noted(path: str) -> Any:
        return lambda module, args, result: gave.setdefault(path, result)

    hooks = [module.register_forward_hook(noted(path)) for path, module in flat.model.named_modules()]
    with suppress(Exception):  # whatever the user's forward raises when it is run again
        flat(*copied(inputs))
    for hook in hooks:
        hook.remove()
    for node in graph.graph.nodes:
        path, ours = node.meta.get("path"), values.get(node)
        theirs = gave.get(path)
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            continue
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not torch.allclose(
            ours, theirs, rtol=1e-3, atol=1e-5, equal_nan=True
        ):
            return str(path)
    return None
