"""The wheel alone: an agent that searches, runs code and records; what needs an extra says which."""

import warnings
from pathlib import Path

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

import metis_agent
from metis_agent import Budget, PythonTool, Recorder, TextSearchTool, TrajectoryStore, create_metis_agent
from metis_agent.errors import MissingDependencyError, SandboxUnavailableError
from metis_agent.tools.search import CorpusSearch, Document


class Model(GenericFakeChatModel):
    """Any chat model."""

    def bind_tools(self, tools, **options):
        return self


def call(name, number, **arguments):
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": str(number)}])


corpus = CorpusSearch.build([Document(id="1", title="Returns", text="Goods can be returned within 30 days.")])
model = Model(
    messages=iter(
        [call("text_search", 1, query="return goods"), call("python", 2, code="print(30 + 12)"), AIMessage("42 days")]
    )
)
store = TrajectoryStore("runs")
try:
    python = [PythonTool()]
except SandboxUnavailableError as error:  # this machine contains no code
    python = []
    warnings.warn(str(error), stacklevel=1)
tools = [TextSearchTool(backend=corpus), *python]
agent = create_metis_agent(model, tools, budget=Budget(calls=2), recorder=Recorder(store))
result = agent.invoke({"messages": [("user", "How long?")]})
if python:
    assert result["messages"][-1].text == "42 days", result["messages"]
    assert [outcome.status for outcome in result["outcomes"]] == ["ok", "ok"], result["outcomes"]
    assert "42" in result["outcomes"][1].content
assert "30 days" in result["outcomes"][0].content
(run,) = store.read()
assert run.question.text == "How long?"
assert Path(metis_agent.__file__).with_name("py.typed").exists()

for name, extra in {"MetisGateMiddleware": "langchain", "HDPOTrainer": "train"}.items():
    said = ""
    try:
        getattr(metis_agent, name)
    except MissingDependencyError as error:
        said = str(error)
    assert f"pip install 'langgraph-metis[{extra}]'" in said, (name, said)
