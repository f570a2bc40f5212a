"""From when on a question is unlike a gate's training: the score of `metis_agent.gates.familiarity`, calibrated.

Where it stands: `train_gate` -> **familiarity** -> `export`. Each training question is scored by what the questions of
the other folds have in common with it, so as a new one would be. The weights separate these from other people's
questions (`other_questions.txt`: of all kinds, in several languages); the threshold is the conformal quantile of the
training questions' own scores: of new ones like them at most `share` are left to the model, whatever the others are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from metis_agent.gates.familiarity import FURTHEST, PLACES, SEEN
from metis_agent.gates.features import hashed_ngrams

__all__ = ["SHARE", "Calibrated", "calibrate", "other_questions"]

SHARE = 0.02
"""Of new questions like the training's, at most so many are taken for strange ones."""
_PRIOR = 0.01


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What goes into the artefact."""

    seen: NDArray[np.uint64]
    """[PLACES / 64]"""
    description: Mapping[str, Any]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """By name."""
        return {SEEN: self.seen}


def other_questions() -> tuple[str, ...]:
    """Questions and requests of other people, one a line."""
    text = (files("metis_agent.hdpo") / "other_questions.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def calibrate(questions: Sequence[str], fold: NDArray[np.int64], *, share: float = SHARE) -> Calibrated | None:
    """The score's weights and threshold.

    Args:
        questions: [N], of training.
        fold: [N], as `OutcomeTable.folds` gives them: what belongs together is in one.
        share: See `SHARE`.

    Returns:
        `None` where there are too few questions for a threshold that keeps the share.
    """
    rank = math.ceil((len(questions) + 1) * (1 - share))
    if rank > len(questions):
        return None
    spaces = [[np.fromiter(counts, np.int64) for counts in hashed_ngrams(question, PLACES)] for question in questions]
    total = np.zeros(PLACES, dtype=np.int32)
    for places in itertools.chain.from_iterable(spaces):
        total[places] += 1
    lengths = np.array([math.log1p(len(question)) for question in questions])
    mean, deviation = float(lengths.mean()), max(float(lengths.std()), 0.1)
    own = np.empty((len(questions), 3))
    for held_out in np.unique(fold):
        rows = np.flatnonzero(fold == held_out)
        seen = total.copy()
        for row in rows.tolist():
            for places in spaces[row]:
                seen[places] -= 1
        own[rows, :2] = [[_new(seen, places) for places in spaces[row]] for row in rows.tolist()]
    own[:, 2] = _surprise(lengths, mean, deviation)
    others = other_questions()
    strange = np.array(
        [[_new(total, np.fromiter(counts, np.int64)) for counts in hashed_ngrams(text, PLACES)] for text in others]
    )
    length = _surprise(np.array([math.log1p(len(text)) for text in others]), mean, deviation)
    strange = np.column_stack([strange, length])
    weights = _separating(own, strange)
    scores = np.sort(_scores(weights, own))
    threshold = float(scores[rank - 1])
    bits = np.packbits(total > 0, bitorder="little").view("<u8")
    return Calibrated(
        seen=np.ascontiguousarray(bits, dtype=np.uint64),
        description={
            "weights": weights.tolist(),
            "length": {"mean": mean, "deviation": deviation},
            "threshold": threshold,
            "share": share,
            "held_out_left": float((scores > threshold).mean()),
            "others_left": float((_scores(weights, strange) > threshold).mean()),
        },
    )


def _new(seen: NDArray[np.int32], places: NDArray[np.int64]) -> float:
    return float((seen[places] <= 0).mean()) if len(places) else 1.0


def _surprise(lengths: NDArray[np.float64], mean: float, deviation: float) -> NDArray[np.float64]:
    return np.minimum(FURTHEST, np.abs(lengths - mean) / deviation)


def _scores(weights: NDArray[np.float64], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(weights[0] + inputs @ weights[1:], -500, 500))))


def _separating(own: NDArray[np.float64], strange: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic regression, both sides counting alike; no weight is below 0, for what is new makes nothing familiar."""
    x = np.column_stack([np.ones(len(own) + len(strange)), np.vstack([own, strange])])
    y = np.concatenate([np.zeros(len(own)), np.ones(len(strange))])
    side = np.where(y > 0, 0.5 / len(strange), 0.5 / len(own))

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = x @ weights
        value = side @ (np.logaddexp(0, z) - y * z) + _PRIOR / 2 * weights[1:] @ weights[1:]
        slope = x.T @ (side * (1 / (1 + np.exp(-np.clip(z, -500, 500))) - y))
        slope[1:] += _PRIOR * weights[1:]
        return float(value), slope

    bounds = [(None, None), (0, None), (0, None), (0, None)]
    found = minimize(loss, np.zeros(4), jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(found.x)
