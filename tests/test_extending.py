"""Each closed set of the package is open: a file from outside adds a verifier, a format, a benchmark, a gate."""

import json
import subprocess
import sys
from pathlib import Path

MINE = '''
"""A verifier, a table format, a benchmark and a kind of gate of my own."""

from metis_agent.gates.scorers import register_scorer
from metis_agent.evaluation.benchmarks import benchmark_named, register_benchmark
from metis_agent.judging.verifiers import register_verifier
from metis_agent.rollouts.questions import register_table_format


def starts(question, answer):
    return answer.startswith(question.answer)


def lines(path):
    for line in path.read_text().splitlines():
        question, _, answer = line.partition(" = ")
        yield {"question": question, "answer": answer, "verifier": "starts"}


class Capitals:
    name = "capitals"

    def __init__(self, *, count=1):
        self.count = count


class LongPolicy:
    """Reads of a question whether it is long."""

    kind = "long"

    def prepare(self, table):
        self.long = [len(question) > 30 for question in table.questions]
        return self

    def fit(self, rows, targets, strength):
        import numpy as np

        long = np.array(self.long)[rows]
        means = np.clip([targets[long == side].mean(axis=0) for side in (False, True)], 0.01, 0.99)
        return LongFitted(self.long, np.log(means / (1 - means)))


class LongFitted:
    def __init__(self, long, weights):
        self.long, self.weights = long, weights

    def logits(self, rows):
        return self.weights[[int(self.long[row]) for row in rows]]

    def tensors(self):
        return {"weights": self.weights}

    def config(self):
        return {}


class LongScorer:
    instant, open_tools, draft_columns = True, False, ()

    def __init__(self, artefact, device):
        values = list(artefact.tensors["weights"].values)
        self.rows = values[: len(values) // 2], values[len(values) // 2 :]

    def logits(self, asked):
        return self.rows[len(asked.question) > 30]


register_scorer("long", LongScorer)
register_verifier("starts", starts)
register_table_format(".quiz", lines)
register_benchmark("capitals", Capitals)
'''
USE = """
import json, sys
from pathlib import Path

import mine
from metis_agent.evaluation.benchmarks import benchmark_named
from metis_agent.judging.verifiers import judge, verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.questions import read_questions
from metis_agent import GateRequest, PolicyGate, Trajectory
from metis_agent.types import ToolSpec
from langchain_core.messages import HumanMessage

(question,) = read_questions("capitals.quiz")
with TrajectoryStore("runs") as store:
    store.append(Trajectory(id="a", question=question, answer="Paris, of course"))
(run,) = TrajectoryStore("runs", read_only=True).read()
def allowed(text):
    request = GateRequest(messages=[HumanMessage(text)], tools=(ToolSpec(name="search"),))
    return PolicyGate("gate", unfamiliar="gate").decide(request).allowed

print(json.dumps([run.question.verifier, judge(run)[0], benchmark_named("capitals", count=3).count,
                  allowed("Hi there"), allowed("How many people live in the second largest city?")]))
"""


def test_one_file_from_outside_adds_to_each_set(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "capitals.quiz").write_text("What is the capital of France? = Paris\n")
    rows = [
        {"question": f"{'How many people live in town number ' if i % 2 else 'Hi, '}{i}", "direct_correct": 1 - i % 2,
         "search_correct": 1 - (i % 9 == 0)}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [
        "train",
        "gate",
        "--outcomes",
        "outcomes.jsonl",
        "--tool",
        "search=search",
        "--policy",
        "mine:LongPolicy",
        "--out",
        "gate",
    ]
    trained = subprocess.run(
        [sys.executable, "-m", "metis_agent.cli", *train], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stderr
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["starts", True, 3, [], ["search"]]
    # Where the file is not there, what it has recorded can be read all the same.
    reader = (
        "from metis_agent import TrajectoryStore as S; print(*[run.id for run in S('runs', read_only=True).read()])"
    )
    found = subprocess.run([sys.executable, "-c", reader], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "a"
