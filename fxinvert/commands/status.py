"""The status of a run: how far it is, who works on it, what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
    for name, text in _words(facts(path)):
        table.add_row(name, text)
    console.print(table)


def facts(path: Path) -> dict[str, Any]:
    """What is known of a run, JSON-ready; what does not apply is None."""
    log = read_log(path)
    events = Counter(line.get("event", "") for line in log)
    trained: dict[str, Any] = next((line for line in reversed(log) if line.get("event") == "trained"), {})
    settings = read_about(path)["identity"]["settings"] if is_resumable(path) else {}
    errors = [line for line in log[-1:] if line.get("event") in ("failed", "interrupted")]
    state = "finished" if is_finished(path) else "running" if is_held(path) else "stopped"
    return {
        "run": str(path),
        "state": state,
        "holder": holder(path) if state == "running" else None,
        "error": errors[0].get("error") if errors and state == "stopped" else None,
        "method": str(settings["method"]).split(" ")[0] if settings else None,
        "waves_per_sweep": len(settings["waves"]) if settings else None,
        "begun": log[0].get("time") if log else None,
        "last_event": log[-1].get("event") if log else None,
        "last_event_time": log[-1].get("time") if log else None,
        "waves_done": events["wave"],
        "tasks_done": events["task"],
        "seconds_of_work": _seconds(log),
        "resumed": events["resumed"],
        "failures_of_tasks": events["task failed"],
        "workers_died": events["worker died"],
        "damaged_files": events["damaged"],
        "latest_wave": next((line["what"] for line in reversed(log) if line.get("event") == "wave"), None),
        "before": trained.get("before"),
        "after": trained.get("after"),
    }


def _words(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", found["run"]
    why = f" ({found['error']})" if found["error"] else ""
    yield (
        "state",
        {
            "finished": "finished",
            "running": f"running: {found['holder']}",
            "stopped": f"stopped{why}; go on with: fxinvert resume {found['run']}",
        }[found["state"]],
    )
    for name in ("method", "waves_per_sweep", "begun"):
        if found[name] is not None:
            yield name.replace("_", " "), str(found[name])
    if found["last_event"] is not None:
        yield "last event", f"{found['last_event']}, {found['last_event_time']}"
    yield "waves done", str(found["waves_done"])
    yield "tasks done", f"{found['tasks_done']}, in {found['seconds_of_work']:.1f} s of work"
    for name in ("resumed", "failures_of_tasks", "workers_died", "damaged_files", "latest_wave"):
        if found[name]:
            yield name.replace("_", " "), str(found[name])
    if found["after"] is not None:
        yield "held-out", f"{found['before']} → {found['after']}"


def _seconds(log: list[dict[str, Any]]) -> float:
    return sum(float(line.get("seconds", 0)) for line in log if line.get("event") == "task")
