"""What lies in a study's state folder on the coordinator's machine, and who is at work there.

status.json       what is going on, written by the supervisor again and again
sites.json        node numbers and the names of the sites that own their keys, for the ServerApp
run/              the run directory: run store, checkpoints, models, server.log
superlink.db      Flower's state, the registered keys among it
stopped           somebody has stopped the study; `resume` removes it
"""

import contextlib
import fcntl
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedseg.errors import ConfigError

RUN = "federated"


def finished(run_directory: Path) -> bool:
    """Whether the closing evaluation is in the run store and the model file is written."""
    if not (run_directory / "models" / f"{RUN}.safetensors").exists():
        return False
    return bool(query(run_directory, "SELECT 1 FROM runs WHERE run = ? AND finished IS NOT NULL", RUN))


def rounds_done(run_directory: Path) -> int:
    """Number of committed rounds."""
    rows = query(run_directory, "SELECT max(server_round) FROM rounds WHERE run = ?", RUN)
    return int(rows[0][0] or 0) if rows else 0


def is_held(run_directory: Path) -> bool:
    """Whether a process is running the run: it holds a lock that the system takes from it when it ends."""
    return is_locked(run_directory / f".{RUN}.lock")


def holder(run_directory: Path) -> int | None:
    """Process that is running the run."""
    return _holder(run_directory / f".{RUN}.lock")


def supervisor(state: Path) -> int | None:
    """Process that supervises the study; `status.json` may still name an earlier one."""
    return _holder(state / ".supervisor.lock")


def _holder(path: Path) -> int | None:
    if not is_locked(path):
        return None
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # it is just writing its number
        return None


Store = Callable[..., list[sqlite3.Row]]
"""Rows of a read-only query, with its values; each can be asked by position and by name."""


@contextlib.contextmanager
def reader(run_directory: Path) -> Iterator[Store]:
    """A run store that another process may be writing; without rows while it is being made."""
    path = run_directory / "store.sqlite"
    if not path.exists():
        yield lambda *_: []
        return
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
        database.row_factory = sqlite3.Row

        def rows(statement: str, *values: object) -> list[sqlite3.Row]:
            try:
                return database.execute(statement, values).fetchall()
            except sqlite3.Error:  # being made, or being repaired
                return []

        yield rows


def query(run_directory: Path, statement: str, *values: object) -> list[sqlite3.Row]:
    """The rows of one query."""
    with reader(run_directory) as store:
        return store(statement, *values)


def read_status(state: Path) -> dict[str, Any]:
    """What the supervisor has written down last.

    Raises:
        ConfigError: no study was ever started there.
    """
    path = state / "status.json"
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError, RecursionError):
        raise ConfigError(
            f"{path}: no study was started there; `fedseg server start` does, --state says where"
        ) from None


def is_supervised(state: Path) -> bool:
    """Whether a supervisor is running there."""
    return is_locked(state / ".supervisor.lock")


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock file."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
