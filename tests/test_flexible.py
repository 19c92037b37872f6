"""`flex_attention`: captured, inverted, trained and exported as the attention that it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flexible

import fxinvert

WIDTH, HEADS, LENGTH = 8, 4, 5

#: torch says that its kernel is not compiled
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")


def attending(attended: Callable[..., Tensor], heads: int = HEADS, **tensors: Any) -> Model:
    """Attention over `(B, LENGTH, WIDTH)` between linear layers; `attended` gets the model, queries, keys and values by heads."""
    torch.manual_seed(0)
    each = WIDTH // HEADS

    def forward(self: Any, x: Tensor) -> Tensor:
        split = self.mixed(x).split([WIDTH, heads * each, heads * each], -1)
        q, k, v = (part.unflatten(-1, (-1, each)).transpose(1, 2) for part in split)
        found = attended(self, q, k, v).transpose(1, 2).flatten(2)
        last: Tensor = self.head(x + self.out(found)).mean(1)
        return last

    return Model(
        forward,
        mixed=nn.Linear(WIDTH, WIDTH + 2 * heads * each), out=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, 3),
        **tensors,
    ).eval()  # fmt: skip


def plain(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flexible.flex_attention(q, k, v)


def biased(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A slope for every head, looked up, and a window."""

    def score(scores: Tensor, _: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i - j).abs() <= 2, scores + self.slope.weight[h, 0] * (i - j), -math.inf)

    return flexible.flex_attention(q, k, v, score_mod=score)


def causal(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask in blocks; the first position sees nothing at all."""
    mask = flexible.create_block_mask(
        lambda b, h, i, j: i > j, None, None, q.shape[2], k.shape[2], device=q.device
    )
    return flexible.flex_attention(q, k, v, block_mask=mask)


def grouped(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fewer heads of keys, and the sums that the kernel also gives."""
    found, more = flexible.flex_attention(q, k, v, enable_gqa=True, return_aux=flexible.AuxRequest(lse=True))
    return found * more.lse.sigmoid()[..., None]  # type: ignore[union-attr]


def kinds(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions of a kind see one another: another mask for every sample."""
    kind = v[:, 0, :, 0] > 0

    def score(scores: Tensor, b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(kind[b, i] == kind[b, j], scores, -math.inf)

    return flexible.flex_attention(q, k, v, score_mod=score)


CASES: dict[str, Callable[[], Model]] = {
    "plain": lambda: attending(plain),
    "biased": lambda: attending(biased, slope=nn.Embedding(HEADS, 1)),
    "causal": lambda: attending(causal),
    "grouped": lambda: attending(grouped, heads=2),
    "kinds": lambda: attending(kinds),
}


def inputs(samples: int) -> Tensor:
    return torch.randn(samples, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name if name == "plain" else pytest.param(name, marks=pytest.mark.slow) for name in CASES])  # fmt: skip
def test_it_is_captured_as_attention(name: str) -> None:
    """With softmax between two products; what torch's kernel gives is checked by the capture, and here for another batch size."""
    model = CASES[name]()
    graph = fxinvert.trace(model, inputs(2))
    ops = [node.meta.get("op") for node in graph.graph.nodes]
    assert ops.count("matmul") == 2
    assert ops.count("softmax") == 1
    assert not {"argsort", "index_put"} & {*ops}  # the blocks that its kernel would skip
    given = inputs(6)
    with torch.no_grad():  # its kernel for processors has no derivative
        torch.testing.assert_close(graph(given), model(given))


@pytest.mark.slow
def test_in_half_precision_scores_are_single() -> None:
    """As of torch's kernel."""
    model, given = CASES["biased"]().bfloat16(), inputs(6).bfloat16()
    graph = fxinvert.trace(model, given[:2])
    with torch.no_grad():
        torch.testing.assert_close(graph(given), model(given))
    scores = next(node for node in graph.graph.nodes if node.meta.get("op") == "matmul")
    assert scores.meta["tensor_meta"].dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "biased"])
def test_it_is_inverted_trained_and_exported(name: str, tmp_path: Path) -> None:
    model, given = CASES[name](), inputs(60)
    labels = torch.arange(60) % 3
    rec = fxinvert.invert(model, given, output_target="margin", refine=10)(given, labels)
    assert float(rec.consistency("mixed").max()) < 1e-3
    result = fxinvert.post_train(model, (given, labels), sweeps=1, confidence=0.5, progress=False)
    assert result.final.loss < result.baseline.loss
    report = fxinvert.export_onnx(result.model, inputs(2), tmp_path / "model.onnx")
    assert max(each.max_abs for each in report.differences) < 1e-5


def test_torch_is_left_as_it_was() -> None:
    before = vars(flexible).copy()
    fxinvert.trace(CASES["plain"](), inputs(2))
    written = ("flex_attention_hop", "create_mask", "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG")
    assert all(vars(flexible)[name] is before[name] for name in written)
