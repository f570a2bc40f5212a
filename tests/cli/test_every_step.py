"""A gate that decides at every step, by the commands that a user types: real runs forked, in both hosts; deployed."""

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from rich.console import Console

from metis_agent.cli.training_options import Records
from metis_agent.errors import ConfigurationError, InputError
from metis_agent.evaluation.gates import replay, score_table
from metis_agent.gates.policy import PolicyGate
from metis_agent.judging.verifiers import verify
from metis_agent.middleware import MetisGateMiddleware
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import FORK
from metis_agent.worlds.almanac.agent import SeekingModel, almanac_search, seeking_agent
from metis_agent.worlds.almanac.questions import CALLS_NEEDED, questions
from tests.cli.test_rollout import metis

KINDS = tuple(CALLS_NEEDED)


def behind_middleware(gate: Any) -> Any:
    """The same agent, made by `create_agent`."""
    return create_agent(SeekingModel(), [almanac_search(linked=True)], middleware=[MetisGateMiddleware(gate)])


@tool
def text_search(query: str) -> str:
    """Of which nobody says that it only reads."""
    return query


def undeclared(gate: Any) -> Any:
    """An agent with a tool that may act."""
    return create_agent(SeekingModel(), [text_search], middleware=[MetisGateMiddleware(gate)])


HOSTS = {
    "graph": "metis_agent.worlds.almanac.agent:seeking_agent",
    "middleware": "tests.cli.test_every_step:behind_middleware",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    rows = [
        {"question": it.text, "answer": it.answer, "kind": it.kind}
        for it in questions("train", 60, kinds=KINDS, seed=3)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with chdir(tmp_path):
        yield tmp_path


def test_from_questions_to_a_gate_that_stops_in_both_hosts(folder: Path) -> None:
    rollout = ("rollout", "questions.jsonl", "--agent", HOSTS["graph"], "--store", "runs", "--every-step")
    metis(*rollout, "--dry-run", "--json", "plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["runs"], plan["forks"]) == (60, 0)
    assert not (folder / "runs").exists()

    # Half of the questions first: what is there is not asked again.
    metis(*rollout, "--limit", "30")
    metis(*rollout, "--dry-run", "--json", "plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["forked_runs"], plan["forks_missing"]) == (30, 0)
    output = metis(*rollout, "--json", "rollout.json")
    assert "Next: metis train gate --store runs --every-step --hold-out" in output
    report = json.loads((folder / "rollout.json").read_text())
    assert report["planned"] == 60 + report["forks"]
    assert report["found"] == 30 + plan["forks"]
    assert (report["failed"], report["finished"]) == (0, report["planned"] - report["found"])
    steps = report["steps"]
    assert steps[0]["runs"] == 60
    assert steps[0]["stop"] < steps[1]["stop"] < steps[2]["stop"]

    metis("train", "gate", "--store", "runs", "--every-step", "--folds", "2", "--hold-out", "0.4", "--out", "my-gate")
    promise = ("--accuracy-loss", "0.3", "--confidence", "0.8")
    metis("calibrate", "my-gate", "--store", "runs", "--drop-seen", *promise)
    output = metis("evaluate", "gate", "my-gate", "--store", "runs", "--drop-seen", "--json", "figures.json")
    figures = json.loads((folder / "figures.json").read_text())["turns"]
    assert "By turn" in output
    assert figures["cost"] < figures["as_recorded"]["cost"]

    # The deployed gate does what the replay says, in either host, to the question.
    gate = PolicyGate("my-gate", unfamiliar="gate")
    points = Records(store="runs").load(Console(quiet=True), tools=gate.artefact.tools, every_step=True)
    points = points.take(np.arange(int(np.flatnonzero(points.steps == 0)[12])))
    predicted = replay(points, score_table(gate, points).need > gate.threshold)
    asked = {it.text: it for it in questions("train", 60, kinds=KINDS, seed=3)}
    for agent in (seeking_agent(gate), behind_middleware(gate)):
        calls, right = [], []
        for question in dict.fromkeys(points.questions):
            state = agent.invoke({"messages": [("user", question)]})
            calls.append(sum(outcome.executed for outcome in state["outcomes"]))
            right.append(verify(asked[question], state["messages"][-1].text))
            assert state["decisions"][0].reason.startswith(("going on", "enough"))
        assert calls == predicted.cost.tolist()
        assert right == predicted.correct.tolist()


def test_a_create_agent_is_forked_as_a_graph_is(folder: Path) -> None:
    said = {}
    for host, agent in HOSTS.items():
        metis("rollout", "questions.jsonl", "--agent", agent, "--store", host, "--every-step", "--limit", "6")
        forks = [run for run in TrajectoryStore(host).read() if FORK in run.metadata]
        assert all(run.status == "finished" and not run.tool_calls for run in forks)
        said[host] = sorted((run.question.text, run.metadata[FORK]["step"], run.answer) for run in forks)
    assert said["graph"] == said["middleware"] != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--agent", HOSTS["graph"], "--free", "0", "--direct", "1"), "--free is at least 1"),
        (("--agent", "tests.cli.test_every_step:undeclared"), "--read-only TOOL"),
    ],
)
def test_what_can_not_be_forked_is_said_before_anything_runs(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        metis("rollout", "questions.jsonl", *arguments, "--store", "runs", "--every-step")
    assert not (folder / "runs").exists()


def test_a_store_without_forks_has_no_decision_points(folder: Path) -> None:
    metis("rollout", "questions.jsonl", "--agent", HOSTS["graph"], "--store", "runs", "--limit", "2")
    with pytest.raises(InputError, match="metis rollout --every-step"):
        metis("train", "gate", "--store", "runs", "--every-step", "--out", "my-gate")
    with pytest.raises(ConfigurationError, match="reads none"):
        metis("train", "gate", "--store", "runs", "--every-step", "--draft", "--out", "my-gate")
