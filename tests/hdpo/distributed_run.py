"""What `accelerate launch` runs in each process: two updates of the tiny policy for each objective."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def shard_on_the_cpu() -> None:
    """Let accelerate take this machine's cores for the GPUs that it wants for FSDP; torch itself shards on either."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


def run(folder: Path, objective: str, processes: int, *, sharded: bool) -> dict[str, Any]:
    """The losses and what became of the weights."""
    from tests.hdpo.policy_world import STRATIFIED, arguments, cold_start, rewriting_tokenizer, rollouts_of, trainer_of

    model, tokenizer = cold_start(), rewriting_tokenizer()
    args = arguments(
        folder / "out", STRATIFIED, objective=objective, learning_rate=0.02, max_steps=2,
        # Four groups a step, whatever the number of processes.
        per_device_train_batch_size=16 // processes, ddp_find_unused_parameters=False,
        use_cpu=not sharded,
    )  # fmt: skip
    sampler = cold_start() if sharded else None
    rollouts = rollouts_of(sampler or model, folder, tokenizer)
    trainer = trainer_of(folder, args, model=model, tokenizer=tokenizer, rollouts=rollouts, sampler=sampler)
    trainer.train()
    whole = [full(parameter) for parameter in model.parameters()]
    return {
        "processes": trainer.accelerator.num_processes,
        "history": [entry for entry in trainer.state.log_history if "hdpo/rho" in entry],
        "weights": [float(weight.double().norm()) for weight in whole],
        "sharded": any(isinstance(parameter, DTensor) for parameter in model.parameters()),
    }


def full(parameter: Any) -> Any:
    """A weight, gathered where it is spread."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        shard_on_the_cpu()
    found = {
        objective: run(folder / objective, objective, processes, sharded=sharded) for objective in ("hdpo", "gdpo")
    }
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
