"""What a report takes in besides runs: a gate, its evaluation, and the history of a training.

Each is a file that another command wrote; what is not such a file is refused with the key that is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from metis_agent import formats
from metis_agent.errors import InputError
from metis_agent.gates.artefact import load_artefact

__all__ = ["CURVES", "Bin", "Gate", "GateFigures", "History", "Point", "read_evaluation", "read_gate", "read_history"]

Share = Field(ge=0, le=1)
Interval = tuple[float | None, float | None]

CURVES = {
    "accuracy": "accuracy", "tool_rate": "tool rate", "redundant_rate": "redundant calls",
    "necessary_recall": "necessary calls made", "rho": "rollouts with an efficiency signal (rho)",
}  # fmt: skip
"""Quantities of a training history that are drawn: key (also under `hdpo/`) and what it is called."""

History = list[dict[str, float]]


class Point(BaseModel):
    """One way to trade calls for accuracy."""

    tool_rate: float = Share
    accuracy: float = Share


class Bin(BaseModel):
    """Questions that the gate gave about the same probability of a right direct answer."""

    predicted: float = Share
    observed: float = Share
    questions: float = Field(gt=0)


class AtThreshold(BaseModel):
    """What the gate does at its threshold; shares of all questions."""

    model_config = ConfigDict(extra="allow")
    threshold: float
    accuracy: float = Share
    tool_rate: float = Share
    accuracy_interval: Interval | None = None
    tool_rate_interval: Interval | None = None

    def share(self, name: str) -> float | None:
        """Another share, such as "redundant"; `None` where it was not measured."""
        value = (self.model_extra or {}).get(name)
        return float(value) if isinstance(value, int | float) else None


class GateFigures(BaseModel):
    """What `hdpo.gate_evaluation.evaluate_gate` measured."""

    questions: int
    frontier: list[Point]
    at_threshold: AtThreshold
    auc: float | None = None
    auc_interval: Interval | None = None
    ece: float | None = None
    brier: float | None = None
    baselines: dict[str, dict[str, Any]] = {}
    calibration: list[Bin] = []


class Gate(BaseModel):
    """A gate and what is known of it."""

    name: str
    kind: str = ""
    version: str = ""
    threshold: float | None = None
    chosen: str = ""
    """How the threshold was chosen."""
    figures: GateFigures | None = None
    measured: str = ""
    """On what."""


def read_gate(folder: Path) -> Gate:
    """A gate's description, with the figures of its training where it has them.

    Raises:
        CheckpointError: it is no gate.
    """
    description = load_artefact(folder).description
    metrics = description.get("metrics") or None
    return Gate(
        name=folder.name,
        kind=str(description["kind"]),
        version=str(description["version"]),
        threshold=description["threshold"].get("value"),
        chosen=str(description["threshold"].get("chosen", "")),
        figures=_figures(metrics, f"the metrics of {str(folder)!r}") if metrics else None,
        measured="held-out folds of the training questions",
    )


def read_evaluation(path: Path) -> GateFigures:
    """The figures that `metis evaluate gate --json` wrote.

    Raises:
        InputError: it holds something else.
        SchemaVersionError: a newer Metis wrote it.
    """
    found = _json(path)
    if isinstance(found, dict):
        formats.check_format(found, formats.FIGURES, repr(str(path)))
    return _figures(found, repr(str(path)))


def read_history(path: Path) -> History:
    """A training's entries by step: a list, JSON lines, or an object with `history` or `log_history`.

    Such are `metrics.json` of `metis demo` and `trainer_state.json` of a Hugging Face trainer. Numbers only; the
    prefix `hdpo/` is dropped.

    Raises:
        InputError: none of what is drawn is in it.
        SchemaVersionError: a newer Metis wrote it.
    """
    found = _json(path)
    if isinstance(found, dict):
        formats.check_format(found, formats.FIGURES, repr(str(path)))
        found = found.get("history", found.get("log_history"))
    if not isinstance(found, list):
        raise InputError(f"{str(path)!r} holds no list of steps, nor one under 'history' or 'log_history'.")
    entries: History = []
    for number, entry in enumerate(found, start=1):
        if isinstance(entry, dict):
            plain = {str(key).removeprefix("hdpo/"): value for key, value in entry.items()}
            numbers = {key: float(value) for key, value in plain.items() if _is_number(value)}
            entries.append({"step": float(number), **numbers})
    if not any(name in entry for entry in entries for name in CURVES):
        raise InputError(
            f"{str(path)!r} has {len(entries)} steps and none of {list(CURVES)!r} in them, with or without 'hdpo/': "
            "there is no curve to draw. Give the history of a training by HDPO, such as metrics.json of `metis demo`."
        )
    return entries


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _figures(value: object, name: str) -> GateFigures:
    try:
        return TypeAdapter(GateFigures).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"{name} holds no evaluation of a gate: {where}: {first['msg']}. Write one with: metis evaluate gate DIR "
            "... --json FILE"
        ) from error


def _json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} can't be read: {error}. Check the name.") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} is no JSON: {error}.") from error
