"""Train a gate on recorded outcomes by HDPO's bounded contrast; and from when on a question is unlike its training.

Where it stands: `outcomes` -> **trainer** -> `export` -> the deployed `PolicyGate`. Two steps:

1. *Pool.* A question has been recorded once or a few times down each branch, which certifies nothing about it.
   So each branch's accuracy p_a(x) is estimated over all questions, cross-fitted: what is estimated for a
   question never saw its outcomes. One strength and one temperature serve all branches: what they have in common
   cancels in a difference only where all are held back alike.
2. *Contrast.* The advantage of action a over direct is A_a(x) = p_a(x) - p_D(x) - beta c_a, *not* z-scored.
   c_a <= 1 is the efficiency reward 1 / (1 + cost) that a right answer by the tool forgoes. The policy that
   maximises E[pi . A] + tau H(pi) over recorded branches has a closed form, pi(a | x) proportional to
   exp(A_a(x) / tau); so it is computed, not searched for. tau is set so that the probability of a tool against
   direct is that of the tool being right where just one of the two is.

Decision points of runs with several calls are learnt from likewise, "the tool" being to go on: what going on gives is
replayed under the rule itself, backwards (optimal stopping by regression; Longstaff and Schwartz, 2001). There the
advantage is divided by the calls that are expected to come, as an index: what a call brings. Its sign, and with it the
bound below, stays; a threshold then spends calls where each brings most.

Direct wins only where p_a - p_D < beta: at most beta of accuracy is lost on any question that the gate can
tell apart. Proof and conditions: docs/accuracy-safe.md.

*Familiarity*: each training question is scored (`metis_agent.gates.reading`) by what the questions of the other folds
have in common with it, so as a new one would be. The weights separate these from other people's questions
(`other_questions.txt`: of all kinds, in several languages); the threshold is the conformal quantile of the training
questions' own scores: of new ones like them at most `share` are left to the model, whatever the others are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

from metis_agent.errors import InputError
from metis_agent.evaluation.gates import followed
from metis_agent.gates.reading import FURTHEST, PLACES, SEEN, hashed_ngrams
from metis_agent.gates.scorers import LEAST_SHARE
from metis_agent.hdpo.policies import FittedPolicy, Policy, PreparedPolicy, Traits, traits_of
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = [
    "SHARE",
    "Calibrated",
    "Contrast",
    "TrainedGate",
    "calibrate",
    "fit_temperature",
    "other_questions",
    "train_gate",
]

STRENGTHS = (0.01, 0.1, 0.3, 1.0, 3.0)
STRONGER = (10.0, 30.0)
"""Tried one by one as long as the strongest so far is the best: what observations brought can tell for certain."""
SWEEPS = 2
"""Of backward induction over decision points: each replays the rule of the one before."""
_SHOWN = 2.0
"""Nats of likelihood by which records have to speak for counting a tool's differences whole beside a draft's."""
MANY = 20_000
"""From here on there is enough of everything: by default two folds, and no search for the strength."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """From estimated accuracies to probabilities that a tool is worth calling."""

    beta: float
    trust: float
    saving: NDArray[np.float64]
    """[A], see `OutcomeTable.saving`."""
    mean_accuracy: NDArray[np.float64]
    """[A], over the training questions."""
    head_temperature: NDArray[np.float64]
    """[A]: logits of the accuracy heads are divided by this."""
    temperature: float
    """tau."""
    step_saving: NDArray[np.float64] | None = None
    """[K] for decision points: what stopping after so many calls saves on average, the same for all tools."""
    most_to_come: float | None = None
    """The most that going on cost in training, where the last head says what share of it is to come."""

    def to_come(self, logits: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """[n]: what going on is expected to cost, from all heads [n, A + 1]; `None` where none says it."""
        if self.most_to_come is None:
            return None
        return self.most_to_come * np.maximum(LEAST_SHARE, 1 / (1 + np.exp(-logits[:, -1])))

    def accuracy(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n, A]: estimated accuracy of each branch, from the heads; those behind the branches' are left out."""
        return np.asarray(1 / (1 + np.exp(-logits[:, : len(self.head_temperature)] / self.head_temperature)))

    def benefit(self, accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n, A - 1]: p_a(x) - p_D(x) for each tool, p_a shrunk to its mean as `trust` says."""
        tools = self.trust * accuracy[:, 1:] + (1 - self.trust) * self.mean_accuracy[1:]
        return np.asarray(tools - accuracy[:, :1])

    def probabilities(
        self,
        accuracy: NDArray[np.float64],
        steps: NDArray[np.int64] | None = None,
        to_come: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """[n, A - 1]: probability of each tool against direct.

        Args:
            accuracy: [n, A].
            steps: [n], the calls before each decision.
            to_come: [n], see `to_come`.
        """
        saving = self.saving[1:]
        if self.step_saving is not None and steps is not None:
            saving = self.step_saving[np.minimum(steps, len(self.step_saving) - 1)][:, None]
        advantage = (self.benefit(accuracy) - self.beta * saving) / (1.0 if to_come is None else to_come[:, None])
        return np.asarray(1 / (1 + np.exp(-np.clip(advantage / self.temperature, -500, 500))))


@dataclass(frozen=True, kw_only=True)
class TrainedGate:
    """A trained gate, before it is written by `export.write_artefact`."""

    kind: str
    actions: tuple[str, ...]
    policy: FittedPolicy
    contrast: Contrast
    strength: NDArray[np.float64]
    """[A], as chosen."""
    accuracy: NDArray[np.float64]
    """[N, A]: cross-fitted estimates for the training questions."""
    keys: tuple[str, ...]
    """Of the training questions, to recognise them again."""
    familiarity: Calibrated | None
    """From when on a question is unlike training; `None` where there are too few questions to tell."""
    steps: NDArray[np.int64]
    """[N], see `OutcomeTable.steps`."""
    all_steps: NDArray[np.int64]
    """The same of the whole table that was given."""
    judged: NDArray[np.int64]
    """[m], the training questions that are like those that the gate will meet: all, or those with a draft."""
    to_come: NDArray[np.float64] | None = None
    """[N], cross-fitted: see `Contrast.to_come`."""

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """[N, A - 1]: cross-fitted probabilities for the training questions."""
        return self.contrast.probabilities(self.accuracy, self.steps, self.to_come)

    def score(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        """Estimated accuracies [n, A] and probabilities [n, A - 1] of rows of the table that was given to training."""
        logits = self.policy.logits(rows)
        accuracy, to_come = self.contrast.accuracy(logits), self.contrast.to_come(logits)
        return accuracy, self.contrast.probabilities(accuracy, self.all_steps[rows], to_come)


def train_gate(
    table: OutcomeTable,
    training: GateTraining | None = None,
    *,
    policy: Policy | None = None,
    prepared: PreparedPolicy | None = None,
    rows: NDArray[np.int64] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> TrainedGate:
    """Train a gate; no model is called.

    Args:
        table: Recorded outcomes.
        training: How.
        policy: What reads the questions; `FeaturesPolicy()` by default.
        prepared: That policy's reading of `table`, where it is at hand.
        rows: [n], train on these only.
        progress: Called with a stage, how much of it is done, and of how much.

    Raises:
        ConfigurationError: `training` sets what the policy does not know.
        InputError: nothing can be learnt from the table, see `OutcomeTable.check_trainable`.
    """
    training = training or GateTraining()
    reader: Policy = policy or FeaturesPolicy()
    chosen = np.arange(len(table)) if rows is None else rows
    part = table if rows is None else table.take(rows)
    part.check_trainable()
    traits = traits_of(reader)
    traits.check(training)
    judged, targets = _judged(part, drafted=training.drafted)
    prepared = prepared or reader.prepare(table)
    many = len(part) >= MANY
    fold = part.folds(training.folds or (2 if many else 5), training.seed)
    strengths = list(training.strengths or ([1.0] if many else STRENGTHS)) if traits.searches_strength else [1.0]
    further = list(STRONGER) if len(strengths) > 1 and not training.strengths else []
    folds, sweeps = int(fold.max()) + 1, SWEEPS if part.runs else 0
    counting = bool(part.runs) and traits.counts_calls and part.cost[:, 1].max() > 0
    rounds, fits = 1 + sweeps + counting, itertools.count(1)

    def told(fitted: FittedPolicy) -> FittedPolicy:
        progress("fit", next(fits), rounds * folds + 1)
        return fitted

    def cross_fit(targets: NDArray[np.float64], strength: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, H]: the logits of heads for `targets`, each by a fit that did not see its fold."""
        found = np.empty(targets.shape)
        for held_out in range(folds):
            kept = fold != held_out
            found[~kept] = told(prepared.fit(chosen[kept], targets[kept], strength)).logits(chosen[~kept])
        return found

    def by_strength(tried: Sequence[float]) -> list[NDArray[np.float64]]:
        """[N, A] for each; in one fit, so that each fold is read once."""
        found = cross_fit(np.tile(targets, len(tried)), np.repeat(tried, len(part.actions)))
        return np.split(found, len(tried), axis=1)

    def loss_of(logits: NDArray[np.float64]) -> float:
        """Of a strength, over all heads, at its own temperature."""
        return fit_temperature(logits[judged], part.correct[judged])[1]

    logits = by_strength(strengths)
    losses = [loss_of(it) for it in logits]
    while further and np.argmin(losses) == len(strengths) - 1:
        rounds, strengths = rounds + 1, [*strengths, further.pop(0)]
        logits += by_strength(strengths[-1:])
        losses.append(loss_of(logits[-1]))
    best = int(np.argmin(losses))
    cross_fitted, strength = logits[best], np.repeat(strengths[best], len(part.actions))
    recorded = part
    contrast = _contrast(part.take(judged), cross_fitted[judged], training, traits, part if part.runs else None)
    for _ in range(sweeps):
        stop = contrast.probabilities(contrast.accuracy(cross_fitted), part.steps).max(axis=1) <= 0.5
        part, targets = followed(recorded, stop), targets.copy()
        targets[:, 1:] = part.correct[:, 1:]
        cross_fitted[:, 1:] = cross_fit(targets[:, 1:2], strength[1:2])
        contrast = _contrast(part, cross_fitted, training, traits, recorded)
    if counting:
        most = float(part.cost[:, 1].max())
        share = part.cost[:, 1:2] / most
        targets, cross_fitted = np.hstack([targets, share]), np.hstack([cross_fitted, cross_fit(share, strength[1:2])])
        contrast = _contrast(part, cross_fitted, training, traits, recorded, most)
    # The head of the calls to come fits as closely as that of going on.
    final = told(prepared.fit(chosen, targets, np.append(strength, strength[1])[: targets.shape[1]]))
    return TrainedGate(
        kind=reader.kind,
        actions=part.actions,
        policy=final,
        contrast=contrast,
        strength=strength,
        accuracy=contrast.accuracy(cross_fitted),
        keys=part.keys,
        familiarity=calibrate(part.questions, fold),
        steps=part.steps,
        all_steps=table.steps,
        judged=judged,
        to_come=contrast.to_come(cross_fitted),
    )


def _judged(table: OutcomeTable, *, drafted: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows [m] that are like those that the gate will meet, and what each row teaches each head [n, A]."""
    if not drafted or table.runs:
        return np.arange(len(table)), table.correct
    columns = [~np.isnan(column) for column in table.draft.values()]
    has = np.logical_and.reduce(columns) if columns else np.zeros(len(table), dtype=bool)
    rows = np.flatnonzero(has)
    try:
        table.take(rows).check_trainable()
    except InputError as error:
        raise InputError(f"Of the {len(rows)} questions with a whole draft: {error}") from error
    return rows, np.where(has[:, None] | (np.arange(len(table.actions)) > 0), table.correct, np.nan)


def _step_saving(recorded: OutcomeTable, cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """[K]: mean of r(spent) - r(spent + `cost`) over the states after so many calls; `cost` [N] is of going on."""
    spent = np.zeros(len(recorded))
    for row in range(1, len(recorded)):
        if recorded.runs[row] == recorded.runs[row - 1]:
            spent[row] = spent[row - 1] + recorded.cost[row - 1, 1] - recorded.cost[row, 1]
    steps = recorded.steps
    total = np.bincount(steps, 1 / (1 + spent) - 1 / (1 + spent + cost))
    return np.asarray(total / np.maximum(1, np.bincount(steps)))


def fit_temperature(logits: NDArray[np.float64], targets: NDArray[np.float64]) -> tuple[float, float]:
    """The T in [0.05, 20] that minimises the mean log loss of sigmoid(logits / T), and that loss; of arrays alike."""

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((np.logaddexp(0, scaled) - targets * scaled).mean())

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(best.x)), float(best.fun)


def _contrast(
    table: OutcomeTable,
    logits: NDArray[np.float64],
    training: GateTraining,
    traits: Traits = Traits(),
    recorded: OutcomeTable | None = None,
    most_to_come: float | None = None,
) -> Contrast:
    always_drafted = traits.reads_drafts and any(not np.isnan(column).any() for column in table.draft.values())
    # Of several tools the likelihood is also of which of them is right, and trust is not about that.
    tried = (0.5, 1.0) if len(table.actions) == 2 else (0.5,)
    trusts = (training.trust,) if training.trust is not None else tried if always_drafted else (1.0,)
    temperature, _ = fit_temperature(logits[:, : len(table.actions)], table.correct)
    contrast = Contrast(
        beta=training.beta,
        trust=trusts[0],
        saving=table.saving,
        mean_accuracy=table.correct.mean(axis=0),
        head_temperature=np.full(len(table.actions), temperature),
        temperature=1.0,
        step_saving=_step_saving(recorded, table.cost[:, 1]) if recorded is not None else None,
        most_to_come=most_to_come,
    )
    to_come, accuracy = contrast.to_come(logits), contrast.accuracy(logits)
    difference = table.correct[:, 1:] - table.correct[:, :1]
    losses: list[tuple[float, Contrast]] = []
    for trust in trusts:
        benefit = (it := replace(contrast, trust=trust)).benefit(accuracy)
        tau, loss = _decision_temperature(benefit / (1.0 if to_come is None else to_come[:, None]), difference)
        losses.append((loss + (_SHOWN if losses else 0.0), replace(it, temperature=tau)))
    return min(losses, key=lambda it: it[0])[1]


def _decision_temperature(benefit: NDArray[np.float64], difference: NDArray[np.float64]) -> tuple[float, float]:
    """Tau by maximum likelihood of which branch is right, where just one is, and the log loss; arrays [n, A - 1]."""
    win, loss, z = np.maximum(difference, 0).ravel(), np.maximum(-difference, 0).ravel(), benefit.ravel()

    def nll(log_temperature: float) -> float:
        scaled = z / np.exp(log_temperature)
        return float(np.sum(win * np.logaddexp(0, -scaled) + loss * np.logaddexp(0, scaled)))

    best = minimize_scalar(nll, bounds=(np.log(0.02), np.log(5)), method="bounded")
    return float(np.exp(best.x)), float(best.fun)


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


def calibrate(questions: Sequence[str], fold: NDArray[np.int64]) -> Calibrated | None:
    """The score's weights and threshold.

    Args:
        questions: [N], of training.
        fold: [N], as `OutcomeTable.folds` gives them: what belongs together is in one.

    Returns:
        `None` where there are too few questions for a threshold that keeps the share.
    """
    rank = math.ceil((len(questions) + 1) * (1 - SHARE))
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
    strange = np.column_stack([strange, _surprise(np.log1p([len(text) for text in others]), mean, deviation)])
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
            "share": SHARE,
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
    return np.asarray(minimize(loss, np.zeros(4), jac=True, method="L-BFGS-B", bounds=bounds).x)
