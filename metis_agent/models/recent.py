"""A bounded memory of a pure function's results: rendered templates, encoded texts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

ValueT = TypeVar("ValueT")


class Recent(Generic[ValueT]):
    """The most recently used results, by key. Safe in threads; a race only computes one twice.

    Args:
        size: What all results may weigh together; the newest is kept whatever it weighs.
        weigh: The weight of a result; by default each weighs 1.
    """

    def __init__(self, size: int, weigh: Callable[[ValueT], int] = lambda value: 1) -> None:
        self._size, self._weigh = size, weigh
        self._weight = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, ValueT] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, compute: Callable[[], ValueT]) -> ValueT:
        """The value for a key, computed where it is not remembered."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._weight += self._weigh(value)
            while self._weight > self._size and len(self._values) > 1:
                self._weight -= self._weigh(self._values.popitem(last=False)[1])
        return value
