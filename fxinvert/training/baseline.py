"""What closed form is measured against: back-propagation with AdamW, for the same time on the same data."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxinvert.errors import DataError
from fxinvert.training.metrics import task_loss


@dataclass(frozen=True)
class AdamWRun:
    """A model trained by AdamW.

    Attributes:
        model: the trained copy, in eval mode.
        learning_rate: the one used.
        steps: how many there was time for.
        seconds: wall time used.
    """

    model: nn.Module
    learning_rate: float
    steps: int
    seconds: float


class ShuffledBatches:
    """Batches of two tensors in a new random order on every pass, drawn from torch's global generator.

    Args:
        x: inputs (N, …).
        y: labels (N, …).
        batch_size: samples per batch.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 64) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.split(torch.randperm(len(self.x)), self.batch_size):
            yield self.x[rows], self.y[rows]


def adamw_for(
    model: nn.Module, train_data: Iterable[Any], seconds: float, learning_rate: float, seed: int
) -> AdamWRun:
    """Trains a copy of a model with AdamW for a time: cross-entropy for classes, mean squared error for numbers.

    Args:
        model: left as it is.
        train_data: `(inputs, labels)` batches, iterable more than once; it decides batch size and order.
        seconds: wall time; the first use of an optimizer, when torch loads its parts, does not count.
        learning_rate: of AdamW, with its usual weight decay of 0.01.
        seed: of torch, for shuffling and dropout; the caller's random state is left as it was.

    Raises:
        DataError: there are no batches.
    """
    trained = copy.deepcopy(model).train()
    device = next((p.device for p in trained.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        warm_up = copy.deepcopy(trained)
        inputs, labels = next(_endless(train_data))
        _step(warm_up, torch.optim.AdamW(warm_up.parameters(), fused=True), inputs, labels, device)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, fused=True)
        steps, began = 0, time.perf_counter()
        for inputs, labels in _endless(train_data):
            if time.perf_counter() - began >= seconds:
                break
            _step(trained, optimizer, inputs, labels, device)
            steps += 1
        spent = time.perf_counter() - began
    return AdamWRun(trained.eval(), learning_rate, steps, spent)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, labels: Tensor, device: torch.device
) -> None:
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    outputs, labels = model(*(value.to(device) for value in given)), labels.to(device)
    loss = task_loss(outputs, labels)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def _endless(train_data: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    while True:
        empty = True
        for batch in train_data:
            empty = False
            yield batch
        if empty:
            raise DataError("train_data has no batches; it is empty, or it can be iterated only once")
