"""A small HTTP server for what may be looked at: series for Prometheus, the watching page.

On the loopback device nobody is asked who he is, but a browser that was led there by another site's page is refused. On any other
address the server wants a web configuration (`fedseg.web_config`) with TLS and some way of telling who asks.
"""

import contextlib
import ipaddress
import logging
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from fedseg.errors import ConfigError, FedsegError
from fedseg.web_auth import Credentials
from fedseg.web_config import WebConfig, files_of, load_web_config, tls_context

log = logging.getLogger(__name__)

Environ = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]
App = Callable[[Environ, Start], Iterable[bytes]]

HANDSHAKE_SECONDS, REQUEST_SECONDS = 10.0, 60.0
"""In which TLS must be agreed on, and in which a connection must be over."""
CONNECTIONS = 64
"""At a time; further ones are closed at once."""
LONGEST_LINE = 65536
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
"""`Host` headers that name this machine; browsers always send one."""


def listen(app: App, host: str, port: int, web_config: Path | None = None) -> "tuple[Endpoint, threading.Thread]":
    """Answer requests in a thread of its own.

    Args:
        app: what answers.
        host: address to listen on.
        port: 0: any; the server that is returned knows it.
        web_config: who is let in; read again when it, or a file that it names, changes. Absent: only on the loopback device.

    Raises:
        ConfigError: the port is in use, or the web configuration is wrong, or too little for the address.
    """
    try:
        server = Endpoint((host, port), app, web_config)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: cannot listen there: {error.strerror or error}; choose another address or port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="endpoint", daemon=True)
    thread.start()
    return server, thread


class Endpoint(ThreadingMixIn, WSGIServer):
    """A thread for every request, TLS included, so that a slow reader keeps nobody waiting."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, address: tuple[str, int], app: App, web_config: Path | None = None) -> None:
        family, *_, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        host = str(found[0])
        loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        self._door = Door(web_config, f"{address[0]}:{address[1]}", loopback)
        self._open: dict[int, tuple[socket.socket, float]] = {}
        self._room = threading.Semaphore(CONNECTIONS)
        self._host = address[0]
        self.address_family = family
        super().__init__((host, int(found[1])), _Request)
        self.set_app(_asking(app, self._door))

    @property
    def url(self) -> str:
        """Where it is to be found, with a slash at the end."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._door.now.tls else 'http'}://{host}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin with a connection, in a thread of its own."""
        if self._room.acquire(blocking=False):
            self._open[id(request)] = (request, time.monotonic() + REQUEST_SECONDS)
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(id(request), None)
            self._room.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Agree on TLS, if it is wanted, and answer."""
        policy = self._door.now
        if policy.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(HANDSHAKE_SECONDS)
        with policy.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as connection:
            self._open[id(request)] = (connection, self._open[id(request)][1])
            connection.do_handshake()
            if policy.allows(connection):
                super().finish_request(connection, client_address)
                with contextlib.suppress(OSError):  # what the client still sends must not throw away our answer
                    socket.socket.shutdown(connection, socket.SHUT_WR)

    def service_actions(self) -> None:
        """End what lasts too long, such as a request that comes a byte at a time; called twice a second."""
        for connection, end in tuple(self._open.values()):
            if time.monotonic() > end:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's own, which would wait

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """What a client does wrong is not worth a word; it may do so all day."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a request of %s was not answered", client_address[0])


@dataclass(frozen=True)
class Policy:
    """What is asked of a client at present."""

    config: WebConfig
    credentials: Credentials
    tls: ssl.SSLContext | None

    def allows(self, connection: ssl.SSLSocket) -> bool:
        """Whether a client's certificate, which TLS has verified, is one of those that are wanted."""
        allowed = self.config.tls_server_config.client_allowed_sans if self.config.tls_server_config else ()
        certificate: dict[str, Any] = connection.getpeercert() or {}
        return not allowed or any(value in allowed for _, value in certificate.get("subjectAltName", ()))


class Door:
    """Knows the policy, and reads it again when a file of it changes: certificates are renewed while the server runs.

    Args:
        path: web configuration; None: nobody is asked.
        where: address for error messages.
        loopback: whether only this machine reaches it.

    Raises:
        ConfigError: the web configuration is wrong, or too little for the address.
    """

    def __init__(self, path: Path | None, where: str, loopback: bool) -> None:
        self._path, self._where, self._loopback = path, where, loopback
        self._turn = threading.Lock()
        self._stamps = self._look(load_web_config(path) if path else None)
        self._policy = self._read()

    @property
    def now(self) -> Policy:
        """The policy; the former one while the files are half written or wrong."""
        with self._turn:
            stamps = self._look(self._policy.config)
            if stamps != self._stamps:
                self._stamps = stamps
                try:
                    self._policy = self._read()
                except FedsegError as error:
                    log.warning("%s; what was there before holds", error)
                else:
                    log.info("%s has been read again", self._path)
            return self._policy

    @property
    def guards_names(self) -> bool:
        """Whether a request must be for a name of the loopback device: nothing else keeps other sites' pages out."""
        return self._loopback and not self._policy.config.asks

    def _look(self, config: WebConfig | None) -> list[tuple[int, ...] | None]:
        files = files_of(self._path, config) if self._path and config else ()
        return [_stamp(file) for file in files]

    def _read(self) -> Policy:
        config = load_web_config(self._path) if self._path else WebConfig()
        if not self._loopback and (config.tls_server_config is None or not config.asks):
            has = "asks nobody who he is" if config.tls_server_config else "has no tls_server_config"
            raise ConfigError(
                f"{self._where}: others than this machine reach this address, and "
                + (f"{self._path} {has}" if self._path else "there is no --web-config")
                + "; give one with tls_server_config and basic_auth_users, bearer_tokens or a client_ca_file "
                "(docs/metrics.md has an example), or listen on 127.0.0.1"
            )
        tls = config.tls_server_config
        context = tls_context(self._path, tls) if self._path and tls else None
        return Policy(config, Credentials(config), context)


def _asking(app: App, door: Door) -> App:
    """An app that answers only those who may ask."""

    def asked(environ: Environ, start: Start) -> Iterable[bytes]:
        policy = door.now
        headers = policy.config.http_server_config.headers

        def with_headers(status: str, own: list[tuple[str, str]]) -> Any:
            kept = [(name, value) for name, value in own if name not in headers]
            return start(status, [*kept, *headers.items()])

        if door.guards_names and not LOOPBACK.fullmatch(environ.get("HTTP_HOST", "localhost")):
            text = "this server is for localhost; ask it as http://localhost:PORT/, or give it a --web-config\n"
            return _refuse(with_headers, "421 Misdirected Request", text)
        if policy.config.asks_for_credentials and not policy.credentials.accept(environ.get("HTTP_AUTHORIZATION", "")):
            log.info("refused a request of %s: no credentials, or wrong ones", environ["REMOTE_ADDR"])
            challenge = ("WWW-Authenticate", policy.credentials.challenge)
            return _refuse(
                with_headers, "401 Unauthorized", "a user name and password, or a token, please\n", challenge
            )
        return app(environ, with_headers)

    return asked


def _refuse(start: Start, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
    body = text.encode()
    start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *headers])
    return [body]


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Changes when a file is written or replaced."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)


class _Handler(ServerHandler):
    def log_exception(self, exc_info: Any) -> None:
        """What the app does wrong is logged; a client that is gone is not."""
        if not isinstance(exc_info[1], (ConnectionError, TimeoutError, ssl.SSLError)):
            log.error("a request was not answered", exc_info=exc_info)


class _Request(WSGIRequestHandler):
    timeout = 30
    server_version, sys_version = "fedseg", ""

    def handle(self) -> None:
        """Answer one request; the connection is closed afterwards."""
        self.raw_requestline = self.rfile.readline(LONGEST_LINE + 1)
        if len(self.raw_requestline) > LONGEST_LINE:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
        elif self.parse_request():
            handler = _Handler(self.rfile, self.wfile, sys.stderr, self.get_environ(), multithread=True)  # type: ignore[arg-type]
            handler.request_handler = self  # type: ignore[attr-defined]
            handler.run(self.server.get_app())  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Nothing is logged: somebody asks every two seconds."""
