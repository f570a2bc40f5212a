"""What `accelerate launch` runs in each process: two updates of the tiny policy for each objective."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

FSDP, ZERO = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def shard_on_the_cpu() -> None:
    """Let accelerate take this machine's cores for the GPUs that it wants before it shards."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device
    if ZERO:
        # Shared memory between processes would be compiled first; gloo does as well.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def run(folder: Path, objective: str, processes: int) -> dict[str, Any]:
    """The losses and what became of the weights."""
    from tests.hdpo.policy_world import STRATIFIED, arguments, cold_start, rewriting_tokenizer, rollouts_of, trainer_of

    model, tokenizer = cold_start(), rewriting_tokenizer()
    args = arguments(
        folder / "out", STRATIFIED, objective=objective, learning_rate=0.02, max_steps=2,
        # Four groups a step, whatever the number of processes.
        per_device_train_batch_size=16 // processes, ddp_find_unused_parameters=False,
        use_cpu=not (FSDP or ZERO),
    )  # fmt: skip
    sampler = cold_start() if FSDP else None
    rollouts = rollouts_of(sampler or model, folder, tokenizer)
    trainer = trainer_of(folder, args, model=model, tokenizer=tokenizer, rollouts=rollouts, sampler=sampler)
    trainer.train()
    whole = [full(parameter) for parameter in model.parameters()]
    here = [held(parameter) for parameter in model.parameters()]
    return {
        "processes": trainer.accelerator.num_processes,
        "history": [entry for entry in trainer.state.log_history if "hdpo/rho" in entry],
        "weights": [float(weight.double().norm()) for weight in whole],
        "sharded": sum(here) < sum(weight.numel() for weight in whole),
    }


def held(parameter: Any) -> int:
    """How many numbers of a weight this process holds."""
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def full(parameter: Any) -> Any:
    """A weight, gathered where it is spread."""
    if ZERO:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if FSDP or ZERO:
        shard_on_the_cpu()
    found = {objective: run(folder / objective, objective, processes) for objective in ("hdpo", "gdpo")}
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
