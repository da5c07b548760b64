"""Threads for sync handlers. They are daemons: one that never returns does not hold up the exit."""

from __future__ import annotations

from concurrent.futures import Future
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_Work = tuple["Future[Any]", "Callable[[], Any]"]


class Threads:
    """Threads that are started when needed and then kept. Used from one thread only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._count = 0
        self._busy: set[Future[Any]] = set()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run ``call`` in a thread, with the caller's context variables."""
        self._busy = {future for future in self._busy if not future.done()}
        future: Future[Any] = Future()
        self._busy.add(future)
        context = copy_context()
        self._work.put((future, lambda: context.run(call)))
        if len(self._busy) > self._count:
            self._count += 1
            Thread(target=self._serve, name=f"{self._name}-{self._count}", daemon=True).start()
        return future

    def close(self) -> None:
        """Let the threads end when they have nothing more to do."""
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            future, call = work
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                future.set_exception(error)
            else:
                future.set_result(result)
            del work, future, call
