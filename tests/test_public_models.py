"""Public models: small random configurations of transformers, and some of torchvision and timm, go all the way."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fxinvert
from benchmarks.studies.public import operators
from fxinvert.errors import TraceError
from fxinvert.inversion import output_given
from fxinvert.passes.flow import Flow

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 64, **SMALL}
IMAGE = {"image_size": 32, "num_labels": 5}

#: model and configuration of transformers, what is configured, and the size of the images; None: it reads text
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], int | None]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, None),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        None,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}, None),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**TEXT, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "topk_group": 1, "n_group": 1},
        None,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**IMAGE, **SMALL, "patch_size": 8}, 32),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": 5},
        64,
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {**IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        32,
    ),
}  # fmt: skip
#: the library, the model, and the size of its images
IMAGE_MODELS = [
    ("torchvision.models", "resnet18", 64),
    ("torchvision.models", "swin_t", 64),
    ("torchvision.models", "densenet121", 64),
    ("timm", "test_vit", 160),
    ("timm", "test_convnext", 160),
    ("timm", "test_efficientnet", 160),
    ("timm", "efficientvit_b0", 224),
    ("timm", "mvitv2_tiny", 224),
]


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> Any:
    library = operators()
    yield
    del library


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def goes_all_the_way(model: torch.nn.Module, inputs: Any) -> None:
    """Traces, inverts, partitions; the linearized targets are approached."""
    graph = fxinvert.trace(model.eval(), inputs)
    plan = fxinvert.partition(graph)
    assert sum(len(segment.trained) for segment in plan.segments) > 3
    inverse = fxinvert.invert(graph, output_target="regression", reconstruction="linearized")
    values = inverse.forward(inputs)
    output, last = values[inverse.output_node], Flow(graph).line[-2]
    torch.manual_seed(0)
    moved = values[last] + 0.01 * values[last].std() * torch.randn_like(values[last])
    target = output_given(graph, values, last, moved).detach()
    rec = inverse(inputs, target)
    assert all(bool(torch.isfinite(rec.targets[name]).all()) for name in rec.names)
    missing = (target - output).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
    assert bool((rec.consistency(last.meta["path"]) < 0.5 * missing).all())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_from_small_random_configurations(name: str, tmp_path: Path) -> None:
    transformers = imported("transformers")
    kind, config, options, size = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    inputs: dict[str, Tensor] = (
        {"input_ids": torch.randint(3, 64, (2, 12))}
        if size is None
        else {"pixel_values": torch.randn(2, 3, size, size)}
    )
    goes_all_the_way(model, inputs)
    fxinvert.export_onnx(model, inputs, tmp_path / "model.onnx")


def test_padding_before_a_text_is_exported(tmp_path: Path) -> None:
    """Its positions attend to nothing."""
    transformers = imported("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[-1, :2] = 0
    inputs = {"input_ids": torch.randint(3, 64, (3, 6)), "attention_mask": mask}
    fxinvert.export_onnx(model, inputs, tmp_path / "model.onnx", batch_sizes=(1, 3))


def test_places_of_a_mask_that_a_model_makes_itself_are_followed(tmp_path: Path) -> None:
    """Longformer's first token attends to all, wherever windows end."""
    transformers = imported("transformers")
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**TEXT, attention_window=4)
    model = transformers.LongformerForSequenceClassification(config).eval()
    few, more = torch.randint(3, 64, (2, 12)), torch.randint(3, 64, (5, 12))
    with torch.no_grad():
        torch.testing.assert_close(fxinvert.trace(model, few)(more), model(more).logits)
    fxinvert.export_onnx(model, few, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("kind", "config", "options", "message"),
    [
        (
            "LongformerForSequenceClassification",
            "LongformerConfig",
            {**TEXT, "attention_window": 4},
            r"data-dependent.*asks for values at .*modeling_longformer.py\", line \d+, in forward \(item\)",
        ),
        ("ViTMAEModel", "ViTMAEConfig", {**SMALL, "image_size": 32, "patch_size": 8}, "noise that forward"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    kind: str, config: str, options: dict[str, Any], message: str
) -> None:
    """Shapes that depend on data, here which of a text is padding; noise in evaluation mode."""
    transformers = imported("transformers")
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    inputs: Any = torch.randn(2, 3, 32, 32)
    if "image_size" not in options:
        inputs = {
            "input_ids": torch.randint(3, 64, (2, 12)),
            "attention_mask": torch.ones(2, 12, dtype=torch.long),
        }
    with pytest.raises(TraceError, match=message):
        fxinvert.trace(model, inputs)


def test_noise_that_is_given_is_an_input() -> None:
    transformers = imported("transformers")
    config = transformers.ViTMAEConfig(**SMALL, image_size=32, patch_size=8, mask_ratio=0.5)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}
    goes_all_the_way(transformers.ViTMAEModel(config), inputs)


@pytest.mark.parametrize(("library", "name", "size"), IMAGE_MODELS)
def test_image_models(library: str, name: str, size: int) -> None:
    source = imported(library)
    torch.manual_seed(0)
    create = source.create_model if library == "timm" else getattr(source, name)
    model = create(name, num_classes=10) if library == "timm" else create(weights=None, num_classes=10)
    goes_all_the_way(model, torch.randn(2, 3, size, size))
