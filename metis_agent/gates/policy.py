"""`PolicyGate`: a gate that was trained on recorded outcomes, loaded from its artefact folder.

Where it stands: `metis train gate` writes the folder, this serves it: plain Python, well under a millisecond a
decision, no torch and no numpy. A decision is about the question of the turn. While the turn goes on it stays as
it was, so a tool branch may call its tool again, as it could when its outcomes were recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from metis_agent.errors import CheckpointError, ConfigurationError, GateError
from metis_agent.gates.artefact import Artefact, load_artefact
from metis_agent.gates.base import Gate
from metis_agent.gates.features import (
    BUCKETS,
    context_features,
    draft_log_prob_features,
    draft_text_features,
    question_features,
    weighed,
)
from metis_agent.turns import is_first_step, turn_of
from metis_agent.types import Draft, GateDecision, GateRequest, ToolSpec

__all__ = ["FeaturesScorer", "PolicyGate", "Scorer", "decision_probabilities", "read_request"]

ReadRequest = Callable[[GateRequest], tuple[str, str]]
ReadDraft = Callable[[Draft], Mapping[str, float]]


class Scorer(Protocol):
    """One kind of policy at run time."""

    def logits(self, question: str, context: str, draft: Mapping[str, float] | None) -> Sequence[float]:
        """One logit a head: direct, then the tools."""


class FeaturesScorer:
    """The `features` policy: a sparse dot product.

    Raises:
        CheckpointError: the tensors don't fit together.
    """

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

    def logits(self, question: str, context: str, draft: Mapping[str, float] | None) -> list[float]:
        """See `Scorer`."""
        vector = weighed(question, self._idf)
        numbers = self._inputs(question, context, draft)
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


def decision_probabilities(decision: Mapping[str, object], logits: Sequence[float]) -> tuple[list[float], list[float]]:
    """(accuracy of each branch, probability of each tool) from the heads; the same as `hdpo`'s `Contrast`."""
    temperatures, saving, means = (_floats(decision[name]) for name in ("head_temperature", "saving", "mean_accuracy"))
    trust, beta, tau = (float(str(decision[name])) for name in ("trust", "beta", "temperature"))
    accuracy = [_sigmoid(z / t) for z, t in zip(logits, temperatures, strict=True)]
    tools = [
        _sigmoid((trust * p + (1 - trust) * mean - accuracy[0] - beta * c) / tau)
        for p, mean, c in zip(accuracy[1:], means[1:], saving[1:], strict=True)
    ]
    return accuracy, tools


def read_request(request: GateRequest) -> tuple[str, str]:
    """(question, context) of the turn: its last paragraph or text block, and what stands before it.

    So a table or a passage goes first and the question last, with a blank line between.
    """
    turn = turn_of(request.messages)
    text = str(turn[0].text).strip() if turn else ""
    content = turn[0].content if turn else ""
    if isinstance(content, list):
        blocks = [block if isinstance(block, str) else str(block.get("text", "")) for block in content]
        if len(blocks := [block.strip() for block in blocks if block.strip()]) > 1:
            return blocks[-1], "\n".join(blocks[:-1])
    context, _, question = text.rpartition("\n\n")
    return question.strip(), context.strip()


class PolicyGate(Gate):
    """A trained gate.

    Args:
        folder: What `metis train gate --out` wrote.
        threshold: By default the artefact's own, as `metis calibrate` chose it.
        required: Where a tool is allowed at the first step of a turn, one has to be called: that is the branch
            whose outcomes were recorded, and what the artefact's figures hold for.
        read_request: (question, context) from a request; the context is used by a gate trained with one. A gate
            trained without reads the whole text of the question by default.
        read_draft: Numbers from a draft, by the names of the training columns, added to those that its text and
            log-probabilities give.

    Raises:
        CheckpointError: the folder is no artefact, or was changed.
        SchemaVersionError: a newer Metis wrote it.
        ConfigurationError: the threshold is out of its range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threshold: float | None = None,
        required: bool = True,
        read_request: ReadRequest | None = None,
        read_draft: ReadDraft | None = None,
        name: str = "",
    ) -> None:
        self.artefact = load_artefact(folder)
        description = self.artefact.description
        super().__init__(
            threshold=description["threshold"]["value"] if threshold is None else threshold,
            required=required,
            name=name,
            version=description["version"],
        )
        if description["kind"] not in _SCORERS:
            raise CheckpointError(
                f"The gate is of kind {description['kind']!r}; this Metis serves {sorted(_SCORERS)!r}. Upgrade it."
            )
        scorer = _SCORERS[description["kind"]](self.artefact)
        self._scorer: Scorer = scorer
        self.wants_draft = bool(scorer.draft_columns)
        """True where the gate was trained on a direct draft, so that requests should bring one."""
        self._read_request = read_request or (_read if description["policy"].get("context") else _whole_text)
        self._read_draft = read_draft

    def check_tools(self, tools: Sequence[ToolSpec]) -> None:
        """Refuse an agent with a tool that the gate knows nothing of, or without one that it does.

        Raises:
            ConfigurationError: the tools are not those that the gate was trained for.
        """
        names = {tool.name for tool in tools}
        if names != set(self.artefact.tools):
            raise ConfigurationError(
                f"The agent has the tools {sorted(names)!r}, and the gate in {str(self.artefact.folder)!r} was trained "
                f"for {sorted(self.artefact.tools)!r}: the sets must be the same. Train a gate for these tools."
            )

    def score(
        self, question: str, context: str = "", draft: Mapping[str, float] | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(estimated accuracy of each branch, probability of each tool), both by name.

        Raises:
            GateError: a number of the draft is missing that never was in training.
        """
        logits = self._scorer.logits(question, context, draft)
        accuracy, tools = decision_probabilities(self.artefact.description["decision"], logits)
        names = self.artefact.tools
        return dict(zip(("direct", *names), accuracy, strict=True)), dict(zip(names, tools, strict=True))

    def estimate(self, request: GateRequest) -> dict[str, float]:
        """Probability of each tool; see `metis_agent.gates.base`.

        Raises:
            ConfigurationError: the request has a tool that the gate was not trained for.
            GateError: see `score`.
        """
        if unknown := {tool.name for tool in request.tools} - set(self.artefact.tools):
            raise ConfigurationError(
                f"The request has the tools {sorted(unknown)!r}, and the gate in {str(self.artefact.folder)!r} was "
                f"trained for {sorted(self.artefact.tools)!r}. Train a gate for these tools."
            )
        question, context = self._read_request(request)
        return self.score(question, context, self._draft_numbers(question, request.draft))[1]

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide; of several tools over the threshold the most probable one is allowed."""
        decision = super().decide(request)
        probabilities = decision.probabilities or {}
        best = max(decision.allowed, key=lambda name: probabilities[name], default=None)
        first = is_first_step(turn_of(request.messages))
        return replace(decision, allowed=() if best is None else (best,), required=decision.required and first)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide`: too quick to be worth a thread."""
        return self.decide(request)

    def _overrides(self, method: str) -> bool:
        # `adecide` here calls `decide`, not the other way round.
        return method != "adecide" and super()._overrides(method)

    def _draft_numbers(self, question: str, draft: Draft | None) -> dict[str, float] | None:
        if draft is None:
            return None
        extra = self._read_draft(draft) if self._read_draft else {}
        return {**draft_text_features(question, draft.text), **draft_log_prob_features(draft.log_probs), **extra}


_read = read_request
_SCORERS = {"features": FeaturesScorer}


def _whole_text(request: GateRequest) -> tuple[str, str]:
    turn = turn_of(request.messages)
    return (str(turn[0].text), "") if turn else ("", "")


def _floats(values: object) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -500 else 0.0
