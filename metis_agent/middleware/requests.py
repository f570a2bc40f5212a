"""Between LangChain's requests and responses and what the rules speak of: tools on offer, what to ask, a reply.

With LangChain's `ToolStrategy` the structured answer is itself a call, which LangChain has answered by the time
that middleware sees it. Such a call is none of the gate's business, and is kept as it is.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain.agents.middleware.types import ModelRequest, ModelResponse
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.constants import TAG_NOSTREAM

from metis_agent.errors import ConfigurationError
from metis_agent.rules.asking import Ask, Reply
from metis_agent.rules.budget import ToolTerms, terms_of
from metis_agent.rules.rules import Offer, Rules
from metis_agent.types import ToolSpec

__all__ = ["RuleCache", "asking", "replaced", "reply_of"]

logger = logging.getLogger(__name__)

_KEPT = 64


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
        by_name = {_name_of(tool): tool for tool in tools}
        untracked = sorted(set(self._rules.budget.calls_per_tool or ()) - set(by_name))
        # No error: other middleware may have taken the tool out of this request.
        if untracked:
            self._warn_once(
                f"Budget.calls_per_tool names {untracked!r}, and a request offers only {sorted(by_name)!r}.",
                key=f"untracked {untracked}",
            )
        specs = [ToolSpec(name=name, description=_description_of(tool)) for name, tool in by_name.items()]
        terms = {name: self.terms_of(tool) for name, tool in by_name.items()}
        return Offer(specs, terms, self._rules.gate.gate)

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
    if before or wanted.again is not None:
        again = () if wanted.again is None else (wanted.again,)
        request = request.override(messages=[*request.messages, *before, *again])
    request = _narrowed(request, wanted.allowed, required=wanted.required)
    return _unseen(request) if wanted.node == "draft" else request


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
    """The request with only these tools, and with no choice of tool that they don't leave.

    As in the graph (`Bindings`), a model class with `offers_tools_when_direct = True` keeps all tools where none is
    allowed, with `tool_choice="none"`: it then answers, where without tools it might write a call all the same.
    """
    keeps = (
        not allowed and request.response_format is None and getattr(request.model, "offers_tools_when_direct", False)
    )
    if keeps and request.tools:
        return request.override(tool_choice="none")
    tools = [tool for tool in request.tools if _name_of(tool) in allowed]
    choice = "any" if required and tools else _choice_left(request.tool_choice, allowed if tools else ())
    if len(tools) == len(request.tools) and choice == request.tool_choice:
        return request
    return request.override(tools=tools, tool_choice=choice)


def _choice_left(choice: Any, allowed: Collection[str]) -> Any:
    if not allowed:
        return None
    named = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    generic = named is None or named in ("auto", "any", "required", "none", True, False)
    return choice if generic or named in allowed else None


def _unseen(request: ModelRequest[Any]) -> ModelRequest[Any]:
    """The request with log-probabilities asked for where the model has that setting, and out of `messages` streams."""
    model: Any = request.model
    settings = request.model_settings
    # None: the model has the setting, and no choice has been made.
    if getattr(model, "logprobs", True) is None:
        settings = {**settings, "logprobs": True}
    if isinstance(model, BaseChatModel):
        model = model.model_copy(update={"tags": [*(model.tags or ()), TAG_NOSTREAM]})
    return request.override(model=model, model_settings=settings)


def _name_of(tool: BaseTool | dict[str, Any]) -> str:
    """A tool's name; for a tool that runs at the provider, its name there or its type."""
    if isinstance(tool, BaseTool):
        return tool.name
    function = tool.get("function")
    named = function if isinstance(function, dict) else tool
    return str(named.get("name") or tool.get("type") or "unnamed")


def _description_of(tool: BaseTool | dict[str, Any]) -> str:
    if isinstance(tool, BaseTool):
        return tool.description
    function = tool.get("function")
    return str((function if isinstance(function, dict) else tool).get("description") or "")
