"""The stages of `metis curate sft` and `metis curate rl`, in order, as their options ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metis_agent.cli.curate_parts import agent_builder, open_base, open_model, open_tools

if TYPE_CHECKING:
    from metis_agent.curation.stage import Stage
    from metis_agent.judging.judge import AnswerJudge
    from metis_agent.types import Trajectory

__all__ = ["rl_stages", "sft_stages"]


def sft_stages(
    work: Path, *, store_tools: tuple[list[str], bool, Path | None], base: str | None, k: int, least: int,
    judge: str | None, rubric: str, unverified: Literal["keep", "drop"], test: str | None, concurrency: int, seed: int,
) -> tuple[list[Stage[Trajectory]], list[str]]:  # fmt: skip
    """The stages, and what was left out for want of an option."""
    from metis_agent.curation.direct import DirectStage, GraphProbe
    from metis_agent.curation.leaks import LeaksStage
    from metis_agent.curation.prompts import read_questions
    from metis_agent.curation.replay import ReplayStage
    from metis_agent.curation.sft import AnswersStage, SoundStage, UniqueStage
    from metis_agent.curation.strategy import StrategyStage
    from metis_agent.judging.cache import DiskCache
    from metis_agent.judging.rubric import Asking
    from metis_agent.judging.verifiers import VERIFIERS, verify

    cache, asking = DiskCache(work / "cache.sqlite"), Asking(concurrency=concurrency)
    judging = _answer_judge(judge, "answer", cache, asking)
    named, python, corpus = store_tools
    tools, version = open_tools(named, python=python, corpus=corpus, sessions=2 * concurrency)
    stages: list[Stage[Trajectory]] = [
        SoundStage(), UniqueStage(work / "ids.sqlite"), AnswersStage(judge=judging, unverified=unverified),
    ]  # fmt: skip
    not_run = []
    if test is not None:
        stages.append(LeaksStage(read_questions(test), question_of=lambda it: it.question, folder=work / "test"))
    stages.append(ReplayStage(tools, cache=cache, concurrency=concurrency, version=version))
    if base is None:
        not_run.append("'direct', what the base model answers without tools: name it with --base")
    else:
        verifiers = {**VERIFIERS, "judge": judging} if judging else VERIFIERS
        probe = GraphProbe(
            agent_builder(open_base(base), tools), model=base, folder=work / "probes", k=k, seed=seed,
            concurrency=8 * concurrency, verify=lambda question, answer: verify(question, answer, verifiers=verifiers),
        )  # fmt: skip
        stages.append(DirectStage(probe, least=least, cache=cache))
    if judge is None:
        not_run.append("'strategy', a judge's view of the tool use: name a model with --judge")
    else:
        stages.append(
            StrategyStage(open_model(judge, temperature=0.0), name=judge, rubric=rubric, cache=cache, asking=asking)
        )
    return stages, not_run


def rl_stages(
    store: str, work: Path, *, mix: tuple[int, float, float], judge: str | None, rubric: str, near: float,
    test: str | None, concurrency: int,
) -> tuple[list[Any], list[str], AnswerJudge | None]:  # fmt: skip
    """The stages, what was left out for want of an option, and the judge of answers."""
    from metis_agent.curation.leaks import LeaksStage
    from metis_agent.curation.prompts import read_questions
    from metis_agent.curation.rl import CorruptedStage, DisagreementStage, DuplicatesStage, MixStage
    from metis_agent.judging.cache import DiskCache
    from metis_agent.judging.rubric import Asking
    from metis_agent.recording.images import ImageStore

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
