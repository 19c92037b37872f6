"""The study of scale: exponents are those of the figures, and a sweep is measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.studies import scale, scale_page
from benchmarks.studies.frame import Outcome


def outcome(settings: dict[str, Any], **result: float) -> Outcome:
    return Outcome("", settings, 0, "", 0.0, {}, result)


def made() -> list[Outcome]:
    """Outcomes whose time grows with the square of the depth, whose memory does not, and whose other figures are as they are."""
    return [
        outcome(dict(run.settings), seconds=3.0 * run.settings["depth"] ** 2, bytes=2.0**20, forward=0.5)
        for run in scale.runs(1)
    ]


def test_every_axis_is_varied_alone() -> None:
    settings = [run.settings for run in scale.runs(1)]
    assert len({run.file for run in scale.runs(1)}) == len(settings)
    for given in settings:
        assert sum(given[axis] != scale.BASE[axis] for axis in scale.BASE) <= 1


def test_exponents_are_fitted() -> None:
    text = scale_page.section(made())
    assert "| depth | 2.00 | 0.00 | 0.00 |" in text
    assert "| width | 0.00 | 0.00 | 0.00 |" in text
    assert "| depth | 8 | 192 | 1 | 0.5 | 384 |" in text
    assert set(scale_page.pictures(made())) == {"axes"}


@pytest.mark.slow
def test_a_sweep_is_measured() -> None:
    result = scale.swept(scale.WARM | {"workers": 1})
    assert result["seconds"] > result["forward"] > 0
    assert result["bytes"] >= 0
