"""What any rule of stopping would have saved: recorded runs replayed under caps, self-reports, a gate, and an oracle.

A rule stops a run at the first state where it says so. The run does not change until then, so its outcome under the
rule is known exactly, verdicts and costs alike: no importance weights, no model of the tools. This holds as long as
going on leaves the run as it was. A rule never stops before an acting call that the run went on to make, so only the
last stretch of a turn can be cut short (see `accounting`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metis_agent.audit.accounting import AuditedTurn, stretches
from metis_agent.audit.estimates import Resampled
from metis_agent.evaluation.agents import Estimate

__all__ = ["Replayable", "RulePoint", "best", "caps", "oracle", "replay", "replayable", "self_report"]

Stops = NDArray[np.int64]
"""[N]: how many rounds of its last stretch each turn makes."""


@dataclass(frozen=True, kw_only=True)
class Replayable:
    """The last stretch of a turn, with a verdict on each of its states."""

    turn: AuditedTurn
    first: int
    """The stretch's first state."""
    right: NDArray[np.bool_]
    """[L + 1]: a_first .. a_K."""
    calls: NDArray[np.int64]
    """[L + 1]: reading calls that the turn has made when it stops there, those of earlier stretches included."""

    @property
    def rounds(self) -> int:
        """L: how many rounds it can be cut short by."""
        return len(self.right) - 1


@dataclass(frozen=True, kw_only=True)
class RulePoint:
    """What a rule would have done with the recorded runs."""

    rule: str
    setting: float | None
    """The cap, or beta, that the rule was used with."""
    right: Estimate
    """Share of turns that end as well as the run did, or rightly where there are reference answers."""
    calls: Estimate
    """Reading calls, as a share of those that the runs made."""

    def loss_to(self, other: RulePoint) -> float:
        """By how much fewer turns end well than under another rule."""
        return (other.right.value or 0.0) - (self.right.value or 0.0)


def replayable(turns: Sequence[AuditedTurn]) -> list[Replayable]:
    """The turns whose last stretch has all its verdicts."""
    found = []
    for turn in turns:
        *_, (first, last) = stretches(turn)
        verdicts = turn.verdicts[first : last + 1]
        if None in verdicts:
            continue
        reading = [sum(call.effect == "reads" for call in calls) for calls in turn.rounds]
        made = np.cumsum([sum(reading[:first]), *reading[first:last]], dtype=np.int64)
        found.append(Replayable(turn=turn, first=first, right=np.array(verdicts, dtype=bool), calls=made))
    return found


def replay(
    runs: Sequence[Replayable], stops: Stops, *, rule: str, setting: float | None = None, seed: int = 0
) -> RulePoint:
    """What comes of stopping each run after so many rounds of its last stretch."""
    right = np.array([run.right[stop] for run, stop in zip(runs, stops, strict=True)], dtype=np.float64)
    made = np.array([run.calls[stop] for run, stop in zip(runs, stops, strict=True)], dtype=np.float64)
    whole = np.array([run.calls[-1] for run in runs], dtype=np.float64)
    resampled = Resampled([run.turn.group for run in runs], seed=seed)
    return RulePoint(
        rule=rule,
        setting=setting,
        right=resampled.ratio(right, np.ones_like(right)),
        calls=resampled.ratio(made, whole),
    )


def stops_where(runs: Sequence[Replayable], says_stop: Callable[[int, int], bool]) -> Stops:
    """Tau of each run: the first state at which a rule, given run and state of the last stretch, says stop."""
    return np.array(
        [next((k for k in range(run.rounds) if says_stop(i, k)), run.rounds) for i, run in enumerate(runs)],
        dtype=np.int64,
    )


def oracle(runs: Sequence[Replayable], *, seed: int = 0) -> RulePoint:
    """Stops where it is first right, and at once where it never is: what no rule can better."""
    stops = np.array([int(run.right.argmax()) for run in runs], dtype=np.int64)
    return replay(runs, stops, rule="oracle", seed=seed)


def caps(runs: Sequence[Replayable], *, seed: int = 0) -> list[RulePoint]:
    """At most 0, 1, 2, ... rounds a turn, up to what the runs made."""
    most = max((len(run.turn.rounds) for run in runs), default=0)
    points = []
    for cap in range(most + 1):
        stops = stops_where(runs, lambda i, k, cap=cap: runs[i].first + k >= cap)  # type: ignore[misc]
        points.append(replay(runs, stops, rule="cap", setting=cap, seed=seed))
    return points


def self_report(
    runs: Sequence[Replayable], done: Mapping[tuple[str, int], bool | None], *, seed: int = 0
) -> RulePoint | None:
    """Stops where the model, asked whether it could answer now, said so.

    Args:
        runs: With the last stretch's verdicts.
        done: What it said, by the turn's id and the state; `None` where it could not be read: the run goes on.
        seed: Of the bootstrap.

    Returns:
        `None` where it was never asked.
    """
    if not done:
        return None
    stops = stops_where(runs, lambda i, k: bool(done.get((runs[i].turn.id, runs[i].first + k))))
    return replay(runs, stops, rule="self-report", seed=seed)


def best(points: Sequence[RulePoint], full: RulePoint, tolerance: float) -> RulePoint:
    """Of a rule's settings the one with fewest calls that loses at most `tolerance` to going on always."""
    fit = [point for point in points if point.loss_to(full) <= tolerance + 1e-12]
    return min(fit, key=lambda point: point.calls.value or 0.0, default=full)
