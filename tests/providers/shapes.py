"""The shapes in which providers' clients give messages: real clients, each made once, all on one loopback server."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel

from tests.providers.claude_wire import Converse, Messages
from tests.providers.gemini_wire import GenerateContent
from tests.providers.openai_wire import Chat, ClaudeChat, Responses
from tests.providers.server import Wire

__all__ = ["DIALECTS", "SHAPES", "Shape"]

DIALECTS = (Chat, ClaudeChat, Responses, Messages, Converse, GenerateContent)


def _openai(path: str = "openai", model: str = "gpt-4o", **options: Any) -> Callable[[str], BaseChatModel]:
    def make(url: str) -> BaseChatModel:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model=model, base_url=f"{url}/{path}", api_key="x", max_retries=0, **options)

    return make


def _responses(**options: Any) -> Callable[[str], BaseChatModel]:
    return _openai(model="gpt-5", use_responses_api=True, **options)


def _anthropic(**options: Any) -> Callable[[str], BaseChatModel]:
    def make(url: str) -> BaseChatModel:
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(
            model="claude-sonnet-4-5", base_url=f"{url}/anthropic", api_key="x", max_retries=0, **options
        )

    return make


def _gemini(**options: Any) -> Callable[[str], BaseChatModel]:
    def make(url: str) -> BaseChatModel:
        from langchain_google_genai import ChatGoogleGenerativeAI

        return ChatGoogleGenerativeAI(model="gemini-3-pro", base_url=url, api_key="x", max_retries=1, **options)

    return make


def _bedrock(**options: Any) -> Callable[[str], BaseChatModel]:
    def make(url: str) -> BaseChatModel:
        import boto3
        from botocore.config import Config
        from langchain_aws import ChatBedrockConverse

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client = boto3.client(
                "bedrock-runtime", region_name="us-east-1", endpoint_url=url, aws_access_key_id="x",
                aws_secret_access_key="x", config=Config(retries={"max_attempts": 0}, proxies={}),
            )  # fmt: skip
        return ChatBedrockConverse(
            model="anthropic.claude-sonnet-4-5-20250929-v1:0", client=client, bedrock_client=client,
            region_name="us-east-1", **options,
        )  # fmt: skip

    return make


_THINKS = {"type": "enabled", "budget_tokens": 1024}


@dataclass(frozen=True)
class Shape:
    """One client, as somebody has set it up."""

    make: Callable[[str], BaseChatModel]
    search: Mapping[str, Any] | None = None
    """The provider's own web search, as its client takes it among the tools."""
    free_tools: bool = False
    """True where OpenAI's free-form tools may be used."""
    text_results: bool = False
    """True where a tool's result may hold nothing but text."""
    thinks: bool = False
    """True where every reply begins with a thought."""

    def start(self, wire: Wire) -> BaseChatModel:
        """The client."""
        return self.make(wire.url)


_WEB: Mapping[str, Any] = {"type": "web_search"}
_CLAUDE_WEB: Mapping[str, Any] = {"type": "web_search_20250305", "name": "web_search"}
_ENCRYPTED: Mapping[str, Any] = {
    "store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"},
}  # fmt: skip

SHAPES: Mapping[str, Shape] = {
    "chat": Shape(_openai(), text_results=True),
    "chat-v1": Shape(_openai(output_version="v1"), text_results=True),
    "chat-of-claude": Shape(_openai("claude", "claude-sonnet"), text_results=True),
    "responses": Shape(_responses(output_version="responses/v1"), search=_WEB, free_tools=True),
    "responses-v0": Shape(_responses(output_version="v0"), search=_WEB),
    "responses-v1-reasoning": Shape(_responses(output_version="v1", **_ENCRYPTED), search=_WEB, thinks=True),
    "responses-stored": Shape(
        _responses(output_version="responses/v1", use_previous_response_id=True, reasoning={"effort": "low"}),
        search=_WEB, free_tools=True, thinks=True,
    ),
    "anthropic": Shape(_anthropic(), search=_CLAUDE_WEB),
    "anthropic-thinking": Shape(_anthropic(thinking=_THINKS, max_tokens=2048), search=_CLAUDE_WEB, thinks=True),
    "anthropic-v1-thinking": Shape(
        _anthropic(thinking=_THINKS, max_tokens=2048, output_version="v1"), search=_CLAUDE_WEB, thinks=True
    ),
    "gemini": Shape(_gemini(), search={"google_search": {}}),
    "gemini-v1-thinking": Shape(
        _gemini(output_version="v1", include_thoughts=True), search={"google_search": {}}, thinks=True
    ),
    "bedrock": Shape(_bedrock()),
    "bedrock-thinking": Shape(
        _bedrock(additional_model_request_fields={"thinking": dict(_THINKS)}, max_tokens=2048), thinks=True
    ),
}  # fmt: skip
