"""Where sweeps happen: work is done, and what it proposes is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fxinvert.output_target import OutputTarget
from fxinvert.training.batch import Batch
from fxinvert.training.confirm import Gain
from fxinvert.training.context import State
from fxinvert.training.judge import HeldOut
from fxinvert.training.work import Work


class Place(Work, HeldOut, Protocol):
    """Work, and what judging it needs."""

    output_target: OutputTarget
    output_targets: Sequence[OutputTarget]

    def state(self) -> State:
        """A copy of the parameters and buffers that jobs are done with."""
        ...

    def begin(self, text: str) -> None:
        """Says what comes next."""
        ...

    def use(self, state: Mapping[str, Any]) -> None:
        """Jobs that begin from now on are done with these parameters and buffers."""
        ...

    def folds(self, count: int) -> Iterator[tuple[Place, list[Batch]]]:
        """The same without each fold of the training samples, and the samples of the fold."""
        ...

    def gain(self, state: State) -> Gain:
        """What held-out samples gain from another state."""
        ...

    def remembered(self, about: Any, do: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What `do` gives, as it comes; if it was done before with the same state and the same `about`, what it gave then."""
        ...
