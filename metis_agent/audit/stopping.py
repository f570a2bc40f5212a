"""A gate trained on the spot, cross-fitted: when to stop, learnt by regression from the recorded runs' own verdicts.

Optimal stopping by regression (Longstaff and Schwartz, 2001; for retrieval: Stop-RAG, arXiv 2510.14337). At s_k two
heads are fitted: q_stop = P(a_k = 1), and q_go = E[a_tau' | s_k], what comes of going on under the current rule from
s_{k+1}. The rule answers where q_go - q_stop <= beta * saving: with beta = 0 accuracy alone decides, and economy is
only asked for within beta. Each run is decided by heads that saw none of its conversation.

This says what a gate could save before one is trained; the gate that serves is trained by `metis train gate`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.audit.frontier import Replayable, RulePoint, replay, stops_where
from metis_agent.audit.turns import RecordedTurn

__all__ = ["BETAS", "StateReading", "cross_fitted", "read_states"]

BETAS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
_FOLDS = 5
_SWEEPS = 2
_FEWEST = 20
"""Runs that can be cut short; with fewer there is nothing to learn."""
_CHARACTERS = 4_000
_MOST_WORDS = 20_000


@dataclass(frozen=True, kw_only=True)
class StateReading:
    """What the heads read of one state."""

    text: str
    """Marked words: the question's own, and those of the latest results."""
    numbers: tuple[float, ...]


def read_states(turn: RecordedTurn, first: int) -> list[StateReading]:
    """The states s_first .. s_{K-1} of a turn, as the heads read them."""
    question = turn.run.question.text[:_CHARACTERS]
    asked = {word for word in question.casefold().split() if len(word) > 3}
    found = []
    for k in range(first, len(turn.steps) - 1):
        outcomes = [it for step in turn.steps[:k] if step.round for it in step.round.outcomes]
        latest = outcomes[-1].content[:_CHARACTERS] if outcomes else ""
        seen = " ".join(it.content for it in outcomes)[-_CHARACTERS:].casefold()
        tools = " ".join(f"called_{it.tool}" for it in outcomes)
        found.append(
            StateReading(
                text=f"{question} {tools} " + " ".join(f"saw_{word}" for word in latest.split()[:200]),
                numbers=(
                    float(k),
                    math.log1p(len(seen)),
                    sum(word in seen for word in asked) / len(asked) if asked else 0.0,
                    float(bool(outcomes) and outcomes[-1].status != "ok"),
                    float(any(it.content == latest for it in outcomes[:-1])),
                    math.log1p(len(question)),
                ),
            )
        )
    return found


def cross_fitted(
    runs: Sequence[Replayable], readings: Sequence[Sequence[StateReading]], *, seed: int = 0
) -> list[RulePoint]:
    """The gate's frontier: one point for each beta.

    Args:
        runs: With the last stretch's verdicts.
        readings: Of each run, its states but the last.
        seed: Of folds and bootstrap.

    Returns:
        Nothing where too few runs could be cut short, or scikit-learn is not installed.
    """
    cuttable = [i for i, run in enumerate(runs) if run.rounds]
    folds = np.array([_fold(runs[i].turn.group, seed) for i in range(len(runs))], dtype=np.int64)
    if len(cuttable) < _FEWEST or len({folds[i] for i in cuttable}) < 2:
        return []
    try:
        inputs = _Inputs([readings[i] for i in cuttable])
    except ImportError:
        return []
    points = []
    for beta in BETAS:
        stop = np.zeros(inputs.states, dtype=bool)
        for fold in range(_FOLDS):
            of_fold = [place for place, i in enumerate(cuttable) if folds[i] == fold]
            others = [place for place, i in enumerate(cuttable) if folds[i] != fold]
            if of_fold and others:
                rows = inputs.rows(of_fold)
                stop[rows] = _decide(inputs, [runs[cuttable[place]] for place in others], others, rows, beta)
        at = {i: inputs.begins[place] for place, i in enumerate(cuttable)}
        stops = stops_where(runs, lambda i, k, at=at, stop=stop: bool(stop[at[i] + k]))  # type: ignore[misc]
        points.append(replay(runs, stops, rule="gate", setting=beta, seed=seed))
    return points


class _Inputs:
    """The states of all runs as one sparse matrix."""

    def __init__(self, readings: Sequence[Sequence[StateReading]]) -> None:
        from scipy.sparse import csr_matrix, hstack
        from sklearn.feature_extraction.text import TfidfVectorizer

        flat = [reading for of_run in readings for reading in of_run]
        words = TfidfVectorizer(sublinear_tf=True, max_features=_MOST_WORDS, token_pattern=r"\w+")
        numbers = np.array([reading.numbers for reading in flat])
        spread = numbers.std(axis=0)
        scaled = (numbers - numbers.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        self.x: Any = hstack([words.fit_transform([reading.text for reading in flat]), csr_matrix(scaled)]).tocsr()
        self.begins = np.concatenate([[0], np.cumsum([len(of_run) for of_run in readings])])

    @property
    def states(self) -> int:
        return int(self.begins[-1])

    def rows(self, places: Sequence[int]) -> NDArray[np.int64]:
        """The states of some runs, in order."""
        return np.concatenate([np.arange(self.begins[place], self.begins[place + 1]) for place in places])


def _decide(
    inputs: _Inputs, train: Sequence[Replayable], places: Sequence[int], rows: NDArray[np.int64], beta: float
) -> NDArray[np.bool_]:
    """Fit on some runs, and say for the states of others whether to stop."""
    learnt = inputs.x[inputs.rows(places)]
    held = inputs.x[rows]
    lengths = [run.rounds for run in train]
    begins = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(train)), lengths).tolist()
    now = np.concatenate([run.right[:-1] for run in train]).astype(np.float64)
    q_stop, q_stop_held = _fit(learnt, now, learnt, held)
    # At first the rule is to go on always; each sweep replays the rule of the one before.
    taus = np.repeat(lengths, lengths)
    stop_held = np.zeros(len(rows), dtype=bool)
    for _ in range(_SWEEPS):
        later = np.array([train[run].right[tau] for run, tau in zip(owner, taus, strict=True)], dtype=np.float64)
        left = np.array(
            [train[run].calls[tau] - train[run].calls[state - begins[run]]
             for state, (run, tau) in enumerate(zip(owner, taus, strict=True))], dtype=np.float64
        )  # fmt: skip
        q_go, q_go_held = _fit(learnt, later, learnt, held)
        calls, calls_held = _fit(learnt, left / (1 + left), learnt, held, binary=False)
        stop = q_go - q_stop <= beta * calls
        stop_held = q_go_held - q_stop_held <= beta * calls_held
        taus = _first_stop_after(stop, begins)
    return stop_held


def _first_stop_after(stop: NDArray[np.bool_], begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each state s_k of each run: where the rule stops it from s_{k+1} on."""
    taus = np.empty(len(stop), dtype=np.int64)
    for begin, end in itertools.pairwise(begins.tolist()):
        tau = end - begin
        for k in range(end - begin - 1, -1, -1):
            taus[begin + k] = tau
            if stop[begin + k]:
                tau = k
    return taus


def _fit(
    x: Any, y: NDArray[np.float64], train: Any, held: Any, *, binary: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predictions of y for the rows trained on, and for those held out."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if np.ptp(y) == 0:
        return np.full(train.shape[0], y[0]), np.full(held.shape[0], y[0])
    if binary:
        fitted = LogisticRegression(C=1.0, max_iter=500).fit(x, y > 0.5)
        return fitted.predict_proba(train)[:, 1], fitted.predict_proba(held)[:, 1]
    ridge = Ridge(alpha=1.0).fit(x, y)
    return np.clip(ridge.predict(train), 0, 1), np.clip(ridge.predict(held), 0, 1)


def _fold(group: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"fold {seed}/{group}".encode(errors="surrogatepass")).digest()[:4]) % _FOLDS
