"""What every test gets: torch that is polite to its neighbours, and the same random numbers on every run."""

import os
from collections.abc import Iterator

# torch's OpenMP runtime reads this once, when it is loaded. Spinning threads make a shared machine ten times slower.
os.environ["OMP_WAIT_POLICY"] = "passive"

import hypothesis
import pytest
import torch

import fxinvert
from fxinvert import InverseGraph, Reconstruction, models

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism

# A test's verdict must not depend on how busy the machine is (deadline, too_slow) or on luck (derandomize).
hypothesis.settings.register_profile(
    "fxinvert",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fxinvert")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rules_as_found() -> Iterator[None]:
    """Whatever a test adds to the default rules is gone afterwards."""
    rules = fxinvert.default_rules()
    before = dict(rules._rules), dict(rules._kept_whole)
    yield
    rules._rules, rules._kept_whole = before


@pytest.fixture(scope="session")
def digits_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """32 test images with their labels."""
    digits = models.digits()
    return digits.x_test[:32], digits.y_test[:32]


@pytest.fixture(scope="session")
def early(digits_batch: tuple[torch.Tensor, torch.Tensor]) -> InverseGraph:
    """The inverse of the under-trained digits CNN."""
    return fxinvert.invert(models.load("digits_cnn", "early"), digits_batch[0])


@pytest.fixture(scope="session")
def rec(early: InverseGraph, digits_batch: tuple[torch.Tensor, torch.Tensor]) -> Reconstruction:
    return early(*digits_batch)
