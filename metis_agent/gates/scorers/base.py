"""What a scorer is: one kind of policy at run time, from a question to one logit a branch.

Where it stands: `metis_agent.gates.policy.PolicyGate` -> **scorer**. The gate turns the logits into
probabilities in the same way for every kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from metis_agent.types import ToolSpec

__all__ = ["Asked", "Scorer"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that a scorer may look at."""

    question: str
    context: str = ""
    draft: Mapping[str, float] | None = None
    images: tuple[Any, ...] = ()
    """PIL images, or base64 strings of their files."""
    tools: tuple[ToolSpec, ...] = ()
    """To ask about; empty for those that the gate was trained for."""


class Scorer(Protocol):
    """One kind of policy at run time; safe to call from many threads."""

    @property
    def instant(self) -> bool:
        """True where a call is too quick to be worth a thread."""

    @property
    def open_tools(self) -> bool:
        """True where a tool is known by its description, so that a new one can be asked about."""

    @property
    def draft_columns(self) -> tuple[str, ...]:
        """What is read of a draft; empty where none is."""

    def logits(self, asked: Asked) -> Sequence[float]:
        """One logit a head: direct, then the tools.

        Raises:
            GateError: it can't be answered, see the message.
        """
