"""Writes `docs/results.md` and its pictures from the files of results alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.studies import STUDIES, claims
from benchmarks.studies.frame import outcomes
from benchmarks.studies.pages import save, table_of
from benchmarks.suites import FOLDER, SUITES

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
PICTURES = "pictures"

HEAD = """\
# Results

What was measured. This page is made from the files in `benchmarks/results`, each of which knows its
settings and its environment: `python -m benchmarks document`. To measure again: `python -m benchmarks all`
(`--quick` for a small part of everything); what is done is not done again.

* Times of studies are **processor seconds of one thread**, the time in which models are measured not counted: the
  machine had other work, which wall time would have measured, too.
* ± is a 95 % confidence interval of the mean over seeds (Student's t); shares of samples have Wilson's interval.
* Whatever could be chosen was chosen on held-out data; test data were only reported.
"""

SUITES_HEAD = """\
## Ratios

Times, or amounts of memory, measured in turn in one process; the median of several ratios, which depends little on the
machine and on what else runs on it. An aim is the largest ratio that was aimed at.
"""


def write(folder: Path, page: Path) -> None:
    """Writes the page, and the pictures beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(folder))
    for study in STUDIES.values():
        found = outcomes(study, folder)
        pictures = study.pictures(found) if study.pictures and found else {}
        for name, figure in pictures.items():
            save(figure, page.parent / PICTURES / f"{study.name}-{name}.svg")


def text(folder: Path) -> str:
    """The page."""
    studies = [(study, outcomes(study, folder)) for study in STUDIES.values()]
    shown = claims.section({study.name: found for study, found in studies})
    return "\n".join([HEAD, shown, *(s.section(found) for s, found in studies if found), suites(folder)])


def suites(folder: Path) -> str:
    """The tables of all suites that were measured."""
    lines = [SUITES_HEAD]
    for name in SUITES:
        file = folder / FOLDER / f"{name}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        environment = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
        rows = [
            (
                r["what"],
                r["compared_with"],
                f"{r['ratio']:.2g}",
                f"≤ {r['aim']:g}" if r["aim"] else "",
                r["note"],
            )
            for r in content["ratios"]
        ]
        lines += [
            f"### {name.capitalize()}\n",
            table_of(("what", "compared with", "ratio", "aim", "note"), rows),
            f"With {environment}.\n",
        ]
    return "\n".join(lines)
