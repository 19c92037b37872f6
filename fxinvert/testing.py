"""For authors of rules: checks that a rule keeps the promises that every rule of fxinvert keeps.

    from fxinvert.testing import check_rule

    def test_my_module() -> None:
        print(check_rule(MyModule(), torch.randn(8, 3, 16)))

The properties, with f the op, x0 its input and t a target of its output:

* t = f(x0) gives x0 back;
* a target that some input reaches is reached, unless the certificate says that it was damped or projected;
* no answer is farther from its target than f(x0) was;
* a sample's answer does not depend on the rest of its batch, nor on its place there;
* shape, dtype and device are those of x0;
* the certificate says what is so: residual, distance, status, failed samples;
* a target with NaN leaves its sample at x0, marked as failed, and touches no other;
* where the rule has a `Trainable`, a change ΔΘ of the parameters changes the output, in rows, by Δy = ΔΘ ã.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import DataError, RuleError
from fxinvert.inversion import InverseGraph, invert
from fxinvert.linalg.vectors import per_sample
from fxinvert.passes import trace
from fxinvert.passes.flow import Flow
from fxinvert.rules import Certificate, Rule, RuleSet, Status
from fxinvert.rules.certificate import relative, row_norms
from fxinvert.rules.registry import in_force
from fxinvert.training.promised import check_parameters

#: what a relative error may be, by dtype
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: statuses that promise that the target is reached
REACHED = (Status.PASSED_THROUGH, Status.EXACT, Status.NEAREST)
#: statuses that say honestly that a target that could be reached may not have been
EXCUSED = (Status.DAMPED, Status.PROJECTED)


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` measured; largest values over all samples.

    Attributes:
        op: the op's key.
        origin: file and line of its rule.
        samples: number of samples tried.
        identity: relative distance from the anchor for a target that is the output.
        residual: relative residual of targets that can be reached.
        independence: relative difference between a sample alone and in its batch.
        statuses: that were seen, the strongest promise first.
        condition: condition number, where a certificate tells it.
    """

    op: str
    origin: str
    samples: int
    identity: float
    residual: float
    independence: float
    statuses: tuple[Status, ...]
    condition: float | None

    def __str__(self) -> str:
        words = ", ".join(status.word for status in self.statuses)
        condition = "" if self.condition is None else f", condition {self.condition:.1e}"
        return (
            f"{self.op}: {self.samples} samples, identity {self.identity:.1e}, residual {self.residual:.1e}, "
            f"independence {self.independence:.1e}{condition}; {words}"
        )


def check_rule(
    op: nn.Module | Callable[..., Any],
    samples: Tensor | Sequence[Tensor],
    *,
    rules: RuleSet | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> RuleReport:
    """Checks that the rule for an op has the properties listed above.

    Args:
        op: a module or function of one input; it must come to exactly one op of the graph.
        samples: inputs `(B, …)`, or several batches of them. Three samples or more make the checks sharp.
        rules: the rules in force, by default `default_rules()`.
        dtype: to check in; by default that of the samples. The op is copied, not changed.
        tolerance: largest relative error, by default 1e-8 in float64, 1e-4 in float32.

    Raises:
        AssertionError: a property does not hold; the message names the rule, the sample and the numbers.
        NoRuleError: there is no rule for the op.
        DataError: the op comes to more than one op, or a batch is empty or not floating-point.
    """
    rules = in_force(rules)
    batches = [samples] if isinstance(samples, Tensor) else list(samples)
    if not batches or not all(len(batch) for batch in batches):
        raise DataError("check_rule() needs at least one sample in every batch")
    if not all(batch.is_floating_point() for batch in batches):
        raise DataError(f"check_rule() needs floating-point samples, not {batches[0].dtype}")
    if dtype is not None:
        batches = [batch.to(dtype) for batch in batches]
        op = copy.deepcopy(op).to(dtype) if isinstance(op, nn.Module) else op
    check = _Check(op, batches[0], rules, tolerance)
    try:
        for batch in batches:
            check.run(batch)
    except RuleError as error:
        raise AssertionError(str(error)) from error
    return check.report()


class _Check:
    """One op under test, and the worst that was measured so far."""

    def __init__(
        self, op: nn.Module | Callable[..., Any], example: Tensor, rules: RuleSet, tolerance: float | None
    ) -> None:
        inverse = invert(trace(_as_model(op, rules), example, rules=rules), output_target=_given, rules=rules)
        flow = Flow(inverse.graph)
        nodes = [node for node in flow.nodes if node.op != "placeholder"]
        first = flow.stretches[-1]
        if len(nodes) != 1 and not (first.copies and first.exit is flow.exit):
            listed = ", ".join(node.meta["op"] for node in nodes) or "none"
            raise DataError(
                f"{type(op).__name__} comes to {len(nodes)} ops ({listed}); check_rule() takes one at a time"
            )
        self.inverse: InverseGraph = inverse
        self.rules = rules
        self.rule: Rule = inverse.inverse_of(first).rule
        self.tolerance = tolerance or TOLERANCES[example.dtype]
        self.samples, self.identity, self.residual, self.independence = 0, 0.0, 0.0, 0.0
        self.statuses: list[Status] = []
        self.condition: float | None = None

    def report(self) -> RuleReport:
        return RuleReport(
            op=self.rule.key,
            origin=self.rule.origin,
            samples=self.samples,
            identity=self.identity,
            residual=self.residual,
            independence=self.independence,
            statuses=tuple(sorted(set(self.statuses), key=lambda status: status.severity)),
            condition=self.condition,
        )

    @torch.no_grad()
    def run(self, x: Tensor) -> None:
        """All properties on one batch."""
        self.samples += len(x)
        draw = torch.Generator().manual_seed(len(x))
        # another input of the same kind: the neighbour's values, scaled; as they are where that leaves the domain
        other = x.roll(1, 0) * (torch.rand(x.shape, generator=draw) + 0.5).to(x)
        y, reachable = self.inverse.graph(x), self.inverse.graph(other)
        outside = ~torch.isfinite(reachable).reshape(len(x), -1).all(1)
        reachable[outside] = self.inverse.graph(x.roll(1, 0))[outside]
        noise = torch.randn(y.shape, generator=draw).to(y)
        spread = float(y.double().std(correction=0)) if y.numel() else 0.0
        anywhere = y + noise * (spread or 1.0)
        self.keeps(x, y)
        self.reaches(x, reachable)
        check_parameters(self.inverse, x, self.rules, self.tolerance)
        for target in (reachable, anywhere):
            answer = self.is_honest(x, target)
            self.is_independent(x, target, answer)
            self.contains_failure(x, target, answer)

    def answer(self, x: Tensor, target: Tensor) -> tuple[Tensor, Certificate]:
        found = self.inverse(x, target)
        return found.targets[found.names[0]], found.certificates[found.names[0]]

    def keeps(self, x: Tensor, y: Tensor) -> None:
        """The inverse of what happened is what happened."""
        value, certificate = self.answer(x, y)
        moved = relative(value - x, x)
        self.identity = max(self.identity, float(moved.max()))
        what = "the target is the output, but the answer is not the input"
        self.expect(what, moved, self.tolerance, certificate)

    def reaches(self, x: Tensor, target: Tensor) -> None:
        """What can be reached is reached, or the certificate excuses it."""
        value, certificate = self.answer(x, target)
        self.expect("samples failed without a reason", certificate.failed.double(), 0, certificate)
        if certificate.status in EXCUSED:
            return
        residual = relative(self.inverse.graph(value) - target, target)
        self.residual = max(self.residual, float(residual.max()))
        self.expect("a target that can be reached is not reached", residual, self.tolerance, certificate)

    def is_honest(self, x: Tensor, target: Tensor) -> Tensor:
        """The certificate says what is so; returns the answer."""
        value, stated = self.answer(x, target)
        self.statuses.append(stated.status)
        self.condition = stated.condition if stated.condition is not None else self.condition
        for name in ("residual", "distance", "failed"):
            shape = tuple(getattr(stated, name).shape)
            if shape != (len(x),):
                raise AssertionError(
                    f"{self._who()}: the certificate's {name} has shape {shape}, not {(len(x),)}"
                )
        residual = relative(self.inverse.graph(value) - target, target)
        before = relative(self.inverse.graph(x) - target, target)
        for what, error in (
            ("samples failed without a reason", stated.failed.double()),
            ("the certificate's residual is not the residual", _difference(stated.residual, residual).abs()),
            (
                "the certificate's distance is not the distance",
                _difference(stated.distance, row_norms(value - x)).abs(),
            ),
            ("the answer is farther from the target than the output was", _difference(residual, before)),
        ):
            self.expect(what, error, self.tolerance, stated)
        if stated.status in REACHED:
            limit = max(self.tolerance, 2 * torch.finfo(x.dtype).eps ** 0.5)
            self.expect("the status says that the target is reached, but it is not", residual, limit, stated)
        return value

    def is_independent(self, x: Tensor, target: Tensor, together: Tensor) -> None:
        """A sample's answer is its own."""
        alone = torch.cat([self.answer(x[i : i + 1], target[i : i + 1])[0] for i in range(len(x))])
        turned, certificate = self.answer(x.flip(0), target.flip(0))
        for what, value in (
            ("a sample alone has another answer than in its batch", alone),
            ("a sample has another answer elsewhere in its batch", turned.flip(0)),
        ):
            error = _apart(value, together, x)
            self.independence = max(self.independence, float(error.max()))
            self.expect(what, error, self.tolerance, certificate)

    def contains_failure(self, x: Tensor, target: Tensor, together: Tensor) -> None:
        """NaN stays in its sample."""
        spoiled = target.clone()
        spoiled[(0,) * target.dim()] = torch.nan
        value, certificate = self.answer(x, spoiled)
        first = torch.arange(len(x), device=x.device) == 0
        what = "NaN in the target of sample 0: "
        wrong = (certificate.failed != first).double()
        self.expect(what + "it is not the failed sample that is marked", wrong, 0, certificate)
        expected = torch.where(per_sample(first, x), x, together)
        error = _apart(value, expected, x)
        self.expect(what + "a sample is not where it belongs", error, self.tolerance, certificate)

    def expect(self, what: str, error: Tensor, limit: float, certificate: Certificate) -> None:
        """Raises unless every sample's error is within the limit; NaN is not."""
        if bool((error <= limit).all()):
            return
        worst = int(torch.where(torch.isnan(error), torch.inf, error).argmax())
        condition = "unknown" if certificate.condition is None else f"{certificate.condition:.1e}"
        raise AssertionError(
            f"{self._who()}: {what}: {float(error[worst]):.3g} at sample {worst} of {len(error)}, at most {limit:.0e} is "
            f"allowed. Certificate: {certificate}; condition {condition}; {certificate.status.value}"
        )

    def _who(self) -> str:
        return f"the rule for {self.rule.key!r} ({self.rule.origin})"


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    """Signed, relative where the expected value is large, absolute where it is small."""
    return (actual - expected) / (1 + expected)


def _apart(value: Tensor, expected: Tensor, x: Tensor) -> Tensor:
    """Distance per sample, relative to the sizes of what is compared."""
    return row_norms(value - expected) / (row_norms(x) + row_norms(expected)).clamp(min=1e-30)


def _given(outputs: Tensor, labels: Tensor) -> Tensor:
    """The output target that is handed in."""
    return labels


def _as_model(op: nn.Module | Callable[..., Any], rules: RuleSet) -> nn.Module:
    """A model that calls the op; a function that tracing must not look inside is put into a graph by hand."""
    if isinstance(op, nn.Module) or not rules.keeps_whole(op):
        return _Applied(op)
    graph = fx.Graph()
    graph.output(graph.call_function(op, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph)


class _Applied(nn.Module):
    def __init__(self, op: Callable[..., Any]) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Any:
        return self.op(x)
