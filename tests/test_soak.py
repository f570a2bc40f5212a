"""Many turns at once, behind a trained gate, with images and a recorder: nothing grows, is lost or is mixed up.

A hundred turns in the suite; twenty thousand, fifty at once, where tests that take minutes are run.
"""

import asyncio
import base64
import gc
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from PIL import Image

from metis_agent import MetisGateMiddleware, Recorder, TrajectoryStore, create_metis_agent
from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
from metis_agent.rollouts.outcomes import OutcomeTable
from tests.fakes import ScriptedChatModel, call, calling

WAYS = [(host, way) for host in ("graph", "middleware") for way in ("async", "threads")]


@tool
def search(query: str) -> str:
    """Look it up."""
    return f"entry of {query}"


class Echo(ScriptedChatModel):
    """Looks up what a question names where it may, and answers with what was found; forgets what it was asked."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked.clear()
        return super()._generate(messages, stop, run_manager, **kwargs)


def reply(may_call):
    def said(messages):
        question = next(message for message in reversed(messages) if message.type == "human")
        [name] = re.findall(r"no-\d{5}", question.text)
        if messages[-1].type == "tool":
            return f"{name}: {messages[-1].text}"
        return calling(call("search", id=f"call_{name}", query=name)) if may_call else f"{name} is known"

    return said


class Asked(Echo):
    def bind_tools(self, tools, *, tool_choice=None, **kwargs):
        return Echo(script=[reply(bool(tools) and tool_choice != "none")])


def text_of(n):
    return f"How long is the river no-{n:05}?" if n % 2 else f"What is no-{n:05} + 1?"


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """Sums are answered directly, rivers looked up."""
    rivers = np.arange(80) % 2 == 1
    table = OutcomeTable(
        questions=tuple(text_of(2 * 131 * n + river) for n, river in enumerate(rivers)),
        actions=("direct", "search"),
        correct=np.stack([~rivers, rivers], axis=1).astype(float),
        cost=np.tile([0.0, 1.0], (80, 1)),
        seconds=np.full((80, 2), np.nan),
    )
    folder = tmp_path_factory.mktemp("soak") / "gate"
    write_artefact(train_gate(table, GateTraining(strengths=[1.0])), folder, table=table, metrics={})
    return PolicyGate(folder)


def an_image(n):
    file = BytesIO()
    Image.new("RGB", (8, 8), (n % 256, n // 256 % 256, 7)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def a_question(n):
    blocks = [{"type": "text", "text": text_of(n)}]
    if n % 4 < 2:
        blocks.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{an_image(n)}"}})
    return {"messages": [HumanMessage(blocks)]}


def check(n, state):
    """Turn `n` has looked up what it was asked, or nothing, and says so."""
    name = f"no-{n:05}"
    assert state["messages"][-1].text == (f"{name}: entry of {name}" if n % 2 else f"{name} is known")
    assert [outcome.arguments["query"] for outcome in state["outcomes"]] == [name] * (n % 2)
    assert len(state["decisions"]) == 1 + n % 2


def hold(agent, way, numbers, at_once):
    left = iter(numbers)

    def work():
        for n in left:
            check(n, agent.invoke(a_question(n)))

    async def awork():
        for n in left:
            check(n, await agent.ainvoke(a_question(n)))

    async def all_of_them():
        await asyncio.gather(*[awork() for _ in range(at_once)])

    if way == "async":
        asyncio.run(all_of_them())
        return
    with ThreadPoolExecutor(at_once) as pool:
        for worker in [pool.submit(work) for _ in range(at_once)]:
            worker.result()


def held():
    """Objects, descriptors, and MiB of memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(gc.get_objects()), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts in /proc")
@pytest.mark.parametrize(
    ("turns", "at_once"), [(20, 10), pytest.param(5000, 50, marks=[pytest.mark.exhaustive, pytest.mark.timeout(0)])]
)
def test_nothing_grows_is_lost_or_mixed_up(gate, tmp_path, turns, at_once):
    recorder = Recorder(TrajectoryStore(tmp_path))
    model = Asked(script=[reply(may_call=False)])
    agents = {
        "graph": create_metis_agent(model, [search], gate=gate, recorder=recorder),
        "middleware": create_agent(model, [search], middleware=[MetisGateMiddleware(gate, recorder=recorder)]),
    }
    asked, after = 0, (0, 0, 0)
    for size in (at_once, turns):
        for host, way in WAYS:
            hold(agents[host], way, range(asked, asked + size), at_once)
            asked += size
        before, after = after, held()
    print("objects, descriptors, MiB:", before, "then", after)
    # Less than two a turn: a turn that is kept has dozens.
    assert after[0] - before[0] < 8 * turns, "objects"
    assert after[1] <= before[1], "descriptors"
    assert after[2] - before[2] < 48, "memory"
    store, seen = TrajectoryStore(tmp_path), Counter()
    for turn in store.read():
        [name] = set(re.findall(r"no-\d{5}", str(turn)))
        n = int(name[3:])
        seen[n] += 1
        assert turn.answer == (f"{name}: entry of {name}" if n % 2 else f"{name} is known")
        assert (an_image(n) in str(turn.messages)) == (n % 4 < 2)
    assert seen == Counter(range(asked))
    assert recorder.report.lost == recorder.report.spooled == 0
