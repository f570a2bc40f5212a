"""HDPO beside its baselines in the almanac: the same cold start, the same budget, several seeds.

Two worlds: the ordinary one, and one with partially known questions added (hearsay about places, which the cold start
gets right in its head about a third of the time). Each run is kept, so a stopped benchmark goes on where it was, and
`--done` shows what there is without running anything.

    python benchmarks/hdpo.py --folder runs/bench-hdpo                                  # each at the usual rate, 1.6e-3
    python benchmarks/hdpo.py --methods all --rate 8e-4 1.6e-3 3.2e-3                   # the search for it: many hours
    python benchmarks/hdpo.py --methods all --done --markdown --pictures docs/pictures  # table and learning curves
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLDS = ("ordinary", "partially-known")
METRICS = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")
COLD_START = "cold start"
DEFAULT = ("contrast", "HDPO, stratified", "coupled, alpha 0.5", "GDPO, w 0.15", "GRPO", "OTC-GRPO", "EAPO")
"""What `make bench-hdpo` compares; `--methods all` adds further weights and what HDPO lacks."""
USUAL = 1.6e-3
"""The learning rate where none is given."""


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


@dataclass(frozen=True)
class Job:
    """One training run and its measurement."""

    world: str
    method: str
    seed: int
    steps: int
    questions: int
    rate: float
    noise: bool
    root: str

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.method.lower())
        trained = "" if self.method == COLD_START else f"-{self.steps}-{self.rate:g}"
        quiet = "" if self.noise else "-quiet"
        return Path(self.root) / f"{self.world}-{slug}-{self.seed}{trained}-{self.questions}{quiet}"

    @property
    def name(self) -> str:
        """The method, at its rate."""
        return self.method if self.method == COLD_START else f"{self.method}, at {self.rate:g}"

    def result(self) -> dict[str, Any] | None:
        """What came out, if it is finished."""
        done = self.folder / "result.json"
        found: dict[str, Any] | None = json.loads(done.read_text()) if done.exists() else None
        return found


def run(job: Job) -> Job:
    """In a process of its own thread; a finished run stays as it is."""
    if job.result() is None:
        from metis_agent.worlds.almanac.agent import Noise
        from metis_agent.worlds.almanac.experiment import COLD_START as WEIGHTS
        from metis_agent.worlds.almanac.experiment import Experiment
        from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN

        settings: dict[str, Any] = {}
        if job.method != COLD_START:
            settings["objective"], settings["groups"] = methods()[job.method]
        # Sampled at temperature 1, as the policy is trained: greedy decoding hides how sure it is.
        experiment = Experiment(
            folder=job.folder,
            steps=job.steps,
            learning_rate=job.rate,
            noise=Noise() if job.noise else Noise(wrong=0.0, error=0.0),
            test_questions=job.questions,
            seed=job.seed,
            kinds=KINDS if job.world == "ordinary" else (*KINDS, PARTIALLY_KNOWN),
            temperature=1.0,
            **settings,
        )
        history = [] if job.method == COLD_START else experiment.train()
        policy = WEIGHTS if job.method == COLD_START else experiment.policy
        result = {**experiment.measure(policy, "measured").to_dict(), "history": history}
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "result.json").write_text(json.dumps(result, default=float))
    return job


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


Results = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""World -> method at its rate -> seed -> result."""


def markdown(found: Results, seeds: int) -> str:
    """One row a world and method, one number a seed, a dash where a run is not finished."""
    columns = {
        "accuracy": lambda it: it["accuracy"],
        "redundant": lambda it: it["redundant_rate"],
        "necessary": lambda it: it["necessary_recall"],
        "partially known: tool rate": lambda it: it["kinds"].get("hearsay", {}).get("tool_rate"),
        "partially known: accuracy": lambda it: it["kinds"].get("hearsay", {}).get("accuracy"),
    }
    picks = columns.values()
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for world, by_method in found.items():
        for method, by_seed in by_method.items():
            values = [
                [_short(pick(by_seed[seed])) if seed in by_seed else "–" for seed in range(seeds)] for pick in picks
            ]
            cells = [" ".join(each) if "".join(each).strip("–") else "" for each in values]
            lines.append(f"| {world}: {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1.00"


def draw(found: Results, path: Path, smooth: int = 5) -> None:
    """Redundant, necessary and accuracy by step: the mean of the seeds, over `smooth` steps, and their range."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("agg")
    mpl.rcParams |= {"svg.hashsalt": "metis", "svg.fonttype": "none", "font.size": 9}
    from matplotlib.figure import Figure

    panels = {"redundant_rate": "redundant", "necessary_recall": "necessary", "accuracy": "accuracy"}
    figure = Figure(figsize=(10, 2.9 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), len(panels), squeeze=False, sharex=True)
    names = [name for by_method in found.values() for name in by_method if name != COLD_START]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(names))}
    lines: dict[str, Any] = {}
    for axes, (world, by_method) in zip(rows, found.items(), strict=True):
        for panel, (key, title) in zip(axes, panels.items(), strict=True):
            for name, colour in colours.items():
                runs = [it["history"] for it in by_method.get(name, {}).values()]
                if not runs:
                    continue
                # A step without such a question says nothing.
                values = np.array([[np.nan if e[f"hdpo/{key}"] is None else e[f"hdpo/{key}"] for e in r] for r in runs])
                windows = [values[:, max(0, end - smooth) : end] for end in range(1, values.shape[1] + 1)]
                smoothed = np.array([np.nanmean(window, axis=1) for window in windows])
                steps = np.arange(1, len(smoothed) + 1)
                lines[name] = panel.plot(steps, smoothed.mean(1), color=colour, linewidth=1.4)[0]
                panel.fill_between(steps, smoothed.min(1), smoothed.max(1), color=colour, alpha=0.15, linewidth=0)
            panel.set_title(f"{world}: {title}", fontsize=9)
            panel.set_ylim(*{"redundant_rate": (-0.02, 1.02), "necessary_recall": (0.6, 1.01)}.get(key, (0.78, 1.005)))
            panel.spines[["top", "right"]].set_visible(False)
    seeds = {name: " and ".join(str(len(by_method.get(name, ()))) for by_method in found.values()) for name in lines}
    labels = [f"{name} (seeds: {count})" for name, count in seeds.items()]
    figure.legend(lines.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "learning-curves.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions (default %(default)s)")
    parser.add_argument("--rate", type=float, nargs="+", help="learning rates (default: 1.6e-3)")
    parser.add_argument("--quiet", action="store_true", help="tools that never fail")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="runs/bench-hdpo")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these, by the beginnings of their names, or all"
    )
    parser.add_argument("--done", action="store_true", help="run nothing: only what is finished")
    parser.add_argument("--markdown", action="store_true", help="print a table in place of JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw learning-curves.svg there")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = tuple([""] if chosen.methods == ["all"] else chosen.methods or DEFAULT)
    names = [name for name in methods() if name.startswith(wanted)]
    if unknown := [it for it in wanted if not any(name.startswith(it) for name in names)]:
        parser.error(f"no method begins with {unknown!r}; there are: {'; '.join(methods())}")
    jobs = [
        Job(world, method, seed, chosen.steps, chosen.questions, rate, not chosen.quiet, chosen.folder)
        for seed in range(chosen.seeds)
        for world in chosen.worlds
        for method in [COLD_START, *names]
        for rate in (USUAL,) * (method == COLD_START) or chosen.rate or (USUAL,)
    ]
    if chosen.done:
        jobs = [job for job in jobs if job.result() is not None]
    else:
        # A fresh process for each run: nothing of one is left to the next.
        with multiprocessing.get_context("spawn").Pool(chosen.processes, maxtasksperchild=1) as pool:
            for count, job in enumerate(pool.imap_unordered(run, jobs), start=1):
                print(f"{count}/{len(jobs)} {job.world}: {job.name}, seed {job.seed}", file=sys.stderr, flush=True)
    found: Results = {world: {} for world in chosen.worlds}
    for job in jobs:
        found[job.world].setdefault(job.name, {})[job.seed] = job.result() or {}
    if chosen.pictures:
        draw(found, chosen.pictures)
    if chosen.markdown:
        print(markdown(found, chosen.seeds))
        return
    settings = {
        "seeds": chosen.seeds,
        "steps": chosen.steps,
        "questions": chosen.questions,
        "tools_fail": not chosen.quiet,
        "temperature": 1.0,
    }
    table = {
        world: {name: summary(list(by_seed.values())) for name, by_seed in by_method.items()}
        for world, by_method in found.items()
    }
    print(json.dumps({"settings": settings, "worlds": table}, indent=2))


if __name__ == "__main__":
    main()
