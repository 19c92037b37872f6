"""Sets of rules: explicit objects, no patching, no routing by class name.

A rule belongs to a *key*, the normalized name of an op. All spellings of an op (module, function, method, ATen) have
one key and so share one rule; `key_of` tells it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fxinvert.errors import NoRuleError, RuleError
from fxinvert.rules.constants import CONSTANTS
from fxinvert.rules.keys import aten_by_letters, is_known, is_torch, key_of
from fxinvert.rules.plugins import load_plugins
from fxinvert.rules.rule import Invert, Kind, Rule

if TYPE_CHECKING:
    from fxinvert.rules.trainable import Trainable


class RuleSet(Mapping[str, Rule]):
    """Rules by key. Immutable to its users but for `add`; `extend` makes a larger copy."""

    def __init__(
        self,
        rules: Mapping[str, Rule] | None = None,
        kept_whole: Mapping[Any, str] | None = None,
        *,
        fallback: bool = True,
    ) -> None:
        self._rules = dict(rules or {})
        self._kept_whole = dict(kept_whole or {})
        self.fallback = fallback

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
            RuleError: the op has a rule already and `override` is False; the rule cannot be called; no op has that name.
        """
        if not callable(rule.invert):
            raise RuleError(
                f"the rule for {rule.key!r} is {rule.invert!r}; give a function of the op and its target"
            )
        if isinstance(spelling, str) and not is_known(key_of(spelling)) and rule.key not in self._rules:
            raise RuleError(
                f"neither torch.Tensor nor ATen has an op {spelling!r}; for a function of your own give the function itself"
            )
        if rule.key in self._rules and not override:
            raise RuleError(
                f"there is a rule for {rule.key!r} already, from {self._rules[rule.key].origin}; "
                f"pass override=True to replace it by the one from {rule.origin}"
            )
        self._rules[rule.key] = rule
        # a module of torch's own that is no ATen op would be taken apart, and its rule never be asked
        if not is_torch(spelling) or (
            isinstance(spelling, type) and rule.key not in aten_by_letters().values()
        ):
            self._kept_whole[spelling] = rule.key

    def extend(self, rules: Mapping[Any, Invert | Rule], *, override: bool = False) -> RuleSet:
        """A copy of this set with more rules: `{op spelling: rule}`.

        Raises:
            RuleError: an op has a rule already and `override` is False.
        """
        larger = RuleSet(self._rules, self._kept_whole, fallback=self.fallback)
        for spelling, rule in rules.items():
            made = rule if isinstance(rule, Rule) else Rule(key_of(spelling), rule, Kind.CUSTOM)
            larger.add(spelling, made, override=override)
        return larger

    def without_fallback(self) -> RuleSet:
        """A copy of this set in which an op without a rule of its own has none, not the matrix-free fallback."""
        return RuleSet(self._rules, self._kept_whole, fallback=False)

    def lookup(self, key: str) -> Rule | None:
        """The rule that inverts `key`: its own, or the matrix-free fallback where that may apply."""
        if key in self._rules or not self.fallback or key in CONSTANTS:
            return self._rules.get(key)
        return matrix_free(key)

    def trainable(self, key: str) -> Trainable | None:
        """How an op depends on its parameters, if it can be trained in closed form."""
        from fxinvert.rules.trainable import SOURCES

        return self[key].trainable if key in self else SOURCES.get(key)

    def require(self, key: str, where: str) -> Rule:
        """The rule for `key`, as `lookup` finds it.

        Raises:
            NoRuleError: there is none; the message offers the nearest names.
        """
        found = self.lookup(key)
        if found is not None:
            return found
        import difflib

        reason = f" Its values do not follow its input ({CONSTANTS[key]})." if key in CONSTANTS else ""
        close = difflib.get_close_matches(key, self._rules, n=3)
        hint = f" Rules with similar names: {', '.join(close)}." if close else ""
        raise NoRuleError(
            f"no inverse rule for op {key!r} ({where}).{reason}{hint} "
            f"Write one with @fxinvert.inverse_rule(...), or cut the graph after this node."
        )


def matrix_free(key: str) -> Rule:
    """The fallback as the rule of an op that has no other, or of a region."""
    from fxinvert.rules.fallback import invert_matrix_free
    from fxinvert.rules.region import REGION, invert_region

    return Rule(key, invert_region if key == REGION else invert_matrix_free, Kind.MATRIX_FREE)


def default_rules() -> RuleSet:
    """The rules that apply when none are given: ours, those of installed plug-ins, and what `inverse_rule` adds."""
    rules = _built_in()
    _add_plugins()
    return rules


def in_force(rules: RuleSet | None) -> RuleSet:
    """The rules given, or the default ones.

    Raises:
        RuleError: what is given is no set of rules.
    """
    if rules is None:
        return default_rules()
    if not isinstance(rules, RuleSet):
        raise RuleError(
            f"rules is {type(rules).__name__}; a RuleSet is needed, such as default_rules().extend({{op: rule}})"
        )
    return rules


@functools.cache
def _built_in() -> RuleSet:
    from fxinvert.rules import (
        arithmetic,
        attention,
        contractions,
        derived,
        elementwise,
        functions,
        linear,
        movement,
        normalization,
        norms,
        padded,
        pooling,
        reduction,
        resampling,
        selection,
        shape,
        simplex,
        wrapped,
    )

    families = (
        linear,
        normalization,
        elementwise,
        functions,
        simplex,
        pooling,
        reduction,
        shape,
        movement,
        arithmetic,
        contractions,
        attention,
        padded,
        norms,
        selection,
        resampling,
        derived,
        wrapped,
    )
    return RuleSet({rule.key: rule for family in families for rule in family.rules()})


_plugins_added = False


def _add_plugins() -> None:
    global _plugins_added
    if not _plugins_added:
        _plugins_added = True  # first: plug-ins ask for the default rules while they load
        load_plugins()


def inverse_rule(
    spelling: Any, *, trainable: Trainable | None = None, override: bool = False
) -> Callable[[Invert], Invert]:
    """Decorator that adds a rule for an op to the default set.

    Args:
        spelling: an `nn.Module` class or a Python function (each kept whole while tracing), a method name, or a
            `torch.library` op.
        trainable: how the op depends on its parameters, if it is to be trained in closed form.
        override: replace the rule that is there.

    The function receives the `Op` (anchors, parameters, attributes; calling it evaluates the op) and the target of its
    output, and returns the target of its input, or an `Inverse` with a certificate of its own.

    Raises:
        RuleError: the op has a rule already and `override` is False; or what is given is a rule and no op, or `trainable` is no
            `Trainable`.
    """
    if inspect.isfunction(spelling) and [*inspect.signature(spelling).parameters][:2] == ["op", "target"]:
        raise RuleError(f"{spelling.__name__} is a rule; name its op: @fxinvert.inverse_rule(MyModule)")

    from fxinvert.rules.checked import Checked
    from fxinvert.rules.trainable import ByPosition, Trainable

    if trainable is not None and not isinstance(trainable, Trainable):
        given = f"the class {trainable.__name__}" if isinstance(trainable, type) else repr(trainable)
        raise RuleError(
            f"trainable is {given}; give an object of a class derived from fxinvert.rules.Trainable"
        )

    def register(invert: Invert) -> Invert:
        key, given = key_of(spelling), trainable
        # rows of single positions, or of a table, are asked for in other ways
        if given is not None and not isinstance(given, ByPosition) and not given.diagonal:
            given = Checked(given, key)
        rule = Rule(key, invert, Kind.CUSTOM, given)
        default_rules().add(spelling, rule, override=override)
        return invert

    return register


def rule_named(key: str) -> Rule:
    return default_rules().without_fallback().require(key, "while loading a saved inverse graph")
