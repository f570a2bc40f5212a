"""From an agent's state to a trajectory, and from there to the store.

Called by the graph's `record` node at the end of a turn (and where a turn fails), and by rollouts, which
bring their own ids and questions. Everything here reads; only `Recorder` writes.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, message_to_dict

from metis_agent.turns import seconds_of, turn_of
from metis_agent.types import TOKEN_RECORD, Branch, ModelCall, Question, Trajectory, TrajectoryStatus

__all__ = ["Recorder", "TrajectorySink", "model_call_of", "question_of", "trajectory_of"]


class TrajectorySink(Protocol):
    """Where trajectories go; `TrajectoryStore` is one."""

    def append(self, trajectory: Trajectory) -> None:
        """Keep a trajectory; called from several threads at once."""


def model_call_of(message: AIMessage, node: str, step: int) -> ModelCall:
    """The record of one model call, token-exact where the model left a token record in its reply.

    Args:
        message: the reply as the model gave it.
        node: the graph node that asked.
        step: position among the turn's model calls, from 0.
    """
    tokens: Mapping[str, Any] = message.response_metadata.get(TOKEN_RECORD) or {}
    usage = {key: count for key, count in (message.usage_metadata or {}).items() if isinstance(count, int)}
    return ModelCall(
        node=node,
        step=step,
        text=str(message.text),
        tool_calls=tuple(
            dict(call) for call in [*message.tool_calls, *message.invalid_tool_calls] if isinstance(call, Mapping)
        ),
        prompt_ids=_tuple_of(tokens, "prompt_ids"),
        completion_ids=_tuple_of(tokens, "completion_ids"),
        log_probs=_tuple_of(tokens, "log_probs"),
        allowed_log_probs=_tuple_of(tokens, "allowed_log_probs"),
        forced=tokens.get("forced", 0),
        continues=tokens.get("continues", False),
        sampling=tokens.get("sampling", {}),
        weights_version=tokens.get("weights_version", ""),
        template_hash=tokens.get("template_hash", ""),
        usage=usage,
    )


def trajectory_of(
    state: Mapping[str, Any],
    *,
    id: str,
    question: Question,
    started_at: float,
    branch: Branch = "free",
    seconds: float | None = None,
    status: TrajectoryStatus = "finished",
    error: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> Trajectory:
    """The record of a state's latest turn.

    Args:
        state: an agent's state or output; keys it lacks count as empty, so a partial state will do.
        id: unique name of the trajectory.
        question: what was asked.
        started_at: Unix time in seconds.
        branch: how the rollout started.
        seconds: duration; by default the state's own count.
        status: whether the turn reached its end.
        error: why not.
        metadata: anything else that JSON can hold.
    """
    return _trajectory_of(
        turn_of(state.get("messages", ())), state, id=id, question=question, started_at=started_at, branch=branch,
        seconds=seconds_of(state) if seconds is None else seconds, status=status, error=error, metadata=metadata or {},
    )  # fmt: skip


def question_of(messages: Sequence[BaseMessage]) -> Question:
    """The latest human message as a question; the same text always gets the same id."""
    return _question_of(turn_of(messages))


class Recorder:
    """Writes a trajectory for every turn of an agent.

    Args:
        store: where they go.
        metadata: added to each of them, such as the name of a deployment.
    """

    def __init__(self, store: TrajectorySink, *, metadata: Mapping[str, Any] | None = None) -> None:
        self.store = store
        self._metadata = dict(metadata or {})

    def record(
        self,
        state: Mapping[str, Any],
        *,
        run_id: str | None = None,
        branch: Branch = "free",
        error: BaseException | None = None,
    ) -> Trajectory:
        """Store the state's latest turn: as failed where an error is given.

        Args:
            state: the agent's state.
            run_id: names the trajectory; a new id by default.
            branch: how the rollout started.
            error: what ended the turn.

        Raises:
            StorageError: the store can't be written to.
        """
        turn, seconds = turn_of(state.get("messages", ())), seconds_of(state)
        trajectory = _trajectory_of(
            turn,
            state,
            id=run_id or str(uuid.uuid4()),
            question=_question_of(turn),
            branch=branch,
            seconds=seconds,
            started_at=time.time() - seconds,
            status="finished" if error is None else "failed",
            error="" if error is None else f"{type(error).__name__}: {error}",
            metadata=self._metadata,
        )
        self.store.append(trajectory)
        return trajectory


def _question_of(turn: Sequence[BaseMessage]) -> Question:
    text = str(turn[0].text) if turn else ""
    return Question(id=f"q-{hashlib.sha256(text.encode()).hexdigest()[:16]}", text=text)


def _trajectory_of(turn: Sequence[BaseMessage], state: Mapping[str, Any], **fields: Any) -> Trajectory:
    return Trajectory(
        answer=_answer_of(turn) if fields["status"] == "finished" else "",
        messages=tuple([_message_record(message) for message in turn]),
        calls=tuple(state.get("calls", ())),
        decisions=tuple(state.get("decisions", ())),
        outcomes=tuple(state.get("outcomes", ())),
        **fields,
    )


def _answer_of(turn: Sequence[BaseMessage]) -> str:
    """The text of the last message, where that is an answer: the model's own, or a tool's that returns directly."""
    last = turn[-1] if turn else None
    if isinstance(last, AIMessage) and not last.tool_calls:
        return str(last.text)
    return str(last.text) if isinstance(last, ToolMessage) else ""


def _message_record(message: BaseMessage) -> dict[str, Any]:
    """A LangChain message as a dict, without its token record: that is in the model calls."""
    if TOKEN_RECORD in message.response_metadata:
        metadata = {key: value for key, value in message.response_metadata.items() if key != TOKEN_RECORD}
        message = message.model_copy(update={"response_metadata": metadata})
    return message_to_dict(message)


def _tuple_of(tokens: Mapping[str, Any], key: str) -> tuple[Any, ...] | None:
    value = tokens.get(key)
    return None if value is None else tuple(value)
