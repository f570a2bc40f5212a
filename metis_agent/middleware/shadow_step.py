"""One model call of the agent behind a gate that only watches: nothing of the run changes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langchain.agents.middleware.types import ExtendedModelResponse, ModelRequest
from langgraph.types import Command

from metis_agent.graphs.records import as_dict
from metis_agent.graphs.setup import Setup
from metis_agent.middleware.asking import Step
from metis_agent.middleware.drafts import drafted
from metis_agent.middleware.replies import answered_in, calls_of, reply_in
from metis_agent.middleware.state import PendingCall
from metis_agent.middleware.turn import TurnView, with_question
from metis_agent.types import GateRequest

__all__ = ["ShadowStep"]


class ShadowStep:
    """A model call that the gate sees and leaves alone: no budget and no loop guard either.

    Args:
        setup: the rules for the request's tools; only the gate's request is made by them.
        request: LangChain's request; it goes on as it is.
        view: the turn so far.
    """

    def __init__(self, setup: Setup, request: ModelRequest[Any], view: TurnView) -> None:
        self._setup = setup
        self._request = request
        self._view = view

    def run(self) -> Step:
        """Ask the gate, then the model."""
        request, view, failure = self._request, self._view, ""
        if not view.decisions and self._setup.gate.wants_draft:
            _, failure = yield from drafted(request, view)
        started = time.perf_counter()
        decision = yield GateRequest(
            messages=with_question(request.messages, view.turn["question"]),
            tools=self._setup.within_budget(view.spent),
            spent=view.spent,
            draft=view.draft,
        )
        decision = replace(
            decision,
            seconds=decision.seconds or time.perf_counter() - started,
            reason="; ".join(filter(None, (failure, decision.reason))),
        )
        view.decisions.append(decision)
        request.runtime.stream_writer({"type": "metis_decision", **as_dict(decision)})
        response = yield request
        if (reply := reply_in(response)) is not None:
            view.take_reply(reply, "act")
            asked = [call for call in calls_of(reply, answered_in(response)) if isinstance(call, Mapping)]
            view.send([_pending(call) for call in asked if call in reply.tool_calls])
        return ExtendedModelResponse(model_response=response, command=Command(update=view.update()))


def _pending(call: Mapping[str, Any]) -> PendingCall:
    arguments = call.get("args")
    return PendingCall(
        id=call.get("id") or "", name=call.get("name") or "", args=arguments if isinstance(arguments, dict) else {}
    )
