"""The package holds what it should, wherever it is built from, and the repository names no machine's folders."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = {".py", ".typed", ".safetensors", ".html", ".css", ".js"}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file of the repository, links as links: what is tracked, and what would be on `git add --all`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = sorted(set(listed.split("\0")) - {""})
    return [Path(name) for name in names if os.path.lexists(ROOT / name)]  # a deletion may be uncommitted


def test_the_map_of_the_passes_names_every_file_once() -> None:
    told = ast.get_docstring(ast.parse((ROOT / "passes" / "__init__.py").read_text())) or ""
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert sorted(re.findall(r"`(\w+)`", told)) == sorted(files)


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    # os.walk, because Path.rglob follows no links
    found = [
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, names in os.walk(ROOT / "fxinvert", followlinks=True)
        if "__init__.py" in names
    ]
    assert listed == sorted(found)


def test_passes_and_models_are_imported_by_their_full_name(files: list[Path]) -> None:
    """`import passes` works at the repository's root and yields a second copy of every class in it."""
    offenders = []
    for path in files:
        if path.suffix != ".py" or (ROOT / path).is_symlink():
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            offenders += [f"{path}: {name}" for name in names if name.split(".")[0] in {"passes", "models"}]
    assert not offenders


def test_no_absolute_paths(files: list[Path]) -> None:
    """A path that begins at a machine's root means nothing on another machine (URLs, `</opt>`, `$X/opt` are fine)."""
    absolute = re.compile(r"(?<![\w.~<)}\]/-])/(?:work|opt|home|root|Users)\b")
    offenders = []
    for path in files:
        if (ROOT / path).is_symlink() or b"\0" in (content := (ROOT / path).read_bytes()):
            continue
        lines = content.decode("utf-8", errors="replace").splitlines()
        offenders += [f"{path}:{n}: {line}" for n, line in enumerate(lines, 1) if absolute.search(line)]
    assert not offenders


def build(source: Path, out: Path, *kinds: str) -> Path:
    """Run `python -m build`; return the wheel. It reuses this environment's setuptools where that is new enough."""
    installed = importlib.util.find_spec("setuptools") and importlib.metadata.version("setuptools")
    isolation = ["--no-isolation"] if installed and int(installed.split(".")[0]) >= 77 else []
    command = [sys.executable, "-m", "build", *isolation, *kinds, "--outdir", str(out), str(source)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    (wheel,) = out.glob("*.whl")
    return wheel


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.mark.slow
def test_wheel_and_sdist(files: list[Path], tmp_path: Path) -> None:
    # Built from a copy: a build leaves folders behind, and the next one picks up what lies in them.
    tree = tmp_path / "tree"
    for path in files:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path, follow_symlinks=False)

    direct = build(tree, tmp_path / "direct", "--wheel")
    through_sdist = build(tree, tmp_path / "through_sdist")  # without a kind: an sdist, then a wheel from it
    held = members(direct)
    assert held == members(through_sdist)

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {PurePosixPath(name).parts[0] for name in held} == {"fxinvert", f"fxinvert-{version}.dist-info"}
    inside = {
        path.as_posix() if path.parts[0] == "fxinvert" else f"fxinvert/{path.as_posix()}"
        for path in files
        if path.parts[0] in {"fxinvert", "passes", "models"} and path.suffix in SHIPPED
    }
    assert {"fxinvert/passes/__init__.py", "fxinvert/models/__init__.py", "fxinvert/py.typed"} <= inside
    assert inside == {name for name in held if name.startswith("fxinvert/")}

    (sdist,) = (tmp_path / "through_sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    assert {"LICENSE", "README.md", "passes/__init__.py", "models/__init__.py"} <= names
    second_copies = [name for name in names if name.startswith(("fxinvert/passes", "fxinvert/models"))]
    assert not second_copies
