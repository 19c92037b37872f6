"""Rules of installed packages are found by entry point; one that fails leaves the others working."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fxinvert
    from good_rules import Halve
    rec = fxinvert.invert(torch.nn.Sequential(Halve()), torch.ones(2, 3), output_target="regression")(
        torch.ones(2, 3), torch.zeros(2, 3)
    )
print(float(rec.targets[rec.names[0]].abs().max()))
print([str(w.message) for w in caught if w.category.__name__ == "PluginWarning"])
print(fxinvert.default_rules()["good_rules.Halve"].origin)
"""


def package(folder: Path, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fxinvert.rules]\n{name} = {name}\n")


def test_installed_packages_bring_rules_and_a_broken_one_is_warned_of(tmp_path: Path) -> None:
    package(
        tmp_path,
        "good_rules",
        "import fxinvert\n"
        "from torch import nn\n"
        "class Halve(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x / 2\n"
        "@fxinvert.inverse_rule(Halve)\n"
        "def invert_halve(op, target):\n"
        "    return 2 * target\n",
    )
    package(tmp_path, "broken_rules", "import no_such_module\n")
    run = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    answer, warnings, origin = run.stdout.splitlines()
    assert float(answer) == 0
    assert "broken_rules" in warnings
    assert "No module named 'no_such_module'" in warnings
    assert "broken_rules.py:1" in warnings
    assert "good_rules' of" not in warnings
    assert origin.endswith("good_rules.py:6")
