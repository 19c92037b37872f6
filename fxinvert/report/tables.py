"""Tables for the console: metrics before and after, methods side by side, sweeps, rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import fx

import fxinvert
from fxinvert.result import Record
from fxinvert.rules import Rule, RuleSet
from fxinvert.training import Metrics


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Attributes:
        name: the method.
        held_out, test: its metrics; None where it was not measured.
        seconds: wall time; None for the model as given.
        remark: anything else, e.g. the learning rate.
        winner: whether the row is emphasized.
    """

    name: str
    held_out: Metrics | None
    test: Metrics | None
    seconds: float | None = None
    remark: str = ""
    winner: bool = False


def metrics_table(changes: Mapping[str, tuple[Metrics, Metrics]]) -> Table:
    """Metrics before and after, a row per data set.

    Args:
        changes: (before, after) by the data's name.
    """
    table = _table("data", ">samples", ">loss before", ">after", ">accuracy before", ">after", ">change")
    for name, (before, after) in changes.items():
        table.add_row(
            name,
            f"{after.samples:,}",
            f"{before.loss:.4f}",
            f"{after.loss:.4f}",
            _percent(before.accuracy),
            _percent(after.accuracy),
            _points(before.accuracy, after.accuracy),
        )
    return table


def comparison_table(contenders: Sequence[Contender]) -> Table:
    """Methods side by side."""
    table = _table(
        "method", "", ">held-out loss", ">held-out accuracy", ">test loss", ">test accuracy", ">seconds"
    )
    for row in contenders:
        held_out, test = row.held_out, row.test
        table.add_row(
            row.name,
            row.remark,
            f"{held_out.loss:.4f}" if held_out else "-",
            _percent(held_out.accuracy) if held_out else "-",
            f"{test.loss:.4f}" if test else "-",
            _percent(test.accuracy) if test else "-",
            "-" if row.seconds is None else f"{row.seconds:.2f}",
            style="bold" if row.winner else None,
        )
    return table


def history_table(history: Sequence[Record]) -> Table:
    """Every update that was tried: step, share of the error explained, held-out metrics after it."""
    table = _table(
        "sweep", "segment", "output target", ">error explained", ">step", ">held-out loss", ">accuracy"
    )
    for record in history:
        explained = [
            f"{100 * share:.0f} %"
            if share or record.damping.get(name)
            else name  # gradient runs solve nothing
            for name, share in record.explained.items()
        ]
        table.add_row(
            str(record.sweep),
            ", ".join(record.segments),
            record.output_target,
            ", ".join(explained),
            f"{record.step:g}",
            f"{record.after.loss:.4f}",
            _percent(record.after.accuracy),
        )
    return table


def nodes_table(graph: fx.GraphModule, rules: RuleSet) -> Table:
    """The rule that inverts each node, in the order of the graph."""
    table = _table("node", "op", "output shape", "rule", "trained in closed form")
    for row in node_rows(graph, rules):
        table.add_row(
            row["node"],
            row["op"],
            "x".join(map(str, row["shape"])) or "1",
            row["rule"] or Text("none", style="red"),
            "yes" if row["trained"] else "",
        )
    return table


def node_rows(graph: fx.GraphModule, rules: RuleSet) -> list[dict[str, Any]]:
    """What `nodes_table` shows, JSON-ready; the rule is None where there is none."""
    rows = []
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or not node.meta.get("active"):
            continue
        rule = rules.lookup(node.meta["op"])
        rows.append(
            {
                "node": node.meta["path"],
                "op": node.meta["op"],
                "shape": list(node.meta["tensor_meta"].shape[1:]),
                "rule": rule.kind.value if rule else None,
                "trained": bool(rule and rule.trainable),
            }
        )
    return rows


def rules_table(rules: RuleSet) -> Table:
    """All rules: how each finds its answer, whether its op can be trained, where it is written."""
    table = _table("op", "rule", "trained in closed form", "written at")
    for row in rule_rows(rules):
        table.add_row(row["op"], row["rule"], "yes" if row["trained"] else "", row["origin"])
    return table


def rule_rows(rules: RuleSet) -> list[dict[str, Any]]:
    """What `rules_table` shows, JSON-ready."""
    return [
        {"op": key, "rule": rule.kind.value, "trained": bool(rule.trainable), "origin": origin_of(rule)}
        for key, rule in rules.items()
    ]


def origin_of(rule: Rule) -> str:
    """File and line of a rule, without the folder that fxinvert is installed in."""
    parent = Path(fxinvert.__file__).parent.parent
    file, separator, line = rule.origin.rpartition(":")
    path = Path(file)
    shown = path.relative_to(parent).as_posix() if separator and path.is_relative_to(parent) else file
    return f"{shown}{separator}{line}"


def _table(*headers: str) -> Table:
    """A table; a header that begins with `>` stands over numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header.removeprefix(">"), justify="right" if header.startswith(">") else "left")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _points(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after - before):+.2f} points"
