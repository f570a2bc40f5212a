"""From a model's direct reply to the draft that a gate reads: its text, and log-probabilities where there are any.

Where it stands: the graph (or whatever else runs gates) asks the chat model for a direct answer where a gate
`wants_draft`, and hands the gate what this module makes of the reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage

from metis_agent.types import TOKEN_RECORD, Draft

__all__ = ["draft_of", "log_probs_of", "read_log_probs"]


def draft_of(reply: AIMessage) -> Draft:
    """The draft that a reply is."""
    return Draft(text=str(reply.text), log_probs=log_probs_of(reply))


def log_probs_of(reply: AIMessage) -> tuple[float, ...]:
    """Log-probabilities of the reply's tokens as `read_log_probs` has them; empty where the model gives none.

    Two forms are read: the token record of `LocalChatModel`, and the `logprobs` that OpenAI and the servers that
    speak its protocol give to a model bound with `logprobs=True`.
    """
    metadata: Mapping[str, Any] = reply.response_metadata
    tokens = metadata.get(TOKEN_RECORD)
    if isinstance(tokens, Mapping):
        return read_log_probs(tokens.get("log_probs"), tokens.get("allowed_log_probs"), tokens.get("forced", 0))
    offered = metadata.get("logprobs")
    content = offered.get("content") if isinstance(offered, Mapping) else None
    if not isinstance(content, list):
        return ()
    return tuple(float(token["logprob"]) for token in content)


def read_log_probs(own: Sequence[float] | None, allowed: Sequence[float] | None, forced: int) -> tuple[float, ...]:
    """What a gate reads of a model call's log-probabilities: without forced tokens, and those of a ban where one was.

    Where a tool call was banned they are those among the allowed tokens: the first token of a draft must not tell
    how much the model would rather have called a tool.

    Args:
        own: `log_probs` of the token record, or of the `ModelCall`.
        allowed: its `allowed_log_probs`.
        forced: how many leading tokens were forced.
    """
    return tuple(map(float, (allowed or own or ())[forced:]))
