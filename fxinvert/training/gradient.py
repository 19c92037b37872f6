"""Gradient training: each segment alone, from its input towards its target; no gradient crosses a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import chain, islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from fxinvert.errors import DataError
from fxinvert.output_target import OutputTarget
from fxinvert.passes.capture import evaluating
from fxinvert.passes.plan import Segment
from fxinvert.settings import check_choice, check_counts, check_numbers
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage, size_of
from fxinvert.training.op_sums import sample_weights
from fxinvert.training.replay import leaves_of, replay
from fxinvert.training.variants import given_by
from fxinvert.training.work import Proposal, Update, Work

#: over a few samples, when what a pass costs is measured
PASSES = 2


@dataclass(frozen=True)
class Optimizer:
    """How parameters follow gradients.

    Attributes:
        kind: the name of a class of `torch.optim`.
        learning_rate: its step.
        options: its other arguments.
        epochs: passes over the data.
        batch_size: samples per step, at most; samples are shuffled among those of a loader's batch.
        seed: of the shuffling.
    """

    kind: str = "AdamW"
    learning_rate: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 3
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        cls = getattr(torch.optim, self.kind, None)
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise DataError(f"torch.optim has no optimizer {self.kind!r}; it has AdamW, SGD, Adam and others")
        check_numbers("a number above 0", lambda r: r > 0, learning_rate=self.learning_rate)
        check_counts(epochs=self.epochs, batch_size=self.batch_size)

    def over(self, leaves: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of some parameters."""
        cls, own = getattr(torch.optim, self.kind), list(leaves)
        # one kernel for all parameters, where there is one
        fused = {"fused": True} if "fused" in signature(cls).parameters and own else {}
        optimizer: torch.optim.Optimizer = cls(own, lr=self.learning_rate, **(fused | dict(self.options)))
        return optimizer

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of all steps."""
        return chain.from_iterable(islice(self.passes(batches), self.epochs))

    def passes(self, batches: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
        """The batches of the steps of one pass after the other, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield (
                batch.select(rows)
                for batch in batches
                for rows in torch.split(torch.randperm(len(batch), generator=generator), self.batch_size)
            )


@dataclass(frozen=True)
class Gradient:
    """Every segment by its own optimizer.

    Attributes:
        optimizer: of each segment.
        loss: squared distance to the target, of all samples alike ("mse"), or with those whose output is its own target
            weighing `satisfied_weight` ("weighted").
        satisfied_weight: see there.
    """

    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Literal["mse", "weighted"] = "mse"
    satisfied_weight: float = 0.1
    name: str = "gradient"
    schedule: str = "sequential"
    follows_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("mse", "weighted"))
        check_numbers("a weight from 0 to 1", lambda w: 0 <= w <= 1, satisfied_weight=self.satisfied_weight)

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields the updates of all segments, each found alone."""
        found = work.each(fit_segment, [self._arguments(work.output_target, own) for own in segments])
        yield [
            [
                Update(segment.name, changes, explained)
                for segment, (changes, explained) in zip(segments, found, strict=True)
            ]
        ]

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields one stage, with a task for each segment."""
        optimizer = replace(self.optimizer, epochs=PASSES)
        tasks, sizes = [], []
        for segment in segments:
            arguments = self._arguments(probe.output_target, segment) | {"optimizer": optimizer}
            cost, found = probe.measured(fit_segment, arguments, optimizer.batch_size)
            tasks.append((f"train {segment.name}", cost))
            sizes.append(size_of(found))
        yield Stage(
            tasks=tuple(tasks),
            by_chunk=False,
            samples=probe.samples,
            memory=step_memory(probe, optimizer) + 5 * max(sizes),  # leaves, gradients, two moments, changes
            sent=max(sizes),
            passes=self.optimizer.epochs,
            updates=len(segments),
        )

    def _arguments(self, output_target: OutputTarget, segment: Segment) -> dict[str, Any]:
        return {
            "output_target": output_target,
            "exit_path": segment.exit,
            "names": segment.parameters,
            "optimizer": self.optimizer,
            "satisfied_weight": self.satisfied_weight if self.loss == "weighted" else 1.0,
        }


def stepped(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Tensor:
    """Takes a step, for which an optimizer may ask for the loss as often as it likes; the loss at its beginning."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = loss_of()
        torch.autograd.backward(loss)
        return loss

    loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type,assignment]
    return loss.detach()


def step_memory(probe: Probe, optimizer: Optimizer) -> int:
    """Bytes of the values of a step, the targets, the values replayed, and their gradients."""
    return 4 * min(optimizer.batch_size, probe.batch_size) * probe.values


def fit_segment(
    context: Context,
    batches: Iterable[Batch],
    *,
    output_target: OutputTarget,
    exit_path: str,
    names: Sequence[str],
    optimizer: Optimizer,
    satisfied_weight: float,
) -> tuple[dict[str, Tensor], float]:
    """Fits a segment to its target, with everything before it as it is.

    Args:
        context: the model.
        batches: the data, iterable more than once.
        output_target: what the output should have been.
        exit_path: of the segment's exit.
        names: of its parameters.
        optimizer: what moves them.
        satisfied_weight: weight of the samples whose output is its own target, the others weigh 1.

    Returns:
        The changes by name, and the share of the squared error removed, from the first to the last pass.
    """
    inverse, exit_ = context.inverse(output_target), context.nodes[exit_path]
    leaves = leaves_of(context, names)
    given, optimize = given_by(context, leaves), optimizer.over(leaves.values())
    before = after = 0.0

    def loss_of(values: dict[fx.Node, Any], target: Tensor, weights: Tensor) -> Tensor:
        reached = replay(context, values, given, exit_)[exit_]
        errors = (reached - target).square().reshape(len(target), -1).mean(1)
        loss: Tensor = (weights * errors).mean()
        return loss

    with evaluating(context.graph):
        for batch in optimizer.steps(batches):
            with torch.no_grad():
                values = inverse.forward(batch.inputs)
                targets = inverse.targets(values, batch.labels, [exit_, inverse.output_node])
                output = inverse.output_node
                weights = sample_weights(values[output], targets[output], satisfied_weight)
            loss = stepped(optimize, partial(loss_of, values, targets[exit_], weights))
            context.keep_zeros(leaves)
            with torch.no_grad():
                started = (values[exit_] - targets[exit_]).square().reshape(len(batch), -1).mean(1)
                before, after = before + float((weights * started).sum()), after + loss.item() * len(batch)
    explained = 1 - after / before if before > 0 else 0.0
    return {name: leaf.detach() - context.tensors[name].detach() for name, leaf in leaves.items()}, explained
