import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from metis_agent.errors import SandboxUnavailableError
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes import Sandbox, open_sandbox

_getaddrinfo = socket.getaddrinfo


@pytest.fixture
def resolver(monkeypatch):
    """Resolve numbers and localhost, which needs no network; pytest-socket warns of any resolving."""
    monkeypatch.setattr(socket, "getaddrinfo", _getaddrinfo)
    return _getaddrinfo


class Server(ThreadingHTTPServer):
    """A web server on 127.0.0.1 whose answers a test writes; a handler may take its time, or hang up."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.requests.append(self)
                answer(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

            def handle(self):
                with suppress(OSError):  # the client had enough
                    super().handle()

        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"


@pytest.fixture
def serve():
    """Start servers: `serve(answer)` where `answer(handler)` writes a reply."""
    servers = []

    def start(answer, tls=None):
        server = Server(answer)
        if tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(handler, body=b"", *, status=200, headers=()):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    if not any(name.lower() == "content-length" for name, _ in headers):
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(name="reply")
def reply_fixture():
    return reply


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        sandbox = open_sandbox()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    with sandbox:
        yield sandbox


@pytest.fixture
def tool(sandbox: Sandbox) -> Iterator[PythonTool]:
    tool = PythonTool(sandbox=sandbox)
    yield tool
    tool.close()
