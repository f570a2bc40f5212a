"""From one's own questions, model and two tools to a deployed gate, by the commands that a new user types."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from rich.console import Console
from typer.testing import CliRunner

from metis_agent.agent import create_metis_agent
from metis_agent.cli import app
from metis_agent.cli.agent_options import choose_agent, load_attribute
from metis_agent.cli.training_options import Records
from metis_agent.errors import ConfigurationError, InputError, MetisError
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.reference import NeverGate
from metis_agent.recording.store import TrajectoryStore

MODULE = '''
import json
import re
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from metis_agent.agent import create_metis_agent

STOCK = {f"part-{n}": (n * 37) % 900 for n in range(1000)}

def stock_level(part: str) -> str:
    """How many of a part are in the warehouse."""
    return str(STOCK.get(part, "no such part"))

def order_status(order: str) -> str:
    """Where an order is."""
    return ["packed", "shipped", "delivered"][int(order.split("-")[1]) % 3]

TOOLS = [stock_level, order_status]

class Model(BaseChatModel):
    """Knows small sums and greetings by heart, and of all else what a tool tells it."""

    @property
    def _llm_type(self):
        return "mine"

    def bind_tools(self, tools, *, tool_choice=None, **options):
        return self.bind(tools=[tool.name for tool in tools], **options)

    def _generate(self, messages, stop=None, run_manager=None, tools=(), **options):
        question = next(message.text for message in reversed(messages) if message.type == "human")
        sum_ = re.fullmatch(r"What is (\\d+) plus (\\d+)\\?", question)
        if messages[-1].type == "tool":
            reply = AIMessage(messages[-1].text)
        elif tools:
            name = tools[0] if len(tools) == 1 else "stock_level" if "part" in question else "order_status"
            kind = {"stock_level": "part", "order_status": "order"}[name]
            found = re.findall(kind + r"-\\d+", question) or [kind + "-0"]
            reply = AIMessage("", tool_calls=[{"name": name, "args": {kind: found[0]}, "id": "1", "type": "tool_call"}])
        else:
            reply = AIMessage(str(int(sum_[1]) + int(sum_[2])) if sum_ else "Hello!" if "Hi" in question else "unknown")
        return ChatResult(generations=[ChatGeneration(message=reply)])

def pair():
    return Model(), TOOLS

def bare():
    return Model(), ()

def make(gate):
    return create_metis_agent(Model(), TOOLS, gate=gate)

agent = create_metis_agent(Model(), TOOLS)

class Judge(Model):
    """Calls the same what ends with the same word."""

    def with_structured_output(self, form, **options):
        from langchain_core.runnables import RunnableLambda

        def rule(messages):
            data = json.loads(re.search(r"<data-\\w+>(.*)</data-\\w+>", messages[1].content, re.S)[1])
            if "reference" in data:
                return form(reason="", right=data["answer"] == data["reference"])
            first, second = (data[key].rstrip(".").split()[-1] for key in ("first", "second"))
            return form(reason="", same=first == second)

        return RunnableLambda(rule)

JUDGE = Judge()
'''


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        a, b, part, order = rng.randint(1, 99), rng.randint(1, 99), rng.randrange(900), rng.randrange(10_000)
        rows += [
            {"question": f"What is {a} plus {b}?", "answer": a + b, "kind": "sum"},
            {"question": f"Hi, I am customer {1000 * seed + number}", "answer": "Hello!", "kind": "greeting"},
            {"question": f"How many of part-{part} are in stock?", "answer": (part * 37) % 900, "kind": "stock"},
            {
                "question": f"Where is order-{order} now?",
                "answer": ["packed", "shipped", "delivered"][order % 3],
                "kind": "order",
            },
        ]
    return rows


def metis(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if isinstance(result.exception, MetisError):
        raise result.exception
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In a folder with one's own module and questions; nothing of it is left in this process afterwards."""
    (folder / "my_agent.py").write_text(MODULE)
    rows = questions(30, seed=0)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = list(sys.path)
    with chdir(folder):
        yield
    sys.path[:] = path
    sys.modules.pop("my_agent", None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with inside(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the questions were rolled out, and a gate was trained and calibrated on part of them."""
    folder = tmp_path_factory.mktemp("trained")
    with inside(folder):
        metis("rollout", "questions.jsonl", *MINE, "--store", "runs", "--json", "rollout.json")
        metis("train", "gate", "--store", "runs", "--hold-out", "0.4", "--out", "my-gate", "--json", "train.json")
        metis("calibrate", "my-gate", "--store", "runs", "--drop-seen", "--calls", "0.8")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with inside(tmp_path):
        yield tmp_path


MINE = ("--model", "my_agent.py:Model", "--tools", "my_agent.py:TOOLS", "--allow-acting")


def test_a_dry_run_runs_nothing(folder: Path) -> None:
    said = metis("rollout", "questions.jsonl", *MINE, "--store", "runs", "--dry-run")
    assert "runs of my_agent.py:Model" in said
    assert "asks first" not in said
    undeclared = metis("rollout", "questions.jsonl", *MINE[:-1], "--store", "runs", "--dry-run")
    assert "asks first whether to force calls of" in undeclared
    assert not (folder / "runs").exists()


def test_from_questions_to_a_gate_that_chooses_among_two_tools(copy: Path) -> None:
    report = json.loads((copy / "rollout.json").read_text())
    asked = report["questions"]
    assert report["runs_per_question"] == {"direct": 1, "stock_level": 1, "order_status": 1, "free": 0}
    assert (report["finished"], report["failed"]) == (3 * asked, 0)
    # Sums and greetings are known; each tool helps with its own kind.
    branches = report["branches"]
    assert branches["direct"]["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert branches["order_status"]["accuracy"] == pytest.approx(0.25, abs=0.03)
    assert branches["stock_level"]["calls"] == 1

    metis("rollout", "questions.jsonl", *MINE, "--store", "runs", "--json", "again.json")
    report = json.loads((copy / "again.json").read_text())
    assert (report["found"], report["finished"]) == (3 * asked, 0)

    assert json.loads((copy / "train.json").read_text())["at_threshold"]["accuracy"] > 0.95
    output = metis("evaluate", "gate", "my-gate", "--store", "runs", "--drop-seen", "--json", "figures.json")
    assert "No drift" in output
    figures = json.loads((copy / "figures.json").read_text())
    assert figures["drift"]["drifted"] is False
    assert figures["at_threshold"]["accuracy"] > 0.95
    with pytest.raises(InputError, match="were trained on"):
        metis("evaluate", "gate", "my-gate", "--store", "runs")

    gate = PolicyGate("my-gate")
    assert gate.artefact.tools == ("order_status", "stock_level")
    deployed = create_metis_agent(*load_attribute("my_agent.py:pair")(), gate=gate)
    chosen: dict[str, list[tuple[str, ...]]] = {}
    for row in questions(5, seed=1):
        state = deployed.invoke({"messages": [HumanMessage(row["question"])]})
        chosen.setdefault(row["kind"], []).append(tuple(outcome.tool for outcome in state["outcomes"]))
        assert state["messages"][-1].text == str(row["answer"])
    assert chosen == {
        "sum": [()] * 5, "greeting": [()] * 5, "stock": [("stock_level",)] * 5, "order": [("order_status",)] * 5,
    }  # fmt: skip


def test_questions_without_answers_are_judged_by_agreement_with_the_free_run(folder: Path) -> None:
    rows = [{"question": row["question"]} for row in questions(8, seed=3) if row["kind"] in ("stock", "order")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = metis("rollout", "mine.jsonl", *MINE, "--store", "runs", "--dry-run")
    assert "16 questions have no 'answer'" in output
    with pytest.raises(ConfigurationError, match="add --free 1"):
        metis("rollout", "mine.jsonl", *MINE, "--store", "runs", "--agreement")
    metis("rollout", "mine.jsonl", *MINE, "--store", "runs", "--free", "1", "--agreement", "--json", "said.json")
    branches = json.loads((folder / "said.json").read_text())["branches"]
    # The model never guesses; each tool finds what the free run found of its own kind. Words need a judge: "unknown"
    # is compared with a number by nothing else, so these have no verdict.
    assert (branches["free"]["judged"], branches["free"]["accuracy"]) == (16, 1.0)
    assert branches["stock_level"]["judged"] < 16
    table = Records(store="runs", agreement=True, judge="my_agent.py:JUDGE").load(Console(quiet=True))
    assert table.actions == ("direct", "order_status", "stock_level")
    assert table.correct.sum(axis=0).tolist() == [0.0, 8.0, 8.0]
    with pytest.raises(InputError, match="no reference"):
        Records(store="runs").load(Console(quiet=True))


def test_drift_is_told_from_questions_alone(copy: Path) -> None:
    today = [row for row in questions(40, seed=2) if row["kind"] in ("stock", "order")]
    for name, rows in (("same.jsonl", questions(30, seed=3)), ("other.jsonl", today), ("few.jsonl", today[:5])):
        (copy / name).write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))
    assert "No drift" in metis("drift", "my-gate", "--questions", "same.jsonl")
    assert "No drift" in metis("drift", "my-gate", "--store", "runs")
    assert "not like those calibrated on" in metis("drift", "my-gate", "--questions", "other.jsonl", code=3)
    with pytest.raises(InputError, match=r"5 different questions: 20 or more are needed\.$"):
        metis("drift", "my-gate", "--questions", "few.jsonl")
    with pytest.raises(ConfigurationError, match="give one of them"):
        metis("drift", "my-gate")


@pytest.mark.parametrize("name", ["pair", "make", "agent"])
def test_an_agent_of_ones_own_in_each_form(folder: Path, name: str) -> None:
    chosen = choose_agent(None, None, f"my_agent.py:{name}")
    assert chosen.tools == ("stock_level", "order_status")
    state = chosen.build(NeverGate()).invoke({"messages": [HumanMessage("How many of part-1 are in stock?")]})
    assert state["messages"][-1].text == "unknown"
    metis(
        "rollout", "questions.jsonl", "--agent", f"my_agent:{name}", "--store", "runs", "--limit", "2", "--forced", "0"
    )
    assert TrajectoryStore("runs").count() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of them"),
        (("--model", "x:y", "--agent", "a:b"), "give one of them"),
        (("--agent", "my_agent.py:make", "--tools", "my_agent.py:TOOLS"), "brings its own"),
        (("--model", "my_agent.py:Model"), r"has no tools.*name some with --tools"),
        (("--agent", "my_agent.py:bare"), r"has no tools.*give 'my_agent.py:bare' some"),
        (("--model", "my_agent.py:Model", "--tools", "my_agent.py:STOCK"), "no tool"),
        (("--model", "my_agent.py:Model", "--tools", "my_agent.py:TOOL"), "has no 'TOOL'; it has"),
        (("--model", "my_agent.py:Model", "--tools", "no_such_tools:TOOLS"), "can't be imported"),
        (("--model", "my_agent.py:Model", "--tools", "TOOLS"), "names no object"),
        (("--agent", "my_agent.py:STOCK"), "must be a MetisAgent"),
        ((*MINE, "--direct", "0", "--forced", "0"), "at least one is above 0"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_runs(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        metis("rollout", "questions.jsonl", *arguments, "--store", "runs")
    assert not (folder / "runs").exists()


def test_records_come_from_one_place(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="give one of them"):
        metis("train", "gate", "--out", "my-gate")
    with pytest.raises(ConfigurationError, match="name alone"):
        metis("train", "gate", "--store", str(folder), "--tool", "a=b", "--out", "my-gate")
