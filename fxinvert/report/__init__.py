"""Reports: what is shown on the console, and the metrics that are written."""

from fxinvert.report.console import error_panel, make_console, print_json
from fxinvert.report.metrics import metrics_record, timing_record
from fxinvert.report.tables import (
    Contender,
    comparison_table,
    history_table,
    metrics_table,
    node_rows,
    nodes_table,
    rule_rows,
    rules_table,
)

__all__ = [
    "Contender",
    "comparison_table",
    "error_panel",
    "history_table",
    "make_console",
    "metrics_record",
    "metrics_table",
    "node_rows",
    "nodes_table",
    "print_json",
    "rule_rows",
    "rules_table",
    "timing_record",
]
