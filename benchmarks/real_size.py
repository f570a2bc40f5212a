"""The shape of Qwen3-VL-2B, with random weights: is it built, rolled out through the graph, and does it take a step?

    make bench-real-size

Everything is what `metis train policy` runs, HDPOTrainer with LoRA in bfloat16, but for three things that random
weights can't do: they don't write a call, so a forced one is forced whole; no answer of theirs is right, so a coin
judges; and their tokenizer is the gallery's, filled up with words that nobody writes to the 151,936 ids of the model.
On a GPU where there is one. Prints JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from tokenizers import models
from transformers import AutoModelForImageTextToText, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_agent.agent import create_metis_agent
from metis_agent.hdpo.policy_trainer import HDPOConfig, HDPOTrainer
from metis_agent.models.checkpoint import StillsProcessor
from metis_agent.models.local import LocalChatModel
from metis_agent.models.vision import ImageReader
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollout, Rollouts
from metis_agent.rules.budget import Budget
from metis_agent.tools.python import PythonTool
from metis_agent.types import Question, Trajectory
from metis_agent.worlds.gallery.tokens import build_processor

VOCABULARY = 151_936
# Qwen/Qwen3-VL-2B-Instruct, config.json; its generation length is cut to what a tiny batch needs.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
    },
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
PIXELS = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
CALL = '<tool_call>{"name": "python", "arguments": {"code": "image_1.crop((0, 0, 64, 64))"}}</tool_call><|end|>'
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Calling(LocalChatModel):
    """Where a call is forced, a whole one is."""

    def _forced(self, choice: str, tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return () if choice in ("auto", "none") else self._tokens.encode(CALL)


class Timed(Rollouts):
    """Rollouts that remember what they returned, and how long they took."""

    seconds = 0.0
    found: list[Trajectory]

    def collect(self, rollouts: Sequence[Rollout], **options: Any) -> list[Trajectory]:
        """As it is, with a clock."""
        started = time.perf_counter()
        self.found = super().collect(rollouts, **options)
        self.seconds += time.perf_counter() - started
        return self.found


def questions(count: int, side: int) -> list[Question]:
    """Each with a picture of noise of its own."""
    asked = []
    for number in range(count):
        pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(number))
        file = BytesIO()
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        asked.append(
            Question(id=str(number), text="What number is on the sign?", answer="1", metadata={"images": [uri]})
        )
    return asked


def coin(question: Question, answer: str) -> bool:
    return zlib.crc32(answer.encode()) % 2 == 0


def processor_of_this_size() -> StillsProcessor:
    """The gallery's tokenizer with as many ids as the model, and Qwen3-VL's own image settings."""
    small = build_processor()
    tokenizer: Any = small.tokenizer
    known = tokenizer.get_vocab()
    rest = {f"word{place}": place for place in range(len(tokenizer), VOCABULARY)}
    tokenizer.backend_tokenizer.model = models.WordLevel({**known, **rest}, unk_token="<|unk|>")
    images: Any = Qwen2VLImageProcessorPil
    pictures = images(
        size=PIXELS, patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return StillsProcessor(image_processor=pictures, tokenizer=tokenizer, chat_template=small.chat_template)


def build_model(tokenizer: Any) -> Any:
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3VLConfig(text_config={**TEXT, **ends}, vision_config=VISION, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def trainer_of(model: Any, processor: Any, folder: Path, chosen: argparse.Namespace) -> tuple[HDPOTrainer, Timed]:
    chat = Calling(
        model=model, tokenizer=processor.tokenizer, processor=processor, temperature=1.0, max_new_tokens=chosen.reply
    )
    tool = PythonTool()
    rollouts = Timed(
        lambda gate: create_metis_agent(chat, [tool], gate=gate, budget=Budget(calls=1)),
        TrajectoryStore(folder / "trajectories"),
    )
    rows = chosen.questions * chosen.group
    arguments = HDPOConfig(
        output_dir=str(folder / "checkpoints"), num_generations=chosen.group, forced_direct=1, forced_tool=1,
        per_device_train_batch_size=chosen.micro_batch, steps_per_generation=rows // chosen.micro_batch,
        gradient_accumulation_steps=rows // chosen.micro_batch, max_steps=1, learning_rate=1e-4, bf16=True,
        activation_checkpointing=True, use_cpu=DEVICE == "cpu", temperature=1.0, max_completion_length=chosen.reply,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", task_type="CAUSAL_LM"
    )
    trainer = HDPOTrainer(
        model, processor.tokenizer, arguments, questions=questions(chosen.questions, chosen.side),
        rollouts=rollouts,
        verify=coin, images=ImageReader(processor), peft_config=lora,
    )  # fmt: skip
    return trainer, rollouts


def peak_gib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--group", type=int, default=4, help="rollouts a question, one forced down each branch")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=256, help="of a picture, in pixels: 256 are 64 tokens")
    parser.add_argument("--reply", type=int, default=16, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    started = time.perf_counter()
    processor = processor_of_this_size()
    model = build_model(processor.tokenizer)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "threads": chosen.threads,
        "load": os.getloadavg()[0], "parameters": model.num_parameters(),
        "build_seconds": time.perf_counter() - started, "peak_gib_after_build": peak_gib(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer, rollouts = trainer_of(model, processor, Path(folder), chosen)
        trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        started = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - started
    after = dict(trainer.model.named_parameters())
    runs = rollouts.found
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    found |= {
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "rollouts": len(runs), "failed": sum(run.status == "failed" for run in runs),
        "executed_calls": sum(run.tool_calls for run in runs),
        "prompt_tokens": max(len(call.prompt_ids or ()) for run in runs for call in run.calls),
        "rollout_seconds": rollouts.seconds, "step_seconds": whole - rollouts.seconds,
        "loss": logged["loss"], "grad_norm": logged["grad_norm"],
        "largest_change": max(float((after[name] - p).abs().max()) for name, p in trained.items()),
        "peak_gib": peak_gib(),
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if not (math.isfinite(found["grad_norm"]) and found["largest_change"] > 0 and not found["failed"]):
        sys.exit("The step did not do its work: see the figures.")


if __name__ == "__main__":
    main()
