"""Everything that a compiled graph can do works with the agent: batches, every stream, events."""

import asyncio
from typing import Any

import pytest

from tests.looking import ask, looking


async def test_batches():
    for states in (looking().batch([ask(), ask()]), await looking().abatch([ask(), ask()])):
        assert [state["messages"][-1].content for state in states] == ["x it is", "x it is"]


@pytest.mark.parametrize("mode", ["values", "updates", "messages", "custom", "debug", "tasks"])
async def test_every_stream_mode(mode):
    sync = list(looking().stream(ask(), stream_mode=mode))
    later = [chunk async for chunk in looking().astream(ask(), stream_mode=mode)]
    assert sync
    assert len(sync) == len(later)


def test_several_modes_at_once_and_subgraphs():
    chunks = list(looking().stream(ask(), stream_mode=["updates", "custom"], subgraphs=True))
    assert {mode for _, mode, _ in chunks} == {"updates", "custom"}


def test_updates_are_plain_values_by_node():
    updates = list(looking().stream(ask(), stream_mode="updates"))
    assert [next(iter(update)) for update in updates] == ["gate", "act", "look", "gate", "act"]
    assert updates[0]["gate"]["decisions"][0]["allowed"] == ("look",)
    assert updates[2]["look"]["outcomes"][0]["status"] == "ok"


async def test_decisions_are_in_the_custom_stream():
    sync = list(looking().stream(ask(), stream_mode="custom"))
    assert sync == [event async for event in looking().astream(ask(), stream_mode="custom")]
    assert [event["type"] for event in sync] == ["metis_decision", "metis_decision"]
    assert sync[0]["allowed"] == ("look",)


def test_messages_are_streamed_once():
    seen = [message.content for message, _ in looking().stream(ask(), stream_mode="messages")]
    assert seen.count("x it is") == 1
    assert seen.count("found x") == 1


async def test_version_2():
    result = looking().invoke(ask(), version="v2")
    assert (result.value["messages"][-1].content, result.interrupts) == ("x it is", ())
    assert (await looking().ainvoke(ask(), version="v2")).value["messages"][-1].content == "x it is"
    parts = list(looking().stream(ask(), stream_mode="updates", version="v2"))
    assert {part["type"] for part in parts} == {"updates"}


async def test_other_stream_modes_of_invoke():
    assert len(looking().invoke(ask(), stream_mode="updates")) == 5
    assert len(await looking().ainvoke(ask(), stream_mode="updates")) == 5


async def test_events():
    names = [event["name"] async for event in looking().astream_events(ask(), version="v2")]
    assert {"gate", "act", "look"} <= set(names)


def test_many_runs_side_by_side():
    agent = looking()

    async def run() -> list[Any]:
        return await asyncio.gather(*(agent.ainvoke(ask()) for _ in range(20)))

    assert all(len(state["outcomes"]) == 1 for state in asyncio.run(run()))
