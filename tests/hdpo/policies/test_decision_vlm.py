"""A vision language model as a gate: images of the request count, and transformers says the same.

A Qwen3-VL of random weights. Its stock processor needs torchvision, for videos only; here it goes without them.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.messages import HumanMessage
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, pipeline
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_agent.errors import GateError
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.scorers.decision_lm import decision_request
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.hdpo.policies.decision_lm import DecisionLMPolicy
from metis_agent.hdpo.settings import GradientTraining
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import GateRequest, ToolSpec
from tests.hdpo.policies.conftest import TRAINING
from tests.hdpo.policies.tiny import tokenizer

TOOL = ToolSpec(name="wiki", description="looks up facts")

# Training takes seconds, and minutes on a machine that is busy with other things.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class StillsProcessor(Qwen3VLProcessor):
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kw: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kw)  # type: ignore[no-untyped-call]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade, shade, shade))


def as_base64(image: Image.Image) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    AutoProcessor.register(Qwen3VLConfig, StillsProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    words = tokenizer(chat=True)
    ids = {
        name: words.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end", "image_pad", "video_pad")
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": words.pad_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 1024}, patch_size=8, merge_size=2, temporal_patch_size=2
    )
    folder = tmp_path_factory.mktemp("vlm")
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    StillsProcessor(image_processor=images, tokenizer=words, chat_template=words.chat_template).save_pretrained(folder)
    return str(folder)


def shades(n: int = 48) -> tuple[OutcomeTable, list[list[Image.Image]]]:
    """All questions read alike: the picture alone says whether the tool is needed."""
    rng = np.random.default_rng(0)
    dark = rng.random(n) < 0.5
    table = OutcomeTable(
        questions=tuple(f"Find the song of {'abcdefghijklmnop'[row % 16]}{'abcdefgh'[row // 16]}" for row in range(n)),
        actions=("direct", "wiki"),
        correct=np.stack([dark, rng.random(n) < 0.9], axis=1).astype(float),
        cost=np.tile([0.0, 1.0], (n, 1)),
        seconds=np.full((n, 2), np.nan),
    )
    return table, [[picture(10 if is_dark else 245)] for is_dark in dark]


@pytest.fixture(scope="module")
def gate(model: str, tmp_path_factory: pytest.TempPathFactory) -> PolicyGate:
    table, images = shades()
    training = GradientTraining(epochs=5, batch_size=4, learning_rate=3e-3, patience=5)
    policy = DecisionLMPolicy(model=model, descriptions={"wiki": TOOL.description}, images=images, training=training)
    folder = tmp_path_factory.mktemp("vlm") / "gate"
    write_artefact(train_gate(table, TRAINING, policy=policy), folder, table=table, metrics={})
    return PolicyGate(folder)


def request(*images: dict[str, str]) -> GateRequest:
    return GateRequest(
        messages=[HumanMessage([*images, {"type": "text", "text": "Find the song of q"}])], tools=(TOOL,)
    )


def test_it_learns_from_the_image_alone(gate: PolicyGate) -> None:
    shown = {
        shade: {"type": "image", "base64": as_base64(picture(shade)), "mime_type": "image/png"} for shade in (10, 245)
    }
    assert gate.decide(request(shown[10])).direct
    assert gate.decide(request(shown[245])).allowed == ("wiki",)


def test_the_pipeline_of_transformers_gives_the_same_probabilities(gate: PolicyGate) -> None:
    decide = pipeline("decision", model=str(gate.artefact.folder), device="cpu")
    for images in ([], [picture(200)], [as_base64(picture(60)), as_base64(picture(90))]):
        answers = decide(decision_request("Find the song of q", tools=[TOOL], form="noul", images=images))
        accuracy, _ = gate.score("Find the song of q", images=images)
        found = {name.removeprefix("tool "): answer["noul"] for name, answer in answers.items()}
        assert found == pytest.approx(accuracy, abs=1e-5)


def test_what_is_no_image_is_refused(gate: PolicyGate) -> None:
    with pytest.raises(GateError, match="can't be put"):
        gate.score("Find the song of q", images=["QUJD"])
    with pytest.raises(GateError, match="fetches nothing"):
        gate.decide(request({"type": "image", "url": "https://example.com/a.png"}))


def test_images_are_for_every_row(model: str, tmp_path: Path) -> None:
    table, images = shades()
    with pytest.raises(ValueError, match="one each"):
        DecisionLMPolicy(model=model, images=images[1:]).prepare(table)
