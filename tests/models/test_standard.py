"""LangChain's own suites, on a model that only ever says "Hello".

So of the integration suite the tests that judge obedience (a tool called on request, a valid structured
answer) are left to real models.
"""

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from metis_agent.models.local import LocalChatModel, _whole_chunk

from .conftest import biased, build_policy, build_tokenizer

TOKENIZER = build_tokenizer()
POLICY = biased(build_policy(TOKENIZER), TOKENIZER.convert_tokens_to_ids("Hello"))


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return LocalChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": POLICY, "tokenizer": TOKENIZER}


class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return LocalChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": POLICY, "tokenizer": TOKENIZER, "max_tokens": 10}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


async def test_a_chunk_is_the_whole_reply() -> None:
    model = LocalChatModel(model=POLICY, tokenizer=TOKENIZER, max_tokens=4, seed=1)
    reply = model.invoke("Say it.")
    for chunk in (list(model.stream("Say it.")), [part async for part in model.astream("Say it.")]):
        (only,) = chunk
        assert only.content == reply.content
        assert only.usage_metadata == reply.usage_metadata
        assert only.response_metadata.keys() == reply.response_metadata.keys()
    called = AIMessage(
        "x",
        tool_calls=[{"name": "python", "args": {"code": "1"}, "id": "1", "type": "tool_call"}],
        invalid_tool_calls=[
            {"name": "python", "args": '{"code": ', "id": "2", "error": "cut", "type": "invalid_tool_call"}
        ],
    )
    whole = _whole_chunk(called)
    assert whole.tool_calls == called.tool_calls
    assert [call["id"] for call in whole.invalid_tool_calls] == ["2"]
