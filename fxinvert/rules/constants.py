"""Ops that need no rule: what they compute does not depend on the model's input as a value.

They work on shapes, masks, positions or other constants, or only check something. Where such an op does get a value
that is to be inverted, it stops the target there, with this reason.
"""

from __future__ import annotations

SHAPE = "shape arithmetic"
MASK = "masks and comparisons: no gradient"
POSITION = "positions and constants"
CHECK = "checks only"
INTEGER = "integers: no gradient"

CONSTANTS: dict[str, str] = {
    "size": SHAPE,
    "sym_size": SHAPE,
    "dim": SHAPE,
    "floordiv": SHAPE,
    "mod": SHAPE,
    "ceil": SHAPE,
    "floor": SHAPE,
    "round": SHAPE,
    "eq": MASK,
    "ne": MASK,
    "ge": MASK,
    "gt": MASK,
    "le": MASK,
    "lt": MASK,
    "invert": MASK,
    "bitwise_not": MASK,
    "and": MASK,
    "or": MASK,
    "sign": MASK,
    "arange": POSITION,
    "meshgrid": POSITION,
    "zeros": POSITION,
    "ones": POSITION,
    "full": POSITION,
    "full_like": POSITION,
    "new_zeros": POSITION,
    "new_ones": POSITION,
    "zero": POSITION,
    "fill": POSITION,
    "lift_fresh_copy": POSITION,
    "one_hot": POSITION,
    "_assert": CHECK,
    "_assert_tensor_metadata": CHECK,
    "argmax": INTEGER,
    "argmin": INTEGER,
    "argsort": INTEGER,
    "embedding": "the input is an index: the target stops here, the table stays",
}
