import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph

from metis_agent.errors import ConfigurationError, InputError, UnknownToolError
from metis_agent.models.engine import Engine
from metis_agent.models.local import OFFERS_TOOLS_WHEN_DIRECT, LocalChatModel
from metis_agent.types import TOKEN_RECORD

from .conftest import biased
from .teacher import teacher_forced


@tool
def python(code: str) -> str:
    """Run code."""
    return code


@tool
def search(query: str) -> str:
    """Search."""
    return query


def record_of(message: Any) -> dict[str, Any]:
    record: dict[str, Any] = message.response_metadata[TOKEN_RECORD]
    return record


def test_record_holds_everything_documented(chat: LocalChatModel, policy: Any, tokenizer: Any) -> None:
    chat.weights_version = "step-7"
    reply = chat.invoke("Hello", seed=5)
    record = record_of(reply)
    assert set(record) == {
        "prompt_ids", "completion_ids", "log_probs", "forced", "sampling", "weights_version", "template_hash",
        "continues", "images",
    }  # fmt: skip
    assert (
        record["prompt_ids"]
        == tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)[
            "input_ids"
        ]
    )
    assert record["log_probs"] == pytest.approx(
        teacher_forced(policy, record["prompt_ids"], record["completion_ids"]), abs=1e-4
    )
    assert record["sampling"] == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5, "max_new_tokens": 12, "tool_choice": "auto",
        "stop": [],
    }  # fmt: skip
    assert (record["forced"], record["continues"], record["weights_version"]) == (0, False, "step-7")
    assert reply.usage_metadata == {
        "input_tokens": len(record["prompt_ids"]),
        "output_tokens": len(record["completion_ids"]),
        "total_tokens": len(record["prompt_ids"]) + len(record["completion_ids"]),
    }
    assert reply.response_metadata["model_name"] == "local"


def test_finish_reasons(says: Any) -> None:
    call = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
    model = says(call, "Hello", "Hello world")
    called, stopped, cut = (model.invoke("?", **options) for options in ({}, {}, {"max_new_tokens": 1}))
    assert [reply.response_metadata["finish_reason"] for reply in (called, stopped, cut)] == [
        "tool_calls", "stop", "length"
    ]  # fmt: skip
    assert called.tool_calls[0]["args"] == {"code": "1"}
    assert called.tool_calls[0]["id"].startswith("call_")
    assert record_of(cut)["forced"] == 1


def test_malformed_call_is_an_invalid_tool_call(says: Any) -> None:
    reply = says('<tool_call>{"name": "python", }</tool_call>').invoke("?")
    assert reply.tool_calls == []
    assert reply.invalid_tool_calls[0]["name"] == "python"
    assert "double quotes" in reply.invalid_tool_calls[0]["error"]
    assert reply.response_metadata["finish_reason"] == "stop"


def test_metis_answer_and_reasoning(says: Any) -> None:
    reply = says("<reason>the</reason><answer>Hello</answer>").invoke("?")
    assert reply.content == "Hello"
    assert reply.additional_kwargs == {"reasoning_content": "the"}


def test_forbidden_calls_keep_the_prompt_and_ban_the_opening(chat: LocalChatModel, policy: Any, tokenizer: Any) -> None:
    opening = tokenizer.convert_tokens_to_ids("<tool_call>")
    eager = LocalChatModel(model=biased(policy, opening), tokenizer=tokenizer, max_new_tokens=6)
    free = record_of(eager.bind_tools([python]).invoke("Hello"))
    barred = record_of(eager.bind_tools([python], tool_choice="none").invoke("Hello"))
    assert opening in free["completion_ids"]
    assert opening not in barred["completion_ids"]
    assert barred["prompt_ids"] == free["prompt_ids"]
    # The policy's own log-probabilities: the ban is not renormalised away, or they would be near 0.
    expected = teacher_forced(eager.model, barred["prompt_ids"], barred["completion_ids"])
    assert barred["log_probs"] == pytest.approx(expected, abs=1e-4)
    assert barred["log_probs"][0] < -1.0
    # Beside them those among the tokens that were left, for whoever reads how sure the model is of its answer.
    assert barred["allowed_log_probs"][0] > barred["log_probs"][0] + 1.0
    assert "allowed_log_probs" not in free


def test_required_call_forces_the_opening(chat: LocalChatModel, tokenizer: Any) -> None:
    model = chat.bind_tools([python, search], tool_choice="any")
    record = record_of(model.invoke("Hello"))
    assert record["forced"] == 1
    assert record["completion_ids"][0] == tokenizer.convert_tokens_to_ids("<tool_call>")
    assert record["log_probs"] == pytest.approx(
        teacher_forced(chat.model, record["prompt_ids"], record["completion_ids"]), abs=1e-4
    )


def test_named_call_forces_the_name(chat: LocalChatModel, tokenizer: Any) -> None:
    record = record_of(chat.bind_tools([python, search], tool_choice="search").invoke("Hello", max_new_tokens=50))
    opening = tokenizer.decode(record["completion_ids"][: record["forced"]])
    assert opening.startswith('<tool_call>\n{"name": "search"')


def test_any_of_one_tool_is_that_tool(chat: LocalChatModel) -> None:
    records = [
        record_of(chat.bind_tools([search], tool_choice=choice).invoke("Hello", max_new_tokens=50))
        for choice in ("any", "search")
    ]
    forced = records[0]["forced"]
    assert forced == records[1]["forced"] > 1
    assert records[0]["completion_ids"][:forced] == records[1]["completion_ids"][:forced]


def test_wrong_tool_choice_is_refused_when_bound(chat: LocalChatModel) -> None:
    with pytest.raises(UnknownToolError, match="'web'"):
        chat.bind_tools([python], tool_choice="web")


def test_seed_repeats_a_reply_alone_and_in_a_crowd(chat: LocalChatModel) -> None:
    async def crowd() -> list[AIMessage]:
        return await asyncio.gather(*[chat.ainvoke(f"Hello {n % 9}", seed=n) for n in range(64)])

    replies = asyncio.run(crowd())
    for number in (0, 13, 63):
        alone = chat.invoke(f"Hello {number % 9}", seed=number)
        assert record_of(alone)["completion_ids"] == record_of(replies[number])["completion_ids"]


def test_a_drawn_seed_is_recorded_and_repeats_the_reply(chat: LocalChatModel) -> None:
    first, second = chat.invoke("Hello"), chat.invoke("Hello")
    assert record_of(first)["completion_ids"] != record_of(second)["completion_ids"]
    again = chat.invoke("Hello", seed=record_of(first)["sampling"]["seed"])
    assert record_of(again)["completion_ids"] == record_of(first)["completion_ids"]


def test_the_models_own_generator_can_be_seeded(policy: Any, tokenizer: Any) -> None:
    def run() -> list[Any]:
        model = LocalChatModel(model=policy, tokenizer=tokenizer, temperature=1.0, max_new_tokens=6, rng_seed=1)
        return [record_of(model.invoke("Hello"))["completion_ids"] for _ in range(3)]

    first = run()
    assert first == run()
    assert first[0] != first[1]


def graph_of(chat: LocalChatModel) -> Any:
    """A run that calls the model twice, the second time with the first reply in the history."""

    async def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await chat.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("first", think)
    builder.add_node("second", think)
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile()


async def test_a_graph_run_passes_its_seed_and_its_calls_differ(chat: LocalChatModel) -> None:
    graph = graph_of(chat)

    async def run(seed: int) -> list[dict[str, Any]]:
        state = await graph.ainvoke({"messages": [HumanMessage("Hello")]}, {"configurable": {"seed": seed}})
        return [record_of(message) for message in state["messages"][1:]]

    (one, two), again, other = await run(1), await run(1), await run(2)
    assert [one["completion_ids"], two["completion_ids"]] == [record["completion_ids"] for record in again]
    assert one["completion_ids"] != other[0]["completion_ids"]
    assert two["continues"]
    assert one["sampling"]["seed"] == two["sampling"]["seed"] == 1


def test_a_config_outside_a_graph_passes_its_seed(chat: LocalChatModel) -> None:
    config: Any = {"configurable": {"seed": 11}}
    expected = record_of(chat.invoke("Hello", seed=11))["completion_ids"]
    assert record_of(chat.invoke("Hello", config))["completion_ids"] == expected
    assert record_of(asyncio.run(chat.ainvoke("Hello", config)))["completion_ids"] == expected
    bound = chat.bind_tools([python]).with_config(config)
    assert record_of(bound.invoke("Hello"))["sampling"]["seed"] == 11


def test_the_calls_own_seed_wins(chat: LocalChatModel) -> None:
    seeded = chat.model_copy(update={"seed": 1})
    config: Any = {"configurable": {"seed": 2}}
    seeds = [
        record_of(reply)["sampling"]["seed"]
        for reply in (seeded.invoke("?"), seeded.invoke("?", config), seeded.invoke("?", config, seed=3))
    ]
    assert seeds == [1, 2, 3]


async def test_concurrent_calls_share_a_batch(chat: LocalChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = chat._engine.run

    def counting(requests: Any, joining: Any) -> Any:
        sizes.append(len(requests))
        return run(requests, joining)

    monkeypatch.setattr(chat._batcher, "_run", counting)
    replies = await asyncio.gather(*[chat.ainvoke(f"Hello {number}") for number in range(64)])
    assert len(replies) == sum(sizes) == 64
    assert len(sizes) <= 4
    for reply in replies[::16]:
        record = record_of(reply)
        assert record["log_probs"] == pytest.approx(
            teacher_forced(chat.model, record["prompt_ids"], record["completion_ids"]), abs=1e-4
        )


def test_threads_get_their_own_replies(chat: LocalChatModel) -> None:
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda number: chat.invoke(f"Hello {number}", seed=number), range(32)))
    for number in (0, 17, 31):
        assert (
            record_of(replies[number])["completion_ids"]
            == record_of(chat.invoke(f"Hello {number}", seed=number))["completion_ids"]
        )


async def test_one_cancelled_call_leaves_the_others_alone(chat: LocalChatModel) -> None:
    tasks = [asyncio.create_task(chat.ainvoke(f"Hello {number}")) for number in range(8)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[3], asyncio.CancelledError)
    assert sum(isinstance(result, AIMessage) for result in results) == 7


async def test_a_failing_batch_reaches_every_caller(chat: LocalChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requests: Any, joining: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat._batcher, "_run", fail)
    results = await asyncio.gather(*[chat.ainvoke("Hello") for _ in range(5)], return_exceptions=True)
    assert [str(result) for result in results] == ["out of memory"] * 5


def test_one_bad_prompt_does_not_harm_the_others(chat: LocalChatModel) -> None:
    async def run() -> list[Any]:
        image = HumanMessage([{"type": "image", "url": "https://example.com/a.png"}])
        calls = [chat.ainvoke("Hello"), chat.ainvoke([image]), chat.ainvoke("Hello")]
        return await asyncio.gather(*calls, return_exceptions=True)

    fine, refused, also_fine = asyncio.run(run())
    assert isinstance(refused, InputError)
    assert isinstance(fine, AIMessage)
    assert isinstance(also_fine, AIMessage)


def test_reply_ends_with_the_context(chat: LocalChatModel) -> None:
    room = Engine(chat.model, chat.tokenizer).context_length
    assert room == 1024
    overhead = len(record_of(chat.invoke("a", max_new_tokens=1))["prompt_ids"]) - 1
    reply = chat.invoke("a" * (room - overhead - 2), max_new_tokens=50)
    assert len(record_of(reply)["completion_ids"]) <= 2
    with pytest.raises(InputError, match="1024 positions"):
        chat.invoke("a" * (room - overhead))


def test_stop_text_is_cut_from_the_reply(says: Any) -> None:
    reply = says("Hello world is").invoke("?", stop=[" world"])
    assert reply.content == "Hello"
    assert reply.response_metadata["finish_reason"] == "stop"
    assert len(record_of(reply)["completion_ids"]) == 2


def test_call_options_win_over_fields(chat: LocalChatModel) -> None:
    reply = chat.invoke("Hello", temperature=0.0, top_k=3, top_p=0.5, max_tokens=2)
    sampling = record_of(reply)["sampling"]
    assert (sampling["temperature"], sampling["top_k"], sampling["top_p"]) == (0.0, 3, 0.5)
    assert len(record_of(reply)["completion_ids"]) <= 2
    with pytest.raises(ConfigurationError, match="temperature=-1"):
        chat.invoke("Hello", temperature=-1)


def test_repr_and_parameters_do_not_spill_the_model(chat: LocalChatModel) -> None:
    assert "Qwen3" not in repr(chat)
    assert set(chat._identifying_params) == {"model_name", "weights_version", "temperature", "max_new_tokens"}


def test_tools_stay_in_a_direct_prompt_only_for_a_policy_that_was_trained_so(policy: Any, tokenizer: Any) -> None:
    assert not LocalChatModel(model=policy, tokenizer=tokenizer).offers_tools_when_direct
    assert LocalChatModel(model=policy, tokenizer=tokenizer, offers_tools_when_direct=True).offers_tools_when_direct
    trained = copy.deepcopy(policy)
    setattr(trained.config, OFFERS_TOOLS_WHEN_DIRECT, True)
    assert LocalChatModel(model=trained, tokenizer=tokenizer).offers_tools_when_direct


def test_streaming_gives_the_whole_reply(chat: LocalChatModel) -> None:
    (chunk,) = [chunk for chunk in chat.stream("Hello", seed=1) if chunk.response_metadata]
    assert record_of(chunk)["completion_ids"] == record_of(chat.invoke("Hello", seed=1))["completion_ids"]


async def test_calls_that_join_a_running_batch_get_the_replies_they_get_alone(chat: LocalChatModel) -> None:
    joining = LocalChatModel(
        model=chat.model, tokenizer=chat.tokenizer, temperature=1.0, linger=0.0, max_batch=8, continuous=True
    )

    async def two_turns(number: int) -> list[AIMessage]:
        limit = 1 + 5 * (number % 7)
        first = await joining.ainvoke(f"Hello {number}", seed=number, max_tokens=limit)
        return [first, await joining.ainvoke(f"Again {number}", seed=number, max_tokens=limit)]

    replies = await asyncio.gather(*[two_turns(number) for number in range(24)])
    for number in range(0, 24, 5):
        for text, reply in zip(("Hello", "Again"), replies[number], strict=True):
            alone = await joining.ainvoke(f"{text} {number}", seed=number, max_tokens=1 + 5 * (number % 7))
            assert record_of(reply)["completion_ids"] == record_of(alone)["completion_ids"]
            assert record_of(reply)["log_probs"] == pytest.approx(record_of(alone)["log_probs"], abs=1e-4)
