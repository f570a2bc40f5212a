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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import MissingDependencyError
from metis_agent.evaluation.gates import Resamples, Scored, accuracy_at_rate, area_under_curve, interval_of
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["FIGURES", "compare_rankings", "feature_baselines", "ranking_figures", "supervised_baselines"]

Float = NDArray[np.float64]
Index = NDArray[np.int64]
FIGURES = ("auc", "auc_benefit", "accuracy_at_half", "half_minus_always")


def ranking_figures(scored: Scored, table: OutcomeTable, index: Index) -> tuple[float, ...]:
    """One number for each of `FIGURES`, of the rows given.

    - auc: of the estimated P(direct answer right).
    - auc_benefit: of the need for the tool, where just one branch is right.
    - accuracy_at_half: the tool called on the half of the questions that need it most.
    - half_minus_always: that, less the accuracy of always calling.
    """
    direct, tool = table.correct[index, 0], table.correct[index, scored.tool[index]]
    need, win = scored.need[index], (1 + np.sign(tool - direct)) / 2
    half = accuracy_at_rate(need, direct, tool, 0.5)
    return (
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


def supervised_baselines(train: OutcomeTable, test: OutcomeTable, *, strength: float = 1.0) -> dict[str, Scored]:
    """Fit each baseline on `train` and score `test`, by name.

    Args:
        train: Outcomes to fit on.
        test: Questions to score.
        strength: C of the regressions.

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
        found |= {f"TF-IDF + {name}{suffix}": scored for name, scored in _regressions(x, z, train, strength).items()}
    return found


def feature_baselines(x: Any, z: Any, train: OutcomeTable, *, strength: float = 1.0) -> dict[str, Scored]:
    """Fit regressions on a policy's own inputs, by name.

    Args:
        x: CSR [n, D], inputs of `train`, such as `FeaturesPolicy.prepare(table).inputs(rows, rows)`.
        z: CSR [m, D], inputs of the questions to score.
        train: n outcomes.
        strength: C of the regressions.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    _import_sklearn()
    from sklearn.linear_model import LogisticRegression

    found = {f"features + {name}": scored for name, scored in _regressions(x, z, train, strength).items()}
    right = found["features + logistic regression"].direct_right
    worth, weighted = np.empty((len(right), len(train.tools))), np.empty((len(right), len(train.tools)))
    for tool, outcome in enumerate(train.correct.T[1:]):
        fitted = LogisticRegression(C=strength, max_iter=500).fit(x, _label(outcome))
        worth[:, tool] = fitted.predict_proba(z)[:, 1] - right
        gap = outcome - train.correct[:, 0]
        apart = np.flatnonzero(gap)
        fitted = LogisticRegression(C=strength, max_iter=500)
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


def _regressions(x: Any, z: Any, train: OutcomeTable, strength: float) -> dict[str, Scored]:
    from sklearn.linear_model import LogisticRegression, Ridge

    fitted = LogisticRegression(C=strength, max_iter=500).fit(x, _label(train.correct[:, 0]))
    right = fitted.predict_proba(z)[:, 1]
    benefit = _matrix(Ridge(alpha=1 / strength).fit(x, train.correct[:, 1:] - train.correct[:, :1]).predict(z))
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
