"""Values read between the entries of a map: interpolation by ATen's own names, and sampling on a grid. One line per op."""

from __future__ import annotations

from torch import Tensor

from fxinvert.rules.affine import invert_by_autograd
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.movement import moves
from fxinvert.rules.op import Op
from fxinvert.rules.pooling import average
from fxinvert.rules.rule import Kind, Rule


def sampled(op: Op, target: Tensor) -> Inverse:
    """Affine in the map, a system for every sample's grid; the grid itself is found by its derivatives."""
    return invert_matrix_free(op, target) if "grid" in op.anchors else invert_by_autograd(op, target)


def rules() -> list[Rule]:
    return [
        average("_upsample_bilinear2d_aa", 2),
        average("_upsample_bicubic2d_aa", 2),
        *[moves(f"_upsample_nearest_exact{n}d") for n in (1, 2, 3)],
        *[
            Rule(key, sampled, Kind.AFFINE)
            for key in ("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
        ],
    ]
