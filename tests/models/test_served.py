"""`ServedChatModel` on servers that do nothing where a call is required, as llama.cpp's does with some templates."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from langchain_core.tools import tool

from metis_agent.models.served import ServedChatModel
from metis_agent.types import UNMET

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

WHOLE = '{"name": "python", "arguments": {"code": "6 * 7"}}'


@tool
def python(code: str) -> str:
    """Run it."""
    return code


@tool
def search(query: str) -> str:
    """Search for it."""
    return query


class Server(ThreadingHTTPServer):
    """Answers "42", whatever is required of it; goes on with the assistant's own words, or not."""

    def __init__(self, *, goes_on: bool, repeats: bool = False, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.goes_on, self.repeats, self.refuses = goes_on, repeats, refuses
        self.requests: list[dict[str, Any]] = []

    def reply(self, messages: list[dict[str, Any]]) -> str:
        begun = str(messages[-1]["content"]) if messages[-1]["role"] == "assistant" else ""
        if not begun or not self.goes_on:
            return "42"
        assert WHOLE.startswith(begun)
        return WHOLE if self.repeats else WHOLE[len(begun) :]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(asked)
        refused = self.server.refuses and asked["messages"][-1]["role"] == "assistant"
        message = {"role": "assistant", "content": self.server.reply(asked["messages"])}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [
            {"index": 0, "message": message, "finish_reason": "stop"}]}).encode()  # fmt: skip
        self.send_response(400 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "the last message must be the user\'s"}}' if refused else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[Any]:
    started: list[Server] = []

    def start(**options: bool) -> Server:
        started.append(Server(**options))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def chat_on(server: Server) -> ServedChatModel:
    return ServedChatModel(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m", temperature=0.0)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(
    ("tools", "choice"), [([python], "any"), ([python, search], "python"), ([python, search], "any")]
)
def test_a_call_that_the_server_does_not_make_is_begun_for_the_model(
    serving: Any, repeats: bool, tools: list[Any], choice: str
) -> None:
    server = serving(goes_on=True, repeats=repeats)
    bound = chat_on(server).bind_tools(tools, tool_choice=choice)
    for _ in range(2):
        reply = bound.invoke("6 times 7?")
        assert [(call["name"], call["args"]) for call in reply.tool_calls] == [("python", {"code": "6 * 7"})]
        assert (reply.text, UNMET in reply.response_metadata) == ("", False)
    # Freely, required and begun; from then on it is not required of the server any more.
    assert ["tool_choice" in asked for asked in server.requests] == [False, True, False, False, False]


@pytest.mark.parametrize(("refuses", "begun"), [(False, 3), (True, 1)])
def test_where_the_server_does_not_go_on_the_reply_says_what_is_missing(
    serving: Any, refuses: bool, begun: int
) -> None:
    server = serving(goes_on=False, refuses=refuses)
    bound = chat_on(server).bind_tools([python], tool_choice="any")
    replies = [bound.invoke("6 times 7?") for _ in range(5)]
    assert [(it.text, it.tool_calls, it.response_metadata[UNMET]) for it in replies] == [("42", [], "any")] * 5
    assert [asked["messages"][-1]["role"] for asked in server.requests].count("assistant") == begun


def test_a_server_that_has_gone_on_with_a_call_is_tried_again_and_again(serving: Any) -> None:
    server = serving(goes_on=True)
    bound = chat_on(server).bind_tools([python], tool_choice="any")
    assert bound.invoke("6 times 7?").tool_calls
    server.goes_on = False
    assert all(UNMET in bound.invoke("6 times 7?").response_metadata for _ in range(4))
    server.goes_on = True
    assert bound.invoke("6 times 7?").tool_calls


def test_no_call_is_begun_where_none_is_required(serving: Any) -> None:
    server = serving(goes_on=True)
    for choice in ("auto", "none"):
        reply = chat_on(server).bind_tools([python], tool_choice=choice).invoke("6 times 7?")
        assert (reply.text, reply.tool_calls) == ("42", [])
    assert len(server.requests) == 2
