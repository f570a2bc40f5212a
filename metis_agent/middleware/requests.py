"""What is on offer at one model call: the tools of LangChain's request, as the gate and the rules know them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, cast

from langchain.agents.middleware.types import ModelRequest
from langchain_core.tools import BaseTool

from metis_agent.budget import Budget, ToolTerms, terms_of
from metis_agent.gates.base import Gate
from metis_agent.graphs.bindings import Bindings
from metis_agent.graphs.setup import Setup
from metis_agent.types import ToolSpec

__all__ = ["Offers", "name_of", "narrowed"]

logger = logging.getLogger(__name__)

_KEPT = 64


class Offers:
    """The rules for each set of tools that comes along; in most agents that is one set.

    Args:
        gate: what decides.
        budget: what one turn may spend.
        block_message: what the model reads instead of a result.
        loop_guard: identical calls get the earlier result.
    """

    def __init__(self, gate: Gate, budget: Budget, block_message: str, *, loop_guard: bool) -> None:
        self._gate = gate
        self._budget = budget
        self._block_message = block_message
        self._loop_guard = loop_guard
        self._setups: OrderedDict[tuple[int, ...], tuple[list[Any], Setup]] = OrderedDict()
        self._warned = False

    def setup_for(self, request: ModelRequest[Any]) -> Setup:
        """The rules for a request's tools.

        Raises:
            ConfigurationError: a tool declares a cost or a repeatability that is none.
        """
        key = tuple(id(tool) for tool in request.tools)
        found = self._setups.get(key)
        if found is None:
            # The tools are kept beside the rules, so that no other tool can get one of these ids.
            found = self._setups[key] = (list(request.tools), self._make(request))
            while len(self._setups) > _KEPT:
                self._setups.popitem(last=False)
        return found[1]

    def _make(self, request: ModelRequest[Any]) -> Setup:
        tools = {name_of(tool): tool for tool in request.tools}
        self._warn_of_strangers(tools)
        return Setup(
            models=Bindings(request.model, ()),
            gate=self._gate,
            # Tools that run at the provider are dicts; of these the rules need no more than the name.
            tools=cast(Mapping[str, BaseTool], tools),
            specs=tuple(ToolSpec(name=name, description=_description_of(tool)) for name, tool in tools.items()),
            terms={name: self._terms_of(tool) for name, tool in tools.items()},
            budget=self._budget,
            block_message=self._block_message,
        )

    def _terms_of(self, tool: BaseTool | dict[str, Any]) -> ToolTerms:
        if not isinstance(tool, BaseTool):
            return ToolTerms(repeatable=not self._loop_guard)
        terms = terms_of(tool)
        return terms if self._loop_guard else ToolTerms(cost=terms.cost, repeatable=True)

    def _warn_of_strangers(self, tools: Collection[str]) -> None:
        strangers = sorted(set(self._budget.calls_per_tool or ()) - set(tools))
        # No error: other middleware may have taken the tool out of this request.
        if strangers and not self._warned:
            self._warned = True
            logger.warning("Budget.calls_per_tool names %r; the agent now offers only %r.", strangers, sorted(tools))


def name_of(tool: BaseTool | dict[str, Any]) -> str:
    """A tool's name; for a tool that runs at the provider, its name there or its type."""
    if isinstance(tool, BaseTool):
        return tool.name
    function = tool.get("function")
    named = function if isinstance(function, dict) else tool
    return str(named.get("name") or tool.get("type") or "unnamed")


def narrowed(request: ModelRequest[Any], allowed: Collection[str], *, required: bool = False) -> ModelRequest[Any]:
    """The request with only these tools, and with no choice of tool that they don't leave.

    As in the graph (`Bindings`), a model class with `offers_tools_when_direct = True` keeps all tools where none is
    allowed, with `tool_choice="none"`: it then answers, where without tools it might write a call all the same.
    """
    keeps = getattr(request.model, "offers_tools_when_direct", False) and request.response_format is None
    if keeps and request.tools and not allowed:
        return request.override(tool_choice="none")
    tools = [tool for tool in request.tools if name_of(tool) in allowed]
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


def _description_of(tool: BaseTool | dict[str, Any]) -> str:
    if isinstance(tool, BaseTool):
        return tool.description
    function = tool.get("function")
    return str((function if isinstance(function, dict) else tool).get("description") or "")
