"""A model behind OpenAI's protocol on loopback, which really looks at the pictures that it is sent.

It sees what is large. What is small it guesses wrongly, until a tool has shown it. Left to itself it calls the tool for
everything small, and for what is red. It finds the option of what it sees in the question's own text.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

from tests.evaluation.benchmarks.copies import COLOURS

_OPTION = re.compile(r"(?:^|[;\n])\s*(?:Options: )?[(]?([A-E])[.)]\s*(\w+)")
_TRUTH = re.compile(r"The truth is <(.*?)>")


class Endpoint(ThreadingHTTPServer):
    """Counts what it is asked."""

    daemon_threads = True
    arguments: str = "{}"
    tool: str = "look"
    fail_after: int | None = None
    """Requests that are answered before it is down."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        with self._lock:
            self.requests.append(asked)
            if self.fail_after is not None and len(self.requests) > self.fail_after:
                return None
        messages = asked["messages"]
        user = next(message for message in messages if message["role"] == "user")
        if isinstance(user["content"], str):  # an extractor's or a judge's prompt
            return {"role": "assistant", "content": extracted(user["content"])}
        colour, small = seen(user["content"])
        text = "".join(block.get("text", "") for block in user["content"])
        looked = any(message["role"] == "tool" for message in messages)
        forced = asked.get("tool_choice") not in (None, "auto", "none")
        if asked.get("tools") and not looked and (forced or small or colour == "red"):
            call = {"name": self.tool, "arguments": self.arguments}
            return {
                "role": "assistant", "content": None,
                "tool_calls": [{"id": f"call-{len(self.requests)}", "type": "function", "function": call}],
            }  # fmt: skip
        return {"role": "assistant", "content": answered(text, colour, right=looked or not small)}


def seen(content: list[dict[str, Any]]) -> tuple[str, bool]:
    uri = next(block["image_url"]["url"] for block in content if block["type"] == "image_url")
    image = Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    return next(name for name, value in COLOURS.items() if value == (red, green, blue & ~1)), bool(blue & 1)


def answered(text: str, colour: str, *, right: bool) -> str:
    options = {name: letter for letter, name in _OPTION.findall(text)}
    if not options:
        truth = _TRUTH.findall(text)[0]
        return f"So the answer is {truth}" if right else "It is 99."
    names = list(COLOURS)
    letter = options[colour if right else names[(names.index(colour) + 1) % 4]]
    return f"<Thought process>: seen. <Answer>: <<{letter}>>" if "<Answer>" in text else f"The answer is {letter}."


def extracted(prompt: str) -> str:
    """What an extractor answers: what stands after "the answer is" in the reply that is shown last."""
    found = re.findall(r"Reply: (?:So the answer is |It is |The answer is )(.*)\nAnswer:", prompt)
    return found[-1].rstrip(".") if found else "-"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = self.server.reply(asked)
        finish = "tool_calls" if message and message.get("tool_calls") else "stop"
        reply = {
            "id": "chat", "object": "chat.completion", "created": 1, "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        body = json.dumps(reply if message else {"error": {"message": "down"}}).encode()
        self.send_response(200 if message else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
