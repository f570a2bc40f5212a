"""`DecisionModelGate`: any decision model as a gate, trained or not.

Two levels. First a noul question, "can this be answered rightly without any tool?"; only where the answer is no
surely enough, and there are several tools, a choice among them by their descriptions. Decided anew at each step of
a turn, with the tools' results in sight. Where the decision model was not trained for this, choose the threshold on
questions of your own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from metis_agent.errors import GateError
from metis_agent.gates.base import Gate, allows
from metis_agent.gates.systemone import Answers, Questions, asker_of
from metis_agent.turns import is_first_step, turn_of
from metis_agent.types import GateDecision, GateRequest, ToolSpec

__all__ = ["ANSWERABLE", "WHICH_TOOL", "DecisionModelGate", "conversation"]

ANSWERABLE = "Can this be answered rightly without any tool?"
"""The noul question of the first level."""

WHICH_TOOL = "Which tool is needed to answer this rightly?"
"""The choice of the second level."""

_CRITERIA = {
    "true": "The right answer is known, or stands in what is given.",
    "false": "The right answer has to be looked up, computed or observed with a tool.",
}
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}
_Asking = Generator[Questions, Answers, GateDecision]


def conversation(request: GateRequest) -> str | list[dict[str, str]]:
    """The state that a decision model is asked about: the question's text, or the messages where there are more."""
    if len(request.messages) == 1:
        return str(request.messages[0].text)
    return [
        {"role": _ROLES.get(message.type, message.type), "content": str(message.text)} for message in request.messages
    ]


class DecisionModelGate(Gate):
    """Asks a decision model.

    With p = 1 - P("can be answered without a tool"), each tool's probability is p times how likely it is the one
    that is needed, relative to the likeliest; so the likeliest has p, and is the one that is allowed where p is
    above the threshold. Where the second question was not asked, each has p.

    Args:
        model: a LangChain `BaseDecisionModel` (langchain-core 1.8), or another Runnable that takes its requests; a
            transformers `pipeline("decision")`, or another callable that takes its requests; or the URL of a server
            that answers `POST /v1/systemone`, such as `transformers serve`.
        threshold: as in `Gate`.
        required: where a tool is allowed at the first step of a turn, it has to be called.
        read_state: what the model is asked about; by default the text of the conversation (see `conversation`).
        timeout: seconds that a server may take.
        model_name: the model's name, for a server that holds several.
        headers: for a server, such as `{"Authorization": "Bearer ..."}`.
        name: as in `Gate`.

    Raises:
        ConfigurationError: the model is none of these, or the threshold is out of range.
        MissingDependencyError: a URL is given, and httpx is not installed.
    """

    def __init__(
        self,
        model: object,
        *,
        threshold: float = 0.5,
        required: bool = False,
        read_state: Callable[[GateRequest], Any] = conversation,
        timeout: float = 10.0,
        model_name: str | None = None,
        headers: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        super().__init__(threshold=threshold, required=required, name=name)
        self._asker = asker_of(model, timeout=timeout, model_name=model_name, headers=headers)
        self._read_state = read_state

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide; see `metis_agent.gates.base`.

        Raises:
            GateError: the model can't be asked, or its answer is none to the question.
        """
        state, asking = self._read_state(request), self._ask(request)
        questions = next(asking)
        while True:
            try:
                questions = asking.send(self._asker.ask(state, questions))
            except StopIteration as end:
                return _decision_of(end)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` without blocking the event loop."""
        state, asking = self._read_state(request), self._ask(request)
        questions = next(asking)
        while True:
            answers = await self._asker.aask(state, questions)
            try:
                questions = asking.send(answers)
            except StopIteration as end:
                return _decision_of(end)

    def _ask(self, request: GateRequest) -> _Asking:
        """Yield what to ask, get the answers, and so on; at last return the decision."""
        started = time.perf_counter()
        answers = yield {"answerable": {"type": "noul", "instructions": ANSWERABLE, "criteria": dict(_CRITERIA)}}
        p = 1 - _number(answers, "answerable", "noul")
        chosen = [tool.name for tool in request.tools]
        estimates = dict.fromkeys(chosen, p)
        if len(request.tools) > 1 and allows(p, self.threshold):
            answers = yield {"tool": _choice(request.tools)}
            chance = {name: _number(answers, "tool", "probabilities", name) for name in chosen}
            likeliest = max(chance, key=lambda name: chance[name])
            if not chance[likeliest]:
                raise GateError(f"the decision model gives every tool probability 0: {answers['tool']!r}")
            estimates, chosen = {name: p * chance[name] / chance[likeliest] for name in chance}, [likeliest]
        allowed = tuple(chosen) if allows(p, self.threshold) else ()
        return GateDecision(
            allowed=allowed,
            required=bool(self.required and allowed and is_first_step(turn_of(request.messages))),
            probabilities=estimates,
            threshold=self.threshold,
            gate=self.name,
            version=self.version,
            seconds=time.perf_counter() - started,
        )


def _choice(tools: tuple[ToolSpec, ...]) -> dict[str, Any]:
    criteria = {tool.name: tool.description or None for tool in tools}
    return {"type": "choice", "instructions": WHICH_TOOL, "criteria": criteria}


def _number(answers: Answers, *path: str) -> float:
    """A probability of the answers."""
    value: Any = answers
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise GateError(f"the decision model answered {answers!r}; {'.'.join(path)} must be a number in [0, 1]")
    return float(value)


def _decision_of(end: StopIteration) -> GateDecision:
    decision: GateDecision = end.value
    return decision
