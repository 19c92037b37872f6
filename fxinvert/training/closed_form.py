"""Closed-form training of the affine ops of segments: sums over the data, one linear solve per op.

Once per sweep, or recursively: every so many samples the solution so far is taken, and the next samples correct it. That
is recursive least squares in its information form (Björck 1996, §3.2): errors are those of the parameters as they are
now, and the Gram matrix G is that of all samples since the sweep began.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxinvert.errors import REPORT, DataError, SolveError
from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.inversion.replay import Values
from fxinvert.output_target import OutputTarget
from fxinvert.passes.capture import attribute, evaluating
from fxinvert.passes.plan import Segment
from fxinvert.passes.synthesize import parameters_of
from fxinvert.rules import ByPosition, Op, Trainable
from fxinvert.training.batch import Batch
from fxinvert.training.blocks import BLOCK, Equations, added, equations, equations_over
from fxinvert.training.budget import Size
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage, size_of
from fxinvert.training.grams import Shifts
from fxinvert.training.positions import drawn_positions
from fxinvert.training.sensitivity import sensitivities
from fxinvert.training.work import Proposal, Update, Work

#: one op, or several that share their parameters
Sums = dict[str, Equations]
#: shares of the damping that are tried with every update
DAMPINGS = (1.0, 0.5)


@dataclass(frozen=True)
class ClosedForm:
    """One linear solve per op.

    Attributes:
        damping: ρ, relative to the mean of the Gram matrix's diagonal; half of it is tried too.
        satisfied_weight: weight of the samples whose output is its own target, the others weigh 1.
        error: how the error of a fit is measured: "plain", or "weighted" by how sensitive the output is to it.
        every: solve again after so many samples; None: once, after all of them.
        position_fraction: the share of the positions of a convolution's map, drawn at random, that its sums are made of;
            None: as many as make rows abundant, which is all of them in small maps (`fxinvert.training.positions`).
        ops: train the ops of the segments "together", all from one pass over the data, or "in_turn", each with its own.
        samples: how many samples to use, at least, from the beginning of the data; None: all.
    """

    damping: float = 1e-2
    satisfied_weight: float = 0.1
    error: Literal["plain", "weighted"] = "plain"
    every: int | None = None
    ops: Literal["together", "in_turn"] = "together"
    position_fraction: float | None = None
    samples: int | None = None
    name: str = "closed_form"
    schedule: str = "sequential"

    def __post_init__(self) -> None:
        if self.damping < 0 or not 0 <= self.satisfied_weight <= 1:
            raise DataError(
                f"damping={self.damping}, satisfied_weight={self.satisfied_weight}: "
                "needed are damping ≥ 0 and a weight between 0 and 1"
            )
        if self.error not in ("plain", "weighted") or self.ops not in ("together", "in_turn"):
            raise DataError(
                f"error={self.error!r}, ops={self.ops!r}: the error is plain or weighted, ops are trained "
                "together or in_turn"
            )
        for setting, number in (("every", self.every), ("samples", self.samples)):
            if number is not None and number < 1:
                raise DataError(f"{setting}={number}; it is a number of samples, at least 1")
        if self.position_fraction is not None and not 0 < self.position_fraction <= 1:
            raise DataError(
                f"position_fraction={self.position_fraction}; it is a share, above 0 and at most 1"
            )

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields the updates of all ops, or of one after the other, solved with each damping.

        Raises:
            SolveError: sums are not finite.
        """
        for paths in self._groups(work.context, segments):
            yield from self._solved(work, paths)

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields a pass over the data for all ops, or for each; recursively, one for every block of samples."""
        used = min(_whole(self.samples or probe.samples, probe.chunk), probe.samples)
        block = min(_whole(self.every or used, probe.chunk), used)
        for paths in self._groups(probe.context, segments):
            cost, (found,) = probe.measured(sums, self._arguments([probe.output_target], paths))
            names = paths if self.ops == "in_turn" else [segment.name for segment in segments]
            sent = size_of(found)
            yield Stage(
                tasks=((f"statistics of {', '.join(names)}", cost),),
                by_chunk=True,
                samples=block,
                memory=min(2 * probe.batch_size * probe.values + 2 * sent, probe.context.budget.limit),
                sent=sent,
                add_seconds=probe.seconds(partial(_added, copy.deepcopy(found), found)),
                solve_seconds=len(DAMPINGS) * probe.seconds(lambda: [v.solve(1e-2) for v in found.values()]),  # noqa: B023
                proposals=len(DAMPINGS),
                updates=len(found),
                times=-(-used // block),
            )

    def _groups(self, context: Context, segments: Sequence[Segment]) -> list[list[str]]:
        """The paths of the ops that are trained from one pass over the data; those that share parameters always are."""
        owners: dict[str, list[str]] = {}
        for path in (path for segment in segments for path in segment.trained):
            owners.setdefault(_owner(context.nodes[path]), []).append(path)
        groups = list(owners.values())
        return groups if self.ops == "in_turn" else [[path for group in groups for path in group]]

    def _arguments(self, output_targets: Sequence[OutputTarget], paths: list[str]) -> dict[str, Any]:
        return {
            "output_targets": output_targets,
            "paths": paths,
            "satisfied_weight": self.satisfied_weight,
            "weighted": self.error == "weighted",
            "position_fraction": self.position_fraction,
        }

    def _solved(self, work: Work, paths: list[str]) -> Iterator[list[Proposal]]:
        known: Sums = {}
        for found in self._blocks(work, paths):
            known = _added(known, found)
            inverse = work.context.inverse(work.output_target)
            representatives = {_use(n): n for n in (work.context.nodes[path] for path in reversed(paths))}
            yield [
                [
                    _solve(inverse, representatives[key], value, share * self.damping)
                    for key, value in known.items()
                ]
                for share in DAMPINGS
            ]
            # what the solution did not remove is seen again in the next samples' errors
            known = {
                key: replace(value, cross=torch.zeros_like(value.cross), error=0.0)
                for key, value in known.items()
            }

    def _blocks(self, work: Work, paths: list[str]) -> Iterator[Sums]:
        """The sums of each block of samples; from one pass for all output targets that are told apart."""
        size = self.every or self.samples
        count = None if size is None or self.samples is None else -(-self.samples // size)

        def passed(targets: Sequence[OutputTarget]) -> Iterator[list[Sums]]:
            for block in islice(work.blocks(sums, self._arguments(targets, paths), size), count):
                yield reduce(lambda known, part: list(map(_added, known, part)), block)

        if count == 1 or size is None:
            targets = work.output_targets
            (found,) = work.once((self, *paths), lambda: list(passed(targets)))
            yield found[targets.index(work.output_target)]
        else:
            yield from (found for (found,) in passed([work.output_target]))


def sums(
    context: Context,
    batches: Iterable[Batch],
    *,
    output_targets: Sequence[OutputTarget],
    paths: Sequence[str],
    satisfied_weight: float,
    weighted: bool,
    position_fraction: float | None = None,
) -> list[Sums]:
    """G and C of some ops over batches, by what the op does with which parameters, for each output target.

    Ops that do the same with the same are added.

    Args:
        context: the model.
        batches: the samples.
        output_targets: what the output should have been; each is told for itself.
        paths: of the ops.
        satisfied_weight: weight of the samples whose output is its own target, the others weigh 1.
        weighted: whether errors are weighted by how sensitive the output is to them.
        position_fraction: see `ClosedForm`.
    """
    inverses, totals = (
        [context.inverse(target) for target in output_targets],
        [Sums() for _ in output_targets],
    )
    nodes = [context.nodes[path] for path in paths]
    kept: dict[str, int | None] = {}
    with torch.no_grad(), evaluating(context.graph):
        for number, batch in enumerate(batches):
            first = 0
            for part in context.parts(batch):
                values = inverses[0].forward(part.inputs)
                kept = kept or context.budget.rows(_sizes(inverses[0], nodes, values), times=len(inverses))
                felt = sensitivities(inverses[0], nodes, part) if weighted else {}
                for inverse, total in zip(inverses, totals, strict=True):
                    last = inverse.output_node
                    targets = inverse.targets(values, part.labels, [*nodes, last])
                    weights = sample_weights(values[last], targets[last], satisfied_weight)
                    for i, node in enumerate(nodes):
                        op, trainable = inverse.op(node, values), trainable_of(inverse, node)
                        at = None
                        if isinstance(trainable, ByPosition):
                            # the place in the piece of data, so that the same are drawn wherever it is worked on
                            seed = number * len(nodes) + i
                            at = drawn_positions(op, position_fraction, seed, len(batch))
                            at = None if at is None else at[first : first + len(part)]
                        errors, key = targets[node] - values[node], _use(node)
                        made = _sums_of(
                            op,
                            trainable,
                            errors,
                            weights,
                            felt.get(node),
                            at,
                            kept[key],
                            context.budget.block,
                        )
                        total[key] = added(total[key], made) if key in total else made
                first += len(part)
    return totals


def _sizes(inverse: InverseGraph, nodes: Sequence[fx.Node], values: Values) -> dict[str, Size]:
    """Of the equations of some ops, whatever the samples whose values are given."""
    found = dict[str, Size]()
    for node in nodes:
        op, trainable = inverse.op(node, values), trainable_of(inverse, node)
        op = op if op.by_sample else op.samples(slice(0, 1))
        if isinstance(trainable, ByPosition):
            at = torch.zeros(len(op.output), 1, dtype=torch.long, device=op.output.device)
            rows, errors = trainable.features(op, at), trainable.outputs(op, op.output, at)
        else:
            rows, errors = trainable.features(op), trainable.outputs(op, op.output)
        found[_use(node)] = Size(len(rows), errors.shape[2], rows.shape[2])
    return found


def trainable_of(inverse: InverseGraph, node: fx.Node) -> Trainable:
    """The parameter side of an op that is trained."""
    trainable = inverse.inverse_op(node).rule.trainable
    assert trainable is not None, f"{node.name} cannot be trained. {REPORT}"
    return trainable


def _whole(samples: int, chunk: int) -> int:
    """The samples of the chunks that have so many."""
    return -(-samples // chunk) * chunk


def _added(known: Sums, more: Sums) -> Sums:
    """Sums over more samples; those that are known already are overwritten."""
    return known | {key: added(known[key], value) if key in known else value for key, value in more.items()}


def _sums_of(
    op: Op,
    trainable: Trainable,
    errors: Tensor,
    weights: Tensor,
    felt: Tensor | None,
    at: Tensor | None,
    kept: int | None = None,
    block: int = BLOCK,
) -> Equations:
    """The sums of one op over one batch.

    Args:
        op: the op.
        trainable: its parameter side.
        errors: t − y, of the op's output.
        weights: of the samples, `(B,)`.
        felt: how sensitive the output is to the op's, where errors are weighted by it.
        at: the positions that are summed over, `(B, p)`; None: all.
        kept: so many rows are kept in place of a Gram matrix; None: a Gram matrix.
        block: bytes of features that are made at a time.
    """

    def features(samples: slice) -> Tensor:
        part = op.samples(samples)
        if at is not None and isinstance(trainable, ByPosition):
            return trainable.features(part, at[samples])
        return trainable.features(part)

    def rows(value: Tensor) -> Tensor:
        if at is not None and isinstance(trainable, ByPosition):
            return trainable.outputs(op, value, at)
        return trainable.outputs(op, value)

    if at is not None:  # what is drawn stands for what is not
        weights = weights * (op.output[0, 0].numel() / at.shape[1])
    if felt is not None:
        sensitive = rows(felt).square().mean((0, 2))
        weights = sensitive * weights.repeat_interleave(len(sensitive) // len(weights))
    if op.by_sample:
        return equations([features(slice(None))], rows(errors), weights, None, kept)
    shifts = None
    if at is None and isinstance(trainable, ByPosition):
        window, _ = trainable.sliding(op)
        if window.steps is not None:
            shifts = Shifts(window.kernel, tuple(op.output.shape[2:]), window.steps)
    return equations_over(features, rows(errors), weights, len(op.output), shifts, kept, block)


def sample_weights(outputs: Tensor, targets: Tensor, satisfied: float) -> Tensor:
    """1 for each sample whose output is not its own target, `satisfied` for the others: `(B, …)` → `(B,)`."""
    moved = (targets != outputs).reshape(len(outputs), -1).any(1)
    return torch.where(moved, 1.0, satisfied).to(outputs.dtype)


def _solve(inverse: InverseGraph, node: fx.Node, known: Equations, damping: float) -> Update:
    path = node.meta["path"]
    if not known.is_finite:
        raise SolveError(f"the statistics of {path!r} are not finite: its inputs or targets overflow")
    solved = known.solve(damping)
    trainable, names = trainable_of(inverse, node), parameters_of(node)
    parameters: dict[str, Any] = {
        argument: attribute(inverse.graph, name) for argument, name in names.items()
    }
    changes = trainable.changes(parameters, solved.change)
    return Update(
        path,
        {names[argument]: change for argument, change in changes.items()},
        solved.explained,
        solved.damping,
    )


def _owner(node: fx.Node) -> str:
    """The name of the op's first parameter: ops with the same one are trained from the same pass."""
    return next(iter(parameters_of(node).values()))


def _use(node: fx.Node) -> str:
    """What an op does with which parameters: in a x and a y it is the same, in a x + b or aᵀx another."""
    read = ", ".join(f"{argument}={name}" for argument, name in parameters_of(node).items())
    return f"{node.meta['op']}({read})"
