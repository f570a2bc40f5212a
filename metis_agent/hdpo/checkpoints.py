"""Which checkpoint a stopped run goes on from."""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = ["last_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may have left a torn one behind it.

    The trainer writes `trainer_state.json` last, so a checkpoint is whole where that can be read.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state
