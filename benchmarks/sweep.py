"""One closed-form sweep, against one epoch of AdamW on the same data; and how closely ops' targets are to be found."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import fxinvert
from benchmarks.measure import Ratio, ratio
from benchmarks.regions import CifarResNet
from benchmarks.studies.networks import cifar_cnn
from fxinvert import models
from fxinvert.inversion.linearized import QUICK
from fxinvert.training import context


def networks() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, network, and the shape of a sample."""
    return [
        ("digits_cnn", models.load("digits_cnn", "early"), (1, 8, 8)),
        ("cifar_cnn", cifar_cnn(), (3, 32, 32)),
    ]


def run(samples: int = 2048, batch: int = 256) -> Iterator[Ratio]:
    """Reconstruct, sum, solve and search the step, over forward, backward and update."""
    for name, model, shape in networks():
        epoch, sweeps = passes(model, shape, samples, batch)
        for schedule, sweep in sweeps.items():
            aim = 3.0 if schedule == "parallel" else None
            yield ratio(f"{name}: closed-form sweep, {schedule}", sweep, "AdamW epoch", epoch, aim)
    few = samples // 4
    epoch, sweeps = passes(wide(), (3, 32, 32), few, batch // 2)
    what = f"2,048 wide, {few:,} samples: closed-form sweep, parallel"
    yield ratio(what, sweeps["parallel"], "AdamW epoch", epoch)
    fewest = samples // 16
    for outputs in (10, 100):
        epoch, sweeps = passes(branching(outputs), (3, 32, 32), fewest, batch // 8)
        what = f"residual, 20 layers, {outputs} outputs, {fewest:,} samples: closed-form sweep, parallel"
        yield ratio(what, sweeps["parallel"], "AdamW epoch", epoch)
    yield from efforts()
    yield from depths()


def efforts(sweeps: int = 6) -> Iterator[Ratio]:
    """The whole training of the character transformer, 832 outputs, with more and fewer steps towards each target."""
    model, data = models.load("char_transformer", "early"), models.data_of("char_transformer")
    train = data.train.batches()

    usual = fxinvert.post_train(model, train, sweeps=sweeps)
    for steps in (1, 2, 4):
        with stepping(steps):
            other = fxinvert.post_train(model, train, sweeps=sweeps)
        told = f"loss {other.baseline.loss:.3f} → {other.final.loss:.3f} and {usual.final.loss:.3f}"
        what = f"transformer, 832 outputs, {sweeps} sweeps: conjugate-gradient steps towards targets, {steps}"
        yield Ratio(what, "one for all ops at once", other.seconds / usual.seconds, note=told)


def depths(samples: int = 16) -> Iterator[Ratio]:
    """A sweep of residual networks, with two steps towards the targets of every op by itself."""
    for layers in (20, 56):
        _, sweeps = passes(branching(100, layers), (3, 32, 32), samples, samples)
        sweep = sweeps["parallel"]

        def closer(sweep: Callable[[], object] = sweep) -> object:
            with stepping(2):
                return sweep()

        what = f"residual, {layers} layers, 100 outputs, {samples} samples: closed-form sweep, two steps towards targets"
        yield ratio(what, closer, "one for all ops at once", sweep)


def stepping(steps: int) -> AbstractContextManager[object]:
    """Runs the body with so many conjugate-gradient steps towards the target of every op."""
    return mock.patch.object(context, "QUICK", QUICK._replace(steps=steps))


def branching(outputs: int, layers: int = 20) -> nn.Module:
    """A residual network."""
    model = CifarResNet(layers)
    model.head = nn.Linear(model.head.in_features, outputs)
    return model.eval()


def wide() -> nn.Module:
    """3,072 values -> 10 logits, by 2,048."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 10))


def passes(
    model: nn.Module, shape: tuple[int, ...], samples: int, batch: int, device: str = "cpu"
) -> tuple[Callable[[], None], dict[str, Callable[[], object]]]:
    """An epoch of AdamW on random data, and a closed-form sweep over the same by each schedule."""
    torch.manual_seed(0)
    x, y = torch.rand(samples, *shape, device=device), torch.randint(0, 10, (samples,), device=device)
    model, data = copy.deepcopy(model).to(device), models.batches(x, y, batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def epoch() -> None:
        for inputs, labels in data:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(inputs), labels))
            optimizer.step()

    def sweep(schedule: str) -> object:
        return fxinvert.post_train(model, data, schedule=schedule, sweeps=1, output_target="cross_entropy")

    return epoch, {name: functools.partial(sweep, name) for name in ("parallel", "sequential")}
