"""A gate in front of the almanac's cold start, where the model knows some answers partially: ours, plain HDPO, coupled.

For each seed the shipped cold start is run down every branch of fresh train questions through the graph, with tool
noise; from those records alone each method trains a gate; each gate is then enforced in front of the same cold start on
held-out questions. All three read the same features of a question. Greedy decoding; prints JSON; what was run is kept
in --folder, so a stopped benchmark goes on where it was.

    python benchmarks/partially_known_gate.py [--seeds 0 1 2] [--train 1200] [--test 600]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from recorded_groups import GroupTraining, train_on_groups

from metis_agent.evaluation.agents import evaluate, share_right
from metis_agent.gates.base import Gate
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.reference import ModelGate
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.messages import is_first_step, turn_of
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.rollouts.recorded import outcomes_from_trajectories
from metis_agent.rollouts.runner import Rollout, Rollouts
from metis_agent.types import GateDecision, GateRequest, Question, Trajectory
from metis_agent.worlds.almanac.experiment import COLD_START, Experiment
from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN, questions

TOOLS = ("python", "text_search")
WORLD = (*KINDS, PARTIALLY_KNOWN)
GROUPS = {
    "HDPO as published": GroupTraining(),
    "HDPO, stratified": GroupTraining(groups=StratifiedGroups()),
    "coupled, 0.5": GroupTraining(objective=Objective(name="coupled", alpha=0.5)),
}
"""The baselines, trained on groups re-sampled from the same records."""


class ListedGate(Gate):
    """Decisions worked out beforehand, by question, and enforced as those of a trained gate are."""

    def __init__(self, chosen: Mapping[str, str]) -> None:
        super().__init__(name="listed")
        self._chosen = chosen

    def decide(self, request: GateRequest) -> GateDecision:
        """As `PolicyGate`: one tool in the whole turn, and a call of it at its first step."""
        turn = turn_of(request.messages)
        tool = self._chosen[str(turn[0].text)]
        allowed = tuple(offered.name for offered in request.tools if offered.name == tool)
        return GateDecision(allowed=allowed, required=bool(allowed) and is_first_step(turn), gate=self.name)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """The same."""
        return self.decide(request)


class Trial:
    """One seed: its records, its gates, and what came of them."""

    def __init__(self, folder: Path, seed: int, train: int, test: int) -> None:
        self.seed = seed
        self._folder = folder / f"seed-{seed}"
        self._world = Experiment(folder=self._folder, kinds=WORLD)
        self._chat = LocalChatModel.load(COLD_START, temperature=0.0, max_new_tokens=24)
        self._train = questions("train", train, seed=seed, kinds=WORLD)
        self.test = questions("test", test, seed=seed, kinds=WORLD)

    def run(self) -> dict[str, Any]:
        """Record, train, measure."""
        table = outcomes_from_trajectories(self._recorded("train", self._train, BranchPlan()), tools=TOOLS)
        probes = self._recorded("test", self.test, BranchPlan())
        forced = {name: [run for run in probes if run.metadata["forced"] == name] for name in ("direct", *TOOLS)}
        direct = share_right(forced["direct"])
        by_tool = [share_right(forced[tool]) for tool in TOOLS]
        tool = {question.id: max(shares.get(question.id, 0.0) for shares in by_tool) for question in self.test}
        found = {
            name: self._measured(name, gate, direct, tool) for name, gate in self._gates(table).items()
        }  # fmt: skip
        kinds = {kind: [direct[question.id] for question in self.test if question.kind == kind] for kind in WORLD}
        known = [kind for kind, shares in kinds.items() if np.mean(shares) >= 0.9]
        return {
            "seed": self.seed,
            "train_questions": len(table),
            "test_questions": len(self.test),
            "direct_accuracy": {kind: float(np.mean(shares)) for kind, shares in kinds.items()},
            "known_kinds": known,
            "methods": {name: summary(figures, known) for name, figures in found.items()},
        }

    def _recorded(self, split: str, asked: Sequence[Question], plan: BranchPlan) -> list[Trajectory]:
        with TrajectoryStore(self._folder / f"branches-{split}") as store:
            recorder = BranchRecorder(lambda gate: self._world.agent(self._chat, gate), store, concurrency=256)
            rollouts = branch_rollouts(asked, TOOLS, plan, name=split, seed=self.seed)
            report = recorder.record(rollouts, progress=counting(f"seed {self.seed}, {split}"))
            if report.failed:
                print(f"{report.failed} runs failed: {dict(report.failures)}", file=sys.stderr)
            return list(store.read())

    def _gates(self, table: OutcomeTable) -> dict[str, Gate]:
        """What is compared; the trained ones see the records and nothing else."""
        artefact = self._folder / "gate"
        write_artefact(train_gate(table, policy=FeaturesPolicy()), artefact, table=table, metrics={})
        gates: dict[str, Gate] = {"cold start": ModelGate(), "Metis gate": PolicyGate(artefact)}  # fmt: skip
        asked = OutcomeTable(
            questions=(*table.questions, *(question.text for question in self.test)),
            actions=table.actions,
            **{name: padded(getattr(table, name), len(self.test)) for name in ("correct", "cost", "seconds")},
        )
        prepared = FeaturesPolicy().prepare(asked)
        train, test = np.arange(len(table)), np.arange(len(table), len(asked))
        for name, training in GROUPS.items():
            weights, bias = train_on_groups(
                prepared.inputs(train, train), table, GroupTraining(**{**training.__dict__, "seed": self.seed})
            )
            action = (prepared.inputs(train, test) @ weights + bias).argmax(axis=1)
            gates[name] = ListedGate(
                {question.text: table.actions[a] for question, a in zip(self.test, action, strict=True)}
            )
        return gates

    def _measured(self, name: str, gate: Gate, direct: Mapping[str, float], tool: Mapping[str, float]) -> Any:
        store = TrajectoryStore(self._folder / "measured" / name.replace(" ", "-").replace(",", ""))
        start = self.seed * 100_003
        rollouts = Rollouts(
            lambda branch: self._world.agent(self._chat, gate if branch.branch == "free" else branch), store
        )  # fmt: skip
        # The same noise in front of every gate, so that they differ by their decisions only.
        runs = rollouts.collect(
            [Rollout(id=f"{self.seed}/{q.id}", question=q, seed=start + i) for i, q in enumerate(self.test)]
        )
        return evaluate(runs, direct_right=direct, tool_right=tool, seed=self.seed)


def summary(evaluation: Any, known: Sequence[str]) -> dict[str, Any]:
    overall, kinds = evaluation.overall, evaluation.kinds
    count = sum(kinds[kind].tool_rate.questions for kind in known)
    return {
        "accuracy": overall.accuracy.value,
        "accuracy_interval": [overall.accuracy.low, overall.accuracy.high],
        "tool_rate": overall.tool_rate.value,
        "known_tool_rate": sum(kinds[kind].tool_rate.value * kinds[kind].tool_rate.questions for kind in known) / count,
        "partially_known_accuracy": kinds[PARTIALLY_KNOWN].accuracy.value,
        "partially_known_tool_rate": kinds[PARTIALLY_KNOWN].tool_rate.value,
        "necessary_recall": overall.necessary_recall.value,
        "necessary_questions": overall.necessary_recall.questions,
        "redundant_rate": overall.redundant_rate.value,
        "kinds": {kind: {"accuracy": it.accuracy.value, "tool_rate": it.tool_rate.value} for kind, it in kinds.items()},
    }


def promise(trial: Mapping[str, Any], name: str) -> dict[str, bool]:
    """The four lines that the gate has to hold in every seed."""
    cold, gate = trial["methods"]["cold start"], trial["methods"][name]
    return {
        "known kinds: tool rate at most 0.02": gate["known_tool_rate"] <= 0.02,
        "accuracy at least 0.02 above the cold start": gate["accuracy"] >= cold["accuracy"] + 0.02,
        "partially known accuracy not below the cold start": gate["partially_known_accuracy"]
        >= cold["partially_known_accuracy"],
        "necessary recall at least 0.97": gate["necessary_recall"] >= 0.97,
    }


def padded(values: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    return np.vstack([values, np.zeros((rows, values.shape[1]))])


def counting(what: str) -> Callable[[object], None]:
    started, done = time.perf_counter(), 0

    def count(_: object) -> None:
        nonlocal done
        done += 1
        if done % 1000 == 0:
            print(f"{what}: {done} runs, {time.perf_counter() - started:.0f} s", file=sys.stderr)

    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-partially-known"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=1200, help="train questions, the six kinds in equal shares")
    parser.add_argument("--test", type=int, default=600, help="held-out questions, likewise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = []
    for seed in arguments.seeds:
        started = time.perf_counter()
        trial = Trial(arguments.folder, seed, arguments.train, arguments.test).run()
        trial["holds"] = {name: promise(trial, name) for name in ("Metis gate", *GROUPS)}
        trial["seconds"] = time.perf_counter() - started
        trials.append(trial)
        print(f"seed {seed}: {trial['seconds']:.0f} s, {trial['holds']['Metis gate']}", file=sys.stderr)
    print(json.dumps({"temperature": 0.0, "noise": vars(Experiment(folder=Path()).noise), "trials": trials}, indent=2))


if __name__ == "__main__":
    main()
