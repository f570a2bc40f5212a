"""E2B's real client against a server on this machine that speaks its protocol and runs the code for real."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest

from metis_agent.errors import (
    ConfigurationError,
    InputError,
    MissingDependencyError,
    SandboxGoneError,
    SandboxUnavailableError,
)
from metis_agent.tools.sandboxes import E2BSandbox, E2BSession, Execution, Sandbox, SandboxLimits
from metis_agent.tools.sandboxes.inside.serve import MAX_CODE_BYTES
from metis_agent.tools.sandboxes.report import report

from .e2b_server import KEY, E2BServer
from .e2b_server import Sandbox as RemoteSandbox

pytest.importorskip("e2b_code_interpreter")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

LIMITS = SandboxLimits(seconds=20, output_bytes=4096)
GRACE = 0.5


@pytest.fixture
def sandbox(server: E2BServer) -> Iterator[E2BSandbox]:
    with E2BSandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox: E2BSandbox) -> Iterator[E2BSession]:
    with sandbox.open() as session:
        yield session


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def only(server: E2BServer) -> RemoteSandbox:
    (remote,) = server.sandboxes.values()
    return remote


def started(server: E2BServer, calls: int = 1) -> bool:
    return server.requests.count(("POST", "/execute")) >= calls


# --- what it is for --------------------------------------------------------------------------------------------------


def test_state_lasts_in_a_session_and_never_crosses_to_another(sandbox: E2BSandbox, session: E2BSession) -> None:
    assert isinstance(sandbox, Sandbox)
    assert session.run("x = 41\nopen('note', 'w').write('mine')").ok
    assert session.run("print('seen')\nx + 1").result == "42"
    with sandbox.open() as other:
        assert "NameError" in other.run("x").traceback
        assert "FileNotFoundError" in other.run("open('note')").traceback
    assert session.run("open('note').read()").result == "mine"


def test_what_it_says(session: E2BSession) -> None:
    execution = session.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n[1, 2]")
    assert (execution.status, execution.stdout, execution.stderr) == ("ok", "out\n", "err\n")
    assert (execution.result, execution.truncated) == ("[1, 2]", False)
    assert 0 < execution.seconds < 20
    assert report(execution) == "out\nstderr:\nerr\n[1, 2]"
    assert session.run("None").result is None
    assert session.run("display({'a': 1})").stdout == "{'a': 1}\n"


def test_errors_in_words(session: E2BSession) -> None:
    execution = session.run("print('begun')\n1 / 0")
    assert (execution.status, execution.stdout) == ("error", "begun\n")
    assert execution.traceback.endswith("ZeroDivisionError: division by zero")
    assert "\x1b" not in execution.traceback
    assert not execution.state_lost
    assert "Nothing can be installed here" in report(session.run("import absent_package"))
    assert "SyntaxError" in session.run("a b").traceback
    long = session.run("raise ValueError('x' * 100_000 + 'the end')")
    assert long.truncated
    assert len(long.traceback) == 4096
    assert long.traceback.endswith("the end")


def test_text_of_any_kind(session: E2BSession) -> None:
    # httpx takes some of these for the end of a line.
    odd = "a\x85b\u2028c\u2029d\x0be\x1cf é 東京 \U0001f600"
    assert session.run(f"print({odd!r})").stdout == odd + "\n"
    assert session.run("print('\ud800')").stdout == "?\n"
    cut = session.run("print('é' * 4096)")
    assert (cut.stdout, cut.truncated) == ("é" * 2048, True)
    with pytest.raises(InputError, match="bytes long"):
        session.run("#" * (MAX_CODE_BYTES + 1))
    with pytest.raises(ConfigurationError, match="timeout=0"):
        session.run("1", timeout=0)


def test_a_process_that_ends(session: E2BSession) -> None:
    session.run("x = 1")
    execution = session.run("import os\nprint('begun', flush=True)\nimport time; time.sleep(0.1)\nos._exit(1)")
    assert (execution.status, execution.stdout) == ("killed", "begun\n")
    assert "Variables and files of earlier calls are gone." in report(execution)
    assert "NameError" in session.run("x").traceback


def test_calls_of_several_threads_come_one_after_another(session: E2BSession) -> None:
    session.run("inside, most = 0, 0\nimport time")
    code = "inside += 1\nmost = max(most, inside)\ntime.sleep(0.05)\ninside -= 1"
    with ThreadPoolExecutor(4) as threads:
        assert all(execution.ok for execution in threads.map(session.run, [code] * 4))
    assert session.run("most").result == "1"


# --- deadlines -------------------------------------------------------------------------------------------------------


def within_its_time(attempt: Callable[[], object], limit: float) -> object:
    """The outcome of an attempt that ended at most `GRACE` after its limit; on a busy machine, of the third."""
    for _ in range(3):
        began = time.monotonic()
        outcome = attempt()
        took = time.monotonic() - began
        if took <= limit + GRACE:
            return outcome
    raise AssertionError(f"it took {took} s, with a limit of {limit} s")


def test_code_that_goes_on(server: E2BServer, session: E2BSession) -> None:
    def attempt() -> Execution:
        session.run("x = 1")
        return session.run("print('begun', flush=True)\nwhile True: pass", timeout=0.5)

    execution = within_its_time(attempt, 0.5)
    assert isinstance(execution, Execution)
    assert (execution.status, execution.stdout) == ("timeout", "begun\n")
    assert report(execution).startswith("begun\nStopped after 0.5 s. Variables and files")
    # The SDK alone would hang in the next call.
    assert within_its_time(lambda: session.run("'x' in dir()", timeout=20).result, 10) == "False"
    until(lambda: len(server.sandboxes) == 1)


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_server_that_stalls_or_drips(server: E2BServer, session: E2BSession, fault: str) -> None:
    def attempt() -> Execution:
        server.fault = fault
        return session.run("1", timeout=0.5)

    execution = within_its_time(attempt, 0.5)
    assert isinstance(execution, Execution)
    assert execution.status == "timeout"
    assert session.run("1").result == "1"


def test_a_server_that_never_answers_is_not_the_codes_fault(server: E2BServer, session: E2BSession) -> None:
    def attempt() -> None:
        server.fault = "stall before the head"
        with pytest.raises(SandboxGoneError, match=r"did not answer within 0.5 s"):
            session.run("1", timeout=0.5)

    within_its_time(attempt, 0.5)
    assert session.run("1").result == "1"


def test_a_sandbox_that_comes_too_late_is_killed(server: E2BServer) -> None:
    server.create_fault, server.stall_seconds = "stall", 0.6
    with E2BSandbox(LIMITS, open_seconds=0.3) as sandbox:
        with pytest.raises(SandboxGoneError, match=r"no sandbox within 0.3 s"):
            sandbox.open()
        until(lambda: server.made == 1 or server.requests.count(("POST", "/v2/sandboxes")) > 1)
    until(lambda: server.sandboxes == {})


# --- floods and forgeries --------------------------------------------------------------------------------------------


def test_one_message_of_100_mb(session: E2BSession) -> None:
    execution = session.run("print('x' * 100_000_000)")
    assert execution.status == "killed"
    assert "more than 16 MB of output" in execution.reason
    assert session.run("1").result == "1"


def test_many_messages(server: E2BServer, session: E2BSession) -> None:
    execution = session.run(
        "import sys\nfor _ in range(100):\n    print('x' * 20_000)\n    sys.stderr.write('y' * 20_000)"
    )
    assert (execution.status, execution.truncated) == ("ok", True)
    assert (execution.stdout, execution.stderr) == ("x" * 4096, "y" * 4096)
    server.sent = 0
    flood = session.run("while True:\n    print('x' * 1_000_000)\n    import time; time.sleep(0.02)")
    assert (flood.status, flood.stdout, flood.truncated) == ("killed", "x" * 4096, True)
    # What is on its way is lost; no more than that was taken.
    assert server.sent < 40_000_000
    assert session.run("1").result == "1"


def test_a_flood_does_not_delay_other_sessions(sandbox: E2BSandbox, session: E2BSession) -> None:
    with sandbox.open() as other, ThreadPoolExecutor(1) as threads:

        def attempt() -> Execution:
            flood = threads.submit(session.run, "print('x' * 100_000_000)")
            execution = other.run("while True: pass", timeout=0.5)
            flood.result()
            return execution

        for _ in range(3):
            execution = attempt()
            if execution.seconds < 0.5 + GRACE:
                break
        assert execution.status == "timeout"
        assert execution.seconds < 0.5 + GRACE


@pytest.mark.parametrize("fault", ["no JSON", "no object", "no text", "no image", "deep"])
def test_answers_that_are_none(server: E2BServer, session: E2BSession, fault: str) -> None:
    server.fault = fault
    execution = session.run("1")
    assert execution.status == "killed"
    assert "broke the protocol" in execution.reason
    assert session.run("1").result == "1"


# --- a service that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "cut between lines", "500", "401"])
def test_a_call_that_is_cut_off(server: E2BServer, session: E2BSession, fault: str) -> None:
    session.run("x = 1")
    server.fault = fault
    with pytest.raises(SandboxGoneError):
        session.run("x")
    assert "NameError" in session.run("x").traceback
    until(lambda: len(server.sandboxes) == 1)


def test_a_server_that_dies_in_mid_call(server: E2BServer, session: E2BSession) -> None:
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(session.run, "import time; time.sleep(60)")
        until(lambda: started(server))
        server.die()
        with pytest.raises(SandboxGoneError):
            call.result(timeout=15)
    with pytest.raises(SandboxGoneError, match="can't be reached"):
        session.run("1")
    back = E2BServer(server.server_address[1])
    try:
        assert session.run("2").result == "2"
    finally:
        back.stop()


def test_a_server_that_is_away_between_calls_finds_the_session_again(server: E2BServer, session: E2BSession) -> None:
    session.run("x = 7")
    server.die()
    with pytest.raises(SandboxGoneError, match="the code did not run"):
        session.run("x = 8")
    back = E2BServer(server.server_address[1])
    back.sandboxes = server.sandboxes
    try:
        assert session.run("x").result == "7"
    finally:
        back.stop()


def test_a_paused_sandbox_goes_on_where_it_was(server: E2BServer, session: E2BSession) -> None:
    session.run("x = 7")
    only(server).paused = True
    assert session.run("x").result == "7"


def test_a_sandbox_that_ended_between_calls(server: E2BServer, session: E2BSession) -> None:
    session.run("x = 7")
    server.remove(only(server))
    execution = session.run("x")
    assert execution.status == "killed"
    assert report(execution) == (
        "The sandbox had ended before this call, so the code did not run. "
        "Variables and files of earlier calls are gone."
    )
    assert "NameError" in session.run("x").traceback


def test_a_sandbox_that_ends_under_a_call(server: E2BServer, session: E2BSession) -> None:
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(session.run, "import time; time.sleep(60)")
        until(lambda: started(server))
        server.remove(only(server))
        assert call.result(timeout=15).status == "killed"
    assert session.run("1").result == "1"


def test_its_end_is_put_off(server: E2BServer, session: E2BSession, monkeypatch: pytest.MonkeyPatch) -> None:
    from metis_agent.tools.sandboxes.e2b import service

    remote = only(server)
    assert 800 < remote.ends - time.monotonic() <= 900
    session.run("x = 7")
    extend = ("POST", f"/sandboxes/{remote.id}/timeout")
    assert extend not in server.requests
    monkeypatch.setattr(service, "_EXTEND_EVERY", 0.0)
    remote.extend(5)
    assert session.run("x").result == "7"
    assert extend in server.requests
    assert 800 < remote.ends - time.monotonic() <= 900
    remote.extend(-1)
    assert session.run("x").status == "killed"


def test_a_busy_service_is_asked_again(server: E2BServer, sandbox: E2BSandbox) -> None:
    server.create_fault = "503"
    with sandbox.open() as session:
        assert session.run("1").result == "1"
    server.create_fault = "500"
    with pytest.raises(SandboxGoneError, match="500"):
        sandbox.open()


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_wrong_key(server: E2BServer) -> None:
    with E2BSandbox(LIMITS, api_key="e2b_wrong_but_secret") as sandbox:
        with pytest.raises(SandboxUnavailableError, match=r"refused the key.*401.*Set E2B_API_KEY") as caught:
            sandbox.open()
        assert "wrong_but_secret" not in str(caught.value)
        assert "wrong_but_secret" not in repr(sandbox._service.settings)


def test_no_key_and_no_sdk(server: E2BServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2B_API_KEY")
    with pytest.raises(ConfigurationError, match="E2B_API_KEY is not set"):
        E2BSandbox()
    with pytest.raises(ConfigurationError, match=r"lifetime=0"):
        E2BSandbox(api_key=KEY, lifetime=0)
    with pytest.raises(ConfigurationError, match=r"lifetime=30"), E2BSandbox(api_key=KEY, lifetime=30) as sandbox:
        sandbox.open()
    monkeypatch.delitem(sys.modules, "metis_agent.tools.sandboxes.e2b.service")
    monkeypatch.setitem(sys.modules, "e2b", None)
    with pytest.raises(MissingDependencyError, match=r"metis-agent\[e2b\]"):
        E2BSandbox(api_key=KEY)


def test_the_key_never_enters_a_sandbox(server: E2BServer, session: E2BSession) -> None:
    session.run("1")
    assert server.in_sandbox_headers
    assert KEY not in str(server.in_sandbox_headers)
    assert KEY not in str(session.run("import os; print(dict(os.environ))"))


def test_debug_mode_does_not_make_sessions_share(
    server: E2BServer, sandbox: E2BSandbox, session: E2BSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_DEBUG", "true")
    session.run("x = 1")
    with sandbox.open() as other:
        assert "NameError" in other.run("x").traceback
    assert server.made == 2


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_a_session_kills_its_sandbox(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = sandbox.open()
    session.close()
    session.close()
    until(lambda: server.sandboxes == {})
    with pytest.raises(SandboxGoneError, match="closed"):
        session.run("1")


def test_closing_ends_a_call(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = sandbox.open()
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(session.run, "import time; time.sleep(60)") for _ in range(2)]
        until(lambda: started(server))
        session.close()
        for call in calls:
            with pytest.raises(SandboxGoneError, match="closed"):
                call.result(timeout=10)
    until(lambda: server.sandboxes == {})


def test_a_forgotten_session_is_killed(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = sandbox.open()
    session.run("1")
    del session
    gc.collect()
    until(lambda: server.sandboxes == {})


def test_closing_the_backend(server: E2BServer) -> None:
    sandbox = E2BSandbox(LIMITS)
    sessions = [sandbox.open() for _ in range(3)]

    def loops() -> int:
        return sum(thread.name == "metis-e2b" for thread in threading.enumerate())

    before = loops()
    sandbox.close()
    # It has waited for the service to confirm.
    assert server.sandboxes == {}
    assert loops() == before - 1
    sandbox.close()
    for session in sessions:
        session.close()
    with pytest.raises(SandboxGoneError, match="closed"):
        sandbox.open()


def test_the_end_of_the_process(server: E2BServer) -> None:
    code = "from metis_agent.tools.sandboxes import E2BSandbox\nprint(E2BSandbox().open().run('1').result)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert server.made == 1
    assert server.sandboxes == {}


def test_a_fork_leaves_it_alone(server: E2BServer, session: E2BSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.run("x = 7")
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: -1)
        with pytest.raises(SandboxGoneError, match="forked"):
            session.run("x")
    assert session.run("x").result == "7"


# --- async -----------------------------------------------------------------------------------------------------------


async def test_async_sessions(server: E2BServer, sandbox: E2BSandbox) -> None:
    sessions = await asyncio.gather(*(sandbox.aopen() for _ in range(3)))
    await asyncio.gather(*(session.arun(f"x = {number}") for number, session in enumerate(sessions)))
    found = await asyncio.gather(*(session.arun("x") for session in sessions))
    assert [execution.result for execution in found] == ["0", "1", "2"]
    assert (await sessions[0].arun("while True: pass", timeout=0.3)).status == "timeout"
    for session in sessions:
        session.close()
    await asyncio.to_thread(until, lambda: server.sandboxes == {})


async def test_cancelling_a_call_ends_its_code(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = await sandbox.aopen()
    await session.arun("x = 1")
    remote = only(server)
    call = asyncio.create_task(session.arun("import time; time.sleep(60)"))
    await asyncio.to_thread(until, lambda: started(server, 2))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(until, lambda: remote.id not in server.sandboxes)
    await asyncio.to_thread(until, lambda: remote.process.poll() is not None)
    assert "NameError" in (await session.arun("x")).traceback
    session.close()
    await asyncio.to_thread(until, lambda: server.sandboxes == {})


async def test_cancelling_an_opening_leaves_nothing(server: E2BServer, sandbox: E2BSandbox) -> None:
    server.create_fault, server.stall_seconds = "stall", 0.4
    opening = asyncio.create_task(sandbox.aopen())
    await asyncio.to_thread(until, lambda: ("POST", "/v2/sandboxes") in server.requests)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await asyncio.to_thread(until, lambda: server.made == 1)
    await asyncio.to_thread(until, lambda: server.sandboxes == {})


# --- images ----------------------------------------------------------------------------------------------------------

Image = pytest.importorskip("PIL.Image")


def opened(content: bytes):
    return Image.open(BytesIO(content))


def png(colour: str, size: tuple[int, int] = (3, 2)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_images_out(session: E2BSession) -> None:
    execution = session.run(
        "from PIL import Image\ndisplay(Image.new('RGB', (8, 4), 'red'))\nImage.new('L', (2, 2), 255)"
    )
    assert [(image.width, image.height, image.mime_type) for image in execution.images] == [
        (8, 4, "image/png"),
        (2, 2, "image/png"),
    ]
    assert opened(execution.images[0].content).getpixel((0, 0)) == (255, 0, 0)
    assert (execution.result, execution.stdout, execution.notes) == (None, "", ())


def test_images_out_that_are_too_many_too_large_or_none(sandbox: E2BSandbox) -> None:
    limits = SandboxLimits(seconds=20, images=2, image_pixels=10_000)
    with sandbox.open(limits) as session:
        many = session.run("from PIL import Image\nfor _ in range(5): display(Image.new('RGB', (200, 100)))")
        assert [(image.width, image.height) for image in many.images] == [(141, 70), (141, 70)]
        assert many.notes == (
            "Image 1 is shown smaller than it is: 141 x 70 instead of 200 x 100 pixels.",
            "Image 2 is shown smaller than it is: 141 x 70 instead of 200 x 100 pixels.",
            "3 more not shown: a call shows at most 2 images.",
        )
        none = session.run("class Fake:\n    def _repr_png_(self): return b'<svg>'\nFake()")
        assert none.images == ()
        assert none.notes[0].startswith("An image can't be shown: ")
        bomb = session.run("display(Image.new('1', (8_000, 8_000)))")
        assert bomb.images == ()
        assert "pixels" in bomb.notes[0]
        assert session.run("1").result == "1"


def test_images_in(server: E2BServer, session: E2BSession) -> None:
    from metis_agent.tools.sandboxes.pictures import InputImage

    def uploads() -> int:
        return server.requests.count(("POST", "/files"))

    images = {"image_1": InputImage(source=png("red")), "image_2": InputImage(source=png("blue"))}
    code = "image_1.size, image_1.getpixel((0, 0)), image_2.getpixel((0, 0))"
    assert session.run(code, images=images).result == "((3, 2), (255, 0, 0), (0, 0, 255))"
    assert uploads() == 2
    assert session.run(code, images=images).ok
    assert uploads() == 2
    changed = images | {"image_2": InputImage(source=png("lime"))}
    assert session.run("image_2.getpixel((0, 0))", images=changed).result == "(0, 255, 0)"
    assert uploads() == 3
    session.run("while True: pass", timeout=0.3)
    assert session.run(code, images=images).ok
    broken = session.run("image_3", images={"image_3": InputImage(source=b"nothing")})
    assert "NameError" in broken.traceback
    assert broken.notes[0].startswith("image_3 is not there: ")


def test_an_image_that_is_shown_came_from_png(session: E2BSession) -> None:
    from metis_agent.tools.sandboxes.pictures import InputImage

    shown = session.run("image_1.resize((6, 4))", images={"image_1": InputImage(source=png("red"))}).images[0]
    assert opened(shown.content).size == (6, 4)
