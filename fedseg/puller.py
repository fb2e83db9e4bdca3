"""Fetches answers one by one, and does not wait for one that is stuck: Flower announces an answer before all of it has arrived.

It then waits for the rest, for up to two hours, while the site's line is slow, its gate was killed in the middle, or its key was
revoked; meanwhile nobody else's answer would be fetched and no deadline kept.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

STUCK_SECONDS = 2.0
"""After so long, the others are asked for, too; what is stuck may still come."""


class Puller(Generic[T]):
    """Asks for answers by their number. One is fetched at a time, and beside it only what is stuck.

    A context: what is still stuck when it ends is given up, and a thread may go on waiting for it; it does not keep the process.

    Args:
        pull: fetches one answer; None if there is none yet. It is called in threads.
    """

    def __init__(self, pull: Callable[[str], T | None]) -> None:
        self._pull = pull
        self._wanted = queue.SimpleQueue[str | None]()
        self._fetched = queue.SimpleQueue[tuple[str, T | Exception | None]]()
        self.stuck: set[str] = set()
        """Numbers of answers that have begun to arrive."""

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wanted.put(None)

    def __call__(self, numbers: Iterable[str]) -> Iterator[tuple[str, T]]:
        """What has arrived of these.

        Args:
            numbers: of the answers.

        Raises:
            Exception: what `pull` raised.
        """
        for number in [number for number in numbers if number not in self.stuck]:
            self._wanted.put(number)
            yield from self._collect(number)
        yield from self._collect()

    def _collect(self, number: str | None = None) -> Iterator[tuple[str, T]]:
        """What was fetched, with `number` among it unless that is stuck."""
        until = time.monotonic() + (STUCK_SECONDS if number is not None else 0)
        found = None
        while number is None or found != number:
            try:
                found, answer = self._fetched.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                if number is not None:
                    self.stuck.add(number)
                    self._start()  # the other thread waits
                return
            self.stuck.discard(found)
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                yield found, answer

    def _start(self) -> None:
        threading.Thread(target=self._work, name="puller", daemon=True).start()

    def _work(self) -> None:
        while (number := self._wanted.get()) is not None:
            try:
                self._fetched.put((number, self._pull(number)))
            except Exception as error:  # raised where the answer is waited for
                self._fetched.put((number, error))
        self._wanted.put(None)  # for the other threads
