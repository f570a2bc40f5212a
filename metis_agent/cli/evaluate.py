"""`metis evaluate`: a trained gate beside its baselines, and the paper's benchmarks for any model.

`metis evaluate benchmark NAME`, also spelled `metis evaluate --benchmark NAME`, prints the benchmark's scores, and
beside them what the tools were worth.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from metis_agent.cli.agent_options import (
    AgentOption,
    Choice,
    ModelOption,
    ToolsOption,
    choose_agent,
    load_chat_model,
    named_gate,
)
from metis_agent.cli.calibrate import DropSeenOption, ask_gate, report_drift
from metis_agent.cli.output import JsonOption, progress_bars, screen, training_libraries, write_json
from metis_agent.cli.train import show_figures
from metis_agent.cli.training_options import Records, SeedOption, takes_settings
from metis_agent.errors import MissingDependencyError

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Estimate
    from metis_agent.evaluation.benchmarks.run import BenchmarkResult, BenchmarkRun
    from metis_agent.evaluation.gates import Scored
    from metis_agent.rollouts.branches import RecordingReport
    from metis_agent.rollouts.outcomes import OutcomeTable
    from metis_agent.types import Trajectory

__all__ = ["evaluate_app", "evaluate_benchmark_command", "evaluate_gate_command"]

_TOOLS = ("metis_agent.cli.agent_options:seeing_python",)
_RUNS, _AGENT, _SCORING = "Runs", "Agent", "Scoring"


class _WithBenchmarkOption(TyperGroup):
    """`metis evaluate --benchmark NAME ...` is `metis evaluate benchmark NAME ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name first where the option stands for it."""
        if args and args[0].startswith("-"):
            for place, word in enumerate(args):
                option, equals, name = word.partition("=")
                if option == "--benchmark" and (equals or place + 1 < len(args)):
                    rest = [*args[:place], *args[place + (1 if equals else 2) :]]
                    args = ["benchmark", name if equals else args[place + 1], *rest]
                    break
        return super().parse_args(ctx, args)


evaluate_app = typer.Typer(help="Measure what was trained.", no_args_is_help=True, cls=_WithBenchmarkOption)


@evaluate_app.callback()
def _evaluate(
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help="With its options, the same as the command 'benchmark NAME'.")
    ] = None,
) -> None:
    """Measure a gate on your own questions, or any model on a public benchmark."""
    # By now `_WithBenchmarkOption` has made a command of it; here it is only listed.


@evaluate_app.command("gate")
@takes_settings
def evaluate_gate_command(
    records: Records,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The gate's folder.")],
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Try another threshold than the gate's own.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="Table that the supervised baselines are fitted on; by default folds of --outcomes itself."),
    ] = None,
    drop_seen: DropSeenOption = False,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Measure a gate: the area under accuracy and calls, budgets, calibration, and what it does at its threshold.

    Beside it: never, always, random, oracle, and supervised baselines. The area is the mean accuracy over all budgets
    of calls, each spent where the gate sees most need; AUC is of "the direct answer is right". Intervals are 95%. It
    also says whether these questions are like those it was calibrated on.

    Example: metis evaluate gate my-gate --store runs --drop-seen

    Example: metis evaluate gate my-gate --outcomes held-out.parquet --tool text_search=search --json figures.json
    """
    console = screen(json)
    from metis_agent.gates.policy import PolicyGate

    gate = PolicyGate(folder, threshold=threshold)
    table = records.load(console, tools=gate.artefact.tools, every_step=gate.every_step)
    from metis_agent.evaluation.gates import evaluate_gate

    table, scored = ask_gate(gate, table, console, drop_seen=drop_seen)
    try:
        fitted_on = records.other(train).load(console) if train else None
        # Of when to stop, the question alone says too little to compare with; caps and the oracle stand beside it.
        baselines = {} if table.runs else _baselines(table, fitted_on, seed)
    except MissingDependencyError as missing:
        console.print(str(missing))
        baselines = {}
    figures = evaluate_gate(scored, table, gate.threshold, baselines=baselines, seed=seed)
    show_figures(console, figures)
    figures["drift"] = report_drift(console, gate.artefact, scored)
    if json is not None:
        write_json(json, figures)


def _baselines(table: OutcomeTable, train: OutcomeTable | None, seed: int) -> dict[str, Scored]:
    """Fitted on `train`, or on four fifths of the table to score the fifth."""
    import numpy as np

    from metis_agent.evaluation.comparison import supervised_baselines
    from metis_agent.evaluation.gates import merge_folds

    if train is not None:
        return supervised_baselines(train, table)
    try:
        fold = table.folds(5, seed)
        parts = []
        for held_out in range(5):
            rows = np.flatnonzero(fold == held_out)
            parts.append((rows, supervised_baselines(table.take(np.flatnonzero(fold != held_out)), table.take(rows))))
    except ValueError:
        # Too few groups, or a fold with one outcome only: there is nothing to fit.
        return {}
    return merge_folds(len(table), parts)


@evaluate_app.command("benchmark")
def evaluate_benchmark_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="vstar, hrbench (or hrbench-4k, hrbench-8k), wemath or mathvista.")
    ],
    model: ModelOption = None,
    tools: ToolsOption = None,
    agent: AgentOption = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Of an endpoint that speaks OpenAI's protocol, such as vLLM's; --model is then its model's name, and "
            "the key is in OPENAI_API_KEY where it wants one.",
            rich_help_panel=_AGENT,
        ),
    ] = None,
    gate: Annotated[
        str,
        typer.Option(
            help="Folder of a trained gate; or 'model' (it decides itself), 'always' or 'never'.",
            rich_help_panel=_AGENT,
        ),
    ] = "model",
    system_prompt: Annotated[
        str | None, typer.Option(help="Goes before every conversation.", rich_help_panel=_AGENT)
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="Tool calls that one run may make.", rich_help_panel=_AGENT)] = 8,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Of the model's sampling; by default its own.", rich_help_panel=_AGENT),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with a copy of the data set's repository; by default it is fetched, once."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder or URL for the trajectories; by default runs/benchmarks/NAME.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="So many questions (We-Math: problems), taken evenly over the data set."),
    ] = None,
    direct: Annotated[
        int,
        typer.Option(
            min=0, help="Runs of each question without a tool: what they get right needs none.", rich_help_panel=_RUNS
        ),
    ] = 4,
    forced: Annotated[
        int, typer.Option(min=0, help="Runs of each question with a tool's call forced.", rich_help_panel=_RUNS)
    ] = 1,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once; by default as suits the model.", rich_help_panel=_RUNS),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one run may take.", rich_help_panel=_RUNS)] = 600.0,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a failed run is tried again.", rich_help_panel=_RUNS)
    ] = 2,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="MathVista: a model (as --model) that extracts answers, as its authors do it; by default rules do.",
            rich_help_panel=_SCORING,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A model (as --model) that judges the answers that no rule can read; by default they are wrong.",
            rich_help_panel=_SCORING,
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="What records call the model; by default its name in these options.")
    ] = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be run.")] = False,
    json: JsonOption = None,
) -> None:
    """Run a model on a public benchmark: its own scores, and what its tool calls were worth, with 95% intervals.

    Each question is asked once as the agent is deployed, and, to tell redundant calls from necessary ones, --direct
    times without a tool and --forced times with one. What is finished is recorded and never run again: stop it at any
    time, and run the same command to go on. Runs that fail for want of the model or a sandbox are tried again, then
    counted and left out. Scoring asks no model, and can be repeated.

    Example: metis evaluate --benchmark vstar --model openai:gpt-5

    Example: metis evaluate benchmark hrbench-4k --model Qwen/Qwen3-VL-8B-Instruct --base-url http://localhost:8000/v1

    Example: metis evaluate benchmark mathvista --model ./my-qwen3-vl --data MathVista --limit 50 --direct 0 --forced 0
    """
    console = screen(json)
    started = time.perf_counter()
    with training_libraries():
        from metis_agent.evaluation.benchmarks import benchmark_named
        from metis_agent.evaluation.benchmarks.base import open_rows
        from metis_agent.evaluation.benchmarks.run import BenchmarkRun, Runs, chosen_items

        scoring = _scoring(name, extractor, judge)
        benchmark = benchmark_named(name, **scoring.options)
        chosen = choose_agent(
            model, tools or (None if agent else _TOOLS), agent, system_prompt=system_prompt, calls=calls,
            temperature=temperature, label=label, base_url=base_url,
        )  # fmt: skip
        deciding = named_gate(gate)
        rows = open_rows(benchmark.source, data)
        settings = [name, chosen.model, chosen.tools, gate, deciding.version, system_prompt, calls, temperature, seed]
        run = BenchmarkRun(
            benchmark=benchmark, items=chosen_items(benchmark, rows, limit), rows=rows,
            name=hashlib.sha256(repr(settings).encode()).hexdigest()[:12], runs=Runs(direct=direct, tool=forced),
            seed=seed,
        )  # fmt: skip
        place = store or f"runs/benchmarks/{name}"
        _announce(console, run, chosen.model)
        figures: dict[str, Any] = {
            "benchmark": name, "data": str(data or benchmark.source.repository), "rows": len(rows),
            "data_digest": rows.digest(), "licence": benchmark.source.licence, "model": chosen.model,
            "tools": chosen.tools, "gate": gate, "run": run.name, "store": place, "planned_runs": run.planned,
            "extraction": extractor or "rules", "judge": judge,
        }  # fmt: skip
        if dry_run:
            _write(json, {**figures, "dry_run": True})
            return
        report = _record(
            console, run, chosen, place, deciding, concurrency=concurrency or chosen.concurrency, timeout=timeout,
            retries=retries,
        )  # fmt: skip
        console.print("Scoring what is recorded.")
        result = run.score(place, judge_unread=scoring.judge, prepare=scoring.prepare)
    _show(console, run, result, report, place)
    _write(json, {**figures, **_figures(run, result, report), "seconds": time.perf_counter() - started})


def _record(
    console: Console, run: BenchmarkRun, chosen: Choice, store: str, gate: Any, **options: Any
) -> RecordingReport:
    with progress_bars(console) as bars:
        task = bars.add_task(run.benchmark.name, total=run.planned)
        failed = 0

        def on_run(found: Trajectory | None) -> None:
            nonlocal failed
            failed += found is not None and found.status == "failed"
            described = run.benchmark.name + (f" ({failed} failed)" if failed else "")
            bars.update(task, advance=1, description=described)

        report = run.record(
            chosen.build, store, gate=gate, progress=on_run, metadata={"model": chosen.model}, **options
        )
    for reason in run.bad_pictures[:3]:
        console.print(f"[bold yellow]left out[/]: {escape(reason)}", highlight=False)
    return report


class _Scoring:
    """Who reads the answers that rules can't."""

    options: dict[str, Any]
    judge: Callable[..., bool | None] | None = None

    def __init__(self) -> None:
        self.options = {}
        self._preparing: list[Callable[[Any], None]] = []

    def prepare(self, answers: Any) -> None:
        for ask in self._preparing:
            ask(answers)

    def before(self, ask: Callable[[Any], None]) -> None:
        self._preparing.append(ask)


def _scoring(name: str, extractor: str | None, judge: str | None) -> _Scoring:
    from metis_agent.errors import ConfigurationError

    scoring = _Scoring()
    if extractor is not None:
        if name != "mathvista":
            raise ConfigurationError(f"--extractor {extractor!r} is for mathvista alone; {name!r} needs none.")
        from metis_agent.evaluation.benchmarks.mathvista import ModelExtractor

        reads = ModelExtractor(load_chat_model(extractor), name=extractor)
        scoring.options["extract"] = reads
        scoring.before(reads.read)
    if judge is not None:
        from metis_agent.judging.judge import AnswerJudge

        scoring.judge = AnswerJudge(load_chat_model(judge), name=judge)
    return scoring


def _figures(run: BenchmarkRun, result: BenchmarkResult, report: RecordingReport) -> dict[str, Any]:
    return {
        "scores": {name: asdict(found) for name, found in result.measures.items()},
        "agent": result.evaluation.to_dict(),
        "questions": result.questions, "units": result.units, "unanswered": result.unanswered,
        "unread_answers": result.unread, "shrunk_pictures": result.shrunk, "bad_pictures": run.bad_pictures,
        "recording": asdict(report),
        "published": {each.who: each.values for each in run.benchmark.published},
    }  # fmt: skip


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, figures)


_USE = {
    "tool_rate": "questions with a tool call",
    "calls_per_question": "calls a question",
    "redundant_rate": "calls where the direct answer is right",
    "necessary_recall": "calls where only a tool helps",
}


def _announce(console: Console, run: BenchmarkRun, model: str) -> None:
    """What is about to be run."""
    units = len({item.unit for item in run.items})
    direct, forced = run.runs.direct, run.runs.tool
    console.print(
        f"{run.benchmark.name}: {len(run.items):,} questions ({units:,} units), each once as deployed, {direct} times "
        f"without a tool, {forced} times with one: {run.planned:,} runs of {escape(model)}.",
        highlight=False,
    )


def _show(console: Console, run: BenchmarkRun, result: BenchmarkResult, report: RecordingReport, store: str) -> None:
    """The figures, and what was left out of them."""
    table = Table(title=run.benchmark.name, title_justify="left")
    whose = [each.who for each in run.benchmark.published]
    for heading in ("", "value", "95% interval", "of", *whose):
        table.add_column(heading, justify="right" if heading else "left")
    names = [name for name in run.benchmark.headline if name in result.measures]
    for name in names or list(result.measures)[:8]:
        theirs = [each.values.get(name) for each in run.benchmark.published]
        published = ["" if value is None else f"{value:.3f}" for value in theirs]
        table.add_row(escape(name), *_cells(result.measures[name]), *published)
    table.add_section()
    for name, words in _USE.items():
        table.add_row(words, *_cells(getattr(result.evaluation.overall, name)), *[""] * len(whose))
    console.print(table)
    _notes(console, result, report, store)


def _cells(found: Estimate) -> tuple[str, str, str]:
    if found.value is None:
        return "-", "-", "0"
    return f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}", f"{found.questions:,}"


def _notes(console: Console, result: BenchmarkResult, report: RecordingReport, store: str) -> None:
    left_out = f"; {result.unanswered:,} questions have none and are left out" if result.unanswered else ""
    console.print(
        f"{report.found:,} runs were finished before, {report.finished:,} now, {report.failed:,} failed{left_out}."
    )
    if report.failed:
        console.print(f"The last failed with {report.last_failure!r}. Run the same command again to try those.")
    if result.unread:
        console.print(f"{result.unread:,} answers could be read by no rule: wrong, unless a judge read them (--judge).")
    if result.shrunk:
        console.print(f"{result.shrunk:,} pictures had more pixels than the agent reads, and were shrunk.")
    console.print(f"Recorded in {store}; look at it with: metis report {store}", highlight=False)
