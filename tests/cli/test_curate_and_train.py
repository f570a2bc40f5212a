"""From recorded runs to a fine-tuned model by the commands alone; the judge sits behind a real server on loopback."""

import json
import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from metis_agent.agent import create_metis_agent
from metis_agent.cli import app
from metis_agent.curation import sft
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts
from metis_agent.rules.budget import Budget
from metis_agent.types import Trajectory
from metis_agent.worlds.almanac.agent import COLD_START, Noise, almanac_model, almanac_tools
from metis_agent.worlds.almanac.questions import questions

pytestmark = [pytest.mark.enable_socket, pytest.mark.allow_hosts(["127.0.0.1"])]

TOOLS = """
from metis_agent.worlds.almanac.agent import Noise
from metis_agent.worlds.almanac.agent import almanac_tools

TOOLS = almanac_tools(noise=Noise(wrong=0.0, error=0.0))
"""


class Judge(ThreadingHTTPServer):
    """Finds a run strategic where what it calculates stands in its question; or finds everything so, or is down."""

    daemon_threads = True
    finds_all_right = False
    requests_until_down: float = float("inf")

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = 0

    def verdict(self, body: dict[str, Any]) -> dict[str, Any]:
        data = json.loads(re.search(r"<data-\w+>\n(.*)\n</data-", body["messages"][-1]["content"], re.DOTALL)[1])
        arguments = json.dumps([call["arguments"] for step in data["steps"] for call in step.get("calls", ())])
        numbers = re.findall(r"\d+", arguments)
        fits = bool(numbers) and all(number in data["question"] for number in numbers)
        holds = fits or self.finds_all_right
        return {"reason": "the numbers", "relevant": holds, "coherent": True, "justified": True}


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        up = self.server.asked <= self.server.requests_until_down
        reply: dict[str, Any] = {"error": {"message": "overloaded"}}
        if up:
            message = {"role": "assistant", "content": json.dumps(self.server.verdict(body))}
            reply = {
                "id": "chat", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }  # fmt: skip
        text = json.dumps(reply).encode()
        self.send_response(200 if up else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    server = Judge()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the packaged cold start, token ids and all, where it needs a tool and, once, where it doesn't."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "my_tools.py").write_text(TOOLS)
    chat, tools = almanac_model(), almanac_tools(noise=Noise(wrong=0.0, error=0.0))
    asked = questions("train", 60)
    chosen = [*[q for q in asked if q.kind == "product"][:5], next(q for q in asked if q.kind == "sum")]
    with TrajectoryStore(folder / "runs") as store:
        runs = Rollouts(lambda gate: create_metis_agent(chat, tools, gate=gate, budget=Budget(calls=1)), store)
        found: list[Trajectory] = runs.collect(group_rollouts(chosen, ("tool",), name="teacher", seed=0))
    assert sum(run.tool_calls for run in found) == 6
    return folder


def metis(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(it) for it in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def curate(recorded: Path, out: Path, *more: object) -> str:
    return metis(
        "curate", "sft", "--store", recorded / "runs", "--out", out, "--tools", f"{recorded}/my_tools.py:TOOLS",
        "--no-python", "--judge", "openai:judge", "--json", out.with_suffix(".json"), *more,
    )  # fmt: skip


def dropped(out: Path) -> dict[str, dict[str, int]]:
    figures = json.loads(out.with_suffix(".json").read_text())
    return {stage["name"]: stage["dropped"] | stage["undecided"] for stage in figures["stages"]}


def test_from_runs_to_a_model_that_answers(recorded: Path, judge: Judge, tmp_path: Path) -> None:
    shown = curate(recorded, tmp_path / "sft", "--base", COLD_START, "--k", 2)
    assert judge.asked >= 6  # five runs and the decoys
    assert dropped(tmp_path / "sft")["direct"] == {"known without tools": 1}
    assert "6 in = 5 kept + 1 dropped + 0 undecided." in shown
    shown = metis(
        "train", "sft", "--data", tmp_path / "sft/kept", "--model", COLD_START, "--out", tmp_path / "model",
        "--epochs", 4, "--batch", 5, "--learning-rate", 1e-4,
    )  # fmt: skip
    assert "5 trajectories, 5 rows" in shown
    losses = json.loads((tmp_path / "model/sft.json").read_text())["losses"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    answer = metis(
        "ask", "What is 4821 * 7310?", "--model", tmp_path / "model", "--tools", f"{recorded}/my_tools.py:TOOLS"
    )
    assert str(4821 * 7310) in answer


def test_on_a_cluster_it_keeps_the_same_to_the_byte(recorded: Path, judge: Judge, tmp_path: Path, monkeypatch) -> None:
    parts = []

    def elsewhere(function: Any, given: Any, *, ray: str) -> Iterator[Any]:
        """As `spread`: what is sent, and what comes back, is pickled; two rows at a time."""
        for part in given:
            parts.append((ray, len(part)))
            yield pickle.loads(pickle.dumps(list(pickle.loads(pickle.dumps(function))(part))))

    monkeypatch.setattr(sft, "spread", elsewhere)
    monkeypatch.setattr(sft, "connected", nullcontext)
    monkeypatch.setattr(sft, "_PART", 2)
    files = []
    for where in ((), ("--ray", "there")):
        curate(recorded, tmp_path / f"sft{len(where)}", *where)
        found = (tmp_path / f"sft{len(where)}").rglob("segment-*")
        files.append({path.relative_to(tmp_path / f"sft{len(where)}"): path.read_bytes() for path in found})
    assert files[0] == files[1]
    assert [len(it.splitlines()) for it in files[0].values()] == [6]
    assert parts == [("there", 2)] * 9  # answers, replay, strategy


def test_a_judge_that_finds_everything_right_keeps_nothing(recorded: Path, judge: Judge, tmp_path: Path) -> None:
    judge.finds_all_right = True
    assert "6 in = 0 kept + 0 dropped + 6 undecided." in curate(recorded, tmp_path / "sft")
    assert dropped(tmp_path / "sft")["strategy"] == {"judge unfit": 6}


def test_what_a_judge_that_is_down_left_undecided_is_judged_later(recorded: Path, judge: Judge, tmp_path: Path) -> None:
    judge.requests_until_down = 0
    assert "6 in = 0 kept + 0 dropped + 6 undecided." in curate(recorded, tmp_path / "sft")
    assert dropped(tmp_path / "sft")["strategy"] == {"judge unavailable": 6}
    judge.requests_until_down = float("inf")
    shown = metis(
        "curate", "sft", "--store", tmp_path / "sft/quarantine/undecided", "--out", tmp_path / "later",
        "--tools", f"{recorded}/my_tools.py:TOOLS", "--no-python", "--judge", "openai:judge",
    )  # fmt: skip
    assert "6 in = 6 kept + 0 dropped + 0 undecided." in shown
