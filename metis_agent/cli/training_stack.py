"""The training stack as commands use it: quiet, or named with what installs it; its steps shown by a bar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress

from metis_agent.errors import MissingDependencyError

__all__ = ["quiet_libraries", "step_bar", "training_libraries"]


@contextmanager
def training_libraries() -> Iterator[None]:
    """Where `numpy` and its like are needed: one thread each, and what to install where they are missing."""
    # Thread pools read this when numpy is imported; one thread is quickest for sparse work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] == "metis_agent":
            raise  # a fault of ours, which nothing that one can install would mend
        raise MissingDependencyError(
            f"this command needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
        ) from missing


def quiet_libraries() -> None:
    """Have torch, transformers and TRL, which read this when they are imported, look nothing up and say little."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are fastest on one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def step_bar(bars: Progress, description: str) -> Any:
    """A callback of a trainer that moves a bar."""
    from transformers import TrainerCallback

    class StepBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.task = bars.add_task(description, total=state.max_steps, completed=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bars.update(self.task, completed=state.global_step)

    return StepBar()
