"""What a file keeps weights in: initializers and constants, each with the nodes that use it."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxinvert.errors import DataError
from fxinvert.export.annotate import SCOPES
from fxinvert.export.compare import Array
from fxinvert.export.forms import Form

#: relative difference within which a folded weight counts as the same: it was computed by somebody else, in float32
FOLDED = 1e-4
#: prefixes that wrappers put before the names of weights
WRAPPERS = ("model.", "module.", "_orig_mod.")


@dataclass(frozen=True)
class Carrier:
    """A tensor of a file.

    Attributes:
        value: the `onnx_ir.Value`.
        array: what it holds.
        graph: the graph or function that it is in.
    """

    value: Any
    array: Array
    graph: Any

    @property
    def name(self) -> str:
        """Its name in the file."""
        return str(self.value.name)

    def write(self, array: Array) -> None:
        """Put other numbers of the same type and shape in its place."""
        import onnx_ir

        tensor = onnx_ir.tensor(np.ascontiguousarray(array), dtype=self.value.const_value.dtype)
        tensor.name = self.name
        producer = self.value.producer()
        if producer is None:
            self.value.const_value = tensor
        else:
            producer.attributes["value"] = onnx_ir.AttrTensor("value", tensor)

    def split(self, uses: Sequence[tuple[Any, int]], array: Array, number: int) -> None:
        """Give some of its uses an initializer of their own, with other numbers."""
        import onnx_ir

        tensor = onnx_ir.tensor(np.ascontiguousarray(array), dtype=self.value.const_value.dtype)
        own = onnx_ir.Value(name=f"{self.name}_{number}", const_value=tensor)
        own.shape, own.type = self.value.shape, self.value.type
        tensor.name = own.name
        self.graph.register_initializer(own)
        for node, index in uses:
            node.replace_input_with(index, own)


@dataclass(frozen=True)
class Match:
    """A form that a carrier holds, and what it has to hold instead."""

    form: Form
    array: Array


def carriers_of(model: Any) -> Iterator[Carrier]:
    """The floating-point tensors of a file that are more than a number, in its graphs and functions."""
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    for graph in graphs:
        constants = [
            node.outputs[0] for node in graph if node.op_type == "Constant" and "value" in node.attributes
        ]
        for value in [*getattr(graph, "initializers", {}).values(), *constants]:
            tensor = value.const_value
            if tensor is None and value.producer() is not None:
                tensor = value.const_value = value.producer().attributes["value"].value
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype.itemsize >= 2:
                yield Carrier(value, _array(tensor, str(value.name)), graph)


def matches(carrier: Carrier, forms: Sequence[Form]) -> list[Match]:
    """The forms that a carrier holds, in any order of axes and any shape; exact ones, or else computed ones."""
    found = [match for form in forms if form.exact for match in _match(carrier.array, form)]
    return found or [match for form in forms if not form.exact for match in _match(carrier.array, form)]


def chosen(carrier: Carrier, found: Sequence[Match]) -> list[tuple[Match, list[tuple[Any, int]] | None]]:
    """Which of several forms is meant, for all uses (None) or for some.

    Forms of one value before may differ afterwards: biases that were all zero, weights that an optimizer has merged. The
    modules that the uses come from decide, or else the carrier's name.

    Raises:
        DataError: neither tells.
    """
    if _alike(found):
        return [(found[0], None)]
    decided: dict[str, tuple[Match, list[tuple[Any, int]]]] = {}
    for node, index in _uses(carrier.value):
        own = _of_node(node, found)
        if not own:
            break
        decided.setdefault(own[0].form.name, (own[0], []))[1].append((node, index))
    else:
        if decided:
            return [(match, uses if len(decided) > 1 else None) for match, uses in decided.values()]
    named = [match for match in found if _same_name(carrier.name, match.form.name)]
    if named and _alike(named):
        return [(named[0], None)]
    names = ", ".join(dict.fromkeys(repr(match.form.name) for match in found))
    raise DataError(
        f"{carrier.name!r} holds the original values of {names}, which now differ, and neither its name nor the nodes "
        "that use it tell which is meant"
    )


def _uses(value: Any) -> Iterator[tuple[Any, int]]:
    """The nodes that use a value and the numbers of their inputs; the older exporter hands merged weights on by Identity."""
    for node, index in value.uses():
        if node.op_type == "Identity" and not node.domain:
            yield from _uses(node.outputs[0])
        else:
            yield node, index


def _of_node(node: Any, found: Sequence[Match]) -> list[Match]:
    """The forms of the innermost module that a node comes from and that has any; none if they differ."""
    for path in _modules(node):
        here = [match for match in found if match.form.module == path]
        if here:
            return here if _alike(here) else []
    return []


def _match(array: Array, form: Form) -> Iterator[Match]:
    before = _numpy(form.before)
    if before.size != array.size or not array.size:
        return
    given = before.astype(array.dtype) if form.exact else before.astype(np.float64)
    tolerance = 0.0 if form.exact else FOLDED * float(np.abs(given).max())
    if max(abs(given.min() - array.min()), abs(given.max() - array.max())) > tolerance:  # a quick no
        return
    seen: list[Array] = []
    for order in itertools.permutations(range(given.ndim)) if given.ndim <= 4 else [tuple(range(given.ndim))]:
        moved = given.transpose(order).reshape(array.shape)
        same = np.array_equal(moved, array) if form.exact else np.abs(moved - array).max() <= tolerance
        if same:
            after = _numpy(form.after).transpose(order).reshape(array.shape).astype(array.dtype)
            if not any(np.array_equal(after, other) for other in seen):
                seen.append(after)
                yield Match(form, after)


def _alike(found: Sequence[Match]) -> bool:
    return all(np.array_equal(match.array, found[0].array) for match in found[1:])


def _same_name(own: str, name: str) -> bool:
    for prefix in WRAPPERS:
        own = own.removeprefix(prefix)
    return own == name


def _modules(node: Any) -> list[str]:
    """The paths of the modules that a node comes from, innermost first: torch's metadata, or the older exporter's names."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    found = [str(scope) for scope in reversed(scopes)] if isinstance(scopes, list) else []
    for prefix in WRAPPERS:
        found += [scope.removeprefix(prefix) for scope in found if scope.startswith(prefix)]
    path, paths = "", []
    for part in (node.name or "").split("/")[1:-1]:
        path = part if not path or part.startswith(f"{path}.") else f"{path}.{part}"
        paths.append(path)
    return found + paths[::-1]


def _array(tensor: Any, name: str) -> Array:
    try:
        found: Array = tensor.numpy()
    except Exception as error:
        raise DataError(f"the values of {name!r} cannot be read: {error}") from error
    return found


def _numpy(tensor: Any) -> Array:
    found: Array = tensor.detach().cpu().numpy()
    return found
