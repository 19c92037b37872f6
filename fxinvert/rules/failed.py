"""Samples that have no usable answer: they stay at their anchors, and the certificate says why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits
from fxinvert.linalg.vectors import flat, per_sample
from fxinvert.rules.certificate import Certificate, Inverse, Status


def keep_failed_at_anchor(
    inverse: Inverse, anchor: Tensor, target: Tensor, who: Callable[[], str] = lambda: "the rule"
) -> Inverse:
    """Leaves every sample with a non-finite target or answer at its anchor; the certificate says so, and why.

    Answers that are infinite where the anchor is, as the scores that a mask hides, are no failure.

    Args:
        inverse: the answer.
        anchor, target: what the rule was given, `(B, …)`.
        who: names the rule, for messages.
    """
    value, certificate = inverse
    told = certificate.is_measured
    # a sum is finite only if all it sums is; one that is not is looked at more closely
    total = certificate.__dict__.pop("_total", None)
    if total is None and not waits(value):
        total = float(value.sum() if value.data_ptr() == target.data_ptr() else value.sum() + target.sum())
    if total is not None and math.isfinite(total) and not (told and bool(certificate.failed.any())):
        return inverse
    answered = torch.isfinite(value) | torch.isinf(anchor) & (value == anchor)
    failed = ~(flat(answered).all(1) & flat(torch.isfinite(target)).all(1))
    failed = failed | certificate.failed if told else failed
    if not waits(value) and not bool(failed.any()):
        return inverse
    kept = torch.where(per_sample(failed, anchor), anchor, value)

    def measure() -> Certificate:
        facts = certificate.measured()
        if not bool(failed.any()):
            return facts
        distance = torch.where(failed, torch.zeros_like(facts.distance), facts.distance)
        return dataclasses.replace(
            facts,
            status=Status.FAILED,
            failed=failed | facts.failed,
            distance=distance,
            reason=facts.reason or _why_failed(value, anchor, target, who()),
        )

    return Inverse(kept, measure() if told else Certificate.later(measure, value, anchor, target))


def _why_failed(value: Tensor, anchor: Tensor, target: Tensor, who: str) -> str:
    """Whose values are not finite; an answer's only where those that it was made from are."""
    answered, given, wanted = (flat(torch.isfinite(v)).all(1) for v in (value, anchor, target))
    causes = (("the input", given), ("the target", wanted), (who, answered | ~given | ~wanted))
    return "; ".join(
        f"{what} has NaN or infinite values in {int((~finite).sum())} of {len(finite)} samples"
        for what, finite in causes
        if not bool(finite.all())
    )
