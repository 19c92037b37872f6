"""A user's `Trainable`, whose answers are looked at before they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fxinvert.errors import FxInvertError, RuleError
from fxinvert.rules.op import Op
from fxinvert.rules.trainable import Trainable


class Checked(Trainable):
    """What another one gives; what training cannot use is refused by its name.

    Args:
        own: the user's.
        key: of the op.

    Raises:
        RuleError: in every method: `own` raised, or gave something else than `Trainable` asks for.
    """

    def __init__(self, own: Trainable, key: str) -> None:
        self.own, self._who = own, f"{type(own).__name__}, the trainable of the rule for {key!r}"

    def features(self, op: Op) -> Tensor:
        found, rows = self._rows("features", self.own.features, op), self.outputs(op, op.output)
        if found.shape[:2] != rows.shape[:2]:
            raise RuleError(
                f"{self._who}: features() gave {tuple(found.shape)} and outputs() {tuple(rows.shape)}, which are not equally "
                "many groups and rows"
            )
        return found

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return self._rows("outputs", self.own.outputs, op, value)

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        found = self._given(partial(self.own.changes, parameters, matrix), "changes")
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        got = {
            name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            for name, value in (found.items() if isinstance(found, Mapping) else [("", found)])
        }
        if any(shapes.get(name) != shape for name, shape in got.items()):
            listed = (f"{name or 'no mapping, but'} {shape}" for name, shape in got.items())
            raise RuleError(
                f"{self._who}: changes() gave {', '.join(listed)}; needed is a mapping of changes by the names and in the shapes "
                f"of its parameters: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
            )
        return dict(found)

    def _rows(self, what: str, make: Callable[..., Any], *arguments: Any) -> Tensor:
        found = self._given(partial(make, *arguments), what)
        if not isinstance(found, Tensor) or found.dim() != 3:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RuleError(
                f"{self._who}: {what}() gave {got}; a tensor (groups, rows, columns) is needed; a single group is value[None]"
            )
        return found

    def _given(self, make: Callable[[], Any], what: str) -> Any:
        try:
            return make()
        except FxInvertError:
            raise
        except Exception as error:
            raise RuleError(f"{self._who}: {what}() raised {type(error).__name__}: {error}") from error
