"""All that a report says, before any of it is drawn: read from the stores and files that it is given.

Between `figures` and `transcript`, which read the stores' runs, and the page. Besides runs a report takes in a gate,
its evaluation, and the history of a training. Each is a file that another command wrote; what is not such a file is
refused with the key that is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from metis_agent import formats
from metis_agent.errors import InputError
from metis_agent.evaluation.agents import Estimate
from metis_agent.gates.artefact import load_artefact
from metis_agent.gates.wrappers import ShadowReport, shadow_report
from metis_agent.judging.verifiers import Verify
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.report.figures import (
    FAILED,
    LABELS,
    Agent,
    Change,
    RunTable,
    agent_of,
    branch_figures,
    changes,
    labels,
)
from metis_agent.report.transcript import Archive, choose
from metis_agent.types import Trajectory

__all__ = [
    "CURVES",
    "Bin",
    "Facts",
    "Gate",
    "GateFigures",
    "History",
    "Kept",
    "Point",
    "Progress",
    "ReportInputs",
    "gather",
    "read_evaluation",
    "read_gate",
    "read_history",
]

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
    """What `evaluation.gates.evaluate_gate` measured."""

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


Progress = Callable[[str, Iterator[Trajectory], int], Iterator[Trajectory]]
"""Given what is done, runs and their number: the same runs, their progress shown."""


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What a report is made of; only a store is needed."""

    store: str
    """Folder or URL of the trajectories reported on."""
    before: str | None = None
    """Those that they are compared with; without it, the forced-tool runs of `store`, where it has any."""
    gate: Path | None = None
    evaluation: Path | None = None
    history: Path | None = None
    decisions: int = 20_000
    """Runs that the page carries for its browser, at most."""
    verify: Verify = default_verify


@dataclass(kw_only=True)
class Kept:
    """A store as it was read."""

    url: str
    table: RunTable
    agent: Agent | None
    """Its free runs."""
    bad_lines: int
    marked: Mapping[str, int]
    """Free runs by label, see `figures.labels`."""
    redundant_by_tool: Mapping[str, int]
    """Free runs on known questions, by tool that they called."""

    @property
    def runs(self) -> int:
        """All of them, forced and failed ones too."""
        return len(self.table)

    @property
    def failed(self) -> int:
        """Runs that say nothing of the model."""
        return int((self.table.column("verdict") == FAILED).sum())


@dataclass(kw_only=True)
class Facts:
    """What is known."""

    after: Kept
    before: Kept | None = None
    compared: Literal["before", "always", "nothing"] = "nothing"
    """With another store, with always calling (the forced-tool runs of the same store), or with nothing."""
    baseline: Agent | None = None
    changes: Mapping[str, Change] = field(default_factory=dict)
    paired: bool = False
    shadow: ShadowReport | None = None
    gate: Gate | None = None
    history: History | None = None
    archive: Archive = field(default_factory=Archive)

    @property
    def kept(self) -> list[Kept]:
        """The stores, the one reported on first."""
        return [self.after] + ([self.before] if self.before else [])

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON can hold them."""
        return {
            "format": 1,
            "compared": self.compared,
            "paired": self.paired,
            "stores": [_store_figures(kept) for kept in self.kept],
            "changes": {name: asdict(change) for name, change in self.changes.items()},
            "kinds": self._kinds(),
            "shadow": asdict(self.shadow) if self.shadow else None,
            "gate": self.gate.model_dump() if self.gate else None,
            "decisions_shown": len(self.archive),
            "decisions": sum(kept.runs for kept in self.kept),
        }

    def _kinds(self) -> dict[str, Any]:
        agent = self.after.agent
        if agent is None:
            return {}
        found: dict[str, Any] = {}
        for kind in sorted(set(agent.kinds)):
            if self.baseline is not None:
                by_name, _ = changes(self.baseline, agent, frozenset({kind}))
                found[kind] = {name: asdict(change) for name, change in by_name.items()}
            else:
                inside = agent.of_kind(frozenset({kind}))
                found[kind] = {name: {"after": asdict(agent.estimate(name, inside))} for name in agent.columns}
        return found


def gather(inputs: ReportInputs, progress: Progress = lambda _, runs, __: runs) -> Facts:
    """Read everything; each store twice, one run in memory at a time.

    Raises:
        StorageError: a store isn't there or can't be read.
        InputError: the store is empty, or a file is not what it should be.
    """
    gate, history = _gate(inputs), read_history(inputs.history) if inputs.history else None
    after = _read("read the store", inputs.store, inputs.verify, progress)
    before = _read("read the one before", inputs.before, inputs.verify, progress) if inputs.before else None
    facts = Facts(after=after, before=before, gate=gate, history=history)
    if before is not None:
        facts.baseline, facts.compared = before.agent, "before" if before.agent else "nothing"
    elif after.agent is not None:
        facts.baseline = agent_of(after.table, "tool")
        facts.compared = "always" if facts.baseline else "nothing"
    if facts.baseline is not None and after.agent is not None:
        facts.changes, facts.paired = changes(facts.baseline, after.agent)
    _archive(facts, inputs.decisions, progress)
    return facts


def _gate(inputs: ReportInputs) -> Gate | None:
    gate = read_gate(inputs.gate) if inputs.gate else None
    if inputs.evaluation is None:
        return gate
    figures: GateFigures = read_evaluation(inputs.evaluation)
    gate = gate or Gate(name=inputs.evaluation.stem, threshold=figures.at_threshold.threshold)
    return gate.model_copy(
        update={"figures": figures, "measured": f"{figures.questions:,} questions of {inputs.evaluation.name}"}
    )


def _read(said: str, url: str, verify: Verify, progress: Progress) -> Kept:
    store, table = TrajectoryStore(url, read_only=True), RunTable(verify)
    for run in progress(said, store.read(whole=False), store.count()):
        table.add(run)
    if not len(table):
        raise InputError(
            f"{url!r} holds no trajectories ({store.report.torn + store.report.corrupt} lines could not be read): "
            "there is nothing to report. Give the folder that `metis rollout`, `metis demo` or a Recorder wrote, the "
            "one with the segment-*.jsonl files in it."
        )
    marks, free = labels(table), table.column("branch") == 0
    by_tool: Counter[str] = Counter()
    for row in np.flatnonzero(marks["redundant"] & free):
        by_tool.update(table.tools[tool] for tool in table.tool_sets[row])
    return Kept(
        url=url,
        table=table,
        agent=agent_of(table),
        bad_lines=store.report.torn + store.report.corrupt,
        marked={name: int((marks[name] & free).sum()) for name in LABELS},
        redundant_by_tool=by_tool,
    )


def _archive(facts: Facts, limit: int, progress: Progress) -> None:
    """Read the stores again, for what only whole runs have."""
    chosen = choose([kept.table for kept in facts.kept], limit)
    for number, (kept, rows) in enumerate(zip(facts.kept, chosen, strict=True)):
        if rows.any():
            runs = progress("pack the decisions", _whole(kept), kept.runs)
            facts.archive.add(runs, kept.table, rows, store=kept.url, number=number)
    if facts.after.table.shadowed:
        runs = progress("what the watching gate would do", _whole(facts.after), facts.after.runs)
        facts.shadow = shadow_report(_readable(run) for run in runs if run.branch == "free")


def _readable(run: Trajectory) -> Trajectory:
    """Without messages that are none: one bad record must not cost the report."""
    return replace(run, messages=tuple(it for it in run.messages if isinstance(it.get("data", {}), Mapping)))


def _whole(kept: Kept) -> Iterator[Trajectory]:
    return TrajectoryStore(kept.url, read_only=True).read()


def _store_figures(kept: Kept) -> dict[str, Any]:
    tools = {
        name: {**asdict(use), "statuses": dict(use.statuses), "redundant_runs": kept.redundant_by_tool.get(name, 0)}
        for name, use in sorted(kept.table.tool_use.items())
    }
    branches: dict[str, dict[str, Estimate]] = branch_figures(kept.table)
    return {
        "url": kept.url,
        "runs": kept.runs,
        "failed": kept.failed,
        "unjudged": dict(kept.table.unjudged),
        "bad_lines": kept.bad_lines,
        "free_runs": kept.agent.runs if kept.agent else 0,
        "questions": len(kept.agent.questions) if kept.agent else 0,
        "busy_seconds": kept.agent.busy if kept.agent else None,
        "metrics": {name: asdict(kept.agent.estimate(name)) for name in kept.agent.columns} if kept.agent else {},
        "branches": {name: {key: asdict(value) for key, value in row.items()} for name, row in branches.items()},
        "tools": tools,
        "labels": dict(kept.marked),
    }
