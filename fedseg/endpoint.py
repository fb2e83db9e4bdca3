"""A small HTTP server for what may be looked at: series for Prometheus, the watching page."""

import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from fedseg.errors import ConfigError

Environ = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]
App = Callable[[Environ, Start], Iterable[bytes]]


class Endpoint(ThreadingMixIn, WSGIServer):
    """A thread for every request, so that a slow reader keeps nobody waiting."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], app: App) -> None:
        family, *_, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        super().__init__((str(found[0]), int(found[1])), _Request)
        self.set_app(app)


def listen(app: App, host: str, port: int, web_config: Path | None = None) -> tuple[Endpoint, threading.Thread]:
    """Answer requests in a thread of its own.

    Args:
        app: what answers.
        host: address to listen on.
        port: 0: any; the server that is returned knows it.
        web_config: how to ask who is there.

    Raises:
        ConfigError: the port is in use.
    """
    if web_config is not None:
        raise ConfigError(f"{web_config}: nobody can be asked who he is yet")
    try:
        server = Endpoint((host, port), app)
    except OSError as error:
        raise ConfigError(f"{host}:{port}: cannot listen there: {error.strerror}; choose another port") from error
    thread = threading.Thread(target=server.serve_forever, name="endpoint", daemon=True)
    thread.start()
    return server, thread


class _Request(WSGIRequestHandler):
    timeout = 30
    server_version, sys_version = "fedseg", ""

    def log_message(self, *_: Any) -> None:
        """Nothing is logged: somebody asks every two seconds."""
