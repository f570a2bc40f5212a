"""Many threads ask at once, one forward pass answers them.

There is no thread of its own: whoever holds the lock works off everything that waits, and those who come
meanwhile wait for the next round. Alone, a request is answered at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Batcher"]

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batcher(Generic[Request, Answer]):
    """Gathers the requests of concurrent threads.

    Args:
        work: Answers a batch, in order; never called twice at the same time.
        limit: Requests in a batch, at most.
    """

    def __init__(self, work: Callable[[Sequence[Request]], Sequence[Answer]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._waiting: list[_Place[Request, Answer]] = []
        self._guard, self._turn = threading.Lock(), threading.Lock()

    def ask(self, request: Request) -> Answer:
        """The answer to one request; what `work` raises of it is raised here."""
        place: _Place[Request, Answer] = _Place(request)
        with self._guard:
            self._waiting.append(place)
        while not place.done:
            with self._turn:
                if not place.done:
                    self._answer_some()
        return place.result()

    def _answer_some(self) -> None:
        with self._guard:
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
        try:
            answers = self._work([place.request for place in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].fail(error)
            # One bad request must not fail those that happened to come with it.
            for place in batch if len(batch) > 1 else []:
                try:
                    place.answer(self._work([place.request])[0])
                except Exception as own:
                    place.fail(own)
        except BaseException as error:
            for place in batch:
                place.fail(error)
            raise
        else:
            for place, answer in zip(batch, answers, strict=True):
                place.answer(answer)


class _Place(Generic[Request, Answer]):
    def __init__(self, request: Request) -> None:
        self.request = request
        self.done = False
        self._answers: list[Answer] = []
        self._error: BaseException | None = None

    def answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        self.done = True

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.done = True

    def result(self) -> Answer:
        if self._error is not None:
            raise self._error
        return self._answers[0]
