"""Output targets: what the model's output should have been, given the labels.

Each is a function of the outputs `(B, …)` and the labels, which ask for classes or for numbers (see `fxinvert.labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxinvert.errors import DataError
from fxinvert.labels import check_tensor, class_logits, fit, is_classification
from fxinvert.linalg.vectors import per_sample
from fxinvert.settings import check_choice

OutputTargetFunction = Callable[[Tensor, Tensor], Tensor]
#: of an output, the nearest that is right: (the model's own outputs, labels, the output to project, the share of the margin
#: that is asked for, `(B,)`)
Projection = Callable[[Tensor, Any, Tensor, Tensor], Tensor]
OutputTargetName = Literal[
    "nearest", "margin", "cross_entropy", "max_assign", "one_hot", "regression", "soft"
]


def nearest(outputs: Tensor, labels: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """Projection onto {the label's logit exceeds every other by at least `margin`}, exactly, in closed form.

    With the label's logit lowered by the margin the set is {the label's logit is the largest}; its projection is pool
    adjacent violators: the label's logit and the k largest others are replaced by their mean, for the smallest k whose
    mean is not below the next one. A sample that satisfies the constraint keeps its output.

    Args:
        outputs: logits.
        labels: that ask for classes.
        margin: in units of the logits; a number or a tensor that broadcasts to the class numbers.
    """
    logits, classes, restore = class_logits(outputs, labels)
    index, lead = _index(classes), _column(margin, classes)
    own = logits.gather(-1, index) - lead
    others = logits.scatter(-1, index, -torch.inf)
    ranked = others.sort(-1, descending=True).values
    counts = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    # pooled[k]: mean of the label's logit and the k largest others
    pooled = torch.cat([own, own + ranked[..., :-1].cumsum(-1)], -1) / counts
    level = pooled.gather(-1, (pooled >= ranked).to(torch.uint8).argmax(-1, keepdim=True))
    violated = own < ranked[..., :1]
    target = torch.minimum(logits, level).scatter(-1, index, level + lead)
    return restore(torch.where(violated, target, logits))


#: the automatic margin, as a share of the largest lead that is possible: C logits of spread s lead by √C·s at most
LEAD = 2 / 10**0.5


def margin(outputs: Tensor, labels: Tensor, size: float | Literal["auto"] = "auto") -> Tensor:
    """`nearest` with a margin. `"auto"`: `LEAD`·√C times the spread (standard deviation) of the sample's own logits.

    The spread is the sample's own, so that its target does not depend on the rest of its batch. Of 10 classes the
    margin is 2 spreads; of any number it is one that a logit can lead by.
    """
    return nearest(outputs, labels, automatic_margin(outputs, labels) if size == "auto" else size)


def automatic_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """The margin `"auto"` of every label."""
    logits, _, _ = class_logits(outputs, labels)
    classes = logits.shape[-1]
    centred = logits - logits.mean(-1, keepdim=True)
    spread: Tensor = (centred.square().sum(-1) / max(classes - 1, 1)).sqrt()
    size: float = LEAD * classes**0.5
    return size * spread


def _nearest_of(outputs: Tensor, labels: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return nearest(other, labels)


def _margin_of(outputs: Tensor, labels: Tensor, other: Tensor, share: Tensor) -> Tensor:
    size = automatic_margin(outputs, labels)
    return nearest(other, labels, size * per_sample(share, size))


def cross_entropy(outputs: Tensor, labels: Tensor, step: float = 2.0) -> Tensor:
    """o + c·(onehot − softmax(o)): for c = 2 the minimizer of a quadratic upper bound of the cross-entropy.

    The Hessian of the cross-entropy in the logits is at most ½I (Böhning 1992), so that a least-squares fit to this
    target cannot raise the loss of an affine last layer. A larger c over-relaxes.
    """
    logits, classes, restore = class_logits(outputs, labels)
    wanted = torch.zeros_like(logits).scatter(-1, _index(classes), 1.0)
    return restore(logits + step * (wanted - logits.softmax(-1)))


def max_assign(outputs: Tensor, labels: Tensor) -> Tensor:
    """The label's logit takes the largest value of the sample's logits; the others stay."""
    logits, classes, restore = class_logits(outputs, labels)
    return restore(logits.scatter(-1, _index(classes), logits.amax(-1, keepdim=True)))


def one_hot(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 for the label's class, 0 for the others."""
    logits, classes, restore = class_logits(outputs, labels)
    return restore(torch.zeros_like(logits).scatter(-1, _index(classes), 1.0))


def regression(outputs: Tensor, labels: Tensor) -> Tensor:
    """The label itself, `(B, …)` as the output, or `(B,)` where the output is `(B, 1)`.

    Raises:
        DataError: the shapes differ.
    """
    check_tensor(labels)
    if not fit(outputs, labels):
        raise DataError(
            f"labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}: "
            "for regression they are equal; class labels are integers (int64)"
        )
    return labels.reshape(outputs.shape).to(outputs.dtype)


def check_labels(outputs: Tensor, labels: Tensor) -> None:
    """Checks that labels fit outputs, of which only the shape is looked at.

    Raises:
        DataError: they do not.
    """
    check_tensor(labels)
    (class_logits if is_classification(labels) else regression)(outputs, labels)


def soft(outputs: Tensor, labels: Tensor) -> Tensor:
    """Given logits, or probabilities, which are turned into logits of the same mean as the sample's own.

    A sample's labels are probabilities if they are not negative and sum to 1 along the class axis, the second or the
    last, at every position.
    """
    given = regression(outputs, labels)
    target = given
    for axis in dict.fromkeys((outputs.dim() - 1, 1)) if outputs.dim() > 1 else ():
        logits = given.clamp(min=1e-6).log()
        logits = logits + (outputs - logits).mean(axis, keepdim=True)
        target = torch.where(_probabilities(given, axis), logits, target)
    return target


def _probabilities(values: Tensor, axis: int) -> Tensor:
    """Which samples hold distributions along an axis: `(B, …)` → `(B, 1, …)`, True or False."""
    sums = values.sum(axis)
    good = (values >= 0).flatten(1).all(1) & ((sums - 1).abs() <= 1e-4).reshape(len(values), -1).all(1)
    return per_sample(good, values)


FUNCTIONS: dict[str, OutputTargetFunction] = {
    "nearest": nearest,
    "margin": margin,
    "cross_entropy": cross_entropy,
    "max_assign": max_assign,
    "one_hot": one_hot,
    "regression": regression,
    "soft": soft,
}

#: output targets that are the nearest of many outputs that are right
PROJECTIONS: dict[OutputTargetFunction, Projection] = {nearest: _nearest_of, margin: _margin_of}


@dataclass(frozen=True)
class OutputTarget:
    """A named output target; calling it gives the target of the model's output.

    Attributes:
        name: for tables and metadata.
        function: `(outputs, labels) -> target`.
        project: onto the outputs that are right, where the target is the nearest of many; None: it alone is right.
        by_loss: whether it stands for the task's loss, so that what lessens this in another way is as welcome.
    """

    name: str
    function: OutputTargetFunction
    project: Projection | None = None
    by_loss: bool = False

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        try:
            target = self.function(outputs, labels)
        except DataError:
            raise
        except Exception as error:  # a target may be anyone's function
            raise DataError(f"output target {self.name!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(target, Tensor) or target.shape != outputs.shape:
            shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"output target {self.name!r} returned {shape}; the outputs have shape {tuple(outputs.shape)}"
            )
        return target.to(outputs.dtype)


def output_target(choice: str | OutputTargetFunction) -> OutputTarget:
    """The output target of that name, or one made of a callable.

    Raises:
        DataError: there is none of that name.
    """
    if isinstance(choice, OutputTarget):
        return choice
    if callable(choice):
        return OutputTarget(getattr(choice, "__name__", "custom"), choice, PROJECTIONS.get(choice))
    auto = "; 'auto' is for post_train, which chooses by held-out loss" if choice == "auto" else ""
    check_choice("output target", choice, FUNCTIONS, f", or a callable{auto}")
    function = FUNCTIONS[choice]
    return OutputTarget(choice, function, PROJECTIONS.get(function), by_loss=function is cross_entropy)


def _index(classes: Tensor) -> Tensor:
    """Class numbers as a column that tells where their logits are; anywhere for those that ask for nothing."""
    return classes.clamp(min=0)[..., None]


def _column(value: float | Tensor, classes: Tensor) -> float | Tensor:
    return value.expand(classes.shape)[..., None] if isinstance(value, Tensor) else value


def automatic(labels: Any) -> list[OutputTarget]:
    """What `"auto"` chooses from, given some labels: for numbers regression, for classes kinds and scales.

    Smaller scales of the cross-entropy need not be tried: the step along an update scales it down.
    """
    if not any(map(is_classification, tree_leaves(labels))):
        return [output_target("regression")]
    relaxed = [OutputTarget(f"cross_entropy ×{c}", partial(cross_entropy, step=2.0 * c)) for c in (6, 2)]
    return [replace(target, by_loss=True) for target in (*relaxed, output_target("margin"))]
