"""Few samples: sweeps are repeated on parts of them, for the mean of the weights, and for more that confirms a gain.

The fifth of few samples that is kept aside says little, and steps that are chosen by it follow chance. So of few samples, and
of some more where those that were kept aside leave any doubt of what was gained, sweeps are repeated from the model as given,
each time without one fold of the training samples (Stone, Cross-validatory choice and assessment of statistical predictions,
JRSS B 36, 1974), while steps are chosen on the same held-out samples. That gives two things:

    the mean of the weights that all of these end with, which varies less than those of one: bagging (Breiman, Machine Learning
        24, 1996), of weights, since all begin with the same model (Wortsman et al., Model soups, ICML 2022); it is judged
        like any other step;
    what the samples of each fold gain from weights that were found without them, and that nothing was chosen by.

The second helps to confirm a gain where held-out samples are too few to, and where these samples lose, there is none: to the
twenty, or two hundred, that chose them among many, steps can look like a gain that they are not. It is measured half the way
to those weights: what differs between them from fold to fold has a quarter of its variance there, as it has in the mean of
four, and what they have in common half of its effect, so that no more is confirmed than the mean gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch

from fxinvert.training.batch import Batch
from fxinvert.training.confirm import MANY, Gain, gain
from fxinvert.training.context import State
from fxinvert.training.work import Work

#: so many training samples are few, but enough for folds: sweeps are repeated
FEW = range(32, MANY + 1)
#: of so many they are where held-out samples leave doubt of the gain; where there are more, there is little
SOME = range(FEW.start, 1025)
#: the least confidence that leaves none, unless any gain does: these samples have chosen among many steps, which is not accounted for
CERTAIN = 0.999
#: what the mean is called in results
MEAN = "mean of all repetitions"


P = TypeVar("P", bound=Work)


@runtime_checkable
class Repeating(Protocol):
    """A method whose sweeps are repeated where samples are few."""

    def folds_of(self, samples: int) -> int:
        """Of so many training samples, without each of which sweeps may be repeated; 1: they never are."""
        ...


def repeated(
    begun: State, folds: Iterable[tuple[P, Sequence[Batch]]], sweep: Callable[[P], State]
) -> tuple[Gain, list[State]]:
    """What sweeps without each of some folds find.

    Args:
        begun: the parameters and buffers of the model as given.
        folds: work with the model as given and without the samples of a fold, and these samples.
        sweep: the parameters and buffers that sweeps end with.

    Returns:
        What the samples of the folds gain half the way to what was found without them, and all that was found.
    """
    total, states = Gain(), list[State]()
    for own, samples in folds:
        states.append(sweep(own))
        own.context.load(begun)
        total += gain(own.context, samples, state=mean([begun, states[-1]]))
    return total, states


def mean(states: Sequence[State]) -> State:
    """Of parameters and buffers; made in float64, so that rounding happens once."""
    return {
        name: torch.stack([own[name].double() for own in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
