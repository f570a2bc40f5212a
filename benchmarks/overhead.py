"""CPU time of a Metis turn beside one of LangChain's `create_agent`; prints JSON.

All get the same chat model that answers at once and the same trivial tool, with the defaults that users get. Turns are
measured in turn (A B C A B C ...) in one process, so that other load on the machine hits all. A direct turn is one
answer; a tool turn is a call, its result, and the answer. `metis` is our graph; `middleware` is the agent of
`create_agent` behind a `MetisGateMiddleware`; `empty` is the same agent behind a middleware that has the same hooks and
does nothing in them, as LangChain takes its time for each hook.

A ratio is the median, over the rounds, of two turns of one round by process CPU time, with the interval that holds it
in 95% of bootstrap samples; `wall` is the same by the clock. Milliseconds are the 5% quantiles of CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
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


Seconds = dict[str, list[tuple[float, float]]]
"""Of each kind of turn, round by round: of CPU and by the clock."""


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def measure(turns: dict[str, Turn], rounds: int) -> Seconds:
    seconds: Seconds = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            cpu, wall = _now()
            turn()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


async def ameasure(turns: dict[str, AsyncTurn], rounds: int) -> Seconds:
    seconds: Seconds = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            cpu, wall = _now()
            await turn()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


def low(seconds: list[tuple[float, float]]) -> float:
    return sorted(cpu for cpu, _ in seconds)[len(seconds) // 20] * 1000


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, Any]:
    """Of turns that were measured in the same rounds."""
    cpu, wall = ([one[at] / other[at] for one, other in zip(ours, theirs, strict=True)] for at in (0, 1))
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(cpu, k=len(cpu))) for _ in range(400))
    return {
        "cpu": round(statistics.median(cpu), 3),
        "interval": [round(medians[9], 3), round(medians[-10], 3)],
        "wall": round(statistics.median(wall), 3),
    }


class Empty(AgentMiddleware[Any, Any, Any]):
    """The hooks that the gate has, and nothing in them."""

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """Pass it on."""
        return handler(request)

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """Pass it on."""
        return await handler(request)

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """Pass it on."""
        return handler(request)

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """Pass it on."""
        return await handler(request)

    def after_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Change nothing."""
        return None

    async def aafter_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Change nothing."""
        return None


def question() -> dict[str, Any]:
    return {"messages": [HumanMessage("hi")]}


def behind(middleware: Callable[[], AgentMiddleware[Any, Any, Any]]) -> Callable[..., Any]:
    return lambda model, tools: create_agent(model, tools, middleware=[middleware()])


MAKERS: dict[str, Callable[..., Any]] = {
    "create_agent": create_agent,
    "metis": create_metis_agent,
    "empty": behind(Empty),
    "middleware": behind(lambda: MetisGateMiddleware(ModelGate())),
}
COMPARED = {"metis": "create_agent", "middleware": "create_agent", "empty": "create_agent", "middleware_alone": "empty"}
"""What is compared with what; alone, the middleware is beside one that does nothing."""


def overhead(rounds: int) -> dict[str, Any]:
    agents = {
        (kind, who): make(InstantModel(calls=kind == "tool"), [echo])
        for kind in ("direct", "tool")
        for who, make in MAKERS.items()
    }
    sync = {f"{kind}_{who}_sync": lambda it=agent: it.invoke(question()) for (kind, who), agent in agents.items()}
    async_ = {f"{kind}_{who}_async": lambda it=agent: it.ainvoke(question()) for (kind, who), agent in agents.items()}
    measure(sync, 20)
    seconds = measure(sync, rounds)

    async def run_async() -> Seconds:
        await ameasure(async_, 20)
        return await ameasure(async_, rounds)

    seconds |= asyncio.run(run_async())
    ratios = {
        f"{name}_{kind}_{flavour}": ratio(
            seconds[f"{kind}_{name.removesuffix('_alone')}_{flavour}"], seconds[f"{kind}_{other}_{flavour}"]
        )
        for name, other in COMPARED.items()
        for kind in ("direct", "tool")
        for flavour in ("sync", "async")
    }
    milliseconds = {name: round(low(values), 3) for name, values in seconds.items()}
    return {"ratios": ratios, "milliseconds": milliseconds, "rounds": rounds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    print(json.dumps(overhead(parser.parse_args().rounds), indent=2))
