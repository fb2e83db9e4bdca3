"""An answer that is stuck keeps nobody else's answer and no deadline waiting."""

import threading
import time

import pytest

from fedseg import puller
from fedseg.puller import Puller


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(puller, "STUCK_SECONDS", 0.2)


def found_by(pull, numbers, wanted):
    """Looks until so much is found: on a busy machine anything may seem stuck for a while."""
    found, end = dict[str, str](), time.monotonic() + 60
    while found.keys() != wanted and time.monotonic() < end:
        found.update(pull([number for number in numbers if number not in found]))
    return found


def until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_what_has_arrived_is_fetched_and_what_has_not_is_asked_for_again():
    answers = {"a": "A"}
    with Puller(answers.get) as pull:
        assert [*pull(["a", "b"])] == [("a", "A")]
        assert [*pull(["b"])] == []
        answers["b"] = "B"
        assert [*pull(["b"])] == [("b", "B")]


@pytest.mark.usefixtures("hurried")
def test_one_that_is_stuck_does_not_keep_the_others_and_may_still_come():
    whole, asked = threading.Event(), []

    def fetch(number):
        asked.append(number)
        if number in ("slow", "slower"):
            assert whole.wait(30)
        return number.upper()

    with Puller(fetch) as pull:
        assert found_by(pull, ["slow", "b", "slower", "d"], {"b", "d"}) == {"b": "B", "d": "D"}
        assert pull.stuck == {"slow", "slower"}
        assert [*pull(["slow", "slower"])] == []
        assert asked.count("slow") == 1, "it is not asked for twice, for Flower hands out an answer once"
        whole.set()
        assert found_by(pull, ["slow", "slower"], {"slow", "slower"}) == {"slow": "SLOW", "slower": "SLOWER"}
    assert pull.stuck == set()


def test_one_answer_is_fetched_at_a_time():
    running, most = 0, 0

    def fetch(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1
        return number

    with Puller(fetch) as pull:
        assert len([*pull([str(number) for number in range(20)])]) == 20
    assert most == 1


def test_an_error_is_raised_where_the_answer_is_waited_for():
    def fetch(number):
        raise ConnectionError(number)

    with Puller(fetch) as pull, pytest.raises(ConnectionError, match="a"):
        list(pull(["a"]))


@pytest.mark.usefixtures("hurried")
def test_its_threads_end_with_it():
    whole, others = threading.Event(), set(threading.enumerate())

    def ours():
        return set(threading.enumerate()) - others

    with Puller(lambda number: whole.wait(60) and number) as pull:
        list(pull(["a", "b"]))
        assert len(ours()) == 3, "two that wait, and one for what is asked next"
        assert all(thread.daemon for thread in ours()), "they do not keep the process"
    assert until(lambda: len(ours()) == 2)
    whole.set()
    assert until(lambda: not ours())
