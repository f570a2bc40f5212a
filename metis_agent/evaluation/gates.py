"""How good a gate is: its frontier, its calibration, and what it does at its threshold, beside baselines.

On questions that the gate was not trained on. For each question all branches' outcomes are known, so what any gate
would have got is read off, not sampled. Intervals are by bootstrap over whole groups: of a document's questions, of a
conversation's turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import InputError
from metis_agent.gates.policy import PolicyGate
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = [
    "RATES",
    "Replay",
    "Resamples",
    "Scored",
    "accuracy_at_rate",
    "area_under_curve",
    "area_under_frontier",
    "brier",
    "calibration_bins",
    "columns_of",
    "evaluate_gate",
    "evaluate_stopping",
    "expected_calibration_error",
    "followed",
    "frontier",
    "interval_of",
    "merge_folds",
    "replay",
    "score_table",
]

Float = NDArray[np.float64]
Index = NDArray[np.int64]


class Resamples:
    """Bootstrap resamples of whole groups of rows, the same ones whenever they are asked for.

    Args:
        groups: The group of each row; at least one.
        count: How many resamples, at most.
        seed: Of the drawing.
    """

    def __init__(self, groups: Sequence[str], count: int, seed: int) -> None:
        _, place = np.unique(groups, return_inverse=True)
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(place.max() + 2))
        self._members = [order[a:b] for a, b in itertools.pairwise(starts)]
        # Large sets have narrow intervals that need fewer resamples to be seen.
        self._count = min(count, max(50, 5_000_000 // len(place)))
        self._seed = seed

    def values(self, measure: Callable[[Index], Any]) -> Float:
        """[B, ...]: `measure` of the rows of each resample."""
        rng, groups = np.random.default_rng(self._seed), len(self._members)
        alone = groups == sum(map(len, self._members))
        rows = np.concatenate(self._members) if alone else None
        found = []
        for _ in range(self._count):
            drawn = rng.integers(0, groups, groups)
            found.append(
                measure(np.concatenate([self._members[group] for group in drawn]) if rows is None else rows[drawn])
            )
        return np.asarray(found, dtype=np.float64)

    def interval(self, measure: Callable[[Index], float]) -> list[float]:
        """95%, by percentiles."""
        return interval_of(self.values(measure))


def interval_of(values: Float) -> list[float]:
    """[low, high]: 95% of the values, by percentiles."""
    if np.isnan(values).all():
        # Nothing to measure, such as a ranking where the tool never does worse.
        return [float("nan"), float("nan")]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


RATES = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a gate says of N questions."""

    direct_right: Float
    """[N]: estimated probability that the direct answer is right."""
    probabilities: Float
    """[N, A - 1]: that each tool is worth calling."""
    read: Mapping[str, Float] = field(default_factory=dict)
    """By name, [N]: what the gate read of each question, see `PolicyGate.readings`."""

    @property
    def tool(self) -> NDArray[np.int64]:
        """[N]: the action that a call would be, from 1."""
        return np.asarray(self.probabilities.argmax(axis=1) + 1)

    @property
    def need(self) -> Float:
        """[N]: probability that the best tool is worth calling."""
        return np.asarray(self.probabilities.max(axis=1))


def score_table(gate: PolicyGate, table: OutcomeTable, progress: Callable[[int], None] = lambda _: None) -> Scored:
    """Ask the deployed gate about every question of a table.

    Raises:
        InputError: the table has other tools, or lacks what the gate reads of a draft.
    """
    if table.tools != gate.artefact.tools:
        raise InputError(
            f"The table has the tools {table.tools!r}, the gate {gate.artefact.tools!r}: name the same with --tool, in "
            "the same order."
        )
    wanted = gate.artefact.description["policy"].get("draft", [])
    if missing := [name for name in wanted if name not in table.draft and not _may_be_missing(gate, name)]:
        raise InputError(f"The gate reads {missing!r} of a direct draft, and the table has no such columns.")
    nothing = ("",) * len(table)
    contexts, drafts, steps = table.contexts or nothing, table.drafts or nothing, table.steps.tolist()
    direct, tools = np.empty(len(table)), np.empty((len(table), len(table.tools)))
    read: list[Mapping[str, float]] = []
    for row, (question, context) in enumerate(zip(table.questions, contexts, strict=True)):
        draft = {name: float(column[row]) for name, column in table.draft.items()}
        accuracy, probabilities = gate.score(
            question, context, draft, draft_text=drafts[row], history=table.said(row), step=steps[row]
        )
        direct[row], tools[row] = accuracy["direct"], list(probabilities.values())
        read.append(gate.readings(question, contexts[row], table.said(row)))
        progress(1)
    return Scored(direct_right=direct, probabilities=tools, read=columns_of(read))


def columns_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Float]:
    """By name, [N], of rows that have the same names."""
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in (rows[0] if rows else ())}


def _may_be_missing(gate: PolicyGate, name: str) -> bool:
    policy = gate.artefact.description["policy"]
    from_end = len(policy["draft"]) - policy["draft"].index(name)
    width = len(gate.artefact.tensors["number_mean"].values)
    return width - from_end in policy["missing"]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of R recorded runs under a rule of stopping: exact, since a run stays as it was until it is stopped."""

    correct: Float
    """[R]: whether the answer was right where the rule stopped the run, or at its own end."""
    full: Float
    """[R]: whether the run's own answer was."""
    cost: Float
    """[R]: of the calls made."""
    enough: Float
    """[R]: of the calls up to the first state at which answering was right; NaN for a run that never came to one."""
    homes: tuple[str, ...]
    """[R]: what each run is drawn with, see `OutcomeTable.homes`."""

    def figures(self, draws: Resamples | None = None) -> dict[str, Any]:
        """By turn: accuracy, cost, what was spent after it was enough, in vain, and the share of what was needed."""
        won, after = ~np.isnan(self.enough), np.nan_to_num(self.enough)
        needed = np.minimum(self.cost, after)
        columns = {
            "accuracy": self.correct,
            "cost": self.cost,
            "redundant": won * np.maximum(0.0, self.cost - after),
            "in_vain": ~won * self.cost,
        }
        found: dict[str, Any] = {"turns": len(self.cost)}
        for name, column in columns.items():
            found[name] = float(column.mean())
            if draws is not None:
                found[f"{name}_interval"] = draws.interval(partial(_mean_of, column))
        return {**found, "necessary": float(needed.sum() / after.sum()) if after.sum() else float("nan")}


def replay(points: OutcomeTable, go_on: NDArray[np.bool_]) -> Replay:
    """Replay a rule on recorded runs.

    Args:
        points: Decision points.
        go_on: [N], False where the rule answers; each run is stopped at its first such state.
    """
    rows = np.arange(len(points))
    begins = np.array([row for row in rows if not row or points.runs[row] != points.runs[row - 1]])
    ends = np.append(begins[1:], len(points))
    full, budget = points.correct[ends - 1, 1], points.cost[begins, 1]

    def first(of: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        found = np.minimum.reduceat(np.where(of, rows, len(points)), begins)
        return np.minimum(found, ends - 1), found < ends

    at, stopped = first(~go_on)
    right, early = first(points.correct[:, 0] > 0.5)
    homes = points.homes
    return Replay(
        correct=np.where(stopped, points.correct[at, 0], full),
        full=full,
        cost=np.where(stopped, budget - points.cost[at, 1], budget),
        enough=np.where(early, budget - points.cost[right, 1], np.where(full > 0.5, budget, np.nan)),
        homes=tuple(homes[row] for row in begins),
    )


def followed(recorded: OutcomeTable, stop: NDArray[np.bool_]) -> OutcomeTable:
    """What comes of going on from each state, and what it costs, where a rule decides from the next one on.

    Exact replay: the run stays as it was recorded until the rule stops it; where it never does, the run's own end.

    Args:
        recorded: Decision points.
        stop: [N], where the rule answers.
    """
    correct, cost = recorded.correct.copy(), recorded.cost.copy()
    for row in range(len(recorded) - 2, -1, -1):
        after = row + 1
        if recorded.runs[row] != recorded.runs[after]:
            continue
        correct[row, 1:] = correct[after, 0] if stop[after] else correct[after, 1]
        left = 0.0 if stop[after] else cost[after, 1]
        cost[row, 1:] = recorded.cost[row, 1] - recorded.cost[after, 1] + left
    return replace(recorded, correct=correct, cost=cost)


def evaluate_stopping(need: Float, points: OutcomeTable, threshold: float, *, resamples: int = 1000) -> dict[str, Any]:
    """By turn: what a gate that goes on above the threshold does, beside the runs as they were, caps and the oracle."""

    def of(go_on: NDArray[np.bool_], draws: Resamples | None = None) -> dict[str, Any]:
        return replay(points, go_on).figures(draws)

    done = replay(points, need > threshold)
    steps, runs = points.steps, np.array(points.runs)
    winnable = np.isin(runs, runs[(points.correct[:, :2] > 0.5).any(axis=1)])
    return {
        "threshold": threshold,
        **done.figures(Resamples(done.homes, resamples, 0)),
        "frontier": [
            {"threshold": float(t), **of(need > t)} for t in np.unique(np.quantile(need, np.linspace(0, 1, 21)))
        ],
        "as_recorded": of(np.ones(len(points), dtype=bool)),
        "oracle": of((points.correct[:, 0] <= 0.5) & winnable),
        "caps": [{"calls": cap, **of(steps < cap)} for cap in range(int(steps.max()) + 1)],
    }


def area_under_curve(score: Float, target: Float, weight: Float | None = None) -> float:
    """P(score of a right one > of a wrong one) + half of ties; targets in [0, 1] count in part; NaN if one-sided."""
    weight = np.ones(len(score)) if weight is None else weight
    _, place = np.unique(score, return_inverse=True)
    positive = np.bincount(place, weight * target)
    negative = np.bincount(place, weight * (1 - target))
    total = positive.sum() * negative.sum()
    if total <= 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total)


def expected_calibration_error(probability: Float, target: Float, bins: int = 10) -> float:
    """Mean gap, over equal-width bins weighed by their rows, of predicted to true share."""
    place = np.clip((probability * bins).astype(int), 0, bins - 1)
    gaps = np.bincount(place, probability - target, minlength=bins)
    return float(np.abs(gaps).sum() / len(probability))


def calibration_bins(probability: Float, target: Float, bins: int = 10) -> list[dict[str, float]]:
    """The bins of that error that hold questions: mean `predicted`, mean `observed`, and how many `questions`."""
    place = np.clip((probability * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, column, minlength=bins) for column in (probability, target)]
    return [
        {
            "predicted": float(sums[0][k] / count[k]),
            "observed": float(sums[1][k] / count[k]),
            "questions": int(count[k]),
        }
        for k in np.flatnonzero(count)
    ]


def brier(probability: Float, target: Float) -> float:
    """Mean squared gap."""
    return float(np.mean((probability - target) ** 2))


def accuracy_at_rate(need: Float, direct: Float, tool: Float, rate: float) -> float:
    """Accuracy if the tool is called on the share `rate` of questions with the highest `need`, ties shared out."""
    n = len(need)
    _, place = np.unique(-need, return_inverse=True)
    gain = np.bincount(place, tool - direct) / np.bincount(place)
    order = np.sort(place)[: round(rate * n)]
    return float((direct.sum() + gain[order].sum()) / n)


def area_under_frontier(need: Float, direct: Float, tool: Float) -> float:
    """Mean accuracy over all budgets of calls, each spent where the need is highest; ties are shared out.

    An order that knows nothing has the mean of never and always calling.
    """
    n = len(need)
    _, place = np.unique(-need, return_inverse=True)
    gain = (np.bincount(place, tool - direct) / np.bincount(place))[np.sort(place)]
    # The call of rank k is made at all budgets from k on.
    return float(direct.mean() + gain @ (n - np.arange(n) - 0.5) / n**2)


def frontier(need: Float, direct: Float, tool: Float, rates: Sequence[float] = RATES) -> list[dict[str, float]]:
    """`tool_rate` and `accuracy` at each rate."""
    return [{"tool_rate": rate, "accuracy": accuracy_at_rate(need, direct, tool, rate)} for rate in rates]


def evaluate_gate(
    scored: Scored,
    table: OutcomeTable,
    threshold: float,
    *,
    baselines: Mapping[str, Scored] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures, as JSON can hold them; intervals are 95% percentile bootstraps over groups of questions.

    The headline is `aucc`, the area under accuracy and calls: see `area_under_frontier`. `auc` is of "direct is right".

    Args:
        scored: The gate on `table`.
        table: Questions that it was not trained on.
        threshold: A tool is called where its probability is above this.
        baselines: Others on the same questions, such as those of `gate_baselines`.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    draws = Resamples(table.homes, resamples, seed)
    rows = np.arange(len(table))
    direct, tool = table.correct[:, 0], table.correct[rows, scored.tool]
    called = scored.need > threshold
    fixed = {
        "never": float(direct.mean()),
        "always": float(tool.mean()),
        "random at half of the calls": float((direct.mean() + tool.mean()) / 2),
        "oracle": float(table.correct.max(axis=1).mean()),
    }
    others = {name: _ranking(other, table, draws) for name, other in (baselines or {}).items()}
    return {
        "questions": len(table),
        "ece": expected_calibration_error(scored.direct_right, direct),
        "brier": brier(scored.direct_right, direct),
        "calibration": calibration_bins(scored.direct_right, direct),
        **_ranking(scored, table, draws),
        "frontier": frontier(scored.need, direct, tool),
        "at_threshold": {"threshold": threshold, **_at_threshold(called, direct, tool, scored, table, draws)},
        **({"turns": evaluate_stopping(scored.need, table, threshold, resamples=resamples)} if table.runs else {}),
        "baselines": {
            **{name: {"accuracy": value} for name, value in fixed.items()},
            "never": {"accuracy": fixed["never"], "aucc": fixed["never"]},
            "random at half of the calls": dict.fromkeys(("accuracy", "aucc"), fixed["random at half of the calls"]),
            "oracle": {"accuracy": fixed["oracle"], "aucc": area_under_frontier(tool - direct, direct, tool)},
            **others,
        },
    }


def _ranking(scored: Scored, table: OutcomeTable, draws: Resamples) -> dict[str, Any]:
    rows = np.arange(len(table))
    direct, tool = table.correct[:, 0], table.correct[rows, scored.tool]
    win = (1 + np.sign(tool - direct)) / 2

    def auc(index: NDArray[np.int64]) -> float:
        return area_under_curve(scored.direct_right[index], direct[index])

    def benefit(index: NDArray[np.int64]) -> float:
        return area_under_curve(scored.need[index], win[index], np.abs(tool - direct)[index])

    def half(index: NDArray[np.int64]) -> float:
        return accuracy_at_rate(scored.need[index], direct[index], tool[index], 0.5)

    def area(index: NDArray[np.int64]) -> float:
        return area_under_frontier(scored.need[index], direct[index], tool[index])

    named = {"aucc": area, "accuracy_at_half": half, "auc": auc, "auc_benefit": benefit}
    figures: dict[str, Any] = {}
    for name, measure in named.items():
        figures[name], figures[f"{name}_interval"] = measure(rows), draws.interval(measure)
    return figures


def _at_threshold(
    called: NDArray[np.bool_], direct: Float, tool: Float, scored: Scored, table: OutcomeTable, draws: Resamples
) -> dict[str, Any]:
    """Shares of all questions: redundant calls (the direct answer is right; of them harmful ones, where the tool's is
    not), necessary ones, and those where neither is right.
    """
    rows = np.arange(len(table))
    action = np.where(called, scored.tool, 0)
    columns = {
        "accuracy": table.correct[rows, action],
        "tool_rate": called.astype(np.float64),
        "redundant": called * direct,
        "harmful": called * direct * (1 - tool),
        "necessary": called * (1 - direct) * tool,
        "neither": called * (1 - direct) * (1 - tool),
        "missed": ~called * (1 - direct) * tool,
        "cost": table.cost[rows, action],
    }
    figures: dict[str, Any] = {}
    for name, column in columns.items():
        figures[name] = float(column.mean())
        figures[f"{name}_interval"] = draws.interval(partial(_mean_of, column))
    return figures


def _mean_of(column: Float, index: NDArray[np.int64]) -> float:
    return float(column[index].mean())


def merge_folds(count: int, parts: Sequence[tuple[NDArray[np.int64], Mapping[str, Scored]]]) -> dict[str, Scored]:
    """Out-of-fold scores of `count` questions from those of each fold: (rows, by name)."""
    merged: dict[str, Scored] = {}
    for name, first in parts[0][1].items():
        direct = np.empty(count)
        probabilities = np.empty((count, first.probabilities.shape[1]))
        for rows, scored in parts:
            direct[rows], probabilities[rows] = scored[name].direct_right, scored[name].probabilities
        merged[name] = Scored(direct_right=direct, probabilities=probabilities)
    return merged
