"""An agent that answers in sentences, made by `create_agent`: from its questions to a gate, as the how-to says."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.gates.policy import PolicyGate

from .test_rollout import metis

MODULE = '''
import re
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from metis_agent import MetisGateMiddleware

def stock(number):
    return (number * 37) % 900 + 1

@tool
def stock_level(part: str) -> str:
    """How many of a part are in the warehouse."""
    return str(stock(int(part.split("-")[1])))

stock_level.metadata = {"read_only": True}

class Model(BaseChatModel):
    """Knows sums, and of parts what the tool tells it; says so in sentences, and once something wrong."""

    @property
    def _llm_type(self):
        return "mine"

    def bind_tools(self, tools, *, tool_choice=None, **options):
        return self.bind(tools=[one.name for one in tools], **options)

    def _generate(self, messages, stop=None, run_manager=None, tools=(), **options):
        question = next(message.text for message in reversed(messages) if message.type == "human")
        part, numbers = re.search(r"part-\\\\d+", question), [int(digits) for digits in re.findall(r"\\\\d+", question)]
        if messages[-1].type == "tool":
            reply = AIMessage(f"There are {messages[-1].text} of {part[0]} in stock." if part else messages[-1].text)
        elif tools and part:
            reply = AIMessage("", tool_calls=[{"name": "stock_level", "args": {"part": part[0]}, "id": "1"}])
        elif tools:
            reply = AIMessage("", tool_calls=[{"name": "stock_level", "args": {"part": "part-1"}, "id": "1"}])
        elif part:
            reply = AIMessage(f"I would have to look up {part[0]}.")
        else:
            total = sum(numbers) + (numbers == [13, 13])
            reply = AIMessage(f"If you add {numbers[0]} and {numbers[1]}, you get {total}. Is there anything else?")
        return ChatResult(generations=[ChatGeneration(message=reply)])

def make(gate):
    return create_agent(Model(), [stock_level], middleware=[MetisGateMiddleware(gate)])

def says_it(question, answer):
    return str(question.answer) in re.findall(r"\\\\d+", answer)
'''.replace("\\\\", "\\")
ROLL_OUT = ("rollout", "questions.jsonl", "--agent", "prose_agent.py:make", "--store", "runs")
TRAIN = ("train", "gate", "--store", "runs", "--out", "my-gate")


def rows(verifier: str | None = None) -> list[dict[str, object]]:
    asked: list[dict[str, object]] = [
        {"question": f"How many of part-{number} are in stock?", "answer": (number * 37) % 900 + 1}
        for number in range(40, 70)
    ]
    sums = [(13, 13), *((number, 7 * number % 50 + 2) for number in range(20, 49))]
    asked += [{"question": f"What is {a} plus {b}?", "answer": a + b} for a, b in sums]
    return [{**row, "verifier": verifier} if verifier else row for row in asked]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "prose_agent.py").write_text(MODULE)
    path = list(sys.path)
    with chdir(tmp_path):
        yield tmp_path
    sys.path[:] = path
    sys.modules.pop("prose_agent", None)


def ask(folder: Path, verifier: str | None = None) -> None:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(verifier)))


def test_the_gate_answers_as_rightly_as_the_agent(folder: Path) -> None:
    ask(folder)
    metis(*ROLL_OUT, "--json", "rollout.json")
    branches = json.loads((folder / "rollout.json").read_text())["branches"]
    assert branches["direct"]["accuracy"] == pytest.approx(29 / 60)
    assert branches["stock_level"]["accuracy"] == pytest.approx(30 / 60)
    metis(*TRAIN)
    from prose_agent import make  # type: ignore[import-not-found]

    agent = make(PolicyGate("my-gate"))
    right = calls = 0
    for row in rows():
        state = agent.invoke({"messages": [HumanMessage(str(row["question"]))]})
        calls += len(state["outcomes"])
        right += str(row["answer"]) in re.findall(r"\d+", state["messages"][-1].text)
    assert right == 59
    assert calls == 30


def test_verdicts_that_the_verifier_ruined_are_refused_with_the_remedy(folder: Path) -> None:
    ask(folder, "exact")
    metis(*ROLL_OUT)
    with pytest.raises(InputError, match=r"wrong and yet state the reference.*'exact'.*--verifier prose"):
        metis(*TRAIN)
    metis(*TRAIN, "--verifier", "prose")
    metis(*TRAIN, "--verifier", "prose_agent.py:says_it")


def test_judging_is_checked_before_a_run_is_paid_for(folder: Path) -> None:
    ask(folder, "judge")
    with pytest.raises(ConfigurationError, match="--judge MODEL"):
        metis(*ROLL_OUT)
    with pytest.raises(ConfigurationError, match="goes with --judge"):
        metis(*ROLL_OUT, "--judge-rubric", "rubric.txt")
    with pytest.raises(ConfigurationError, match="'fuzzy' is not known here"):
        metis(*ROLL_OUT, "--verifier", "fuzzy")
    assert not (folder / "runs").exists()


def test_a_tool_that_may_act_is_not_forced_unasked(folder: Path) -> None:
    ask(folder)
    module = folder / "prose_agent.py"
    module.write_text(module.read_text().replace('{"read_only": True}', '{"read_only": False}'))
    with pytest.raises(ConfigurationError, match=r"stock_level: not declared.*--read-only TOOL"):
        metis(*ROLL_OUT)
    assert not (folder / "runs").exists()
    metis(*ROLL_OUT, "--forced", "0", "--limit", "2")
    metis(*ROLL_OUT, "--read-only", "stock_level", "--limit", "2")
