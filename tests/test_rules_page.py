"""docs/rules.md is current, and every op that real models use is listed there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"

#: ATen names of the ops that at least two of 222 public models contain
IN_REAL_MODELS = """
linear conv2d flatten add adaptive_avg_pool2d dropout batch_norm mul relu size reshape transpose gelu layer_norm cat
permute mean view getitem slice max_pool2d scaled_dot_product_attention unsqueeze sigmoid expand contiguous softmax
select unbind matmul avg_pool2d index pad arange silu to div sub split_with_sizes chunk embedding ge linalg_vector_norm
stack hardsigmoid new_ones and pow roll expand_as ne clamp_min cos sin masked_fill eq group_norm sum neg squeeze
hardswish clamp new_zeros fill tanh rsqrt conv1d exp gather le split type_as upsample_bilinear2d upsample_nearest2d
reshape_as unflatten hardtanh cumsum addcmul alias meshgrid einsum clone zero upsample_bicubic2d amax rms_norm zeros
im2col lift_fresh_copy _assert_tensor_metadata _assert getattr floordiv mod norm instance_norm
""".split()


@pytest.fixture(scope="module")
def generated() -> str:
    """Made by a fresh process, so that rules registered by other tests are not on it."""
    command = [sys.executable, "-m", "fxinvert", "rules", "--markdown"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_page_is_current(generated: str) -> None:
    assert PAGE.read_text() == generated, "make it anew: fxinvert rules --markdown > docs/rules.md"


@pytest.mark.parametrize("op", IN_REAL_MODELS)
def test_every_op_of_real_models_is_listed(generated: str, op: str) -> None:
    assert f"\n| `{op}` |" in generated
