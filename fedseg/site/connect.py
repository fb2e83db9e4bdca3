"""The way from the gate to the site service: a UNIX socket, and nothing that knows of volumes.

Whoever uses this needs no torch and reads no weights: documents are relayed as they are.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc

from fedseg.errors import ConfigError, SiteUnreachable
from fedseg.site.pieces import cut, join
from fedseg.site.wire.site_pb2 import CancelRequest, DescribeRequest, Description, MetricsRequest, Progress
from fedseg.site.wire.site_pb2_grpc import SiteStub

log = logging.getLogger(__name__)

LONGEST_PATH = 100
"""Bytes of a UNIX socket's path; the system takes a few more."""
LARGEST_ANSWER = 1 << 32
PATIENCE = 120.0
"""Seconds in which a service that is down may come back before a request is given up."""
ATTEMPTS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """A site that gives no update."""

    kind: str
    reason: str


class Connection:
    """A site service that can be asked.

    Args:
        socket: its UNIX socket.
        patience: seconds in which it may be down.
    """

    def __init__(self, socket: Path, *, patience: float = PATIENCE) -> None:
        self._socket, self._patience = socket, patience
        self._channel = grpc.insecure_channel(
            socket_address(socket),
            options=[("grpc.max_receive_message_length", 4 << 20), ("grpc.enable_http_proxy", 0),
                     ("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)],
        )  # fmt: skip
        self._stub = SiteStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def describe(self) -> Description:
        """Who the site is and what it does.

        Raises:
            SiteUnreachable: nobody listens.
        """
        return self._patiently(self._described)

    def ask(
        self, instructions: bytes, *, train: bool, on_progress: Callable[[Progress], None] = lambda _: None
    ) -> bytes | Refusal:
        """The document that answers a document; a service that dies meanwhile is asked again when it is back.

        Raises:
            SiteUnreachable: it was down for too long, or died every time.
            MessageError: its answer is cut short.
        """
        call = self._stub.RunRound if train else self._stub.Evaluate

        def once() -> bytes | Refusal:
            pieces, refusal = [], None
            for event in call(cut(instructions), wait_for_ready=True):  # to its end: only then is the site idle again
                kind = event.WhichOneof("event")
                if kind == "progress":
                    on_progress(event.progress)
                elif kind == "failure":
                    refusal = Refusal(event.failure.kind, event.failure.reason)
                else:
                    pieces.append(event.piece)
            return refusal or bytes(join(pieces, LARGEST_ANSWER))

        return self._patiently(once)

    def cancel(self) -> bool:
        """End the round that is running; False if there is none."""
        return bool(self._patiently(lambda: self._stub.Cancel(CancelRequest(), timeout=10)).cancelled)

    def metrics(self) -> str:
        """The site's series in Prometheus' text format; a service that is down is not waited for.

        Raises:
            SiteUnreachable: nobody listens, or the service takes too long.
        """
        try:
            return str(self._stub.Metrics(MetricsRequest(), timeout=self._patience).text)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
            raise SiteUnreachable(f"{self._socket}: the site service does not answer: {code.name}") from error

    def _patiently(self, call: Callable[[], T]) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._described()
                return call()
            except grpc.RpcError as error:
                code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
                if code != grpc.StatusCode.UNAVAILABLE or attempt == ATTEMPTS:
                    raise SiteUnreachable(f"{self._socket}: the site service ended the call: {code.name}") from error
                log.warning("the site service is gone (%s); asking again when it is back", code.name)
                time.sleep(0.5)
        raise AssertionError

    def _described(self) -> Description:
        """What the service says of itself, as soon as there is one."""
        try:
            found: Description = self._stub.Describe(DescribeRequest(), timeout=self._patience, wait_for_ready=True)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            raise SiteUnreachable(
                f"{self._socket}: no site service has answered for {self._patience:.0f} s; start it with "
                "`fedseg site serve`, and run the gate as the same user"
            ) from None
        return found


def socket_address(socket: Path) -> str:
    """A socket as gRPC writes it.

    Raises:
        ConfigError: its path is too long for a UNIX socket.
    """
    path = str(socket.absolute())
    if len(path.encode()) > LONGEST_PATH:
        raise ConfigError(
            f"socket {path}: is {len(path.encode())} bytes long, a UNIX socket takes {LONGEST_PATH}; "
            'choose another one in site.toml, such as socket = "/run/fedseg/site.sock"'
        )
    return f"unix:{path}"
