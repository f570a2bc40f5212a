"""`metis audit`: what do an agent's tool calls change, and what do those cost that change nothing?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from metis_agent.cli.curate_parts import open_model
from metis_agent.cli.output import JsonOption, progress_bars, screen, training_libraries, write_json
from metis_agent.cli.training_options import SeedOption
from metis_agent.errors import ConfigurationError, InputError
from metis_agent.formats import atomic_path

if TYPE_CHECKING:
    from metis_agent.audit.agreement import Verdicts
    from metis_agent.audit.probes import ProbeEstimate, Prober
    from metis_agent.audit.run import Findings
    from metis_agent.audit.turns import Survey, ToolEffects
    from metis_agent.sqlite import DiskCache

__all__ = ["audit_command"]

_TOOLS, _PROBES, _VERDICTS = "What tools do, and cost", "Probes", "Verdicts"


def audit_command(
    store: Annotated[str, typer.Option(help="Folder or URL of recorded trajectories: see `metis import`.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model to probe, by its init_chat_model name ('openai:gpt-5'), a local folder, or "
            "FILE.py:ATTRIBUTE. By default the one that most of the runs were made with.",
            rich_help_panel=_PROBES,
        ),
    ] = None,
    reads: Annotated[
        list[str] | None,
        typer.Option(
            help="A tool that only reads, or a pattern ('get_*'); repeat for more, '*' for all not named with --acts. "
            "Only the calls of such tools can be redundant.",
            rich_help_panel=_TOOLS,
        ),
    ] = None,
    acts: Annotated[
        list[str] | None,
        typer.Option(help="A tool that acts, or a pattern: books, mails, writes.", rich_help_panel=_TOOLS),
    ] = None,
    tool_cost: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DOLLARS a call; repeat for more. By default what it declares.", rich_help_panel=_TOOLS),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(
            help="Own prices, .json or .toml: 'models' (dollars a million tokens) and 'tools' (dollars a call). What "
            "it does not name is priced by genai-prices.",
            rich_help_panel=_TOOLS,
        ),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns with calls to probe, drawn at random.")] = 300,
    of_model: Annotated[str | None, typer.Option(help="Only runs of this model, as it was named then.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Dollars that probes may cost, now.", rich_help_panel=_PROBES)
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Probes a minute, at most.", rich_help_panel=_PROBES)] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Probes at once.", rich_help_panel=_PROBES)] = 8,
    self_report: Annotated[
        bool,
        typer.Option(
            "--self-report/--no-self-report",
            help="Also ask the model whether it could answer already, to compare with: as many probes again.",
            rich_help_panel=_PROBES,
        ),
    ] = True,
    system_prompt: Annotated[str, typer.Option(help="For runs whose record has none.", rich_help_panel=_PROBES)] = "",
    instruction: Annotated[
        str,
        typer.Option(
            help="A last message to the model, such as 'Answer now.', where it announces calls instead of answering.",
            rich_help_panel=_PROBES,
        ),
    ] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            help="Chat model that rules whether two answers tell the same; by default the probed one. 'none': only "
            "what can be compared has a verdict.",
            rich_help_panel=_VERDICTS,
        ),
    ] = None,
    rubric: Annotated[
        str,
        typer.Option(help="When two answers tell the same: a text file.", rich_help_panel=_VERDICTS),
    ] = "agreement",
    check: Annotated[
        int | None,
        typer.Option(
            min=1, help="Write a page on which a person checks the judge on so many turns.", rich_help_panel=_VERDICTS
        ),
    ] = None,
    checked: Annotated[
        Path | None,
        typer.Option(help="What that page has saved: corrects the figures.", rich_help_panel=_VERDICTS),
    ] = None,
    changed_answers: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers that may change in what the frontier calls best.")
    ] = 0.02,
    work: Annotated[
        Path, typer.Option(help="Local folder where everything that was paid for is kept, at once.")
    ] = Path("audit"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("audit.html"),
    points: Annotated[
        Path | None,
        typer.Option(help="Also write the decision points, a .jsonl file: train a gate on when it is enough."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "What the tool calls changed",
    seed: SeedOption = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked and what it will cost; ask nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Say what an agent's tool calls changed, from recorded runs alone, and what the others cost.

    The model is asked to answer at each step of a sample of recorded runs, from what it had read by then; no tool is
    run. Where it would have told the user the same, the calls that followed changed nothing. What was asked is kept:
    stop it at any time, and run the same command to go on.

    Example: metis audit --store runs --reads search --acts send_mail --dry-run

    Example: metis audit --store runs --model openai:gpt-5 --reads '*' --acts book --budget 5 --check 30
    """
    console = screen(json)
    with training_libraries("audit"):
        from metis_agent.audit.accounting import Prices
        from metis_agent.audit.probes import Prober, Probing
        from metis_agent.audit.run import plan_probes
        from metis_agent.audit.turns import ToolEffects
        from metis_agent.sqlite import DiskCache

    effects = ToolEffects(reads=reads or (), acts=acts or ())
    priced = Prices.read(prices, dict(_tool_cost(it) for it in tool_cost or ()))
    surveyed = _survey(console, store, effects, turns, seed, of_model)
    if surveyed.undeclared and not surveyed.sample and sys.stdin.isatty() and console.is_terminal:
        effects = _asked(console, surveyed.undeclared, effects)
        surveyed = _survey(console, store, effects, turns, seed, of_model)
    name = model or _recorded_model(surveyed)
    with DiskCache(work / "probes.sqlite") as cache:
        prober = Prober(
            None if dry_run else _open(name), name=name, cache=cache, prices=priced,
            probing=Probing(
                concurrency=concurrency, rate=rate, budget=budget, system_prompt=system_prompt, instruction=instruction
            ),
        )  # fmt: skip
        probes = plan_probes(surveyed, self_reports=self_report)
        estimate = prober.estimate(probes)
        _announce(console, surveyed, effects, estimate, name, judged=judge != "none")
        if dry_run:
            if json is not None:
                write_json(json, {"dry_run": True, "model": name, "turns": len(surveyed.sample), **asdict(estimate)})
            return
        judge_name = "" if judge == "none" else judge or name
        verdicts = _verdicts(judge_name, rubric, work, concurrency)
        checks = None
        if checked is not None:
            from metis_agent.audit.run import read_checks

            checks = read_checks(checked)
        with progress_bars(console) as bars:
            task = bars.add_task("probe", total=len(probes))
            findings = _audit(
                surveyed, prober, verdicts, prices=priced, self_reports=self_report, checks=checks,
                tolerance=changed_answers, judge=judge_name, seed=seed, progress=lambda: bars.advance(task),
            )  # fmt: skip
    _write(console, findings, out=out, title=title, json=json, check=check, work=work)
    if points is not None:
        rows = [dumps(row, ensure_ascii=False) for row in findings.points()]
        tools = [tool for tool, (effect, _) in sorted(surveyed.tools.items()) if effect == "reads"]
        with atomic_path(points) as draft:
            draft.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", errors="replace")
        console.print(
            f"{len(rows):,} decision points: {points}. Next: metis train gate --outcomes {points} --direct stop "
            f"{' '.join(f'--tool {tool}=on' for tool in tools)} --out my-gate",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _survey(console: Console, store: str, effects: ToolEffects, turns: int, seed: int, of_model: str | None) -> Survey:
    from metis_agent.audit.turns import survey
    from metis_agent.recording.store import TrajectoryStore

    kept = TrajectoryStore(store, read_only=True)
    with progress_bars(console) as bars:
        task = bars.add_task("read", total=kept.count())
        found = survey(
            kept.read(), effects, sample=turns, seed=seed, of_model=of_model, progress=lambda: bars.advance(task)
        )
    if bad := kept.report.torn + kept.report.corrupt:
        console.print(f"{bad:,} lines of {store} could not be read.")
    return found


def _recorded_model(survey: Survey) -> str:
    name = next((name for name, _ in survey.models.most_common() if name), "")
    if not name:
        raise ConfigurationError(
            "The runs don't say which model made them: name the one to probe with --model, such as openai:gpt-5."
        )
    return name


def _open(name: str) -> Any:
    from metis_agent.cli.agent_options import load_chat_model

    return load_chat_model(name) if Path(name).is_dir() else open_model(name)


def _tool_cost(text: str) -> tuple[str, float]:
    name, _, dollars = text.rpartition("=")
    try:
        if not name or not float(dollars) >= 0:
            raise ValueError
    except ValueError:
        raise ConfigurationError(f"--tool-cost {text!r}: write NAME=DOLLARS, such as search=0.005.") from None
    return name, float(dollars)


def _asked(console: Console, undeclared: Sequence[str], effects: ToolEffects) -> ToolEffects:
    """Ask once which tools only read; remembered by the options that the answer is printed as."""
    from metis_agent.audit.turns import ToolEffects

    console.print("Which of these tools only read, so that leaving out a call leaves nothing undone?")
    reads, acts = [*effects.reads], [*effects.acts]
    for tool in undeclared:
        (reads if typer.confirm(f"  {tool} only reads", default=False) else acts).append(tool)
    options = " ".join([*(f"--reads {quote(it)}" for it in reads), *(f"--acts {quote(it)}" for it in acts)])
    console.print(f"Next time: {options}", markup=False, soft_wrap=True)
    return ToolEffects(reads=reads, acts=acts)


def _announce(
    console: Console, survey: Survey, effects: ToolEffects, estimate: ProbeEstimate, model: str, *, judged: bool
) -> None:
    from metis_agent.audit.summary import money
    from metis_agent.audit.turns import matched

    console.print(
        f"{survey.turns:,} turns with {survey.calls['reads']:,} calls of tools that read, {survey.calls['acts']:,} of "
        f"tools that act and {survey.calls['unknown']:,} of tools of which nobody said which; {len(survey.sample):,} "
        "turns are probed."
    )
    if survey.undeclared:
        console.print(
            f"[bold yellow]Not known to only read:[/] {escape(', '.join(survey.undeclared[:12]))}. Say of each what it "
            "does: --reads NAME where it only reads, --acts NAME where it books, mails or writes.",
            soft_wrap=True,
        )
    said = [it for it in (*effects.reads, *effects.acts) if it != "*"]
    if strange := sorted(set(said) - set(matched(said, *survey.tools))):
        console.print(
            f"[bold yellow]No turn that counts calls[/] {escape(', '.join(strange))}. Do the runs spell it so?",
            soft_wrap=True,
        )
    price = f"about {money(estimate.dollars)}" if estimate.dollars is not None else "an unknown price (see --prices)"
    console.print(
        f"{estimate.probes:,} probes of {model} to make, {estimate.cached:,} were made before: {estimate.read:,} "
        f"tokens to read, {estimate.written:,} to write, {price}."
        f"{' A judge comes on top of it.' if judged else ''}"
    )


def _verdicts(judge: str, rubric: str, work: Path, concurrency: int) -> Verdicts:
    from metis_agent.audit.agreement import AgreementJudge, Verdicts
    from metis_agent.judging.rubric import Asking
    from metis_agent.sqlite import DiskCache

    if not judge:
        return Verdicts()
    cache: DiskCache = DiskCache(work / "judge.sqlite")
    asking = Asking(concurrency=concurrency)
    return Verdicts(judge=AgreementJudge(_open(judge), name=judge, rubric=rubric, cache=cache, asking=asking))


def _audit(survey: Survey, prober: Prober, verdicts: Verdicts, **options: Any) -> Findings:
    from metis_agent.audit.run import audit
    from metis_agent.rollouts.runner import run_async

    return run_async(audit(survey, prober, verdicts, **options))


def _write(
    console: Console, findings: Findings, *, out: Path, title: str, json: Path | None, check: int | None, work: Path
) -> None:
    from metis_agent.audit.page import audit_page
    from metis_agent.audit.summary import show
    from metis_agent.report.document import write_page

    write_page(out, audit_page(findings, title))
    show(console, findings)
    if check is not None:
        from metis_agent.audit.run import check_page

        try:
            write_page(work / "check.html", [check_page(findings, check)])
            console.print(f"Check the judge: {work / 'check.html'}; then again with --checked FILE.")
        except InputError as nothing:
            console.print(str(nothing))
    if json is not None:
        write_json(json, findings.to_dict())
    console.print(f"Page: {out}")
