"""The gate in front of an agent made by `create_agent`: in shadow, then enforced."""

from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from metis_agent import MetisGateMiddleware, NeverGate, ShadowGate


class Model(GenericFakeChatModel):
    """Any chat model."""

    def bind_tools(self, tools, **options):
        return self


def look(word: str) -> str:
    """Look a word up."""
    return word


def asked(gate):
    call = AIMessage("", tool_calls=[{"name": "look", "args": {"word": "hi"}, "id": "1"}])
    model = Model(messages=iter([call, AIMessage("Hello!"), AIMessage("Hello!")]))
    agent = create_agent(model, [look], middleware=[MetisGateMiddleware(gate)])
    return agent.invoke({"messages": [("user", "hi")]})


shadow = ShadowGate(NeverGate())
assert [outcome.status for outcome in asked(shadow)["outcomes"]] == ["ok"]
assert shadow.report().calls_saved == 1
state = asked(NeverGate())
assert [outcome.status for outcome in state["outcomes"]] == ["blocked"], state["outcomes"]
assert state["messages"][-1].text == "Hello!"
