"""Curation for RL: recorded rollouts in, prompts worth rolling out again out.

Two passes: the rollouts of each question are counted (`prompts`), then the prompts go through the stages. What is
kept is a JSONL file of questions, or with `hold_out` two: `train` and `test`, split by a hash of the question, so
that the same question always falls on the same side.

Source: arXiv:2604.08545, the RL data: prompts with a mix of successes and failures.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.curation.pipeline import Chunking, Mark, Pipeline
from metis_agent.hdpo.curation.prompts import Prompt, PromptCounts, question_line
from metis_agent.hdpo.curation.report import CurationReport
from metis_agent.hdpo.curation.sft import MARK, source_identity
from metis_agent.hdpo.curation.similarity import fingerprint
from metis_agent.hdpo.curation.stage import Stage
from metis_agent.hdpo.verifiers import verify as default_verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question

__all__ = ["curate_rl"]


def curate_rl(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    stages: Sequence[Stage[Prompt]],
    *,
    work: Path,
    verify: Callable[[Question, str], bool | None] = default_verify,
    hold_out: float = 0.0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    chunking: Chunking = Chunking(),
    fresh: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    counting: Callable[[int], None] = lambda _: None,
    progress: Callable[[CurationReport], None] = lambda _: None,
) -> CurationReport:
    """Count the rollouts of each question, and stream the prompts through stages.

    Args:
        source: a trajectory store; it is only read, and must not change until the run is finished.
        out: a folder or any fsspec URL: `OUT/kept/*.jsonl`, or `OUT/train` and `OUT/test`, hold questions.
        stages: in order, the cheap ones first.
        work: a local folder for the counts.
        verify: judges the rollouts' answers.
        hold_out: share of the kept prompts that goes to `OUT/test`.
        seed: of that split.
        settings: what else the run depends on, as JSON.
        chunking: how much is done at a time.
        fresh: start again, over what an earlier run left.
        storage_options: keywords for the fsspec file systems.
        counting: called with the number of trajectories counted so far.
        progress: called with the counts of prompts so far.

    Returns:
        The report; its rows are prompts.

    Raises:
        ConfigurationError, InfrastructureError, StorageError: as `curate_sft`.
    """
    if not 0 <= hold_out < 1:
        raise ConfigurationError(f"hold_out={hold_out!r}: it is a share, 0 or more and less than 1.")
    store = TrajectoryStore(source, read_only=True, storage_options=storage_options)
    identity = source_identity(source, storage_options)
    # Before anything is counted: a folder of another run is refused at once.
    pipeline = Pipeline(
        out, stages, _Prompts(hold_out, seed), chunking=chunking, fresh=fresh, storage_options=storage_options,
        settings={"source": identity, "hold_out": hold_out, "seed": seed, **(settings or {})},
    )  # fmt: skip
    counts = work / f"prompts-{identity}.sqlite"
    if fresh:
        for left in work.glob(f"{counts.name}*"):
            left.unlink()
    prompts = PromptCounts(counts, verify=verify)
    prompts.count(store.read(whole=False), progress=counting)
    report = pipeline.run(prompts.prompts(), progress=progress)
    report.unreadable = store.report.torn + store.report.corrupt
    pipeline.finish(report)
    return report


class _Prompts:
    """The codec: questions as JSON lines, with the counts of their rollouts in the metadata."""

    def __init__(self, hold_out: float, seed: int) -> None:
        self._hold_out, self._seed = hold_out, seed

    def line(self, value: Prompt) -> str:
        return question_line(value.question, rollouts=_counts(value))

    def marked(self, value: Prompt, mark: Mark) -> str:
        return question_line(value.question, rollouts=_counts(value), **{MARK: vars(mark)})

    def folder(self, value: Prompt) -> str:
        if not self._hold_out:
            return "kept"
        print_ = fingerprint(value.question)
        # Questions about one image stay together.
        group = print_.images.partition(" ")[0] or print_.text
        digest = hashlib.sha256(f"{self._seed}\x00{group}".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") < self._hold_out * 2**64 else "train"


def _counts(prompt: Prompt) -> dict[str, int]:
    return {"right": prompt.right, "wrong": prompt.wrong, "excluded": prompt.excluded}
