from dataclasses import replace

import numpy as np
import pytest

from fedseg.federated.rounds import (
    NORMS_KEPT,
    ServerState,
    apply_round,
    choose_sites,
    derive_seed,
    final_instructions,
    instructions_for,
    site_weight,
)
from tests.federated.toys import same, toy_experiment, toy_state, toy_weights

SITES = tuple(f"site-{number}" for number in range(10))


def weights(w, variance):
    return {"w": np.array([w], np.float32), "var": np.array([variance], np.float32)}


def rounds(config, *joined):
    """Apply joint updates, given as (parameter, buffer), one round after the other."""
    state = ServerState("digest", 0, weights(1.0, 1.0), frozenset({"var"}))
    for w, variance in joined:
        state = apply_round(state, weights(w, variance), (1.0,), config.federation)
    return state


def test_fedavg_adds_the_mean():
    state = rounds(toy_experiment(), (0.5, 0.25), (-1.0, 0.25))
    assert (state.weights["w"][0], state.weights["var"][0]) == (0.5, 1.5)
    assert state.server_round == 2
    assert state.moments == {}


def test_a_server_learning_rate_scales_parameters_and_not_batch_statistics():
    state = rounds(toy_experiment(server_learning_rate=0.5), (0.5, 0.25))
    assert (state.weights["w"][0], state.weights["var"][0]) == (1.25, 1.25)


def test_fedavgm_accumulates_parameters_and_not_batch_statistics():
    config = toy_experiment(server_optimizer="momentum", server_momentum=0.5, server_learning_rate=2.0)
    state = rounds(config, (1.0, -0.25), (1.0, -0.25))
    assert state.moments["first"]["w"][0] == 1.5  # 0.5 * 1 + 1
    assert state.weights["w"][0] == 1 + 2 * 1 + 2 * 1.5
    assert state.weights["var"][0] == 0.5
    assert "var" not in state.moments["first"]


def test_fedadam_follows_its_paper():
    config = toy_experiment(server_optimizer="adam", server_momentum=0.5, server_learning_rate=0.1)
    state = rounds(config, (1.0, 0.25), (2.0, 0.25))
    first, second = [0.5, 0.25 + 1.0], [0.01, 0.99 * 0.01 + 0.01 * 4]
    expected = 1 + sum(0.1 * m / (v**0.5 + 1e-3) for m, v in zip(first, second, strict=True))
    assert state.moments["first"]["w"][0] == pytest.approx(1.25)
    assert state.moments["second"]["w"][0] == pytest.approx(0.0499)
    assert state.weights["w"][0] == pytest.approx(expected, rel=1e-6)
    assert state.weights["var"][0] == 1.5


@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam"])
def test_every_optimizer_keeps_names_shapes_and_types(optimizer):
    experiment = toy_experiment(server_optimizer=optimizer)
    state = toy_state(experiment)
    for seed in (1, 2):
        state = apply_round(state, toy_weights(seed), (1.0,), experiment.federation)
    for group in (state.weights, *state.moments.values()):
        for name, array in group.items():
            assert array.dtype == np.float32
            assert array.shape == toy_weights()[name].shape


def test_a_round_leaves_the_state_before_it_alone():
    experiment = toy_experiment(server_optimizer="momentum")
    before = toy_state(experiment)
    apply_round(before, toy_weights(1), (1.0,), experiment.federation)
    assert same(before.weights, toy_weights())
    assert before.server_round == 0


def test_only_the_last_norms_are_kept():
    experiment = toy_experiment()
    state = replace(toy_state(experiment), norms=tuple(map(float, range(NORMS_KEPT))))
    state = apply_round(state, toy_weights(1), (100.0, 101.0), experiment.federation)
    assert state.norms == (*map(float, range(2, NORMS_KEPT)), 100.0, 101.0)


def test_all_sites_are_asked_unless_the_experiment_says_otherwise():
    assert choose_sites(SITES[::-1], toy_experiment(), 1, 1) == SITES


def test_a_share_of_sites_is_drawn_anew_each_round_and_the_same_for_the_same_seed():
    experiment = toy_experiment(participation=0.3)
    draws = [choose_sites(SITES, experiment, number, 1) for number in range(1, 40)]
    assert all(len(draw) == 3 for draw in draws)
    assert len(set(draws)) > 20
    assert {site for draw in draws for site in draw} == set(SITES)
    assert draws == [choose_sites(SITES[::-1], experiment, number, 1) for number in range(1, 40)]
    other = experiment.model_copy(update={"seed": 1})
    assert draws != [choose_sites(SITES, other, number, 1) for number in range(1, 40)]


def test_a_repeated_round_asks_others():
    experiment = toy_experiment(participation=0.3)
    assert len({choose_sites(SITES, experiment, 1, attempt) for attempt in range(1, 6)}) > 1


def test_never_fewer_sites_than_the_quorum_are_asked():
    assert len(choose_sites(SITES, toy_experiment(participation=0.1, min_sites=4), 1, 1)) == 4
    assert len(choose_sites(SITES[:3], toy_experiment(participation=0.1, min_sites=4), 1, 1)) == 3


def test_sites_weigh_their_cases_or_the_same():
    assert site_weight(7, toy_experiment().federation) == 7
    assert site_weight(7, toy_experiment(weighting="uniform").federation) == 1


def test_sites_score_every_so_many_rounds_but_never_untrained_weights():
    experiment = toy_experiment(evaluate_every=2, rounds=6)
    state = toy_state(experiment)
    asked = [instructions_for(replace(state, server_round=done), experiment, "{}") for done in range(6)]
    assert [one.server_round for one in asked] == [1, 2, 3, 4, 5, 6]
    assert [one.evaluate for one in asked] == [False, False, True, False, True, False]
    assert all(one.train for one in asked)
    closing = final_instructions(replace(state, server_round=6), "{}")
    assert (closing.train, closing.evaluate, closing.surface) == (False, True, True)


def test_seeds_differ_by_every_part_and_stay_the_same():
    assert derive_seed(0, "patches", "A") == 1560297875
    assert len({derive_seed(seed, word, site) for seed in range(9) for word in "ab" for site in SITES}) == 180
