"""The `features` policy at run time: plain Python, well under a millisecond, no torch and no numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from metis_agent.errors import CheckpointError, GateError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.features import AGREEMENT_FEATURES, BUCKETS, context_features, question_features, weighed
from metis_agent.gates.scorers.base import Asked

__all__ = ["FeaturesScorer"]


class FeaturesScorer:
    """The `features` policy: a sparse dot product.

    Raises:
        CheckpointError: the tensors don't fit together.
    """

    instant = True
    open_tools = False

    def __init__(self, artefact: Artefact) -> None:
        try:
            policy, tensors = artefact.description["policy"], artefact.tensors
            self._context: bool = policy["context"]
            self._draft: tuple[str, ...] = tuple(policy["draft"])
            self._log = frozenset(policy["log"])
            self._missing: list[int] = policy["missing"]
            self._weight, self._clip = float(policy["number_weight"]), float(policy["clip"])
            self._idf = tensors["idf"].values
            self._mean, self._scale = tensors["number_mean"].values, tensors["number_scale"].values
            self._bias = tensors["bias"].values
            heads = range(len(artefact.tools) + 1)
            self._text = [tensors["text_weights"].row(head) for head in heads]
            self._numbers = [tensors["number_weights"].row(head) for head in heads]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error
        width = len(self._mean) + len(self._missing)
        sizes = {*map(len, self._text), policy["buckets"], len(self._idf)}
        if sizes != {BUCKETS} or {*map(len, self._numbers)} != {width} or len(self._bias) != len(heads):
            raise CheckpointError(
                f"{str(artefact.folder)!r} has tensors of sizes that don't fit its {len(heads)} heads, {width} "
                f"numbers and {BUCKETS} buckets; train the gate again with this version."
            )

    @property
    def draft_columns(self) -> tuple[str, ...]:
        """What is read of a draft; empty where none is."""
        return self._draft

    def logits(self, asked: Asked) -> list[float]:
        """See `metis_agent.gates.scorers.base.Scorer`."""
        vector = weighed(asked.question, self._idf)
        numbers = self._inputs(asked.question, asked.context, asked.draft)
        return [
            bias
            + sum([text[bucket] * value for bucket, value in vector])
            + sum([weight * value for weight, value in zip(weights, numbers, strict=True)])
            for bias, text, weights in zip(self._bias, self._text, self._numbers, strict=True)
        ]

    def _inputs(self, question: str, context: str, draft: Mapping[str, float] | None) -> list[float]:
        raw = question_features(question)
        if self._context:
            raw += context_features(question, context)
        first_draft = len(raw)
        raw += [(draft or {}).get(name, math.nan) for name in self._draft]
        gone = {index for index, value in enumerate(raw) if math.isnan(value)}
        if unforeseen := gone - set(self._missing):
            names = [self._draft[index - first_draft] for index in sorted(unforeseen)]
            if not {*names} - {*AGREEMENT_FEATURES}:
                raise GateError(
                    f"The gate was trained on {names!r}, how far two direct attempts agree, and the request brings "
                    "one. Give PolicyGate a `read_draft` that makes a second one and returns "
                    "`metis_agent.gates.features.agreement(one, other)`, or train without the column 'draft_answer'."
                )
            raise GateError(
                f"The gate was trained on {names!r} of a direct draft, and the request has no such numbers. Give the "
                "request a draft with log-probabilities, or PolicyGate a `read_draft` that computes them."
            )
        values = []
        for index, value in enumerate(raw):
            if index in gone:
                values.append(0.0)
                continue
            if index in self._log:
                value = math.log(max(value, 1e-12))
            scaled = (value - self._mean[index]) / self._scale[index]
            values.append(self._weight * min(self._clip, max(-self._clip, scaled)))
        return values + [self._weight * (index in gone) for index in self._missing]
