"""The whole model to sample rollouts from, where FSDP or DeepSpeed has spread its weights over the processes.

Stands between the policy trainer and its rollouts. DeepSpeed and FSDP 1 gather the weights for as long as the rollouts
take. FSDP 2 gathers layer by layer, in step with the other processes, and processes whose rollouts differ in length
are not in step: there a second, whole copy of the model is sampled from, and gets the weights before each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from trl.models.utils import unwrap_model_for_generation

from metis_agent.errors import ConfigurationError

__all__ = ["check_sampler", "copy_weights", "unsharded_model"]


def check_sampler(trainer: Any, sampler: nn.Module | None) -> None:
    """Whether the rollouts have a model to sample from.

    Raises:
        ConfigurationError: FSDP 2 has spread the weights and there is no copy, or the copy is another model.
    """
    if sampler is None:
        if trainer._dist.fsdp_version == 2 and not trainer.use_vllm:
            raise ConfigurationError(
                "FSDP 2 spreads the weights, and processes that sample different numbers of tokens from them would "
                "wait for each other for ever. Sample from vLLM (use_vllm=True), or give the trainer sampler=, a "
                "second copy of the model that the agent's chat model samples from."
            )
        return
    ours, theirs = (sorted(name for name, _ in model.named_parameters()) for model in (trainer.model, sampler))
    if ours != theirs:
        first = next(iter(set(ours) ^ set(theirs)))
        raise ConfigurationError(
            f"sampler has other weights than the model that is trained ({first!r} is in one only): load both from the "
            "same checkpoint; adapters (LoRA) can't be sampled from a copy."
        )
    sampler.to(trainer.accelerator.device)


@torch.no_grad()
def copy_weights(model: nn.Module, sampler: nn.Module) -> None:
    """Give a whole copy the weights of a model that may be spread; every process must call it."""
    # By their order: wrapping changes the names.
    for theirs, parameter in zip(sampler.parameters(), model.parameters(), strict=True):
        weight = parameter.detach()
        theirs.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)


@contextmanager
def unsharded_model(trainer: Any, sampler: nn.Module | None) -> Iterator[None]:
    """While it lasts, the model that rollouts sample from is whole and has the trained weights."""
    spread = trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sampler is not None:
        copy_weights(trainer.model, sampler)
        yield
    elif not spread or trainer.use_vllm:
        yield
    else:
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            ),
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            yield
