r"""`math`: is a mathematical answer equal to the reference, whatever its form? By `math-verify`.

One of the `verifiers`, for answers such as `\frac{1}{2}`, `x^2 - 1` or `\{1, 2\}`. An answer is text that a model
wrote, and reading it runs a computer algebra system: `9^{9^{9^9}}` would take for ever and all memory. So that
happens in a process of its own, with a deadline and a memory limit; it is started at the first call and again
after a death.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from metis_agent.errors import JudgeUnavailableError, MissingDependencyError
from metis_agent.types import Question

__all__ = ["MathVerifier", "math"]

_START_SECONDS = 60.0


class MathVerifier:
    """Compares with `math-verify` in a process of its own; safe to call from several threads, one at a time.

    Args:
        seconds: an answer may take; one that takes longer is wrong.
        memory_mb: the process may take.
    """

    def __init__(self, *, seconds: float = 5.0, memory_mb: int = 1024) -> None:
        self._seconds, self._memory_mb = seconds, memory_mb
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._pid = os.getpid()

    def __call__(self, question: Question, answer: str) -> bool | None:
        """As `Verifier`: `None` where there is no reference, or none that can be read as mathematics.

        Raises:
            MissingDependencyError: the `math` extra is not installed.
            JudgeUnavailableError: the process can't be started.
        """
        if question.answer is None or not question.answer.strip():
            return None
        if importlib.util.find_spec("math_verify") is None:
            raise MissingDependencyError(
                f"question {question.id!r} asks for the verifier 'math', which needs math-verify; install it with: "
                "pip install 'langgraph-metis[math]'"
            )
        with self._lock:
            # Read alone first: a reference that can't be read is no fault of the answer.
            if self._ask({"reference": question.answer}) is not True:
                return None
            if _hedged(answer) and not _hedged(question.answer):
                return False
            return self._ask({"reference": question.answer, "answer": answer}) is True

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._drop()

    def _ask(self, request: dict[str, str]) -> bool | None:
        """The reply; `None` where the process died or was too slow over it."""
        if self._pid != os.getpid():  # a fork: the parent's process answers the parent
            self._worker, self._pid = None, os.getpid()
        if self._worker is None:
            self._worker = _Worker(self._memory_mb, int(self._seconds) + 1)
            atexit.register(self._worker.end)
            if self._worker.ask({"reference": "1"}, _START_SECONDS) is not True:
                self._drop()
                raise JudgeUnavailableError(
                    "the process that compares mathematical answers does not start; try `python -c 'import "
                    "math_verify'`, and make room in memory."
                )
        reply = self._worker.ask(request, self._seconds)
        if reply is None:
            self._drop()
        return reply

    def _drop(self) -> None:
        if self._worker is not None:
            atexit.unregister(self._worker.end)
            self._worker.end()
            self._worker = None


class _Worker:
    """The process, and a thread that reads its replies."""

    def __init__(self, memory_mb: int, cpu_seconds: int) -> None:
        self._process = subprocess.Popen(
            # By its path and without this folder on the module path: it needs nothing of Metis, whose import is slow.
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(memory_mb)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._replies: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._read, name="metis-math", daemon=True).start()

    def ask(self, request: dict[str, str], seconds: float) -> bool | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=seconds)
        except (OSError, ValueError, Empty):
            return None
        reply: Any = json.loads(line) if line else None
        return reply if isinstance(reply, bool) else None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._replies.put(line)
        except (OSError, ValueError):
            pass  # closed under us
        self._replies.put(b"")


def _hedged(answer: str) -> bool:
    """Whether several answers are offered: math-verify would take the last, so that all could be tried."""
    boxed = [text.strip() for text in _BOXED.findall(answer)]
    if boxed:
        return len(set(boxed)) > 1
    lines = [line for line in answer.splitlines() if line.strip()]
    return bool(lines) and (_DOUBT.search(lines[-1]) is not None or _LISTED.fullmatch(lines[-1].strip()) is not None)


_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_DOUBT = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|alternatively|otherwise|could|might)\b", re.I)
_LISTED = re.compile(r"\$?[-+.\w\\{}/^]+\$?(?:\s*[,;]\s*(?:and\s+)?\$?[-+.\w\\{}/^]+\$?)+[.]?")

math = MathVerifier()
"""The verifier that `VERIFIERS` names "math"."""
