"""Reports: the facts are those of the run, and the page shows them, whatever the names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_folder import invoke, make_folder
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxinvert
from fxinvert.commands.finished import plan_of
from fxinvert.errors import DataError
from fxinvert.report import intervals
from fxinvert.report.answers import answers, histograms
from fxinvert.report.page import STATUSES, render, status_class
from fxinvert.report.pictures import curve, histogram, image_of, ticks
from fxinvert.report.record import Report, Subject, build
from fxinvert.report.samples import first, pick
from fxinvert.rules import Status
from fxinvert.training import Batches, evaluate

CPU = torch.device("cpu")
HOSTILE = "<img src=x onerror=\"console.error('hostile')\"></script><script>console.error('hostile')</script>"


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small classifier, with its report."""
    with pytest.MonkeyPatch.context() as patch:
        here = make_folder(tmp_path_factory.mktemp("report"), patch)
        done = invoke("post-train", "cli_nets:Net", "data.npz", "--run-directory", "run", "--no-export")
        assert done.exit_code == 0, done.output
        result = invoke("report", "run")
        assert result.exit_code == 0, result.output
        assert "report.html" in result.output
    return here / "run"


@pytest.fixture(scope="module")
def facts(run: Path) -> Any:
    return json.loads((run / "report.json").read_text())


def subject(model: nn.Module, batches: Any, **change: Any) -> Subject:
    """A model before and after training, without a run."""
    result = fxinvert.post_train(model, batches, sweeps=1)
    x = batches[0][0]
    given: dict[str, Any] = {
        "name": "a run",
        "before": model,
        "after": result.model,
        "data": Batches(batches, CPU),
        "data_name": "held-out",
        "example": (x[:2],),
        "output": None,
        "plan": result.plan,
        "settings": {"method": "closed_form"},
        "metrics": {"metrics": {}, "post_training": result.to_dict()},
        "timing": {},
    }
    return Subject(**given | change)


def regression_report() -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(60, 4)
    return build(subject(model, [(x, x.sum(1, keepdim=True))]))


def test_rows_of_outputs_are_reported_by_sample() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(60, 2, 4)
    report = build(subject(model, [(x, x.flatten(0, 1).argmax(1) % 3)]))
    assert report.facts["headline"]["samples"] == 60


# intervals


@given(st.integers(1, 400), st.integers(0, 400))
def test_wilson_holds_the_share(count: int, right: int) -> None:
    hits = (torch.arange(count) < right).double()
    found = intervals.share(hits)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_wilson_of_a_known_case() -> None:
    """Newcombe 1998 gives 0.0624 to 0.3045 … for 81 of 263: 0.2553 to 0.3662."""
    found = intervals.share((torch.arange(263) < 81).double())
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_bootstrap_of_a_mean_is_that_of_its_standard_error() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3)).double()
    found = intervals.mean(values)
    assert found == intervals.mean(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.08)
    assert intervals.share(torch.tensor([0.0, 0.5, 1.0])).how == intervals.BOOTSTRAP


# facts


def test_the_headline_is_what_the_run_measured(run: Path, facts: Any) -> None:
    measured = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    assert facts["headline"]["data"] == "test"
    assert facts["headline"]["samples"] == 30
    for when in ("before", "after"):
        assert facts["headline"][when]["value"] == pytest.approx(measured[when]["accuracy"])
    change = facts["headline"]["change"]
    assert change["value"] == pytest.approx(measured["after"]["accuracy"] - measured["before"]["accuracy"])
    assert change["low"] <= change["value"] <= change["high"]


def test_answers_agree_with_the_metrics_of_training() -> None:
    model = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(7, 1, 2, 2), torch.randint(3, (7, 2, 2))
    graph, data = fxinvert.trace(model, x), Batches([(x[:4], y[:4]), (x[4:], y[4:])], CPU)
    with torch.no_grad():
        found, expected = answers(graph, data), evaluate(model, data)
    assert found.hits is not None
    assert float(found.losses.mean()) == pytest.approx(expected.loss, rel=1e-5)
    assert float(found.hits.mean()) == pytest.approx(expected.accuracy)
    counts = torch.tensor(found.heads[0].confusion())
    assert counts.sum() == 28
    assert int(counts.diagonal().sum()) == round(float(found.hits.sum()) * 4)
    assert counts.sum(1).tolist() == torch.bincount(y.flatten(), minlength=3).tolist()


def test_segments_and_updates_are_those_of_the_run(run: Path, facts: Any) -> None:
    record = json.loads((run / "metrics.json").read_text())["post_training"]
    assert len(facts["updates"]) == len(record["history"])
    assert [segment["name"] for segment in facts["segments"]] == ["hidden", "head"]
    gained = sum(segment["gain"] for segment in facts["segments"])
    kept = [update for update in facts["updates"] if update["kept"]]
    assert gained == pytest.approx(record["baseline"]["loss"] - kept[-1]["loss_after"])
    assert {update["output_target"] for update in kept} == {record["output_target"]}
    assert all(update["seconds"] > 0 for update in facts["updates"])


def test_nodes_have_their_rules_and_certificates(facts: Any) -> None:
    nodes = {node["name"]: node for node in facts["graph"]["nodes"]}
    assert nodes["flatten"]["rule"] == "linear: linear solve"
    assert nodes["images"]["rule"] == "flatten: moves values"
    assert nodes["head"]["why"].startswith("the output")
    assert all(node["status"] in STATUSES and "residual" in node for node in nodes.values())
    names = list(nodes)
    assert [[names[a], names[b]] for a, b in facts["graph"]["inverse"]] == [
        [names[i + 1], names[i]] for i in reversed(range(len(names) - 1))
    ]
    assert facts["graph"]["problem"] == ""


def test_samples_are_counted_and_ranked(facts: Any) -> None:
    samples = facts["samples"]
    turned = ("right_before_and_after", "turned_right", "turned_wrong", "wrong_before_and_after")
    assert sum(samples[name] for name in turned) == 30
    gains = [sample["loss_before"] - sample["loss_after"] for sample in samples["better"]]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)
    assert all(sample["loss_after"] > sample["loss_before"] for sample in samples["worse"])


def test_the_same_run_gives_the_same_report(run: Path, facts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (run / "report.html").read_bytes()
    monkeypatch.chdir(run.parent)
    monkeypatch.syspath_prepend(run.parent)
    result = invoke("report", "run", "--json")
    assert json.loads(result.output) == facts
    assert (run / "report.html").read_bytes() == page


def test_the_automatic_method_says_what_it_tried(digits_batch: Any) -> None:
    from fxinvert import models
    from fxinvert.report.tables import history_table

    model, (x, y) = models.load("digits_mlp", "early"), digits_batch
    result = fxinvert.post_train(model, [(x, y)], method="auto", sweeps=1)
    report = build(
        subject(
            *(model, [(x, y)]),
            settings={"method": "auto"},
            metrics={"metrics": {}, "post_training": result.to_dict()},
            plan=result.plan,
        )
    )
    tried = {update["method"] for update in report.facts["updates"]}
    assert "closed_form" in tried
    assert any(name.startswith("gradient, learning rate") for name in tried)
    assert all(not u["explained"] for u in report.facts["updates"] if u["method"].startswith("gradient"))
    (column,) = (c for c in history_table(result.history).columns if c.header == "error explained")
    assert any("gradient, learning rate" in str(cell) for cell in column.cells)
    assert "gradient, learning rate" in render(report)


def test_regression_has_histograms() -> None:
    report = regression_report()
    (output,) = report.facts["outputs"]
    assert sum(output["errors"]["before"]) == sum(output["errors"]["after"]) == 60
    assert report.facts["headline"]["metric"] == "loss"
    assert 'class="bar before"' in render(report)


def test_histograms_of_equal_errors() -> None:
    graph = fxinvert.trace(nn.Linear(2, 1), torch.randn(2, 2))
    head = answers(graph, Batches([(torch.zeros(3, 2), torch.zeros(3, 1))], CPU)).heads[0]
    found = histograms(head, head)
    assert found["edges"][0] < found["edges"][-1]
    assert sum(found["before"]) == 3


def test_a_graph_that_cannot_be_inverted_is_reported_all_the_same() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.round(self.fc(x))

    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    healthy = subject(nn.Linear(3, 2), [(x, y)])
    report = build(subject(nn.Linear(3, 2), [(x, y)], before=Rounded(), after=Rounded(), plan=healthy.plan))
    assert report.facts["graph"]["problem"] or report.facts["explain"]["problem"]
    assert "note" in render(report)


def test_samples_are_picked_by_their_number() -> None:
    x = torch.arange(10.0)[:, None]
    data = Batches([(x[:4], x[:4]), (x[4:], x[4:])], CPU, "the data")
    assert pick(data, [5, 0, 5]).labels.flatten().tolist() == [5, 0, 5]
    assert first(data, 6).labels.flatten().tolist() == list(range(6))
    assert len(first(data, 100)) == 10
    with pytest.raises(DataError, match="no sample 10 in the data, which has 10: 0 to 9"):
        pick(data, [3, 10])


# the page


def test_the_page_is_self_contained(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    addresses = [a for _, attributes in page.tags for n in ("src", "href") if (a := attributes.get(n))]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    inside = {"graph", "segments", "sweeps", "nodes", "outputs", "samples", "explain", "settings"}
    assert inside <= set(page.ids)
    assert all(address[1:] in page.ids for address in addresses if address.startswith("#"))
    assert "prefers-color-scheme: dark" in text
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_every_status_has_a_colour() -> None:
    assert [status_class(status.word) for status in Status] == [f"s{i}" for i in range(len(Status))]


def hostile_report() -> Report:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    named = type(HOSTILE, (nn.Sequential,), {})()
    for name, part in model.named_children():
        named.add_module(f"{name}<b>&'", part)
    x = torch.randn(40, 3)
    return build(
        subject(
            named, [(x, (x.sum(1) > 0).long())], name=HOSTILE, settings={HOSTILE: HOSTILE, "method": HOSTILE}
        )
    )


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    text = render(hostile_report())
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "b" not in tags
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert HOSTILE not in text
    assert "&lt;img src=x" in text


def test_the_graph_is_drawn_and_folds(run: Path, tmp_path: Path) -> None:
    from browser import opened

    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    x = torch.randn(30, 4)
    report = build(subject(nn.Sequential(blocks, nn.Linear(4, 2)), [(x, (x.sum(1) > 0).long())]))
    path = tmp_path / "report.html"
    path.write_text(render(report))
    with opened(path) as page:
        count = len(report.facts["graph"]["nodes"])
        assert page.locator("#graph-view .node").count() == count
        assert page.locator("#graph-view .edge").count() == len(report.facts["graph"]["forward"])
        page.get_by_role("button", name="close all").click()
        assert page.locator("#graph-view .node").count() < count
        page.locator('#graph-view .node.group[data-name="0"]').click()
        assert page.locator('#graph-view .node.group[data-name="0.1"]').count() == 1
        page.locator('#graph-view .frame[data-group="0"] text').click()
        assert page.locator('#graph-view .node.group[data-name="0"]').count() == 1
        page.get_by_role("button", name="open all").click()
        page.get_by_role("button", name="inverse").click()
        assert page.locator("#graph-view .node").count() == count
        assert page.locator("#graph-view .edge").count() == len(report.facts["graph"]["inverse"])


def test_tables_sort_and_filter(run: Path, facts: Any) -> None:
    from browser import opened

    with opened(run / "report.html") as page:
        names = page.locator("#segments-table tbody tr td:nth-child(2)")
        button = page.locator("#segments-table thead button", has_text="parameters")
        button.click()
        by_size = sorted(facts["segments"], key=lambda segment: segment["parameters"])
        assert names.all_inner_texts() == [segment["name"] for segment in by_size]
        button.click()
        assert names.all_inner_texts() == [segment["name"] for segment in by_size[::-1]]
        page.locator('input[data-filter="nodes-table"]').fill("linear  head")
        shown = page.locator("#nodes-table tbody tr:visible td:first-child").all_inner_texts()
        assert "head" in shown
        assert "images" not in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(run: Path, scheme: str, tmp_path: Path) -> None:
    """Its contrast with what is behind it is at least 4.5, as WCAG asks for, graph and tables included."""
    from browser import faint, opened

    regression = tmp_path / "report.html"
    regression.write_text(render(regression_report()))
    for path in (run / "report.html", regression):
        with opened(path, scheme) as page:
            assert faint(page) == {}
            if page.get_by_role("button", name="close all").is_visible():
                page.get_by_role("button", name="inverse").click()
            page.locator("thead button").first.hover()
            assert faint(page) == {}


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    from browser import opened

    path = tmp_path / "report.html"
    path.write_text(render(hostile_report()))
    with opened(path) as page:
        assert page.locator("h1").inner_text() == HOSTILE
        assert page.locator("#graph-view .node").count() > 0


# pictures


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, size: float) -> None:
    found = ticks(low, low + size)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 * abs(low) <= tick <= low + size * (1 + 1e-9) + 1e-9 * abs(low) for tick in found)


def test_curves_and_histograms_are_drawn() -> None:
    drawn = str(curve([3.0, None, 2.0], [0, 1, 2], "<loss>"))
    assert drawn.count("<circle") == 2
    assert "&lt;loss&gt;" in drawn
    assert curve([None], [0], "loss") == ""
    assert str(histogram([0, 1, 2], [1, 2], [2, 1])).count("<rect") == 4


def test_only_images_are_shown_as_such() -> None:
    image = image_of(torch.rand(3, 200, 100))
    assert image is not None
    assert image.startswith("data:image/png;base64,")
    assert image_of(torch.rand(8, 4, 4)) is None
    assert image_of(torch.rand(5)) is None
    assert image_of(torch.zeros(1, 3, 3, dtype=torch.long)) is None


# the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


def test_reports_need_a_finished_run(here: Path) -> None:
    result = invoke("report", "nowhere")
    assert result.exit_code == 2
    assert "there is no finished run in nowhere" in result.stderr


def test_held_out_data_are_said_to_be_chosen_by(here: Path) -> None:
    done = invoke("post-train", "cli_nets:Net", "photos", "--run-directory", "run", "--no-export")
    assert done.exit_code == 0, done.output
    result = invoke("report", "run", "--out", "elsewhere")
    assert result.exit_code == 0, result.output
    assert "Steps were chosen on these data" in (here / "elsewhere" / "report.html").read_text()
    facts = json.loads((here / "elsewhere" / "report.json").read_text())
    measured = json.loads((here / "run" / "metrics.json").read_text())["metrics"]["held_out"]
    assert facts["headline"]["samples"] == measured["after"]["samples"]
    assert facts["headline"]["after"]["value"] == pytest.approx(measured["after"]["accuracy"])
    explained = invoke("explain", "--run", "run", "--state", "after", "--sample", "0")
    assert explained.exit_code == 0, explained.output
    assert (here / "run" / "explain_0.png").exists()


def test_plans_are_read_again(run: Path) -> None:
    content = json.loads((run / "plan.json").read_text())
    assert json.loads(json.dumps(plan_of(content).to_dict())) == content
    with pytest.raises(DataError, match="damaged"):
        plan_of({"segments": [{"name": "x"}]})
