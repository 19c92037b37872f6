"""The history of post-training as TensorBoard shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fxinvert.errors import DataError
from fxinvert.result import Record
from fxinvert.training.metrics import Metrics


def write_history(history: Sequence[Record], folder: Path) -> None:
    """Writes one step for every update, from 1; 0 is the model given. A folder for each output target that was tried.

    Raises:
        DataError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DataError("TensorBoard is not installed: pip install 'fxinvert[tensorboard]'") from error
    for target in dict.fromkeys(record.output_target for record in history):
        records = [record for record in history if record.output_target == target]
        try:
            writer = SummaryWriter(folder / target)
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error
        with writer:
            for step, name, value in _scalars(records):
                writer.add_scalar(name, value, step)


def _scalars(records: Sequence[Record]) -> Iterator[tuple[int, str, float]]:
    """Steps, names and values."""
    for step, metrics in enumerate([records[0].before, *(record.after for record in records)]):
        yield from ((step, name, value) for name, value in _measured(metrics))
    for step, record in enumerate(records, 1):
        yield step, "step", record.step
        yield from ((step, f"explained/{op}", share) for op, share in record.explained.items())


def _measured(metrics: Metrics) -> Iterator[tuple[str, float]]:
    yield "held out/loss", metrics.loss
    if metrics.accuracy is not None:
        yield "held out/accuracy", metrics.accuracy
