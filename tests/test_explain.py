"""Explanations: what is measured is what was defined, whatever the network, and pictures show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_folder import invoke, make_folder
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from small_models import Model, own_output
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert import Explanation, models
from fxinvert.errors import CutError, DataError
from fxinvert.explanation.attention import weights
from fxinvert.explanation.explain import along, joint_parts
from fxinvert.explanation.panels import Scale, largest

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def cnn(digits_batch: Batch) -> Explanation:
    return fxinvert.explain(models.load("digits_cnn", "early"), digits_batch[0][:12], digits_batch[1][:12])


def linear_chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)).double()


# the shares


positive = st.floats(0.05, 2.0)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6), st.integers(0, 10**6))
def test_joint_parts_remove_the_error_with_the_least_movement(
    rows: list[tuple[float, float]], seed: int
) -> None:
    removed, moved = torch.tensor(rows, dtype=torch.double).T[:, None]
    parts = joint_parts(removed, moved)
    assert float((parts * removed).sum()) == pytest.approx(1)
    # a convex sum of squares is least where it does not change along any way that keeps the error removed
    way = torch.randn(parts.shape, generator=torch.Generator().manual_seed(seed)).double()
    way -= (way * removed).sum() / removed.square().sum() * removed
    assert float((parts * moved.square() * way).sum()) == pytest.approx(0, abs=1e-9)


def test_corrections_that_do_harm_or_nothing_take_no_part() -> None:
    parts = joint_parts(
        torch.tensor([[1.0, -0.3, 0.0], [0.0, -1.0, 0.0]]), torch.tensor([[0.5, 0.1, 0.2]] * 2)
    )
    assert parts.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_along_measures_the_way_towards_the_target() -> None:
    error = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert along(error / 2, error).tolist() == pytest.approx([0.5, 0.0])
    assert along(torch.tensor([[-4.0, 3.0], [1.0, 1.0]]), error).tolist() == pytest.approx([0.0, 0.0])


def test_rows_of_a_sample_are_explained_together() -> None:
    net, x, labels = linear_chain(), torch.randn(9, 2, 6).double(), torch.randint(3, (18,))
    found = fxinvert.explain(nn.Sequential(nn.Flatten(0, 1), net), x, labels)
    wanted = fxinvert.explain(net, x, labels.view(9, 2))
    assert torch.allclose(found.error, wanted.error)
    for own, other in zip(found.cuts, wanted.cuts, strict=True):
        assert own.shape == other.anchor.shape[1:]
        assert torch.allclose(own.share, other.share)


def test_shares_of_a_linear_network_sum_to_one() -> None:
    found = fxinvert.explain(linear_chain(), torch.randn(9, 6).double(), torch.randint(3, (9,)))
    wrong = found.error > 0
    assert wrong.sum() > 3
    removed = torch.stack([cut.removed for cut in found.cuts], 1)[wrong]
    assert torch.allclose(removed, torch.ones_like(removed), atol=1e-4)
    assert torch.allclose(found.shares[wrong].sum(1), torch.ones(int(wrong.sum())).double(), atol=1e-6)


def test_shares_are_measured_by_running_the_model(cnn: Explanation, digits_batch: Batch) -> None:
    model = models.load("digits_cnn", "early")
    cut = cnn["fc1"]
    with torch.no_grad():
        output = model.fc2(cut.anchor + cut.part[:, None] * cut.correction)  # type: ignore[operator]
    error = cnn.output_target - cnn.output
    share = ((output - cnn.output) * error).sum(1) / error.square().sum(1).clamp_min(1e-30)
    assert torch.allclose(cut.share, share, atol=1e-5)


def test_a_sample_that_is_as_it_should_be_has_nothing_to_explain(digits_batch: Batch) -> None:
    model = models.load("digits_cnn", "early")
    found = fxinvert.explain(model, digits_batch[0][:3], digits_batch[1][:3], output_target=own_output)
    assert not found.error.any()
    assert not found.shares.any()
    assert found.by_class()["all"]["fc1"]["samples"] == 0
    assert "nothing to correct" in found.figure(1).texts[0].get_text()


def test_samples_do_not_depend_on_their_neighbours(cnn: Explanation, digits_batch: Batch) -> None:
    alone = fxinvert.explain(models.load("digits_cnn", "early"), digits_batch[0][4:5], digits_batch[1][4:5])
    assert torch.allclose(alone.shares, cnn.shares[4:5], atol=1e-4)
    assert torch.allclose(alone.moved, cnn.moved[4:5], atol=1e-4)


def test_the_plan_says_which_cuts(digits_batch: Batch) -> None:
    model, (x, y) = models.load("digits_cnn", "early"), digits_batch
    plan = fxinvert.partition(fxinvert.trace(model, x[:2]), segments=2)
    found = fxinvert.explain(model, x[:4], y[:4], plan=plan)
    assert [cut.name for cut in found.cuts] == [segment.exit for segment in plan.segments]
    assert [v.name for v in found.cuts[0].inside] == [
        p for p in plan.segments[0].trained if p != found.cuts[0].name
    ]
    with pytest.raises(KeyError, match="there are"):
        found["nowhere"]


def test_a_plan_of_another_graph_is_refused(digits_batch: Batch) -> None:
    plan = fxinvert.partition(fxinvert.trace(linear_chain(), torch.randn(2, 6).double()))
    with pytest.raises(CutError, match="another graph: this one has no '0'"):
        fxinvert.explain(models.load("digits_cnn", "early"), *digits_batch, plan=plan)


def test_the_model_is_left_as_it_was(digits_batch: Batch) -> None:
    model = models.load("digits_cnn", "early").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fxinvert.explain(model, digits_batch[0][:2], digits_batch[1][:2])
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_means_by_class(cnn: Explanation) -> None:
    means, wrong = cnn.by_class(), cnn.error > 0
    assert cnn.classes is not None
    for name, by_segment in means.items():
        rows = wrong if name == "all" else wrong & (cnn.classes == int(name))
        assert by_segment["conv2"]["samples"] == int(rows.sum())
        if rows.any():
            assert by_segment["conv2"]["moved"] == pytest.approx(
                float(cnn["conv2"].moved[rows].mean()), rel=1e-5
            )
    assert list(means) == ["all", *(str(c) for c in sorted(set(cnn.classes.tolist())))]


def test_regression_with_several_outputs() -> None:
    samples = models.data_of("driving").test.select(torch.arange(3))
    ((inputs, labels),) = samples.batches()
    found = fxinvert.explain(models.load("driving", "early"), inputs, labels, output=("steering", "speed"))
    assert found.classes is None
    wanted = torch.cat([samples.labels["steering"], samples.labels["speed"]], 1)
    assert torch.allclose(found.output_target, wanted)
    assert all((cut.removed > 0.95).all() for cut in found.cuts)
    assert "steering" in found.figure(0).texts[0].get_text()
    assert [value.name for value in found.inputs] == ["camera", "ego"]


# attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_weights_are_those_of_torch(mask: str, causal: bool) -> None:
    if causal and mask != "none":
        pytest.skip("torch takes only one of the two")
    query, key, value = torch.randn(3, 2, 4, 5, 6).double()
    given: dict[str, Tensor | None] = {
        "none": None,
        "bool": torch.rand(5, 5) > 0.2,
        "float": torch.randn(5, 5).double(),
    }
    attn_mask = given[mask]
    if mask == "bool" and attn_mask is not None:
        attn_mask.fill_diagonal_(True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=causal)
    assert torch.allclose(weights(query, key, attn_mask, causal) @ value, expected)


def test_attention_of_a_transformer(digits_batch: Batch) -> None:
    model = models.load("digits_vit", "early")
    found = fxinvert.explain(model, digits_batch[0][:2], digits_batch[1][:2])
    assert [a.anchor.shape[1:] for a in found.attention] == [(4, 17, 17)] * 2
    for attention in found.attention:
        for map_ in (attention.anchor, attention.target):
            assert torch.allclose(map_.sum(-1), torch.ones(2, 4, 17), atol=1e-5)
    assert float((found.attention[1].anchor - found.attention[1].target).abs().max()) > 1e-3


def test_attention_written_out() -> None:
    def attend(self: Any, x: Tensor) -> Any:
        heads = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / 2, -1)
        return self.head((scores @ heads[2]).mean(2).flatten(1))

    model = Model(attend, qkv=nn.Linear(5, 24), head=nn.Linear(8, 3))
    found = fxinvert.explain(model, torch.randn(2, 7, 5), torch.tensor([0, 1]))
    assert [a.anchor.shape for a in found.attention] == [(2, 2, 7, 7)]


# pictures


def test_channels_are_chosen_by_the_size_of_their_corrections() -> None:
    computed = torch.zeros(6, 3, 3)
    wanted = computed.clone()
    for channel, size in {1: 3.0, 2: 1.0, 4: -5.0, 5: 2.0, 0: 0.5}.items():
        wanted[channel, 1, 1] = size
    scale = Scale.of(computed, wanted)
    assert scale.chosen == (1, 2, 4, 5)
    assert scale.difference[2].min() == -5
    assert largest(torch.tensor([1.0, 1.0, 1.0]), 2) == [0, 1]


@pytest.mark.parametrize("shape", [(), (1,), (300,), (5, 4), (1, 8, 8), (20, 3, 9), (2, 3, 4, 5), (3, 0, 2)])
def test_values_of_any_shape_are_drawn(shape: tuple[int, ...]) -> None:
    scale = Scale.of(torch.zeros(shape), torch.ones(shape))
    assert scale.computed.ndim == (1 if len(shape) < 2 else 3)


def test_pictures_are_the_same_every_time(cnn: Explanation, tmp_path: Path) -> None:
    first, second = (cnn.save(tmp_path / f"{i}.png", 3) for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.width == 1200
    assert cnn.save(tmp_path / "deep" / "x.svg").read_text().startswith("<?xml")


def test_every_text_of_a_picture_is_legible(cnn: Explanation) -> None:
    """Its contrast with the paper is at least 4.5, as for a page."""
    texts = [text for text in cnn.figure(3).findobj(Text) if text.get_text().strip()]
    assert len(texts) > 20
    for text in texts:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(text.get_color())
        ]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, text.get_text()


def test_pictures_refuse_what_they_cannot_do(cnn: Explanation, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample 99"):
        cnn.figure(99)
    with pytest.raises(DataError, match="png, svg, pdf"):
        cnn.save(tmp_path / "x.doc")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        cnn.save(tmp_path / "file" / "x.png")


def test_names_are_never_read_as_mathematics(tmp_path: Path) -> None:
    name = "a$x_{$<b>"
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 3))
    found = fxinvert.explain(model, torch.randn(2, 4), torch.tensor([0, 1]))
    assert found.save(tmp_path / "x.png").stat().st_size > 1000


# the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_folder(tmp_path, monkeypatch)


def test_explain_a_model_on_data(here: Path) -> None:
    result = invoke(
        "explain", "cli_nets:Net", "data.npz", "--sample", "3", "--sample", "5", "--mean-over", "9"
    )
    assert result.exit_code == 0, result.output
    assert "Share of the output error" in result.output
    assert "over 9 samples" in result.output
    assert (here / "explain_3.png").exists()
    assert (here / "explain_5.png").exists()


def test_explain_as_json(here: Path) -> None:
    arguments = ("--sample", "2", "--segments", "1", "--out", "picture.svg", "--json")
    result = invoke("explain", "cli_nets:Net", "data.npz", *arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["samples"] == [{"sample": 2, "picture": "picture.svg"}]
    assert [segment["segment"] for segment in told["segments"]] == ["hidden"]
    assert (here / "picture.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cli_nets:Net", "data.npz"), "which samples?"),
        (("cli_nets:Net", "data.npz", "--sample", "1000"), "no sample 1000"),
        (("cli_nets:Net",), "either a model and data"),
        (("--run", "nowhere", "--sample", "1"), "no finished run"),
        (("cli_nets:Net", "data.npz", "--sample", "1", "--sample", "2", "--out", "x.png"), "need a folder"),
    ],
)
def test_bad_requests_are_refused(here: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("explain", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
