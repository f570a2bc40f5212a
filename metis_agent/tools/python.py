"""The `python` tool: a model runs code in a sandbox and reads what came out.

Stands between the graph (or any LangChain agent) and a `Sandbox`. Each conversation has a session of its
own, in which names last from call to call, and finds the conversation's images as `image_1`, `image_2`, ... What
the code does wrong is a result that the model can read (`report`); what the sandbox does wrong is an
`InfrastructureError`.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.prebuilt import InjectedState
from langgraph.runtime import get_runtime
from pydantic import BaseModel, Field, PrivateAttr

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.messages import conversation_images
from metis_agent.tools.sandboxes.base import NO_IMAGES, Execution, InputImage, Sandbox, SandboxLimits, ShownImage
from metis_agent.tools.sandboxes.choose import Backend, LazySandbox
from metis_agent.tools.sandboxes.session import SessionPool

if TYPE_CHECKING:
    from metis_agent.tools.images import ImageRules

__all__ = ["CodeInput", "PythonInput", "PythonTool", "report", "session_key", "unwrap_fence"]

_DESCRIPTION = (
    "Run Python code, for calculations and for anything that has to be exact. Variables last from call to "
    "call. The value of the last expression is shown, as in a notebook; print what else you need. The standard "
    "library is there, often numpy and PIL too. No network, no other programs, {seconds:g} seconds a call."
)
_IMAGES = (
    " The images of the conversation, sent by the user or shown by tools, are there in their order as PIL images "
    "image_1, image_2, ... You see an image or a matplotlib figure that the code ends with, displays or shows."
)
_RUN_IDLE_SECONDS = 30.0
_THREADS = 64


class CodeInput(BaseModel):
    """What the model passes."""

    code: str = Field(description="Python source, as in a notebook cell.")


class PythonInput(CodeInput):
    """The same, with the conversation, where code may work on its images."""

    messages: Annotated[Any, InjectedState("messages")] = Field(default=None, exclude=True)
    """Put in by LangGraph; the model does not see this."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What runs the code. Copies of a tool share it, deep ones as well: it is not data."""

    sandbox: LazySandbox
    pool: SessionPool
    threads: ThreadPoolExecutor

    def __deepcopy__(self, memo: dict[int, Any]) -> _Parts:
        return self


class PythonTool(BaseTool):
    """Runs Python code in a sandbox, with names that last through a conversation.

    The message content is what the model reads, and where the code shows images, a list of content blocks: the
    text, then the images. Its artifact is the `Execution`. Code that fails gives a message with
    `status="error"`. The conversation's images are known where LangGraph injects the state. A conversation is the
    config's `thread_id`; without one, the graph's run; without that, the single call. Nothing starts before the
    first call, or `check()`.

    Args:
        sandbox: where to run; by default the first backend that passes its self-test. The caller closes it.
        limits: of each session; by default the sandbox's.
        backend: which backend to open, where no sandbox is given.
        allow_unsafe: run without containment where nothing contains; warns.
        max_sessions: conversations that are kept open; the least recently used is closed.
        idle_seconds: how long a conversation's session is kept after a call.
        images: give code the images of the conversation, and show the model those that the code shows; `False` for
            models that can't see, and for those whose API takes no images in tool messages.
        image_rules: which of the conversation's images are loaded; by default as `load_image` has it.
        **fields: further fields of `BaseTool`, such as `description`.

    Raises:
        ConfigurationError: a value is out of its range, or a backend is given along with a sandbox.
    """

    name: str = "python"
    description: str = ""
    args_schema: type[BaseModel] = PythonInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    limits: SandboxLimits
    backend: Backend = "auto"
    allow_unsafe: bool = False
    idle_seconds: float = 600.0
    images: bool = True

    _parts: _Parts = PrivateAttr()
    _image_rules: ImageRules | None = PrivateAttr(default=None)

    def __init__(
        self,
        *,
        sandbox: Sandbox | None = None,
        limits: SandboxLimits | None = None,
        backend: Backend = "auto",
        allow_unsafe: bool = False,
        max_sessions: int = 64,
        idle_seconds: float = 600.0,
        images: bool = True,
        image_rules: ImageRules | None = None,
        **fields: Any,
    ) -> None:
        _check_arguments(sandbox, limits, backend, allow_unsafe)
        _check_keeping(max_sessions, idle_seconds)
        chosen = limits or (sandbox.limits if sandbox is not None else SandboxLimits())
        if not images:
            chosen = replace(chosen, images=0)
            fields.setdefault("args_schema", CodeInput)
        fields.setdefault("description", _DESCRIPTION.format(seconds=chosen.seconds) + (_IMAGES if images else ""))
        super().__init__(
            limits=chosen,
            backend=backend,
            allow_unsafe=allow_unsafe,
            idle_seconds=idle_seconds,
            images=images,
            **fields,
        )
        self._image_rules = image_rules
        lazy = LazySandbox(sandbox, limits=chosen, backend=backend, allow_unsafe=allow_unsafe)
        self._parts = _Parts(
            sandbox=lazy,
            pool=SessionPool(lazy.open_session, most=max_sessions),
            threads=ThreadPoolExecutor(_THREADS, thread_name_prefix="metis-python"),
        )

    def check(self) -> str:
        """Find the sandbox and test it now, rather than at the first call.

        Returns:
            What contains the code, such as "Landlock + seccomp".

        Raises:
            SandboxUnavailableError: nothing contains code on this machine; the message says what to do.
        """
        return self._parts.sandbox.check()

    def close(self) -> None:
        """End every session, and the sandbox if it is the tool's own. A later call opens new ones."""
        self._parts.pool.close()
        self._parts.sandbox.close()

    def _to_args_and_kwargs(
        self, tool_input: str | dict[str, Any], tool_call_id: str | None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        # Kept out of the schema: a direct `invoke` with arguments has no call id.
        args, kwargs = super()._to_args_and_kwargs(tool_input, tool_call_id)
        return args, kwargs | {"tool_call_id": tool_call_id}

    def _run(
        self,
        code: str,
        config: RunnableConfig,
        tool_call_id: str | None = None,
        messages: Annotated[Any, InjectedState("messages")] = None,
    ) -> tuple[str | list[Any] | ToolMessage, Execution]:
        key, idle_seconds = self._session_for(config)
        return self._answer(self._execute(code, key, idle_seconds, messages), tool_call_id)

    async def _arun(
        self,
        code: str,
        config: RunnableConfig,
        tool_call_id: str | None = None,
        messages: Annotated[Any, InjectedState("messages")] = None,
    ) -> tuple[str | list[Any] | ToolMessage, Execution]:
        key, idle_seconds = self._session_for(config)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._parts.threads, self._execute, code, key, idle_seconds, messages)
        try:
            execution = await asyncio.shield(running)
        except asyncio.CancelledError:
            # Nobody waits for the answer any more; closing ends the code at once.
            running.add_done_callback(lambda done: done.cancelled() or done.exception())
            loop.run_in_executor(self._parts.threads, self._parts.pool.discard, key)
            raise
        return self._answer(execution, tool_call_id)

    def _session_for(self, config: RunnableConfig) -> tuple[Hashable, float]:
        """The key of the session, and how many seconds it is kept."""
        key = session_key(config)
        if key is None:
            return ("call", uuid.uuid4()), 0.0
        return key, self.idle_seconds if key[0] == "thread" else min(_RUN_IDLE_SECONDS, self.idle_seconds)

    def _execute(self, code: str, key: Hashable, idle_seconds: float, messages: Any) -> Execution:
        images, note = _named_images(code, messages, self._image_rules) if self.images else (NO_IMAGES, "")
        with self._parts.pool.session(key, idle_seconds=idle_seconds) as session:
            try:
                # Without images, as a session without any knowledge of them is called.
                source = unwrap_fence(code)
                execution = session.run(source, images=images) if images else session.run(source)
            except InputError as error:
                return Execution(status="error", traceback=str(error))
        # Code that works has bound the name itself.
        return replace(execution, notes=(note, *execution.notes)) if note and not execution.ok else execution

    def _answer(
        self, execution: Execution, tool_call_id: str | None
    ) -> tuple[str | list[Any] | ToolMessage, Execution]:
        content: str | list[Any] = report(execution)
        if execution.images:
            content = [{"type": "text", "text": content}, *map(_block, execution.images)]
        if execution.ok or tool_call_id is None:
            return content, execution
        # A ToolException would set the status as well, but lose the artifact.
        message = ToolMessage(content, artifact=execution, tool_call_id=tool_call_id, name=self.name, status="error")
        return message, execution


def _block(image: ShownImage) -> dict[str, Any]:
    return {"type": "image", "base64": image.base64, "mime_type": image.mime_type}


def _check_arguments(sandbox: object, limits: object, backend: str, allow_unsafe: bool) -> None:
    if sandbox is not None and not isinstance(sandbox, Sandbox):
        raise ConfigurationError(f"PythonTool(sandbox={sandbox!r}): it must be a Sandbox; see open_sandbox().")
    if limits is not None and not isinstance(limits, SandboxLimits):
        raise ConfigurationError(f"PythonTool(limits={limits!r}): it must be a SandboxLimits, such as SandboxLimits().")
    if backend not in get_args(Backend):
        raise ConfigurationError(f"PythonTool(backend={backend!r}): it must be one of {', '.join(get_args(Backend))}.")
    if backend == "unsafe" and not allow_unsafe:
        raise ConfigurationError(
            "PythonTool(backend='unsafe', allow_unsafe=False): it runs code with all the rights of this user. Pass "
            "allow_unsafe=True as well, only where you trust whoever writes the code."
        )
    if sandbox is not None and (backend != "auto" or allow_unsafe):
        raise ConfigurationError(
            f"PythonTool(sandbox=..., backend={backend!r}, allow_unsafe={allow_unsafe!r}): with a sandbox there is "
            "none to open; leave the other two out."
        )


def _check_keeping(max_sessions: int, idle_seconds: float) -> None:
    if not max_sessions >= 1:
        raise ConfigurationError(f"PythonTool(max_sessions={max_sessions!r}): it must be at least 1.")
    if not idle_seconds >= 0:
        raise ConfigurationError(f"PythonTool(idle_seconds={idle_seconds!r}): it must be seconds, 0 or more.")


def session_key(config: RunnableConfig) -> tuple[str, Hashable] | None:
    """Which calls share a session.

    Returns:
        `("thread", thread_id)`; without a thread, `("run", something that only this graph run has)`; outside
        of a graph `None`: the call shares with none.
    """
    thread = (config.get("configurable") or {}).get("thread_id")
    if thread:
        return "thread", str(thread)
    try:
        runtime: Any = get_runtime()
    except (RuntimeError, KeyError):
        runtime = None
    run_id = getattr(getattr(runtime, "execution_info", None), "run_id", None)
    if run_id:
        return "run", str(run_id)
    # The same object in every step of a run. As part of the key it lives on, so that no later run's has its id.
    control = getattr(runtime, "control", None)
    return ("run", control) if control is not None else None


_NOTHING_SHOWN = "The code ran but printed nothing; print the value or end with an expression."
_CUT = "[The output was longer than is shown. Print less.]"
_STATE_LOST = "Variables and files of earlier calls are gone."
_LESS_WORK = "Do less in one call, or use a faster method."

_HINTS = (
    (
        re.compile(r"^ModuleNotFoundError", re.M),
        "Nothing can be installed here; use the standard library or a package that is installed.",
    ),
    (
        re.compile(r"^\s+[!%].*\n\s+\^+\nSyntaxError", re.M),
        "Shell and notebook commands (! and %) do not run here; write plain Python.",
    ),
    (
        re.compile(r"^(PermissionError|OSError: \[Errno 30\])", re.M),
        "This Python has no network, starts no programs, and reads and writes files in its current folder only.",
    ),
    (re.compile(r"^(\w+\.)*_?\w*MemoryError", re.M), "The memory limit was reached; work on smaller pieces."),
)

_FENCE = re.compile(r"\A\s*```[^\n`]*\n(?P<code>.*?)(?:\n?```\s*)?\Z", re.S)


def report(execution: Execution) -> str:
    """What happened, for the model: the output, then the result or what went wrong and what to do."""
    parts = [execution.stdout.rstrip("\n")]
    if execution.stderr.strip():
        parts.append("stderr:\n" + execution.stderr.rstrip("\n"))
    if execution.result is not None:
        parts.append(execution.result)
    parts.append(execution.traceback)
    if execution.truncated:
        parts.append(_CUT)
    parts += [f"[image {n}: {i.width} x {i.height} pixels]" for n, i in enumerate(execution.images, start=1)]
    parts += execution.notes
    parts.append(_advice(execution))
    return "\n".join(part for part in parts if part) or _NOTHING_SHOWN


def unwrap_fence(code: str) -> str:
    """The code of a Markdown block, if the whole text is one; models often write it so."""
    match = _FENCE.match(code)
    return match["code"] if match else code


def _advice(execution: Execution) -> str:
    if execution.status == "timeout":
        return f"{execution.reason} {_STATE_LOST} {_LESS_WORK}"
    if execution.status == "killed":
        return f"{execution.reason} {_STATE_LOST}"
    if execution.status == "error":
        return next((hint for pattern, hint in _HINTS if pattern.search(execution.traceback)), "")
    return ""


# With a number, or with one to be put in: f"image_{number}".
_IMAGE_NAME = re.compile(r"\bimage_(?:(\d{1,9})\b|(?!\w))")


def _named_images(code: str, messages: Any, rules: ImageRules | None) -> tuple[Mapping[str, InputImage], str]:
    """The images that the code names, and a note where it names one that is not there."""
    named = set(_IMAGE_NAME.findall(code))
    if not named:
        return NO_IMAGES, ""

    there = conversation_images(messages)
    wanted = [name for name in there if "" in named or name.removeprefix("image_") in named]
    absent = {f"image_{number}" for number in named if number} - set(there)
    note = ""
    if absent:
        last = f"image_1 to image_{len(there)}" if there else "none"
        note = f"The conversation has no {', '.join(sorted(absent))}; its images are: {last}."
    return {name: InputImage(source=there[name], rules=rules) for name in wanted}, note
