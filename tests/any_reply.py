"""Whatever a model may return, as hypothesis makes it: calls that are sound, broken, unknown or cut short."""

import itertools

from hypothesis import strategies as st
from langchain_core.messages import AIMessage

NAMES = ("a", "b", "c")

sound = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "args": st.fixed_dictionaries({"x": st.integers(0, 2)}),
        "id": st.integers(0, 10**6).map(str),
    }
)
broken = st.fixed_dictionaries(
    {
        "name": st.sampled_from([*NAMES, "unknown", "", None]),
        "args": st.sampled_from([{"x": 1}, {}, {"x": "not a number"}, "x=1", None, 5, ["x"]]),
        "id": st.sampled_from(["1", "2", "", None]),
    }
)
unparsed = st.fixed_dictionaries(
    {
        "name": st.sampled_from([*NAMES, None]),
        "args": st.sampled_from(['{"x": ', None]),
        "id": st.sampled_from(["1", "5", None]),
        "error": st.sampled_from(["cut short", None]),
    }
)


@st.composite
def replies(draw):
    message = AIMessage(draw(st.sampled_from(["", " ", "text"])))
    message.tool_calls = draw(st.lists(st.one_of(sound, sound, sound, broken), max_size=4))
    message.invalid_tool_calls = draw(st.one_of(st.just([]), st.just([]), st.lists(unparsed, max_size=2)))
    return message


allowed_sets = st.one_of(st.just(NAMES), st.lists(st.sampled_from(NAMES), unique=True).map(tuple))


def check_repetitions(messages, outcomes, repeatable=("c",)):
    """Nothing runs twice in a row within a reply, or right after itself alone; rounds without news come to an end."""
    by_reply = [
        [o for o in outcomes if o.executed and o.call_id in {call["id"] for call in message.tool_calls}]
        for message in messages
        if isinstance(message, AIMessage)
    ]
    before, known, stale = [], set(), 0
    for ran in filter(None, by_reply):
        keys = [(o.tool, str(o.arguments)) for o in ran]
        once = [key for key in keys if key[0] not in repeatable]
        assert all(one != other or one[0] in repeatable for one, other in itertools.pairwise(keys))
        assert not (len(before) == 1 and once and keys[0] == before[0] == once[0])
        news = {(*key, o.content) for key, o in zip(keys, ran, strict=True)} - known
        stale = 0 if news or len(once) < len(keys) else stale + 1
        assert stale <= 3
        before, known = keys, known | news
