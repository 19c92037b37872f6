"""What a rule promises of its answer.

Every rule answers with an `Inverse`: the targets of the op's inputs and a `Certificate` that states, with numbers,
how good they are. Values of `Status` are sentences, ordered from the strongest promise to the weakest, so that the
status of many is the maximum of theirs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.operators import flat


class Status(enum.Enum):
    """How an inverse was found; the value is the sentence shown to people."""

    PASSED_THROUGH = "passed through: the op only moves values, nothing had to be solved"
    EXACT = "exact: the target is reached"
    NEAREST = "nearest: the target is reached by the nearest of the inputs that do"
    LEAST_SQUARES = "least squares: no input reaches the target; the nearest of those that come closest"
    PROJECTED = (
        "projected: the target was outside the op's range and was moved to its nearest attainable value"
    )
    DAMPED = (
        "damped: ill-conditioned; the correction was regularized or stopped early, the target is approached"
    )
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
    """

    status: Status
    residual: Tensor
    distance: Tensor
    failed: Tensor
    damping: float = 0.0
    iterations: int = 0
    projected: int = 0
    condition: float | None = None

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
        }

    def _worst(self, values: Tensor) -> float:
        """The largest value; a failed sample has none."""
        counted = values[~self.failed]
        return float(counted.max()) if counted.numel() else 0.0


class Inverse(NamedTuple):
    """The answer of a rule: the input's target (one per unknown input) and its certificate."""

    target: Tensor
    certificate: Certificate


def row_norms(value: Tensor) -> Tensor:
    """Euclidean norm of every sample: `(B, …)` → `(B,)`; computed in float32 at least."""
    working = torch.promote_types(value.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(flat(value), dim=1, dtype=working)
    return norms


def relative(error: Tensor, reference: Tensor) -> Tensor:
    """‖error‖ / ‖reference‖ per sample, ‖error‖ where the reference is zero; `(B, …)` → `(B,)`."""
    scale = row_norms(reference)
    return row_norms(error) / torch.where(scale > 0, scale, torch.ones_like(scale))


def passed_through(target: Tensor, anchor: Tensor) -> Inverse:
    """The inverse of an op that only moves values: nothing to solve, no residual."""
    zeros = torch.zeros_like(row_norms(target))
    certificate = Certificate(
        Status.PASSED_THROUGH, zeros, row_norms(target - anchor), torch.zeros_like(zeros, dtype=torch.bool)
    )
    return Inverse(target, certificate)


def keep_failed_at_anchor(inverse: Inverse, anchor: Tensor, target: Tensor) -> Inverse:
    """Leaves every sample with a non-finite target or answer at its anchor, and says so in the certificate."""
    certificate = inverse.certificate
    # where the norms are finite, so is everything; one that overflows is looked at more closely
    if bool(torch.isfinite(certificate.distance + certificate.residual + row_norms(target)).all()):
        failed = certificate.failed
    else:
        finite = flat(torch.isfinite(inverse.target)).all(1) & flat(torch.isfinite(target)).all(1)
        failed = certificate.failed | ~finite
    if not bool(failed.any()):
        return inverse
    rows = failed.reshape(-1, *[1] * (anchor.dim() - 1))
    certificate = replace(
        certificate,
        status=Status.FAILED,
        failed=failed,
        distance=torch.where(failed, torch.zeros_like(certificate.distance), certificate.distance),
    )
    return Inverse(torch.where(rows, anchor, inverse.target), certificate)
