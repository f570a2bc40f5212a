"""The almanac's agent as the real LangSmith client traces it, and the truth about its calls: forced direct, k times."""

from __future__ import annotations

import asyncio
import warnings
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import pytest
from langchain_core.tracers import LangChainTracer
from langsmith import Client

from metis_agent.agent import create_metis_agent
from metis_agent.audit.agreement import Agreement, Verdicts
from metis_agent.audit.probes import Prober, Probing
from metis_agent.audit.run import Findings, audit
from metis_agent.audit.turns import ToolEffects, survey
from metis_agent.judging.verifiers import verify
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
from metis_agent.rollouts.runner import run_async
from metis_agent.rules.budget import Budget
from metis_agent.sqlite import DiskCache
from metis_agent.traces import import_traces
from metis_agent.types import Question, Trajectory
from metis_agent.worlds.almanac.agent import COLD_START, almanac_tools
from tests.traces.receiver import receiver

ERRS = 0.1
"""How often the erring judge is wrong."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What was traced, and what is true of it."""

    chat: LocalChatModel
    runs: Sequence[Trajectory]
    """As imported, one a question; with the reference answers, which no trace has."""
    share: dict[str, float]
    """By question: how often the model is right without tools."""
    said: DiskCache
    """What it answered to probes."""

    def truth(self, findings: Findings) -> float:
        """Expected share of the sample's calls that change nothing: one call a run."""
        shares = [self.share[turn.run.question.text] for turn in findings.survey.sample]
        return sum(shares) / len(shares)


def world(asked: Sequence[Question], times: int, folder: Path) -> World:
    """Ask each question once as it likes, traced, and so many times without tools."""
    chat = LocalChatModel.load(COLD_START, model_name="almanac", max_new_tokens=24, temperature=1.0, seed=1)
    tools = almanac_tools()

    def build(gate=None):
        return create_metis_agent(chat, tools, gate=gate, budget=Budget(calls=1), block_message="Error.")

    by_text = {question.text: question for question in asked}
    (folder / "runs.jsonl").write_text("\n".join(_traced(build(), list(by_text))))
    with TrajectoryStore(folder / "runs") as store:
        import_traces([folder / "runs.jsonl"], store)
        runs = [replace(run, question=by_text[run.question.text]) for run in store.read()]
    right = defaultdict(list)
    with TrajectoryStore(folder / "truth") as store:
        BranchRecorder(build, store, concurrency=128).record(
            branch_rollouts(asked, (), BranchPlan(direct=times, tool=0), name="truth", seed=0)
        )
        for run in store.read(whole=False):
            right[run.question.text].append(bool(verify(run.question, run.answer)))
    share = {text: sum(found) / len(found) for text, found in right.items()}
    return World(chat=chat, runs=runs, share=share, said=DiskCache(None))


def audited(world: World, verdicts: Verdicts, *, checks=None, sample: int | None = None, seed: int = 0) -> Findings:
    """The audit by the same model; what it answered to a probe is asked once."""
    found = survey(world.runs, ToolEffects(reads=["*"]), sample=sample, seed=seed)
    prober = Prober(world.chat, name="almanac", cache=world.said, probing=Probing(concurrency=128))
    return run_async(audit(found, prober, verdicts, self_reports=False, checks=checks, seed=seed))


class ErringJudge(Verdicts):
    """Rules as a judge does that errs one time in ten, on every state but the run's own answer."""

    lots = 0

    def _without_judge(self, turn, k, probe):
        ruled = super()._without_judge(turn, k, probe)
        if ruled.source != "reference" or probe is None:
            return ruled
        lot = zlib.crc32(f"{self.lots}/{turn.run.question.text}/{k}".encode()) % 1000
        return Agreement(agrees=ruled.agrees != (lot < 1000 * ERRS), source="judge")


def checked_by_hand(exact: Findings, turns: int) -> dict[tuple[str, int], bool | None]:
    """What a person would say of the first turns of the sample, which is in random order."""
    return {(turn.id, 0): turn.verdicts[0] for turn in exact.turns[:turns]}


def _traced(agent, texts: Sequence[str]) -> list[str]:
    """The lines of an export of the agent's runs: sent by the client, and read back by it."""
    with receiver() as server, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # list_runs is what the guide names, and has a successor
        patch.setenv("LANGSMITH_DISABLE_RUN_COMPRESSION", "true")
        client = Client(api_url=server.url, api_key="x")
        tracer = LangChainTracer(client=client, project_name="almanac")
        configs = [{"callbacks": [tracer], "configurable": {"seed": number}} for number in range(len(texts))]

        async def ask():
            await asyncio.gather(
                *(agent.ainvoke({"messages": [("user", text)]}, config)
                  for text, config in zip(texts, configs, strict=True))
            )  # fmt: skip

        run_async(ask())
        client.flush()
        runs = server.when(lambda: _whole(server.langsmith_runs(), len(texts)), seconds=120)
        server.answers["/runs/query"] = {"runs": runs, "cursors": {"next": None}}
        lines = [run.model_dump_json() for run in client.list_runs(project_id=UUID(int=1))]
        client.close()
    return lines


def _whole(runs, roots: int):
    """The runs, once all have ended."""
    ended = all(run.get("end_time") for run in runs)
    return runs if ended and sum(not run.get("parent_run_id") for run in runs) == roots else None
