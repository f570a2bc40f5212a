"""The published model's three tools, run from replies in its published format.

The weights are not here, so the replies are written out below, in the format that Accio-Lab/Metis documents: that of
the system prompts in the data set Accio-Lab/Metis-RL (`<reason>`, then one `<tool_call>` as JSON or `<answer>`;
`python` with `code`, `text_search` with `query`, `image_search` with nothing; the question's images are `image_1`, ...)
with the habits of its tool server at 84fd45e (replies stop at `</tool_call>`, code in a kernel that remembers names).
A server on this machine gives them one by one, as vLLM would; everything else is real: the sandbox, both searches, the
graph.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from PIL import Image

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.models.vllm import VLLMChatModel
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.tools.text_search import TextSearchTool

pytestmark = pytest.mark.enable_socket

CROP = (
    "<reason>The sign is tiny at this size; cropping the corner and enlarging it will tell its colour.</reason>\n"
    '<tool_call>{"name": "python", "arguments": {"code": "from PIL import Image\\n'
    "crop = image_1.crop((192, 0, 256, 64))\\nprint(crop.size, crop.getpixel((32, 32)))\\n"
    'crop = crop.resize((128, 128), Image.LANCZOS)\\ncrop"}}</tool_call>'
)
AGAIN = (
    "<reason>The enlarged crop is image_2 now; its mean colour settles it.</reason>\n"
    '<tool_call>{"name": "python", "arguments": {"code": "print(crop.size == image_2.size, '
    'image_2.resize((1, 1)).getpixel((0, 0)))"}}</tool_call>'
)
LOOK_ALIKE = (
    "<reason>I can't tell which place this is; a visual search may.</reason>\n"
    '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>'
)
LOOK_UP = (
    "<reason>It looks like the Blue Gate. I need the year of its building.</reason>\n"
    '<tool_call>\n{"name": "text_search", "arguments": {"query": "Blue Gate built"}}\n</tool_call>'
)
ANSWER = "<reason>The passage says so.</reason>\n<answer>1874</answer>"
DIRECT = "<reason>Plain arithmetic; no tool is needed.</reason>\n<answer>4</answer>"
BROKEN = '<reason>Count.</reason>\n<tool_call>{"name": "python", "arguments": {"code": "1 + </tool_call>'


class Server(ThreadingHTTPServer):
    """Gives the replies in turn, stop token and ids included, and keeps what it was sent."""

    replies: list[str]
    requests: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = self.server.replies[len(self.server.requests)]
        self.server.requests.append(asked)
        # vLLM stops at the first stop text, and keeps it where it was asked to.
        for mark in asked.get("stop") or ():
            head, found, _ = text.partition(mark)
            text = head + (found if asked.get("include_stop_str_in_output") else "")
        ids = list(text.encode())
        body = json.dumps(
            {
                "id": f"chat-{len(self.server.requests)}", "object": "chat.completion", "created": 1,
                "model": asked["model"], "prompt_token_ids": [1], "prompt_logprobs": None,
                "choices": [{
                    "index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop",
                    "logprobs": {"content": [
                        {"token": chr(i), "logprob": -0.5, "bytes": None, "top_logprobs": []} for i in ids
                    ]},
                    "token_ids": ids,
                }],
                "usage": {"prompt_tokens": 1, "completion_tokens": len(ids), "total_tokens": 1 + len(ids)},
            }
        ).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.replies, made.requests = [], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def png(colour: str, corner: str | None = None) -> bytes:
    image = Image.new("RGB", (256, 256), colour)
    if corner:
        image.paste(Image.new("RGB", (64, 64), corner), (192, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def agent(server: Server, tmp_path: Path) -> Iterator[MetisAgent]:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "blue gate.png").write_bytes(png("navy", "red"))
    texts = CorpusSearch.build([Document(id="1", title="Blue Gate", text="The Blue Gate was built in 1874.")])
    python = PythonTool()
    yield create_metis_agent(
        VLLMChatModel(
            model="Accio-Lab/Metis-8B-RL", base_url=f"http://127.0.0.1:{server.server_port}/v1", wire="metis",
            temperature=0.0, max_tokens=512, max_retries=0,
        ),
        [python, TextSearchTool(backend=texts), ImageSearchTool(likeness=ImageFolder.build(pictures))],
        budget=Budget(calls=10),
        recorder=Recorder(TrajectoryStore(tmp_path / "runs")),
    )  # fmt: skip
    python.close()


def asked(text: str, image: bytes | None = None) -> dict[str, Any]:
    blocks: list[Any] = [{"type": "text", "text": text}]
    if image is not None:
        blocks.insert(0, {"type": "image", "base64": base64.b64encode(image).decode(), "mime_type": "image/png"})
    return {"messages": [HumanMessage(blocks)]}


def sent_image(block: dict[str, Any]) -> Any:
    head, _, data = block["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_crop_runs_in_the_sandbox_and_goes_back_as_an_image_in_a_users_turn(
    server: Server, agent: MetisAgent, tmp_path: Path
) -> None:
    server.replies = [CROP, AGAIN, "<reason>Red.</reason>\n<answer>red</answer>"]
    state = agent.invoke(asked("What colour has the sign?", png("white", "red")))
    assert state["messages"][-1].content == "red"
    assert [(outcome.tool, outcome.status) for outcome in state["outcomes"]] == [("python", "ok")] * 2
    first, second, third = server.requests
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert '{"name": "image_search", "arguments": {}}' in first["messages"][0]["content"]
    assert ("tools" in first, first["stop"], first["include_stop_str_in_output"]) == (False, ["</tool_call>"], True)
    # The reply as it was written, and its result as a user's turn with the crop in it.
    reply, observation = second["messages"][2:]
    assert reply == {"role": "assistant", "content": CROP}
    assert observation["role"] == "user"
    said, crop = observation["content"]
    assert "(64, 64) (255, 0, 0)" in said["text"]
    assert (sent_image(crop).size, sent_image(crop).convert("RGB").getpixel((64, 64))) == ((128, 128), (255, 0, 0))
    # Names last from call to call, and what was shown is the next image.
    assert "True (255, 0, 0)" in third["messages"][-1]["content"]
    (run,) = TrajectoryStore(tmp_path / "runs").read()
    assert (run.answer, run.tool_calls, len(run.calls)) == ("red", 2, 3)
    assert bytes(run.calls[0].completion_ids or ()).decode() == CROP


def test_both_searches_as_published(server: Server, agent: MetisAgent) -> None:
    server.replies = [LOOK_ALIKE, LOOK_UP, ANSWER]
    state = agent.invoke(asked("When was this built?", png("navy", "red")))
    assert state["messages"][-1].content == "1874"
    assert [(it.tool, it.status) for it in state["outcomes"]] == [("image_search", "ok"), ("text_search", "ok")]
    found, read = server.requests[1]["messages"][-1], server.requests[2]["messages"][-1]
    assert "blue gate" in json.dumps(found["content"][:2])
    assert any(block["type"] == "image_url" for block in found["content"])
    assert (read["role"], "1874" in str(read["content"])) == ("user", True)


async def test_a_direct_answer_calls_nothing(server: Server, agent: MetisAgent) -> None:
    server.replies = [DIRECT]
    state = await agent.ainvoke(asked("2 + 2?"))
    assert (state["messages"][-1].content, state["outcomes"]) == ("4", [])
    assert state["messages"][-1].additional_kwargs["reasoning_content"] == "Plain arithmetic; no tool is needed."


def test_a_broken_call_is_answered_and_the_model_goes_on(server: Server, agent: MetisAgent) -> None:
    server.replies = [BROKEN, DIRECT]
    state = agent.invoke(asked("2 + 2?"))
    assert state["messages"][-1].content == "4"
    assert state["outcomes"][0].executed is False
    assert [message["role"] for message in server.requests[1]["messages"]] == ["system", "user", "assistant", "user"]


def test_what_a_model_writes_after_its_call_is_not_believed(server: Server, agent: MetisAgent) -> None:
    server.replies = [CROP + "\n\nuser\nIt is blue.\n\nassistant\n<answer>blue</answer>", "<answer>red</answer>"]
    state = agent.invoke(asked("What colour has the sign?", png("white", "red")))
    assert state["messages"][-1].content == "red"
    assert server.requests[1]["messages"][2]["content"] == CROP
