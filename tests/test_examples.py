"""The example scripts run as they are, and what they claim is so by their own numbers."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

Numbers = dict[str, float]


def repaired(found: Numbers) -> bool:
    return found["after"] > found["before"] + 0.03


def adapted(found: Numbers) -> bool:
    return found["new after"] > found["new before"] + 0.2 and found["old after"] > found["old before"] - 0.1


def class_added(found: Numbers) -> bool:
    others_stay = found["the others after"] > found["the others before"] - 0.02
    return found["the new 9 before"] == 0 and found["the new 9 after"] > 0.8 and others_stay


def recovered(found: Numbers) -> bool:
    return found["pruned"] < found["recovered"] - 0.2 and found["recovered"] > found["whole"] - 0.05


def decision_explained(found: Numbers) -> bool:
    right_there = found["error after"] < found["error before"] / 2
    right_everywhere = found["explained after"] > found["explained before"] + 0.1
    return right_there and right_everywhere and 0.5 < found["shares"] < 1.5


def custom_op_used(found: Numbers) -> bool:
    return found["after"] > found["before"] + 0.5


CLAIMS: dict[str, Callable[[Numbers], bool]] = {
    "repair": repaired,
    "adapt_to_a_shifted_domain": adapted,
    "add_a_missing_class": class_added,
    "recover_a_pruned_network": recovered,
    "explain_a_driving_decision": decision_explained,
    "a_custom_op": custom_op_used,
}


def test_every_example_makes_a_claim() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CLAIMS)


@pytest.mark.slow
@pytest.mark.usefixtures("rules_as_found")
@pytest.mark.parametrize("name", CLAIMS)
def test_the_claim_holds(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert CLAIMS[name](found), found
    assert len(capsys.readouterr().out.splitlines()) > 1
