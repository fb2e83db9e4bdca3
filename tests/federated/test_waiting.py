import pytest

from fedseg.errors import QuorumError
from fedseg.federated.messages import SiteFailure
from fedseg.federated.waiting import read_waiting, waiting_path
from tests.federated.toys import SITES, changed_fleet, run_toy, toy_experiment


def test_while_a_round_runs_the_sites_that_have_not_answered_are_named(tmp_path):
    seen = []

    def look(site, instructions, answer):
        found = read_waiting(tmp_path, "federated")
        seen.append((found.server_round, found.closing, found.attempt, found.asked, found.missing))
        return answer

    run_toy(toy_experiment(rounds=1), tmp_path, fleet=changed_fleet(look))
    expected = [SITES, ("B", "C"), ("C",)]
    assert seen == [(1, closing, 1, SITES, missing) for closing in (False, True) for missing in expected]


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"server_round": "x"}', "[" * 100_000])
def test_a_damaged_file_says_nothing(tmp_path, text):
    waiting_path(tmp_path, "federated").write_text(text)
    assert read_waiting(tmp_path, "federated") is None
