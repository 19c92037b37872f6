"""Capture: from a model to a raw torch.fx graph, the model left as it was found."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import rnn

from fxinvert.errors import TraceError
from fxinvert.passes.inputs import Inputs
from fxinvert.passes.interpreted import Interpreted
from fxinvert.passes.lengths import lengths_followed
from fxinvert.rules import RuleSet

#: packages whose functions are ops
_TRANSPARENT = ("torch", "builtins", "math", "_operator")
#: ops that cuDNN has a kernel of its own for
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class CaptureError(TraceError):
    """One way to capture a model has failed; another may not."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the body with every module in evaluation mode, then restores each module's own mode.

    cuDNN differentiates recurrent layers in training mode only; a model that has some does without it.
    """
    without = torch.cuda.is_available() and torch.backends.cudnn.enabled and _is_recurrent(model)
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:  # `eval()` may be the user's own, and exported modules refuse it
        if training:
            module.training = False
    if without:  # only then: torch refuses to set what others have frozen, as its own tests do
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        if without:
            torch.backends.cudnn.enabled = True
        for module, training in modes:
            if module.training is not training:
                module.training = training


def _is_recurrent(model: nn.Module) -> bool:
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    return any(isinstance(m, nn.RNNBase) for m in model.modules()) or any(
        n.meta.get("op") in _RECURRENT for n in nodes
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Runs the body, then undoes what it did to the model: attributes that forward() sets, buffers that it updates."""
    tables = _tables(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


#: what modules keep entries in, their hooks in the second
_TABLES = (dict, OrderedDict)


def _tables(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The tables that hold what modules consist of, and the entries that each has now."""
    own = [vars(module) for module in model.modules()]
    return [(t, dict(t)) for t in (*own, *(v for saved in own for v in saved.values() if type(v) in _TABLES))]


class _Tracer(fx.Tracer):
    """Keeps torch's own modules and those with a rule of their own whole.

    Only the inputs that are given become inputs of the graph; the others have their default values while tracing, so
    that forward() may branch on them.
    """

    proxy_buffer_attributes = True  # what is computed from a buffer follows the buffer

    def __init__(self, rules: RuleSet, inputs: Inputs, choose: Callable[[Any], Any]) -> None:
        super().__init__(autowrap_functions=tuple(rules.whole_functions))
        self.rules, self.inputs, self.choose = rules, inputs, choose

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # what hooks do with a module's inputs and outputs is part of the graph
        hooked = m._forward_hooks or m._forward_pre_hooks
        own = not hooked and super().is_leaf_module(m, module_qualified_name)
        return own or self.rules.keeps_whole(type(m))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.stack_trace = _users_stack()
        if "as_strided" in (node.target, getattr(node.target, "__name__", None)):
            raise CaptureError("it takes views by strides, which depend on how tensors lie in memory")
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        proxies = tuple(self.create_proxy("placeholder", name, (), {}) for name in self.inputs.names)
        args, kwargs = self.inputs.arguments(proxies)

        def called(root: nn.Module) -> Any:
            return self.choose(root_fn(root, *args, **kwargs))

        return called, [self.root]


def _users_stack() -> str | None:
    """Where in the user's code something happens, as Python prints it; None: in none.

    Torch's own records of that (`record_stack_traces`) look up all frames, and take half as long as all of tracing.
    """
    found: list[traceback.FrameSummary] = []
    for frame, line in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        if frame.f_code is symbolic_graph.__code__:
            break
        if _is_users(name):
            found.append(traceback.FrameSummary(name, line, frame.f_code.co_name))
    return "".join(traceback.StackSummary.from_list(found[::-1]).format()).strip() or None


def symbolic_graph(
    model: nn.Module, inputs: Inputs, rules: RuleSet, choose: Callable[[Any], Any]
) -> fx.GraphModule:
    """The model's raw graph, by symbolic tracing.

    Args:
        model: in evaluation mode.
        inputs: how it is called.
        rules: modules and functions that they name are kept whole.
        choose: what is taken of its result.

    Raises:
        CaptureError: the model cannot be followed symbolically.
    """
    if rules.keeps_whole(type(model)):
        return _as_leaf(model, inputs, rules, choose)
    tracer = _Tracer(rules, inputs, choose)
    tables = _tables(model)
    try:
        with lengths_followed(model):
            graph = tracer.trace(model)
    except TraceError:
        raise
    except Exception as error:  # whatever the user's forward raises while it is traced
        if tracer.is_leaf_module(model, ""):  # torch's modules need not be traceable, only runnable
            return _as_leaf(model, inputs, rules, choose)
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: {_cause(error)}{raised_at(error)}. Usual causes are Python control flow "
            "on tensor values or shapes in forward(); move it into a function of its own and give that function a "
            "rule with @fxinvert.inverse_rule, which keeps it whole"
        ) from error
    finally:
        # what forward() has set is symbolic; constants of the graph are new entries
        for table, entries in tables:
            table.update(entries)
    return Interpreted(tracer.root, graph, type(model).__name__)


def _cause(error: BaseException) -> str:
    """What an error says, in our words where torch's tell nothing."""
    if any(frame.filename == rnn.__file__ for frame in traceback.extract_tb(error.__traceback__)):
        return (
            "it packs sequences in a way that cannot be followed; pack with pack_padded_sequence in the code of a module, or give "
            "the layer the padded sequences, and take of its result what belongs to each length, as in "
            "y[torch.arange(y.shape[0]), lengths - 1]"
        )
    return str(error)


def _as_leaf(
    model: nn.Module, inputs: Inputs, rules: RuleSet, choose: Callable[[Any], Any]
) -> fx.GraphModule:
    """The raw graph of a model that stays whole: one call. Its parameters have the names that they have in the model."""
    raw = symbolic_graph(nn.Sequential(model), inputs, rules, choose)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(raw)[name] = {**vars(model)[name], **vars(raw)[name]}
    return raw


def hides_parameters(raw: fx.GraphModule, rules: RuleSet) -> str | None:
    """Which function of neither torch nor Python takes parameters, so that what it does with them stays hidden; None: none.

    Functions with a rule of their own hide nothing: the rule knows them.
    """
    for node in raw.graph.nodes:
        known = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
        if node.op != "call_function" or known in _TRANSPARENT or rules.keeps_whole(node.target):
            continue
        read = [n for n in node.all_input_nodes if n.op == "get_attr"]
        if any(isinstance(attribute(raw, str(n.target)), nn.Parameter) for n in read):
            return f"{_target_name(node.target)} takes parameters and does not show what it does with them"
    return None


def attribute(module: nn.Module, target: str) -> Any:
    """What a dotted name stands for: `"layer1.conv.weight"`."""
    return functools.reduce(getattr, target.split("."), module)


def describe(node: fx.Node) -> str:
    """A node as messages name it: its module path, its op, and the user's source line where known."""
    path = node.meta.get("path", node.name)
    text = f"node {path!r}, {node.op} {_target_name(node.target)}"
    line = _source_line(node.stack_trace)
    return f"{text}, at {line}" if line else text


def no_path(graph: fx.GraphModule) -> str:
    """Why the output does not depend on a floating-point input, in words: the ops that end every path."""
    text = "the output does not depend on a floating-point input"
    (output,) = graph.graph.find_nodes(op="output")
    kind = getattr(output.args[0].meta.get("tensor_meta"), "dtype", None)
    if kind is not None and kind.is_complex:
        return f"{text}: it is complex, given by {describe(output.args[0])}; take its real part, or its size"
    ends = [n for n in graph.graph.nodes if not n.meta.get("active", True) and n.op != "get_attr"]
    stops = [n for n in ends if "tensor_meta" in n.meta and any(i.meta["active"] for i in n.all_input_nodes)]
    return (
        f"{text}: the way ends at {describe(stops[-1])}, whose values do not follow its input as real numbers"
        if stops
        else text
    )


def _target_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def called_at() -> str | None:
    """`File "model.py", line 3, in forward`: the user's line that is running, if there is one."""
    return _source_line(_users_stack())


_PACKAGE = Path(inspect.getfile(TraceError)).parent
#: frames in these places are not the user's; the last two are code that torch.fx and Python's own eval have made
_FOREIGN = (*map(str, (Path(torch.__file__).parent, _PACKAGE, Path(__file__).resolve().parent)), "<eval_with_key>", "<string>")  # fmt: skip
#: but for the models, which are written as users write theirs
_MODELS = str(_PACKAGE / "models")


def _is_users(file: str) -> bool:
    """Whether code that lies there is the user's."""
    return file.startswith(_MODELS) or not file.startswith(_FOREIGN)


def raised_at(error: BaseException) -> str:
    """`, at File "model.py", line 3, in forward`: the user's line that an error was raised on, if there is one."""
    line = _source_line("".join(traceback.format_tb(error.__traceback__)))
    return f", at {line}" if line else ""


def _source_line(stack: str | None) -> str | None:
    """The innermost line of a stack that is neither torch's nor ours."""
    places = [line.strip() for line in (stack or "").splitlines() if line.strip().startswith('File "')]
    own = [place for place in places if _is_users(place.removeprefix('File "'))]
    return own[-1] if own else None
