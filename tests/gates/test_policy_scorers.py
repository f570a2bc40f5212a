"""What a trained gate's parts do without a model: batching, reading images, and kinds of one's own."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.messages import HumanMessage

from metis_agent.errors import CheckpointError, ConfigurationError, GateError
from metis_agent.gates import scorers as base
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.policy import PolicyGate, read_images
from metis_agent.gates.scorers import Asked, register_scorer
from metis_agent.gates.scorers.decision_lm import decision_request, questions_about
from metis_agent.gates.scorers.pretrained import Batcher
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import GateRequest, ToolSpec


def test_requests_that_wait_are_answered_together_and_each_gets_its_own() -> None:
    batches: list[list[int]] = []
    first = threading.Event()

    def work(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        if batch == [0]:
            first.set()
            while len(batcher._waiting) < 20:
                time.sleep(0.001)
        return [10 * number for number in batch]

    batcher: Batcher[int, int] = Batcher(work, limit=8)
    with ThreadPoolExecutor(21) as threads:
        head = threads.submit(batcher.ask, 0)
        first.wait()
        rest = list(threads.map(batcher.ask, range(1, 21)))
        assert head.result() == 0
    assert rest == [10 * number for number in range(1, 21)]
    assert [len(batch) for batch in batches] == [1, 8, 8, 4]


def test_a_bad_request_fails_alone() -> None:
    started = threading.Event()

    def work(batch: Sequence[int]) -> list[int]:
        if batch == [-1]:
            started.set()
            while len(batcher._waiting) < 3:
                time.sleep(0.001)
        if 13 in batch:
            raise GateError("13 can't be read")
        return list(batch)

    batcher: Batcher[int, int] = Batcher(work, limit=8)
    with ThreadPoolExecutor(4) as threads:
        threads.submit(batcher.ask, -1)
        started.wait()
        asked = {number: threads.submit(batcher.ask, number) for number in (12, 13, 14)}
        assert asked[12].result() == 12
        assert asked[14].result() == 14
        with pytest.raises(GateError, match="13"):
            asked[13].result()


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "QUJD", "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        {"type": "image_url", "image_url": "data:image/jpeg;base64,QUJD"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        {"type": "image", "url": "data:image/png;base64,QUJD"},
    ],
)
def test_images_are_read_in_every_spelling(block: dict[str, Any]) -> None:
    asked = GateRequest(messages=[HumanMessage([{"type": "text", "text": "What is it?"}, block])], tools=())
    assert read_images(asked) == ("QUJD",)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "url": "http://169.254.169.254/secret.png"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image", "url": "file:///etc/passwd"},
        {"type": "image", "file_id": "file-1"},
    ],
)
def test_a_gate_fetches_no_image(block: dict[str, Any]) -> None:
    with pytest.raises(GateError, match="fetches nothing"):
        read_images(GateRequest(messages=[HumanMessage([block])], tools=()))


def test_the_questions_name_each_tool_with_its_description() -> None:
    tools = (ToolSpec(name="python", description="runs code"), ToolSpec(name="search"))
    nouls = questions_about(tools, "noul")
    assert list(nouls) == ["direct", "tool python", "tool search"]
    assert nouls["tool python"]["instructions"].endswith("python: runs code")
    choice = questions_about(tools, "choice")
    assert list(choice) == ["direct", "tools", "tool"]
    assert choice["tool"]["criteria"] == {"python": "runs code", "search": None}
    assert "tool" not in questions_about(tools[:1], "choice")
    with pytest.raises(GateError, match="27 tools"):
        questions_about(tuple(ToolSpec(name=f"t{number}") for number in range(27)), "choice")
    request = decision_request("What?", "A table", tools=tools, form="noul", images=["QUJD"])
    assert request["state"] == "<image_1>\nA table\n\nWhat?"
    assert request["assets"]["<image_1>"]["data_base64"] == "QUJD"
    json.dumps(request)


def test_the_gates_module_imports_no_model_library() -> None:
    code = (
        "import sys, metis_agent.gates.policy, metis_agent.gates.scorers.decision_lm; "
        "print(sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_gate_whose_library_is_missing_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from metis_agent.gates.scorers.pretrained import import_transformers\n"
        "from metis_agent.errors import MissingDependencyError\n"
        "try: import_transformers('A gate of kind encoder')\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "langgraph-metis[train]" in found.stdout


class ByLength:
    """A kind of gate of one's own, all of it: what is trained, and what serves it."""

    kind = "length"

    def prepare(self, table: OutcomeTable) -> "ByLength":
        self.lengths = np.array([len(question) for question in table.questions], dtype=float)
        return self

    def fit(self, rows: Any, targets: Any, strength: Any) -> "ByLength":
        long = self.lengths[rows] > 20
        self.odds = np.array([[targets[long == side].mean(0) for side in (False, True)]])[0].clip(0.01, 0.99)
        return self

    def logits(self, rows: Any) -> Any:
        share = self.odds[(self.lengths[rows] > 20).astype(int)]
        return np.log(share / (1 - share))

    def tensors(self) -> dict[str, Any]:
        return {"odds": self.odds.astype(np.float32)}

    def config(self) -> dict[str, Any]:
        return {"context": False}


class LengthScorer:
    instant, open_tools = True, False
    draft_columns: tuple[str, ...] = ()

    def __init__(self, artefact: Artefact, device: str | None) -> None:
        self._odds = artefact.tensors["odds"]

    def logits(self, asked: Asked) -> list[float]:
        return [math.log(share / (1 - share)) for share in self._odds.row(len(asked.question) > 20)]


@pytest.fixture
def length_gate(tmp_path: Path) -> Path:
    questions = tuple(f"short {n}" if n % 2 else f"a question of many words, number {n}" for n in range(60))
    right = np.array([[n % 2, 1 - n % 2] for n in range(60)], dtype=float)
    table = OutcomeTable(
        questions=questions, actions=("direct", "look"), correct=right, cost=np.zeros((60, 2)),
        seconds=np.full((60, 2), np.nan),
    )  # fmt: skip
    write_artefact(train_gate(table, policy=ByLength()), tmp_path / "gate", table=table, metrics={})
    return tmp_path / "gate"


def test_a_kind_of_ones_own_is_trained_written_and_served(length_gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTERED", {})
    with pytest.raises(CheckpointError, match=r"kind 'length'; served are \['decision_lm', 'encoder', 'features'\]"):
        PolicyGate(length_gate)
    register_scorer("length", LengthScorer)
    gate = PolicyGate(length_gate, unfamiliar="gate")
    asked = [GateRequest(messages=[HumanMessage(text)], tools=(ToolSpec(name="look"),)) for text in ("hm", "x" * 30)]
    assert [gate.decide(request).allowed for request in asked] == [(), ("look",)]
    for kind, load in (("features", LengthScorer), ("length", ByLength)):
        with pytest.raises(ConfigurationError, match="already"):
            register_scorer(kind, load)  # type: ignore[arg-type]


def test_an_installed_package_can_bring_a_kind(length_gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTERED", {})
    point = EntryPoint(name="length", value=f"{__name__}:LengthScorer", group=base.ENTRY_POINTS)
    monkeypatch.setattr(base, "entry_points", lambda **wanted: EntryPoints([point]).select(**wanted))
    assert PolicyGate(length_gate).score("hm")[1]["look"] < 0.5


def test_weights_that_give_no_number_decide_nothing(length_gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(LengthScorer):
        def logits(self, asked: Asked) -> list[float]:
            return [math.nan, 1.0]

    monkeypatch.setattr(base, "_REGISTERED", {"length": Broken})
    with pytest.raises(GateError, match="no finite numbers"):
        PolicyGate(length_gate).score("hm")
