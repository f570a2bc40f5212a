"""The nouns that every layer shares, from the question that comes in to the trajectory that is learnt from.

Plain frozen dataclasses: they cross checkpointers, streams and files, so they hold only values that
JSON can hold. Validation happens where files are read (`metis_agent.recording.schema`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

from langchain_core.messages import BaseMessage

__all__ = [
    "TOKEN_RECORD",
    "Branch",
    "Draft",
    "GateDecision",
    "GateRequest",
    "Group",
    "ModelCall",
    "OutcomeStatus",
    "Question",
    "Spending",
    "ToolOutcome",
    "ToolSpec",
    "Trajectory",
    "TrajectoryStatus",
]

_READ_ONLY_KEYS = ("read_only", "readOnlyHint")


def declared_read_only(*places: object) -> bool | None:
    """Whether a tool says of itself that it only reads: `None` where it says neither.

    Args:
        places: where it may say so, in this order, such as its metadata: under our `read_only` or MCP's `readOnlyHint`.
    """
    said = (place.get(key) for place in places if isinstance(place, Mapping) for key in _READ_ONLY_KEYS)
    return next((it for it in said if isinstance(it, bool)), None)


def amount_of(value: object) -> float | None:
    """A price or a limit as a float, whatever kind of number it is; `None` where it is not finite or below 0."""
    if not isinstance(value, Real | Decimal) or isinstance(value, bool):
        return None
    try:
        amount = float(value)
    except (OverflowError, ValueError):  # an int above all floats; a signalling NaN
        return None
    return amount if 0 <= amount < math.inf else None


UNMET = "unmet_tool_choice"
"""Key of `AIMessage.response_metadata`: the call that was required and that neither model nor server gave."""

TOKEN_RECORD = "token_record"
"""Key of `AIMessage.response_metadata` under which a recording chat model leaves its exact tokens.

The value is a dict: `prompt_ids: list[int]`, `completion_ids: list[int]`, `log_probs: list[float]` (one for
each completion token: the policy's own, at the sampling temperature, before any forcing or banning),
`allowed_log_probs: list[float]` (only where a call was banned: the same among the tokens that were not),
`forced: int` (how many leading completion tokens were forced), `sampling: dict`, `weights_version: str`,
`template_hash: str`, `continues: bool` (the prompt extends the previous call's ids exactly), `images: list[str]` (a
digest of each picture in the prompt).
"""

Branch = Literal["free", "direct", "tool"]
"""How a rollout starts: as the policy wishes, forced to answer directly, or forced to call a tool."""

OutcomeStatus = Literal["ok", "error", "timeout", "blocked", "repeated"]
TrajectoryStatus = Literal["finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask, with what is needed to check the answer."""

    id: str
    text: str
    answer: str | None = None
    """The reference answer; `None` where nobody knows it (then nothing can be scored)."""
    verifier: str = "exact"
    """By its name in `metis_agent.judging.verifiers.VERIFIERS`; a record may name one that is not known here."""
    kind: str = ""
    """A label to break results down by, such as "sum" or "popular fact"."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """What a gate may know of a tool."""

    name: str
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A direct answer, written before the decision by a gate that asks for one."""

    text: str
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What this turn has used so far: executed calls, seconds since it began, and declared tool cost."""

    calls: int = 0
    calls_per_tool: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """What a gate sees: the conversation, the tools still within budget, and what has been spent."""

    messages: Sequence[BaseMessage]
    tools: tuple[ToolSpec, ...]
    spent: Spending = Spending()
    draft: Draft | None = None


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """Answer directly (`allowed` empty), or these tools may be called (and one must be, if `required`)."""

    allowed: tuple[str, ...]
    required: bool = False
    probabilities: Mapping[str, float] | None = None
    """Probability that each tool is worth calling, by name; `None` where the gate has no estimate."""
    threshold: float | None = None
    gate: str = ""
    version: str = ""
    reason: str = ""
    seconds: float = 0.0
    propensity: float | None = None
    """Probability with which this decision was made, where a gate explores at random."""
    shadow: Mapping[str, Any] | None = None
    """What a gate that only watched would have decided: the fields of its decision, or its `error`."""

    @property
    def direct(self) -> bool:
        """True where the decision is to answer without a tool."""
        return not self.allowed


@dataclass(frozen=True, kw_only=True)
class ToolOutcome:
    """What became of one tool call that the model asked for."""

    call_id: str
    tool: str
    arguments: Mapping[str, Any]
    status: OutcomeStatus
    content: str = ""
    """The text that the model got back."""
    seconds: float = 0.0
    cost: float = 0.0

    @property
    def executed(self) -> bool:
        """True where the tool really ran: only these count as T in the rewards."""
        return self.status in ("ok", "error", "timeout")


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One call of the chat model, token-exact where the backend gives its tokens."""

    node: str
    step: int
    text: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    allowed_log_probs: tuple[float, ...] | None = None
    """Where a call was banned: the same among the tokens that were not, so without the decision that the ban took."""
    forced: int = 0
    """Leading completion tokens that were forced, not sampled."""
    continues: bool = False
    """The prompt starts with the previous call's prompt and completion, token for token."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    weights_version: str = ""
    template_hash: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    """Tokens as LangChain counts them (`input_tokens`, `output_tokens`), details flat: `input_cache_read`."""
    model: str = ""
    """The model's name as its provider gives it, where that was recorded."""
    seconds: float = 0.0
    """How long the call took, where that was recorded."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The record of one run: everything needed to score it, to show it, and to train on it."""

    id: str
    question: Question
    branch: Branch = "free"
    answer: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    """LangChain messages of this turn as dicts, token records moved to `calls`."""
    calls: tuple[ModelCall, ...] = ()
    decisions: tuple[GateDecision, ...] = ()
    outcomes: tuple[ToolOutcome, ...] = ()
    status: TrajectoryStatus = "finished"
    error: str = ""
    """Why the run failed, with `status="failed"`."""
    seconds: float = 0.0
    started_at: float = 0.0
    """Unix time in seconds."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    """LangChain messages that the model had read before this turn, as dicts: system prompt, earlier turns."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The definitions of the tools that were offered, as OpenAI's API takes them."""
    conversation: str = ""
    """The conversation that this turn belongs to; the unit of intervals and of cross-fitting."""
    user: str = ""
    """Who asked, as the application names them."""

    @property
    def tool_calls(self) -> int:
        """T of the paper: executed tool calls, from the trace; blocked and repeated ones don't count."""
        return sum(outcome.executed for outcome in self.outcomes)

    @property
    def cost(self) -> float:
        """Declared cost of all executed tool calls."""
        return sum(outcome.cost for outcome in self.outcomes)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The G trajectories of one question."""

    question: Question
    trajectories: tuple[Trajectory, ...]
