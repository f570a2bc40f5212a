"""One model call of the agent, gated: what to ask, what may run of the reply, and when the turn has to end.

Written once, as a generator that yields what it wants (a decision, a reply) and is sent it; the sync and the async
run differ in who does the asking. A reply of which nothing can run is answered here and asked again at once, so
that other middleware never sees a call that leads nowhere: a person is not asked to approve it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from langchain.agents.middleware.types import ExtendedModelResponse, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.types import Command

from metis_agent.graphs.answers import ask_again, fallback_answer, has_answer
from metis_agent.graphs.enforcement import Plan, plan_calls
from metis_agent.graphs.orphans import with_all_results
from metis_agent.graphs.records import as_dict
from metis_agent.graphs.setup import Setup
from metis_agent.middleware.asking import Step
from metis_agent.middleware.drafts import drafted
from metis_agent.middleware.offer import narrowed
from metis_agent.middleware.replies import answered_in, calls_of, replaced, reply_in, with_calls
from metis_agent.middleware.settled import sent, stripped
from metis_agent.middleware.turn import TurnView, with_question
from metis_agent.types import GateDecision, GateRequest

__all__ = ["GatedStep"]

_NOTABLE_SECONDS = 1e-3


class GatedStep:
    """A model call behind the gate.

    Args:
        setup: the rules for the request's tools.
        request: LangChain's request.
        view: the turn so far.
    """

    def __init__(self, setup: Setup, request: ModelRequest[Any], view: TurnView) -> None:
        self._setup = setup
        self._request = request.override(messages=list(with_all_results(request.messages)))
        self._view = view
        self._said: list[BaseMessage] = []
        """Replies of which nothing could run, with the messages that answer their calls."""

    def run(self) -> Step:
        """Ask until there is an answer, or a call to run."""
        while True:
            decision, response = yield from self._decide()
            if response is None:
                request = narrowed(self._request, decision.allowed, required=decision.required)
                response = yield request
                self._note(response, "act" if decision.allowed else "answer")
            response = yield from self._settle(decision, response)
            if response is not None:
                return self._conclude(response)

    def _decide(self) -> Generator[Any, Any, tuple[GateDecision, ModelResponse[Any] | None]]:
        """The decision, and the reply where a draft is the answer."""
        view, setup = self._view, self._setup
        tools = setup.within_budget(view.spent)
        decision, response, failure = self._forced(bool(tools)), None, ""
        if decision is None:
            draft, first = view.draft, not view.decisions
            if first and setup.gate.wants_draft:
                response, failure = yield from drafted(self._request, view)
                draft = view.draft
            started = time.perf_counter()
            messages = with_question(self._request.messages, view.turn["question"])
            decision = yield GateRequest(messages=messages, tools=tools, spent=view.spent, draft=draft)
            if not decision.seconds and (seconds := time.perf_counter() - started) > _NOTABLE_SECONDS:
                decision = replace(decision, seconds=seconds)
            if failure:
                decision = replace(decision, reason="; ".join(filter(None, (failure, decision.reason))))
        view.decisions.append(decision)
        self._request.runtime.stream_writer({"type": "metis_decision", **as_dict(decision)})
        return decision, response if decision.direct else None

    def _forced(self, tools_left: bool) -> GateDecision | None:
        """The decision where there is nothing to ask the gate."""
        setup, view = self._setup, self._view
        if not tools_left:
            if not setup.specs:
                return GateDecision(allowed=(), gate="metis", reason="the agent offers no tools")
            spent = setup.budget.spent(view.spent)
            return GateDecision(allowed=(), gate="budget", reason=spent or "the budget of every tool is spent")
        reason = view.stuck()
        return GateDecision(allowed=(), gate="loop guard", reason=reason) if reason else None

    def _note(self, response: ModelResponse[Any], node: str) -> None:
        if (reply := reply_in(response)) is not None:
            self._view.take_reply(reply, node)

    def _settle(
        self, decision: GateDecision, response: ModelResponse[Any]
    ) -> Generator[Any, Any, ModelResponse[Any] | None]:
        """What becomes of a response; `None` where the model is to be asked again."""
        reply = reply_in(response)
        if reply is None:
            return response
        answered = answered_in(response)
        calls = calls_of(reply, answered)
        structured = bool(answered) or response.structured_response is not None
        if not calls and (structured or has_answer(reply)):
            return response
        if decision.direct or not calls:
            return (yield from self._answer(decision, response))
        plan = self._plan(decision, reply, answered)
        if plan.run:
            return sent(self._view, response, plan)
        if structured:
            self._view.take_outcomes(plan.outcomes)
            return replaced(response, with_calls(reply, answered))
        self._answer_calls(plan)
        return None

    def _answer(self, decision: GateDecision, response: ModelResponse[Any]) -> Generator[Any, Any, ModelResponse[Any]]:
        """End the turn with a response, or with what stands in for it where it says nothing."""
        response = stripped(self._setup, self._view, response)
        if not _says_something(response):
            prompt = [*self._request.messages, self._ask_again()]
            response = yield narrowed(self._request, ()).override(messages=prompt)
            self._note(response, "answer")
            response = stripped(self._setup, self._view, response)
        if not _says_something(response) and (reply := reply_in(response)) is not None:
            response = replaced(response, fallback_answer(reply, decision.reason, self._view.outcomes))
        return response

    def _ask_again(self) -> HumanMessage:
        if self._request.response_format is None:
            return ask_again()
        return HumanMessage(
            "You have not answered yet, and no other tool can be called any more. Answer my question now, in the "
            "format that is asked for, with what you know."
        )

    def _plan(self, decision: GateDecision, reply: AIMessage, answered: set[str]) -> Plan:
        """Settle each call that LangChain has not settled itself."""
        if answered:
            reply = reply.model_copy(update={"tool_calls": [c for c in reply.tool_calls if c["id"] not in answered]})
        view = self._view
        return plan_calls(
            self._setup, reply, decision, spent=view.spent, outcomes=view.outcomes, turn=self._request.messages
        )

    def _answer_calls(self, plan: Plan) -> None:
        """Answer calls of which none can run, for the model to be asked again."""
        self._view.take_outcomes(plan.outcomes)
        self._view.take_fruitless_round(blocked=all(outcome.status == "blocked" for outcome in plan.outcomes))
        said: Sequence[Any] = [plan.message, *plan.replies]
        self._said += said
        self._request = self._request.override(messages=[*self._request.messages, *said])

    def _conclude(self, response: ModelResponse[Any]) -> ExtendedModelResponse[Any]:
        if self._said:
            response = ModelResponse(
                result=[*self._said, *response.result], structured_response=response.structured_response
            )
        return ExtendedModelResponse(model_response=response, command=Command(update=self._view.update()))


def _says_something(response: ModelResponse[Any]) -> bool:
    if response.structured_response is not None or answered_in(response):
        return True
    reply = reply_in(response)
    return reply is None or has_answer(reply)
