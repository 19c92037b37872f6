"""`python -m benchmarks [NAME …]`: measure, print, and write `benchmarks/results.json`."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads measure the neighbours

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import convolution, reconstruction, rules, sweep
from benchmarks.measure import environment

SUITES = {
    "convolution": convolution.run,
    "reconstruction": reconstruction.run,
    "rules": rules.run,
    "sweep": sweep.run,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"which: {', '.join(SUITES)}")] = None,
) -> None:
    """Measures ratios, side by side in one run."""
    console = Console()
    results: dict[str, object] = {"environment": environment()}
    for name in names or list(SUITES):
        table = Table("what", "compared with", "ratio", "aim", "note", title=name)
        measured = list(SUITES[name]())
        for r in measured:
            table.add_row(r.what, r.compared_with, f"{r.ratio:.2g}", f"{r.aim:g}" if r.aim else "", r.note)
        console.print(table)
        results[name] = [r.to_dict() for r in measured]
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
