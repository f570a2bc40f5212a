"""`metis rollout`: record what comes of each question down every branch, and at every step of a run, with any model."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from langchain_core.messages import AIMessage
from rich.console import Console
from rich.markup import escape
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
from metis_agent.cli.output import JsonOption, RayOption, progress_bars, screen, training_libraries, write_json
from metis_agent.cli.training_options import VERDICTS, runs_of
from metis_agent.errors import ConfigurationError
from metis_agent.rollouts.branches import EVERY_STEP, BranchPlan
from metis_agent.rules.budget import Budget

if TYPE_CHECKING:
    from metis_agent.judging.verifiers import Verify
    from metis_agent.rollouts.branches import RecordingReport
    from metis_agent.rollouts.runner import Rollout
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
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step",
            help="Also fork each run that goes as the model decides, before each of its rounds of calls, into "
            "answering at once: what `metis train gate --every-step` learns from.",
        ),
    ] = False,
    direct: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rollouts of each question without a tool.",
            show_default=f"{BranchPlan.direct}, with --every-step {EVERY_STEP.direct}",
        ),
    ] = None,
    forced: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rollouts of each question with each tool's call forced.",
            show_default=f"{BranchPlan.tool}, with --every-step {EVERY_STEP.tool}",
        ),
    ] = None,
    free: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rollouts of each question as the model decides.",
            show_default=f"{BranchPlan.free}, with --every-step {EVERY_STEP.free}",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Goes before every conversation.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="Tool calls that one run may make.")] = Budget.calls,
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
    base_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a server that speaks OpenAI's protocol and serves --model; repeat for more that serve the same, "
            "with --ray."
        ),
    ] = None,
    ray: RayOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be run.")] = False,
    json: JsonOption = None,
) -> None:
    """Ask a model each question without a tool, with each tool, and as it likes, and record what comes of it.

    The graph that serves users makes the runs. What is finished is never run again: stop it at any time, and run the
    same command to go on. Runs that fail for want of the model, a sandbox or a judge are tried again, then counted and
    left out; they are never scored as wrong.

    Example: metis rollout questions.jsonl --model openai:gpt-5 --tools my_tools.py:TOOLS --store runs

    Example: metis rollout questions.jsonl --agent my_agent.py:make --store runs --every-step --dry-run

    Next: metis train gate --store runs --hold-out 0.4 --out my-gate
    """
    console = screen(json)
    from metis_agent.rollouts.questions import read_questions

    given = {name: count for name, count in (("direct", direct), ("tool", forced), ("free", free)) if count is not None}
    plan = replace(EVERY_STEP if every_step else BranchPlan(), **given)
    asked = read_questions(questions)[:limit]
    cache = None if "://" in store or dry_run else Path(store) / VERDICTS
    verify = verify_with(verifier, judge, judge_rubric, cache=cache)
    check_verifiers(asked, verify)
    urls: Sequence[str | None] = base_url or [None]
    if len(urls) > 1 and ray is None:
        raise ConfigurationError(
            f"{len(urls)} servers are asked from several workers: add --ray local, or a cluster's."
        )
    choose = partial(
        choose_agent, model, tools, agent, system_prompt=system_prompt, calls=calls, temperature=temperature,
        label=label,
    )  # fmt: skip
    chosen = choose(base_url=urls[0])
    if every_step and not plan.free:
        raise ConfigurationError("--every-step forks the runs that go as the model decides: --free is at least 1.")
    if agreement and not plan.free:
        raise ConfigurationError("--agreement compares with what a question's free run answered: add --free 1.")
    _announce(console, asked, chosen, plan, agreement=agreement)
    acting = sorted({*chosen.undeclared} - {*(read_only or ())})
    if acting and plan.tool and not allow_acting:
        _ask_to_act(console, acting, dry_run=dry_run)
    settings = [chosen.model, chosen.tools, system_prompt, calls, temperature, seed]
    name = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    forks = _Forks(store, asked, name=name, seed=seed, acting=acting) if every_step else None
    if forks is not None:
        forks.check(console, chosen)
    if dry_run:
        planned = {} if forks is None else forks.announce(console, chosen)
        if json is not None:
            write_json(json, {**_plan_figures(asked, chosen, plan), **planned, "dry_run": True})
        return
    from metis_agent.rollouts.branches import branch_rollouts

    started = time.perf_counter()
    how: dict[str, Any] = {
        "name": name,
        "timeout": timeout,
        "retries": retries,
        "concurrency": concurrency or chosen.concurrency,
        "on": None if ray is None else (ray, partial(_chosen_for, choose, urls)),
    }
    report = _record(
        console, "roll out", branch_rollouts(asked, chosen.tools, plan, name=name, seed=seed),
        len(asked) * len(plan.starts(chosen.tools)), chosen, store, **how,
    )  # fmt: skip
    figures: dict[str, Any] = {**_plan_figures(asked, chosen, plan), "agreement": agreement, "every_step": every_step}
    if forks is not None:
        figures |= forks.announce(console, chosen)
        further = _record(console, "answer at each step", forks.missing(), figures["forks"], chosen, store, **how)
        report = report.merged(further)
    figures |= {**asdict(report), "seconds": time.perf_counter() - started}
    if agreement:
        from metis_agent.judging.judge import own_answers

        mine = (run for run in runs_of(store, console) if run.metadata.get("rollout") == name)
        verify = verify_with(verifier, judge, judge_rubric, cache=cache, own=own_answers(mine))
    with training_libraries():
        figures["branches"] = _figures_by_branch(store, name, verify, console)
        if every_step:
            figures["steps"] = _figures_by_step(store, name, verify, console)
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


def _ask_to_act(console: Console, acting: list[str], *, dry_run: bool) -> None:
    """Ask before tools are forced that may act on the world.

    Raises:
        ConfigurationError: there is nobody to ask, or the answer was no.
    """
    tools = ", ".join(acting)
    if dry_run:
        console.print(f"Without --read-only or --allow-acting it asks first whether to force calls of {escape(tools)}.")
        return
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
    what: str,
    rollouts: Iterable[Rollout],
    total: int,
    chosen: Choice,
    store: str,
    *,
    name: str,
    on: tuple[str, Callable[[int], Any]] | None,
    **how: Any,
) -> RecordingReport:
    from metis_agent.recording.store import TrajectoryStore
    from metis_agent.rollouts.branches import BranchRecorder, record_on_ray

    how["metadata"] = {"model": chosen.model, "rollout": name}
    with progress_bars(console) as bars:
        task = bars.add_task(what, total=total)
        failed = 0

        def show(done: int, of_them_failed: int) -> None:
            nonlocal failed
            failed += of_them_failed
            bars.update(task, advance=done, description=what + (f" ({failed} failed)" if failed else ""))

        if on is not None:
            return record_on_ray(rollouts, store, on[1], ray=on[0], progress=show, **how)
        with TrajectoryStore(store) as kept:
            recorder = BranchRecorder(chosen.build, kept, **how)
            return recorder.record(rollouts, progress=lambda run: show(1, run is not None and run.status == "failed"))


def _chosen_for(choose: Callable[..., Choice], urls: Sequence[str | None], part: int) -> Any:
    """The agent on a worker: its part is asked of one of the servers, each in its turn."""
    return choose(base_url=urls[part % len(urls)]).build


class _Forks:
    """The answers to ask for at each step of the free runs of one recording, as they stand in its store."""

    def __init__(self, store: str, asked: Sequence[Question], *, name: str, seed: int, acting: Sequence[str]) -> None:
        self._store, self._name, self._seed, self._acting = store, name, seed, acting
        self._asked = {question.id for question in asked}

    def check(self, console: Console, chosen: Choice) -> None:
        """Say before which tools' calls no run is cut short.

        Raises:
            ConfigurationError: these are all.
        """
        if not self._acting:
            return
        tools = ", ".join(self._acting)
        if {*self._acting} == {*chosen.tools}:
            raise ConfigurationError(
                f"{tools}: not declared to change nothing, and no run may be cut short before a call that acts, so "
                "there would be no step to decide at. Of those that only read say so, by metadata={'read_only': True} "
                "or --read-only TOOL."
            )
        console.print(f"Not declared to change nothing: {tools}. Runs are forked after their last such call only.")

    def announce(self, console: Console, chosen: Choice) -> dict[str, Any]:
        """Say what is to be asked of the runs that are recorded, and what it will read."""
        from metis_agent.audit.accounting import Prices
        from metis_agent.audit.turns import tokens_of

        runs, forks, finished, missing, read = 0, 0, set[str](), 0, 0
        for run, of_run in self._of_runs(finished):
            runs += 1
            forks += len(of_run)
            left = [fork for fork in of_run if fork.id not in finished]
            missing += len(left)
            read += sum(tokens_of(fork.begun) for fork in left) + len(left) * tokens_of([AIMessage(run.answer)])
        cost = Prices().of_call(chosen.model, {"input_tokens": read})
        price = f", about ${cost.total:,.2f}" if cost else ""
        if runs:
            console.print(
                f"At each step of {runs:,} recorded runs: {forks:,} answers to ask for, of which {forks - missing:,} "
                f"are there; about {read:,} tokens to read and write{price}."
            )
        if rest := max(0, len(self._asked) - runs):
            console.print(
                f"Of {rest:,} questions no run is there yet: each adds an answer for each round of its calls."
            )
        return {"forked_runs": runs, "forks": forks, "forks_missing": missing, "fork_tokens": read}

    def missing(self) -> Iterator[Rollout]:
        """All forks; the recorder leaves out those that are finished."""
        for _, forks in self._of_runs():
            yield from forks

    def _of_runs(self, finished: set[str] | None = None) -> Iterator[tuple[Trajectory, list[Rollout]]]:
        from metis_agent.recording.store import TrajectoryStore
        from metis_agent.rollouts.branches import FORK
        from metis_agent.rollouts.points import forks_of

        if "://" not in self._store and not Path(self._store).exists():
            return
        kept = TrajectoryStore(self._store, read_only=True)
        if finished is not None:
            finished |= kept.ids()
        for run in kept.read():
            mine = run.metadata.get("rollout") == self._name and run.branch == "free" and run.status == "finished"
            if mine and FORK not in run.metadata and run.question.id in self._asked:
                yield run, forks_of(run, acting=self._acting, seed=self._seed)


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


def _figures_by_step(store: str, name: str, verify: Verify, console: Console) -> list[dict[str, float]]:
    """By step, over the runs that were forked at all of their steps: what stopping there and what going on gave."""
    from metis_agent.rollouts.points import PointPool

    pool = PointPool(verify=verify, trust_verdicts=True)
    pool.extend(run for run in runs_of(store, console, whole=True) if run.metadata.get("rollout") == name)
    if not pool.coverage()["whole runs"]:
        return []
    points = pool.table()
    return [
        {
            "step": step,
            "runs": int((at := points.steps == step).sum()),
            "stop": float(points.correct[at, 0].mean()),
            "on": float(points.correct[at, 1].mean()),
            "calls_left": float(points.cost[at, 1].mean()),
        }
        for step in range(int(points.steps.max()) + 1)
        if (points.steps == step).any()
    ]


def _show(console: Console, figures: dict[str, Any], store: str) -> None:
    table = Table(title="What is in the store", title_justify="left")
    for heading in ("branch", "runs", "accuracy", "calls a run", "cost a run", "seconds a run"):
        table.add_column(heading, justify="left" if heading == "branch" else "right")
    for branch, row in figures["branches"].items():
        accuracy = f"{row['accuracy']:.3f}" if row["judged"] else "-"
        calls, cost, seconds = f"{row['calls']:.2f}", f"{row['cost']:.4g}", f"{row['seconds']:.2f}"
        table.add_row(branch, f"{row['runs']:,.0f}", accuracy, calls, cost, seconds)
    console.print(table)
    if figures["every_step"]:
        steps = Table(title="At each step of the runs with calls", title_justify="left")
        for heading in ("calls so far", "runs", "right by answering", "right by going on", "calls to come"):
            steps.add_column(heading, justify="right")
        for row in figures["steps"]:
            steps.add_row(
                str(row["step"]), f"{row['runs']:,}", f"{row['stop']:.3f}", f"{row['on']:.3f}",
                f"{row['calls_left']:.2f}",
            )  # fmt: skip
        console.print(steps if figures["steps"] else "No run made a call of a tool that only reads: nothing to decide.")
    console.print(
        f"{figures['found']:,} were finished before, {figures['finished']:,} now; {figures['failed']:,} failed and are "
        "left out" + (f", the last with {figures['last_failure']!r}" if figures["failed"] else "") + "."
    )
    if figures["uncalled"]:
        console.print(
            f"[bold yellow]{figures['uncalled']:,} runs made no call though one was forced[/]: they count for no "
            "branch." + (f" In {figures['unmet']:,} of them the server gave none either." if figures["unmet"] else "")
        )
    if figures["failed"]:
        console.print("Run the same command again to try those.")
    more = (" --every-step" if figures["every_step"] else "") + (" --agreement" if figures["agreement"] else "")
    console.print(f"Next: metis train gate --store {store}{more} --hold-out 0.4 --out my-gate")
