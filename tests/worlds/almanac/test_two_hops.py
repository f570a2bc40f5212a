"""The tiny transformer of the almanac of two hops: what it learns from, and what training makes of it."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metis_agent.worlds.almanac.agent import COLD_START, seeking_agent
from metis_agent.worlds.almanac.cold_start import (
    SEEKING,
    _Muon,
    _seeking_row,
    build_tokenizer,
    train_seeking_cold_start,
)
from metis_agent.worlds.almanac.questions import CALLS_NEEDED

TOKENIZER = build_tokenizer()


def test_what_it_learns_from_is_what_the_agent_says_and_reads() -> None:
    rows = dataclasses.replace(SEEKING, knowledge=0.0)
    ids, labels = _seeking_row(TOKENIZER, rows, random.Random(5))
    text = TOKENIZER.decode(ids)
    question = text.removeprefix("<|user|>").partition("<|end|>")[0]
    state = seeking_agent().invoke({"messages": [("user", question)]})
    spoken = [message for message in state["messages"] if message.type in ("user", "human", "ai", "tool")]
    roles = {"human": "user", "ai": "assistant", "tool": "tool"}
    as_sent = [
        {
            "role": roles[message.type], "content": message.text,
            "tool_calls": [{"name": it["name"], "arguments": it["args"]} for it in getattr(message, "tool_calls", [])],
        }
        for message in spoken
    ]  # fmt: skip
    assert text == TOKENIZER.apply_chat_template(as_sent, tokenize=False)
    assert len(spoken) > 3
    learnt = TOKENIZER.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
    assert learnt.count("<|end|>") == len(spoken) // 2
    assert "<|tool|>" not in learnt


def test_the_answer_at_a_state_says_nothing_of_the_decision_to_give_it() -> None:
    rng, seen = random.Random(0), set()
    for _ in range(40):
        ids, labels = _seeking_row(TOKENIZER, dataclasses.replace(SEEKING, knowledge=1.0), rng)
        learnt = TOKENIZER.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
        assert "<answer>" not in learnt
        assert learnt.endswith("</answer><|end|>")
        assert "<tool_call>" not in learnt
        seen.add(TOKENIZER.decode(ids).count("<|tool|>"))
        assert len(ids) < 300
    assert seen >= {0, 1, 2, 3}


def test_its_optimiser_is_torchs_in_float32() -> None:
    torch.manual_seed(0)
    for shape in ((64, 128), (384, 128)):
        start = torch.randn(shape)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        options = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.0}
        steps = _Muon([ours], **options), torch.optim.Muon([theirs], **options)
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            for step in steps:
                step.step()
        assert (ours - theirs).norm() < 0.02 * (start - theirs).norm()  # of bfloat16's rounding


def test_a_cold_start_is_trained_from_the_packaged_one(tmp_path: Path) -> None:
    losses = []
    recipe = dataclasses.replace(SEEKING, steps=2, batch=4)
    train_seeking_cold_start(tmp_path, recipe, progress=lambda _, loss: losses.append(loss))
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert (tmp_path / "model.safetensors").read_bytes() != (COLD_START / "model.safetensors").read_bytes()


@pytest.mark.exhaustive
def test_the_benchmark_of_the_whole_model_runs_from_end_to_end(tmp_path: Path) -> None:
    """From the packaged cold start, in place of the one that takes minutes: whether all of it fits together."""
    shutil.copytree(COLD_START, tmp_path / "cold-2000" / "cold-start")
    benchmark = Path(__file__).parents[3] / "benchmarks" / "steps.py"
    sizes = ("--seeds", "0", "--steps", "2", "--train", "120", "--test", "24", "--folder", str(tmp_path))
    said = subprocess.run(
        [sys.executable, "-W", "ignore", str(benchmark), "--whole-model", *sizes], check=True, capture_output=True
    ).stdout
    figures = json.loads(said)
    for name in ("cold start", "contrast", "hdpo"):
        assert set(figures[name]["kinds"]) == set(CALLS_NEEDED)
        assert 0 <= figures[name]["accuracy"] <= 1
    assert set(figures["curves"]) >= {"gate", "self-report", "value regression", "caps", "oracle"}
    # Figures at other counts are others.
    kept = {"cold start-0-24.json", "contrast-0-2-24.json", "hdpo-0-2-24.json", "curves-0-120-24.json"}
    assert {file.name for file in (tmp_path / "cold-2000").glob("*.json")} == kept
