"""Commands that look: at a plan, a decision, a run and the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fxinvert.command_line.options import (
    DEFAULT,
    Alpha,
    AnyData,
    AnyModel,
    AsJson,
    BatchSize,
    Chunk,
    Cuts,
    Device,
    Epochs,
    ErrorMeasure,
    Every,
    InputColumns,
    LabelColumns,
    Mean,
    Model,
    Only,
    Ops,
    OptimizerName,
    PositionFraction,
    Pretrained,
    Recalibrate,
    Resize,
    Run,
    ScheduleName,
    Segments,
    Shapes,
    ShareName,
    Std,
    SupervisedOutput,
    TrainingMethod,
    Weights,
    config_of,
    shapes_of,
)
from fxinvert.errors import DataError


def plan(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str | None,
        typer.Argument(help="Data, as for post-train; its first batch tells the shapes.", metavar="[DATA]"),
    ] = None,
    shape: Shapes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    segments: Segments = None,
    cuts: Cuts = None,
    supervised_output: SupervisedOutput = None,
    only: Only = None,
    method: TrainingMethod = DEFAULT.method,
    schedule: ScheduleName = DEFAULT.schedule,
    share: ShareName = DEFAULT.share,
    recalibrate: Recalibrate = DEFAULT.recalibrate,
    error: ErrorMeasure = DEFAULT.error,
    every: Every = None,
    ops: Ops = DEFAULT.ops,
    position_fraction: PositionFraction = None,
    optimizer: OptimizerName = DEFAULT.optimizer,
    epochs: Epochs = DEFAULT.epochs,
    alpha: Alpha = DEFAULT.alpha,
    samples: Annotated[int, typer.Option(min=1, help="Samples to train on, for the estimates.")] = 10_000,
    batch_size: BatchSize = DEFAULT.batch_size,
    chunk: Chunk = DEFAULT.chunk,
    device: Device = DEFAULT.device,
    resize: Resize = None,
    input_columns: InputColumns = None,
    label_columns: LabelColumns = None,
    as_json: AsJson = False,
) -> None:
    """Show how a model would be split, which rule inverts each node, and what a sweep costs, without training."""
    from fxinvert.commands.look import show_plan
    from fxinvert.report import make_console

    show_plan(config_of(context), shapes_of(shape), samples, make_console(), as_json)


def explain(
    context: typer.Context,
    model: AnyModel = "",
    data: AnyData = "",
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Instead of a model and data: a finished run.")
    ] = None,
    state: Annotated[
        Literal["before", "after"], typer.Option(help="Which model of the run: as given, or post-trained.")
    ] = "before",
    sample: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="K", help="A sample's number in the data, from 0; several are allowed."),
    ] = None,
    mean_over: Annotated[
        int, typer.Option(min=0, help="Show mean corrections by class over so many samples.")
    ] = 0,
    repair_alone: Annotated[
        bool,
        typer.Option(
            "--repair-alone",
            help="Train every segment alone, all else as it is, and show what that gains: the most where a layer is damaged.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where pictures go: a .png, .svg or .pdf file, or a folder."),
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    segments: Segments = None,
    cuts: Cuts = None,
    output_target: Annotated[
        str, typer.Option(help="What outputs should have been; auto: margin for classes, else regression.")
    ] = "auto",
    supervised_output: SupervisedOutput = None,
    device: Device = DEFAULT.device,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    input_columns: InputColumns = None,
    label_columns: LabelColumns = None,
    as_json: AsJson = False,
) -> None:
    """Show what every cut computed for a sample, what it should have computed, and where that would put it right."""
    if (run is None) == (not model or not data):
        raise DataError("give either a model and data, fxinvert explain MODEL DATA, or --run RUN")
    from fxinvert.commands import explain as command
    from fxinvert.report import make_console

    command.explain(
        command.subject_of(config_of(context)) if run is None else command.subject_of_run(run, state),
        sample or [],
        out or run or Path(),
        make_console(),
        output_target=output_target,
        mean_over=mean_over,
        alone=repair_alone,
        as_json=as_json,
    )


def report(
    run: Run,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default="the run's", help="Where to write: a new or empty folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished run's report: one page to look at, report.html, and the same facts in report.json."""
    from fxinvert.commands.report import report as write_report
    from fxinvert.report import make_console

    write_report(run, out, make_console(), as_json)


def rules(
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import this first, so that its rules are listed too."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/rules.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the inverse rules: how each finds its answer, whether its op can be trained, where it is written."""
    from fxinvert.commands.look import rules_markdown, show_rules
    from fxinvert.report import make_console

    if markdown:
        typer.echo(rules_markdown(modules or []), nl=False)
    else:
        show_rules(modules or [], make_console(), as_json)
