"""A small server that speaks E2B's protocol over HTTP, as the SDK's source has it, and runs the code for real.

Control plane (`X-API-KEY`): `POST /v2/sandboxes`, `POST /v2/sandboxes/ID/connect`, `POST /sandboxes/ID/timeout`,
`DELETE /sandboxes/ID`. Of a sandbox, told apart by the header `E2b-Sandbox-Id`: envd's `/health` and `/files`, and
the code interpreter's `/health` and `/execute`, which streams lines of JSON. A sandbox that is not running answers
502, as E2B's edge does; one whose time is over is gone. Each sandbox has a process of its own, see `e2b_kernel`.

A test sets `fault` for what the next `/execute` does, or `create_fault` for what making a sandbox does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from metis_agent.tools.sandboxes.machine import inside_folder

KEY = "e2b_0123456789abcdef"
NOT_FOUND = "The sandbox was not found"
KERNEL = Path(__file__).with_name("e2b_kernel.py")


class Sandbox:
    def __init__(self, lifetime: float, internet: bool) -> None:
        self.id = f"i{uuid.uuid4().hex[:20]}"
        self.token = uuid.uuid4().hex
        self.folder = tempfile.mkdtemp(prefix="metis-e2b-")
        self.internet = internet
        self.paused = self.removed = False
        self.turn = threading.Lock()
        self.extend(lifetime)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(KERNEL), inside_folder(), self.folder, str(self.internet)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What runs here is somebody else's code on somebody else's machine.
            env={"PATH": os.defpath},
            start_new_session=True,
        )

    def extend(self, lifetime: float) -> None:
        self.ends = time.monotonic() + lifetime

    def messages(self, code: str) -> Iterator[bytes]:
        with self.turn:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(json.dumps(code).encode() + b"\n")
                self.process.stdin.flush()
                for line in self.process.stdout:
                    yield line
                    if line.startswith(b'{"type": "end_of_execution"'):
                        return
            except GeneratorExit:
                # The client is gone: Jupyter is told to interrupt.
                os.kill(self.process.pid, signal.SIGINT)
                for line in self.process.stdout:
                    if line.startswith(b'{"type": "end_of_execution"'):
                        break
                raise
            except BrokenPipeError:
                pass
            if self.removed:
                raise ConnectionAbortedError
            # Jupyter starts the process again, and E2B says so.
            self.kill_process()
            self.start()
            error = {"type": "error", "name": "ContextRestarting", "value": "Context was restarted", "traceback": ""}
            yield json.dumps(error).encode() + b"\n"
            yield b'{"type": "end_of_execution"}\n'

    def kill_process(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()

    def kill(self) -> None:
        self.removed = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.turn:
            self.kill_process()
        shutil.rmtree(self.folder, ignore_errors=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: E2BServer

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_DELETE(self) -> None:
        self.serve()

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        if path.startswith(("/sandboxes", "/v2/sandboxes")):
            self.control(path.removeprefix("/v2").split("/")[2:])
        else:
            self.in_sandbox(path)

    # --- the control plane -------------------------------------------------------------------------------------------

    def control(self, parts: list[str]) -> None:
        if self.headers.get("X-API-KEY") != KEY:
            self.answer(401, {"code": 401, "message": "Invalid API key"})
            return
        if not parts:
            self.create()
            return
        sandbox = self.server.found(parts[0])
        if sandbox is None:
            self.answer(404, {"code": 404, "message": f"Sandbox {parts[0]} not found"})
        elif self.command == "DELETE":
            self.server.remove(sandbox)
            self.answer(204)
        else:
            sandbox.extend(json.loads(self.body)["timeout"])
            if parts[1] == "connect":
                sandbox.paused = False
                self.answer(200, self.server.described(sandbox))
            else:
                self.answer(204)

    def create(self) -> None:
        fault, self.server.create_fault = self.server.create_fault, None
        if fault == "stall":
            self.server.wait(self.server.stall_seconds)
        elif fault is not None:
            self.answer(int(fault), {"code": int(fault), "message": "not now"})
            return
        wanted = json.loads(self.body)
        sandbox = Sandbox(wanted["timeout"], wanted.get("allow_internet_access", True))
        self.server.sandboxes[sandbox.id] = sandbox
        self.server.made += 1
        self.answer(201, self.server.described(sandbox))

    # --- a sandbox ---------------------------------------------------------------------------------------------------

    def in_sandbox(self, path: str) -> None:
        self.server.in_sandbox_headers.append(dict(self.headers))
        sandbox = self.server.found(self.headers.get("E2b-Sandbox-Id", ""))
        if sandbox is None or sandbox.paused:
            self.answer(502, {"message": NOT_FOUND, "code": 502})
        elif path == "/health":
            self.answer(204)
        elif self.headers.get("X-Access-Token") != sandbox.token:
            self.answer(401, {"message": "Invalid access token"})
        elif path == "/files":
            self.upload(sandbox)
        else:
            self.execute(sandbox, json.loads(self.body)["code"])

    def upload(self, sandbox: Sandbox) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        written = []
        for part in message_from_bytes(head + self.body).get_payload():
            path = Path(sandbox.folder, part.get_filename())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(part.get_payload(decode=True))
            written.append({"name": path.name, "type": "file", "path": str(path)})
        self.answer(200, written)

    def execute(self, sandbox: Sandbox, code: str) -> None:
        fault, self.server.fault = self.server.fault, None
        if fault == "stall before the head":
            self.server.wait(self.server.stall_seconds)
            return
        if fault in ("401", "500"):
            self.answer(int(fault), {"message": "failed"})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault in self.server.SENT:
            self.chunk(self.server.SENT[fault])
        elif fault == "stall":
            self.server.wait(self.server.stall_seconds)
        elif fault == "drip":
            while not self.server.stopped.wait(0.01):
                self.chunk(b" ")
        elif fault == "cut":
            self.chunk(b'{"type": "stdout", "text": "half of')
            self.hang_up()
            return
        else:
            self.stream(sandbox, code)
        self.chunk(b"")

    def stream(self, sandbox: Sandbox, code: str) -> None:
        messages = sandbox.messages(code)
        watch = threading.Thread(target=self.interrupt_when_gone, args=(sandbox,), daemon=True)
        self.streaming = True
        watch.start()
        try:
            for line in messages:
                self.chunk(line)
        except ConnectionAbortedError:
            self.hang_up()
        except OSError:
            messages.close()
        finally:
            self.streaming = False
            watch.join()

    def interrupt_when_gone(self, sandbox: Sandbox) -> None:
        """A client that hangs up is noticed also where the code prints nothing."""
        while self.streaming:
            self.connection.settimeout(None)
            with suppress(OSError, ValueError):
                if self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                    with suppress(ProcessLookupError):
                        os.kill(sandbox.process.pid, signal.SIGINT)
                    return
            time.sleep(0.02)

    def chunk(self, content: bytes) -> None:
        self.server.sent += len(content)
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def noticed(ended: socket.socket) -> bool:
    """Whether the other side has been told: the state is neither TCP_ESTABLISHED nor TCP_FIN_WAIT1."""
    return sys.platform != "linux" or ended.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] not in (1, 4)


class E2BServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    SENT = {  # noqa: RUF012
        "no JSON": b"<html>\n",
        "no object": b"[1]\n",
        "no text": b'{"type": "stdout", "text": 5, "timestamp": "now"}\n',
        "no image": b'{"type": "result", "png": {"a": 1}, "is_main_result": true}\n',
        "deep": b"[" * 100_000 + b"\n",
        "cut between lines": b'{"type": "stdout", "text": "half", "timestamp": "now"}\n',
    }

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.sandboxes: dict[str, Sandbox] = {}
        self.connections: set[socket.socket] = set()
        self.requests: list[tuple[str, str]] = []
        self.in_sandbox_headers: list[dict[str, str]] = []
        self.made = self.sent = 0
        self.fault: str | None = None
        self.create_fault: str | None = None
        self.stall_seconds = 60.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def wait(self, seconds: float) -> None:
        self.stopped.wait(seconds)

    def found(self, sandbox_id: str) -> Sandbox | None:
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is not None and time.monotonic() > sandbox.ends:
            self.remove(sandbox)
            return None
        return sandbox

    def remove(self, sandbox: Sandbox) -> None:
        if self.sandboxes.pop(sandbox.id, None):
            sandbox.kill()

    def described(self, sandbox: Sandbox) -> dict[str, str]:
        return {
            "templateID": "code-interpreter-v1",
            "sandboxID": sandbox.id,
            "clientID": "client",
            "envdVersion": "0.6.4",
            "envdAccessToken": sandbox.token,
        }

    def die(self) -> None:
        """Go at once, connections and all; the sandboxes stay, as other machines would."""
        self.stopped.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError), connection.dup() as ours:
                ours.shutdown(socket.SHUT_RDWR)
                # A client that had not noticed would send its next request, and not know what became of it.
                deadline = time.monotonic() + 1
                while not noticed(ours) and time.monotonic() < deadline:
                    time.sleep(0.001)

    def stop(self) -> None:
        if not self.stopped.is_set():
            self.die()
        for sandbox in list(self.sandboxes.values()):
            self.remove(sandbox)


@contextmanager
def e2b_server() -> Iterator[E2BServer]:
    server = E2BServer()
    try:
        yield server
    finally:
        server.stop()
