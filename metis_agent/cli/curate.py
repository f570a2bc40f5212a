"""`metis curate`: from everything that was recorded to what is worth learning from, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metis_agent.cli.agent_options import verify_with
from metis_agent.cli.curate_parts import agent_builder, open_base, open_model, open_tools, show_report, work_folder
from metis_agent.cli.output import FreshOption, JsonOption, RayOption, progress_bars, screen, write_json
from metis_agent.cli.training_options import SeedOption

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

    from metis_agent.curation.pipeline import CurationReport, Stage
    from metis_agent.judging.judge import AnswerJudge
    from metis_agent.types import Trajectory

__all__ = ["curate_app", "curate_rl_command", "curate_sft_command", "rl_stages", "rubric_command"]

curate_app = typer.Typer(
    help="Choose what is worth learning from. Nothing is lost: what is dropped is kept, with the reason, in a "
    "quarantine.",
    no_args_is_help=True,
)

StoreOption = Annotated[str, typer.Option("--store", help="Recorded trajectories: a folder or any fsspec URL.")]
OutOption = Annotated[str, typer.Option("--out", help="Where the outcome goes: a folder or any fsspec URL.")]
WorkOption = Annotated[
    Path | None, typer.Option(help="Local folder for caches and indices; by default 'work' in --out.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="Chat model that judges, by its init_chat_model name, such as openai:gpt-5-mini, or "
        "FILE.py:ATTRIBUTE for one of your own."
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(help="Test questions to keep away from: a .jsonl file of questions, or a store of trajectories."),
]
ChunkOption = Annotated[int, typer.Option(min=1, help="Rows done at a time, and lost at most when killed.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Calls of tools, models and judges under way at once.")]
LeastJaccard = Annotated[float, typer.Option(min=0.1, max=1.0, help="Likeness (Jaccard) from which two are the same.")]


@curate_app.callback()
def _curate() -> None:
    """Choose what is worth learning from."""


@curate_app.command("sft")
def curate_sft_command(
    store: StoreOption,
    out: OutOption,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            "--tools",
            help="MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE: tools that can be re-executed (one, a list, or a "
            "function that returns them), "
            "as the agent had them; repeat for more.",
        ),
    ] = None,
    python: Annotated[bool, typer.Option(help="Re-execute 'python' calls in the sandbox.")] = True,
    corpus: Annotated[
        Path | None, typer.Option(help="Documents that 'text_search' searched (.jsonl, .md, .txt, or a folder).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: what it answers without tools is dropped. A folder or an init_chat_model name."),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="How often the base model is asked each question.")] = 8,
    least: Annotated[
        int, typer.Option(min=1, help="Right answers of these that make a question known; 1 is pass@k.")
    ] = 1,
    judge: JudgeOption = None,
    rubric: Annotated[
        str, typer.Option(help="What strategic tool use is: a text file; `metis curate rubric strategy` prints one.")
    ] = "strategy",
    unverified: Annotated[
        Literal["keep", "drop"], typer.Option(help="Runs whose answer nobody can check (no reference).")
    ] = "keep",
    test: TestOption = None,
    work: WorkOption = None,
    chunk: ChunkOption = 1_000,
    concurrency: ConcurrencyOption = 8,
    seed: SeedOption = 0,
    fresh: FreshOption = False,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Trajectories for SFT: sound, right, reproducible, beyond the base model, and strategic.

    Stages, in order: 'sound' (the record agrees with itself), 'unique', 'answers' (the answer is right), 'leaks'
    (with --test), 'replay' (every call that can be run again gives what was recorded), 'direct' (with --base: the
    base model does not know it anyway), 'strategy' (with --judge: the tools were used well).

    Example: metis curate sft --store runs/teacher --out runs/sft --corpus docs/ --base ./Qwen3-VL-8B-Instruct
    --judge google_genai:gemini-3.1-pro

    A run that was stopped goes on where it was with the same command. Next: metis train sft --data OUT/kept ...
    What could not be decided (a judge was down) is a store, too: metis curate sft --store OUT/quarantine/undecided.
    """
    from metis_agent.curation.sft import curate_sft

    console, started = screen(json), time.perf_counter()
    local = work_folder(work, out)
    stages = _SftStages(
        work=local, tools=tuple(tools or ()), python=python, corpus=corpus, base=base, k=k, least=least, judge=judge,
        rubric=rubric, unverified=unverified, concurrency=concurrency, seed=seed,
    )  # fmt: skip
    not_run = stages.not_run
    with progress_bars(console) as bars:
        task = bars.add_task("curate", total=_count(store))
        report = curate_sft(
            store, out, stages.every(test), chunking=_chunking(chunk), fresh=fresh, ray=ray,
            there={name: partial(_stage_there, stages, name) for name in stages.by_row},
            progress=lambda it: bars.update(task, completed=it.rows, description=_so_far(it)),
        )  # fmt: skip
    show_report(console, report, rows="trajectories", not_run=not_run)
    console.print(f"Kept: {out}/kept   quarantine: {out}/quarantine   next: metis train sft --data {out}/kept ...")
    _write(json, report, not_run, started)


@curate_app.command("rl")
def curate_rl_command(
    store: StoreOption,
    out: OutOption,
    least_rollouts: Annotated[
        int, typer.Option(min=2, help="Judged rollouts of a question that it takes to tell.")
    ] = 2,
    lowest: Annotated[float, typer.Option(min=0, max=1, help="Least share of right rollouts.")] = 0.0,
    highest: Annotated[float, typer.Option(min=0, max=1, help="Greatest share of right rollouts.")] = 1.0,
    judge: JudgeOption = None,
    rubric: Annotated[str, typer.Option(help="When an answer is right: a text file for --judge.")] = "answer",
    near: LeastJaccard = 0.9,
    test: TestOption = None,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the kept prompts that goes to OUT/test, by a hash.")
    ] = 0.0,
    work: WorkOption = None,
    chunk: ChunkOption = 1_000,
    concurrency: ConcurrencyOption = 8,
    seed: SeedOption = 0,
    fresh: FreshOption = False,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Prompts for RL, from recorded rollouts: those with successes and failures, each once, none from the test set.

    Stages, in order: 'corrupted' (missing images, references that can't be verified or contradict one another),
    'mix', 'disagreement' (with --judge: judge and verifier agree), 'duplicates' (exact and near), 'leaks' (with
    --test). Rollouts whose judging failed are excluded and counted, never taken for wrong.

    Example: metis curate rl --store runs/rollouts --out runs/prompts --test benchmark.jsonl --hold-out 0.1

    The outcome is JSONL, one question a line, with the counts of its rollouts in the metadata. A run that was
    stopped goes on where it was with the same command.
    """
    from metis_agent.curation.rl import curate_rl
    from metis_agent.judging.verifiers import VERIFIERS, verify

    console, started = screen(json), time.perf_counter()
    local = work_folder(work, out)
    stages, not_run, judging = rl_stages(
        store, local, mix=(least_rollouts, lowest, highest), judge=judge, rubric=rubric, near=near, test=test,
        concurrency=concurrency,
    )  # fmt: skip
    verifiers = {**VERIFIERS, "judge": judging} if judging else VERIFIERS
    with progress_bars(console) as bars:
        count = bars.add_task("count rollouts", total=_count(store))
        task = bars.add_task("curate prompts", total=None)
        report = curate_rl(
            store, out, stages, work=local, hold_out=hold_out, seed=seed, chunking=_chunking(chunk), fresh=fresh,
            verify=lambda question, answer: verify(question, answer, verifiers=verifiers),
            settings={"judge": judging.identity if judging else None},
            counting=lambda done: bars.update(count, completed=done), ray=ray,
            verify_there=partial(
                verify_with, None, judge, None if rubric == "answer" or judge is None else Path(rubric),
                cache=local / "cache.sqlite",
            ),
            progress=lambda it: bars.update(task, completed=it.rows, description=_so_far(it)),
        )  # fmt: skip
    show_report(console, report, rows="prompts", not_run=not_run)
    folders = "   ".join(f"{out}/{folder}" for folder in sorted(report.kept)) or "nothing"
    console.print(f"Kept: {folders}   quarantine: {out}/quarantine")
    _write(json, report, not_run, started)


@curate_app.command("rubric")
def rubric_command(
    name: Annotated[Literal["strategy", "answer"], typer.Argument(help="Which packaged rubric.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file; by default it is printed.")] = None,
) -> None:
    """Print a packaged rubric, to edit and give back with --rubric.

    Example: metis curate rubric strategy --out my-rubric.md
    """
    from metis_agent.errors import ConfigurationError
    from metis_agent.judging.rubric import load_rubric

    text = load_rubric(name) + "\n"
    if out is None:
        print(text, end="")
    elif out.exists():
        raise ConfigurationError(f"{str(out)!r} is there already; name another file, or remove it.")
    else:
        out.write_text(text, "utf-8")


# --- parts ---------------------------------------------------------------------------------------------------------


def _count(store: str) -> int:
    from metis_agent.recording.store import TrajectoryStore

    return TrajectoryStore(store, read_only=True).count()


def _chunking(rows: int) -> Any:
    from metis_agent.curation.pipeline import Chunking

    return Chunking(rows=rows)


def _so_far(report: CurationReport) -> str:
    return f"curate: {report.kept.total()} kept"


def _write(path: Path | None, report: CurationReport, not_run: list[str], started: float) -> None:
    if path is not None:
        write_json(path, {**report.to_dict(), "not_run": not_run, "seconds": time.perf_counter() - started})


@dataclass(frozen=True, kw_only=True)
class _SftStages:
    """The stages of `metis curate sft`, each made of its options: here, and on the workers of a cluster."""

    work: Path
    tools: tuple[str, ...]
    python: bool
    corpus: Path | None
    base: str | None
    k: int
    least: int
    judge: str | None
    rubric: str
    unverified: Literal["keep", "drop"]
    concurrency: int
    seed: int

    @property
    def by_row(self) -> list[str]:
        """The costly ones that rule on each row by itself, in order."""
        return ["answers", "replay", *["direct"] * (self.base is not None), *["strategy"] * (self.judge is not None)]

    @property
    def not_run(self) -> list[str]:
        """What was left out for want of an option."""
        return [
            *["'direct', what the base model answers without tools: name it with --base"] * (self.base is None),
            *["'strategy', a judge's view of the tool use: name a model with --judge"] * (self.judge is None),
        ]

    def every(self, test: str | None) -> list[Stage[Trajectory]]:
        """All in order, with the one that keeps away from the test questions where there are some."""
        from metis_agent.curation.leaks import LeaksStage
        from metis_agent.curation.prompts import read_questions
        from metis_agent.curation.sft import SoundStage, UniqueStage

        opened = cache(self.open)
        answers, *others = (self.one(name, opened) for name in self.by_row)
        leaks: list[Stage[Trajectory]] = [] if test is None else [
            LeaksStage(read_questions(test), question_of=lambda it: it.question, folder=self.work / "test")
        ]  # fmt: skip
        return [SoundStage(), UniqueStage(self.work / "ids.sqlite"), answers, *leaks, *others]

    def open(self) -> tuple[list[BaseTool], str]:
        """The tools, as `open_tools`."""
        return open_tools(self.tools, python=self.python, corpus=self.corpus, sessions=2 * self.concurrency)

    def one(self, name: str, opened: Callable[[], tuple[list[BaseTool], str]]) -> Stage[Trajectory]:
        """One of `by_row`; the tools are opened where it needs some."""
        from metis_agent.judging.rubric import Asking
        from metis_agent.judging.verifiers import VERIFIERS, verify
        from metis_agent.sqlite import DiskCache

        cache, asking = DiskCache(self.work / "cache.sqlite"), Asking(concurrency=self.concurrency)
        if name == "strategy":
            from metis_agent.curation.strategy import StrategyStage

            assert self.judge is not None
            model = open_model(self.judge, temperature=0.0)
            return StrategyStage(model, name=self.judge, rubric=self.rubric, cache=cache, asking=asking)
        judging = _answer_judge(self.judge, "answer", cache, asking)
        if name == "answers":
            from metis_agent.curation.sft import AnswersStage

            return AnswersStage(judge=judging, unverified=self.unverified)
        tools, version = opened()
        if name == "replay":
            from metis_agent.curation.replay import ReplayStage

            return ReplayStage(tools, cache=cache, concurrency=self.concurrency, version=version)
        from metis_agent.curation.strategy import DirectStage, GraphProbe

        assert self.base is not None
        verifiers = {**VERIFIERS, "judge": judging} if judging else VERIFIERS
        probe = GraphProbe(
            agent_builder(open_base(self.base), tools), model=self.base, folder=self.work / "probes", k=self.k,
            seed=self.seed, concurrency=8 * self.concurrency,
            verify=lambda question, answer: verify(question, answer, verifiers=verifiers),
        )  # fmt: skip
        return DirectStage(probe, least=self.least, cache=cache)


@cache
def _stage_there(stages: _SftStages, name: str) -> Stage[Trajectory]:
    """A stage on a worker, made once in each process."""
    return stages.one(name, partial(_opened_there, stages))


@cache
def _opened_there(stages: _SftStages) -> tuple[list[BaseTool], str]:
    return stages.open()


def rl_stages(
    store: str, work: Path, *, mix: tuple[int, float, float], judge: str | None, rubric: str, near: float,
    test: str | None, concurrency: int,
) -> tuple[list[Any], list[str], AnswerJudge | None]:  # fmt: skip
    """The stages, what was left out for want of an option, and the judge of answers."""
    from metis_agent.curation.leaks import LeaksStage
    from metis_agent.curation.prompts import read_questions
    from metis_agent.curation.rl import CorruptedStage, DisagreementStage, DuplicatesStage, MixStage
    from metis_agent.judging.rubric import Asking
    from metis_agent.recording.images import ImageStore
    from metis_agent.sqlite import DiskCache

    least_rollouts, lowest, highest = mix
    stages: list[Any] = [
        CorruptedStage(images=ImageStore(store)),
        MixStage(least_rollouts=least_rollouts, lowest=lowest, highest=highest),
    ]
    judging = _answer_judge(judge, rubric, DiskCache(work / "cache.sqlite"), Asking(concurrency=concurrency))
    not_run = []
    if judging is None:
        not_run.append("'disagreement', whether judge and verifier agree: name a model with --judge")
    else:
        stages.append(DisagreementStage(judging))
    stages.append(DuplicatesStage(work / "duplicates.sqlite", least=near))
    if test is None:
        not_run.append("'leaks', what stands in the test set: name it with --test")
    else:
        stages.append(LeaksStage(read_questions(test), question_of=lambda it: it.question, folder=work / "test"))
    return stages, not_run, judging


def _answer_judge(judge: str | None, rubric: str, cache: Any, asking: Any) -> AnswerJudge | None:
    from metis_agent.judging.judge import AnswerJudge

    if judge is None:
        return None
    return AnswerJudge(open_model(judge, temperature=0.0), name=judge, rubric=rubric, cache=cache, asking=asking)
