"""The command line. Thin: it reads arguments, calls what does the work, and shows errors.

torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from fxinvert.commands.config import (
    PLACE,
    ExecutorName,
    MethodName,
    PostTrainConfig,
    Schedule,
    Share,
    read_settings,
)
from fxinvert.errors import DataError, FxInvertError

FAILED, INTERRUPTED = 2, 130


class _Group(TyperGroup):
    """Shows errors of ours as a panel; `--debug` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxInvertError as error:
            if ctx.params.get("debug"):
                raise
            from fxinvert.report.console import error_panel, make_console

            make_console(stderr=True).print(error_panel(error))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    epilog="Begin with: [bold]fxinvert demo[/bold]",
)


def _setting(name: str, *flags: str, **more: Any) -> Any:
    """An option that sets a field of the configuration, described there."""
    return typer.Option(*flags, help=PostTrainConfig.describe(name), **more)


#: the settings by default
DEFAULT = PostTrainConfig(model="", data="")

Model = Annotated[str, typer.Argument(help=PostTrainConfig.describe("model"), metavar="MODEL")]
Weights = Annotated[Path | None, _setting("weights", metavar="FILE")]
Segments = Annotated[int | None, _setting("segments", min=1)]
Cuts = Annotated[list[str] | None, _setting("cuts", metavar="NAME,…")]
SupervisedOutput = Annotated[str | None, _setting("supervised_output", metavar="NAME|INDEX")]
Device = Annotated[str, _setting("device")]
BatchSize = Annotated[int, _setting("batch_size", min=1)]
Mean = Annotated[str | None, _setting("mean", metavar="NUMBER,…")]
Std = Annotated[str | None, _setting("std", metavar="NUMBER,…")]
Resize = Annotated[str | None, _setting("resize", metavar="HEIGHT,WIDTH")]
Seed = Annotated[int, _setting("seed", min=0)]
Workers = Annotated[int | None, _setting("workers", min=1)]
Address = Annotated[str | None, _setting("address", metavar="ADDRESS")]
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


def _show_version(wanted: bool) -> None:
    if wanted:
        import fxinvert

        typer.echo(f"fxinvert {fxinvert.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Post-train pretrained PyTorch networks without back-propagation, and export proven ONNX."""


@app.command(epilog="Example: [bold]fxinvert demo --model digits_mlp --run-directory my_run[/bold]")
def demo(
    model: Annotated[
        Literal["digits_cnn", "digits_mlp"], typer.Option(help="The reference network.")
    ] = "digits_cnn",
    state: Annotated[Literal["early", "converged"], typer.Option(help="The state of its weights.")] = "early",
    run_directory: Directory = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which AdamW sees the samples.")] = 0,
) -> None:
    """Do everything on data and weights inside the package: plan, post-train, compare with AdamW, export, prove."""
    from fxinvert.commands.demo import demo as run_demo
    from fxinvert.report import make_console

    run_demo(model, state, run_directory, seed, make_console())


@app.command(
    name="post-train",
    epilog="Examples:\n\n"
    "[bold]fxinvert post-train my_nets:small_cnn data.npz --weights small_cnn.pt[/bold]\n\n"
    "[bold]fxinvert post-train my_nets:resnet photos/train --test photos/test --resize 64,64 "
    "--cuts layer1,layer2[/bold]\n\n"
    "[bold]fxinvert post-train my_nets:small_cnn my_data:loader --schedule parallel --executor processes[/bold]\n\n"
    "[bold]fxinvert post-train --config runs/first/config.yaml --sweeps 5[/bold]",
)
def post_train(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help=PostTrainConfig.describe("model"), metavar="[MODEL]", show_default=False)
    ] = "",
    data: Annotated[
        str, typer.Argument(help=PostTrainConfig.describe("data"), metavar="[DATA]", show_default=False)
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Settings, such as config.yaml of a run; what is given besides goes first."
        ),
    ] = None,
    weights: Weights = None,
    validation: Annotated[str | None, _setting("validation", metavar="DATA")] = None,
    test: Annotated[str | None, _setting("test", metavar="DATA")] = None,
    segments: Segments = None,
    cuts: Cuts = None,
    only: Annotated[list[str] | None, _setting("only", metavar="NAME,…")] = None,
    method: Annotated[MethodName, _setting("method")] = DEFAULT.method,
    schedule: Annotated[Schedule, _setting("schedule")] = DEFAULT.schedule,
    output_target: Annotated[str, _setting("output_target")] = DEFAULT.output_target,
    supervised_output: SupervisedOutput = None,
    sweeps: Annotated[int, _setting("sweeps", min=1)] = DEFAULT.sweeps,
    patience: Annotated[int, _setting("patience", min=1)] = DEFAULT.patience,
    least_gain: Annotated[float, _setting("least_gain", min=0)] = DEFAULT.least_gain,
    inputs: Annotated[Literal["updated", "original"], _setting("inputs")] = DEFAULT.inputs,
    share: Annotated[Share, _setting("share")] = DEFAULT.share,
    recalibrate: Annotated[bool, _setting("recalibrate", "--recalibrate/--no-recalibrate")] = False,
    damping: Annotated[float, _setting("damping", min=0)] = DEFAULT.damping,
    satisfied_weight: Annotated[float, _setting("satisfied_weight", min=0, max=1)] = DEFAULT.satisfied_weight,
    error: Annotated[Literal["plain", "weighted"], _setting("error")] = DEFAULT.error,
    every: Annotated[int | None, _setting("every", min=1)] = None,
    ops: Annotated[Literal["together", "in_turn"], _setting("ops")] = DEFAULT.ops,
    optimizer: Annotated[str, _setting("optimizer")] = DEFAULT.optimizer,
    learning_rate: Annotated[float | None, _setting("learning_rate")] = None,
    epochs: Annotated[int, _setting("epochs", min=1)] = DEFAULT.epochs,
    alpha: Annotated[float, _setting("alpha", min=0)] = DEFAULT.alpha,
    executor: Annotated[ExecutorName, _setting("executor")] = DEFAULT.executor,
    workers: Workers = None,
    address: Address = None,
    threads: Annotated[int, _setting("threads", min=1)] = DEFAULT.threads,
    chunk: Annotated[int, _setting("chunk", min=1)] = DEFAULT.chunk,
    retries: Annotated[int, _setting("retries", min=0)] = DEFAULT.retries,
    memory_limit: Annotated[int, _setting("memory_limit", min=1)] = DEFAULT.memory_limit,
    device: Device = DEFAULT.device,
    batch_size: BatchSize = DEFAULT.batch_size,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    seed: Seed = DEFAULT.seed,
    export: Annotated[bool, _setting("export", "--export/--no-export")] = DEFAULT.export,
    run_directory: Directory = None,
) -> None:
    """Post-train your model on your data; write weights, metrics and a proven ONNX file."""
    settings = read_settings(config) if config is not None else {}
    settings |= {name: _read(name, value) for name, value in _given(context).items()}
    if not settings.get("model") or not settings.get("data"):
        raise DataError("a model and data are needed: fxinvert post-train MODEL DATA, or --config FILE")
    checked = PostTrainConfig.of(**settings)
    from fxinvert.commands.run import execute
    from fxinvert.report import make_console

    execute(checked, run_directory, make_console())


@app.command(epilog="Example: [bold]fxinvert resume runs/2026-01-31_12-00-00 --executor processes[/bold]")
def resume(
    context: typer.Context,
    run: Run,
    executor: Annotated[ExecutorName, _setting("executor")] = DEFAULT.executor,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Go on with a run that was interrupted; it ends as if it had not been."""
    from fxinvert.commands.run import resume as go_on
    from fxinvert.report import make_console
    from fxinvert.scheduling.run_directory import is_finished

    console = make_console()
    if is_finished(run):
        console.print(f"The run in {run} is finished.", markup=False)
        return
    given = _given(context)
    go_on(run, {name: value for name, value in given.items() if name in PLACE}, console)


@app.command(epilog="Example: [bold]fxinvert status runs/2026-01-31_12-00-00[/bold]")
def status(run: Run) -> None:
    """Tell how far a run is, who works on it, and what went wrong."""
    from fxinvert.commands.status import show_status
    from fxinvert.report import make_console

    show_status(run, make_console())


@app.command(
    epilog="Examples:\n\n[bold]fxinvert plan my_nets:small_cnn --shape 1,8,8[/bold]\n\n"
    "[bold]fxinvert plan my_nets:small_cnn data.npz --segments 2[/bold]"
)
def plan(
    model: Model,
    data: Annotated[
        str | None,
        typer.Argument(help="Data, as for post-train; its first batch tells the shapes.", metavar="[DATA]"),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE,…", help="Instead of data: shape of an input without the batch; once per input."
        ),
    ] = None,
    weights: Weights = None,
    segments: Segments = None,
    cuts: Cuts = None,
    supervised_output: SupervisedOutput = None,
    schedule: Annotated[Schedule, _setting("schedule")] = DEFAULT.schedule,
    samples: Annotated[int, typer.Option(min=1, help="Samples to train on, for the estimates.")] = 10_000,
    batch_size: BatchSize = DEFAULT.batch_size,
    chunk: Annotated[int, _setting("chunk", min=1)] = DEFAULT.chunk,
    device: Device = DEFAULT.device,
    resize: Resize = None,
) -> None:
    """Show how a model would be split, which rule inverts each node, and what a sweep costs, without training."""
    from fxinvert.commands.look import show_plan
    from fxinvert.report import make_console

    show_plan(
        PostTrainConfig.of(
            model=model,
            data=data or "",
            weights=weights,
            segments=segments,
            cuts=_names(cuts),
            supervised_output=supervised_output,
            schedule=schedule,
            batch_size=batch_size,
            chunk=chunk,
            device=device,
            resize=_size(resize),
        ),
        [tuple(_integers("--shape", text)) for text in shape or ()],
        samples,
        make_console(),
    )


@app.command(
    epilog="Examples:\n\n"
    "[bold]fxinvert explain my_nets:small_cnn data.npz --weights small_cnn.pt --sample 7[/bold]\n\n"
    "[bold]fxinvert explain --run runs/2026-01-31_12-00-00 --sample 7 --mean-over 200[/bold]"
)
def explain(
    model: Annotated[
        str, typer.Argument(help=PostTrainConfig.describe("model"), metavar="[MODEL]", show_default=False)
    ] = "",
    data: Annotated[
        str, typer.Argument(help="Data, as for post-train.", metavar="[DATA]", show_default=False)
    ] = "",
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
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where pictures go: a .png, .svg or .pdf file, or a folder."),
    ] = None,
    weights: Weights = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what every cut computed for a sample, what it should have computed, and where that would put it right."""
    if (run is None) == (not model or not data):
        raise DataError("give either a model and data, fxinvert explain MODEL DATA, or --run RUN")
    from fxinvert.commands import explain as command
    from fxinvert.report import make_console

    if run is not None:
        subject = command.subject_of_run(run, state)
    else:
        settings = {
            "model": model,
            "data": data,
            "weights": weights,
            "segments": segments,
            "cuts": _names(cuts),
            "supervised_output": supervised_output,
            "device": device,
            "mean": _numbers("--mean", mean),
            "std": _numbers("--std", std),
            "resize": _size(resize),
        }
        subject = command.subject_of(PostTrainConfig.of(**settings))
    command.explain(
        subject,
        sample or [],
        out or run or Path(),
        make_console(),
        output_target=output_target,
        mean_over=mean_over,
        as_json=as_json,
    )


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
BatchSizes = Annotated[str, typer.Option(metavar="SIZE,…", help="Batch sizes at which the file is proven.")]
Axis = Annotated[
    list[str] | None,
    typer.Option(metavar="INPUT:DIM=NAME", help="Another dimension that may vary, e.g. tokens:1=length."),
]
Atol = Annotated[float | None, typer.Option(help="Absolute tolerance.", show_default="1e-5")]
Rtol = Annotated[
    float | None, typer.Option(help="Tolerance relative to each expected number.", show_default="1e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="Report as JSON.")]


@app.command(
    epilog="Examples:\n\n[bold]fxinvert export my_nets:small_cnn net.onnx --weights run/weights.safetensors "
    "--shape 1,8,8[/bold]\n\n"
    "[bold]fxinvert export my_nets:small_cnn new.onnx --weights new.pt --into old.onnx --original-weights old.pt "
    "--data data.npz[/bold]\n\n"
    "[bold]fxinvert export my_nets:small_cnn inverse.onnx --inverse --at conv1 --shape 1,8,8[/bold]"
)
def export(
    model: Model,
    file: File,
    data: Example = None,
    shape: Shapes = None,
    weights: Weights = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="ONNX", help="Put the weights into a copy of this file of the original model."),
    ] = None,
    original_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --into: the weights that file was made with.")
    ] = None,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Export what reconstructs a feature from the output's target.")
    ] = False,
    at: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --inverse: the node to reconstruct.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(min=1, help="The ONNX operator set.", show_default="20")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Weights and computation in half precision.")] = False,
    external_data: Annotated[
        bool | None,
        typer.Option(
            "--external-data/--one-file", help="Whether weights go to a second file.", show_default="large"
        ),
    ] = None,
    axis: Axis = None,
    batch_sizes: BatchSizes = "1,2,7",
    atol: Atol = None,
    rtol: Rtol = None,
    resize: Resize = None,
    seed: Seed = DEFAULT.seed,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, and prove that the file computes what the model computes."""
    from fxinvert.commands.export import ExportSettings
    from fxinvert.commands.export import export as write
    from fxinvert.report import make_console

    settings = ExportSettings(
        batch_sizes=tuple(_integers("--batch-sizes", batch_sizes)),
        axes=tuple(axis or ()),
        atol=atol,
        rtol=rtol,
        opset=opset,
        half=half,
        external_data=external_data,
        into=into,
        original_weights=original_weights,
        inverse=inverse,
        at=at,
        as_json=as_json,
    )
    config = PostTrainConfig.of(
        model=model, data=data or "", weights=weights, resize=_size(resize), seed=seed
    )
    write(config, [tuple(_integers("--shape", text)) for text in shape or ()], file, settings, make_console())


@app.command(
    epilog="Example: [bold]fxinvert verify net.onnx --model my_nets:small_cnn --weights small_cnn.pt --data data.npz[/bold]"
)
def verify(
    file: File,
    model: Annotated[str, typer.Option("--model", help=PostTrainConfig.describe("model"), metavar="MODEL")],
    data: Example = None,
    shape: Shapes = None,
    weights: Weights = None,
    axis: Axis = None,
    batch_sizes: BatchSizes = "1,2,7",
    atol: Atol = None,
    rtol: Rtol = None,
    resize: Resize = None,
    seed: Seed = DEFAULT.seed,
    as_json: AsJson = False,
) -> None:
    """Prove that an ONNX file computes what a model computes."""
    from fxinvert.commands.export import ExportSettings
    from fxinvert.commands.export import verify as prove
    from fxinvert.report import make_console

    sizes = tuple(_integers("--batch-sizes", batch_sizes))
    settings = ExportSettings(sizes, tuple(axis or ()), atol, rtol, as_json=as_json)
    config = PostTrainConfig.of(
        model=model, data=data or "", weights=weights, resize=_size(resize), seed=seed
    )
    prove(config, [tuple(_integers("--shape", text)) for text in shape or ()], file, settings, make_console())


@app.command(epilog="Example: [bold]fxinvert report runs/2026-01-31_12-00-00[/bold]")
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


@app.command(epilog="Example: [bold]fxinvert rules --import my_package.rules[/bold]")
def rules(
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import this first, so that its rules are listed too."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/rules.md.")] = False,
) -> None:
    """List the inverse rules: how each finds its answer, whether its op can be trained, where it is written."""
    from fxinvert.commands.look import rules_markdown, show_rules
    from fxinvert.report import make_console

    if markdown:
        typer.echo(rules_markdown(modules or []), nl=False)
    else:
        show_rules(modules or [], make_console())


def _given(context: typer.Context) -> dict[str, Any]:
    """The settings that the command line gives, without those that it leaves as they are."""
    return {
        name: value
        for name, value in context.params.items()
        if name in PostTrainConfig.model_fields
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _read(name: str, value: Any) -> Any:
    """A setting as it is meant, from how it is written."""
    match name:
        case "cuts" | "only":
            return _names(value)
        case "mean" | "std":
            return _numbers(f"--{name}", value)
        case "resize":
            return _size(value)
    return value


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(name for text in given for name in text.split(",") if name) if given else None


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise DataError(
            f"{option} {text!r}: numbers separated by commas are needed, e.g. 0.5,0.5,0.5"
        ) from error


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise DataError(
            f"{option} {text!r}: whole numbers separated by commas are needed, e.g. 3,32,32"
        ) from error


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sizes = _integers("--resize", text)
    if len(sizes) > 2:
        raise DataError(f"--resize {text!r}: a height and a width are needed, or one number for both")
    return sizes[0], sizes[-1]
