"""Open sessions by key: the least recently used and the idle ones are closed."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from metis_agent.tools.sandboxes.base import SandboxSession

__all__ = ["SessionPool"]


@dataclass(eq=False)
class _Entry:
    idle_seconds: float
    session: SandboxSession | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    last_used: float = 0.0

    def close(self) -> None:
        with self.opening:
            if self.session is not None:
                self.session.close()


class SessionPool:
    """Thread-safe. Sessions in use are never evicted, so there can be more than `most` for a while.

    Args:
        open_session: opens a fresh one.
        most: how many to keep.
    """

    def __init__(self, open_session: Callable[[], SandboxSession], *, most: int) -> None:
        self._open, self._most = open_session, most
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._timer: threading.Timer | None = None
        self._timer_ends = 0.0
        self._finalizer = weakref.finalize(self, _close_all, self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def session(self, key: Hashable, *, idle_seconds: float) -> Iterator[SandboxSession]:
        """The session of this key, opened if there is none; kept for `idle_seconds` after its last use."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(idle_seconds))
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield self._opened(key, entry)
        finally:
            with self._lock:
                entry.users -= 1
                entry.last_used = time.monotonic()
            self._close_stale()

    def discard(self, key: Hashable) -> None:
        """Close the session of this key, also under a running call; its state is lost."""
        with self._lock:
            entry = self._entries.pop(key, None)
        if entry is not None:
            entry.close()

    def close(self) -> None:
        """Close every session. The pool can be used again."""
        with self._lock:
            keys = list(self._entries)
            self._cancel_timer()
        for key in keys:
            self.discard(key)

    def _opened(self, key: Hashable, entry: _Entry) -> SandboxSession:
        # Two calls of one key must get one session; calls of other keys must not wait for it.
        with entry.opening:
            if entry.session is None:
                try:
                    entry.session = self._open()
                except BaseException:
                    with self._lock:
                        if self._entries.get(key) is entry:
                            del self._entries[key]
                    raise
            return entry.session

    def _close_stale(self) -> None:
        """Close what is idle for too long or too many, and set a timer for what will be."""
        now = time.monotonic()
        with self._lock:
            idle = [(key, entry) for key, entry in self._entries.items() if not entry.users]
            surplus = len(self._entries) - self._most
            stale = [
                key
                for place, (key, entry) in enumerate(idle)
                if place < surplus or now - entry.last_used >= entry.idle_seconds
            ]
            closing = [self._entries.pop(key) for key in stale]
            self._set_timer(now)
        for entry in closing:
            entry.close()

    def _set_timer(self, now: float) -> None:
        ends = [entry.last_used + entry.idle_seconds for entry in self._entries.values() if not entry.users]
        if not ends or (self._timer is not None and now < self._timer_ends <= min(ends)):
            # None is needed, or the one that is set comes first and will set the next.
            return
        self._cancel_timer()
        self._timer_ends = min(ends)
        # The timer must not keep the pool alive.
        self._timer = threading.Timer(self._timer_ends - now, _expire, [weakref.ref(self)])
        self._timer.daemon = True
        self._timer.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _expire(reference: weakref.ref[SessionPool]) -> None:
    pool = reference()
    if pool is not None:
        pool._close_stale()


def _close_all(entries: OrderedDict[Hashable, _Entry]) -> None:
    while entries:
        entries.popitem()[1].close()
