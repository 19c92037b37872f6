"""Normalization: one line per op."""

from __future__ import annotations

from torch import Tensor

from fxinvert.linalg import Diagonal
from fxinvert.rules.affine import invert_affine
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule
from fxinvert.rules.trainable import ChannelScale


def batch_norm(op: Op, target: Tensor) -> Inverse:
    """Batch norm in evaluation is a diagonal affine map, y = w (x − μ) / √(σ² + ε) + b."""
    anchor = op.anchor

    def scale() -> Diagonal:
        gain = (op.parameters["running_var"] + op.attributes["eps"]).rsqrt()
        if "weight" in op.parameters:
            gain = gain * op.parameters["weight"]
        return Diagonal(gain.reshape(-1, *[1] * (anchor.dim() - 2)), anchor.shape[1:])

    return invert_affine(op, target, scale)


def rules() -> list[Rule]:
    return [
        Rule("batch_norm", batch_norm, Kind.AFFINE, trainable=ChannelScale()),
    ]
