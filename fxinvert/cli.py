"""The command line. Thin: it reads arguments, calls what does the work, and shows errors.

torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from fxinvert.commands.config import PostTrainConfig, Schedule
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


@app.command(epilog="Example: [bold]fxinvert demo --model digits_mlp --output my_run[/bold]")
def demo(
    model: Annotated[
        Literal["digits_cnn", "digits_mlp"], typer.Option(help="The reference network.")
    ] = "digits_cnn",
    state: Annotated[Literal["early", "converged"], typer.Option(help="The state of its weights.")] = "early",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default="runs/<time>", help="Where to write: a new or empty folder."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which AdamW sees the samples.")] = 0,
) -> None:
    """Do everything on data and weights inside the package: plan, post-train, compare with AdamW, export, prove."""
    from fxinvert.commands.demo import demo as run_demo
    from fxinvert.report import make_console

    run_demo(model, state, output, seed, make_console())


@app.command(
    name="post-train",
    epilog="Examples:\n\n"
    "[bold]fxinvert post-train my_nets:small_cnn data.npz --weights small_cnn.pt[/bold]\n\n"
    "[bold]fxinvert post-train my_nets:resnet photos/train --test photos/test --resize 64,64 "
    "--cuts layer1,layer2[/bold]\n\n"
    "[bold]fxinvert post-train my_nets:small_cnn my_data:loader --schedule parallel --sweeps 5[/bold]",
)
def post_train(
    model: Model,
    data: Annotated[str, typer.Argument(help=PostTrainConfig.describe("data"), metavar="DATA")],
    weights: Weights = None,
    validation: Annotated[str | None, _setting("validation", metavar="DATA")] = None,
    test: Annotated[str | None, _setting("test", metavar="DATA")] = None,
    segments: Segments = None,
    cuts: Cuts = None,
    schedule: Annotated[Schedule, _setting("schedule")] = DEFAULT.schedule,
    output_target: Annotated[str, _setting("output_target")] = DEFAULT.output_target,
    supervised_output: SupervisedOutput = None,
    sweeps: Annotated[int, _setting("sweeps", min=1)] = DEFAULT.sweeps,
    damping: Annotated[float, _setting("damping", min=0)] = DEFAULT.damping,
    satisfied_weight: Annotated[float, _setting("satisfied_weight", min=0, max=1)] = DEFAULT.satisfied_weight,
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
    config = PostTrainConfig.of(
        model=model,
        data=data,
        weights=weights,
        validation=validation,
        test=test,
        segments=segments,
        cuts=_names(cuts),
        schedule=schedule,
        output_target=output_target,
        supervised_output=supervised_output,
        sweeps=sweeps,
        damping=damping,
        satisfied_weight=satisfied_weight,
        device=device,
        batch_size=batch_size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        resize=_size(resize),
        seed=seed,
        export=export,
    )
    from fxinvert.commands.run import execute
    from fxinvert.report import make_console

    execute(config, run_directory, make_console())


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
    device: Device = DEFAULT.device,
    resize: Resize = None,
) -> None:
    """Show how a model would be split and which rule inverts each node, without training anything."""
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
            device=device,
            resize=_size(resize),
        ),
        [tuple(_integers("--shape", text)) for text in shape or ()],
        make_console(),
    )


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
