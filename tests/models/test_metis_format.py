from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage

from metis_agent.models.metis_format import AS_WRITTEN, metis_prompt, to_metis_turns, up_to_call
from metis_agent.models.wire import parse_reply

PYTHON = {
    "type": "function",
    "function": {
        "name": "python", "description": "Run code.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}  # fmt: skip
IMAGE_SEARCH = {
    "type": "function",
    "function": {
        "name": "image_search", "description": "Find images.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "image": {"type": "string"}}},
    },
}  # fmt: skip
PICTURE = {"type": "image", "base64": "AAAA", "mime_type": "image/png"}
WRITTEN = '<reason>Too small.</reason>\n<tool_call>{"name": "python",  "arguments": {"code": "1"}}</tool_call>'


def reply(text: str) -> AIMessage:
    """As `ServedChatModel` reads it."""
    read = parse_reply(text)
    calls = [{"name": call["name"], "args": call["args"], "id": "c"} for call in read.tool_calls]
    return AIMessage(read.content, tool_calls=calls, additional_kwargs={AS_WRITTEN: text})


def contents(messages: list[BaseMessage]) -> list[tuple[str, object]]:
    return [(message.type, message.content) for message in to_metis_turns(messages)]


def test_the_prompt_shows_each_call_as_the_published_models_write_it() -> None:
    prompt = metis_prompt([PYTHON, IMAGE_SEARCH])
    assert '## python\nRun code.\n<tool_call>{"name": "python", "arguments": {"code": "..."}}</tool_call>' in prompt
    assert '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>' in prompt
    assert "<reason>...</reason>" in prompt
    assert "<answer>...</answer>" in prompt


def test_tools_stand_in_the_system_prompt_unless_that_has_them_already() -> None:
    question = HumanMessage("?")
    (system, asked) = to_metis_turns([SystemMessage("Be brief."), question], [PYTHON])
    assert str(system.text).startswith(metis_prompt([PYTHON]))
    assert str(system.text).endswith("Be brief.")
    assert asked == question
    published = SystemMessage("Use <tool_call>...</tool_call>.")
    assert to_metis_turns([published, question], [PYTHON]) == [published, question]
    assert to_metis_turns([question]) == [question]


def test_a_reply_goes_back_as_it_was_written_and_its_result_as_a_users_turn() -> None:
    shown = ToolMessage([{"type": "text", "text": "A crop."}, PICTURE], tool_call_id="c")
    asked = [{"type": "text", "text": "Which?"}, PICTURE]
    assert contents([HumanMessage(asked), reply(WRITTEN), shown, reply("<answer>7</answer>")]) == [
        ("human", asked),
        ("ai", WRITTEN),
        ("human", [{"type": "text", "text": "A crop."}, PICTURE]),
        ("ai", "<answer>7</answer>"),
    ]


def test_results_of_one_reply_are_one_turn_and_text_alone_is_a_string() -> None:
    results = [ToolMessage("one", tool_call_id="a"), ToolMessage([{"type": "text", "text": "two"}], tool_call_id="b")]
    assert contents([*results, HumanMessage("Go on.")]) == [("human", "one\ntwo"), ("human", "Go on.")]


def test_a_reply_that_was_changed_or_is_not_the_models_is_written_anew() -> None:
    stripped = reply(WRITTEN).model_copy(update={"tool_calls": [], "content": "7"})
    made = AIMessage(
        "Hm.",
        tool_calls=[{"name": "python", "args": {"code": "2"}, "id": "x"}],
        additional_kwargs={"reasoning_content": "Sure."},
    )
    assert contents([stripped, made]) == [
        ("ai", "<answer>7</answer>"),
        ("ai", '<reason>Sure.</reason>\nHm.\n<tool_call>{"name": "python", "arguments": {"code": "2"}}</tool_call>'),
    ]


def test_what_a_model_says_of_a_result_that_it_can_not_know_is_cut() -> None:
    assert up_to_call(WRITTEN + "\nuser\nThe crop shows 9.\n<answer>9</answer>") == WRITTEN
    assert up_to_call("<answer>9</answer>") == "<answer>9</answer>"
