"""When is it enough? The almanac of two hops, run through the graph for real: a gate that decides at every step.

For each seed the agent that never has enough is run on questions to learn from, each run forked at each of its steps;
a gate is trained, its threshold set for a promise on further runs, and deployed in the graph on fresh questions.
Beside it, replayed on the cold start's own runs of the same questions and by the area under the curve of accuracy
against calls: caps, the oracle, and value regression as Stop-RAG has it (arXiv:2510.14337), which trades accuracy for
calls at a price instead of within a bound; it reads the same features. Also how often a promise by turn is broken over
random splits. Prints JSON.

    python benchmarks/steps.py [--seeds 0 1 2] [--train 1000] [--test 600] [--splits 200]
    python benchmarks/steps.py --points 100000      # time and memory of training on so many decision points
    python benchmarks/steps.py --whole-model [--seeds 0 1 2] [--steps 48] [--cold-steps 2000] [--folder runs/two-hops]

With `--whole-model` the agent is the almanac's tiny transformer, trained first on runs of that which never has enough,
then by the decision contrast and by HDPO, forced at three decisions of a run, and measured on the same fresh questions,
greedily. Its own odds of a call at each state are one more rule beside the gate that is trained on its runs. What is
finished in the folder at the same counts is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from metis_agent.errors import InputError
from metis_agent.evaluation.calibration import Promise, choose_threshold
from metis_agent.evaluation.gates import Resamples, followed, interval_of, replay, score_table
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.reference import ModelGate
from metis_agent.hdpo.export import set_threshold, write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.judging.verifiers import verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.rollouts.points import PointPool, forks_of
from metis_agent.types import Question, Trajectory
from metis_agent.worlds.almanac.agent import seeking_agent
from metis_agent.worlds.almanac.questions import CALLS_NEEDED, questions

PRICES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2)
"""Of a call, in accuracy: the settings of value regression."""


def record(
    asked: Sequence[Question], folder: Path, seed: int, build: Callable[[Any], Any] = seeking_agent
) -> OutcomeTable:
    """Runs of the cold start through the graph, forked at each step, as decision points."""
    with TrajectoryStore(folder) as store:
        recorder = BranchRecorder(build, store, concurrency=128)
        plan = BranchPlan(direct=0, tool=0, free=1)
        recorder.record(branch_rollouts(asked, ["text_search"], plan, name="steps", seed=seed))
        runs = list(TrajectoryStore(folder, read_only=True).read())
        recorder.record(fork for run in runs for fork in forks_of(run, seed=seed))
    return PointPool().extend(TrajectoryStore(folder, read_only=True).read()).table()


def deployed(gate: Any, asked: Sequence[Question]) -> dict[str, float]:
    """What an agent with this gate does, run for real."""
    agent = seeking_agent(gate)
    rows = []
    for question in asked:
        state = agent.invoke({"messages": [("user", question.text)]})
        calls = sum(outcome.executed for outcome in state["outcomes"])
        rows.append((question, calls, bool(verify(question, state["messages"][-1].text))))
    return figures_of(rows)


def figures_of(rows: Sequence[tuple[Question, int, bool]]) -> dict[str, float]:
    """Of one run a question: its calls, and whether its answer was right."""
    needed = np.array([CALLS_NEEDED[question.kind] for question, _, _ in rows])  # type: ignore[index]
    made = np.array([calls for _, calls, _ in rows])
    return {
        "accuracy": float(np.mean([right for _, _, right in rows])),
        "calls": float(made.mean()),
        "redundant": float(np.maximum(0, made - needed).mean()),
        "necessary": float(np.minimum(made, needed).sum() / max(needed.sum(), 1)),
    }


def value_regression(train: OutcomeTable, test: OutcomeTable, price: float) -> Any:
    """[N], where to go on: ridge regressions of the value of stopping and of going on, on what the gate reads.

    The value is accuracy less `price` a call still to be made; nothing bounds what is given up in all.
    """
    from sklearn.linear_model import Ridge

    columns: dict[str, Any] = {
        name: np.concatenate([getattr(train, name), getattr(test, name)])
        if isinstance(getattr(train, name), np.ndarray)
        else (*getattr(train, name), *getattr(test, name))
        for name in ("questions", "correct", "cost", "seconds", "observations")
    }
    both = OutcomeTable(
        **columns,
        runs=(*(f"train {run}" for run in train.runs), *(f"test {run}" for run in test.runs)),
        actions=train.actions,
    )
    mine = np.arange(len(train))
    inputs = FeaturesPolicy().prepare(both).inputs(mine, np.arange(len(both)))
    x, fresh = inputs[mine], inputs[len(train) :]
    stop = Ridge(alpha=1.0).fit(x, train.correct[:, 0])
    stops = np.zeros(len(train), dtype=bool)
    for _ in range(3):
        under = followed(train, stops)
        on = Ridge(alpha=1.0).fit(x, under.correct[:, 1] - price * under.cost[:, 1])
        stops = stop.predict(x) >= on.predict(x)
    return stop.predict(fresh) < on.predict(fresh)


def area(correct: Any, cost: Any, top: float) -> float:
    """Under the curve of accuracy against mean calls up to `top`, what lies between two settings being mixed; [S]."""
    order = np.lexsort((correct, cost))
    best = np.maximum.accumulate(correct[order])
    calls = np.linspace(0, top, 201)
    return float(np.interp(calls, cost[order], best).mean())


def at_thresholds(need: Any) -> list[Any]:
    """Where to go on, at thresholds over the whole range of a score."""
    return [need > threshold for threshold in np.unique(np.quantile(need, np.linspace(0, 1, 61)))]


def fixed_rules(points: OutcomeTable) -> dict[str, list[Any]]:
    """Caps on the calls, and the oracle: the cheapest runs that can be won go on to where they are, the others stop."""
    steps, runs = points.steps, np.array(points.runs)
    most = int(steps.max()) + 1
    wins = np.full(len(points), most + 1)  # by how many steps a row's run is won first
    for run in np.unique(runs):
        rows = np.flatnonzero(runs == run)
        right = steps[rows][points.correct[rows, 0] > 0.5]
        end = steps[rows[-1]] + 1 if points.correct[rows[-1], 1] > 0.5 else most + 1
        wins[rows] = right[0] if len(right) else end
    return {
        "caps": [steps < cap for cap in range(most)],
        "oracle": [(steps < wins) & (wins <= within) for within in range(most + 1)],
    }


def areas(rules: Mapping[str, list[Any]], points: OutcomeTable, resamples: int = 300) -> dict[str, Any]:
    """The area of each rule, and by how much the gate's is above it, with intervals over questions.

    Args:
        rules: By name, "gate" among them: for each setting of the rule, where it goes on.
        points: What stopping and going on gave.
        resamples: Of the bootstrap.
    """
    ends = [np.zeros(len(points), dtype=bool), np.ones(len(points), dtype=bool)]
    replays = {name: [replay(points, go_on) for go_on in (*settings, *ends)] for name, settings in rules.items()}
    correct = {name: np.stack([it.correct for it in of]) for name, of in replays.items()}
    cost = {name: np.stack([it.cost for it in of]) for name, of in replays.items()}
    draws = Resamples(replays["gate"][0].homes, resamples, 0)
    top = float(replays["gate"][-1].cost.mean())

    def of(name: str, rows: Any) -> float:
        return area(correct[name][:, rows].mean(axis=1), cost[name][:, rows].mean(axis=1), top)

    def above(name: str, rows: Any) -> float:
        return of("gate", rows) - of(name, rows)

    everything = np.arange(len(replays["gate"][0].cost))
    measured: dict[str, Any] = {}
    for name in rules:
        measured[name] = {"area": of(name, everything)}
        if name != "gate":
            measured[name]["gate_above"] = above(name, everything)
            measured[name]["gate_above_interval"] = interval_of(draws.values(partial(above, name)))
    return measured


def promises(need: Any, points: OutcomeTable, splits: int) -> list[dict[str, Any]]:
    """How often a promise by turn was broken: on the other half, and on all turns, which is what is promised."""
    found = []
    for promise in (Promise(kind="accuracy_loss", limit=0.05), Promise(kind="cost", limit=1.2, highest=6.0)):
        measure: Callable[[Any], Any] = (
            (lambda it: it.full - it.correct) if promise.kind == "accuracy_loss" else (lambda it: it.cost)
        )
        counts, kept = {"half": 0, "all": 0, "refused": 0}, []
        for split in range(splits):
            fold = points.folds(2, split)
            train, test = np.flatnonzero(fold == 0), np.flatnonzero(fold == 1)
            half, other = points.take(train), points.take(test)
            try:
                threshold = choose_threshold(
                    need[train][:, None], half.correct, half.cost, promise, points=half, seed=split
                ).value
            except InputError:
                counts["refused"] += 1
                continue
            done = replay(other, need[test] > threshold)
            counts["half"] += measure(done).mean() > promise.limit
            counts["all"] += measure(replay(points, need > threshold)).mean() > promise.limit
            kept.append(done.cost.mean())
        found.append(
            {
                "promise": f"{promise.kind} at most {promise.limit} a turn", "allowed_share": promise.delta,
                "refused": counts["refused"] / splits, "exceeded_on_other_half": counts["half"] / splits,
                "exceeded_on_all_turns": counts["all"] / splits,
                "calls_where_given": float(np.mean(kept)) if kept else None,
                "calls_as_recorded": float(replay(points, need > -1).cost.mean()),
            }
        )  # fmt: skip
    return found


def run(seed: int, train: int, test: int, splits: int, folder: Path) -> dict[str, Any]:
    started = time.process_time()
    kinds = tuple(CALLS_NEEDED)
    both = questions("train", train + 2 * test, seed=seed, kinds=kinds)
    learnt = record(both[:train], folder / "train", seed)
    further = record(both[train:], folder / "calibration", seed)
    asked = questions("test", test, seed=seed, kinds=kinds)
    fresh = record(asked, folder / "test", seed)
    print(f"seed {seed}: recorded after {time.process_time() - started:.0f} s of CPU", file=sys.stderr)
    write_artefact(train_gate(learnt), folder / "gate", table=learnt, metrics={})
    scores = score_table(PolicyGate(folder / "gate", unfamiliar="gate"), further).probabilities
    promise = Promise(kind="accuracy_loss", limit=0.02)
    threshold = choose_threshold(scores, further.correct, further.cost, promise, points=further)
    set_threshold(folder / "gate", threshold.note())
    gate = PolicyGate(folder / "gate", unfamiliar="gate")
    need = score_table(gate, fresh).need
    figures = {
        "seed": seed,
        "train": {"questions": train, "decision_points": len(learnt)},
        "threshold": threshold.note(),
        "cold start": deployed(ModelGate(), asked),
        "gate": deployed(gate, asked),
        "gate, what is unlike its training left to the model": deployed(PolicyGate(folder / "gate"), asked),
        "replayed": replay(fresh, need > gate.threshold).figures(),
        "curves": areas(
            {
                "gate": at_thresholds(need),
                "value regression": [value_regression(learnt, fresh, price) for price in PRICES],
                **fixed_rules(fresh),
            },
            fresh,
        ),
        "promises": promises(need, fresh, splits) if splits else [],
    }
    print(f"seed {seed}: done after {time.process_time() - started:.0f} s of CPU", file=sys.stderr)
    return figures


def self_report(runs: Sequence[Trajectory], points: OutcomeTable) -> Any:
    """[N], log-odds of a call that the model itself gives at each state, read off the first token of the call there."""
    opening = {run.id: [(call.log_probs or (math.nan,))[0] for call in run.calls] for run in runs}
    log_p = np.minimum([opening[run][step] for run, step in zip(points.runs, points.steps, strict=True)], -1e-9)
    return log_p - np.log(-np.expm1(log_p))


def whole_model(seed: int, steps: int, cold_steps: int, train: int, test: int, folder: Path) -> dict[str, Any]:
    """The tiny transformer: its cold start, gates beside it, and what training the whole model makes of it."""
    from metis_agent.hdpo.advantages import Objective
    from metis_agent.models.local import LocalChatModel
    from metis_agent.rollouts.runner import group_rollouts
    from metis_agent.worlds.almanac.cold_start import SEEKING, train_seeking_cold_start
    from metis_agent.worlds.almanac.experiment import TwoHops

    folder /= f"cold-{cold_steps}"  # all else depends on it
    cold = folder / "cold-start"
    if not (cold / "tokenizer.json").exists():  # saved last
        train_seeking_cold_start(cold, replace(SEEKING, steps=cold_steps), progress=_learnt)
    figures: dict[str, Any] = {"seed": seed, "steps": steps}

    def noted(name: str, counts: str, do: Callable[[], dict[str, Any]]) -> None:
        file = folder / f"{name}-{seed}-{counts}.json"
        if not file.exists():
            file.write_text(json.dumps(do(), default=float))
            print(f"seed {seed}: {name}, {time.process_time():.0f} s of CPU", file=sys.stderr, flush=True)
        figures[name] = json.loads(file.read_text())

    def measured(experiment: TwoHops, policy: Path) -> dict[str, float]:
        chat = LocalChatModel.load(policy, max_new_tokens=experiment.reply)
        asked = experiment.questions("test", test)
        runs = experiment._rollouts(chat, f"measured-{test}").collect(
            group_rollouts(asked, ("free",), name="free", seed=seed)
        )
        rows = [(run.question, run.tool_calls, bool(verify(run.question, run.answer))) for run in runs]
        kinds = {kind: figures_of([row for row in rows if row[0].kind == kind]) for kind in CALLS_NEEDED}
        return {**figures_of(rows), "kinds": kinds}

    def trained(name: str) -> dict[str, Any]:
        objective = Objective(name=name)
        experiment = TwoHops(
            folder=folder / f"{name}-{seed}-{steps}", cold_start=cold, objective=objective, steps=steps, seed=seed
        )
        history = experiment.train(on_step=lambda it: print(_curve(it), file=sys.stderr, flush=True))
        return {**measured(experiment, experiment.policy), "history": [_curve(it) for it in history]}

    def gates() -> dict[str, Any]:
        world = TwoHops(folder=folder, cold_start=cold, seed=seed)
        chat = LocalChatModel.load(cold, max_new_tokens=world.reply)
        both = {"train": world.questions("train", train), "test": world.questions("test", test)}
        tables = {
            name: record(asked, folder / f"{name}-{seed}-{len(asked)}", seed, lambda gate: world.agent(chat, gate))
            for name, asked in both.items()
        }
        gate = folder / f"gate-{seed}-{train}"
        write_artefact(train_gate(tables["train"]), gate, table=tables["train"], metrics={})
        need = score_table(PolicyGate(gate, unfamiliar="gate"), tables["test"]).need
        runs = list(TrajectoryStore(folder / f"test-{seed}-{test}", read_only=True).read())
        points = tables["test"]
        rules = {
            "gate": at_thresholds(need),
            "self-report": at_thresholds(self_report(runs, points)),
            "value regression": [value_regression(tables["train"], points, price) for price in PRICES],
            **fixed_rules(points),
        }
        return {"decision_points": len(points), **areas(rules, points)}

    before = TwoHops(folder=folder / f"cold-{seed}", cold_start=cold, seed=seed)
    noted("cold start", f"{test}", lambda: measured(before, cold))
    for name in ("contrast", "hdpo"):
        noted(name, f"{steps}-{test}", partial(trained, name))
    noted("curves", f"{train}-{test}", gates)
    return figures


def _learnt(step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"cold start: step {step}, loss {loss:.3f}", file=sys.stderr, flush=True)


def _curve(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("accuracy", "calls", "redundant_rate", "necessary_recall", "excluded")
    return {"step": metrics["step"], **{name: metrics.get(f"hdpo/{name}", math.nan) for name in names}}


def many_points(count: int) -> dict[str, float]:
    """Train on so many decision points of made-up runs, written without running them: three a run, of two hops."""
    from metis_agent.gates.reading import observed
    from metis_agent.worlds.almanac.facts import PLACES, linked_entries, place, sister_of

    rng = np.random.default_rng(0)
    texts, names = linked_entries(), [place(index).name for index in range(PLACES)]
    rows = []
    for number in range(-(-count // 3)):
        index = int(rng.integers(PLACES))
        sister = sister_of(index)
        needed, about = (2, "the sister town of ") if rng.random() < 0.5 else (1, "")
        question = f"When was {about}{names[index]} founded, by the account of traveller {number}?"
        brought = [("text_search", texts[names[it]], False) for it in (index, sister, sister_of(sister))]
        rows += [(number, question, observed(brought[:k]), float(k >= needed), 3 - k) for k in range(3)]
    rows = rows[:count]
    table = OutcomeTable(
        questions=tuple(row[1] for row in rows), actions=("direct", "text_search"),
        correct=np.array([[row[3], 1.0] for row in rows]), cost=np.array([[0.0, row[4]] for row in rows]),
        seconds=np.full((count, 2), np.nan), runs=tuple(str(row[0]) for row in rows),
        observations=tuple(row[2] for row in rows),
    )  # fmt: skip
    before = time.process_time(), time.perf_counter()
    train_gate(table)
    return {
        "decision_points": count,
        "cpu_seconds": time.process_time() - before[0],
        "wall_seconds": time.perf_counter() - before[1],
        "peak_memory_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--points", type=int)
    parser.add_argument("--whole-model", action="store_true")
    parser.add_argument("--steps", type=int, default=48, help="of training the whole model")
    parser.add_argument("--cold-steps", type=int, default=2000, help="of the cold start that --whole-model begins with")
    parser.add_argument("--folder", type=Path, default=Path("runs/two-hops"))
    given = parser.parse_args()
    if given.points:
        print(json.dumps(many_points(given.points), indent=2))
        return
    if given.whole_model:
        for seed in given.seeds:
            print(
                json.dumps(whole_model(seed, given.steps, given.cold_steps, given.train, given.test, given.folder)),
                flush=True,
            )
        return
    report = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            report.append(run(seed, given.train, given.test, given.splits, Path(folder)))
        print(json.dumps(report[-1], indent=2), flush=True)


if __name__ == "__main__":
    main()
