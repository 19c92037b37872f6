"""Our rules on PyTorch's own operator samples: a few of each by default, many under `slow`."""

from __future__ import annotations

from typing import Any

import pytest
from opinfo import operators, samples

import fxinvert
from fxinvert import DataError, NoRuleError
from fxinvert.testing import check_rule

INFOS = operators(fxinvert.default_rules())
IDS = [f"{info.name}.{info.variant_test_name}".strip(".") for info in INFOS]


def check(info: Any, limit: int) -> None:
    tried = 0
    for sample in samples(info, limit):
        try:
            check_rule(sample.call, sample.batch)
        except (DataError, NoRuleError):  # several ops, or a form of the op that the rule refuses
            continue
        except AssertionError as error:
            raise AssertionError(f"{info.name}, {sample}: {error}") from error
        tried += 1
    if not tried:
        pytest.skip("no sample of this operator is a batch of one op")


@pytest.mark.parametrize("info", INFOS, ids=IDS)
def test_a_few_samples(info: Any) -> None:
    check(info, 3)


@pytest.mark.slow
@pytest.mark.parametrize("info", INFOS, ids=IDS)
def test_many_samples(info: Any) -> None:
    check(info, 40)
