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
    assert time.perf_counter() - began < 10
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


async def test_many_calls_of_one_loop_keep_their_results_and_contexts() -> None:
    number_of: contextvars.ContextVar[int] = contextvars.ContextVar("number_of")

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
