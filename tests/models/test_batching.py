import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from metis_agent.errors import ConfigurationError
from metis_agent.models import batching
from metis_agent.models.batching import MicroBatcher


class Recorder:
    """Doubles numbers, and remembers the batches; can be held until released."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Event()
        self.released = threading.Event()
        if not held:
            self.released.set()

    def __call__(self, requests: Sequence[int], joining: Callable[[int], Sequence[int]]) -> Iterator[Mapping[int, int]]:
        self.batches.append(list(requests))
        self.started.set()
        assert self.released.wait(10)
        if -1 in requests:
            raise ValueError("a bad request")
        yield {place: 2 * request for place, request in enumerate(requests)}


def test_concurrent_requests_run_together_and_keep_their_results() -> None:
    recorder = Recorder()
    batcher = MicroBatcher(recorder, max_batch=100, linger=0.2)
    futures = [batcher.submit(number) for number in range(50)]
    assert [future.result(10) for future in futures] == [2 * number for number in range(50)]
    assert recorder.batches == [list(range(50))]


def test_a_full_batch_does_not_linger() -> None:
    recorder = Recorder()
    batcher = MicroBatcher(recorder, max_batch=4, linger=30.0)
    assert [future.result(10) for future in [batcher.submit(number) for number in range(4)]] == [0, 2, 4, 6]
    assert recorder.batches == [[0, 1, 2, 3]]


def test_more_than_a_batch_is_split_in_order() -> None:
    recorder = Recorder(held=True)
    batcher = MicroBatcher(recorder, max_batch=4, linger=0.0)
    futures = [batcher.submit(0)]
    assert recorder.started.wait(10)
    futures += [batcher.submit(number) for number in range(1, 10)]
    recorder.released.set()
    assert [future.result(10) for future in futures] == list(range(0, 20, 2))
    assert recorder.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_an_error_reaches_everyone_in_the_batch_and_nobody_else() -> None:
    batcher = MicroBatcher(Recorder(), max_batch=3, linger=5.0)
    bad = [batcher.submit(number) for number in (1, -1, 3)]
    for future in bad:
        with pytest.raises(ValueError, match="bad request"):
            future.result(10)
    assert [future.result(10) for future in [batcher.submit(number) for number in (1, 2, 3)]] == [2, 4, 6]


def test_a_wrong_number_of_results_is_an_error_for_all() -> None:
    batcher: MicroBatcher[int, int] = MicroBatcher(lambda requests, joining: iter([{}]), max_batch=2)
    with pytest.raises(ValueError, match="1 requests of a batch got no result"):
        batcher.submit(1).result(10)


def test_a_cancelled_request_is_dropped() -> None:
    recorder = Recorder(held=True)
    batcher = MicroBatcher(recorder, max_batch=4, linger=0.0)
    running = batcher.submit(0)
    assert recorder.started.wait(10)
    kept, withdrawn = batcher.submit(1), batcher.submit(2)
    assert withdrawn.cancel()
    recorder.released.set()
    assert (running.result(10), kept.result(10)) == (0, 2)
    assert recorder.batches == [[0], [1]]


async def test_a_cancelled_task_withdraws_its_request() -> None:
    recorder = Recorder(held=True)
    batcher = MicroBatcher(recorder, max_batch=4, linger=0.0)
    running = asyncio.create_task(batcher.ask(0))
    await asyncio.to_thread(recorder.started.wait, 10)
    task = asyncio.create_task(batcher.ask(1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    recorder.released.set()
    assert await running == 0
    assert recorder.batches == [[0]]


async def test_awaiting_callers_get_errors_too() -> None:
    batcher = MicroBatcher(Recorder(), max_batch=2, linger=5.0)
    results = await asyncio.gather(batcher.ask(1), batcher.ask(-1), return_exceptions=True)
    assert [str(result) for result in results] == ["a bad request"] * 2


async def test_closing_ends_the_wait_of_tasks() -> None:
    recorder = Recorder(held=True)
    batcher = MicroBatcher(recorder, max_batch=1, linger=0.0)
    running, waiting = (asyncio.create_task(batcher.ask(number)) for number in (0, 1))
    await asyncio.to_thread(recorder.started.wait, 10)
    threading.Timer(0.05, recorder.released.set).start()
    await asyncio.to_thread(batcher.close)
    assert await running == 0
    with pytest.raises(CancelledError):
        await waiting


def test_a_loop_that_closed_meanwhile_does_no_harm() -> None:
    recorder = Recorder(held=True)
    batcher = MicroBatcher(recorder, max_batch=1, linger=0.0)

    async def leave() -> None:
        task = asyncio.create_task(batcher.ask(0))
        await asyncio.to_thread(recorder.started.wait, 10)
        task.cancel()

    asyncio.run(leave())
    recorder.released.set()
    assert batcher.submit(1).result(10) == 2


async def test_a_wave_of_tasks_stays_together() -> None:
    # Each task comes back as soon as it is answered; the wave must not fall apart into small batches.
    recorder = Recorder()
    batcher = MicroBatcher(recorder, max_batch=64, linger=0.05)

    async def three_turns() -> None:
        for _ in range(3):
            await batcher.ask(1)

    await asyncio.gather(*[three_turns() for _ in range(64)])
    assert [len(batch) for batch in recorder.batches] == [64, 64, 64]


def test_threads_share_batches() -> None:
    recorder = Recorder()
    batcher = MicroBatcher(recorder, max_batch=16, linger=1.0)
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda number: batcher.submit(number).result(10), range(16)))
    assert results == list(range(0, 32, 2))
    assert len(recorder.batches) == 1


def test_no_thread_before_the_first_request_and_none_after_idling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_IDLE_SECONDS", 0.02)
    batcher = MicroBatcher(Recorder(), max_batch=4)
    assert batcher._worker is None
    assert batcher.submit(1).result(10) == 2
    deadline = time.monotonic() + 10
    while batcher._worker is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batcher._worker is None
    assert batcher.submit(2).result(10) == 4


def test_an_unused_batcher_can_be_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_IDLE_SECONDS", 0.02)
    batcher = MicroBatcher(Recorder(), max_batch=4)
    worker_done = batcher.submit(1)
    worker_done.result(10)
    worker = batcher._worker
    if worker is not None:
        worker.join(10)
    gone = weakref.ref(batcher)
    del batcher, worker_done, worker
    gc.collect()
    assert gone() is None


def test_closing_cancels_what_waits_and_refuses_more() -> None:
    recorder = Recorder(held=True)
    batcher = MicroBatcher(recorder, max_batch=1, linger=0.0)
    running = batcher.submit(1)
    assert recorder.started.wait(10)
    waiting = batcher.submit(2)
    threading.Timer(0.05, recorder.released.set).start()
    batcher.close()
    assert running.result(10) == 2
    with pytest.raises(CancelledError):
        waiting.result(10)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(3)


def test_interpreter_exit_with_a_batch_running_is_quick_and_clean() -> None:
    program = """
        import time
        from metis_agent.models.batching import MicroBatcher
        def run(requests, joining):
            while not batcher.closed:
                time.sleep(0.01)
            yield dict(enumerate(requests))
        batcher = MicroBatcher(run, max_batch=1)
        batcher.submit(1)
        time.sleep(0.1)
        batcher.submit(2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_batch": 1, "linger": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        MicroBatcher(Recorder(), **wrong)  # type: ignore[arg-type]


async def test_tasks_that_ask_rounds_apart_get_one_batch_though_nobody_lingers() -> None:
    recorder = Recorder()
    batcher = MicroBatcher(recorder, max_batch=100, linger=0.0)

    async def ask(number: int) -> int:
        for _ in range(number % 10):
            await asyncio.sleep(0)
        return await batcher.ask(number)

    assert await asyncio.gather(*[ask(number) for number in range(40)]) == [2 * number for number in range(40)]
    assert [sorted(batch) for batch in recorder.batches] == [list(range(40))]


async def test_a_full_batch_of_tasks_does_not_wait_for_more() -> None:
    recorder = Recorder()
    batcher = MicroBatcher(recorder, max_batch=4, linger=30.0)
    assert await asyncio.wait_for(asyncio.gather(*[batcher.ask(number) for number in range(8)]), 10) == [
        *range(0, 16, 2)
    ]
    assert [len(batch) for batch in recorder.batches] == [4, 4]


async def test_what_tasks_ask_of_a_closed_batcher_is_refused() -> None:
    batcher = MicroBatcher(Recorder(), max_batch=4)
    asked = asyncio.create_task(batcher.ask(1))
    await asyncio.sleep(0)
    batcher.close()
    with pytest.raises(CancelledError):
        await asked
    with pytest.raises(RuntimeError, match="closed"):
        await batcher.ask(2)


class Stepper:
    """Doubles each number after as many steps as it says, and lets others join; a step waits until it is let go."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.running: list[list[int]] = []
        """At each step."""

    def __call__(self, requests: Sequence[int], joining: Callable[[int], Sequence[int]]) -> Iterator[Mapping[int, int]]:
        asked, left = list(requests), dict(enumerate(requests))
        while left:
            assert self.steps.acquire(timeout=10)
            self.running.append([asked[place] for place in left])
            if -1 in left.values():
                raise ValueError("a bad request")
            left = {place: number - 1 for place, number in left.items()}
            ended = [place for place, number in left.items() if not number]
            yield {place: 2 * asked[place] for place in ended}
            for place in ended:
                del left[place]
            for number in joining(len(left)):
                left[len(asked)] = number
                asked.append(number)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.release()


def continuous(stepper: Stepper, *numbers: int, most: int = 100) -> tuple[MicroBatcher[int, int], list[Future[int]]]:
    """A batcher in whose batch these run."""
    batcher = MicroBatcher(stepper, max_batch=most, linger=0.05, continuous=True)
    futures = [batcher.submit(number) for number in numbers]
    stepper.go(1)
    wait_until(lambda: len(stepper.running) == 1)
    return batcher, futures


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_who_is_done_need_not_wait_for_the_others() -> None:
    stepper = Stepper()
    _, (short, long) = continuous(stepper, 1, 3)
    assert short.result(10) == 2
    assert not long.done()
    stepper.go(2)
    assert long.result(10) == 6


def test_who_waits_joins_the_running_batch() -> None:
    stepper = Stepper()
    batcher, (first, *_) = continuous(stepper, 9, 9, 9)
    joined = batcher.submit(2)
    stepper.go(4)
    assert joined.result(10) == 4
    assert not first.done()
    assert stepper.running.count([9, 9, 9, 2]) == 2
    stepper.go(9)
    assert first.result(10) == 18


def test_a_few_who_wait_do_not_stop_many() -> None:
    stepper = Stepper()
    batcher, (*_, last) = continuous(stepper, *[4] * 20)
    late = batcher.submit(1)
    stepper.go(9)
    assert (last.result(10), late.result(10)) == (8, 2)
    assert stepper.running == [[4] * 20] * 4 + [[1]]


def test_no_more_run_at_once_than_may() -> None:
    stepper = Stepper()
    batcher, _ = continuous(stepper, 1, 5, 5, most=3)
    futures = [batcher.submit(5) for _ in range(6)]
    stepper.go(60)
    assert [future.result(10) for future in futures] == [10] * 6
    assert max(map(len, stepper.running)) == 3


def test_an_error_reaches_those_who_joined_and_not_those_who_are_done() -> None:
    stepper = Stepper()
    batcher, (done, running) = continuous(stepper, 1, 9)
    assert done.result(10) == 2
    joined = batcher.submit(-1)
    stepper.go(3)
    for future in (running, joined):
        with pytest.raises(ValueError, match="bad request"):
            future.result(10)
    assert batcher.submit(1).result(10) == 2


def test_who_has_withdrawn_does_not_join() -> None:
    stepper = Stepper()
    batcher, (running,) = continuous(stepper, 5)
    withdrawn = batcher.submit(7)
    assert withdrawn.cancel()
    stepper.go(9)
    assert running.result(10) == 10
    assert 7 not in {number for numbers in stepper.running for number in numbers}


async def test_tasks_are_answered_as_their_requests_end() -> None:
    stepper = Stepper()
    batcher = MicroBatcher(stepper, max_batch=10, linger=0.0, continuous=True)
    short, long = (asyncio.create_task(batcher.ask(number)) for number in (1, 4))
    await asyncio.sleep(0)
    stepper.go(1)
    assert await asyncio.wait_for(short, 10) == 2
    assert not long.done()
    stepper.go(3)
    assert await asyncio.wait_for(long, 10) == 8
