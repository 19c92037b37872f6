"""The page: a report as one HTML file that needs nothing else, and lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import math
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from fxinvert.report.pictures import curve, histogram
from fxinvert.report.record import Report

#: statuses that the graph and the tables colour, from the strongest promise to the weakest
STATUSES = (
    "passed through",
    "exact",
    "nearest",
    "least squares",
    "projected",
    "damped",
    "failed",
    "no target",
)


def render(report: Report) -> str:
    """The page.

    All text is escaped. The page forbids itself every request, and every script but its own, known by its digest.
    """
    sources = {name: _read(name) for name in ("page.html", "page.css", "page.js")}
    script = sources["page.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=DictLoader({"page.html": sources["page.html"]}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "count": count,
        "points": partial(percent, sign=True),
        "signed": signed,
        "status": status_class,
    }
    return environment.get_template("page.html").render(
        **report.facts,
        pictures=report.pictures,
        style=Markup(sources["page.css"]),
        script=Markup(script),
        digest=digest,
        statuses=STATUSES,
        curves=_curves(report.facts),
        histograms=[
            histogram(**output["errors"]) if "errors" in output else None
            for output in report.facts["outputs"]
        ],
    )


def percent(value: float | None, sign: bool = False) -> str:
    """A share as people read it; a change of one, in points."""
    if value is None:
        return "-"
    return f"{100 * value:+.2f} points" if sign else f"{100 * value:.2f} %"


def number(value: float | None) -> str:
    """A number with four digits."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4g}"


def signed(value: float) -> str:
    """A change."""
    return f"{value:+.4g}"


def count(value: int) -> str:
    """A whole number with separators."""
    return f"{value:,}"


def status_class(status: str) -> str:
    """The class name of a status."""
    return f"s{STATUSES.index(status)}"


def _curves(facts: dict[str, Any]) -> dict[str, Markup]:
    """Held-out loss and accuracy through the updates with the output target that was gone on with."""
    updates = [update for update in facts["updates"] if update["kept"]]
    if not updates:
        return {}
    sweeps = [0, *(update["sweep"] for update in updates)]
    held_out = facts["metrics"].get("held_out", {}).get("before", {})
    losses = [updates[0]["loss_before"], *(update["loss_after"] for update in updates)]
    found = {"held-out loss": curve(losses, sweeps, "held-out loss")}
    accuracies = [held_out.get("accuracy"), *(update["accuracy_after"] for update in updates)]
    if any(value is not None for value in accuracies):
        shares = [None if value is None else 100 * value for value in accuracies]
        found["held-out accuracy, %"] = curve(shares, sweeps, "held-out accuracy, %")
    return found


def _read(name: str) -> str:
    return files("fxinvert.report").joinpath("web", name).read_text(encoding="utf-8")
