"""Runs the notebooks of examples/ and tells whether they still print what is kept in them.

`python -m tests.notebooks [NAME ...]` runs them again and keeps what they print. A cell tagged `varies` (times, ids)
may print anything; one tagged `rough` (sampled training) numbers that are near.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def run_notebook(path: Path, folder: Path) -> Any:
    """A copy of the notebook with fresh outputs, run with `folder` as its current one, the data beside it in reach."""
    shutil.copytree(EXAMPLES / "qwen15", folder / "qwen15", dirs_exist_ok=True)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}.items():
        os.environ[name] = value
    client.execute()
    return notebook


def printed(cell: Any) -> str:
    """What a cell printed, and its last value, as text."""
    parts = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in ("display_data", "execute_result") and "image/png" not in output.data:
            parts.append(output.data.get("text/plain", ""))
    return "".join(parts)


def pictures(cell: Any) -> int:
    """How many pictures a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def same(kept: str, fresh: str, tolerance: float) -> bool:
    """The same words, and numbers that are as near as that, relative to 1 + their size."""
    if _NUMBER.sub("#", kept) != _NUMBER.sub("#", fresh):
        return False
    pairs = zip(_NUMBER.findall(kept), _NUMBER.findall(fresh), strict=True)
    return all(math.isclose(float(a), float(b), abs_tol=tolerance * (1 + abs(float(a)))) for a, b in pairs)


def keep(path: Path, folder: Path) -> None:
    """Run a notebook, and write it back with what it printed."""
    notebook = run_notebook(path, folder)
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    import tempfile

    for notebook_path in sorted(EXAMPLES.glob("*.ipynb")):
        if not sys.argv[1:] or notebook_path.stem[:2] in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as scratch:
                keep(notebook_path, Path(scratch))
            print(notebook_path.name)
