"""What the ServerApp leaves for the supervisor, another process: its log, and what ended it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fedseg import logs

LOG, ERROR = "server.log", "error.txt"
LOG_BYTES, LOGS_KEPT = 10_000_000, 3


@contextmanager
def logged(directory: Path) -> Iterator[None]:
    """Log to the console and into the run directory; what ends the run is left there in one line for the supervisor."""
    directory.mkdir(parents=True, exist_ok=True)
    error_file = directory / ERROR
    logger = logging.getLogger("fedseg")
    rotating = RotatingFileHandler(directory / LOG, maxBytes=LOG_BYTES, backupCount=LOGS_KEPT)
    handlers: list[logging.Handler] = [logging.StreamHandler(), rotating]
    for handler in handlers:
        handler.setFormatter(logs.formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    before, propagated = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    error_file.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        logger.error("%s: %s", type(error).__name__, error)
        error_file.write_text(f"{type(error).__name__}: {error}\n")
        raise
    finally:
        logger.setLevel(before)
        logger.propagate = propagated
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def last_error(directory: Path) -> str:
    """What ended the run last; empty if it said nothing."""
    try:
        return (directory / ERROR).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
