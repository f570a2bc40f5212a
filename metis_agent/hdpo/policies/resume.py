"""The state of a fit on disk, so that one which was killed goes on from its last whole epoch.

One safetensors file a fit, its numbers in the header; written beside its place and moved there whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from metis_agent.errors import StorageError

__all__ = ["FitState", "fit_name", "load_state", "save_state", "source_stamp"]


@dataclass(frozen=True, kw_only=True)
class FitState:
    """After `epoch` epochs."""

    epoch: int
    best_loss: float
    since_best: int
    best: Mapping[str, torch.Tensor]
    latest: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    """Of Adam, by parameter and name."""


def source_stamp(model: str) -> list[Any]:
    """What tells one state of a model folder from another; of a model on the Hub, its name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return [model]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]


def fit_name(
    description: Sequence[Any], keys: Sequence[str], rows: NDArray[np.int64], targets: NDArray[np.float64]
) -> str:
    """The same for the same fit of the same model to the same outcomes, and for no other."""
    digest = hashlib.sha256(json.dumps([description, [keys[row] for row in rows]], sort_keys=True).encode())
    digest.update(np.ascontiguousarray(targets).tobytes())
    return digest.hexdigest()[:20]


def save_state(path: Path, state: FitState) -> None:
    """Write it.

    Raises:
        StorageError: it can't be written.
    """
    parts = {"best": state.best, "latest": state.latest, "moments": state.moments}
    tensors = {
        f"{part}:{name}": value.detach().to("cpu", copy=True).contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    numbers = {"epoch": state.epoch, "best_loss": state.best_loss, "since_best": state.since_best}
    draft = path.with_suffix(".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={"state": json.dumps(numbers)})
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{str(path)!r} can't be written: {error}. Free some space, or give another.") from error


def load_state(path: Path) -> FitState | None:
    """Read it; None where there is none, or none that is whole."""
    parts: dict[str, dict[str, torch.Tensor]] = {"best": {}, "latest": {}, "moments": {}}
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["state"])
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, _, name = key.partition(":")
                parts[part][name] = file.get_tensor(key)
        return FitState(**{**numbers, **parts})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
