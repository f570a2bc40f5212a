"""Wheel and sdist of this tree: how they are built, and what has to be in them and what must not."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

__all__ = ["ROOT", "build", "names_in_sdist", "names_in_wheel", "strays", "wanted_in_wheel"]

ROOT = Path(__file__).parents[2]

_KEPT = (".jinja", ".yaml", ".md", ".css", ".html", ".js", ".json", ".safetensors", ".typed", ".txt", ".py")
"""What a package may hold; anything else came there by accident."""
_STRAY = {
    "__pycache__", ".git", ".hypothesis", ".ipynb_checkpoints", ".langgraph_api", ".mypy_cache", ".pytest_cache",
    ".ruff_cache", ".venv", "build", "dist", "runs",
}  # fmt: skip


def build(source: Path, folder: Path, *targets: str) -> list[Path]:
    """Build these targets (`wheel`, `sdist`) of a source tree, without a network; the files that came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    for target in targets:
        command += ["-t", target]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True, timeout=900)
    return sorted(set(folder.iterdir()) - before, key=lambda path: path.suffix)  # .gz, then .whl


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def names_in_sdist(sdist: Path) -> set[str]:
    """Without the folder that an sdist has around everything."""
    with tarfile.open(sdist) as file:
        return {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}


def wanted_in_wheel(package: Path) -> set[str]:
    """Every file of the package that belongs to it: code, and what the code opens."""
    return {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and path.suffix in _KEPT and not strays([str(path.relative_to(package))])
    }


def strays(names: set[str] | list[str]) -> list[str]:
    """Caches, environments and what an editor left."""
    return sorted(name for name in names if name.endswith(".pyc") or _STRAY & set(name.split("/")))
