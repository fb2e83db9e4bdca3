import json
import socket
import subprocess
import sys
import threading
import time

from typer.testing import CliRunner

from fedseg.app_bundle import app_bundle
from fedseg.cli import app
from fedseg.coordinator import supervisor
from fedseg.coordinator.state import supervisor as supervising
from fedseg.coordinator.supervisor import Plan, Supervisor
from fedseg.kit import load_kit
from fedseg.site.supernode import free_port


def test_the_superlink_of_another_study_is_left_alone(study, tmp_path):
    study.provision()
    told = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def note(text):
            told.append(text)
            if str(port) in text:
                supervisor.stop.set()

        supervisor = Supervisor(Plan(load_kit(study.coordinator), tmp_path / "state", port, port), tell=note)
        assert not supervisor.run()
    assert told[-1].startswith(f"127.0.0.1:{port} is taken by another program")
    assert not (tmp_path / "state" / "superlink.pid").exists()


def test_a_study_survives_a_state_folder_that_cannot_be_written_for_a_while(study, tmp_path):
    study.provision()
    state, told = tmp_path / "state", []
    (state / "superlink.pid").mkdir(parents=True)

    def note(text):
        told.append(text)
        if "superlink.pid" in text:
            supervisor.stop.set()

    supervisor = Supervisor(Plan(load_kit(study.coordinator), state, free_port(), free_port()), tell=note)
    assert not supervisor.run()
    assert "superlink.pid" in told[-1]


def test_a_trouble_is_told_with_its_time_and_is_over_when_everything_runs_again(study, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "WELL_SECONDS", 3.0)
    (tmp_path / "app.fab").write_bytes(app_bundle())
    study.provision(app=tmp_path / "app.fab")
    state = tmp_path / "state"
    (state / "superlink.pid").mkdir(parents=True)

    def status():
        done = CliRunner().invoke(app, ["server", "status", "--state", str(state)], env={"COLUMNS": "300"})
        return done.stdout

    plan = Plan(load_kit(study.coordinator), state, free_port(), free_port())
    keeper = Supervisor(plan)
    running = threading.Thread(target=keeper.run)
    running.start()
    try:
        assert wait_until(lambda: (state / "status.json").exists() and "trouble since 20" in status())
        assert "superlink.pid" in status()
        assert "over now" not in status()
        (state / "superlink.pid").rmdir()
        assert wait_until(lambda: ", over now:" in status())
        assert "superlink.pid" in status()
    finally:
        keeper.stop.set()
        running.join()


def wait_until(true, patience=60.0):
    end = time.monotonic() + patience
    while not true() and time.monotonic() < end:
        time.sleep(0.2)
    return true()


def test_stop_ends_the_supervisor_and_no_process_that_an_old_status_names(tmp_path):
    hold = (
        "import sys, signal\n"
        "from pathlib import Path\n"
        "from fedseg.processes import only_one\n"
        "with only_one(Path(sys.argv[1]) / '.supervisor.lock', 'taken'):\n"
        "    print('held', flush=True)\n"
        "    signal.sigwait({signal.SIGTERM})\n"
    )
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        (tmp_path / "status.json").write_text(json.dumps({"pid": bystander.pid, "rounds": 3}))
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert supervising(tmp_path) == holder.pid
        done = CliRunner().invoke(app, ["server", "stop", "--state", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert holder.wait(10) is not None
        assert bystander.poll() is None
    finally:
        for process in (holder, bystander):
            process.kill()
            process.wait()
