"""Ways in which people write models: each is followed, and inverted, as the same model written plainly would be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_models import Model
from torch import Tensor, fx, nn
from torch.nn.utils import rnn

import fxinvert
from fxinvert.errors import TraceError


def follows(model: nn.Module, example: Any, other: Any) -> fx.GraphModule:
    """The graph, which computes what the model does for another batch as well."""
    graph = fxinvert.trace(model.eval(), example)
    with torch.no_grad():
        got = graph(*graph.meta["inputs"].tensors(other))
        wanted = model(*other) if isinstance(other, tuple) else model(other)
    torch.testing.assert_close(got, wanted)
    return graph


def test_a_model_that_stays_whole_is_known_by_its_own_names() -> None:
    # symbolic tracing cannot go into this layer, so that it is one call
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    graph = follows(model, torch.randn(2, 3, 8), torch.randn(5, 3, 8))
    read = {str(n.target) for n in graph.graph.find_nodes(op="get_attr")}
    assert read == set(dict(model.named_parameters()))


def test_added_keys_and_values_of_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(s: Any, x: Tensor) -> Any:
        return s.attend(x, x, x, key_padding_mask=s.pad.expand(x.shape[0], -1))[0]

    graph = follows(
        Model(forward, attend=attention, pad=torch.tensor([[False, False, True]])),
        torch.randn(2, 3, 8),
        torch.randn(5, 3, 8),
    )
    trained = [name for segment in fxinvert.partition(graph).segments for name in segment.trained]
    assert len(trained) == 2  # of query, key and value together, and of the output


class Halves(nn.Module):
    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.part, self.traceable = nn.Linear(3, 4), traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and len(x[0].unbind(0)) != 6:
            raise ValueError
        rows: Tensor = self.part(x.view(len(x) * 2, 3)).view(len(x), -1)
        return rows


@pytest.mark.parametrize("traceable", [True, False])
def test_a_batch_size_that_is_read_by_len(traceable: bool) -> None:
    graph = follows(Halves(traceable), torch.randn(2, 6), torch.randn(5, 6))
    assert ("captured" in graph.meta) != traceable
    assert "len" not in globals()


def _plain(windows: Tensor, height: int, width: int) -> int:
    return int(windows.shape[0]) // (height * width // 4)


def _divided(windows: Tensor, height: int, width: int) -> int:
    size = 2
    return int(windows.shape[0] / (height * width / size / size))


class Windows(nn.Module):
    """Windows of 2 by 2 of images, whose number of samples is found again from how many windows there are."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.part, self.last, self.batch = nn.Linear(3, 4), nn.Linear(4, 2), batch

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        assert isinstance(channels, int)
        assert type(channels) == int
        x = x.view(-1, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        windows = self.part(x.reshape(-1, 4, channels))
        batch = self.batch(windows, height, width)
        x = windows.view(batch, height // 2, width // 2, 2, 2, -1).transpose(2, 3)
        rows: Tensor = self.last(x.reshape(batch, height, width, -1)).amax((1, 2))
        return rows


@pytest.mark.parametrize("batch", [_plain, _divided])
def test_a_batch_size_that_code_makes_a_whole_number_of(batch: Any, tmp_path: Path) -> None:
    model, x = Windows(batch), torch.randn(2, 4, 6, 3)
    follows(model, x, torch.randn(5, 4, 6, 3))
    fxinvert.export_onnx(model, x, tmp_path / "model.onnx")
    assert "int" not in globals()


def test_buffers_that_forward_replaces_are_read_as_they_were() -> None:
    class Counting(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(3, 2)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x - self.mean)
            if self.training:
                return y
            self.seen = self.mean * 0.9 + 0.1
            self.mean = self.mean * 1.0
            return y

    follows(Counting(), torch.randn(2, 3), torch.randn(5, 3))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_inputs_in_a_named_tuple() -> None:
    model = Model(lambda s, pair: s.part(pair.left) + pair.right, part=nn.Linear(3, 2))
    graph = follows(
        model, (Pair(torch.randn(2, 3), torch.randn(2, 2)),), (Pair(torch.randn(5, 3), torch.randn(5, 2)),)
    )
    assert [n.name for n in graph.graph.find_nodes(op="placeholder")] == ["x_left", "x_right"]


def test_what_hooks_collect_follows_the_input() -> None:
    kept: dict[str, Tensor] = {}
    first = nn.Linear(3, 4)
    first.register_forward_hook(lambda module, inputs, output: kept.update(first=output))
    model = Model(
        lambda s, x: s.last(torch.cat([torch.relu(s.first(x)), kept["first"]], 1)),
        first=first,
        last=nn.Linear(8, 2),
    )
    graph = follows(model, torch.randn(2, 3), torch.randn(2, 3))
    torch.testing.assert_close(graph(torch.ones(2, 3)), model(torch.ones(2, 3)))


def test_half_precision_is_compared_by_its_own_rounding() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).bfloat16()
    fxinvert.trace(model, torch.randn(4, 5, 16).bfloat16())


def test_a_largest_value_and_its_place_in_a_region() -> None:
    model = Model(
        lambda s, x: s.last(torch.relu(s.first(x)).max(-1)[0]), first=nn.Conv1d(3, 4, 1), last=nn.Linear(4, 2)
    )
    x = torch.randn(2, 3, 5)
    fxinvert.invert(fxinvert.trace(model, x), output_target="regression")(x, torch.randn(2, 2))


@pytest.mark.parametrize("detached", [Tensor.detach, lambda x: x.data])
def test_what_is_kept_from_training_is_inverted_all_the_same(detached: Any) -> None:
    def model(way: Any) -> nn.Module:
        torch.manual_seed(0)
        layers = {"first": nn.Linear(3, 4), "last": nn.Linear(8, 5)}
        return Model(lambda s, x: s.last(torch.cat((way(s.first(x)), way(s.first(x)).tanh()), 1)), **layers)

    x, target = torch.randn(2, 3), torch.randn(2, 5)
    found, plain = (
        fxinvert.invert(fxinvert.trace(model(way), x), output_target="regression")(x, target)
        for way in (detached, lambda x: x)
    )
    assert not torch.equal(plain.targets["x"], x)
    torch.testing.assert_close(found.targets["x"], plain.targets["x"])


def test_a_layer_with_one_output_may_have_a_vector_for_a_weight() -> None:
    vector = nn.Parameter(torch.randn(4))
    ways = [lambda s, x: nn.functional.linear(s.fc(x), s.vector), lambda s, x: s.fc(x) @ s.vector]
    x, target = torch.randn(2, 3, 5), torch.randn(2, 3)
    fc = nn.Linear(5, 4)
    one, other = (
        fxinvert.invert(Model(way, fc=fc, vector=vector), x, output_target="regression")(x, target)
        for way in ways
    )
    assert torch.equal(one.targets["x"], other.targets["x"])
    torch.testing.assert_close(vector @ fc(one.targets["x"]).mT, target)


def test_a_transformer_that_compares_its_mask_with_one_of_its_own_shows_its_layers() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.layers(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Model(forward, layers=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    graph = follows(model, torch.randn(2, 3, 8), torch.randn(5, 3, 8))
    assert not graph.graph.find_nodes(op="call_module")


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, batch_first=True), nn.GRU(3, 4, batch_first=True)])
def test_first_states_that_a_layer_makes_are_no_constants(layer: nn.Module) -> None:
    model = Model(lambda s, x: s.layer(x)[0][:, -1], layer=layer)
    graph = follows(model, torch.randn(2, 5, 3), torch.randn(7, 5, 3))
    assert "captured" not in graph.meta


@pytest.mark.parametrize("way", ["filled", "added"])
def test_scores_that_a_mask_hides_stay_hidden_and_the_others_get_targets(way: str) -> None:
    later = torch.ones(4, 4).triu(1).bool()
    masks = {"filled": later, "added": torch.zeros(4, 4).masked_fill(later, -torch.inf)}

    def forward(s: Any, x: Tensor) -> Tensor:
        scores = s.query(x) @ s.key(x).mT
        scores = scores.masked_fill(s.mask, -torch.inf) if way == "filled" else scores + s.mask
        mixed: Tensor = scores.softmax(-1) @ s.value(x)
        return mixed

    torch.manual_seed(0)
    parts = {name: nn.Linear(6, 6) for name in ("query", "key", "value")}
    model, x = Model(forward, **parts, mask=masks[way]), torch.randn(3, 4, 6)
    graph = fxinvert.trace(model, x)
    found = fxinvert.invert(graph, output_target="regression")(x, model(x).detach() + 0.1)
    assert not any(bool(c.failed.any()) for c in found.certificates.values())
    assert all(bool(torch.isfinite(c.distance).all()) for c in found.certificates.values())
    hidden = found.targets["masked_fill" if way == "filled" else "add"]
    assert bool((hidden[:, later] == -torch.inf).all())
    assert bool(torch.isfinite(hidden[:, ~later]).all())
    assert not torch.equal(found.targets["query"], found.anchors["query"])


def test_a_target_that_is_infinite_where_the_output_is_not_fails() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.randn(2, 3)
    found = fxinvert.invert(fxinvert.trace(model, x), output_target=lambda outputs, labels: labels)(
        x, torch.tensor([[torch.inf, 0.0], [0.0, 0.0]])
    )
    assert found.certificates["0"].failed.tolist() == [True, False]


class Packed(nn.Module):
    """Packed sequences through a recurrent layer: what it gives, padded again, and the states that it ends with."""

    def __init__(self, layer: nn.RNNBase, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer, self.given, self.options = layer, given, options

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        first = self.layer.batch_first
        steps = x if first else x.transpose(0, 1)
        packed = rnn.pack_padded_sequence(steps, lengths, batch_first=first, enforce_sorted=False)
        output, last = self.layer(packed, self.state(x) if self.given else None)
        padded = rnn.pad_packed_sequence(output, batch_first=first, **self.options)[0]
        last = last if isinstance(last, tuple) else (last,)
        return padded if first else padded.transpose(0, 1), [state.transpose(0, 1) for state in last]

    def state(self, x: Tensor) -> Any:
        """Other than zeros, which are what a layer starts from by itself."""
        layers, size = self.layer.num_layers * (1 + self.layer.bidirectional), self.layer.hidden_size
        hidden = torch.linspace(-1, 1, size).expand(layers, x.shape[0], size)
        return (hidden, -hidden) if self.layer.mode == "LSTM" else hidden


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.LSTM(3, 4, batch_first=True), {}),
        (nn.LSTM(3, 4, num_layers=2, bidirectional=True), {"given": True, "total_length": 7}),
        (nn.LSTM(3, 4, num_layers=2, proj_size=2, batch_first=True), {"padding_value": 1.0}),
        (nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True, bias=False), {"given": True}),
        (nn.RNN(3, 4, bidirectional=True, nonlinearity="relu"), {}),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_packed_sequences_are_followed_as_padded_ones(layer: nn.RNNBase, options: dict[str, Any]) -> None:
    """Outputs, last states and last cells are those of torch's kernels for packed sequences, whatever comes behind their ends."""
    model = Packed(layer, **options)
    example = torch.randn(3, 5, 3), torch.tensor([2, 5, 1])
    other = torch.randn(4, 5, 3), torch.tensor([5, 1, 3, 4])
    outputs, last = model(*other)
    for i, wanted in enumerate([outputs, *last]):
        graph = fxinvert.trace(model, example, output=f"1.{i - 1}" if i else 0)
        torch.testing.assert_close(graph(*other), wanted)


def test_packed_sequences_are_inverted_and_trained_around() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer, self.head = (
                nn.Linear(3, 6),
                nn.LSTM(6, 8, batch_first=True),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            packed = rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.layer(packed)[1][0][-1])

    torch.manual_seed(0)
    model, inputs = Model(), (torch.randn(5, 4, 3), torch.tensor([4, 2, 1, 3, 4]))
    graph = fxinvert.trace(model, inputs)
    wanted = model(*inputs).detach() + 0.01
    found = fxinvert.invert(graph, output_target="regression", reconstruction="linearized", refine=10)(
        inputs, wanted
    )
    assert bool((found.consistency("x") < 1e-3).all())
    moved = found.targets["x"] != inputs[0]
    for row, length in enumerate(inputs[1]):
        assert bool(moved[row, :length].any())
        assert not bool(moved[row, length:].any())


def test_packing_that_cannot_be_followed_is_refused_with_what_to_do() -> None:
    """What packs in code that is no module's calls torch's own."""
    own = rnn.pack_padded_sequence

    def forward(s: Any, x: Tensor) -> Any:
        return s.layer(own(x, x[:, 0, 0].long(), batch_first=True))[1][-1]

    with pytest.raises(fxinvert.TraceError, match=r"packs sequences.*padded sequences.*test_idioms\.py"):
        fxinvert.trace(Model(forward, layer=nn.GRU(3, 4, batch_first=True)), 5 * torch.ones(2, 5, 3))


@pytest.mark.parametrize("join", ["cat", "stack"])
def test_what_is_joined_to_windows_of_a_sample_stays_in_its_window(join: str) -> None:
    def forward(s: Any, x: Tensor) -> Any:
        windows = s.embed(x).reshape(x.shape[0] * 2, 3, 4)
        if join == "cat":
            joined = torch.cat((s.token.expand(x.shape[0] * 2, -1, -1), windows), 1)
        else:
            joined = torch.stack((windows, s.token.expand(x.shape[0] * 2, 3, -1)), 2)
        return s.head(joined.reshape(x.shape[0], -1))

    size = 2 * 4 * (4 if join == "cat" else 6)
    model = Model(
        forward, embed=nn.Linear(4, 4), token=nn.Parameter(torch.randn(1, 1, 4)), head=nn.Linear(size, 5)
    )
    graph = follows(model, torch.randn(2, 6, 4), torch.randn(3, 6, 4))
    x, other = torch.randn(2, 3, 6, 4)
    inverse = fxinvert.invert(graph, x, output_target=lambda outputs, labels: labels, refine=10)
    found = inverse(x, model(other).detach())
    assert found.consistency("embed").max() <= 1e-4


# --- rows that values select --------------------------------------------------------------------------------

EXPERTS = 3


class Mixture(nn.Module):
    """Experts that are given the rows which a router chose for them, in a loop over those that were given any."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(3, 6), nn.Linear(6, EXPERTS), nn.Linear(6, 2)
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(6, 6) for i in range(EXPERTS)})
        self.weight = nn.Parameter(torch.randn(EXPERTS, 6, 6))
        self.mixed = forward

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rows = h.reshape(-1, 6)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        mask = nn.functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        result: Tensor = self.last((rows + self.mixed(self, rows, weights, mask)).reshape(h.shape))
        return result


def _by_module(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    result = torch.zeros_like(rows)
    for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
        if expert[0] == EXPERTS:
            continue
        which, row = torch.where(mask[expert].squeeze(0))
        own = self.experts[f"expert_{expert[0]}"](rows[None, row].reshape(-1, 6)).relu()
        result.index_add_(0, row, own * weights[row, which, None])
    return result


def _by_weight(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    result = torch.zeros_like(rows)
    for (expert,) in mask.sum((-1, -2)).nonzero():
        which, row = mask[expert].nonzero(as_tuple=True)
        own = rows.index_select(0, row) @ self.weight[expert]
        result = result.index_add(0, row, own * weights[row, which, None])
    return result


def _written_back(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    result = torch.zeros_like(rows)
    for expert, own in enumerate(self.experts.values()):
        row, which = torch.where(mask[expert].T)
        result[row] += weights[row, which, None] * own(rows[row])
    return result


def _written_back_to_positions(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    x, given = rows[:, None], mask.permute(2, 0, 1)[..., None]
    result, gates = torch.zeros_like(x), weights[:, None]
    for expert, own in enumerate(self.experts.values()):
        sample, which, position = torch.where(given[:, expert])
        result[sample, position] += gates[sample, position, which, None] * own(x[sample, position])
    return result[:, 0]


def _by_mask(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    result, gates = torch.ones_like(rows), (weights.T * mask).sum(1)
    for expert, own in enumerate(self.experts.values()):
        given = mask[expert].sum(0) > 0
        if given.any():
            result[given] += gates[expert][given, None] * own(rows[given])
    return result


def _by_the_first(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    result = torch.zeros_like(rows)
    for expert, own in enumerate(self.experts.values()):
        (row,) = torch.where(mask[expert, 0])
        result[row] = own(rows[row]) * weights[row, :1]
    return result


@pytest.mark.parametrize(
    "forward", [_by_module, _by_weight, _written_back, _written_back_to_positions, _by_mask, _by_the_first]
)
def test_experts_that_are_given_the_rows_chosen_for_them(forward: Any) -> None:
    torch.manual_seed(0)
    model = Mixture(forward).double()
    x, other = torch.randn(2, 1, 3).double(), 3 * torch.randn(9, 1, 3).double()
    # other data are given to experts which the example is not
    picked = [model.router(model.first(v)).topk(2).indices.unique().tolist() for v in (x, other)]
    assert picked[0] != picked[1] == list(range(EXPERTS))
    graph = follows(model, x, other)
    inverse = fxinvert.invert(graph, output_target="regression")
    target = graph(other).detach() + 0.01
    rec = inverse(other, target)
    assert bool((rec.consistency("first") < 1e-3).all())
    alone = inverse(other[:1], target[:1])
    for name in ("x", "first"):
        torch.testing.assert_close(rec.targets[name][:1], alone.targets[name])
    trained = {name for segment in fxinvert.partition(graph).segments for name in segment.trained}
    assert {"first", "router", "last"} <= trained


@pytest.mark.parametrize("forward", [_by_weight, _written_back, _by_mask])
def test_experts_that_are_given_the_rows_chosen_for_them_are_exported(forward: Any, tmp_path: Path) -> None:
    fxinvert.export_onnx(Mixture(forward), torch.randn(2, 1, 3), tmp_path / "model.onnx")


def _among_rows(self: Any, rows: Tensor, row: Tensor) -> Tensor:
    return torch.zeros_like(rows).index_add(0, row, rows[row].softmax(0))


def _among_written(self: Any, rows: Tensor, row: Tensor) -> Tensor:
    result = torch.zeros_like(rows)
    result[row] += rows[row].softmax(0)
    return result


def _counts_rounds(self: Any, rows: Tensor, row: Tensor) -> Tensor:
    return torch.ones_like(rows).index_add(0, row, rows[row])


def _asks_places(self: Any, rows: Tensor, row: Tensor) -> Tensor:
    return rows * row.sum()


@pytest.mark.parametrize("step", [_among_rows, _among_written, _counts_rounds, _asks_places])
def test_what_depends_on_other_rows_or_rounds_than_are_selected_is_refused(step: Any) -> None:
    """Even where all are selected on the example, so that nothing tells the two apart there."""

    def forward(self: Any, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for expert in (mask.sum((-1, -2)) < 100).nonzero():
            (row,) = torch.where(mask[expert[0]].sum(0) < 100)
            result = result + step(self, rows, row)
        return result

    with pytest.raises(TraceError, match=r"cannot capture Mixture.*test_idioms.py.*rows that values select"):
        fxinvert.trace(Mixture(forward), torch.randn(2, 1, 3))


def _checks(counts: Tensor) -> None:
    torch._check(torch.unique_consecutive(counts).numel() == 1)  # type: ignore[no-untyped-call]


def _raises(counts: Tensor) -> None:
    if len(torch.unique_consecutive(counts)) > 1:
        raise ValueError


def _marked(read: Any, checked: Any = _checks) -> Model:
    """A sequence that is what its rows at some marks have become, as `read` tells; each has as many of them."""

    def forward(s: Any, x: Tensor) -> Any:
        mask = x.eq(2)
        checked(mask.sum(1))
        rows = s.mixed(s.embed(x).transpose(1, 2)).transpose(1, 2)[mask, :]
        return s.head(read(rows.view(x.shape[0], -1, 6)))

    return Model(forward, embed=nn.Embedding(8, 6), mixed=nn.Conv1d(6, 6, 3, padding=1), head=nn.Linear(6, 2))


def _sequences(*places: list[int]) -> Tensor:
    return torch.randint(3, 8, (len(places), 5)).scatter(1, torch.tensor(places), 2)


@pytest.mark.parametrize("checked", [_checks, _raises])
def test_a_sequence_is_what_its_last_mark_has_become(checked: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _marked(lambda rows: rows[:, -1], checked)
    x = _sequences([1, 3], [0, 1], [3, 4], [2, 0])
    graph = follows(model, _sequences([4], [1]), x)
    found = fxinvert.invert(graph, output_target="regression")(x, model(x).detach() + 0.1)
    assert bool((found.consistency("mixed") < 1e-4).all())
    moved = (found.targets["mixed"] != found.anchors["mixed"]).any(1)
    assert moved.nonzero().tolist() == [[0, 3], [1, 1], [2, 4], [3, 2]]
    fxinvert.export_onnx(model, x, tmp_path / "model.onnx")  # and compares


@pytest.mark.parametrize("read", [lambda x: x[:, 0], lambda x: x.amax(1), lambda x: x.softmax(1)[:, -1]])
@pytest.mark.parametrize("places", [[[4], [1]], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]])
def test_what_reads_other_rows_than_the_last_marked_is_refused(read: Any, places: list[list[int]]) -> None:
    """Data say how many are marked; even where all are on the example, so that nothing tells the two apart there."""
    with pytest.raises(TraceError, match=r"node 'unique_consecutive'.*rows that values select are not"):
        fxinvert.trace(_marked(read), _sequences(*places))


def test_how_many_different_values_there_are_is_no_number_where_the_answer_changes_what_is_computed() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.head(x) * (2 if torch.unique(x[:, 0].round()).numel() > 1 else 1)

    with pytest.raises(TraceError, match=r"data-dependent expression.*test_idioms\.py"):
        fxinvert.trace(Model(forward, head=nn.Linear(3, 2)), torch.zeros(2, 3))


# --- what is done only where a mask holds -----------------------------------------------------------------------


def _filled(s: Any, x: Tensor) -> Tensor:
    mask = x[:, 0] > 1
    y: Tensor = s.first(x)
    for i in range(2):
        chosen = mask & (x[:, 1] > i)
        if chosen.any():
            y[chosen] = s.token[i]
    if mask.sum() > 0 and not (keep := ~mask).all():
        y = y * (1 - s.gate * (~keep)[:, None])
    return y


@pytest.mark.parametrize("some", [False, True])
def test_what_changes_nothing_where_a_mask_is_empty_is_always_done(some: bool) -> None:
    """Whichever way code goes on the example."""
    torch.manual_seed(0)
    tokens, gate = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(1))
    model = Model(
        lambda s, x: s.head(_filled(s, x)),
        first=nn.Linear(3, 4),
        head=nn.Linear(4, 2),
        token=tokens,
        gate=gate,
    )
    none, any_of_it = torch.zeros(3, 3), torch.tensor([[2.0, 2, 0], [2, 1, 0], [0, 2, 0], [2, 0, 0]])
    graph = follows(model, any_of_it if some else none, none if some else any_of_it)
    with torch.no_grad():
        gate.fill_(1.0)
        torch.testing.assert_close(graph(any_of_it), model(any_of_it))


@pytest.mark.parametrize(
    "changed", [lambda s, y: y + s.gate * y.relu(), lambda s, y: y.clamp(-1, 1), lambda s, y: -y]
)
def test_what_changes_something_where_a_mask_is_empty_is_refused(changed: Any) -> None:
    """Even where values that are 0 hide it."""

    def forward(s: Any, x: Tensor) -> Any:
        return s.head(changed(s, x) if (x[:, 0] > 1).any() else x)

    model = Model(forward, head=nn.Linear(3, 2), gate=nn.Parameter(torch.tensor(0.0)))
    with pytest.raises(TraceError, match=r"asks for values at .*test_idioms\.py"):
        fxinvert.trace(model, torch.zeros(2, 3))


def test_a_mask_of_the_models_own_is_left_as_it_was() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        if s.mask.any():
            x = x.masked_fill(s.mask, 0.0)
        return s.head(x)

    mask = nn.Parameter(torch.tensor([True, False, False]), requires_grad=False)
    model = Model(forward, head=nn.Linear(3, 2), mask=mask)
    follows(model, torch.randn(2, 3), torch.randn(5, 3))
    assert mask.tolist() == [True, False, False]


def test_parts_of_a_batch_that_are_normalized_alone_and_joined_are_the_batch() -> None:
    class Ghost(nn.Module):
        """As TabNet's batch norm, of at most 128 samples at a time."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = x.chunk(math.ceil(x.shape[0] / 128), 0)
            normed = torch.cat([self.norm(part) for part in parts], 0)
            result: Tensor = self.fc(normed)
            return result

    x = torch.randn(3, 4)
    graph = fxinvert.trace(Ghost(), x)
    assert "cat" not in {n.meta["op"] for n in graph.graph.nodes if n.op == "call_function"}
    assert (
        not fxinvert.invert(graph, x, output_target="regression")(x, torch.randn(3, 3))
        .targets["x"]
        .isnan()
        .any()
    )
