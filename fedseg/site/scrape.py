"""What answers a hospital's Prometheus: asks the site service at its socket, whenever somebody scrapes.

The service has no network, so it cannot answer itself; this process has no data, so it needs none of what reads them.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from fedseg.endpoint import App, Environ, Start
from fedseg.errors import ConfigError, SiteUnreachable
from fedseg.sections import read_toml
from fedseg.series import Series
from fedseg.site.connect import Connection

log = logging.getLogger(__name__)

UP = Series(
    "fedseg_site_service_up", "gauge", (), "1 if the site service answers; 0: it does not, and nothing else is shown."
)
SECONDS = 5.0
"""In which the service must answer; Prometheus waits for 10 unless it is told otherwise."""


def scraped(socket: Path) -> str:
    """The series of a site service in Prometheus' text format; if it does not answer, one that says so."""
    try:
        with Connection(socket, patience=SECONDS) as connection:
            found = connection.metrics()
    except SiteUnreachable as error:
        log.warning("%s", error)
        return _up(0)
    return _up(1) + found


def scraping_app(socket: Path) -> App:
    """`/metrics` are the series; nothing can be changed here.

    Args:
        socket: of the site service.
    """

    def app(environ: Environ, start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "/")
        status, kind, text = "200 OK", "text/plain; version=0.0.4; charset=utf-8", ""
        if method not in ("GET", "HEAD"):
            status, text = "405 Method Not Allowed", "use GET or HEAD\n"
        elif path != "/metrics":
            status, text = "404 Not Found", "here is /metrics\n"
        else:
            text = scraped(socket)
        body = text.encode()
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
        return [] if method == "HEAD" else [body]

    return app


def socket_in(site_file: Path) -> Path:
    """The socket that a site file names; nothing else of the file is looked at.

    Raises:
        ConfigError: the file cannot be read, or `socket` is no text.
    """
    socket = read_toml(site_file).get("socket", "site.sock")
    if not isinstance(socket, str):
        raise ConfigError(f'{site_file}: socket must be a path in quotes, such as "site.sock", got {socket!r}')
    return site_file.resolve().parent / socket


def _up(value: int) -> str:
    return f"# HELP {UP.name} {UP.help}\n# TYPE {UP.name} {UP.kind}\n{UP.name} {value}\n"
