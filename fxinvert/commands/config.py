"""The settings of a post-training run: checked once, used by the command line, saved with the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fxinvert.errors import DataError

Schedule = Literal["sequential", "parallel"]


class PostTrainConfig(BaseModel):
    """Everything that decides the outcome of a run, besides the files that it names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="The model: package.module:factory; the current folder is importable.")
    data: str = Field(
        description="Training data: an .npz file with x and y, a folder of class folders of images, or "
        "package.module:factory of a loader."
    )
    weights: Path | None = Field(
        default=None, description="Weights for the model: .safetensors, .pt or .pth."
    )
    validation: str | None = Field(
        default=None,
        description="Data that steps are judged on, given like the training data; without it a fifth of that is kept aside.",
    )
    test: str | None = Field(default=None, description="Data that is only measured, before and after.")
    segments: int | None = Field(default=None, ge=1, description="How many segments, balanced by cost.")
    cuts: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Modules or nodes to cut after, instead of a number of segments.",
    )
    method: Literal["closed_form"] = Field(default="closed_form", description="How segments are trained.")
    schedule: Schedule = Field(
        default="sequential", description="Train segments one after the other, or all from one snapshot."
    )
    output_target: str = Field(
        default="auto",
        description="What outputs should have been: auto, nearest, margin, cross_entropy, max_assign, one_hot, regression, "
        "soft, or package.module:function of outputs and labels.",
    )
    supervised_output: str | None = Field(
        default=None, description="Which output of the model is trained, by key or index, if it has several."
    )
    sweeps: int = Field(default=3, ge=1, description="Passes over the segments, at most.")
    damping: float = Field(
        default=1e-2, ge=0, description="Relative damping of the linear solves; half of it is tried too."
    )
    satisfied_weight: float = Field(
        default=0.1, ge=0, le=1, description="Weight of samples that need no correction; the others weigh 1."
    )
    device: str = Field(default="cpu", description="Where to compute, as torch names it: cpu, cuda, cuda:1.")
    batch_size: int = Field(default=256, ge=1, description="Samples per batch, for files.")
    mean: tuple[float, ...] = Field(
        default=(), description="Subtracted from the inputs, per channel or one for all."
    )
    std: tuple[float, ...] = Field(
        default=(), description="The inputs are divided by it, per channel or one for all."
    )
    resize: tuple[int, int] | None = Field(default=None, description="Height and width to bring images to.")
    seed: int = Field(
        default=0, ge=0, description="Seed of torch, while the model is made, and of the order of samples."
    )
    export: bool = Field(default=True, description="Whether to write and prove model.onnx.")

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> Self:
        if self.segments is not None and self.cuts is not None:
            raise ValueError("give segments or cuts, not both")
        return self

    @classmethod
    def of(cls, **settings: Any) -> PostTrainConfig:
        """The configuration with these settings.

        Raises:
            DataError: a setting is unknown or out of range; all of them are named.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors()
            ]
            raise DataError("; ".join(problems)) from error

    @classmethod
    def describe(cls, name: str) -> str:
        """The description of a setting, as `--help` shows it."""
        return cls.model_fields[name].description or ""
