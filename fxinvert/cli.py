"""The command line. Thin: it reads arguments, calls what does the work, and shows errors.

torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from fxinvert.commands.arguments import (
    DEFAULT,
    Address,
    AnyData,
    AnyModel,
    AsJson,
    Atol,
    Axis,
    BatchSize,
    BatchSizes,
    Chunk,
    Cuts,
    Device,
    Directory,
    Example,
    Executor,
    File,
    InputColumns,
    LabelColumns,
    Mean,
    Model,
    Pretrained,
    Report,
    Resize,
    Rtol,
    Run,
    ScheduleName,
    Seed,
    Segments,
    Shapes,
    Std,
    SupervisedOutput,
    Weights,
    Workers,
    config_of,
    given,
    integers,
    setting,
    shapes_of,
)
from fxinvert.commands.config import PLACE, MethodName, PostTrainConfig, Share, read_settings
from fxinvert.errors import REPORT, DataError, ExportMismatchError, FxInvertError

FAULT, FAILED, MISMATCH, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = (
    "Exit codes: 0 done; 2 something given does not fit; 3 an ONNX file is not valid, or does not compute what the model computes; "
    "130 interrupted; 1 a fault of fxinvert."
)


class _Group(TyperGroup):
    """Shows errors as a panel, whoever is to blame; `--debug` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            # exits and complaints about usage know their exit code, and a pipe that closes is no error
            known = hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError)
            if known or ctx.params.get("debug"):
                raise
            from fxinvert.report.console import error_panel, make_console

            code = _exit_code(error)
            if code == FAULT:
                error.add_note(f"{REPORT} fxinvert --debug … shows where it happened.")
            make_console(stderr=True).print(error_panel(error))
            raise typer.Exit(code) from error


def _exit_code(error: Exception) -> int:
    if isinstance(error, ExportMismatchError):
        return MISMATCH
    return FAILED if isinstance(error, FxInvertError | OSError) else FAULT


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    epilog=f"Begin with: [bold]fxinvert demo[/bold]\n\n{EXIT_CODES}",
)


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
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8, nor terminals
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command(
    epilog="Examples:\n\n[bold]fxinvert demo[/bold]\n\n"
    "[bold]fxinvert demo --model digits_mlp --run-directory my_run[/bold]"
)
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


@app.command(
    name="post-train",
    epilog="Examples:\n\n"
    "[bold]fxinvert post-train my_nets:small_cnn data.npz --weights small_cnn.pt[/bold]\n\n"
    "[bold]fxinvert post-train my_nets:resnet photos/train --test photos/test --resize 64,64 "
    "--cuts layer1,layer2[/bold]\n\n"
    "[bold]fxinvert post-train timm:resnet18 photos --pretrained --resize 224 --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225[/bold]\n\n"
    "[bold]fxinvert post-train drive.pt2 log.csv --input-columns center --label-columns steering[/bold]\n\n"
    "[bold]fxinvert post-train my_nets:small_cnn my_data:loader --schedule parallel --executor processes[/bold]\n\n"
    "[bold]fxinvert post-train --config runs/first/config.yaml --sweeps 5[/bold]",
)
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
    only: Annotated[list[str] | None, setting("only", metavar="NAME,…")] = None,
    method: Annotated[MethodName, setting("method")] = DEFAULT.method,
    schedule: ScheduleName = DEFAULT.schedule,
    output_target: Annotated[str, setting("output_target")] = DEFAULT.output_target,
    supervised_output: SupervisedOutput = None,
    sweeps: Annotated[int, setting("sweeps", min=1)] = DEFAULT.sweeps,
    patience: Annotated[int, setting("patience", min=1)] = DEFAULT.patience,
    least_gain: Annotated[float, setting("least_gain", min=0)] = DEFAULT.least_gain,
    inputs: Annotated[Literal["updated", "original"], setting("inputs")] = DEFAULT.inputs,
    share: Annotated[Share, setting("share")] = DEFAULT.share,
    recalibrate: Annotated[bool, setting("recalibrate", "--recalibrate/--no-recalibrate")] = False,
    damping: Annotated[float, setting("damping", min=0)] = DEFAULT.damping,
    satisfied_weight: Annotated[float, setting("satisfied_weight", min=0, max=1)] = DEFAULT.satisfied_weight,
    error: Annotated[Literal["plain", "weighted"], setting("error")] = DEFAULT.error,
    every: Annotated[int | None, setting("every", min=1)] = None,
    ops: Annotated[Literal["together", "in_turn"], setting("ops")] = DEFAULT.ops,
    optimizer: Annotated[str, setting("optimizer")] = DEFAULT.optimizer,
    learning_rate: Annotated[float | None, setting("learning_rate")] = None,
    epochs: Annotated[int, setting("epochs", min=1)] = DEFAULT.epochs,
    alpha: Annotated[float, setting("alpha", min=0)] = DEFAULT.alpha,
    executor: Executor = DEFAULT.executor,
    workers: Workers = None,
    address: Address = None,
    threads: Annotated[int, setting("threads", min=1)] = DEFAULT.threads,
    chunk: Chunk = DEFAULT.chunk,
    retries: Annotated[int, setting("retries", min=0)] = DEFAULT.retries,
    memory_limit: Annotated[int, setting("memory_limit", min=1)] = DEFAULT.memory_limit,
    device: Device = DEFAULT.device,
    batch_size: BatchSize = DEFAULT.batch_size,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    input_columns: InputColumns = None,
    label_columns: LabelColumns = None,
    seed: Seed = DEFAULT.seed,
    export: Annotated[bool, setting("export", "--export/--no-export")] = DEFAULT.export,
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


@app.command(
    epilog="Examples:\n\n[bold]fxinvert resume runs/2026-01-31_12-00-00[/bold]\n\n"
    "[bold]fxinvert resume runs/2026-01-31_12-00-00 --executor processes --workers 8[/bold]"
)
def resume(
    context: typer.Context,
    run: Run,
    executor: Executor = DEFAULT.executor,
    workers: Workers = None,
    address: Address = None,
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
    place = {name: value for name, value in given(context).items() if name in PLACE}
    go_on(run, place, console)
    conclude(run, PostTrainConfig.of(**read_settings(run / CONFIG)).report, console, as_json)


@app.command(epilog="Example: [bold]fxinvert status runs/2026-01-31_12-00-00 --json[/bold]")
def status(run: Run, as_json: AsJson = False) -> None:
    """Tell how far a run is, who works on it, and what went wrong."""
    from fxinvert.commands.status import show_status
    from fxinvert.report import make_console

    show_status(run, make_console(), as_json)


@app.command(
    epilog="Examples:\n\n[bold]fxinvert plan my_nets:small_cnn --shape 1,8,8[/bold]\n\n"
    "[bold]fxinvert plan my_nets:small_cnn data.npz --segments 2[/bold]\n\n"
    "[bold]fxinvert plan torchvision:resnet18 --shape 3,64,64 --json[/bold]"
)
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
    schedule: ScheduleName = DEFAULT.schedule,
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


@app.command(
    epilog="Examples:\n\n"
    "[bold]fxinvert explain my_nets:small_cnn data.npz --weights small_cnn.pt --sample 7[/bold]\n\n"
    "[bold]fxinvert explain --run runs/2026-01-31_12-00-00 --sample 7 --mean-over 200[/bold]"
)
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
        as_json=as_json,
    )


@app.command(
    epilog="Examples:\n\n[bold]fxinvert export my_nets:small_cnn net.onnx --weights run/weights.safetensors "
    "--shape 1,8,8[/bold]\n\n"
    "[bold]fxinvert export my_nets:small_cnn new.onnx --weights new.pt --into old.onnx --original-weights old.pt "
    "--data data.npz[/bold]\n\n"
    "[bold]fxinvert export my_nets:small_cnn inverse.onnx --inverse --at conv1 --shape 1,8,8[/bold]"
)
def export(
    context: typer.Context,
    model: Model,
    file: File,
    data: Example = None,
    shape: Shapes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
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
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    input_columns: InputColumns = None,
    label_columns: LabelColumns = None,
    seed: Seed = DEFAULT.seed,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, and prove that the file computes what the model computes."""
    from fxinvert.commands.export import ExportSettings
    from fxinvert.commands.export import export as write
    from fxinvert.report import make_console

    settings = ExportSettings(
        batch_sizes=tuple(integers("--batch-sizes", batch_sizes)),
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
    write(config_of(context), shapes_of(shape), file, settings, make_console())


@app.command(
    epilog="Examples:\n\n[bold]fxinvert verify net.onnx --model my_nets:small_cnn --weights small_cnn.pt --data "
    "data.npz[/bold]\n\n[bold]fxinvert verify net.onnx --model my_nets:small_cnn --shape 1,8,8 --json[/bold]"
)
def verify(
    context: typer.Context,
    file: File,
    model: Annotated[str, typer.Option("--model", help=PostTrainConfig.describe("model"), metavar="MODEL")],
    data: Example = None,
    shape: Shapes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    axis: Axis = None,
    batch_sizes: BatchSizes = "1,2,7",
    atol: Atol = None,
    rtol: Rtol = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    input_columns: InputColumns = None,
    label_columns: LabelColumns = None,
    seed: Seed = DEFAULT.seed,
    as_json: AsJson = False,
) -> None:
    """Prove that an ONNX file computes what a model computes."""
    from fxinvert.commands.export import ExportSettings
    from fxinvert.commands.export import verify as prove
    from fxinvert.report import make_console

    sizes = tuple(integers("--batch-sizes", batch_sizes))
    settings = ExportSettings(sizes, tuple(axis or ()), atol, rtol, as_json=as_json)
    prove(config_of(context), shapes_of(shape), file, settings, make_console())


@app.command(
    epilog="Examples:\n\n[bold]fxinvert report runs/2026-01-31_12-00-00[/bold]\n\n"
    "[bold]fxinvert report runs/2026-01-31_12-00-00 --out page --json[/bold]"
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


@app.command(
    epilog="Examples:\n\n[bold]fxinvert rules[/bold]\n\n[bold]fxinvert rules --import my_package.rules --json[/bold]"
)
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
