"""Guarded: what code does only where a mask holds for any entry, and what does nothing where it holds for none.

    if mask.any():                        =        x[mask] = value
        x[mask] = value

Data decide which way code goes there, and yet one way is right for all: it is what code does for data of which the mask
holds for some, and what it does for the others changes nothing. Whether that is so is tried, with the mask emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxinvert.errors import TraceError
from fxinvert.passes.capture import called_at
from fxinvert.passes.inputs import Flat
from fxinvert.passes.questions import Question
from fxinvert.passes.runs import difference, run
from fxinvert.quiet import quiet

#: what tells how many entries of a mask hold, of this number and of how many there are
_COUNTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda count, most: count == most,
    "any": lambda count, most: count > 0,
    "sum": lambda count, most: count,
}


def right_for_all(
    flat: Flat,
    values: tuple[Tensor, ...],
    questions: Sequence[Question],
    number: int,
    asking: Callable[[Iterable[Tensor]], AbstractContextManager[Any]],
) -> bool | None:
    """The answer to a question that is right whatever it would be of other data; None: there is none.

    Args:
        flat: the model.
        values: its inputs.
        questions: what a run asks.
        number: which of them it is.
        asking: opens what answers those before it as that run did, given the tensors that follow data or parameters.
    """
    question = questions[number]
    if question.name != "__bool__":
        return None
    before = sum((q.name, q.place) == (question.name, question.place) for q in questions[:number])
    # parameters and inputs that are 0, as gates are at first, would hide what is done with them
    moved = {n: p + 0.1 * torch.randn_like(p) for n, p in flat.named_parameters() if p.is_floating_point()}
    given = tuple(v + torch.randn_like(v) if v.is_floating_point() else v for v in values)

    def way(answer: bool) -> tuple[_Sparing, list[Any]]:
        sparing = _Sparing(question.place, before, answer)

        def forward(*copies: Tensor) -> Any:
            with asking([*copies, *moved.values()]), sparing:
                return functional_call(flat, moved, copies)

        try:
            return sparing, tree_leaves(run(forward, given))  # type: ignore[arg-type]
        finally:
            for mask, own in sparing.filled:  # it may be the model's own
                mask.copy_(own)

    try:
        with quiet():
            (sparing, yes), (_, no) = way(True), way(False)
    except TraceError:
        return None
    # other kernels, as those of attention without a mask, round otherwise
    same = not any(
        isinstance(one, Tensor) and difference(one, other) for one, other in zip(yes, no, strict=True)
    )
    return not sparing.spared if same and sparing.spared is not None else None


class _Sparing(TorchFunctionMode):
    """Fills a mask so that code is spared what it asks about, where it asks, and gives an answer of its own.

    Args:
        place: where code asks.
        before: how often it does so before.
        answer: to the question.

    Attributes:
        spared: what the mask would answer; None: it is none that is asked, or others than full or empty ones would, too.
        filled: the mask, and what it was.
    """

    def __init__(self, place: str | None, before: int, answer: bool) -> None:
        super().__init__()
        self.place, self.left, self.answer = place, before, answer
        self.spared: bool | None = None
        self.filled: list[tuple[Tensor, Tensor]] = []
        # numbers that follow how many entries of a mask hold, by the memory that they lie in, which is kept: what they are
        # for none, for one and so on
        self.counts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        known = (
            self.counts.get(args[0].untyped_storage()._cdata) if args and type(args[0]) is Tensor else None
        )
        if name == "__bool__" and called_at() == self.place:
            self.left -= 1
            if self.left == -1 and known is not None:
                return self._filled(known[1], known[2].bool())
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.dim() or kwargs:
            return result
        mask, *others = args
        if name in _COUNTS and not others and (name != "sum" or mask.dtype == torch.bool):
            self._note(result, mask, _COUNTS[name](torch.arange(mask.numel() + 1), mask.numel()))
        elif known is not None and not any(isinstance(other, Tensor) for other in others):
            self._note(result, known[1], func(known[2], *others))
        return result

    def _note(self, result: Tensor, mask: Tensor, answers: Tensor) -> None:
        self.counts[result.untyped_storage()._cdata] = result, mask, answers

    def _filled(self, mask: Tensor, answers: Tensor) -> bool:
        for full, own, others in ((False, answers[0], answers[1:]), (True, answers[-1], answers[:-1])):
            if bool((others != own).all()):
                self.spared = bool(own)
                self.filled.append((mask, mask.clone()))
                mask.fill_(full)
                break
        return self.answer
