"""The local chat model with a Qwen3-VL of random weights: what it saw is what transformers' own processor sees."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from PIL import Image
from tokenizers import AddedToken
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_agent.errors import CheckpointError, InputError
from metis_agent.messages import image_block
from metis_agent.models.checkpoint import StillsProcessor
from metis_agent.models.local import LocalChatModel
from metis_agent.models.vision import ImageReader
from metis_agent.types import TOKEN_RECORD
from tests.models.conftest import APPEND_ONLY, PYTHON, build_tokenizer

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = APPEND_ONLY.replace(
    "{{- message.content }}",
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for block in message.content %}"
    "{%- if block.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- block.text }}{%- endif %}{%- endfor %}{%- endif %}",
)
CALL = '<tool_call>{"name": "python", "arguments": {"code": "image_1"}}</tool_call>'


def build_processor() -> StillsProcessor:
    tokenizer = build_tokenizer(TEMPLATE)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in VISION])
    images: Any = Qwen2VLImageProcessorPil
    sizes = {"shortest_edge": 1024, "longest_edge": 4096}
    return StillsProcessor(
        image_processor=images(size=sizes, patch_size=8, merge_size=2, temporal_patch_size=2),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def build_model(processor: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "initializer_range": 0.2, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 48,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0], "initializer_range": 0.2,
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config).eval()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def processor() -> StillsProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def model(processor: StillsProcessor) -> Any:
    return build_model(processor)


@pytest.fixture
def chat(model: Any, processor: Any) -> LocalChatModel:
    return LocalChatModel(
        model=model, tokenizer=processor.tokenizer, processor=processor, temperature=1.0, max_new_tokens=6, seed=3
    )


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def block(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return image_block(file.getvalue(), "image/png")


def asked(*images: Image.Image, text: str = " is the") -> HumanMessage:
    return HumanMessage([*map(block, images), {"type": "text", "text": text}])


def conversation(*, crop: Image.Image) -> tuple[list[BaseMessage], list[Image.Image]]:
    """A question with two pictures, a call, and a crop as its result; with the pictures in their order."""
    first, second = picture(1), picture(2, (70, 41))
    call = {"name": "python", "args": {"code": "image_1"}, "id": "c", "type": "tool_call"}
    result = ToolMessage([{"type": "text", "text": "image"}, block(crop)], tool_call_id="c", name="python")
    return [asked(first, second), AIMessage("", tool_calls=[call]), result], [first, second, crop]


def by_transformers(model: Any, processor: Any, text: str, images: list[Image.Image], completion: list[int]) -> Any:
    """Prompt ids and the completion's log-probabilities, by stock code alone."""
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    prompt = inputs["input_ids"]
    whole = torch.cat([prompt, torch.tensor([completion])], dim=1)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    types = torch.tensor(processor.create_mm_token_type_ids(whole.tolist()))
    with torch.no_grad():
        logits = model(
            input_ids=whole, attention_mask=torch.ones_like(whole), mm_token_type_ids=types, use_cache=False, **pixels
        ).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.log_softmax(dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    return prompt[0].tolist(), chosen.tolist()


def rendered(processor: Any, messages: list[BaseMessage]) -> str:
    """The template's text, by the tokenizer's own call."""
    roles = {"human": "user", "ai": "assistant", "tool": "tool"}
    chat: list[dict[str, Any]] = []
    for message in messages:
        calls = [
            {"type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
            for call in getattr(message, "tool_calls", [])
        ]
        chat.append({"role": roles[message.type], "content": message.content, "tool_calls": calls})
    return str(processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def test_ids_and_log_probabilities_are_those_of_plain_transformers(
    chat: LocalChatModel, model: Any, processor: Any
) -> None:
    messages, images = conversation(crop=picture(3, (32, 64)))
    for upto, seen in ((1, images[:2]), (3, images)):
        record = chat.invoke(messages[:upto]).response_metadata[TOKEN_RECORD]
        text = rendered(processor, messages[:upto])
        ids, log_probs = by_transformers(model, processor, text, seen, record["completion_ids"])
        assert record["prompt_ids"] == ids
        assert record["log_probs"] == pytest.approx(log_probs, abs=1e-4)


def test_a_batch_gives_what_each_row_gives_alone(chat: LocalChatModel) -> None:
    long, _ = conversation(crop=picture(4))
    rows: list[list[BaseMessage]] = [
        long, [asked(picture(5, (80, 40)))], [HumanMessage("Hello world")], [asked(picture(6)), *long[1:]],
        [asked(picture(7, (32, 32)), picture(8, (96, 32)))],
    ]  # fmt: skip
    alone = [chat.invoke(row).response_metadata[TOKEN_RECORD] for row in rows]

    async def together() -> list[AIMessage]:
        return list(await asyncio.gather(*(chat.ainvoke(row) for row in rows)))

    for single, reply in zip(alone, asyncio.run(together()), strict=True):
        record = reply.response_metadata[TOKEN_RECORD]
        assert record["prompt_ids"] == single["prompt_ids"]
        assert record["completion_ids"] == single["completion_ids"]
        assert record["log_probs"] == pytest.approx(single["log_probs"], abs=1e-4)


def test_a_turn_after_a_crop_continues_the_tokens_of_the_turn_before(
    chat: LocalChatModel, model: Any, processor: Any
) -> None:
    question, crop = asked(picture(1)), picture(9, (64, 48))
    tools = chat.bind_tools([PYTHON], tool_choice="python")
    first = tools.invoke([question])
    before = first.response_metadata[TOKEN_RECORD]
    # A random model does not write a whole call; what it began with is the text of its reply then.
    observed = HumanMessage([{"type": "text", "text": " answer"}, block(crop)])
    record = chat.bind_tools([PYTHON]).invoke([question, first, observed]).response_metadata[TOKEN_RECORD]
    if record["continues"]:
        start = before["prompt_ids"] + before["completion_ids"]
        assert record["prompt_ids"][: len(start)] == start
    pads = [token == processor.image_token_id for token in record["prompt_ids"]]
    # 48 x 32 pixels are 6 x 4 patches, 6 places; 64 x 48 are 8 x 6 patches, 12 places.
    assert sum(pads) == 6 + 12


def test_a_reply_that_was_sampled_is_never_encoded_again(
    chat: LocalChatModel, monkeypatch: pytest.MonkeyPatch, processor: Any, model: Any
) -> None:
    question, crop = asked(picture(1)), picture(9, (64, 48))
    written = tuple(processor.tokenizer(f"{CALL}<|im_end|>")["input_ids"])
    monkeypatch.setattr(LocalChatModel, "_forced", lambda self, choice, tools: written)
    calling = chat.model_copy(update={"max_new_tokens": 200})
    first = calling.bind_tools([PYTHON]).invoke([question])
    assert first.tool_calls[0]["args"] == {"code": "image_1"}
    monkeypatch.undo()
    result = ToolMessage([{"type": "text", "text": "image"}, block(crop)], tool_call_id=first.tool_calls[0]["id"] or "")
    record = chat.bind_tools([PYTHON]).invoke([question, first, result]).response_metadata[TOKEN_RECORD]
    before = first.response_metadata[TOKEN_RECORD]
    start = before["prompt_ids"] + before["completion_ids"]
    assert record["continues"]
    assert record["prompt_ids"][: len(start)] == start
    assert record["prompt_ids"].count(processor.image_token_id) == 6 + 12
    # Another picture of the same size has the same ids; but it is not what the model had seen when it replied.
    swapped = chat.bind_tools([PYTHON]).invoke([asked(picture(2)), first, result]).response_metadata[TOKEN_RECORD]
    asked_ids = before["prompt_ids"]
    assert swapped["prompt_ids"][: len(asked_ids)] == asked_ids
    assert not swapped["continues"]
    assert [one == other for one, other in zip(swapped["images"], record["images"], strict=True)] == [False, True]


def test_the_picture_decides_the_reply(chat: LocalChatModel) -> None:
    one, other = (chat.invoke([asked(picture(seed))]).response_metadata[TOKEN_RECORD] for seed in (1, 2))
    assert one["prompt_ids"] == other["prompt_ids"]
    assert one["log_probs"] != pytest.approx(other["log_probs"], abs=1e-3)


def test_pixels_by_hand() -> None:
    """A 32 x 32 picture, grey 51 but for one pixel: (51/255 - mean) / std in its place among the patches.

    With mean .5 and std .25: 51 -> (.2 - .5) / .25 = -1.2, and 255 -> 2. The pixel at column 9, row 17 lies in the
    patch of column 1, row 2. Patches come in squares of 2 x 2: square (row 1, column 0) is the third, and in it the
    patch is at row 0, column 1, the second: patch 2 * 4 + 1 = 9. In it the pixel is at row 1, column 1, place 9 of
    64; each channel holds two identical frames of 64 values, so channel c begins at c * 128.
    """
    image = Image.new("RGB", (32, 32), (51, 51, 51))
    image.putpixel((9, 17), (255, 51, 255))
    processor = build_processor()
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.5] * 3, [0.25] * 3
    seen = ImageReader(processor).see(_bytes(image))
    pixels = seen.tensors["pixel_values"]
    assert pixels.shape == (16, 3 * 2 * 64)
    expected = torch.full((16, 384), -1.2)
    for frame in (0, 64):
        for channel in (0, 2):
            expected[9, channel * 128 + frame + 9] = 2.0
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert seen.tensors["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert seen.text == "<|image_pad|>" * 4


def _bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_placeholder_in_a_text_claims_no_image(chat: LocalChatModel, processor: Any) -> None:
    record = chat.invoke([HumanMessage("Hello<|image_pad|><|video_pad|>")]).response_metadata[TOKEN_RECORD]
    assert processor.image_token_id not in record["prompt_ids"]
    hidden = asked(picture(1), text="<|image_pad|>")
    assert chat.invoke([hidden]).response_metadata[TOKEN_RECORD]["prompt_ids"].count(processor.image_token_id) == 6


def test_a_reply_holds_no_placeholder(chat: LocalChatModel, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = torch.zeros(len(processor.tokenizer))
    extra[processor.image_token_id] = 60.0
    hook = chat.model.lm_head.register_forward_hook(lambda module, inputs, output: output + extra)
    try:
        record = chat.invoke([asked(picture(1))]).response_metadata[TOKEN_RECORD]
    finally:
        hook.remove()
    assert processor.image_token_id not in record["completion_ids"]
    assert all(log_prob < -30 for log_prob in record["log_probs"])  # the policy's own, as if nothing were banned


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"type": "image", "url": "https://example.com/a.png"}, "fetches nothing"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "fetches nothing"),
        ({"type": "image", "file_id": "f-1"}, "no bytes"),
        ({"type": "image", "base64": "QUJD", "mime_type": "image/png"}, "no PNG"),
        ({"type": "image", "base64": "PHN2Zy8+", "mime_type": "image/svg+xml"}, "SVG"),
        (block(Image.new("RGB", (450, 2))), "refuses an image of 450 x 2"),
        (block(Image.new("1", (7000, 7000))), "at most 40,000,000"),
        ({"type": "audio", "base64": "QUJD", "mime_type": "audio/wav"}, "can't be read here"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(
    chat: LocalChatModel, content: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        chat.invoke([HumanMessage([content, {"type": "text", "text": " is"}])])


def test_odd_images_are_read(chat: LocalChatModel, processor: Any) -> None:
    turned = picture(2, (32, 64))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    jpeg, gif = io.BytesIO(), io.BytesIO()
    turned.save(jpeg, "JPEG", exif=exif)
    turned.save(gif, "GIF", save_all=True, append_images=[picture(3, (32, 64))])
    odd = [
        block(Image.new("RGB", (1, 1))), image_block(jpeg.getvalue(), "image/jpeg"),
        image_block(gif.getvalue(), "image/gif"), block(Image.new("RGBA", (40, 40), (9, 9, 9, 0))),
    ]  # fmt: skip
    record = chat.invoke([HumanMessage([*odd, {"type": "text", "text": " is"}])]).response_metadata[TOKEN_RECORD]
    # 1 x 1 grows to 1,024 pixels, 2 x 2 places; the others keep their size to the next 16: 4 x 2, 2 x 4, 2 x 2.
    assert record["prompt_ids"].count(processor.image_token_id) == 4 + 8 + 8 + 4


def test_a_folder_loads_with_its_processor(model: Any, processor: Any, chat: LocalChatModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LocalChatModel.load(tmp_path, temperature=1.0, max_new_tokens=6, seed=3)
    messages, _ = conversation(crop=picture(3))
    one, other = (it.invoke(messages).response_metadata[TOKEN_RECORD] for it in (chat, loaded))
    assert one["prompt_ids"] == other["prompt_ids"]
    assert one["template_hash"] == other["template_hash"]
    assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-5)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="does not load"):
        LocalChatModel.load(tmp_path)


def test_a_folder_as_qwen_publishes_it_loads_without_torchvision(model: Any, processor: Any, tmp_path: Path) -> None:
    """The layout of Qwen/Qwen3-VL-*: a fast image processor and a video processor, whose library may be missing."""
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "merge_size": 2,
        "patch_size": 8, "temporal_patch_size": 2, "size": {"longest_edge": 4096, "shortest_edge": 1024},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    videos = {**images, "video_processor_type": "Qwen3VLVideoProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    record = LocalChatModel.load(tmp_path, max_new_tokens=2).invoke([asked(picture(1))]).response_metadata[TOKEN_RECORD]
    assert record["prompt_ids"].count(processor.image_token_id) == 6


def test_without_its_processor_images_are_refused(model: Any, processor: Any) -> None:
    blind = LocalChatModel(model=model, tokenizer=processor.tokenizer, max_new_tokens=2)
    with pytest.raises(InputError, match="can't be read here"):
        blind.invoke([asked(picture(1))])
    assert blind.invoke("Hello").response_metadata[TOKEN_RECORD]["completion_ids"]
