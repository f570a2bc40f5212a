"""Runs that the real LangSmith client sent and read back, in all the shapes that they are exported in."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from langchain_core.tracers import LangChainTracer
from langsmith import Client
from langsmith._internal._beta_decorator import LangSmithDeprecationWarning
from langsmith.types.run import Run as ApiRun

from metis_agent.traces import steps_of
from tests.traces.agents import check_two_turns, converse, two_turns
from tests.traces.receiver import receiver

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.timeout(60),
]


@pytest.fixture(scope="module")
def sent():
    """The lines of `client.list_runs` and of `client.list_feedback`, for a conversation of two turns."""
    with receiver() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANGSMITH_DISABLE_RUN_COMPRESSION", "true")  # else it warns that the server can't do it
        client = Client(api_url=server.url, api_key="x")
        tracer = LangChainTracer(client=client, project_name="p")
        config = {"callbacks": [tracer], "metadata": {"thread_id": "t-1", "user_id": "u-1"}, "tags": ["live"]}
        converse(two_turns(), config)
        client.flush()
        runs = server.when(lambda: (found := server.langsmith_runs()) and len(_roots(found)) == 2 and found)
        roots = _roots(runs)
        client.create_feedback(
            roots[1]["id"], "thumb", score=1, comment="good", trace_id=roots[1]["id"], session_id=UUID(int=1)
        )
        client.flush()
        server.answers["/runs/query"] = {"runs": runs, "cursors": {"next": None}}
        server.answers["/feedback"] = [json.loads(body) for body in server.sent("/feedback")]
        with pytest.warns(LangSmithDeprecationWarning):
            first = [run.model_dump_json() for run in client.list_runs(project_id=UUID(int=1))]
        second = [ApiRun.model_validate(_second_api(run)).model_dump_json() for run in runs]
        feedback = [given.model_dump_json() for given in client.list_feedback(run_ids=[roots[1]["id"]])]
        client.close()
    return {"list_runs": [*first, *feedback], "query": [*second, *feedback]}


@pytest.fixture(params=["list_runs", "query"])
def exported(request, sent):
    return sent[request.param]


def _second_api(run):
    """The run as the server's second API gives it."""
    metadata = run.get("extra", {}).get("metadata", {})
    above = [piece.partition("Z")[2] for piece in run["dotted_order"].split(".")[:-1]]
    kept = {key: run[key] for key in ("id", "trace_id", "name", "start_time", "end_time", "inputs", "outputs", "extra")}
    return {
        **kept, "dotted_order": run["dotted_order"], "run_type": run["run_type"].upper(), "status": "SUCCESS",
        "parent_run_ids": above, "metadata": metadata, "thread_id": metadata.get("thread_id"), "is_root": not above,
    }  # fmt: skip


def _roots(runs):
    """The roots that have ended, in order."""
    ended = [run for run in runs if not run.get("parent_run_id") and run.get("end_time")]
    return sorted(ended, key=lambda run: run["start_time"])


def test_each_turn_is_a_trajectory(exported, imported):
    first, second = check_two_turns(*imported("\n".join(exported)), "langsmith")
    assert [(run.metadata["turn"], run.metadata["model"]) for run in (first, second)] == [
        (0, "gpt-x-1"),
        (1, "gpt-x-1"),
    ]
    assert "feedback" not in first.metadata
    assert second.metadata["feedback"] == [{"key": "thumb", "score": 1, "comment": "good"}]
    asked, answered = first.calls
    assert (asked.node, asked.model) == ("model", "gpt-x-1")
    assert 0 < answered.seconds < first.seconds
    assert [tool["function"]["name"] for tool in first.tools] == ["look", "convert"]
    steps = steps_of(first)
    assert [step.model_call for step in steps] == [asked, answered]
    assert [len(step.messages) for step in steps] == [2, 5]
