"""Is a promised threshold kept on real recorded outcomes? Over random splits into calibration and test.

The gate's probabilities are cross-fitted, so no question's outcome is in its own. For each promise: how often the
promised quantity was exceeded on the test half, and on all questions (what a promise is about is the long-run mean;
a test half scatters around it), how often it was refused, and what the tool rate was. Questions about one table are
split, and counted, as one. With --ahead the promise covers a test half as well. Prints JSON.

    python benchmarks/promise.py --data DIR [--splits 200] [--ahead]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from gates import tables

from metis_agent.errors import InputError
from metis_agent.evaluation.calibration import Promise, choose_threshold
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.rollouts.outcomes import OutcomeTable

PROMISES = (
    *(Promise(kind="accuracy_loss", limit=limit, delta=delta) for limit in (0.01, 0.02, 0.05) for delta in (0.05, 0.2)),
    *(Promise(kind="calls", limit=limit, delta=0.1) for limit in (0.3, 0.5)),
)


def promised(promise: Promise, called: Any, correct: Any) -> float:
    if promise.kind == "calls":
        return float(called.mean())
    return float((~called * (correct[:, 1] - correct[:, 0])).mean())


def keep(table: OutcomeTable, probabilities: Any, promise: Promise, splits: int, ahead: bool) -> dict[str, Any]:
    test_broken = all_broken = refused = 0
    rates = []
    for split in range(splits):
        fold = table.folds(2, split)
        train, test = np.flatnonzero(fold == 0), np.flatnonzero(fold == 1)
        half = table.take(train)
        try:
            found = choose_threshold(
                probabilities[train], half.correct, half.cost, promise, groups=half.groups,
                ahead=len(set(np.array(table.groups or table.keys)[test])) if ahead else None, seed=split,
            )  # fmt: skip
        except InputError:
            # The user is told so, and goes on with always calling, or never.
            refused += 1
            continue
        called = probabilities[:, 0] > found.value
        test_broken += promised(promise, called[test], table.correct[test]) > promise.limit
        all_broken += promised(promise, called, table.correct) > promise.limit
        rates.append(float(called[test].mean()))
    return {
        "promise": f"{promise.kind} at most {promise.limit}",
        "allowed_share": promise.delta,
        "covers_the_test_half": ahead,
        "exceeded_on_test_half": test_broken / splits,
        "exceeded_on_all_questions": all_broken / splits,
        "refused": refused / splits,
        "tool_rate_where_given": float(np.mean(rates)) if rates else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument(
        "--ahead", action="store_true", help="promise it for the test half too, not for the long run alone"
    )
    parser.add_argument("--only", nargs="*", default=["table_qa", "search_qa with a draft", "search_qa"])
    arguments = parser.parse_args()
    report = {}
    for name in arguments.only:
        table = tables(arguments.data)[name]
        probabilities = train_gate(table).probabilities
        print(name, file=sys.stderr)
        report[name] = [keep(table, probabilities, promise, arguments.splits, arguments.ahead) for promise in PROMISES]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
