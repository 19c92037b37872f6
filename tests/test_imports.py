"""What is imported when: `import fxinvert` and `--help` wait for nothing heavy, and the library for nothing that it may not need.

Times depend on the machine; what is imported does not. Measured where this was written, in processor time: `import
fxinvert` takes 0.02 s, all of its names 0.3 s on top of torch, and `fxinvert --help` 0.4 s.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import fxinvert

#: what only export, reports, explanations, pictures and clusters need, and only when they are asked for
LATER = """onnx onnxruntime onnxscript matplotlib sklearn scipy pandas jinja2 PIL ray loky tensorboard networkx sympy
torch._dynamo torch._inductor transformers torchvision""".split()


def imported(script: str) -> set[str]:
    """The modules that a fresh interpreter has imported after a script."""
    script += "\nimport sys; print(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_but_itself() -> None:
    found = imported("import fxinvert")
    assert {name.partition(".")[0] for name in found} & {"torch", "numpy", "rich", "pydantic"} == set()
    assert found.isdisjoint(LATER)


@pytest.mark.parametrize("command", [[], ["post-train"], ["explain"]], ids=" ".join)
def test_help_does_not_wait_for_torch(command: list[str]) -> None:
    arguments = [*command, "--help"]
    found = imported(f"from fxinvert.cli import app; app({arguments}, standalone_mode=False)")
    assert "fxinvert.cli" in found
    assert found.isdisjoint({"torch", "numpy", *LATER})


def test_the_public_names_need_torch_and_little_else() -> None:
    torch_alone = imported("import torch")
    everything = imported(f"import fxinvert\nfor name in {fxinvert.__all__}: getattr(fxinvert, name)")
    assert "fxinvert.post_training" in everything
    assert (everything - torch_alone).isdisjoint(LATER)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fxinvert.no_such_name
    assert set(fxinvert.__all__) <= set(dir(fxinvert))
