"""The command line. Thin: it reads arguments, calls what does the work, and shows errors.

torch is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxinvert.command_line import looking, proving, training
from fxinvert.errors import REPORT, ExportMismatchError, FxInvertError

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


#: every command, with examples of it, in the order of `--help`
COMMANDS: dict[Callable[..., None], list[str]] = {
    training.demo: [
        "demo",
        "demo --model digits_mlp --run-directory my_run",
    ],
    training.post_train: [
        "post-train my_nets:small_cnn data.npz --weights small_cnn.pt",
        "post-train my_nets:resnet photos/train --test photos/test --resize 64,64 --cuts layer1,layer2",
        "post-train timm:resnet18 photos --pretrained --resize 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        "post-train drive.pt2 log.csv --input-columns center --label-columns steering",
        "post-train my_nets:small_cnn my_data:loader --schedule parallel --executor processes",
        "post-train --config runs/first/config.yaml --sweeps 5",
    ],
    training.resume: [
        "resume runs/2026-01-31_12-00-00",
        "resume runs/2026-01-31_12-00-00 --executor processes --workers 8",
    ],
    training.status: [
        "status runs/2026-01-31_12-00-00 --json",
    ],
    looking.plan: [
        "plan my_nets:small_cnn --shape 1,8,8",
        "plan my_nets:small_cnn data.npz --segments 2",
        "plan my_nets:small_cnn --shape 1,8,8 --method auto --samples 100000",
        "plan torchvision:resnet18 --shape 3,64,64 --json",
    ],
    looking.explain: [
        "explain my_nets:small_cnn data.npz --weights small_cnn.pt --sample 7",
        "explain --run runs/2026-01-31_12-00-00 --sample 7 --mean-over 200",
        "explain --run runs/2026-01-31_12-00-00 --repair-alone",
    ],
    proving.export: [
        "export my_nets:small_cnn net.onnx --weights run/weights.safetensors --shape 1,8,8",
        "export my_nets:small_cnn new.onnx --weights new.pt --into old.onnx --original-weights old.pt --data data.npz",
        "export my_nets:small_cnn inverse.onnx --inverse --at conv1 --shape 1,8,8",
    ],
    proving.verify: [
        "verify net.onnx --model my_nets:small_cnn --weights small_cnn.pt --data data.npz",
        "verify net.onnx --model my_nets:small_cnn --shape 1,8,8 --json",
    ],
    looking.report: [
        "report runs/2026-01-31_12-00-00",
        "report runs/2026-01-31_12-00-00 --out page --json",
    ],
    looking.rules: [
        "rules",
        "rules --import my_package.rules --json",
    ],
}

for command, examples in COMMANDS.items():
    name = command.__name__.replace("_", "-")
    written = "\n\n".join(f"[bold]fxinvert {example}[/bold]" for example in examples)
    app.command(name, epilog=f"Examples:\n\n{written}")(command)
