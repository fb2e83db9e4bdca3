"""What crosses Flower's wire is what was meant, to the last bit, and nothing else."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedseg.errors import MessageError, SiteAbstained
from fedseg.federated.messages import RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.weights import Weights
from fedseg.flower import pack_answer, pack_instructions, read_answer, read_instructions, reply_to
from tests.apps.grid import over_the_wire

AWKWARD: Weights = {
    "scalar": np.array(0.1, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3],
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "special": np.array([np.inf, -0.0, np.nan, np.finfo(np.float32).smallest_subnormal], np.float32),
}


@pytest.fixture(autouse=True)
def task_identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def message(content: RecordDict) -> Message:
    return over_the_wire(Message(content, 7, "train"))[0]


def bits(weights: Weights) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    return {name: (array.shape, array.dtype.str, array.tobytes()) for name, array in weights.items()}


def test_instructions_arrive_bit_for_bit() -> None:
    sent = RoundInstructions(3, AWKWARD, '{"name": "ä"}', train=False, evaluate=True, surface=True)
    received = read_instructions(message(pack_instructions(sent)).content)
    assert bits(received.weights) == bits(AWKWARD)
    assert received.header() == sent.header()


def test_an_update_arrives_bit_for_bit() -> None:
    sent = SiteUpdate("Aare", 3, AWKWARD, 12, {"dice/liver/sum": 0.1 + 0.2}, {"loss": 1e-300}, {"missing-label": 2})
    received = read_answer(message(pack_answer(sent)), "Aare", 3)
    assert isinstance(received, SiteUpdate)
    assert bits(received.delta) == bits(AWKWARD)
    assert received.header() == sent.header()


def test_an_update_of_nothing_but_scores_arrives() -> None:
    sent = SiteUpdate("Aare", 3, {}, 12, {"cases": 4.0})
    assert read_answer(message(pack_answer(sent)), "Aare", 3) == sent


@pytest.mark.parametrize(
    "failure",
    [
        SiteFailure("Aare", 3, "abstained", "too-few-cases"),
        SiteFailure("Aare", 3, "failed", "DataError"),
        SiteFailure("Aare", 3, "late", "deadline"),
    ],
)
def test_a_failure_arrives_with_its_kind_and_reason(failure: SiteFailure) -> None:
    assert read_answer(message(pack_answer(failure)), "Aare", 3) == failure


def test_an_answer_counts_for_the_site_that_was_asked() -> None:
    forged = pack_answer(SiteUpdate("Elbe", 3, {}, 12))
    assert read_answer(message(forged), "Aare", 3) == SiteFailure("Aare", 3, "failed", "WrongName")


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"update": ConfigRecord({"x": 1})}),
        RecordDict({"update": ArrayRecord()}),
        RecordDict({"update": ArrayRecord([np.zeros(3)])}),
        RecordDict({"update": ArrayRecord({"message": Array("uint8", (3,), "fedseg", b"\x00\x01\x02")})}),
        RecordDict({"update": pack_instructions(RoundInstructions(1, {}, "{}"))["instructions"]}),
    ],
    ids=["nothing", "no-array", "no-message", "wrong-name", "garbage", "wrong-kind"],
)
def test_a_broken_reply_is_a_failure_of_its_site(content: RecordDict) -> None:
    assert read_answer(message(content), "Aare", 3) == SiteFailure("Aare", 3, "failed", "MessageError")


def test_instructions_that_are_something_else_are_refused() -> None:
    with pytest.raises(MessageError, match="no instructions"):
        read_instructions(RecordDict({"update": ArrayRecord()}))


def test_flowers_own_error_becomes_a_failure_without_its_text() -> None:
    question = Message(RecordDict(), 7, "train")
    reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, "Mustermann.nii.gz"), reply_to=question)
    assert read_answer(reply, "Aare", 3) == SiteFailure("Aare", 3, "failed", "ClientAppCrashed")


@pytest.mark.parametrize("reason", ["no such file: Mustermann.nii.gz", "x" * 500, "", 3.5])
def test_a_reason_that_is_no_plain_word_is_not_passed_on(reason: str | float) -> None:
    reply = message(RecordDict({"failure": ConfigRecord({"kind": "failed", "reason": reason})}))
    assert read_answer(reply, "Aare", 3) == SiteFailure("Aare", 3, "failed", "Unreadable")


class Broken:
    """A site whose errors speak of patients."""

    site, version = "Aare", "1"

    def __enter__(self) -> "Broken":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def describe(self) -> "Broken":
        return self

    def ask(self, instructions: bytes, *, train: bool) -> bytes:
        raise SiteAbstained("too-few-cases", "only Mustermann_Max.nii.gz is usable")


def test_no_error_of_the_site_leaves_the_gate_with_its_text() -> None:
    def no_site() -> Broken:
        raise FileNotFoundError("/data/Mustermann_Max.nii.gz")

    question = message(pack_instructions(RoundInstructions(3, {}, "{}")))
    for connect, reason in [(Broken, "SiteAbstained"), (no_site, "FileNotFoundError")]:
        reply, sent = over_the_wire(reply_to(question, connect))
        assert read_answer(reply, "Aare", 3) == SiteFailure("Aare", 3, "failed", reason)
        assert not any(b"Mustermann" in data for data in sent)


def test_a_question_for_the_name_is_answered_without_opening_the_site() -> None:
    reply = reply_to(over_the_wire(Message(RecordDict(), 7, "query"))[0], Broken)
    assert json.loads(json.dumps(dict(reply.content["site"])))["name"] == "Aare"
