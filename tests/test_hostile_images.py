"""The same hostile images at every entrance: refused or handled, and never decoded.

The entrances are those of docs/security.md. Data sets of benchmarks: tests/benchmarks/test_pictures.py; addresses:
tests/tools/test_download.py; forged frames of a sandbox: tests/tools/sandboxes/test_forgeries.py.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from PIL import Image

from metis_agent.agent import create_metis_agent
from metis_agent.curation.rl import image_fault
from metis_agent.errors import GateError, InputError
from metis_agent.gates.scorers import Asked
from metis_agent.gates.scorers.decision_lm import DecisionModel
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.images import ImageStore
from metis_agent.report.transcript import Pictures
from metis_agent.rollouts.questions import read_questions
from metis_agent.rollouts.runner import question_message
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.images import load_image
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes.base import SandboxLimits
from metis_agent.tools.sandboxes.e2b.client import shown_images
from metis_agent.tools.search import ImageHit
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.types import Question, ToolSpec
from tests.fakes import call, calling, model
from tests.hostile_images import HOSTILE, ODD, bomb
from tests.models.test_vision import build_model, build_processor

EVERY = pytest.mark.parametrize("name", sorted(HOSTILE))
BROKEN_EXIF = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
PROCESSOR = build_processor()


@pytest.fixture(scope="module")
def chat() -> LocalChatModel:
    seeing = build_model(PROCESSOR)
    return LocalChatModel(model=seeing, tokenizer=PROCESSOR.tokenizer, processor=PROCESSOR, max_new_tokens=3)


def uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def block(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(content)}}


def good() -> bytes:
    return ODD["one pixel"]()[0]


# --- the loader -----------------------------------------------------------------------------------------------


@EVERY
def test_the_loader(name: str, tmp_path: Path) -> None:
    content = HOSTILE[name]()
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, uri(content), tmp_path / "a.png"):
        with pytest.raises(InputError):
            load_image(source)


@BROKEN_EXIF
@pytest.mark.parametrize("name", sorted(ODD))
def test_what_is_odd_is_loaded_upright_and_bare(name: str) -> None:
    content, size = ODD[name]()
    image = load_image(content)
    assert image.size == size
    assert image.mode in ("RGB", "RGBA")
    assert not image.info
    assert not dict(image.getexif())


def test_the_bomb_is_small_until_it_is_opened() -> None:
    assert len(bomb()) < 400_000


# --- messages -------------------------------------------------------------------------------------------------


@EVERY
def test_a_question_to_the_local_model(chat: LocalChatModel, name: str) -> None:
    with pytest.raises(InputError):
        chat.invoke([HumanMessage([block(HOSTILE[name]()), {"type": "text", "text": "Hello"}])])


@EVERY
def test_a_question_to_an_agent(chat: LocalChatModel, name: str) -> None:
    agent = create_metis_agent(chat, [])
    asked = question_message(Question(id="q", text="Hello", metadata={"images": [uri(HOSTILE[name]())]}))
    with pytest.raises(InputError):
        agent.invoke({"messages": [asked]})


@EVERY
def test_a_tools_image_becomes_a_line_and_the_conversation_goes_on(chat: LocalChatModel, name: str) -> None:
    shown = [{"type": "text", "text": "answer"}, block(HOSTILE[name]()), block(good())]
    conversation = [HumanMessage("Hello"), AIMessage("", tool_calls=[call("look")]), tool_message(shown)]
    record = chat.invoke(conversation).response_metadata["token_record"]
    text = PROCESSOR.tokenizer.decode(record["prompt_ids"])
    assert "[image not shown:" in text
    # The good one, of one pixel, which grows to 32 x 32: 4 places of 16 x 16.
    assert record["prompt_ids"].count(PROCESSOR.image_token_id) == 4
    assert len(record["images"]) == 1


def tool_message(content: Any) -> ToolMessage:
    return ToolMessage(content, tool_call_id="1")


@pytest.mark.parametrize("url", ["http://169.254.169.254/a.png", "file:///etc/passwd", "/etc/passwd", "ftp://a/b.png"])
def test_an_address_in_a_tools_result_is_not_fetched(chat: LocalChatModel, url: str) -> None:
    conversation = [
        HumanMessage("Hello"), AIMessage("", tool_calls=[call("look")]),
        tool_message([{"type": "image_url", "image_url": {"url": url}}]),
    ]  # fmt: skip
    record = chat.invoke(conversation).response_metadata["token_record"]
    assert "fetches nothing" in PROCESSOR.tokenizer.decode(record["prompt_ids"]).replace(" ", " ")
    with pytest.raises(InputError, match="fetches nothing"):
        chat.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": url}}])])


# --- tools ----------------------------------------------------------------------------------------------------


def test_code_that_names_them() -> None:
    """All of them in one conversation: each is missing with its reason, and the good one is there."""
    names = sorted(HOSTILE)
    shown = HumanMessage([*(block(HOSTILE[name]()) for name in names), block(good()), {"type": "text", "text": "?"}])
    count = len(names)
    code = f"found = [n for n in range(1, {count + 2}) if 'image_%d' % n in globals()]\nfound, image_{count + 1}.size\n"
    code += "\n".join(f"# image_{number}" for number in range(1, count + 1))
    tool = PythonTool()
    try:
        scripted = model(calling(call("python", code=code)), "done")
        state = create_metis_agent(scripted, [tool]).invoke({"messages": [shown]})
    finally:
        tool.close()
    (result,) = [message for message in state["messages"] if message.type == "tool"]
    assert f"([{count + 1}], (1, 1))" in result.text
    missing = set(re.findall(r"image_(\d+) is not there", result.text))
    assert missing == {str(number) for number in range(1, count + 1)}


@EVERY
def test_a_search_by_image(name: str, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(good())
    tool = ImageSearchTool(words=ImageFolder.build(tmp_path))
    request = {"name": "image_search", "type": "tool_call", "id": "1"}
    asked = [HumanMessage([block(HOSTILE[name]())])]
    for image in ("image_1", uri(HOSTILE[name]())):
        message = tool.invoke({**request, "args": {"image": image, "messages": asked}})
        assert message.status == "error"


@EVERY
def test_what_a_search_brings(name: str) -> None:
    class Backend:
        def search(self, query: str, limit: int) -> list[ImageHit]:
            return [ImageHit(title="a", text="b", image=uri(HOSTILE[name]()), thumbnail=uri(HOSTILE[name]()))]

    content, _ = ImageSearchTool(words=Backend())._run(query="a")
    assert {part["type"] for part in content if isinstance(part, dict)} == {"text"}


def test_a_folder_of_them(tmp_path: Path) -> None:
    for number, name in enumerate(sorted(HOSTILE)):
        for suffix in (".png", ".jpg", ".webp"):
            (tmp_path / f"{number}{suffix}").write_bytes(HOSTILE[name]())
    (tmp_path / "good.png").write_bytes(good())
    folder = ImageFolder.build(tmp_path, index=tmp_path / "index.jsonl")
    assert len(folder) == 1
    # One that changes after it was read is found, and not shown.
    (tmp_path / "good.png").write_bytes(bomb())
    (hit,) = folder.search("good", 5)
    assert hit.thumbnail == ""


@EVERY
def test_a_file_that_a_remote_sandbox_sends_back(name: str) -> None:
    encoded = [base64.b64encode(content).decode() for content in (HOSTILE[name](), good())]
    shown, notes = shown_images(encoded, SandboxLimits())
    assert [(image.width, image.height) for image in shown] == [(1, 1)]
    assert len(notes) == 1
    assert notes[0].startswith("An image can't be shown")


# --- the gate -------------------------------------------------------------------------------------------------


@EVERY
def test_a_gate_that_sees(name: str) -> None:
    eyes = SimpleNamespace(image_processor=object(), tokenizer=None)
    gate = DecisionModel(None, eyes, {"noul": ("Yes", "No")}, "noul", 512)
    encoded = base64.b64encode(HOSTILE[name]()).decode()
    with pytest.raises(GateError, match="can't be put"):
        gate.render(Asked(question="Hello", images=(encoded,)), [ToolSpec(name="look")])


# --- files ----------------------------------------------------------------------------------------------------


def questions_file(folder: Path, images: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text(json.dumps({"question": "What is it?", "answer": "red", "images": images}) + "\n")
    return path


@EVERY
def test_a_file_of_questions(name: str, tmp_path: Path) -> None:
    content = HOSTILE[name]()
    (tmp_path / "a.png").write_bytes(content)
    for images in ("a.png", [uri(content)]):
        with pytest.raises(InputError, match=r"questions.jsonl row 1: the image .* can't be used"):
            read_questions(questions_file(tmp_path, images))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ("../secret.png", "outside of the folder"),
        ("/etc/passwd", "outside of the folder"),
        ("link.png", "outside of the folder"),
        ("nowhere.png", "no such file"),
        ("pipe.png", "no such file"),
        ("a\x00.png", "can't be read|no such file"),
        ("http://169.254.169.254/latest", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ([3], "name files beside"),
        ({"bytes": "x"}, "name files beside"),
    ],
)
def test_a_file_of_questions_names_nothing_else(images: Any, reason: str, tmp_path: Path) -> None:
    import os

    (tmp_path / "secret.png").write_bytes(good())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(inside / "pipe.png")
    with pytest.raises(InputError, match=reason):
        read_questions(questions_file(inside, images))


@BROKEN_EXIF
def test_a_file_of_questions_with_pictures(tmp_path: Path) -> None:
    content, _ = ODD["turned by EXIF"]()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(content)
    (tmp_path / "b.png").write_bytes(good())
    first, second = (
        read_questions(questions_file(tmp_path, images))[0] for images in (["pictures/a.jpg", uri(good())], "b.png")
    )
    assert [load_image(image).size for image in first.metadata["images"]] == [(12, 24), (1, 1)]
    assert second.metadata["images"] == [uri(good())]
    assert first.id != second.id  # the same words about other pictures
    message = question_message(first)
    assert [part["type"] for part in message.content if isinstance(part, dict)] == ["image_url", "image_url", "text"]


@EVERY
def test_curation(name: str, tmp_path: Path) -> None:
    if name in ("text bomb", "tiff", "truncated"):
        pytest.skip("curation reads no pixels, and reads TIFF; what trains on it goes through the loader")
    content = HOSTILE[name]()
    store = ImageStore(tmp_path)
    reference = store.put_image(content)
    (tmp_path / "a.png").write_bytes(content)
    for image in (uri(content), reference, str(tmp_path / "a.png")):
        assert image_fault(Question(id="q", text="?", metadata={"images": [image]}), store)


def test_curation_reads_no_device_and_no_end_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.png").write_bytes(good() + b"\x00" * 1000)
    monkeypatch.setattr("metis_agent.curation.rl._MAX_BYTES", 1000)
    for image, reason in (("/dev/zero", "is no file"), (str(tmp_path / "large.png"), "more than 1,000 bytes")):
        assert reason in image_fault(Question(id="q", text="?", metadata={"images": [image]}), None)


@EVERY
def test_the_report(name: str, tmp_path: Path) -> None:
    if name in ("text bomb", "truncated"):
        pytest.skip("a browser draws what is there of it; its size is within the limit")
    content = HOSTILE[name]()
    store, pictures = ImageStore(tmp_path), Pictures()
    shown = [
        pictures.part_of(part, store)
        for part in (block(content), {"type": "image", "url": store.put_image(content) if content else ""})
    ]
    assert all(part["note"].startswith("image not shown: ") for part in shown)
    assert not pictures.embedded


def test_the_report_of_a_large_one_that_is_hostile(tmp_path: Path) -> None:
    """One that would have to be shrunk is decoded, so here the pixels count as well."""
    file = tmp_path / "a.png"
    Image.effect_noise((800, 800), 90).save(file)
    cut = file.read_bytes()[:400_000]
    pictures = Pictures()
    assert "can't be decoded" in pictures.part_of(block(cut), ImageStore(tmp_path))["note"]
    assert not pictures.embedded
