"""What the tests of the middleware share: tools that keep count, gates that follow a script, checks of a run."""

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from metis_agent import MetisGateMiddleware
from metis_agent.gates import Gate
from metis_agent.types import GateDecision


class Verdict(BaseModel):
    """The answer."""

    text: str


class Only(Gate):
    """Allows the tools that it was given."""

    def __init__(self, *names, required=False):
        super().__init__(required=required)
        self.names = names
        self.requests = []

    def decide(self, request):
        self.requests.append(request)
        return GateDecision(allowed=self.names, required=self.required, gate="only")


def make_tools(ran):
    """`look` and `pay`, which note in `ran` that they ran."""

    @tool
    def look(query: str) -> str:
        """Look it up."""
        ran.append(("look", query))
        return f"found {query}"

    @tool
    def pay(amount: int) -> str:
        """Pay."""
        ran.append(("pay", amount))
        return f"paid {amount}"

    return [look, pay]


def gated(chat, tools, gate, *, before=(), after=(), agent=None, **options):
    """A LangChain agent behind a gate, with other middleware before and after."""
    middleware = [*before, MetisGateMiddleware(gate, **options), *after]
    return create_agent(chat, tools, middleware=middleware, **(agent or {}))


def ask(agent, text="q", config=None):
    return agent.invoke({"messages": [HumanMessage(text)]}, config)


def calls_in(messages):
    return [
        call
        for message in messages
        if isinstance(message, AIMessage)
        for call in [*message.tool_calls, *message.invalid_tool_calls]
    ]


def answered(state):
    """Result text by call id; each call must have exactly one."""
    results = [m for m in state["messages"] if isinstance(m, ToolMessage)]
    assert sorted(m.tool_call_id for m in results) == sorted(call["id"] for call in calls_in(state["messages"]))
    return {m.tool_call_id: str(m.text) for m in results}


def statuses(state):
    return sorted(outcome.status for outcome in state["outcomes"])


def results(state):
    return [str(message.text) for message in state["messages"] if isinstance(message, ToolMessage)]
