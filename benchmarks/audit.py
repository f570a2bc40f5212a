"""Is the audit's share of redundant calls within its own interval of the truth? On the almanac; prints JSON.

The world's agent answers questions, traced by the real LangSmith client at loopback; its traces are imported and
audited, by the agent's own model. What is true is measured apart: each question is forced direct so many times. Samples
are audited again and again: with exact verdicts, with a judge that errs one time in ten, and with that judge corrected
by a check of some turns by hand. Of intervals at 95% about that share should hold the truth; of the judge's own, which
is biased, far fewer.

    python -m benchmarks.audit [--questions 600] [--times 16] [--audits 40]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from metis_agent.audit.agreement import Verdicts
from metis_agent.evaluation.agents import Estimate
from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN, questions
from tests.audit.almanac import ErringJudge, World, audited, checked_by_hand, world


def held(world: World, audits: int, sample: int, checks: int) -> dict[str, Any]:
    """How often each kind of interval held the truth, its width and its error, over so many samples."""
    found: dict[str, list[tuple[Estimate, float]]] = {"exact": [], "erring judge": [], "corrected": []}
    for seed in range(audits):
        exact = audited(world, Verdicts(), sample=sample, seed=seed)
        truth = world.truth(exact)
        judge = ErringJudge()
        judge.lots = seed
        corrected = audited(world, judge, checks=checked_by_hand(exact, checks), sample=sample, seed=seed).figures
        found["exact"].append((exact.figures.redundant, truth))
        found["erring judge"].append((corrected.judged, truth))
        found["corrected"].append((corrected.redundant, truth))
    return {
        name: {
            "held": sum(it.low <= truth <= it.high for it, truth in pairs),
            "of": len(pairs),
            "mean": sum(it.value for it, _ in pairs) / len(pairs),
            "truth": sum(truth for _, truth in pairs) / len(pairs),
            "width": sum(it.high - it.low for it, _ in pairs) / len(pairs),
        }
        for name, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--times", type=int, default=16, help="how often each question is forced direct")
    parser.add_argument("--audits", type=int, default=40)
    parser.add_argument("--sample", type=int, default=150, help="turns of an audit")
    parser.add_argument("--checks", type=int, default=60, help="turns that are checked by hand")
    options = parser.parse_args()
    began = time.perf_counter()
    asked = questions("test", options.questions, seed=3, kinds=(*KINDS, PARTIALLY_KNOWN))
    with tempfile.TemporaryDirectory() as folder:
        made = world(asked, options.times, Path(folder))
    seconds = time.perf_counter() - began
    figures = held(made, options.audits, options.sample, options.checks)
    print(json.dumps({"runs": len(made.runs), "seconds_to_make": seconds, **figures}, indent=1))


if __name__ == "__main__":
    main()
