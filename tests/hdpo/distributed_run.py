"""What `accelerate launch` runs in each process: two updates of the tiny policy for each objective."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def run(folder: Path, objective: str, processes: int) -> dict[str, Any]:
    """The losses and what became of the weights."""
    from tests.hdpo.policy_world import STRATIFIED, arguments, cold_start, rewriting_tokenizer, rollouts_of, trainer_of

    model, tokenizer = cold_start(), rewriting_tokenizer()
    args = arguments(
        folder / "out", STRATIFIED, objective=objective, learning_rate=0.02, max_steps=2,
        # Four groups a step, whatever the number of processes.
        per_device_train_batch_size=16 // processes, ddp_find_unused_parameters=False,
    )  # fmt: skip
    rollouts = rollouts_of(model, folder, tokenizer)
    trainer = trainer_of(folder, args, model=model, tokenizer=tokenizer, rollouts=rollouts)
    trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "history": [entry for entry in trainer.state.log_history if "hdpo/rho" in entry],
        "weights": [float(parameter.detach().double().norm()) for parameter in model.parameters()],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = {objective: run(folder / objective, objective, processes) for objective in ("hdpo", "gdpo")}
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
