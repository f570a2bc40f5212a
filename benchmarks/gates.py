"""Gates trained on real recorded outcomes, beside baselines trained on the same folds.

Five folds, out of fold, several seeds: table_qa grouped by table, search_qa by question, and the rows of search_qa
that have a draft. Prints JSON. A figure is the mean over seeds; its interval a 95% bootstrap over groups of questions,
and `<figure>_below_reference` by how much the gate is above a baseline on the same resamples.

    python benchmarks/gates.py --data DIR [--seeds 3] [--only table_qa] [--group-seeds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from recorded_groups import GroupTraining, train_on_groups

from metis_agent.evaluation.comparison import compare_rankings, feature_baselines, supervised_baselines
from metis_agent.evaluation.gates import Resamples, Scored, evaluate_gate, merge_folds
from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo.advantages import Objective, branch_weight
from metis_agent.hdpo.exploration import BranchCounts, StratifiedGroups
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import TrainedGate, train_gate
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable, read_outcomes

GROUPS = {
    "HDPO as published": GroupTraining(),
    "coupled reward": GroupTraining(objective=Objective(name="coupled")),
    "HDPO, stratified": GroupTraining(groups=StratifiedGroups()),
    "HDPO, stratified, branch weight": GroupTraining(groups=StratifiedGroups()),
}
EVIDENCE = 16
"""Rollouts of each branch that a pooled estimate counts for in the branch weight: as many as a group holds."""


def tables(folder: Path) -> dict[str, OutcomeTable]:
    table_qa = read_outcomes(folder / "table_qa.dev.parquet", tools={"python": "python"}, group_by="table")
    search = read_outcomes(folder / "search_qa.dev.parquet", tools={"text_search": "search"})
    drafted = np.flatnonzero(~np.isnan(search.draft["draft_perplexity"]))
    no_agreement = search.take(drafted)
    return {
        "table_qa": table_qa,
        "search_qa with a draft": search.take(drafted),
        "search_qa with a draft, agreement not read": OutcomeTable(
            **{
                **no_agreement.__dict__,
                "draft": {
                    name: column
                    for name, column in no_agreement.draft.items()
                    if name not in ("draft_agreement", "draft_containment")
                },
            }
        ),
        "search_qa": search,
        "search_qa, text alone": OutcomeTable(**{**search.__dict__, "draft": {}, "drafts": ()}),
    }


def with_a_draft_first(table: OutcomeTable) -> OutcomeTable:
    return table.take(np.argsort(np.isnan(table.draft["draft_perplexity"]), kind="stable"))


def out_of_fold(table: OutcomeTable, seed: int, groups: bool, whole: OutcomeTable | None) -> dict[str, Scored]:
    """Each method's scores; `whole` is the table and behind it questions without a draft, to learn about the tools."""
    policy = FeaturesPolicy()
    prepared = policy.prepare(table)
    read = None if whole is None else policy.prepare(whole)
    fold = table.folds(5, seed)
    parts = []
    for held_out in range(5):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        plain = train_gate(table, GateTraining(seed=seed), policy=policy, prepared=prepared, rows=train)
        x, z = prepared.inputs(train, train), prepared.inputs(train, test)
        found = {
            "gate": scored(plain, test),
            **supervised_baselines(table.take(train), table.take(test)),
            **feature_baselines(x, z, table.take(train)),
        }
        if whole is not None:
            rows = np.append(train, np.arange(len(table), len(whole)))
            gate = train_gate(whole, GateTraining(seed=seed, drafted=True), policy=policy, prepared=read, rows=rows)
            found["gate, --drafted"] = scored(gate, test)
        for name in GROUPS if groups else ():
            found[name] = group_trained(name, x, z, table.take(train), plain, seed)
        parts.append((test, found))
    return merge_folds(len(table), parts)


def scored(gate: TrainedGate, rows: Any) -> Scored:
    accuracy, probabilities = gate.score(rows)
    return Scored(direct_right=accuracy[:, 0], probabilities=probabilities)


def group_trained(name: str, x: Any, z: Any, train: OutcomeTable, gate: TrainedGate, seed: int) -> Scored:
    training = replace(GROUPS[name], seed=seed)
    weight = None
    if name.endswith("branch weight"):
        n = np.full(len(train), float(EVIDENCE))
        direct, tool = gate.accuracy[:, 0] * n, gate.accuracy[:, 1:].max(axis=1) * n
        weight = branch_weight(BranchCounts(direct_right=direct, direct_n=n, tool_right=tool, tool_n=n)).numpy()
    weights, bias = train_on_groups(x, train, training, efficiency=weight)
    logits = z @ weights + bias
    pi = 1 / (1 + np.exp(logits[:, :1] - logits[:, 1:]))
    return Scored(direct_right=1 - pi.max(axis=1), probabilities=pi)


def measure(
    table: OutcomeTable, seeds: int, resamples: int, group_seeds: int, whole: OutcomeTable | None
) -> dict[str, Any]:
    runs: dict[str, list[Scored]] = {}
    for seed in range(seeds):
        for name, one in out_of_fold(table, seed, seed < group_seeds, whole).items():
            runs.setdefault(name, []).append(one)
        print(f"  seed {seed}", file=sys.stderr)
    methods = compare_rankings(runs, table, Resamples(table.groups or table.keys, resamples, 0), reference="gate")
    for name in ("gate", *GROUPS):
        at = [evaluate_gate(one, table, 0.5, resamples=2) for one in runs.get(name, [])]
        if at:
            methods[name]["at_threshold"] = {
                key: statistics.mean(one["at_threshold"][key] for one in at)
                for key in ("accuracy", "tool_rate", "redundant", "harmful", "necessary", "missed")
            }
        if name == "gate":
            fixed = {key: value["accuracy"] for key, value in at[0]["baselines"].items()}
            methods[name] |= {key: statistics.mean(one[key] for one in at) for key in ("ece", "brier")}
            methods[name]["frontier"] = at[0]["frontier"]
    return {"questions": len(table), **fixed, "methods": methods}


def latency(table: OutcomeTable, folder: Path) -> dict[str, float]:
    """Milliseconds a decision, of the deployed gate on one core; processor time is what an idle machine takes."""
    gate_folder = folder / "latency-gate"
    write_artefact(train_gate(table), gate_folder, table=table, metrics={})
    gate = PolicyGate(gate_folder)
    contexts = table.contexts or ("",) * len(table)
    times, spent = [], []
    for row, (question, context) in enumerate(zip(table.questions, contexts, strict=True)):
        draft = {name: float(column[row]) for name, column in table.draft.items()}
        started, busy = time.perf_counter(), time.thread_time()
        gate.score(question, context, draft)
        times.append(1000 * (time.perf_counter() - started))
        spent.append(1000 * (time.thread_time() - busy))
    found: dict[str, float] = {}
    for suffix, values in (("", times), ("_of_processor_time", spent)):
        found |= {f"p{p}_ms{suffix}": float(np.percentile(values, p)) for p in (50, 99)}
    return found


def scale(table: OutcomeTable, rows: int) -> dict[str, float]:
    """Seconds to train on many rows, made from the table's by varying their words."""
    import resource

    rng = np.random.default_rng(0)
    index = rng.integers(0, len(table), rows)
    big = table.take(index)
    words = [f"{question} {rng.integers(1_000_000)}" for question in big.questions]
    big = OutcomeTable(**{**big.__dict__, "questions": tuple(words), "groups": ()})
    started, busy = time.perf_counter(), time.process_time()
    train_gate(big)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "rows": rows,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - busy,
        "peak_memory_gib": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--group-seeds", type=int, default=3, help="seeds of HDPO on re-sampled groups (slow)")
    parser.add_argument("--scale", type=int, default=0, help="also time training on this many rows")
    parser.add_argument("--scratch", type=Path, default=Path("runs/bench-gates"))
    arguments = parser.parse_args()
    sets = tables(arguments.data)
    report: dict[str, Any] = {}
    if arguments.scale:
        report["scale"] = scale(sets["search_qa, text alone"], arguments.scale)
    for name, table in sets.items():
        if arguments.only in (None, name):
            print(name, file=sys.stderr)
            whole = with_a_draft_first(sets["search_qa"]) if name == "search_qa with a draft" else None
            report[name] = measure(table, arguments.seeds, arguments.resamples, arguments.group_seeds, whole)
            # What is done so far, should the run be stopped.
            arguments.scratch.mkdir(parents=True, exist_ok=True)
            (arguments.scratch / "partial.json").write_text(json.dumps(report, indent=2))
    if arguments.only in (None, "latency"):
        report["latency"] = {
            name: latency(sets[name], arguments.scratch) for name in ("table_qa", "search_qa with a draft")
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
