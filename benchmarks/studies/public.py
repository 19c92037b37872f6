"""Public models: how far each goes, from the trace to the proven file, with random weights and whatever image size it takes.

A run is a model of torchvision, timm or transformers, and does the whole road: it is captured, inverted for two samples
and a nudged output, partitioned, trained for one sweep in closed form, and exported with a proof. Nothing is chosen for
any of them. Those of a library that is not installed are left out.
"""

from __future__ import annotations

import importlib.metadata
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fxinvert
from benchmarks.studies import public_page
from benchmarks.studies.frame import Run, Study
from benchmarks.studies.public_models import IMAGES, TRANSFORMERS, built
from benchmarks.studies.public_page import BYTES, SECONDS
from fxinvert.errors import DataError, FxInvertError
from fxinvert.inversion import InverseGraph, output_given
from fxinvert.inversion.choice import reconstruction_for
from fxinvert.passes.flow import Flow

#: samples that are inverted, and that are trained on
SHOWN, TRAINED = 2, 12
#: how far the last feature is moved for a target that the model can nearly reach, of its spread
NUDGE = 0.01


def runs(seeds: int) -> Iterator[Run]:
    """Every model; there is one seed."""
    for library, names in [*IMAGES.items(), ("transformers", TRANSFORMERS)]:
        for name in names:
            yield Run(f"{library}-{name}", {"library": library, "model": name}, needs=library)


def measure(run: Run) -> dict[str, Any]:
    """The road in a process of its own, which may run out of time or memory without harm to others."""
    context = get_context("forkserver")  # what is imported there is imported once
    context.set_forkserver_preload(["benchmarks.studies.public"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sending, run.settings), daemon=True)
    process.start()
    sending.close()
    stages: dict[str, float] = {}
    ended = {"outcome": "gave up", "message": f"more than {SECONDS} s, or {BYTES >> 30} GiB"}
    try:
        while True:
            match receiving.recv():
                case str(stage), float(seconds):
                    stages[stage] = seconds
                case told:
                    ended = told
    except EOFError:
        process.join()
    if not stages and ended["outcome"] == "gave up":
        raise DataError(f"{run.name}: it could not be built")
    return {**ended, "stages": stages, "version": importlib.metadata.version(run.settings["library"])}


def _tell(to: Connection, settings: Mapping[str, Any]) -> None:
    """Sends each stage that was passed, and how it ended."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    declared = operators()
    model, (shown, more) = built(settings["library"], settings["model"], (SHOWN, TRAINED))
    del declared
    began = time.process_time()
    to.send(("build", began))

    def passed(stage: str) -> None:
        nonlocal began
        now = time.process_time()
        to.send((stage, now - began))
        began = now

    try:
        to.send({"outcome": "done", **road(model, shown, more, passed)})
    except FxInvertError as error:
        to.send({"outcome": "refused", "message": f"{type(error).__name__}: {error}"})
    except MemoryError:
        return
    except Exception as error:  # noqa: BLE001 what no user should ever see, and what is looked for here
        to.send({"outcome": "failed", "message": f"{type(error).__name__}: {error}"})


def operators() -> torch.library.Library:
    """torchvision's CUDA build is imported beside a CPU torch, if two of its operators are declared before."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            library.define(  # type: ignore[no-untyped-call]
                f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return library


def road(model: nn.Module, inputs: Any, more: Any, passed: Callable[[str], object]) -> dict[str, Any]:
    """All steps; `passed` is told of each that was gone."""
    graph = fxinvert.trace(model, inputs)
    passed("trace")
    plan = fxinvert.partition(graph)
    trained = sum(len(segment.trained) for segment in plan.segments)
    passed("partition")
    inverse = fxinvert.invert(graph, output_target="regression", reconstruction=reconstruction_for(graph))
    finite, consistency = inverted(inverse, inputs)
    passed("invert")
    # all values of all samples could be much
    parts = [tree_map(lambda v: v[i : i + SHOWN], more) for i in range(0, TRAINED, SHOWN)]  # noqa: B023
    labels = labels_of(torch.cat([inverse.forward(part)[inverse.output_node] for part in parts]))
    result = fxinvert.post_train(
        model,
        [(more, labels)],
        method="closed_form",
        sweeps=1,
        progress=False,
    )
    passed("sweep")
    with tempfile.TemporaryDirectory() as folder:
        fxinvert.export_onnx(result.model, inputs, Path(folder) / "model.onnx")
    passed("export")
    return {"segments": len(plan.segments), "trained": trained, "finite": finite, "consistency": consistency}


def inverted(inverse: InverseGraph, inputs: Any) -> tuple[bool, float]:
    """Whether all targets are finite for an output that the last feature, nudged, leads to, and how far that one misses it."""
    values, last = inverse.forward(inputs), Flow(inverse.graph).line[-2]
    torch.manual_seed(1)
    moved = values[last] + NUDGE * values[last].std() * torch.randn_like(values[last])
    target = output_given(inverse.graph, values, last, moved).detach()
    found = inverse(inputs, target)
    finite = all(bool(torch.isfinite(found.targets[name]).all()) for name in found.names)
    return finite, float(found.consistency(last.meta["path"]).max())


def labels_of(output: Tensor) -> Tensor:
    """Classes at random of scores `(samples, classes)`; values near those of any other output."""
    if output.ndim == 2 and output.is_floating_point():
        return torch.randint(output.shape[1], output.shape[:1])
    return output + output.std() / 10 * torch.randn_like(output)


STUDY = Study("public", 1, runs, measure, public_page.section)
