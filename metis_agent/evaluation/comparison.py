"""How a gate ranks questions, with intervals, and by how much it beats another gate on the same questions.

Several scorings of the same questions (one a seed of the folds) count as one method: a figure is their mean, and one
bootstrap over groups of questions gives the interval of that mean. Two methods are compared on the same resamples, so
what makes a question hard for both does not widen the interval of their gap.

Supervised baselines that a trained gate has to beat are fitted on the same folds with scikit-learn. TF-IDF (words and
pairs) of the question, with and without its context, and

- logistic regression of P(direct answer right): the tool is called where that is lowest;
- benefit regression: ridge regression of (tool right) - (direct right), called where that is highest.

`feature_baselines` fits them on what the `features` policy reads, and two more: a logistic regression for each branch,
the tool called where the difference is highest, and a branch-weighted one, of which branch is right, each question
weighed by how far its branches differ. What a gate does better than these is owed to its objective, not its inputs.

Are today's questions like those that a gate was calibrated on? No outcomes are needed. `metis calibrate` keeps a sample
of what the gate read and said with it, `metis drift` compares others with that: its scores, the numbers of the
questions, and how strange they are to its training, one test each. Foreign questions among the usual ones show by what
is read long before they move the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom, ks_2samp

from metis_agent.errors import CheckpointError, InputError, MissingDependencyError
from metis_agent.evaluation.gates import (
    Resamples,
    Scored,
    accuracy_at_rate,
    area_under_curve,
    area_under_frontier,
    interval_of,
)
from metis_agent.gates.artefact import Artefact
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = [
    "FIGURES",
    "LEAST",
    "Drift",
    "compare_rankings",
    "drift",
    "drift_since_calibration",
    "feature_baselines",
    "ranking_figures",
    "reference_note",
    "supervised_baselines",
]

Float = NDArray[np.float64]
Index = NDArray[np.int64]
FIGURES = ("aucc", "auc", "auc_benefit", "accuracy_at_half", "half_minus_always")
LEAST = 20
"""Questions on a side that a drift check needs."""


def ranking_figures(scored: Scored, table: OutcomeTable, index: Index) -> tuple[float, ...]:
    """One number for each of `FIGURES`, of the rows given.

    - aucc: mean accuracy over all budgets of calls, see `area_under_frontier`.
    - auc: of the estimated P(direct answer right).
    - auc_benefit: of the need for the tool, where just one branch is right.
    - accuracy_at_half: the tool called on the half of the questions that need it most.
    - half_minus_always: that, less the accuracy of always calling.
    """
    direct, tool = table.correct[index, 0], table.correct[index, scored.tool[index]]
    need, win = scored.need[index], (1 + np.sign(tool - direct)) / 2
    half = accuracy_at_rate(need, direct, tool, 0.5)
    return (
        area_under_frontier(need, direct, tool),
        area_under_curve(scored.direct_right[index], direct),
        area_under_curve(need, win, np.abs(tool - direct)),
        half,
        half - float(tool.mean()),
    )


def compare_rankings(
    methods: Mapping[str, Sequence[Scored]], table: OutcomeTable, resamples: Resamples, *, reference: str
) -> dict[str, dict[str, Any]]:
    """Figures of each method with intervals, and by how much the `reference` is above it.

    Args:
        methods: By name, the scorings of `table` that are one method's.
        table: The questions.
        resamples: Of the table's questions.
        reference: The method that the others are compared with.

    Returns:
        By method and then figure: `<figure>`, `<figure>_seeds`, `<figure>_interval` and, but for the reference's
        own, `<figure>_below_reference` and its `_interval`.
    """
    rows = np.arange(len(table))

    def each_seed(name: str, index: Index) -> Float:
        return np.array([ranking_figures(one, table, index) for one in methods[name]])

    def mean(name: str) -> Float:
        return resamples.values(lambda index: each_seed(name, index).mean(axis=0))

    ours, ours_drawn = each_seed(reference, rows).mean(axis=0), mean(reference)
    found: dict[str, dict[str, Any]] = {}
    for name in methods:
        seeds, drawn = each_seed(name, rows), ours_drawn if name == reference else mean(name)
        row: dict[str, Any] = {}
        for place, figure in enumerate(FIGURES):
            row[figure] = float(seeds[:, place].mean())
            row[f"{figure}_seeds"] = seeds[:, place].tolist()
            row[f"{figure}_interval"] = interval_of(drawn[:, place])
            if name != reference:
                row[f"{figure}_below_reference"] = float(ours[place] - row[figure])
                row[f"{figure}_below_reference_interval"] = interval_of(ours_drawn[:, place] - drawn[:, place])
        found[name] = row
    return found


def supervised_baselines(train: OutcomeTable, test: OutcomeTable) -> dict[str, Scored]:
    """Fit each baseline on `train` and score `test`, by name.

    Args:
        train: Outcomes to fit on.
        test: Questions to score.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    _import_sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer

    found: dict[str, Scored] = {}
    for suffix, context in (("", False), (", question and context", True)):
        if context and not (train.contexts or train.histories):
            continue
        vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        x = vectoriser.fit_transform(_texts(train, context))
        z = vectoriser.transform(_texts(test, context))
        found |= {f"TF-IDF + {name}{suffix}": scored for name, scored in _regressions(x, z, train).items()}
    return found


def feature_baselines(x: Any, z: Any, train: OutcomeTable) -> dict[str, Scored]:
    """Fit regressions on a policy's own inputs, by name.

    Args:
        x: CSR [n, D], inputs of `train`, such as `FeaturesPolicy.prepare(table).inputs(rows, rows)`.
        z: CSR [m, D], inputs of the questions to score.
        train: n outcomes.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    _import_sklearn()
    from sklearn.linear_model import LogisticRegression

    found = {f"features + {name}": scored for name, scored in _regressions(x, z, train).items()}
    right = found["features + logistic regression"].direct_right
    worth, weighted = np.empty((len(right), len(train.tools))), np.empty((len(right), len(train.tools)))
    for tool, outcome in enumerate(train.correct.T[1:]):
        fitted = LogisticRegression(max_iter=500).fit(x, _label(outcome))
        worth[:, tool] = fitted.predict_proba(z)[:, 1] - right
        gap = outcome - train.correct[:, 0]
        apart = np.flatnonzero(gap)
        fitted = LogisticRegression(max_iter=500)
        fitted.fit(x[apart], gap[apart] > 0, sample_weight=np.abs(gap[apart]))
        weighted[:, tool] = fitted.predict_proba(z)[:, 1]
    found["features + logistic regression of each branch"] = Scored(direct_right=right, probabilities=worth)
    found["features + branch-weighted logistic regression"] = Scored(
        direct_right=1 - weighted.max(axis=1), probabilities=weighted
    )
    return found


def _import_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as missing:
        raise MissingDependencyError(
            f"The supervised baselines need {missing.name!r}; install it with: pip install scikit-learn"
        ) from missing


def _regressions(x: Any, z: Any, train: OutcomeTable) -> dict[str, Scored]:
    from sklearn.linear_model import LogisticRegression, Ridge

    fitted = LogisticRegression(max_iter=500).fit(x, _label(train.correct[:, 0]))
    right = fitted.predict_proba(z)[:, 1]
    benefit = _matrix(Ridge().fit(x, train.correct[:, 1:] - train.correct[:, :1]).predict(z))
    return {
        "logistic regression": Scored(
            direct_right=right, probabilities=np.repeat(1 - right[:, None], len(train.tools), axis=1)
        ),
        "benefit regression": Scored(direct_right=-benefit.max(axis=1), probabilities=benefit),
    }


def _label(outcome: NDArray[np.float64]) -> NDArray[np.int64]:
    return (outcome > 0.5).astype(np.int64)


def _texts(table: OutcomeTable, context: bool) -> list[str]:
    if not context:
        return list(table.questions)
    return [f"{question}\n{table.background(row)}" for row, question in enumerate(table.questions)]


def _matrix(values: Any) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Are these questions like those that the gate was calibrated on?"""

    drifted: bool
    p_value: float
    """Smallest of the columns', times the number of columns (Bonferroni)."""
    distance: float
    """Largest gap between two distribution functions, 0 to 1: how large the drift is, however many rows."""
    column: str
    """Where it is largest."""


def drift(
    reference: NDArray[np.float64], today: NDArray[np.float64], names: tuple[str, ...], *, level: float = 0.01
) -> Drift:
    """Two-sample tests of each column, of the whole and of its ends; all of them together at `level` (Bonferroni).

    It needs no outcomes, so it can run on live traffic. It sees a change of the questions; it can't see one that only
    changes which answers are right, such as another model: a gate knows its model by name.

    Args:
        reference: [N, S], of the questions calibrated on.
        today: [M, S].
        names: [S], of the columns.
        level: False alarms, of all checks without drift.

    Raises:
        InputError: fewer than 20 rows on a side.
    """
    if min(len(reference), len(today)) < LEAST:
        raise InputError(
            f"{len(reference)} and {len(today)} questions: a drift check needs {LEAST} or more on each side."
        )
    tests = [_test(a, b) for a, b in zip(reference.T, today.T, strict=True)]
    worst = min(range(len(tests)), key=lambda index: tests[index][0])
    p_value = min(1.0, tests[worst][0] * len(tests))
    return Drift(drifted=p_value < level, p_value=p_value, distance=tests[worst][1], column=names[worst])


def _test(reference: NDArray[np.float64], today: NDArray[np.float64]) -> tuple[float, float]:
    """(p-value, largest gap between the distribution functions) of one column.

    Beside the gap two more questions are asked, since a few foreign questions among many hardly move the whole: are
    there more than there should be above what only a few of the reference reach, or below it? How many of n new values
    exceed the r-th largest of m is beta-binomial, whatever the distribution; ties make it rarer.
    """
    gap = ks_2samp(reference, today, method="asymp")
    m, n = len(reference), len(today)
    p_values = [float(gap.pvalue)]
    for old, new in ((reference, today), (-reference, -today)):
        rank = max(1, round(_EXTREME * m))
        beyond = int((new > np.partition(old, m - rank)[m - rank]).sum())
        p_values.append(float(betabinom.sf(beyond - 1, n, rank, m + 1 - rank)))
    return min(1.0, len(p_values) * min(p_values)), float(gap.statistic)


_EXTREME = 0.02
"""Share of the reference that is extreme, on each side."""
_KEPT = 1000
"""Values kept of each column: evenly spaced ranks, so the distribution function is off by at most 1/2000."""


def reference_note(scored: Scored, tools: Sequence[str]) -> dict[str, Any]:
    """What `gate.json` keeps of the questions calibrated on."""
    found = _columns(scored, tools)
    columns = np.sort(np.column_stack([*found.values()]), axis=0)
    rows = np.arange(len(columns))
    if len(rows) > _KEPT:
        rows = np.round((np.arange(_KEPT) + 0.5) * len(columns) / _KEPT - 0.5).astype(np.int64)
    return {"columns": list(found), "values": columns[rows].T.tolist()}


def drift_since_calibration(artefact: Artefact, scored: Scored, *, level: float = 0.01) -> Drift | None:
    """Compare today's questions with those calibrated on; `None` where the gate was not calibrated by `metis`.

    The scores of its training questions would not do: each comes from a fold's gate, not from this one. What a gate of
    an earlier version did not keep is not compared.

    Args:
        artefact: The gate's.
        scored: Its scores of today's questions; without any, what it read of them alone is compared.
        level: False alarms, of all checks without drift.

    Raises:
        InputError: fewer than 20 questions on a side.
        CheckpointError: what the gate says of the questions calibrated on is no such thing.
    """
    note = artefact.description["threshold"].get("reference")
    if note is None:
        return None
    today = _columns(scored, artefact.tools)
    try:
        pairs = zip(note["columns"], note["values"], strict=True)
        kept = {str(name): np.array(values, dtype=np.float64) for name, values in pairs if name in today}
        if not kept:
            return None
        reference = np.column_stack([*kept.values()])
        if reference.ndim != 2 or not np.isfinite(reference).all():
            raise ValueError(f"values of shape {reference.shape}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{str(artefact.folder)!r} has no readable scores of the questions it was calibrated on ({error!r}). "
            "Calibrate it again."
        ) from error
    return drift(reference, np.column_stack([today[name] for name in kept]), tuple(kept), level=level)


def _columns(scored: Scored, tools: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    said = (scored.direct_right, *scored.probabilities.T) if len(scored.direct_right) else ()
    names = ("direct answer is right", *(f"{tool} is worth calling" for tool in tools))
    # Rounded on both sides: how near 1 a sure gate comes is no drift.
    return {name: column.round(5) for name, column in (*zip(names, said, strict=False), *scored.read.items())}
