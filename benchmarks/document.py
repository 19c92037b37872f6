"""Puts what was measured into `docs/results.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- solvers: begin -->", "<!-- solvers: end -->"
SUITES = ("convolution", "solvers", "reconstruction", "sweep", "memory")


def write(results: dict[str, Any]) -> None:
    """Renews the section "Solvers", between its marks."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + section(results) + END + after)


def section(results: dict[str, Any]) -> str:
    """The tables of the suites that belong to the solver layer."""
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    lines = [f"Measured with {environment}.", ""]
    for suite in SUITES:
        if suite not in results:
            continue
        lines += [
            f"### {suite.capitalize()}",
            "",
            "| what | compared with | ratio | aim | note |",
            "|---|---|---|---|---|",
        ]
        for r in results[suite]:
            aim = f"≤ {r['aim']:g}" if r["aim"] else ""
            lines.append(f"| {r['what']} | {r['compared_with']} | {r['ratio']:.2g} | {aim} | {r['note']} |")
        lines.append("")
    return "\n".join(lines)
