"""Runs code like a notebook cell: names stay, the value of a last expression is shown."""

import ast
import builtins
import inspect
import linecache
import sys
import traceback
import types
from typing import Any, TextIO

from .pictures import Pictures

__all__ = ["CALL_NAME", "Repl"]

CALL_NAME = "<call {}>"
"""The file name of a call's code in tracebacks."""

_MOST_FRAMES = 40
"""The innermost frames shown; an endless recursion has millions."""
_MESSAGE_START = 1000

_TOP_LEVEL_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


class Repl:
    """One namespace, `__main__`, in which calls run one after another."""

    def __init__(self, stdout: TextIO, stderr: TextIO, pictures: Pictures) -> None:
        self._streams = (stdout, stderr)
        self._pictures = pictures
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
            self._pictures.end(code)

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
        return None if self._pictures.show(value) else repr(value)

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
