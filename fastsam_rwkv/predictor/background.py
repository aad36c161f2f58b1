"""Work on a stream of items in a background thread. Standard library only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2  # items in work beyond the one that is waited for: one is worked on, one is ready


def in_background(
    function: Callable[[T], R], items: Iterable[T], ahead: int = AHEAD, *, prefetch: bool = False
) -> Iterator[R]:
    """Yield `function(item)` of each item, in order. A thread computes it while the caller works on other items.

    Items are taken in the caller's thread. An exception, of an item or of the function, is raised when it is its turn:
    after the results of all items before it.

    Args:
        function: Runs in the thread.
        items: Taken only while the next result is not ready.
        ahead: Most items that are taken beyond the next result.
        prefetch: Take as many items as that before each result, even if it is ready. For items that take no time.
    """
    waiting: deque[Future[R]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(1) as pool:
        more = True
        try:
            while True:
                while more and len(waiting) <= ahead and (prefetch or not waiting or not waiting[0].done()):
                    try:
                        waiting.append(pool.submit(function, next(source)))
                    except StopIteration:
                        more = False
                    except Exception as error:  # of any type: it is raised again below
                        more = False
                        waiting.append(Future())
                        waiting[-1].set_exception(error)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
