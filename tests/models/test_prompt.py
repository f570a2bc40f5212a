from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from tokenizers import pre_tokenizers

from metis_agent.models.chat_tokenizer import ChatTokenizer
from metis_agent.models.local import LocalChatModel
from metis_agent.models.prompt import PromptBuilder
from metis_agent.types import TOKEN_RECORD

from .conftest import PYTHON, STRIPS_THINKING, build_tokenizer

CALL = '<tool_call>{"name":"python",  "arguments":{"code":"1+1"}}</tool_call>'
"""Spaced unlike the template, so that rendering it again gives other tokens."""


def record_of(message: BaseMessage) -> dict[str, Any]:
    record: dict[str, Any] = message.response_metadata[TOKEN_RECORD]
    return record


def extends(later: AIMessage, earlier: AIMessage) -> bool:
    """The definition of a continuing prompt."""
    before = record_of(earlier)
    exact = [*before["prompt_ids"], *before["completion_ids"]]
    return bool(record_of(later)["prompt_ids"][: len(exact)] == exact)


def result_of(message: AIMessage) -> ToolMessage:
    return ToolMessage("2", tool_call_id=message.tool_calls[0]["id"])


@pytest.fixture
def builder(tokenizer: Any) -> PromptBuilder:
    return PromptBuilder(ChatTokenizer(tokenizer, eos_ids=frozenset({tokenizer.eos_token_id})))


def test_first_prompt_is_the_template_encoded(builder: PromptBuilder, tokenizer: Any) -> None:
    messages = [SystemMessage("Hello"), HumanMessage(" world"), AIMessage("is"), HumanMessage("?")]
    prompt = builder.build(messages, [PYTHON])
    chat = [
        {"role": "system", "content": "Hello"}, {"role": "user", "content": " world"},
        {"role": "assistant", "content": "is"}, {"role": "user", "content": "?"},
    ]  # fmt: skip
    whole = tokenizer.apply_chat_template(chat, tools=[PYTHON], add_generation_prompt=True)["input_ids"]
    assert list(prompt.ids) == whole
    assert not prompt.continues


def test_several_turns_chain_exactly(says: Any) -> None:
    model = says(CALL, "Hello world", "is").bind_tools([PYTHON])
    messages: list[BaseMessage] = [SystemMessage("Hello"), HumanMessage("1+1?")]
    first = model.invoke(messages)
    messages += [first, result_of(first)]
    second = model.invoke(messages)
    messages += [second, HumanMessage("And?")]
    third = model.invoke(messages)
    assert [record_of(reply)["continues"] for reply in (first, second, third)] == [False, True, True]
    assert extends(second, first)
    assert extends(third, second)


def test_only_what_came_after_is_new(says: Any, tokenizer: Any) -> None:
    model = says(CALL, "Hello").bind_tools([PYTHON])
    first = model.invoke("1+1?")
    second = model.invoke([HumanMessage("1+1?"), first, result_of(first)])
    before = record_of(first)
    rest = record_of(second)["prompt_ids"][len(before["prompt_ids"]) + len(before["completion_ids"]) :]
    # The newline after <|im_end|> is the template's, not the model's.
    assert tokenizer.decode(rest) == "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"


def test_a_cut_reply_gets_its_end_of_turn(chat: LocalChatModel, tokenizer: Any) -> None:
    first = chat.invoke("Hello", max_new_tokens=1)
    first_record = record_of(first)
    assert first.response_metadata["finish_reason"] == "length"
    second = chat.invoke([HumanMessage("Hello"), first, HumanMessage("?")])
    assert extends(second, first)
    cut = len(first_record["prompt_ids"]) + 1
    assert tokenizer.decode(record_of(second)["prompt_ids"][cut:]).startswith("<|im_end|>\n<|im_start|>user\n?")


def test_content_blocks_of_output_version_v1_continue(says: Any) -> None:
    blocks = says(CALL, "Hello").model_copy(update={"output_version": "v1"}).bind_tools([PYTHON])
    first = blocks.invoke("1+1?")
    assert first.content[0]["type"] == "tool_call"
    second = blocks.invoke([HumanMessage("1+1?"), first, result_of(first)])
    assert second.content == [{"type": "text", "text": "Hello"}]
    assert extends(second, first)
    assert record_of(second)["continues"]


def test_a_malformed_call_continues(says: Any) -> None:
    model = says('<tool_call>{"name": "python"', "Hello").bind_tools([PYTHON])
    first = model.invoke("1+1?")
    assert first.invalid_tool_calls
    assert extends(model.invoke([HumanMessage("1+1?"), first, HumanMessage("Mend it.")]), first)


def test_parallel_calls_continue(says: Any) -> None:
    model = says(CALL + CALL, "Hello").bind_tools([PYTHON])
    first = model.invoke("1+1?")
    results = [ToolMessage("2", tool_call_id=call["id"]) for call in first.tool_calls]
    second = model.invoke([HumanMessage("1+1?"), first, *results])
    assert record_of(second)["continues"]
    assert extends(second, first)


@pytest.mark.parametrize(
    "edit",
    [
        lambda history: [HumanMessage("2+2?"), *history[1:]],
        lambda history: [SystemMessage("Hello"), *history],
        lambda history: [history[0], history[1].model_copy(update={"content": "other"}), *history[2:]],
        lambda history: [history[0], history[1].model_copy(update={"tool_calls": []}), *history[2:]],
        lambda history: [
            history[0],
            AIMessage(history[1].content, tool_calls=history[1].tool_calls),
            *history[2:],
        ],
    ],
    ids=["question changed", "system added", "reply changed", "call stripped", "record lost"],
)
def test_an_edited_history_is_rendered_anew(says: Any, edit: Any) -> None:
    model = says(CALL, "Hello").bind_tools([PYTHON])
    first = model.invoke("1+1?")
    history = edit([HumanMessage("1+1?"), first, result_of(first)])
    second = model.invoke(history)
    assert not record_of(second)["continues"]
    assert not extends(second, first)


def test_other_tools_make_another_prompt(says: Any) -> None:
    model = says(CALL, "Hello")
    first = model.bind_tools([PYTHON]).invoke("1+1?")
    history = [HumanMessage("1+1?"), first, result_of(first)]
    assert not record_of(model.invoke(history))["continues"]
    # With the tools kept and calling forbidden the prompt continues.
    assert record_of(model.bind_tools([PYTHON], tool_choice="none").invoke(history))["continues"]


def test_a_call_written_where_calls_are_forbidden_is_text_in_the_next_turn_too(says: Any) -> None:
    model = says(CALL, "Hello").bind_tools([PYTHON], tool_choice="none")
    first = model.invoke("1+1?")
    assert first.tool_calls == []
    assert first.content == CALL
    assert record_of(model.invoke([HumanMessage("1+1?"), first, HumanMessage("?")]))["continues"]


def thinker(says: Any, template: str, *texts: str) -> Any:
    scripted = says(*texts)
    return LocalChatModel(
        model=scripted.model, tokenizer=build_tokenizer(template), temperature=1.0, max_new_tokens=200
    )


def test_a_template_that_strips_thinking_falls_back(says: Any) -> None:
    model = thinker(says, STRIPS_THINKING, "<think>the</think>Hello", "<think>is</think> world")
    first = model.invoke("1?")
    assert first.additional_kwargs["reasoning_content"] == "the"
    second = model.invoke([HumanMessage("1?"), first, HumanMessage("2?")])
    assert not record_of(second)["continues"]
    assert "the" not in model.tokenizer.decode(record_of(second)["prompt_ids"])


def test_a_template_that_strips_thinking_continues_where_there_was_none(says: Any) -> None:
    model = thinker(says, STRIPS_THINKING, "Hello", " world")
    first = model.invoke("1?")
    assert extends(model.invoke([HumanMessage("1?"), first, HumanMessage("2?")]), first)


def test_a_template_that_knows_no_reasoning_continues_with_it(says: Any) -> None:
    # Metis's <reason> block on an instruct model's template: the tokens keep what messages can't say.
    model = says(f"<reason>the answer</reason>{CALL}", "Hello").bind_tools([PYTHON])
    first = model.invoke("1+1?")
    second = model.invoke([HumanMessage("1+1?"), first, result_of(first)])
    assert extends(second, first)
    assert record_of(second)["continues"]


def test_a_spelled_out_end_of_turn_is_no_place_to_continue(chat: LocalChatModel, tokenizer: Any) -> None:
    first = chat.invoke("Hello")
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "<|im_end|>"]
    record = {**record_of(first), "completion_ids": [*spelled, tokenizer.eos_token_id]}
    metadata = {**first.response_metadata, TOKEN_RECORD: record}
    forged = AIMessage("<|im_end|>", response_metadata=metadata)
    second = chat.invoke([HumanMessage("Hello"), forged, HumanMessage("?")])
    assert not record_of(second)["continues"]


def test_a_tokenizer_that_marks_beginnings_is_never_split(policy: Any) -> None:
    tokenizer = build_tokenizer()
    split = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="~", prepend_scheme="first"), split]
    )
    model = LocalChatModel(model=policy, tokenizer=tokenizer, max_new_tokens=2)
    first = model.invoke("Hello")
    second = model.invoke([HumanMessage("Hello"), first, HumanMessage("?")])
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert record_of(first)["prompt_ids"] == whole
    assert not record_of(second)["continues"]


def test_a_record_of_another_process_continues_too(says: Any) -> None:
    model = says(CALL, "Hello", "is").bind_tools([PYTHON])
    messages: list[BaseMessage] = [HumanMessage("1+1?")]
    first = model.invoke(messages)
    messages += [first, result_of(first)]
    second = model.invoke(messages)
    messages += [second, HumanMessage("And?")]
    scripted = says("is")
    fresh = LocalChatModel(model=scripted.model, tokenizer=build_tokenizer(), max_new_tokens=5).bind_tools([PYTHON])
    third = fresh.invoke(messages)
    assert record_of(third)["continues"]
    assert extends(third, second)
    assert not record_of(fresh.invoke([HumanMessage("2+2?"), *messages[1:]]))["continues"]
