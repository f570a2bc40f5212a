"""Supervised baselines that a trained gate has to beat, fitted on the same folds with scikit-learn.

Beside `gate_evaluation`. TF-IDF (words and pairs) of the question, with and without its context, and

- logistic regression of P(direct answer right): the tool is called where that is lowest;
- benefit regression: ridge regression of (tool right) - (direct right), called where that is highest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import MissingDependencyError
from metis_agent.hdpo.gate_evaluation import Scored
from metis_agent.hdpo.outcomes import OutcomeTable

__all__ = ["supervised_baselines"]


def supervised_baselines(train: OutcomeTable, test: OutcomeTable, *, strength: float = 1.0) -> dict[str, Scored]:
    """Fit each baseline on `train` and score `test`, by name.

    Args:
        train: Outcomes to fit on.
        test: Questions to score.
        strength: C of the regressions.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression, Ridge
    except ImportError as missing:
        raise MissingDependencyError(
            f"The supervised baselines need {missing.name!r}; install it with: pip install scikit-learn"
        ) from missing
    found: dict[str, Scored] = {}
    for suffix, context in (("", False), (", question and context", True)):
        if context and not train.contexts:
            continue
        vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        x = vectoriser.fit_transform(_texts(train, context))
        z = vectoriser.transform(_texts(test, context))
        direct = (train.correct[:, 0] > 0.5).astype(int)
        right = LogisticRegression(C=strength, max_iter=500).fit(x, direct).predict_proba(z)[:, 1]
        benefit = Ridge(alpha=1 / strength).fit(x, train.correct[:, 1:] - train.correct[:, :1]).predict(z)
        tools = len(train.tools)
        found[f"TF-IDF + logistic regression{suffix}"] = Scored(
            direct_right=right, probabilities=np.repeat(1 - right[:, None], tools, axis=1)
        )
        found[f"TF-IDF + benefit regression{suffix}"] = Scored(
            direct_right=-_matrix(benefit).max(axis=1), probabilities=_matrix(benefit)
        )
    return found


def _texts(table: OutcomeTable, context: bool) -> list[str]:
    if not context:
        return list(table.questions)
    return [f"{question}\n{given}" for question, given in zip(table.questions, table.contexts, strict=True)]


def _matrix(values: Any) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array
