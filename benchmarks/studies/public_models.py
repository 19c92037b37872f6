"""Which public models are tried: one of every family, the smallest; of transformers with small configurations."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

#: pixels of images: the first of these that a model takes, or else its own
SIZES = 64, 128, 224
CLASSES = 10


#: names of image models: of each file of timm the one with the fewest parameters, of torchvision each builder's smallest
IMAGES: dict[str, tuple[str, ...]] = {
    "torchvision": tuple(
        """
        alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
        mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50
        resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32
        wide_resnet50_2 deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large mc3_18 mvit_v1_b r2plus1d_18
        r3d_18 s3d swin3d_t
        """.split()
    ),
    "timm": tuple(
        """
        adv_inception_v3 beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
        convnext_zepto_rms cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny
        deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
        efficientformerv2_s0 efficientnet_lite0 efficientvim_m1 efficientvit_b0 efficientvit_m0
        ens_adv_inception_resnet_v2 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
        flexivit_small focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 gluon_resnet18_v1b gmlp_ti16_224
        halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
        inception_v4 jx_nest_tiny lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0
        mambaout_femto maxvit_pico_rw_256 mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs
        mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nextvit_small nf_regnet_b0 pit_ti_224
        pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
        res2next50 resnest14d resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42
        sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
        swinv2_cr_tiny_224 swinv2_tiny_window16_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
        twins_svt_small vgg11 visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224
        volo_d1_224 xception41p xcit_nano_12_p8_224
        """.split()
    ),
}
#: those of which there are only large ones: so many layers of them will do
SHALLOW = ("beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m", "naflexvit_base_patch16_parfac_gap",
           "qwen3_vit_88m", "samvit_base_patch16_224")  # fmt: skip
LAYERS = 3
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO, FRAMES = ("mc3_18", "mvit_v1_b", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t"), 16

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
CODER = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
         "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
PIXELS = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES, **SMALL}
STAGES = {"num_labels": CLASSES, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}

#: of transformers: what its class is called before `Config`, and after it; its configuration; pixels of images, 0 for texts
TRANSFORMERS: dict[str, tuple[str, str, Mapping[str, Any], int]] = {
    "albert": ("Albert", "ForSequenceClassification", {**TEXT, "embedding_size": 16}, 0),
    "bart": ("Bart", "ForConditionalGeneration", CODER, 0),
    "bert": ("Bert", "ForSequenceClassification", TEXT, 0),
    "bloom": ("Bloom", "ForCausalLM", {**TEXT, "n_layer": 2, "n_head": 4}, 0),
    "deberta_v2": ("DebertaV2", "ForSequenceClassification", TEXT, 0),
    "distilbert": ("DistilBert", "ForSequenceClassification", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, 0),
    "electra": ("Electra", "ForTokenClassification", {**TEXT, "embedding_size": 16}, 0),
    "falcon": ("Falcon", "ForCausalLM", TEXT, 0),
    "gemma": ("Gemma", "ForCausalLM", GROUPED, 0),
    "gpt2": ("GPT2", "LMHeadModel", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 0),
    "gpt_neo": ("GPTNeo", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}, 0),
    "gptj": ("GPTJ", "ForCausalLM", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}, 0),
    "llama": ("Llama", "ForCausalLM", GROUPED, 0),
    "mamba": ("Mamba", "ForCausalLM", {**TEXT, "state_size": 8}, 0),
    "mistral": ("Mistral", "ForCausalLM", GROUPED, 0),
    "opt": ("OPT", "ForCausalLM", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, 0),
    "phi": ("Phi", "ForCausalLM", TEXT, 0),
    "qwen2": ("Qwen2", "ForCausalLM", GROUPED, 0),
    "roberta": ("Roberta", "ForSequenceClassification", {**TEXT, "max_position_embeddings": 64}, 0),
    "t5": ("T5", "ForConditionalGeneration", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}, 0),
    "xlnet": ("XLNet", "ForSequenceClassification", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, 0),
    "beit": ("Beit", "ForImageClassification", PIXELS, 32),
    "convnext": ("ConvNext", "ForImageClassification", STAGES, 64),
    "deit": ("DeiT", "ForImageClassification", PIXELS, 32),
    "dinov2": ("Dinov2", "ForImageClassification", PIXELS, 32),
    "mobilevit": ("MobileViT", "ForImageClassification", {"num_labels": CLASSES, "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}, 64),
    "resnet": ("ResNet", "ForImageClassification", {**STAGES, "embedding_size": 8, "layer_type": "basic"}, 64),
    "segformer": ("Segformer", "ForSemanticSegmentation", {"num_labels": CLASSES, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32}, 64),
    "swin": ("Swin", "ForImageClassification", {"image_size": 32, "num_labels": CLASSES, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, 32),
    "vit": ("ViT", "ForImageClassification", PIXELS, 32),
}  # fmt: skip
#: tokens of a text
LENGTH = 12


def built(library: str, name: str, samples: tuple[int, ...]) -> tuple[nn.Module, list[Any]]:
    """A model with random weights, in evaluation mode, and inputs for each number of samples."""
    torch.manual_seed(0)
    if library == "transformers":
        return _configured(name, samples)
    model: nn.Module
    if library == "timm":
        options: dict[str, Any] = {"depth": LAYERS} if name in SHALLOW else {}
        model = importlib.import_module("timm").create_model(name, num_classes=CLASSES, **options)
    else:
        options = {"weights_backbone": None} if name in SEGMENTATION else {}
        models = importlib.import_module("torchvision.models")
        with _of_size(SIZES[0]) if name == "mvit_v1_b" else nullcontext():
            model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    model.eval()
    shapes: list[tuple[int, ...]] = [(3, *([FRAMES] if name in VIDEO else []), size, size) for size in SIZES]
    own = tuple(getattr(model, "default_cfg", {}).get("input_size", shapes[-1]))
    shape = next((shape for shape in shapes if _takes(model, shape)), own)
    return model, [torch.randn(count, *shape) for count in samples]


@contextmanager
def _of_size(size: int) -> Iterator[None]:
    """torchvision's MViT takes images of one size only, for which its builders do not ask."""
    mvit = importlib.import_module("torchvision.models.video.mvit")
    made = mvit.MViT
    with patch.object(mvit, "MViT", lambda **settings: made(**{**settings, "spatial_size": (size, size)})):
        yield


def _takes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model runs on samples of a shape; what it does not like it says in many ways."""
    try:
        with torch.no_grad():
            model(torch.zeros(2, *shape))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError):
        return False
    return True


def _configured(name: str, samples: tuple[int, ...]) -> tuple[nn.Module, list[Any]]:
    transformers = importlib.import_module("transformers")
    family, head, options, size = TRANSFORMERS[name]
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options))
    inputs = [
        {"pixel_values": torch.randn(count, 3, size, size)}
        if size
        else {"input_ids": torch.randint(3, 64, (count, LENGTH))}
        for count in samples
    ]
    if getattr(model.config, "is_encoder_decoder", False):
        inputs = [{**given, "decoder_input_ids": given["input_ids"]} for given in inputs]
    return model.eval(), inputs
