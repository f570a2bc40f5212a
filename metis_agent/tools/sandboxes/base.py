"""What a sandbox is: it opens sessions; a session runs code, keeps its names, and shares with nobody.

Where it stands: `metis_agent.tools.python` runs the model's code in a session; `choose.open_sandbox` finds
a backend that really contains on this machine. Other backends (a remote one, say) implement these two
protocols.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.pictures import InputImage, ShownImage

__all__ = ["NO_IMAGES", "Execution", "ExecutionStatus", "Sandbox", "SandboxSession"]

NO_IMAGES: Mapping[str, InputImage] = MappingProxyType({})

ExecutionStatus = Literal["ok", "error", "timeout", "killed"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What became of one piece of code. Everything in it was under the code's control: it is data."""

    status: ExecutionStatus
    """`ok`; `error`: an exception; `timeout`: stopped at the time limit; `killed`: its process ended."""
    stdout: str = ""
    """What was printed, up to the limit; also what was printed before a timeout."""
    stderr: str = ""
    traceback: str = ""
    """For `error`: the traceback, trimmed to the lines of the code itself."""
    result: str | None = None
    """The `repr` of the value of a last expression; `None` if there is none, it is `None`, or it is an image."""
    images: tuple[ShownImage, ...] = ()
    """Figures and images that the code showed, in its order: what it displayed, the value of a last expression,
    figures that are still open."""
    notes: tuple[str, ...] = ()
    """What became of images that are not as the code asked for: not loaded, left out, made smaller."""
    reason: str = ""
    """For `timeout` and `killed`: what happened, in words."""
    seconds: float = 0.0
    """Wall-clock time of the call."""
    truncated: bool = False
    """True where output, traceback or result was longer than the limit and was cut."""

    @property
    def ok(self) -> bool:
        """True where the code ran to its end."""
        return self.status == "ok"

    @property
    def state_lost(self) -> bool:
        """True where the session's process ended: variables and files of earlier calls are gone."""
        return self.status in ("timeout", "killed")


class SandboxSession(Protocol):
    """A Python session: names and files last from call to call. Safe to use from several threads."""

    def run(self, code: str, timeout: float | None = None, images: Mapping[str, InputImage] = NO_IMAGES) -> Execution:
        """Run code; after a timeout or a death the next call works, in a new and empty process.

        Args:
            code: Python source, as in a notebook cell.
            timeout: seconds; by default the session's limit.
            images: names that the code finds bound to Pillow images. What the session has from an earlier call is
                not sent again; one that can't be used gives a note.

        Raises:
            InputError: the code can't be sent (too long).
            SandboxGoneError: the sandbox itself failed, or the session is closed.
        """
        ...

    def close(self) -> None:
        """End the session, and a call that is running in it; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Sandbox(Protocol):
    """A way to run code. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """What contains the code, such as "bubblewrap + Landlock + seccomp"."""
        ...

    @property
    def limits(self) -> SandboxLimits:
        """The limits of a session that asks for no others."""
        ...

    def open(self, limits: SandboxLimits | None = None) -> SandboxSession:
        """Open a fresh session.

        Raises:
            SandboxUnavailableError: this backend can't work on this machine.
            SandboxGoneError: the backend failed just now.
        """
        ...

    def close(self) -> None:
        """End every session and the backend itself; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
