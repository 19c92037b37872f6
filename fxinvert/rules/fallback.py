"""The matrix-free fallback: the inverse of any differentiable op, from its values and derivatives alone.

Damped Gauss–Newton from the anchor (`fxinvert.linalg.gauss_newton`). It claims what it has measured: `NEAREST` where
the target is reached and the correction has no part in the null space of the op's Jacobian, `EXACT` where only the first
holds, `LEAST_SQUARES` where the error has no slope left, `DAMPED` where it stopped early. All are local statements, on
the op's branch at the anchor; a rule of its own may know better, and is faster.
"""

from __future__ import annotations

import torch

from fxinvert.errors import NoRuleError, SolveError
from fxinvert.linalg.gauss_newton import gauss_newton
from fxinvert.linalg.minimum import Minimum
from fxinvert.linalg.vectors import flat
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.op import Op

#: relative residual at which a target counts as reached; half precisions stop at half of their digits
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5}


def invert_matrix_free(op: Op, target: torch.Tensor, apart: int = 1, worthwhile: float = 0.0) -> Inverse:
    """Nearest of the inputs that come closest to `target`, found from the anchor by Jacobian-vector products.

    Args:
        op: the op.
        target: `(B, …)`.
        apart: how many of the leading axes tell problems apart that do not see each other; 1, the samples, or more,
            such as the queries of an attention: each then has steps of its own.
        worthwhile: part of its error that a step must take off, or it is a problem's last.

    Raises:
        NoRuleError: the op cannot be differentiated, or does not keep samples apart.
    """
    anchor, own = op.anchor, op.anchor.dtype
    working = torch.promote_types(own, torch.float32)
    if not len(anchor) == len(op.output) == len(target):
        raise _no_rule(
            op,
            f"it makes {tuple(op.output.shape)} of {tuple(anchor.shape)}; the batch must stay the first axis",
        )

    def problems(value: torch.Tensor) -> torch.Tensor:
        return value.to(working).flatten(0, apart - 1)

    try:
        found = gauss_newton(
            lambda x: problems(op(x.to(own).reshape(anchor.shape))),
            *(problems(value) for value in (anchor, op.output, target)),
            tolerance=TOLERANCES.get(own, torch.finfo(own).eps ** 0.5),
            condition_limit=op.settings.limit(target.dtype),
            limit=op.settings.max_iterations,
            worthwhile=worthwhile,
        )
    except SolveError as error:
        raise _no_rule(op, str(error)) from error
    # what has not moved is the anchor, bit for bit
    value = found.value.to(own).reshape(anchor.shape)
    residual = relative(op(value) - target, target)
    certificate = Certificate(
        status=_status(found),
        residual=residual,
        distance=row_norms(value - anchor),
        failed=flat(found.failed.reshape(anchor.shape[:apart])).any(1),
        damping=float(found.damping.max()) if found.damping.numel() else 0.0,
        iterations=int(found.products.max()) if found.products.numel() else 0,
    )
    return Inverse(value, certificate)


def _status(found: Minimum) -> Status:
    """The weakest promise among the samples."""
    if bool(found.failed.any()):
        return Status.FAILED
    if bool((~found.reached & ~found.stationary).any()):
        return Status.DAMPED
    if not bool(found.reached.all()):
        return Status.LEAST_SQUARES
    return Status.NEAREST if bool(found.nearest.all()) else Status.EXACT


def _no_rule(op: Op, reason: str) -> NoRuleError:
    return NoRuleError(
        f"node {op.name!r}, op {op.key!r} has no inverse rule and cannot be inverted without one: {reason}. "
        "Write one with @fxinvert.inverse_rule(...), or cut the graph after this node."
    )
