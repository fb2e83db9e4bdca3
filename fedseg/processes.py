"""Processes that are started and ended by others, and the ports that they need."""

import signal
import socket
import subprocess
import sys


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
