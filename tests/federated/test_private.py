"""The site's side of private tensors: files that outlive rounds, workers and restarts. Phantoms, a tiny U-Net."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from fedseg import flower
from fedseg.config import TrainingConfig, parse_experiment
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.errors import ModelError, StoreError, TrainingDiverged
from fedseg.evaluation import evaluate
from fedseg.federated import site as site_module
from fedseg.federated.driver import run_federation
from fedseg.federated.exchange import anchor_of, put_weights, take_weights
from fedseg.federated.local import InProcessFleet, WorkerFleet
from fedseg.federated.messages import RoundInstructions, SiteFailure
from fedseg.federated.networks import new_model, start_state
from fedseg.federated.private import FILES_KEPT, PrivateTensors
from fedseg.federated.site import Site
from fedseg.federated.sites import OpenSites
from fedseg.federated.store import RunStore
from fedseg.federated.weights import digest, subtract
from fedseg.model_file import load_model_file, read_model_file, save_model_file, save_site_model
from fedseg.site.config import SiteConfig, load_site
from fedseg.training import train_locally
from tests.apps.grid import LoopGrid
from tests.apps.hospitals import gates
from tests.federated.test_site import train_by_hand, without_clock
from tests.federated.toys import history, rows, same

NAMES = ("Aare", "Elbe", "Loire")
ROUNDS = 3


def tiny(**federation):
    return parse_experiment(
        json.dumps(
            {
                "name": "tiny",
                "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
                "data": {"validation_fraction": 0.34},
                "model": {"name": "unet", "options": {"widths": [4, 8], "norm": "batch"}},
                "training": {"patch_size": [8, 8, 8], "learning_rate": 0.01, "steps_per_epoch": 2},
                "federation": {"rounds": ROUNDS, "exchange": "all-but-norms"} | federation,
            }
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospitals")
    for number, name in enumerate(NAMES):
        write_phantoms(
            folder / name, PhantomConfig(cases=4, shape=(16, 16, 16), first=10 * number, structures=("liver",))
        )
    return folder


def hospitals(folder, state):
    """Sites whose private tensors lie in a folder of the test's own."""
    common = {"cache": str(folder / "cache"), "state": str(state), "device": "cpu"}
    return tuple(SiteConfig(name=name, data=str(folder / name), **common) for name in NAMES)


def run(experiment, configs, output, fleet=None):
    store = RunStore(output)
    try:
        fleet = fleet or InProcessFleet(NAMES, OpenSites(configs)())
        return run_federation(experiment, fleet, store, lambda: start_state(experiment), resume=True)
    finally:
        store.close()


def kept_by(config, experiment):
    return PrivateTensors(config.state_folder, experiment.to_json(), config.name, start_state(experiment).private)


def private_of_all(configs, experiment):
    return {config.name: kept_by(config, experiment).latest() for config in configs}


def digests(configs, experiment):
    return {name: digest(tensors) for name, tensors in private_of_all(configs, experiment).items()}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """A whole run: its history and what its sites kept."""
    output = tmp_path_factory.mktemp("undisturbed")
    configs = hospitals(folder, output / "state")
    final = run(tiny(), configs, output)
    return final, without_clock(history(output)), digests(configs, tiny())


def check(output, configs, undisturbed):
    _, expected, private = undisturbed
    assert without_clock(history(output)) == expected
    assert digests(configs, tiny()) == private


# ------------------------------------------------------------------------------------------------ a federation
@pytest.mark.parametrize("exchange", ["all-but-norms", "all-but-statistics", "decoder"])
def test_private_tensors_differ_from_site_to_site_and_the_others_are_the_servers(folder, tmp_path, exchange):
    experiment = tiny(exchange=exchange, rounds=2)
    configs = hospitals(folder, tmp_path / "state")
    final = run(experiment, configs, tmp_path)
    save_model_file(tmp_path / "server", experiment, final.weights, "tiny")
    models = []
    for config in configs:
        save_site_model(tmp_path / config.name, read_model_file(tmp_path / "server"), config.state_folder, config.name)
        models.append(take_weights(load_model_file(tmp_path / config.name)[1]))
    assert final.private
    for name, array in final.weights.items():
        values = [model[name] for model in models]
        assert all(np.array_equal(value, array) for value in values) == (name not in final.private), name
        if name in final.private:
            assert len({value.tobytes() for value in values}) == len(NAMES), name
            assert np.array_equal(array, start_state(experiment).weights[name])


@pytest.mark.parametrize("exchange", ["all", "all-but-norms", "decoder"])
def test_an_update_carries_the_exchanged_tensors_only(folder, tmp_path, exchange):
    experiment = tiny(exchange=exchange)
    state = start_state(experiment)
    site = Site(hospitals(folder, tmp_path / "state")[0])
    update = site(RoundInstructions(1, state.weights, experiment.to_json()))
    assert update.delta.keys() == state.exchanged.keys()
    assert (tmp_path / "state").exists() == (exchange != "all")


def test_two_rounds_are_what_training_by_hand_gives_with_the_sites_own_norms(folder, tmp_path):
    experiment = tiny()
    config = hospitals(folder, tmp_path)[0]
    state, site = start_state(experiment), Site(config)
    model = new_model(experiment)
    received, own = state.weights, {}
    for server_round in (1, 2):
        put_weights(model, received | own)
        by_hand = train_by_hand(model, site, experiment, server_round)
        update = site(RoundInstructions(server_round, received, experiment.to_json()))
        own = {name: array for name, array in take_weights(model).items() if name in state.private}
        assert same(update.delta, subtract(take_weights(model), {name: received[name] for name in state.exchanged}))
        assert same(kept_by(config, experiment).latest(), own)
        assert any(by_hand[name].any() for name in state.private)
        received = {
            name: array + update.delta[name] if name in update.delta else array for name, array in received.items()
        }


def test_one_worker_and_two_give_the_same_run_and_leave_the_same_at_each_site(folder, tmp_path, undisturbed):
    configs = hospitals(folder, tmp_path / "state")
    with WorkerFleet(NAMES, OpenSites(configs), 2) as fleet:
        run(tiny(), configs, tmp_path, fleet)
    check(tmp_path, configs, undisturbed)


def test_flower_gives_the_same_run_as_a_loop(folder, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(flower, "POLL", (0.001, 0.01))
    configs = hospitals(folder, tmp_path / "state")
    services = [config.model_copy(update={"state": str(tmp_path / "state" / config.name)}) for config in configs]
    with gates(services) as nodes:
        run(tiny(), configs, tmp_path, flower.FlowerFleet(LoopGrid(nodes), min_sites=3))
    check(tmp_path, services, undisturbed)


def run_until_killed(configs, output, fault):
    os.environ["FEDSEG_FAULT"] = fault
    run(tiny(), configs, output)


MOMENTS = [f"store-committed:{count}" for count in range(1, ROUNDS + 2)]
MOMENTS += ["update-folded:2", "update-folded:5", "checkpoint-written:3", "checkpoint-written:8", "store-written:3"]
"""After every round, and within rounds: between two sites, and while a site's or the server's file is being written."""


@pytest.mark.parametrize("fault", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_weights_and_private_tensors(folder, tmp_path, undisturbed, fault):
    configs = hospitals(folder, tmp_path / "state")
    process = multiprocessing.get_context("forkserver").Process(
        target=run_until_killed, args=(configs, tmp_path / "run", fault)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run(tiny(), configs, tmp_path / "run")
    check(tmp_path / "run", configs, undisturbed)
    assert not list(tmp_path.rglob("*.part"))


def test_a_repeated_round_ends_as_if_it_had_worked_at_once(folder, tmp_path, undisturbed):
    """Everybody trains; the answers of two sites get lost, and the round is repeated."""
    configs = hospitals(folder, tmp_path / "state")
    ask, asked = OpenSites(configs)(), []

    def losing(name, instructions):
        answer = ask(name, instructions)
        asked.append((instructions.server_round, name))
        lost = name != "Elbe" and asked.count((2, name)) == 1 and instructions.server_round == 2
        return SiteFailure(name, 2, "late", "deadline") if lost else answer

    experiment = tiny()
    run(experiment, configs, tmp_path, InProcessFleet(NAMES, losing))
    assert asked.count((2, "Aare")) == 2
    attempts = [row["attempts"] for row in rows(tmp_path, "SELECT attempts FROM rounds ORDER BY server_round")]
    assert attempts == [0, 1, 2, 1]
    assert digests(configs, experiment) == undisturbed[2]
    assert history(tmp_path)["rounds"][-1]["weights_sha256"] == undisturbed[1]["rounds"][-1]["weights_sha256"]


def test_a_run_that_goes_back_to_the_checkpoint_before_the_last_ends_like_any_other(folder, tmp_path, undisturbed):
    """The sites are a round further than the newest checkpoint when it turns out to be damaged."""
    configs = hospitals(folder, tmp_path / "state")
    ask = OpenSites(configs)()

    def stopping(name, instructions):
        answer = ask(name, instructions)
        if (instructions.server_round, name) == (ROUNDS, NAMES[-1]):
            raise KeyboardInterrupt
        return answer

    with pytest.raises(KeyboardInterrupt):
        run(tiny(), configs, tmp_path, InProcessFleet(NAMES, stopping))
    (tmp_path / "checkpoints" / f"federated-round-{ROUNDS - 1:04d}.safetensors").write_bytes(b"damaged")
    run(tiny(), configs, tmp_path)
    check(tmp_path, configs, undisturbed)


def test_files_of_an_earlier_run_of_the_same_experiment_do_not_leak_into_a_later_one(folder, tmp_path):
    """The second time, one site is away in round 1, so that nothing tells it that a new run has begun."""

    def away(configs):
        ask = OpenSites(configs)()

        def absent(name, one):
            away = (name, one.server_round) == ("Elbe", 1)
            return SiteFailure(name, 1, "failed", "NotReached") if away else ask(name, one)

        return InProcessFleet(NAMES, absent)

    used, fresh = hospitals(folder, tmp_path / "used"), hospitals(folder, tmp_path / "fresh")
    run(tiny(), used, tmp_path / "first")
    run(tiny(), used, tmp_path / "second", away(used))
    run(tiny(), fresh, tmp_path / "alone", away(fresh))
    assert without_clock(history(tmp_path / "second")) == without_clock(history(tmp_path / "alone"))
    assert digests(used, tiny()) == digests(fresh, tiny())


def test_a_site_that_skips_rounds_goes_on_with_what_it_had(folder, tmp_path):
    experiment = tiny(rounds=9)
    config = hospitals(folder, tmp_path)[0]
    state, site = start_state(experiment), Site(config)
    site(RoundInstructions(2, state.weights, experiment.to_json()))
    own = kept_by(config, experiment).latest()
    model = new_model(experiment)
    put_weights(model, state.weights | own)
    train_by_hand(model, site, experiment, 7)
    site(RoundInstructions(7, state.weights, experiment.to_json()))
    after = kept_by(config, experiment).latest()
    assert same(after, {name: array for name, array in take_weights(model).items() if name in state.private})
    assert not same(after, own)


def test_scores_are_those_of_the_network_that_the_site_has(folder, tmp_path, monkeypatch):
    experiment = tiny(rounds=1)
    config = hospitals(folder, tmp_path)[0]
    weights, site, seen = start_state(experiment).weights, Site(config), []
    site(RoundInstructions(1, weights, experiment.to_json(), evaluate=False))
    own = kept_by(config, experiment).latest()

    def watching(model, *arguments, **options):
        seen.append(take_weights(model))
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(site_module, "evaluate", watching)
    site(RoundInstructions(2, weights, experiment.to_json(), train=False))
    assert same(seen[0], weights | own)
    assert not same(seen[0], weights)
    assert same(kept_by(config, experiment).latest(), own)


# ------------------------------------------------------------------------------------------------ FedProx
def test_fedprox_pulls_exchanged_tensors_and_leaves_private_ones_alone(folder, tmp_path):
    experiment = tiny(proximal_mu=10.0, exchange="decoder")
    config = hospitals(folder, tmp_path)[0]
    state, site = start_state(experiment), Site(config)
    update = site(RoundInstructions(1, state.weights, experiment.to_json()))
    trained = state.weights | kept_by(config, experiment).latest()
    moved = {}
    for unanchored in (state.private, ()):
        model = new_model(experiment)
        put_weights(model, state.weights)
        anchor = {name: tensor for name, tensor in anchor_of(model).items() if name not in unanchored}
        by_hand = train_by_hand(model, site, experiment, 1, anchor=anchor, proximal_mu=10.0, unanchored=unanchored)
        moved[bool(unanchored)] = take_weights(model)
        if unanchored:
            assert same(update.delta, {name: by_hand[name] for name in state.exchanged})
            assert same(trained | update.delta, moved[True] | update.delta)
    assert not same(moved[True], moved[False])
    unpulled = new_model(experiment)
    put_weights(unpulled, state.weights)
    free = train_by_hand(unpulled, site, experiment, 1)
    assert not same(update.delta, {name: free[name] for name in state.exchanged})


class Two(nn.Module):
    """A head that learns and an offset to which no gradient comes but FedProx's."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv3d(1, 2, 1)
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return self.head(image) + 0 * self.offset


class Patch:
    image = torch.ones(1, 1, 4, 4, 4)
    label = torch.ones(1, 1, 4, 4, 4)


def test_a_private_parameter_is_not_pulled_and_needs_no_anchor():
    config = TrainingConfig(patch_size=(4, 4, 4), optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.0)
    anchor = {"head.weight": torch.zeros(2, 1, 1, 1, 1), "head.bias": torch.zeros(2)}
    moved = []
    for extra, unanchored in (({"offset": torch.ones(1)}, ()), ({}, {"offset"})):
        torch.manual_seed(0)
        model = Two()
        train_locally(model, [Patch(), Patch()], config, anchor=anchor | extra, proximal_mu=1.0, unanchored=unanchored)
        moved.append(model.offset.item())
        assert model.head.weight.abs().sum() > 0
    assert moved == [pytest.approx(0.1 + 0.9 * 0.1), 0.0]
    with pytest.raises(ModelError, match="lacks the parameter 'offset'"):
        train_locally(Two(), [Patch()], config, anchor=anchor, proximal_mu=1.0)


def test_private_tensors_that_are_not_finite_are_not_kept(folder, tmp_path, monkeypatch):
    experiment = tiny()
    config = hospitals(folder, tmp_path)[0]
    take = site_module.take_weights
    spoil = {name: np.full(1, np.nan, np.float32) for name in start_state(experiment).private}
    monkeypatch.setattr(site_module, "take_weights", lambda model: take(model) | spoil)
    with pytest.raises(TrainingDiverged, match="private tensors are NaN"):
        Site(config)(RoundInstructions(1, take(new_model(experiment)), experiment.to_json()))
    assert kept_by(config, experiment).latest() is None


# ------------------------------------------------------------------------------------------------ files
RECEIVED = {"w": np.zeros(3, np.float32)}


def tensors(value):
    return {"scale": np.full(3, value, np.float32), "shift": np.array(value, np.float32)}


@pytest.fixture
def kept(tmp_path):
    return PrivateTensors(tmp_path / "state", '{"an": "experiment"}', "A", ("scale", "shift"))


def fill(kept, *rounds):
    for number in rounds:
        kept.save(number, RECEIVED, tensors(number))


def numbers(kept):
    return sorted(int(path.stem.partition("-")[2]) for path in kept.folder.iterdir())


def test_nothing_is_made_on_disk_before_something_is_saved(kept, tmp_path):
    assert kept.before(1, RECEIVED) is None
    assert kept.latest() is None
    kept.begin(1, RECEIVED)
    assert list(tmp_path.iterdir()) == []


def test_what_was_saved_comes_back_to_the_last_bit_and_the_latest_round_before_counts(kept):
    fill(kept, 1, 4)
    assert same(kept.latest(), tensors(4))
    assert same(kept.before(5, RECEIVED), tensors(4))
    assert same(kept.before(4, RECEIVED), tensors(1))
    assert kept.before(1, {"w": np.ones(3, np.float32)}) is None


def test_only_the_last_files_are_kept(kept):
    fill(kept, 1, 2, 5, 6, 9)
    assert numbers(kept) == [5, 6, 9]
    assert len(numbers(kept)) == FILES_KEPT


def test_a_round_that_begins_again_forgets_itself_and_what_came_after(kept):
    fill(kept, 1, 2, 3)
    (kept.folder / ".round-2.safetensors.99.part").write_bytes(b"killed while writing")
    kept.begin(2, RECEIVED)
    assert [path.name for path in kept.folder.iterdir()] == ["round-1.safetensors"]


@pytest.mark.parametrize(
    ("server_round", "received"),
    [(2, {"w": np.ones(3, np.float32)}), (1, RECEIVED)],
    ids=["other weights", "too far back"],
)
def test_files_of_another_run_are_ignored_and_removed(kept, server_round, received):
    fill(kept, *((1, 2, 3) if server_round == 2 else (3, 4, 5)))
    assert kept.before(server_round, received) is None
    kept.begin(server_round, received)
    assert numbers(kept) == []


def test_experiments_and_sites_do_not_see_each_others_files(kept, tmp_path):
    fill(kept, 1)
    for document, site in (('{"another": "one"}', "A"), ('{"an": "experiment"}', "B")):
        assert PrivateTensors(tmp_path / "state", document, site, ("scale", "shift")).latest() is None
    assert same(
        PrivateTensors(tmp_path / "state", '{"an": "experiment"}', "A", ("shift", "scale")).latest(), tensors(1)
    )


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_file_is_named_and_not_used(kept, keep):
    fill(kept, 1)
    path = kept.folder / "round-1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"round-1\.safetensors: not readable: .*; remove it"):
        kept.before(2, RECEIVED)


def test_a_file_of_other_tensors_or_another_round_is_refused(kept, tmp_path):
    fill(kept, 1)
    other = PrivateTensors(tmp_path / "state", '{"an": "experiment"}', "A", ("scale", "more"))
    with pytest.raises(StoreError, match=r"\['more', 'shift'\] are missing or unknown"):
        other.latest()
    (kept.folder / "round-1.safetensors").rename(kept.folder / "round-2.safetensors")
    with pytest.raises(StoreError, match="is not of this experiment's round 2"):
        kept.latest()


# ------------------------------------------------------------------------------------------------ the site file
def test_private_tensors_lie_beside_the_cache_unless_the_site_says_otherwise(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('name = "A"\ndata = "data"\ncache = "here/cache"\n')
    assert load_site(path).state_folder == tmp_path / "here" / "cache-state"
    path.write_text('name = "A"\ndata = "data"\nstate = "kept"\n')
    assert load_site(path).state_folder == tmp_path / "kept"
