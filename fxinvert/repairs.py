"""Repairing one segment at a time: which of them can put right, alone, what is wrong.

The corrections of single samples tell where the output is easiest to move, and not which layer is damaged: what one layer spoils
others can make up for. So every segment is trained by itself, on the loss, while all else stays: the damaged one can
be put right altogether, the others only so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxinvert.labels import is_classification
from fxinvert.modes import as_usual
from fxinvert.notebook import table
from fxinvert.passes import trace
from fxinvert.passes.checks import check_readable
from fxinvert.passes.outputs import Key
from fxinvert.passes.partition import partition
from fxinvert.passes.plan import Plan
from fxinvert.post_training import post_train
from fxinvert.rules import RuleSet
from fxinvert.scheduling.waves import trained_segments
from fxinvert.training import Batches
from fxinvert.training.auto import Auto
from fxinvert.training.metrics import Metrics

#: a solve in closed form, then few passes of gradients: what is asked for is an order, not the best weights
METHOD = Auto(learning_rates=(1e-2,), runs=2)


@dataclass(frozen=True)
class Repairs:
    """What repairing each segment alone brings.

    Attributes:
        baseline: of the model as given, on held-out data.
        repaired: by segment, of the model with that segment repaired; in the order of the plan.
    """

    baseline: Metrics
    repaired: Mapping[str, Metrics]

    @property
    def gained(self) -> dict[str, float]:
        """By segment, the held-out loss that repairing it alone removes; the largest gain first."""
        found = {name: self.baseline.loss - metrics.loss for name, metrics in self.repaired.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; segments in the order of their gains."""
        return {
            "baseline": self.baseline.to_dict(),
            "segments": [
                {"segment": name, "gained": gain} | self.repaired[name].to_dict()
                for name, gain in self.gained.items()
            ],
        }

    def __repr__(self) -> str:
        width = max(map(len, self.repaired), default=0)
        rows = [f"Repairs of single segments, before {self.baseline}"]
        rows += [
            f"  {name:<{width}}  gains {gain:.4f}: {self.repaired[name]}"
            for name, gain in self.gained.items()
        ]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        rows = [(name, gain, str(self.repaired[name])) for name, gain in self.gained.items()]
        return table(
            "Repairs", ("segment", "held-out loss gained", "then"), rows, [f"before: {self.baseline}"]
        )


@as_usual()
def repair_alone(
    model: nn.Module,
    train_data: Any,
    *,
    plan: Plan | None = None,
    validation_data: Any = None,
    output: Key | tuple[Key, ...] | None = None,
    rules: RuleSet | None = None,
) -> Repairs:
    """Post-trains each segment by itself, all others as they are; the first in `Repairs.gained` is the suspect.

    With noise added to one layer of a converged reference network it is that layer in 12 of 16 cases, the second in three
    more (docs/report.md).

    Args:
        model: as for `fxinvert.post_train`; it stays as it is.
        train_data: as for `fxinvert.post_train`; gains are measured on a part that is kept aside.
        plan: whose segments are repaired; by default one per trainable op.
        validation_data: to measure on instead.
        output: which output is supervised.
        rules: the rules in force.

    Raises:
        TraceError: the model cannot be captured.
        CutError: the plan was made for another graph.
        DataError: the data do not fit, or nothing can be trained.
    """
    check_readable(model)
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    first = next(iter(Batches(train_data, device)))
    plan = plan or partition(trace(model, first.inputs, output=output, rules=rules), rules=rules)
    classes = [is_classification(own) for own in tree_leaves(first.labels)]
    target = "cross_entropy" if all(classes) else "auto" if any(classes) else "regression"
    results = {
        segment.name: post_train(
            model,
            train_data,
            plan=plan,
            only=[segment.name],
            method=METHOD,
            sweeps=1,
            output_target=target,
            validation_data=validation_data,
            output=output,
            rules=rules,
            progress=False,
        )
        for segment in trained_segments(plan, METHOD.follows_gradients)
    }
    baseline = next(iter(results.values())).baseline
    return Repairs(baseline, {name: result.final for name, result in results.items()})
