"""Processes that are started and ended by others, and the ports that they need."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedseg.errors import ConfigError

PAUSES = (1.0, 60.0)
"""Shortest and longest wait in seconds before something that ended is started again."""
LOG_BYTES = 50_000_000
"""Of the log of a process that does not look after it itself; so much more is kept beside it."""


@dataclass
class Backoff:
    """How long to wait before the next try: twice as long each time, and shortest again when there was progress."""

    pause: float = 0.0
    """Seconds, after the last failure."""
    until: float = 0.0
    mark: object = None

    def failed(self, mark: object = None) -> float:
        """Take a failure into account.

        Args:
            mark: how far it had got; another one than at the last failure is progress.

        Returns:
            The pause in seconds.
        """
        self.pause = min(2 * self.pause or PAUSES[0], PAUSES[1]) if mark == self.mark else PAUSES[0]
        self.mark, self.until = mark, time.monotonic() + self.pause
        return self.pause

    @property
    def over(self) -> bool:
        """Whether it is time for the next try."""
        return self.until <= time.monotonic()


def die_with_parent() -> None:
    """For `preexec_fn`: on Linux, have the kernel end this process when its parent ends, even by SIGKILL."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def only_one(lock: Path, refusal: str) -> Iterator[None]:
    """Keep a second process from the same work; the file holds the number of the first, and the system frees it at its end.

    Args:
        lock: file that stands for the work.
        refusal: what the second one is told.

    Raises:
        ConfigError: another process is at it.
    """
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(refusal) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


def start_process(
    command: Sequence[str], log: Path, *, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program in a session of its own that ends when this process does; what it prints goes to a log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def is_port_taken(port: int) -> bool:
    """Whether a process listens on a port of the loopback device."""
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended a moment ago does not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def end_process(process: "subprocess.Popen[bytes]", patience: float = 10.0) -> None:
    """Ask a process to end, and insist after `patience` seconds."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep_short(log: Path, most: int = LOG_BYTES) -> None:
    """Move what a log holds aside when it has grown too long; whoever writes it must have opened it for appending."""
    with contextlib.suppress(OSError):  # there is none yet, or no room for a copy: then it goes on growing
        if log.stat().st_size > most:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            with log.open("r+b") as file:
                file.truncate()
