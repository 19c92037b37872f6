"""Which of a model's outputs is supervised."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxinvert.errors import TraceError


def supervised(values: Any, output: int | str | None) -> Tensor:
    """The one output that is supervised.

    Raises:
        TraceError: there are several and none is named, or there is no such output.
    """
    chosen = chosen_output(values, output)
    return values if chosen is None else values[chosen]  # type: ignore[no-any-return]


def chosen_output(values: Any, output: int | str | None) -> int | str | None:
    """Index or key of the supervised output; None where the model returns a single tensor.

    Raises:
        TraceError: there are several and none is named, or there is no such output.
    """
    if isinstance(values, Tensor):
        if output not in (None, 0):
            raise TraceError(f"the model has no output {output!r}; it returns a single tensor")
        return None
    tensors = [name for name in _names(values) if isinstance(values[name], Tensor)]
    if not tensors:
        raise TraceError(
            f"the model returns {type(values).__name__}; a tensor, or a tuple, list or dict of tensors is needed"
        )
    listed = ", ".join(map(repr, tensors))
    if output is None and len(tensors) > 1:
        raise TraceError(
            f"the model returns {len(tensors)} outputs ({listed}); "
            f"name the one that the labels are for, e.g. output={tensors[0]!r}"
        )
    chosen = tensors[0] if output is None else output
    if chosen not in tensors:
        raise TraceError(f"the model has no output {chosen!r}; it returns {listed}")
    return chosen


def _names(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return list(values)
    return list(range(len(values))) if isinstance(values, tuple | list) else []
