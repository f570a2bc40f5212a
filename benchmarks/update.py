"""What the second surrogate costs: CPU time of HDPO's update over TRL's GRPO update on the same batch.

Both are timed in turn in one process on one model: forward, loss, backward. Prints JSON; `update_ratio` is
the median of the rounds' ratios, and at most 1.05 is wanted.

    python benchmarks/update.py --rows 256 --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from trl import GRPOConfig, GRPOTrainer

from metis_agent.agent import create_metis_agent
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts
from metis_agent.worlds.almanac.experiment import COLD_START
from metis_agent.worlds.almanac.questions import questions


def trainer_in(folder: Path) -> HDPOTrainer:
    """A trainer of the shipped cold start that is never asked to roll out."""
    chat = LocalChatModel.load(COLD_START)
    groups = StratifiedGroups()
    arguments = GRPOConfig(
        output_dir=str(folder), num_generations=groups.size, per_device_train_batch_size=groups.size,
        steps_per_generation=1, max_steps=1, beta=0.0, report_to="none", use_cpu=not torch.cuda.is_available(),
        bf16=False, activation_checkpointing=False,
    )  # fmt: skip
    rollouts = Rollouts(lambda gate: create_metis_agent(chat, gate=gate), TrajectoryStore(folder / "trajectories"))
    trainer = HDPOTrainer(
        chat.model, chat.tokenizer, arguments, questions=questions("train", 4), rollouts=rollouts, groups=groups
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def batch_of(rows: int, prompt: int, completion: int, vocabulary: int) -> dict[str, Any]:
    """Random tokens in the shapes that rollouts have, a quarter of each completion observed."""
    torch.manual_seed(0)
    mask = torch.ones(rows, completion, dtype=torch.long)
    observed = torch.arange(completion) % 4 == 3
    return {
        "prompt_ids": torch.randint(10, vocabulary, (rows, prompt)),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": torch.randint(10, vocabulary, (rows, completion)),
        "completion_mask": mask,
        "tool_mask": (~observed).long().expand(rows, completion),
        "advantages": torch.randn(rows, completion),
        "tool_advantages": torch.randn(rows, completion),
        "num_items_in_batch": (~observed).sum() * rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--completion", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(Path(folder))
        batch = batch_of(chosen.rows, chosen.prompt, chosen.completion, trainer.model.config.vocab_size)

        def seconds(loss_of: Callable[[], torch.Tensor]) -> float:
            trainer.model.zero_grad()
            started = time.process_time()
            loss_of().backward()
            return time.process_time() - started

        def hdpo() -> torch.Tensor:
            return trainer._compute_loss(trainer.model, batch)

        def grpo() -> torch.Tensor:
            return GRPOTrainer._compute_loss(trainer, trainer.model, batch)

        rounds = [(seconds(hdpo), seconds(grpo)) for _ in range(chosen.rounds + 2)][2:]
    print(
        json.dumps(
            {
                "update_ratio": statistics.median(ours / theirs for ours, theirs in rounds),
                "hdpo_seconds": min(ours for ours, _ in rounds),
                "grpo_seconds": min(theirs for _, theirs in rounds),
                "rows": chosen.rows,
                "tokens_per_row": chosen.prompt + chosen.completion,
                "rounds": chosen.rounds,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
