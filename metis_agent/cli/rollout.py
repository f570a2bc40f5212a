"""`metis rollout`: record what comes of each question down every branch, with any model."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from metis_agent.cli.agent_options import (
    AgentOption,
    AgreementOption,
    Choice,
    JudgeOption,
    ModelOption,
    RubricOption,
    ToolsOption,
    VerifierOption,
    check_verifiers,
    choose_agent,
    verify_with,
)
from metis_agent.cli.output import JsonOption, progress_bars, screen, training_libraries, write_json
from metis_agent.cli.training_options import VERDICTS, runs_of
from metis_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from metis_agent.judging.verifiers import Verify
    from metis_agent.rollouts.branches import BranchPlan, RecordingReport
    from metis_agent.types import Question, Trajectory

__all__ = ["rollout_command"]


def rollout_command(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="QUESTIONS",
            help="A .jsonl, .csv or .parquet file: 'question', and 'answer' to judge by; optional 'id', 'verifier' "
            "(prose by default, exact, numeric, choice, math, judge), 'kind', 'context'. Further columns are kept for "
            "--group-by.",
        ),
    ],
    store: Annotated[str, typer.Option(help="Folder or URL for the trajectories: see `metis train gate --store`.")],
    model: ModelOption = None,
    tools: ToolsOption = None,
    agent: AgentOption = None,
    direct: Annotated[int, typer.Option(min=0, help="Rollouts of each question without a tool.")] = 1,
    forced: Annotated[int, typer.Option(min=0, help="Rollouts of each question with each tool's call forced.")] = 1,
    free: Annotated[int, typer.Option(min=0, help="Rollouts of each question as the model decides.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Goes before every conversation.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="Tool calls that one run may make.")] = 8,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the model's sampling; by default its own.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Runs at once; by default as suits the model.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one run may take.")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed run is tried again.")] = 2,
    label: Annotated[
        str | None, typer.Option(help="What records call the model; by default its name in these options.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, for models and tools that read it.")] = 0,
    read_only: Annotated[
        list[str] | None,
        typer.Option(
            "--read-only", help="A tool that changes nothing, though it does not declare so; repeat for more."
        ),
    ] = None,
    allow_acting: Annotated[
        bool,
        typer.Option(
            "--allow-acting",
            help="Force the calls of all tools, also of those that are not declared to change nothing by "
            "metadata={'read_only': True}.",
        ),
    ] = False,
    verifier: VerifierOption = None,
    judge: JudgeOption = None,
    judge_rubric: RubricOption = None,
    agreement: AgreementOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be run.")] = False,
    json: JsonOption = None,
) -> None:
    """Ask a model each question without a tool, with each tool, and as it likes, and record what comes of it.

    The graph that serves users makes the runs. What is finished is never run again: stop it at any time, and run the
    same command to go on. Runs that fail for want of the model, a sandbox or a judge are tried again, then counted and
    left out; they are never scored as wrong.

    Example: metis rollout questions.jsonl --model openai:gpt-5 --tools my_tools.py:TOOLS --store runs

    Next: metis train gate --store runs --hold-out 0.4 --out my-gate
    """
    console = screen(json)
    from metis_agent.rollouts.branches import BranchPlan
    from metis_agent.rollouts.questions import read_questions

    plan = BranchPlan(direct=direct, tool=forced, free=free)
    asked = read_questions(questions)[:limit]
    cache = None if "://" in store or dry_run else Path(store) / VERDICTS
    verify = verify_with(verifier, judge, judge_rubric, cache=cache)
    check_verifiers(asked, verify)
    chosen = choose_agent(
        model, tools, agent, system_prompt=system_prompt, calls=calls, temperature=temperature, label=label
    )
    if agreement and not free:
        raise ConfigurationError("--agreement compares with what a question's free run answered: add --free 1.")
    _announce(console, asked, chosen, plan, agreement=agreement)
    acting = sorted({*chosen.undeclared} - {*(read_only or ())}) if forced else []
    if acting and not (allow_acting or dry_run):
        _ask_to_act(acting)
    if dry_run:
        if json is not None:
            write_json(json, {**_plan_figures(asked, chosen, plan), "dry_run": True})
        return
    settings = [chosen.model, chosen.tools, system_prompt, calls, temperature, seed]
    name = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    started = time.perf_counter()
    report = _record(
        console, asked, chosen, plan, store, name=name, seed=seed, timeout=timeout, retries=retries,
        concurrency=concurrency or chosen.concurrency,
    )  # fmt: skip
    figures: dict[str, Any] = {**_plan_figures(asked, chosen, plan), **asdict(report), "agreement": agreement}
    figures["seconds"] = time.perf_counter() - started
    if agreement:
        from metis_agent.judging.judge import own_answers

        mine = (run for run in runs_of(store, console) if run.metadata.get("rollout") == name)
        verify = verify_with(verifier, judge, judge_rubric, cache=cache, own=own_answers(mine))
    with training_libraries():
        figures["branches"] = _figures_by_branch(store, name, verify, console)
    _show(console, figures, store)
    if json is not None:
        write_json(json, figures)


def _announce(console: Console, asked: list[Question], chosen: Choice, plan: BranchPlan, *, agreement: bool) -> None:
    branches = ", ".join([f"{plan.direct} direct", *(f"{plan.tool} with {tool}" for tool in chosen.tools)])
    starts = len(plan.starts(chosen.tools))
    console.print(
        f"{len(asked):,} questions, each {branches}, {plan.free} free: {len(asked) * starts:,} runs of {chosen.model}."
    )
    if unjudged := sum(question.answer is None for question in asked):
        console.print(
            f"{unjudged:,} questions have no 'answer': their runs are judged by agreement with the free run's."
            if agreement
            else f"[bold yellow]{unjudged:,} questions have no 'answer'[/]: their runs can't be judged, but by their "
            "agreement with the answer of a free run (--free 1 --agreement)."
        )


def _ask_to_act(acting: list[str]) -> None:
    """Ask before tools are forced that may act on the world.

    Raises:
        ConfigurationError: there is nobody to ask, or the answer was no.
    """
    tools = ", ".join(acting)
    if sys.stdin.isatty() and typer.confirm(f"Not declared to change nothing: {tools}. Force their calls?"):
        return
    raise ConfigurationError(
        f"{tools}: not declared to change nothing, and each question would force a call of each. Of those that only "
        "read say so, by metadata={'read_only': True} or --read-only TOOL; leave out those that act, or --allow-acting."
    )


def _plan_figures(asked: list[Question], chosen: Choice, plan: BranchPlan) -> dict[str, Any]:
    runs = len(asked) * len(plan.starts(chosen.tools))
    counts = {"direct": plan.direct, **dict.fromkeys(chosen.tools, plan.tool), "free": plan.free}
    return {"model": chosen.model, "questions": len(asked), "runs": runs, "runs_per_question": counts}


def _record(
    console: Console,
    asked: list[Question],
    chosen: Choice,
    plan: BranchPlan,
    store: str,
    *,
    name: str,
    seed: int,
    timeout: float,
    retries: int,
    concurrency: int,
) -> RecordingReport:
    from metis_agent.recording.store import TrajectoryStore
    from metis_agent.rollouts.branches import BranchRecorder, branch_rollouts

    with TrajectoryStore(store) as kept, progress_bars(console) as bars:
        recorder = BranchRecorder(
            chosen.build, kept, concurrency=concurrency, timeout=timeout, retries=retries,
            metadata={"model": chosen.model, "rollout": name},
        )  # fmt: skip
        task = bars.add_task("roll out", total=len(asked) * len(plan.starts(chosen.tools)))
        failed = 0

        def on_run(run: Trajectory | None) -> None:
            nonlocal failed
            failed += run is not None and run.status == "failed"
            bars.update(task, advance=1, description="roll out" + (f" ({failed} failed)" if failed else ""))

        return recorder.record(branch_rollouts(asked, chosen.tools, plan, name=name, seed=seed), progress=on_run)


def _figures_by_branch(store: str, name: str, verify: Verify, console: Console) -> dict[str, dict[str, float]]:
    """Accuracy, calls, cost and seconds of each forced branch and of the free runs, over all runs of this name."""
    from metis_agent.judging.verifiers import judged

    totals: dict[str, dict[str, float]] = {}
    mine = (run for run in runs_of(store, console) if run.metadata.get("rollout") == name and run.status != "failed")
    for run, right, _ in judged(mine, verify):
        total = totals.setdefault(
            str(run.metadata.get("forced")), dict.fromkeys(("runs", "judged", "right", "calls", "cost", "seconds"), 0.0)
        )
        for key, value in (
            ("runs", 1), ("judged", right is not None), ("right", bool(right)), ("calls", run.tool_calls),
            ("cost", run.cost), ("seconds", run.seconds),
        ):  # fmt: skip
            total[key] += value
    return {
        branch: {
            "runs": total["runs"],
            "judged": total["judged"],
            "accuracy": total["right"] / total["judged"] if total["judged"] else float("nan"),
            **{key: total[key] / total["runs"] for key in ("calls", "cost", "seconds")},
        }
        for branch, total in totals.items()
    }


def _show(console: Console, figures: dict[str, Any], store: str) -> None:
    table = Table(title="What is in the store", title_justify="left")
    for heading in ("branch", "runs", "accuracy", "calls a run", "cost a run", "seconds a run"):
        table.add_column(heading, justify="left" if heading == "branch" else "right")
    for branch, row in figures["branches"].items():
        accuracy = f"{row['accuracy']:.3f}" if row["judged"] else "-"
        calls, cost, seconds = f"{row['calls']:.2f}", f"{row['cost']:.4g}", f"{row['seconds']:.2f}"
        table.add_row(branch, f"{row['runs']:,.0f}", accuracy, calls, cost, seconds)
    console.print(table)
    console.print(
        f"{figures['found']:,} were finished before, {figures['finished']:,} now; {figures['failed']:,} failed and are "
        "left out" + (f", the last with {figures['last_failure']!r}" if figures["failed"] else "") + "."
    )
    if figures["uncalled"]:
        console.print(
            f"[bold yellow]{figures['uncalled']:,} runs made no call though one was forced[/]: they count for no "
            "branch."
        )
    if figures["failed"]:
        console.print("Run the same command again to try those.")
    more = " --agreement" if figures["agreement"] else ""
    console.print(f"Next: metis train gate --store {store}{more} --hold-out 0.4 --out my-gate")
