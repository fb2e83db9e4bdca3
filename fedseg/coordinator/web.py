"""The watching page over HTTP, beside the series for Prometheus: one page, its JSON, nothing to change anything with."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, make_wsgi_app

from fedseg.coordinator.page import watched
from fedseg.endpoint import App, Environ, Start


def watching_app(directory: Path, registry: CollectorRegistry) -> App:
    """`/` is the page, `/status.json` what it shows, `/metrics` the series.

    Args:
        directory: of a study or of a simulation, see `watched`.
        registry: holds the collector of the series.
    """
    series: App = make_wsgi_app(registry)
    page = (files("fedseg.coordinator") / "page.html").read_bytes()
    page_headers = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", content_policy(page))]

    def app(environ: Environ, start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "/")
        if method not in ("GET", "HEAD"):
            return _answer(environ, start, "405 Method Not Allowed", b"use GET or HEAD\n", [("Allow", "GET, HEAD")])
        if path in ("", "/"):
            return _answer(environ, start, "200 OK", page, page_headers)
        if path == "/status.json":
            run = parse_qs(environ.get("QUERY_STRING", "")).get("run", [None])[0]
            document = json.dumps(watched(directory, run), allow_nan=False, separators=(",", ":")).encode()
            return _answer(environ, start, "200 OK", document, [("Content-Type", "application/json")])
        if path == "/metrics":
            body = series({**environ, "REQUEST_METHOD": "GET"}, start)
            return [] if method == "HEAD" else body
        if path == "/favicon.ico":
            return _answer(environ, start, "204 No Content", b"", [])
        return _answer(environ, start, "404 Not Found", b"here are /, /status.json and /metrics\n", [])

    return app


def content_policy(page: bytes) -> str:
    """What a browser may do with the page: run its one script, use its one style sheet, ask this server; nothing else."""
    sources = {}
    for tag in ("script", "style"):
        (content,) = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), page, re.DOTALL)
        sources[tag] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{sources['style']}'; script-src 'sha256-{sources['script']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _answer(environ: Environ, start: Start, status: str, body: bytes, headers: list[tuple[str, str]]) -> list[bytes]:
    named = {name for name, _ in headers}
    plain = [] if "Content-Type" in named or not body else [("Content-Type", "text/plain; charset=utf-8")]
    safe = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    length = [("Content-Length", str(len(body)))] if body else []
    start(status, [*headers, *plain, *safe, *length])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
