"""Each closed set of the package is open: one file from outside adds a verifier, a table format and a benchmark."""

import json
import subprocess
import sys
from pathlib import Path

MINE = '''
"""A verifier, a table format and a benchmark of my own."""

from metis_agent.evaluation.benchmarks import benchmark_named, register_benchmark
from metis_agent.judging.verifiers import register_verifier
from metis_agent.rollouts.tables import register_table_format


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
from metis_agent.types import Trajectory

(question,) = read_questions("capitals.quiz")
with TrajectoryStore("runs") as store:
    store.append(Trajectory(id="a", question=question, answer="Paris, of course"))
(run,) = TrajectoryStore("runs", read_only=True).read()
print(json.dumps([run.question.verifier, judge(run)[0], benchmark_named("capitals", count=3).count]))
"""


def test_one_file_from_outside_adds_to_each_set(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "capitals.quiz").write_text("What is the capital of France? = Paris\n")
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["starts", True, 3]
    # Where the file is not there, what it has recorded can be read all the same.
    reader = (
        "from metis_agent import TrajectoryStore as S; print(*[run.id for run in S('runs', read_only=True).read()])"
    )
    found = subprocess.run([sys.executable, "-c", reader], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "a"
