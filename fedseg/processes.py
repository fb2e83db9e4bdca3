"""Processes that are started and ended by others, and the ports that they need."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

LOG_BYTES = 50_000_000
"""Of the log of a process that does not look after it itself; so much more is kept beside it."""


def die_with_parent() -> None:
    """For `preexec_fn`: on Linux, have the kernel end this process when its parent ends, even by SIGKILL."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
