"""What a configuration names: model, data and method, loaded and made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fxinvert.commands.config import PostTrainConfig
from fxinvert.errors import DataError
from fxinvert.output_target import OutputTargetFunction
from fxinvert.scheduling.run_directory import CONFIG
from fxinvert.sources import (
    DataOptions,
    Preprocessing,
    find_device,
    find_object,
    is_factory,
    load_data,
    open_model,
)
from fxinvert.sources.data import Data, Loader
from fxinvert.training import Auto, ClosedForm, GaussNewton, Gradient, Joint, Method
from fxinvert.training.batch import Arguments
from fxinvert.training.chunks import Shards
from fxinvert.training.data import Begun

#: rows of the first batch that are enough to trace and export with
EXAMPLE_ROWS = 8


@dataclass(frozen=True)
class Inputs:
    """What a configuration names, loaded."""

    model: nn.Module
    train: Loader
    validation: Loader | None
    test: Loader | None
    example: Arguments
    output_target: str | OutputTargetFunction
    supervised_output: int | str | None
    expected: Preprocessing | None
    classes: tuple[str, ...] | None


def open_inputs(config: PostTrainConfig) -> Inputs:
    """Loads what a configuration names.

    Raises:
        DataError: something is not there or does not fit.
    """
    find_device(config.device)
    torch.manual_seed(config.seed)
    options = options_of(config, config.seed)
    data = load_data(config.data, options)
    if not isinstance(data.train, Shards):
        data = replace(data, train=Begun(data.train))
    model, expected = open_model(config.model, config.weights, config.device, config.pretrained)
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
        example=data.example_inputs(EXAMPLE_ROWS, config.device),
        output_target=target,
        supervised_output=output_key(config.supervised_output),
        expected=expected,
        classes=data.classes,
    )


def inputs_of_run(path: Path, config: PostTrainConfig) -> Inputs:
    """Loads what the configuration of an earlier run names.

    Raises:
        DataError: something is not there any more, or does not fit.
    """
    try:
        return open_inputs(config)
    except DataError as error:
        error.add_note(
            f"What {path / CONFIG} names is looked for from the current folder, as when the run was begun: call fxinvert there."
        )
        raise


def method_of(config: PostTrainConfig) -> Method:
    """The method of a configuration, with its settings.

    Raises:
        DataError: a setting does not fit.
    """
    if config.method == "closed_form":
        return ClosedForm(
            config.damping,
            config.satisfied_weight,
            config.error,
            config.every,
            config.ops,
            position_fraction=config.position_fraction,
        )
    if config.method == "gauss_newton":
        return GaussNewton()
    if config.method == "auto":
        return Auto(optimizer=replace(Auto().optimizer, kind=config.optimizer, seed=config.seed))
    own = (Gradient() if config.method == "gradient" else Joint()).optimizer
    optimizer = replace(
        own,
        kind=config.optimizer,
        learning_rate=config.learning_rate or own.learning_rate,
        epochs=config.epochs,
        seed=config.seed,
    )
    if config.method == "gradient":
        loss: Literal["mse", "weighted"] = "mse" if config.error == "plain" else "weighted"
        return Gradient(optimizer, loss, config.satisfied_weight)
    return Joint(config.alpha, optimizer)


def options_of(config: PostTrainConfig, seed: int | None = None) -> DataOptions:
    """How data is read; in its own order unless there is a seed.

    Raises:
        DataError: a setting does not fit.
    """
    return DataOptions(
        batch_size=config.batch_size,
        mean=config.mean,
        std=config.std,
        resize=config.resize,
        input_columns=config.input_columns,
        label_columns=config.label_columns,
        seed=seed,
    )


def output_key(text: str | None) -> int | str | None:
    """Which output is meant: digits are an index, anything else is a key."""
    return int(text) if text is not None and text.isdecimal() else text


def _other(spec: str | None, options: DataOptions, train: Data) -> Loader | None:
    if spec is None:
        return None
    data = load_data(spec, options, train.classes)
    return data.train if data.test is None else data.test
