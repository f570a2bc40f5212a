"""The runs of a store as columns of numbers: what the report's figures need of each, in some sixty bytes.

First step of the report: a store is read once, run by run, and nothing of a run's text is kept. So a store of a
hundred thousand trajectories takes a few megabytes, and several times that for its questions' ids.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.judging.verifiers import Verify, judge
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.rollouts.recorded import branch_of
from metis_agent.types import ToolOutcome, Trajectory

__all__ = ["BRANCHES", "FAILED", "RIGHT", "UNJUDGED", "WRONG", "RunTable", "ToolUse"]

BRANCHES = ("free", "direct", "tool")
WRONG, RIGHT, UNJUDGED, FAILED = 0, 1, 2, 3
"""What a run's answer was; failed runs say nothing of the model."""


@dataclass(kw_only=True)
class ToolUse:
    """One tool, over the runs that were not forced."""

    runs: int = 0
    """Runs in which it was executed."""
    calls: int = 0
    """Executed calls."""
    seconds: float = 0.0
    cost: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    """Of all calls that were asked for, executed or not."""


class RunTable:
    """One row a run; `add` them in the order of the store.

    Args:
        verify: Judges an answer.
    """

    def __init__(self, verify: Verify = default_verify) -> None:
        self._verify = verify
        self._questions: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._tools: dict[str, int] = {}
        self._sets: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._kind_of = array("i")
        self._whole = {name: array("i") for name in ("question", "branch", "verdict", "called", "calls")}
        self._real = {name: array("d") for name in ("seconds", "tool_seconds", "cost", "started")}
        self.tool_sets: list[tuple[int, ...]] = []
        """Which tools each run executed, as places in `tools`."""
        self.tool_use: dict[str, ToolUse] = {}
        self.unjudged: Counter[str] = Counter()
        """Why finished runs could not be judged."""
        self.shadowed = 0
        """Runs in which a gate watched without deciding."""

    def __len__(self) -> int:
        return len(self._whole["question"])

    @property
    def questions(self) -> Sequence[str]:
        """Ids, in the order in which they came."""
        return list(self._questions)

    @property
    def kinds(self) -> Sequence[str]:
        """Kinds of question, in the order in which they came."""
        return list(self._kinds)

    @property
    def tools(self) -> Sequence[str]:
        """Tools that were asked for, in the order in which they came."""
        return list(self._tools)

    @property
    def kind_of(self) -> NDArray[np.int32]:
        """[N]: each question's kind, as a place in `kinds`."""
        return np.array(self._kind_of, dtype=np.int32)

    def column(self, name: str) -> NDArray[np.int32]:
        """[R]: "question", "branch" (a place in `BRANCHES`), "verdict", "called" (0 or 1) or "calls" (T)."""
        return np.array(self._whole[name], dtype=np.int32)

    def amount(self, name: str) -> NDArray[np.float64]:
        """[R]: "seconds", "tool_seconds", "cost" or "started"."""
        return np.array(self._real[name], dtype=np.float64)

    def add(self, run: Trajectory) -> None:
        """Take in one run."""
        question = self._questions.setdefault(run.question.id, len(self._questions))
        if question == len(self._kind_of):
            self._kind_of.append(self._kinds.setdefault(run.question.kind, len(self._kinds)))
        executed = [outcome for outcome in run.outcomes if outcome.executed]
        row = {
            "question": question, "branch": BRANCHES.index(run.branch), "verdict": self._verdict(run),
            "called": int(branch_of(run) == "tool"), "calls": len(executed),
        }  # fmt: skip
        for name, number in row.items():
            self._whole[name].append(number)
        amounts = (run.seconds, sum(outcome.seconds for outcome in executed), run.cost, run.started_at)
        for amount, column in zip(amounts, self._real.values(), strict=True):
            column.append(amount)
        for outcome in run.outcomes:
            self._tools.setdefault(outcome.tool, len(self._tools))
        used = tuple(sorted({self._tools[outcome.tool] for outcome in executed}))
        self.tool_sets.append(self._sets.setdefault(used, used))
        self.shadowed += any(decision.shadow for decision in run.decisions)
        if run.branch == "free" and run.status == "finished":
            self._count_tools(run.outcomes)

    def _verdict(self, run: Trajectory) -> int:
        if run.status == "failed":
            return FAILED
        try:
            right, reason = judge(run, self._verify)
        except MissingDependencyError:
            right, reason = None, f"the verifier {run.question.verifier!r} needs an extra that is not installed"
        except ConfigurationError:
            right, reason = None, f"the verifier {run.question.verifier!r} is not at hand here"
        if right is None:
            self.unjudged[reason] += 1
            return UNJUDGED
        return RIGHT if right else WRONG

    def _count_tools(self, outcomes: Sequence[ToolOutcome]) -> None:
        for name in {outcome.tool for outcome in outcomes}:
            use = self.tool_use.setdefault(name, ToolUse())
            mine = [outcome for outcome in outcomes if outcome.tool == name]
            ran = [outcome for outcome in mine if outcome.executed]
            use.runs += bool(ran)
            use.calls += len(ran)
            use.seconds += sum(outcome.seconds for outcome in ran)
            use.cost += sum(outcome.cost for outcome in ran)
            use.statuses.update(outcome.status for outcome in mine)
