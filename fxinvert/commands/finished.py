"""A finished run, opened again to look at: the model before and after, and the data it is shown on."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxinvert
from fxinvert import models
from fxinvert.commands.config import PostTrainConfig, read_settings
from fxinvert.commands.demo import Parts
from fxinvert.commands.inputs import EXAMPLE_ROWS, inputs_of_run
from fxinvert.errors import DataError
from fxinvert.passes.outputs import Key
from fxinvert.passes.plan import Plan
from fxinvert.scheduling.run_directory import CONFIG, WEIGHTS, is_finished, is_resumable
from fxinvert.sources import load_weights
from fxinvert.training import Batches
from fxinvert.training.batch import Arguments

#: settings of a demonstration, which has no configuration file
DEMO = "demo.json"
TEST, HELD_OUT = "test", "held-out"
#: what repairing each segment alone brings, where that was asked for
REPAIRS = "repairs.json"


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end.

    Attributes:
        path: its directory.
        before, after: the model, as given and as post-trained.
        data: what both are shown on: the test data if there are any, else what steps were judged on.
        data_name: which of the two.
        train, validation: what it was trained on, and judged on where that is not a part of it.
        example: inputs to trace with.
        output: the supervised output.
        settings: as written.
    """

    path: Path
    before: nn.Module
    after: nn.Module
    data: Batches
    data_name: str
    train: Any
    validation: Any
    example: Arguments
    output: Key | None
    settings: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> FinishedRun:
        """The run in a directory; its model and data are loaded from where they were.

        Raises:
            DataError: there is no finished run, or its model or data cannot be loaded any more.
        """
        if not is_finished(path):
            problem = f"the run in {path} is not finished; see: fxinvert status {path}"
            raise DataError(problem if is_resumable(path) else f"there is no finished run in {path}")
        return cls._demo(path) if (path / DEMO).is_file() else cls._configured(path)

    @classmethod
    def _demo(cls, path: Path) -> FinishedRun:
        settings = read_json(path, DEMO)
        before = models.load(settings["model"], settings["state"])
        parts = Parts.of(models.digits())
        data = Batches(parts.test, torch.device("cpu"), "test data")
        example = (parts.x[:EXAMPLE_ROWS],)
        after = _updated(before, path)
        return cls(path, before, after, data, TEST, parts.train, parts.held_out, example, None, settings)

    @classmethod
    def _configured(cls, path: Path) -> FinishedRun:
        settings = read_settings(path / CONFIG)
        config = PostTrainConfig.of(**settings)
        inputs = inputs_of_run(path, config)
        device = torch.device(config.device)
        if inputs.test is not None:
            data, name = Batches(inputs.test, device, "test data"), TEST
        elif inputs.validation is not None:
            data, name = Batches(inputs.validation, device, "validation data"), HELD_OUT
        else:
            data, name = Batches(inputs.train, device, part="held_out"), HELD_OUT
            if next(iter(data), None) is None:  # too few samples to keep some aside
                data = data.of("all")
        after = _updated(inputs.model, path)
        return cls(
            *(path, inputs.model, after, data, name, inputs.train, inputs.validation),
            *(inputs.example, inputs.supervised_output, settings),
        )

    def plan(self) -> Plan:
        """The partition that was used.

        Raises:
            DataError: its file is damaged.
        """
        return plan_of(read_json(self.path, "plan.json"))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return dict(json.loads((path / name).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path / name} cannot be read: {error}") from error


def plan_of(content: dict[str, Any]) -> Plan:
    """The inverse of `Plan.to_dict`.

    Raises:
        DataError: that is none.
    """
    try:
        # JSON has no tuples
        found: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in segment.items()}
            for segment in content["segments"]
        ]
        segments = [fxinvert.Segment(**segment) for segment in found]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the plan is damaged: {error}") from error
    return Plan(tuple(segments))


def _updated(model: nn.Module, path: Path) -> nn.Module:
    updated = copy.deepcopy(model)
    load_weights(updated, path / WEIGHTS)
    return updated
