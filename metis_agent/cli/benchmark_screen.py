"""What `metis evaluate benchmark` prints: the benchmark's scores, and beside them what the tools were worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Estimate
    from metis_agent.evaluation.benchmarks.run import BenchmarkResult, BenchmarkRun
    from metis_agent.rollouts.branches import RecordingReport

__all__ = ["announce", "show"]

_USE = {
    "tool_rate": "questions with a tool call",
    "calls_per_question": "calls a question",
    "redundant_rate": "calls where the direct answer is right",
    "necessary_recall": "calls where only a tool helps",
}


def announce(console: Console, run: BenchmarkRun, model: str) -> None:
    """What is about to be run."""
    units = len({item.unit for item in run.items})
    direct, forced = run.runs.direct, run.runs.tool
    console.print(
        f"{run.benchmark.name}: {len(run.items):,} questions ({units:,} units), each once as deployed, {direct} times "
        f"without a tool, {forced} times with one: {run.planned:,} runs of {escape(model)}.",
        highlight=False,
    )


def show(console: Console, run: BenchmarkRun, result: BenchmarkResult, report: RecordingReport, store: str) -> None:
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
