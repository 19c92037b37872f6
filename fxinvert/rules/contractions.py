"""Sums of products with one unknown operand, in the notation of einsum: one line per op.

With the other operands multiplied into one, K, every index is of one of five kinds, and the op is a matrix product,

    y[b, r, f] = Σ_c x[b, r, c] K[b, c, f],

b the indices of x, K and y, r those of x and y, f those of K and y, and c those that are summed. So every (b, r) is a
system of its own: of one matrix, factorized once, where there is no b, else of a batch of matrices.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxinvert.linalg import Dense
from fxinvert.linalg.each import solve_batched
from fxinvert.rules.affine import Rows, invert_affine, invert_by_autograd, moved, shortfall
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.trainable import Trainable


@dataclass(frozen=True)
class Product:
    """Which index of x, K and y is of which kind, each a string of letters.

    Attributes:
        x, y: their indices, in order.
        held: those of the other operands.
        both, rows, summed, free: b, r, c, f of the module's text.
        sizes: by letter.
    """

    x: str
    held: tuple[str, ...]
    y: str
    both: str
    rows: str
    summed: str
    free: str
    sizes: dict[str, int]

    @classmethod
    def of(cls, equation: str, unknown: int, shapes: Sequence[Sequence[int]]) -> Product | None:
        """Of operands with these shapes, one of which is x; None where an index is taken twice from one operand."""
        terms, y = _terms(equation, shapes)
        if any(len(set(term)) < len(term) for term in (*terms, y)):
            return None
        sizes: dict[str, int] = {}
        for term, shape in zip(terms, shapes, strict=True):
            for letter, size in zip(term, shape, strict=True):
                if sizes.setdefault(letter, size) != size:  # an axis of one entry is spread over several
                    return None
        own = terms[unknown]
        if not (own and y and own[0] == y[0]):
            return None
        held = tuple(term for place, term in enumerate(terms) if place != unknown)
        others = "".join(held)
        both, rows = _in(own, others, y), "".join(i for i in own if i in y and i not in others)
        summed, free = "".join(i for i in own if i not in y), "".join(i for i in y if i not in own)
        return cls(own, held, y, both, rows, summed, free, sizes)

    def lengths(self, letters: str) -> list[int]:
        return [self.sizes[letter] for letter in letters]

    def count(self, letters: str) -> int:
        return math.prod(self.lengths(letters))

    def grouped(self, value: Tensor, letters: str, last: str) -> Tensor:
        """`(b, r, last)` from a value with these indices."""
        ordered = value.permute([letters.index(i) for i in self.both + self.rows + last])
        both, rows = len(self.both), len(self.both + self.rows)
        sizes = ordered.shape
        return ordered.reshape(math.prod(sizes[:both]), math.prod(sizes[both:rows]), math.prod(sizes[rows:]))

    def joined(self, value: Tensor) -> Tensor:
        """x from `(b, r, c)`."""
        ordered = self.both + self.rows + self.summed
        return value.reshape(self.lengths(ordered)).permute([ordered.index(i) for i in self.x])


def product_of(
    equation: str, unknown: int, operands: dict[int, Tensor], x: Tensor
) -> tuple[Product, Tensor] | None:
    """The op as a matrix product, and K as `(b, c, f)`; None where an index is taken twice from one operand.

    Args:
        equation: of einsum, with its output.
        unknown: place of x among the operands.
        operands: the others, by place.
        x: the unknown's anchor.
    """
    shapes = {place: value.shape for place, value in operands.items()} | {unknown: x.shape}
    product = Product.of(equation, unknown, [shapes[place] for place in sorted(shapes)])
    if product is None:
        return None
    working = torch.promote_types(x.dtype, torch.float32)
    wanted, held = product.both + product.summed + product.free, "".join(product.held)
    known = "".join(i for i in wanted if i in held)
    values = [operands[place].to(working) for place in sorted(operands)]
    # an op that only turns its one operand has a K of one entry
    k = (
        torch.einsum(f"{','.join(product.held)}->{known}", *values)
        if values
        else x.new_ones((), dtype=working)
    )
    # an index of x alone that is summed meets a K that does not depend on it
    k = k.reshape([product.sizes[i] if i in known else 1 for i in wanted]).expand(product.lengths(wanted))
    return product, k.reshape([product.count(i) for i in (product.both, product.summed, product.free)])


def _in(first: str, *others: str) -> str:
    return "".join(i for i in first if all(i in other for other in others))


def _terms(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[list[str], str]:
    """The indices of every operand and of the output: an ellipsis spelled out, a missing output as einsum understands it."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    given = left.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    widest = max(len(shapes[i]) - len(term.replace("...", "")) for i, term in enumerate(given))
    dots = "".join(spare[:widest])

    def spelled(term: str, axes: int) -> str:
        return term.replace("...", dots[len(dots) - axes :]) if "..." in term else term

    terms = [spelled(term, len(shapes[i]) - len(term.replace("...", ""))) for i, term in enumerate(given)]
    if arrow:
        return terms, spelled(right, widest)
    letters = left.replace(",", "").replace("...", "")
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return terms, (dots if "..." in left else "") + "".join(once)


def invert_contraction(
    op: Op, target: Tensor, equation: str, unknown: int, operands: dict[int, Tensor]
) -> Inverse:
    """Nearest x for y = einsum(equation, …) + constant, the other operands held."""
    found = product_of(equation, unknown, operands, op.anchor)
    if found is None:
        return invert_by_autograd(op, target)
    product, k = found
    if product.both:
        missing = product.grouped(shortfall(op, target), product.y, product.free)
        solved = solve_batched(k.mT, missing, op.settings.limit(target.dtype))
        return moved(op, target, product.joined(solved.value), solved)
    rows = Rows(
        lambda value: product.grouped(value, product.y, product.free)[0],
        lambda value, like: product.joined(value[None]),
    )
    return invert_affine(op, target, lambda: Dense(k[0].T), rows)


def einsum(op: Op, target: Tensor) -> Inverse:
    """A product of matrices, of one or of a batch: every row of the unknown operand is a system of its own."""
    (name,) = op.anchors
    listed, _, place = name.rpartition("_")
    others = {
        int(other.rpartition("_")[2]): value
        for other, value in op.parameters.items()
        if other.rpartition("_")[0] == listed
    }
    return invert_contraction(op, target, op.attributes["equation"], int(place), others)


class ContractionWeights(Trainable):
    """y = einsum(equation, x, W), W a parameter: what the module's text says of K; every b is a group, every r a row.

    Args:
        product: of one call; None: of any, for `of_call`.
    """

    def __init__(self, product: Product | None = None) -> None:
        self.product = product

    def of_call(self, arguments: Mapping[str, Any]) -> Trainable | None:
        operands = {name: v for name, v in arguments.items() if name.startswith("tensors_")}
        shapes = [v.shape if isinstance(v, Tensor) else v for v in operands.values()]
        held = [name for name, v in operands.items() if isinstance(v, Tensor)]
        if len(operands) != 2 or len(held) != 1:
            return None
        (name,) = held
        product = Product.of(arguments["equation"], 1 - list(operands).index(name), shapes)
        # an index of x alone that is summed, or of W alone, is no column of a matrix
        if product is None or set(product.held[0]) != {*product.both, *product.summed, *product.free}:
            return None
        return ContractionWeights(product) if product.y[0] in product.rows else None

    def features(self, op: Op) -> Tensor:
        return self._own.grouped(op.anchor, self._own.x, self._own.summed)

    def outputs(self, op: Op, value: Tensor) -> Tensor:
        return self._own.grouped(value, self._own.y, self._own.free)

    def changes(self, parameters: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
        ((name, weight),) = parameters.items()
        (letters,), ordered = self._own.held, self._own.both + self._own.free + self._own.summed
        sizes = dict(zip(letters, weight.shape, strict=True))
        change = matrix.reshape([sizes[i] for i in ordered])
        return {name: change.permute([ordered.index(i) for i in letters])}

    @property
    def _own(self) -> Product:
        assert self.product is not None, "of no call"
        return self.product


def named(key: str, equation: Callable[[Op], str], names: tuple[str, ...]) -> Rule:
    """A rule for an op that is a contraction of operands with these names, plus what does not depend on them."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """A product of matrices, of one or of a batch: every row of the unknown operand is a system of its own."""
        (name,) = op.anchors
        others = {i: op.parameters[other] for i, other in enumerate(names) if other != name}
        return invert_contraction(op, target, equation(op), names.index(name), others)

    return Rule(key, invert, Kind.AFFINE)


def rules() -> list[Rule]:
    return [
        Rule("einsum", einsum, Kind.AFFINE, trainable=ContractionWeights()),
        named("bilinear", lambda op: "...i,...j,kij->...k", ("input1", "input2", "weight")),
        Rule("linalg_vecdot", invert_by_autograd, Kind.AFFINE),
        Rule("linalg_cross", invert_by_autograd, Kind.AFFINE),
        Rule("cross", invert_by_autograd, Kind.AFFINE),
    ]
