import pytest

from fedseg.errors import QuorumError
from fedseg.federated import store
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import SiteFailure
from fedseg.federated.waiting import read_waiting, waiting_path
from tests.federated.toys import SITES, ask_toy, changed_fleet, run_toy, toy_experiment


def test_while_a_round_runs_the_sites_that_have_not_answered_are_named(tmp_path):
    seen = []

    def look(site, instructions, answer):
        found = read_waiting(tmp_path, "federated")
        seen.append((found.server_round, found.closing, found.attempt, found.asked, found.missing))
        return answer

    run_toy(toy_experiment(rounds=1), tmp_path, fleet=changed_fleet(look))
    expected = [SITES, ("B", "C"), ("C",)]
    assert seen == [(1, closing, 1, SITES, missing) for closing in (False, True) for missing in expected]


class HandsOver(InProcessFleet):
    """Looks what is going on whenever it is asked for something."""

    def __init__(self, seen, output):
        super().__init__(SITES, ask_toy)
        self._seen, self._output = seen, output

    def sites(self):
        self._look()
        return super().sites()

    def exchange(self, instructions, sites, deadline):
        self._look()
        return self._answers(super().exchange(instructions, sites, deadline))

    def _answers(self, answers):
        for answer in answers:
            self._look()
            yield answer

    def _look(self):
        found = read_waiting(self._output, "federated")
        self._seen.append(found.phase if found else None)


def test_a_round_says_in_which_phase_it_is(tmp_path, monkeypatch):
    seen, reach = [], store.reach

    def look(point):
        if point == "store-begun":
            seen.append(read_waiting(tmp_path, "federated").phase if seen else None)
        reach(point)

    def observe(event):
        if event.kind == "answer":
            seen.append(read_waiting(tmp_path, "federated").phase)

    monkeypatch.setattr(store, "reach", look)
    run_toy(toy_experiment(rounds=1), tmp_path, HandsOver(seen, tmp_path), observe=observe)
    round_ = [None, "broadcast", *["wait", "aggregate"] * 3, "checkpoint"]
    assert seen == [None, *round_, None, *["evaluate"] * 4]


def test_a_run_that_is_finished_waits_for_nobody(tmp_path):
    run_toy(toy_experiment(rounds=1), tmp_path)
    assert read_waiting(tmp_path, "federated") is None


def test_a_repeated_round_says_which_attempt_it_is(tmp_path):
    with pytest.raises(QuorumError):
        run_toy(
            toy_experiment(rounds=1, max_attempts=3, min_sites=3),
            tmp_path,
            fleet=changed_fleet(
                lambda site, sent, answer: SiteFailure(site, 1, "failed", "OSError") if site == "A" else answer
            ),
        )
    found = read_waiting(tmp_path, "federated")
    assert (found.attempt, found.missing) == (3, ())


PHASELESS = '{"server_round": 1, "closing": false, "attempt": 1, "since": 1, "asked": [], "missing": [], "phase": "?"}'


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"server_round": "x"}', "[" * 100_000, PHASELESS])
def test_a_damaged_file_says_nothing(tmp_path, text):
    waiting_path(tmp_path, "federated").write_text(text)
    assert read_waiting(tmp_path, "federated") is None
