"""What the supervisor and the ServerApp, two processes, tell each other through files."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fedseg import logs
from fedseg.errors import ConfigError
from fedseg.federated.checkpoint import write_durably

LOG, ERROR = "server.log", "error.txt"
LOG_BYTES, LOGS_KEPT = 10_000_000, 3


@dataclass(frozen=True)
class Member:
    """A site whose key is registered."""

    name: str
    """Of the site that owns the key."""
    started: float
    """When its SuperNode was started last, in seconds since 1970; what it was asked before that is lost. 0: never."""


def write_who(path: Path, members: Mapping[int, Member]) -> None:
    """Say which site owns the key of which node; an unchanged file is left alone."""
    document = json.dumps({str(node): asdict(member) for node, member in sorted(members.items())}, indent=1).encode()
    if not path.exists() or path.read_bytes() != document:
        write_durably(path, document)


def read_who(path: Path) -> dict[int, Member]:
    """The sites by number of their node.

    Raises:
        ConfigError: it is another file.
    """
    try:
        document = json.loads(path.read_bytes())
        members = {int(node): Member(**member) for node, member in document.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no list of sites by node: {error}") from error
    names = [member.name for member in members.values()]
    if not all(isinstance(member.name, str) and type(member.started) is float for member in members.values()) or (
        len(set(names)) != len(names)
    ):
        raise ConfigError(f"{path}: each node needs the name of a site and a time, each site one node")
    return members


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
