"""Reading what comes next while what came before is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
# So many objects are read, or wait, at once.
AHEAD = 8


def read_ahead(
    keys: Iterable[Key], read: Callable[[Key], Value], ahead: int = AHEAD
) -> Iterator[tuple[Key, Value]]:
    """Each key with `read(key)`, in order; threads read the next few. Raises what `read` does.

    >>> list(read_ahead([1, 2, 3], lambda k: k * k, ahead=2))
    [(1, 1), (2, 4), (3, 9)]
    """
    waiting: deque[tuple[Key, Future[Value]]] = deque()
    with ThreadPoolExecutor(ahead, thread_name_prefix="raymem-read") as pool:
        for key in keys:
            waiting.append((key, pool.submit(read, key)))
            if len(waiting) == ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for key, future in waiting:
            yield key, future.result()
