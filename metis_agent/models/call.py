"""One call of the local model: what it asked for, and the message that its completion becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall
from langchain_core.messages.ai import UsageMetadata

from metis_agent.models.completions import Completion, GenerationRequest
from metis_agent.models.prompt import Prompt
from metis_agent.models.wire import Reply, parse_reply
from metis_agent.types import TOKEN_RECORD

__all__ = ["Call"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call must remember until its completion is there."""

    request: GenerationRequest
    prompt: Prompt
    seed: int
    choice: str
    weights_version: str

    def record(self, completion: Completion) -> dict[str, Any]:
        """The token record, as `metis_agent.types.TOKEN_RECORD` documents it."""
        sampling = self.request.sampling
        no_call = self.choice == "none" and sampling.banned
        return {
            "prompt_ids": list(self.prompt.ids),
            "completion_ids": completion.ids,
            "log_probs": completion.log_probs,
            **({"allowed_log_probs": completion.allowed_log_probs} if no_call else {}),
            "forced": min(len(sampling.forced), len(completion.ids)),
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "seed": self.seed,
                "max_new_tokens": self.request.max_new_tokens,
                "tool_choice": self.choice,
                "stop": list(self.request.stop),
            },
            "weights_version": self.weights_version,
            "template_hash": self.prompt.template_hash,
            "continues": self.prompt.continues,
            "images": [image.digest for image in self.prompt.images],
        }

    def message(self, completion: Completion, text: str, *, model_name: str) -> AIMessage:
        """The reply as a LangChain message, token record included.

        Args:
            completion: The tokens.
            text: The same decoded, without an end-of-turn token.
            model_name: For `response_metadata`.
        """
        reply = parse_reply(text, calls=self.choice != "none", stop=self.request.stop)
        return AIMessage(
            content=reply.content,
            additional_kwargs={"reasoning_content": reply.reasoning} if reply.reasoning else {},
            tool_calls=_tool_calls(reply),
            invalid_tool_calls=_invalid_tool_calls(reply),
            usage_metadata=UsageMetadata(
                input_tokens=len(self.prompt.ids),
                output_tokens=len(completion.ids),
                total_tokens=len(self.prompt.ids) + len(completion.ids),
            ),
            response_metadata={
                "model_name": model_name,
                "finish_reason": "tool_calls" if reply.tool_calls else completion.finish,
                TOKEN_RECORD: self.record(completion),
            },
        )


def _tool_calls(reply: Reply) -> list[ToolCall]:
    return [
        ToolCall(name=call["name"], args=call["args"], id=_call_id(), type="tool_call") for call in reply.tool_calls
    ]


def _invalid_tool_calls(reply: Reply) -> list[InvalidToolCall]:
    return [
        InvalidToolCall(
            name=call["name"], args=call["args"], id=_call_id(), error=call["error"], type="invalid_tool_call"
        )
        for call in reply.invalid_tool_calls
    ]


def _call_id() -> str:
    return f"call_{uuid4().hex}"
