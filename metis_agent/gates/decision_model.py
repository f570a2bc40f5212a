"""A gate as a LangChain decision model: the same two questions that `DecisionModelGate` asks, answered by a gate.

So a trained gate stands wherever LangChain takes a `BaseDecisionModel`: with callbacks, traces, batches and chains.
A gate knows when a tool is needed and nothing else, so any other question is refused rather than answered wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, convert_to_messages
from langchain_core.tools import BaseTool
from pydantic import Field

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.gates.base import Gate, SupportsDecide, as_gate
from metis_agent.gates.decision import ANSWERABLE, langchain_decisions
from metis_agent.types import GateDecision, GateRequest, ToolSpec

__all__ = ["TOOL_NEEDED", "as_decision_model"]

TOOL_NEEDED = "Is a tool needed to answer this rightly?"
"""The noul question the other way round; understood too."""

NO_TOOL = "none"
"""A label that a choice may have beside tools: answer without any."""


def as_decision_model(
    gate: Gate | SupportsDecide, tools: Sequence[ToolSpec | BaseTool], *, model: str = "metis-gate"
) -> Any:
    """The gate as a `langchain_core.decisions.BaseDecisionModel`.

    It answers a `Noul` whose instructions are `ANSWERABLE` or `TOOL_NEEDED`, and a `Choice` whose labels are names
    of tools and perhaps "none". With p the largest of the gate's tool probabilities, "none" has 1 - p, and the tools
    share p (or without "none", everything) in proportion to theirs.

    Args:
        gate: a gate that gives probabilities and needs no draft.
        tools: the tools that it decides on.
        model: the name in responses and traces.

    Raises:
        MissingDependencyError: the installed langchain-core has no decision models.
        ConfigurationError: there are no tools, or the gate can't decide on them, or needs a draft.
    """
    model_class = _model_class()
    gate = as_gate(gate)
    specs = tuple(
        tool if isinstance(tool, ToolSpec) else ToolSpec(name=tool.name, description=tool.description) for tool in tools
    )
    if not specs:
        raise ConfigurationError("tools is empty; a gate decides on tools: pass at least one.")
    if gate.wants_draft:
        raise ConfigurationError(
            f"The gate {gate.name!r} reads a direct draft, and a decision model is given none. "
            "Use it in an agent, or train one without drafts."
        )
    gate.check_tools(specs)
    return model_class(model=model, gate=gate, tools=specs)


@cache
def _model_class() -> Any:
    decisions = langchain_decisions()

    base: Any = decisions.BaseDecisionModel

    class GateDecisionModel(base):  # type: ignore[misc]
        """A gate that answers LangChain's typed questions."""

        gate: Any = Field(exclude=True, repr=False)
        tools: tuple[ToolSpec, ...] = Field(exclude=True, repr=False)

        @property
        def _provider(self) -> str:
            return "metis"

        def _classify(self, state: Any, questions: dict[str, Any]) -> Any:
            asked = {id_: question.model_dump() for id_, question in questions.items()}
            check_questions(asked, self.tools)
            decision = self.gate.decide(GateRequest(messages=messages_of(state), tools=self.tools))
            return self._response(asked, decision)

        async def _aclassify(self, state: Any, questions: dict[str, Any]) -> Any:
            asked = {id_: question.model_dump() for id_, question in questions.items()}
            check_questions(asked, self.tools)
            decision = await self.gate.adecide(GateRequest(messages=messages_of(state), tools=self.tools))
            return self._response(asked, decision)

        def _response(self, asked: Mapping[str, Mapping[str, Any]], decision: GateDecision) -> Any:
            answers = {id_: answer_of(question, decision) for id_, question in asked.items()}
            return decisions.ClassifierResponse(model=self.model, answers=answers)

    return GateDecisionModel


def check_questions(questions: Mapping[str, Mapping[str, Any]], tools: Sequence[ToolSpec]) -> None:
    """Refuse what a gate can't answer, before it is asked.

    Raises:
        InputError: another question.
    """
    labels = {NO_TOOL, *(tool.name for tool in tools)}
    for id_, question in questions.items():
        if question["type"] == "noul" and question["instructions"] in (ANSWERABLE, TOOL_NEEDED):
            continue
        if question["type"] == "choice" and labels.issuperset(question["criteria"]):
            continue
        raise InputError(
            f"Question {id_!r} is {dict(question)!r}; a gate answers a noul whose instructions are {ANSWERABLE!r} or "
            f"{TOOL_NEEDED!r}, and a choice among {sorted(labels)!r}."
        )


def messages_of(state: Any) -> list[BaseMessage]:
    """A conversation from a decision model's state: text, messages in any of LangChain's forms, or JSON."""
    if isinstance(state, str):
        return [HumanMessage(state)]
    if isinstance(state, BaseMessage):
        return [state]
    messages = state.get("messages") if isinstance(state, Mapping) else state
    if isinstance(messages, list | tuple) and messages and all(map(_is_message, messages)):
        return list(convert_to_messages(messages))
    return [HumanMessage(json.dumps(state, ensure_ascii=False, default=str))]


def answer_of(question: Mapping[str, Any], decision: GateDecision) -> dict[str, Any]:
    """One answer, in the standard's words.

    Raises:
        InputError: the decision has no probabilities.
    """
    estimates = decision.probabilities
    if not estimates:
        raise InputError(
            f"The gate {decision.gate!r} decided without probabilities ({decision.reason or 'it has no estimate'}); "
            "only a gate that estimates can answer as a decision model."
        )
    p = max(estimates.values())
    if question["type"] == "noul":
        return {"type": "noul", "noul": 1 - p if question["instructions"] == ANSWERABLE else p}
    labels = list(question["criteria"])
    named = {label: estimates.get(label, 0.0) for label in labels if label != NO_TOOL}
    total, share = sum(named.values()), p if NO_TOOL in labels else 1.0
    chances = {label: share * (value / total if total else 1 / len(named)) for label, value in named.items()}
    if NO_TOOL in labels:
        chances[NO_TOOL] = 1 - p if named else 1.0
    best, n = max(chances, key=lambda label: chances[label]), len(labels)
    # As transformers has it: 0 for a guess, 1 for a certainty.
    confidence = 1.0 if n == 1 else max(0.0, min(1.0, (chances[best] - 1 / n) / (1 - 1 / n)))
    return {"type": "choice", "choice": best, "probabilities": chances, "confidence": confidence}


def _is_message(candidate: Any) -> bool:
    if isinstance(candidate, BaseMessage):
        return True
    return isinstance(candidate, Mapping) and "content" in candidate and bool({"role", "type"} & set(candidate))
