import subprocess
import sys
from dataclasses import replace

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supercore.superexec.executor.types import LaunchResultStatus

from fedseg.site.clientapps import ForkingExecutor, _without_text
from fedseg.site.supernode import check_flower

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


def test_an_error_of_flowers_own_leaves_without_its_text():
    error = _without_text(7, "[Errno 28] No space left on device: '/home/mueller/patients'")
    assert (error.code, error.reason) == (7, None)
