"""One run: from a configuration to a run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fxinvert
from fxinvert.commands.config import PostTrainConfig
from fxinvert.errors import DataError
from fxinvert.export import ExportReport, export_onnx
from fxinvert.output_target import OutputTargetFunction
from fxinvert.passes.capture import evaluating
from fxinvert.passes.plan import Plan
from fxinvert.report import history_table, metrics_record, metrics_table, timing_record
from fxinvert.report.metrics import Change
from fxinvert.result import PostTrainingResult
from fxinvert.scheduling.run_directory import ONNX, RunDirectory
from fxinvert.sources import DataOptions, find_device, find_object, is_factory, load_data, load_model
from fxinvert.sources.data import Data, Loader
from fxinvert.training import Batches, Metrics, evaluate

#: rows of the first batch that are enough to trace and export with
EXAMPLE_ROWS = 8


@dataclass(frozen=True)
class Inputs:
    """What a configuration names, loaded."""

    model: nn.Module
    train: Loader
    validation: Loader | None
    test: Loader | None
    example: tuple[Tensor, ...]
    output_target: str | OutputTargetFunction
    supervised_output: int | str | None


def execute(config: PostTrainConfig, directory: Path | None, console: Console) -> Path:
    """Post-trains, measures, exports, and writes it all; the path of the run directory.

    Args:
        config: what to do.
        directory: where to write; None: `runs/` and the time.
        console: where to tell about it.

    Raises:
        FxInvertError: something given does not fit, cannot be inverted, or cannot be written.
    """
    inputs = open_inputs(config)
    with RunDirectory.create(directory) as run:
        run.write_json("config.json", config.model_dump(mode="json"))
        graph = fxinvert.trace(inputs.model, inputs.example, output=inputs.supervised_output)
        plan = fxinvert.partition(graph, config.segments, cuts=config.cuts)
        write_plan(run, plan)
        console.print(plan)
        result = fxinvert.post_train(
            inputs.model,
            inputs.train,
            plan=plan,
            method=config.method,
            schedule=config.schedule,
            output_target=inputs.output_target,
            sweeps=config.sweeps,
            validation_data=inputs.validation,
            damping=config.damping,
            satisfied_weight=config.satisfied_weight,
            output=inputs.supervised_output,
        )
        console.print(history_table(result.history))
        measured: dict[str, Change] = {}
        if inputs.test is not None:
            before = measure(inputs.model, inputs.test, "test data", inputs.supervised_output)
            after = measure(result.model, inputs.test, "test data", inputs.supervised_output)
            measured["test"] = (before, after)
        finish(run, config, result, measured, inputs.example, console)
    return run.path


def open_inputs(config: PostTrainConfig) -> Inputs:
    """Loads what a configuration names.

    Raises:
        DataError: something is not there or does not fit.
    """
    find_device(config.device)
    torch.manual_seed(config.seed)
    options = DataOptions(config.batch_size, config.mean, config.std, config.resize, config.seed)
    data = load_data(config.data, options)
    model = load_model(config.model, config.weights, config.device)
    target: Any = config.output_target
    if is_factory(target):
        target = find_object(target, "output target")
        if not callable(target):
            raise DataError(
                f"output target {config.output_target!r} is {type(target).__name__}; a function is needed"
            )
    return Inputs(
        model=model,
        train=data.train,
        validation=_other(config.validation, options, data),
        test=_other(config.test, options, data) or data.test,
        example=tuple(value[:EXAMPLE_ROWS].to(config.device) for value in data.example_inputs()),
        output_target=target,
        supervised_output=output_key(config.supervised_output),
    )


def output_key(text: str | None) -> int | str | None:
    """Which output is meant: digits are an index, anything else is a key."""
    return int(text) if text is not None and text.isdecimal() else text


def measure(model: nn.Module, data: Loader, what: str, output: int | str | None = None) -> Metrics:
    """Loss and accuracy of a model, or of one of its outputs, over data.

    Raises:
        DataError: the data or its labels do not fit.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def forward(*inputs: Tensor) -> Tensor:
        outputs: Any = model(*inputs)
        return outputs if output is None else outputs[output]  # type: ignore[no-any-return]

    with torch.no_grad(), evaluating(model):
        return evaluate(forward, Batches(data, device, what))


def write_plan(run: RunDirectory, plan: Plan) -> None:
    """Writes the plan, to read and to parse."""
    run.write_text("plan.txt", f"{plan}\n")
    run.write_json("plan.json", plan.to_dict())


def finish(
    run: RunDirectory,
    config: PostTrainConfig,
    result: PostTrainingResult,
    measured: dict[str, Change],
    example: tuple[Tensor, ...],
    console: Console,
    figures: dict[str, Any] | None = None,
    times: dict[str, Any] | None = None,
) -> None:
    """Writes weights, ONNX file and metrics, and says so.

    Args:
        run: where to.
        config: what was done.
        result: what came out.
        measured: metrics before and after, by the name of the data.
        example: inputs to export with.
        console: where to tell about it.
        figures: more for `metrics.json`.
        times: more for `timing.json`.
    """
    about = facts(config, result)
    run.write_weights(result.model, about)
    exported = _exported(run, result, example, about) if config.export else None
    run.write_json("timing.json", timing_record(result, **(times or {})))
    run.write_json("metrics.json", metrics_record(result, measured, exported, **(figures or {})))
    console.print(metrics_table({"held-out": (result.baseline, result.final), **measured}))
    for note in result.notes:
        console.print(f"Note: {note}.", markup=False)
    if not result.changed:
        console.print("Nothing was found that is better on the held-out data; the weights are as they were.")
    if exported is not None:
        sizes = ", ".join(map(str, exported.batch_sizes))
        console.print(
            f"ONNX proven: at batch sizes {sizes} onnxruntime and torch differ by at most {exported.max_abs:.1e} "
            f"(allowed: {exported.atol:g} + {exported.rtol:g}·|expected|)."
        )
    files = ", ".join(sorted(item.name for item in run.path.iterdir()))
    console.print(f"Written to {run.path}: {files}.", markup=False, soft_wrap=True)


def facts(config: PostTrainConfig, result: PostTrainingResult) -> dict[str, Any]:
    """What weight and ONNX files say about how they were made."""
    changed = set(result.changed)
    return {
        "method": config.method,
        "schedule": config.schedule,
        "output_target": result.output_target,
        "held_out": {"before": result.baseline.to_dict(), "after": result.final.to_dict()},
        "segments": [s.name for s in result.plan.segments if changed.intersection(s.parameters)],
    }


def _exported(
    run: RunDirectory, result: PostTrainingResult, example: tuple[Tensor, ...], about: dict[str, Any]
) -> ExportReport:
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    segments = {name: segment.name for segment in result.plan.segments for name in segment.parameters}
    return export_onnx(result.model, example, run.path / ONNX, metadata=metadata, segments=segments)


def _other(spec: str | None, options: DataOptions, train: Data) -> Loader | None:
    if spec is None:
        return None
    data = load_data(spec, options, train.classes)
    return data.train if data.test is None else data.test
