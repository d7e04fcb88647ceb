"""A pool of threads that works with fewer of them, or with none, if the system does not let it start more."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """At most `threads` threads that do what is submitted, in order. A context manager; leaving it waits for them.

    A limit on processes or on memory can forbid a further thread. Then the threads that did start do all the work. If
    there is none, `submit` does it at once. With `threads` of 1 or less nothing is started.
    """

    def __init__(self, threads: int, name: str = "swsurgery"):
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError, MemoryError):  # "can't start new thread"
            for number in range(threads if threads > 1 else 0):
                thread = threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def submit(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> Future[R]:
        """Return what will be the result of the call. Without threads, the call is made here and may raise."""
        future: Future[R] = Future()
        if not self._threads:
            future.set_result(call(*arguments, **named))
            return future

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*arguments, **named)
            except BaseException as error:  # noqa: BLE001 (it is raised where the result is asked for)
                future.set_exception(error)
            else:
                future.set_result(result)

        self._tasks.put(run)
        return future

    def map(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results in the order of `items`, all of which are submitted first."""
        futures = [self.submit(call, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def shutdown(self, cancel: bool = False) -> None:
        """Finish what was submitted, then end the threads. With `cancel`, drop what has not begun."""
        if cancel:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # or its result would live until the next one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.shutdown()
