"""Is a question like those that a gate was trained on? Where it isn't, the gate knows nothing of it.

Where it stands: training counts which n-grams it has seen and calibrates a score on questions that it held out, and on
other people's (`metis_agent.hdpo.familiarity`); `PolicyGate` leaves a question above the threshold to the model. The
text alone is read, whatever the policy reads: with w and s the shares of the question's word and skeleton n-grams that
no training question had, and l how far its length is from theirs, in standard deviations, the score is

    sigmoid(b0 + b1 w + b2 s + b3 min(l, 6)),    b1, b2, b3 >= 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metis_agent.errors import CheckpointError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.features import hashed_ngrams

__all__ = ["PLACES", "SEEN", "UNFAMILIAR", "Familiarity", "load_familiarity", "strangeness"]

UNFAMILIAR = "unlike the gate's training"
"""How the reason of a decision begins that was left to the model."""
SEEN = "seen_ngrams"
"""Name of the tensor: one bit for each place of the hashed space, in words of 64."""
PLACES = 2**20
FURTHEST = 6.0
"""Standard deviations of length beyond which a question is not stranger still."""


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """What a gate has seen, and from when on a question is unlike it."""

    seen: Sequence[int]
    """[PLACES / 64]"""
    weights: tuple[float, float, float, float]
    """b0 to b3."""
    length: tuple[float, float]
    """Mean and standard deviation of log(1 + characters)."""
    threshold: float

    def score(self, question: str) -> float:
        """How unlike training a question is, in [0, 1]."""
        words, skeleton = map(self._unseen, hashed_ngrams(question, PLACES))
        return strangeness(self.weights, words, skeleton, length_surprise(question, self.length))

    def _unseen(self, counts: Mapping[int, int]) -> float:
        new = sum(not self.seen[place >> 6] >> (place & 63) & 1 for place in counts)
        return new / len(counts) if counts else 1.0


def strangeness(weights: Sequence[float], words: float, skeleton: float, length: float) -> float:
    """The score of a question from what is new in it."""
    z = weights[0] + weights[1] * words + weights[2] * skeleton + weights[3] * length
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, z))))


def length_surprise(question: str, length: tuple[float, float]) -> float:
    """Standard deviations between the question's length and the usual one, at most `FURTHEST`."""
    return min(FURTHEST, abs(math.log1p(len(question)) - length[0]) / length[1])


def load_familiarity(artefact: Artefact) -> Familiarity | None:
    """That of a gate; `None` where it was trained without, by an earlier version or on too few questions.

    Raises:
        CheckpointError: a part of it is missing or no finite number.
    """
    told: Any = artefact.description.get("familiarity")
    if told is None:
        return None
    try:
        found = Familiarity(
            seen=artefact.tensors[SEEN].values,
            weights=tuple(float(weight) for weight in told["weights"]),  # type: ignore[arg-type]
            length=(float(told["length"]["mean"]), float(told["length"]["deviation"])),
            threshold=float(told["threshold"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error
    numbers = (*found.weights, *found.length, found.threshold)
    whole = len(found.seen) == PLACES // 64 and artefact.tensors[SEEN].values.typecode == "Q" and len(numbers) == 7
    if not (whole and all(map(math.isfinite, numbers)) and found.length[1] > 0):
        raise CheckpointError(
            f"{str(artefact.folder)!r} has a familiarity that fits no gate: {told!r}; export it again."
        )
    return found
