"""Commands that prove: ONNX files, written or only checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxinvert.command_line.options import (
    DEFAULT,
    AsJson,
    Atol,
    Axis,
    BatchSizes,
    Example,
    File,
    InputColumns,
    LabelColumns,
    Mean,
    Model,
    Pretrained,
    Resize,
    Rtol,
    Seed,
    Shapes,
    Std,
    Weights,
    config_of,
    integers,
    shapes_of,
)
from fxinvert.commands.config import PostTrainConfig


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
    batch_sizes: BatchSizes = None,
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
        batch_sizes=None if batch_sizes is None else tuple(integers("--batch-sizes", batch_sizes)),
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


def verify(
    context: typer.Context,
    file: File,
    model: Annotated[str, typer.Option("--model", help=PostTrainConfig.describe("model"), metavar="MODEL")],
    data: Example = None,
    shape: Shapes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    axis: Axis = None,
    batch_sizes: BatchSizes = None,
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

    sizes = None if batch_sizes is None else tuple(integers("--batch-sizes", batch_sizes))
    settings = ExportSettings(sizes, tuple(axis or ()), atol, rtol, as_json=as_json)
    prove(config_of(context), shapes_of(shape), file, settings, make_console())
