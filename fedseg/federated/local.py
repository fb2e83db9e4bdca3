"""Many sites on one machine: in this process, or spread over worker processes that stay warm."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Self

from fedseg import logs
from fedseg.errors import StoreError
from fedseg.federated.mailbox import Mailbox
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate

PRELOAD = ("fedseg.simulation", "monai.losses", "torch._dynamo")
"""Modules that worker processes share from the start; torch imports the last one with its first optimizer, for 1.4 seconds."""

Ask = Callable[[str, RoundInstructions], Answer]
"""Asks the site with this name; never raises."""


class InProcessFleet:
    """Asks one site after another in this process.

    Args:
        sites: names of the sites.
        ask: reaches one of them.
    """

    def __init__(self, sites: Sequence[str], ask: Ask) -> None:
        self._sites, self._ask = tuple(sites), ask

    def sites(self) -> Sequence[str]:
        """All sites."""
        return self._sites

    def exchange(
        self, instructions: RoundInstructions, sites: Sequence[str], deadline: float | None
    ) -> Iterator[Answer]:
        """Ask the sites in turn; those not reached before the deadline are late."""
        begun = time.monotonic()
        for site in sites:
            answer: Answer = SiteFailure(site, instructions.server_round, "late", "deadline")
            if deadline is None or time.monotonic() - begun < deadline:
                answer = self._ask(site, instructions)
            if deadline is not None and time.monotonic() - begun > deadline:
                answer = SiteFailure(site, instructions.server_round, "late", "deadline")
            yield answer


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    outbox: Mailbox
    """For its updates."""
    site: str | None = None
    """The site it is working for."""
    briefed: bool = False
    """It has this round's instructions."""


class WorkerFleet:
    """Asks sites in worker processes; any worker can be any site.

    A worker keeps its network and the volumes that it has opened from round to round. Only bytes go from process to
    process, in the format of `fedseg.federated.messages`; the instructions are written once per round for all workers. At
    most one update per worker exists at a time, so memory does not grow with the federation.

    Args:
        sites: names of the sites.
        make_ask: called in each worker once; must be picklable.
        workers: number of processes.
        preload: modules that the workers share from the start.
    """

    def __init__(
        self,
        sites: Sequence[str],
        make_ask: Callable[[], Ask],
        workers: int,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        self._sites, self._make_ask = tuple(sites), make_ask
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._instructions = Mailbox()
        self._workers = [self._start() for _ in range(min(workers, len(sites)))]

    def sites(self) -> Sequence[str]:
        """All sites."""
        return self._sites

    def exchange(
        self, instructions: RoundInstructions, sites: Sequence[str], deadline: float | None
    ) -> Iterator[Answer]:
        """Spread the sites over the workers; a worker that is busy at the deadline is ended and replaced."""
        end = None if deadline is None else time.monotonic() + deadline
        size, waiting = self._instructions.write(*instructions.buffers()), list(sites)

        def answers() -> Iterator[Answer]:
            for worker in self._workers:
                worker.briefed = False
            try:
                self._assign(waiting, size)
                while busy := [worker for worker in self._workers if worker.site is not None]:
                    left = None if end is None else max(0.0, end - time.monotonic())
                    ready = wait([worker.pipe for worker in busy], left)
                    if not ready:
                        break
                    for worker in busy:
                        if worker.pipe in ready:
                            answer = self._receive(worker, instructions.server_round)
                            if end is None or time.monotonic() < end:
                                self._assign(waiting, size)
                            yield answer
                late = [worker.site for worker in self._workers if worker.site is not None] + waiting
                yield from (SiteFailure(site, instructions.server_round, "late", "deadline") for site in sorted(late))
            finally:
                for worker in list(self._workers):
                    if worker.site is not None:
                        self._replace(worker)

        return answers()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            _end(worker)
        if self._workers:
            self._instructions.close()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        outbox = Mailbox()
        arguments = (theirs, self._instructions, outbox, self._make_ask)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, outbox)

    def _replace(self, worker: _Worker) -> None:
        _end(worker)
        self._workers[self._workers.index(worker)] = self._start()

    def _assign(self, waiting: list[str], size: int) -> None:
        for worker in list(self._workers):
            if waiting and worker.site is None:
                worker.site = waiting.pop(0)
                try:
                    if not worker.briefed:
                        worker.pipe.send_bytes(b"I%d" % size)
                        worker.briefed = True
                    worker.pipe.send_bytes(b"S" + worker.site.encode())
                except OSError:
                    pass  # it is dead, which `_receive` will notice and report

    def _receive(self, worker: _Worker, server_round: int) -> Answer:
        site = worker.site
        assert site is not None
        try:
            reply = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._replace(worker)
            return SiteFailure(site, server_round, "failed", "WorkerDied")
        worker.site = None
        if reply[:1] == b"F":
            return SiteFailure(**json.loads(reply[1:]))
        return SiteUpdate.decode(worker.outbox.read(int(reply[1:])))


def _work(pipe: Connection, inbox: Mailbox, outbox: Mailbox, make_ask: Callable[[], Ask]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends its workers
    logs.follow()
    ask, instructions = make_ask(), None
    with suppress(EOFError, OSError):  # the main process is gone
        while True:
            message = pipe.recv_bytes()
            if message[:1] == b"I":
                instructions = RoundInstructions.decode(inbox.read(int(message[1:])))
                continue
            assert instructions is not None
            answer = ask(message[1:].decode(), instructions)
            if isinstance(answer, SiteUpdate):
                pipe.send_bytes(b"U%d" % outbox.write(*answer.buffers()))
            else:
                pipe.send_bytes(b"F" + json.dumps(answer.header()).encode())


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.outbox.close()
    worker.process.terminate()
    worker.process.join(5)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


@contextmanager
def worker_pool(workers: int, remedy: str, preload: Sequence[str] = PRELOAD) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that share slow imports, and end with whoever started them.

    Args:
        workers: how many.
        remedy: what a person can do if one dies.
        preload: modules that they share from the start.

    Raises:
        StoreError: a worker died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise StoreError(f"a worker process died, perhaps out of memory; {remedy}") from None
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _start_worker() -> None:
    """Log as the process that started this one does, and end with it, even by SIGKILL."""
    logs.follow()
    if (gatherer := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(gatherer,), daemon=True).start()


def _end_with(gatherer: BaseProcess) -> None:
    gatherer.join()
    os._exit(1)
