"""Ditto: a network of each site's own, in a federation that is killed and spread over workers."""

import itertools
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from fedseg.config import parse_experiment
from fedseg.data.patches import PatchSampler
from fedseg.device import seed_everything
from fedseg.errors import ConfigError, ModelError
from fedseg.federated.ditto import personal_tensors
from fedseg.federated.exchange import put_weights, take_weights
from fedseg.federated.local import WorkerFleet
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.networks import new_model, start_state
from fedseg.federated.rounds import derive_seed
from fedseg.federated.site import Site
from fedseg.federated.sites import OpenSites
from fedseg.model_file import read_model_file, save_model_file, save_personal_model
from fedseg.training import train_locally
from tests.federated.test_steps import NAMES, ROUNDS, folder, hospitals, run, tiny  # noqa: F401 - a fixture
from tests.federated.toys import same

DITTO = {"personal_lambda": 0.5}


def own_of(configs, experiment, weights):
    document = experiment.to_json()
    return [personal_tensors(config.state_folder, document, config.name, weights).latest() for config in configs]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("undisturbed")
    configs = hospitals(folder, output / "state")
    state = run(tiny(**DITTO), configs, output)
    return state, own_of(configs, tiny(**DITTO), state.weights)


def test_the_federation_does_not_notice(folder, tmp_path, undisturbed):  # noqa: F811
    plain = run(tiny(), hospitals(folder, tmp_path / "state"), tmp_path)
    assert same(plain.weights, undisturbed[0].weights)


def test_every_site_has_a_network_of_its_own(undisturbed):
    state, own = undisturbed
    assert not any(same(one, two) for one, two in itertools.combinations(own, 2))
    assert all(not same(weights, state.weights) for weights in own)


def test_its_steps_are_those_of_fedprox_from_where_it_was(folder, tmp_path):  # noqa: F811
    """Two rounds by hand."""
    experiment, config = tiny(**DITTO), hospitals(folder, tmp_path / "state")[0]
    state, site, model = start_state(experiment), Site(config, seeded_noise=True), new_model(experiment)
    received, own = state.weights, state.weights
    cases = site.prepare(experiment).training.cases
    for number in (1, 2):
        update = site(RoundInstructions(number, received, experiment.to_json(), evaluate=False))
        put_weights(model, own)
        sampler = PatchSampler(
            cases, experiment.training, derive_seed(0, "own patches", config.name), (), experiment.slicing
        )
        seed_everything(derive_seed(0, "own training", number, config.name))
        anchor = {name: torch.from_numpy(received[name]) for name, _ in model.named_parameters()}
        progress = (number - 1) / ROUNDS
        train_locally(
            model, sampler.epoch(number - 1), experiment.training, anchor=anchor, proximal_mu=0.5, progress=progress
        )
        own = take_weights(model)
        assert same(own_of([config], experiment, received)[0], own)
        received = {name: np.asarray(array + update.delta[name], np.float32) for name, array in received.items()}


def test_workers_change_no_bit(folder, tmp_path, undisturbed):  # noqa: F811
    configs = hospitals(folder, tmp_path / "state")
    with WorkerFleet(NAMES, OpenSites(configs), 2) as fleet:
        state = run(tiny(**DITTO), configs, tmp_path, fleet)
    assert all(
        same(one, two) for one, two in zip(own_of(configs, tiny(**DITTO), state.weights), undisturbed[1], strict=True)
    )


def run_until_killed(configs, output, fault):
    os.environ["FEDSEG_FAULT"] = fault
    run(tiny(**DITTO), configs, output)


@pytest.mark.parametrize("fault", ["update-folded:5"])  # every moment is tried in test_private and test_kill
def test_a_killed_run_goes_on_to_the_same_networks(folder, tmp_path, undisturbed, fault):  # noqa: F811
    configs = hospitals(folder, tmp_path / "state")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_until_killed, args=(configs, tmp_path / "run", fault))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = run(tiny(**DITTO), configs, tmp_path / "run")
    assert all(
        same(one, two) for one, two in zip(own_of(configs, tiny(**DITTO), state.weights), undisturbed[1], strict=True)
    )


def test_a_site_makes_a_model_file_of_its_own_network(folder, tmp_path):  # noqa: F811
    experiment, configs = tiny(**DITTO), hospitals(folder, tmp_path / "state")
    state = run(experiment, configs, tmp_path / "run")
    shared = tmp_path / "shared.safetensors"
    save_model_file(shared, experiment, state.weights, "tiny/ditto")
    save_personal_model(tmp_path / "own.safetensors", read_model_file(shared), configs[0].state_folder, "Aare")
    assert same(read_model_file(tmp_path / "own.safetensors").weights, own_of(configs, experiment, state.weights)[0])
    with pytest.raises(ModelError, match="'Rhein' has no network of its own"):
        save_personal_model(tmp_path / "no.safetensors", read_model_file(shared), configs[0].state_folder, "Rhein")


def test_a_whole_network_of_ones_own_leaves_nothing_to_exchange_in_part():
    with pytest.raises(ConfigError, match="gives each site a whole network"):
        tiny(**DITTO, exchange="all-but-norms")
    document = json.loads(tiny(**DITTO).to_json())
    document["federation"]["personal_lambda"] = 0
    with pytest.raises(ConfigError, match="greater than 0"):
        parse_experiment(json.dumps(document))
