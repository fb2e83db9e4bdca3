import multiprocessing
import os
import signal
import time

import pytest

from fedseg.federated.local import InProcessFleet, WorkerFleet
from fedseg.federated.messages import RoundInstructions, SiteFailure, SiteUpdate
from tests.federated.toys import PRELOAD, ask_toy, history, make_ask, rows, run_toy, same, toy_experiment, toy_weights

SITES = tuple(f"site-{number}" for number in range(5))


def workers(sites, count):
    return WorkerFleet(sites, make_ask, count, preload=PRELOAD)


def instructions(server_round=1):
    return RoundInstructions(server_round, toy_weights(), "{}")


def children():
    return {process.pid for process in multiprocessing.active_children()}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_number_of_workers_does_not_change_a_bit(tmp_path, count):
    experiment = toy_experiment(server_optimizer="momentum", participation=0.6)
    run_toy(experiment, tmp_path / "alone", InProcessFleet(SITES, ask_toy))
    with workers(SITES, count) as fleet:
        run_toy(experiment, tmp_path / "workers", fleet)
    assert history(tmp_path / "alone") == history(tmp_path / "workers")


def test_no_more_workers_than_sites_are_started():
    before = children()
    with workers(SITES[:2], 7):
        assert len(children() - before) == 2


def test_closing_leaves_no_worker():
    before = children()
    with workers(SITES, 3) as fleet:
        list(fleet.exchange(instructions(), SITES, None))
        started = children() - before
        assert len(started) == 3
    assert not any(is_alive(pid) for pid in started)
    assert children() == before


def test_closing_ends_workers_that_are_busy():
    before = children()
    with workers(["slow-1", "slow-2"], 2) as fleet:
        answers = fleet.exchange(instructions(), ["slow-1", "slow-2"], 0.3)
        next(answers)
        started = children() - before
    assert not any(is_alive(pid) for pid in started)


def test_a_killed_worker_costs_its_site_the_round_and_is_replaced(tmp_path):
    sites = ("A", "B", "crash")
    before = children()
    with workers(sites, 2) as fleet:
        run_toy(toy_experiment(), tmp_path, fleet)
        assert len(children() - before) == 2
    kept = rows(tmp_path, "SELECT server_round, site, reason FROM updates WHERE status = 'failed'")
    assert [tuple(row.values()) for row in kept] == [(2, "crash", "WorkerDied")]


def test_a_worker_killed_between_two_rounds_does_not_end_the_run():
    before = children()
    with workers(SITES, 2) as fleet:
        list(fleet.exchange(instructions(1), SITES, None))
        victim = min(children() - before)
        os.kill(victim, signal.SIGKILL)
        while is_alive(victim) and victim in children():
            time.sleep(0.01)
        second = {answer.site: answer for answer in fleet.exchange(instructions(2), SITES, None)}
        third = list(fleet.exchange(instructions(3), SITES, None))
    failed = [answer for answer in second.values() if isinstance(answer, SiteFailure)]
    assert [answer.reason for answer in failed] == ["WorkerDied"]
    assert second.keys() == set(SITES)
    assert all(isinstance(answer, SiteUpdate) for answer in third)


def test_failures_cross_the_process_border():
    with workers(["fail-1", "A"], 1) as fleet:
        answers = {answer.site: answer for answer in fleet.exchange(instructions(), ["A", "fail-1"], None)}
    assert answers["fail-1"] == SiteFailure("fail-1", 1, "failed", "ValueError")
    assert isinstance(answers["A"], SiteUpdate)


def test_the_deadline_ends_stragglers_and_the_fleet_goes_on():
    sites = ["A", "B", "slow"]
    with workers(sites, 2) as fleet:
        list(fleet.exchange(instructions(), ["A", "B"], None))  # both workers are up
        first = {answer.site: answer for answer in fleet.exchange(instructions(), sites, 2.0)}
        second = {answer.site: answer for answer in fleet.exchange(instructions(2), ["A", "B"], None)}
    assert first["slow"] == SiteFailure("slow", 1, "late", "deadline")
    assert isinstance(first["A"], SiteUpdate)
    assert isinstance(second["A"], SiteUpdate)
    assert second["A"].server_round == 2


def test_sites_that_were_never_reached_are_late_too():
    with workers(["slow-1", "A"], 1) as fleet:
        answers = list(fleet.exchange(instructions(), ["slow-1", "A"], 0.3))
    assert answers == [SiteFailure("A", 1, "late", "deadline"), SiteFailure("slow-1", 1, "late", "deadline")]


def test_an_exchange_that_is_abandoned_leaves_no_answer_for_the_next():
    with workers(SITES, 2) as fleet:
        abandoned = fleet.exchange(instructions(1), SITES, None)
        next(abandoned)
        abandoned.close()
        answers = list(fleet.exchange(instructions(2), SITES, None))
    assert sorted(answer.site for answer in answers) == list(SITES)
    assert {answer.server_round for answer in answers} == {2}


def test_sites_in_this_process_answer_in_turn():
    answers = list(InProcessFleet(SITES, ask_toy).exchange(instructions(), SITES, None))
    assert [answer.site for answer in answers] == list(SITES)
    assert same(answers[0].delta, ask_toy("site-0", instructions()).delta)
