"""LangGraph's own tools on the packaged graph: the server answers, the drawing shows the loop, decisions are traced."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from metis_agent.graphs import metis
from metis_agent.graphs.metis import graph
from tests.fakes import model

ROOT = Path(__file__).parents[2]

# What LangSmith's own server says of itself.
INGEST = {
    "use_multipart_endpoint": True, "size_limit": 100, "size_limit_bytes": 20_971_520, "scale_up_nthreads_limit": 4,
    "scale_up_qsize_trigger": 1000, "scale_down_nempty_trigger": 4,
}  # fmt: skip

TRACED = """
from langchain_core.tracers.langchain import wait_for_all_tracers
from metis_agent import NeverGate, create_metis_agent
from tests.fakes import call, calling, model

def lookup(word: str) -> str:
    "Look a word up."
    return word

chat = model(calling(call("lookup", word="x")), "five")
if MIDDLEWARE:
    from langchain.agents import create_agent
    from metis_agent import MetisGateMiddleware
    agent = create_agent(chat, [lookup], middleware=[MetisGateMiddleware(NeverGate())])
else:
    agent = create_metis_agent(chat, [lookup], gate=NeverGate())
print(agent.invoke({"messages": [("user", "2 + 3?")]})["messages"][-1].text)
wait_for_all_tracers()
"""


def test_the_graph_is_made_once_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("METIS_MODEL", "METIS_GATE"):
        monkeypatch.delenv(name, raising=False)
    agent = asyncio.run(graph())
    assert agent is asyncio.run(graph())
    result = agent.invoke({"messages": [("user", "What is 4821 * 7310?")]})
    assert result["messages"][-1].text == "35241510"


def test_the_environment_names_model_and_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METIS_GATE", str(tmp_path / "no-gate"))
    with pytest.raises(OSError, match="no-gate"):
        asyncio.run(graph())
    monkeypatch.delenv("METIS_GATE")
    monkeypatch.setenv("METIS_MODEL", "openai:gpt-5")
    monkeypatch.setattr("langchain.chat_models.init_chat_model", lambda name: model(f"I am {name}"))
    try:
        assert asyncio.run(graph()).invoke({"messages": [("user", "hi")]})["messages"][-1].text == "I am openai:gpt-5"
    finally:
        metis._agent.cache_clear()


def test_langgraph_json_names_the_graph() -> None:
    place, _, name = json.loads((ROOT / "langgraph.json").read_text())["graphs"]["metis"].partition(":")
    assert (ROOT / place).resolve() == Path(metis.__file__).resolve()
    assert getattr(metis, name) is graph


def test_the_drawing_shows_the_loop() -> None:
    from metis_agent import create_metis_agent

    def lookup(word: str) -> str:
        """Look a word up."""
        return word

    drawn = create_metis_agent(model(), [lookup]).get_graph().draw_mermaid()
    edges = {line.strip("\t ;") for line in drawn.splitlines() if "-->" in line or "-.->" in line}
    found = {tuple(edge.replace(" ", "").replace("-.->", "-->").split("-->")) for edge in edges}
    assert {("__start__", "gate"), ("gate", "act"), ("gate", "answer"), ("act", "lookup"), ("lookup", "gate")} <= found
    assert any(end == "__end__" for _, end in found)


@pytest.fixture
def collector(socket_enabled: None) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that takes whatever is sent to it: its address, and (path, body) of each request."""
    taken: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(json.dumps({"batch_ingest_config": INGEST}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not body and self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            encoding = self.headers.get("Content-Encoding")
            if encoding == "gzip":
                body = gzip.decompress(body)
            elif encoding == "zstd":
                import zstandard

                body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
            taken.append((self.path, body))
            self._reply(b"{}")

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            chunk = self.rfile.read(size)
            self.rfile.readline()
            return chunk

        def _reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()
    server.server_close()


def traced(environment: dict[str, str], *, middleware: bool = False) -> None:
    """Run an agent in a process of its own, since tracers are configured once a process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "OTEL"))}
    done = subprocess.run(
        [sys.executable, "-c", TRACED.replace("MIDDLEWARE:", f"{middleware}:")],
        cwd=ROOT, env={**kept, "LANGSMITH_TRACING": "true", "LANGSMITH_API_KEY": "none", **environment},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "five", done.stderr


@pytest.mark.enable_socket
@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.parametrize("middleware", [False, True], ids=["graph", "middleware"])
def test_decisions_are_in_langsmith_traces(collector: tuple[str, list[tuple[str, bytes]]], middleware: bool) -> None:
    address, taken = collector
    traced({"LANGSMITH_ENDPOINT": address}, middleware=middleware)
    runs = b"".join(body for path, body in taken if path.startswith("/runs"))
    assert (b'"name":"gate"' in runs) is not middleware
    assert b'"gate":"NeverGate"' in runs
    assert b'"status":"blocked"' in runs


@pytest.mark.enable_socket
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_decisions_are_in_opentelemetry_spans(collector: tuple[str, list[tuple[str, bytes]]]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, taken = collector
    traced({"LANGSMITH_TRACING_MODE": "otel", "OTEL_EXPORTER_OTLP_ENDPOINT": address})
    spans = [
        span
        for path, body in taken
        if path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    gate = next(span for span in spans if span.name == "gate")
    assert any("NeverGate" in attribute.value.string_value for attribute in gate.attributes)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.enable_socket
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_langgraph_dev_starts_and_answers_over_its_api(tmp_path: Path) -> None:
    # A folder of its own: the server keeps its state in the folder that it is started in.
    config = json.loads((ROOT / "langgraph.json").read_text())
    config["graphs"]["metis"] = config["graphs"]["metis"].replace("./", f"{ROOT}/")
    (tmp_path / "langgraph.json").write_text(json.dumps(config))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "studio"\nversion = "0"\n')
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    langgraph = str(Path(sys.executable).with_name("langgraph"))
    command = [langgraph, "dev", "--no-browser", "--no-reload", "--port", str(port)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "OTEL", "METIS"))}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env={**kept, "LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGSMITH_TRACING": "false"},
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/ok", server, tmp_path / "log")
            run = {
                "assistant_id": "metis",
                "input": {"messages": [{"role": "user", "content": "What is 4821 * 7310?"}]},
            }
            state = _post(f"http://127.0.0.1:{port}/runs/wait", run)
            # The server refuses code that blocks its event loop: a search must not.
            found = _post(
                f"http://127.0.0.1:{port}/runs/wait",
                {**run, "input": {"messages": [{"role": "user", "content": "What is the capital of France?"}]}},
            )
            drawn = _get(f"http://127.0.0.1:{port}/assistants/{_assistant(port)}/graph")
        finally:
            server.terminate()
            server.wait(30)
    assert state["messages"][-1]["content"] == "35241510", state
    assert state["decisions"][0]["allowed"] == ["python", "text_search"]
    assert found["messages"][-1]["content"] == "Paris", found
    assert [(outcome["tool"], outcome["status"]) for outcome in found["outcomes"]] == [("text_search", "ok")]
    assert {"gate", "act", "answer", "python", "text_search"} <= {node["id"] for node in drawn["nodes"]}
    shutil.rmtree(tmp_path / ".langgraph_api", ignore_errors=True)


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 140
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            _get(address)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text())


def _assistant(port: int) -> str:
    found = _post(f"http://127.0.0.1:{port}/assistants/search", {"graph_id": "metis"})
    return str(found[0]["assistant_id"])


def _get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=120) as reply:
        return json.load(reply)


def _post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)
