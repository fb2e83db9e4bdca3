import pickle

import pytest

from fedseg.federated.machines import Machines, SimulatedMachine
from fedseg.federated.messages import SiteFailure

SLOW = SimulatedMachine(speed=0.5)


def test_a_slow_machine_is_late_or_does_the_share_of_its_steps_that_fits():
    assert Machines(deadline=10).of("A", SLOW).steps(6) == 0
    assert Machines(deadline=10, partial=True).of("A", SLOW).steps(6) == 5
    assert Machines(deadline=12).of("A", SLOW).steps(6) == 6
    assert Machines().of("A", SLOW).steps(1000) == 1000
    assert Machines().of("A", SLOW).seconds(6) == 12


def test_a_machine_too_slow_for_a_single_step_is_late_even_where_partial_work_counts():
    assert Machines(deadline=1, partial=True).of("A", SLOW).steps(6) == 0


def test_absences_are_seeded_and_about_as_frequent_as_they_should_be():
    plan = Machines(dropout=0.3).of("A", None)
    absent = [plan.absence(number) for number in range(1, 1001)]
    assert 250 < sum(failure is not None for failure in absent) < 350
    assert absent == [pickle.loads(pickle.dumps(plan)).absence(number) for number in range(1, 1001)]
    other = Machines(dropout=0.3).of("B", None)
    assert [failure is None for failure in absent] != [other.absence(n) is None for n in range(1, 1001)]


def test_a_hospital_joins_late_and_is_away_for_some_rounds():
    plan = Machines().of("A", SimulatedMachine(joins=3, offline=(5, 6)))
    there = [number for number in range(1, 9) if plan.absence(number) is None]
    assert there == [3, 4, 7, 8]
    assert plan.absence(1) == SiteFailure("A", 1, "failed", "NotYetJoined")
    assert plan.absence(5) == SiteFailure("A", 5, "failed", "Offline")


def test_speeds_are_drawn_once_for_each_hospital():
    machines = Machines(speed_sigma=0.7)
    speeds = {name: machines.of(name, None).machine.speed for name in "ABCDEF"}
    assert len(set(speeds.values())) == 6
    assert speeds == {name: machines.of(name, None).machine.speed for name in "ABCDEF"}
    assert Machines().of("A", None).machine.speed == pytest.approx(1)
