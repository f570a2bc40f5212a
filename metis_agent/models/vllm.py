"""`VLLMChatModel`: a chat model on a vLLM server that keeps what a trainer needs, token ids and log-probabilities.

Beside `local`, for models that are too large for this process or are served anyway. `ChatOpenAI` drops vLLM's
`prompt_token_ids` and `token_ids`; here they become the same token record that `LocalChatModel` leaves. Calls are
parsed from the text, so the server needs no tool parser. vLLM renders each prompt anew from messages: where that does
not repeat the sampled tokens exactly, a trajectory splits into segments, and all of them are trained on.

Serve with `vllm serve MODEL --logprobs-mode processed_logprobs`, or `trl vllm-serve`, which a trainer can update.
Fields as in vLLM 0.30 and TRL 1.16's own client: `return_token_ids`, `prompt_logprobs`, `continue_final_message`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, ToolCall
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import ensure_config
from pydantic import Field, PrivateAttr, SecretStr

from metis_agent.errors import InfrastructureError, InputError, MissingDependencyError
from metis_agent.models.tool_schemas import ToolSchemas, resolve_tool_choice
from metis_agent.models.wire import TOOL_CALL_OPENING, parse_reply
from metis_agent.types import TOKEN_RECORD

try:
    import openai
    from langchain_openai.chat_models.base import BaseChatOpenAI
except ImportError as missing:
    raise MissingDependencyError(
        f"VLLMChatModel needs {missing.name!r}; install it with: pip install 'metis-agent[vllm]'"
    ) from missing

__all__ = ["VLLMChatModel"]


class VLLMChatModel(BaseChatOpenAI):
    """A chat model on the OpenAI-compatible endpoint of a vLLM server.

    `base_url` ends in `/v1`; `model` is the name that the server was started with. A graph run passes its seed as
    `config["configurable"]["seed"]`. Replies are not streamed: a stream can lose token ids.

    A server that can't be reached, or that fails, raises `InfrastructureError`: a rollout is then left out and counted.
    """

    openai_api_key: SecretStr | None = Field(alias="api_key", default=SecretStr("EMPTY"))
    """vLLM asks for none unless it was started with one."""
    disable_streaming: bool = True
    weights_version: str = "0"
    """Recorded with every reply; a trainer sets it."""

    offers_tools_when_direct: ClassVar[bool] = True
    """A gate that decides "answer" keeps the tools in the prompt and passes `tool_choice="none"`."""

    _schemas: ToolSchemas = PrivateAttr(default_factory=ToolSchemas)

    @property
    def _llm_type(self) -> str:
        return "metis-vllm"

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools; choices as `LocalChatModel.bind_tools` has them, but a name forces only a call's opening.

        Raises:
            UnknownToolError: `tool_choice` names a tool that is not among `tools`.
        """
        schemas = self._schemas.convert(tools)
        return self.bind(tools=schemas, tool_choice=resolve_tool_choice(tool_choice, schemas), **kwargs)

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        choice = kwargs.pop("tool_choice", None) or "auto"
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        body: dict[str, Any] = {**(payload.get("extra_body") or {}), "return_token_ids": True}
        if payload.get("tools"):
            payload["tool_choice"] = "none"  # rendered into the prompt, and left to us to parse
        if choice == "none":
            body["bad_words"] = [TOOL_CALL_OPENING]
        elif choice != "auto":
            payload["messages"] = [*payload["messages"], {"role": "assistant", "content": TOOL_CALL_OPENING}]
            body |= {"add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 0}
        seed = ensure_config().get("configurable", {}).get("seed")
        if seed is not None and payload.get("seed") is None:
            # The calls of one run draw different numbers.
            payload["seed"] = zlib.crc32(f"{seed}/{len(payload['messages'])}".encode()) & 0x7FFFFFFF
        payload["extra_body"] = body
        payload["logprobs"] = True
        return payload

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _infrastructure(self.openai_api_base):
            result = super()._generate(messages, stop, run_manager, **kwargs)
        return self._finished(result, kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _infrastructure(self.openai_api_base):
            result = await super()._agenerate(messages, stop, run_manager, **kwargs)
        return self._finished(result, kwargs)

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        """Keep what the base class drops: the ids, and with them the log-probabilities."""
        found: dict[str, Any] = response if isinstance(response, dict) else response.model_dump(warnings=False)
        result: ChatResult = super()._create_chat_result(response, generation_info)
        for generation, choice in zip(result.generations, found["choices"], strict=True):
            generation.message.response_metadata[TOKEN_RECORD] = _ids(found, choice, str(self.openai_api_base))
        return result

    def _finished(self, result: ChatResult, options: Mapping[str, Any]) -> ChatResult:
        """The reply as text, calls and a whole token record."""
        choice = options.get("tool_choice") or "auto"
        return ChatResult(
            generations=[
                ChatGeneration(
                    message=self._message(generation.message, choice), generation_info=generation.generation_info
                )
                for generation in result.generations
            ],
            llm_output=result.llm_output,
        )

    def _message(self, message: BaseMessage, choice: str) -> AIMessage:
        assert isinstance(message, AIMessage)
        record: dict[str, Any] = message.response_metadata[TOKEN_RECORD]
        prompt_log_probs = record.pop("prompt_log_probs")
        text = str(message.text)
        if choice not in ("auto", "none"):
            text = TOOL_CALL_OPENING + text
            record |= _with_opening(record, prompt_log_probs)
        reply = parse_reply(text, calls=choice != "none", stop=())
        record |= {
            "sampling": {"temperature": self.temperature, "max_new_tokens": self.max_tokens, "tool_choice": choice},
            "weights_version": self.weights_version,
            "template_hash": "",
            "continues": False,
        }
        return AIMessage(
            content=reply.content,
            additional_kwargs={"reasoning_content": reply.reasoning} if reply.reasoning else {},
            tool_calls=[
                ToolCall(name=call["name"], args=call["args"], id=_call_id(message, place), type="tool_call")
                for place, call in enumerate(reply.tool_calls)
            ],
            invalid_tool_calls=[
                InvalidToolCall(
                    name=call["name"], args=call["args"], id=_call_id(message, -1 - place), error=call["error"],
                    type="invalid_tool_call",
                )
                for place, call in enumerate(reply.invalid_tool_calls)
            ],
            usage_metadata=message.usage_metadata,
            response_metadata={**message.response_metadata, TOKEN_RECORD: record},
            id=message.id,
        )  # fmt: skip


def _ids(found: Mapping[str, Any], choice: Mapping[str, Any], server: str) -> dict[str, Any]:
    prompt_ids, completion_ids = found.get("prompt_token_ids"), choice.get("token_ids")
    sampled = (choice.get("logprobs") or {}).get("content")
    if prompt_ids is None or completion_ids is None or sampled is None or len(sampled) != len(completion_ids):
        raise InfrastructureError(
            f"the server at {server!r} sent {len(completion_ids or ())} token ids and {len(sampled or ())} "
            "log-probabilities; it must send both for every token. Use vLLM 0.10 or newer, which knows "
            "return_token_ids."
        )
    return {
        "prompt_ids": list(prompt_ids),
        "completion_ids": list(completion_ids),
        "log_probs": [float(token["logprob"]) for token in sampled],
        "forced": 0,
        "prompt_log_probs": found.get("prompt_logprobs"),
    }


def _with_opening(record: Mapping[str, Any], prompt_log_probs: Sequence[Any] | None) -> dict[str, Any]:
    """Move the forced opening from the end of the prompt to the head of the completion."""
    prompt_ids, text = list(record["prompt_ids"]), ""
    log_probs: list[float] = []
    for token in reversed(prompt_ids):
        if text == TOOL_CALL_OPENING or prompt_log_probs is None:
            break
        entry = prompt_log_probs[len(prompt_ids) - 1 - len(log_probs)][str(token)]
        text = entry["decoded_token"] + text
        log_probs.insert(0, float(entry["logprob"]))
    if text != TOOL_CALL_OPENING:
        raise InfrastructureError(
            f"the prompt that the server sent back ends in {text!r}, not in the forced opening {TOOL_CALL_OPENING!r}: "
            "it must know continue_final_message and prompt_logprobs, and the template must leave the text as it is."
        )
    split = len(prompt_ids) - len(log_probs)
    return {
        "prompt_ids": prompt_ids[:split],
        "completion_ids": prompt_ids[split:] + record["completion_ids"],
        "log_probs": log_probs + record["log_probs"],
        "forced": len(log_probs),
    }


def _call_id(message: AIMessage, place: int) -> str:
    return f"call_{zlib.crc32(f'{message.id}/{place}'.encode()):08x}"


@contextmanager
def _infrastructure(server: str | None) -> Iterator[None]:
    """What the server does wrong is nothing that the model did."""
    try:
        yield
    except openai.BadRequestError as error:
        raise InputError(f"the server at {server!r} refused the request: {error}") from error
    except openai.OpenAIError as error:
        raise InfrastructureError(
            f"the server at {server!r} failed: {type(error).__name__}: {error}. Is it up, and is that its address?"
        ) from error
