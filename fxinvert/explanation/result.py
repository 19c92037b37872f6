"""An explanation: every cut's value as it was, as it should have been, and what the difference accounts for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxinvert.errors import DataError, UnknownNameError
from fxinvert.heads import Heads
from fxinvert.labels import flat_classes, is_classification
from fxinvert.rules.certificate import relative

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Value:
    """What a node computed, and what it should have computed.

    Attributes:
        name: the node's path.
        op: its op; "input" for an input.
        anchor, target: `(B, …)`; for an input that can have no target, such as tokens, both are what was given.
        shape: without the batch, as it is shown: what a flattened value had been before.
    """

    name: str
    op: str
    anchor: Tensor
    target: Tensor
    shape: tuple[int, ...]

    def pair(self, sample: int) -> tuple[Tensor, Tensor]:
        """What was computed for a sample, and what should have been, in the shape that is shown."""
        return self.anchor[sample].reshape(self.shape), self.target[sample].reshape(self.shape)

    @property
    def correction(self) -> Tensor:
        """target − anchor."""
        return self.target - self.anchor

    @property
    def moved(self) -> Tensor:
        """`(B,)`: ‖correction‖ / ‖anchor‖, how far the value had to move, relatively."""
        return relative(self.correction, self.anchor)


@dataclass(frozen=True, eq=False)
class Cut(Value):
    """The value at a segment's exit.

    Attributes:
        segment: the segment's name.
        inside: other values of the segment: what its trained ops computed, where there are several.
        removed: `(B,)`: the share of the output error that this correction, alone and whole, removes.
        part: `(B,)`: the part of this correction in the joint one.
        share: `(B,)`: the share of the output error that this part, alone, removes.
    """

    segment: str
    inside: tuple[Value, ...]
    removed: Tensor
    part: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention weights of one op.

    Attributes:
        name: the op's path.
        cut: the cut before it, whose target the other weights follow from; None: that is the input's.
        anchor: as computed, `(B, heads, queries, keys)`.
        target: as computed from the target of the cut before it.
    """

    name: str
    cut: str
    anchor: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a network computed for some samples, what it should have computed, and where it went wrong.

    **Shares.** Every cut's correction, alone, would lead to the output target. The *joint* correction shares the work
    out: cut k moves by a part p_k of its own correction. Of all parts that together remove the output error, to first
    order, they are those with the least Σ (p_k·m_k)², where m_k = ‖correction‖ / ‖anchor‖ is how far that cut would
    have to move alone: p_k = (e_k / m_k²) / Σ_j (e_j / m_j)², with e_k the share of the output error that the whole
    correction of cut k removes. The share of segment k is then *measured*: the model is run forward with the value at
    only that cut moved, by its part; the share is how far its output moves along the output error, ⟨o_k − o, t − o⟩ /
    ‖t − o‖² (o: the output, t: its target). What the shares leave to 1 is what the parts do only together: the model
    is not linear.

    A large share says that little change there goes a long way; it is where a correction is cheapest, and no verdict
    on which parameters are bad.

    Attributes:
        labels: as given.
        output: `(B, …)`, what the model answered; several outputs are joined.
        output_target: what it should have answered.
        inputs: the inputs.
        cuts: in the order of the graph.
        attention: attention weights, in the order of the graph.
        heads: what the output is joined of, if of several.
        kind: the name of the output target.
    """

    labels: Any
    output: Tensor
    output_target: Tensor
    inputs: tuple[Value, ...]
    cuts: tuple[Cut, ...]
    attention: tuple[Attention, ...]
    heads: Heads
    kind: str

    def __len__(self) -> int:
        return len(self.output)

    def __getitem__(self, name: str) -> Cut:
        """The cut of a segment, by the segment's or the cut's name."""
        for cut in self.cuts:
            if name in (cut.segment, cut.name):
                return cut
        raise UnknownNameError(
            f"no segment {name!r}; there are {', '.join(cut.segment for cut in self.cuts)}"
        )

    @property
    def error(self) -> Tensor:
        """`(B,)`: ‖t − o‖ / ‖t‖, how far the output was from its target; 0 where there is nothing to explain."""
        return relative(self.output_target - self.output, self.output_target)

    @property
    def shares(self) -> Tensor:
        """`(B, segments)`: the share of the output error that each segment's correction accounts for."""
        return torch.stack([cut.share for cut in self.cuts], 1)

    @property
    def moved(self) -> Tensor:
        """`(B, segments)`: how far each segment's output would have to move, relatively."""
        return torch.stack([cut.moved for cut in self.cuts], 1)

    @property
    def classes(self) -> Tensor | None:
        """`(B,)`: the class of every sample; None unless one output is asked for one class per sample."""
        found = [own for _, own in self.heads.pairs(self.output, self.labels) if is_classification(own)]
        return found[0] if len(found) == 1 and found[0].dim() == 1 else None

    @property
    def predicted(self) -> Tensor | None:
        """`(B,)`: the class that was answered, where `classes` are known."""
        classes = self.classes
        if classes is None:
            return None
        pairs = self.heads.pairs(self.output, self.labels)
        output, own = next((o, labels) for o, labels in pairs if is_classification(labels))
        return flat_classes(output, own)[0].argmax(-1)

    def by_class(self) -> dict[str, Mapping[str, dict[str, float]]]:
        """Means over the samples that have something to explain: by class (or "all"), then by segment.

        Each mean tells `moved`, `share` and the count of `samples`.
        """
        wrong = self.error > 0
        groups = {"all": wrong}
        if self.classes is not None:
            for number in sorted(set(self.classes.tolist())):
                groups[str(number)] = wrong & (self.classes == number)
        return {
            name: {
                cut.segment: {
                    "moved": _mean(cut.moved[rows]),
                    "share": _mean(cut.share[rows]),
                    "samples": int(rows.sum()),
                }
                for cut in self.cuts
            }
            for name, rows in groups.items()
        }

    def figure(self, sample: int = 0, number: int | None = None) -> Figure:
        """One sample as a picture: what every cut computed, what it should have computed, and the difference.

        Args:
            sample: its place among the explained ones.
            number: what to call it, by default its place.

        Raises:
            DataError: there is no such sample.
        """
        from fxinvert.explanation.figure import draw

        if not -len(self) <= sample < len(self):
            raise DataError(f"there is no sample {sample}; there are {len(self)}")
        place = sample % len(self)
        return draw(self, place, place if number is None else number)

    def save(self, path: str | Path, sample: int = 0, number: int | None = None) -> Path:
        """Writes the picture of a sample (see `figure`), as PNG, SVG or PDF by the name's ending.

        Raises:
            DataError: there is no such sample, or the file cannot be written.
        """
        from fxinvert.explanation.figure import write

        return write(self.figure(sample, number), Path(path))

    def to_dict(self) -> dict[str, Any]:
        """The numbers, sample by sample, JSON-ready, without the values themselves."""
        return {
            "output_target": self.kind,
            "output": self.output.tolist(),
            "target": self.output_target.tolist(),
            "error": self.error.tolist(),
            "segments": [
                {
                    "segment": cut.segment,
                    "cut": cut.name,
                    "moved": cut.moved.tolist(),
                    "removed": cut.removed.tolist(),
                    "part": cut.part.tolist(),
                    "share": cut.share.tolist(),
                }
                for cut in self.cuts
            ],
            "by_class": self.by_class(),
        }

    def __repr__(self) -> str:
        means = self.by_class()["all"]
        rows = [f"Explanation of {len(self)} samples, {int((self.error > 0).sum())} with an output error"]
        width = max(len(cut.segment) for cut in self.cuts)
        for name, mean in means.items():
            rows.append(
                f"  {name:<{width}}  {100 * mean['share']:5.1f} % of the output error, "
                f"moved {100 * mean['moved']:.1f} %"
            )
        return "\n".join(rows)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
