"""A loopback server that plays a script of replies in the wire formats of five provider APIs.

Each format is a `Dialect`: it writes a reply as the provider would, whole or as a stream, and refuses a request
that the provider refuses, by rules written from its documentation. A test plays a script and reads what was asked,
and what was refused.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from langchain_core.utils.json import parse_partial_json

__all__ = ["Call", "Dialect", "Refused", "Reply", "Wire", "halves", "words"]


@dataclass(frozen=True)
class Call:
    """One call of a client-side tool, as a model makes it."""

    tool: str
    arguments: dict[str, Any] | str
    """A string goes out as it is: broken JSON, JSON cut short, or the input of a free-form tool."""
    id: str | None = None
    """`None` for one that the server makes up."""
    free: bool = False
    """True for OpenAI's free-form tools."""

    @property
    def raw(self) -> str:
        """The arguments as JSON."""
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as far as they can be read, as providers give them that have parsed them already."""
        if isinstance(self.arguments, dict):
            return self.arguments
        try:
            found = parse_partial_json(self.arguments)
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Reply:
    """What a model says, in no provider's format; each dialect writes as much of it as its provider has."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    refusal: str = ""
    searched: str = ""
    """The query of a web search that ran at the provider."""
    end: str = ""
    """`length`, `filter` or `pause`, where it did not end by itself."""


class Refused(Exception):
    """The provider answers this request with an error 400."""


class Dialect:
    """One provider's wire format. An instance serves one script, and remembers what it has given."""

    path: ClassVar[str]
    """What the paths of its requests hold."""

    def __init__(self) -> None:
        self._count = 0

    def new_id(self, prefix: str) -> str:
        """An id that this script has not had."""
        self._count += 1
        return f"{prefix}{self._count:04d}"

    def check(self, body: dict[str, Any]) -> None:
        """Refuse what the provider refuses.

        Raises:
            Refused: with the provider's reason.
        """
        raise NotImplementedError

    def document(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        """The reply in one piece."""
        raise NotImplementedError

    def events(self, document: dict[str, Any], body: dict[str, Any]) -> Iterator[bytes]:
        """The same as a stream."""
        raise NotImplementedError

    def is_streamed(self, path: str, body: dict[str, Any]) -> bool:
        """Whether the request asks for a stream."""
        return bool(body.get("stream"))

    def error(self, reason: str) -> dict[str, Any]:
        """The body of an error 400."""
        return {"type": "error", "error": {"type": "invalid_request_error", "message": reason}}


@dataclass
class _Play:
    script: Sequence[Reply]
    dialects: list[Dialect]
    asked: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str, bytes]:
        dialect = next(dialect for dialect in self.dialects if dialect.path in path)
        reply = self.script[min(len(self.asked), len(self.script) - 1)]
        self.asked.append(body)
        try:
            dialect.check(body)
        except Refused as error:
            self.refused.append(f"request {len(self.asked)}: {error}")
            return 400, "application/json", json.dumps(dialect.error(str(error))).encode()
        document = dialect.document(reply, body)
        if not dialect.is_streamed(path, body):
            return 200, "application/json", json.dumps(document).encode()
        kind = "application/vnd.amazon.eventstream" if "converse" in path else "text/event-stream"
        return 200, kind, b"".join(dialect.events(document, body))


class Wire:
    """The server. One script is played at a time, the last reply for ever after.

    Args:
        dialects: the formats that it speaks, told apart by the paths of requests.
    """

    def __init__(self, *dialects: type[Dialect]) -> None:
        self._dialects = dialects
        self._play = _Play([Reply("unasked")], [])
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                wire._play.raw.append(raw)
                status, kind, data = wire._play.answer(self.path, json.loads(raw))
                self.send_response_only(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                # Or connections would outlive the event loop that a client has opened them in.
                self.send_header("connection", "close")
                if status != 200:
                    self.send_header("x-amzn-errortype", "ValidationException")
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def play(self, *script: Reply) -> None:
        """Begin a script; what was asked before is forgotten."""
        self._play = _Play(script, [dialect() for dialect in self._dialects])

    def go_on(self, *script: Reply) -> None:
        """The same conversation, with other replies from here on."""
        self._play.script = [*[Reply()] * len(self.asked), *script]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all requests of this script."""
        return self._play.asked

    @property
    def raw(self) -> list[bytes]:
        """The same, to the byte."""
        return self._play.raw

    @property
    def refused(self) -> list[str]:
        """Why requests of this script were refused."""
        return self._play.refused

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no failure of the server."""

    def shutdown_request(self, request: Any) -> None:
        if isinstance(request, socket.socket):
            request.close()


def words(text: str) -> list[str]:
    """The text in the pieces in which a stream brings it."""
    return text.replace(" ", " \0").split("\0") if text else []


def halves(text: str) -> tuple[str, str]:
    """JSON in two pieces, cut where it can't be read."""
    return text[: len(text) // 2], text[len(text) // 2 :]
