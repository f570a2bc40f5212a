import asyncio
import threading
import time
from contextlib import nullcontext

import pytest

from metis_agent.errors import ConfigurationError, ToolError
from metis_agent.tools.search import (
    AsyncSearchBackend,
    BreakerSearch,
    CachedSearch,
    DeadlineSearch,
    RetryingSearch,
    SearchHit,
    SearchUnavailableError,
    resilient,
)

HIT = SearchHit(text="found")


class Backend:
    """Answers with what it was given, one after the other; the last one for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def search(self, query, limit):
        self.asked.append((query, limit))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        return answer


class AsyncBackend(Backend):
    async def asearch(self, query, limit):
        return self.search(query, limit)


DOWN = SearchUnavailableError("down")


async def both(search, query="q", limit=3):
    """Search in both ways; they must agree."""
    return search.search(query, limit), await search.asearch(query, limit)


@pytest.mark.parametrize("kind", [Backend, AsyncBackend])
async def test_all_of_them_hand_through(kind):
    search = resilient(kind([HIT]))
    assert isinstance(search, AsyncSearchBackend)
    assert await both(search) == ([HIT], [HIT])


# --- deadline --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hang():
    """A search that never answers by itself."""
    end = threading.Event()
    yield lambda: end.wait(20) or []
    end.set()


def test_a_search_that_hangs_is_left_behind(hang):
    began = time.perf_counter()
    with pytest.raises(SearchUnavailableError, match=r"within 0\.1 seconds"):
        DeadlineSearch(Backend(hang), seconds=0.1).search("q", 1)
    assert time.perf_counter() - began < 10


async def test_and_so_it_is_on_the_event_loop_however_many_hang(hang):
    search, began = DeadlineSearch(Backend(hang), seconds=0.2), time.perf_counter()
    ended = await asyncio.gather(*(search.asearch("q", 1) for _ in range(40)), return_exceptions=True)
    assert time.perf_counter() - began < 10
    assert all(isinstance(error, SearchUnavailableError) for error in ended)


async def test_a_timeout_of_the_backend_is_its_own():
    search = DeadlineSearch(Backend(TimeoutError("mine")), seconds=5)
    with pytest.raises(TimeoutError, match="mine"):
        search.search("q", 1)
    with pytest.raises(TimeoutError, match="mine"):
        await search.asearch("q", 1)


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Backend, AsyncBackend])
async def test_what_may_pass_is_tried_again(kind):
    backend = kind(DOWN, DOWN, [HIT], DOWN, DOWN, [HIT])
    assert await both(RetryingSearch(backend, wait=0.001)) == ([HIT], [HIT])
    assert len(backend.asked) == 6


async def test_the_last_failure_is_the_one_that_is_raised():
    backend = Backend(DOWN, DOWN, SearchUnavailableError("third"))
    with pytest.raises(SearchUnavailableError, match="third"):
        RetryingSearch(backend, retries=2, wait=0).search("q", 1)
    assert len(backend.asked) == 3


@pytest.mark.parametrize("error", [ToolError("no results"), ValueError("defect")])
def test_what_will_not_pass_is_not_tried_again(error):
    backend = Backend(error)
    with pytest.raises(type(error)):
        RetryingSearch(backend, wait=0).search("q", 1)
    assert len(backend.asked) == 1


def test_no_retry_begins_after_the_time():
    def slowly():
        time.sleep(0.1)
        return DOWN

    backend = Backend(slowly)
    with pytest.raises(SearchUnavailableError):
        RetryingSearch(backend, retries=50, seconds=0.25, wait=0).search("q", 1)
    assert len(backend.asked) <= 3


# --- breaker ---------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def breaker(*answers, **settings):
    backend, clock = Backend(*answers), Clock()
    return BreakerSearch(backend, clock=clock, **settings), backend, clock


def fail(search):
    with pytest.raises(SearchUnavailableError) as caught:
        search.search("q", 1)
    return str(caught.value)


async def test_the_breaker_opens_and_closes():
    search, backend, clock = breaker(DOWN, DOWN, DOWN, [HIT], failures=2, pause=10)
    assert [fail(search), fail(search)] == ["down", "down"]
    assert "paused for 10 seconds" in fail(search)
    with pytest.raises(SearchUnavailableError, match="paused"):
        await search.asearch("q", 1)
    assert len(backend.asked) == 2
    clock.now = 10.0
    assert fail(search) == "down"  # one may try, and it opens again
    assert "paused" in fail(search)
    clock.now = 20.0
    assert await both(search) == ([HIT], [HIT])


def test_only_one_tries_after_the_pause():
    search, backend, clock = breaker(DOWN, lambda: fail(search) and [HIT], failures=1, pause=10)
    fail(search)
    clock.now = 10.0
    assert search.search("q", 1) == [HIT]  # meanwhile, another was refused
    assert len(backend.asked) == 2


def test_failures_have_to_be_in_a_row():
    search, backend, _ = breaker(DOWN, [HIT], DOWN, ToolError("none"), DOWN, DOWN, failures=2)
    for _ in range(5):
        with pytest.raises(ToolError) if not isinstance(backend.answers[0], list) else nullcontext():
            search.search("q", 1)
    assert len(backend.asked) == 5


# --- cache -----------------------------------------------------------------------------------------------------------


async def test_equal_searches_are_made_once():
    backend = Backend([HIT], [])
    search = CachedSearch(backend)
    found, again = await both(search)
    found.clear()  # the caller's own
    assert again == [HIT] == search.search("q", 3)
    assert search.search("q", 4) == []
    assert backend.asked == [("q", 3), ("q", 4)]


async def test_failures_are_not_kept():
    backend = Backend(DOWN, [HIT])
    search = CachedSearch(backend)
    fail(search)
    assert await both(search) == ([HIT], [HIT])


# --- all together ----------------------------------------------------------------------------------------------------


def test_never_later_than_the_deadline_and_not_for_long(hang):
    backend = Backend(hang)
    search, began = resilient(backend, seconds=0.2), time.perf_counter()
    messages = [fail(search) for _ in range(10)]
    assert time.perf_counter() - began < 10
    assert len(backend.asked) <= 4
    assert "within 0.2 seconds" in messages[0]
    assert "paused" in messages[-1]


@pytest.mark.parametrize(
    ("wrapper", "arguments"),
    [
        (DeadlineSearch, {"seconds": 0}),
        (RetryingSearch, {"retries": -1}),
        (RetryingSearch, {"seconds": 0}),
        (RetryingSearch, {"wait": -1}),
        (BreakerSearch, {"failures": 0}),
        (BreakerSearch, {"pause": 0}),
        (CachedSearch, {"seconds": 0}),
        (CachedSearch, {"max_entries": 0}),
    ],
)
def test_settings_are_checked(wrapper, arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        wrapper(Backend([]), **arguments)
