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
    """Asks for answers by the ids of the messages that they answer. One is fetched at a time, and beside it only what is stuck.

    A context: what is still stuck when it ends is given up, and a thread may go on waiting for it; it does not keep the process.

    Args:
        pull: fetches one answer; None if there is none yet. It is called in threads.
    """

    def __init__(self, pull: Callable[[str], T | None]) -> None:
        self._pull = pull
        self._wanted = queue.SimpleQueue[str | None]()
        self._fetched = queue.SimpleQueue[tuple[str, T | Exception | None]]()
        self.stuck: set[str] = set()
        """Ids of messages whose answers have begun to arrive."""

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wanted.put(None)

    def __call__(self, message_ids: Iterable[str]) -> Iterator[tuple[str, T]]:
        """What has arrived of these.

        Args:
            message_ids: what they answer.

        Raises:
            Exception: what `pull` raised.
        """
        for message_id in [message_id for message_id in message_ids if message_id not in self.stuck]:
            self._wanted.put(message_id)
            yield from self._collect(message_id)
        yield from self._collect()

    def _collect(self, message_id: str | None = None) -> Iterator[tuple[str, T]]:
        """What was fetched, with `message_id` among it unless that is stuck."""
        until = time.monotonic() + (STUCK_SECONDS if message_id is not None else 0)
        found = None
        while message_id is None or found != message_id:
            try:
                found, answer = self._fetched.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                if message_id is not None:
                    self.stuck.add(message_id)
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
        while (message_id := self._wanted.get()) is not None:
            try:
                self._fetched.put((message_id, self._pull(message_id)))
            except Exception as error:  # raised where the answer is waited for
                self._fetched.put((message_id, error))
        self._wanted.put(None)  # for the other threads
