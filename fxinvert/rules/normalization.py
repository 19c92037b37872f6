"""Normalization: one line per op."""

from __future__ import annotations

from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import invert_diagonal
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule
from fxinvert.rules.trainable import ChannelScale


def batch_norm(op: Op, target: Tensor) -> Inverse:
    """Batch norm in evaluation is a diagonal affine map, y = w (x − μ) / √(σ² + ε) + b."""
    if op.attributes["training"]:
        raise NoRuleError(
            f"node {op.name!r}, batch_norm: it normalizes by the statistics of the batch, so that no sample has a "
            "target of its own; give it running statistics (track_running_stats=True)"
        )
    gain = (op.parameters["running_var"] + op.attributes["eps"]).rsqrt()
    if "weight" in op.parameters:
        gain = gain * op.parameters["weight"]
    return invert_diagonal(op, target, gain.reshape(-1, *[1] * (op.anchor.dim() - 2)))


def rules() -> list[Rule]:
    return [
        Rule("batch_norm", batch_norm, Kind.AFFINE, trainable=ChannelScale()),
    ]
