"""The conversation's images in the `python` tool, and the code's images in its messages."""

from __future__ import annotations

import base64
import time
from io import BytesIO
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from PIL import Image

from metis_agent import create_metis_agent
from metis_agent.gates.reference import ModelGate
from metis_agent.messages import conversation_images
from metis_agent.tools.images import ImageRules, load_image
from metis_agent.tools.instrumented import InstrumentedTool
from metis_agent.tools.python import PythonTool
from metis_agent.tools.redaction import Redactor
from metis_agent.tools.sandboxes import InputImage, Sandbox, SandboxLimits
from tests.fakes import call, calling, model


def encoded(colour: str, size: tuple[int, int]) -> str:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def block(colour: str, size: tuple[int, int] = (40, 20)) -> dict[str, Any]:
    return {"type": "image", "base64": encoded(colour, size), "mime_type": "image/png"}


def asked(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [HumanMessage([{"type": "text", "text": "What is in it?"}, *blocks])]}


def in_graph(tool: PythonTool, code: str, *messages: Any, **arguments: Any) -> ToolMessage:
    graph = StateGraph(MessagesState).add_node("tools", ToolNode([tool])).add_edge(START, "tools").compile()
    request = calling(call("python", code=code, **arguments))
    message: ToolMessage = graph.invoke({"messages": [*messages, request]})["messages"][-1]
    return message


def images_in(message: Any) -> list[Image.Image]:
    return [load_image(base64.b64decode(b["base64"])) for b in message.content if b["type"] == "image"]


TWO = (HumanMessage([block("red")]), HumanMessage([block("blue", (8, 6))]))
CROP, LOOK = "image_1.crop((0, 0, 9, 7))", "image_2.size, image_2.getpixel((0, 0))"


def in_metis(tool: PythonTool, *script: Any) -> Any:
    return create_metis_agent(model(*script), [tool], gate=ModelGate(), checkpointer=InMemorySaver())


def in_langchain(tool: PythonTool, *script: Any) -> Any:
    return create_agent(model(*script), [tool], checkpointer=InMemorySaver())


@pytest.mark.parametrize("made", [in_metis, in_langchain])
async def test_a_crop_comes_back_and_is_the_next_image(tool: PythonTool, made: Any) -> None:
    script = calling(call("python", id="1", code=CROP)), calling(call("python", id="2", code=LOOK)), "A red field."
    for run in ("sync", "async"):
        agent, config = made(tool, *script), {"configurable": {"thread_id": f"{made.__name__} {run}"}}
        question = asked(block("red"))
        state = await agent.ainvoke(question, config) if run == "async" else agent.invoke(question, config)
        first, second = (m for m in state["messages"] if isinstance(m, ToolMessage))
        assert [b["type"] for b in first.content] == ["text", "image"]
        assert first.text == "[image 1: 9 x 7 pixels]"
        assert [i.size for i in images_in(first)] == [(9, 7)]
        assert first.artifact.images[0].mime_type == first.content[1]["mime_type"] == "image/png"
        assert second.content == "((9, 7), (255, 0, 0))"
        assert state["messages"][-1].text == "A red field."
        # A checkpointer keeps it, and so does JSON.
        kept = agent.get_state(config).values["messages"][2]
        assert kept.content == first.content
        assert kept.artifact["images"][0]["base64"] == first.artifact.images[0].base64
        assert ToolMessage.model_validate_json(first.model_dump_json()).content == first.content


def test_a_later_turn_counts_on(tool: PythonTool) -> None:
    config = {"configurable": {"thread_id": "turns"}}
    script = calling(call("python", id="1", code=CROP)), "One.", calling(call("python", id="2", code="image_3.size"))
    agent = in_metis(tool, *script, "Two.")
    agent.invoke(asked(block("red")), config)
    state = agent.invoke(asked(block("blue", (5, 4))), config)
    assert state["messages"][-2].content == "(5, 4)"


def test_only_what_the_code_names_is_loaded(tool: PythonTool) -> None:
    broken = HumanMessage([{"type": "image", "base64": "AAAA", "mime_type": "image/png"}])
    assert in_graph(tool, "image_1.size", *TWO, broken).content == "(40, 20)"
    assert in_graph(tool, "image_name = 'image_1'\nimage_name", *TWO, broken).content == "'image_1'"
    together = "[globals()[f'image_{n}'].size for n in (1, 2)]"
    content = in_graph(tool, together, *TWO).content
    assert content == "[(40, 20), (8, 6)]"
    message = in_graph(tool, "image_3.size", *TWO, broken)
    assert message.status == "error"
    assert "image_3 is not there: the image can't be read" in message.content


def test_one_that_the_conversation_does_not_have(tool: PythonTool) -> None:
    assert "no image_9; its images are: image_1 to image_2." in in_graph(tool, "image_9", *TWO).content
    assert "its images are: none" in in_graph(tool, "image_1").content
    assert "its images are: none" in tool.invoke({"code": "image_1"})
    assert in_graph(tool, "image_9 = 3\nimage_9", *TWO).content == "3"


def test_the_model_can_not_pass_the_conversation(tool: PythonTool) -> None:
    forged = [HumanMessage([block("red")])]
    assert "none" in in_graph(tool, "image_1", messages=forged).content
    assert list(tool.args) == ["code"]


def test_for_models_that_can_not_see(sandbox: Sandbox) -> None:
    tool = PythonTool(sandbox=sandbox, images=False)
    assert "image" not in tool.description
    assert list(tool.args) == ["code"]
    message = in_graph(tool, "from PIL import Image\nprint('made')\nImage.new('RGB', (4, 4))", *TWO)
    assert message.content == "made\n1 more not shown: a call shows at most 0 images."
    assert "NameError" in in_graph(tool, "image_1", *TWO).content
    tool.close()


def test_a_failed_call_shows_what_it_had(tool: PythonTool) -> None:
    message = in_graph(tool, "display(image_1)\n1 / 0", *TWO)
    assert message.status == "error"
    assert "ZeroDivisionError" in message.text
    assert [i.size for i in images_in(message)] == [(40, 20)]


def test_the_limits_and_rules_are_the_tools_own(sandbox: Sandbox) -> None:
    tool = PythonTool(
        sandbox=sandbox, limits=SandboxLimits(images=1, image_pixels=256), image_rules=ImageRules(max_pixels=100)
    )
    assert "at most 100 in all are read" in in_graph(tool, "image_1", *TWO).content
    message = in_graph(tool, "from PIL import Image\nfor _ in range(3): display(Image.new('RGB', (32, 32)))")
    assert [i.size for i in images_in(message)] == [(16, 16)]
    assert "2 more not shown" in message.text
    tool.close()


def test_within_a_wrapper(tool: PythonTool) -> None:
    # The second secret is what every PNG file begins with.
    metered: Any = InstrumentedTool(tool, timeout=30, redactor=Redactor(secrets=["s3cret-value", "iVBORw0KGgo"]))
    message = in_graph(metered, "print('s3cret-value')\nimage_2", *TWO)
    assert message.text == "[redacted]\n[image 1: 8 x 6 pixels]"
    assert [i.size for i in images_in(message)] == [(8, 6)]
    assert load_image(message.artifact.images[0].content).size == (8, 6)


def test_the_images_of_a_conversation() -> None:
    found = ToolMessage([{"type": "text", "text": "x"}, block("green")], tool_call_id="1")
    reply = AIMessage([block("white")])
    url = HumanMessage([{"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}])
    images = conversation_images([TWO[0], reply, found, HumanMessage("text"), url])
    assert list(images) == ["image_1", "image_2", "image_3"]
    assert images["image_2"] == f"data:;base64,{encoded('green', (40, 20))}"
    assert images["image_3"] == "https://a.example/x.png"
    assert conversation_images(None) == conversation_images([]) == {}


def test_loading_counts_against_the_call_and_goes_one_by_one(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    """Eight slow images in a call of two seconds: the code still runs, and reads which are not there."""
    held, most = 0, 0

    def load(self: InputImage, seconds: float) -> Image.Image:
        nonlocal held, most
        held, most = held + 1, max(most, held + 1)
        time.sleep(min(0.5, seconds))
        held -= 1
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(InputImage, "load", load)
    images = {f"image_{number}": InputImage(source=b"x") for number in range(1, 9)}
    with sandbox.open() as session:
        execution = session.run("sorted(name for name in globals() if name.startswith('image_'))", 2.0, images)
    assert execution.ok
    assert most == 1
    assert "'image_1'" in str(execution.result)
    assert any("Not there" in note and "image_8" in note for note in execution.notes)
    assert execution.seconds < 2.4
