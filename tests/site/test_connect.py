"""The gate's end of the socket, with a real service and with services that misbehave."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from fedseg.errors import ConfigError, MessageError, SiteUnreachable
from fedseg.site.connect import ATTEMPTS, LONGEST_PATH, Connection, Refusal, socket_address
from fedseg.site.pieces import cut, join
from fedseg.site.service import opened
from fedseg.site.wire.site_pb2 import Description, Event, Failure, Piece, Progress
from fedseg.site.wire.site_pb2_grpc import SiteServicer, add_SiteServicer_to_server
from tests.apps.hospitals import short_socket
from tests.site.rounds import asked, decoded, write_hospital

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path():
    path = short_socket()
    yield path
    path.unlink(missing_ok=True)


class Site(SiteServicer):
    """Answers as a test wants it.

    Args:
        answer: from the request's document and the call to events.
    """

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    def Describe(self, request, context):
        return Description(site="Aare")

    def RunRound(self, request, context):
        self.calls += 1
        return self.answer(join(request, 1 << 30), context)

    Evaluate = RunRound


@contextmanager
def serving(path, answer):
    site, server = Site(answer), grpc.server(ThreadPoolExecutor(4))
    add_SiteServicer_to_server(site, server)
    server.add_insecure_port(socket_address(path))
    server.start()
    try:
        yield site
    finally:
        server.stop(None).wait()


def echo(document, _):
    yield Event(progress=Progress(phase="training", done=1, total=2))
    for piece in cut(document):
        yield Event(piece=piece)


def test_documents_of_any_size_pass_both_ways(path):
    with serving(path, echo), Connection(path) as connection:
        for size in (0, 1, 1 << 20, 100_000_001):
            document = os.urandom(1000) * (size // 1000) + b"x" * (size % 1000)
            assert connection.ask(document, train=True) == document


def test_a_document_is_not_looked_into(path):
    with serving(path, echo), Connection(path) as connection:
        assert connection.ask(b"\0 no message at all", train=False) == b"\0 no message at all"


def test_progress_is_passed_on(path):
    told = []
    with serving(path, echo), Connection(path) as connection:
        connection.ask(b"x", train=True, on_progress=told.append)
    assert [(progress.phase, progress.done, progress.total) for progress in told] == [("training", 1, 2)]


def test_a_refusal_is_no_error(path):
    def refuse(*_):
        yield Event(failure=Failure(kind="abstained", reason="too-few-cases"))

    with serving(path, refuse), Connection(path) as connection:
        assert connection.ask(b"x", train=True) == Refusal("abstained", "too-few-cases")


def test_an_answer_that_is_cut_short_is_refused(path):
    def short(*_):
        yield Event(piece=Piece(data=b"abc", total=4))

    with serving(path, short), Connection(path) as connection, pytest.raises(MessageError, match="3 of 4 bytes"):
        connection.ask(b"x", train=True)


def test_a_service_that_dies_every_time_is_given_up(path):
    def die(_, context):
        yield Event(progress=Progress(phase="training"))
        context.abort(grpc.StatusCode.UNAVAILABLE, "/data/Mustermann")

    with (
        serving(path, die) as site,
        Connection(path) as connection,
        pytest.raises(SiteUnreachable, match="ended the call: UNAVAILABLE") as error,
    ):
        connection.ask(b"x", train=True)
    assert site.calls == ATTEMPTS
    assert "Mustermann" not in str(error.value)


def test_a_service_that_dies_once_is_asked_again(path):
    def die_once(document, context):
        if site.calls == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "")
        yield from echo(document, context)

    with serving(path, die_once) as site, Connection(path) as connection:
        assert connection.ask(b"x", train=True) == b"x"
    assert site.calls == 2


def test_an_error_of_the_service_is_not_asked_again(path):
    def fail(*_):
        raise ValueError("/data/Mustermann")
        yield

    with (
        serving(path, fail) as site,
        Connection(path) as connection,
        pytest.raises(SiteUnreachable, match="UNKNOWN") as error,
    ):
        connection.ask(b"x", train=True)
    assert site.calls == 1
    assert "Mustermann" not in str(error.value)


def test_a_service_that_is_not_there_is_waited_for_and_then_told_of(path):
    with Connection(path, patience=0.5) as connection:
        for call in (connection.describe, connection.cancel, lambda: connection.ask(b"x", train=True)):
            with pytest.raises(SiteUnreachable, match="no site service has answered for 0 s; start it with"):
                call()


def test_a_service_that_comes_later_is_found(path):
    with ThreadPoolExecutor(1) as callers, Connection(path, patience=60) as connection:
        found = callers.submit(connection.ask, b"x", train=True)
        time.sleep(0.5)
        with serving(path, echo):
            assert found.result() == b"x"


def test_one_connection_outlives_several_services(path):
    with Connection(path, patience=60) as connection:
        for _ in range(3):
            with serving(path, echo):
                assert connection.ask(b"x", train=True) == b"x"
            path.unlink(missing_ok=True)


def test_a_proxy_of_the_environment_is_not_asked(path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(path, echo), Connection(path, patience=10) as connection:
        assert connection.describe().site == "Aare"


def test_whoever_stops_listening_to_progress_ends_the_round(path):
    ended = threading.Event()

    def endless(_, context):
        context.add_callback(ended.set)
        while not ended.is_set():
            yield Event(progress=Progress(phase="training"))
            time.sleep(0.01)

    def enough(_):
        raise KeyboardInterrupt

    with serving(path, endless), Connection(path) as connection, pytest.raises(KeyboardInterrupt):
        connection.ask(b"x", train=True, on_progress=enough)
    assert ended.wait(10)


def test_a_relative_path_means_the_folder_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert socket_address(Path("site.sock")) == f"unix:{tmp_path}/site.sock"


def test_a_path_is_measured_in_bytes():
    assert socket_address(Path("/" + "x" * (LONGEST_PATH - 1)))
    for path in ("/" + "x" * LONGEST_PATH, "/" + "ä" * (LONGEST_PATH // 2)):
        with pytest.raises(ConfigError, match=f"is 101 bytes long, a UNIX socket takes {LONGEST_PATH}; choose another"):
            socket_address(Path(path))


def test_the_way_to_the_service_needs_no_torch():
    program = "import sys, fedseg.site.connect; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert {name.partition(".")[0] for name in result.stdout.split()} & {"torch", "monai", "nibabel", "scipy"} == set()


def test_a_real_service_answers_a_connection_that_was_made_before_it(tmp_path):
    config = write_hospital(tmp_path)
    with Connection(Path(config.socket), patience=60) as connection:
        for _ in range(2):
            with opened(config):
                assert decoded(connection.ask(asked(), train=True)).delta
