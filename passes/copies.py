"""Copies: ops that pad or repeat the map that a convolution reads; the run of them is inverted as one affine op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxinvert.passes.inverse_op import call_arguments
from fxinvert.rules.padded import INTERPOLATE

_COPYING = frozenset(
    ["pad", "constant_pad_nd", INTERPOLATE]
    + [f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)]
    + [f"upsample_nearest{n}d" for n in (1, 2, 3)]
)
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def run_from(node: fx.Node) -> list[fx.Node]:
    """The ops that copy, one after another and this node first, and the convolution that they end in.

    Nothing if they do not end in one, or something else reads a value on the way, or a size is computed as the model runs.
    """
    run = [node]
    while _copies(run[-1]):
        if len(run[-1].users) != 1:
            return []
        (user,) = run[-1].users
        if not user.args or user.args[0] is not run[-1] or user.all_input_nodes.count(run[-1]) != 1:
            return []
        run.append(user)
    convolution = run[-1].meta.get("op") in _CONVOLUTIONS and run[-1].op == "call_function"
    return run if len(run) > 1 and convolution else []


def padded_arguments(copying: Sequence[fx.Node], convolution: fx.Node) -> tuple[Any, ...]:
    """What `padded_convolution` takes for a run."""
    given = call_arguments(convolution.target, convolution.args, convolution.kwargs)
    copies = tuple((_name(node), tuple(node.args[1:]), dict(node.kwargs)) for node in copying)
    return copying[0].args[0], *list(given.values())[1:], copies


def _name(node: fx.Node) -> str:
    return INTERPOLATE if node.meta["op"] == INTERPOLATE else str(node.target)


def _copies(node: fx.Node) -> bool:
    """Whether a node copies entries of a map within its sample, in a way that is known before the model runs."""
    key = node.meta.get("op")
    if node.op != "call_function" or key not in _COPYING or len(node.all_input_nodes) != 1:
        return False
    if key == INTERPOLATE:
        return call_arguments(node.target, node.args, node.kwargs)["mode"] in ("nearest", "nearest-exact")
    ends = node.args[1] if "pad" in key else ()
    # not the batch
    return isinstance(ends, list | tuple) and len(ends) < 2 * len(node.meta["tensor_meta"].shape)
