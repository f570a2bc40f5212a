import asyncio
import contextvars
import subprocess
import sys
import threading
import time

import pytest

from metis_agent.deadline import DeadlineError, arun_in_thread, arun_within, run_within, start_in_thread

name = contextvars.ContextVar("name", default="nobody")


def test_a_result_or_an_error_in_time():
    assert run_within(5, lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        run_within(5, lambda: 1 / 0)


async def test_and_on_the_event_loop():
    assert await arun_within(5, arun_in_thread(lambda a: a + 1, 1)) == 2
    with pytest.raises(ZeroDivisionError):
        await arun_in_thread(lambda: 1 / 0)


async def test_the_time_is_up():
    end = threading.Event()
    began = time.perf_counter()
    with pytest.raises(DeadlineError):
        run_within(0.1, end.wait, 20)
    with pytest.raises(DeadlineError):
        await arun_within(0.1, arun_in_thread(end.wait, 20))
    with pytest.raises(DeadlineError):
        await arun_within(0.1, asyncio.sleep(20))
    assert time.perf_counter() - began < 1.0
    end.set()


async def test_a_timeout_of_the_code_is_its_own():
    def raises():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        run_within(5, raises)
    with pytest.raises(TimeoutError, match="mine"):
        await arun_within(5, arun_in_thread(raises))


def test_the_context_goes_along():
    name.set("caller")
    assert run_within(5, name.get) == "caller"
    assert start_in_thread(name.get).result(5) == "caller"


def test_threads_are_used_again():
    first = run_within(5, threading.get_ident)
    assert {run_within(5, threading.get_ident) for _ in range(20)} == {first}


def test_nothing_waits_for_what_was_left_behind():
    code = (
        "import time; from metis_agent.deadline import DeadlineError, run_within\n"
        "try: run_within(0.05, time.sleep, 60)\nexcept DeadlineError: print('left')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=True)
    assert done.stdout == "left\n"
