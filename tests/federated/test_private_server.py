"""The server's side of private tensors: no update changes or carries them. Without torch."""

from dataclasses import replace

import numpy as np
import pytest

from fedseg.errors import UpdateRefused
from fedseg.federated.checkpoint import load_state, save_state
from fedseg.federated.document import pack, unpack
from fedseg.federated.driver import run_federation
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.rounds import apply_round, initial_state
from fedseg.federated.screening import screen
from fedseg.federated.store import RunStore
from fedseg.federated.weights import digest, num_bytes
from tests.federated.toys import SITES, history, rows, run_toy, same, toy_experiment, toy_update, toy_weights

PRIVATE = frozenset({"bias", "norm.running_var"})

BEFORE = {
    "average": "fd4c450309cf746fc7a0b5c357d218b1ccc3c899ffe874af55ff8d8c498ec17d",
    "momentum": "f5ab5e31d6f02bec5b0af3f608bf52350e55880242686ea5543d6feb2e171abe",
}
"""Digests of the final weights of `run_toy`, from before there were private tensors."""


def state_of(experiment, private=PRIVATE):
    return initial_state(experiment, toy_weights(), {"norm.running_var"}, private)


def without(update, names=PRIVATE):
    return replace(update, delta={name: array for name, array in update.delta.items() if name not in names})


def run(experiment, output, ask=lambda site, one: without(toy_update(site, one)), private=PRIVATE, **options):
    store = RunStore(output)
    try:
        fleet = InProcessFleet(SITES, ask)
        return run_federation(experiment, fleet, store, lambda: state_of(experiment, private), **options)
    finally:
        store.close()


@pytest.mark.parametrize("optimizer", list(BEFORE))
def test_exchanging_everything_gives_the_very_same_weights_as_before_there_was_a_choice(tmp_path, optimizer):
    assert digest(run_toy(toy_experiment(server_optimizer=optimizer), tmp_path).weights) == BEFORE[optimizer]


@pytest.mark.parametrize("aggregate", ["mean", "median", "trimmed-mean"])
@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam"])
def test_private_tensors_keep_their_initial_values_on_the_server(tmp_path, aggregate, optimizer):
    final = run(toy_experiment(aggregate=aggregate, server_optimizer=optimizer), tmp_path)
    start = toy_weights()
    for name, array in final.weights.items():
        assert np.array_equal(array, start[name]) == (name in PRIVATE or array.size == 0), name
    assert all(PRIVATE.isdisjoint(moment) for moment in final.moments.values())


def test_the_exchanged_tensors_of_one_round_move_as_if_there_were_no_others(tmp_path):
    experiment = toy_experiment(rounds=1, server_optimizer="momentum")
    some = run(experiment, tmp_path / "some")
    every = run(experiment, tmp_path / "all", toy_update, private=())
    assert same(some.exchanged, {name: array for name, array in every.weights.items() if name not in PRIVATE})
    sent = rows(tmp_path / "some", "SELECT SUM(bytes) AS n FROM updates")[0]["n"]
    assert sent == len(SITES) * num_bytes(some.exchanged)
    assert sent < rows(tmp_path / "all", "SELECT SUM(bytes) AS n FROM updates")[0]["n"]


GOOD = without(toy_update("A", RoundInstructions(1, toy_weights(), "{}")))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (replace(GOOD, delta=GOOD.delta | {"bias": np.zeros(5, np.float32)}), r"missing \[\], unknown \['bias'\]"),
        (without(GOOD, {"conv"}), r"missing \['conv'\], unknown \[\]"),
        (replace(GOOD, delta={}), "missing"),
    ],
)
def test_an_update_with_a_private_tensor_or_without_an_exchanged_one_is_refused(update, message):
    state = state_of(toy_experiment())
    assert screen(GOOD, 1, state.exchanged, (), toy_experiment().federation.screening) > 0
    with pytest.raises(UpdateRefused, match=message) as refused:
        screen(update, 1, state.exchanged, (), toy_experiment().federation.screening)
    assert refused.value.reason == "wrong-names"


def test_an_update_with_a_private_tensor_is_never_folded_in(tmp_path):
    def leaky(site, one):
        update = toy_update(site, one)
        return update if site == "A" else without(update)

    def absent(site, one):
        return without(toy_update(site, one)) if site != "A" else replace(toy_update(site, one), delta={})

    experiment = toy_experiment(min_sites=2)
    final = run(experiment, tmp_path / "leaky", leaky)
    assert same(final.weights, run(experiment, tmp_path / "absent", absent).weights)
    refused = rows(tmp_path / "leaky", "SELECT site, status, reason FROM updates WHERE status != 'accepted'")
    assert refused == [{"site": "A", "status": "refused", "reason": "wrong-names"}] * 3


@pytest.mark.parametrize("optimizer", ["average", "adam"])
def test_a_checkpoint_knows_which_tensors_are_private(tmp_path, optimizer):
    experiment = toy_experiment(server_optimizer=optimizer)
    joined = {name: array for name, array in toy_weights(1).items() if name not in PRIVATE}
    state = apply_round(state_of(experiment), joined, (1.0,), experiment.federation)
    sha256 = save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state", sha256)
    assert loaded.private == PRIVATE
    after = [apply_round(one, joined, (1.0,), experiment.federation) for one in (state, loaded)]
    assert same(after[0].weights, after[1].weights)


def test_a_checkpoint_from_before_there_were_private_tensors_has_none(tmp_path):
    save_state(tmp_path / "state", state_of(toy_experiment()))
    header, tensors = unpack((tmp_path / "state").read_bytes())
    del header["private"]
    (tmp_path / "old").write_bytes(b"".join(pack(tensors, header)))
    assert load_state(tmp_path / "old").private == frozenset()


def test_a_run_that_goes_on_after_every_round_ends_like_one_that_never_stopped(tmp_path):
    def until(stop):
        def ask(site, one):
            if one.server_round > stop:
                raise KeyboardInterrupt
            return without(toy_update(site, one))

        return ask

    experiment = toy_experiment(server_optimizer="momentum")
    for stop in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "stopped", until(stop), resume=True)
    run(experiment, tmp_path / "stopped", resume=True)
    run(experiment, tmp_path / "plain")
    assert history(tmp_path / "stopped") == history(tmp_path / "plain")
