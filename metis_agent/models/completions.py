"""Prompts to complete, completions as they grow in a running batch, and the message that one becomes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall
from langchain_core.messages.ai import UsageMetadata
from torch import Tensor
from torch.nn.functional import pad

from metis_agent.errors import InfrastructureError
from metis_agent.messages import new_call_id
from metis_agent.models.decoding import RowSampling
from metis_agent.models.prompt import Prompt
from metis_agent.models.vision import SeenImage
from metis_agent.models.wire import Reply, parse_reply
from metis_agent.types import TOKEN_RECORD

__all__ = ["Call", "Completion", "Completions", "GenerationRequest"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to complete."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: RowSampling
    stop: tuple[str, ...] = ()
    """Texts after which the completion ends."""
    images: tuple[SeenImage, ...] = ()
    """Those that the prompt has places for."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came out: ids with the end-of-turn token, where the model wrote one."""

    ids: list[int]
    log_probs: list[float]
    """Among all tokens."""
    allowed_log_probs: list[float]
    """Among the tokens that were not banned."""
    finish: Literal["stop", "length"]


class Completions:
    """The completions of A rows as they grow, token by token, until each has ended.

    A row ends at an end token, at one of its stop texts or at its own limit; what is chosen for it after that is not
    its own. All is kept on the device, which is asked what has ended only when somebody wants to know.

    Args:
        requests: One a row.
        eos_ids: Tokens that end a row.
        tokenizer: Reads the last tokens of a row that has stop texts.
        device: Where the tokens are chosen.
    """

    def __init__(
        self, requests: Sequence[GenerationRequest], eos_ids: Collection[int], tokenizer: Any, device: torch.device
    ) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._eos_E = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        limits = [request.max_new_tokens for request in requests]
        self._limits_A = torch.tensor(limits, device=device)
        self._lengths_A = torch.zeros_like(self._limits_A)
        self._stopped_A = torch.zeros_like(self._limits_A, dtype=torch.bool)
        self.ended_A = self._limits_A <= 0
        """Which rows have ended."""
        # One column more than tokens: there goes what is chosen for rows that have ended.
        width = max(limits, default=0) + 1
        self._tokens_AT = torch.zeros(len(requests), width, dtype=torch.long, device=device)
        self._log_probs_AT2 = torch.zeros(len(requests), width, 2, device=device)
        self._steps = 0
        self._lay_out(list(requests), limits)

    def _lay_out(self, requests: list[GenerationRequest], last_steps: list[int]) -> None:
        self._requests, self._last_steps = requests, last_steps
        self._rows_A = torch.arange(len(requests), device=self._device)
        self._until = max(last_steps, default=0)
        self.has_stop_texts = any(request.stop for request in requests)
        """Whether any row may end at a text, which is seen only by looking at every token."""

    @property
    def steps_left(self) -> int:
        """After so many more tokens every row has met its limit."""
        return self._until - self._steps

    def take(self, chosen_A: Tensor, log_probs_A2: Tensor) -> None:
        """Give each row that has not ended its next token, with its two log-probabilities."""
        self._tokens_AT[self._rows_A, self._lengths_A] = chosen_A
        self._log_probs_AT2[self._rows_A, self._lengths_A] = log_probs_A2
        going_A = ~self.ended_A
        self._lengths_A = self._lengths_A + going_A
        self._stopped_A = self._stopped_A | (going_A & torch.isin(chosen_A, self._eos_E))
        if self.has_stop_texts:
            self._stop_at_texts()
        self.ended_A = self._stopped_A | (self._lengths_A >= self._limits_A)
        self._steps += 1

    def cut(self) -> None:
        """End all rows here, whatever is missing."""
        self._limits_A = self._lengths_A
        self.ended_A = torch.ones_like(self.ended_A)

    def of(self, rows: Sequence[int]) -> list[Completion]:
        """What these rows have come to.

        Raises:
            InfrastructureError: The model gave logits that are not numbers.
        """
        chosen_R = torch.tensor(rows, device=self._device)
        lengths = self._lengths_A[chosen_R].tolist()
        stopped = self._stopped_A[chosen_R].tolist()
        longest = max(lengths, default=0)
        log_probs_RT2 = self._log_probs_AT2[chosen_R, :longest]
        if bool(log_probs_RT2.isnan().any()):
            raise InfrastructureError(
                "The model's logits are not numbers (NaN): its weights have diverged, or its dtype overflows. Load an "
                "earlier checkpoint, or use float32."
            )
        columns = (self._tokens_AT[chosen_R, :longest], *log_probs_RT2.unbind(-1))
        return [
            Completion(
                ids=ids[:length], log_probs=own[:length], allowed_log_probs=allowed[:length],
                finish="stop" if stop else "length",
            )
            for length, stop, ids, own, allowed in zip(lengths, stopped, *(it.tolist() for it in columns), strict=True)
        ]  # fmt: skip

    def keep(self, rows_A: Tensor) -> None:
        """Go on with these rows only."""
        rows = rows_A.tolist()
        self._lay_out([self._requests[row] for row in rows], [self._last_steps[row] for row in rows])
        self._limits_A, self._lengths_A = self._limits_A[rows_A], self._lengths_A[rows_A]
        self._stopped_A, self.ended_A = self._stopped_A[rows_A], self.ended_A[rows_A]
        self._tokens_AT, self._log_probs_AT2 = self._tokens_AT[rows_A], self._log_probs_AT2[rows_A]

    def join(self, other: Completions) -> None:
        """Take another batch's rows in, behind those that are there."""
        theirs = [self._steps + last - other._steps for last in other._last_steps]
        self._lay_out(self._requests + other._requests, self._last_steps + theirs)
        self._limits_A = torch.cat([self._limits_A, other._limits_A])
        self._lengths_A = torch.cat([self._lengths_A, other._lengths_A])
        self._stopped_A = torch.cat([self._stopped_A, other._stopped_A])
        self.ended_A = torch.cat([self.ended_A, other.ended_A])
        width = max(self._tokens_AT.shape[1], other._tokens_AT.shape[1])
        both = (self, other)
        self._tokens_AT = torch.cat([pad(it._tokens_AT, (0, width - it._tokens_AT.shape[1])) for it in both])
        self._log_probs_AT2 = torch.cat(
            [pad(it._log_probs_AT2, (0, 0, 0, width - it._log_probs_AT2.shape[1])) for it in both]
        )

    def _stop_at_texts(self) -> None:
        going = (~self.ended_A).tolist()
        for row, (request, length) in enumerate(zip(self._requests, self._lengths_A.tolist(), strict=True)):
            if going[row] and request.stop and self._meets(request.stop, self._tokens_AT[row, :length]):
                self._stopped_A[row] = True

    def _meets(self, stops: tuple[str, ...], tokens_T: Tensor) -> bool:
        # A stop text spans at most as many tokens as it has characters, bytes of one character included.
        tail = max(len(stop.encode()) for stop in stops)
        text = self._tokenizer.decode(tokens_T[-tail:].tolist())
        return any(stop in text for stop in stops)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call must remember until its completion is there."""

    request: GenerationRequest
    prompt: Prompt
    seed: int
    choice: str
    offered: frozenset[str]
    """Names of the tools that may be called."""
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
        reply = parse_reply(text, calls=self.choice != "none", stop=self.request.stop, offered=self.offered)
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
        ToolCall(name=call["name"], args=call["args"], id=new_call_id(), type="tool_call") for call in reply.tool_calls
    ]


def _invalid_tool_calls(reply: Reply) -> list[InvalidToolCall]:
    return [
        InvalidToolCall(
            name=call["name"], args=call["args"], id=new_call_id(), error=call["error"], type="invalid_tool_call"
        )
        for call in reply.invalid_tool_calls
    ]
