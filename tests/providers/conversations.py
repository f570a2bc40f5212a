"""Running a scenario: an agent for each host, each way of asking it, and what holds for every history."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage, ToolMessage

from metis_agent import MetisGateMiddleware, create_metis_agent
from tests.providers.scenarios import RAN, Scenario, Steps
from tests.providers.server import Reply, Wire
from tests.providers.shapes import SHAPES

__all__ = ["HOSTS", "WAYS", "Bench", "check_history"]

HOSTS = ("graph", "middleware")
WAYS = ("invoke", "stream", "ainvoke")
WELCOME = Reply("you are welcome")
_CALLS = {"tool_use": "id", "tool_call": "id", "function_call": "call_id", "custom_tool_call": "call_id"}


class Bench:
    """A server, a client for each shape, and an event loop, for all tests of a module."""

    def __init__(self) -> None:
        from tests.providers.shapes import DIALECTS

        self.wire = Wire(*DIALECTS)
        self._models: dict[str, BaseChatModel] = {}
        self._runner = asyncio.Runner()
        self._kept: tuple[Any, Any, Any] = (None, None, None)

    def model(self, name: str) -> BaseChatModel:
        """The client of a shape."""
        if name not in self._models:
            self._models[name] = SHAPES[name].start(self.wire)
        return self._models[name]

    def agent(self, host: str, name: str, scenario: Scenario) -> Any:
        """An agent for a scenario; the last one is kept, for other ways of asking it."""
        key = (host, name, id(scenario))
        if key != self._kept[0]:
            model, tools, gate = self.model(name), scenario.tools(SHAPES[name]), scenario.gate()
            if host == "graph":
                agent: Any = create_metis_agent(model, tools, gate=gate, budget=scenario.budget, **scenario.options)
            else:
                middleware = MetisGateMiddleware(gate, budget=scenario.budget)
                agent = create_agent(model, tools, middleware=[middleware], **scenario.options)
            self._kept = (key, agent, gate)
        if isinstance(gate := self._kept[2], Steps):
            gate.begin()
        return self._kept[1]

    def ask(self, agent: Any, messages: Sequence[AnyMessage], way: str) -> tuple[dict[str, Any], str]:
        """Ask an agent; its state, and what a reader of the stream has seen of its answers."""
        question = {"messages": list(messages)}
        if way == "invoke":
            return agent.invoke(question), ""
        if way == "ainvoke":
            return self._runner.run(agent.ainvoke(question)), ""
        shown, state = "", {}
        for mode, part in agent.stream(question, stream_mode=["values", "messages"]):
            if mode == "values":
                state = part
            elif isinstance(part[0], AIMessage | AIMessageChunk):
                shown += str(part[0].text)
        return state, shown

    def close(self) -> None:
        """Stop the server."""
        self._runner.close()
        self.wire.close()

    def converse(self, scenario: Scenario, name: str, host: str, way: str) -> list[str]:
        """Play a scenario, then thank; what is wrong with it."""
        wire = self.wire
        RAN.clear()
        wire.play(*scenario.script)
        agent = self.agent(host, name, scenario)
        try:
            state, shown = self.ask(agent, [*scenario.earlier, HumanMessage(scenario.question)], way)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"[:300], *wire.refused]
        faults = [*wire.refused, *check_history(state["messages"][len(scenario.earlier) :])]
        answer, requests = str(state["messages"][-1].text), len(wire.asked)
        if scenario.says not in answer or not answer.strip():
            faults.append(f"the answer is {answer!r}, not {scenario.says!r}")
        if way == "stream" and answer not in shown:
            faults.append(f"the answer {answer!r} was not streamed, only {shown!r}")
        if scenario.ran is not None and sorted(RAN) != sorted(scenario.ran):
            faults.append(f"{RAN} have run, not {scenario.ran}")
        if scenario.requests is not None and requests != scenario.requests:
            faults.append(f"the model was asked {requests} times, not {scenario.requests}")
        statuses = tuple(sorted(outcome.status for outcome in state["outcomes"]))
        if scenario.statuses is not None and statuses != scenario.statuses:
            faults.append(f"outcomes are {statuses}, not {scenario.statuses}")
        wire.go_on(WELCOME)
        try:
            after, _ = self.ask(agent, [*state["messages"], HumanMessage("thanks")], way)
        except Exception as error:
            return [*faults, f"the next turn: {type(error).__name__}: {error}"[:300]]
        if after["messages"][-1].text != WELCOME.text:
            faults.append(f"the next turn ends in {after['messages'][-1].text!r}")
        return faults


def check_history(messages: Sequence[AnyMessage]) -> list[str]:
    """What is wrong with a history, whoever the provider is."""
    faults: list[str] = []
    seen: set[str] = set()
    for place, message in enumerate(messages):
        content = message.content if isinstance(message.content, list) else []
        if strays := [block for block in content if not isinstance(block, dict)]:
            faults.append(f"message {place}: bare strings among content blocks: {strays}")
        if not isinstance(message, AIMessage):
            continue
        calls = [*message.tool_calls, *message.invalid_tool_calls]
        ids = [call["id"] or "" for call in calls]
        if not all(ids) or len(set(ids)) < len(ids) or seen & set(ids):
            faults.append(f"message {place}: call ids are empty or not unique: {ids}")
        seen |= set(ids)
        results: list[str] = []
        for follower in messages[place + 1 :]:
            if not isinstance(follower, ToolMessage):
                break
            results.append(follower.tool_call_id)
        if sorted(results) != sorted(ids):
            faults.append(f"message {place}: its calls are {ids}, the results after it {results}")
        shown = [block[_CALLS[block["type"]]] for block in content if _names_call(block)]
        if not set(shown) <= set(ids) or len(set(shown)) < len(shown):
            faults.append(f"message {place}: its content holds the calls {shown}, its tool_calls are {ids}")
        raw = message.additional_kwargs.get("tool_calls")
        if raw and sorted(call["id"] for call in raw) != sorted(ids):
            faults.append(f"message {place}: additional_kwargs hold other calls: {raw}")
    return faults


def _names_call(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("type") in _CALLS
