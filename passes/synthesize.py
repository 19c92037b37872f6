"""Synthesize: from a normalized graph to its inverse graph, one node per inverted op.

The inverse graph walks the forward graph backwards. Its inputs are the output target and the forward pass's values
(the anchors); each op becomes a call of an `InverseOp`, which hands the op's rule what the op was given and what it
gave; its output is a pair of dictionaries, targets and certificates, by the names users know.

    conv1_inverse = self.conv1_inverse(conv1_target, conv1, x, conv1_weight, conv1_bias, …)
    x_target      = conv1_inverse[0]
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import FxInvertError, NoRuleError, RuleError
from fxinvert.linalg import SolveSettings
from fxinvert.passes.capture import describe
from fxinvert.rules import Certificate, FactorCache, Inverse, Op, Rule, RuleSet
from fxinvert.rules.certificate import Status, keep_failed_at_anchor, relative, row_norms

#: the inverse graph's first input
OUTPUT_TARGET = "output_target"


class InverseOp(nn.Module):
    """One inverted op: calls its rule, checks what comes back, and keeps the op's factorizations.

    Args:
        rule: how the op is inverted.
        name: the node's name.
        function: what evaluates the op: the name of an ATen op or tensor method, a function, or a module.
        unknown: position of the input whose target is asked for.
        settings: how linear systems are solved.
    """

    def __init__(self, rule: Rule, name: str, function: Any, unknown: int, settings: SolveSettings) -> None:
        super().__init__()
        self.rule, self.name, self.unknown, self.settings = rule, name, unknown, settings
        self.function = str(function) if isinstance(function, torch._ops.OpOverload) else function
        self._cache = FactorCache()

    def forward(self, target: Tensor, output: Tensor, *args: Any, **kwargs: Any) -> Inverse:
        """The target of the op's unknown input, with its certificate.

        Args:
            target: what the op should have produced, `(B, …)`.
            output: what it produced.
            *args, **kwargs: what it was called with.

        Raises:
            RuleError: the rule raised, or returned something that is not an inverse.
        """
        op = self.op(output, args, kwargs)
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
        inverse = answer if isinstance(answer, Inverse) else Inverse(value, measured(op, target, value))
        return keep_failed_at_anchor(inverse, anchor, target)

    def op(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
        """The op as rules see it, for one batch."""
        function = self._callable()
        arguments = _arguments(function, args, kwargs)
        anchor = args[self.unknown]
        unknown = next(name for name, value in arguments.items() if value is anchor)
        del arguments[unknown]
        # evaluating must not keep the batch alive: factorizations may hold on to it
        held = tuple(None if i == self.unknown else value for i, value in enumerate(args))

        def evaluate(value: Tensor) -> Tensor:
            return function(*(value if i == self.unknown else h for i, h in enumerate(held)), **kwargs)  # type: ignore[no-any-return]

        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        if isinstance(function, nn.Module):
            tensors |= dict(function.named_parameters()) | dict(function.named_buffers())
        return Op(
            key=self.rule.key,
            name=self.name,
            anchors={unknown: anchor},
            output=output,
            parameters=tensors,
            attributes=_plain_attributes(function)
            | {name: value for name, value in arguments.items() if not isinstance(value, Tensor)},
            evaluate=evaluate,
            settings=self.settings,
            cache=self._cache,
        )

    def extra_repr(self) -> str:
        return f"{self.rule.key}: {self.rule.kind.value}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": FactorCache()}

    def _callable(self) -> Callable[..., Any]:
        if not isinstance(self.function, str):
            return self.function  # type: ignore[no-any-return]
        if self.function.count(".") != 2:
            return getattr(Tensor, self.function)  # type: ignore[no-any-return]
        namespace, packet, overload = self.function.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]

    def _who(self) -> str:
        return f"the rule for {self.rule.key!r} ({self.rule.origin}), at node {self.name!r},"


def synthesize(graph: fx.GraphModule, rules: RuleSet, settings: SolveSettings) -> fx.GraphModule:
    """The inverse graph of a normalized graph.

    Raises:
        NoRuleError: an op on the way has no rule, several unknown inputs, or several consumers.
    """
    result, root = fx.Graph(), nn.Module()
    nodes: dict[str, fx.Node] = {OUTPUT_TARGET: result.placeholder(OUTPUT_TARGET)}

    def forward_value(node: fx.Node) -> fx.Node:
        """A forward value in the inverse graph: a parameter is read, anything else is an input."""
        if node.name not in nodes:
            if node.op == "get_attr":
                _share(root, graph, str(node.target))
                nodes[node.name] = result.get_attr(str(node.target))
            else:
                with result.inserting_after(list(result.find_nodes(op="placeholder"))[-1]):
                    nodes[node.name] = result.placeholder(node.name)
        return nodes[node.name]

    targets: dict[str, fx.Node] = {}
    certificates: dict[str, fx.Node] = {}
    target = nodes[OUTPUT_TARGET]
    for node, source in chain(graph):
        targets[node.meta["path"]] = target
        if source is None:
            break
        rule = rules.require(node.meta["op"], describe(node))
        function = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        unknown = next((i for i, argument in enumerate(node.args) if argument is source), None)
        if unknown is None:
            raise NoRuleError(
                f"{describe(node)} takes its input inside a list or by keyword; no rule handles that yet"
            )
        name = f"{node.name}_inverse"
        root.add_module(name, InverseOp(rule, node.meta["path"], function, unknown, settings))
        arguments = fx.node.map_arg((node.args, node.kwargs), forward_value)
        inverse = result.call_module(name, (target, forward_value(node), *arguments[0]), arguments[1])
        target = _item(result, inverse, 0, f"{source.name}_target")
        certificates[node.meta["path"]] = _item(result, inverse, 1, f"{node.name}_certificate")
    result.output((targets, certificates))
    return fx.GraphModule(root, result, "Inverse")


def chain(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """The nodes between output and input, output first, each with the node that feeds it (None for the input).

    Raises:
        NoRuleError: the graph branches.
    """
    (output,) = graph.graph.find_nodes(op="output")
    node = output.args[0]
    if not node.meta["active"]:
        raise NoRuleError(f"the output does not depend on a floating-point input: {describe(node)}")
    while node is not None:
        used = [user for user in node.users if user.op == "output" or user.meta["active"]]
        if len(used) > 1:
            raise NoRuleError(
                f"{describe(node)} feeds {len(used)} ops ({', '.join(u.meta.get('path', 'output') for u in used)}); "
                "branching graphs cannot be inverted yet"
            )
        sources = [source for source in node.all_input_nodes if source.meta["active"]]
        if len(sources) > 1:
            raise NoRuleError(
                f"{describe(node)} has {len(sources)} inputs that depend on the model's input "
                f"({', '.join(s.meta['path'] for s in sources)}); branching graphs cannot be inverted yet"
            )
        source = sources[0] if sources else None
        yield node, source
        node = source


def parameters_of(node: fx.Node) -> dict[str, str]:
    """The names of the parameters and buffers that an op reads, by argument name."""
    arguments = _arguments(node.target, node.args, node.kwargs)
    return {k: str(n.target) for k, n in arguments.items() if isinstance(n, fx.Node) and n.op == "get_attr"}


def measured(op: Op, target: Tensor, value: Tensor) -> Certificate:
    """The certificate of an answer that came without one, by evaluating the op on it."""
    residual = relative(op(value) - target, target)
    reached = bool((residual <= torch.finfo(target.dtype).eps ** 0.5).all())
    return Certificate(
        status=Status.EXACT if reached else Status.LEAST_SQUARES,
        residual=residual,
        distance=row_norms(value - op.anchor),
        failed=torch.zeros_like(residual, dtype=torch.bool),
    )


def _arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call passes, by argument name, defaults filled in."""
    if isinstance(function, torch._ops.OpOverload):
        schema = function._schema.arguments
        named = {a.name: a.default_value for a in schema if a.has_default_value()}
        return named | dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        bound = inspect.signature(called).bind(*args, **kwargs)
    except (TypeError, ValueError):  # built-in functions have no signature
        return {str(i): value for i, value in enumerate(args)} | kwargs
    bound.apply_defaults()
    return dict(bound.arguments)


def _plain_attributes(function: Any) -> dict[str, Any]:
    """The public attributes of a module that are not tensors or modules."""
    if not isinstance(function, nn.Module):
        return {}
    return {
        name: value
        for name, value in vars(function).items()
        if not name.startswith("_") and name != "training"
    }


def _share(root: nn.Module, graph: fx.GraphModule, target: str) -> None:
    """Makes a parameter of the forward graph readable in the inverse graph, the same tensor under the same name."""
    *path, name = target.split(".")
    owner, given = root, graph.get_submodule(".".join(path))
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    tensor = getattr(given, name)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)


def _item(graph: fx.Graph, node: fx.Node, index: int, name: str) -> fx.Node:
    return graph.create_node("call_function", operator.getitem, (node, index), name=name)
