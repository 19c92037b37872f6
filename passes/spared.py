"""Spared: which optional inputs of a model would keep its code from where it is.

if noise is None:
    noise = torch.rand(n, length)          # not reached by who gives `noise`
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import traceback
from collections.abc import Collection
from contextlib import suppress
from types import CodeType

import torch
from torch import nn


def sparing(model: nn.Module) -> tuple[str, ...]:
    """The optional inputs of a model whose absence leads to the line that runs now, the innermost condition first."""
    optional = [p.name for p in inspect.signature(model.forward).parameters.values() if p.default is None]
    lines = ((frame.f_code, line) for frame, line in traceback.walk_stack(None))
    asked = (name for code, line in lines for name in _absent(code, line) if name in optional)
    return tuple(dict.fromkeys(asked))


def advice(names: Collection[str]) -> str:
    """What a message says of the inputs that would spare the model something; nothing of none."""
    return (
        f"; or give forward() {' or '.join(map(repr, names))}, without which it comes to this"
        if names
        else ""
    )


@functools.lru_cache(maxsize=1024)
def _absent(code: CodeType, line: int) -> tuple[str, ...]:
    """The variables that are None where this line of a function runs, by the conditions around it, innermost first."""
    if code.co_filename.startswith(str(torch.__path__[0])):
        return ()
    # no source, or none that stands for itself, as of a lambda
    with suppress(OSError, SyntaxError, TypeError):
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        return tuple(
            test.left.id
            for node in reversed(list(ast.walk(tree)))
            if isinstance(node, ast.If) and isinstance(test := node.test, ast.Compare)
            if isinstance(test.left, ast.Name) and ast.unparse(test.comparators[0]) == "None"
            if _within(_branch(node, test.ops[0]), line - first + 1)
        )
    return ()


def _branch(condition: ast.If, compared: ast.cmpop) -> list[ast.stmt]:
    """What runs if the variable is None."""
    if isinstance(compared, ast.Is):
        return condition.body
    return condition.orelse if isinstance(compared, ast.IsNot) else []


def _within(body: list[ast.stmt], line: int) -> bool:
    return any(part.lineno <= line <= (part.end_lineno or part.lineno) for part in body)
