import socket

from fedseg.coordinator.supervisor import Plan, Supervisor
from fedseg.kit import load_kit


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
