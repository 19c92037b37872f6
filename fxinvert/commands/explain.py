"""Explain some samples: pictures, and the numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import fxinvert
from fxinvert.commands.config import PostTrainConfig
from fxinvert.commands.finished import REPAIRS, FinishedRun
from fxinvert.commands.inputs import options_of, output_key
from fxinvert.errors import DataError
from fxinvert.explanation import Explanation
from fxinvert.passes.outputs import Key
from fxinvert.passes.plan import Plan
from fxinvert.report.console import print_json
from fxinvert.report.samples import first, pick
from fxinvert.scheduling.run_directory import RunDirectory
from fxinvert.sources import find_device, load_data, load_model
from fxinvert.training import Batches

State = Literal["before", "after"]


@dataclass(frozen=True)
class Subject:
    """What is explained, on what; and what its segments can be repaired with.

    Attributes:
        run: the run whose report is to show repairs.
    """

    model: nn.Module
    data: Batches
    plan: Plan | None
    output: Key | tuple[Key, ...] | None
    train: Any
    validation: Any = None
    run: Path | None = None


def explain(
    subject: Subject,
    samples: list[int],
    out: Path,
    console: Console,
    *,
    output_target: str = "auto",
    mean_over: int = 0,
    alone: bool = False,
    as_json: bool = False,
) -> None:
    """Explains samples, writes a picture of each, and shows the shares.

    Args:
        subject: model and data.
        samples: their numbers in the data.
        out: where pictures go: a file for one sample, else a folder.
        console: where to tell about it.
        output_target: what outputs should have been.
        mean_over: of how many samples, the first ones, the mean corrections by segment and class are shown.
        alone: whether every segment is repaired alone, to show what that gains.
        as_json: whether to print JSON instead of tables.

    Raises:
        FxInvertError: there is no such sample, or the model cannot be inverted.
    """
    if not samples and not mean_over and not alone:
        raise DataError(
            "which samples? give --sample K (several times, if you like), --mean-over COUNT or --repair-alone"
        )
    one_file = out.suffix and not out.is_dir()
    if len(samples) > 1 and one_file:
        raise DataError(f"--out {out}: several samples need a folder")
    told: dict[str, Any] = {}
    if samples:
        found = _explained(subject, samples, output_target)
        files = [
            found.save(out if one_file else out / f"explain_{number}.png", place, number)
            for place, number in enumerate(samples)
        ]
        told["samples"] = [{"sample": n, "picture": str(f)} for n, f in zip(samples, files, strict=True)]
        told |= found.to_dict()
        if not as_json:
            console.print(_table(found, samples))
            for file in files:
                console.print(f"Picture: {file}", soft_wrap=True)
    if mean_over:
        means = _explained(subject, mean_over, output_target)
        told["mean_over"] = {"samples": len(means), "by_class": means.by_class()}
        if not as_json:
            console.print(_means(means))
    if alone:
        told["repaired_alone"] = _repaired(subject, console, as_json)
    if as_json:
        print_json(told)


def subject_of_run(path: Path, state: State) -> Subject:
    """The model of a finished run, before or after, and the data that it is reported on.

    Raises:
        DataError: there is no such run, or its model or data cannot be loaded any more.
    """
    run = FinishedRun.open(path)
    given = state == "before"
    model, shown_by = (run.before, path) if given else (run.after, None)
    return Subject(model, run.data, run.plan(), run.output, run.train, run.validation, shown_by)


def subject_of(config: PostTrainConfig) -> Subject:
    """The model and the data of a configuration; the test part of the data, if it has one.

    Raises:
        DataError: something named is not there or does not fit.
    """
    find_device(config.device)
    torch.manual_seed(config.seed)
    data = load_data(config.data, options_of(config))
    model = load_model(config.model, config.weights, config.device, config.pretrained)
    batches = Batches(data.train if data.test is None else data.test, torch.device(config.device), "the data")
    output = _outputs(config.supervised_output)
    plan = None
    if config.segments is not None or config.cuts is not None:
        example = first(batches, 2).inputs
        graph = fxinvert.trace(model, example, output=output)
        plan = fxinvert.partition(graph, config.segments, cuts=config.cuts)
    return Subject(model, batches, plan, output, data.train)


def _explained(subject: Subject, samples: list[int] | int, output_target: str) -> Explanation:
    batch = first(subject.data, samples) if isinstance(samples, int) else pick(subject.data, samples)
    return fxinvert.explain(
        subject.model,
        batch.inputs,
        batch.labels,
        plan=subject.plan,
        output_target=output_target,
        output=subject.output,
    )


def _repaired(subject: Subject, console: Console, as_json: bool) -> dict[str, Any]:
    """Repairs every segment alone, and shows what that gains; for the report, too, if there is one."""
    found = fxinvert.repair_alone(
        subject.model,
        subject.train,
        plan=subject.plan,
        validation_data=subject.validation,
        output=subject.output,
    )
    if subject.run is not None:
        RunDirectory(subject.run).write_json(REPAIRS, found.to_dict())
    if not as_json:
        console.print(_gains(found))
        if subject.run is not None:
            console.print(f"The report shows it: fxinvert report {subject.run}", soft_wrap=True)
    return found.to_dict()


def _gains(found: fxinvert.Repairs) -> Table:
    """What is gained when each segment is repaired alone, the most first."""
    title = f"Repaired alone, held-out {found.baseline} before"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("segment")
    for name in ("loss gained", "loss", "accuracy"):
        table.add_column(name, justify="right")
    for name, gain in found.gained.items():
        after = found.repaired[name]
        accuracy = "-" if after.accuracy is None else f"{100 * after.accuracy:.2f} %"
        table.add_row(name, f"{gain:.4f}", f"{after.loss:.4f}", accuracy)
    return table


def _outputs(text: str | None) -> Key | tuple[Key, ...] | None:
    """One output, or several with commas between."""
    if text is None or "," not in text:
        return output_key(text)
    return tuple(key for part in text.split(",") if (key := output_key(part)) is not None)


def _table(found: Explanation, samples: list[int]) -> Table:
    """For every sample, the share of the output error that each segment's correction accounts for."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="Share of the output error", title_justify="left"
    )
    table.add_column("segment")
    for number in samples:
        table.add_column(f"sample {number}", justify="right")
        table.add_column("moved", justify="right", style="dim")
    for cut in found.cuts:
        cells = []
        for i in range(len(samples)):
            cells += [f"{100 * float(cut.share[i]):.1f} %", f"{100 * float(cut.moved[i]):.1f} %"]
        table.add_row(cut.segment, *cells)
    return table


def _means(found: Explanation) -> Table:
    """How far each segment's output has to move, relatively, in the mean over the samples of a class."""
    by_class = found.by_class()
    title = f"Mean correction, by class, over {len(found)} samples"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("segment")
    for name in by_class:
        table.add_column(name, justify="right")
    for cut in found.cuts:
        table.add_row(
            cut.segment, *(f"{100 * means[cut.segment]['moved']:.1f} %" for means in by_class.values())
        )
    return table
