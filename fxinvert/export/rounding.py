"""How far a model's own rounding takes it from what it computes: the answer in float64, and how far it is missed.

A file adds and multiplies in another order than the model, so that both round differently: their errors are two draws of
one distribution, whose spread is that of the model's error (a sum of many small independent terms: Higham and Mary, SIAM
J. Sci. Comput. 41, 2019). The largest of `DRAWS` errors of the model, at weights and inputs which differ so little that
all round afresh and nothing else changes, tells that spread element by element. Another draw exceeds `FACTOR` times the
largest of them with a probability of ∫ 2 φ(h) (2 Φ(h / FACTOR) − 1)^DRAWS dh = 1e-10 where the file rounds as much, and
of 1e-6 where it rounds twice as much.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fxinvert.errors import DataError
from fxinvert.export.called import Call, outputs_by_name

DRAWS = 16
FACTOR = 8.0
NEAR = 2.0**-12
"""How far weights and inputs are moved, towards 0 and relative to them: thousands of roundings of float32."""

HIDDEN = 1e-2
"""What may be rounding of an element, relative to its output's root mean square; what is beyond could hide anything."""

WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex32: torch.complex128, torch.complex64: torch.complex128}  # fmt: skip


@dataclass(frozen=True)
class Rounding:
    """The rounding of one output of a model.

    Attributes:
        exact: what float64 gives.
        error: the largest error of each element.
    """

    exact: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]

    def explains(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which elements of other values are as near to float64 as rounding lets them be."""
        finite = np.isfinite(self.exact)
        scale = np.sqrt(np.square(self.exact[finite]).mean()) if finite.any() else 0.0
        allowed = np.minimum(FACTOR * self.error, HIDDEN * scale)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(values - self.exact) <= allowed)


def rounding_of(model: nn.Module, call: Call, values: Sequence[Tensor]) -> list[Rounding]:
    """The rounding of every output of a model.

    Args:
        model: The frozen model; it stays as it is.
        call: How it is called.
        values: The tensors that it is called with.

    Returns:
        One entry per output.

    Raises:
        DataError: The model draws random numbers, or does not run in float64.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[Rounding] = []
    for draw in range(DRAWS):
        near, given = copy.deepcopy(model), [value.clone() for value in values]
        if draw:
            _move([*near.parameters(), *near.buffers(), *given], generator)
        single = _outputs(near, call, given)
        with _double():
            exact = _outputs(near.double(), call, [_wide(value) for value in given])
        with np.errstate(invalid="ignore"):
            errors = [np.nan_to_num(np.abs(a - b), posinf=np.inf) for a, b in zip(single, exact, strict=True)]
        if not draw:
            found = [Rounding(a, error) for a, error in zip(exact, errors, strict=True)]
        for rounding, error in zip(found, errors, strict=True):
            np.maximum(rounding.error, error, out=rounding.error)
    return found


def _outputs(model: nn.Module, call: Call, values: Sequence[Tensor]) -> list[npt.NDArray[np.float64]]:
    args, kwargs = call.inputs.arguments(tuple(value.clone() for value in values))
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            result = model(*args, **kwargs)
    except Exception as error:
        raise DataError(f"the model does not run ({type(error).__name__}: {error}).") from error
    if not torch.equal(state, torch.get_rng_state()):
        raise DataError("forward draws random numbers, which is no rounding.")
    return [np.atleast_1d(value.double().numpy()) for value in outputs_by_name(result).values()]


def _move(tensors: Sequence[Tensor], generator: torch.Generator) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data.mul_(1 - NEAR * torch.rand(tensor.shape, generator=generator).to(tensor.dtype))


class _Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 whatever casts the code makes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return WIDER.get(value, value)
    return value.to(WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in WIDER else value


@contextmanager
def _double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)
