"""One run: from a configuration to a run directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fxinvert
from fxinvert.commands.config import PostTrainConfig, read_settings
from fxinvert.commands.doubts import doubts
from fxinvert.commands.inputs import Inputs, inputs_of_run, method_of, open_inputs, options_of
from fxinvert.errors import DataError, FxInvertError
from fxinvert.export import ExportReport, export_onnx
from fxinvert.export.files import destination_of
from fxinvert.passes.capture import evaluating
from fxinvert.passes.outputs import Chosen
from fxinvert.passes.plan import Plan
from fxinvert.post_training import open_journal
from fxinvert.report import history_table, metrics_record, metrics_table, timing_record
from fxinvert.report.metrics import Change
from fxinvert.result import PostTrainingResult
from fxinvert.scheduling import executor_named, journal
from fxinvert.scheduling.run_directory import CONFIG, ONNX, WEIGHTS, RunDirectory, is_resumable
from fxinvert.sources.data import Loader
from fxinvert.training import Batches, Metrics, evaluate
from fxinvert.training.batch import Arguments
from fxinvert.training.data import beginning_of


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
    return _execute(config, inputs, RunDirectory.create(directory), console)


def resume(path: Path, place: Mapping[str, Any], console: Console) -> Path:
    """Goes on with a run that was interrupted; what is finished is not done again.

    Args:
        path: of its directory.
        place: settings of where it works, and whether it exports, instead of those that it was begun with.
        console: where to tell about it.

    Raises:
        FxInvertError: there is no such run, another process holds it, or it was begun with other data or another model.
    """
    run = RunDirectory.reopen(path)
    config = PostTrainConfig.of(**read_settings(path / CONFIG) | dict(place))
    return _execute(config, inputs_of_run(path, config), run, console, begun=True)


def _execute(
    config: PostTrainConfig, inputs: Inputs, directory: RunDirectory, console: Console, begun: bool = False
) -> Path:
    with directory as run, _telling_how_to_go_on(run.path, console), open_journal(run.path) as kept:
        if config.export:
            destination_of(run.path / ONNX)  # before anything slow
        if not begun:
            run.write_text(CONFIG, config.to_yaml())
        graph = fxinvert.trace(inputs.model, inputs.example, output=inputs.supervised_output)
        plan = fxinvert.partition(graph, config.segments, cuts=config.cuts)
        write_plan(run, plan)
        console.print(plan)
        warnings = doubts(
            graph,
            Batches(beginning_of(inputs.train), torch.device(config.device)),
            options_of(config),
            inputs.expected,
            inputs.classes,
        )
        for warning in warnings:
            console.print(f"Warning: {warning}.", style="yellow", soft_wrap=True)
        before = _tested(inputs, inputs.model)  # first of all: it tells whether the test data fit
        result = fxinvert.post_train(
            inputs.model,
            inputs.train,
            plan=plan,
            method=method_of(config),
            schedule=config.schedule,
            only=config.only,
            output_target=inputs.output_target,
            sweeps=config.sweeps,
            patience=config.patience,
            least_gain=config.least_gain,
            confidence=config.confidence,
            inputs=config.inputs,
            share=config.share,
            recalibrate=config.recalibrate,
            keep_zeros=config.keep_zeros,
            validation_data=inputs.validation,
            executor=executor_named(config.executor, config.workers, config.address),
            threads=config.threads,
            chunk=config.chunk,
            retries=config.retries,
            memory_limit=config.memory_limit,
            solvers=config.solvers,
            compiled=config.compiled,
            run_directory=kept,
            output=inputs.supervised_output,
        )
        console.print(history_table(result.history))
        measured: dict[str, Change] = {}
        after = _tested(inputs, result.model)
        if before is not None and after is not None:
            measured["test"] = (before, after)
        finish(run, config, result, measured, inputs.example, console, {"warnings": warnings})
    return run.path


@contextmanager
def _telling_how_to_go_on(path: Path, console: Console) -> Iterator[None]:
    """Says how to resume, if a run that can go on is left."""
    try:
        yield
    except BaseException:
        if is_resumable(path) and not journal.is_held(path):
            console.print(f"What is finished is kept; go on with: fxinvert resume {path}", soft_wrap=True)
        raise


def _tested(inputs: Inputs, model: nn.Module) -> Metrics | None:
    """What a model achieves on the test data, if there are any."""
    if inputs.test is None:
        return None
    return measure(model, inputs.test, "test data", inputs.supervised_output)


def measure(model: nn.Module, data: Loader, what: str, output: int | str | None = None) -> Metrics:
    """Loss and accuracy of a model, or of one of its outputs, over data.

    Raises:
        DataError: the data or its labels do not fit, or the model does not run on them.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def forward(*inputs: Tensor) -> Tensor:
        try:
            outputs: Any = model(*inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"the model does not run on the {what}: {error}") from error
        chosen: Tensor = Chosen.of(outputs, output)(outputs)
        return chosen

    try:
        with torch.no_grad(), evaluating(model):
            return evaluate(forward, Batches(data, device, what))
    except DataError as error:
        if what not in str(error):
            error.add_note(f"This is about the {what}.")
        raise


def write_plan(run: RunDirectory, plan: Plan) -> None:
    """Writes the plan, to read and to parse."""
    run.write_text("plan.txt", f"{plan}\n")
    run.write_json("plan.json", plan.to_dict())


def finish(
    run: RunDirectory,
    config: PostTrainConfig,
    result: PostTrainingResult,
    measured: dict[str, Change],
    example: Arguments,
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
        console.print(f"Note: {note}.")
    if not result.changed:
        console.print("Nothing was found that is better on the held-out data; the weights are as they were.")
    if exported is not None:
        sizes = ", ".join(map(str, exported.batch_sizes))
        console.print(
            f"ONNX proven: at batch sizes {sizes} onnxruntime and torch differ by at most {exported.max_abs:.1e} "
            f"(allowed: {exported.atol:g} + {exported.rtol:g}·|expected|)."
        )
    files = ", ".join(sorted({item.name for item in run.path.iterdir()} - journal.TRANSIENT))
    console.print(f"Written to {run.path}: {files}.", soft_wrap=True)


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
    run: RunDirectory, result: PostTrainingResult, example: Arguments, about: dict[str, Any]
) -> ExportReport:
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    segments = {name: segment.name for segment in result.plan.segments for name in segment.parameters}
    try:
        return export_onnx(result.model, example, run.path / ONNX, metadata=metadata, segments=segments)
    except FxInvertError as error:
        error.add_note(
            f"The new weights are in {run.path / WEIGHTS}. The run ends without an ONNX file by: fxinvert resume {run.path} "
            "--no-export"
        )
        raise
