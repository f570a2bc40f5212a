"""A known secret in whatever a tool returns or raises: it reaches no model, tracer, stream, record, report or log."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from langgraph.types import Command
from pydantic import BaseModel, Field

from metis_agent import MetisGateMiddleware, ModelGate, Recorder, TrajectoryStore, create_metis_agent
from metis_agent.errors import InfrastructureError, ToolError
from metis_agent.report.facts import ReportInputs
from metis_agent.report.page import write_report
from metis_agent.tools import InstrumentedTool
from metis_agent.tools.redaction import Redactor
from tests.fakes import call, calling

SECRET = "S3cr3t-value/of the+vault-0042"
REDACTOR = Redactor(secrets=[SECRET])
FORMS = {SECRET, quote(SECRET), quote(SECRET, safe=""), base64.b64encode(SECRET.encode()).decode()[:-4]}


class Row(BaseModel):
    value: Any


def raises(error: BaseException) -> Callable[[str], Any]:
    def make(_: str) -> Any:
        raise error

    return make


def chained(said: str) -> Any:
    try:
        raise ConnectionError(f"GET https://x.example/?key={said}")
    except ConnectionError as error:
        raise RuntimeError("a search failed") from error


def noted(said: str) -> Any:
    error = ValueError("no")
    error.add_note(said)
    raise error


# What a tool makes of a text that holds the secret. The text stands for what it read somewhere.
RESULTS: dict[str, Callable[[str], Any]] = {
    "text": lambda said: said,
    "event stream": lambda said: f"data: {json.dumps({'a': said})}\n\n",
    "number and text": lambda said: [1, said, None],
    "dict": lambda said: {"k": {"deep": [said]}},
    "key": lambda said: {said: 1},
    "base64 key": lambda said: {"base64": said},
    "text block": lambda said: [{"type": "text", "text": said}],
    "reference block": lambda said: [{"type": "text", "text": "x", "annotations": [{"url": said, "title": said}]}],
    "file block": lambda said: [
        {"type": "file", "mime_type": "text/plain", "base64": base64.b64encode(said.encode()).decode()}
    ],
    "data address": lambda said: [
        {
            "type": "image_url",
            "image_url": {"url": "data:text/plain;base64," + base64.b64encode(said.encode()).decode()},
        }
    ],
    "cut in two": lambda said: [{"type": "text", "text": said[:20]}, {"type": "text", "text": said[20:]}],
    "cut in letters": lambda said: list(said),
    "address": lambda said: f"https://x.example/?q={quote(said)}&r={quote(said, safe='')}",
    "json in json": lambda said: json.dumps({"body": json.dumps({"k": said})}),
    "bytes": lambda said: said.encode(),
    "bytes in a dict": lambda said: {"raw": bytearray(said.encode())},
    "model": lambda said: Row(value=[said]),
    "document": lambda said: [Document(page_content=said, metadata={"source": said})],
    "path": lambda said: Path("/") / said,
    "error as a value": lambda said: {"error": ValueError(said)},
    "message": lambda said: ToolMessage(said, tool_call_id="c1"),
    "message with an artifact": lambda said: ToolMessage(
        "x", tool_call_id="c1", artifact={"k": said}, additional_kwargs={"n": said}, response_metadata={"n": said}
    ),
    "messages": lambda said: [ToolMessage([{"type": "text", "text": said}], tool_call_id="c1")],
    "command": lambda said: Command(
        update={"messages": [ToolMessage(said, tool_call_id="c1"), HumanMessage(f"[{said}]")]}
    ),
    "tool exception": lambda said: raises(ToolException(said))(said),
    "tool error": lambda said: raises(ToolError(f"no: {said}"))(said),
    "error": lambda said: raises(ValueError(said, {"k": said}))(said),
    "chained error": chained,
    "error with a note": noted,
    "errors in a group": lambda said: raises(ExceptionGroup("g", [OSError(2, said)]))(said),
    "infrastructure": lambda said: raises(InfrastructureError(f"at {said}"))(said),
}
ARTIFACTS: dict[str, Callable[[str], Any]] = {
    "documents": lambda said: [Document(page_content=said)],
    "dict": lambda said: {"rows": [{"v": said}]},
    "model": lambda said: Row(value=said),
    "bytes": lambda said: said.encode(),
    "object": lambda said: ValueError(said),
}


class Caller(BaseChatModel):
    """Calls the tool once, then answers with what it read; keeps all that it was shown."""

    seen: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "caller"

    def bind_tools(self, tools: Any, **keywords: Any) -> Any:
        return self.bind(tools=[getattr(tool, "name", "") for tool in tools])

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **keywords: Any) -> ChatResult:
        self.seen.append(f"{messages!r} {[message.model_dump() for message in messages]!r}")
        called = any(isinstance(message, AIMessage) for message in messages)
        reply = AIMessage(str(messages[-1].content)) if called else calling(call("look", id="c1"))
        return ChatResult(generations=[ChatGeneration(message=reply)])


class Tracer(BaseCallbackHandler):
    """Keeps what every callback was given, as a tracing service would."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _keep(self, *arguments: Any, **keywords: Any) -> None:
        for part in (*arguments, *keywords.values()):
            self.seen.append(repr(part))
            if isinstance(part, BaseException):
                self.seen.append("".join(traceback.format_exception(part)))

    on_tool_start = on_tool_end = on_tool_error = on_chain_start = on_chain_end = on_chain_error = _keep
    on_llm_end = on_chat_model_start = on_llm_error = on_custom_event = on_retry = _keep


def tool_of(
    make: Callable[[str], Any],
    said: str,
    *,
    artifact: Any = None,
    is_async: bool = False,
    redactor: Redactor = REDACTOR,
) -> BaseTool:
    def look() -> Any:
        """Look."""
        return (make(said), artifact(said)) if artifact else make(said)

    async def alook() -> Any:
        return look()

    made = StructuredTool.from_function(
        None if is_async else look, alook if is_async else None, name="look", description="Look.",
        response_format="content_and_artifact" if artifact else "content",
    )  # fmt: skip
    return InstrumentedTool(made, redactor=redactor, timeout=20)


def everything_seen(tool: BaseTool, folder: Path, *, middleware: bool, is_async: bool, logged: Any) -> str:
    model, tracer = Caller(seen=[]), Tracer()
    store = TrajectoryStore(folder / "store")
    recorder = Recorder(store)  # which knows nothing of the secret: the tool's own redactor has to do
    if middleware:
        agent: Any = create_agent(model, [tool], middleware=[MetisGateMiddleware(ModelGate(), recorder=recorder)])
    else:
        agent = create_metis_agent(model, [tool], recorder=recorder)
    streamed: list[str] = []
    asked = {"messages": [("user", "look")]}
    config: Any = {"callbacks": [tracer]}
    modes = ["values", "updates", "messages", "custom", "tasks"]

    async def consume() -> None:
        async for part in agent.astream(asked, config, stream_mode=modes):
            streamed.append(repr(part))

    try:
        if is_async:
            asyncio.run(consume())
        else:
            streamed += [repr(part) for part in agent.stream(asked, config, stream_mode=modes)]
    except Exception as error:
        streamed.append("".join(traceback.format_exception(error)))
    store.flush()
    write_report(ReportInputs(store=str(folder / "store")), folder / "report.html")
    on_disk = [path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()]
    return "\n".join([*model.seen, *tracer.seen, *streamed, *on_disk, logged.text])


def leaks(seen: str) -> set[str]:
    return {form for form in FORMS if form in seen}


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("middleware", [False, True])
def test_of_every_kind_of_result(
    result: str, middleware: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tool = tool_of(RESULTS[result], f"it is {SECRET}")
    assert not leaks(everything_seen(tool, tmp_path, middleware=middleware, is_async=middleware, logged=caplog))


def test_the_tripwire_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = tool_of(RESULTS["dict"], SECRET, redactor=Redactor(secrets=["something else"]))
    assert leaks(everything_seen(told, tmp_path, middleware=False, is_async=False, logged=caplog))


texts = st.sampled_from([SECRET, f"it is {SECRET}.", f"{SECRET}{SECRET}", f"key={SECRET}&x=1", f'"{SECRET}"\n{SECRET}'])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    result=st.sampled_from([*RESULTS]), artifact=st.sampled_from([None, *ARTIFACTS]), said=texts,
    middleware=st.booleans(), is_async=st.booleans(),
)  # fmt: skip
def test_of_any_mixture(
    result: str, artifact: str | None, said: str, middleware: bool, is_async: bool,
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tool = tool_of(RESULTS[result], said, artifact=artifact and ARTIFACTS[artifact], is_async=is_async)
    folder = tmp_path_factory.mktemp("run")
    assert not leaks(everything_seen(tool, folder, middleware=middleware, is_async=is_async, logged=caplog))


@pytest.mark.parametrize("middleware", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        PermissionError(f"401 for key {SECRET}"),
        ExceptionGroup("several", [ValueError(SECRET), OSError(2, SECRET)]),
        KeyError(SECRET),
        RuntimeError(f"GET https://x.example/v1?key={quote(SECRET, safe='')} failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_of_a_providers_error(
    error: Exception, middleware: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Your own code gets the error as it was; the record, the report and the log do not."""

    class Refused(Caller):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **keywords: Any) -> ChatResult:
            raise error

    recorder = Recorder(TrajectoryStore(tmp_path / "store"), redactor=REDACTOR)
    agent: Any = create_metis_agent(Refused(), [], recorder=recorder)
    if middleware:
        agent = create_agent(Refused(), [], middleware=[MetisGateMiddleware(ModelGate(), recorder=recorder)])
    with pytest.raises(type(error)):
        agent.invoke({"messages": [("user", "hi")]})
    write_report(ReportInputs(store=str(tmp_path / "store")), tmp_path / "report.html")
    on_disk = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not leaks("\n".join([*on_disk, caplog.text]))
