"""The runs that a report carries with it, packed so that the page reads only what is looked at.

An index holds a line for each run (question, answer, and what filters need); the runs themselves lie behind it in
compressed blocks. The browser unpacks the index when the page has been drawn, and a block when one of its runs is
opened. Where a store holds more runs than the page may carry, `choose` says which ones it carries.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.recording.images import ImageStore
from metis_agent.report.figures import LABELS, labels
from metis_agent.report.runs import BRANCHES, RunTable
from metis_agent.report.transcript import Pictures, transcript_of
from metis_agent.report.words import clipped
from metis_agent.types import Trajectory

__all__ = ["Archive", "choose", "packed"]

_BLOCK_RUNS, _BLOCK_CHARACTERS = 200, 1_000_000
_SHOWN = 240


def choose(tables: Sequence[RunTable], limit: int, seed: int = 0) -> list[NDArray[np.bool_]]:
    """Which runs of each store the page carries: all, or `limit` of them drawn at random, fairly by what they are.

    Runs are grouped by store, by how they began, and by the first of the `LABELS` that fits. Groups smaller than
    their share of the limit come whole, and the others share equally what is left.
    """
    groups: list[tuple[int, NDArray[np.int64]]] = []
    for number, table in enumerate(tables):
        marks, branch = labels(table), table.column("branch")
        # The narrow label first: a harmful call is also a redundant one.
        order = ("failed", "harmful", "redundant", "wrong_direct", "missed", "wrong")
        label = np.select([marks[name] for name in order], range(len(order)), default=len(order))
        for group in np.unique(branch * 10 + label):
            groups.append((number, np.flatnonzero(branch * 10 + label == group)))
    kept = [np.zeros(len(table), dtype=bool) for table in tables]
    rng = np.random.default_rng(seed)
    left = limit
    for done, (number, rows) in enumerate(sorted(groups, key=lambda group: len(group[1]))):
        share = min(len(rows), left // (len(groups) - done))
        kept[number][rng.permutation(rows)[:share]] = True
        left -= share
    return kept


class Archive:
    """The index and the blocks.

    Args:
        pictures: Where images of runs go.
    """

    def __init__(self, pictures: Pictures | None = None) -> None:
        self.pictures = pictures or Pictures()
        self.blocks: list[str] = []
        """Base64 of gzipped JSON, a list of transcripts each."""
        self._starts: list[int] = []
        self._waiting: list[str] = []
        self._questions: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._tools: dict[str, int] = {}
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("store", "branch", "question", "text", "answer", "reference", "kind", "tools",
                                  "calls", "verdict", "labels")
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self._columns["store"])

    def add(
        self, runs: Iterable[Trajectory], table: RunTable, chosen: NDArray[np.bool_], *, store: str, number: int
    ) -> None:
        """Take in the chosen runs of a store, in its order.

        Args:
            runs: As `table` has read them, with their messages.
            table: Their columns.
            chosen: [R].
            store: Where its images are.
            number: Kept with each run, to tell stores apart.
        """
        images = ImageStore(store)
        marks = labels(table)
        bits = sum((marks[name].astype(np.int64) << bit for bit, name in enumerate(LABELS)), np.zeros(len(table), int))
        columns = {name: table.column(name) for name in ("branch", "verdict", "calls")}
        # A store that grows while it is read has more runs than the table.
        for row, (run, wanted) in enumerate(zip(runs, chosen, strict=False)):
            if not wanted:
                continue
            entry = {"store": number, "labels": int(bits[row])}
            entry |= {name: int(column[row]) for name, column in columns.items()}
            self._index(entry | self._words(run))
            self._pack(json.dumps(transcript_of(run, self.pictures, images), separators=(",", ":")))

    def index(self) -> dict[str, Any]:
        """What the page's browser reads first; closes the last block."""
        self._close_block()
        return {
            "columns": self._columns, "starts": self._starts, "kinds": list(self._kinds), "tools": list(self._tools),
            "labels": LABELS, "branches": BRANCHES,
        }  # fmt: skip

    def _words(self, run: Trajectory) -> dict[str, Any]:
        used = {outcome.tool for outcome in run.outcomes if outcome.executed}
        return {
            "question": self._questions.setdefault(run.question.id, len(self._questions)),
            "text": clipped(run.question.text, _SHOWN),
            "answer": clipped(run.answer, _SHOWN),
            "reference": clipped(run.question.answer or "", _SHOWN),
            "kind": self._kinds.setdefault(clipped(run.question.kind, _SHOWN), len(self._kinds)),
            "tools": sorted(self._tools.setdefault(clipped(tool, _SHOWN), len(self._tools)) for tool in sorted(used)),
        }

    def _index(self, entry: dict[str, Any]) -> None:
        for name, column in self._columns.items():
            column.append(entry[name])

    def _pack(self, transcript: str) -> None:
        if not self._waiting:
            self._starts.append(len(self) - 1)
        self._waiting.append(transcript)
        if len(self._waiting) >= _BLOCK_RUNS or sum(map(len, self._waiting)) > _BLOCK_CHARACTERS:
            self._close_block()

    def _close_block(self) -> None:
        if self._waiting:
            self.blocks.append(packed(f"[{','.join(self._waiting)}]"))
            self._waiting = []


def packed(text: str) -> str:
    """Base64 of the gzipped text, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode()
