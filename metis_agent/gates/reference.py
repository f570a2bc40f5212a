"""Gates that need no training: always, never, the model's own choice, one branch, a sure draft.

`ModelGate` is the agent's default, and the right one for a self-gating model; the others are the baselines
that a trained gate has to beat, and the branches of stratified rollouts.

`DraftConfidenceGate` calls a tool where the model is unsure of its own direct answer. The graph writes a direct draft
at the first step of a turn and hands it over with its log-probabilities; a sure draft becomes the answer at no further
cost. With log p_t the log-probability of the draft's token t of n, the model's confidence c is

    mean:  c = exp((1/n) sum_t log p_t)      the geometric mean of the tokens' probabilities
    min:   c = min_t p_t                     the least sure token
    first: c = p_1                           the first token, where the answer is one word or a number
    all:   c = exp(sum_t log p_t)            the probability of the whole draft; falls with its length

and the probability that a tool is needed is 1 - c. It ranks questions; it is not calibrated: choose the threshold
on questions of your own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.messages import AIMessage

from metis_agent.errors import ConfigurationError, GateError
from metis_agent.gates.base import Gate, SupportsDecide, allows, as_gate
from metis_agent.messages import is_first_step, turn_of
from metis_agent.types import TOKEN_RECORD, Branch, Draft, GateDecision, GateRequest, ToolSpec

__all__ = [
    "AlwaysGate",
    "BranchGate",
    "DraftConfidenceGate",
    "ModelGate",
    "NeverGate",
    "Reading",
    "draft_of",
    "log_probs_of",
    "read_log_probs",
]


class _InstantGate(Gate):
    """A gate that decides without work, so that an async run needs no thread for it."""

    def __init__(self, *, name: str = "", version: str = "") -> None:
        super().__init__(name=name, version=version)

    async def adecide(self, request: GateRequest) -> GateDecision:
        return self.decide(request)

    def _allow_all(self, request: GateRequest, *, required: bool = False) -> GateDecision:
        allowed = tuple([tool.name for tool in request.tools])
        return GateDecision(allowed=allowed, required=required and bool(allowed), gate=self.name, version=self.version)


class ModelGate(_InstantGate):
    """Every tool within budget is allowed: the model itself decides."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow everything."""
        return self._allow_all(request)


class NeverGate(_InstantGate):
    """No tool, ever."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow nothing."""
        return GateDecision(allowed=(), gate=self.name, version=self.version)


class AlwaysGate(_InstantGate):
    """A tool has to be called at the first step of every turn; after that the model decides."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow everything; require a call at the first step."""
        return self._allow_all(request, required=is_first_step(turn_of(request.messages)))


class BranchGate(_InstantGate):
    """How a rollout starts: "free" as `ModelGate`, "direct" as `NeverGate`, "tool" as `AlwaysGate`.

    With a `tool`, branch "tool" is that one's, decided as a trained gate decides: it alone is allowed in the whole
    turn, and has to be called at its first step. With `at` above 0 it is the decision after so many replies of the
    turn that is forced; up to there the model decides.

    Source: stratified groups, which keep both branches in every group of rollouts.

    Raises:
        ConfigurationError: another branch, or a tool in a branch without one.
    """

    def __init__(self, branch: Branch, *, tool: str = "", at: int = 0, version: str = "") -> None:
        name = f"branch:{branch}" + (f":{tool}" if tool else "") + (f"@{at}" if at else "")
        super().__init__(name=name, version=version)
        gates = {"free": ModelGate, "direct": NeverGate, "tool": AlwaysGate}
        if branch not in gates:
            raise ConfigurationError(f"The branch is {branch!r}; it must be one of {sorted(gates)}.")
        if tool and branch != "tool":
            raise ConfigurationError(f"The branch is {branch!r} and the tool {tool!r}; only branch 'tool' has one.")
        self.branch, self.tool, self.at = branch, tool, at
        self._gate: _InstantGate = gates[branch](name=self.name, version=version)

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide as this branch's baseline does."""
        turn = turn_of(request.messages)
        replies = sum(message.type == "ai" for message in turn) if self.at else 0
        if replies < self.at:
            return self._allow_all(request)
        if self.branch != "tool" or not (self.tool or self.at):
            return self._gate.decide(request)
        allowed = tuple([tool.name for tool in request.tools if self.tool in ("", tool.name)])
        required = bool(allowed) and (replies == self.at if self.at else is_first_step(turn))
        return GateDecision(allowed=allowed, required=required, gate=self.name, version=self.version)


Reading = Literal["mean", "min", "first", "all"]

_READINGS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda log_probs: sum(log_probs) / len(log_probs),
    "min": min,
    "first": lambda log_probs: log_probs[0],
    "all": sum,
}


class DraftConfidenceGate(Gate):
    """Two levels: whether a tool is needed, by the draft's log-probabilities; then which.

    A decision holds for the whole turn, as the draft does: where a tool was allowed, it may be called again.

    Args:
        threshold: a tool is allowed where 1 - confidence is above this.
        reading: how confidence is read off the log-probabilities; see the head of this module.
        which: decides among the tools where one is needed; by default all are offered, and the model chooses.
        required: where a tool is allowed at the first step of a turn, one has to be called.
        name: as in `Gate`.

    Raises:
        ConfigurationError: no such reading, `which` is no gate, or the threshold is out of range.
    """

    wants_draft = True

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        reading: Reading = "mean",
        which: Gate | SupportsDecide | None = None,
        required: bool = False,
        name: str = "",
    ) -> None:
        super().__init__(threshold=threshold, required=required, name=name)
        if reading not in _READINGS:
            raise ConfigurationError(f"The reading is {reading!r}; it must be one of {sorted(_READINGS)!r}.")
        self.reading = reading
        self.which = None if which is None else as_gate(which)

    def check_tools(self, tools: Sequence[ToolSpec]) -> None:
        """See `Gate`: the second level may know its tools."""
        if self.which is not None:
            self.which.check_tools(tools)

    def probability(self, draft: Draft | None) -> float:
        """Probability that a tool is needed: 1 - confidence.

        Raises:
            GateError: there is no draft, or it has no log-probabilities.
        """
        if draft is None:
            raise GateError("the request has no draft; run the gate in an agent, which writes one, or give it a draft")
        if not draft.log_probs:
            raise GateError(
                "the draft has no log-probabilities; use a chat model that gives them (LocalChatModel, or one with a "
                "`logprobs` setting), or another gate"
            )
        value = _READINGS[self.reading](draft.log_probs)
        if math.isnan(value):
            raise GateError(f"the draft's log-probabilities {draft.log_probs!r} are not numbers")
        return 1 - math.exp(min(0.0, value))

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide; see `metis_agent.gates.base`."""
        started = time.perf_counter()
        p = self.probability(request.draft)
        second = self.which.decide(request) if self.which is not None and allows(p, self.threshold) else None
        return self._conclude(request, p, second, started)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide`: too quick to be worth a thread, but for the second level."""
        started = time.perf_counter()
        p = self.probability(request.draft)
        second = await self.which.adecide(request) if self.which is not None and allows(p, self.threshold) else None
        return self._conclude(request, p, second, started)

    def _conclude(self, request: GateRequest, p: float, second: GateDecision | None, started: float) -> GateDecision:
        names = [tool.name for tool in request.tools]
        open_to = names if second is None else [name for name in names if name in second.allowed]
        allowed = tuple(open_to) if allows(p, self.threshold) else ()
        first = is_first_step(turn_of(request.messages))
        return GateDecision(
            allowed=allowed,
            required=bool(self.required and allowed and first),
            probabilities={name: p if name in open_to else 0.0 for name in names},
            threshold=self.threshold,
            gate=self.name,
            version=self.version,
            reason="" if second is None else f"which: {second.gate or 'the second gate'} {second.reason}".rstrip(),
            seconds=time.perf_counter() - started,
        )


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
