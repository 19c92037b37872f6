"""What a rule promises of its answer.

Every rule answers with an `Inverse`: the targets of the op's inputs and a `Certificate` that states, with numbers,
how good they are. Values of `Status` are sentences, ordered from the strongest promise to the weakest, so that the
status of many is the maximum of theirs.

Training asks for targets and never looks at certificates, so a certificate may be measured when somebody looks at it
(`Certificate.later`). It then measures the very answer that was given, or refuses.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.linalg.vectors import flat
from fxinvert.rules.op import Op


class Status(enum.Enum):
    """How an inverse was found; the value is the sentence shown to people."""

    PASSED_THROUGH = "passed through: the op only moves values, nothing had to be solved"
    EXACT = "exact: the target is reached"
    NEAREST = "nearest: the target is reached by the nearest of the inputs that do"
    LEAST_SQUARES = "least squares: no input reaches the target; the nearest of those that come closest"
    PROJECTED = (
        "projected: the target was outside the op's range and was moved to its nearest attainable value"
    )
    DAMPED = "damped: ill-conditioned; the correction was regularized, the target is approached"
    FAILED = "failed: no usable answer; these samples were left at their anchors"

    @property
    def severity(self) -> int:
        """Rank of the status, 0 for the strongest promise."""
        return list(Status).index(self)

    @property
    def word(self) -> str:
        """The status in one or two words, for tables."""
        return self.value.split(":")[0]


@dataclass(frozen=True)
class Certificate:
    """What one inversion of a batch achieved.

    Attributes:
        status: the weakest status among the samples.
        residual: `(B,)` relative residual per sample, ‖f(x*) − t‖ / ‖t‖ (absolute where t = 0); nothing where failed.
        distance: `(B,)` distance moved per sample, ‖x* − x0‖.
        damping: the largest λ used (0 where nothing was damped).
        iterations: the largest number of iterations used by an iterative solver (0 for direct ones).
        projected: number of target values that lay outside the op's range.
        failed: `(B,)` mask of the samples that were left at their anchors.
        condition: condition number (largest over smallest retained singular value), where it is known.
        reason: why a target is not reached, where that is known.
    """

    status: Status
    residual: Tensor
    distance: Tensor
    failed: Tensor
    # factories: a plain default would be found in the class, and hide that nothing has been measured yet
    damping: float = field(default_factory=float)
    iterations: int = field(default_factory=int)
    projected: int = field(default_factory=int)
    condition: float | None = field(default_factory=lambda: None)
    reason: str = field(default_factory=str)

    @classmethod
    def later(cls, measure: Callable[[], Certificate], *held: Tensor) -> Certificate:
        """A certificate that is measured, once, when it is first looked at, copied or pickled.

        Until then it keeps alive what `measure` refers to.

        Args:
            measure: returns the facts.
            *held: the tensors that it reads. If one of them is changed in place before, there is nothing left to
                measure, and looking raises `DataError`. Changes that torch does not count (through `.data`, or numpy) go
                unnoticed.
        """
        if any(tensor.is_inference() for tensor in held):  # torch does not count their changes
            return measure()
        certificate = cls.__new__(cls)
        versions = [tensor._version for tensor in held]
        certificate.__dict__["_measure"] = lambda: _unchanged(measure, held, versions)
        return certificate

    @property
    def is_measured(self) -> bool:
        """Whether the numbers are there; otherwise looking at one of them measures all."""
        return "_measure" not in self.__dict__

    def measured(self) -> Certificate:
        """This certificate, with its numbers.

        Raises:
            DataError: what it was to be measured on has been changed in place since.
        """
        measure = self.__dict__.get("_measure")
        if measure is not None:
            # two threads may both measure, and find the same
            self.__dict__.update(measure().__dict__)
            self.__dict__.pop("_measure", None)
        return self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Called for what is not there."""
            if name not in _FIELDS or self.is_measured:
                raise AttributeError(f"a certificate has no attribute {name!r}")
            return getattr(self.measured(), name)

    def __getstate__(self) -> dict[str, Any]:
        return self.measured().__dict__

    def __str__(self) -> str:
        parts = [
            self.status.word,
            f"residual {self._worst(self.residual):.1e}",
            f"distance {self._worst(self.distance):.1e}",
        ]
        if self.damping:
            parts.append(f"damping {self.damping:.1e}")
        if self.iterations:
            parts.append(f"{self.iterations} iterations")
        if self.projected:
            parts.append(f"{self.projected} values projected")
        if bool(self.failed.any()):
            parts.append(f"{int(self.failed.sum())} samples failed")
        if self.reason:
            parts.append(self.reason)
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON-ready numbers (worst of the samples that have not failed)."""
        return {
            "status": self.status.word,
            "residual": self._worst(self.residual),
            "distance": self._worst(self.distance),
            "damping": self.damping,
            "iterations": self.iterations,
            "projected": self.projected,
            "failed": int(self.failed.sum()),
            "condition": self.condition,
            "reason": self.reason,
        }

    def _worst(self, values: Tensor) -> float:
        """The largest value; a failed sample has none."""
        counted = values[~self.failed]
        return float(counted.max()) if counted.numel() else 0.0


_FIELDS = frozenset(entry.name for entry in dataclasses.fields(Certificate))


class Inverse(NamedTuple):
    """The answer of a rule: the input's target (one per unknown input) and its certificate."""

    target: Tensor
    certificate: Certificate


def row_norms(value: Tensor) -> Tensor:
    """Euclidean norm of every sample: `(B, …)` → `(B,)`; computed in float32 at least."""
    working = torch.promote_types(value.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(flat(value), dim=1, dtype=working)
    return norms


def apart(value: Tensor, other: Tensor) -> Tensor:
    """value − other, 0 where they are the same: infinite values, as of scores that a mask hides, have no difference."""
    return torch.where(value == other, 0, value - other)


def relative(error: Tensor, reference: Tensor) -> Tensor:
    """‖error‖ / ‖reference‖ per sample, ‖error‖ where the reference is zero; `(B, …)` → `(B,)`.

    Infinite values of the reference do not count.
    """
    scale = row_norms(torch.where(torch.isinf(reference), 0, reference))
    return row_norms(error) / torch.where(scale > 0, scale, torch.ones_like(scale))


def reached(residual: Tensor, dtype: torch.dtype) -> bool:
    """Whether every target is reached, to half of the digits: what a solve may lose to conditioning."""
    return bool((residual <= torch.finfo(dtype).eps ** 0.5).all())


def certified(
    op: Op,
    target: Tensor,
    value: Tensor,
    facts: Callable[[Tensor], dict[str, Any]] | Status,
    total: float | None = None,
) -> Inverse:
    """An answer with its certificate, which is measured on it when somebody looks.

    Args:
        op: the op, of one anchor.
        target: `(B, …)`.
        value: the answer.
        facts: what else the certificate says (its status at least), from f(x*); or the status where the target is
            reached, which is least squares where it is not.
        total: a number that is finite only if all entries of target and answer are, if one is known.
    """

    def measure() -> Certificate:
        found = op(value)
        residual = relative(apart(found, target), target)
        if isinstance(facts, Status):
            told: dict[str, Any] = {
                "status": facts if reached(residual, target.dtype) else Status.LEAST_SQUARES
            }
        else:
            told = facts(found)
        told = {"residual": residual, "failed": torch.zeros_like(residual, dtype=torch.bool)} | told
        return Certificate(distance=row_norms(apart(value, op.anchor)), **told)

    certificate = Certificate.later(measure, *_read(op, target, value))
    if total is not None:
        certificate.__dict__["_total"] = total
    return Inverse(value, certificate)


def passed_through(target: Tensor, anchor: Tensor) -> Inverse:
    """The inverse of an op that only moves values: nothing to solve, no residual."""

    def measure() -> Certificate:
        zeros = torch.zeros_like(row_norms(target))
        none = torch.zeros_like(zeros, dtype=torch.bool)
        return Certificate(Status.PASSED_THROUGH, zeros, row_norms(apart(target, anchor)), none)

    return Inverse(target, Certificate.later(measure, target, anchor))


def _read(op: Op, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All that a certificate is measured on."""
    return (*tensors, op.output, *op.anchors.values(), *op.parameters.values())


def _unchanged(
    measure: Callable[[], Certificate], held: tuple[Tensor, ...], versions: list[int]
) -> Certificate:
    if [tensor._version for tensor in held] != versions:
        raise DataError(
            "a certificate is measured when it is first looked at, and by now a tensor that it is measured on (the "
            "op's input, output, parameters, target or answer) has been changed in place; look at it before that, or "
            "call its measured()"
        )
    with torch.no_grad():
        return measure()
