"""Which tool calls of a recorded run changed its outcome: redundant, necessary, harmful ones, and those kept apart.

Pure: verdicts in, labels out. A run visits states s_0 .. s_K, one before each round of tool calls and one after the
last. The verdict a_k says whether the model, asked to commit itself at s_k, would have done as well as the run did:
given its answer, or made the acting call that the run went on to make.

- k* is the first k with a_k = 1. Calls after it are *redundant*, those up to it *necessary*; without it the run is
  *lost* whatever it calls, and its calls are counted apart.
- A round with a_{k-1} = 1 and a_k = 0 is *harmful*: it took away what was right.
- A call that acts (books, mails, writes) is never redundant: its effect is its purpose. It ends a *stretch* of the
  run, and the calls after it are counted from there. A call of a tool of which nobody said what it does may act, so
  it is treated alike, and counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from metis_agent.errors import InputError

__all__ = ["Amount", "AuditedCall", "AuditedTurn", "Effect", "Use", "harmful_rounds", "stretches", "uses"]

Effect = Literal["reads", "acts", "unknown"]
"""What a tool does; only the calls of tools that read can be redundant."""

Use = Literal["redundant", "necessary", "lost", "acting", "undeclared", "undecided"]
"""What a call was for. "acting": it acts, or was made in the same breath as one that does. "undeclared": its tool's
effect is unknown. "undecided": a verdict that it hangs on is missing."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What a call took; amounts add up."""

    dollars: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    """Tokens of the chat model, read and written, that the run would have done without."""
    unpriced: int = 0
    """Of these, tokens of a model whose price is unknown: they are not in `dollars`."""
    guessed: int = 0
    """Of these, tokens that were not recorded, and guessed from the length of the texts."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            dollars=self.dollars + other.dollars,
            seconds=self.seconds + other.seconds,
            tokens=self.tokens + other.tokens,
            unpriced=self.unpriced + other.unpriced,
            guessed=self.guessed + other.guessed,
        )


@dataclass(frozen=True, kw_only=True)
class AuditedCall:
    """One executed tool call."""

    tool: str
    effect: Effect = "reads"
    amount: Amount = field(default_factory=Amount)
    """What not making it would have saved: the tool's own cost, and its part of the model call that read its result."""


@dataclass(frozen=True, kw_only=True)
class AuditedTurn:
    """One turn of a conversation: its rounds of tool calls, and the verdicts on its states.

    Raises:
        InputError: there isn't one verdict for each state.
    """

    id: str
    rounds: tuple[tuple[AuditedCall, ...], ...]
    """K rounds; the calls of one round are made at once."""
    verdicts: tuple[bool | None, ...]
    """a_0 .. a_K; `None` where there is no verdict. Where the run itself acted it is right by definition, so what
    stands there is not read."""
    conversation: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        if len(self.verdicts) != len(self.rounds) + 1:
            raise InputError(
                f"turn {self.id!r} has {len(self.rounds)} rounds of calls and {len(self.verdicts)} verdicts; there is "
                "one verdict for each state: before every round, and after the last."
            )

    @property
    def group(self) -> str:
        """What is resampled as one: the conversation, or the turn where it has none."""
        return self.conversation or self.id

    @property
    def decided(self) -> bool:
        """False where a verdict is missing that a call of it hangs on."""
        return not any(use == "undecided" for labels in uses(self) for use in labels)


def reads_only(calls: Sequence[AuditedCall]) -> bool:
    """True for a round that could have been left out without leaving an effect out."""
    return all(call.effect == "reads" for call in calls)


def stretches(turn: AuditedTurn) -> Iterator[tuple[int, int]]:
    """(first, last) states of each stretch: within it calls only read, and at its last state the run committed itself.

    Example:
        >>> look, book = (AuditedCall(tool="look"),), (AuditedCall(tool="book", effect="acts"),)
        >>> turn = AuditedTurn(id="1", rounds=(look, book, look), verdicts=(True, None, True, True))
        >>> list(stretches(turn))
        [(0, 1), (2, 3)]
    """
    first = 0
    for state, calls in enumerate(turn.rounds):
        if not reads_only(calls):
            yield first, state
            first = state + 1
    yield first, len(turn.rounds)


def uses(turn: AuditedTurn) -> tuple[tuple[Use, ...], ...]:
    """What each call of each round was for."""
    found: list[tuple[Use, ...]] = []
    for first, last in stretches(turn):
        known = _verdicts(turn, first, last)
        enough = next((k for k, right in enumerate(known) if right), None)
        undecided = None in known[:enough]
        for k in range(last - first):
            use: Use = "redundant" if enough is not None and k >= enough else "necessary" if enough else "lost"
            found.append(("undecided" if undecided else use,) * len(turn.rounds[first + k]))
        if last < len(turn.rounds):
            found.append(tuple("undeclared" if call.effect == "unknown" else "acting" for call in turn.rounds[last]))
    return tuple(found)


def harmful_rounds(turn: AuditedTurn) -> tuple[bool, ...]:
    """For each round whether it took away a right answer: right before it, and wrong after."""
    found = [False] * len(turn.rounds)
    for first, last in stretches(turn):
        known = _verdicts(turn, first, last)
        for k in range(last - first):
            found[first + k] = known[k] is True and known[k + 1] is False
    return tuple(found)


def _verdicts(turn: AuditedTurn, first: int, last: int) -> tuple[bool | None, ...]:
    """Of a stretch; where the run acted it agrees with itself."""
    found = turn.verdicts[first : last + 1]
    return found if last == len(turn.rounds) else (*found[:-1], True)
