"""An execution in words that a model can act on."""

from __future__ import annotations

import re

from metis_agent.tools.sandboxes.base import Execution

__all__ = ["report", "unwrap_fence"]

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
