"""LSTMs whose state is projected (`proj_size`), written out step by step: ONNX's op has no projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxinvert.errors import TraceError


class ProjectedSteps(TorchFunctionMode):
    """While it is on, `nn.LSTM` with `proj_size` computes by ops that have a translation; other calls are as they are.

    torch's own translation of them takes the projection's weights for another layer's. There are as many steps as the
    example has, so that the length of the sequences is fixed.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The call, or what replaces it.

        Raises:
            TraceError: sequences may have any length.
        """
        if func is torch.lstm and isinstance(args[1], tuple | list):
            (hidden, cell), weights, biases = args[1], args[2], args[3]
            if hidden.shape[-1] != cell.shape[-1]:
                return _lstm(args[0], (hidden, cell), _cells(weights, biases), *args[4:5], *args[7:9])
        return func(*args, **(kwargs or {}))


Cell = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


def _cells(weights: Sequence[Tensor], biases: bool) -> list[Cell]:
    """Each layer's and direction's weights: of the input, of the state, their biases, of the projection."""
    size = 5 if biases else 3
    parts = [weights[i : i + size] for i in range(0, len(weights), size)]
    return [tuple(part) if biases else (part[0], part[1], None, None, part[2]) for part in parts]  # type: ignore[misc]


def _lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    cells: Sequence[Cell],
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` in evaluation mode (`torch.nn.LSTM`'s equations): outputs, last states, last cells."""
    time, ends = int(batch_first), []
    if not isinstance(x.shape[time], int):
        raise TraceError(
            "an LSTM with 'proj_size' is written out step by step, as ONNX's has no projection, for sequences of a fixed length: "
            "leave its length out of dynamic_axes"
        )
    directions = 2 if bidirectional else 1
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            steps = x.unbind(time)
            found, end = _run(
                steps[::-1] if direction else steps, state[0][index], state[1][index], cells[index]
            )
            outputs.append(torch.stack(found[::-1] if direction else found, time))
            ends.append(end)
        x = torch.cat(outputs, -1)
    return x, torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])


def _run(
    steps: Sequence[Tensor], h: Tensor, c: Tensor, cell: Cell
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    of_input, of_state, input_bias, state_bias, projection = cell
    outputs = []
    for step in steps:
        gates = F.linear(step, of_input, input_bias) + F.linear(h, of_state, state_bias)
        enter, forget, new, leave = gates.chunk(4, -1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
        h = F.linear(torch.sigmoid(leave) * torch.tanh(c), projection)
        outputs.append(h)
    return outputs, (h, c)
