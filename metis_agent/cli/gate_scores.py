"""A trained gate asked for its scores, on questions that it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from metis_agent.cli.output import progress_bars
from metis_agent.errors import InputError

if TYPE_CHECKING:
    from metis_agent.evaluation.gates import Scored
    from metis_agent.gates.policy import PolicyGate
    from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["DropSeenOption", "ask_gate"]

DropSeenOption = Annotated[
    bool, typer.Option("--drop-seen", help="Leave out questions that the gate was trained on, rather than refuse.")
]


def ask_gate(
    gate: PolicyGate, table: OutcomeTable, console: Console, *, drop_seen: bool
) -> tuple[OutcomeTable, Scored]:
    """The rows that the gate was not trained on, and what it says of them.

    Raises:
        InputError: it was trained on some, and `drop_seen` is false; or there is nothing else.
    """
    from metis_agent.evaluation.gates import score_table

    unseen = _unseen(table, gate, drop_seen=drop_seen)
    with progress_bars(console) as bars:
        task = bars.add_task("ask the gate", total=len(unseen))
        return unseen, score_table(gate, unseen, lambda count: bars.advance(task, count))


def _unseen(table: OutcomeTable, gate: PolicyGate, *, drop_seen: bool) -> OutcomeTable:
    import numpy as np

    from metis_agent.hdpo.export import trained_keys
    from metis_agent.rollouts.outcomes import check_unseen

    unseen = check_unseen(table, trained_keys(gate.artefact))
    if unseen.all():
        return table
    if not drop_seen:
        first = table.questions[int(np.flatnonzero(~unseen)[0])]
        raise InputError(
            f"{int((~unseen).sum())} of {len(table)} questions were trained on, such as {first!r}: figures on them are "
            "worth nothing. Use held-out rows, or pass --drop-seen to leave these out."
        )
    return table.take(np.flatnonzero(unseen))
