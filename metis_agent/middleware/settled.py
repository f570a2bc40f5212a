"""What becomes of the calls of a reply: some go to their tools, the others are answered or taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain.agents.middleware.types import ModelResponse
from langchain_core.messages import AIMessage, ToolMessage

from metis_agent.graphs.enforcement import Plan
from metis_agent.graphs.setup import Setup
from metis_agent.middleware.replies import answered_in, calls_of, replaced, reply_in, with_calls
from metis_agent.middleware.state import PendingCall
from metis_agent.middleware.turn import TurnView
from metis_agent.types import ToolOutcome

__all__ = ["sent", "stripped"]

_TWIN = "An identical call in the same message, {id}, runs in place of this one; its result counts for both."
_LAST = "no tool can be called in the last answer of a turn"


def stripped(setup: Setup, view: TurnView, response: ModelResponse[Any]) -> ModelResponse[Any]:
    """The response without the calls that wait for a result, each of them noted as blocked."""
    reply, answered = reply_in(response), answered_in(response)
    if reply is None or not (calls := calls_of(reply, answered)):
        return response
    for call in calls:
        call = call if isinstance(call, Mapping) else {}
        tool, arguments = call.get("name") or "unnamed", call.get("args")
        outcome = ToolOutcome(
            call_id=call.get("id") or "",
            tool=tool,
            arguments=arguments if isinstance(arguments, dict) else {},
            status="blocked",
            content=setup.block(tool, _LAST),
        )
        view.take_outcomes([outcome])
    return replaced(response, with_calls(reply, answered))


def sent(view: TurnView, response: ModelResponse[Any], plan: Plan) -> ModelResponse[Any]:
    """The response with its calls on their way: those that may run to their tools, the others to their messages.

    The latter get their message in their tool's place, not here: middleware that looks at a reply's calls after the
    model may answer them too, and a call must have one message.
    """
    replies = {message.tool_call_id: message for message in plan.replies}
    outcomes = {outcome.call_id: outcome for outcome in plan.outcomes}
    for call in plan.run:
        for twin in call.get("twins", ()):
            text = _TWIN.format(id=call["id"])
            replies[twin] = ToolMessage(text, name=call["name"], tool_call_id=twin)
            outcomes[twin] = ToolOutcome(
                call_id=twin, tool=call["name"], arguments=call["args"], status="repeated", content=text
            )
    view.take_outcomes(outcomes.values())
    # LangChain sends no call that it could not parse: these are answered at once.
    unparsed = [replies.pop(call["id"] or "") for call in plan.message.invalid_tool_calls]
    pending = [PendingCall(id=call["id"] or "", name=call["name"], args=call["args"]) for call in plan.run]
    for id_, message in replies.items():
        arguments, name = dict(outcomes[id_].arguments), message.name or ""
        pending.append(PendingCall(id=id_, name=name, args=arguments, settled=message.content, status=message.status))
    view.send(pending)
    return replaced(response, _with_structured(response, plan.message), unparsed)


def _with_structured(response: ModelResponse[Any], message: AIMessage) -> AIMessage:
    """The planned message with the structured calls, which no plan knows of."""
    reply, answered = reply_in(response), answered_in(response)
    if reply is None or not answered:
        return message
    structured = [call for call in reply.tool_calls if call["id"] in answered]
    return message.model_copy(update={"tool_calls": [*structured, *message.tool_calls]})
