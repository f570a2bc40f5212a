"""A real model's runs of several steps: record them from any OpenAI-compatible server, and compare what stops them.

    python benchmarks/real_steps.py --openai URL --model NAME --record FOLDER [--questions 200]
    python benchmarks/real_steps.py --openai URL --model NAME --compare STORE [--seeds 0 1 2]

The questions are about companies and people that do not exist, in a collection that `text_search` reads, and about
what everybody knows: a question needs no search, one, or two, and some of what it needs is known by heart (capitals).
`--record` is `metis rollout --every-step` into FOLDER/runs: run again, it goes on where it stopped.

`--compare` takes the decision points of a store, its forks or, where a question was run freely and without tools, the
first step of the free run. It trains the gate on four fifths of the questions and replays the last fifth, five times
over, beside value regression, caps, the oracle and *self-report*: at each state the model is asked whether it knows
the answer for certain, and its odds of yes against no are the score (kept in STORE/enough.jsonl). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.tools import BaseTool
from openai import OpenAI

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.evaluation.gates import replay
from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.judging.verifiers import VERIFIERS, prose, verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import FORK
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.rollouts.points import PointPool, forks_of
from metis_agent.rules.budget import Budget
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.types import Question

sys.path.insert(0, str(Path(__file__).parent))
from real_model import FACTS as CAPITALS
from steps import PRICES, areas, at_thresholds, fixed_rules, value_regression

KNOWN = {
    "Who wrote the play Hamlet?": "Shakespeare", "Who painted the Mona Lisa?": "Leonardo da Vinci",
    "What is the largest planet of the solar system?": "Jupiter", "Who developed the theory of relativity?": "Einstein",
    "In which country does the Eiffel Tower stand?": "France", "What is the chemical symbol of gold?": "Au",
    "In which country do the pyramids of Giza stand?": "Egypt", "Which ocean is the largest?": "Pacific",
    "What is the longest river of South America?": "Amazon", "Who wrote the novel War and Peace?": "Tolstoy",
    "In which city does the Colosseum stand?": "Rome", "Which metal is liquid at room temperature?": "mercury",
    "How many legs does a spider have?": "8", "In which year did the Second World War end?": "1945",
    "Who composed the opera The Magic Flute?": "Mozart", "What is the hardest natural mineral?": "diamond",
}  # fmt: skip
_FIRST = "Orla Bram Tilde Anso Mirek Ylva Dario Henka Sefton Ludvika Corin Petra Ivo Marisol Ulrik Zenia Otmar Nadja"
_HEAD = "Tar Bel Quor Mav Ost Vin Drel Kal Sor Pen Lun Gar Fen Hol Wex Yar Zim Cor Nim Rad"
_TAIL = "volin dex mere strand okko wick uma bari ettle onde arsk ilo"
_TRADES = ("barometers", "violins", "fishing nets", "typewriters", "lighthouse lamps", "tea", "bicycles", "carpets")
_WORK = ("an engineer", "a botanist", "a clockmaker", "a chemist", "a sailor")
NEEDED = {"known": 0, "fact": 1, "fact and capital": 1, "hop": 2, "hop and capital": 2}
"""Kinds of question, and the searches that each needs."""
PROMPT = "Answer with the name alone."
ENOUGH = "Do you know for certain what the answer to the question is? Answer yes or no."


def world(count: int = 400) -> list[dict[str, str]]:
    """Companies and their founders. Of some the company's own entry says where its founder was born."""
    rng = random.Random("companies")
    heads, tails, first = _HEAD.split(), _TAIL.split(), _FIRST.split()
    names = [f"{head}{tail}" for head in heads for tail in tails]
    families = [f"{tail.capitalize()}{head.casefold()}" for head in heads for tail in tails]
    rng.shuffle(names)
    rng.shuffle(families)
    return [
        {
            "company": name, "founder": f"{rng.choice(first)} {family}", "country": rng.choice(list(CAPITALS)),
            "founded": str(rng.randrange(1821, 1899)), "trade": rng.choice(_TRADES), "work": rng.choice(_WORK),
            "told": "yes" if rng.random() < 0.3 else "",
        }
        for name, family in zip(names[:count], families[:count], strict=True)
    ]  # fmt: skip


def documents() -> list[Document]:
    """Two for each company: its own and its founder's."""
    found = []
    for it in world():
        told = f", who was born in {it['country']}" if it["told"] else ""
        founded = f"It was founded in {it['founded']} by {it['founder']}{told}."
        company = f"The {it['company']} company makes {it['trade']}. {founded}"
        person = f"{it['founder']} was {it['work']}, born in {it['country']}."
        found += [
            Document(id=it["company"], title=it["company"], text=company),
            Document(id=it["founder"], title=it["founder"], text=person),
        ]
    return found


def questions(count: int, seed: int = 0) -> list[Question]:
    """Of the five kinds in equal shares, in an order of their own: a longer list begins with a shorter one."""
    rng = random.Random(f"questions {seed}")
    companies = world()
    rng.shuffle(companies)
    known = [*((f"What is the capital of {it}?", capital) for it, capital in CAPITALS.items()), *KNOWN.items()]
    rng.shuffle(known)
    found = []
    for number in range(count):
        kind = list(NEEDED)[number % len(NEEDED)]
        it = companies[number % len(companies)]
        if kind == "known":
            if not known:
                continue
            text, answer = known.pop()
        elif kind == "fact":
            text, answer = rng.choice(
                [
                    (f"In which year was the {it['company']} company founded?", it["founded"]),
                    (f"Who founded the {it['company']} company?", it["founder"]),
                    (f"In which country was {it['founder']} born?", it["country"]),
                ]
            )
        elif kind == "fact and capital":
            text = f"What is the capital of the country where {it['founder']} was born?"
            answer = CAPITALS[it["country"]]
        elif kind == "hop":
            text, answer = f"In which country was the founder of the {it['company']} company born?", it["country"]
        else:
            text = f"What is the capital of the country where the founder of the {it['company']} company was born?"
            answer = CAPITALS[it["country"]]
        found.append(Question(id=f"{kind}: {text}", text=text, answer=answer, kind=kind, verifier="prose"))
    return found


def search() -> BaseTool:
    return TextSearchTool(
        backend=CorpusSearch.build(documents()), limit=1, label="", template="{text}", no_results="No results.",
        description="Search for a fact.", metadata={"read_only": True},
    )  # fmt: skip


def agent(gate: Any = None) -> MetisAgent:
    """What `metis rollout --agent` builds; the server and its model's name are in the environment."""
    from metis_agent.models.served import ServedChatModel

    chat = ServedChatModel(
        base_url=os.environ["METIS_STEPS_URL"], model=os.environ["METIS_STEPS_MODEL"], temperature=0.0, max_tokens=48
    )
    return create_metis_agent(chat, [search()], gate=gate, system_prompt=PROMPT, budget=Budget(calls=4))


def record(url: str, model: str, folder: Path, count: int, concurrency: int) -> None:
    """`metis rollout --every-step`, ten questions more each time, so that what is there is there with its forks."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / "questions.jsonl"
    lines = [{"id": it.id, "question": it.text, "answer": it.answer, "kind": it.kind, "verifier": it.verifier}
             for it in questions(count)]  # fmt: skip
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {**os.environ, "METIS_STEPS_URL": url, "METIS_STEPS_MODEL": model}
    options = ["--agent", f"{Path(__file__)}:agent", "--store", str(folder / "runs"), "--label", model, "--every-step"]
    for limit in range(10, count + 10, 10):
        command = [sys.executable, "-m", "metis_agent.cli", "rollout", str(asked), *options]
        subprocess.run([*command, "--concurrency", str(concurrency), "--limit", str(limit)], check=True, env=told)


def points_of(store: str) -> OutcomeTable:
    """The decision points of a store; of runs without forks the first, by what came of the question without tools."""
    runs = list(TrajectoryStore(store, read_only=True).read())
    forks = [run for run in runs if FORK in run.metadata]
    if not forks:
        direct = {run.question.id: run for run in runs if run.branch == "direct"}
        first = [(run, *forks_of(run)[:1]) for run in runs if run.branch == "free"]
        forks = [
            replace(direct[run.question.id], id=fork[0].id, metadata=fork[0].metadata)
            for run, *fork in first if fork and run.question.id in direct
        ]  # fmt: skip
    return PointPool(verify=partial(verify, verifiers={**VERIFIERS, "exact": prose})).extend(forks).table()


def self_report(points: OutcomeTable, url: str, model: str, kept: Path, concurrency: int) -> Any:
    """[N]: log-odds, by the model itself, that it has not got enough; what was asked before is read from `kept`."""
    read = zip(points.questions, points.observations or [""] * len(points), strict=True)
    states = [f"{ENOUGH}\nNotes: {brought or 'none'}\nQuestion: {question}" for question, brought in read]
    said = {}
    if kept.exists():
        said = {it["state"]: it["enough"] for it in map(json.loads, kept.read_text().splitlines())}
    client = OpenAI(base_url=url or "http://127.0.0.1", api_key="none")

    def ask(state: str) -> float:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": state}], max_tokens=1, temperature=0, logprobs=True,
            top_logprobs=20,
        )  # fmt: skip
        first = reply.choices[0].logprobs.content[0].top_logprobs  # type: ignore[union-attr, index]
        yes, no = (
            sum(math.exp(it.logprob) for it in first if it.token.strip().casefold() == word) for word in ("yes", "no")
        )
        return math.log(yes + 1e-9) - math.log(no + 1e-9)

    missing = sorted({*states} - said.keys())
    with ThreadPoolExecutor(concurrency) as threads, kept.open("a") as file:
        for state, enough in zip(missing, threads.map(ask, missing), strict=True):
            said[state] = enough
            file.write(json.dumps({"state": state, "enough": enough}) + "\n")
            file.flush()
    return np.array([-said[state] for state in states])


def compared(points: OutcomeTable, seed: int, asked: Any) -> dict[str, Any]:
    """The area of each rule, out of fold."""
    policy = FeaturesPolicy()
    prepared = policy.prepare(points)
    fold, need = points.folds(5, seed), np.zeros(len(points))
    values = [np.zeros(len(points), dtype=bool) for _ in PRICES]
    for held_out in range(5):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        gate = train_gate(points, GateTraining(seed=seed), policy=policy, prepared=prepared, rows=train)
        # Each fold's gate has a temperature of its own: what a call brings is compared without.
        alike = replace(gate, contrast=replace(gate.contrast, temperature=1.0))
        need[test] = alike.score(test)[1].max(axis=1)
        for rule, price in zip(values, PRICES, strict=True):
            rule[test] = value_regression(points.take(train), points.take(test), price)
    rules = {"gate": at_thresholds(need), "value regression": values, **fixed_rules(points)}
    if asked is not None:
        rules["self-report"] = at_thresholds(asked)
    return areas(rules, points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai", metavar="URL", help="of the server; ends in /v1")
    parser.add_argument("--model", default="model", help="the name that the server knows")
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--compare", metavar="STORE")
    parser.add_argument("--enough", type=Path, metavar="FILE", help="self-report, by default STORE/enough.jsonl")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()
    if given.record:
        record(given.openai, given.model, given.record, given.questions, given.concurrency)
    if given.compare:
        points = points_of(given.compare)
        kept = given.enough or Path(given.compare) / "enough.jsonl"
        asked = (
            self_report(points, given.openai, given.model, kept, given.concurrency)
            if given.openai or kept.exists()
            else None
        )
        ends = {
            "going on": replay(points, np.ones(len(points), dtype=bool)),
            "stopping": replay(points, np.zeros(len(points), dtype=bool)),
        }
        print(
            json.dumps(
                {
                    "runs": len(set(points.runs)),
                    "decision_points": len(points),
                    **{
                        name: {"accuracy": float(it.correct.mean()), "calls": float(it.cost.mean())}
                        for name, it in ends.items()
                    },
                    "seeds": {seed: compared(points, seed, asked) for seed in given.seeds},
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
