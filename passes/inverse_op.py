"""One op of the inverse graph: it hands a rule what the op was given and what it gave, and checks the answer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import boolean_dispatched
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fxinvert.errors import FxInvertError, RuleError
from fxinvert.linalg import Factor, SolveSettings
from fxinvert.rules import FactorCache, Inverse, Op, Rule
from fxinvert.rules.certificate import Status, certified, keep_failed_at_anchor
from fxinvert.rules.keys import op_named

#: stands for the unknown argument while the others are named
UNKNOWN = object()


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
        self._cache = FactorCache()

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
        target = _folded(target, self.rows[1])
        try:
            answer = self.rule.invert(op, target)
        except FxInvertError:
            raise
        except Exception as error:  # a rule is anyone's code
            raise RuleError(f"{self._who()} raised {type(error).__name__}: {error}") from error
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
        inverse = keep_failed_at_anchor(inverse, anchor, target)
        if not isinstance(
            self.function, str
        ):  # not torch's own: its state may be another when somebody looks
            inverse.certificate.measured()
        return Inverse(_unfolded(inverse.target, self.rows[0]), inverse.certificate)

    def op(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
        """The op as rules see it, for one batch."""
        function = self._callable()
        anchor = tree_leaves((args, kwargs))[self.unknown]
        # evaluating must not keep the batch alive: factorizations may hold on to it
        held, named = self._with((args, kwargs), UNKNOWN)
        arguments = _opened(call_arguments(function, held, named))
        unknown = next(name for name, value in arguments.items() if value is UNKNOWN)
        del arguments[unknown]

        def evaluate(value: Tensor) -> Tensor:
            given, options = self._with((held, named), _unfolded(value, self.rows[0]))
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
        return self.__dict__ | {"_cache": FactorCache()}

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

    def _with(self, arguments: Any, value: Any) -> Any:
        """The call's arguments with another value for the unknown one."""
        flat, form = tree_flatten(arguments)
        flat[self.unknown] = value
        return tree_unflatten(flat, form)

    def _callable(self) -> Callable[..., Any]:
        if not isinstance(self.function, str):
            return self.function  # type: ignore[no-any-return]
        if self.function.count(".") != 2:
            return getattr(Tensor, self.function)  # type: ignore[no-any-return]
        return op_named(self.function)

    def _who(self) -> str:
        return f"the rule for {self.rule.key!r} ({self.rule.origin}), at node {self.name!r},"


def _folded(value: Tensor, rows: int) -> Tensor:
    """`(B·k, …)` → `(B, k, …)`."""
    return value if rows == 1 else value.reshape(len(value) // rows, rows, *value.shape[1:])


def _unfolded(value: Tensor, rows: int) -> Tensor:
    return value if rows == 1 else value.flatten(0, 1)


def call_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call passes, by argument name, defaults filled in."""
    if isinstance(function, torch._ops.OpOverload):
        schema = function._schema.arguments
        given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        known = [a for a in schema if a.name in given or a.has_default_value()]
        return {a.name: given.get(a.name, a.default_value) for a in known}
    called = function.forward if isinstance(function, nn.Module) else function
    if (
        called in boolean_dispatched
    ):  # one function for "with indices" and "without"; the former gives several tensors
        called = boolean_dispatched[called]["if_false"]
    try:
        signature = inspect.signature(called)
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


def _opened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with the items of a list that holds the unknown one by the names `tensors_0`, `tensors_1`, …"""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple | list) and any(item is UNKNOWN for item in value):
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
