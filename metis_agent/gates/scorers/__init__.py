"""What a scorer is: one kind of trained gate at run time, from a question to one logit a branch.

Where it stands: `metis_agent.gates.policy.PolicyGate` -> **scorer**. The gate turns the logits into
probabilities in the same way for every kind. A kind of your own is a policy that is trained
(`metis_agent.hdpo.policies.Policy`) and a scorer of the same kind: call `register_scorer` where your package is
imported, or name it under the entry point group `metis_agent.scorers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

from metis_agent.errors import CheckpointError, ConfigurationError
from metis_agent.gates.artefact import Artefact
from metis_agent.types import ToolSpec

__all__ = [
    "ENTRY_POINTS",
    "LEAST_SHARE",
    "Asked",
    "Scorer",
    "background",
    "decision_probabilities",
    "load_scorer",
    "register_scorer",
]

LEAST_SHARE = 0.01
"""Of the most that was to come in training: going on is never taken for cheaper."""

ENTRY_POINTS = "metis_agent.scorers"
"""Group of entry points; each is named by its kind and gives what `register_scorer` takes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that a scorer may look at."""

    question: str
    context: str = ""
    history: str = ""
    """The conversation before the question, see `metis_agent.gates.reading.conversation_before`."""
    draft: Mapping[str, float] | None = None
    draft_text: str = ""
    images: tuple[Any, ...] = ()
    """PIL images, or base64 strings of their files."""
    tools: tuple[ToolSpec, ...] = ()
    """To ask about; empty for those that the gate was trained for."""

    @property
    def background(self) -> str:
        """All that a model reads beside the question: the conversation, then what came with the question."""
        return background(self.history, self.context)


def background(history: str, context: str) -> str:
    """Conversation and context as one text; empty where there is neither."""
    return "\n\n".join(part for part in (history, context) if part)


class Scorer(Protocol):
    """One kind of policy at run time; safe to call from many threads."""

    @property
    def instant(self) -> bool:
        """True where a call is too quick to be worth a thread."""

    @property
    def open_tools(self) -> bool:
        """True where a tool is known by its description, so that a new one can be asked about."""

    @property
    def draft_columns(self) -> tuple[str, ...]:
        """What is read of a draft; empty where none is."""

    def logits(self, asked: Asked) -> Sequence[float]:
        """One logit a head: direct, then the tools; last the share of the most cost to come, where it tells that.

        Raises:
            GateError: it can't be answered, see the message.
        """


ScorerLoader = Callable[[Artefact, str | None], Scorer]
"""Makes the scorer of an artefact, on a device; such as the scorer's class."""

# By name, so that a gate of one kind is served without what the others need.
_OWN = {
    "features": "metis_agent.gates.features:FeaturesScorer",
    "encoder": "metis_agent.gates.scorers.pretrained:EncoderScorer",
    "decision_lm": "metis_agent.gates.scorers.decision_lm:DecisionLMScorer",
}
_REGISTERED: dict[str, ScorerLoader] = {}


def register_scorer(kind: str, load: ScorerLoader) -> None:
    """Serve gates of another kind.

    Args:
        kind: As `gate.json` calls it; that of the policy that was trained.
        load: Called with the artefact and with the device that `PolicyGate` was given, or `None`.

    Raises:
        ConfigurationError: the kind is one of Metis's own, or registered for something else.
    """
    if kind in _OWN or _REGISTERED.get(kind, load) is not load:
        raise ConfigurationError(f"There is a scorer of kind {kind!r} already; give yours another name.")
    _REGISTERED[kind] = load


def load_scorer(artefact: Artefact, device: str | None = None) -> Scorer:
    """The scorer of an artefact.

    Raises:
        CheckpointError: nothing here serves its kind, or a part of it is missing.
    """
    kind = str(artefact.description["kind"])
    load = _REGISTERED.get(kind)
    if load is None and kind in _OWN:
        module, _, name = _OWN[kind].partition(":")
        load = getattr(import_module(module), name)
    if load is None:
        load = next((point.load() for point in entry_points(group=ENTRY_POINTS, name=kind)), None)
    if load is None:
        raise CheckpointError(
            f"The gate is of kind {kind!r}; served are {sorted({*_OWN, *_REGISTERED})!r}. Import the package that "
            "registers this kind, or upgrade langgraph-metis."
        )
    return load(artefact, device)


def decision_probabilities(
    decision: Mapping[str, object], logits: Sequence[float], step: int = 0
) -> tuple[list[float], list[float]]:
    """(accuracy of each branch, probability of each tool) from the heads; the same as `hdpo`'s `Contrast`.

    Args:
        decision: That part of `gate.json`.
        logits: One a head.
        step: Calls so far, for a gate that decides at every step.
    """
    temperatures, saving, means = (_floats(decision[name]) for name in ("head_temperature", "saving", "mean_accuracy"))
    to_come = 1.0
    if most := float(str(decision.get("most_to_come") or 0)):
        *logits, last = logits
        to_come = most * max(LEAST_SHARE, _sigmoid(last))
    if by_step := _floats(decision.get("step_saving")):
        saving = [0.0, *[by_step[min(step, len(by_step) - 1)]] * (len(saving) - 1)]
    trust, beta, tau = (float(str(decision[name])) for name in ("trust", "beta", "temperature"))
    accuracy = [_sigmoid(z / t) for z, t in zip(logits, temperatures, strict=True)]
    tools = [
        _sigmoid((trust * p + (1 - trust) * mean - accuracy[0] - beta * c) / to_come / tau)
        for p, mean, c in zip(accuracy[1:], means[1:], saving[1:], strict=True)
    ]
    return accuracy, tools


def _floats(values: object) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -500 else 0.0
