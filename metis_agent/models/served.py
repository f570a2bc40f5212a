"""`ServedChatModel`: a chat model behind an OpenAI-compatible address, such as that of `transformers serve`.

Beside `local`, for models that are served; its subclass `vllm.VLLMChatModel` also keeps token ids, which this one does
not: its runs train gates, not models. Calls are parsed from the text, so the server needs no tool parser, and one that
has a parser does no harm. With `wire="metis"` the conversation goes out as Accio-Lab/Metis-8B-RL was trained on it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, ToolCall
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import ensure_config
from pydantic import Field, PrivateAttr, SecretStr

from metis_agent.errors import InfrastructureError, InputError, MissingDependencyError
from metis_agent.models.metis_format import AS_WRITTEN, to_metis_turns, up_to_call
from metis_agent.models.wire import Reply, ToolSchemas, names_of, parse_reply, resolve_tool_choice
from metis_agent.types import UNMET

try:
    import openai
    from langchain_openai.chat_models.base import BaseChatOpenAI
except ImportError as missing:
    raise MissingDependencyError(
        f"A served chat model needs {missing.name!r}; install it with: pip install 'langgraph-metis[vllm]'"
    ) from missing

_REQUIRED = "required_of_the_server"

__all__ = ["Ask", "ServedChatModel", "Steps"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to the server: a chat with these options, or a body for its completions."""

    options: Mapping[str, Any]
    messages: list[BaseMessage] | None = None
    """Of the chat; by default the conversation."""
    completions: bool = False

    def chat(self, conversation: list[BaseMessage]) -> list[BaseMessage]:
        """The messages to send."""
        return conversation if self.messages is None else self.messages


Steps = Generator[Ask, Any, ChatResult]
"""What it takes to get a reply: yields requests, gets what the server said (a `ChatResult`, or a dict)."""


class ServedChatModel(BaseChatOpenAI):
    """A chat model on an OpenAI-compatible endpoint.

    `base_url` ends in `/v1`; `model` is the name that the server was started with. A graph run passes its seed as
    `config["configurable"]["seed"]`. Replies are not streamed.

    Where a call is required and the model writes none, the server's own `tool_choice` is tried, and where that does
    nothing, the call is begun for the model: llama.cpp's server goes on with what the assistant has begun. Others may
    do neither: where none of the first three that were begun was made, no more are. None can be kept from writing a
    call: the graph runs no call that was not allowed, and where a call is required, the model may still answer.

    A server that can't be reached, or that fails, raises `InfrastructureError`: a rollout is then left out and counted.
    """

    openai_api_key: SecretStr | None = Field(alias="api_key", default=SecretStr("EMPTY"))
    """Most local servers ask for none."""
    disable_streaming: bool = True
    http_async_client: Any = Field(default_factory=lambda: _client_of_any_loop(), exclude=True)
    """By default one that keeps no connection: those belong to an event loop, and each wave of rollouts has its own."""
    wire: Literal["template", "metis"] = "template"
    """How the conversation is written: by the server's chat template, tools and all; or in plain turns with the tools
    in the system prompt, as the published Metis models have it (`models.metis_format`)."""
    offers_tools_when_direct: bool | None = None
    """Whether the tools stay in the prompt where a gate decides "answer". Right for a policy that was trained so: other
    models then write their call in other words. `None`: for `wire="metis"`, which always has them there."""

    _schemas: ToolSchemas = PrivateAttr(default_factory=ToolSchemas)
    _own_tool_choice: str | None = PrivateAttr(default=None)
    """What the server is told where calls are ours to parse; most need not be told."""
    _requires: bool = PrivateAttr(default=True)
    """False once the server has refused to require a call, or has required none where one that was begun was made."""
    _tries: float = PrivateAttr(default=3)
    """How many calls may still be begun in vain: no end of them once one was made, 0 where the server has refused one
    or a subclass begins its calls itself."""

    def model_post_init(self, context: Any, /) -> None:
        """Settle what depends on another setting."""
        super().model_post_init(context)
        if self.offers_tools_when_direct is None:
            self.offers_tools_when_direct = self.wire == "metis"

    @property
    def _llm_type(self) -> str:
        return "metis-served"

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools.

        Raises:
            UnknownToolError: `tool_choice` names a tool that is not among `tools`.
        """
        schemas = self._schemas.convert(tools)
        return self.bind(tools=schemas, tool_choice=resolve_tool_choice(tool_choice, schemas), **kwargs)

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs.pop("tool_choice", None)  # calls are ours to parse
        required = kwargs.pop(_REQUIRED, None)
        if self.wire == "metis":
            messages = self._convert_input(input_).to_messages()
            input_ = to_metis_turns(messages, kwargs.pop("tools", None) or ())
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        if payload.get("tools") and (told := required or self._own_tool_choice):
            payload["tool_choice"] = told
        seed = ensure_config().get("configurable", {}).get("seed")
        if seed is not None and payload.get("seed") is None:
            # The calls of one run draw different numbers.
            payload["seed"] = (
                zlib.crc32(f"{seed}/{len(payload['messages'])}".encode(errors="surrogatepass")) & 0x7FFFFFFF
            )
        return payload

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        steps = self._steps(messages, stop, kwargs)
        answer: Any = None
        while True:
            try:
                ask = steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer)
            except StopIteration as end:
                return _result_of(end)
            try:
                with _infrastructure(self.openai_api_base):
                    if ask.completions:
                        self._ensure_sync_client_available()
                        answer = self.root_client.completions.create(**ask.options).model_dump(warnings=False)
                    else:
                        answer = super()._generate(ask.chat(messages), stop, run_manager, **ask.options)
            except InputError as refused:
                answer = refused

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        steps = self._steps(messages, stop, kwargs)
        answer: Any = None
        while True:
            try:
                ask = steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer)
            except StopIteration as end:
                return _result_of(end)
            try:
                with _infrastructure(self.openai_api_base):
                    if ask.completions:
                        reply = await self.root_async_client.completions.create(**ask.options)
                        answer = reply.model_dump(warnings=False)
                    else:
                        answer = await super()._agenerate(ask.chat(messages), stop, run_manager, **ask.options)
            except InputError as refused:
                answer = refused

    def _steps(self, messages: list[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]) -> Steps:
        """A reply, with the call that was required where the model or its server can be brought to write it."""
        choice = options.get("tool_choice") or "auto"
        result = self._finished((yield from self._first(messages, stop, options)), options)
        if choice in ("auto", "none") or _called(result, names_of(options["tools"])):
            return result
        if self._requires and self.wire == "template":
            required = "required" if choice == "any" else {"type": "function", "function": {"name": choice}}
            try:
                second = yield from self._required(messages, {**options, _REQUIRED: required})
                second = self._finished(second, options)
                if _called(second, names_of(options["tools"])):
                    return second
            except InputError:
                self._requires = False
        if self._tries > 0 and self.wire == "template":
            try:
                begun = self._finished((yield from self._begun(messages, options)), options)
                if _called(begun, names_of(options["tools"])):
                    self._requires, self._tries = False, inf
                    return begun
                self._tries -= 1
            except InputError:
                self._tries = 0
        for generation in result.generations:
            generation.message.response_metadata[UNMET] = choice
        return result

    def _first(self, messages: list[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]) -> Steps:
        """The reply, before it is known whether it has the call that was required."""
        try:
            result: ChatResult = yield Ask(options=options)
        except InputError as refused:
            # vLLM without a tool parser leaves calls to the model only where it is told not to look for them.
            if not options.get("tools") or self._own_tool_choice or "tool" not in str(refused):
                raise
            self._own_tool_choice = "none"
            result = yield Ask(options=options)
        return result

    def _required(self, messages: list[BaseMessage], options: Mapping[str, Any]) -> Steps:
        """The reply that the server makes a call."""
        result: ChatResult = yield Ask(options=options)
        return result

    def _begun(self, messages: list[BaseMessage], options: Mapping[str, Any]) -> Steps:
        """The reply that goes on from a call's opening, where the server goes on with the assistant's own words."""
        choice, names = options["tool_choice"], names_of(options["tools"])
        named = names if choice == "any" else {choice}
        opening = '{"name": "' + (f'{next(iter(named))}", "arguments":' if len(named) == 1 else "")
        result: ChatResult = yield Ask(options=options, messages=[*messages, AIMessage(opening)])
        for message in [generation.message for generation in result.generations]:
            assert isinstance(message, AIMessage)
            # Some servers repeat what was begun.
            if not message.tool_calls and not str(message.text).startswith(opening):
                message.content = opening + str(message.text)
        return result

    def _finished(self, result: ChatResult, options: Mapping[str, Any]) -> ChatResult:
        """The reply as text and calls."""
        choice = options.get("tool_choice") or "auto"
        finished = []
        for generation in result.generations:
            assert isinstance(generation.message, AIMessage)
            message = self._message(generation.message, choice, names_of(options.get("tools")))
            finished.append(ChatGeneration(message=message, generation_info=generation.generation_info))
        return ChatResult(generations=finished, llm_output=result.llm_output)

    def _message(self, message: AIMessage, choice: str, offered: frozenset[str]) -> AIMessage:
        # Nothing bans a call here, so one that was not wanted is still read as one; the graph does not run it.
        return self._read(message, str(message.text), calls=True, offered=offered)

    def _read(self, message: AIMessage, text: str, *, calls: bool, offered: frozenset[str]) -> AIMessage:
        """The message that `text` is, with the usage and metadata of the server's."""
        kept: dict[str, Any] = {}
        if self.wire == "metis":
            # Not asked of the server: `transformers serve` fails on a stop text where the model reads images.
            text = up_to_call(text)
            kept[AS_WRITTEN] = text
        reply = parse_reply(text, calls=calls, offered=offered)
        reasoning = reply.reasoning or message.additional_kwargs.get("reasoning_content")
        if reasoning:
            kept["reasoning_content"] = reasoning
        return AIMessage(
            content=reply.content,
            additional_kwargs=kept,
            tool_calls=_calls(message, reply) if calls else [],
            invalid_tool_calls=[
                InvalidToolCall(
                    name=call["name"], args=call["args"], id=_call_id(message, -1 - place), error=call["error"],
                    type="invalid_tool_call",
                )
                for place, call in enumerate(reply.invalid_tool_calls)
            ],
            usage_metadata=message.usage_metadata,
            response_metadata=message.response_metadata,
            id=message.id,
        )  # fmt: skip


def _client_of_any_loop() -> Any:
    limits: Any = type(openai.DEFAULT_CONNECTION_LIMITS)  # of whichever HTTP library this version of openai uses
    return openai.DefaultAsyncHttpxClient(limits=limits(max_connections=1000, max_keepalive_connections=0))


def _result_of(end: StopIteration) -> ChatResult:
    result: ChatResult = end.value
    return result


def _called(result: ChatResult, offered: frozenset[str]) -> bool:
    """Whether the reply calls a tool that was offered."""
    messages = [generation.message for generation in result.generations]
    return all(
        isinstance(message, AIMessage) and any(call["name"] in offered for call in message.tool_calls)
        for message in messages
    )


def _calls(message: AIMessage, reply: Reply) -> list[ToolCall]:
    """The calls in the text; where there are none, those that the server's own parser took out of it."""
    found = [ToolCall(name=call["name"], args=call["args"], id=None) for call in reply.tool_calls]
    if not found:
        found = [ToolCall(name=call["name"], args=call["args"], id=None) for call in message.tool_calls]
    return [
        ToolCall(name=call["name"], args=call["args"], id=_call_id(message, place), type="tool_call")
        for place, call in enumerate(found)
    ]


def _call_id(message: AIMessage, place: int) -> str:
    return f"call_{zlib.crc32(f'{message.id}/{place}'.encode()):08x}"


@contextmanager
def _infrastructure(server: str | None) -> Iterator[None]:
    """What the server does wrong is nothing that the model did."""
    try:
        yield
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise InputError(f"the server at {server!r} refused the request: {error}") from error
    except (openai.OpenAIError, json.JSONDecodeError) as error:
        raise InfrastructureError(
            f"the server at {server!r} failed: {type(error).__name__}: {error}. Is it up, and is that its address?"
        ) from error
