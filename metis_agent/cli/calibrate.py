"""`metis calibrate`, a threshold that keeps a promise, and `metis drift`, are today's questions still like those?

Both ask a trained gate for its scores on questions that it was not trained on; so does `metis evaluate gate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from metis_agent.cli.output import JsonOption, progress_bars, screen, training_libraries, write_json
from metis_agent.cli.training_options import Records, SeedOption, runs_of, takes_settings
from metis_agent.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from metis_agent.evaluation.calibration import Promise
    from metis_agent.evaluation.gates import Scored
    from metis_agent.gates.artefact import Artefact
    from metis_agent.gates.policy import PolicyGate
    from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["DropSeenOption", "ask_gate", "calibrate_command", "drift_command", "report_drift"]

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


@takes_settings
def calibrate_command(
    records: Records,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The gate's folder; its threshold is replaced.")],
    accuracy_loss: Annotated[
        float | None,
        typer.Option(help="Promise: at most this much accuracy lost against always calling; 0.01 is one point."),
    ] = None,
    calls: Annotated[float | None, typer.Option(help="Promise: at most this many calls a question.")] = None,
    cost_per_1000: Annotated[
        float | None, typer.Option(help="Promise: at most this cost for 1,000 questions; needs --highest-cost.")
    ] = None,
    highest_cost: Annotated[float | None, typer.Option(help="What one question can cost at most.")] = None,
    confidence: Annotated[float, typer.Option(help="How sure the promise is to hold.")] = 0.95,
    ahead: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the promise over the next so many questions as well (groups, with --group-by), not in the long "
            "run alone: surer, and fewer calls saved.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Write nothing: say what 100 to 5,000 records could promise, for this gate."),
    ] = False,
    drop_seen: DropSeenOption = False,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Choose the gate's threshold so that a promise holds for new questions like these, and write it to the gate.

    Refused where these records can't support the promise: then record more, or promise less. With --group-by the
    questions of one group count as one record, for they may be won and lost together.

    The scores of these questions are kept with the gate, so that `metis drift` can tell when others come.

    Example: metis calibrate my-gate --store runs --drop-seen --accuracy-loss 0.03

    Example: metis calibrate my-gate --outcomes held-out.parquet --tool text_search=search --accuracy-loss 0.01

    Example: metis calibrate my-gate --store runs --drop-seen --plan
    """
    console = screen(json)
    from metis_agent.gates.policy import PolicyGate

    gate = PolicyGate(folder)
    table = records.load(console, tools=gate.artefact.tools, every_step=gate.every_step)
    from metis_agent.evaluation.calibration import Promise, choose_threshold
    from metis_agent.evaluation.comparison import reference_note
    from metis_agent.hdpo.export import set_threshold

    delta = round(1 - confidence, 12)
    wanted = {"accuracy_loss": accuracy_loss, "calls": calls, "cost": cost_per_1000}
    promises = [
        Promise(kind="accuracy_loss", limit=accuracy_loss, delta=delta) if accuracy_loss is not None else None,
        Promise(kind="calls", limit=calls, delta=delta) if calls is not None else None,
        Promise(kind="cost", limit=cost_per_1000 / 1000, delta=delta, highest=highest_cost)
        if cost_per_1000 is not None
        else None,
    ]
    stated = [promise for promise in promises if promise is not None]
    if plan:
        limits = stated or [Promise(kind="accuracy_loss", limit=limit, delta=delta) for limit in (0.01, 0.02, 0.05)]
        table, scored = ask_gate(gate, table, console, drop_seen=drop_seen)
        _plan(console, table, scored, limits, seed, json)
        return
    if len(stated) != 1:
        raise ConfigurationError(
            f"The promises are {wanted!r}: state exactly one, with --accuracy-loss, --calls or --cost-per-1000."
        )
    table, scored = ask_gate(gate, table, console, drop_seen=drop_seen)
    threshold = choose_threshold(
        scored.probabilities,
        table.correct,
        table.cost,
        stated[0],
        groups=table.groups,
        ahead=ahead,
        seed=seed,
        points=table if table.runs else None,
    )
    found = report_drift(console, gate.artefact, scored)
    set_threshold(folder, {**threshold.note(), "reference": reference_note(scored, gate.artefact.tools)})
    asked = "decisions" if table.runs else "questions"
    console.print(
        f"Threshold {threshold.value:.4f}: {threshold.note()['chosen']}.\nOn these records: a tool on "
        f"{threshold.tool_rate:.1%} of the {asked}, accuracy {threshold.accuracy:.3f}; always calling has "
        f"{threshold.always:.3f}."
    )
    if json is not None:
        write_json(json, {**threshold.note(), "drift": found})


def _plan(
    console: Console, table: OutcomeTable, scored: Scored, promises: Sequence[Promise], seed: int, json: Path | None
) -> None:
    from metis_agent.evaluation.calibration import plan_promises

    if table.runs:
        raise ConfigurationError("--plan is for single questions; these records are decision points of runs.")
    sizes = (100, 200, 500, 1000, 2000, 5000)
    plans = plan_promises(
        scored.probabilities, table.correct, table.cost, promises, sizes, groups=table.groups, seed=seed
    )
    shown = Table("records", "promise", "refused", "calls kept", "accuracy", "always calling")
    for plan in plans:
        told = f"{plan.promise.kind} {plan.promise.limit:g}"
        rates = (f"{plan.refused:.0%}", f"{plan.tool_rate:.0%}", f"{plan.accuracy:.3f}", f"{plan.always:.3f}")
        shown.add_row(f"{plan.rows:,}{'' if plan.rows <= len(table) else ' *'}", told, *rates)
    console.print(shown)
    console.print(
        f"Means over draws from these {len(table):,} records, at confidence {1 - promises[0].delta:g}. * more than "
        "there are: an outlook."
    )
    if json is not None:
        write_json(json, {"records": len(table), "plan": [asdict(plan) for plan in plans]})


_MOST = 20_000
"""Questions looked at; more change nothing."""


def drift_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The gate's folder.")],
    questions: Annotated[
        Path | None, typer.Option(help="Today's questions: a .jsonl, .csv or .parquet file with a column 'question'.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Or the trajectories of today's runs.")] = None,
    level: Annotated[
        float, typer.Option(min=0, max=1, help="Share of false alarms among checks without drift.")
    ] = 0.01,
    json: JsonOption = None,
) -> None:
    """Say whether today's questions are like those that the gate was calibrated on.

    Compares the gate's own scores of both, what it reads of the questions, and how strange they are to its training
    (Kolmogorov-Smirnov). A gate that reads a draft is checked by its questions alone. Exit code 3 where they differ,
    for use in a schedule.

    Example: metis drift my-gate --store s3://bucket/today
    """
    console = screen(json)
    if (questions is None) == (store is None):
        raise ConfigurationError(f"--questions is {questions!r} and --store {store!r}: give one of them.")
    from metis_agent.gates.policy import PolicyGate

    with training_libraries():
        from metis_agent.evaluation.comparison import LEAST

        gate = PolicyGate(folder)
        asked = dict.fromkeys(_asked(questions, store, console))
        found = report_drift(console, gate.artefact, _score(gate, list(asked)[:_MOST], console), level=level)
    if found is None:
        chosen = gate.artefact.description["threshold"].get("chosen")
        raise InputError(
            f"Nothing can be said of drift from {len(asked)} different questions: {LEAST} or more are needed."
            if len(asked) < LEAST
            else f"The gate has no questions to compare with (threshold: {chosen!r}). Run `metis calibrate`."
        )
    if json is not None:
        write_json(json, found)
    if found["drifted"]:
        raise typer.Exit(3)


def report_drift(console: Console, artefact: Artefact, scored: Scored, *, level: float = 0.01) -> dict[str, Any] | None:
    """Say it in a line, and return it for JSON; `None` where it can't be told: too few
    questions, or a gate that was not calibrated.
    """
    from metis_agent.evaluation.comparison import drift_since_calibration

    try:
        found = drift_since_calibration(artefact, scored, level=level)
    except InputError:
        return None
    if found is None:
        return None
    if found.drifted:
        console.print(
            f"[bold yellow]Drift:[/] these questions are not like those calibrated on: largest gap "
            f"{found.distance:.2f}, in {found.column!r} (p = {found.p_value:.2g}). The promise is for questions like "
            "those: record some of today's and calibrate again."
        )
    else:
        console.print(f"No drift: these questions are like those calibrated on (largest gap {found.distance:.2f}).")
    return asdict(found)


def _asked(questions: Path | None, store: str | None, console: Console) -> Iterator[tuple[str, str]]:
    """(question, context), as they come."""
    from metis_agent.rollouts.questions import CONTEXT, read_questions

    asked = (
        read_questions(questions) if questions is not None else (run.question for run in runs_of(str(store), console))
    )
    for question in asked:
        context = str(question.metadata.get(CONTEXT) or "")
        yield (question.text.removeprefix(context).lstrip() if context else question.text), context


def _score(gate: PolicyGate, asked: list[tuple[str, str]], console: Console) -> Scored:
    import numpy as np

    from metis_agent.evaluation.gates import Scored, columns_of

    direct, tools, read = np.empty(len(asked)), np.empty((len(asked), len(gate.artefact.tools))), []
    with progress_bars(console) as bars:
        for row, (question, context) in enumerate(bars.track(asked, description="ask the gate")):
            read.append(gate.readings(question, context))
            # A gate that reads a draft has no scores of questions alone.
            if not gate.wants_draft:
                accuracy, probabilities = gate.score(question, context)
                direct[row], tools[row] = accuracy["direct"], list(probabilities.values())
    said = slice(0 if gate.wants_draft else None)
    return Scored(direct_right=direct[said], probabilities=tools[said], read=columns_of(read))
