"""One table of ops with several tensors that depend on the sample: one is unknown, the others are held at their anchors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

import fxinvert
from fxinvert.linalg import SolveSettings
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.rules import Inverse, Rule

ATEN = torch.ops.aten
F64 = torch.float64


@dataclass(frozen=True)
class Held:
    """An op, what it is called with for a batch of a size, and which of these is unknown, lists opened.

    Attributes:
        affine: whether it is affine in the unknown, so that a dense solution says what the answer is.
    """

    note: str
    function: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    unknown: int = 0
    affine: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.note


class Call:
    """A case with its values drawn, in a dtype."""

    def __init__(self, case: Held, batch: int, dtype: torch.dtype = F64) -> None:
        self.case, self.batch = case, batch
        flat, self._form = tree_flatten((case.arguments(batch), case.options))
        self._flat = [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in flat]
        self.x: Tensor = self._flat[case.unknown]

    @property
    def rule(self) -> Rule:
        rules = fxinvert.default_rules()
        return rules.require(rules.key(self.case.function), self.case.note)

    def rows(self, rows: slice) -> Call:
        """The same for some of the samples."""
        part = object.__new__(Call)
        part.__dict__ |= self.__dict__
        part._flat = [v[rows] if isinstance(v, Tensor) and self._own(v) else v for v in self._flat]
        part.x = part._flat[self.case.unknown]
        return part

    def __call__(self, x: Tensor) -> Tensor:
        args, options = self._with(x)
        result: Tensor = self.case.function(*args, **options)
        return result

    def inverse(self, target: Tensor) -> Inverse:
        args, options = self._with(self.x)
        op = InverseOp(self.rule, self.case.note, self.case.function, self.case.unknown, SolveSettings())
        answer: Inverse = op(target, self(self.x), *args, **options)
        return answer

    def _own(self, value: Tensor) -> bool:
        return value.dim() > 0 and len(value) == self.batch

    def _with(self, x: Tensor) -> Any:
        flat = list(self._flat)
        flat[self.case.unknown] = x
        return tree_unflatten(flat, self._form)


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, dtype=F64)


def positive(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.rand(batch, *shape, dtype=F64) + 0.5


def mask(batch: int) -> Tensor:
    return torch.rand(batch, 5, 6) > 0.4


def index(batch: int) -> Tensor:
    return torch.randint(0, 5, (batch, 3, 6))


def grid(batch: int) -> Tensor:
    return torch.rand(batch, 3, 4, 2, dtype=F64) * 2 - 1


def volume(batch: int) -> Tensor:
    return torch.rand(batch, 2, 2, 3, 3, dtype=F64) * 1.6 - 0.8


def given(*makes: Any) -> Callable[[int], tuple[Any, ...]]:
    """Arguments by batch size: a function makes one, a list holds functions, anything else is itself."""

    def made(make: Any, batch: int) -> Any:
        if isinstance(make, list):
            return [made(item, batch) for item in make]
        return make(batch) if callable(make) else make

    return lambda batch: tuple(made(make, batch) for make in makes)


A, ROW, COLUMN = normal(5, 6), normal(1, 6), normal(5, 1)
Q, K, V = normal(2, 5, 6), normal(2, 7, 6), normal(2, 7, 3)
BOTH = [
    ("add", ATEN.add.Tensor, (A, A)),
    ("add-spread", ATEN.add.Tensor, (ROW, COLUMN)),
    ("sub", ATEN.sub.Tensor, (A, COLUMN)),
    ("mul", ATEN.mul.Tensor, (A, A)),
    ("mul-spread", ATEN.mul.Tensor, (ROW, COLUMN)),
    ("matmul", ATEN.matmul.default, (A, normal(6, 3))),
    ("matmul-more", ATEN.matmul.default, (normal(2, 5, 6), normal(2, 6, 7))),
    ("matmul-spread", ATEN.matmul.default, (normal(1, 5, 6), normal(2, 6, 3))),
    ("bmm", ATEN.bmm.default, (A, normal(6, 3))),
    ("vecdot", ATEN.linalg_vecdot.default, (A, A)),
    ("cross", ATEN.linalg_cross.default, (normal(5, 3), normal(5, 3))),
]
AFFINE = [
    *[Held(f"{note}-{i}", function, given(*makes), i) for note, function, makes in BOTH for i in (0, 1)],
    Held("div", ATEN.div.Tensor, given(A, positive(5, 6))),
    Held("div-spread", ATEN.div.Tensor, given(COLUMN, positive(5, 6))),
    *[Held(f"where-{i}", ATEN.where.self, given(mask, A, COLUMN), i) for i in (1, 2)],
    *[Held(f"baddbmm-{i}", ATEN.baddbmm.default, given(normal(5, 3), A, normal(6, 3)), i) for i in range(3)],
    *[Held(f"addcmul-{i}", ATEN.addcmul.default, given(A, A, COLUMN), i) for i in range(3)],
    *[Held(f"addcdiv-{i}", ATEN.addcdiv.default, given(A, A, positive(5, 1)), i) for i in range(2)],
    *[Held(f"lerp-{i}", ATEN.lerp.Tensor, given(A, A, positive(5, 1)), i) for i in range(3)],
    *[Held(f"cat-{i}", ATEN.cat.default, given([normal(2, 6), A, ROW], 1), i) for i in range(3)],
    Held("cat-last", ATEN.cat.default, given([A, normal(5, 2)], -1), 1),
    # torch skips a tensor of shape (0,)
    Held("cat-nothing", ATEN.cat.default, lambda b: ([torch.zeros(0), torch.randn(b, 5, 6)], -2), 1),
    *[Held(f"stack-{i}", ATEN.stack.default, given([A, A], 2), i) for i in range(2)],
    Held("stack-last", ATEN.stack.default, given([A, A], -1), 0),
    *[
        Held(key, getattr(ATEN, key).default, given([A, normal(5, 6)], 2), 1)
        for key in ("concat", "concatenate")
    ],
    *[
        Held(key, getattr(ATEN, key).default, given([A, A]), 1)
        for key in ("hstack", "dstack", "column_stack")
    ],
    Held("index_copy", ATEN.index_copy.default, given(A, 1, lambda b: torch.tensor([0, 2]), normal(2, 6)), 3),
    Held("masked_scatter", ATEN.masked_scatter.default, given(A, lambda b: torch.arange(5)[:, None] > 2, A)),
    *[
        Held(f"diagonal_scatter-{i}", ATEN.diagonal_scatter.default, given(A, normal(5), 0, 1, 2), i)
        for i in (0, 1)
    ],
    Held("masked_fill", ATEN.masked_fill.Scalar, given(A, mask, 3.0)),
    Held("gather", ATEN.gather.default, given(A, 1, index)),
    Held("take_along_dim", torch.take_along_dim, given(A, index, 1)),
    Held("scatter", ATEN.scatter.src, given(A, 1, index, normal(3, 6))),
    Held("scatter-value", ATEN.scatter.value, given(A, 1, index, 2.0)),
    *[
        Held(f"scatter_add-{i}", ATEN.scatter_add.default, given(A, 1, index, normal(3, 6)), i)
        for i in (0, 3)
    ],
    *[
        Held(
            f"index_add-{i}",
            ATEN.index_add.default,
            given(A, 1, lambda b: torch.tensor([0, 0, 2]), normal(3, 6)),
            i,
            options={"alpha": -2},
        )
        for i in (0, 3)
    ],
    *[
        Held(
            f"index_put-{note}",
            ATEN.index_put.default,
            given(A, lambda b: [None, torch.tensor([1, 1])], normal(2, 6), note == "added"),
            i,
        )
        for note, i in (("base", 0), ("added", 3))
    ],
    *[
        Held(f"slice_scatter-{i}", ATEN.slice_scatter.default, given(A, normal(2, 6), 1, 0, 2), i)
        for i in (0, 1)
    ],
    *[Held(f"select_scatter-{i}", ATEN.select_scatter.default, given(A, normal(6), 1, 2), i) for i in (0, 1)],
    *[Held(f"diff-{i}", ATEN.diff.default, given(A, 1, 1, ROW), i) for i in (0, 3)],
    *[Held(f"einsum-heads-{i}", ATEN.einsum.default, given("bhnd,bhmd->bhnm", [Q, K]), i) for i in (1, 2)],
    *[
        Held(
            f"einsum-three-{i}",
            ATEN.einsum.default,
            given("bnc,bmc,bn->bnm", [A, normal(3, 6), normal(5)]),
            i,
        )
        for i in (1, 2, 3)
    ],
    Held("einsum-parameter", ATEN.einsum.default, given("b...i,oi->b...o", [Q, lambda b: weight(3, 6)]), 1),
    Held(
        "einsum-summed",
        ATEN.einsum.default,
        given("bcwh,cd->bd", [normal(5, 2, 3), lambda b: weight(5, 2)]),
        1,
    ),
    Held("einsum-diagonal", ATEN.einsum.default, given("bii,bi->bi", [normal(5, 5), normal(5)]), 1),
    *[
        Held(f"bilinear-{i}", ATEN.bilinear.default, given(A, normal(5, 3), lambda b: weight(2, 6, 3)), i)
        for i in (0, 1)
    ],
    Held("attention-value", ATEN.scaled_dot_product_attention.default, given(Q, K, V), 2),
    Held(
        "attention-causal",
        ATEN.scaled_dot_product_attention.default,
        given(Q, Q, normal(2, 5, 3), None, 0.0, True),
        2,
    ),
    Held(
        "attention-masked",
        ATEN.scaled_dot_product_attention.default,
        given(normal(1, 5, 6), normal(1, 6, 6), normal(1, 6, 3), lambda b: mask(b)[:, None]),
        2,
    ),
    Held(
        "attention-grouped",
        ATEN.scaled_dot_product_attention.default,
        given(normal(4, 5, 6), K, V),
        2,
        options={"enable_gqa": True},
    ),
    Held(
        "attention-one-head",
        ATEN.scaled_dot_product_attention.default,
        given(A, normal(7, 6), normal(7, 3)),
        2,
    ),
    Held("grid_sampler", ATEN.grid_sampler.default, given(normal(2, 5, 6), grid, 0, 0, False)),
    Held("grid_sampler_2d", ATEN.grid_sampler_2d.default, given(normal(2, 5, 6), grid, 1, 1, True)),
    Held("grid_sampler_3d", ATEN.grid_sampler_3d.default, given(normal(2, 3, 4, 3), volume, 0, 0, False)),
    Held("grid_sample", F.grid_sample, given(normal(2, 5, 6), grid, "bilinear", "border", False)),
    Held("cross", ATEN.cross.default, given(normal(5, 3), normal(5, 3), 2)),
]
CURVED = [
    # torch has no derivative to compare with
    Held("copy", ATEN.copy.default, given(A, COLUMN), 1, affine=False),
    Held("div-below", ATEN.div.Tensor, given(A, positive(5, 6)), 1, affine=False),
    Held("div-below-spread", ATEN.div.Tensor, given(A, positive(5, 1)), 1, affine=False),
    Held("addcdiv-below", ATEN.addcdiv.default, given(A, A, positive(5, 6)), 2, affine=False),
    *[Held(f"maximum-{i}", ATEN.maximum.default, given(A, ROW), i, affine=False) for i in (0, 1)],
    *[Held(f"minimum-{i}", ATEN.minimum.default, given(COLUMN, A), i, affine=False) for i in (0, 1)],
    Held("pow", ATEN.pow.Tensor_Tensor, given(positive(5, 6), positive(5, 6)), affine=False),
    Held("clamp", ATEN.clamp.Tensor, given(A, lambda b: -positive(5, 6)(b), positive(5, 6)), affine=False),
    Held("hypot", ATEN.hypot.default, given(A, COLUMN), affine=False),
    Held("logaddexp", ATEN.logaddexp.default, given(A, COLUMN), affine=False),
    *[
        Held(f"cosine_similarity-{i}", ATEN.cosine_similarity.default, given(A, A, -1), i, affine=False)
        for i in (0, 1)
    ],
    Held("cosine_similarity-row", ATEN.cosine_similarity.default, given(A, ROW, 2), affine=False),
    *[
        Held(f"attention-{name}", ATEN.scaled_dot_product_attention.default, given(Q, K, V), i, affine=False)
        for i, name in enumerate(("query", "key"))
    ],
]
WHOLE = [
    Held("normalize", F.normalize, given(A), affine=False),
    Held("normalize-1", F.normalize, given(A, 1.0, 2), affine=False),
    Held("normalize-inf", F.normalize, given(A, float("inf"), 2), affine=False),
    Held("lp_pool1d", F.lp_pool1d, given(normal(2, 7), 2, 3), affine=False),
    Held("lp_pool2d", F.lp_pool2d, given(normal(2, 6, 7), 2, 2), affine=False),
    Held("lp_pool2d-sum", F.lp_pool2d, given(normal(2, 6, 7), 1, 3, 2)),
    Held("lp_pool2d-inf", F.lp_pool2d, given(normal(2, 6, 7), float("inf"), 2), affine=False),
    Held("var", ATEN.var.correction, given(A, [1]), affine=False),
    Held("var-last", ATEN.var.dim, given(A, [2], False, True), affine=False),
    Held("std", ATEN.std.correction, given(A, [1, 2]), affine=False, options={"correction": 0}),
    Held("softmin", F.softmin, given(A, 1), affine=False),
    Held("upsample-aa", ATEN._upsample_bilinear2d_aa.default, given(normal(2, 5, 6), [3, 3], False)),
    Held("upsample-bicubic-aa", ATEN._upsample_bicubic2d_aa.default, given(normal(2, 5, 6), [7, 7], False)),
    Held("lp_pool3d", F.lp_pool3d, given(normal(2, 4, 4, 5), 2, 2), affine=False),
    Held("upsample-exact-1d", ATEN._upsample_nearest_exact1d.default, given(normal(2, 5), [7])),
    Held("upsample-exact-3d", ATEN._upsample_nearest_exact3d.default, given(normal(2, 3, 4, 3), [5, 6, 4])),
    Held("upsample-exact", ATEN._upsample_nearest_exact2d.default, given(normal(2, 5, 6), [7, 9])),
]


def weight(*shape: int) -> Tensor:
    """A parameter: the same whatever the batch."""
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
