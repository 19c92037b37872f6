"""Inputs: how a model is called, and the flat list of tensors that its graph takes instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxinvert.errors import TraceError


@dataclass(frozen=True)
class Inputs:
    """How a model is called: what is given by position and by name, how it nests, and what is a tensor.

    Attributes:
        names: of the tensors, in order; the graph's inputs.
        form: `(args, kwargs)` without their leaves.
        constants: the leaves, with the class `Tensor` in place of every tensor.
    """

    names: tuple[str, ...]
    form: pytree.TreeSpec
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, forward: Callable[..., Any], example: Any) -> Inputs:
        """The form of an example: a tensor, a tuple of what is given by position, or a mapping of what is by name.

        Raises:
            TraceError: `forward` does not take such inputs, or they hold no tensor.
        """
        arguments = _arguments(example)
        leaves, form = pytree.tree_flatten(arguments)
        names = [name for name, leaf in zip(_names(forward, *arguments), leaves, strict=True)]
        tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        if not any(tensors):
            raise TraceError("example_inputs holds no tensor; torch.as_tensor makes one of an array")
        return cls(
            tuple(name for name, tensor in zip(names, tensors, strict=True) if tensor),
            form,
            tuple(Tensor if tensor else leaf for leaf, tensor in zip(leaves, tensors, strict=True)),
        )

    def tensors(self, inputs: Any) -> tuple[Tensor, ...]:
        """The tensors of inputs of this form, in order.

        Raises:
            TraceError: the inputs have another form.
        """
        leaves, form = pytree.tree_flatten(_arguments(inputs))
        if form != self.form or [isinstance(leaf, Tensor) for leaf in leaves] != self._are_tensors:
            raise TraceError(
                f"the model takes {self}, as it was traced; it was given {_described(form, leaves)}"
            )
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def arguments(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, by position and by name, with these values in place of the tensors."""
        given = iter(values)
        leaves = [next(given) if leaf is Tensor else leaf for leaf in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return args, kwargs

    def __str__(self) -> str:
        return _described(self.form, self.constants)

    @property
    def _are_tensors(self) -> list[bool]:
        return [leaf is Tensor for leaf in self.constants]


class Flat(nn.Module):
    """A model as a function of a flat list of tensors that returns what `choose` takes of its result.

    Args:
        model: the model.
        inputs: how it is called.
        choose: what is taken of its result.
        within: opens the context that it runs in.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        choose: Callable[[Any], Any],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.choose, self.within = model, inputs, choose, within

    def forward(self, *values: Any) -> Any:
        args, kwargs = self.inputs.arguments(values)
        with self.within():
            return self.choose(self.model(*args, **kwargs))


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _names(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """A name for every leaf: the argument's, followed by the keys that lead to the leaf.

    Raises:
        TraceError: the function takes fewer inputs, or needs more.
    """
    for name, value in zip(
        _argument_names(forward, len(args), kwargs), (*args, *kwargs.values()), strict=True
    ):
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            yield "_".join((name, *(_key(key) for key in path)))


def _key(key: Any) -> str:
    """The key of a mapping, the index in a sequence or the field of a named tuple."""
    kind = next(kind for kind in ("key", "idx", "name") if hasattr(key, kind))
    return str(getattr(key, kind))


def _argument_names(forward: Callable[..., Any], count: int, kwargs: dict[str, Any]) -> list[str]:
    parameters = inspect.signature(forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p.name for p in parameters if p.kind == p.VAR_POSITIONAL]
    names = positional[:count]
    if rest:
        names += [f"{rest[0]}_{i}" for i in range(count - len(names))]
    if len(names) < count:
        raise TraceError(f"the model takes {len(names)} inputs; {count} were given")
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in kwargs if not anything and (name not in known or name in names)]
    if unknown:
        raise TraceError(f"the model takes no input {unknown[0]!r}; it takes {', '.join(known)}")
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [p.name for p in needed if p.name not in (*names, *kwargs)]
    if missing:
        raise TraceError(
            f"the model needs an input {missing[0]!r}; example_inputs has {count + len(kwargs)} inputs "
            "and none left for it"
        )
    return [*names, *kwargs]


def _described(form: pytree.TreeSpec, leaves: Any) -> str:
    words = ["tensor" if leaf is Tensor or isinstance(leaf, Tensor) else _word(leaf) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(words, form)
    return f"({', '.join([*map(str, args), *(f'{k}={v}' for k, v in kwargs.items())])})"


def _word(constant: Any) -> str:
    """A constant as code, if that is short; else what it is."""
    text = repr(constant)
    return text if len(text) <= 40 and "\n" not in text else type(constant).__name__
