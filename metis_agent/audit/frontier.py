"""What any rule of stopping would have saved, and the intervals of the audit's estimates.

Recorded runs are replayed under caps, self-reports, a gate, and an oracle. A rule stops a run at the first state where
it says so. The run does not change until then, so its outcome under the rule is known exactly, verdicts and costs
alike: no importance weights, no model of the tools. This holds as long as going on leaves the run as it was. A rule
never stops before an acting call that the run went on to make, so only the last stretch of a turn can be cut short
(see `accounting`).

Calls of one conversation are alike, so intervals resample conversations whole. A share is a ratio of sums: redundant
calls of all turns by calls of all turns. Where verdicts come from a judge that errs, turns drawn at random are checked
by a person, and the judge's error there corrects the share everywhere (prediction-powered inference: Angelopoulos et
al., 2023, arXiv 2301.09633, with the weight of PPI++, arXiv 2311.01453).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metis_agent.audit.accounting import AuditedTurn, stretches
from metis_agent.evaluation.agents import Estimate
from metis_agent.evaluation.gates import Resamples, interval_of
from metis_agent.report.figures import wilson

__all__ = [
    "Replayable",
    "Resampled",
    "RulePoint",
    "best",
    "caps",
    "corrected_ratio",
    "oracle",
    "replay",
    "replayable",
    "self_report",
]

Float = NDArray[np.float64]
_RESAMPLES = 1000
_NOTHING = Estimate(value=None, low=None, high=None, questions=0)


class Resampled:
    """Ratios and sums over turns, with percentile intervals over conversations.

    Args:
        groups: [N], the conversation of each turn.
        seed: Of the bootstrap.
    """

    def __init__(self, groups: Sequence[str], *, seed: int = 0) -> None:
        self._n = len(groups)
        self._count = len(set(groups))
        self._resamples = Resamples(groups, _RESAMPLES, seed) if groups else None

    def ratio(self, above: Float, below: Float) -> Estimate:
        """Sum of one column by sum of another; `questions` is the latter.

        A share that is 0 or 1 throughout has the exact (Clopper-Pearson) bound for so many conversations, one that is
        the same in all of them Wilson's: a bootstrap of what never varies would read as a promise.
        """
        whole = float(below.sum())
        if self._resamples is None or not whole:
            return _NOTHING
        value = float(above.sum()) / whole
        if np.array_equal(above, below) or not above.any():
            width = 1 - 0.025 ** (1 / self._count)
            low, high = (0.0, width) if value == 0 else (1 - width, 1.0)
        else:
            low, high = self._interval(lambda rows: _by(above[rows].sum(), below[rows].sum()))
            if high - low < 1e-9:
                low, high = wilson(value, self._count)
        return Estimate(value=value, low=low, high=high, questions=round(whole))

    def total(self, column: Float, scale: float = 1.0) -> Estimate:
        """Sum of a column, times what the sample stands for."""
        if self._resamples is None:
            return _NOTHING
        low, high = self._interval(lambda rows: float(column[rows].mean()))
        size = scale * self._n
        return Estimate(value=scale * float(column.sum()), low=size * low, high=size * high, questions=self._n)

    def _interval(self, measure: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
        assert self._resamples is not None
        low, high = interval_of(self._resamples.values(measure))
        return low, high


def corrected_ratio(
    judged: Float,
    below: Float,
    checked: NDArray[np.int64],
    person: Float,
    groups: Sequence[str],
    *,
    fallible: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Estimate:
    """A share by a judge's verdicts, corrected by a person's on some of the turns.

    The estimate is w J + (P' - w J'): J is the judge's share of all turns, J' and P' the judge's and the person's of
    the checked ones. Its bias is none whatever w is; w is chosen so that it varies least, so it is never wider than
    what the checked turns alone would give.

    Args:
        judged: [N], redundant calls of each turn by the judge.
        below: [N], calls of each turn.
        checked: [n], rows drawn at random from the fallible ones.
        person: [n], redundant calls of those turns by the person's verdicts.
        groups: [N], conversations.
        fallible: [N], turns on which a judge ruled; the others are taken as they are. All by default.
        seed: Of the bootstrap.
    """
    if not len(checked) or not below[checked].sum():
        return _NOTHING
    by_person = np.full(len(judged), np.nan)
    by_person[checked] = person
    is_checked = ~np.isnan(by_person)
    weight = _weight(judged[checked], person, below[checked])

    by_judge = np.ones(len(judged), dtype=bool) if fallible is None else fallible
    weighed = np.where(by_judge, weight * judged, judged)

    def parts(rows: NDArray[np.int64]) -> tuple[float, float]:
        few, whole = rows[is_checked[rows]], float(below[rows].sum())
        error = _by(by_person[few].sum() - weighed[few].sum(), below[few].sum())
        return _by(weighed[rows].sum(), whole), error * _by(below[rows[by_judge[rows]]].sum(), whole)

    drawn = Resamples(groups, _RESAMPLES, seed).values(parts)
    everywhere, error = parts(np.arange(len(judged)))
    low, high = interval_of(np.clip(drawn.sum(axis=1) + _doubt(drawn[:, 1], groups, checked, seed), 0.0, 1.0))
    return Estimate(
        value=min(max(everywhere + error, 0.0), 1.0), low=low, high=high, questions=round(float(below.sum()))
    )


def _weight(judged: Float, person: Float, below: Float) -> float:
    """Covariance by variance of the two shares' residuals, within 0 and 1."""
    by_judge = judged - below * judged.sum() / below.sum()
    by_person = person - below * person.sum() / below.sum()
    spread = float(by_judge @ by_judge)
    return min(max(float(by_judge @ by_person) / spread, 0.0), 1.0) if spread else 1.0


def _doubt(error: Float, groups: Sequence[str], checked: NDArray[np.int64], seed: int) -> Float:
    """Noise that widens a correction by too few errors: 30 checks without one don't prove that there are none.

    The correction varies at least as if two of the checked conversations had an error, as Agresti and Coull add two.
    """
    least = math.sqrt(2) / len({groups[row] for row in checked})
    missing = math.sqrt(max(0.0, least**2 - float(np.nanvar(error))))
    return np.random.default_rng(seed + 1).normal(0.0, missing, len(error))


def _by(above: float, below: float) -> float:
    return float(above) / float(below) if below else float("nan")


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
