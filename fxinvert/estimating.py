"""Estimating: the jobs of a method are measured on a few samples, before any work."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fxinvert.estimates import Estimate, Wave
from fxinvert.identity import check_plan
from fxinvert.inversion.inverse_graph import Reconstructed
from fxinvert.passes.checks import check_readable
from fxinvert.passes.outputs import Key
from fxinvert.passes.partition import partition
from fxinvert.passes.plan import Plan, Segment
from fxinvert.rules import RuleSet
from fxinvert.scheduling.executor import torch_threads
from fxinvert.settings import check_counts
from fxinvert.training import Method
from fxinvert.training.batch import checked, tensors_of
from fxinvert.training.chunks import CHUNK, source_of
from fxinvert.training.context import Context
from fxinvert.training.costs import Estimated, Probe, Stage
from fxinvert.training.judge import Candidate, Share, tallies
from fxinvert.training.named import method_named
from fxinvert.training.order import ordered_waves
from fxinvert.training.recalibrate import recalibration


def estimate(
    model: nn.Module,
    example_inputs: Any,
    plan: Plan | None = None,
    *,
    samples: int,
    batch: int = 256,
    chunk: int = CHUNK,
    method: str | Method = "closed_form",
    schedule: str = "auto",
    only: Sequence[str] | str | None = None,
    share: Share = "searched",
    recalibrate: bool = False,
    output: Key | tuple[Key, ...] | None = None,
    reconstruction: Reconstructed | Literal["auto"] = "auto",
    rules: RuleSet | None = None,
    memory_limit: int | None = None,
) -> Estimate:
    """Measures, on copies of a few samples, what a sweep of `fxinvert.post_train` costs with the same arguments.

    Args:
        model: the model, which stays as it is.
        example_inputs: of a few samples, as for `fxinvert.trace`.
        plan: the segments; by default one per trainable op.
        samples: how many there will be.
        batch, chunk: samples per batch, and batches per chunk.
        method: by name, or an object. One of your own is estimated if it has the method `stages` of
            `fxinvert.training.Estimated`.
        schedule, only, share, recalibrate, output, reconstruction, rules, memory_limit: see `fxinvert.post_train`.

    Raises:
        TraceError: the model cannot be captured.
        NoRuleError: an op on the way has no rule.
        DataError, CutError: settings, samples or plan do not fit.
    """
    check_counts(samples=samples, batch=batch, chunk=chunk, memory_limit=memory_limit)
    check_readable(model)
    trainer = method_named(method)
    few = checked((example_inputs, torch.zeros(len(tensors_of(example_inputs)[0]))), "example_inputs")
    context = Context(
        copy.deepcopy(model),
        {"train": source_of([tuple(few)])},
        output,
        rules,
        reconstruction,
        memory_limit=memory_limit,
    )
    few = few.to(context.device)
    plan = plan or partition(context.graph, rules=rules)
    check_plan(plan, context)
    cost = sum(segment.cost for segment in plan.segments)
    with torch_threads(1):
        probe = Probe(context, few, samples, batch, min(batch * chunk, samples), cost)

        def stages(segments: Sequence[Segment]) -> Iterator[Stage]:
            assert isinstance(trainer, Estimated)
            for stage in trainer.stages(probe, segments):
                yield stage
                if recalibrate:
                    yield from recalibration(probe)

        context.load({}, "as given")
        measured = tuple(
            Wave(
                tuple(segment.name for segment in segments),
                tuple(stages(segments)) if isinstance(trainer, Estimated) else None,
                probe.judged(name for segment in segments for name in segment.parameters),
            )
            for segments in ordered_waves(plan, schedule, trainer, context, only)
        )
        forward, _ = probe.measured(tallies, {"proposals": [[]], "candidates": [Candidate(0, ())]})
    return Estimate(
        method=trainer.name,
        waves=measured,
        forward=forward,
        state=sum(value.nbytes for value in context.state().values()),
        samples=samples,
        chunk=min(batch * chunk, samples),
        batch=batch,
        measured=probe.rows,
        share=share,
    )
