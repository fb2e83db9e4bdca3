"""The processes in which a gate answers messages: one for each message, forked from one that has everything imported.

Flower starts a new Python for every message, and most of a short round is then spent on importing Flower. Here the process that
waits for messages imports it once and forks. Every message still has a process of its own, which ends with it; the bundle's code
is loaded in that process only.
"""

import importlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable

from flwr.app import Error
from flwr.supercore.constant import TaskType
from flwr.supercore.exit import ExitCode
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.utils import get_flwr_home

from fedseg import logs
from fedseg.processes import die_with_parent

log = logging.getLogger(__name__)

PRELOAD = ("flwr.supernode.runtime.run_clientapp", "fedseg.flower", "fedseg.site.connect")
"""What the gate's program needs; none of it is the program."""


class ForkingExecutor(SubprocessExecutor):
    """Answers each task in a fork of this process; knows no tasks but those of ClientApps."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Fork, and let the child run the ClientApp."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"a gate runs ClientApps only, not {spec.task_type}")
        executor = os.getpid()  # the child may ask for its parent when that is gone, and then wait for process 1 to end
        if os.fork() == 0:
            _end_with(lambda: _run_clientapp(spec, executor))
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Take note of children that have ended."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def start_executor(address: str) -> int:
    """Fork the process that waits for messages; must be called before any thread is started.

    Args:
        address: of the SuperNode's Runtime API on the loopback device.

    Returns:
        The process' number. It ends with this process.
    """
    gate = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        _end_with(lambda: _wait_for_messages(address, gate))
    return pid


def _wait_for_messages(address: str, gate: int) -> None:
    if os.getppid() != gate:  # it ended before the kernel was asked to tell
        return
    for name in PRELOAD:
        importlib.import_module(name)
    vars(superexec)["get_executor"] = lambda *_, **__: ForkingExecutor()
    superexec.run_superexec(address, insecure=True, parent_pid=gate)


def _run_clientapp(spec: ExecutionSpec, executor: int) -> None:
    from flwr.supernode.runtime import run_clientapp

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    vars(run_clientapp)["Error"] = _without_text
    with tempfile.TemporaryDirectory(prefix="app-", dir=get_flwr_home()) as home:
        os.environ["FLWR_HOME"] = home  # Flower would take a folder that is there already for the bundle
        with logs.printed():
            run_clientapp.run_clientapp(spec.runtime_api_address, spec.token, insecure=True, parent_pid=executor)


def _without_text(code: int, reason: str | None = None) -> Error:
    """Flower's error for the coordinator without its text, which may name paths of the hospital; the log has it."""
    del reason
    return Error(code)


def _end_with(work: Callable[[], None]) -> None:
    """Do something and end this process, whatever happens: nothing of the parent's must run on in a child."""
    code = int(ExitCode.SUCCESS)
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # the process ends here; the log is all that is left of it
        log.critical("the process of a message ends", exc_info=True)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(min(code, 255))
