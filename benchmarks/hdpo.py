"""HDPO beside its baselines in the almanac: the same cold start, the same budget, several seeds.

Two worlds: the ordinary one, and one with partially known questions added (hearsay about places, which the cold start
gets right in its head about a third of the time). Prints JSON; each run is kept, so a stopped
benchmark goes on where it was.

    python benchmarks/hdpo.py --seeds 3 --folder runs/bench-hdpo
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

WORLDS = ("ordinary", "partially-known")
METRICS = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")


def methods() -> dict[str, Any]:
    """Name -> (objective, groups). All but the published form explore by the same stratified groups."""
    import peers  # noqa: F401 - makes "otc" and "eapo" known

    from metis_agent.hdpo.advantages import Objective
    from metis_agent.hdpo.exploration import StratifiedGroups

    free, stratified = StratifiedGroups(direct=0, tool=0), StratifiedGroups()
    return {
        "contrast": (Objective(name="contrast"), stratified),
        "HDPO, stratified": (Objective(), stratified),
        "coupled, alpha 0.1": (Objective(name="coupled", alpha=0.1), stratified),
        "coupled, alpha 0.5": (Objective(name="coupled", alpha=0.5), stratified),
        "coupled, alpha 1": (Objective(name="coupled", alpha=1.0), stratified),
        "GDPO, w 0.15": (Objective(name="gdpo"), stratified),
        "GRPO": (Objective(name="grpo"), stratified),
        "OTC-GRPO": (Objective(name="otc"), stratified),
        "EAPO": (Objective(name="eapo"), stratified),
        "HDPO as published (no forced rollouts)": (Objective(), free),
        "branch-weighted HDPO, stratified": (Objective(branch_weight=True), stratified),
    }


def run(job: tuple[str, str, int, int, int, float, bool, str]) -> tuple[str, str, int, dict[str, Any]]:
    """One training run and its measurement, in a process of its own thread."""
    world, method, seed, steps, questions, rate, noise, root = job
    slug = "".join(letter if letter.isalnum() else "-" for letter in method.lower())
    trained = "" if method == "cold start" else f"-{steps}-{rate:g}"
    folder = Path(root) / f"{world}-{slug}-{seed}{trained}-{questions}{'' if noise else '-quiet'}"
    done = folder / "result.json"
    if not done.exists():
        from metis_agent.worlds.almanac.agent import Noise
        from metis_agent.worlds.almanac.experiment import COLD_START, Experiment
        from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN

        kinds = KINDS if world == "ordinary" else (*KINDS, PARTIALLY_KNOWN)
        settings: dict[str, Any] = {}
        if method != "cold start":
            settings["objective"], settings["groups"] = methods()[method]
        # Sampled at temperature 1, as the policy is trained: greedy decoding hides how sure it is.
        experiment = Experiment(
            folder=folder,
            steps=steps,
            learning_rate=rate,
            noise=Noise() if noise else Noise(wrong=0.0, error=0.0),
            test_questions=questions,
            seed=seed,
            kinds=kinds,
            temperature=1.0,
            **settings,
        )
        history = [] if method == "cold start" else experiment.train()
        policy = COLD_START if method == "cold start" else experiment.policy
        result = {**experiment.measure(policy, "measured").to_dict(), "history": history}
        folder.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(result, default=float))
    return world, method, seed, json.loads(done.read_text())


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds with every seed beside it, overall and by kind of question."""

    def over_seeds(pick: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in METRICS:
            values = [pick(result)[name] for result in results]
            known = [value for value in values if value is not None]
            found[name] = {"mean": statistics.fmean(known) if known else None, "seeds": values}
        return found

    kinds = {kind: over_seeds(lambda result, kind=kind: result["kinds"][kind]) for kind in results[0]["kinds"]}
    return {**over_seeds(lambda result: result), "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--questions", type=int, default=300, help="held-out questions (default %(default)s)")
    parser.add_argument("--rate", type=float, default=8e-4, help="learning rate (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="tools that never fail")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="runs/bench-hdpo")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, by the beginnings of their names")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = tuple(chosen.methods or [""])
    names = ["cold start", *(name for name in methods() if name.startswith(wanted))]
    if unknown := [it for it in wanted if not any(name.startswith(it) for name in names)]:
        parser.error(f"no method begins with {unknown!r}; there are: {', '.join(methods())}")
    jobs = [
        (world, method, seed, chosen.steps, chosen.questions, chosen.rate, not chosen.quiet, chosen.folder)
        for seed in range(chosen.seeds)
        for world in chosen.worlds
        for method in names
    ]
    collected: dict[str, dict[str, list[dict[str, Any]]]] = {world: {} for world in chosen.worlds}
    context = multiprocessing.get_context("spawn")
    # A fresh process for each run: nothing of one is left to the next.
    with context.Pool(chosen.processes, maxtasksperchild=1) as pool:
        for count, (world, method, seed, result) in enumerate(pool.imap_unordered(run, jobs), start=1):
            collected[world].setdefault(method, []).append(result)
            print(f"{count}/{len(jobs)} {world}: {method}, seed {seed}", file=sys.stderr, flush=True)
    table = {world: {method: summary(by_method[method]) for method in names} for world, by_method in collected.items()}
    settings = {
        "seeds": chosen.seeds,
        "steps": chosen.steps,
        "questions": chosen.questions,
        "learning_rate": chosen.rate,
        "tools_fail": not chosen.quiet,
        "temperature": 1.0,
    }
    print(json.dumps({"settings": settings, "worlds": table}, indent=2))


if __name__ == "__main__":
    main()
