"""Curation for SFT: recorded trajectories in, those that teach strategic tool use out.

Source: arXiv:2604.08545, the data of the cold start: run all code, drop what the base model solves without tools,
let a judge keep strategic tool use.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.curation.pipeline import Chunking, Mark, Pipeline
from metis_agent.hdpo.curation.report import CurationReport
from metis_agent.hdpo.curation.stage import Stage
from metis_agent.recording import schema
from metis_agent.recording.places import Place
from metis_agent.recording.segments import is_segment
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Trajectory

__all__ = ["MARK", "curate_sft", "source_identity", "unmarked"]

MARK = "quarantine"
"""Key of `Trajectory.metadata` under which a row in quarantine says why it is there."""


def curate_sft(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    stages: Sequence[Stage[Trajectory]],
    *,
    settings: Mapping[str, Any] | None = None,
    chunking: Chunking = Chunking(),
    fresh: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[CurationReport], None] = lambda _: None,
) -> CurationReport:
    """Stream a store's trajectories through stages; `OUT/kept` and both parts of `OUT/quarantine` are stores.

    Run it again after it was stopped, and it goes on; run it again after it was finished, and it reports.

    Args:
        source: a trajectory store; it is only read, and must not change until the run is finished.
        out: a folder or any fsspec URL.
        stages: in order, the cheap ones first.
        settings: what else the run depends on, as JSON.
        chunking: how much is done at a time.
        fresh: start again, over what an earlier run left.
        storage_options: keywords for the fsspec file systems.
        progress: called with the counts so far.

    Raises:
        ConfigurationError: source and out are the same, or out holds a run with other settings.
        InfrastructureError: a stage could decide nothing, such as with a judge that is down.
        StorageError: nothing can be read or written there.
    """
    if os.path.abspath(os.fspath(source)) == os.path.abspath(os.fspath(out)):
        raise ConfigurationError(f"source and out are both {os.fspath(source)!r}; name another folder for the outcome.")
    store = TrajectoryStore(source, read_only=True, storage_options=storage_options)
    pipeline = Pipeline(
        out, stages, _Trajectories(), chunking=chunking, fresh=fresh, storage_options=storage_options,
        settings={"source": source_identity(source, storage_options), **(settings or {})},
    )  # fmt: skip
    report = pipeline.run(map(unmarked, store.read()), progress=progress)
    report.unreadable = store.report.torn + store.report.corrupt
    pipeline.finish(report)
    return report


def source_identity(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str:
    """A hash of the segments' names and sizes: rows are counted from the start, so a source must not change."""
    place = Place(url, storage_options)
    segments = [(name, place.size(name)) for name in sorted(filter(is_segment, place.names()))]
    return hashlib.sha256(json.dumps(segments).encode()).hexdigest()[:16]


def unmarked(trajectory: Trajectory) -> Trajectory:
    """A trajectory without the mark of a quarantine, so that what was set aside can be curated again."""
    if MARK not in trajectory.metadata:
        return trajectory
    return replace(trajectory, metadata={key: it for key, it in trajectory.metadata.items() if key != MARK})


class _Trajectories:
    """The codec: stores of trajectories, those in quarantine with a mark in their metadata."""

    def line(self, value: Trajectory) -> str:
        return schema.dumps(value)

    def marked(self, value: Trajectory, mark: Mark) -> str:
        return schema.dumps(replace(value, metadata={**value.metadata, MARK: vars(mark)}))

    def folder(self, value: Trajectory) -> str:
        return "kept"
