"""Data that does not fit into memory goes through closed form."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch, fxinvert
from torch import nn
limit = 2 * 2**30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
torch.manual_seed(0)
base, signs = torch.randn(1000, 1, 600), torch.randn(1000)
class Generated:
    "A million samples, 2.4 GB; no two of them are the same."
    def __iter__(self):
        for i in range(1000):
            x = base + signs[i]
            yield x, (x.mean((1, 2)) > 0).long()
net = nn.Sequential(nn.AvgPool1d(100), nn.Flatten(), nn.Linear(6, 2))
result = fxinvert.post_train(net, Generated(), sweeps=1, output_target="cross_entropy")
assert result.final.loss < result.baseline.loss
print(result.final.samples)
"""


@pytest.mark.slow
def test_a_million_samples_in_less_memory_than_they_take() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 150_000 < int(done.stdout) < 250_000
