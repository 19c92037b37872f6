"""The frame of the studies: every run is measured once, written whole, and the page follows from the files alone."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks
from benchmarks import document
from benchmarks.__main__ import RESULTS
from benchmarks.studies import STUDIES, baselines, public, public_page
from benchmarks.studies.curve import best, follow
from benchmarks.studies.frame import Outcome, Outcomes, Run, Study, outcomes, perform, table
from benchmarks.studies.statistics import Interval, wilson
from benchmarks.suites import FOLDER, SUITES
from fxinvert import models
from fxinvert.errors import DataError, FxInvertError
from fxinvert.models.samples import OUTPUT, Samples

DONE: list[str] = []


def lines(seeds: int) -> Iterator[Run]:
    for seed in range(seeds):
        yield Run("twice", {"factor": 2}, seed, quick=True)
        yield Run("thrice", {"factor": 3}, seed)


def multiply(run: Run) -> dict[str, Any]:
    if run.settings["factor"] == 0:
        raise DataError("nothing to multiply by")
    DONE.append(run.file)
    return {"product": run.settings["factor"] * (run.seed + 0.5)}


def said(found: Outcomes) -> str:
    return " ".join(str(outcome.result["product"]) for outcome in found)


TOY = Study("toy", 1, lines, multiply, said)


def do(study: Study, folder: Path, seeds: int = 2, **options: Any) -> list[str]:
    """The files of the runs that were done."""
    DONE.clear()
    return [run.file for run, _ in perform(study, folder, table(study, seeds, quick=False), **options)]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    files = ["twice-0.json", "thrice-0.json", "twice-1.json", "thrice-1.json"]
    assert do(TOY, tmp_path) == files == DONE
    assert do(TOY, tmp_path) == DONE == []
    (tmp_path / "toy" / "twice-1.json").unlink()
    assert do(TOY, tmp_path, seeds=3) == ["twice-1.json", "twice-2.json", "thrice-2.json"]
    assert len(do(TOY, tmp_path, fresh=True)) == 4
    assert not list(tmp_path.rglob("*partial*"))


def test_other_settings_and_other_versions_are_measured_anew(tmp_path: Path) -> None:
    do(TOY, tmp_path, seeds=1)
    other = replace(TOY, runs=lambda seeds: [Run("twice", {"factor": 4}), Run("thrice", {"factor": 3})])
    assert do(other, tmp_path) == ["twice-0.json"]
    raised = replace(TOY, version=2)
    assert outcomes(raised, tmp_path) == []
    assert len(do(raised, tmp_path, seeds=1)) == 2


def test_a_result_knows_where_it_comes_from(tmp_path: Path) -> None:
    do(TOY, tmp_path, seeds=1)
    content = json.loads((tmp_path / "toy" / "thrice-0.json").read_text())
    assert content["settings"] == {"factor": 3}
    assert content["result"] == {"product": 1.5}
    assert content["environment"]["torch"] == torch.__version__
    assert content["seconds"] >= 0
    assert said(outcomes(TOY, tmp_path)) == "1.5 1.0"


def test_the_quick_form_is_a_part_of_the_first_seed() -> None:
    assert [run.file for run in table(TOY, 5, quick=True)] == ["twice-0.json"]


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    failing = replace(TOY, runs=lambda seeds: [Run("zero", {"factor": 0}), Run("twice", {"factor": 2})])
    found = [outcome for _, outcome in perform(failing, tmp_path, table(failing, 1, quick=False))]
    assert isinstance(found[0], FxInvertError)
    assert [outcome.run for outcome in outcomes(failing, tmp_path)] == ["twice"]


def test_runs_that_need_what_is_missing_are_left_out() -> None:
    needing = replace(TOY, runs=lambda seeds: [Run("other", {}, needs="no_such_library"), *lines(seeds)])
    assert table(needing, 1, quick=False) == table(TOY, 1, quick=False)


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_road_of_a_public_model(shortcut: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).tanh()
            found: torch.Tensor = self.last(x + y if shortcut else y)
            return found

    torch.manual_seed(0)
    passed: list[str] = []
    found = public.road(Net().eval(), torch.randn(2, 6), torch.randn(12, 6), passed.append)
    assert tuple(passed) == public_page.STAGES
    assert found["trained"] == 2
    assert found["finite"]


def test_the_page_tells_how_far_public_models_went() -> None:
    def outcome(model: str, **result: Any) -> Outcome:
        return Outcome(model, {"library": "lib", "model": model}, 0, "", 0.0, {}, result)

    stages = dict.fromkeys(public_page.STAGES, 1.0)
    text = public_page.section(
        [
            outcome("whole", outcome="done", stages=stages, segments=2, trained=3),
            outcome("half", outcome="refused", stages={"trace": 1.0}, message="TraceError: a | b"),
        ]
    )
    assert "| `lib` | 2 | 1 | 1 | 0 | 0 |" in text
    assert r"| `half` | refused | partition | `TraceError: a \| b` |" in text
    assert "| `whole` | 2 | 3 |" in text


def test_the_page_follows_from_the_files() -> None:
    assert document.text(RESULTS) == document.PAGE.read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_every_file_is_a_line_of_a_table(name: str) -> None:
    study = STUDIES[name]
    known = {run.file: study.key(run.settings, run.seed) for run in study.runs(10)}
    for outcome in outcomes(study, RESULTS):
        assert known[f"{outcome.run}-{outcome.seed}.json"] == outcome.key


def test_every_benchmark_is_a_suite() -> None:
    modules = {
        name: importlib.import_module(f"benchmarks.{name}")
        for _, name, _ in iter_modules(benchmarks.__path__)
    }
    assert {name for name, module in modules.items() if hasattr(module, "run")} == SUITES.keys()
    assert {path.stem for path in (RESULTS / FOLDER).glob("*.json")} <= SUITES.keys()


def test_the_page_on_scaling_tells_what_was_measured() -> None:
    page = (document.PAGE.parent / "scaling.md").read_text()
    ratios = json.loads((RESULTS / FOLDER / "scaling.json").read_text())["ratios"]
    told = {ratio["what"]: ratio for ratio in ratios}
    for workers in ("256", "1,000", "5,000"):
        (found,) = (told[what] for what in told if f" {workers} workers, simulated" in what)
        speedup, alone = re.findall(r"[\d,]+(?= |;)", found["note"])
        assert re.search(rf"\| {workers} \| [\d.]+ \| {speedup} \|", page)
        assert f"| 1 | {alone} | 1 |" in page
    (wall,) = (told[what] for what in told if what.endswith("2 workers, wall time"))
    assert f"two took {wall['ratio']:.2f} of the time" in page


def test_intervals() -> None:
    found = Interval.of([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)
    assert found.verdict == "level"
    assert Interval.of([0.1, 0.11, 0.12]).verdict == "better"
    assert math.isnan(Interval.of([0.1]).half)
    assert wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-3)


def easy() -> tuple[nn.Sequential, Samples]:
    x = torch.randn(120, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return model, Samples((x,), {OUTPUT: (x[:, 0] > 0).long()})


def test_baselines_learn_and_leave_their_model_alone() -> None:
    model, samples = easy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = {"0.weight": (torch.rand(8, 4) > 0.5).float()}
    baselines.apply_masks(model, mask)
    before["0.weight"] = model.get_parameter("0.weight").detach().clone()
    baselines.warm_up(model, samples)
    curve = follow(baselines.adamw(model, samples, 1e-2, 0, masks=mask), samples, {}, seconds=0.5)
    assert best(curve)["held_out"]["score"] > 0.9
    (tuned,) = [
        m for _, m in zip(range(1), baselines.adamw(model, samples, 1e-2, 0, masks=mask), strict=False)
    ]
    assert not tuned.get_parameter("0.weight")[mask["0.weight"] == 0].any()
    (fitted,) = baselines.last_layer(model, samples, samples)
    assert models.scores(fitted, samples)[OUTPUT] > models.scores(model, samples)[OUTPUT] + 0.1
    (normed,) = baselines.batch_norm(model, samples)
    seen = model[0](samples.inputs[0])
    assert torch.allclose(normed.get_buffer("1.running_mean"), seen.mean(0), atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
