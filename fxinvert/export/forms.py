"""The forms in which exporters and optimizers keep a model's weights: as they are, folded, in other orders.

A form knows what it is made of, its value for the original model, and its value for the updated one. Permutations of axes and
reshapes are no forms of their own: every form is looked for in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

Weights = Mapping[str, Tensor]

#: the order of an LSTM's and a GRU's gates in ONNX, by number in torch (input, forget, cell, output; reset, update, new)
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


@dataclass(frozen=True)
class Form:
    """What a file may hold in place of some weights.

    Attributes:
        name: of the weight, or of what they were folded into.
        made_of: the names of the weights.
        before, after: its value for the original weights and for the updated ones.
        exact: whether it is the weights' own numbers, in some order, rather than computed from them.
    """

    name: str
    made_of: tuple[str, ...]
    before: Tensor
    after: Tensor
    exact: bool = True

    @property
    def module(self) -> str:
        """The path of the module that it belongs to."""
        return self.name.rpartition(".")[0]


def forms_of(model: nn.Module, graph: fx.Graph, before: Weights, after: Weights) -> Iterator[Form]:
    """All forms that are looked for.

    Args:
        model: the original.
        graph: of `torch.export`, which tells what follows what.
        before: the original model's weights by name, parameters and buffers.
        after: the updated model's.
    """
    for name in before:
        yield Form(name, (name,), before[name], after[name])
        parts = before[name].shape[0] if before[name].dim() else 0
        if name.rpartition(".")[2] in ("in_proj_weight", "in_proj_bias") and parts % 3 == 0:
            for index in range(3):
                first, second = (w[name].chunk(3)[index] for w in (before, after))
                yield Form(f"{name}[{index}]", (name,), first, second)
    for path, module in model.named_modules():
        if isinstance(module, (nn.LSTM, nn.GRU)):
            yield from _recurrent(f"{path}." if path else "", module, before, after)
    for made_of, path, fold in _folds(graph):
        folded = [dict(fold({name: weights[name] for name in made_of})) for weights in (before, after)]
        for kind in folded[0]:
            yield Form(f"{path}.{kind}", made_of, folded[0][kind], folded[1][kind], exact=False)


def _recurrent(prefix: str, module: nn.LSTM | nn.GRU, before: Weights, after: Weights) -> Iterator[Form]:
    """W, R and B of ONNX's recurrent ops, for every layer: gates in their own order, directions stacked."""
    order = GATES[type(module).__name__]

    def gates(weight: Tensor) -> Tensor:
        parts = weight.chunk(len(order))
        return torch.cat([parts[i] for i in order])

    ends = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        wanted: dict[str, tuple[str, ...]] = {"W": ("weight_ih",), "R": ("weight_hh",)}
        if module.bias:
            wanted["B"] = ("bias_ih", "bias_hh")
        for kind, names in wanted.items():
            made_of = tuple(f"{prefix}{name}_l{layer}{end}" for end in ends for name in names)
            values = []
            for weights in (before, after):
                rows = [gates(weights[name]) for name in made_of]
                each = [torch.cat(rows[i : i + len(names)]) for i in range(0, len(rows), len(names))]
                values.append(torch.stack(each))
            yield Form(f"{prefix}{kind}_l{layer}", made_of, values[0], values[1])


Fold = Callable[[Weights], Iterator[tuple[str, Tensor]]]


def _folds(graph: fx.Graph) -> Iterator[tuple[tuple[str, ...], str, Fold]]:
    """Normalizations by fixed statistics that follow a convolution or linear layer, and nothing else does."""
    for node in graph.nodes:
        if node.op != "call_function" or "batch_norm" not in str(node.target):
            continue
        source, scale, shift, mean, variance = node.args[:5]
        known = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose")
        kind = str(source.target) if isinstance(source, fx.Node) else ""
        if not any(f"aten.{op}" in kind for op in known) or len(source.users) > 1:
            continue
        weight, bias = source.args[1], source.args[2] if len(source.args) > 2 else None
        names = [_name(given) for given in (weight, bias, scale, shift, mean, variance)]
        if names[0] is None or names[4] is None or names[5] is None:
            continue
        eps = next((a for a in reversed(node.args) if isinstance(a, float)), 1e-5)
        axis = 1 if "conv_transpose" in kind else 0
        groups = source.args[6] if "conv_transpose" in kind and len(source.args) > 6 else 1
        if groups != 1:
            continue
        yield (
            tuple(name for name in names if name),
            names[0].rpartition(".")[0],
            _folded(names, eps, axis),
        )


def _folded(names: list[str | None], eps: float, axis: int) -> Fold:
    def fold(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        values = [weights[name].double() if name else None for name in names]
        weight, bias, scale, shift, mean, variance = values
        assert weight is not None
        assert mean is not None
        assert variance is not None
        gain = (variance + eps).rsqrt() * (1 if scale is None else scale)
        shape = [1] * weight.dim()
        shape[axis] = -1
        yield "folded weight", weight * gain.reshape(shape)
        yield "folded bias", ((0 if bias is None else bias) - mean) * gain + (0 if shift is None else shift)

    return fold


def _name(node: object) -> str | None:
    """The name of the weight that a node of an exported module reads."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return str(node.target).removeprefix("model.")
    return None


def unused(graph: fx.Graph, names: Weights) -> set[str]:
    """The names of weights that nothing reads."""
    read = {_name(node) for node in graph.nodes if node.users}
    return {name for name in names if name not in read}
