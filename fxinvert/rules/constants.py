"""Ops that need no rule: what they compute does not follow the model's input as a value.

They work on shapes, masks, positions or other constants, are piecewise constant, or only check something. Where such an
op does get a value that is to be inverted, it stops the target there, with this reason: nothing, not the matrix-free
fallback either, can be done by derivatives that are zero everywhere.
"""

from __future__ import annotations

SHAPE = "shape arithmetic"
MASK = "masks and comparisons: no gradient"
POSITION = "positions and constants"
STEPS = "piecewise constant: no gradient"
RANDOM = "drawn, not computed"
CHECK = "checks only"
INTEGER = "integers: no gradient"

CONSTANTS: dict[str, str] = {
    "size": SHAPE,
    "sym_size": SHAPE,
    "dim": SHAPE,
    "floordiv": SHAPE,
    "mod": SHAPE,
    "ceil": STEPS,
    "floor": STEPS,
    "round": STEPS,
    "trunc": STEPS,
    "fix": STEPS,
    "floor_divide": STEPS,
    "heaviside": STEPS,
    "sgn": STEPS,
    "sign": STEPS,
    "numel": SHAPE,
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
    "xor": MASK,
    "__and__": MASK,
    "__or__": MASK,
    "__xor__": MASK,
    "bitwise_and": MASK,
    "bitwise_or": MASK,
    "bitwise_xor": MASK,
    "logical_and": MASK,
    "logical_or": MASK,
    "logical_not": MASK,
    "logical_xor": MASK,
    "isnan": MASK,
    "isinf": MASK,
    "isfinite": MASK,
    "arange": POSITION,
    "meshgrid": POSITION,
    "zeros": POSITION,
    "ones": POSITION,
    "full": POSITION,
    "full_like": POSITION,
    "new_zeros": POSITION,
    "new_ones": POSITION,
    "new_full": POSITION,
    "new_empty": POSITION,
    "zeros_like": POSITION,
    "ones_like": POSITION,
    "empty_like": POSITION,
    "zero": POSITION,
    "fill": POSITION,
    "lift_fresh_copy": POSITION,
    "one_hot": POSITION,
    "bernoulli": RANDOM,
    "multinomial": RANDOM,
    "rand_like": RANDOM,
    "randn_like": RANDOM,
    "_assert": CHECK,
    "_assert_tensor_metadata": CHECK,
    "argmax": INTEGER,
    "argmin": INTEGER,
    "argsort": INTEGER,
    "bucketize": INTEGER,
    "searchsorted": INTEGER,
    "count_nonzero": INTEGER,
    "embedding": "the input is an index: the target stops here, and trains the table",
}
