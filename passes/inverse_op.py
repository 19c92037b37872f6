"""One op of the inverse graph: it hands a rule what the op was given and what it gave, and checks the answer."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import boolean_dispatched
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxinvert.errors import FxInvertError, RuleError, out_of_memory
from fxinvert.linalg import Factor, SolveSettings
from fxinvert.linalg.memory import waits
from fxinvert.rules import FactorCache, Inverse, Kind, Op, Rule
from fxinvert.rules.certificate import Status, certified
from fxinvert.rules.failed import keep_failed_at_anchor
from fxinvert.rules.keys import is_torch, op_named

#: stands for the unknown argument while the others are named
UNKNOWN = object()
#: the position or name of an argument, and the index in it, if it is a list
Place = tuple[int | str, int | None]


class InverseOp(nn.Module):
    """One inverted op: calls its rule, checks what comes back, and keeps the op's factorizations.

    Args:
        rule: how the op is inverted.
        name: the node's name.
        function: what evaluates the op: the name of an ATen op or tensor method, a function, or a module.
        unknown: which of the call's arguments, lists opened, is the input whose target is asked for.
        settings: how linear systems are solved.
        rows: how many rows of the input and of the output belong to a sample. The rule sees them as one:
            `(B·k, …)` as `(B, k, …)`. With 1 and 1 every row stands for itself.
    """

    def __init__(
        self,
        rule: Rule,
        name: str,
        function: Any,
        unknown: int,
        settings: SolveSettings,
        rows: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.rule, self.name, self.unknown, self.settings, self.rows = rule, name, unknown, settings, rows
        self.function = str(function) if isinstance(function, torch._ops.OpOverload) else function
        self._cache = FactorCache(settings.ledger)
        self._found: Place | None = None
        own = isinstance(function, str | types.FunctionType | types.BuiltinFunctionType) and (
            is_torch(function) or function.__module__.startswith("fxinvert.")
        )
        self._stateless = own or isinstance(function, torch._ops.OpOverload)

    @torch.no_grad()
    def forward(self, target: Tensor, output: Tensor, *args: Any, **kwargs: Any) -> Inverse:
        """The target of the op's unknown input, with its certificate.

        Args:
            target: what the op should have produced, `(B·k, …)`.
            output: what it produced.
            *args, **kwargs: what it was called with.

        Raises:
            RuleError: the rule raised, or returned something that is not an inverse.
        """
        op = self.op(output, args, kwargs)
        inverse = self._answer(op, _folded(target, self.rows[1]))
        if not self._stateless:  # its state may be another when somebody looks
            inverse.certificate.measured()
        return Inverse(_unfolded(inverse.target, self.rows[0]), inverse.certificate)

    def _answer(self, op: Op, target: Tensor) -> Inverse:
        """What the rule answers, checked; failed samples are at their anchors."""
        try:
            answer = self.rule.invert(op, target)
        except FxInvertError:
            raise
        except Exception as error:  # a rule is anyone's code
            hint = ""
            if out_of_memory(error):
                hint = "; memory ran out: give fewer samples at once, or a smaller memory_limit"
            elif self.rule.kind is Kind.MATRIX_FREE:
                hint = "; write a rule for it with @fxinvert.inverse_rule"
            raise RuleError(f"{self._who()} raised {type(error).__name__}: {error}{hint}") from error
        value = answer.target if isinstance(answer, Inverse) else answer
        if not isinstance(value, Tensor):
            raise RuleError(
                f"{self._who()} returned {type(value).__name__}; a tensor or an Inverse is needed"
            )
        anchor = op.anchor
        for what, got, wanted in (
            ("shape", tuple(value.shape), tuple(anchor.shape)),
            ("dtype", value.dtype, anchor.dtype),
            ("device", value.device, anchor.device),
        ):
            if got != wanted:
                raise RuleError(f"{self._who()} returned {what} {got}; its input has {wanted}")
        inverse = answer if isinstance(answer, Inverse) else certified(op, target, value, Status.EXACT)
        kept = keep_failed_at_anchor(inverse, anchor, target, lambda: f"the answer of {self._who()}")
        if kept is not inverse and not waits(target):
            hidden = torch.isinf(op.output) & (target == op.output)
            if bool(hidden.any()):
                return self._answer(op.finite(), target.masked_fill(hidden, 0))
        return kept

    def op(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
        """The op as rules see it, for one batch."""
        function = self._callable()
        place = self._place(args, kwargs)
        anchor = _taken(args, kwargs, place)
        # evaluating must not keep the batch alive: factorizations may hold on to it
        held, named = _with(args, kwargs, place, UNKNOWN)
        arguments = opened(call_arguments(function, held, named), lambda value: value is UNKNOWN)
        unknown = next(name for name, value in arguments.items() if value is UNKNOWN)
        del arguments[unknown]

        def evaluate(value: Tensor) -> Tensor:
            given, options = _with(held, named, place, _unfolded(value, self.rows[0]))
            return _folded(function(*given, **options), self.rows[1])

        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        if isinstance(function, nn.Module):
            tensors |= dict(function.named_parameters()) | dict(function.named_buffers())
        return Op(
            key=self.rule.key,
            name=self.name,
            anchors={unknown: _folded(anchor, self.rows[0])},
            output=_folded(output, self.rows[1]),
            parameters=tensors,
            attributes=_plain_attributes(function)
            | {name: value for name, value in arguments.items() if not isinstance(value, Tensor)},
            evaluate=evaluate,
            settings=self.settings,
            cache=self._cache,
        )

    def explain(self) -> list[str]:
        """How the linear systems of the op are solved and why, for every factorization that is kept."""
        return [value.chosen for value in self._cache.values() if isinstance(value, Factor)]

    def extra_repr(self) -> str:
        return f"{self.rule.key}: {self.rule.kind.value}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": FactorCache(self.settings.ledger)}

    def __deepcopy__(self, memo: dict[int, Any]) -> InverseOp:
        # the rule is code and stays the same; a pickle would look it up in the default set
        return InverseOp(
            self.rule,
            self.name,
            copy.deepcopy(self.function, memo),
            self.unknown,
            self.settings,
            self.rows,
        )

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        """Where the unknown argument is; the same in every call, as it is a node's."""
        if self._found is None:
            flat, form = tree_flatten((args, kwargs))
            flat[self.unknown] = UNKNOWN
            marked, options = tree_unflatten(flat, form)
            self._found = _place_of(marked, options)
        return self._found

    def _callable(self) -> Callable[..., Any]:
        if not isinstance(self.function, str):
            return self.function  # type: ignore[no-any-return]
        if self.function.count(".") != 2:
            return getattr(Tensor, self.function)  # type: ignore[no-any-return]
        return op_named(self.function)

    def _who(self) -> str:
        return f"the rule for {self.rule.key!r} ({self.rule.origin}), at node {self.name!r},"


def _place_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
    """Where `UNKNOWN` stands: the position or name of the argument, and the index in it, if it is a list."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if value is UNKNOWN:
            return key, None
        if isinstance(value, tuple | list) and any(item is UNKNOWN for item in value):
            return key, next(i for i, item in enumerate(value) if item is UNKNOWN)
    raise RuleError("an unknown argument stands deeper than in a list of tensors; please report this")


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any], place: Place) -> Any:
    key, index = place
    value = args[key] if isinstance(key, int) else kwargs[key]
    return value if index is None else value[index]


def _with(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: Place, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another value at one place."""
    key, index = place
    if index is not None:
        items = list(_taken(args, kwargs, (key, None)))
        items[index] = value
        value = items
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}


def _folded(value: Tensor, rows: int) -> Tensor:
    """`(B·k, …)` → `(B, k, …)`."""
    return value if rows == 1 else value.reshape(len(value) // rows, rows, *value.shape[1:])


def _unfolded(value: Tensor, rows: int) -> Tensor:
    return value if rows == 1 else value.flatten(0, 1)


def call_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call passes, by argument name, defaults filled in."""
    if isinstance(function, torch._ops.OpOverload):
        names, defaults = _schema(function)
        given = dict(zip(names, args, strict=False)) | kwargs
        return {n: given.get(n, defaults.get(n)) for n in names if n in given or n in defaults}
    called = function.forward if isinstance(function, nn.Module) else function
    # one function for "with indices" and "without"; the former gives several tensors
    if called in boolean_dispatched:
        called = boolean_dispatched[called]["if_false"]
    try:
        known = isinstance(called, types.FunctionType)
        signature = _signature(called) if known else inspect.signature(called)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):  # built-in functions have no signature
        return {str(i): value for i, value in enumerate(args)} | kwargs
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        else:
            named[name] = value
    return named


#: of functions, which do not keep modules alive
_signature = functools.lru_cache(maxsize=256)(inspect.signature)


@functools.cache
def _schema(function: torch._ops.OpOverload) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an op's arguments, and the defaults of those that have one."""
    schema = function._schema.arguments
    return tuple(a.name for a in schema), {a.name: a.default_value for a in schema if a.has_default_value()}


def opened(arguments: Mapping[str, Any], held: Callable[[Any], bool]) -> dict[str, Any]:
    """The arguments, with the items of a list that holds such a one by the names `tensors_0`, `tensors_1`, …"""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple | list) and any(map(held, value)):
            found |= {f"{name}_{i}": item for i, item in enumerate(value)}
        else:
            found[name] = value
    return found


def _plain_attributes(function: Any) -> dict[str, Any]:
    """The public attributes of a module that are not tensors or modules."""
    if not isinstance(function, nn.Module):
        return {}
    return {
        name: value
        for name, value in vars(function).items()
        if not name.startswith("_") and name != "training"
    }
