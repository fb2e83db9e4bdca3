"""The site service as a gate sees it: over a real socket, in this process or in one of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedseg import __version__
from fedseg.errors import ConfigError
from fedseg.site.connect import Connection, Refusal, socket_address
from fedseg.site.pieces import cut
from fedseg.site.service import SERVICE, opened
from fedseg.site.wire.site_pb2 import CancelRequest, DescribeRequest, Piece
from fedseg.site.wire.site_pb2_grpc import SiteStub
from tests.apps.hospitals import short_socket
from tests.site.rounds import LONG, asked, decoded, directly, instructions, logged, same, write_hospital

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    return write_hospital(tmp_path)


@contextmanager
def stub(config):
    """A caller that is not our own."""
    with grpc.insecure_channel(socket_address(Path(config.socket))) as channel:
        yield SiteStub(channel)


def ask(config, document=None, *, train=True, **options):
    with Connection(Path(config.socket), patience=90) as connection:
        return connection.ask(asked() if document is None else document, train=train, **options)


def wait_until(true, seconds=60):
    for _ in range(seconds * 50):
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError("has not happened")


def is_training(config):
    with stub(config) as site:
        now = site.Describe(DescribeRequest())
    return now.state == "busy" and now.progress.phase == "training"


# ---------------------------------------------------------------------------------------------------- rounds


def test_a_round_over_the_socket_has_the_bits_of_the_site_called_directly(config, tmp_path):
    with opened(config):
        update = decoded(ask(config))
    assert same(update, directly(config, tmp_path, instructions()))
    assert update.manifest


def test_scores_come_without_training(config):
    with opened(config):
        update = decoded(ask(config, asked(train=False), train=False))
    assert update.delta == {}
    assert update.sums["cases"] == 1


def test_progress_is_told_in_the_order_of_the_work(config):
    told = []
    with opened(config):
        ask(config, on_progress=lambda progress: told.append((progress.phase, progress.done)))
    phases = list(dict.fromkeys(phase for phase, _ in told))
    assert phases == ["checking", "preparing", "scoring", "training"]
    for phase in phases:
        done = [number for name, number in told if name == phase]
        assert done == sorted(done)


def test_a_site_says_who_it_is_and_what_it_does(config):
    before = time.time()
    with opened(config), Connection(Path(config.socket)) as connection:
        idle = connection.describe()
        assert (idle.site, idle.version, idle.state, idle.device) == ("Aare", __version__, "idle", "cpu")
        assert before <= idle.started <= time.time()
        assert (idle.answered, idle.rounds_answered, idle.rounds_refused) == (0, 0, 0)
        connection.ask(asked(), train=True)
        connection.ask(asked(), train=False)
        after = connection.describe()
    assert (after.state, after.rounds_answered, after.rounds_refused) == ("idle", 1, 1)
    assert after.server_round == 1
    assert after.answered > idle.started


def test_what_the_policy_forbids_leaves_as_its_rule_only(tmp_path):
    config = write_hospital(tmp_path, policy='models = ["mlru++"]')
    with opened(config):
        assert ask(config) == Refusal("abstained", "policy.models")
    assert logged(config)[0]["rule"] == "models"


def test_an_error_leaves_as_the_name_of_its_class_only(config):
    Path(config.data).rename(f"{config.data}-gone")
    with opened(config), stub(config) as site:
        events = list(site.RunRound(cut(asked())))
    assert (events[-1].failure.kind, events[-1].failure.reason) == ("failed", "DataError")
    assert config.data not in str(events)


def test_nothing_leaves_when_the_audit_log_was_changed(config):
    with opened(config), stub(config) as site:
        ask(config)
        with config.audit_log.open("ab") as log:
            log.write(b"{}\n")
        events = list(site.RunRound(cut(asked())))
        assert {event.WhichOneof("event") for event in events} == {"progress", "failure"}
        assert events[-1].failure.reason == "AuditError"
        assert str(config.audit_log) not in str(events)
        config.audit_log.write_bytes(config.audit_log.read_bytes().removesuffix(b"{}\n"))
        assert decoded(ask(config)).delta


@pytest.mark.parametrize("document", [b"", b"garbage", bytes(100_000_000)], ids=["empty", "short", "100 MB"])
def test_garbage_is_refused_and_the_next_round_works(config, document):
    with opened(config):
        assert ask(config, document) == Refusal("failed", "MessageError")
        assert decoded(ask(config)).delta


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [Piece(data=b"abc", total=2)],
        [Piece(data=b"abc", total=400)],
        [Piece(data=b"abc")],
        [Piece(total=1 << 63)],
    ],
)
def test_pieces_that_make_no_document_are_refused(config, pieces):
    with opened(config), stub(config) as site:
        (event,) = site.RunRound(iter(pieces))
        assert (event.failure.kind, event.failure.reason) == ("failed", "MessageError")


def test_a_request_that_is_too_large_is_refused_when_it_is_announced(tmp_path):
    config = write_hospital(tmp_path, largest_request=1)
    sent = []

    def endless():
        yield Piece(data=b"x", total=1_000_001)
        while True:
            sent.append(1)
            yield Piece(data=b"x" * 1_000_000)

    with opened(config), stub(config) as site:
        call = site.RunRound(endless())
        (event,) = call
        assert event.failure.reason == "MessageError"
    assert len(sent) < 100


def test_a_message_beyond_the_size_of_a_piece_is_refused(config):
    with opened(config), stub(config) as site:
        with pytest.raises(grpc.RpcError) as error:
            list(site.RunRound(iter([Piece(data=b"x" * (5 << 20), total=5 << 20)])))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert decoded(ask(config)).delta


# ---------------------------------------------------------------------------------------------------- callers


def test_two_callers_are_served_one_after_the_other(config):
    document = asked()
    with opened(config), ThreadPoolExecutor(2) as callers:
        updates = [decoded(call.result()) for call in [callers.submit(ask, config, document) for _ in range(2)]]
    assert same(*updates)
    assert [entry["decided"] for entry in logged(config)] == ["allowed", "allowed"]


def test_a_running_round_can_be_cancelled(config):
    with opened(config), ThreadPoolExecutor(1) as callers, Connection(Path(config.socket)) as connection:
        running = callers.submit(ask, config, asked(LONG))
        wait_until(lambda: is_training(config))
        assert connection.cancel() is True
        assert running.result() == Refusal("failed", "RoundCancelled")
        assert connection.cancel() is False
        assert decoded(ask(config)).delta
    assert [entry["decided"] for entry in logged(config)] == ["cancelled", "allowed"]


def test_a_caller_that_hangs_up_ends_its_round_and_the_next_one_works(config):
    with opened(config), stub(config) as site:
        call = site.RunRound(cut(asked(LONG)))
        while next(call).progress.phase != "training":
            pass
        call.cancel()
        assert decoded(ask(config)).delta
        assert site.Cancel(CancelRequest()).cancelled is False
    assert [entry["decided"] for entry in logged(config)] == ["cancelled", "allowed"]


def test_a_caller_that_dies_ends_its_round(config):
    program = (
        "import sys; from pathlib import Path; from fedseg.site.connect import Connection\n"
        "Connection(Path(sys.argv[1])).ask(Path(sys.argv[2]).read_bytes(), train=True)"
    )
    document = Path(config.data).parent / "request"
    document.write_bytes(asked(LONG))
    with opened(config):
        caller = subprocess.Popen([sys.executable, "-c", program, config.socket, str(document)], cwd=ROOT)
        wait_until(lambda: is_training(config))
        caller.kill()
        caller.wait()
        assert decoded(ask(config)).delta
    assert [entry["decided"] for entry in logged(config)] == ["cancelled", "allowed"]


def test_a_caller_that_did_not_wait_for_its_turn_is_not_served(config):
    with opened(config), ThreadPoolExecutor(1) as callers, stub(config) as site:
        first = callers.submit(ask, config, asked(LONG))
        wait_until(lambda: is_training(config))
        impatient = site.RunRound(cut(asked(LONG)))
        with pytest.raises(grpc.RpcError):
            list(site.RunRound(cut(asked(LONG)), timeout=1))
        impatient.cancel()
        site.Cancel(CancelRequest())
        assert first.result() == Refusal("failed", "RoundCancelled")
        assert decoded(ask(config)).delta
    assert [entry["decided"] for entry in logged(config)] == ["cancelled", "allowed"]


def test_a_service_that_closes_ends_the_round_that_is_running(config):
    document = asked(LONG)
    with ThreadPoolExecutor(1) as callers, stub(config) as site:
        with opened(config):
            running = callers.submit(lambda: list(site.RunRound(cut(document))))
            wait_until(lambda: is_training(config))
        error = running.exception()
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert logged(config)[0]["decided"] == "cancelled"


# ---------------------------------------------------------------------------------------------------- socket


def test_the_socket_is_closed_to_others_and_gone_afterwards(config):
    with opened(config):
        assert Path(config.socket).stat().st_mode & 0o777 == 0o600
    assert not Path(config.socket).exists()


def test_the_health_service_says_that_it_serves(config):
    with opened(config), grpc.insecure_channel(socket_address(Path(config.socket))) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_socket_that_a_dead_service_left_is_replaced(config):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(config.socket)
    assert Path(config.socket).exists()
    with opened(config):
        assert decoded(ask(config)).delta


def test_a_socket_on_which_somebody_listens_is_left_alone(config):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(config.socket)
        other.listen()
        with pytest.raises(ConfigError, match="another site service listens there"), opened(config):
            pass
        assert Path(config.socket).exists()
    Path(config.socket).unlink()


def test_a_file_that_is_no_socket_is_left_alone(config, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("data")
    with (
        pytest.raises(ConfigError, match="is another kind of file"),
        opened(config.model_copy(update={"socket": str(precious)})),
    ):
        pass
    assert precious.read_text() == "data"


def test_two_services_cannot_share_a_state_folder(config):
    other = config.model_copy(update={"socket": str(short_socket())})
    with opened(config):
        with pytest.raises(ConfigError, match="another site service uses this state folder"), opened(other):
            pass
        assert decoded(ask(config)).delta
    with opened(other):
        assert decoded(ask(other)).delta


def test_a_path_that_is_too_long_for_a_socket_is_refused(config, tmp_path):
    with (
        pytest.raises(ConfigError, match="a UNIX socket takes 100"),
        opened(config.model_copy(update={"socket": str(tmp_path / ("s" * 100))})),
    ):
        pass


def test_starting_and_stopping_are_on_record(config):
    with opened(config):
        pass
    (started,), (stopped,) = logged(config, "started"), logged(config, "stopped")
    assert started["version"] == __version__
    assert started["policy"]["min_cases"] == "trains with 1 cases or more"
    assert stopped == {"event": "stopped"}


# ---------------------------------------------------------------------------------------------------- processes


def start(config):
    """The command as a hospital runs it."""
    file = Path(config.data).parent / "site.toml"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedseg", "site", "serve", str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with Connection(Path(config.socket), patience=90) as connection:
        connection.describe()
    return process


@pytest.mark.integration
def test_whoever_asked_a_service_that_ended_is_answered_by_the_next_one_with_the_same_bits(config, tmp_path):
    """One service is killed in training, the next is told to end in training, the third one answers."""
    training = LONG.training.model_copy(update={"steps_per_epoch": 100})
    slow = LONG.model_copy(update={"training": training, "name": "slow"})
    process = start(config)
    with ThreadPoolExecutor(1) as callers:
        running = callers.submit(ask, config, asked(slow))
        wait_until(lambda: is_training(config))
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL

        process = start(config)
        wait_until(lambda: is_training(config))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert [entry["decided"] for entry in logged(config)] == ["cancelled"]
        assert len(logged(config, "stopped")) == 1
        assert not Path(config.socket).exists()

        process = start(config)
        try:
            update = decoded(running.result(timeout=120))
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert same(update, directly(config, tmp_path, instructions(slow)))
    assert [entry["decided"] for entry in logged(config)] == ["cancelled", "allowed"]
    assert len(logged(config, "stopped")) == 2
