"""Between LangChain's requests and responses and what the rules speak of: tools on offer, what to ask, a reply, a call.

With LangChain's `ToolStrategy` the structured answer is itself a call, which LangChain has answered by the time
that middleware sees it. Such a call is none of the gate's business, and is kept as it is.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from langchain.agents.middleware.types import ModelRequest, ModelResponse, ToolCallRequest
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.constants import TAG_NOSTREAM
from langgraph.types import Command

from metis_agent.deadline import DeadlineError
from metis_agent.errors import ConfigurationError
from metis_agent.rules.answers import sendable
from metis_agent.rules.asking import Ask, Reply, no_tools_choice
from metis_agent.rules.budget import ToolTerms, terms_of
from metis_agent.rules.outcomes import OutcomeBuffer, abandoned, outcome_of, without_records
from metis_agent.rules.rules import Offer, Rules, spec_of
from metis_agent.rules.state import Notes
from metis_agent.rules.turn import Turn
from metis_agent.types import OutcomeStatus, ToolOutcome

__all__ = ["GatedCall", "RuleCache", "asking", "check_keys", "replaced", "reply_of"]

logger = logging.getLogger(__name__)

_ToolResult = ToolMessage | Command[Any]
_NO_TOOL = "is not a valid tool"
"""In what LangChain says of a call of no tool."""


class GatedCall:
    """One tool call of the agent: may it run, and what became of it."""

    def __init__(self, request: ToolCallRequest, rules: Rules, cache: RuleCache, buffer: OutcomeBuffer) -> None:
        self._request = request
        self._call = request.tool_call
        self._rules = rules
        self._terms = cache.terms_of(request.tool)
        self._buffer = buffer
        self._notes: Notes | None = request.state.get("metis_turn")
        self._started = time.perf_counter()
        self._unknown = ""

    @property
    def seconds_left(self) -> float | None:
        """What the budget leaves of time; `None` for no limit."""
        limit = self._rules.budget.seconds
        if limit is None or self._notes is None:
            return None
        return max(0.0, limit - Turn(self._rules, self._request.state).spent.seconds)

    def instead(self) -> ToolMessage | None:
        """What the model reads in place of the result, where the call must not run."""
        for sent in self._notes["pending"] if self._notes else ():
            if sent["id"] == self._call["id"]:
                if "settled" not in sent:
                    self._unknown = sent.get("added", "")
                    # The agent has such a tool, and it was not on offer.
                    return self._refused(self._unknown) if self._unknown and self._request.tool is not None else None
                status: Any = sent["status"]
                return ToolMessage(sent["settled"], name=sent["name"], tool_call_id=sent["id"], status=status)
        return self._stray()

    def _stray(self) -> ToolMessage | None:
        """The same for a call that no gated reply has held: other middleware has brought it in."""
        turn, call, cost = Turn(self._rules, self._request.state), self._call, self._terms.cost
        reason = self._rules.budget.refuses(call["name"], cost, turn.spent)
        if not turn.decisions or call["name"] not in turn.decisions[-1].allowed:
            reason = "the gate did not allow it at this step"
        if reason is None:
            return None
        return self._refused(self._rules.block(call["name"], reason))

    def _refused(self, text: str) -> ToolMessage:
        self._note("blocked", text)
        return ToolMessage(text, name=self._call["name"], tool_call_id=self._call["id"], status="error")

    def returned(self, result: _ToolResult) -> _ToolResult:
        """Note the result; it goes on as it is, but for records of another agent that the tool has asked."""
        # LangChain itself answers a call of a tool that the agent does not have.
        missing = self._request.tool is None and isinstance(result, ToolMessage) and result.status == "error"
        if missing and self._unknown and _NO_TOOL in str(cast(ToolMessage, result).text):
            return self._refused(self._unknown)
        seconds, cost = (0.0, 0.0) if missing else self._spent()
        self._keep(outcome_of(self._call, result, seconds=seconds, cost=cost, status="blocked" if missing else None)[0])
        kept: _ToolResult = without_records(result)
        return kept

    def timed_out(self, limit: float, error: DeadlineError) -> ToolMessage:
        """Note that the budget's time was up, or that the call was not made, and tell the model."""
        status, message = abandoned(self._call, limit, error)
        self._note(status, str(message.text))
        return message

    def raised(self, error: Exception) -> None:
        """Note that the tool raised."""
        self._note("error", f"{type(error).__name__}: {error}")

    def _note(self, status: OutcomeStatus, content: str) -> None:
        call = self._call
        seconds, cost = (0.0, 0.0) if status == "blocked" else self._spent()
        self._keep(
            ToolOutcome(
                call_id=call["id"] or "", tool=call["name"], arguments=call["args"], status=status, content=content,
                seconds=seconds, cost=cost,
            )
        )  # fmt: skip

    def _spent(self) -> tuple[float, float]:
        return time.perf_counter() - self._started, self._terms.cost

    def _keep(self, outcome: ToolOutcome) -> None:
        if self._notes is not None:
            self._buffer.add(self._notes, outcome)


_KEPT = 64
_ONLY_WITH_TOOLS = frozenset({"tool_choice", "parallel_tool_calls", "strict"})


class RuleCache:
    """What the rules know of each set of tools that comes along; in most agents that is one set.

    Args:
        rules: the agent's.
        loop_guard: identical calls get the earlier result.
        watching: nothing of the run may change, so nothing is refused either.
    """

    def __init__(self, rules: Rules, *, loop_guard: bool, watching: bool) -> None:
        self._rules = rules
        self._loop_guard = loop_guard
        self._watching = watching
        self._offers: OrderedDict[tuple[int, ...], tuple[list[Any], Offer]] = OrderedDict()
        self._warned: set[str] = set()

    def offer_of(self, tools: Sequence[BaseTool | dict[str, Any]]) -> Offer:
        """What the rules know of a request's tools.

        Raises:
            ConfigurationError: a tool declares a cost or a repeatability that is none, and it would matter.
        """
        key = tuple([id(tool) for tool in tools])
        found = self._offers.get(key)
        if found is None:
            # The tools are kept beside the offer, so that no other tool can get one of these ids.
            found = self._offers[key] = (list(tools), self._make(tools))
            while len(self._offers) > _KEPT:
                self._offers.popitem(last=False)
        return found[1]

    def terms_of(self, tool: BaseTool | dict[str, Any] | None) -> ToolTerms:
        """What a tool declares of itself.

        Raises:
            ConfigurationError: the declaration can't be read, and a budget of cost depends on it.
        """
        if not isinstance(tool, BaseTool):
            return ToolTerms(repeatable=not self._loop_guard)
        try:
            terms = terms_of(tool)
        except ConfigurationError as error:
            if self._rules.budget.cost is not None and not self._watching:
                raise
            # The agent is somebody else's, and so may be the key.
            self._warn_once(f"{error} It is left out of account.")
            terms = ToolTerms()
        return terms if self._loop_guard else ToolTerms(cost=terms.cost, repeatable=True)

    def _make(self, tools: Sequence[BaseTool | dict[str, Any]]) -> Offer:
        by_name = {spec_of(tool).name: tool for tool in tools}
        untracked = sorted(set(self._rules.budget.calls_per_tool or ()) - set(by_name))
        # No error: other middleware may have taken the tool out of this request.
        if untracked:
            self._warn_once(
                f"Budget.calls_per_tool names {untracked!r}, and a request offers only {sorted(by_name)!r}.",
                key=f"untracked {untracked}",
            )
        specs = [spec_of(tool) for tool in by_name.values()]
        terms = {name: self.terms_of(tool) for name, tool in by_name.items()}
        return Offer(specs, terms, self._rules, open=True, tools=tuple(by_name.values()))

    def _warn_once(self, text: str, key: str = "") -> None:
        if (key or text) not in self._warned:
            self._warned.add(key or text)
            logger.warning("%s", text)


def asking(request: ModelRequest[Any], wanted: Ask, before: Sequence[Any]) -> ModelRequest[Any]:
    """The request for what a step wants to ask.

    Args:
        request: as it came.
        wanted: what to ask.
        before: what has been said at this step already.
    """
    if before or wanted.after:
        request = request.override(messages=list(sendable([*request.messages, *before, *wanted.after])))
    request = (
        _narrowed(request, wanted.allowed, required=wanted.required)
        if wanted.allowed
        else _closed(request, wanted.again)
    )
    return _unseen(request, log_probs=wanted.log_probs) if wanted.node == "draft" else request


def reply_of(response: ModelResponse[Any]) -> Reply:
    """The model's reply in a response; it has no message where other middleware has left none."""
    return Reply(
        message=_message_in(response),
        answered=frozenset([message.tool_call_id for message in response.result if isinstance(message, ToolMessage)]),
        structured=response.structured_response,
        response=response,
    )


def replaced(
    response: ModelResponse[Any],
    message: AIMessage | None,
    *,
    before: Sequence[BaseMessage] = (),
    beside: Sequence[BaseMessage] = (),
) -> ModelResponse[Any]:
    """The response with another reply, with messages before it, and with messages right after it."""
    old = _message_in(response)
    if message is old and not before and not beside:
        return response
    result = list(before)
    for item in response.result:
        result += [message, *beside] if item is old and message is not None else [item]
    return ModelResponse(result=result, structured_response=response.structured_response)


def _message_in(response: ModelResponse[Any]) -> AIMessage | None:
    for message in reversed(response.result):
        if isinstance(message, AIMessage):
            return message
    return None


def _narrowed(request: ModelRequest[Any], allowed: Collection[str], *, required: bool) -> ModelRequest[Any]:
    """The request with only these tools, and with no choice of tool that they don't leave."""
    tools = [tool for tool in request.tools if spec_of(tool).name in allowed]
    choice = "any" if required else _choice_left(request.tool_choice, allowed)
    if len(tools) == len(request.tools) and choice == request.tool_choice:
        return request
    return request.override(tools=tools, tool_choice=choice)


def _closed(request: ModelRequest[Any], again: bool) -> ModelRequest[Any]:
    """The request for an answer, without calling anything.

    As in the graph (`Bindings`): without tools, but where the conversation holds calls, or the model settles it for
    itself. An answer in a format of the provider's keeps them too, as LangChain would send an empty list of tools; an
    answer that is a call of a tool of its own needs no other.
    """
    if not request.tools:
        return request
    format_ = request.response_format
    if isinstance(format_, AutoStrategy):
        format_ = (ProviderStrategy if _has_own_format(request.model) else ToolStrategy)(schema=format_.schema)
        request = request.override(response_format=format_)
    declared = getattr(request.model, "offers_tools_when_direct", None)
    choice = "none" if declared else no_tools_choice(request.model)
    if isinstance(format_, ProviderStrategy):
        keeps = True
    elif format_ is not None:
        keeps = False
    else:
        keeps = any(message.type == "tool" for message in request.messages) if declared is None else bool(declared)
    if not keeps or (again and choice is None and format_ is None):
        settings = {key: value for key, value in request.model_settings.items() if key not in _ONLY_WITH_TOOLS}
        return request.override(tools=[], tool_choice=None, model_settings=settings)
    if isinstance(format_, ProviderStrategy):
        # LangChain does not pass a request's `tool_choice` on beside a format.
        settings = {**request.model_settings, **({"tool_choice": choice} if choice else {})}
        return request.override(tool_choice=None, model_settings=settings)
    return request.override(tool_choice=choice)


def _has_own_format(model: Any) -> bool:
    """Whether the model's provider takes a schema for the answer, beside tools."""
    name = str(getattr(model, "model_name", None) or getattr(model, "model", None) or "").lower()
    profile = getattr(model, "profile", None) or {}
    return bool(profile.get("structured_output")) and ("gemini" not in name or "gemini-3" in name)


def _choice_left(choice: Any, allowed: Collection[str]) -> Any:
    named = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    generic = named is None or named in ("auto", "any", "required", "none", True, False)
    return choice if generic or named in allowed else None


def _unseen(request: ModelRequest[Any], *, log_probs: bool) -> ModelRequest[Any]:
    """The request with log-probabilities asked for where the model has that setting, and out of `messages` streams."""
    model: Any = request.model
    settings = request.model_settings
    # None: the model has the setting, and no choice has been made.
    if log_probs and getattr(model, "logprobs", True) is None:
        settings = {**settings, "logprobs": True}
    if isinstance(model, BaseChatModel):
        model = model.model_copy(update={"tags": [*(model.tags or ()), TAG_NOSTREAM]})
    return request.override(model=model, model_settings=settings)


def check_keys(state: Mapping[str, Any]) -> None:
    """Refuse an agent whose own state schema has taken over one of our keys.

    Raises:
        ConfigurationError: it has.
    """
    for key in ("decisions", "outcomes", "calls"):
        if not isinstance(state.get(key), list):
            raise ConfigurationError(
                f"The agent's state has {key}={state.get(key)!r}; MetisGateMiddleware keeps a list of records there. "
                "Rename that key in your state_schema."
            )
