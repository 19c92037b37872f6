"""Post-training: sweep over the segments, train each, keep what is better on held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.export import ExportedProgram

from fxinvert.copies import changed, copy_of, showing
from fxinvert.errors import DataError
from fxinvert.identity import check_finite, check_plan, identity
from fxinvert.inversion.inverse_graph import Reconstructed
from fxinvert.inversion.invert import check_solvers
from fxinvert.linalg.anchored import Method as SolverMethod
from fxinvert.misreadings import misreadings
from fxinvert.modes import as_usual
from fxinvert.output_target import OutputTargetFunction, automatic
from fxinvert.output_target import output_target as named_target
from fxinvert.passes.checks import check_readable
from fxinvert.passes.outputs import Key
from fxinvert.passes.partition import partition
from fxinvert.passes.plan import Plan
from fxinvert.passes.ready import in_evaluation
from fxinvert.progress import progress_display
from fxinvert.result import PostTrainingResult, Record
from fxinvert.rules import RuleSet
from fxinvert.scheduling import Executor, executor_named
from fxinvert.scheduling.crew import Crew, Task
from fxinvert.scheduling.executor import torch_threads
from fxinvert.scheduling.journal import Journal
from fxinvert.settings import check_choice, check_counts, check_numbers
from fxinvert.survey import parts_of, survey
from fxinvert.training import Method, NormalEquations, Repeating
from fxinvert.training.best import Best
from fxinvert.training.chunks import CHUNK, source_of
from fxinvert.training.confirm import Gain
from fxinvert.training.context import Context
from fxinvert.training.curvature import Curvature
from fxinvert.training.data import Part
from fxinvert.training.fingerprint import Fingerprint
from fxinvert.training.jacobian_rows import JacobianRows
from fxinvert.training.joint import Course
from fxinvert.training.judge import Share
from fxinvert.training.metrics import Tally
from fxinvert.training.named import method_named
from fxinvert.training.order import most_sweeps, ordered_waves
from fxinvert.training.recalibrate import Moments
from fxinvert.training.repeat import FEW
from fxinvert.training.sizes import Quadratic
from fxinvert.training.sweeps import Settings, run_sweeps
from fxinvert.training.wide import WideEquations
from fxinvert.training.work import Following
from fxinvert.untrained import untrained
from fxinvert.workshop import Workshop

#: what results of tasks are made of
KNOWN: list[type] = [
    NormalEquations,
    WideEquations,
    Curvature,
    JacobianRows,
    Tally,
    Gain,
    Moments,
    Fingerprint,
    Quadratic,
    Course,
]

INPUTS = ("updated", "original")


@as_usual()
def post_train(
    model: nn.Module | ExportedProgram,
    train_data: Any,
    *,
    plan: Plan | None = None,
    method: str | Method = "closed_form",
    schedule: str = "auto",
    only: Sequence[str] | str | None = None,
    output_target: str | OutputTargetFunction = "auto",
    sweeps: int | None = None,
    patience: int = 1,
    least_gain: float = 0.0,
    confidence: float = 0.95,
    inputs: str = "updated",
    share: Share = "searched",
    recalibrate: bool = False,
    keep_zeros: bool = False,
    validation_data: Any = None,
    executor: str | Executor = "serial",
    workers: int | None = None,
    threads: int = 1,
    chunk: int = CHUNK,
    retries: int = 2,
    memory_limit: int | None = None,
    solvers: Mapping[str, SolverMethod] | None = None,
    compiled: bool = False,
    run_directory: str | Path | Journal | None = None,
    damping: float = 1e-2,
    satisfied_weight: float = 0.1,
    output: Key | tuple[Key, ...] | None = None,
    reconstruction: Reconstructed | Literal["auto"] = "auto",
    rules: RuleSet | None = None,
    progress: bool | None = None,
    watch: Callable[[Record, nn.Module], None] | None = None,
) -> PostTrainingResult:
    """Post-trains a model without back-propagating through it.

    Every sweep walks the segments; for each, the inverse graph says what its ops should have produced, sums over the
    training data give the least-squares change of their parameters, and the step is searched on held-out loss. The
    model given is not touched, and what is returned is never worse on the held-out data, in loss or accuracy.

    Args:
        model: the model; any module that `fxinvert.trace` captures. Of an exported program its module in evaluation mode
            is trained and returned, whose state dict fits the model that was exported.
        train_data: a pair `(inputs, labels)` of all samples, or a `Dataset` of them; `(inputs, labels)` batches, iterable
            more than once, as a `DataLoader`; a factory of such batches, which every process calls for itself; or a list
            of factories, one for each shard of the data. In place of a pair a mapping by name will do, with the labels as `labels`.
        plan: from `fxinvert.partition`; by default one segment per trainable op.
        method: how segments are trained: `"auto"` (gradients of everything at once, also after a solve where no batch norm is),
            `"closed_form"`, `"gauss_newton"` (all ops from one linear system), `"gradient"`, `"joint"`, or an object of
            `fxinvert.training` with settings of its own, such as `Joint(alpha=0.3)`.
        schedule: `"sequential"` (each segment sees what the updated earlier ones produce), `"parallel"` (all from one
            snapshot), `"waves"` (those that do not feed one another together) or `"single"` (one segment); `"auto"`:
            the method's own, which is parallel for auto and gauss_newton, and for closed_form where the graph branches, else
            sequential.
        only: the names of the segments to train; by default all.
        output_target: what the output should have been, by name or a callable of outputs and labels; `"auto"` chooses
            by held-out loss, after training the last segment with each.
        sweeps: how many at most; fewer if they bring nothing. By default 3, and 6 in closed form where the graph branches.
        patience: after how many sweeps in a row that bring too little to stop.
        least_gain: what a sweep must at least bring, as a share of the held-out loss.
        confidence: with which held-out samples must confirm that the loss has fallen and that answers have become no
            worse, from 0.5 (any gain does) to below 1; otherwise the model is returned as it was (see
            `fxinvert.training.confirm`).
        inputs: what a segment's input and target follow from: the `"updated"` earlier segments, or the `"original"`
            ones that the sweep began with; in a parallel schedule they are the same.
        share: how updates that were found together share the correction, so that they do not overshoot: `"searched"`,
            `"equal"`, `"explained"` (in proportion to what each explains) or `"none"`.
        recalibrate: whether batch-norm statistics are estimated anew after every update.
        keep_zeros: whether entries of parameters that are zero stay zero, as after pruning.
        validation_data: what steps are judged on; by default a fifth of `train_data` is kept aside.
        executor: where work is done: `"serial"`, `"processes"`, `"ray"`, or an executor of your own. The result is the
            same, to the last bit.
        workers: of the executor; by default as many as there are cores.
        threads: of torch, in every task: sums that more threads share are rounded differently.
        chunk: batches per task.
        retries: how often a task is tried again that failed or whose worker died.
        memory_limit: bytes that every task may take, besides its data and copies of the parameters, see
            `fxinvert.training.budget`: solvers are chosen among those that fit, batches are worked on in parts, and layers
            whose Gram matrix does not fit are solved from rows. By default 2 GiB, or what a sample of the model takes, or
            the sums of its largest table. Methods that follow gradients take batches as they are.
        solvers: of single ops, by node, where they are not to be chosen, see `fxinvert.invert`.
        compiled: whether rules are compiled, see `fxinvert.invert`: it pays where many batches are inverted node by node.
        run_directory: where finished work is written; called again with the same arguments after a crash, the work
            goes on, and ends with the same result.
        damping: ρ of the closed form, relative to the mean of the Gram matrix's diagonal; half of it is tried too, and
            held-out loss decides.
        satisfied_weight: in the closed form, weight of a sample whose output is its own target; the others weigh 1.
        output: which output is supervised, by index or key, if there are several; or a tuple of those that are, whose
            labels come as a mapping by name, or in that order.
        reconstruction: how targets are found, see `fxinvert.invert`: `"nodewise"`, `"linearized"`; `"auto"`: node by
            node on chains, linearized where the graph branches or a chain's op takes and gives more than 8,192 numbers.
        rules: the rules in force.
        progress: whether to show progress; None: on a terminal.
        watch: is called after every step with its record and the model as it would be returned if nothing followed, a copy
            of its own: to save it, or to look at it before all is done.

    Raises:
        TraceError: the model cannot be captured.
        NoRuleError: an op on the way has no rule.
        DataError: data, labels or settings do not fit, or a run directory holds another run.
        CutError: the plan was made for another graph, or has no such segments.
        TaskError: a task failed as often as it may.
    """
    began = time.perf_counter()
    if isinstance(model, ExportedProgram):
        model = in_evaluation(model.module())
    check_readable(model)
    check_counts(sweeps=sweeps, memory_limit=memory_limit, patience=patience, threads=threads, chunk=chunk)
    check_counts(least=0, retries=retries)
    check_numbers("a probability from 0.5 to below 1", lambda p: 0.5 <= p < 1, confidence=confidence)
    check_numbers("a share of at least 0", lambda g: g >= 0, least_gain=least_gain)
    check_choice("inputs", inputs, INPUTS)
    if run_directory == "" or not isinstance(run_directory, str | Path | Journal | None):
        raise DataError(f"run_directory={run_directory!r}; give a path, or None to write nothing")
    check_choice("share", share, get_args(Share))
    trainer = method_named(method, damping, satisfied_weight)
    hand = executor_named(executor, workers)
    updated = copy_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        sources = {"train": source_of(train_data, "train_data", chunk)}
        if validation_data is not None:
            sources["validation"] = source_of(validation_data, "validation_data", chunk)
        context = Context(
            updated, sources, output, rules, reconstruction, memory_limit, solvers, compiled, keep_zeros
        )
        check_solvers(context.graph, context.solvers)
        plan = plan or partition(context.graph, rules=rules)
        check_plan(plan, context)
        check_finite(plan, context)
        ordered = ordered_waves(plan, schedule, trainer, context, only)
        sweeps = sweeps or most_sweeps(schedule, trainer, context)
        settings = Settings(
            sweeps, share, inputs == "original", recalibrate, patience, least_gain, confidence
        )
        targets = (
            automatic(context.first.labels) if output_target == "auto" else [named_target(output_target)]
        )
        journal = run_directory
        if isinstance(journal, str | Path):
            journal = stack.enter_context(open_journal(Path(journal)))
        hand.open(threads, None if journal is None else journal.scratch)
        stack.callback(hand.close)
        crew = Crew(hand, journal.store, retries, journal.note) if journal else Crew(hand, retries=retries)
        shared = hand.share(context)

        def ask(look: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
            tasks = (Task(i, f"survey {i}", look, (shared, *own)) for i, own in enumerate(arguments))
            return Crew(hand, retries=retries).run(tasks)

        judged: dict[str, Part] = {"validation": "all"} if "validation" in sources else {"train": "held_out"}
        surveyed = {
            name: survey(name, context, hand, journal is not None, judged.get(name), ask)
            for name in context.sources
        }
        feeds, notes = parts_of(surveyed)
        if isinstance(output_target, str) and output_target not in ("regression", "soft"):
            notes += misreadings(context.graph, feeds["held_out"].sample.batches() or [context.first])
        if journal is not None:
            journal.is_about(identity(context, plan, feeds, (trainer, settings, ordered, targets, threads)))
        if isinstance(trainer, Repeating):
            samples = feeds["train"].size
            settings = replace(settings, folds=trainer.folds_of(samples), in_doubt=samples not in FEW)
        total = len(ordered) * sweeps + (len(targets) if len(targets) > 1 else 0)
        if settings.folds > 1 and not settings.in_doubt:
            total *= 1 + settings.folds
        with progress_display(total, progress) as display:
            shop = Workshop(crew, shared, feeds, targets[0], display)
            shown = None if watch is None else showing(watch, model)
            best, records = run_sweeps(shop, trainer, ordered, targets, settings, display.advance, shown)
        context.load(best.state)
        notes += _unconfirmed(best, confidence)
        if journal is not None:
            journal.note("trained", before=str(best.baseline), after=str(best.metrics))
    return PostTrainingResult(
        model=updated,
        baseline=best.baseline,
        final=best.metrics,
        history=tuple(records),
        plan=plan,
        output_target=shop.output_target.name,
        changed=changed(model, updated),
        notes=(*notes, *untrained(plan, context.graph, isinstance(trainer, Following))),
        seconds=time.perf_counter() - began,
    )


def open_journal(folder: Path) -> Journal:
    """The journal of a run in a folder, for a `with` block.

    Raises:
        DataError: another process has it open, or it cannot be written.
    """
    return Journal(folder, KNOWN)


def _unconfirmed(best: Best, confidence: float) -> list[str]:
    gain, unseen = best.gain, best.unseen
    if gain is None or best.metrics is not best.baseline:
        return []
    others = f" and {unseen.loss.samples} that training was repeated without" if unseen else ""
    note = (
        f"the model is returned as it was: {gain}, which {gain.loss.samples} samples{others} do not confirm with "
        f"confidence {confidence:g}; more held-out samples may, and confidence=0.5 takes any gain"
    )
    return [note]
