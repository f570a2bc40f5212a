"""Outcomes and imports pooled part by part: the same in one process and on a Ray cluster, whatever dies meanwhile."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool

from metis_agent.agent import create_metis_agent
from metis_agent.errors import MissingDependencyError
from metis_agent.recording.store import TrajectoryStore, spread
from metis_agent.rollouts import branches
from metis_agent.rollouts.branches import BranchPlan, branch_rollouts, record_on_ray
from metis_agent.rollouts.recorded import OutcomePool, outcomes_from_trajectories, pool_store
from metis_agent.types import GateDecision, Question, ToolOutcome, Trajectory

ROOT = Path(__file__).parents[2]


def runs(questions: int = 40):
    """Each question directly and by a tool, twice, with seconds whose sums depend on their order."""
    for index in range(4 * questions):
        tool = index % 2
        used = ToolOutcome(call_id="1", tool="search", arguments={}, status="ok")
        yield Trajectory(
            id=f"r{index}", question=Question(id=str(index // 4), text=f"What is {index // 4}?", answer="yes"),
            answer="yes" if index % 3 else "no", seconds=0.1 * index + 1e-9, metadata={"model": "m"},
            decisions=(GateDecision(allowed=("search",) if tool else (), required=bool(tool)),),
            outcomes=(used,) * tool,
        )  # fmt: skip


@pytest.fixture
def sharded(tmp_path):
    """A store of several shards."""
    every = list(runs())
    for part in range(5):
        with TrajectoryStore(tmp_path / "store") as store:
            for run in every[part::5]:
                store.append(run)
    return tmp_path / "store"


def test_a_store_pooled_shard_by_shard_is_the_store_pooled_whole(sharded):
    assert len(TrajectoryStore(sharded, read_only=True).shards()) == 5
    reports = []
    pool = pool_store(str(sharded), tools=["search"], draft=True, progress=reports.append)
    table = pool.table()
    whole = outcomes_from_trajectories(TrajectoryStore(sharded, read_only=True).read(), tools=["search"], draft=True)
    assert (table.questions, table.actions, table.dropped) == (whole.questions, whole.actions, whole.dropped)
    np.testing.assert_array_equal(table.correct, whole.correct)
    np.testing.assert_allclose(table.seconds, whole.seconds, rtol=1e-12)
    assert table.draft.keys() == whole.draft.keys()
    for name, column in table.draft.items():
        np.testing.assert_array_equal(column, whole.draft[name])
    assert (pool.runs, sum(report.read for report in reports)) == (160, 160)


def test_a_merged_pool_keeps_those_that_a_whole_one_would(sharded):
    store = TrajectoryStore(sharded, read_only=True)
    whole = OutcomePool(max_questions=7).extend(store.read())
    merged = OutcomePool(max_questions=7)
    for shard in reversed(store.shards()):
        merged.merge(OutcomePool(max_questions=7).extend(store.read(only_shard=shard)))
    assert merged.table().questions == whole.table().questions
    np.testing.assert_array_equal(merged.table().correct, whole.table().correct)
    assert merged.runs == whole.runs


def test_here_a_part_is_read_as_far_as_it_is_wanted():
    read = []

    def part(number):
        for item in range(3):
            read.append((number, item))
            yield item

    first, *_ = spread(part, [0])
    assert next(iter(first)) == 0
    assert read == [(0, 0)]


def test_without_ray_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"langgraph-metis\[ray\]"):
        list(spread(iter, [[1]], ray="local"))


ON_RAY = """
import os, pickle, sys, time
from pathlib import Path
import ray
from metis_agent.curation import sft
from metis_agent.judging.verifiers import verify as by_reference
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.recorded import pool_store
from metis_agent.traces import import_traces, importing

importing.shelves_for = lambda size: 3
store, export, out = map(Path, sys.argv[1:])

def dying():
    # The first worker that gets here is killed while it works.
    try:
        os.close(os.open(out / "killed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return by_reference
    os.kill(os.getpid(), 9)

ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
pool = pool_store(str(store), tools=["search"], verify=dying, ray="auto")
assert (out / "killed").exists()
(out / "table").write_bytes(pickle.dumps(pool.table()))
with TrajectoryStore(out / "imported") as kept:
    import_traces([export], kept, ray="auto")
sft.curate_sft(store, out / "curated there", [sft.AnswersStage()], ray="auto", there={"answers": sft.AnswersStage})
"""


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_two_workers_of_ray_give_the_same_to_the_byte_and_a_killed_one_loses_nothing(sharded, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("metis_agent.traces.importing.shelves_for", lambda size: 3)
    from metis_agent.curation import sft
    from metis_agent.traces import import_traces
    from tests.traces.test_importing import lines, whole

    export = tmp_path / "export.jsonl"
    export.write_text(
        lines(*(record for number in range(200) for record in whole(f"t{number}", f"Question {number}?")))
    )
    subprocess.run([sys.executable, "-c", ON_RAY, str(sharded), str(export), str(tmp_path)], cwd=ROOT, check=True)
    table = pool_store(str(sharded), tools=["search"]).table()
    assert (tmp_path / "table").read_bytes() == pickle.dumps(pickle.loads(pickle.dumps(table)))
    with TrajectoryStore(tmp_path / "alone") as alone:
        import_traces([export], alone)
        expected = list(alone.read())
    assert list(TrajectoryStore(tmp_path / "imported", read_only=True).read()) == expected
    assert len(expected) == 200
    sft.curate_sft(sharded, tmp_path / "curated here", [sft.AnswersStage()])
    here, there = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("segment-*")}
        for folder in (tmp_path / "curated here", tmp_path / "curated there")
    )
    assert here == there
    assert len(here) == 2  # kept and dropped


class Scripted(BaseChatModel):
    """Calls `look` where it is offered, and answers 42."""

    tools: tuple[Any, ...] = ()

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools, **_):
        return Scripted(tools=tuple(tools))

    def _generate(self, messages, stop=None, run_manager=None, **_):
        asked = {"name": "look", "args": {"query": "x"}, "id": "1"}
        calls = [asked] if self.tools and messages[-1].type != "tool" else []
        return ChatResult(generations=[ChatGeneration(message=AIMessage("" if calls else "42", tool_calls=calls))])


@tool
def look(query: str) -> str:
    """Look it up."""
    return "42"


def test_rollouts_in_parts_are_found_again_by_a_part_that_is_made_again(tmp_path, monkeypatch):
    """As on a cluster, with a worker that dies once: its part is made again, and finds what it had stored."""
    asked = [Question(id=str(n), text=f"What is {n}?", answer="42") for n in range(6)]
    plan = branch_rollouts(asked, ["look"], BranchPlan(), name="r", seed=0)
    built: list[int] = []

    def build(part):
        built.append(part)
        return lambda gate: create_metis_agent(Scripted(), [look], gate=gate)

    def dying(function, parts, *, ray):
        for part in parts:
            list(function((part[0], part[1][:2])))  # dies after two
            yield function(part)

    monkeypatch.setattr(branches, "spread", dying)
    monkeypatch.setattr(branches, "_PART", 4)
    store, done = tmp_path / "store", []
    for again in (False, True):
        report = record_on_ray(plan if not again else branch_rollouts(asked, ["look"], BranchPlan(), name="r", seed=0),
                               str(store), build, ray="here", progress=lambda more, _: done.append(more))  # fmt: skip
        assert report.planned == 12
        assert report.found + report.finished == 12
    assert built == [0, 0, 1, 1, 2, 2]  # and none when all is there
    assert report.found == 12
    runs = [run.id for run in TrajectoryStore(store).read()]
    assert len(runs) == len(set(runs)) == 12
    table = pool_store(str(store), tools=["look"]).table()
    assert table.correct.tolist() == [[1.0, 1.0]] * 6


def test_prompts_of_answers_that_were_judged_elsewhere(sharded, tmp_path, monkeypatch):
    from metis_agent.curation import rl

    monkeypatch.setattr(rl, "spread", lambda function, parts, *, ray: map(function, parts))
    found = []
    for where in (None, "there"):
        report = rl.curate_rl(
            sharded, tmp_path / f"{where}", [rl.MixStage()], work=tmp_path / f"work {where}", ray=where
        )
        kept = sorted((tmp_path / f"{where}" / "kept").glob("*.jsonl"))
        found.append((report.kept, report.dropped, [path.read_bytes() for path in kept]))
    assert found[0] == found[1]
