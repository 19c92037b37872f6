"""docs/rules.md is current, and every op that real models use is listed there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fxinvert
from fxinvert.rules.constants import CONSTANTS

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"

#: keys of the ops that at least two of 222 public models contain, as modules, functions, methods or ATen ops
IN_REAL_MODELS = """
conv2d linear add adaptive_avg_pool2d dropout relu mul alias batch_norm getattr flatten getitem mean eq _assert max_pool2d
cat permute reshape gelu transpose view layer_norm avg_pool2d floordiv silu sigmoid unbind contiguous
scaled_dot_product_attention matmul torchvision.ops.stochastic_depth.stochastic_depth softmax expand unsqueeze sub chunk
pad hardsigmoid div mod size stack hardswish torchvision.models.swin_transformer._get_relative_position_bias
torchvision.models.swin_transformer.shifted_window_attention torchvision.models.swin_transformer._patch_merging_pad
normalize pow interpolate to relu6 dim multiheadattention conv1d addcmul split sin cos sum reshape_as group_norm roll
squeeze norm neg type_as arange upsample clamp exp unfold sym_size slice select index _assert_tensor_metadata
split_with_sizes embedding ge linalg_vector_norm new_ones and __and__ expand_as ne clamp_min masked_fill lift_fresh_copy
new_zeros fill tanh rsqrt gather le upsample_bilinear2d upsample_nearest2d unflatten hardtanh cumsum meshgrid einsum clone
zero upsample_bicubic2d amax rms_norm zeros im2col instance_norm
""".split()


@pytest.fixture(scope="module")
def generated() -> str:
    """Made by a fresh process, so that rules registered by other tests are not on it."""
    command = [sys.executable, "-m", "fxinvert", "rules", "--markdown"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_page_is_current(generated: str) -> None:
    assert PAGE.read_text() == generated, "make it anew: fxinvert rules --markdown > docs/rules.md"


def test_every_rule_says_what_it_does_and_from_where(generated: str) -> None:
    table = generated.split("\n\n")[2].splitlines()
    assert len(table) > 200
    for row in table[2:]:
        cells = [cell.strip() for cell in row.replace("\\|", "").split("|")[1:-1]]
        assert len(cells) == 6, row
        assert all(cells[i] for i in (0, 1, 2, 4, 5)), row


def test_no_op_is_both_inverted_and_constant() -> None:
    assert not set(fxinvert.default_rules()) & set(CONSTANTS)


@pytest.mark.parametrize("op", IN_REAL_MODELS)
def test_every_op_of_real_models_is_listed(generated: str, op: str) -> None:
    assert f"\n| `{op}` |" in generated
