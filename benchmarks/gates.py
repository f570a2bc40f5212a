"""Gates trained on real recorded outcomes, beside supervised baselines trained on the same folds.

Five folds, out of fold, several seeds: table_qa grouped by table, search_qa by question, and the rows of search_qa
that have a draft. Prints JSON; intervals are 95% bootstraps over groups of questions, of seed 0.

    python benchmarks/gates.py --data DIR [--seeds 3] [--only table_qa]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_baselines import supervised_baselines
from metis_agent.hdpo.gate_evaluation import Scored, evaluate_gate, merge_folds
from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
from metis_agent.hdpo.outcome_files import read_outcomes
from metis_agent.hdpo.outcomes import OutcomeTable
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.hdpo.recorded_groups import GroupTraining, train_on_groups

FIGURES = ("auc", "auc_benefit", "accuracy_at_half")
GROUPS = {
    "HDPO as published": GroupTraining(),
    "HDPO, stratified": GroupTraining(groups=StratifiedGroups()),
}


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
        "search_qa, text alone": OutcomeTable(**{**search.__dict__, "draft": {}}),
    }


def out_of_fold(table: OutcomeTable, seed: int, groups: bool) -> tuple[dict[str, Scored], dict[str, float]]:
    policy = FeaturesPolicy()
    prepared = policy.prepare(table)
    fold = table.folds(5, seed)
    parts, rates = [], {}
    for held_out in range(5):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        gate = train_gate(table, GateTraining(seed=seed), policy=policy, prepared=prepared, rows=train)
        accuracy, probabilities = gate.score(test)
        found = {
            "gate": Scored(direct_right=accuracy[:, 0], probabilities=probabilities),
            **supervised_baselines(table.take(train), table.take(test)),
        }
        for name, training in GROUPS.items() if groups else ():
            weights, bias = train_on_groups(prepared.inputs(train, train), table.take(train), training)
            z = prepared.inputs(train, test) @ weights + bias
            pi = 1 / (1 + np.exp(z[:, :1] - z[:, 1:]))
            found[name] = Scored(direct_right=1 - pi.max(axis=1), probabilities=pi)
        parts.append((test, found))
    scored = merge_folds(len(table), parts)
    for name in ("gate", *(GROUPS if groups else ())):
        rates[name] = float((scored[name].need > 0.5).mean())
    return scored, rates


def measure(table: OutcomeTable, seeds: int, resamples: int, groups: bool) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        scored, _ = out_of_fold(table, seed, groups)
        for name, one in scored.items():
            runs.setdefault(name, []).append(
                evaluate_gate(one, table, 0.5, resamples=resamples if seed == 0 else 2, seed=seed)
            )
    fixed = {name: value["accuracy"] for name, value in runs["gate"][0]["baselines"].items()}
    methods = {}
    for name, figures in runs.items():
        row: dict[str, Any] = {}
        for key in FIGURES:
            row[key] = statistics.mean(run[key] for run in figures)
            row[f"{key}_seeds"] = [run[key] for run in figures]
            row[f"{key}_interval"] = figures[0][f"{key}_interval"]
        if not name.startswith("TF-IDF"):
            at = [run["at_threshold"] for run in figures]
            row["at_threshold"] = {
                key: statistics.mean(one[key] for one in at)
                for key in ("accuracy", "tool_rate", "redundant", "harmful", "necessary", "missed")
            }
        if name == "gate":
            row["ece"] = statistics.mean(run["ece"] for run in figures)
            row["brier"] = statistics.mean(run["brier"] for run in figures)
            row["frontier"] = figures[0]["frontier"]
        methods[name] = row
    return {"questions": len(table), **fixed, "methods": methods}


def latency(table: OutcomeTable, folder: Path) -> dict[str, float]:
    """Milliseconds a decision, of the deployed gate on one core."""
    gate_folder = folder / "latency-gate"
    write_artefact(train_gate(table), gate_folder, table=table, metrics={})
    gate = PolicyGate(gate_folder)
    contexts = table.contexts or ("",) * len(table)
    times = []
    for row, (question, context) in enumerate(zip(table.questions, contexts, strict=True)):
        draft = {name: float(column[row]) for name, column in table.draft.items()}
        started = time.perf_counter()
        gate.score(question, context, draft)
        times.append(1000 * (time.perf_counter() - started))
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def scale(table: OutcomeTable, rows: int) -> dict[str, float]:
    """Seconds to train on many rows, made from the table's by varying their words."""
    import resource

    rng = np.random.default_rng(0)
    index = rng.integers(0, len(table), rows)
    big = table.take(index)
    words = [f"{question} {rng.integers(1_000_000)}" for question in big.questions]
    big = OutcomeTable(**{**big.__dict__, "questions": tuple(words), "groups": ()})
    started = time.perf_counter()
    train_gate(big)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rows": rows, "seconds": time.perf_counter() - started, "peak_memory_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--no-groups", action="store_true", help="leave out HDPO on re-sampled groups (slow)")
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
            report[name] = measure(table, arguments.seeds, arguments.resamples, not arguments.no_groups)
            # What is done so far, should the run be stopped.
            arguments.scratch.mkdir(parents=True, exist_ok=True)
            (arguments.scratch / "partial.json").write_text(json.dumps(report, indent=2))
    if arguments.only is None:
        report["latency"] = {
            name: latency(sets[name], arguments.scratch) for name in ("table_qa", "search_qa with a draft")
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
