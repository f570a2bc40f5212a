"""A session's side of the conversation: read a call, run it like a notebook cell, answer.

Names stay from call to call, and the value of a last expression is shown. `main_uncontained` is the same conversation
in a process with the rights of the user: no defence, only limits that keep accidents small.
"""

import ast
import builtins
import contextlib
import inspect
import json
import linecache
import os
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import paths
from .paths import REHEARSALS
from .pictures import Pictures
from .wire import (
    AnswerLimits,
    FrameError,
    Screen,
    Terms,
    pack_frame,
    pack_parts,
    pack_pictures,
    read_frame,
    unpack_parts,
)

__all__ = ["CALL_NAME", "Repl", "announce", "main_uncontained", "rehearse", "serve"]

CALL_NAME = "<call {}>"
"""The file name of a call's code in tracebacks."""

_MOST_FRAMES = 40
"""The innermost frames shown; an endless recursion has millions."""
_MESSAGE_START = 1000

_TOP_LEVEL_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


class Repl:
    """One namespace, `__main__`, in which calls run one after another."""

    def __init__(self, screen: Screen, pictures: Pictures) -> None:
        self._streams = (screen.stdout, screen.stderr)
        # Kept: taking the interpreter's own apart would be the work of every fork.
        self._before = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        self.pictures = pictures
        """What calls show, and find bound."""
        self._calls = 0
        module = types.ModuleType("__main__")
        # A module of that name must exist: dataclasses and pickle look classes up in it.
        sys.modules["__main__"] = module
        self.names: dict[str, Any] = module.__dict__
        """What the code has bound, and finds bound."""
        self.names["__builtins__"] = builtins

    def run(self, code: str) -> tuple[bool, str, str | None]:
        """Run one call.

        Returns:
            Whether it ended without an exception, the traceback if not, and the `repr` of the value of a
            last expression if there is one other than `None` and images.
        """
        sys.stdout, sys.stderr = self._streams
        vars(sys).update(__stdout__=self._streams[0], __stderr__=self._streams[1])
        self._calls += 1
        name = CALL_NAME.format(self._calls)
        lines = [line + "\n" for line in code.splitlines()]
        linecache.cache[name] = (len(code), None, lines, name)
        try:
            return True, "", self._execute(code, name)
        except SystemExit as stop:
            if stop.code in (None, 0):
                return True, "", None
            return False, f"SystemExit: {stop.code}", None
        except BaseException as error:
            return False, _user_traceback(error), None
        finally:
            self.pictures.end(code)

    def _execute(self, code: str, name: str) -> str | None:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if tree.body:
            self._evaluate(compile(tree, name, "exec", _TOP_LEVEL_AWAIT))
        if not isinstance(last, ast.Expr):
            return None
        value = self._evaluate(compile(ast.Expression(last.value), name, "eval", _TOP_LEVEL_AWAIT))
        if value is None:
            return None
        self.names["_"] = value
        return None if self.pictures.show(value) else repr(value)

    def _evaluate(self, compiled: types.CodeType) -> object:
        value = eval(compiled, self.names)
        if compiled.co_flags & inspect.CO_COROUTINE:
            import asyncio

            return asyncio.run(value)
        return value


def _user_traceback(error: BaseException) -> str:
    """The traceback without the frames of this program, and of libraries below the user's lines."""
    try:
        report = traceback.TracebackException.from_exception(error, limit=-_MOST_FRAMES, compact=True)
        _trim(report, set())
        return "".join(report.format()).rstrip()
    except BaseException:
        # The exception's own code can fail, or memory is short.
        return f"{type(error).__name__}: {_start_of_message(error)}"


def _start_of_message(error: BaseException) -> str:
    try:
        return str(error)[:_MESSAGE_START]
    except BaseException:
        return "(its message could not be printed)"


def _trim(report: traceback.TracebackException | None, seen: set[int]) -> None:
    if report is None or id(report) in seen:
        return
    seen.add(id(report))
    own = [frame for frame in report.stack if frame.filename.startswith("<call ")]
    report.stack[:] = own
    for other in (report.__cause__, report.__context__, *(report.exceptions or ())):
        _trim(other, seen)


_MAX_REQUEST_BYTES = (1 << 32) - 1


def announce(stream: socket.socket, prepare: Callable[[], None]) -> bool:
    """Run the preparation and tell the host how it went.

    Returns:
        Whether the session may go on.
    """
    try:
        prepare()
    except Exception as error:
        stream.sendall(f"failed: {type(error).__name__}: {error}".encode())
        return False
    stream.sendall(b"ready")
    return True


def serve(stream: socket.socket, screen: Screen, repl: Repl, limits: AnswerLimits | Terms) -> None:
    """Take pictures and answer calls until the host hangs up.

    Args:
        stream: the host's stream.
        screen: where prints go.
        repl: that writes there.
        limits: of an answer.
    """
    pictures = repl.pictures
    pictures.limit(limits.pictures, limits.pixels)
    while True:
        try:
            number, payload = read_frame(stream.recv, _MAX_REQUEST_BYTES)
        except MemoryError:
            pictures.did_not_fit()
            continue
        except (EOFError, OSError, FrameError):
            return
        parts = unpack_parts(payload)
        if b"i" in parts:
            name = str(parts[b"n"], "utf-8")
            pictures.place(repl.names, name, str(parts[b"m"], "ascii"), parts[b"i"])
            # The next picture should find the memory of this frame free.
            del payload, parts
            continue
        screen.clear()
        pictures.begin()
        finished, error, result = repl.run(str(parts[b"c"], "utf-8", "replace"))
        stream.sendall(pack_frame(number, pack_parts(_answer(finished, error, result, pictures, limits))))


def rehearse(screen: Screen, pictures: Pictures) -> None:
    """Answer a few calls that nobody made, so that what every session looks up first is looked up before the fork."""
    ours, theirs = socket.socketpair()
    screen.attach(-1, 1 << 10)
    streams, main = (sys.stdout, sys.stderr), sys.modules["__main__"]
    with ours, theirs:
        for number in range(REHEARSALS):
            ours.sendall(pack_frame(number, pack_parts({b"c": b"n = 1\nprint(n)\nn + 1"})))
        ours.shutdown(socket.SHUT_WR)
        serve(theirs, screen, Repl(screen, pictures), AnswerLimits(1 << 10, 0, 0))
    (sys.stdout, sys.stderr), sys.modules["__main__"] = streams, main
    linecache.clearcache()


def _answer(
    finished: bool, error: str, result: str | None, pictures: Pictures, limits: AnswerLimits | Terms
) -> dict[bytes, bytes]:
    parts = {b"s": b"o" if finished else b"e"}
    for tag, text in ((b"e", error), (b"r", result), (b"n", "\n".join(pictures.notes) or None)):
        if text is not None:
            body = text.encode("utf-8", "backslashreplace")
            parts[tag] = body[: limits.text]
            if len(body) > limits.text:
                parts[b"t"] = b"1"
    if pictures.taken:
        parts[b"p"] = pack_pictures(pictures.taken)
    return parts


def main_uncontained() -> None:
    """Arguments: a folder to take off the path, the stream's and the screen's descriptor, settings as JSON."""
    sys.path.remove(sys.argv[1])
    stream = socket.socket(fileno=int(sys.argv[2]))
    settings = json.loads(sys.argv[4])
    threading.Thread(target=_end_with_host, daemon=True).start()

    def prepare() -> None:
        paths.add_site_folders(settings["site"])
        paths.be_like_a_console()
        os.chdir(settings["folder"])
        _limit(settings)

    if announce(stream, prepare):
        answer, screen = AnswerLimits(*settings["answer"]), Screen()
        screen.attach(int(sys.argv[3]), answer.text)
        serve(stream, screen, Repl(screen, Pictures()), answer)


def _end_with_host() -> None:
    """Standard input is a pipe that the host holds open; its end means that the host is gone."""
    os.read(0, 1)
    os._exit(0)


def _limit(settings: dict[str, Any]) -> None:
    import resource

    for kind, value in ((resource.RLIMIT_DATA, settings["memory"]), (resource.RLIMIT_FSIZE, settings["disk"])):
        # macOS refuses some of these.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))
