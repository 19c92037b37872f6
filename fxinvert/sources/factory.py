"""`package.module:factory`: import what a name on the command line stands for, and call it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fxinvert.errors import DataError, FxInvertError

SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(spec: str) -> bool:
    """Whether `spec` is written like `package.module:factory`."""
    return SPEC.fullmatch(spec) is not None


def find_object(spec: str, what: str) -> Any:
    """What `package.module:name` stands for. The current folder is importable, as with `python -m`.

    Args:
        spec: the name.
        what: how messages call the thing that is wanted, e.g. "model".

    Raises:
        DataError: there is no such module or name, or importing it raised.
    """
    if not is_factory(spec):
        raise DataError(
            f"{what} {spec!r}: write it as package.module:factory, e.g. my_package.networks:small_cnn"
        )
    module_name, _, attribute = spec.partition(":")
    found: Any = import_module(module_name, what, spec)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DataError(_unknown(what, spec, module_name, part, found))
        found = getattr(found, part)
    return found


def call_factory(spec: str, what: str) -> Any:
    """What `package.module:factory` makes. A name that is no function or class is taken as it is.

    Args:
        spec: the name.
        what: how messages call the thing that is wanted, e.g. "model".

    Raises:
        DataError: there is no such factory, it needs arguments, or it raised.
    """
    found = find_object(spec, what)
    if not (inspect.isroutine(found) or isinstance(found, type)):
        return found
    needed = _needed_arguments(found)
    if needed:
        raise DataError(
            f"{what} {spec!r} needs the arguments {', '.join(needed)}; name a function that can be called without any, "
            "for example one that calls this one"
        )
    try:
        return found()
    except FxInvertError:
        raise
    except Exception as error:  # a factory is anyone's code
        raise DataError(f"{what} {spec!r} raised {_told(error)}") from error


def import_module(name: str, what: str, spec: str) -> ModuleType:
    """The module `name`; messages call it `what` `spec`. The current folder is importable.

    Raises:
        DataError: there is no such module, or importing it raised.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise DataError(
                f"{what} {spec!r}: there is no module {error.name!r}, neither in {folder} nor among the installed packages"
            ) from error
        raise DataError(
            f"{what} {spec!r}: importing {name} needs the module {error.name!r}, which is not installed"
        ) from error
    except Exception as error:  # a module is anyone's code
        raise DataError(f"{what} {spec!r}: importing {name} raised {_told(error)}") from error


def _unknown(what: str, spec: str, module: str, name: str, owner: Any) -> str:
    public = [key for key, value in vars(owner).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, public, n=3, cutoff=0.5) or public[:5]
    hint = f"; it has {', '.join(near)}" if near else ""
    return f"{what} {spec!r}: {module} has no {name!r}{hint}"


def _needed_arguments(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions have no signature
        return []
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in free]


def _told(error: Exception) -> str:
    """The error in one line, with the innermost source line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f", at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{where}"
