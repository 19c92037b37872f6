"""What the parts of the work need: the graph with the parameters of some moment, its inverse, the settings.

A context is made once in every process. Where it is sent, it is the model that travels, and the graph is traced
anew: a graph's nodes lose what the passes know about them on the way.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from fxinvert.content import content_of
from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.inversion.choice import reconstruction_for
from fxinvert.inversion.inverse_graph import InverseGraph, Reconstructed
from fxinvert.inversion.linearized import QUICK
from fxinvert.labels import is_classification
from fxinvert.linalg import SolveSettings
from fxinvert.linalg.anchored import Method as SolverMethod
from fxinvert.output_target import OutputTarget, check_labels
from fxinvert.passes.flow import Flow
from fxinvert.passes.outputs import Key
from fxinvert.passes.trace import by_sample, interpreted, is_normalized
from fxinvert.rules import RuleSet
from fxinvert.rules.registry import in_force
from fxinvert.settings import check_choice
from fxinvert.training.batch import Batch, Types, check_alike, types_of
from fxinvert.training.budget import SOLVERS, WORK, Budget, Size, budget_for, bytes_of_sample
from fxinvert.training.chunks import Source
from fxinvert.training.data import first_batch

State = dict[str, Tensor]

#: samples that a model is traced with
_EXAMPLE = 2


class Context:
    """The working copy of a model, and the data.

    Args:
        model: the working copy; its parameters are changed in place.
        sources: data in chunks, by name: "train", and "validation" if it is apart.
        output: which output is supervised, if there are several.
        rules: the rules in force.
        reconstruction: how targets are found, see `fxinvert.invert`; `"auto"`: see `fxinvert.inversion.choice`.
        memory_limit: bytes that a task may take, see `fxinvert.training.budget`; by default what `budget_for` tells.
        solvers: of single ops, by node.
        compiled: whether rules are compiled, see `fxinvert.invert`.
        keep_zeros: whether entries of parameters that are zero stay zero.

    Attributes:
        first: the first samples of the training data, which the model is traced with.
        graph: the model's graph.
        nodes: its nodes, by path.
        tensors: its parameters and floating-point buffers, by name.
        sizes: of the equations of ops that are trained, by use, as far as they are known.
        masks: by name, 0 where an entry of a parameter stays zero and 1 elsewhere; of parameters with such entries.

    Raises:
        DataError: there are no data, or there is no such reconstruction.
        TraceError: the model cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source],
        output: Key | tuple[Key, ...] | None = None,
        rules: RuleSet | None = None,
        reconstruction: Reconstructed | Literal["auto"] = "auto",
        memory_limit: int | None = None,
        solvers: Mapping[str, SolverMethod] | None = None,
        compiled: bool = False,
        keep_zeros: bool = False,
    ) -> None:
        check_choice("reconstruction", reconstruction, ("auto", *get_args(Reconstructed)))
        self.model, self.sources = model, dict(sources)
        self.output, self.rules, self.reconstruction = output, rules, reconstruction
        self.solvers, self.compiled = solvers or {}, compiled
        self.first = self._first()
        self._open()
        self.budget = (
            Budget(memory_limit) if memory_limit else budget_for(self._each, self.model.parameters())
        )
        self.masks: State = {}
        if keep_zeros:
            nonzero = {name: (p.detach() != 0).to(p.dtype) for name, p in self.graph.named_parameters()}
            self.masks = {name: mask for name, mask in nonzero.items() if not bool(mask.all())}

    def _first(self) -> Batch:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        device = next((value.device for value in tensors), torch.device("cpu"))
        return first_batch(self.sources["train"].beginning, "train_data", _EXAMPLE, device)

    def _open(self) -> None:
        example = self.first.inputs
        graph = interpreted(self.model, example, output=self.output, rules=self.rules)
        self.graph: fx.GraphModule = by_sample(graph, example, self.rules)
        self.nodes = {n.meta["path"]: n for n in self.graph.graph.nodes if n.op != "output"}
        self.tensors: State = {
            name: value
            for name, value in [*self.graph.named_parameters(), *self.graph.named_buffers()]
            if value.is_floating_point()
        }
        self._each = bytes_of_sample(self.graph, len(self.first))
        self._loaded, self._state = "", State()
        self.sizes: dict[str, Size] = {}
        self._inverses: dict[OutputTarget, InverseGraph] = {}

    @property
    def loaded(self) -> str:
        """The digest of the parameters and buffers as they were loaded; empty where that was not told."""
        return self._loaded

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((value.device for value in self.tensors.values()), torch.device("cpu"))

    @functools.cached_property
    def branches(self) -> bool:
        """Whether paths of the graph part and meet again."""
        return Flow(self.graph).branches

    @functools.cached_property
    def _types(self) -> Types:
        return types_of(self.first)

    def check(self, batch: Batch, where: str) -> None:
        """Checks that a batch is like the first one, and that its labels fit the outputs.

        Args:
            batch: on any device.
            where: how messages call it.

        Raises:
            DataError: it is not, or they do not.
        """
        check_alike(batch, self._types, where, "batch 0 of train_data")
        rows, *shape = self.graph.graph.output_node().all_input_nodes[0].meta["tensor_meta"].shape
        outputs = torch.empty(rows * len(batch) // len(self.first), *shape, device="meta")
        heads, at = Heads.of(self.graph), where
        try:
            pairs = heads.pairs(outputs, batch.labels)
            for head, (own, labels) in zip(heads.heads or (None,), pairs, strict=True):
                at = f"{where}, output {head.key!r}" if head else where
                check_labels(own, labels)
                self._check_rows(own, labels)
        except DataError as error:
            raise DataError(f"{at}: {error}") from error

    def _check_rows(self, outputs: Tensor, labels: Tensor) -> None:
        rows, shape = self.graph.meta.get("rows", 1), outputs.shape
        if rows > 1 and is_classification(labels) and labels.shape == shape[:1] + shape[2:] != shape:
            raise DataError(
                f"the model gives {rows} rows of outputs for each sample, and as many classes, so that class numbers of shape "
                f"{tuple(labels.shape)} could be meant for either axis; train a module that calls the model and returns "
                "y.unflatten(0, (len(x), -1)).movedim(-1, 1)"
            )

    def inverse(self, output_target: OutputTarget) -> InverseGraph:
        """The graph's inverse for an output target; made once, and with its factorizations shared by all of them."""
        if output_target not in self._inverses and self._inverses:
            other = next(iter(self._inverses.values()))
            self._inverses[output_target] = other.towards(output_target)
        if output_target not in self._inverses:
            how = self.reconstruction
            if how == "auto":
                how = reconstruction_for(self.graph, self.rules)
            settings = SolveSettings(
                memory_limit=self.budget.limit,
                memory_share=SOLVERS,
                work_share=WORK,
                methods=self.solvers,
                compiled=self.compiled,
            )
            self._inverses[output_target] = InverseGraph(
                self.graph, output_target, in_force(self.rules), settings, reconstruction=how, effort=QUICK
            )
        return self._inverses[output_target]

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """A batch, in as many parts as it takes for the values and targets of each to keep to the budget.

        Raises:
            SolveError: not even one sample does.
        """
        slices = list(self.budget.parts(batch, self._each))
        if len(slices) == 1:
            yield batch
            return
        for rows in slices:
            yield batch.map(lambda value: value[rows]).to(self.device)  # noqa: B023

    def mask(self, changes: Mapping[str, Tensor]) -> State:
        """Changes of tensors, by name, that leave alone what stays zero."""
        return {name: v * self.masks[name] if name in self.masks else v for name, v in changes.items()}

    def keep_zeros(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets what stays zero to zero, in place."""
        with torch.no_grad():
            for name in self.masks.keys() & tensors.keys():
                tensors[name].mul_(self.masks[name])

    def state(self) -> State:
        """A copy of the parameters and buffers as they are, of those that have changed since it was last asked for."""
        before = self._state
        self._state = {
            name: before[name]
            if name in before and torch.equal(before[name], value)
            else value.detach().clone()
            for name, value in self.tensors.items()
        }
        return dict(self._state)

    def load(self, state: Mapping[str, Tensor], digest: str = "") -> None:
        """Takes over parameters and buffers; nothing is done if the digest says that they are there already."""
        if digest and digest == self._loaded:
            return
        with torch.no_grad():
            for name, value in state.items():
                if not torch.equal(self.tensors[name], value):  # factorizations of what stays are kept
                    self.tensors[name].copy_(value)
        self._loaded = digest

    def holds(self, state: Mapping[str, Tensor]) -> bool:
        """Whether parameters and buffers are these."""
        return all(torch.equal(self.tensors[name], value) for name, value in state.items())

    def __getstate__(self) -> dict[str, Any]:
        if is_normalized(self.model):
            raise DataError(
                "the model is a traced graph, which other processes cannot be sent; give the module itself"
            )
        kept = "model first output rules reconstruction budget solvers compiled masks".split()
        # what only this process can read is sent chunk by chunk
        sources = {name: source for name, source in self.sources.items() if not source.local}
        return {name: vars(self)[name] for name in kept} | {"sources": sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


class Digests:
    """Digests of states; what has not changed since the last one is not read again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, str]] = {}

    def of(self, state: Mapping[str, Tensor]) -> str:
        """A digest of names, shapes, types and values."""
        for name, value in state.items():
            if name not in self._known or self._known[name][0] is not value:
                self._known[name] = value, digest_of({name: value})
        told = "".join(self._known[name][1] for name in sorted(state))
        return hashlib.sha256(told.encode()).hexdigest()


def digest_of(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, shapes, types and values."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        sha.update(content_of(value))
    return sha.hexdigest()
