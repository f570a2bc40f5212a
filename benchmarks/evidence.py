"""Gates on every table of recorded outcomes, beside peers; promises over splits; how much data is needed.

Five folds, out of fold, several seeds. The headline is the area under accuracy and calls (mean accuracy over all
budgets of calls), with a 95% bootstrap over groups of questions, and the gap to each peer on the same resamples.
Prints a line of JSON for each table as it is done.

    python benchmarks/evidence.py --data DIR [--only gsm8k mint_claude_2] [--seeds 3] [--splits 200]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from metis_agent.errors import InputError
from metis_agent.evaluation.calibration import Promise, choose_threshold
from metis_agent.evaluation.comparison import compare_rankings, feature_baselines, supervised_baselines
from metis_agent.evaluation.gates import Resamples, Scored, area_under_frontier, merge_folds
from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.rollouts.outcomes import OutcomeTable, read_outcomes

SIZES = (100, 200, 400, 800, 1600, 3200)


def tables(folder: Path, part: str) -> dict[str, OutcomeTable]:
    """By name, the smallest first."""

    def read(name: str, tool: str, group_by: str | None = None, branch: str = "") -> OutcomeTable:
        return read_outcomes(folder / f"{name}.{part}.parquet", tools={tool: branch or tool}, group_by=group_by)

    search = read("search_qa", "text_search", branch="search")
    drafted = np.flatnonzero(~np.isnan(search.draft["draft_perplexity"]))
    return {
        "mint_gpt_35": read("mint_gpt_35_turbo_0613", "python"),
        "mint_claude_2": read("mint_claude_2", "python"),
        "mint_llama_3_70b": read("mint_meta_llama_3_70b_instruct", "python"),
        "search_qa_drafted": search.take(drafted),
        "gsm8k": read("routellm_gsm8k", "gpt4"),
        "table_qa": read("table_qa", "python", group_by="table"),
        "search_qa": search,
        "mirage_gpt35": read("mirage_gpt35", "rag"),
        "mirage_gpt4": read("mirage_gpt4", "rag"),
        "mmlu": read("routellm_mmlu", "gpt4"),
    }


def by_likeness(train: OutcomeTable, test: OutcomeTable) -> dict[str, Scored]:
    """Peers that go by how like a question is to recorded ones (TF-IDF of question and context, cosine).

    kNN: mean benefit of the 30 nearest. Router: benefit of all, each weighed by 10^(4 likeness), as RouteLLM's
    similarity-weighted ranking does. Routes: nearer to the centre of the questions that the tool won, or of those that
    the direct answer won, as semantic-router does.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    def texts(table: OutcomeTable) -> list[str]:
        return [f"{question}\n{table.background(row)}" for row, question in enumerate(table.questions)]

    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    x, z = vectoriser.fit_transform(texts(train)), vectoriser.transform(texts(test))
    like = np.asarray((z @ x.T).toarray())
    benefit = train.correct[:, 1] - train.correct[:, 0]
    nearest = np.argpartition(-like, 30, axis=1)[:, :30]
    weight = 10.0 ** (4 * like)
    centres = [np.asarray(like[:, benefit == sign].mean(axis=1)) for sign in (1, -1)]
    found = {
        "kNN": benefit[nearest].mean(axis=1),
        "similarity-weighted router": weight @ benefit / weight.sum(axis=1),
        "semantic routes": np.nan_to_num(centres[0]) - np.nan_to_num(centres[1]),
    }
    return {name: Scored(direct_right=-worth, probabilities=worth[:, None]) for name, worth in found.items()}


def out_of_fold(table: OutcomeTable, seed: int, peers: bool = True) -> dict[str, Scored]:
    policy = FeaturesPolicy()
    prepared = policy.prepare(table)
    fold, parts = table.folds(5, seed), []
    for held_out in range(5):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        gate = train_gate(table, GateTraining(seed=seed), policy=policy, prepared=prepared, rows=train)
        accuracy, worth = gate.score(test)
        found = {"gate": Scored(direct_right=accuracy[:, 0], probabilities=worth)}
        if peers:
            inputs = (prepared.inputs(train, train), prepared.inputs(train, test), table.take(train))
            found |= supervised_baselines(table.take(train), table.take(test)) | feature_baselines(*inputs)
            found |= by_likeness(table.take(train), table.take(test))
        parts.append((test, found))
    return merge_folds(len(table), parts)


def routing(score: Any, direct: Any, tool: Any) -> dict[str, float]:
    """As RouteLLM measures where the tool is a better model (arXiv:2406.18665): of the gap between the two, what is
    recovered on average over all shares of calls (APGR); and the share of calls that recovers half or four fifths.
    """
    order = np.argsort(-score, kind="stable")
    gained = np.append(0.0, np.cumsum((tool - direct)[order])) / max(1e-12, float((tool - direct).sum()))
    return {
        "apgr": float(np.trapezoid(gained) / len(score)),
        **{f"calls_for_{share}": float(np.argmax(gained >= share) / len(score)) for share in (0.5, 0.8)},
    }


def promises(table: OutcomeTable, worth: Any, splits: int, records: int) -> list[dict[str, Any]]:
    """Over splits: how often the long-run mean (of all questions) breaks the promise, and the calls that are kept."""
    loss, found = table.correct[:, 1] - table.correct[:, 0], []
    for limit in (0.01, 0.02, 0.05):
        broken, refused, kept = 0, 0, []
        for split in range(splits):
            homes, place = np.unique(table.homes, return_inverse=True)
            drawn = np.random.default_rng(split).permutation(len(homes))[: round(records * len(homes) / len(table))]
            part = np.flatnonzero(np.isin(place, drawn))
            some = table.take(part)
            promise = Promise(kind="accuracy_loss", limit=limit)
            try:
                value = choose_threshold(
                    worth[part], some.correct, some.cost, promise, groups=some.groups, seed=split
                ).value
            except InputError:
                refused += 1
                kept.append(1.0)
                continue
            called = worth[:, 0] > value
            broken += bool((~called * loss).mean() > limit)
            kept.append(float(called.mean()))
        rates = [float((worth[:, 0] > it).mean()) for it in worth[:, 0] if ((worth[:, 0] <= it) * loss).mean() <= limit]
        found.append(
            {"limit": limit, "records": records, "broken": broken / splits, "refused": refused / splits,
             "calls_kept": float(np.mean(kept)), "fewest_calls_that_keep_it": min(rates, default=1.0)}
        )  # fmt: skip
    return found


def learning_curve(table: OutcomeTable, seeds: int) -> list[dict[str, float]]:
    """Area of a gate that was trained on so many records, on a fifth that it never saw."""
    points = []
    for size in SIZES:
        areas = []
        for seed in range(seeds):
            fold = table.folds(5, seed)
            test, rest = np.flatnonzero(fold == 0), np.flatnonzero(fold != 0)
            if size > len(rest):
                continue
            train = np.random.default_rng(seed).permutation(rest)[:size]
            worth = train_gate(table, GateTraining(seed=seed), rows=train).score(test)[1][:, 0]
            areas.append(area_under_frontier(worth, table.correct[test, 0], table.correct[test, 1]))
        if areas:
            points.append({"records": size, "aucc": float(np.mean(areas)), "seeds": len(areas)})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", default="dev", help="of the files' names")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--curves", action="store_true", help="learning curves as well (slow)")
    arguments = parser.parse_args()
    for name, table in tables(arguments.data, arguments.part).items():
        if arguments.only and name not in arguments.only:
            continue
        runs: dict[str, list[Scored]] = {}
        for seed in range(arguments.seeds):
            for method, one in out_of_fold(table, seed).items():
                runs.setdefault(method, []).append(one)
        methods = compare_rankings(runs, table, Resamples(table.homes, 500, 0), reference="gate")
        direct, tool = table.correct[:, 0], table.correct[:, 1]
        report = {
            "table": name,
            "questions": len(table),
            "never": float(direct.mean()),
            "always": float(tool.mean()),
            "oracle": area_under_frontier(tool - direct, direct, tool),
            "methods": methods,
            "routing": {name: routing(found[0].probabilities[:, 0], direct, tool) for name, found in runs.items()},
            "promises": promises(table, runs["gate"][0].probabilities, arguments.splits, min(1000, len(table) // 2)),
            **({"learning_curve": learning_curve(table, arguments.seeds)} if arguments.curves else {}),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
