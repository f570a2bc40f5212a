"""The gallery with several seeds: HDPO beside rewarding accuracy alone, a font that no training picture had, a control.

Each seed draws its own training and held-out pictures. The control goes on training the cold start, eyes included, to
read tiny text without a crop: if that could be learnt, the tool would not be needed. Prints JSON; each run is kept, so
a stopped benchmark goes on where it was.

    python benchmarks/vision.py --seeds 3 --folder runs/bench-vision
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

METHODS = {"cold start": "hdpo", "HDPO": "hdpo", "contrast": "contrast", "GRPO": "grpo"}
"""Name -> objective; the cold start is not trained."""


def measured(method: str, seed: int, root: Path, questions: int) -> dict[str, Any]:
    """A policy's figures on held-out pictures, greedy, in the fonts of training and in the one held out."""
    from metis_agent.hdpo.advantages import Objective
    from metis_agent.worlds.gallery.experiment import Experiment
    from metis_agent.worlds.gallery.pictures import HELD_OUT_FONT

    folder = root / f"{method.lower().replace(' ', '-')}-{seed}"
    done = folder / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    objective = Objective(name=METHODS[method])
    experiment = Experiment(folder=folder, seed=seed, test_questions=questions, objective=objective)
    unseen = Experiment(
        folder=folder / "held-out-font", seed=seed, test_questions=questions, fonts=(HELD_OUT_FONT,),
        cold_start=experiment.cold_start,
    )  # fmt: skip
    try:
        history = [] if method == "cold start" else experiment.train()
        policy = experiment.cold_start if method == "cold start" else experiment.policy
        found = experiment.measure(policy, "measured").to_dict()
        found["held_out_font"] = unseen.measure(policy, "measured").to_dict()
        found["history"] = history
    finally:
        experiment.close()
        unseen.close()
    done.write_text(json.dumps(found, default=float))
    return found


def control(steps: int) -> dict[str, float]:
    """Share of tiny texts, in pictures never seen, that are read without a crop after so many steps of learning it."""
    import torch

    from metis_agent.worlds.gallery.experiment import gallery_model
    from metis_agent.worlds.gallery.pictures import CONTENTS
    from metis_agent.worlds.gallery.questions import drawn_from
    from metis_agent.worlds.gallery.rows import IGNORE, Rows

    chat = gallery_model()
    model: Any = chat.model
    assert chat.processor is not None
    rows = Rows(chat.processor, random.Random(0), pool=200, fresh=20, direct_large=0.0, direct_tiny=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model.train()
    for _ in range(steps):
        (batch,) = rows.batches([(("read", content, "tiny"), 12) for content in CONTENTS])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    dice = random.Random(1)
    found: dict[str, float] = {}
    for content in CONTENTS:
        batch = rows.batch([rows.row("read", rows.see(drawn_from("test", content, "tiny", dice))) for _ in range(200)])
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            said = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.argmax(-1)
        found[content] = float(((said[:, :-1] == labels) | (labels == IGNORE)).all(1).float().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=210, help="held-out pictures (default %(default)s)")
    parser.add_argument("--control-steps", type=int, default=500)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-vision"))
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    table: dict[str, list[Any]] = {}
    for seed in range(chosen.seeds):
        for method in chosen.methods:
            table.setdefault(method, []).append(measured(method, seed, chosen.folder, chosen.questions))
            print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
    tiny = control(chosen.control_steps) if chosen.control_steps else {}
    print(json.dumps({"tiny_without_a_crop_after_training_on_it": tiny, "methods": table}, default=float))


if __name__ == "__main__":
    main()
