"""What one turn may spend on tools, out of the model's reach.

The graph asks here which tools are still within budget (before the gate decides), whether a call may run
(after the model answered), and whether the turn is over. Spent never raises: it means one last turn
without tools. Sources: langchain#36919, langchain#37961 (low defaults), langchain#40444 (a real answer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.tools import BaseTool

from metis_agent.errors import ConfigurationError, UnknownToolError
from metis_agent.types import Spending, ToolOutcome, amount_of

__all__ = ["Budget", "ToolTerms", "spending_of", "terms_of"]


@dataclass(frozen=True, kw_only=True)
class ToolTerms:
    """What a tool declares of itself in `tool.metadata`, under the names of these fields."""

    cost: float = 0.0
    """Price of one executed call, in the unit of `Budget.cost`."""
    repeatable: bool = False
    """True where the same call may be worth making again (polling, a changing world)."""


def terms_of(tool: BaseTool) -> ToolTerms:
    """Read `cost` and `repeatable` from a tool's metadata.

    Raises:
        ConfigurationError: `cost` is no finite number of at least 0, or `repeatable` is no bool.
    """
    declared = tool.metadata or {}
    cost, repeatable = amount_of(declared.get("cost", 0.0)), declared.get("repeatable", False)
    if cost is None:
        raise ConfigurationError(
            f"Tool {tool.name!r} declares metadata['cost'] = {declared['cost']!r}; it must be a finite number of at "
            "least 0."
        )
    if not isinstance(repeatable, bool):
        raise ConfigurationError(
            f"Tool {tool.name!r} declares metadata['repeatable'] = {repeatable!r}; it must be True or False."
        )
    return ToolTerms(cost=cost, repeatable=repeatable)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one turn; `None` sets no limit.

    Raises:
        ConfigurationError: a limit is negative, not a number, or not whole where it counts calls.
    """

    calls: int = 8
    """Executed tool calls."""
    calls_per_tool: Mapping[str, int] | None = None
    """Executed calls of single tools, by name; a tool not named has no limit of its own."""
    seconds: float | None = None
    """Time at work: gate, model and tools. Waiting at an interrupt is not counted."""
    cost: float | None = None
    """Sum of what executed calls cost by their tools' declarations; see `ToolTerms`."""

    def __post_init__(self) -> None:
        _check_count("calls", self.calls)
        for name, limit in (self.calls_per_tool or {}).items():
            _check_count(f"calls_per_tool[{name!r}]", limit)
        for field, amount in (("seconds", self.seconds), ("cost", self.cost)):
            if amount is not None and amount_of(amount) is None:
                raise ConfigurationError(
                    f"Budget.{field} is {amount!r}; it must be a finite number of at least 0, or None for no limit."
                )
            object.__setattr__(self, field, amount_of(amount))

    def check_tools(self, names: Iterable[str]) -> None:
        """Refuse limits for tools that the agent does not have.

        Raises:
            UnknownToolError: `calls_per_tool` names a tool that is not among `names`.
        """
        known = sorted(names)
        for name in self.calls_per_tool or {}:
            if name not in known:
                raise UnknownToolError(
                    f"Budget.calls_per_tool names the tool {name!r}, which the agent does not have. "
                    f"Its tools are {known!r}; use one of these names."
                )

    def spent(self, spending: Spending) -> str | None:
        """Why no tool at all may run any more, in words for the model and the record; `None` where some may."""
        if spending.calls >= self.calls:
            return f"the budget of {self.calls} tool calls is spent"
        if self.seconds is not None and spending.seconds >= self.seconds:
            return f"the budget of {self.seconds:g} seconds is spent"
        return None

    def refuses(self, tool: str, cost: float, spending: Spending) -> str | None:
        """Why one more call of this tool, at this cost, is over budget; `None` where it is within."""
        if reason := self.spent(spending):
            return reason
        limit = (self.calls_per_tool or {}).get(tool)
        if limit is not None and spending.calls_per_tool.get(tool, 0) >= limit:
            return f"the budget of {limit} calls of {tool} is spent"
        if self.cost is not None and cost > 0 and spending.cost + cost > self.cost + 1e-9:
            return f"its cost of {cost:g} is more than the {max(0.0, self.cost - spending.cost):g} left"
        return None

    @property
    def same_for_all(self) -> bool:
        """True where no limit tells one tool from another."""
        return self.cost is None and not self.calls_per_tool

    @property
    def max_steps(self) -> int:
        """Graph steps that a turn within this budget can take at most, for the recursion limit.

        A round is gate, act and tools. Between two rounds that run a call there is at most one that runs none (a
        second one in a row ends the turn); then come gate, answer and record, and the start.
        """
        return 3 * (2 * self.calls + 2) + 5


def spending_of(outcomes: Iterable[ToolOutcome], seconds: float = 0.0) -> Spending:
    """What a turn with these outcomes has spent; blocked and repeated calls cost nothing."""
    per_tool: dict[str, int] = {}
    cost = 0.0
    for outcome in outcomes:
        if outcome.executed:
            per_tool[outcome.tool] = per_tool.get(outcome.tool, 0) + 1
            cost += outcome.cost
    return Spending(calls=sum(per_tool.values()), calls_per_tool=per_tool, seconds=seconds, cost=cost)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigurationError(f"Budget.{name} is {value!r}; it must be a whole number of at least 0.")
