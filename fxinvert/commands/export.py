"""Export and verify: an ONNX file with its proof, and the proof alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fxinvert.commands.config import PostTrainConfig
from fxinvert.commands.look import example_of
from fxinvert.errors import DataError
from fxinvert.export import ExportReport, export_inverse, export_onnx, update_onnx, verify_onnx
from fxinvert.export.called import Axes
from fxinvert.export.proof import ATOL, RTOL
from fxinvert.report.console import print_json
from fxinvert.sources import load_model


@dataclass(frozen=True)
class ExportSettings:
    """How a file is written and proven.

    Attributes:
        batch_sizes, axes, atol, rtol: as `export_onnx` takes them; None for its own.
        opset: of the file; None for the exporter's.
        half: whether to compute in half precision.
        external_data: whether weights go to a second file; None where they are large.
        into: a file of the original model, to put the weights into.
        original_weights: the weights that this file was exported with; None for those that the factory gives.
        inverse: whether to export the inverse.
        at: the node that it reconstructs.
        as_json: whether to report as JSON.
    """

    batch_sizes: tuple[int, ...] | None = None
    axes: tuple[str, ...] = ()
    atol: float | None = None
    rtol: float | None = None
    opset: int | None = None
    half: bool = False
    external_data: bool | None = None
    into: Path | None = None
    original_weights: Path | None = None
    inverse: bool = False
    at: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        fresh = {"--opset": self.opset, "--half": self.half or None, "--external-data": self.external_data}
        given = [name for name, value in fresh.items() if value is not None]
        if self.into is not None and given:
            raise DataError(
                f"{given[0]} does not go with --into: the file stays as it is, but for its weights"
            )
        if self.into is not None and self.inverse:
            raise DataError("--inverse writes a new file; it does not go with --into")
        if self.inverse and (self.half or self.external_data or self.axes):
            raise DataError("--half, --external-data and --axis do not go with --inverse")
        if self.original_weights is not None and self.into is None:
            raise DataError("--original-weights are those of the file that --into names; it is not given")
        if self.at is not None and not self.inverse:
            raise DataError("--at names the node that --inverse reconstructs; it is not given")


def export(
    config: PostTrainConfig,
    shapes: Sequence[tuple[int, ...]],
    path: Path,
    settings: ExportSettings,
    console: Console,
) -> None:
    """Writes an ONNX file, proven, and reports.

    Args:
        config: names the model, its weights and, unless shapes are given, the data.
        shapes: of the model's inputs, without the batch.
        path: of the file.
        settings: how.
        console: where to report.

    Raises:
        FxInvertError: something given does not fit, or the file is not right; it is not written then.
    """
    torch.manual_seed(config.seed)
    model = load_model(config.model, config.weights, pretrained=config.pretrained)
    example = example_of(config, shapes)
    own = {
        name: value
        for name, value in (("atol", settings.atol), ("rtol", settings.rtol), ("opset", settings.opset))
        if value is not None
    }
    if settings.inverse:
        report = export_inverse(
            model,
            example,
            path,
            at=settings.at,
            batch_sizes=settings.batch_sizes,
            **own,  # type: ignore[arg-type]
        )
    elif settings.into is not None:
        torch.manual_seed(config.seed)
        report = update_onnx(
            model,
            load_model(config.model, settings.original_weights, pretrained=config.pretrained),
            example,
            settings.into,
            path,
            batch_sizes=settings.batch_sizes,
            dynamic_axes=_axes(settings.axes),
            **own,  # type: ignore[arg-type]
        )
    else:
        report = export_onnx(
            model,
            example,
            path,
            batch_sizes=settings.batch_sizes,
            dynamic_axes=_axes(settings.axes),
            precision="float16" if settings.half else "own",
            external_data=settings.external_data,
            **own,  # type: ignore[arg-type]
        )
    _show(report, settings.as_json, console)


def verify(
    config: PostTrainConfig,
    shapes: Sequence[tuple[int, ...]],
    path: Path,
    settings: ExportSettings,
    console: Console,
) -> None:
    """Proves an ONNX file, and reports; the arguments are those of `export`.

    Raises:
        FxInvertError: something given does not fit, or the file is not right.
    """
    torch.manual_seed(config.seed)
    report = verify_onnx(
        path,
        load_model(config.model, config.weights, pretrained=config.pretrained),
        example_of(config, shapes),
        batch_sizes=settings.batch_sizes,
        dynamic_axes=_axes(settings.axes),
        atol=ATOL if settings.atol is None else settings.atol,
        rtol=RTOL if settings.rtol is None else settings.rtol,
    )
    _show(report, settings.as_json, console)


def _show(report: ExportReport, as_json: bool, console: Console) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        console.print(str(report), soft_wrap=True)


def _axes(texts: Sequence[str]) -> Axes:
    """`tokens:1=length` as `{"tokens": {1: "length"}}`; without a name the dimension does not vary."""
    found: dict[str, dict[int, str | None]] = {}
    for text in texts:
        place, equals, axis = text.partition("=")
        name, _, dimension = place.rpartition(":")
        if not name or not equals or not dimension.isdecimal():
            raise DataError(
                f"--axis {text!r}: INPUT:DIMENSION=NAME is needed, e.g. tokens:1=length; or tokens:0= where "
                "dimension 0 is not the batch"
            )
        found.setdefault(name, {})[int(dimension)] = axis or None
    return found
