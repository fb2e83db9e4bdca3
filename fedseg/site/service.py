"""The site service: a gRPC server on a UNIX socket, with the data and the device, and without the network.

One round at a time. A caller that goes away ends its round at the next step; the next caller waits for that. Arrays travel in
pieces, progress in between. The standard health service answers under the name of the service and under none.
"""

import logging
import os
import queue
import signal
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedseg import __version__
from fedseg.device import pick_device
from fedseg.errors import ConfigError, MessageError, RoundCancelled
from fedseg.federated.document import Buffer
from fedseg.federated.messages import SiteFailure
from fedseg.processes import only_one
from fedseg.site.config import SiteConfig
from fedseg.site.connect import socket_address
from fedseg.site.desk import Desk
from fedseg.site.isolation import has_network
from fedseg.site.pieces import cut, join
from fedseg.site.series import exposition
from fedseg.site.wire import site_pb2, site_pb2_grpc
from fedseg.site.wire.site_pb2 import (
    CancelReply,
    CancelRequest,
    DescribeRequest,
    Description,
    Event,
    MetricsReply,
    MetricsRequest,
    Piece,
    Progress,
)

log = logging.getLogger(__name__)

SERVICE = site_pb2.DESCRIPTOR.services_by_name["Site"].full_name
TELL_EVERY = 0.5
"""Seconds between two progress events of one phase."""
BUSY_SECONDS = 120.0
"""How long a caller waits for the round of another one to end."""


class SiteService(site_pb2_grpc.SiteServicer):
    """Carries requests to the desk and its answers back.

    Args:
        config: of the site.
        desk: does the work.
    """

    def __init__(self, config: SiteConfig, desk: Desk) -> None:
        self._config, self._desk = config, desk
        self._turn = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="round")  # torch's settings are those of one thread
        self._cancelled: threading.Event | None = None
        self._closing = False
        self._now = Description(
            site=config.name,
            version=__version__,
            state="idle",
            device=str(pick_device(config.device)),
            started=time.time(),
        )

    def Describe(self, request: DescribeRequest, context: grpc.ServicerContext) -> Description:  # noqa: N802, ARG002
        """Who the site is and what it does."""
        return self._now

    def RunRound(self, request: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[Event]:  # noqa: N802
        """Train a round."""
        return self._serve(request, context, train=True)

    def Evaluate(self, request: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[Event]:  # noqa: N802
        """Score weights."""
        return self._serve(request, context, train=False)

    def Cancel(self, request: CancelRequest, context: grpc.ServicerContext) -> CancelReply:  # noqa: N802, ARG002
        """End the round that is running."""
        cancelled = self._cancelled
        if cancelled is not None:
            cancelled.set()
        return CancelReply(cancelled=cancelled is not None)

    def Metrics(self, request: MetricsRequest, context: grpc.ServicerContext) -> MetricsReply:  # noqa: N802, ARG002
        """The series for the hospital's Prometheus."""
        return MetricsReply(text=exposition(self._now, self._desk.tally, self._config.state_folder))

    def close(self) -> None:
        """End the round that is running, and wait for it."""
        self._closing = True
        if self._cancelled is not None:
            self._cancelled.set()
        self._worker.shutdown(wait=True)

    def _serve(self, pieces: Iterator[Piece], context: grpc.ServicerContext, *, train: bool) -> Iterator[Event]:
        try:
            document = join(pieces, self._config.largest_request * 1_000_000)
        except MessageError as error:
            log.warning("unreadable request: %s", error)
            yield _failure("failed", "MessageError")
            return
        if not self._turn.acquire(timeout=BUSY_SECONDS):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the site is busy with another round")
        try:
            if self._closing:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the site service is stopping")
            yield from self._round(document, context, train)
        finally:
            self._cancelled = None
            self._now.state = "idle"
            self._turn.release()

    def _round(self, document: Buffer, context: grpc.ServicerContext, train: bool) -> Iterator[Event]:
        cancelled, events = threading.Event(), queue.SimpleQueue[Progress | None]()
        self._cancelled, self._now.state = cancelled, "busy"
        if not context.add_callback(cancelled.set):  # called when all is well, too, but then nobody asks any more
            return  # the caller has not waited for its turn

        def watch(phase: str, done: int, total: int) -> None:
            if cancelled.is_set() or self._closing:
                raise RoundCancelled("the caller is gone")
            events.put(Progress(phase=phase, done=done, total=total))

        work = self._worker.submit(self._desk.answer, document, train=train, watch=watch)
        work.add_done_callback(lambda _: events.put(None))
        for progress in _now_and_then(events.get):
            self._now.progress.CopyFrom(progress)
            yield Event(progress=progress)
        try:
            answer = work.result()
        except Exception as error:  # gRPC would send its text
            log.exception("the round has no answer")
            self._now.rounds_refused += 1
            yield _failure("failed", type(error).__name__)
            return
        if isinstance(answer, SiteFailure):
            self._now.server_round = answer.server_round
            if self._closing and answer.reason == RoundCancelled.__name__:  # whoever asked asks the next service
                context.abort(grpc.StatusCode.UNAVAILABLE, "the site service is stopping")
            self._now.rounds_refused += 1
            yield _failure(answer.kind, answer.reason)
            return
        for piece in cut(*answer):
            yield Event(piece=piece)
        self._now.answered = time.time()
        self._now.rounds_answered += 1


def serve(config: SiteConfig, *, ready: Callable[[], None] = lambda: None) -> None:
    """Answer requests until SIGTERM or SIGINT.

    Args:
        config: of the site.
        ready: called when the socket is open.

    Raises:
        ConfigError: the socket or the state folder is in use, or cannot be.
    """
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with opened(config):
            ready()
            stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def opened(config: SiteConfig) -> Iterator[SiteService]:
    """Answer requests while the context lasts.

    Raises:
        ConfigError: the socket or the state folder is in use, or cannot be.
    """
    desk, path = Desk(config), Path(config.socket)
    # two services would take turns in writing the same private tensors
    lock, refusal = config.state_folder / ".service.lock", "another site service uses this state folder; stop it first"
    with only_one(lock, f"{config.state_folder}: {refusal}"):
        service, state = SiteService(config, desk), health.HealthServicer()
        server = grpc.server(
            ThreadPoolExecutor(8, thread_name_prefix="grpc"),
            options=[("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0)],
        )
        site_pb2_grpc.add_SiteServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        _listen(server, path)
        for name in ("", SERVICE):
            state.set(name, health_pb2.HealthCheckResponse.SERVING)
        desk.note("started", version=__version__, network=has_network(), policy=dict(config.policy.describe()))
        log.info("site %s answers on %s", config.name, path)
        try:
            yield service
        finally:
            state.enter_graceful_shutdown()
            service.close()
            server.stop(grace=2).wait()
            path.unlink(missing_ok=True)
            desk.note("stopped")


def _listen(server: grpc.Server, path: Path) -> None:
    """Bind the socket so that at no moment anybody but this user can use it."""
    address = socket_address(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if not path.is_socket():
            raise ConfigError(f"socket {path}: is another kind of file; choose another path in the site file")
        with sockets.socket(sockets.AF_UNIX) as probe:
            if probe.connect_ex(str(path.absolute())) == 0:
                raise ConfigError(f"socket {path}: another site service listens there; stop it, or choose another one")
        path.unlink()
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(address)
        server.start()
    except RuntimeError as error:
        raise ConfigError(f"socket {path}: cannot listen there: {error}") from error
    finally:
        os.umask(mask)
    path.chmod(0o600)


def _now_and_then(get: Callable[[], Progress | None]) -> Iterator[Progress]:
    """Not every step, but every change of phase."""
    last, phase = 0.0, ""
    while (progress := get()) is not None:
        if progress.phase != phase or time.monotonic() - last > TELL_EVERY:
            last, phase = time.monotonic(), progress.phase
            yield progress


def _failure(kind: str, reason: str) -> Event:
    return Event(failure=site_pb2.Failure(kind=kind, reason=reason))
