"""What methods are given to work with: functions are applied to the data, wherever that happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Segment
from fxinvert.training.context import Context, State

#: something done with a part of the data, `job(context, batches, **arguments)`: a function of a module, so that it can
#: be sent by its name; what it returns is made of tensors, numbers, strings and containers, so that it can be stored
Job = Callable[..., Any]


class Work(Protocol):
    """Where jobs are done, each with the parameters that are current when it begins.

    Attributes:
        context: this process's own.
        output_target: what the output should have been.
        output_targets: those that are told apart from the same state, this one among them.
        gained: the share of the held-out loss that went with what was proposed last.
        taken: which of the alternatives proposed last was taken; None: none was.
        sweep: its number, from 1; 0 while output targets are told apart by the last segment.
        begun: the parameters and buffers of the model as given.
        samples: how many there are to train on.
    """

    context: Context
    output_target: OutputTarget
    output_targets: Sequence[OutputTarget]
    gained: float
    taken: int | None
    sweep: int
    begun: State

    @property
    def samples(self) -> int: ...

    def blocks(self, job: Job, arguments: Mapping[str, Any], every: int | None) -> Iterator[Iterator[Any]]:
        """Does a job with every chunk of the training data; the results of each block of chunks, in their order.

        Args:
            job: what to do; its batches can be iterated once.
            arguments: of the job.
            every: samples per block, at least; None: all of the data is one block.
        """
        ...

    def once(self, about: Any, do: Callable[[], Any]) -> Any:
        """What `do` gives; if it was asked for the same with the same parameters, what it gave last."""
        ...

    def each(self, job: Job, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Does a job with all of the training data, once for each of the arguments, independently of one another.

        Args:
            job: what to do; its batches can be iterated any number of times.
            arguments: of the job, one mapping for each time.
        """
        ...


@dataclass(frozen=True)
class Update:
    """A change of some parameters or buffers, found with all others as they were.

    Attributes:
        op: the path of the op, or the name of the segment, that it belongs to.
        changes: by name, for a full step.
        explained: the share of the squared error that the full change removes on the training data.
        damping: the relative damping ρ of its solution; 0 where nothing was solved.
    """

    op: str
    changes: dict[str, Tensor]
    explained: float = 0.0
    damping: float = 0.0


@dataclass(frozen=True)
class Back:
    """A return to earlier values, whatever was taken: what is proposed from then on is judged against these.

    Attributes:
        state: some parameters and buffers by name; the others stay as they are.
    """

    state: State


#: updates that were found together, each as if the others stayed
Proposal = list[Update]
#: the multiple of each update of a proposal
Sizes = tuple[float, ...]


def moved(state: Mapping[str, Tensor], proposal: Proposal, sizes: Sizes) -> State:
    """The tensors that a proposal changes, after some multiple of each of its updates."""
    total: dict[str, Tensor] = {}
    for update, size in zip(proposal, sizes, strict=True):
        for name, change in update.changes.items() if size else ():
            # the sum is made in the solution's float64, so that rounding happens once
            if name not in total:
                total[name] = state[name].to(torch.float64, copy=True)
            total[name].add_(change, alpha=size)
    return {name: value.to(state[name].dtype) for name, value in total.items()}


class Method(Protocol):
    """How segments are trained.

    Attributes:
        name: what it is called in settings and results.
        schedule: of the segments, where the user asks for none; see `fxinvert.scheduling.waves` and `fxinvert.training.order`.
    """

    @property
    def name(self) -> str: ...

    @property
    def schedule(self) -> str: ...

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal] | Back]:
        """Proposes updates, several times if it likes.

        Every time it yields alternatives; before it goes on, the one with the least held-out loss has been taken, as
        far as that is an improvement. Or it goes back to earlier values, so as to train in several ways: of all states
        the best is kept, whatever follows. What it proposes may depend on its settings and the results of jobs only.

        Raises:
            DataError: these segments cannot be trained so.
        """
        ...


@runtime_checkable
class Following(Protocol):
    """A method that follows gradients: it trains what cannot be solved for, too."""

    @property
    def follows_gradients(self) -> bool: ...
