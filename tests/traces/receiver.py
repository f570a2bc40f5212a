"""A server at loopback that takes in what the real clients send, for exports of their own making."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Receiver", "receiver"]

_INFO = {
    "batch_ingest_config": {
        "use_multipart_endpoint": True, "size_limit": 100, "size_limit_bytes": 2**24, "scale_up_nthreads_limit": 1,
        "scale_up_qsize_trigger": 1000, "scale_down_nempty_trigger": 4,
    }
}  # fmt: skip


class Receiver:
    """What has come in, and what is given out."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str, bytes]] = []
        self.answers: dict[str, Any] = {"/info": _INFO}

    def langsmith_runs(self) -> list[dict[str, Any]]:
        """The runs as the server has them: what was posted, with what was patched."""
        runs: dict[str, dict[str, Any]] = {}
        for _, path, body in self.requests:
            if not path.endswith("/runs/multipart"):
                continue
            head, _, _ = body.partition(b"\r\n")
            mime = b'Content-Type: multipart/form-data; boundary="' + head[2:] + b'"\r\n\r\n'
            for part in BytesParser(policy=HTTP).parsebytes(mime + body).iter_parts():
                name = part.get_param("name", header="content-disposition")
                kind, id_, *field = str(name).split(".")
                if kind not in ("post", "patch"):
                    continue
                value = json.loads(part.get_payload(decode=True))
                runs.setdefault(id_, {}).update({field[0]: value} if field else value)
        return list(runs.values())

    def when(self, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
        """What the condition gives, once it gives something: clients send in their own time."""
        until = time.monotonic() + seconds
        while not (given := condition()):
            assert time.monotonic() < until, [(path, len(body)) for _, path, body in self.requests]
            time.sleep(0.05)
        return given

    def sent(self, ending: str) -> list[bytes]:
        """The bodies sent to paths with that ending."""
        return [body for _, path, body in self.requests if path.partition("?")[0].endswith(ending)]


@contextmanager
def receiver() -> Iterator[Receiver]:
    """A receiver, until the block ends."""
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            kept.requests.append((self.command, self.path, body))
            content = json.dumps(kept.answers.get(self.path.partition("?")[0], {})).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kept.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
