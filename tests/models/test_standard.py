"""LangChain's own suites, on a model that only ever says "Hello".

So of the integration suite the tests that judge obedience (a tool called on request, a valid structured
answer) are left to real models.
"""

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from metis_agent.models.local import LocalChatModel

from .conftest import biased, build_policy, build_tokenizer

TOKENIZER = build_tokenizer()
POLICY = biased(build_policy(TOKENIZER), TOKENIZER.convert_tokens_to_ids("Hello"))
NOT_STREAMED = "a reply is whole or not at all: its record is about all of its tokens"


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

    @pytest.mark.xfail(reason=NOT_STREAMED)
    def test_stream(self, model: BaseChatModel) -> None:
        super().test_stream(model)

    @pytest.mark.xfail(reason=NOT_STREAMED)
    async def test_astream(self, model: BaseChatModel) -> None:
        await super().test_astream(model)

    @pytest.mark.xfail(reason=NOT_STREAMED)
    def test_usage_metadata_streaming(self, model: BaseChatModel) -> None:
        super().test_usage_metadata_streaming(model)
