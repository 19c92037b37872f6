"""Commands that train: the demonstration, a run, and a run that goes on or is looked after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fxinvert.command_line.options import (
    DEFAULT,
    Address,
    Alpha,
    AnyData,
    AnyModel,
    AsJson,
    BatchSize,
    Chunk,
    Cuts,
    Device,
    Directory,
    Epochs,
    ErrorMeasure,
    Every,
    Executor,
    Export,
    InputColumns,
    LabelColumns,
    Mean,
    Only,
    Ops,
    OptimizerName,
    PositionFraction,
    Pretrained,
    Recalibrate,
    Report,
    Resize,
    Run,
    ScheduleName,
    Seed,
    Segments,
    ShareName,
    Solvers,
    Std,
    SupervisedOutput,
    TrainingMethod,
    Weights,
    Workers,
    config_of,
    given,
    setting,
)
from fxinvert.commands.config import PLACE, PostTrainConfig, read_settings
from fxinvert.errors import DataError


def demo(
    model: Annotated[
        Literal["digits_cnn", "digits_mlp"], typer.Option(help="The reference network.")
    ] = "digits_cnn",
    state: Annotated[Literal["early", "converged"], typer.Option(help="The state of its weights.")] = "early",
    run_directory: Directory = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which AdamW sees the samples.")] = 0,
    report: Report = True,
    as_json: AsJson = False,
) -> None:
    """Do everything on data and weights inside the package: plan, post-train, compare with AdamW, export, prove."""
    from fxinvert.commands.demo import demo as run_demo
    from fxinvert.commands.report import conclude
    from fxinvert.report import make_console

    console = make_console(stderr=as_json)
    conclude(run_demo(model, state, run_directory, seed, console), report, console, as_json)


def post_train(
    context: typer.Context,
    model: AnyModel = "",
    data: AnyData = "",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Settings, such as config.yaml of a run; what is given besides goes first."
        ),
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    validation: Annotated[str | None, setting("validation", metavar="DATA")] = None,
    test: Annotated[str | None, setting("test", metavar="DATA")] = None,
    segments: Segments = None,
    cuts: Cuts = None,
    only: Only = None,
    method: TrainingMethod = DEFAULT.method,
    schedule: ScheduleName = DEFAULT.schedule,
    output_target: Annotated[str, setting("output_target")] = DEFAULT.output_target,
    supervised_output: SupervisedOutput = None,
    sweeps: Annotated[int | None, setting("sweeps", min=1)] = DEFAULT.sweeps,
    patience: Annotated[int, setting("patience", min=1)] = DEFAULT.patience,
    least_gain: Annotated[float, setting("least_gain", min=0)] = DEFAULT.least_gain,
    confidence: Annotated[float, setting("confidence", min=0.5, max=1)] = DEFAULT.confidence,
    inputs: Annotated[Literal["updated", "original"], setting("inputs")] = DEFAULT.inputs,
    share: ShareName = DEFAULT.share,
    recalibrate: Recalibrate = False,
    keep_zeros: Annotated[bool, setting("keep_zeros", "--keep-zeros/--no-keep-zeros")] = False,
    damping: Annotated[float, setting("damping", min=0)] = DEFAULT.damping,
    satisfied_weight: Annotated[float, setting("satisfied_weight", min=0, max=1)] = DEFAULT.satisfied_weight,
    error: ErrorMeasure = DEFAULT.error,
    every: Every = None,
    ops: Ops = DEFAULT.ops,
    position_fraction: PositionFraction = None,
    optimizer: OptimizerName = DEFAULT.optimizer,
    learning_rate: Annotated[float | None, setting("learning_rate")] = None,
    epochs: Epochs = DEFAULT.epochs,
    alpha: Alpha = DEFAULT.alpha,
    executor: Executor = DEFAULT.executor,
    workers: Workers = None,
    address: Address = None,
    threads: Annotated[int, setting("threads", min=1)] = DEFAULT.threads,
    chunk: Chunk = DEFAULT.chunk,
    retries: Annotated[int, setting("retries", min=0)] = DEFAULT.retries,
    memory_limit: Annotated[int | None, setting("memory_limit", min=1)] = DEFAULT.memory_limit,
    solvers: Solvers = None,
    compiled: Annotated[bool, setting("compiled", "--compiled/--no-compiled")] = DEFAULT.compiled,
    device: Device = DEFAULT.device,
    batch_size: BatchSize = DEFAULT.batch_size,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    input_columns: InputColumns = None,
    label_columns: LabelColumns = None,
    seed: Seed = DEFAULT.seed,
    export: Export = DEFAULT.export,
    report: Report = DEFAULT.report,
    run_directory: Directory = None,
    as_json: AsJson = False,
) -> None:
    """Post-train your model on your data; write weights, metrics, a proven ONNX file and a report."""
    settings = config_of(context, **(read_settings(config) if config is not None else {}))
    if not settings.model or not settings.data:
        raise DataError("a model and data are needed: fxinvert post-train MODEL DATA, or --config FILE")
    from fxinvert.commands.report import conclude
    from fxinvert.commands.run import execute
    from fxinvert.report import make_console

    console = make_console(stderr=as_json)
    conclude(execute(settings, run_directory, console), settings.report, console, as_json)


def resume(
    context: typer.Context,
    run: Run,
    executor: Executor = DEFAULT.executor,
    workers: Workers = None,
    address: Address = None,
    export: Export = DEFAULT.export,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was interrupted; it ends as if it had not been."""
    from fxinvert.commands.report import conclude
    from fxinvert.commands.run import resume as go_on
    from fxinvert.report import make_console
    from fxinvert.scheduling.run_directory import CONFIG, is_finished

    console = make_console(stderr=as_json)
    if is_finished(run):
        console.print(f"The run in {run} is finished.")
        return
    place = {name: value for name, value in given(context).items() if name in (*PLACE, "export")}
    go_on(run, place, console)
    conclude(run, PostTrainConfig.of(**read_settings(run / CONFIG)).report, console, as_json)


def status(run: Run, as_json: AsJson = False) -> None:
    """Tell how far a run is, who works on it, and what went wrong."""
    from fxinvert.commands.status import show_status
    from fxinvert.report import make_console

    show_status(run, make_console(), as_json)
