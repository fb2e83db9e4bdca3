import itertools
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from fedseg.errors import QuorumError
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import SiteFailure
from tests.federated.toys import (
    SITES,
    ask_toy,
    changed_fleet,
    history,
    rows,
    run_toy,
    same,
    toy_experiment,
    toy_state,
    toy_update,
    with_delta,
)


class Shuffled(InProcessFleet):
    """Answers in an order of its own."""

    def __init__(self, order):
        super().__init__(SITES, ask_toy)
        self._order = order

    def exchange(self, instructions, sites, deadline):
        return super().exchange(instructions, sorted(sites, key=self._order.index), deadline)


def failing(*broken, kind="failed", reason="ValueError", rounds=range(99)):
    def change(site, instructions, answer):
        if site in broken and instructions.server_round in rounds:
            return SiteFailure(site, instructions.server_round, kind, reason)
        return answer

    return change


def test_one_round_is_the_weighted_mean_of_the_sites_deltas(tmp_path):
    experiment = toy_experiment(rounds=1)
    final = run_toy(experiment, tmp_path)
    start = toy_state(experiment).weights
    seen = []
    run_toy(experiment, tmp_path / "again", changed_fleet(lambda site, _, answer: seen.append(answer) or answer))
    updates = [answer for answer in seen if answer.delta]
    cases = sum(update.num_cases for update in updates)
    for name, array in start.items():
        mean = sum(update.num_cases * update.delta[name].astype(np.float64) for update in updates) / cases
        np.testing.assert_allclose(final.weights[name], array + mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("aggregate", ["mean", "median", "trimmed-mean"])
def test_the_order_of_answers_does_not_change_a_bit_of_weights_or_history(tmp_path, aggregate):
    experiment = toy_experiment(aggregate=aggregate, trim=0.34, server_optimizer="momentum")
    for order in itertools.permutations(SITES):
        run_toy(experiment, tmp_path / "".join(order), Shuffled(order))
    kept = [history(tmp_path / "".join(order)) for order in itertools.permutations(SITES)]
    assert all(one == kept[0] for one in kept)


@pytest.mark.parametrize(
    ("kind", "reason"), [("failed", "ValueError"), ("abstained", "too-few-cases"), ("late", "deadline")]
)
def test_a_site_that_fails_changes_nothing_but_the_number_of_sites(tmp_path, kind, reason):
    experiment = toy_experiment()
    without = run_toy(experiment, tmp_path / "without", InProcessFleet(SITES[:2], ask_toy))
    broken = run_toy(experiment, tmp_path / "broken", changed_fleet(failing("C", kind=kind, reason=reason)))
    assert same(without.weights, broken.weights)
    assert without.norms == broken.norms
    assert history(tmp_path / "without")["metrics"] == history(tmp_path / "broken")["metrics"]
    kept = rows(tmp_path / "broken", "SELECT status, reason, norm FROM updates WHERE site = 'C'")
    assert kept == [{"status": kind, "reason": reason, "norm": None}] * 3
    events = rows(tmp_path / "broken", "SELECT kind, server_round, site, detail FROM events ORDER BY id")
    assert [tuple(event.values()) for event in events] == [(kind, number, "C", reason) for number in (1, 2, 3, 4)]


def spoil_nan(update):
    return with_delta(update, bias=np.full(5, math.nan, np.float32))


def spoil_names(update):
    return replace(update, delta={"other": np.zeros(3, np.float32)})


def spoil_size(update):
    return replace(with_delta(update, bias=np.full(5, 1e12, np.float32)), num_cases=1000)


def spoil_round(update):
    return replace(update, server_round=update.server_round - 1)


def spoil_metric(update):
    return replace(update, sums={"dice/liver/count": 3.0})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_nan, "non-finite"),
        (spoil_names, "wrong-names"),
        (spoil_size, "too-large"),
        (spoil_round, "stale"),
        (spoil_metric, "wrong-metrics"),
    ],
)
def test_a_refused_update_never_touches_the_model_and_is_recorded(tmp_path, spoil, reason):
    experiment = toy_experiment(rounds=2)
    without = run_toy(experiment, tmp_path / "without", InProcessFleet(SITES[1:], ask_toy))

    def change(site, instructions, answer):
        return spoil(answer) if site == "A" and instructions.train else answer

    refused = run_toy(experiment, tmp_path / "refused", changed_fleet(change))
    assert same(without.weights, refused.weights)
    kept = rows(tmp_path / "refused", "SELECT status, reason FROM updates WHERE site = 'A' AND server_round = 1")
    assert kept == [{"status": "refused", "reason": reason}]


def test_an_absurd_norm_is_refused_once_there_are_others_to_compare_with(tmp_path):
    def change(site, instructions, answer):
        return (
            with_delta(answer, bias=1e4 * answer.delta["bias"])
            if site == "B" and instructions.server_round == 2
            else answer
        )

    run_toy(toy_experiment(rounds=2), tmp_path, changed_fleet(change))
    kept = rows(tmp_path, "SELECT status, reason FROM updates WHERE site = 'B' ORDER BY server_round")
    assert kept == [{"status": "accepted", "reason": None}, {"status": "refused", "reason": "absurd-norm"}]


class Doubling(InProcessFleet):
    """Every site answers twice, and a stranger answers too."""

    def exchange(self, instructions, sites, deadline):
        for answer in super().exchange(instructions, sites, deadline):
            yield from (answer, answer)
        yield toy_update("stranger", instructions)


def test_answers_that_nobody_asked_for_do_not_count(tmp_path):
    experiment = toy_experiment()
    plain = run_toy(experiment, tmp_path / "plain")
    doubled = run_toy(experiment, tmp_path / "doubled", Doubling(SITES, ask_toy))
    assert same(plain.weights, doubled.weights)
    assert history(tmp_path / "plain")["metrics"] == history(tmp_path / "doubled")["metrics"]
    unasked = rows(
        tmp_path / "doubled", "SELECT site FROM events WHERE detail = 'unasked' AND server_round = 1 ORDER BY site"
    )
    assert [row["site"] for row in unasked] == [*SITES, "stranger"]


@pytest.mark.parametrize("aggregate", ["mean", "median", "trimmed-mean"])
def test_every_update_is_kept_with_its_cosine_to_the_joint_one_over_parameters_only(tmp_path, aggregate):
    updates = {}

    def change(site, instructions, answer):
        if instructions.train:
            answer = with_delta(answer, **{"norm.running_var": 1e3 * answer.delta["norm.running_var"]})
            updates[site] = answer
        return answer

    experiment = toy_experiment(rounds=1, aggregate=aggregate, trim=0.34)
    final = run_toy(experiment, tmp_path, changed_fleet(change))
    start = toy_state(experiment)
    names = sorted(start.weights.keys() - start.buffers)

    def flat(weights):
        return np.concatenate([weights[name].reshape(-1) for name in names]).astype(float)

    joint = flat(final.weights) - flat(start.weights)
    kept = rows(tmp_path, "SELECT site, cosine FROM updates ORDER BY site")
    for row in kept:
        delta = flat(updates[row["site"]].delta)
        exact = delta @ joint / np.linalg.norm(delta) / np.linalg.norm(joint)
        assert row["cosine"] == pytest.approx(exact, abs=0.05)
    assert len({row["cosine"] for row in kept}) == 3


def test_a_site_that_pulls_the_other_way_has_a_negative_cosine_and_one_that_stands_still_has_none(tmp_path):
    def change(site, instructions, answer):
        factor = {"A": 1, "B": -0.1, "C": 0}[site]
        base = toy_update("A", instructions).delta
        return with_delta(answer, **{name: np.float32(factor) * array for name, array in base.items()})

    run_toy(toy_experiment(rounds=1, weighting="uniform"), tmp_path, changed_fleet(change))
    kept = [row["cosine"] for row in rows(tmp_path, "SELECT cosine FROM updates ORDER BY site")]
    assert kept[:2] == pytest.approx([1, -1])
    assert kept[2] is None


def test_a_round_below_the_quorum_is_repeated_and_ends_as_if_it_had_worked_at_once(tmp_path):
    experiment = toy_experiment(min_sites=3)
    calls = []

    def change(site, instructions, answer):
        calls.append((instructions.server_round, site))
        return failing("A")(site, instructions, answer) if calls.count((2, "A")) == 1 else answer

    plain = run_toy(experiment, tmp_path / "plain")
    repeated = run_toy(experiment, tmp_path / "repeated", changed_fleet(change))
    assert same(plain.weights, repeated.weights)
    attempts = [
        row["attempts"] for row in rows(tmp_path / "repeated", "SELECT attempts FROM rounds ORDER BY server_round")
    ]
    assert attempts == [0, 1, 2, 1]
    events = rows(tmp_path / "repeated", "SELECT kind, detail FROM events WHERE kind = 'repeated'")
    assert events == [{"kind": "repeated", "detail": "2 of 3 sites needed"}]


def test_a_run_stops_after_too_many_attempts_names_the_reasons_and_can_go_on_later(tmp_path):
    experiment = toy_experiment(max_attempts=2, min_sites=2)
    broken = changed_fleet(failing("A", "B", rounds=[2]))
    with pytest.raises(
        QuorumError, match=r"round 2: fewer than 2 sites .* in 2 attempts\. A: failed \(ValueError\); B: failed"
    ):
        run_toy(experiment, tmp_path / "stopped", broken)
    resumed = run_toy(experiment, tmp_path / "stopped", resume=True)
    assert same(resumed.weights, run_toy(experiment, tmp_path / "plain").weights)
    assert history(tmp_path / "stopped") == history(tmp_path / "plain")


def test_too_few_connected_sites_are_called_that(tmp_path):
    with pytest.raises(QuorumError, match="too few are connected"):
        run_toy(toy_experiment(min_sites=2), tmp_path, InProcessFleet(["A"], ask_toy))


def test_sites_beyond_the_deadline_are_late_and_the_round_ends_without_them(tmp_path):
    def slow(site, instructions, answer):
        if site == "B":
            time.sleep(0.3)
        return answer

    experiment = toy_experiment(rounds=1, deadline=0.2, min_sites=1)
    run_toy(experiment, tmp_path, changed_fleet(slow))
    kept = rows(tmp_path, "SELECT site, status, reason FROM updates ORDER BY site")
    assert [tuple(row.values()) for row in kept] == [
        ("A", "accepted", None), ("B", "late", "deadline"), ("C", "late", "deadline")
    ]  # fmt: skip


def test_partial_participation_is_the_same_for_the_same_seed(tmp_path):
    sites = tuple(f"site-{number}" for number in range(6))
    experiment = toy_experiment(participation=0.5, rounds=5)
    for name in ("one", "other"):
        run_toy(experiment, tmp_path / name, InProcessFleet(sites, ask_toy))
    assert history(tmp_path / "one") == history(tmp_path / "other")
    asked = [
        json.loads(row["asked"]) for row in rows(tmp_path / "one", "SELECT asked FROM rounds WHERE server_round > 0")
    ]
    assert all(len(one) == 3 for one in asked)
    assert len({tuple(one) for one in asked}) > 1


def closing(spoiled):
    def change(site, instructions, answer):
        return answer if instructions.train else spoiled(site, instructions, answer)

    return change


def test_the_closing_evaluation_survives_every_kind_of_failing_site(tmp_path):
    def spoiled(site, instructions, answer):
        if site == "A":
            return SiteFailure(site, instructions.server_round, "failed", "ValueError")
        if site == "B":
            return replace(answer, sums={"dice/liver/sum": math.nan, "dice/liver/count": 1.0})
        return answer

    experiment = toy_experiment()
    final = run_toy(experiment, tmp_path / "broken", changed_fleet(closing(spoiled)))
    assert same(final.weights, run_toy(experiment, tmp_path / "plain").weights)
    kept = rows(tmp_path / "broken", "SELECT DISTINCT site FROM metrics WHERE server_round = 3")
    assert kept == [{"site": "C"}]
    events = rows(tmp_path / "broken", "SELECT kind, site, detail FROM events ORDER BY site")
    assert [tuple(event.values()) for event in events] == [
        ("failed", "A", "ValueError"),
        ("refused", "B", "non-finite"),
    ]
    assert rows(tmp_path / "broken", "SELECT finished IS NOT NULL AS done FROM runs") == [{"done": 1}]


def test_a_run_finishes_though_nobody_can_score_the_final_weights(tmp_path):
    nobody = changed_fleet(closing(failing(*SITES)))
    run_toy(toy_experiment(), tmp_path, nobody)
    assert rows(tmp_path, "SELECT finished IS NOT NULL AS done FROM runs") == [{"done": 1}]
    assert rows(tmp_path, "SELECT 1 FROM metrics WHERE server_round = 3") == []


def test_sites_without_validation_cases_have_no_scores(tmp_path):
    run_toy(toy_experiment(), tmp_path, changed_fleet(lambda site, _, answer: replace(answer, sums={})))
    assert rows(tmp_path, "SELECT * FROM metrics") == []


def test_observers_are_told_in_order(tmp_path):
    seen = []
    run_toy(toy_experiment(rounds=1), tmp_path, changed_fleet(failing("C")), observe=seen.append)
    assert [event.kind for event in seen] == ["round", "answer", "answer", "answer", "finished-round", "finished"]
    assert isinstance(seen[3].answer, SiteFailure)
    assert [update.site for update in seen[4].report.accepted] == ["A", "B"]
    assert seen[5].scores.keys() == {"A", "B"}


def test_instructions_hold_no_name_of_any_site(tmp_path):
    seen = []
    sites = ("Marienhospital", "Charité")
    run_toy(
        toy_experiment(), tmp_path, changed_fleet(lambda _, one, answer: seen.append(one.encode()) or answer, sites)
    )
    assert not any(site.encode() in message for site in sites for message in seen)
