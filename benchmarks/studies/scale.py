"""Scale: what a sweep costs as the network, its inputs, the data and the number of workers grow."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxinvert
from benchmarks.studies import scale_page
from benchmarks.studies.frame import Run, Study
from fxinvert import models
from fxinvert.scheduling.journal import read_log

#: one axis is varied at a time, the others stay here; 0 workers: in the process itself
BASE = {"depth": 4, "width": 16, "size": 16, "samples": 1024, "workers": 0}
AXES = {
    "depth": (2, 4, 8, 16),
    "width": (12, 16, 24, 32),
    "size": (12, 16, 24, 32),
    "samples": (512, 1024, 2048, 4096),
    "workers": (1, 2, 4),
}
#: what belongs to the quick form
QUICK = {"depth": 2, "samples": 512, "workers": 1}
BATCH, CLASSES = 64, 10
#: forward passes over all samples that are timed; the least time counts
FORWARDS = 3
#: of a sweep and a forward pass that come first, so that the others find everything loaded
WARM = {"depth": 1, "width": 2, "size": 4, "samples": 64, "workers": 0}


def runs(seeds: int) -> Iterator[Run]:
    """Every value of every axis; times hardly depend on the seed, so that there is one."""
    small = [{**BASE, axis: value} for axis, value in QUICK.items()]
    varied = [{**BASE, axis: value} for axis, values in AXES.items() for value in values]
    for given in [BASE, *(settings for settings in varied if settings != BASE)]:
        name = "-".join(f"{axis}{value}" for axis, value in given.items())
        yield Run(name, given, quick=given in (BASE, *small))


def measure(run: Run) -> dict[str, Any]:
    """A sweep in a process of its own, whose memory nobody has used before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(swept, run.settings).result()


def swept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Processor seconds and memory of a parallel sweep, and of a forward pass over the same samples."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if settings != WARM:
        swept(WARM)
    model = network(settings["depth"], settings["width"])
    x = torch.rand(settings["samples"], 1, settings["size"], settings["size"])
    data = models.batches(x, torch.randint(0, CLASSES, (len(x),)), BATCH)
    ctypes.CDLL(None).malloc_trim(0)  # what was used and is free would be used again unseen
    before = peak(forget=True)
    seconds = sweep(model, data, settings["workers"])
    grown = peak() - before
    with torch.no_grad():
        forward = min(spent(lambda: [model(inputs) for inputs, _ in data]) for _ in range(FORWARDS))
    return {"seconds": seconds, "forward": forward, "bytes": grown}


def network(depth: int, width: int) -> nn.Module:
    """Convolutions that keep the size of their images, and a linear layer on what is left of it."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 1, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES)).eval()


def sweep(model: nn.Module, data: Any, workers: int) -> float:
    """Processor seconds of a sweep; with workers, those of the main process and an equal share of what they did."""
    where: dict[str, Any] = {"executor": "processes", "workers": workers} if workers else {}
    with tempfile.TemporaryDirectory() as folder:
        main = spent(
            lambda: fxinvert.post_train(
                model,
                data,
                schedule="parallel",
                sweeps=1,
                output_target="cross_entropy",
                chunk=1,
                run_directory=folder,
                progress=False,
                **where,
            )
        )
        if not workers:
            return main
        tasks: list[float] = [line["processor"] for line in read_log(Path(folder)) if line["event"] == "task"]
        return main + sum(tasks) / workers


def spent(function: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def peak(forget: bool = False) -> int:
    """Bytes of memory that this process has had at most, since it last forgot that."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


STUDY = Study("scale", 1, runs, measure, scale_page.section, scale_page.pictures)
