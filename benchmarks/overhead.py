"""CPU time of a Metis turn beside one of LangChain's `create_agent`; prints JSON.

Both get the same chat model that answers at once and the same trivial tool, with the defaults that users get.
Turns are measured in turn (A B A B ...) in one process, by process CPU time, so that other load on the machine
hits both; of each kind the 5% quantile over all rounds counts. A direct turn is one answer; a tool turn is a
call, its result, and the answer. `extra_call` is what the tool turn adds to the direct one. `middleware` is the agent
of `create_agent` behind a `MetisGateMiddleware`, beside the same agent without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import tool

from metis_agent.agent import create_metis_agent
from metis_agent.gates import ModelGate
from metis_agent.middleware import MetisGateMiddleware

Turn = Callable[[], Any]
AsyncTurn = Callable[[], Awaitable[Any]]


class InstantModel(BaseChatModel):
    """Answers at once; calls the tool first where `calls` is set."""

    calls: bool = False

    @property
    def _llm_type(self) -> str:
        return "instant"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """Bind the tools as they are; real models convert them here, which would flatter who binds only once."""
        return self.bind(tools=tools, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        reply = AIMessage("done")
        if self.calls and not isinstance(messages[-1], ToolMessage):
            reply = AIMessage("", tool_calls=[{"name": "echo", "args": {"text": "x"}, "id": "call_1"}])
        return ChatResult(generations=[ChatGeneration(message=reply)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._generate(messages, stop)


@tool
def echo(text: str) -> str:
    """Say it again."""
    return text


def measure(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            started = time.process_time()
            turn()
            seconds[name].append(time.process_time() - started)
    return {name: low(values) for name, values in seconds.items()}


async def ameasure(turns: dict[str, AsyncTurn], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            started = time.process_time()
            await turn()
            seconds[name].append(time.process_time() - started)
    return {name: low(values) for name, values in seconds.items()}


def low(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 20] * 1000


def question() -> dict[str, Any]:
    return {"messages": [HumanMessage("hi")]}


def gated(model: BaseChatModel, tools: list[Any]) -> Any:
    return create_agent(model, tools, middleware=[MetisGateMiddleware(ModelGate())])


MAKERS: dict[str, Callable[..., Any]] = {
    "create_agent": create_agent, "metis": create_metis_agent, "middleware": gated,
}  # fmt: skip


def overhead(rounds: int) -> dict[str, Any]:
    agents = {
        f"{kind}_{who}": make(InstantModel(calls=kind == "tool"), [echo])
        for kind in ("direct", "tool")
        for who, make in MAKERS.items()
    }
    sync = {name: lambda agent=agent: agent.invoke(question()) for name, agent in agents.items()}
    async_ = {name: lambda agent=agent: agent.ainvoke(question()) for name, agent in agents.items()}
    measure(sync, 20)
    milliseconds = {f"{name}_sync": value for name, value in measure(sync, rounds).items()}

    async def run_async() -> dict[str, float]:
        await ameasure(async_, 20)
        return await ameasure(async_, rounds)

    milliseconds |= {f"{name}_async": value for name, value in asyncio.run(run_async()).items()}
    for who in MAKERS:
        for flavour in ("sync", "async"):
            both = [milliseconds[f"{kind}_{who}_{flavour}"] for kind in ("tool", "direct")]
            milliseconds[f"extra_call_{who}_{flavour}"] = both[0] - both[1]
    ratios = {
        f"{prefix}{kind}_{flavour}": milliseconds[f"{kind}_{who}_{flavour}"]
        / milliseconds[f"{kind}_create_agent_{flavour}"]
        for who, prefix in (("metis", ""), ("middleware", "middleware_"))
        for kind in ("direct", "tool", "extra_call")
        for flavour in ("sync", "async")
    }
    return {
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "milliseconds": {name: round(value, 3) for name, value in milliseconds.items()},
        "rounds": rounds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    print(json.dumps(overhead(parser.parse_args().rounds), indent=2))
