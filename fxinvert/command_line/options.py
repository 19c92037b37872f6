"""Arguments and options of the command line: what several commands share, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxinvert.commands.config import ExecutorName, MethodName, PostTrainConfig, Schedule, Share
from fxinvert.errors import DataError


def setting(name: str, *flags: str, **more: Any) -> Any:
    """An option that sets a field of the configuration, described there."""
    return typer.Option(*flags, help=PostTrainConfig.describe(name), **more)


def _argument(name: str, metavar: str, **more: Any) -> Any:
    return typer.Argument(help=PostTrainConfig.describe(name), metavar=metavar, **more)


#: the settings by default
DEFAULT = PostTrainConfig(model="", data="")

Model = Annotated[str, _argument("model", "MODEL")]
AnyModel = Annotated[str, _argument("model", "[MODEL]", show_default=False)]
AnyData = Annotated[str, _argument("data", "[DATA]", show_default=False)]
Weights = Annotated[Path | None, setting("weights", metavar="FILE")]
Pretrained = Annotated[bool, setting("pretrained", "--pretrained")]
Segments = Annotated[int | None, setting("segments", min=1)]
Cuts = Annotated[list[str] | None, setting("cuts", metavar="NAME,…")]
SupervisedOutput = Annotated[str | None, setting("supervised_output", metavar="NAME|INDEX")]
Only = Annotated[list[str] | None, setting("only", metavar="NAME,…")]
TrainingMethod = Annotated[MethodName, setting("method")]
ShareName = Annotated[Share, setting("share")]
Recalibrate = Annotated[bool, setting("recalibrate", "--recalibrate/--no-recalibrate")]
ErrorMeasure = Annotated[Literal["plain", "weighted"], setting("error")]
Every = Annotated[int | None, setting("every", min=1)]
Ops = Annotated[Literal["together", "in_turn"], setting("ops")]
PositionFraction = Annotated[float | None, setting("position_fraction", min=0, max=1)]
Solvers = Annotated[list[str] | None, setting("solvers", metavar="NODE=SOLVER,…")]
OptimizerName = Annotated[str, setting("optimizer")]
Epochs = Annotated[int, setting("epochs", min=1)]
Alpha = Annotated[float, setting("alpha", min=0)]
ScheduleName = Annotated[Schedule, setting("schedule")]
Executor = Annotated[ExecutorName, setting("executor")]
Workers = Annotated[int | None, setting("workers", min=1)]
Address = Annotated[str | None, setting("address", metavar="ADDRESS")]
Chunk = Annotated[int, setting("chunk", min=1)]
Device = Annotated[str, setting("device")]
BatchSize = Annotated[int, setting("batch_size", min=1)]
Mean = Annotated[str | None, setting("mean", metavar="NUMBER,…")]
Std = Annotated[str | None, setting("std", metavar="NUMBER,…")]
Resize = Annotated[str | None, setting("resize", metavar="HEIGHT,WIDTH")]
InputColumns = Annotated[str | None, setting("input_columns", metavar="NAME,…")]
LabelColumns = Annotated[str | None, setting("label_columns", metavar="NAME,…")]
Seed = Annotated[int, setting("seed", min=0)]
Export = Annotated[bool, setting("export", "--export/--no-export")]
Report = Annotated[bool, setting("report", "--report/--no-report")]
Run = Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN")]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--run-directory",
        metavar="DIR",
        show_default="runs/<time>",
        help="Where to write: a new or empty folder.",
    ),
]
File = Annotated[Path, typer.Argument(help="The ONNX file.", metavar="FILE")]
Example = Annotated[
    str | None,
    typer.Option("--data", help="Data, as for post-train; its first batch is the example.", metavar="DATA"),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="SIZE,…",
        help="Instead of data: shape of an input without the batch; once per input.",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(metavar="SIZE,…", help="Batch sizes at which the file is proven.", show_default="1,2,7"),
]
Axis = Annotated[
    list[str] | None,
    typer.Option(metavar="INPUT:DIM=NAME", help="Another dimension that may vary, e.g. tokens:1=length."),
]
Atol = Annotated[float | None, typer.Option(min=0, help="Absolute tolerance.", show_default="1e-5")]
Rtol = Annotated[
    float | None, typer.Option(min=0, help="Tolerance relative to each expected number.", show_default="1e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and everything else on standard error.")]


def config_of(context: typer.Context, **settings: Any) -> PostTrainConfig:
    """The configuration with these settings, and those that the command line gives, which go first.

    Raises:
        DataError: one of them does not fit.
    """
    return PostTrainConfig.of(**{"model": "", "data": ""} | settings | given(context))


def given(context: typer.Context) -> dict[str, Any]:
    """The settings that the command line gives, read, without those that it leaves as they are.

    Raises:
        DataError: one of them cannot be read.
    """
    return {
        name: _read(name, value)
        for name, value in context.params.items()
        if name in PostTrainConfig.model_fields
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def shapes_of(texts: list[str] | None) -> list[tuple[int, ...]]:
    """What `--shape` says, once per input.

    Raises:
        DataError: it is no list of whole numbers.
    """
    return [tuple(integers("--shape", text)) for text in texts or ()]


def integers(option: str, text: str) -> list[int]:
    """Whole numbers with commas, or `x`, between them.

    Raises:
        DataError: they are something else.
    """
    try:
        return [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise DataError(
            f"{option} {text!r}: whole numbers separated by commas are needed, e.g. 3,32,32"
        ) from error


def _read(name: str, value: Any) -> Any:
    """A setting as it is meant, from how it is written."""
    match name:
        case "cuts" | "only":
            return tuple(part for text in value for part in text.split(",") if part)
        case "solvers":
            return dict(_pair(part) for text in value for part in text.split(",") if part)
        case "input_columns" | "label_columns":
            return tuple(part.strip() for part in value.split(",") if part.strip())
        case "mean" | "std":
            return _numbers(f"--{name}", value)
        case "resize":
            return _size(value)
    return value


def _pair(text: str) -> tuple[str, str]:
    node, equals, solver = text.partition("=")
    if not equals:
        raise DataError(f"--solvers {text!r}: nodes and their solvers are needed, e.g. conv1=banded,conv2=qr")
    return node, solver


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(
            f"{option} {text!r}: numbers separated by commas are needed, e.g. 0.5,0.5,0.5"
        ) from error


def _size(text: str) -> tuple[int, int]:
    sizes = integers("--resize", text)
    if len(sizes) > 2:
        raise DataError(f"--resize {text!r}: a height and a width are needed, or one number for both")
    return sizes[0], sizes[-1]
