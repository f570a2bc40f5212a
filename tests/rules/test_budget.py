import math
from decimal import Decimal

import numpy as np
import pytest
from langchain_core.tools import tool

from metis_agent.errors import ConfigurationError, UnknownToolError
from metis_agent.rules.budget import Budget, spending_of, terms_of
from metis_agent.types import Spending, ToolOutcome, amount_of


def outcome(tool: str, status: str = "ok", cost: float = 0.0) -> ToolOutcome:
    return ToolOutcome(call_id="1", tool=tool, arguments={}, status=status, cost=cost)


def test_spending_counts_executed_calls_only():
    outcomes = [outcome("a", cost=0.5), outcome("a", "error", 0.5), outcome("b", "timeout", 0.25)]
    outcomes += [outcome("a", "blocked"), outcome("b", "repeated")]
    spent = spending_of(outcomes, seconds=2.5)
    assert spent == Spending(calls=3, calls_per_tool={"a": 2, "b": 1}, seconds=2.5, cost=1.25)


@pytest.mark.parametrize(
    "limits",
    [
        {"calls": -1},
        {"calls": 1.5},
        {"calls": True},
        {"calls": None},
        {"calls_per_tool": {"a": -1}},
        {"seconds": -0.1},
        {"seconds": math.nan},
        {"seconds": math.inf},
        {"cost": "1"},
    ],
)
def test_bad_limits_are_refused(limits):
    with pytest.raises(ConfigurationError, match="must be"):
        Budget(**limits)


@pytest.mark.parametrize("amount", [0.5, np.float32(0.5), np.float64(0.5), Decimal("0.5"), 2, np.int64(2), 0])
def test_an_amount_may_be_any_kind_of_number(amount):
    assert amount_of(amount) == amount
    assert type(amount_of(amount)) is float
    assert Budget(cost=amount, seconds=amount).refuses("a", 3.0, Spending())


@pytest.mark.parametrize(
    "amount",
    [10**400, -1, math.nan, math.inf, Decimal("sNaN"), Decimal("1e400"), np.float32("nan"), True, "1", None, 1j],
)
def test_what_is_no_amount(amount):
    assert amount_of(amount) is None


def test_what_is_spent_and_why():
    budget = Budget(calls=2, seconds=10)
    assert budget.spent(Spending(calls=1, seconds=9.9)) is None
    assert budget.spent(Spending(calls=2)) == "the budget of 2 tool calls is spent"
    assert budget.spent(Spending(seconds=10)) == "the budget of 10 seconds is spent"
    assert Budget(calls=0).spent(Spending())


def test_single_calls_are_refused_by_tool_and_by_cost():
    budget = Budget(calls=9, calls_per_tool={"a": 1}, cost=1.0)
    assert budget.refuses("a", 0.0, Spending()) is None
    assert "1 calls of a" in budget.refuses("a", 0.0, Spending(calls=1, calls_per_tool={"a": 1}))
    assert budget.refuses("b", 0.3, Spending(calls=1, cost=0.7)) is None
    assert "more than the 0.2 left" in budget.refuses("b", 0.3, Spending(calls=1, cost=0.8))
    # A free tool is never too dear.
    assert budget.refuses("b", 0.0, Spending(calls=1, cost=1.0)) is None
    assert budget.refuses("b", 0.0, Spending(calls=9)) == "the budget of 9 tool calls is spent"


def test_costs_that_add_up_exactly_are_within_budget():
    # 0.1 + 0.1 + 0.1 is 0.30000000000000004 in floats.
    assert Budget(cost=0.3).refuses("a", 0.1, Spending(calls=2, cost=0.1 + 0.1)) is None


def test_limits_of_unknown_tools_are_refused():
    with pytest.raises(UnknownToolError, match=r"'serch'.*\['search'\]"):
        Budget(calls_per_tool={"serch": 1}).check_tools(["search"])


def test_terms_are_read_from_metadata():
    @tool
    def search(query: str) -> str:
        """Search."""
        return query

    assert (terms_of(search).cost, terms_of(search).repeatable) == (0.0, False)
    search.metadata = {"cost": 2, "repeatable": True, "other": "kept"}
    assert (terms_of(search).cost, terms_of(search).repeatable) == (2.0, True)
    for bad in ({"cost": -1}, {"cost": "free"}, {"repeatable": "yes"}):
        search.metadata = bad
        with pytest.raises(ConfigurationError, match="'search' declares"):
            terms_of(search)
