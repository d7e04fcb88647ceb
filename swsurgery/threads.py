"""Run calls in a pool of threads that also works if the system allows few threads or none."""

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
    """Up to `threads` threads that start submitted calls in order. Leaving the `with` block waits for all calls.

    A limit on processes or memory can prevent a thread from starting. The threads that did start then make all calls.
    If no thread started, `submit` makes each call itself. If `threads` is less than `least`, no thread is started.
    """

    def __init__(self, threads: int, name: str = "swsurgery", *, least: int = 2):
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError, MemoryError):  # "can't start new thread"
            for number in range(threads if threads >= least else 0):
                thread = threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)

    @property
    def started(self) -> bool:
        """True if the pool has a thread."""
        return bool(self._threads)

    def submit(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> Future[R]:
        """Schedule a call and return its future. Without threads, make the call now and raise its exception."""
        future: Future[R] = Future()
        if not self._threads:
            future.set_result(call(*arguments, **named))
            return future

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*arguments, **named)
            except BaseException as error:  # noqa: BLE001 (the future raises the error in the caller)
                future.set_exception(error)
            else:
                future.set_result(result)

        self._tasks.put(run)
        return future

    def map(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Submit a call for each item, then yield the results in the order of `items`."""
        futures = [self.submit(call, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def shutdown(self, cancel: bool = False, wait: bool = True) -> None:
        """Wait for all submitted calls and end the threads. With `cancel`, drop the calls that have not started.

        Without `wait`, return at once; each thread ends after its present call.
        """
        if cancel:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # otherwise the result of this task would stay in memory until the next task

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.shutdown()
