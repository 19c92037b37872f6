"""The best state that sweeps have come by, and whether samples confirm that it is better than the first."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxinvert.training.confirm import ANY, Gain
from fxinvert.training.context import State
from fxinvert.training.metrics import Metrics
from fxinvert.training.place import Place


@dataclass
class Best:
    """The best state seen that is no worse than the baseline, and the metrics of the latest state.

    Attributes:
        gain: what held-out samples gain from it.
        unseen: what training samples gain from repeated sweeps without them, if any were.
    """

    metrics: Metrics
    state: State = field(repr=False)
    gain: Gain | None = None
    unseen: Gain | None = None

    def __post_init__(self) -> None:
        self.baseline = self.latest = self.metrics
        self._begun = self.state

    def see(self, metrics: Metrics, state: State) -> None:
        """Takes notice of a state."""
        self.latest = metrics
        if metrics.loss < self.metrics.loss and metrics.no_worse_than(self.baseline):
            self.metrics, self.state, self.gain = metrics, state, None

    def confirmed(self, place: Place, confidence: float) -> bool:
        """Whether held-out samples confirm, with some confidence, that the state is better than the first; or is the first.

        Samples that nothing was chosen by may help to, where there are some, and must not lose, unless any gain is enough.
        """
        if self.metrics is self.baseline:
            return True
        if self.gain is None:
            now = place.state()
            place.use(self._begun)
            self.gain = place.gain(self.state)
            place.use(now)
        if self.unseen is not None and self.unseen.lost and confidence > ANY:
            return False
        return self.gain.confirmed(confidence) or self.gain.confirmed(confidence, self.unseen)

    def kept(self, place: Place, confidence: float) -> State:
        """The state that is returned if nothing follows."""
        return self.state if self.confirmed(place, confidence) else self._begun
