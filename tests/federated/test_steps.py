"""FedNova and SCAFFOLD against numbers worked out by hand, and in a federation that is killed and spread over workers."""

import itertools
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from fedseg.config import TrainingConfig, parse_experiment
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.errors import ConfigError, UpdateRefused
from fedseg.federated.aggregation import LARGEST, StreamingMean
from fedseg.federated.driver import run_federation
from fedseg.federated.exchange import put_weights, take_weights
from fedseg.federated.local import InProcessFleet, WorkerFleet
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.networks import new_model, start_state
from fedseg.federated.site import Site
from fedseg.federated.sites import OpenSites
from fedseg.federated.steps import Controls, NormalisedMean, amount, mean_gradient, reported_steps
from fedseg.federated.store import RunStore
from fedseg.federated.weights import subtract
from fedseg.site.config import SiteConfig
from fedseg.training import train_locally
from tests.federated.toys import history, same

PLAIN = TrainingConfig(patch_size=(8, 8, 8), optimizer="sgd", momentum=0.0, learning_rate=0.5, schedule="constant")


def one(*values):
    return {"w": np.array(values, np.float32)}


# ---------------------------------------------------------------------------------------------------------------- steps
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_steps_with_momentum_amount_to_what_they_move_under_a_constant_gradient(rho):
    config = PLAIN.model_copy(update={"momentum": rho})
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=rho, nesterov=True)
    for steps in range(1, 8):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert amount(steps, config) == pytest.approx(-float(weight.detach()) / 0.5)


def test_steps_without_momentum_and_those_of_adamw_are_counted():
    assert amount(7, PLAIN) == 7
    assert amount(7, PLAIN.model_copy(update={"optimizer": "adamw"})) == 7


@pytest.mark.parametrize("steps", [None, 0, -1, 1.5, np.nan, np.inf, 1e9])
def test_a_site_must_say_how_many_steps_it_took(steps):
    with pytest.raises(UpdateRefused, match="no number of local steps"):
        reported_steps("A", {} if steps is None else {"steps": steps})


# -------------------------------------------------------------------------------------------------------------- FedNova
def test_fednova_divides_by_the_steps_and_multiplies_by_their_mean():
    mean = NormalisedMean(PLAIN, ())
    mean.fold("A", one(8.0, 4.0), 3, 4)  # direction (2, 1) with share 3/4
    mean.fold("B", one(2.0, -6.0), 1, 2)  # direction (1, -3) with share 1/4
    # mean direction (1.75, 0), mean steps 3/4 * 4 + 1/4 * 2 = 3.5
    assert mean.result()["w"] == pytest.approx([6.125, 0.0])


def test_fednova_is_fedavg_where_all_take_the_same_steps():
    generator = np.random.default_rng(0)
    deltas = [one(*generator.standard_normal(5)) for _ in range(4)]
    nova, plain = NormalisedMean(PLAIN, ()), StreamingMean()
    for weight, delta in enumerate(deltas, start=1):
        nova.fold("A", delta, weight, 4)
        plain.fold("A", delta, weight)
    assert nova.result()["w"] == pytest.approx(plain.result()["w"], rel=1e-6)


def test_batch_statistics_take_the_plain_mean():
    mean = NormalisedMean(PLAIN, {"var"})
    mean.fold("A", one(8.0) | {"var": np.float32([1.0])}, 1, 8)
    mean.fold("B", one(1.0) | {"var": np.float32([3.0])}, 1, 1)
    assert mean.result()["var"] == pytest.approx([2.0])
    assert mean.result()["w"] == pytest.approx([4.5])


def test_the_order_of_sites_changes_no_bit():
    generator = np.random.default_rng(1)
    answers = [(f"S{n}", one(*generator.standard_normal(50)), n + 1, 3 * n + 1) for n in range(4)]
    results = []
    for order in itertools.permutations(answers):
        mean = NormalisedMean(PLAIN, ())
        for answer in order:
            mean.fold(*answer)
        results.append(mean.result())
    assert all(same(results[0], other) for other in results)


def test_an_update_that_cannot_be_added_exactly_leaves_no_trace():
    mean = NormalisedMean(PLAIN, {"var"})
    mean.fold("A", one(1.0) | {"var": np.float32([1.0])}, 1, 1)
    with pytest.raises(UpdateRefused, match="cannot be added exactly"):
        mean.fold("B", one(1.0) | {"var": np.float32([2 * LARGEST])}, 1, 1)
    assert mean.result()["w"] == pytest.approx([1.0])


# ------------------------------------------------------------------------------------------------------------- SCAFFOLD
def test_the_server_works_out_the_controls_of_option_two():
    controls = Controls(PLAIN, 0.0, {"var"})
    for site, delta, steps in (("A", one(-4.0), 4), ("B", one(3.0), 2)):
        controls.fold(site, controls.gradient(site, delta | {"var": np.float32([9.0])}, steps))
    # gradients: 4 / (0.5 * 4) = 2 and -3 / (0.5 * 2) = -3; their mean is -0.5
    assert controls.after(None, 2) == {"w": pytest.approx([-0.5])}
    # two of four sites answered: c + 1/2 (-0.5 - c) with c = 1.5
    assert controls.after(one(1.5), 4) == {"w": pytest.approx([0.5])}


def test_a_correction_is_added_to_every_gradient():
    model = torch.nn.Conv3d(1, 2, 1, bias=False)
    before = model.weight.detach().clone()
    batch = type("Batch", (), {"image": torch.zeros(1, 1, 4, 4, 4), "label": torch.zeros(1, 1, 4, 4, 4)})()
    config = PLAIN.model_copy(update={"weight_decay": 0.0, "deep_supervision": False})
    control = {"weight": torch.full_like(before, 0.25)}
    train_locally(model, [batch, batch], config, correction=control)  # an empty image has no gradient of its own
    assert torch.allclose(model.weight, before - 2 * 0.5 * 0.25)


NAMES = ("Aare", "Elbe", "Loire")
ROUNDS = 3


def tiny(**federation):
    document = {
        "name": "tiny",
        "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "data": {"validation_fraction": 0.34},
        "model": {"name": "unet", "options": {"widths": [4, 8], "norm": "batch"}},
        "training": {
            "patch_size": [8, 8, 8], "learning_rate": 0.05, "optimizer": "sgd", "momentum": 0.5, "steps_per_epoch": 2,
        },
        "federation": {"rounds": ROUNDS} | federation,
    }  # fmt: skip
    return parse_experiment(json.dumps(document))


SCAFFOLD = {"control_variates": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospitals")
    for number, name in enumerate(NAMES):
        config = PhantomConfig(cases=4, shape=(16, 16, 16), first=10 * number, structures=("liver",))
        write_phantoms(folder / name, config)
    return folder


def hospitals(folder, state):
    common = {"cache": str(folder / "cache"), "state": str(state), "device": "cpu"}
    return tuple(SiteConfig(name=name, data=str(folder / name), **common) for name in NAMES)


def run(experiment, configs, output, fleet=None):
    store = RunStore(output)
    try:
        fleet = fleet or InProcessFleet(NAMES, OpenSites(configs)())
        return run_federation(experiment, fleet, store, lambda: start_state(experiment), resume=True)
    finally:
        store.close()


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    state = run(tiny(**SCAFFOLD), hospitals(folder, output / "state"), output)
    return state, history(output)


def test_sites_train_with_what_the_others_gradients_differ_from_their_own(folder, tmp_path, undisturbed):
    """Rounds 1 and 2 by hand: the control that each site keeps and the one that the server sends."""
    experiment, configs = tiny(**SCAFFOLD), hospitals(folder, tmp_path / "state")
    state = start_state(experiment)
    sites = [Site(config, seeded_noise=True) for config in configs]
    first = [site(RoundInstructions(1, state.weights, experiment.to_json(), evaluate=False)) for site in sites]
    training, rate = experiment.training, 0.05
    own = [mean_gradient(update.delta, 2, training, rate, state.buffers) for update in first]
    server = {name: np.mean([control[name] for control in own], axis=0, dtype=np.float32) for name in own[0]}
    second = sites[0](RoundInstructions(2, state.weights, experiment.to_json(), evaluate=False, control=server))
    plain = Site(configs[0].model_copy(update={"state": str(tmp_path / "other")}), seeded_noise=True)
    bare = plain(RoundInstructions(2, state.weights, experiment.to_json(), evaluate=False))
    assert not same(second.delta, bare.delta)
    model = new_model(experiment)
    put_weights(model, state.weights)
    correction = {name: torch.from_numpy(array - own[0][name]) for name, array in server.items()}
    train_by_hand(model, sites[0], experiment, 2, correction)
    assert same(second.delta, subtract(take_weights(model), state.weights))


def train_by_hand(model, site, experiment, server_round, correction):
    from fedseg.data.patches import PatchSampler
    from fedseg.device import seed_everything
    from fedseg.federated.rounds import derive_seed

    name, training = site.config.name, experiment.training
    cases = site.prepare(experiment).training.cases
    sampler = PatchSampler(cases, training, derive_seed(experiment.seed, "patches", name), (), experiment.slicing)
    seed_everything(derive_seed(experiment.seed, "training", server_round, name))
    progress = (server_round - 1) / experiment.federation.rounds
    train_locally(model, sampler.epoch(server_round - 1), training, correction=correction, progress=progress)


def test_the_control_travels_and_is_kept_with_the_checkpoint(undisturbed):
    state, _ = undisturbed
    control = state.moments["control"]
    assert control.keys() == state.weights.keys() - state.buffers
    assert any(array.any() for array in control.values())
    message = RoundInstructions(4, state.weights, "{}", control=control)
    again = RoundInstructions.decode(message.encode())
    assert same(again.control, control)
    assert same(again.weights, state.weights)


def test_workers_change_no_bit(folder, tmp_path, undisturbed):
    configs = hospitals(folder, tmp_path / "state")
    with WorkerFleet(NAMES, OpenSites(configs), 2) as fleet:
        state = run(tiny(**SCAFFOLD), configs, tmp_path, fleet)
    assert same(state.weights, undisturbed[0].weights)
    assert history(tmp_path)["rounds"] == undisturbed[1]["rounds"]


def run_until_killed(configs, output, fault):
    os.environ["FEDSEG_FAULT"] = fault
    run(tiny(**SCAFFOLD), configs, output)


@pytest.mark.parametrize("fault", ["update-folded:5"])  # every moment is tried in test_private and test_kill
def test_a_killed_run_goes_on_to_the_same_weights(folder, tmp_path, undisturbed, fault):
    configs = hospitals(folder, tmp_path / "state")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_until_killed, args=(configs, tmp_path / "run", fault))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = run(tiny(**SCAFFOLD), configs, tmp_path / "run")
    assert same(state.weights, undisturbed[0].weights)
    assert same(state.moments["control"], undisturbed[0].moments["control"])


def test_fednova_trains_a_federation(folder, tmp_path):
    state = run(tiny(normalise_steps=True), hospitals(folder, tmp_path / "state"), tmp_path)
    plain = run(tiny(), hospitals(folder, tmp_path / "state"), tmp_path / "plain")
    assert all(state.weights[name] == pytest.approx(plain.weights[name], abs=1e-5) for name in plain.weights)


@pytest.mark.parametrize("setting", ["control_variates", "normalise_steps"])
def test_combinations_that_make_no_sense_are_refused(setting):
    with pytest.raises(ConfigError, match=f"federation.{setting}: is about a mean of updates"):
        tiny(**{setting: True, "aggregate": "median"})


def test_scaffold_wants_plain_gradient_steps():
    document = json.loads(tiny(**SCAFFOLD).to_json())
    document["training"]["optimizer"] = "adamw"
    with pytest.raises(ConfigError, match=r"corrects gradient steps; use training.optimizer = .sgd."):
        parse_experiment(json.dumps(document))
