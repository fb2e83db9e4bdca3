"""Processes that are started and ended by others."""

import signal
import subprocess
import sys


def die_with_parent() -> None:
    """For `preexec_fn`: on Linux, have the kernel end this process when its parent ends, even by SIGKILL."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_process(process: "subprocess.Popen[bytes]", patience: float = 10.0) -> None:
    """Ask a process to end, and insist after `patience` seconds."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
