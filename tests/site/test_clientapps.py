import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supercore.superexec.executor.types import LaunchResultStatus

from fedseg.site.clientapps import ForkingExecutor, _without_text
from fedseg.site.supernode import check_flower

ROOT = Path(__file__).parents[2]
SPEC = ExecutionSpec(
    task_type=TaskType.CLIENT_APP,
    runtime_api_address="127.0.0.1:1",
    token="token",
    insecure=True,
    root_certificates_path=None,
    runtime_dependency_install=False,
    parent_pid=None,
    suppress_output=False,
    task_id=1,
)


@pytest.mark.parametrize("kind", [kind for kind in TaskType if kind != TaskType.CLIENT_APP])
def test_a_gate_runs_client_apps_only(kind):
    result = ForkingExecutor().launch(replace(SPEC, task_type=kind))
    assert result.status == LaunchResultStatus.FAILED
    assert "ClientApps only" in result.message


def test_the_installed_flower_has_what_the_gate_holds_on_to():
    check_flower()


def test_a_gate_is_not_started_with_a_flower_that_checks_bundles_elsewhere():
    program = (
        "from flwr.supernode import start_client_internal\n"
        "del start_client_internal._verify_fab\n"
        "from fedseg.site.supernode import check_flower\n"
        "check_flower()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "keeps its bundle check elsewhere (_verify_fab" in done.stderr


def test_a_process_that_ends_its_work_with_an_error_runs_nothing_of_its_parents():
    program = (
        "import os\n"
        "from fedseg.site.clientapps import _end_with\n"
        "if os.fork() == 0:\n"
        "    _end_with(lambda: 1 / 0)\n"
        "_, status = os.wait()\n"
        "print('parent', os.waitstatus_to_exitcode(status))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "parent 1\n"
    assert "ZeroDivisionError" in done.stderr


def test_the_process_of_a_message_ends_although_its_parent_was_gone_before_it_looked():
    program = (
        "import os, signal\n"
        "from fedseg.site.clientapps import ForkingExecutor\n"
        "from tests.site.test_clientapps import SPEC\n"
        "ForkingExecutor().launch(SPEC)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    reading, writing = os.pipe()  # stays open as long as the child lives
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=writing, stderr=writing)
    os.close(writing)
    try:
        assert parent.wait(60) == -signal.SIGKILL
        end = time.monotonic() + 60
        while select.select([reading], [], [], max(0, end - time.monotonic()))[0] and os.read(reading, 1 << 16):
            pass
        assert time.monotonic() < end, "the child is still there"
    finally:
        os.close(reading)


def test_an_error_of_flowers_own_leaves_without_its_text():
    error = _without_text(7, "[Errno 28] No space left on device: '/home/mueller/patients'")
    assert (error.code, error.reason) == (7, None)
