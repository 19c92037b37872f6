"""Packed: sequences that are packed for a recurrent layer, followed as the padded ones that they were made of.

torch packs by numbers that it reads from the lengths, sorts the samples by them and computes on as many rows as they say. The
same follows from the padded sequences, sample by sample: what comes behind the end of one is never seen by the way forward,
the way back reads each turned around within its own length, and the last states are those at its end. The results have the
length of what was packed, as if one sample had it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

#: closes a gate to the last bit, or opens it
_SURE = 1e4


class Padded(rnn.PackedSequence):
    """Sequences `(B, T, …)` in `data`, and their lengths `(B,)` in `batch_sizes`."""


@contextmanager
def packing_followed(scopes: list[dict[str, Any]]) -> Iterator[None]:
    """Runs the body with packing and unpacking that keep the padded sequences, and recurrent layers that take these.

    Args:
        scopes: global names of code that may have imported them.
    """
    instead: dict[Any, Callable[..., Any]] = {rnn.pack_padded_sequence: _pack, rnn.pad_packed_sequence: _pad}
    with ExitStack() as stack:
        for scope in (vars(rnn), *scopes):
            named = {id(value): name for name, value in scope.items()}
            found = {named[id(own)]: new for own, new in instead.items() if id(own) in named}
            stack.enter_context(patch.dict(scope, found))
        for kind in (nn.LSTM, nn.GRU, nn.RNN):
            stack.enter_context(patch.object(kind, "forward", _forward(kind.forward)))
        yield


def _pack(
    input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> rnn.PackedSequence:
    """`pack_padded_sequence`."""
    return Padded(input if batch_first else input.transpose(0, 1), torch.as_tensor(lengths))


def _pad(
    sequence: rnn.PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`pad_packed_sequence`."""
    steps, lengths = sequence.data.shape[1], sequence.batch_sizes
    behind = _behind(sequence).reshape(-1, steps, *[1] * (sequence.data.dim() - 2))
    padded = sequence.data.masked_fill(behind, padding_value)
    more = (total_length or steps) - steps
    if more:
        padded = F.pad(padded, (0, 0) * (padded.dim() - 2) + (0, more), value=padding_value)
    return padded if batch_first else padded.transpose(0, 1), lengths


def _behind(sequence: rnn.PackedSequence) -> Tensor:
    """Which steps come behind the end, `(B, T)`."""
    steps = torch.arange(sequence.data.shape[1], device=sequence.data.device)
    return steps >= sequence.batch_sizes.to(steps.device)[:, None]


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer's `forward` that takes padded sequences, too."""

    def forward(layer: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        return _recurrent(layer, input, hx) if isinstance(input, Padded) else own(layer, input, hx)

    return forward


def _recurrent(layer: nn.RNNBase, sequence: Padded, hx: Any) -> tuple[Padded, Any]:
    """A recurrent layer in evaluation mode, direction by direction: outputs, and the states at the ends."""
    x, behind = sequence.data, _behind(sequence)
    lengths = sequence.batch_sizes.to(x.device)[:, None]
    steps = torch.arange(x.shape[1], device=x.device)
    turned = torch.where(behind, steps, lengths - 1 - steps)  # its own inverse
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 1 + (layer.mode == "LSTM")]
    given = hx if isinstance(hx, tuple) else (hx,) * len(sizes)
    directions, outputs, ends = 1 + layer.bidirectional, list[Tensor](), list[tuple[Tensor, ...]]()
    for i, weights in enumerate(layer.all_weights):
        if i % directions == 0 and outputs:
            x, outputs = torch.cat(outputs, -1), []
        state = tuple(
            x.new_zeros(1, x.shape[0], size) if hx is None else known[i : i + 1]
            for known, size in zip(given, sizes, strict=True)
        )
        back = i % directions == 1
        own = _taken(x, turned) if back else x
        output = _run(layer, own, state, weights)[0]
        end: tuple[Tensor, ...] = (_taken(output, lengths - 1).transpose(0, 1),)
        if len(sizes) == 2:
            end = (*end, _last_cell(layer, own, behind, state, weights))
        outputs.append(_taken(output, turned) if back else output)
        ends.append(end)
    last = tuple(torch.cat(kind) for kind in zip(*ends, strict=True))
    return Padded(torch.cat(outputs, -1), sequence.batch_sizes), last if len(last) == 2 else last[0]


def _taken(values: Tensor, steps: Tensor) -> Tensor:
    """Of `(B, T, N)` what is at these steps `(B, S)` of each sample."""
    return values.gather(1, steps[:, :, None].expand(-1, -1, values.shape[2]))


def _run(
    layer: nn.RNNBase, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One layer in one direction: outputs, and the states after the last step."""
    op = getattr(torch, layer.mode.lower())
    found: tuple[Tensor, ...] = op(
        x, state if len(state) == 2 else state[0], list(weights), layer.bias, 1, 0.0, False, False, True
    )
    return found


def _last_cell(
    layer: nn.RNNBase, x: Tensor, behind: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]
) -> Tensor:
    """An LSTM's cells at the ends: with another feature that lets nothing in and forgets nothing behind them, they stay."""
    gates = x.new_tensor([-_SURE, _SURE, 0.0, 0.0]).repeat_interleave(layer.hidden_size)
    widened = [torch.cat([weights[0], gates[:, None]], 1), *weights[1:]]
    return _run(layer, torch.cat([x, behind[:, :, None].to(x.dtype)], 2), state, widened)[2]
