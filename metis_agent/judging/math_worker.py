"""The process in which `mathematics` reads mathematics: requests in on stdin, verdicts out on stdout, as JSON."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

__all__: list[str] = []


def main() -> None:
    """Answer until stdin ends. A reference alone: can it be read? With an answer: are they equal?"""
    with suppress(ImportError, ValueError, OSError):  # Windows has no limits
        import resource

        most = int(sys.argv[1]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no verdict
    from math_verify import parse, verify

    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            # Without the library's own timeouts: they are signals, and the parent has a clock.
            gold = parse(_dressed(request["reference"]), parsing_timeout=None, fallback_mode="no_fallback")
            right = bool(gold)
            if right and "answer" in request:
                answer = parse(_dressed(request["answer"]), parsing_timeout=None, fallback_mode="no_fallback")
                right = bool(answer) and bool(verify(gold, answer, timeout_seconds=None))
        except Exception:
            right = False
        out.write(json.dumps(right).encode() + b"\n")


def _dressed(text: str) -> str:
    """Bare LaTeX is only read between dollar signs."""
    plain = "$" not in text and "\\boxed" not in text and "\\[" not in text and "\\(" not in text
    return (
        f"${text.strip()}$"
        if plain and "\n" not in text and len(text) < 200 and ("\\" in text or "^" in text)
        else text
    )


if __name__ == "__main__":
    main()
