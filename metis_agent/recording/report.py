"""What a store met while it was read: how many records, and which lines were no good.

Curation and training print it: a run that lost lines says so.
"""

import logging
from dataclasses import dataclass, field

__all__ = ["BadLine", "StoreReport", "Tally"]

logger = logging.getLogger(__name__)

_KEPT_BAD_LINES = 100


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that was skipped, and why."""

    segment: str
    line: int
    """Counted from 1."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """What the latest `read` of a store has met so far."""

    read: int = 0
    torn: int = 0
    """Last lines that a crash cut short."""
    corrupt: int = 0
    """Other lines that are no trajectory."""
    bad_lines: tuple[BadLine, ...] = ()
    """The first 100 of both kinds."""


@dataclass
class Tally:
    """The counts of one `read`, as it goes."""

    read: int = 0
    torn: int = 0
    corrupt: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)

    def skip(self, segment: str, line: int, reason: str, *, torn: bool) -> None:
        """Count a bad line, and say where it is."""
        self.torn += torn
        self.corrupt += not torn
        if len(self.bad_lines) < _KEPT_BAD_LINES:
            self.bad_lines.append(BadLine(segment=segment, line=line, reason=reason))
        logger.warning("skipped %s, line %d: %s", segment, line, reason)

    def report(self) -> StoreReport:
        """Return the counts as they stand."""
        return StoreReport(read=self.read, torn=self.torn, corrupt=self.corrupt, bad_lines=tuple(self.bad_lines))
