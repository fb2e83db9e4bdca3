import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.deploy.variants import DEPLOY

Status = health_pb2.HealthCheckResponse


@contextmanager
def answering(address: str, status: Status.ServingStatus) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    server.start()
    yield port
    server.stop(None).wait()


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "docker" / "health.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_socket_that_serves_is_healthy(tmp_path: Path):
    with answering(f"unix:{tmp_path}/site.sock", Status.SERVING):
        done = ask(f"unix:{tmp_path}/site.sock")
    assert (done.returncode, done.stdout) == (0, "SERVING\n")


def test_a_port_that_serves_is_healthy():
    with answering("127.0.0.1:0", Status.SERVING) as port:
        assert ask(f"127.0.0.1:{port}").returncode == 0


@pytest.mark.parametrize("status", [Status.NOT_SERVING, Status.UNKNOWN])
def test_a_process_that_is_stopping_is_not_healthy(tmp_path: Path, status: Status.ServingStatus):
    with answering(f"unix:{tmp_path}/site.sock", status):
        assert ask(f"unix:{tmp_path}/site.sock").returncode == 1


def test_a_socket_without_a_process_is_not_healthy(tmp_path: Path):
    done = ask(f"unix:{tmp_path}/site.sock")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr


def test_a_call_without_a_target_says_how():
    done = ask()
    assert done.returncode == 2
    assert "usage" in done.stderr
