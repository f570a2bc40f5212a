import asyncio
import subprocess
import sys
import threading
import time
from contextvars import ContextVar

import pytest

from metis_agent.deadline import DeadlineError, NotCalledError, arun_in_thread, arun_within, run_within, start_in_thread

PLACE = ContextVar("PLACE", default="nowhere")


def fail(error: BaseException) -> None:
    raise error


def test_results_and_errors_come_back():
    assert run_within(5, lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        run_within(5, lambda: 1 / 0)


def test_a_tools_own_timeout_error_is_not_the_deadline():
    with pytest.raises(TimeoutError, match="socket"):
        run_within(5, fail, TimeoutError("socket"))


async def test_what_hangs_is_left_behind():
    release = threading.Event()
    started = time.perf_counter()
    with pytest.raises(DeadlineError):
        run_within(0.05, release.wait, 30)
    with pytest.raises(DeadlineError):
        await arun_within(0.05, arun_in_thread(release.wait, 30))
    assert time.perf_counter() - started < 5
    release.set()


class Hanging:
    def __init__(self):
        self.release, self.calls = threading.Event(), 0

    def wait(self):
        self.calls += 1
        self.release.wait(30)


@pytest.mark.parametrize("is_async", [False, True])
def test_so_many_calls_of_one_thing_are_left_behind_and_no_more(monkeypatch, is_async):
    monkeypatch.setattr("metis_agent.deadline._MOST_LEFT", 3)
    one, other = Hanging(), Hanging()

    def call(it, seconds=0.02):
        if is_async:
            asyncio.run(arun_within(seconds, arun_in_thread(it.wait), of=it))
        else:
            run_within(seconds, it.wait, of=it)

    for _ in range(3):
        with pytest.raises(DeadlineError, match=r"^$"):
            call(one)
    for _ in range(2):
        with pytest.raises(NotCalledError, match="3 earlier calls took too long and go on"):
            call(one)
    with pytest.raises(DeadlineError, match=r"^$"):
        call(other)
    one.release.set(), other.release.set()
    until = time.monotonic() + 20
    while time.monotonic() < until:  # they end, and it is called again
        try:
            call(one, seconds=20)
            break
        except NotCalledError:
            time.sleep(0.01)
    assert one.calls == 4


async def test_a_run_that_is_broken_off_says_nothing_of_the_tool(monkeypatch):
    monkeypatch.setattr("metis_agent.deadline._MOST_LEFT", 1)
    one = Hanging()
    for _ in range(3):
        running = asyncio.create_task(arun_within(30, arun_in_thread(one.wait), of=one))
        await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    one.release.set()
    await arun_within(20, arun_in_thread(one.wait), of=one)


def test_the_callers_context_reaches_the_thread():
    token = PLACE.set("here")
    assert run_within(5, PLACE.get) == start_in_thread(PLACE.get).result(5) == "here"
    PLACE.reset(token)
    assert run_within(5, PLACE.get) == "nowhere"


def test_threads_are_used_again():
    first = run_within(5, threading.get_ident)
    assert {run_within(5, threading.get_ident) for _ in range(20)} == {first}


async def test_async_work_is_cancelled():
    cancelled = asyncio.Event()

    async def hang():
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(DeadlineError):
        await arun_within(0.05, hang())
    assert cancelled.is_set()


async def test_async_results_and_own_timeouts_come_back():
    assert await arun_within(5, arun_in_thread(lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        await arun_in_thread(lambda: 1 / 0)
    with pytest.raises(TimeoutError, match="socket"):
        await arun_within(5, arun_in_thread(fail, TimeoutError("socket")))

    async def own():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await arun_within(5, own())


def test_a_hung_call_keeps_neither_the_loop_nor_the_interpreter_alive():
    code = (
        "import asyncio, time\n"
        "from metis_agent.deadline import *\n"
        "async def main():\n"
        "    try: await arun_within(0.05, arun_in_thread(time.sleep, 60))\n"
        "    except DeadlineError: pass\n"
        "asyncio.run(main())\n"
        "try: run_within(0.05, time.sleep, 60)\n"
        "except DeadlineError: print('left behind')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "left behind"


async def test_many_calls_of_one_loop_keep_their_results_and_contexts() -> None:
    number_of: ContextVar[int] = ContextVar("number_of")

    async def one(number: int) -> int:
        number_of.set(number)
        return await arun_in_thread(number_of.get)

    assert await asyncio.gather(*[one(number) for number in range(50)]) == list(range(50))


async def test_calls_that_wait_for_each_other_get_a_thread_each() -> None:
    everybody = threading.Barrier(40)
    await asyncio.wait_for(asyncio.gather(*[arun_in_thread(everybody.wait, 20) for _ in range(40)]), 25)


async def test_a_stop_iteration_reaches_who_awaits() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(arun_in_thread(next, iter(())), 10)
