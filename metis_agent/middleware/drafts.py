"""The direct answer that a gate may ask for before it decides, as in `metis_agent.graphs.drafts`.

It is asked for as LangChain asks for an answer, so that a structured answer can be a draft too.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from langchain.agents.middleware.types import ModelRequest, ModelResponse
from langchain_core.language_models import BaseChatModel
from langgraph.constants import TAG_NOSTREAM
from langgraph.errors import GraphBubbleUp

from metis_agent.gates.confidence import draft_of
from metis_agent.middleware.offer import narrowed
from metis_agent.middleware.replies import reply_in
from metis_agent.middleware.turn import TurnView

__all__ = ["drafted"]

_Result = tuple[ModelResponse[Any] | None, str]


def drafted(request: ModelRequest[Any], view: TurnView) -> Generator[ModelRequest[Any], Any, _Result]:
    """Ask the model for a draft, note it in the view, and return the response, or why there is none."""
    try:
        response: ModelResponse[Any] = yield _unseen(narrowed(request, ()))
    except GraphBubbleUp:
        raise
    except Exception as error:
        return None, f"the direct draft failed with {type(error).__name__}: {error}"
    reply = reply_in(response)
    if reply is None:
        return None, "the direct draft held no message of the model"
    draft = draft_of(reply)
    if not draft.text.strip() and response.structured_response is not None and reply.tool_calls:
        draft = replace(draft, text=json.dumps(reply.tool_calls[0]["args"], default=str, ensure_ascii=False))
    view.take_draft(reply, draft)
    return response, ""


def _unseen(request: ModelRequest[Any]) -> ModelRequest[Any]:
    """The request with log-probabilities asked for where the model has that setting, and out of `messages` streams."""
    model: Any = request.model
    settings = request.model_settings
    # None: the model has the setting, and nobody has made a choice.
    if getattr(model, "logprobs", True) is None:
        settings = {**settings, "logprobs": True}
    if isinstance(model, BaseChatModel):
        model = model.model_copy(update={"tags": [*(model.tags or ()), TAG_NOSTREAM]})
    return request.override(model=model, model_settings=settings)
