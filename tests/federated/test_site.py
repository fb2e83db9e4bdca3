"""The round with real networks and volumes: phantoms, a tiny U-Net, one thread."""

import json
import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import parse_experiment
from fedseg.data.patches import PatchSampler
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.device import seed_everything
from fedseg.errors import ModelError, SiteAbstained
from fedseg.federated.driver import run_federation
from fedseg.federated.exchange import anchor_of, buffer_names, put_weights, take_weights
from fedseg.federated.local import InProcessFleet, WorkerFleet
from fedseg.federated.messages import RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.networks import new_model, start_state
from fedseg.federated.rounds import derive_seed
from fedseg.federated.site import EXPERIMENTS_OPEN, Site
from fedseg.federated.sites import OpenSites, answer_safely
from fedseg.federated.store import RunStore
from fedseg.federated.weights import digest, subtract
from fedseg.site.config import SiteConfig
from fedseg.training import train_locally
from tests.federated.toys import history, same

NAMES = ("Aare", "Elbe")


def tiny(**federation):
    return parse_experiment(
        json.dumps(
            {
                "name": "tiny",
                "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
                "data": {"validation_fraction": 0.34},
                "model": {"name": "unet", "options": {"widths": [4, 8], "norm": "batch", "dropout": 0.1}},
                "training": {"patch_size": [8, 8, 8], "learning_rate": 0.01},
                "federation": {"rounds": 2} | federation,
            }
        )
    )


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospitals")
    configs = []
    for number, name in enumerate(NAMES):
        phantoms = PhantomConfig(cases=4, shape=(16, 16, 16), first=10 * number, structures=("liver",))
        write_phantoms(folder / name, phantoms)
        configs.append(SiteConfig(name=name, data=str(folder / name), cache=str(folder / "cache"), device="cpu"))
    return tuple(configs)


def run(experiment, configs, output, fleet=None):
    store = RunStore(output)
    try:
        fleet = fleet or InProcessFleet([config.name for config in configs], OpenSites(configs)())
        return run_federation(experiment, fleet, store, lambda: start_state(experiment), resume=True)
    finally:
        store.close()


def instructions(experiment, server_round=1, **options):
    return RoundInstructions(server_round, start_state(experiment).weights, experiment.to_json(), **options)


def test_fedprox_with_mu_zero_is_fedavg_bit_for_bit(hospitals):
    site = Site(hospitals[0])
    zero, small = (site(instructions(tiny(proximal_mu=mu))).delta for mu in (0.0, 1.0))
    experiment = tiny()
    model = new_model(experiment)
    put_weights(model, start_state(experiment).weights)
    by_hand = train_by_hand(model, site, experiment, 1)
    assert same(zero, by_hand)
    assert not same(zero, small)


def train_by_hand(model, site, experiment, server_round, **options):
    """One round of local training without anything of the federation, in place; returns what changed."""
    name = site.config.name
    sampler = PatchSampler(
        site.prepare(experiment).training.cases, experiment.training, derive_seed(0, "patches", name)
    )
    seed_everything(derive_seed(0, "training", server_round, name))
    before = take_weights(model)
    progress = (server_round - 1) / experiment.federation.rounds
    train_locally(model, sampler.epoch(server_round - 1), experiment.training, progress=progress, **options)
    return subtract(take_weights(model), before)


def test_one_site_with_all_cases_is_centralised_training_on_the_same_batches(hospitals, tmp_path):
    experiment = tiny(min_sites=1, rounds=3)
    final = run(experiment, hospitals[:1], tmp_path)
    site = Site(hospitals[0])
    seed_everything(experiment.seed)
    model = new_model(experiment)
    for server_round in (1, 2, 3):
        weights = take_weights(model)
        delta = train_by_hand(model, site, experiment, server_round)
        put_weights(model, {name: weights[name] + delta[name] for name in weights})
    assert same(final.weights, take_weights(model))


def test_workers_and_a_loop_give_the_same_run(hospitals, tmp_path):
    experiment = tiny(proximal_mu=0.1, server_optimizer="momentum")
    run(experiment, hospitals, tmp_path / "loop")
    with WorkerFleet(NAMES, OpenSites(hospitals), 2) as fleet:
        run(experiment, hospitals, tmp_path / "workers", fleet)
    loop, workers = (without_clock(history(tmp_path / name)) for name in ("loop", "workers"))
    assert loop == workers
    assert any(row["name"] == "hd95/liver" for row in loop["metrics"])


def without_clock(kept):
    for row in kept["updates"]:
        if row["training"]:
            training = json.loads(row["training"])
            row["training"] = {key: value for key, value in training.items() if not key.endswith("seconds")}
    return kept


def run_until_killed(configs, output):
    os.environ["FEDSEG_FAULT"] = "store-written:3"
    run(tiny(), configs, output)


def test_a_real_run_killed_in_the_middle_ends_with_the_weights_of_an_undisturbed_one(hospitals, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(
        target=run_until_killed, args=(hospitals, tmp_path / "killed")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = run(tiny(), hospitals, tmp_path / "killed")
    undisturbed = run(tiny(), hospitals, tmp_path / "undisturbed")
    assert digest(resumed.weights) == digest(undisturbed.weights)
    assert without_clock(history(tmp_path / "killed")) == without_clock(history(tmp_path / "undisturbed"))


def test_a_site_that_only_scores_sends_no_weights(hospitals):
    update = Site(hospitals[0])(instructions(tiny(), train=False, surface=True))
    assert update.delta == {}
    assert update.sums["cases"] == 1.0
    assert update.sums["hd95/liver/count"] == 1.0


def test_what_a_site_did_before_does_not_change_its_answer(hospitals):
    experiment = tiny()
    fresh, used = Site(hospitals[0]), Site(hospitals[0])
    used(instructions(experiment, 2))
    Site(hospitals[1])(instructions(experiment))
    assert same(fresh(instructions(experiment)).delta, used(instructions(experiment)).delta)


def test_a_site_with_too_few_cases_abstains(hospitals):
    few = hospitals[0].model_copy(update={"cases": ("phantom_000", "phantom_001")})
    with pytest.raises(SiteAbstained):
        Site(few)(instructions(tiny()))
    answer = answer_safely(Site(few), few.name, instructions(tiny()))
    assert isinstance(answer, SiteFailure)
    assert answer.kind == "abstained"


SECRET = "Mustermann_Erika_1957"


def explode(one):
    raise OSError(f"cannot read /data/{SECRET}.nii.gz")


def abstain(one):
    raise SiteAbstained("too-few-cases", f"{SECRET} has no label")


def run_out(one):
    raise MemoryError(SECRET)


@pytest.mark.parametrize(
    ("site", "kind", "reason"),
    [(explode, "failed", "OSError"), (abstain, "abstained", "too-few-cases"), (run_out, "failed", "MemoryError")],
)
def test_no_error_leaves_a_site_with_its_text(tmp_path, caplog, site, kind, reason):
    def ask(name, one):
        return answer_safely(site, name, one)

    experiment = tiny(min_sites=1, max_attempts=1)
    seen = []
    fleet = InProcessFleet(["A"], lambda name, one: seen.append(ask(name, one)) or seen[-1])
    store = RunStore(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match=reason) as caught:
        run_federation(experiment, fleet, store, lambda: start_state(experiment))
    store.close()
    assert seen == [SiteFailure("A", 1, kind, reason)]
    assert SECRET not in json.dumps(seen[0].header()) + str(caught.value)
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET in caplog.text  # the hospital's own log has the whole story


def test_a_broken_case_is_counted_and_nothing_that_leaves_the_site_names_it(tmp_path):
    folder = tmp_path / "data"
    write_phantoms(folder, PhantomConfig(cases=5, shape=(16, 16, 16), structures=("liver",)))
    listing = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(listing.replace("phantom_002", SECRET))
    for part in ("imagesTr", "labelsTr"):
        (folder / part / "phantom_002.nii.gz").rename(folder / part / f"{SECRET}.nii.gz")
    (folder / "imagesTr" / f"{SECRET}.nii.gz").write_bytes(b"\x1f\x8b damaged")
    config = SiteConfig(name="A", data=str(folder), cache=str(tmp_path / "cache"), device="cpu")
    experiment = tiny(min_sites=1)
    seen = []

    def ask(name, one):
        seen.append(answer_safely(site, name, one))
        return seen[-1]

    site = Site(config)
    run(experiment, (config,), tmp_path / "run", InProcessFleet(["A"], ask))
    assert all(isinstance(answer, SiteUpdate) for answer in seen)
    assert all(sum(answer.quarantined.values()) == 1 for answer in seen)
    assert not any(SECRET.encode() in answer.encode() or b"phantom_0" in answer.encode() for answer in seen)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert SECRET.encode() not in kept
    assert b"phantom_0" not in kept


class Mixed(nn.Module):
    """Half precision, batch statistics, a counter, a scalar, a frozen part, channels-last weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3).to(memory_format=torch.channels_last_3d)
        self.norm = nn.BatchNorm3d(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.small = nn.Parameter(torch.ones(3, dtype=torch.float16))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def test_all_floating_point_tensors_travel_as_float32_and_counters_stay():
    model = Mixed()
    weights = take_weights(model)
    batch_norm = {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert weights.keys() == {"conv.weight", "conv.bias", "scale", "small", "frozen"} | batch_norm
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    assert weights["scale"].shape == ()
    assert buffer_names(model) == {"norm.running_mean", "norm.running_var"}
    assert anchor_of(model).keys() == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "scale", "small"}


def test_taken_weights_are_copies_and_come_back_to_the_last_bit():
    model, other = Mixed(), Mixed()
    weights = take_weights(model)
    kept = {name: array.copy() for name, array in weights.items()}
    with torch.no_grad():
        model.conv.weight.add_(1)
    assert same(weights, kept)
    put_weights(other, weights)
    assert same(take_weights(other), kept)


def test_many_experiments_do_not_keep_their_volumes_open(hospitals):
    site = Site(hospitals[0])
    for rounds in range(1, EXPERIMENTS_OPEN + 3):
        site.prepare(tiny(rounds=rounds))
    assert len(site._data) == EXPERIMENTS_OPEN
    assert (tiny(rounds=rounds).digest(), ()) in site._data


def test_instructions_for_another_network_are_refused_before_any_data_are_read(hospitals):
    nowhere = hospitals[0].model_copy(update={"data": "/nowhere", "cache": "/nowhere/cache"})
    asked = instructions(tiny())
    other = RoundInstructions(1, {**asked.weights, "more": np.zeros(1, np.float32)}, asked.experiment)
    with pytest.raises(ModelError, match=r"\['more'\] differ"):
        Site(nowhere)(other)


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "type"])
def test_weights_of_another_network_are_refused(spoil):
    weights = take_weights(Mixed())
    if spoil == "missing":
        del weights["scale"]
    elif spoil == "unknown":
        weights["more"] = np.zeros(1, np.float32)
    elif spoil == "type":
        weights["scale"] = weights["scale"].astype(np.float64)
    else:
        weights["scale"] = np.zeros(1, np.float32)
    with pytest.raises(ModelError, match="of another network"):
        put_weights(Mixed(), weights)
