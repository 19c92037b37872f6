"""Functions of other libraries that tracing meets as a whole: one line per function."""

from __future__ import annotations

from fxinvert.rules.movement import moves
from fxinvert.rules.rule import Rule
from fxinvert.rules.shape import keeps


def rules() -> list[Rule]:
    return [
        keeps("torchvision.ops.stochastic_depth.stochastic_depth"),
        moves("torchvision.models.swin_transformer._patch_merging_pad"),
    ]
