"""What a gate promised on a real model's recorded runs, and what then happened on fresh questions, live.

    python benchmarks/real_promise.py --openai URL --model NAME --folder FOLDER [--recorded 160] [--fresh 208]

URL is any OpenAI-compatible server. Four kinds of question, in equal shares: small sums, products of large numbers,
what everybody knows, and what only the collection behind `text_search` says. Some are recorded down every branch, as
`metis rollout` does it. A gate is trained on one half of them; whether it reads a direct draft, and what it promises,
is chosen by cross-fitting on that half. The other half sets its threshold, as `metis calibrate` does it. Then other
questions are asked live: of the model alone, of the gate in both hosts, and directly; with --always also with a call
each time. Prints JSON; a table goes to FOLDER/table.md.

Run again, it goes on where it stopped; a gate that is there is taken as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from langchain.agents import create_agent

from metis_agent.agent import create_metis_agent
from metis_agent.evaluation.agents import evaluate, share_right
from metis_agent.evaluation.calibration import Plan, Promise, choose_threshold, plan_promises
from metis_agent.evaluation.comparison import reference_note
from metis_agent.evaluation.gates import Resamples, Scored, area_under_frontier, score_table
from metis_agent.gates.base import Gate
from metis_agent.gates.policy import UNFAMILIAR, PolicyGate
from metis_agent.hdpo.export import set_threshold, write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.middleware import MetisGateMiddleware
from metis_agent.models.served import ServedChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.rollouts.recorded import outcomes_from_trajectories
from metis_agent.rules.budget import Budget
from metis_agent.tools.python import PythonTool
from metis_agent.types import Question, Trajectory

sys.path.insert(0, str(Path(__file__).parent))
from real_model import FACTS as CAPITALS
from real_steps import KNOWN, search, world

TOOLS = ("python", "text_search")
PROMPT = "Answer with the number or the name alone."
BUDGET = Budget(calls=1)
RECORDED, FRESH = 160, 208
"""Questions that there are to record, and to ask live."""
MORE_KNOWN = {
    "What is the chemical symbol of iron?": "Fe", "What is the chemical symbol of silver?": "Ag",
    "What is the chemical symbol of oxygen?": "O", "What is the chemical symbol of sodium?": "Na",
    "What is the chemical symbol of helium?": "He", "What is the chemical symbol of carbon?": "C",
    "What is the chemical formula of water?": "H2O", "What is the chemical formula of table salt?": "NaCl",
    "Which planet is the closest to the sun?": "Mercury", "Which planet is known as the red planet?": "Mars",
    "Which planet is famous for its rings?": "Saturn", "Which gas do plants take up from the air?": "carbon dioxide",
    "What is the currency of Japan?": "yen", "What is the currency of the United Kingdom?": "pound",
    "What is the currency of India?": "rupee", "What is the currency of Russia?": "ruble",
    "What is the currency of Mexico?": "peso", "What is the currency of Switzerland?": "franc",
    "What is the currency of China?": "yuan", "What is the currency of Germany?": "euro",
    "What is the capital of Canada?": "Ottawa", "What is the capital of Australia?": "Canberra",
    "What is the capital of Argentina?": "Buenos Aires", "What is the capital of Mexico?": "Mexico City",
    "What is the capital of Brazil?": "Brasilia", "What is the capital of South Korea?": "Seoul",
    "What is the capital of Vietnam?": "Hanoi", "What is the capital of Indonesia?": "Jakarta",
    "What is the capital of Romania?": "Bucharest", "What is the capital of Bulgaria?": "Sofia",
    "What is the capital of Croatia?": "Zagreb", "What is the capital of Serbia?": "Belgrade",
    "What is the capital of Iceland?": "Reykjavik", "What is the capital of Colombia?": "Bogota",
    "What is the capital of Venezuela?": "Caracas", "What is the capital of the Netherlands?": "Amsterdam",
    "Who wrote the play Romeo and Juliet?": "Shakespeare", "Who wrote the novel Don Quixote?": "Cervantes",
    "Who wrote the novel Pride and Prejudice?": "Austen", "Who wrote the novel Oliver Twist?": "Dickens",
    "Who wrote the novel 1984?": "Orwell", "Who wrote the play Faust?": "Goethe",
    "Who wrote the epic The Odyssey?": "Homer", "Who wrote the novel Crime and Punishment?": "Dostoevsky",
    "Who painted the Starry Night?": "Van Gogh", "Who painted the ceiling of the Sistine Chapel?": "Michelangelo",
    "Who discovered penicillin?": "Fleming", "Who formulated the law of universal gravitation?": "Newton",
    "Who invented the telephone?": "Bell", "Who was the first president of the United States?": "Washington",
    "Who was the first person on the moon?": "Armstrong",
    "Who composed the Ninth Symphony with the Ode to Joy?": "Beethoven",
    "What is the largest ocean animal?": "blue whale", "What is the tallest mountain in the world?": "Everest",
    "What is the largest desert of Africa?": "Sahara", "Which river flows through Paris?": "Seine",
    "Which river flows through London?": "Thames", "Which river flows through Egypt?": "Nile",
    "On which continent is Brazil?": "South America", "On which continent is Kenya?": "Africa",
    "How many days are there in a week?": "7", "How many months are there in a year?": "12",
    "How many minutes are there in an hour?": "60", "How many continents are there?": "7",
    "How many sides does a triangle have?": "3", "How many legs does an insect have?": "6",
    "In which country does the Great Wall stand?": "China", "In which country does the Taj Mahal stand?": "India",
    "In which city does the Statue of Liberty stand?": "New York", "In which city does Big Ben stand?": "London",
}  # fmt: skip
PROMISES = [
    *(Promise(kind="accuracy_loss", limit=limit) for limit in (0.01, 0.02, 0.05)),
    *(Promise(kind="calls", limit=limit) for limit in (0.4, 0.5, 0.6, 0.7, 0.8)),
]


def small_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    return (f"What is {a} + {b}?", str(a + b)) if rng.random() < 0.5 else (f"What is {a + b} - {b}?", str(a))


def large_product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1_000, 9_999), rng.randint(1_000, 9_999)
    return f"What is {a} * {b}?", str(a * b)


def asked_of(pool: Sequence[tuple[str, str]]) -> Callable[[random.Random], tuple[str, str]]:
    return lambda rng: rng.choice(pool)


def kinds() -> dict[str, Callable[[random.Random], tuple[str, str]]]:
    """What makes a question of each kind, with its answer."""
    known = [*((f"What is the capital of {it}?", capital) for it, capital in CAPITALS.items()), *KNOWN.items()]
    companies = [
        question
        for it in world()
        for question in (
            (f"Who founded the {it['company']} company?", it["founder"]),
            (f"In which year was the {it['company']} company founded?", it["founded"]),
            (f"In which country was {it['founder']} born?", it["country"]),
        )
    ]
    return {
        "small sum": small_sum,
        "large product": large_product,
        "common fact": asked_of([*known, *MORE_KNOWN.items()]),
        "obscure fact": asked_of(companies),
    }


def questions(count: int) -> list[Question]:
    """Of the four kinds in turn, no two alike; a longer list begins with a shorter one."""
    rng, seen, found = random.Random("promise"), set[str](), list[Question]()
    for kind, make in itertools.islice(itertools.cycle(kinds().items()), count):
        drawn = next((it for _ in range(10_000) if (it := make(rng))[0] not in seen), None)
        if drawn is None:
            raise SystemExit(f"There are fewer than {count} different questions of the kind {kind!r}: ask for fewer.")
        seen.add(drawn[0])
        found.append(Question(id=drawn[0], text=drawn[0], answer=drawn[1], kind=kind, verifier="prose"))
    return found


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model with its tools, and where its runs are kept."""

    url: str
    model: str
    folder: Path
    concurrency: int

    def agent(self, gate: Gate) -> Any:
        """The agent in our own graph."""
        return create_metis_agent(
            self._chat(), self._tools(), gate=gate, system_prompt=PROMPT, budget=BUDGET, record_calls=True
        )

    def created(self, gate: Gate) -> Any:
        """The same of LangChain's `create_agent`."""
        middleware = [MetisGateMiddleware(gate, budget=BUDGET, record_calls=True)]
        return create_agent(self._chat(), self._tools(), system_prompt=PROMPT, middleware=middleware)

    def _chat(self) -> ServedChatModel:
        return ServedChatModel(base_url=self.url, model=self.model, temperature=0.0, max_tokens=48)

    def _tools(self) -> list[Any]:
        return [PythonTool(images=False), search()]

    def runs(
        self, build: Callable[[Gate], Any], asked: Sequence[Question], plan: BranchPlan, name: str
    ) -> list[Trajectory]:
        """The runs of a plan, made where they are not in the store yet; those that failed are told and left out."""
        with TrajectoryStore(self.folder / "runs") as store:
            rollouts = list(branch_rollouts(asked, TOOLS, plan, name=name, seed=0))
            recorder = BranchRecorder(
                build, store, concurrency=self.concurrency, timeout=600, metadata={"model": self.model, "arm": name}
            )
            report = recorder.record(rollouts)
            print(f"{name}: {report}", file=sys.stderr)
            wanted = {rollout.id for rollout in rollouts}
            return [run for run in store.read() if run.id in wanted and run.status == "finished"]


def trained(records: Sequence[Trajectory], folder: Path) -> dict[str, Any]:
    """Write the better of two gates, and say how good either is on folds that it did not see; promise nothing yet."""
    found, told = {}, dict[str, Any]()
    for name, draft in (("question", False), ("question and draft", True)):
        table = outcomes_from_trajectories(records, tools=TOOLS, draft=draft)
        gate = train_gate(table)
        scored = Scored(direct_right=gate.accuracy[:, 0], probabilities=gate.probabilities)
        rows = np.arange(len(table))
        area = area_under_frontier(scored.need, table.correct[:, 0], table.correct[rows, scored.tool])
        called = scored.need > 0.5
        right = table.correct[rows, np.where(called, scored.tool, 0)]
        found[name] = gate, table, scored
        told[name] = {"area": area, "accuracy": float(right.mean()), "calls": float(called.mean()), "rows": len(table)}
    reads = max(told, key=lambda name: told[name]["area"])
    gate, table, scored = found[reads]
    write_artefact(gate, folder, table=table, metrics={"cross_fitted": told[reads]})
    plans = plan_promises(scored.probabilities, table.correct, table.cost, PROMISES, [len(table)])
    return {"reads": reads, "cross_fitted": told, "dropped": dict(table.dropped), "plans": [asdict(it) for it in plans],
            "promise": asdict(chosen(plans))}  # fmt: skip


def chosen(plans: Sequence[Plan]) -> Promise:
    """Of the promises that nearly any such records support: the fewest calls at two points or less under the best."""
    supported = [plan for plan in plans if plan.refused <= 0.05]
    if not supported:
        raise SystemExit("So few records can support none of the promises: record more questions.")
    best = max(plan.accuracy for plan in supported)
    return min((it for it in supported if it.accuracy >= best - 0.02), key=lambda plan: plan.tool_rate).promise


def promised(gate: PolicyGate, table: OutcomeTable, promise: Promise) -> dict[str, Any]:
    """Set the gate's threshold on questions that it was not trained on, and say what is promised."""
    scored = score_table(gate, table)
    threshold = choose_threshold(scored.probabilities, table.correct, table.cost, promise)
    note = threshold.note()
    set_threshold(gate.artefact.folder, {**note, "reference": reference_note(scored, gate.artefact.tools)})
    return {**note, "dropped": dict(table.dropped)}


def figures(runs: Mapping[str, Sequence[Trajectory]]) -> dict[str, Any]:
    """Of each arm, beside what came of the same questions directly and, where that was asked, with a call."""
    direct, always = share_right(runs["directly"]), share_right(runs.get("always calling", ()))
    told: dict[str, Any] = {}
    for arm, own in runs.items():
        evaluation = evaluate(own, direct_right=direct, tool_right=always or None, resamples=10_000)
        read, written = (float(np.mean([tokens(run, f"{way}_tokens") for run in own])) for way in ("input", "output"))
        told[arm] = {**asdict(evaluation), "tokens_read": read, "tokens_written": written}
    return told


def tokens(run: Trajectory, kind: str) -> int:
    """Of the replies that the user's history has, and of drafts."""
    replies = [message["data"].get("usage_metadata") or {} for message in run.messages if message["type"] == "ai"]
    drafts = [call.usage for call in run.calls if call.node == "draft" and run.tool_calls]
    return sum(usage.get(kind, 0) for usage in (*replies, *drafts))


def difference(one: Sequence[Trajectory], other: Sequence[Trajectory]) -> dict[str, Any]:
    """Accuracy of one arm less that of the other on the questions that both have; 95% bootstrap."""
    left, right = share_right(one), share_right(other)
    both = sorted(left.keys() & right.keys())
    gap = np.array([left[it] - right[it] for it in both])
    interval = Resamples(both, 10_000, 0).interval(lambda index: float(gap[index].mean()))
    return {"value": float(gap.mean()), "low": interval[0], "high": interval[1], "questions": len(both)}


def markdown(live: Mapping[str, Any]) -> str:
    """A row an arm, with a row for each of its kinds below."""
    titles = ("", "questions", "right", "calls a question", "calls where it knows", "tokens read, written")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for arm, told in live.items():
        tokens = f"{told['tokens_read']:.0f}, {told['tokens_written']:.0f}"
        lines.append(_row(arm, told["overall"], told["questions"], tokens))
        lines += [_row(f"- {kind}", it, it["accuracy"]["questions"], "") for kind, it in told["kinds"].items()]
    return "\n".join(lines) + "\n"


def _row(name: str, metrics: Mapping[str, Any], count: int, tokens: str) -> str:
    cells = [_cell(metrics[it]) for it in ("accuracy", "calls_per_question", "redundant_rate")]
    return "| " + " | ".join([name, str(count), *cells, tokens]) + " |"


def _cell(it: Mapping[str, Any]) -> str:
    return "" if it["value"] is None else f"{it['value']:.3f} [{it['low']:.3f}, {it['high']:.3f}]"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai", metavar="URL", required=True, help="of the server; ends in /v1")
    parser.add_argument("--model", required=True, help="the name that the server knows")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recorded", type=int, default=RECORDED, help="questions to train and to calibrate on")
    parser.add_argument("--fresh", type=int, default=FRESH, help="questions to ask live")
    parser.add_argument("--left-alone", type=int, default=FRESH, help="the first so many of them without the gate")
    parser.add_argument("--middleware", type=int, default=FRESH, help="the first so many of them with create_agent")
    parser.add_argument("--always", type=int, default=0, help="the first so many of them with a call each time")
    parser.add_argument("--concurrency", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    bench = Bench(url=given.openai, model=given.model, folder=given.folder, concurrency=given.concurrency)
    asked = questions(RECORDED + FRESH)
    known, fresh = asked[:RECORDED][: given.recorded], asked[RECORDED:][: given.fresh]
    records = bench.runs(bench.agent, known, BranchPlan(), "recorded")
    folder, kept = given.folder / "gate", given.folder / "promise.json"
    if not kept.exists():
        train = {it.id for it in known[: len(known) // 2]}
        told = trained([run for run in records if run.question.id in train], folder)
        gate = PolicyGate(folder)
        rest = [run for run in records if run.question.id not in train]
        table = outcomes_from_trajectories(rest, tools=TOOLS, draft=gate.wants_draft)
        told["promised"] = promised(gate, table, Promise(**told["promise"]))
        kept.write_text(json.dumps(told, indent=2))
    gate, free = PolicyGate(folder), BranchPlan(direct=0, tool=0, free=1)
    runs = {
        "directly": bench.runs(bench.agent, fresh, BranchPlan(tool=0), "directly"),
        "with the gate": bench.runs(lambda _: bench.agent(gate), fresh, free, "gate"),
        "left alone": bench.runs(bench.agent, fresh[: given.left_alone], free, "left alone"),
    }
    if given.middleware:
        part = fresh[: given.middleware]
        runs["with the gate, create_agent"] = bench.runs(lambda _: bench.created(gate), part, free, "middleware")
    if given.always:
        always = PolicyGate(folder, threshold=0.0, unfamiliar="gate")
        part = fresh[: given.always]
        runs["always calling"] = bench.runs(lambda _: bench.agent(always), part, free, "always calling")
    live, with_gate = figures(runs), runs["with the gate"]
    (given.folder / "table.md").write_text(markdown(live))
    shown = {
        **json.loads(kept.read_text()),
        "live": live,
        "left_to_the_model": sum(run.decisions[0].reason.startswith(UNFAMILIAR) for run in with_gate if run.decisions),
        "with_the_gate_less": {arm: difference(with_gate, runs[arm]) for arm in runs if arm != "with the gate"},
    }
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
