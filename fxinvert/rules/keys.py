"""The normalized name of an op: one key for all its spellings."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import nn

from fxinvert.errors import RuleError

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

#: an ATen op as torch prints it, its overload may be told
_ATEN_SPELLING = re.compile(r"aten(?:\.|::)(\w+)(?:\.\w+)?")


def key_of(spelling: Any) -> str:
    """The normalized name of an op, from any of its spellings.

    ATen ops and torch's own functions, methods and modules have the ATen name without overload and in-place mark;
    everything else is known by its qualified name.

    Raises:
        RuleError: the spelling names no op.
    """
    if isinstance(spelling, str):
        aten = _ATEN_SPELLING.fullmatch(spelling)
        name: str = aten[1] if aten else spelling
        name = name if name.startswith("_") else name.rstrip("_")
        return _ATEN_NAMES.get(name, name)
    if isinstance(spelling, torch._ops.OpOverload):
        spelling = spelling.overloadpacket
    if isinstance(spelling, torch._ops.OpOverloadPacket):
        namespace, name = spelling._qualified_op_name.split("::")
        return key_of(name) if namespace == "aten" else f"{namespace}::{name}"
    if (
        isinstance(spelling, type)
        and issubclass(spelling, nn.Module)
        and spelling.__module__.startswith("torch.nn.")
    ):
        return _module_key(spelling.__name__)
    if not hasattr(spelling, "__qualname__"):
        raise RuleError(
            f"{spelling!r} does not name an op; give a module class, a function, a method name or an ATen op"
        )
    return (
        key_of(spelling.__name__) if is_torch(spelling) else f"{spelling.__module__}.{spelling.__qualname__}"
    )


@functools.cache
def op_named(name: str) -> torch._ops.OpOverload:
    """The op with a qualified name, `"aten.pad.default"`."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]


def is_known(name: str) -> bool:
    """Whether tensors have a method, torch a function, or a library an op of this name, or it is a qualified one."""
    if "." in name or any(hasattr(home, name) for home in (torch.Tensor, torch, nn.functional)):
        return True
    ops = torch._C._dispatch_get_all_op_names()
    return any(op.removeprefix("aten::").split(".")[0] == name for op in ops)


def is_torch(spelling: Any) -> bool:
    """Whether a spelling is torch's own, or that of an op, rather than a user's class or function."""
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
    known = aten_by_letters()
    return known.get(letters) or known.get(re.sub(r"[123]d$", "", letters)) or letters


@functools.cache
def aten_by_letters() -> dict[str, str]:
    """ATen's names, without overloads and private ones, by their letters."""
    full = sorted(torch._C._dispatch_get_all_op_names())
    names = [name.removeprefix("aten::").split(".")[0] for name in full if name.startswith("aten::")]
    return {name.replace("_", ""): name for name in names if not (name.startswith("_") or name.endswith("_"))}
