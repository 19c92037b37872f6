"""What post-training gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxinvert.notebook import table
from fxinvert.passes.plan import Plan
from fxinvert.training.metrics import Metrics


@dataclass(frozen=True)
class Record:
    """One update that was tried.

    Attributes:
        sweep: counted from 1; 0 for the updates by which output targets were compared.
        segments: the names of the segments updated together.
        output_target: the output target in use.
        step: the largest of `sizes`; 0 if nothing was taken.
        before, after: held-out metrics.
        explained: by op, the share of its squared error that the full update removes on the training data.
        damping: by op, the relative damping ρ used; 0 where nothing was solved.
        sizes: by op, the multiple of its update that was taken.
        seconds: wall time of statistics, solve and search together.
    """

    sweep: int
    segments: tuple[str, ...]
    output_target: str
    step: float
    before: Metrics
    after: Metrics
    explained: dict[str, float]
    damping: dict[str, float]
    sizes: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def _row(self) -> tuple[str | int | float, ...]:
        accuracy = "" if self.after.accuracy is None else f"{100 * self.after.accuracy:.2f} %"
        segments = ", ".join(self.segments)
        return self.sweep, segments, self.output_target, self.step, self.after.loss, accuracy, self.seconds

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Record:
        """The inverse of `to_dict`."""
        before, after = Metrics(**content["before"]), Metrics(**content["after"])
        return cls(**content | {"before": before, "after": after, "segments": tuple(content["segments"])})


@dataclass(frozen=True)
class PostTrainingResult:
    """A post-trained model and how it came about.

    Attributes:
        model: a copy of the model given, with updated parameters, in the same mode (train or eval).
        baseline: held-out metrics of the model given.
        final: of the model returned; neither loss nor accuracy is worse.
        history: every update that was tried, in order.
        plan: the partition that was used.
        output_target: the name of the output target that was used.
        changed: the names of the parameters and buffers that differ.
        notes: sentences that the user should read.
        seconds: wall time in all.
    """

    model: nn.Module
    baseline: Metrics
    final: Metrics
    history: tuple[Record, ...]
    plan: Plan
    output_target: str
    changed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, JSON-ready."""
        return {
            "baseline": self.baseline.to_dict(),
            "final": self.final.to_dict(),
            "output_target": self.output_target,
            "changed": list(self.changed),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "history": [record.to_dict() for record in self.history],
        }

    def to_tensorboard(self, folder: str | Path) -> None:
        """Writes held-out loss and accuracy, steps, and what updates explain, update by update, for TensorBoard.

        Args:
            folder: where event files go, one for each output target that was tried.

        Raises:
            DataError: TensorBoard is not installed, or the folder cannot be written.
        """
        from fxinvert.report.tensorboard import write_history

        write_history(self.history, Path(folder))

    def __repr__(self) -> str:
        return f"PostTrainingResult(held-out: {self.baseline} → {self.final}; {len(self.changed)} parameters changed)"

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"Note: {note}." for note in self.notes)])

    def _repr_html_(self) -> str:
        notes = (
            f"held out ({self.final.samples:,} samples): {self.baseline} → {self.final}",
            f"{len(self.changed)} parameters changed, output target {self.output_target!r}, {self.seconds:.1f} s",
            *self.notes,
        )
        header = ("sweep", "segments", "output target", "step", "loss", "accuracy", "seconds")
        return table("PostTrainingResult", header, map(Record._row, self.history), notes)
