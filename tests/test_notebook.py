"""How results show themselves: as text, as HTML in a notebook, in TensorBoard, in the log."""

from __future__ import annotations

import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxinvert
from fxinvert import DataError, PostTrainingResult, models
from fxinvert.notebook import table

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def result() -> PostTrainingResult:
    data = models.digits()
    train = models.batches(data.x_train[:300], data.y_train[:300])
    return fxinvert.post_train(models.load("digits_mlp", "early"), train, sweeps=1)


@pytest.fixture(scope="module")
def shown(result: PostTrainingResult) -> dict[str, Any]:
    """One of each kind of object that shows itself."""
    model, data = models.load("digits_mlp", "early"), models.digits()
    inverse = fxinvert.invert(model, data.x_test[:2], output_target="margin", reconstruction="linearized")
    return {
        "plan": result.plan,
        "inverse": inverse,
        "reconstruction": inverse(data.x_test[:4], data.y_test[:4]),
        "result": result,
        "estimate": fxinvert.estimate(model, data.x_test[:2], result.plan, samples=1000),
    }


KINDS = ("plan", "inverse", "reconstruction", "result", "estimate")


class Balanced(HTMLParser):
    """Text of a piece of HTML whose tags are all closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_small_and_takes_on_the_notebooks_colours(shown: dict[str, Any], kind: str) -> None:
    html = shown[kind]._repr_html_()
    page = Balanced(html)
    assert page.tags <= {"div", "style", "strong", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert len(html) < 6000
    assert not re.search(r"#[0-9a-f]{3}|\brgb|https?:|white|black", html)


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_html_tell_of_the_same_names(shown: dict[str, Any], kind: str) -> None:
    it = shown[kind]
    text = " ".join(Balanced(it._repr_html_()).text)
    for name in ("fc1", "fc2", "fc3"):
        assert name in text
        assert name in repr(it) or kind == "result"
    assert str(it) == repr(it)


def test_numbers_are_written_for_people() -> None:
    html = table("t", ["a", "b", "c"], [("x", 12345, 0.123456)])
    assert re.findall(r"<td.*?>(.*?)</td>", html) == ["x", "12,345", "0.1235"]


def test_names_are_escaped() -> None:
    assert HOSTILE not in table(HOSTILE, [HOSTILE], [(HOSTILE,)], [HOSTILE])


def test_names_of_modules_are_escaped() -> None:
    model = nn.Sequential()
    model.add_module("<b>bold", nn.Linear(3, 2))
    inverse = fxinvert.invert(model, torch.randn(2, 3))
    rec = inverse(torch.randn(2, 3), torch.tensor([0, 1]))
    for it in (inverse, rec, fxinvert.partition(inverse.graph)):
        assert "<b>" not in it._repr_html_()
        assert "&lt;b&gt;bold" in it._repr_html_()


def test_the_inverse_tells_how_targets_are_found_and_where_they_stop() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last: torch.Tensor = self.last(self.first(x).round())
            return last

    inverse = fxinvert.invert(Rounded(), torch.randn(2, 3), refine=3)
    for text in (repr(inverse), inverse._repr_html_()):
        assert "at most 3 steps of refinement" in text
        assert "the target stops at" in text


def test_the_history_is_written_for_tensorboard(result: PostTrainingResult, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result.to_tensorboard(tmp_path)
    for target in {record.output_target for record in result.history}:
        records = [record for record in result.history if record.output_target == target]
        found = events.EventAccumulator(str(tmp_path / target)).Reload()
        losses = [event.value for event in found.Scalars("held out/loss")]
        assert losses == pytest.approx([records[0].before.loss, *(r.after.loss for r in records)])
        assert [event.value for event in found.Scalars("step")] == pytest.approx([r.step for r in records])
        explained = {f"explained/{op}" for record in records for op in record.explained}
        assert explained
        assert explained == {tag for tag in found.Tags()["scalars"] if tag.startswith("explained/")}


def test_without_tensorboard_it_is_said_what_to_do(
    result: PostTrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DataError, match=r"fxinvert\[tensorboard\]"):
        result.to_tensorboard(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(result: PostTrainingResult, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        result.to_tensorboard(tmp_path / "file")


def test_every_update_is_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    data = models.digits()
    train = models.batches(data.x_train[:200], data.y_train[:200])
    with caplog.at_level(logging.INFO, logger="fxinvert"):
        result = fxinvert.post_train(models.load("digits_mlp"), train, sweeps=1, output_target="margin")
    assert [record.name for record in caplog.records] == ["fxinvert.progress"] * len(result.plan.segments)
    assert caplog.messages[0].startswith("sweep 1, fc1: accuracy")
    assert capfd.readouterr() == ("", "")
