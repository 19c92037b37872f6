"""Rules and the sets that hold them: explicit objects, no patching, no routing by class name.

A rule belongs to a *key*, the normalized name of an op. All spellings of an op (module, function, method, ATen) have
one key and so share one rule; `key_of` tells it.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxinvert.errors import NoRuleError, RuleError
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op

if TYPE_CHECKING:
    from fxinvert.rules.trainable import Trainable

#: names in torch that are not ATen's
_ATEN_NAMES = {
    "identity": "alias",
    "truediv": "div",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "logsigmoid": "log_sigmoid",
    "dropout1d": "feature_dropout",
    "dropout2d": "feature_dropout",
    "dropout3d": "feature_dropout",
}

Invert = Callable[[Op, Tensor], Inverse | Tensor]


class Kind(enum.Enum):
    """How a rule finds its answer."""

    MOVES = "moves values"
    ELEMENTWISE = "monotone branches"
    AFFINE = "linear solve"
    CLOSED_FORM = "closed form"
    CUSTOM = "user rule"


@dataclass(frozen=True)
class Rule:
    """How one op is inverted.

    Attributes:
        key: the op.
        invert: `(op, target) -> Inverse`, or the input's target alone, in which case its certificate is measured.
        kind: how the answer is found.
        trainable: how the op depends on its parameters, if it can be trained in closed form.
        origin: where the rule was written.
    """

    key: str
    invert: Invert
    kind: Kind
    trainable: Trainable | None = None

    @property
    def origin(self) -> str:
        """File and line of the rule's code."""
        code = inspect.unwrap(self.invert).__code__ if hasattr(self.invert, "__code__") else None
        return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(self.invert)

    def __reduce__(self) -> tuple[Any, ...]:
        # a rule is code: it is pickled by name, like a function, and found again in the default set
        return _rule_named, (self.key,)


class RuleSet(Mapping[str, Rule]):
    """Rules by key. Immutable to its users but for `add`; `extend` makes a larger copy."""

    def __init__(
        self, rules: Mapping[str, Rule] | None = None, kept_whole: Mapping[Any, str] | None = None
    ) -> None:
        self._rules = dict(rules or {})
        self._kept_whole = dict(kept_whole or {})

    def __getitem__(self, key: str) -> Rule:
        return self._rules[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __repr__(self) -> str:
        return f"RuleSet({len(self)} rules)"

    def key(self, spelling: Any) -> str:
        """The key under which a spelling of an op (class, function, method name, ATen op, key) is known here."""
        return self._kept_whole.get(spelling) or key_of(spelling)

    def keeps_whole(self, spelling: Any) -> bool:
        """Whether a module class or function has a rule of its own, so that tracing must not look inside."""
        return spelling in self._kept_whole

    @property
    def whole_functions(self) -> list[Callable[..., Any]]:
        """The Python functions that tracing must not look inside."""
        return [s for s in self._kept_whole if not isinstance(s, type) and inspect.isfunction(s)]

    def add(self, spelling: Any, rule: Rule, *, override: bool = False) -> None:
        """Adds a rule.

        Raises:
            RuleError: the op has a rule already and `override` is False.
        """
        if rule.key in self._rules and not override:
            raise RuleError(
                f"there is a rule for {rule.key!r} already, from {self._rules[rule.key].origin}; "
                f"pass override=True to replace it by the one from {rule.origin}"
            )
        self._rules[rule.key] = rule
        # a module of torch's own that is no ATen op would be taken apart, and its rule never be asked
        if not _is_torch(spelling) or (
            isinstance(spelling, type) and rule.key not in _aten_by_letters().values()
        ):
            self._kept_whole[spelling] = rule.key

    def extend(self, rules: Mapping[Any, Invert | Rule], *, override: bool = False) -> RuleSet:
        """A copy of this set with more rules: `{op spelling: rule}`.

        Raises:
            RuleError: an op has a rule already and `override` is False.
        """
        larger = RuleSet(self._rules, self._kept_whole)
        for spelling, rule in rules.items():
            made = rule if isinstance(rule, Rule) else Rule(key_of(spelling), rule, Kind.CUSTOM)
            larger.add(spelling, made, override=override)
        return larger

    def require(self, key: str, where: str) -> Rule:
        """The rule for `key`.

        Raises:
            NoRuleError: there is none; the message offers the nearest names.
        """
        if key in self._rules:
            return self._rules[key]
        import difflib

        close = difflib.get_close_matches(key, self._rules, n=3)
        hint = f" Rules with similar names: {', '.join(close)}." if close else ""
        raise NoRuleError(
            f"no inverse rule for op {key!r} ({where}).{hint} "
            f"Write one with @fxinvert.inverse_rule(...), or cut the graph after this node."
        )


@functools.cache
def default_rules() -> RuleSet:
    """The rules that apply when none are given; `inverse_rule` adds to this set."""
    from fxinvert.rules import arithmetic, elementwise, linear, normalization, pooling, shape

    families = (linear, normalization, elementwise, pooling, shape, arithmetic)
    return RuleSet({rule.key: rule for family in families for rule in family.rules()})


def inverse_rule(spelling: Any, *, override: bool = False) -> Callable[[Invert], Invert]:
    """Decorator that adds a rule for an op to the default set.

    Args:
        spelling: an `nn.Module` class or a Python function (each kept whole while tracing), a method name, or a
            `torch.library` op.
        override: replace the rule that is there.

    The function receives the `Op` (anchors, parameters, attributes; calling it evaluates the op) and the target of its
    output, and returns the target of its input, or an `Inverse` with a certificate of its own.

    Raises:
        RuleError: the op has a rule already and `override` is False.
    """

    def register(invert: Invert) -> Invert:
        default_rules().add(spelling, Rule(key_of(spelling), invert, Kind.CUSTOM), override=override)
        return invert

    return register


def key_of(spelling: Any) -> str:
    """The normalized name of an op, from any of its spellings.

    ATen ops and torch's own functions, methods and modules have the ATen name without overload and in-place mark;
    everything else is known by its qualified name.

    Raises:
        RuleError: the spelling names no op.
    """
    if isinstance(spelling, str):
        name = spelling if spelling.startswith("_") else spelling.rstrip("_")
        return _ATEN_NAMES.get(name, name)
    if isinstance(spelling, torch._ops.OpOverload):
        spelling = spelling.overloadpacket
    if isinstance(spelling, torch._ops.OpOverloadPacket):
        namespace, name = spelling._qualified_op_name.split("::")
        return key_of(name) if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(spelling, type) and issubclass(spelling, nn.Module) and _is_torch(spelling):
        return _module_key(spelling.__name__)
    if not hasattr(spelling, "__qualname__"):
        raise RuleError(
            f"{spelling!r} does not name an op; give a module class, a function, a method name or an ATen op"
        )
    return (
        key_of(spelling.__name__) if _is_torch(spelling) else f"{spelling.__module__}.{spelling.__qualname__}"
    )


def _is_torch(spelling: Any) -> bool:
    if isinstance(spelling, str | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    module = getattr(spelling, "__module__", None) or ""
    # methods of tensors and built-in functions have no module of their own
    return not module or module.split(".")[0] in ("torch", "_operator", "builtins")


def _module_key(name: str) -> str:
    """`LeakyReLU` → `leaky_relu`, `BatchNorm2d` → `batch_norm`: matched to ATen's names, letters only."""
    letters = name.lower()
    if letters in _ATEN_NAMES:
        return _ATEN_NAMES[letters]
    known = _aten_by_letters()
    return known.get(letters) or known.get(re.sub(r"[123]d$", "", letters)) or letters


@functools.cache
def _aten_by_letters() -> dict[str, str]:
    """ATen's names, without overloads and private ones, by their letters."""
    full = sorted(torch._C._dispatch_get_all_op_names())
    names = [name.removeprefix("aten::").split(".")[0] for name in full if name.startswith("aten::")]
    return {name.replace("_", ""): name for name in names if not (name.startswith("_") or name.endswith("_"))}


def _rule_named(key: str) -> Rule:
    return default_rules().require(key, "while loading a saved inverse graph")
