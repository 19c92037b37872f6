"""`python -m benchmarks [NAME …]`: measure, print, and write `benchmarks/results.json`."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads measure the neighbours

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import (
    consistency,
    convolution,
    document,
    memory,
    reconstruction,
    regions,
    rules,
    solvers,
    sweep,
)
from benchmarks.measure import environment

SUITES = {
    "convolution": convolution.run,
    "solvers": solvers.run,
    "reconstruction": reconstruction.run,
    "rules": rules.run,
    "sweep": sweep.run,
    "memory": memory.run,
    "regions": regions.run,
    "consistency": consistency.run,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"which: {', '.join(SUITES)}")] = None,
    write: Annotated[bool, typer.Option(help="put the tables into docs/results.md, too")] = False,
) -> None:
    """Measures ratios, side by side in one run."""
    console = Console()
    known = Path(__file__).with_name("results.json")
    for name in names or list(SUITES):
        table = Table("what", "compared with", "ratio", "aim", "note", title=name)
        measured = list(SUITES[name]())
        for r in measured:
            table.add_row(r.what, r.compared_with, f"{r.ratio:.2g}", f"{r.aim:g}" if r.aim else "", r.note)
        console.print(table)
        # read anew: other runs may have written meanwhile
        results: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
        results |= {"environment": environment(), name: [r.to_dict() for r in measured]}
        known.write_text(json.dumps(results, indent=2) + "\n")
        if write:
            document.write(results)


if __name__ == "__main__":
    typer.run(main)
