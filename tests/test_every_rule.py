"""No rule goes untried: each is in a table of some test, here, or in the list of those that cannot stand alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import test_linear_rules
import test_movement_rules
import test_normalization_rules
import test_pooling_rules
import test_reduction_rules
import test_simplex_rules
import torch
from held_cases import AFFINE, CURVED, WHOLE
from rule_samples import ALL
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.rules import Inverse, Kind, Op
from fxinvert.testing import check_rule

ATEN = torch.ops.aten
TABLES = (
    test_linear_rules.OPS,
    test_movement_rules.OPS,
    test_normalization_rules.MAKES,
    test_pooling_rules.OPS,
    test_reduction_rules.OPS,
    test_simplex_rules.OPS,
)

#: op → (call, shape of a batch)
OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 2), (4, 3, 6)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (4, 2, 6, 4)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), (4, 2, 4, 4, 4)),
    "constant_pad_nd": (lambda x: ATEN.constant_pad_nd(x, [1, 2]), (4, 5)),
    "mH": (lambda x: x.mH, (4, 3, 2)),
    "mT": (lambda x: x.mT, (4, 3, 2)),
    "reflection_pad1d": (lambda x: ATEN.reflection_pad1d(x, [1, 2]), (4, 2, 5)),
    "reflection_pad2d": (lambda x: ATEN.reflection_pad2d(x, [1, 1, 2, 0]), (4, 2, 5, 4)),
    "reflection_pad3d": (lambda x: ATEN.reflection_pad3d(x, [1, 1, 1, 0, 0, 1]), (4, 2, 3, 4, 3)),
    "replication_pad1d": (lambda x: ATEN.replication_pad1d(x, [1, 2]), (4, 2, 5)),
    "replication_pad2d": (lambda x: ATEN.replication_pad2d(x, [1, 1, 2, 0]), (4, 2, 5, 4)),
    "replication_pad3d": (lambda x: ATEN.replication_pad3d(x, [1, 1, 1, 0, 0, 1]), (4, 2, 3, 4, 3)),
    "upsample_nearest1d": (lambda x: ATEN.upsample_nearest1d(x, [7]), (4, 2, 5)),
    "upsample_nearest3d": (lambda x: ATEN.upsample_nearest3d(x, [3, 5, 4]), (4, 2, 2, 3, 4)),
}
#: ops that need an operand for every sample, which only branching graphs have, or that turn the batch itself
NOT_ALONE = """
addmv baddbmm bmm mv gather expand_as reshape_as view_as broadcast_to flipud t numpy_T matrix_H
""".split()
#: functions of torchvision
WRAPPED = [key for key in fxinvert.default_rules() if key.startswith("torchvision.")]
#: changes of type, which `check_rule` does not make
CASTS = "bfloat16 float half type".split()


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_every_rule_is_tried() -> None:
    rules = fxinvert.default_rules()
    tried = {sample.key for sample in ALL} | {name.split("-")[0] for table in TABLES for name in table}
    # test_elementwise_rules.py
    tried |= {key for key, rule in rules.items() if rule.kind is Kind.ELEMENTWISE}
    tried |= {rules.key(case.function) for case in (*AFFINE, *CURVED, *WHOLE)}
    tried |= {"padded_convolution"}  # test_padded.py
    assert set(rules) - tried == {*OTHERS, *CASTS, *WRAPPED, *(set(NOT_ALONE) - tried)}


@pytest.mark.parametrize("key", WRAPPED)
def test_functions_of_torchvision(key: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="the function is torchvision's")
    del torchvision
    module, _, name = key.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    batch = torch.randn(3, 5, 5, 4, dtype=torch.float64)
    calls = {"stochastic_depth": lambda x: function(x, 0.3, "row", False), "_patch_merging_pad": function}
    rules = fxinvert.default_rules()
    y = calls[name](batch)
    op = Op(key, key, {"x": batch}, y, {}, {}, calls[name])
    target = calls[name](torch.randn_like(batch))
    found = rules[key].invert(op, target)
    assert isinstance(found, Inverse)
    torch.testing.assert_close(calls[name](found.target), target)


@pytest.mark.parametrize("key", OTHERS)
def test_promises(key: str) -> None:
    call, shape = OTHERS[key]
    batch = torch.randn(shape, dtype=torch.float64)
    check_rule(Called(call), batch)
    check_rule(Called(call), batch, dtype=torch.float32)
