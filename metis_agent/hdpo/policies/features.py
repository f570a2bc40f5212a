"""The `features` policy: hashed n-grams and a few numbers into one layer, one logit a head. No download.

Fitted by L-BFGS on the convex log loss, so a fit is a matter of seconds, has one solution and needs no seed.
A few numbers need no more restraint in a small table than in a large one, thousands of n-grams do: `strength` is
that of the text alone, down to a gate that reads little but numbers.
On the recorded sets here one layer ranks at least as well as forests and boosted trees on the same numbers.
What it reads is in `metis_agent.gates.features`; a deployed gate runs the same functions.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from metis_agent.gates.features import (
    SPACES,
    context_features,
    history_features,
    question_features,
    spaces_of,
    state_features,
)
from metis_agent.gates.reading import BUCKETS
from metis_agent.hdpo.policies import Traits
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["FeaturesPolicy"]

Progress = Callable[[int], None]

DENSE_WEIGHT = 0.3
"""What a number one standard deviation from its mean is as an input; with a prior of 1 on its weight, C = 0.09."""
CLIP = 3.0


@dataclass(frozen=True, kw_only=True)
class FeaturesPolicy:
    """The embedded default."""

    kind: str = "features"
    traits: Traits = Traits(counts_calls=True)
    min_df: int = 2
    """Questions that an n-gram has to be in to count."""
    iterations: int = 100
    """At most, of L-BFGS."""
    progress: Progress = field(default=lambda _: None, compare=False)
    """Called with 1 for each question read."""

    def prepare(self, table: OutcomeTable) -> _Prepared:
        """Hash every question once."""
        reads_history = bool(table.histories or table.observations)
        text, dense = _Rows(), array("d")
        for row, question in enumerate(table.questions):
            spaces = spaces_of(
                question,
                history=table.said(row) if reads_history else None,
                context=table.contexts[row] if table.contexts else None,
                draft=table.drafts[row] if table.drafts else None,
            )
            text.add(spaces)
            dense.extend(question_features(question))
            if table.contexts:
                dense.extend(context_features(question, table.contexts[row]))
            if reads_history:
                dense.extend(history_features(question, table.said(row)))
            if table.observations:
                dense.extend(state_features(question, table.said(row)))
            self.progress(1)
        numbers = np.frombuffer(dense).reshape(len(table), -1)
        draft = np.stack([*table.draft.values()], axis=1) if table.draft else np.zeros((len(table), 0))
        return _Prepared(
            policy=self,
            text=text.counts(),
            numbers=np.hstack([numbers, draft]),
            draft=tuple(table.draft),
            context=bool(table.contexts),
            history=reads_history,
            steps=bool(table.observations),
        )


class _Rows:
    """Counts of all spaces, row by row, grown in little memory."""

    def __init__(self) -> None:
        self._spaces: tuple[str, ...] = ()
        self._indices, self._values, self._lengths = array("i"), array("f"), array("i")

    def add(self, spaces: Mapping[str, Mapping[int, int]]) -> None:
        """One row; all rows have the same spaces."""
        self._spaces = tuple(spaces)
        for counts in spaces.values():
            self._indices.frombytes(np.fromiter(counts.keys(), np.int32, len(counts)).tobytes())
            self._values.frombytes(np.fromiter(counts.values(), np.float32, len(counts)).tobytes())
            self._lengths.append(len(counts))

    def counts(self) -> _Counts:
        lengths = np.frombuffer(self._lengths, np.int32).reshape(-1, max(1, len(self._spaces)))
        values, indices = np.frombuffer(self._values, np.float32), np.frombuffer(self._indices, np.int32)
        damped = 1 + np.log(values)
        ends = np.append(0, np.cumsum(lengths.sum(axis=1)))
        return _Counts(self._spaces, sparse.csr_matrix((damped, indices, ends), (len(lengths), BUCKETS)), lengths)


@dataclass(frozen=True)
class _Counts:
    """N-grams of every row: space after space, as they lie in hashed space."""

    spaces: tuple[str, ...]
    """S names of `SPACES`."""
    damped: Any
    """CSR [N, BUCKETS], 1 + log(count); a bucket stands in a row as often as spaces have it."""
    lengths: NDArray[np.int32]
    """[N, S], the buckets of each."""

    def weighed(self, rows: NDArray[np.int64], idf: NDArray[np.float64]) -> Any:
        """CSR [n, BUCKETS]: what `metis_agent.gates.features.weighed` does to one question, for many."""
        matrix, lengths = self.damped[rows], self.lengths[rows].ravel()
        values = matrix.data * idf[matrix.indices]
        ends = np.append(0, np.cumsum(lengths))
        squares = sparse.csr_matrix((values * values, matrix.indices, ends), (len(lengths), BUCKETS)).sum(axis=1)
        norm = np.sqrt(np.asarray(squares).ravel())
        weights = np.tile([SPACES[name] for name in self.spaces], len(rows))
        values *= np.repeat(weights / np.where(norm > 0, norm, 1.0), lengths)
        matrix = sparse.csr_matrix((values, matrix.indices, matrix.indptr), matrix.shape)
        matrix.eliminate_zeros()
        return matrix


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    policy: FeaturesPolicy
    text: _Counts
    numbers: NDArray[np.float64]
    """[N, D], drafts last, NaN where there was none."""
    draft: tuple[str, ...]
    context: bool
    history: bool
    steps: bool

    def fit(self, rows: NDArray[np.int64], targets: NDArray[np.float64], strength: NDArray[np.float64]) -> _Fitted:
        scaling = _Scaling.of(self, rows)
        x = scaling.apply(self, rows)
        width = x.shape[1]
        # Most buckets are empty: their weights stay 0 and need no place in the optimiser.
        used = np.flatnonzero(np.bincount(x.indices, minlength=width))
        x = x[:, used]
        transposed, text = x.T.tocsr(), used < BUCKETS
        weights = np.zeros((targets.shape[1], width + 1))
        solved: dict[tuple[bytes, float], NDArray[np.float64]] = {}
        for head, (target, c) in enumerate(zip(targets.T, strength, strict=True)):
            prior = np.where(text, 1 / float(c), 1.0)
            # Tools that share a branch, as those of decision points do, share its head.
            same = target.tobytes(), float(c)
            if same not in solved:
                solved[same] = _solve(x, transposed, target, prior, self.policy.iterations)
            solution = solved[same]
            weights[head, used], weights[head, -1] = solution[:-1], solution[-1]
        return _Fitted(prepared=self, scaling=scaling, weights=weights)

    def inputs(self, fitted_on: NDArray[np.int64], rows: NDArray[np.int64]) -> Any:
        """CSR [n, inputs] of `rows`, scaled as `fitted_on` says: for policies that are trained by gradient."""
        x = _Scaling.of(self, fitted_on).apply(self, rows)
        x.sum_duplicates()
        return x


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    """How raw counts and numbers become inputs; all of it learnt from the rows fitted to."""

    idf: NDArray[np.float64]
    log: NDArray[np.bool_]
    """[D]: numbers that are read as their logarithm, being positive with a long tail."""
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    missing: NDArray[np.int64]
    """Numbers that are sometimes missing; each gets an indicator."""

    @classmethod
    def of(cls, prepared: _Prepared, rows: NDArray[np.int64]) -> _Scaling:
        df = np.bincount(prepared.text.damped[rows].indices, minlength=BUCKETS)
        idf = np.where(df >= prepared.policy.min_df, np.log((1 + len(rows)) / (1 + df)) + 1, 0.0)
        numbers = prepared.numbers[rows]
        is_draft = np.arange(numbers.shape[1]) >= numbers.shape[1] - len(prepared.draft)
        gone = np.isnan(numbers)
        lowest = np.where(gone, np.inf, numbers).min(axis=0)
        centred = np.where(gone, 0.0, numbers - _mean(numbers, gone))
        spread = np.sqrt(_mean(centred**2, gone))
        skew = _mean(centred**3, gone) / np.maximum(spread, 1e-12) ** 3
        log = is_draft & (lowest > 0) & (skew > 1)
        numbers = np.where(log, np.log(np.where(log, np.maximum(numbers, 1e-12), 1.0)), numbers)
        mean = _mean(numbers, gone)
        scale = np.sqrt(_mean(np.where(gone, 0.0, numbers - mean) ** 2, gone))
        return cls(
            idf=np.asarray(idf, dtype=np.float32).astype(np.float64),
            log=log,
            mean=mean,
            scale=np.where(scale > 1e-9, scale, 1.0),
            missing=np.flatnonzero(gone.any(axis=0)),
        )

    def apply(self, prepared: _Prepared, rows: NDArray[np.int64]) -> Any:
        """CSR [n, BUCKETS + D + missing]."""
        text = prepared.text.weighed(rows, self.idf)
        numbers = prepared.numbers[rows]
        gone = np.isnan(numbers)
        numbers = np.where(self.log, np.log(np.where(self.log, np.maximum(numbers, 1e-12), 1.0)), numbers)
        scaled = np.clip((np.where(gone, self.mean, numbers) - self.mean) / self.scale, -CLIP, CLIP)
        dense = DENSE_WEIGHT * np.hstack([scaled, gone[:, self.missing]])
        return sparse.hstack([text, sparse.csr_matrix(dense)], format="csr")


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    prepared: _Prepared
    scaling: _Scaling
    weights: NDArray[np.float64]
    """[H, BUCKETS + D + missing + 1], the bias last."""

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        x = self.scaling.apply(self.prepared, rows)
        return np.asarray(x @ self.weights[:, :-1].T + self.weights[:, -1])

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {
            "idf": self.scaling.idf.astype(np.float32),
            "text_weights": self.weights[:, :BUCKETS].astype(np.float32),
            "number_weights": self.weights[:, BUCKETS:-1].astype(np.float32),
            "bias": self.weights[:, -1].astype(np.float32),
            "number_mean": self.scaling.mean.astype(np.float32),
            "number_scale": self.scaling.scale.astype(np.float32),
        }

    def config(self) -> dict[str, Any]:
        return {
            "buckets": BUCKETS,
            "context": self.prepared.context,
            "history": self.prepared.history,
            "steps": self.prepared.steps,
            "context_words": "c" in self.prepared.text.spaces,
            "draft_words": "d" in self.prepared.text.spaces,
            "draft": list(self.prepared.draft),
            "log": np.flatnonzero(self.scaling.log).tolist(),
            "missing": self.scaling.missing.tolist(),
            "number_weight": DENSE_WEIGHT,
            "clip": CLIP,
        }


def _mean(values: NDArray[np.float64], gone: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(np.where(gone, 0.0, values).sum(axis=0) / np.maximum(1, (~gone).sum(axis=0)))


def _solve(
    x: Any, transposed: Any, target: NDArray[np.float64], prior: NDArray[np.float64], iterations: int
) -> NDArray[np.float64]:
    """argmin_w sum_i CE(y_i, sigmoid(x_i w + b)) + sum_j prior_j w_j^2 / 2, over y_i that are known; returns [w, b].

    Solved for v = sqrt(prior) w, in which all inputs are held back alike, so that L-BFGS needs fewer steps.
    """
    root = np.sqrt(prior)
    known = ~np.isnan(target)
    target = np.where(known, target, 0.0)

    def loss(v: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = x @ (v[:-1] / root) + v[-1]
        residual = known * (1 / (1 + np.exp(-z)) - target)
        value = float(np.sum(known * (np.logaddexp(0.0, z) - target * z))) + 0.5 * float(v[:-1] @ v[:-1])
        return value, np.append((transposed @ residual) / root + v[:-1], residual.sum())

    start = np.zeros(x.shape[1] + 1)
    mean = min(max(float(target.sum() / known.sum()), 1e-6), 1 - 1e-6)
    start[-1] = np.log(mean / (1 - mean))
    options = {"maxiter": iterations, "maxcor": 10, "gtol": 1e-4, "ftol": 1e-7}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return np.append(found[:-1] / root, found[-1])
