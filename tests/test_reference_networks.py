"""The reference networks: their forms, their shapes, and what their outputs depend on."""

from __future__ import annotations

import pytest
import torch
from reference import NAMES, inputs_of, parts_of
from torch import Tensor, fx, nn

import fxinvert.models as zoo
from fxinvert.models.samples import by_name, loss


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("digits_cnn", ["conv1", "relu1", "conv2", "relu2", "flatten", "fc1", "relu3", "fc2"]),
        ("digits_mlp", ["flatten", "fc1", "tanh1", "fc2", "tanh2", "fc3"]),
    ],
)
def test_networks_trace_to_their_attributes(name: str, nodes: list[str]) -> None:
    model = zoo.load(name)
    graph = fx.symbolic_trace(model)
    assert [node.name for node in graph.graph.nodes if node.op == "call_module"] == nodes
    images = torch.rand(3, 1, 8, 8)
    assert model(images).shape == (3, 10)
    assert torch.equal(graph(images), model(images))


BATCH_NORM = ("digits_resnet", "digits_mbconv", "digits_densenet", "digits_unet")
OUTPUT_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "digits_unet": {"output": (3, 8, 8)},
    "digits_two_head": {"digit": (10,), "offset": (1,)},
    "char_transformer": {"output": (32, 26)},
    "driving": {"steering": (1,), "speed": (1,)},
}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_stated_shapes_and_fit_the_labels(name: str) -> None:
    model = zoo.load(name)
    shapes = OUTPUT_SHAPES.get(name, {"output": (10,)})
    for count in (1, 3):
        outputs = by_name(model(*inputs_of(name, count)))
        assert {key: tuple(value.shape) for key, value in outputs.items()} == {
            key: (count, *shape) for key, shape in shapes.items()
        }
    assert list(parts_of(name).test.labels) == list(shapes)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    model = zoo.load(name)
    together, alone = by_name(model(*inputs_of(name, 8))), by_name(model(*inputs_of(name, 1)))
    for key, value in alone.items():
        torch.testing.assert_close(together[key][:1], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_networks_can_be_traced_symbolically(name: str) -> None:
    model = zoo.load(name)
    graph = fx.symbolic_trace(model)
    inputs = inputs_of(name, 3)
    expected, found = by_name(model(*inputs)), by_name(graph(*inputs))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_matters(name: str) -> None:
    """The loss depends on each parameter."""
    model, samples = zoo.load(name), parts_of(name).test.split(64)[0]
    torch.autograd.backward(loss(model(*samples.inputs), samples.labels))
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().max() > 0, key


def test_residual_network_has_the_stated_form() -> None:
    convolutions = [module for module in zoo.load("digits_resnet").modules() if isinstance(module, nn.Conv2d)]
    sizes = [module.kernel_size for module in convolutions]
    assert (sizes.count((3, 3)), sizes.count((1, 1))) == (9, 1)
    assert {module.out_channels for module in convolutions} == {12, 16}


@pytest.mark.parametrize("name", BATCH_NORM)
def test_batch_normalization_has_seen_data(name: str) -> None:
    for state in ("early", "converged"):
        layers = [m for m in zoo.load(name, state).modules() if isinstance(m, nn.BatchNorm2d)]
        assert layers
        for layer in layers:
            assert layer.num_batches_tracked == zoo.card(name, state)["step"]
            assert layer.running_mean is not None
            assert layer.running_mean.abs().max() > 0


def test_character_transformer_is_causal() -> None:
    model = zoo.load("char_transformer")
    (tokens,) = inputs_of("char_transformer", 4)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 26
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax((1, 2)).min() > 0.1
    torch.testing.assert_close(model(tokens[:, :9]), before[:, :9])  # a shorter context will do


def test_heads_look_at_both_inputs() -> None:
    for name in ("digits_two_head", "driving"):
        model = zoo.load(name)
        images, told = inputs_of(name, 16)
        outputs = model(images, told)
        for other in (model(images.roll(1, 0), told), model(images, told.roll(1, 0))):
            assert all((other[key] - value).abs().max() > 0.1 for key, value in outputs.items())


def test_factories_draw_from_the_global_generator() -> None:
    def first(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return next(zoo.digits_cnn().parameters()).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
