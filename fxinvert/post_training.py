"""Post-train: sweep over the segments, update each in closed form, keep what is better on held-out data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import CutError, DataError
from fxinvert.inversion.inverse_graph import InverseGraph, invert
from fxinvert.output_target import OutputTargetFunction, automatic, output_target
from fxinvert.passes import trace
from fxinvert.passes.capture import attribute, evaluating
from fxinvert.passes.partition import partition
from fxinvert.passes.plan import Plan
from fxinvert.progress import Advance, progress_bar
from fxinvert.result import PostTrainingResult, Record
from fxinvert.rules import RuleSet
from fxinvert.scheduling import Executor, executor_named, waves
from fxinvert.scheduling.waves import Wave
from fxinvert.training import Batches, Metrics, Step, Update, evaluate, search_step, update_ops

METHODS = ("closed_form",)
#: shares of the damping that are tried with every update
DAMPINGS = (1.0, 0.5)

State = dict[str, Tensor]


def post_train(
    model: nn.Module,
    train_data: Iterable[Any],
    *,
    plan: Plan | None = None,
    method: str = "closed_form",
    schedule: str = "sequential",
    output_target: str | OutputTargetFunction = "auto",
    sweeps: int = 3,
    validation_data: Iterable[Any] | None = None,
    executor: str | Executor = "serial",
    damping: float = 1e-2,
    satisfied_weight: float = 0.1,
    output: int | str | None = None,
    rules: RuleSet | None = None,
    progress: bool | None = None,
) -> PostTrainingResult:
    """Post-trains a model without back-propagating through it.

    Every sweep walks the segments; for each, the inverse graph says what its ops should have produced, sums over the
    training data give the least-squares change of their parameters, and the step is searched on held-out loss. The
    model given is not touched, and what is returned is never worse on the held-out data, in loss or accuracy.

    Args:
        model: the model; any module that `fxinvert.trace` captures.
        train_data: `(inputs, labels)` batches, iterable more than once.
        plan: from `fxinvert.partition`; by default one segment per trainable op.
        method: `"closed_form"`.
        schedule: `"sequential"` (each segment sees what the updated earlier ones produce) or `"parallel"` (all from
            one snapshot).
        output_target: what the output should have been, by name or a callable of outputs and labels; `"auto"` chooses
            by held-out loss after the first sweep.
        sweeps: how many at most; fewer if one brings nothing.
        validation_data: what steps are judged on; by default a fifth of `train_data` is kept aside.
        executor: `"serial"`.
        damping: ρ, relative to the mean of the Gram matrix's diagonal; half of it is tried too, and held-out loss
            decides.
        satisfied_weight: weight of a sample whose output is its own target; the others weigh 1.
        output: which output is supervised, by index or key, if there are several.
        rules: the rules in force.
        progress: whether to show a progress bar; None: on a terminal.

    Raises:
        TraceError: the model cannot be captured.
        NoRuleError: an op on the way has no rule.
        DataError: data, labels or settings do not fit.
        CutError: the plan was made for another graph.
    """
    began = time.perf_counter()
    if method not in METHODS:
        raise DataError(f"unknown method {method!r}; known is {', '.join(map(repr, METHODS))}")
    if sweeps < 1 or damping < 0 or not 0 <= satisfied_weight <= 1:
        raise DataError(
            f"sweeps={sweeps}, damping={damping}, satisfied_weight={satisfied_weight}: "
            "needed are at least 1 sweep, damping ≥ 0, and a weight between 0 and 1"
        )
    updated = copy.deepcopy(model)
    device = next((t.device for t in [*updated.parameters(), *updated.buffers()]), torch.device("cpu"))
    train, held_out, notes = _split(train_data, validation_data, device)
    first = next(iter(train))
    graph = trace(updated, tuple(value[:2] for value in first.inputs), output=output, rules=rules)
    run = _Run(
        graph=graph,
        plan=plan or partition(graph, rules=rules),
        train=train,
        held_out=held_out,
        executor=executor_named(executor),
        damping=damping,
        satisfied_weight=satisfied_weight,
        rules=rules,
        records=[],
    )
    ordered = waves(run.plan, schedule)
    candidates = automatic(first.labels) if output_target == "auto" else [_named(output_target)]
    baseline = run.measure()
    best = _Best(baseline, run.state())
    total = len(ordered) * (sweeps + len(candidates) - 1)
    with progress_bar(total, progress) as advance:
        chosen = _first_sweep(run, ordered, candidates, best, advance)
        for sweep in range(2, sweeps + 1):
            before = best.latest
            run.sweep(sweep, ordered, chosen, best, advance)
            if best.latest == before:
                break
    run.load(best.state)
    changed = [
        name for name, value in model.named_parameters() if not torch.equal(value, attribute(updated, name))
    ]
    return PostTrainingResult(
        model=updated,
        baseline=baseline,
        final=best.metrics,
        history=tuple(run.records),
        plan=run.plan,
        output_target=chosen.output_target.name,
        changed=tuple(changed),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


_named = output_target


@dataclass
class _Best:
    """The best state seen that is no worse than the baseline, and the metrics of the latest state."""

    metrics: Metrics
    state: State

    def __post_init__(self) -> None:
        self.baseline = self.latest = self.metrics

    def see(self, metrics: Metrics, state: Callable[[], State]) -> None:
        self.latest = metrics
        if metrics.loss < self.metrics.loss and metrics.no_worse_than(self.baseline):
            self.metrics, self.state = metrics, state()


@dataclass
class _Run:
    """The working copy's graph, its data, and what was tried."""

    graph: fx.GraphModule
    plan: Plan
    train: Batches
    held_out: Batches
    executor: Executor
    damping: float
    satisfied_weight: float
    rules: RuleSet | None
    records: list[Record]

    def __post_init__(self) -> None:
        self.nodes = {n.meta["path"]: n for n in self.graph.graph.nodes if n.op != "output"}
        names = dict.fromkeys(name for segment in self.plan.segments for name in segment.parameters)
        known = dict(self.graph.named_parameters(remove_duplicate=False)) | self.nodes
        for name in [*names, *(path for segment in self.plan.segments for path in segment.trained)]:
            if name not in known:
                raise CutError(f"the plan was made for another graph: this one has no {name!r}")
        self.parameters: State = {name: attribute(self.graph, name) for name in names}

    def state(self) -> State:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def load(self, state: State) -> None:
        with torch.no_grad():
            for name, value in state.items():
                self.parameters[name].copy_(value)

    def measure(self) -> Metrics:
        with torch.no_grad(), evaluating(self.graph):
            return evaluate(self.graph, self.held_out)

    def inverse(self, choice: Any) -> InverseGraph:
        return invert(self.graph, output_target=choice, rules=self.rules)

    def sweep(
        self, number: int, ordered: Sequence[Wave], inverse: InverseGraph, best: _Best, advance: Advance
    ) -> None:
        for wave in ordered:
            began = time.perf_counter()
            before = best.latest
            nodes = [self.nodes[path] for segment in wave for path in segment.trained]
            tried = update_ops(
                inverse,
                nodes,
                self.train,
                dampings=[share * self.damping for share in DAMPINGS],
                satisfied_weight=self.satisfied_weight,
                run=self.executor.map,
            )
            step, updates = self._best_of(tried, before)
            best.see(step.metrics, self.state)
            self.records.append(
                Record(
                    sweep=number,
                    segments=tuple(segment.name for segment in wave),
                    output_target=inverse.output_target.name,
                    step=step.size,
                    before=before,
                    after=step.metrics,
                    explained={update.op: update.solved.explained for update in updates},
                    damping={update.op: update.solved.damping for update in updates},
                    seconds=time.perf_counter() - began,
                )
            )
            advance(f"sweep {number}, {', '.join(segment.name for segment in wave)}: {step.metrics}")

    def _best_of(self, tried: Sequence[list[Update]], start: Metrics) -> tuple[Step, list[Update]]:
        """Moves along the updates, and by the step, that have the least held-out loss."""
        found = (Step(0.0, start), tried[0], self.state())
        unmoved = found[2]
        for updates in tried:
            self.load(unmoved)
            changes = {name: change for update in updates for name, change in update.changes.items()}
            step = search_step(self.parameters, changes, self.measure, start)
            if step.metrics.loss < found[0].metrics.loss:
                found = (step, updates, self.state())
        self.load(found[2])
        return found[:2]


def _first_sweep(
    run: _Run, ordered: Sequence[Wave], candidates: Sequence[Any], best: _Best, advance: Advance
) -> InverseGraph:
    """Sweeps once with every candidate output target, from the same start, and goes on from the best."""
    start, tried = run.state(), []
    for candidate in candidates:
        run.load(start)
        best.latest = best.baseline
        inverse = run.inverse(candidate)
        run.sweep(1, ordered, inverse, best, advance)
        tried.append((best.latest, run.state(), inverse))
    best.latest, state, inverse = min(tried, key=lambda result: result[0].loss)
    run.load(state)
    return inverse


def _split(
    train_data: Iterable[Any], validation_data: Iterable[Any] | None, device: torch.device
) -> tuple[Batches, Batches, list[str]]:
    """Training and held-out batches, and what to note about them."""
    train = Batches(train_data, device)
    if validation_data is not None:
        return train, Batches(validation_data, device, "validation_data"), []
    parts = train.of("train"), train.of("held_out")
    if all(list(islice(iter(part), 1)) for part in parts):
        return *parts, []
    return train, train, ["too few samples to keep some aside: steps were judged on the training data"]
