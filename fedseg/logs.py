"""What goes on, a line for each record: text for people, or JSON for whatever collects logs.

A line of JSON has `time` (ISO 8601, UTC), `level`, `logger`, `message`, and `run`, `round` and `site`, which are null where they
are not known; `exception` is there if there was one. FEDSEG_LOG_FORMAT chooses, so that processes that are started inherit it.
"""

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]
FORMAT, LEVEL = "FEDSEG_LOG_FORMAT", "FEDSEG_LOG_LEVEL"
TEXT = "%(asctime)s %(name)s: %(message)s"
ABOUT = ("run", "round", "site")
"""What every line of JSON says it is about. A single record says it with `extra`."""

_thread: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 - never changed
_process: dict[str, Any] = {}


def set_up(chosen: Format, level: int = logging.ERROR) -> None:
    """Log to stderr, in this process and in those that it starts.

    Args:
        chosen: of the lines.
        level: of what is logged; JSON has our own INFO and others' WARNING at least.
    """
    os.environ[FORMAT], os.environ[LEVEL] = chosen, str(level)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(TEXT))
    if chosen == "json":
        level = min(level, logging.WARNING)
        logging.getLogger("fedseg").setLevel(min(level, logging.INFO))
        logging.captureWarnings(True)
        sys.excepthook = lambda *error: logging.getLogger("fedseg").critical("ended by an error", exc_info=error)
        threading.excepthook = lambda found: sys.excepthook(
            found.exc_type, found.exc_value or found.exc_type(), found.exc_traceback
        )
    logging.basicConfig(level=level, handlers=[handler])


def follow() -> None:
    """Log like the process that has started this one, if that logs JSON."""
    if is_json():
        set_up("json", int(os.environ.get(LEVEL, logging.ERROR)))


def is_json() -> bool:
    """Whether lines are JSON."""
    return os.environ.get(FORMAT) == "json"


def formatter(text: str) -> logging.Formatter:
    """Of the chosen format.

    Args:
        text: what a line of text looks like.
    """
    return JsonFormatter() if is_json() else logging.Formatter(text)


def adopt(name: str) -> None:
    """Have a library's logger, whose handlers write lines of text, write ours of JSON instead, if that is chosen."""
    logger = logging.getLogger(name)
    if is_json():
        logger.setLevel(max([logger.level, *(handler.level for handler in logger.handlers)]))
        logger.handlers.clear()
    logger.propagate = is_json()


def say(text: str) -> None:
    """Tell whoever has started a command: on stderr, as a log line if that is JSON."""
    if is_json():
        logging.getLogger("fedseg").info(text)
    else:
        print(text, file=sys.stderr)


@contextmanager
def printed() -> Iterator[None]:
    """Have what is printed to stdout meanwhile logged, if lines are JSON."""
    if is_json():
        with redirect_stdout(_Printed()):
            yield
    else:
        yield


@contextmanager
def about(**known: Any) -> Iterator[None]:
    """Say what the lines are about that this thread writes meanwhile: `run`, `round`, `site`."""
    token = _thread.set({**_thread.get(), **known})
    try:
        yield
    finally:
        _thread.reset(token)


def now_about(**known: Any) -> None:
    """Like `about`, until the `about` ends that is around it."""
    _thread.set({**_thread.get(), **known})


def always_about(**known: Any) -> None:
    """Say what all lines of this process are about, unless something else is said."""
    _process.update(known)


class _Printed(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in filter(str.strip, str.splitlines(text)):  # bytes are refused, even none: click tries
            logging.getLogger("fedseg").info(line)
        return len(text)


class JsonFormatter(logging.Formatter):
    """One record, one object, one line; ASCII, whatever a file name holds."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record as JSON."""
        known = {**_process, **_thread.get(), **vars(record)}
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: known.get(name) for name in ABOUT},
        }
        if record.exc_info and record.exc_info[0] is not None:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)
