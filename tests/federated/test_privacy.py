"""Clipping and noise: by hand, at a site, and through a federation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fedseg.config import Experiment, PrivacyConfig, parse_experiment
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.errors import ConfigError
from fedseg.federated.driver import run_federation
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.networks import start_state
from fedseg.federated.privacy import protect
from fedseg.federated.site import Site
from fedseg.federated.sites import OpenSites
from fedseg.federated.store import RunStore
from fedseg.federated.weights import Weights, norm
from fedseg.site.config import SiteConfig
from tests.federated.toys import ask_toy, changed_fleet, run_toy, same, toy_experiment

THREE_FOUR = {"a": np.array([3.0], np.float32), "b": np.array([[0.0, 4.0]], np.float32)}
"""Of norm 5 over both tensors."""


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_update_is_scaled_to_the_clip_over_all_tensors_together():
    got = protect(THREE_FOUR, PrivacyConfig(clip_norm=2.5), generator())
    assert same(got, {"a": np.array([1.5], np.float32), "b": np.array([[0.0, 2.0]], np.float32)})
    assert norm(got) == 2.5


@pytest.mark.parametrize("clip", [5.0, 5.1, 1e9])
def test_an_update_within_the_clip_leaves_as_it_is(clip: float):
    assert same(protect(THREE_FOUR, PrivacyConfig(clip_norm=clip), generator()), THREE_FOUR)


def test_without_a_clip_nothing_is_done():
    assert protect(THREE_FOUR, PrivacyConfig(), generator()) is THREE_FOUR


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_site_that_stood_still_divides_by_nothing(noise: float):
    zero = {"a": np.zeros(3, np.float32), "b": np.zeros((0, 2), np.float32), "c": np.zeros((), np.float32)}
    got = protect(zero, PrivacyConfig(clip_norm=1.0, noise_multiplier=noise), generator())
    assert all(np.isfinite(array).all() and array.shape == zero[name].shape for name, array in got.items())
    assert same(got, zero) == (noise == 0.0)


def test_the_noise_has_the_standard_deviation_that_was_asked_for():
    size = 200_000
    zero = {"w": np.zeros(size, np.float32)}
    got = protect(zero, PrivacyConfig(clip_norm=2.0, noise_multiplier=1.5), generator())["w"].astype(float)
    assert abs(got.mean()) < 5 * 3.0 / math.sqrt(size)
    assert abs(got.std() - 3.0) < 5 * 3.0 / math.sqrt(2 * size)
    assert abs((np.abs(got) < 3.0).mean() - 0.6827) < 0.01, "one standard deviation of a Gaussian holds 68.27 %"


def test_every_value_gets_noise_of_its_own():
    zero = {"a": np.zeros(100, np.float32), "b": np.zeros((10, 10), np.float32)}
    got = protect(zero, PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0), generator())
    values = np.concatenate([array.reshape(-1) for array in got.values()])
    assert len(np.unique(values)) == 200


def test_noise_comes_after_the_clip_and_is_not_clipped():
    config = PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0)
    noisy = protect(THREE_FOUR, config, generator(7))
    clipped = protect(THREE_FOUR, PrivacyConfig(clip_norm=1.0), generator())
    draws = generator(7)
    by_hand = {
        name: clipped[name] + np.float32(2) * draws.standard_normal(clipped[name].shape, dtype=np.float32)
        for name in sorted(clipped)
    }
    assert same(noisy, by_hand)
    assert norm(protect({"w": np.zeros(10_000, np.float32)}, config, generator())) > 100


def test_the_received_weights_are_not_touched():
    before = {name: array.copy() for name, array in THREE_FOUR.items()}
    protect(THREE_FOUR, PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0), generator())
    assert same(THREE_FOUR, before)


def test_what_is_not_finite_stays_so_for_screening_to_see():
    for value in (np.nan, np.inf):
        with np.errstate(invalid="ignore"):
            got = protect({"w": np.array([value, 1.0], np.float32)}, PrivacyConfig(clip_norm=1.0), generator())
        assert not math.isfinite(norm(got))


def experiment(**privacy: float) -> Experiment:
    document = {
        "name": "tiny",
        "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "data": {"validation_fraction": 0.34},
        "model": {"name": "unet", "options": {"widths": [4, 8], "norm": "instance"}},
        "training": {"patch_size": [8, 8, 8], "learning_rate": 0.01},
        "federation": {"rounds": 2},
        "privacy": privacy,
    }
    return parse_experiment(json.dumps(document))


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ({"noise_multiplier": 1.0}, "noise_multiplier is a multiple of clip_norm; set clip_norm too"),
        ({"clip_norm": 0.0}, "privacy.clip_norm: .*greater than 0"),
        ({"clip_norm": -1.0}, "privacy.clip_norm: .*greater than 0"),
        ({"clip_norm": 1.0, "noise_multiplier": -0.1}, "privacy.noise_multiplier: .*greater than or equal to 0"),
        ({"clip": 1.0}, "privacy.clip: unknown key; did you mean 'clip_norm'"),
    ],
)
def test_an_experiment_that_asks_for_no_privacy_there_can_be_is_refused(privacy: dict[str, float], told: str):
    with pytest.raises(ConfigError, match=told):
        experiment(**privacy)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    folder = tmp_path_factory.mktemp("hospital")
    write_phantoms(folder / "data", PhantomConfig(cases=4, shape=(16, 16, 16), structures=("liver",)))
    return SiteConfig(name="Aare", data=str(folder / "data"), cache=str(folder / "cache"), device="cpu")


def delta_of(site: Site, asked: Experiment) -> Weights:
    return site(RoundInstructions(1, start_state(asked).weights, asked.to_json())).delta


def test_a_hospitals_noise_cannot_be_repeated_and_a_simulations_can(hospital: SiteConfig):
    asked = experiment(clip_norm=1.0, noise_multiplier=0.5)
    real, simulated = Site(hospital), Site(hospital, seeded_noise=True)
    assert not same(delta_of(real, asked), delta_of(real, asked))
    assert same(delta_of(simulated, asked), delta_of(Site(hospital, seeded_noise=True), asked))


def test_noise_differs_between_sites_and_rounds_of_a_simulation(hospital: SiteConfig):
    draws = [
        Site(config, seeded_noise=True)._noise(0, server_round).standard_normal()
        for config in (hospital, hospital.model_copy(update={"name": "Elbe"}))
        for server_round in (1, 2)
    ]
    assert len(set(draws)) == 4


def test_what_leaves_a_site_is_no_longer_than_its_clip(hospital: SiteConfig):
    free, clipped = (delta_of(Site(hospital), experiment(**privacy)) for privacy in ({}, {"clip_norm": 0.01}))
    assert norm(free) > 0.01
    assert norm(clipped) == pytest.approx(0.01, rel=1e-5)


def test_an_enormous_clip_is_no_clip_to_the_last_bit(tmp_path):
    def clipped(site, instructions, answer):
        return replace(answer, delta=protect(answer.delta, PrivacyConfig(clip_norm=1e9), generator()))

    plain = run_toy(toy_experiment(), tmp_path / "plain")
    huge = run_toy(toy_experiment(), tmp_path / "huge", changed_fleet(clipped, ask=ask_toy))
    assert same(plain.weights, huge.weights)


def test_an_enormous_clip_at_real_sites_is_no_clip_to_the_last_bit(hospital: SiteConfig):
    assert same(*(delta_of(Site(hospital), experiment(**privacy)) for privacy in ({}, {"clip_norm": 1e9})))


def test_a_federation_with_noise_ends_with_weights_and_scores_that_are_finite(hospital: SiteConfig, tmp_path):
    configs = (hospital, hospital.model_copy(update={"name": "Elbe"}))
    asked = experiment(clip_norm=0.5, noise_multiplier=0.01)
    store = RunStore(tmp_path)
    try:
        fleet = InProcessFleet([config.name for config in configs], OpenSites(configs)())
        final = run_federation(asked, fleet, store, lambda: start_state(asked))
        statuses = {row["status"] for row in store.rows("SELECT status FROM updates")}
    finally:
        store.close()
    assert math.isfinite(norm(final.weights))
    assert final.server_round == 2
    assert len(statuses) == 1, "every update was accepted"
