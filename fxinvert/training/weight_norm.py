"""Weights behind a weight norm, W = g v / ‖v‖ (Salimans & Kingma, arXiv 1602.07868): what a change of W is for g and v.

An op is affine in W, not in g and v; so ΔW is solved for, and taken apart. With s = g / ‖v‖, W = s v, and

    Δv = ΔW / s,    Δg = ± ‖W + ΔW‖ − g,    the sign that of g,

give W + ΔW. They do so for the direction v of any part α of the step, too: v + α Δv = (W + α ΔW) / s. Where g = 0, W has
no direction yet: v takes that of ΔW, at its own length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(v: Tensor, g: Tensor, change: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Δv and Δg in float64; in what is normed to length 0 v takes the direction of ΔW.

    Args:
        v, g: direction and length.
        change: ΔW.
        dim: the axis whose entries have a length each; −1: there is one for all.
    """
    v, g, change = v.double(), g.double(), change.double()
    size = torch.norm_except_dim(v, 2, dim)
    wanted = v * (g / size) + change
    length = torch.norm_except_dim(wanted, 2, dim)
    turned = torch.where(length > 0, wanted * (size / length), v) - v
    return (
        torch.where(g == 0, turned, change * (size / torch.where(g == 0, 1, g))),
        torch.where(g < 0, -length, length) - g,
    )
