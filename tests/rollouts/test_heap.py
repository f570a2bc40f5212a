import gc
import threading
import weakref

import pytest

from metis_agent.rollouts.runner import _YOUNG, heap_set_aside


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)
    gc.enable()


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_the_heap_is_set_aside_and_comes_back():
    before = gc.get_threshold()
    with heap_set_aside():
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold() == (_YOUNG, *before[1:])
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_what_the_block_makes_is_still_collected():
    with heap_set_aside():
        gone = weakref.ref(Ring())
        gc.collect()
        assert gone() is None


def test_blocks_in_blocks_and_in_threads_end_with_the_outermost():
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with heap_set_aside():
            inside.set()
            assert leave.wait(10)

    before, thread = gc.get_threshold(), threading.Thread(target=other)
    with heap_set_aside(), heap_set_aside():
        thread.start()
        assert inside.wait(10)
    assert gc.get_freeze_count() > 0
    leave.set()
    thread.join()
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_an_error_in_the_block_gives_the_heap_back():
    before = gc.get_threshold()
    with pytest.raises(ValueError), heap_set_aside():
        raise ValueError
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_a_collector_that_is_off_and_a_heap_that_is_frozen_stay_so():
    gc.disable()
    with heap_set_aside():
        assert (gc.isenabled(), gc.get_freeze_count()) == (False, 0)
    assert not gc.isenabled()
    gc.enable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    with heap_set_aside():
        assert gc.get_freeze_count() <= frozen  # objects may die, but none are added
    assert gc.get_freeze_count() > 0
