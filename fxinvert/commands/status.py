"""The status of a run: how far it is, who works on it, what went wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fxinvert.errors import DataError
from fxinvert.report.console import print_json
from fxinvert.scheduling.journal import holder, is_held, read_about, read_log
from fxinvert.scheduling.run_directory import CONFIG, is_finished, is_resumable


def show_status(path: Path, console: Console, as_json: bool = False) -> None:
    """Shows the status of a run.

    Args:
        path: of its directory.
        console: where to show it.
        as_json: whether to print JSON instead.

    Raises:
        DataError: there is no run.
    """
    if not path.is_dir() or not (is_finished(path) or is_resumable(path) or (path / CONFIG).is_file()):
        raise DataError(f"there is no run in {path}")
    if as_json:
        print_json(facts(path))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in facts(path).items():
        table.add_row(name, text)
    console.print(table)


def facts(path: Path) -> dict[str, str]:
    """What is known of a run, in words."""
    log = read_log(path)
    events = Counter(line.get("event", "") for line in log)
    found = {"run": str(path), "state": _state(path, log)}
    if is_resumable(path):
        settings = read_about(path)["identity"]["settings"]
        found["method"] = str(settings["method"]).split(" ")[0]
        found["waves per sweep"] = str(len(settings["waves"]))
    if log:
        found["begun"] = str(log[0].get("time"))
        found["last event"] = f"{log[-1].get('event')}, {log[-1].get('time')}"
    found["waves done"] = str(events["wave"])
    found["tasks done"] = f"{events['task']}, in {_seconds(log):.1f} s of work"
    for event, words in (
        ("resumed", "resumed"),
        ("task failed", "failures of tasks"),
        ("worker died", "workers died"),
        ("damaged", "damaged files"),
    ):
        if events[event]:
            found[words] = str(events[event])
    latest = next((line["what"] for line in reversed(log) if line.get("event") == "wave"), "")
    trained = next((line for line in reversed(log) if line.get("event") == "trained"), None)
    if latest:
        found["latest wave"] = latest
    if trained is not None:
        found["held-out"] = f"{trained['before']} → {trained['after']}"
    return found


def _state(path: Path, log: list[dict[str, Any]]) -> str:
    if is_finished(path):
        return "finished"
    if is_held(path):
        return f"running: {holder(path)}"
    errors = [line for line in log if line.get("event") in ("failed", "interrupted") and "error" in line]
    why = f" ({errors[-1]['error']})" if errors and log[-1] is errors[-1] else ""
    return f"stopped{why}; go on with: fxinvert resume {path}"


def _seconds(log: list[dict[str, Any]]) -> float:
    return sum(float(line.get("seconds", 0)) for line in log if line.get("event") == "task")
