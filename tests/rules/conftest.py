"""Agents of either host, run in either flavour."""

import asyncio

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage

from metis_agent import MetisGateMiddleware, create_metis_agent
from tests.middleware.conftest import ran, tools
from tests.middleware.helpers import Only

__all__ = ["go", "make", "ran", "tools"]


@pytest.fixture(params=["graph", "middleware"])
def make(request):
    """Makes an agent of either kind."""

    def make(chat, tools, gate=None, *, checkpointer=None, **options):
        if request.param == "graph":
            return create_metis_agent(chat, tools, gate=gate, checkpointer=checkpointer, **options)
        gate = MetisGateMiddleware(gate or Only(*[one.name for one in tools]), **options)
        return create_agent(chat, tools, middleware=[gate], checkpointer=checkpointer)

    return make


@pytest.fixture(params=["sync", "async"])
def go(request):
    """Runs one turn, in either flavour."""

    def go(agent, text="q", config=None):
        question = {"messages": [HumanMessage(text)]} if isinstance(text, str) else text
        return (
            agent.invoke(question, config) if request.param == "sync" else asyncio.run(agent.ainvoke(question, config))
        )

    return go
