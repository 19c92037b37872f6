"""Keys: what a task depends on, as one number. Equal keys, equal results."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxinvert.content import content_of


def content_key(*values: Any) -> str:
    """The SHA-256 of values made of numbers, strings, tensors, dataclasses, containers and functions.

    Functions stand for their names and their code, other objects for their class.
    """
    sha = hashlib.sha256()
    _feed(sha, values)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    match value:
        case None | bool() | int() | float() | str() | bytes():
            sha.update(f"{type(value).__name__}:{value!r};".encode())
        case Tensor():
            sha.update(f"tensor:{value.dtype}{tuple(value.shape)};".encode())
            sha.update(content_of(value))
        case Mapping():
            sha.update(f"map:{len(value)};".encode())
            for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
                _feed(sha, key)
                _feed(sha, item)
        case list() | tuple():
            sha.update(f"list:{len(value)};".encode())
            for item in value:
                _feed(sha, item)
        case functools.partial():
            _feed(sha, ("partial", value.func, value.args, value.keywords))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            _feed(sha, (type(value), fields))
        case _:
            named = value if hasattr(value, "__qualname__") else type(value)
            sha.update(f"object:{named.__module__}.{named.__qualname__};".encode())
            code = getattr(value, "__code__", None)
            if code is not None:
                sha.update(code.co_code)
