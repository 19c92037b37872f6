"""The settings of a post-training run: checked once, used by the command line, saved with the result."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fxinvert.errors import DataError

MethodName = Literal["closed_form", "gauss_newton", "gradient", "joint", "auto"]
Schedule = Literal["auto", "sequential", "parallel", "waves", "single"]
ExecutorName = Literal["serial", "processes", "ray"]
SolverName = Literal[
    "diagonal", "spectral", "qr", "cholesky", "banded", "capacitance", "circulant", "iterative"
]
Share = Literal["searched", "equal", "explained", "none"]

#: of the settings; raised when a setting changes its meaning
VERSION: Literal[1] = 1
#: settings that only some methods have, and those that have them
OF_METHODS: dict[str, tuple[MethodName, ...]] = {
    "damping": ("closed_form",),
    "satisfied_weight": ("closed_form", "gradient"),
    "error": ("closed_form", "gradient"),
    "every": ("closed_form",),
    "ops": ("closed_form",),
    "position_fraction": ("closed_form",),
    "optimizer": ("gradient", "joint", "auto"),
    "learning_rate": ("gradient", "joint"),
    "epochs": ("gradient", "joint"),
    "alpha": ("joint",),
}
#: settings that decide where and how fast a run works, not what comes out
PLACE = ("executor", "workers", "address", "retries")


class PostTrainConfig(BaseModel):
    """Everything that decides the outcome of a run, besides the files that it names, and where it works."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = Field(default=VERSION, description="Version of these settings.")
    model: str = Field(
        description="The model: package.module:factory (the current folder is importable), a .pt2 file, timm:NAME, "
        "torchvision:NAME or transformers:DIR."
    )
    data: str = Field(
        description="Training data: an .npz file with x and y, a .csv file of image paths and numbers, a folder of "
        "class folders of images, of MNIST's or of CIFAR's files, datasets:DIR, or package.module:factory of a loader or of a list of factories, one per shard."
    )
    weights: Path | None = Field(
        default=None, description="Weights for the model: .safetensors, .pt or .pth."
    )
    pretrained: bool = Field(
        default=False,
        description="Use the own weights of a model of timm, torchvision or transformers, fetched where they are not here.",
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
    only: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Segments to train, by name; by default all."
    )
    method: MethodName = Field(
        default="closed_form",
        description="How segments are trained: closed_form, gauss_newton (all ops at once), gradient (each alone), joint (everything "
        "up to a cut), or auto (a solve, then gradients of everything at once).",
    )
    schedule: Schedule = Field(
        default="auto",
        description="Train segments one after the other, all from one snapshot (parallel), those that do not feed one "
        "another together (waves), or one (single); auto: parallel for auto and gauss_newton, and for closed_form "
        "where the graph branches, else one after the other.",
    )
    output_target: str = Field(
        default="auto",
        description="What outputs should have been: auto, nearest, margin, cross_entropy, max_assign, one_hot, regression, "
        "soft, or package.module:function of outputs and labels.",
    )
    supervised_output: str | None = Field(
        default=None, description="Which output of the model is trained, by key or index, if it has several."
    )
    sweeps: int | None = Field(
        default=None,
        ge=1,
        description="Passes over the segments, at most; by default 3, and 6 in closed form where the graph branches.",
    )
    patience: int = Field(
        default=1, ge=1, description="Stop after so many sweeps in a row that bring too little."
    )
    least_gain: float = Field(
        default=0.0, ge=0, description="What a sweep must bring, as a share of the held-out loss."
    )
    confidence: float = Field(
        default=0.95,
        ge=0.5,
        lt=1,
        description="With which held-out samples must confirm the gain, or the model stays as it was; 0.5: any gain does.",
    )
    inputs: Literal["updated", "original"] = Field(
        default="updated",
        description="What a segment's input follows from: the updated earlier segments, or the original ones.",
    )
    share: Share = Field(default="searched", description="How updates found together share the correction.")
    recalibrate: bool = Field(
        default=False, description="Estimate batch-norm statistics anew after every update."
    )
    keep_zeros: bool = Field(
        default=False, description="Keep entries of parameters that are zero, as after pruning."
    )
    damping: float = Field(
        default=1e-2, ge=0, description="Relative damping of the linear solves; half of it is tried too."
    )
    satisfied_weight: float = Field(
        default=0.1, ge=0, le=1, description="Weight of samples that need no correction; the others weigh 1."
    )
    error: Literal["plain", "weighted"] = Field(
        default="plain",
        description="Closed form and gradient: measure errors plainly, or weighted by how sensitive the output is to them.",
    )
    every: int | None = Field(
        default=None, ge=1, description="Closed form: solve again after so many samples; by default once."
    )
    ops: Literal["together", "in_turn"] = Field(
        default="together", description="Closed form: train a segment's ops together or one after the other."
    )
    position_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Closed form: share of the positions of maps, drawn at random, that its sums are made of; by default 16 "
        "rows per feature and batch.",
    )
    optimizer: str = Field(default="AdamW", description="Gradient, joint and auto: a class of torch.optim.")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Gradient and joint: of the optimizer; by default 1e-3, for joint 5e-5.",
    )
    epochs: int = Field(default=3, ge=1, description="Gradient and joint: passes over the data.")
    alpha: float = Field(
        default=0.1, ge=0, description="Joint: weight of the distance to the target; 0 is plain fine-tuning."
    )
    executor: ExecutorName = Field(
        default="serial", description="Where work is done; the result is the same to the last bit."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Tasks at the same time; by default one per core."
    )
    address: str | None = Field(default=None, description="Of a running Ray cluster.")
    threads: int = Field(default=1, ge=1, description="Threads of torch in every task.")
    chunk: int = Field(default=8, ge=1, description="Batches per task.")
    retries: int = Field(
        default=2, ge=0, description="How often a task is tried again that failed or whose worker died."
    )
    memory_limit: int | None = Field(
        default=None,
        ge=1,
        description="Bytes that every task may take, besides its data and copies of the parameters; by default 2 GiB, or "
        "what a sample of the model or its largest table takes.",
    )
    solvers: dict[str, SolverName] | None = Field(
        default=None,
        description="Solvers of single ops, by node, where they are not to be chosen; fxinvert.invert tells the names.",
    )
    compiled: bool = Field(
        default=False,
        description="Compile elementwise rules and norms, which takes a C++ compiler and seconds for each; for long runs.",
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
    input_columns: tuple[str, ...] = Field(
        default=(),
        description="Of .csv and datasets: columns that are inputs; by default the first of images.",
    )
    label_columns: tuple[str, ...] = Field(
        default=(), description="Of .csv and datasets: columns that are labels; by default all other numbers."
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of torch, while the model is made, and of the order of samples."
    )
    export: bool = Field(default=True, description="Whether to write and prove model.onnx.")
    report: bool = Field(default=True, description="Whether to write report.html and report.json in the end.")

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> Self:
        if self.segments is not None and self.cuts is not None:
            raise ValueError("give segments or cuts, not both")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        for name, methods in OF_METHODS.items():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is a setting of method {' and '.join(methods)}; {self.method} has none"
                )
        if self.address is not None and self.executor != "ray":
            raise ValueError(f"address is a setting of executor ray; {self.executor} has none")
        return self

    @classmethod
    def of(cls, **settings: Any) -> PostTrainConfig:
        """The configuration with these settings.

        Raises:
            DataError: a setting is unknown or out of range; all of them are named.
        """
        found = settings.get("version", VERSION)
        if found != VERSION:
            raise DataError(
                f"the configuration has version {found!r}; this version of fxinvert reads version {VERSION}"
            )
        try:
            return cls(**settings)
        except ValidationError as error:
            raise DataError("; ".join(map(cls._said, error.errors()))) from error

    @classmethod
    def _said(cls, problem: Any) -> str:
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(name, cls.model_fields, 1)
            return f"{name}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
        said: str = problem["msg"].removeprefix("Value error, ")
        return f"{name}: {said}" if name else said

    @classmethod
    def describe(cls, name: str) -> str:
        """The description of a setting, as `--help` shows it."""
        return cls.model_fields[name].description or ""

    def to_yaml(self) -> str:
        """The settings as a file that `read_settings` reads."""
        content = self.model_dump(mode="json")
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # names of files that are not UTF-8
            text = yaml.safe_dump(content, sort_keys=False)
        return text


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        DataError: it is not there, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the configuration {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # besides what is no YAML: dates and numbers that are none, endless nesting
        raise DataError(f"the configuration {path} is no YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"the configuration {path} holds no settings; `name: value` lines are needed")
    return content
