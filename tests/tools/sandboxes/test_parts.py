"""The small parts: frames, the screen, folders, limits, words, the pool."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError
from metis_agent.tools.python import report, unwrap_fence
from metis_agent.tools.sandboxes import Execution, SandboxLimits
from metis_agent.tools.sandboxes.base import Closing
from metis_agent.tools.sandboxes.inside import wire
from metis_agent.tools.sandboxes.inside.paths import everyone_may_enter, remove_folder
from metis_agent.tools.sandboxes.inside.wire import Screen, read_screen, screen_size
from metis_agent.tools.sandboxes.machine import LimitExceededError, folder_bytes, spare_uids
from metis_agent.tools.sandboxes.session import SessionPool


def receiver(data: bytes, most: int = 3) -> Callable[[int], bytes]:
    """A stream that gives a few bytes at a time."""
    rest = bytearray(data)

    def receive(count: int) -> bytes:
        piece = bytes(rest[: min(count, most)])
        del rest[: len(piece)]
        return piece

    return receive


class TestWire:
    @given(
        st.integers(0, 2**64 - 1),
        st.dictionaries(st.binary(min_size=1, max_size=1), st.binary(max_size=50), max_size=8),
    )
    def test_round_trip(self, number: int, parts: dict[bytes, bytes]) -> None:
        frame = wire.pack_frame(number, wire.pack_parts(parts))
        got, payload = wire.read_frame(receiver(frame), 10_000)
        assert (got, wire.unpack_parts(payload)) == (number, parts)

    @given(st.binary(max_size=200))
    def test_any_bytes_are_parts_or_an_error(self, payload: bytes) -> None:
        try:
            parts = wire.unpack_parts(payload)
        except wire.FrameError:
            return
        assert sum(map(len, parts.values())) <= len(payload)

    def test_a_frame_over_the_limit_is_not_read(self) -> None:
        with pytest.raises(wire.FrameError, match="101 bytes, over the limit of 100"):
            wire.read_frame(receiver(wire.pack_frame(1, b"x" * 101)), 100)

    def test_an_end_inside_a_frame(self) -> None:
        with pytest.raises(EOFError, match="inside a frame"):
            wire.read_frame(receiver(wire.pack_frame(1, b"abc")[:-1]), 100)


class TestScreen:
    def test_kept_and_dropped(self, tmp_path: Path) -> None:
        with open(tmp_path / "screen", "w+b") as file:
            file.truncate(screen_size(8))
            screen = Screen()
            screen.attach(file.fileno(), 8)
            screen.stdout.write("12345")
            assert read_screen(file.fileno(), 8) == (b"12345", b"", False)
            screen.stdout.write("67890")
            screen.stderr.write("é")
            assert read_screen(file.fileno(), 8) == (b"12345678", "é".encode(), True)
            screen.clear()
            assert read_screen(file.fileno(), 8) == (b"", b"", False)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        with open(tmp_path / "screen", "w+b") as file:
            assert read_screen(file.fileno(), 8) == (b"", b"", False)


class TestFolders:
    def test_a_deep_tree_and_links(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "file").write_text("x")
        top = tmp_path / "top"
        top.mkdir()
        (top / "link").symlink_to(kept)
        here = os.open(top, os.O_RDONLY)
        for _ in range(300):
            os.mkdir("d" * 50, dir_fd=here)
            below = os.open("d" * 50, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        (top / "sealed").mkdir(0)
        remove_folder(str(top))
        assert os.listdir(tmp_path) == ["kept"]
        assert (kept / "file").read_text() == "x"

    def test_an_absent_folder(self, tmp_path: Path) -> None:
        remove_folder(str(tmp_path / "absent"))

    def test_who_may_enter(self, tmp_path: Path) -> None:
        assert everyone_may_enter("/usr")
        tmp_path.chmod(0o700)
        (tmp_path / "open").mkdir()
        assert not everyone_may_enter(str(tmp_path / "open"))

    def test_measured_size(self, tmp_path: Path) -> None:
        (tmp_path / "deep" / "deeper").mkdir(parents=True)
        (tmp_path / "deep" / "deeper" / "file").write_bytes(b"x" * 100_000)
        used, inodes = folder_bytes(str(tmp_path), most_files=10)
        assert 100_000 <= used < 200_000
        assert len(inodes) == 3
        os.link(tmp_path / "deep" / "deeper" / "file", tmp_path / "again")
        assert folder_bytes(str(tmp_path), most_files=10) == (used, inodes)

    def test_what_is_too_deep_to_be_measured(self, tmp_path: Path) -> None:
        here = os.getcwd()
        try:
            os.chdir(tmp_path)
            for _ in range(18):
                os.mkdir("d" * 250)
                os.chdir("d" * 250)
        finally:
            os.chdir(here)
        with pytest.raises(LimitExceededError, match="too deep"):
            folder_bytes(str(tmp_path), most_files=100)
        remove_folder(str(tmp_path))

    def test_counting_stops(self, tmp_path: Path) -> None:
        for number in range(30):
            (tmp_path / str(number)).touch()
        assert len(folder_bytes(str(tmp_path), most_files=10)[1]) == 11


class TestLimits:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("seconds", 0),
            ("seconds", float("nan")),
            ("seconds", float("inf")),
            ("seconds", "10"),
            ("seconds", True),
            ("memory_mb", 1),
            ("memory_mb", 512.0),
            ("processes", 0),
            ("disk_mb", -1),
            ("output_bytes", True),
        ],
    )
    def test_refused(self, name: str, value: object) -> None:
        with pytest.raises(ConfigurationError) as caught:
            SandboxLimits(**{name: value})  # type: ignore[arg-type]
        assert f"{name}={value!r}" in str(caught.value)

    def test_frozen(self) -> None:
        with pytest.raises(AttributeError):
            SandboxLimits().seconds = 1  # type: ignore[misc]

    def test_spare_uids_are_nobodys(self) -> None:
        spare = spare_uids(os.getpid())
        if os.geteuid() != 0:
            assert spare is None
        elif spare is not None:
            first, count = spare
            assert count >= 1
            assert first > 0


class TestReport:
    @pytest.mark.parametrize(
        ("execution", "text"),
        [
            (Execution(status="ok"), "The code ran but printed nothing; print the value or end with an expression."),
            (Execution(status="ok", stdout="1\n", result="2"), "1\n2"),
            (Execution(status="ok", stdout="1\n", stderr="w\n"), "1\nstderr:\nw"),
            (
                Execution(status="ok", stdout="1", truncated=True),
                "1\n[The output was longer than is shown. Print less.]",
            ),
            (
                Execution(status="timeout", stdout="1\n", reason="Stopped after 5 s."),
                "1\nStopped after 5 s. Variables and files of earlier calls are gone. Do less in one call, or use a "
                "faster method.",
            ),
            (
                Execution(status="killed", reason="It died."),
                "It died. Variables and files of earlier calls are gone.",
            ),
            (Execution(status="error", traceback="ValueError: x"), "ValueError: x"),
            (
                Execution(status="error", traceback="ModuleNotFoundError: No module named 'x'"),
                "ModuleNotFoundError: No module named 'x'\nNothing can be installed here; use the standard library "
                "or a package that is installed.",
            ),
        ],
    )
    def test_words(self, execution: Execution, text: str) -> None:
        assert report(execution) == text

    @pytest.mark.parametrize(
        ("written", "code"),
        [
            ("x = 1", "x = 1"),
            ("```python\nx = 1\n```", "x = 1"),
            ("\n```py\nx = 1\ny = 2\n```\n", "x = 1\ny = 2"),
            ("```\nx\n```", "x"),
            ("```python\nx = 1", "x = 1"),
            ("s = '''\n```\n'''", "s = '''\n```\n'''"),
            ("", ""),
        ],
    )
    def test_fences(self, written: str, code: str) -> None:
        assert unwrap_fence(written) == code


class FakeSession(Closing):
    """Counts."""

    def __init__(self) -> None:
        self.closed = 0

    def run(self, code: str, timeout: float | None = None) -> Execution:
        return Execution(status="ok")

    def close(self) -> None:
        self.closed += 1


class TestPool:
    def make(self, most: int = 2) -> tuple[SessionPool, list[FakeSession]]:
        opened: list[FakeSession] = []

        def open_session() -> FakeSession:
            opened.append(FakeSession())
            return opened[-1]

        return SessionPool(open_session, most=most), opened

    def use(self, pool: SessionPool, key: str, idle_seconds: float = 60) -> Any:
        with pool.session(key, idle_seconds=idle_seconds) as session:
            return session

    def test_one_session_for_a_key(self) -> None:
        pool, opened = self.make()
        assert self.use(pool, "a") is self.use(pool, "a")
        assert self.use(pool, "b") is opened[1]
        pool.close()
        assert [session.closed for session in opened] == [1, 1]

    def test_the_least_recently_used_goes(self) -> None:
        pool, opened = self.make(most=2)
        for key in ("a", "b", "a", "c"):
            self.use(pool, key)
        assert [session.closed for session in opened] == [0, 1, 0]
        pool.close()

    def test_those_in_use_stay(self) -> None:
        pool, opened = self.make(most=1)
        with pool.session("a", idle_seconds=60):
            with pool.session("b", idle_seconds=60):
                self.use(pool, "c")
                assert [session.closed for session in opened] == [0, 0, 1]
            assert [session.closed for session in opened] == [0, 1, 1]
        assert len(pool) == 1
        pool.close()

    def test_idle_ones_go_by_themselves(self) -> None:
        pool, opened = self.make()
        self.use(pool, "long", idle_seconds=60)
        self.use(pool, "short", idle_seconds=0.05)
        deadline = time.monotonic() + 5
        while not opened[1].closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [session.closed for session in opened] == [0, 1]
        pool.close()

    def test_no_idle_time_closes_at_once(self) -> None:
        pool, opened = self.make()
        self.use(pool, "once", idle_seconds=0)
        assert opened[0].closed == 1
        assert len(pool) == 0

    def test_a_failed_opening_is_not_kept(self) -> None:
        answers: list[object] = [RuntimeError("not now"), FakeSession()]

        def open_session() -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        pool = SessionPool(open_session, most=2)
        with pytest.raises(RuntimeError, match="not now"):
            self.use(pool, "a")
        assert isinstance(self.use(pool, "a"), FakeSession)
        pool.close()

    def test_threads_of_one_key_get_one_session(self) -> None:
        pool, opened = self.make(most=9)
        threads = [threading.Thread(target=self.use, args=(pool, "a")) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1
        pool.close()

    def test_a_forgotten_pool_closes_its_sessions(self) -> None:
        pool, opened = self.make()
        self.use(pool, "a")
        del pool
        gc.collect()
        assert opened[0].closed == 1
