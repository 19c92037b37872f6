"""As run: a model whose questions to tensors are answered as runs of it on the example answered them.

`torch.export` follows tensors without values. Code that asks for one (`if mask.any():`) stops it even where the answer is
the same for all data, as of a mask that forward() makes itself; and code that asks whether it is being captured may go
other ways than it runs. What is captured here goes the way that runs go. An answer that the data or the parameters decide
is given only where the other one would change nothing that is computed, as where code warns of it or shows a number, or
raises, as where code checks it, or where one is right for all data (`guarded.py`): all else would fix for all data what holds
for the example.
"""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxinvert.errors import TraceError
from fxinvert.passes.capture import called_at
from fxinvert.passes.following import Following, tensors_in
from fxinvert.passes.guarded import right_for_all
from fxinvert.passes.inputs import Flat
from fxinvert.passes.questions import Question
from fxinvert.passes.runs import doubled, run
from fxinvert.passes.spared import sparing
from fxinvert.quiet import quiet

#: what Python asks of tensors for plain values
_QUESTIONS = frozenset(
    ["__bool__", "__contains__", "__float__", "__format__", "__index__", "__int__", "allclose", "equal", "is_nonzero", "item", "tolist"]
)  # fmt: skip
#: functions that give as many rows as there are different values, of which code may ask how many these are
_COUNTED = frozenset(["unique", "unique_consecutive"])
#: functions that ask the tensors of one integer in an index for it
_INDEXED = frozenset(["__getitem__", "__setitem__"])
#: functions that ask those among sizes
_SIZED = frozenset(
    ["constant_pad_nd", "expand", "narrow", "new_empty", "new_ones", "new_zeros", "pad", "repeat", "reshape", "view"]
)  # fmt: skip
#: functions that make tensors, and ask those among sizes
_MAKING = frozenset(["arange", "empty", "ones", "zeros"])
_INTEGERS = frozenset([torch.int8, torch.int16, torch.int32, torch.int64])


class AsRun(Flat):
    """A model as a function of a flat list of tensors, captured the way that it runs.

    Attributes:
        questions: what runs on batches of two sizes ask alike, up to the first whose answer data or parameters decide and
            which changes what is computed.
        decided: that one, or what the larger batch asks in place of it; None: there is none.
        selects: whether values decide how many rows something has.
    """

    def __init__(self, flat: Flat, values: tuple[Tensor, ...]) -> None:
        super().__init__(flat.model, flat.inputs, flat.choose, flat.within)
        self.questions: list[Question] = []
        self.decided: Question | None = None
        first, second = _Run(flat, values), _Run(flat, doubled(values))
        for i in itertools.count():
            if i >= min(len(first.questions), len(second.questions)):
                break
            one, two = first.questions[i], second.questions[i]
            if (one.decided or one != two) and first.differs_by(i):
                if one.name in _COUNTED:
                    continue  # it goes on with them
                right = right_for_all(flat, values, first.questions, i, first.asking)
                if right is None:
                    self.decided = one if one.decided else two
                    break
                first, second = first.answered(i, right), second.answered(i, right)
                one = first.questions[i]
            self.questions.append(one)
        self.selects = first.following.everything

    def forward(self, *values: Any) -> Any:
        with _running(), _Answering(self.questions):
            return super().forward(*values)


class _NoTensor:
    """The class of no tensor."""


@contextmanager
def _running() -> Iterator[None]:
    """Runs the body with code being told that it runs, not that it is captured; modules that it converts are so already.

    What it keeps by sizes (`functools.lru_cache`), of which those that vary have no hash, it finds by the objects that they are.

    What torch itself asks of its tensors without values is answered as ever; other code finds none of their class.
    """

    def converted(module: nn.Module, *_: Any) -> nn.Module:
        return module

    def asked(name: str) -> Any:
        if name != "FakeTensor":
            raise AttributeError(f"module 'torch._subclasses' has no attribute {name!r}")
        own = str(sys._getframe(1).f_globals.get("__name__")).split(".")[0] == "torch"
        return fake if own else _NoTensor

    compiler, apply, hashed = torch.compiler, nn.Module._apply, torch.SymInt.__hash__
    flags = compiler._is_compiling_flag, compiler._is_exporting_flag
    kinds = vars(torch._subclasses)
    compiler._is_compiling_flag = compiler._is_exporting_flag = False
    nn.Module._apply = converted  # type: ignore[method-assign]
    torch.SymInt.__hash__ = object.__hash__  # type: ignore[method-assign]
    fake, kinds["__getattr__"] = kinds.pop("FakeTensor"), asked
    try:
        yield
    finally:
        kinds["FakeTensor"] = fake
        del kinds["__getattr__"]
        compiler._is_compiling_flag, compiler._is_exporting_flag = flags
        nn.Module._apply = apply  # type: ignore[method-assign]
        torch.SymInt.__hash__ = hashed  # type: ignore[method-assign]


class _Answering(TorchFunctionMode):
    """Answers questions in the order in which runs asked them; code may leave some out, or ask more, while it is captured."""

    def __init__(self, questions: Iterable[Question]) -> None:
        super().__init__()
        self.left = list(questions)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _QUESTIONS and (question := self._known(name)) is not None:
            return question.answer
        result = func(*_numbered(name, args, self._number), **(kwargs or {}))
        if name in _COUNTED and (question := self._known(name)) is not None:
            torch._check(result.shape[0] == question.answer)  # type: ignore[no-untyped-call]
            result = result.narrow(0, 0, question.answer)  # Python's `len` takes no size that varies
        return result

    def _known(self, name: str) -> Question | None:
        asked = name, called_at()
        for i, question in enumerate(self.left):
            if (question.name, question.place) == asked:
                del self.left[: i + 1]
                return question
        return None

    def _number(self, value: Tensor) -> Any:
        question = self._known("__index__")
        return value if question is None else question.answer


class _Run:
    """A run of a model: what it computes, and what it asks.

    Args:
        flat: the model.
        values: its inputs.
        answers: to questions by number, in place of what they are answered by themselves.
    """

    def __init__(self, flat: Flat, values: tuple[Tensor, ...], answers: Mapping[int, Any] = {}) -> None:
        self.flat, self.values, self.answers = flat, values, answers

        def recorded(*copies: Tensor) -> Any:
            with self.asking([*copies, *flat.parameters()]) as (self.following, asking):
                self.questions = asking.asked
                return flat(*copies)

        self.results = tensors_in(run(recorded, values))  # type: ignore[arg-type]

    @contextmanager
    def asking(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Following, _Asking]]:
        """Runs the body with its questions answered as in this run; what these tensors decide is told apart."""
        following = Following(tensors)
        with torch.no_grad(), following, _Asking(self.flat.model, following, self.answers) as asking:
            yield following, asking

    def answered(self, number: int, answer: Any) -> _Run:
        """The run with another answer to a question, and to those before it the same."""
        return _Run(self.flat, self.values, {**self.answers, number: answer})

    @property
    def computed(self) -> Any:
        """All ops, and where the results lie."""
        return self.following.ops, [self.following.number(value) for value in self.results]

    def differs_by(self, number: int) -> bool:
        """Whether another answer to a question would change what is computed; the user's code may refuse to go on with it."""
        others = _others(self.questions[number])
        return others is None or any(self._differs(number, other) for other in others)

    def _differs(self, number: int, answer: Any) -> bool:
        try:
            with quiet():
                other = self.answered(number, answer)
        except TraceError as error:
            return not _refuses(error.__cause__, self.questions[number])
        return other.computed != self.computed or not all(map(torch.equal, other.results, self.results))


def _others(question: Question) -> tuple[Any, ...] | None:
    """What a question might be answered otherwise: of a number that is no count of anything some beside it, and those beyond
    whatever code may compare it with, as it does nothing but show it; None: no others stand for all."""
    answer = question.answer
    if question.name in _COUNTED:
        return (answer + 1,)
    if isinstance(answer, bool):
        return (not answer,)
    return (-1e30, 0.0, 1.1 * answer + 0.1, 1e30) if isinstance(answer, float) else None


class _Asking(TorchFunctionMode):
    """Notes the questions of a run, and their answers; those that are given stand in place of others."""

    def __init__(self, model: nn.Module, following: Following, answers: Mapping[int, Any]) -> None:
        super().__init__()
        self.model, self.following, self.answers = model, following, answers
        self.asked: list[Question] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        _numbered(name, args, self._number)
        answer = func(*args, **(kwargs or {}))
        if name in _QUESTIONS:
            decided = self.following.decide((args, kwargs))
            if decided and name == "__format__":
                return answer  # a text for people; in place of a tensor's values it holds something else while captured
            answer = self.answers.get(len(self.asked), answer)
            self._note(name, answer, decided)
        elif name in _COUNTED and isinstance(answer, Tensor):
            more = self.answers.get(len(self.asked), len(answer)) - len(answer)
            self._note(name, len(answer), self.following.decide((args, kwargs)))
            answer = torch.cat([answer, *[answer[-1:]] * more])
        return answer

    def _number(self, value: Tensor) -> int:
        self._note("__index__", int(value), self.following.decide(value))
        return int(value)

    def _note(self, name: str, answer: Any, decided: bool) -> None:
        self.asked.append(Question(name, called_at(), answer, decided, sparing(self.model), _asker()))


def _asker() -> CodeType | None:
    """The function that asks: the innermost that neither this module nor torch's tensors have."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in (__file__, torch._tensor.__file__):
        frame = frame.f_back
    return frame.f_code if frame is not None else None


def _numbered(name: str, args: tuple[Any, ...], number: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """The arguments of a function, with the numbers that it asks of tensors as `_read` gives them."""
    if name in _INDEXED:
        return args[0], _read(args[1], number), *args[2:]
    if name in _MAKING:
        return tuple(_read(args, number))
    return (args[0], *_read(args[1:], number)) if name in _SIZED else args


def _read(index: Any, number: Callable[[Tensor], Any]) -> Any:
    """An index, or sizes, with what a function gives in place of its tensors of one integer, in order."""
    if isinstance(index, tuple | list):
        kind = list if isinstance(index, list) else tuple
        return kind(_read(part, number) for part in index)
    if isinstance(index, slice):
        return slice(*(_read(part, number) for part in (index.start, index.stop, index.step)))
    single = isinstance(index, Tensor) and not index.dim() and index.dtype in _INTEGERS
    return number(index) if single else index


def _refuses(error: BaseException | None, question: Question) -> bool:
    """Whether the code that asks a question raises an error itself, as `assert` does, or has `torch._check` raise it.

    That code is the user's, or a function that it calls and that asks and raises, as those of `torch.distributions` do.
    """
    place, asking = error.__traceback__ if error else None, None
    while place is not None:
        code, last = place.tb_frame.f_code, place.tb_lasti
        if code.co_filename != torch.__file__ or not code.co_name.startswith("_check"):
            asking = code.co_filename
        place = place.tb_next
    if asking is None or question.place is None:
        return False
    raises = code.co_code[last] == dis.opmap["RAISE_VARARGS"]
    return raises and (asking in question.place or code is question.asker)
