"""Closed-form training of the affine ops of segments: sums over the data, one linear solve per op.

Once per sweep, or recursively: every so many samples the solution so far is taken, and the next samples correct it. That
is recursive least squares in its information form (Björck 1996, §3.2): errors are those of the parameters as they are
now, and the Gram matrix G is that of all samples since the sweep began.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain, islice
from statistics import mean
from typing import Any, Literal

from torch import fx

from fxinvert.errors import SolveError
from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Segment
from fxinvert.passes.synthesize import parameters_of
from fxinvert.settings import check_choice, check_counts, check_numbers
from fxinvert.training.blocks import Equations
from fxinvert.training.computed import changes_of
from fxinvert.training.context import Context
from fxinvert.training.costs import Cost, Probe, Stage, size_of
from fxinvert.training.last_layer import MOST, asks_for_classes, descend, last_layer
from fxinvert.training.op_sums import Sums, add, in_passes, sums, told_together, use_of
from fxinvert.training.work import Back, Proposal, Update, Work

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
        last_layer: whether it is also tried what the last layer alone can do with 16,384 samples at most
            (`fxinvert.training.last_layer`), where the output target stands for the task's loss.

    Where the graph branches, the targets of all layers follow from one linearization, which costs as much as those of one of
    them: all segments are trained from it, twice as often. On chains they are trained one after the other.
    """

    damping: float = 1e-2
    satisfied_weight: float = 0.1
    error: Literal["plain", "weighted"] = "plain"
    every: int | None = None
    ops: Literal["together", "in_turn"] = "together"
    position_fraction: float | None = None
    samples: int | None = None
    last_layer: bool = True
    name: str = "closed_form"
    schedule: str = "auto"

    def __post_init__(self) -> None:
        check_numbers("a number of at least 0", lambda d: d >= 0, damping=self.damping)
        check_numbers("a weight from 0 to 1", lambda w: 0 <= w <= 1, satisfied_weight=self.satisfied_weight)
        check_numbers(
            "a share above 0 and up to 1", lambda s: 0 < s <= 1, position_fraction=self.position_fraction
        )
        check_counts(every=self.every, samples=self.samples)
        check_choice("error", self.error, ("plain", "weighted"))
        check_choice("ops", self.ops, ("together", "in_turn"))

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal] | Back]:
        """Yields the updates of all ops, or of one after the other, solved with each damping.

        Before that what the last layer alone can do, and a return: it is what comes out where nothing better
        follows, but a last layer that has gone to its end leaves the others little to correct.

        Raises:
            SolveError: sums are not finite.
        """
        if work.output_target.by_loss and work.output_target is work.output_targets[0]:
            yield from self._last(work, segments)
        for paths in self._groups(work.context, segments):
            yield from self._recursive(work, paths, self.every) if self.every else self._once(work, paths)

    def _last(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal] | Back]:
        """Yields what the last layer alone can do, and a return to what was."""
        path = self._last_path(work.context, segments)
        if path is None or not asks_for_classes(work.context.first.labels):
            return
        samples = min(self.samples or work.samples, MOST)
        (found,) = work.each(descend, [{"path": path, "samples": samples}])
        if found:
            given = {name: work.context.tensors[name].detach().clone() for name in found[0]}
            yield [[Update(f"{path} alone", changes)] for changes in found]
            if work.taken is not None:
                yield Back(given)

    def _last_path(self, context: Context, segments: Sequence[Segment]) -> str | None:
        return last_layer(context, segments) if self.last_layer and self.every is None else None

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields what is done for all ops, or for each; recursively, once for every block of samples."""
        used = min(_whole(self.samples or probe.samples, probe.chunk), probe.samples)
        block = min(_whole(self.every or used, probe.chunk), used)
        targets = [probe.output_target]
        last = self._last_path(probe.context, segments)
        if last is not None:
            few = min(self.samples or probe.samples, probe.samples, MOST)
            cost, found = probe.measured(descend, {"path": last, "samples": few})
            yield Stage(
                tasks=((f"{last} alone", cost),),
                by_chunk=False,
                samples=few,
                memory=min(2 * probe.batch_size * probe.values, probe.context.budget.limit),
                sent=size_of(found),
                proposals=len(found),
                judged=probe.judged(found[0]) if found else None,
            )
        for paths in self._groups(probe.context, segments):
            passes = [paths] if self.every else in_passes(probe.context, paths, targets, used)
            costs, sent, adding, solving = list[tuple[float, float]](), 0, 0.0, 0.0
            for summed in passes:
                cost, (found,) = probe.measured(sums, self._arguments(targets, paths, summed, used))
                costs.append((cost.operations, cost.seconds))
                sent = max(sent, size_of(found))
                adding += probe.seconds(partial(add, copy.deepcopy(found), found))
                solving += probe.seconds(lambda: [v.solve(1e-2) for v in found.values()])  # noqa: B023
            names = ", ".join(paths if self.ops == "in_turn" else [segment.name for segment in segments])
            passed = f", {len(passes)} passes" if len(passes) > 1 else ""
            yield Stage(
                tasks=((f"statistics of {names}{passed}", Cost(*map(mean, zip(*costs, strict=True)))),),
                by_chunk=True,
                samples=block,
                memory=min(2 * probe.batch_size * probe.values + 2 * sent, probe.context.budget.limit),
                sent=sent,
                passes=len(passes),
                add_seconds=adding,
                solve_seconds=len(DAMPINGS) * solving,
                proposals=len(DAMPINGS),
                updates=len({use_of(probe.context.nodes[path]) for path in paths}),
                times=-(-used // block),
            )

    def _groups(self, context: Context, segments: Sequence[Segment]) -> list[list[str]]:
        """The paths of the ops that are trained together; those that share parameters always are."""
        owners: dict[str, list[str]] = {}
        for path in (path for segment in segments for path in segment.trained):
            owners.setdefault(_owner(context.nodes[path]), []).append(path)
        groups = list(owners.values())
        if not groups:
            return []
        return groups if self.ops == "in_turn" else [[path for group in groups for path in group]]

    def _arguments(
        self, output_targets: Sequence[OutputTarget], paths: list[str], summed: list[str], samples: int
    ) -> dict[str, Any]:
        return {
            "output_targets": output_targets,
            "paths": paths,
            "summed": summed,
            "satisfied_weight": self.satisfied_weight,
            "weighted": self.error == "weighted",
            "position_fraction": self.position_fraction,
            "samples": samples,
        }

    def _once(self, work: Work, paths: list[str]) -> Iterator[list[Proposal]]:
        """The updates after all samples, for all output targets that are told apart at the same time."""
        targets = work.output_targets

        def solved(summed: list[str]) -> list[list[Proposal]]:
            found = list[list[Proposal]]()
            for together in told_together(work.context, summed, targets, work.samples):
                blocks = self._blocks(work, together, paths, summed, self.samples)
                (block,) = islice(blocks, None if self.samples is None else 1)
                found += [
                    [list(self._updates(work, summed, known, share)) for share in DAMPINGS] for known in block
                ]
            return found

        def proposals() -> list[list[Proposal]]:
            passes = [solved(summed) for summed in in_passes(work.context, paths, targets, work.samples)]
            return [
                [list(chain(*parts)) for parts in zip(*own, strict=True)] for own in zip(*passes, strict=True)
            ]

        yield work.once((self, *paths), proposals)[targets.index(work.output_target)]

    def _recursive(self, work: Work, paths: list[str], every: int) -> Iterator[list[Proposal]]:
        """The updates after every block of samples."""
        known: Sums = {}
        count = None if self.samples is None else -(-self.samples // every)
        blocks = self._blocks(work, [work.output_target], paths, paths, every)
        for (found,) in islice(blocks, count):
            known = add(known, found)
            yield [list(self._updates(work, paths, known, share)) for share in DAMPINGS]
            # what the solution did not remove is seen again in the next samples' errors
            known = {key: value.answered() for key, value in known.items()}

    def _blocks(
        self,
        work: Work,
        targets: Sequence[OutputTarget],
        paths: list[str],
        summed: list[str],
        size: int | None,
    ) -> Iterator[list[Sums]]:
        """The sums of each block of samples, for each output target."""
        for block in work.blocks(sums, self._arguments(targets, paths, summed, work.samples), size):
            yield reduce(lambda known, part: list(map(add, known, part)), block)

    def _updates(self, work: Work, paths: list[str], known: Sums, share: float) -> Iterator[Update]:
        """The update of each use, solved with a share of the damping."""
        inverse = work.context.inverse(work.output_target)
        nodes = {use_of(node): node for node in (work.context.nodes[path] for path in reversed(paths))}
        return (_solve(inverse, nodes[use], value, share * self.damping) for use, value in known.items())


def _solve(inverse: InverseGraph, node: fx.Node, known: Equations, damping: float) -> Update:
    path = node.meta["path"]
    if not known.is_finite:
        raise SolveError(f"the statistics of {path!r} are not finite: its inputs or targets overflow")
    solved = known.solve(damping)
    own = changes_of(inverse, node, solved.change, partial(known.metric, solved.damping))
    return Update(path, own.changes, own.kept * solved.explained, solved.damping)


def _whole(samples: int, chunk: int) -> int:
    """The samples of the chunks that have so many."""
    return -(-samples // chunk) * chunk


def _owner(node: fx.Node) -> str:
    """The name of the op's first parameter: ops with the same one are trained from the same pass."""
    return next(iter(parameters_of(node).values()))
