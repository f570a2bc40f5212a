"""`VLLMChatModel`: a chat model on a vLLM server that keeps what a trainer needs, token ids and log-probabilities.

Beside `local`, for models that are too large for this process or are served anyway. `ChatOpenAI` drops vLLM's
`prompt_token_ids` and `token_ids`; here they become the same token record that `LocalChatModel` leaves. Calls are
parsed from the text, so the server needs no tool parser. vLLM renders each prompt anew from messages: where that does
not repeat the sampled tokens exactly, a trajectory splits into segments, and all of them are trained on.

Serve with `vllm serve MODEL --logprobs-mode processed_logprobs`, or `trl vllm-serve`, which a trainer can update.
Fields as in vLLM 0.30 and TRL 1.16's own client: `return_token_ids`, `prompt_logprobs`, `continue_final_message`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatResult

from metis_agent.errors import InfrastructureError
from metis_agent.models.metis_format import CALL_ENDING
from metis_agent.models.served import ServedChatModel
from metis_agent.models.wire import TOOL_CALL_OPENING
from metis_agent.types import TOKEN_RECORD

__all__ = ["VLLMChatModel"]


class VLLMChatModel(ServedChatModel):
    """A chat model on the OpenAI-compatible endpoint of a vLLM server.

    As `ServedChatModel`, and a call can be forced or banned: `tool_choice` as `LocalChatModel.bind_tools` has it, but a
    name forces only a call's opening. Replies are not streamed: a stream can lose token ids.
    """

    weights_version: str = "0"
    """Recorded with every reply; a trainer sets it."""

    @property
    def offers_tools_when_direct(self) -> bool:
        """A gate that decides "answer" keeps the tools in the prompt and passes `tool_choice="none"`."""
        return True

    @property
    def _llm_type(self) -> str:
        return "metis-vllm"

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        choice = kwargs.get("tool_choice") or "auto"
        if self.wire == "metis":
            stop = [*(stop or ()), CALL_ENDING]
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        body: dict[str, Any] = {**(payload.get("extra_body") or {}), "return_token_ids": True}
        if payload.get("tools"):
            payload["tool_choice"] = "none"  # rendered into the prompt, and left to us to parse
        if self.wire == "metis":
            body["include_stop_str_in_output"] = True
        if choice == "none":
            body["bad_words"] = [TOOL_CALL_OPENING]
        elif choice != "auto":
            payload["messages"] = [*payload["messages"], {"role": "assistant", "content": TOOL_CALL_OPENING}]
            body |= {"add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 0}
        payload["extra_body"] = body
        payload["logprobs"] = True
        return payload

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        """Keep what the base class drops: the ids, and with them the log-probabilities."""
        found: dict[str, Any] = response if isinstance(response, dict) else response.model_dump(warnings=False)
        result: ChatResult = super()._create_chat_result(response, generation_info)
        for generation, choice in zip(result.generations, found["choices"], strict=True):
            generation.message.response_metadata[TOKEN_RECORD] = _ids(found, choice, str(self.openai_api_base))
        return result

    def _message(self, message: AIMessage, choice: str) -> AIMessage:
        record: dict[str, Any] = message.response_metadata[TOKEN_RECORD]
        prompt_log_probs = record.pop("prompt_log_probs")
        text = str(message.text)
        if choice not in ("auto", "none"):
            text = TOOL_CALL_OPENING + text
            record |= _with_opening(record, prompt_log_probs)
        record |= {
            "sampling": {"temperature": self.temperature, "max_new_tokens": self.max_tokens, "tool_choice": choice},
            "weights_version": self.weights_version,
            "template_hash": "",
            "continues": False,
        }
        return self._read(message, text, calls=choice != "none")


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
