import asyncio
import threading

import pytest
from langchain_core.messages import HumanMessage

from metis_agent.errors import ConfigurationError
from metis_agent.tools import proxy
from metis_agent.tools.proxy import ResultCache


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_result_is_made_once():
    cache, made = ResultCache(), []
    assert cache.get("a", lambda: made.append(1) or "x") == ("x", False)
    assert cache.get("a", lambda: made.append(1) or "y") == ("x", True)
    assert cache.get("b", lambda: "z") == ("z", False)
    assert len(made) == 1


def test_a_result_has_its_time():
    clock = Clock()
    cache = ResultCache(seconds=10, clock=clock)
    cache.get("a", lambda: 1)
    clock.now = 9.9
    assert cache.get("a", lambda: 2) == (1, True)
    clock.now = 10.0
    assert cache.get("a", lambda: 3) == (3, False)


def test_the_least_recently_used_goes_first():
    cache = ResultCache(2)
    cache.get("a", lambda: 1)
    cache.get("b", lambda: 1)
    cache.get("a", lambda: 1)
    cache.get("c", lambda: 1)
    assert len(cache) == 2
    assert cache.get("a", lambda: 2) == (1, True)
    assert cache.get("b", lambda: 2) == (2, False)


@pytest.mark.parametrize(
    "hold",
    [lambda part: part, lambda part: [{"data": part}], lambda part: ("text", HumanMessage([{"base64": part}]))],
    ids=["alone", "in blocks", "in a message"],
)
def test_large_results_are_bounded_by_their_size(monkeypatch, hold):
    monkeypatch.setattr(proxy, "_MOST_BYTES", 1_000_000)
    cache = ResultCache()
    for key in range(20):
        assert cache.get(key, lambda: hold("x" * 300_000))[1] is False
    assert len(cache) == 3
    assert cache.get(19, lambda: "made again")[1] is True
    assert cache.get("larger than all", lambda: hold("x" * 2_000_000))[1] is False
    assert len(cache) == 1
    cache.clear()
    cache.get("small", lambda: hold("x"))
    cache.get("as small", lambda: hold("x"))
    assert len(cache) == 2


def test_what_may_not_be_kept_is_made_again():
    cache = ResultCache()
    assert cache.get("a", lambda: 1, lambda value: value > 1) == (1, False)
    assert len(cache) == 0
    assert cache.get("a", lambda: 2, lambda value: value > 1) == (2, False)
    assert cache.get("a", lambda: 3, lambda value: value > 1) == (2, True)


def test_a_failure_is_not_kept():
    cache = ResultCache()
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert cache.get("a", lambda: 1) == (1, False)


@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_ask_at_the_same_time_share_one_call(fails):
    cache, made, answers = ResultCache(), [], []
    everybody, answer = threading.Barrier(8), threading.Event()

    def make():
        made.append(1)
        answer.wait(5)
        if fails:
            raise ValueError("down")
        return "x"

    def ask():
        everybody.wait(5)
        try:
            answers.append(cache.get("a", make)[0])
        except ValueError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not made:
        pass
    answer.set()
    for thread in threads:
        thread.join(5)
    assert answers == ["down" if fails else "x"] * 8
    assert len(made) == 1 or fails  # one that came after the failure makes its own call


async def test_tasks_share_one_call_and_one_that_is_cancelled_hands_it_on():
    cache, made, end = ResultCache(), [], asyncio.Event()

    async def make():
        made.append(1)
        await end.wait()
        return len(made)

    first, second, third = (asyncio.create_task(cache.aget("a", make)) for _ in range(3))
    while not made:
        await asyncio.sleep(0)
    second.cancel()
    first.cancel()
    end.set()
    assert await third == (2, False)
    assert await cache.aget("a", make) == (2, True)
    with pytest.raises(asyncio.CancelledError):
        await second


def test_clear():
    cache = ResultCache()
    cache.get("a", lambda: 1)
    cache.clear()
    assert cache.get("a", lambda: 2) == (2, False)


@pytest.mark.parametrize("arguments", [{"max_entries": 0}, {"seconds": 0}, {"seconds": -1}])
def test_limits_have_limits(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        ResultCache(**arguments)
