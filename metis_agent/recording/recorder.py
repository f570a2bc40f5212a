"""From an agent's state to a trajectory, and from there to the store.

Called by the graph's `record` node at the end of a turn (and where a turn fails), and by rollouts, which
bring their own ids and questions. Everything here reads; only `Recorder` writes, and what it can't write costs nobody
an answer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from langchain_core.messages import AIMessage, BaseMessage, SystemMessage, ToolMessage, message_to_dict
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from metis_agent.errors import InputError
from metis_agent.messages import seconds_of, text_of, turn_of
from metis_agent.recording.schema import plain
from metis_agent.recording.store import TrajectoryStore
from metis_agent.tools.redaction import Redactor
from metis_agent.types import (
    TOKEN_RECORD,
    Branch,
    ModelCall,
    Question,
    ToolOutcome,
    Trajectory,
    TrajectoryStatus,
    declared_read_only,
)

__all__ = [
    "Recorder",
    "RecorderReport",
    "TrajectorySink",
    "as_told",
    "definitions_of",
    "keep",
    "model_call_of",
    "outcomes_as_told",
    "question_of",
    "trajectory_of",
]

_log = logging.getLogger(__name__)
_SHORT = 10_000
"""Characters of a text, and items of a list, that are kept of a trajectory that is too large."""


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
    tools: Sequence[Mapping[str, Any]] = (),
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
        tools: definitions of the tools that were on offer (`definitions_of`).
    """
    return _trajectory_of(
        turn_of(state.get("messages", ())), state, id=id, question=question, started_at=started_at, branch=branch,
        seconds=seconds_of(state) if seconds is None else seconds, status=status, error=error, metadata=metadata or {},
        tools=tuple(tools),
    )  # fmt: skip


def definitions_of(tools: Iterable[BaseTool | Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """What a model is told of tools, as OpenAI's API takes it; with `read_only` where a tool declares it.

    Tools that run at the provider are given as its client takes them, and stay so. One that can't be described is
    named.
    """
    return tuple([dict(tool) if isinstance(tool, Mapping) else _definition_of(tool) for tool in tools])


def _definition_of(tool: BaseTool) -> dict[str, Any]:
    try:
        found = convert_to_openai_tool(tool)
    except Exception as error:  # schemas of any kind
        _log.warning("tool %r is recorded without its schema: %s", tool.name, error)
        found = {"type": "function", "function": {"name": tool.name, "description": tool.description}}
    read_only = declared_read_only(tool.metadata)
    return found if read_only is None else {**found, "read_only": read_only}


def question_of(messages: Sequence[BaseMessage]) -> Question:
    """The latest human message as a question; the same text always gets the same id."""
    return _question_of(turn_of(messages))


@dataclass(frozen=True, kw_only=True)
class RecorderReport:
    """What a recorder has done with the turns that it was given."""

    recorded: int = 0
    spooled: int = 0
    """Turns that the store did not take, and the spool did."""
    lost: int = 0
    """Turns that neither took."""
    reason: str = ""
    """Why the store did not take the latest of these."""


class Recorder:
    """Writes a trajectory for every turn of an agent.

    A store that can't be written to costs no answer: the turn goes to the spool, or is lost, and that is logged and
    counted in `report`. Keys and passwords are taken out of errors; of the rest only what a `redactor` is given for.

    Args:
        store: where they go.
        metadata: added to each of them, such as the name of a deployment.
        redactor: takes secrets out of everything that is recorded. Token ids are left out where it found any: they
            spell what it took out.
        spool: a folder for turns that the store doesn't take; a store of its own, that can be read as one. Once the
            store is back: `for turn in TrajectoryStore(spool).read(): store.append(turn)`.
        wait: for the upload of each turn, where the store is no local folder. Without it turns are gathered, into
            fewer and larger files, and those that still wait are lost where the process is killed.

    Raises:
        StorageError: the spool can't be written to.
    """

    def __init__(
        self,
        store: TrajectorySink,
        *,
        metadata: Mapping[str, Any] | None = None,
        redactor: Redactor | None = None,
        spool: str | os.PathLike[str] | None = None,
        wait: bool = True,
    ) -> None:
        self.store = store
        self._spool = None if spool is None else TrajectoryStore(spool)
        self._metadata = dict(metadata or {})
        self._redactor = redactor
        self._of_errors = redactor or Redactor.from_environment()
        self._wait = wait
        self._report = RecorderReport()
        self._counting = threading.Lock()

    @property
    def report(self) -> RecorderReport:
        """How many turns were recorded, spooled and lost so far, by this process."""
        return self._report

    def record(
        self,
        state: Mapping[str, Any],
        *,
        run_id: str | None = None,
        branch: Branch = "free",
        error: BaseException | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        system_prompt: SystemMessage | None = None,
    ) -> Trajectory:
        """Store the state's latest turn: as failed where an error is given.

        Args:
            state: the agent's state.
            run_id: names the trajectory; a new id by default.
            branch: how the rollout started.
            error: what ended the turn.
            tools: definitions of the tools that were on offer, as OpenAI's API takes them.
            system_prompt: what the model read before the conversation, where the state does not hold it.

        Returns:
            What was recorded, or would have been; see `report`.
        """
        id = run_id or str(uuid.uuid4())
        trajectory = Trajectory(id=id, question=Question(id=id, text=""), status="failed")
        try:
            turn, seconds = turn_of(state.get("messages", ())), seconds_of(state)
            trajectory = self._redacted(
                _trajectory_of(
                    turn,
                    state,
                    id=id,
                    question=_question_of(turn),
                    branch=branch,
                    seconds=seconds,
                    started_at=time.time() - seconds,
                    status="finished" if error is None else "failed",
                    error="" if error is None else f"{type(error).__name__}: {error}",
                    metadata=self._metadata,
                    conversation=_thread(),
                    tools=tuple(tools),
                    before=() if system_prompt is None else (system_prompt,),
                )
            )
            self._append(self.store, trajectory)
            self._count("recorded")
        except Exception as failure:  # any sink, with errors of its own
            self._set_aside(trajectory, self._of_errors.text(f"{type(failure).__name__}: {failure}"))
        return trajectory

    def _append(self, store: TrajectorySink, trajectory: Trajectory) -> None:
        keep(store, trajectory, **({"wait": True} if self._wait and isinstance(store, TrajectoryStore) else {}))

    def _set_aside(self, trajectory: Trajectory, reason: str) -> None:
        if self._spool is not None:
            try:
                self._append(self._spool, trajectory)
                self._count("spooled", reason)
                _log.warning(
                    "turn %s could not be recorded: %s; it is in the spool %r", trajectory.id, reason, self._spool
                )
                return
            except Exception as error:
                reason = f"{reason}; nor did the spool take it: {self._of_errors.text(str(error))}"
        self._count("lost", reason)
        _log.error("turn %s could not be recorded: %s", trajectory.id, reason)

    def _count(self, what: str, reason: str = "") -> None:
        with self._counting:
            counts = {what: getattr(self._report, what) + 1}
            self._report = replace(self._report, reason=reason or self._report.reason, **counts)

    def _redacted(self, trajectory: Trajectory) -> Trajectory:
        """Without secrets: everywhere with a redactor, else in what was said of failures."""
        if self._redactor is None:
            if trajectory.error or any(one.reason or one.shadow for one in trajectory.decisions):
                said = self._of_errors.value([trajectory.error, trajectory.decisions])
                trajectory = replace(trajectory, error=said[0], decisions=said[1])
            return trajectory
        cleaned: Trajectory = self._redactor.value(trajectory)
        if cleaned.question.text != trajectory.question.text:  # its id is a hash, which a good guess undoes
            cleaned = replace(cleaned, question=replace(cleaned.question, id=_question_id(cleaned.question.text)))
        if all(getattr(cleaned, name) is getattr(trajectory, name) for name in ("messages", "calls", "outcomes")):
            return cleaned
        calls = (
            replace(call, prompt_ids=None, completion_ids=None, log_probs=None, allowed_log_probs=None)
            for call in cleaned.calls
        )
        return replace(cleaned, calls=tuple(calls))


def keep(store: TrajectorySink, trajectory: Trajectory, **options: Any) -> None:
    """Append a trajectory: with notes where JSON has no form for what a tool gave, cut short where it is too large.

    Raises:
        StorageError: the store can't be written to.
    """
    try:
        store.append(trajectory, **options)
    except InputError:
        try:
            store.append(_plain(trajectory), **options)
        except InputError as error:
            store.append(_shortened(trajectory, str(error)), **options)


def as_told(turn: Sequence[BaseMessage], calls: Sequence[ModelCall]) -> list[ModelCall]:
    """Model calls with the text that the turn's messages have now, once middleware has been at them."""
    told = _Told(turn)
    return [told.call(call, last=call is calls[-1]) for call in calls]


def outcomes_as_told(turn: Sequence[BaseMessage], outcomes: Sequence[ToolOutcome]) -> list[ToolOutcome]:
    """The same for outcomes."""
    return list(map(_Told(turn).outcome, outcomes))


class _Told:
    """What a turn's messages say now, once middleware has been at them.

    A record that kept what was taken out of the messages (names and addresses, say) would undo that.
    """

    def __init__(self, turn: Sequence[BaseMessage]) -> None:
        replies = [message for message in turn if isinstance(message, AIMessage)]
        self._results = {message.tool_call_id: message for message in turn if isinstance(message, ToolMessage)}
        self._calls = {call["id"]: (call, message) for message in replies for call in message.tool_calls}
        self._last = replies[-1] if replies and not replies[-1].tool_calls else None

    def outcome(self, outcome: ToolOutcome) -> ToolOutcome:
        """The outcome, with the content and the arguments that the messages have."""
        call, _ = self._calls.get(outcome.call_id, (None, None))
        result = self._results.get(outcome.call_id)
        content = outcome.content if result is None else text_of(result)
        arguments = outcome.arguments if call is None else call["args"]
        if content != outcome.content or arguments != outcome.arguments:
            outcome = replace(outcome, content=content, arguments=arguments)
        return outcome

    def call(self, call: ModelCall, *, last: bool) -> ModelCall:
        """The model call, with the text that its message has; where tokens were recorded they are what was said."""
        if call.completion_ids is None:
            found = [self._calls.get(asked.get("id")) for asked in call.tool_calls]
            message = found[0][1] if found and found[0] else self._last if last else None
            asked = (
                {**one, "args": now[0]["args"]} if now else one for one, now in zip(call.tool_calls, found, strict=True)
            )
            text = str(message.text) if message is not None and call.text else call.text
            call = replace(call, text=text, tool_calls=tuple(asked))
        return call


def _plain(trajectory: Trajectory) -> Trajectory:
    """The trajectory, with notes in its free-form fields where JSON has no form for what they hold."""
    free = ("messages", "history", "tools", "metadata")
    return replace(
        trajectory,
        calls=tuple(
            replace(one, tool_calls=plain(one.tool_calls), sampling=plain(one.sampling)) for one in trajectory.calls
        ),
        outcomes=tuple(replace(one, arguments=plain(one.arguments)) for one in trajectory.outcomes),
        decisions=tuple(replace(one, shadow=plain(one.shadow)) for one in trajectory.decisions),
        question=replace(trajectory.question, metadata=plain(trajectory.question.metadata)),
        **{name: plain(getattr(trajectory, name)) for name in free},
    )


def _shortened(trajectory: Trajectory, reason: str) -> Trajectory:
    """What is left of a trajectory that is too large to be kept."""
    return replace(
        trajectory,
        answer=trajectory.answer[:_SHORT],
        question=replace(trajectory.question, text=trajectory.question.text[:_SHORT], metadata={}),
        messages=(),
        calls=(),
        history=(),
        tools=(),
        outcomes=tuple(
            replace(one, content=one.content[:_SHORT], arguments={}) for one in trajectory.outcomes[:_SHORT]
        ),
        decisions=trajectory.decisions[:_SHORT],
        error=trajectory.error[:_SHORT],
        metadata={"not_recorded": f"messages, model calls and longer texts: {reason}"},
    )


def _question_of(turn: Sequence[BaseMessage]) -> Question:
    text = str(turn[0].text) if turn else ""
    return Question(id=_question_id(text), text=text)


def _question_id(text: str) -> str:
    # Half an emoji is no UTF-8, and a question all the same.
    return f"q-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _trajectory_of(turn: Sequence[BaseMessage], state: Mapping[str, Any], **fields: Any) -> Trajectory:
    told, messages = _Told(turn), state.get("messages", ())
    before = [*fields.pop("before", ()), *messages[: len(messages) - len(turn)]]
    return Trajectory(
        answer=_answer_of(turn) if fields["status"] == "finished" else "",
        messages=tuple([_message_record(message) for message in turn]),
        history=tuple([_message_record(message) for message in before]),
        calls=tuple(as_told(turn, state.get("calls", ()))),
        decisions=tuple(state.get("decisions", ())),
        outcomes=tuple([told.outcome(outcome) for outcome in state.get("outcomes", ())]),
        **fields,
    )


def _thread() -> str:
    """The graph run's thread: what its turns have in common."""
    config = var_child_runnable_config.get() or {}
    return str((config.get("configurable") or {}).get("thread_id") or "")


def _answer_of(turn: Sequence[BaseMessage]) -> str:
    """The text of the last message, where that is an answer: the model's own, or a tool's that returns directly."""
    last = turn[-1] if turn else None
    if isinstance(last, AIMessage) and not last.tool_calls:
        return str(last.text)
    return text_of(last) if isinstance(last, ToolMessage) else ""


def _message_record(message: BaseMessage) -> dict[str, Any]:
    """A LangChain message as a dict, without its token record: that is in the model calls."""
    if TOKEN_RECORD in message.response_metadata:
        metadata = {key: value for key, value in message.response_metadata.items() if key != TOKEN_RECORD}
        message = message.model_copy(update={"response_metadata": metadata})
    return message_to_dict(message)


def _tuple_of(tokens: Mapping[str, Any], key: str) -> tuple[Any, ...] | None:
    value = tokens.get(key)
    return None if value is None else tuple(value)
