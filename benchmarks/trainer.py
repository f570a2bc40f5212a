"""HDPO's trainer beside TRL's GRPO: the update, its peak memory, and rollouts through the graph beside TRL's tool loop.

Each pair runs in turn in one process on one model, so that whatever else the machine does hits both. Prints JSON:
`update_ratio`, tokens a second of HDPO's update (forward, both surrogates, backward) over GRPO's, at least 0.95 wanted;
`rollout_ratio`, rollouts a second through the graph over TRL's own tool loop with the same model and tools, at least
1.0 wanted; `continuous_ratio`, how many times faster agents of several turns are answered by batches that others join
than by whole ones, with a model so large that a token costs the same for one row as for eight. On a CPU all are by the
process's own CPU time, which another program's load does not enter; wall-clock ratios stand beside them. On a GPU they
are by the wall clock, and a 2B-shaped and an 8B-shaped model with random weights are measured too, with the share of
the chip's peak.

    python benchmarks/trainer.py --rounds 15
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

from metis_agent.agent import create_metis_agent
from metis_agent.hdpo.config import HDPOConfig
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts
from metis_agent.rules.budget import Budget
from metis_agent.worlds.almanac.cold_start import build_tokenizer
from metis_agent.worlds.almanac.experiment import COLD_START
from metis_agent.worlds.almanac.questions import questions

REPLY = 64
"""Tokens of one reply, for both."""
CUDA = torch.cuda.is_available()
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bfloat16 operations a second, from the makers' data sheets."""
SHAPES = {
    "0.1B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16},
    "2B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}


def python(code: str) -> str:
    """Run code.

    Args:
        code: To run.
    """
    return str(len(code))


def text_search(query: str) -> str:
    """Search.

    Args:
        query: To look up.
    """
    return query[:20]


def measured(work: Callable[[], Any]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak memory in MiB."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    if CUDA:
        return *seconds, torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return *seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024


def in_turn(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Both, `rounds` times after one of warming up; ratios are of their time over ours, so above 1 is faster."""
    pairs = []
    for round_ in range(rounds + 1):
        # Whoever goes second finds warm caches: take turns.
        order = (ours, theirs) if round_ % 2 else (theirs, ours)
        found = [measured(each) for each in order]
        pairs.append(tuple(found) if round_ % 2 else tuple(reversed(found)))
    pairs = pairs[1:]
    clock = 1 if CUDA else 0
    figures = {
        "ratio": statistics.median(b[clock] / a[clock] for a, b in pairs),
        "ratio_wall": statistics.median(b[1] / a[1] for a, b in pairs),
        "ours_seconds": statistics.median(a[clock] for a, _ in pairs),
        "theirs_seconds": statistics.median(b[clock] for _, b in pairs),
        "ours_peak_mib": max(a[2] for a, _ in pairs),
        "theirs_peak_mib": max(b[2] for _, b in pairs),
        "rounds": rounds,
    }
    return figures, [(a[clock], b[clock]) for a, b in pairs]


def hdpo_trainer(chat: LocalChatModel, folder: Path, **changed: Any) -> HDPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 1, "report_to": "none", "use_cpu": not CUDA, "bf16": False,
        "activation_checkpointing": False, "temperature": 1.0, "disable_tqdm": True,
    }  # fmt: skip
    trainer = HDPOTrainer(
        chat.model, chat.tokenizer, HDPOConfig(**{**settings, **changed}), questions=questions("train", 4),
        rollouts=rollouts_through_the_graph(chat, folder),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rollouts_through_the_graph(chat: LocalChatModel, folder: Path) -> Rollouts:
    store = TrajectoryStore(folder / "trajectories")
    return Rollouts(
        lambda gate: create_metis_agent(chat, [python, text_search], gate=gate, budget=Budget(calls=1)), store
    )


def batch_of(rows: int, prompt: int, completion: int, vocabulary: int, device: torch.device) -> dict[str, Any]:
    """Random tokens in the shapes that rollouts have, a quarter of each completion observed."""
    torch.manual_seed(0)
    observed = torch.arange(completion) % 4 == 3
    batch: dict[str, Any] = {
        "prompt_ids": torch.randint(10, vocabulary, (rows, prompt)),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": torch.randint(10, vocabulary, (rows, completion)),
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "tool_mask": (~observed).long().expand(rows, completion),
        "advantages": torch.randn(rows, completion),
        "tool_advantages": torch.randn(rows, completion),
        "num_items_in_batch": (~observed).sum() * rows,
    }
    return {name: value.to(device) for name, value in batch.items()}


def update(trainer: HDPOTrainer, rows: int, prompt: int, completion: int, rounds: int) -> dict[str, Any]:
    batch = batch_of(rows, prompt, completion, trainer.model.config.vocab_size, trainer.model.device)

    def of(loss: Callable[[Any, Any], torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            trainer.model.zero_grad()
            loss(trainer.model, batch).backward()

        return work

    figures, _ = in_turn(
        of(trainer._compute_loss), of(lambda model, inputs: GRPOTrainer._compute_loss(trainer, model, inputs)), rounds
    )
    tokens = rows * (prompt + completion)
    return {
        **figures, "rows": rows, "tokens": tokens, "ours_tokens_a_second": tokens / figures["ours_seconds"],
        "theirs_tokens_a_second": tokens / figures["theirs_seconds"],
    }  # fmt: skip


def rollout(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """`count` questions, 16 rollouts each, free: through the graph, recorded on disk, and by TRL's tool loop."""
    chat = LocalChatModel.load(COLD_START, temperature=1.0, max_new_tokens=REPLY, device="cuda" if CUDA else "cpu")
    tokenizer = build_tokenizer()
    tokenizer.response_template = qwen3_template
    asked = questions("train", count)
    theirs = GRPOTrainer(
        chat.model,
        [lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=str(folder / "trl"), num_generations=16, per_device_train_batch_size=16 * count, max_steps=1,
            max_completion_length=REPLY, max_tool_calling_iterations=1, report_to="none", use_cpu=not CUDA, bf16=False,
            activation_checkpointing=False, temperature=1.0, beta=0.0, disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": each.text}]} for each in asked]),
        tools=[python, text_search],
    )  # fmt: skip
    theirs.model.train()
    theirs._sync_tool_dicts = [{"python": python, "text_search": text_search}] * (16 * count)
    theirs._async_tool_dicts = [{}] * (16 * count)
    prompts = [[{"role": "user", "content": each.text}] for each in asked for _ in range(16)]
    rollouts = rollouts_through_the_graph(chat, folder)
    number = 0
    called: dict[str, list[float]] = {"ours": [], "theirs": []}

    def graph() -> None:
        nonlocal number
        number += 1
        plan = group_rollouts(asked, ("free",) * 16, name=f"round-{number}", seed=number)
        runs = rollouts.collect(plan)
        called["ours"].append(sum(run.tool_calls for run in runs) / len(runs))

    def loop() -> None:
        _, _, mask, *_ = theirs._generate(prompts)
        called["theirs"].append(sum(0 in row for row in mask) / len(mask))

    figures, _ = in_turn(graph, loop, rounds)
    runs = 16 * count
    return {
        **figures, "rollouts": runs, "ours_rollouts_a_second": runs / figures["ours_seconds"],
        "theirs_rollouts_a_second": runs / figures["theirs_seconds"],
        "tool_calls_a_rollout": {name: statistics.fmean(values) for name, values in called.items()},
    }  # fmt: skip


def model_of(name: str, vocabulary: int) -> Qwen3ForCausalLM:
    """Of this shape, with random weights; in bfloat16 on a GPU."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=vocabulary, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        tie_word_embeddings=name != "8B", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **SHAPES[name],
    )  # fmt: skip
    with torch.device("cuda" if CUDA else "cpu"):
        return Qwen3ForCausalLM(config).to(torch.bfloat16 if CUDA else torch.float32)


def continuous(rounds: int) -> dict[str, Any]:
    """Three times as many agents as a batch has rows, of three turns each, whose replies are 4 to 64 tokens long."""
    tokenizer = build_tokenizer()
    model, rows = model_of("2B" if CUDA else "0.1B", len(tokenizer)), 64 if CUDA else 8

    async def agent(chat: LocalChatModel, number: int) -> None:
        lengths = random.Random(number)
        for turn in range(3):
            text = "What is 2 plus 3" + " plus 4" * lengths.randint(0, 9)
            await chat.ainvoke(text, seed=3 * number + turn, max_tokens=lengths.choice((4, 8, 8, 8, 16, 32, 64)))

    async def agents(chat: LocalChatModel) -> None:
        await asyncio.gather(*[agent(chat, number) for number in range(3 * rows)])

    def work(joining: bool) -> Callable[[], None]:
        chat = LocalChatModel(model=model, tokenizer=tokenizer, temperature=1.0, max_batch=rows, continuous=joining)
        return lambda: asyncio.run(agents(chat))

    return in_turn(work(True), work(False), rounds)[0]


def shaped(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """The update of a model of this shape with random weights, on a GPU."""
    model = model_of(name, 151_936)
    chat = LocalChatModel(model=model, tokenizer=build_tokenizer(), temperature=1.0)
    trainer = hdpo_trainer(chat, folder, bf16=True, activation_checkpointing=True)
    figures = update(trainer, 8, 1024, 3072, rounds)
    parameters = sum(p.numel() for p in model.parameters())
    done = 6 * parameters * figures["tokens"] / figures["ours_seconds"]
    chip = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK.items() if key in chip), None)
    return {
        **figures, "parameters": parameters, "chip": chip,
        "share_of_peak": done / peak if peak else None,  # 6 N operations a token; recomputation not counted
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--questions", type=int, default=8, help="of 16 rollouts each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("update", "rollout", "continuous"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if chosen.only in (None, "update"):
            chat = LocalChatModel.load(COLD_START, device="cuda" if CUDA else "cpu")
            found["update"] = update(hdpo_trainer(chat, folder / "update"), chosen.rows, 20, 60, chosen.rounds)
            found["update_ratio"] = found["update"]["ratio"]
        if chosen.only in (None, "rollout"):
            found["rollout"] = rollout(folder / "rollout", chosen.questions, chosen.rounds)
            found["rollout_ratio"] = found["rollout"]["ratio"]
        if chosen.only in (None, "continuous"):
            found["continuous"] = continuous(min(3, chosen.rounds))
            found["continuous_ratio"] = found["continuous"]["ratio"]
        if CUDA:
            found["shapes"] = {shape: shaped(shape, folder / shape, 5) for shape in ("2B", "8B")}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
