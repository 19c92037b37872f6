"""Labels: what they ask of an output, by their type and shape.

| labels | type | ask for |
|---|---|---|
| `(B, …)` without the class axis: `(B,)` for outputs `(B, C)`, `(B, H, W)` for `(B, C, H, W)`, `(B, T)` for `(B, T, C)` | integers | a class: its logit on top |
| `(B, …)` as the outputs, or `(B,)` for `(B, 1)` | truth values | that the logit is above 0, or below |
| the same | floating-point numbers | the numbers |

A logit o of a truth value is a choice between two classes with the logits −o/2 and o/2: its softmax is the sigmoid of o, its
cross-entropy the binary one. Truth values may stand for the class numbers 0 and 1 of two logits, too. Class numbers
`IGNORED` ask for nothing: padding, unlabelled pixels. Outputs `(B·k, …)` of k rows for each sample are trained as `(B, k, …)`, with
labels of either form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxinvert.errors import DataError

#: in place of a class number: no answer is asked for (as in `torch.nn.functional.cross_entropy`)
IGNORED = -100


def is_classification(labels: Tensor) -> bool:
    """Whether labels ask for classes: integers and truth values do, floating-point numbers do not."""
    return not labels.dtype.is_floating_point


def class_logits(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Logits with the classes last `(…, C)`, class numbers `(…)`, and the way back from such logits to outputs.

    Logits that nothing is asked of come back as they were.

    Raises:
        DataError: the labels do not ask for classes of these outputs.
    """
    check_tensor(labels)
    if labels.dtype == torch.bool and fit(outputs, labels):
        half, classes = outputs / 2, labels.reshape(outputs.shape).long()
        return torch.stack([-half, half], -1), classes, lambda pair: pair[..., 1] - pair[..., 0]
    axis = class_axis(outputs, labels)
    logits = outputs.movedim(axis, -1)
    check_range(labels, logits.shape[-1])
    if labels.dtype == torch.bool and logits.shape[-1] != 2:
        raise DataError(
            f"labels of shape {tuple(labels.shape)} are truth values; outputs of shape {tuple(outputs.shape)} need one for "
            "each logit, or class numbers (int64)"
        )

    def restored(value: Tensor) -> Tensor:
        return torch.where((labels == IGNORED)[..., None], logits, value).movedim(-1, axis)

    return logits, labels.long(), restored


def flat_classes(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `(N, C)` and class numbers `(N,)` of all samples and positions.

    Raises:
        DataError: the labels do not ask for classes of these outputs.
    """
    logits, classes, _ = class_logits(outputs, labels)
    return logits.flatten(0, -2), classes.flatten()


def shares(classes: Tensor, samples: int) -> Tensor:
    """What every position counts for in the mean of its sample, `(N,)` float64: nothing where it is ignored."""
    asked = (classes != IGNORED).reshape(samples, -1).double()
    return (asked / asked.sum(1, keepdim=True).clamp(min=1)).flatten()


def class_axis(outputs: Tensor, labels: Tensor) -> int:
    """The axis of the outputs that holds the classes: the one that the labels lack.

    Raises:
        DataError: the labels are not class numbers for these outputs.
    """
    check_tensor(labels)
    shape, own = tuple(outputs.shape), tuple(labels.shape)
    if not is_classification(labels):
        raise DataError(
            f"labels of type {labels.dtype}; class numbers are integers (int64). For what the output should have been "
            'itself take output_target="regression", for probabilities "soft"'
        )
    for axis in (1, outputs.dim() - 1):
        if outputs.dim() > 1 and own == shape[:axis] + shape[axis + 1 :]:
            return axis
    wanted = shape[:1] + shape[2:]
    if own == shape:
        advice = (
            "; if they tell 0 from 1 for every output, give them as truth values: labels.bool(); if they are the numbers that "
            "the outputs should be: labels.float()"
        )
    elif own == (*wanted, 1) or own == (shape[0], 1, *wanted[1:]):
        advice = "; leave out the axis of length 1"
    else:
        advice = ""
    raise DataError(
        f"labels of shape {own} do not fit outputs of shape {shape}: class labels have the shape of the outputs "
        f"without the class axis, here {wanted}{advice}"
    )


def asks(labels: Any) -> bool:
    """Whether any of some labels, however nested, asks for something."""
    leaves = pytree.tree_leaves(labels)
    return any(own.is_floating_point() or bool((own != IGNORED).any()) for own in leaves)


def check_range(labels: Tensor, classes: int) -> None:
    """Checks that class numbers lie between 0 and `classes` − 1, those that are `IGNORED` aside.

    Raises:
        DataError: one does not.
    """
    least, most = torch.stack(labels.long().aminmax()).tolist() if labels.numel() else (0, 0)
    if least == IGNORED:
        least = int(torch.where(labels == IGNORED, 0, labels).min())
    if least < 0 or most >= classes:
        single = " A single logit answers yes or no: give its labels as truth values, labels.bool()."
        raise DataError(
            f"labels range from {least} to {most}; the model has {classes} classes, 0 to {classes - 1}; where none "
            f"is asked for, the label is {IGNORED}.{single if classes == 1 else ''}"
        )


def fit(outputs: Tensor, labels: Tensor) -> bool:
    """Whether there is a label for each output: of the same shape but for axes of length 1."""
    own, wanted = ([n for n in value.shape[1:] if n != 1] for value in (labels, outputs))
    return labels.shape[:1] == outputs.shape[:1] and own == wanted


def check_tensor(labels: object) -> None:
    """Checks that labels are a tensor.

    Raises:
        DataError: they are not.
    """
    if isinstance(labels, Mapping):
        raise DataError(
            f"labels by the names {', '.join(map(repr, labels))}, where one output is supervised: give the tensor that is for it "
            "alone, or name several outputs, output=(…, …)"
        )
    if not isinstance(labels, Tensor):
        raise DataError(f"labels of type {type(labels).__name__}; a tensor is needed")
