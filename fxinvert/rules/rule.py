"""How one op is inverted."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op

if TYPE_CHECKING:
    from fxinvert.rules.branches import Branch
    from fxinvert.rules.trainable import Trainable

Invert = Callable[[Op, Tensor], Inverse | Tensor]


class Kind(enum.Enum):
    """How a rule finds its answer."""

    MOVES = "moves values"
    ELEMENTWISE = "monotone branches"
    AFFINE = "linear solve"
    CLOSED_FORM = "closed form"
    CUSTOM = "user rule"
    MATRIX_FREE = "matrix-free"


@dataclass(frozen=True)
class Rule:
    """How one op is inverted.

    Attributes:
        key: the op.
        invert: `(op, target) -> Inverse`, or the input's target alone, in which case its certificate is measured.
        kind: how the answer is found.
        trainable: how the op depends on its parameters, if it can be trained in closed form.
        reference: the source of the method, where it is not that of the rule's family (`families.py`).
        branches: of an entrywise op, the monotone branches that its inverse is found on.
        counts_axes: of a rule that moves values, whether it counts axes as the op does, and so needs the rows of the batch as
            they are. Others see what belongs to a sample as one row.
        origin: where the rule was written.
    """

    key: str
    invert: Invert
    kind: Kind
    trainable: Trainable | None = None
    reference: str = ""
    branches: Callable[[Op], tuple[Branch, ...]] | None = None
    counts_axes: bool = False

    @property
    def origin(self) -> str:
        """File and line of the rule's code."""
        code = inspect.unwrap(self.invert).__code__ if hasattr(self.invert, "__code__") else None
        return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(self.invert)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        from fxinvert.rules.registry import matrix_free, rule_named

        # a rule is code: it is pickled by name, like a function, and found again in the default set
        return (matrix_free if self.kind is Kind.MATRIX_FREE else rule_named), (self.key,)
