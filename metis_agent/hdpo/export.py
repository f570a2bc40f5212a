"""Write a trained gate as an artefact folder: `gate.json`, safetensors, and the files of a policy that has its own.

Where it stands: `gate_trainer` -> **export** -> `metis_agent.gates.policy.PolicyGate`. The folder is written
beside its place and moved there whole, so a reader never meets half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from metis_agent.errors import CheckpointError, StorageError
from metis_agent.formats import atomic_path
from metis_agent.gates.artefact import (
    FORMAT,
    GATE_FILE,
    TENSOR_FILE,
    Artefact,
    description_hash,
    file_hash,
    load_artefact,
)
from metis_agent.gates.reading import READING
from metis_agent.hdpo.gate_trainer import TrainedGate
from metis_agent.hdpo.policies import SavesFiles
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["set_threshold", "trained_keys", "write_artefact"]


def write_artefact(
    gate: TrainedGate,
    folder: str | Path,
    *,
    table: OutcomeTable,
    metrics: Mapping[str, Any],
    descriptions: Mapping[str, str] | None = None,
) -> Artefact:
    """Write `gate`, trained on `table`, and read it back.

    Args:
        gate: To write.
        folder: An artefact that is already there is replaced; any other folder has to be empty.
        table: Its outcomes' hash is recorded.
        metrics: Held-out figures to keep with it.
        descriptions: Of the tools, by name.

    Raises:
        StorageError: the folder holds something else, or can't be written.
    """
    contrast = gate.contrast
    data_hash = _data_hash(table)
    description = {
        "format": FORMAT,
        "kind": gate.kind,
        "reading": READING,
        "version": data_hash[:12],
        "tools": _tools(gate, descriptions or {}),
        "threshold": {"value": 0.5, "chosen": "a tool's estimated benefit exceeds beta times what it saves"},
        "decision": {
            "beta": contrast.beta,
            "trust": contrast.trust,
            "saving": contrast.saving.tolist(),
            "mean_accuracy": contrast.mean_accuracy.tolist(),
            "head_temperature": contrast.head_temperature.tolist(),
            "temperature": contrast.temperature,
            **({} if contrast.step_saving is None else {"step_saving": contrast.step_saving.tolist()}),
            **({} if contrast.most_to_come is None else {"most_to_come": contrast.most_to_come}),
        },
        "policy": dict(gate.policy.config()),
        "training": {"rows": len(table), "strength": gate.strength.tolist(), "data_hash": data_hash},
        "metrics": dict(metrics),
        **({"models": list(table.models)} if table.models else {}),
        **({"familiarity": dict(gate.familiarity.description)} if gate.familiarity else {}),
    }
    tensors = {
        **gate.policy.tensors(),
        **(gate.familiarity.tensors() if gate.familiarity else {}),
        "trained_keys": np.array([int(key, 16) for key in gate.keys], dtype=np.uint64),
        "reference_scores": np.hstack([gate.accuracy, gate.probabilities]).astype(np.float32),
    }

    def write_files(fresh: Path) -> None:
        if isinstance(gate.policy, SavesFiles):
            gate.policy.save(fresh, contrast.head_temperature)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, fresh / TENSOR_FILE)

    _publish(Path(folder), description, write_files)
    return load_artefact(folder)


def set_threshold(folder: str | Path, threshold: Mapping[str, Any]) -> Artefact:
    """Replace the threshold, and the note of how it was chosen, of an artefact.

    Raises:
        CheckpointError: the folder is no artefact.
    """
    description = {**load_artefact(folder).description, "threshold": dict(threshold)}
    path = Path(folder) / GATE_FILE
    with atomic_path(path) as draft:
        _write_description(draft, description)
    return load_artefact(folder)


def trained_keys(artefact: Artefact) -> list[str]:
    """Keys of the questions that the gate was trained on, see `OutcomeTable.keys`.

    Raises:
        CheckpointError: the gate does not say which, so that nothing can be measured on others.
    """
    found = artefact.tensors.get("trained_keys")
    if found is None or found.values.typecode != "Q":
        raise CheckpointError(
            f"{str(artefact.folder)!r} lacks the keys of the questions that it was trained on, and what is measured on "
            "those promises nothing. Train it again."
        )
    return [f"{key:016x}" for key in found.values]


def _tools(gate: TrainedGate, descriptions: Mapping[str, str]) -> list[dict[str, str]]:
    # A policy that reads descriptions was trained on its own.
    read = {tool["name"]: tool["description"] for tool in gate.policy.config().get("tools", [])}
    return [{"name": tool, "description": read.get(tool) or descriptions.get(tool, "")} for tool in gate.actions[1:]]


def _publish(folder: Path, description: Mapping[str, Any], write_files: Callable[[Path], None]) -> None:
    if folder.exists() and not (folder / GATE_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{str(folder)!r} exists and holds no gate; give a new folder, or empty this one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            write_files(fresh)
            hashes = {path.name: file_hash(path) for path in sorted(fresh.iterdir())}
            _write_description(fresh / GATE_FILE, {**description, "files": hashes})
            if folder.exists():
                os.replace(folder, old)
            try:
                shutil.move(fresh, folder)
            except OSError:
                if old.exists():
                    os.replace(old, folder)
                raise
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{str(folder)!r} can't be written: {error}. Free some space, or give another.") from error


def _write_description(path: Path, description: Mapping[str, Any]) -> None:
    # Through JSON once, so that the hash is of what will be read.
    plain = json.loads(json.dumps(description, default=float))
    plain["hash"] = description_hash(plain)
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _data_hash(table: OutcomeTable) -> str:
    digest = hashlib.sha256(json.dumps([table.actions, *table.keys]).encode())
    for values in (table.correct, table.cost, *table.draft.values()):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
